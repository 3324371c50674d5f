# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Cluster labels that come from outside the model, for the controls: random routes, and routes by known domains.

A model with `cse_routing="given"` reads them from the column `given_clusters`.
"""

import hashlib
import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, IterableDataset, Value

from .packing import DOMAIN_COLUMN


CLUSTER_COLUMN = "given_clusters"
OTHER = -1

# See packing.py: raise it with every change to what comes out.
_VERSION = 1


def label_at_random(
    dataset: Dataset | IterableDataset, shares: Sequence[float], seed: int
) -> Dataset | IterableDataset:
    """
    The control "random routing with the same cluster sizes": every sequence gets a cluster that has nothing to do with
    its text, the same one whenever it is seen.

    A keyed hash (BLAKE2b) of its tokens gives a number that is uniform on [0, 1), and the cumulative shares the
    cluster. So a label depends on tokens, seed and shares alone, not on place, batch, process or machine; equal
    sequences have equal labels. Shares are met on average over sequences that differ.

    Args:
        dataset: sequences with `input_ids` (T,), from `pack` for example.
        shares: share of each cluster, at least one, not negative, with the sum 1. Those of the run to compare with are
            its `cluster_sizes` over their sum.
        seed: an int from 0 to 2**64 - 1; another one gives labels that are independent of these.

    Returns:
        The data with a column `given_clusters`, int64, from 0 to `len(shares) - 1`.

    Raises:
        ValueError: wrong shares or seed, no `input_ids`, or labels there already.
    """
    _check_columns(dataset, "input_ids")
    return _with_labels(dataset, _RandomLabels(_checked_shares(shares), _checked_seed(seed)))


def label_by_domain(
    dataset: Dataset | IterableDataset, domains: Sequence[str], *, every_domain: bool = True
) -> Dataset | IterableDataset:
    """
    The control "oracle": every sequence gets the cluster of its domain.

    A domain that is not in the list gets -1, which is no cluster: its text goes through the base module. That is what
    general text is for in this method, and what text of an unseen domain must do in validation, so it is no mistake;
    a listed domain that no row has is one in a `Dataset` (a misspelled name would silently switch its expert off).

    Args:
        dataset: sequences with a column `domain`, from `pack(..., domain_column=...)` for example.
        domains: names of the domains, each once; the place of a name is its label.
        every_domain: whether each of them must have a row; False for one split of several that share their names.

    Returns:
        The data with a column `given_clusters`, int64, from -1 to `len(domains) - 1`.

    Raises:
        ValueError: domains that are no list of different names, or (`every_domain`) of which a `Dataset` lacks one; no
            column `domain`, or labels there already. A row without a domain, when it is read.
    """
    names = [] if isinstance(domains, str) else list(domains)
    if not names or not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
        raise ValueError(f"domains={domains!r} is not allowed: it must be a list of different names, at least one.")
    _check_columns(dataset, DOMAIN_COLUMN)
    feature = (dataset.features or {}).get(DOMAIN_COLUMN)
    labels = _DomainLabels(names, feature.names if isinstance(feature, ClassLabel) else None)
    if every_domain and isinstance(dataset, Dataset):
        found = {labels.name_of(value) for value in dataset.unique(DOMAIN_COLUMN)}
        missing = [name for name in names if name not in found]
        if missing:
            raise ValueError(f"domains={names!r} is not allowed: no row is of {missing}, they are of {sorted(found)}.")
    return _with_labels(dataset, labels)


def _with_labels(dataset: Dataset | IterableDataset, labels) -> Dataset | IterableDataset:
    # a stream need not know its columns
    features = Features({**dataset.features, CLUSTER_COLUMN: Value("int64")}) if dataset.features else None
    description = {"desc": "Labelling"} if isinstance(dataset, Dataset) else {}
    return dataset.map(labels, batched=True, features=features, **description)


class _RandomLabels:
    """Batch of rows to batch of labels by hash."""

    def __init__(self, shares: list[float], seed: int) -> None:
        self.version = _VERSION
        # Over their sum, the bound of the last cluster with a share is exactly 1, and no number reaches it.
        sums = np.cumsum(shares)
        self.bounds = (sums / sums[-1]).tolist()
        self.key = seed.to_bytes(8, "little")

    def __call__(self, batch: dict[str, list]) -> dict[str, list[int]]:
        return {CLUSTER_COLUMN: [self.label_of(ids) for ids in batch["input_ids"]]}

    def label_of(self, ids: Sequence[int]) -> int:
        # One width and byte order, whatever the data set stores and the machine prefers.
        digest = hashlib.blake2b(np.asarray(ids, dtype="<i8").tobytes(), digest_size=8, key=self.key).digest()
        number = (int.from_bytes(digest, "little") >> 11) * 2.0**-53
        return bisect_right(self.bounds, number)


class _DomainLabels:
    """Batch of rows to batch of labels by name."""

    def __init__(self, domains: list[str], class_names: list[str] | None) -> None:
        self.version = _VERSION
        self.labels = {name: label for label, name in enumerate(domains)}
        self.class_names = class_names

    def __call__(self, batch: dict[str, list]) -> dict[str, list[int]]:
        return {CLUSTER_COLUMN: [self.labels.get(self.name_of(value), OTHER) for value in batch[DOMAIN_COLUMN]]}

    def name_of(self, value: Any) -> str:
        if value is None:
            raise ValueError(f"column {DOMAIN_COLUMN!r} has rows without a value; every row needs one.")
        return self.class_names[value] if self.class_names is not None else str(value)


def _check_columns(dataset: Dataset | IterableDataset, needed: str) -> None:
    if not isinstance(dataset, Dataset | IterableDataset):
        raise ValueError(f"dataset is a {type(dataset).__name__}; it must be one split, a Dataset or IterableDataset.")
    columns = dataset.column_names or list(next(iter(dataset), {}))
    if needed not in columns:
        raise ValueError(f"dataset has no column {needed!r}; it has {columns}.")
    if CLUSTER_COLUMN in columns:
        raise ValueError(f"dataset has a column {CLUSTER_COLUMN!r} already: remove it first.")


def _checked_shares(shares: Sequence[float]) -> list[float]:
    try:
        values = [float(share) for share in shares]
    except (TypeError, ValueError):
        values = []
    # `not` rather than the opposite comparison: it catches NaN too
    if not values or not all(value >= 0 for value in values) or not math.isclose(sum(values), 1.0, abs_tol=1e-6):
        raise ValueError(
            f"shares={shares!r} is not allowed: it must be one number or more, none negative, with the sum 1."
        )
    return values


def _checked_seed(seed: int) -> int:
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**64:
        raise ValueError(f"seed={seed!r} is not allowed: it must be an int from 0 to 2**64 - 1.")
    return seed


__all__ = ["CLUSTER_COLUMN", "label_at_random", "label_by_domain"]
