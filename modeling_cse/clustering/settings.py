# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""What a user decides about clusters: values are checked when set, and defaults that depend on others resolved."""

from dataclasses import dataclass, replace


# These look for a number of clusters that is given, ...
CENTROID_ALGORITHMS = ("kmeans", "spherical")
# ... and these for regions as dense as the sample asks for, however many there are.
DENSITY_ALGORITHMS = ("dbscan", "hdbscan")
# The labels that come with the batches: domains that are known, or a control.
GIVEN = "given"
# k-means on what texts are about, by their tokens.
TEXT = "text"
ALGORITHMS = (TEXT, *CENTROID_ALGORITHMS, *DENSITY_ALGORITHMS, GIVEN)

NUM_CLUSTERS = 6
NUM_TEXT_CLUSTERS = 10
COMMON_SHARE = 0.7
COMMON_TEXT_SHARE = 0.75

ELBOW = "elbow"
# What makes a cluster common: its size, or that its words are those of all text.
SIZE = "size"
SEPARATION = "separation"
COMMON_BY = (SIZE, SEPARATION)
DENSITY_PROJECTION = 32
DENSITY_MIN_SHARE = 0.02


@dataclass
class ClusterSettings:
    """
    How clusters are found and kept, checked when made.

    Fields:
        algorithm: one of `ALGORITHMS`; None stands for text where routes are read from evidence, else for kmeans.
        num_clusters: for kmeans, spherical and text how many to look for, at least 1, or a pair (low, high), low at
            least 2: the number between them, both included, with the largest silhouette. None stands for 6 there (10
            for text), and is all that the others take, which find their number themselves. A list, as YAML has it,
            becomes a tuple.
        common_share: clusters are common, in the order of `common_by`, until together they hold this share, 0 to 1; or
            "elbow", see `long_tail`. None stands for 0.75 with text, else for 0.7.
        patience: fits in a row an owner may be absent or common before it loses its expert, at least 1.
        seed: of clustering and of fresh expert weights, below 2 ** 32.
        projection: dimensions of a Gaussian random projection before any distance is taken (the paper does so), None
            for none. "auto": none for kmeans and spherical, 32 for dbscan and hdbscan.
        min_cluster_share: the smallest share of the sequences, 0 to 1, that dbscan and hdbscan call a cluster; None
            stands for 0.02. The other algorithms do not read it, and refuse it.
        common_by: "size": the largest clusters are common. "separation" (text only): those are whose words are most
            like all text's (`evidence.separations`); of the others those get experts first whose words tell most in
            all, separation times share. None stands for separation with text, but for size with an elbow, which is one
            of sizes; else for size.

    Raises:
        ValueError: a value that is not allowed, or not allowed beside this algorithm.
    """

    algorithm: str | None = None
    num_clusters: int | tuple[int, int] | None = None
    common_share: float | str | None = None
    patience: int = 3
    seed: int = 0
    projection: int | str | None = "auto"
    min_cluster_share: float | None = None
    common_by: str | None = None

    def __post_init__(self):
        if self.algorithm is not None and self.algorithm not in ALGORITHMS:
            raise ValueError(f"algorithm={self.algorithm!r} is not allowed: it must be one of {list(ALGORITHMS)}.")
        if isinstance(self.num_clusters, list):
            self.num_clusters = tuple(self.num_clusters)
        self._check_num_clusters()
        if self.common_share not in (None, ELBOW) and not is_share(self.common_share):
            raise ValueError(
                f"common_share={self.common_share!r} is not allowed: it must be from 0 to 1, or {ELBOW!r}."
            )
        self._check_common_by()
        if not is_count(self.patience, 1):
            raise ValueError(f"patience={self.patience!r} is not allowed: it must be an int >= 1.")
        if not is_count(self.seed, 0) or self.seed >= 2**32:
            raise ValueError(f"seed={self.seed!r} is not allowed: it must be an int >= 0 and below 2 ** 32.")
        if self.algorithm in (GIVEN, TEXT) and self.projection not in (None, "auto"):
            raise ValueError(
                f"projection={self.projection!r} is not allowed with algorithm={self.algorithm!r}: "
                + ("labels need no distance." if self.algorithm == GIVEN else "texts have a space of their own.")
            )
        if self.projection is not None and self.projection != "auto" and not is_count(self.projection, 1):
            raise ValueError(
                f"projection={self.projection!r} is not allowed: it must be an int >= 1, None for no projection, or "
                "'auto'."
            )
        if self.min_cluster_share is None:
            return
        if not self.density:
            raise ValueError(
                f"min_cluster_share={self.min_cluster_share!r} is not allowed with algorithm={self.algorithm!r}: only "
                f"{list(DENSITY_ALGORITHMS)} read it."
            )
        if not is_share(self.min_cluster_share):
            raise ValueError(f"min_cluster_share={self.min_cluster_share!r} is not allowed: it must be from 0 to 1.")

    def _check_common_by(self) -> None:
        allowed = [SIZE] if self.algorithm not in (None, TEXT) or self.common_share == ELBOW else list(COMMON_BY)
        if self.common_by not in (None, *allowed):
            others = {"algorithm": self.algorithm, "common_share": self.common_share}
            beside = " and ".join(f"{name}={value!r}" for name, value in others.items() if value is not None)
            refused = f"common_by={self.common_by!r} is not allowed" + (f" with {beside}" if beside else "")
            raise ValueError(f"{refused}: it must be None or one of {allowed}.")

    def _check_num_clusters(self) -> None:
        value = self.num_clusters
        if value is None:
            return
        if self.algorithm not in (None, TEXT, *CENTROID_ALGORITHMS):
            right, allowed = False, "None, because their number is found, not asked for"
        else:
            right = is_count(value, 1) or (
                isinstance(value, tuple)
                and len(value) == 2
                and all(is_count(end, 2) for end in value)
                and value[0] <= value[1]
            )
            allowed = "an int >= 1, or a pair (low, high) with 2 <= low <= high"
        if not right:
            raise ValueError(
                f"num_clusters={value!r} is not allowed with algorithm={self.algorithm!r}: it must be {allowed}."
            )

    def resolve(self, routing: str) -> "ClusterSettings":
        """The same with the defaults filled in that depend on how routes are read (`cse_routing`).

        Raises:
            ValueError: a value that is not allowed beside the algorithm.
        """
        algorithm = self.algorithm or (TEXT if routing == "evidence" else CENTROID_ALGORITHMS[0])
        share, by = (COMMON_TEXT_SHARE, SEPARATION) if algorithm == TEXT else (COMMON_SHARE, SIZE)
        share = share if self.common_share is None else self.common_share
        return replace(
            self,
            algorithm=algorithm,
            common_share=share,
            common_by=(SIZE if share == ELBOW else by) if self.common_by is None else self.common_by,
        )

    @property
    def density(self) -> bool:
        """Whether the algorithm looks for dense regions, and may call sequences noise."""
        return self.algorithm in DENSITY_ALGORITHMS

    @property
    def cluster_range(self) -> tuple[int, int] | None:
        """The least and the most clusters that are asked for, the same where it is one number; None where the
        algorithm finds it."""
        if self.algorithm not in (None, TEXT, *CENTROID_ALGORITHMS):
            return None
        default = NUM_TEXT_CLUSTERS if self.algorithm == TEXT else NUM_CLUSTERS
        asked = default if self.num_clusters is None else self.num_clusters
        return (asked, asked) if isinstance(asked, int) else asked

    @property
    def smallest_share(self) -> float | None:
        """`min_cluster_share` with its default filled in; None for algorithms that have no such bound."""
        if self.density and self.min_cluster_share is None:
            return DENSITY_MIN_SHARE
        return self.min_cluster_share

    def projected_width(self, width: int) -> int | None:
        """
        Dimensions to project embeddings of `width` dimensions to, None for no projection. The default of the density
        algorithms is passed over where there is nothing to reduce.

        Raises:
            ValueError: a projection that was asked for has more dimensions than there are.
        """
        asked = self.projection
        if isinstance(asked, str):  # "auto"
            return DENSITY_PROJECTION if self.density and DENSITY_PROJECTION < width else None
        if asked is not None and asked > width:
            raise ValueError(
                f"projection={asked} is not allowed for embeddings of {width} dimensions: it must be at "
                f"most {width}, or None."
            )
        return asked


def is_count(value: object, least: int) -> bool:
    """Whether it is an int, no bool, of at least so much."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_share(value: object) -> bool:
    """Whether it is a number, no bool, from 0 to 1."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
