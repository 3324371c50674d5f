# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""How well routes agree with known domains (METHOD section 3)."""

import math
from collections.abc import Sequence

import datasets
import evaluate
import numpy as np
from sklearn.metrics import adjusted_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix

from .metric import InMemoryMetric


def sequence_routes(experts: np.ndarray) -> np.ndarray:
    """
    The route of a sequence: the most frequent of its tokens' experts, the lower one where two are equally frequent.

    Args:
        experts: (N, T) integers from -1, the expert of every token, -1 for the base; T at least 1.

    Returns:
        (N,) int64.
    """
    experts = np.asarray(experts).astype(np.int64)
    if experts.ndim != 2 or not experts.shape[1] or (experts.size and experts.min() < -1):
        raise ValueError(f"experts of shape {experts.shape} is not allowed: it must be (N, T) of numbers from -1.")
    kinds = np.arange(-1, experts.max(initial=-1) + 1)
    return kinds[np.stack([(experts == kind).sum(1) for kind in kinds]).argmax(0)]


def routing_purity(routes: Sequence[int], domains: Sequence[str]) -> dict[str, float]:
    """
    Args:
        routes: (N,) integers, the expert of each sequence or token.
        domains: (N,) the domain of each.

    Returns:
        `purity`: share of those whose domain is the most frequent one of their route, which no route at all has too
            as large as the largest domain is;
        `normalised_purity`: (purity - largest domain) / (1 - largest domain), 0 where routes tell nothing more than
            that, 1 where each has one domain; NaN with a single domain;
        `adjusted_mutual_information`: of scikit-learn, 0 in expectation by chance, 1 for the same partition. It falls
            also where domains share a route, as those without an expert do.

    Raises:
        ValueError: nothing is given, or not as many routes as domains.
    """
    routes, domains = np.asarray(routes), np.asarray(domains)
    if routes.ndim != 1 or routes.shape != domains.shape or not len(routes):
        raise ValueError(f"routes of shape {routes.shape} is not allowed for domains of shape {domains.shape}.")
    counts = contingency_matrix(domains, routes)
    purity = float(counts.max(axis=0).sum() / len(routes))
    largest = float(counts.sum(axis=1).max() / len(routes))
    return {
        "purity": purity,
        "normalised_purity": (purity - largest) / (1 - largest) if largest < 1 else math.nan,
        "adjusted_mutual_information": float(adjusted_mutual_info_score(domains, routes)),
    }


class RoutingPurity(InMemoryMetric):
    """
    Purity of routes and their adjusted mutual information with domains; see `routing_purity`. One row is one sequence
    (`sequence_routes` makes its route), or one token with the domain of its sequence.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Purity of routes, and their adjusted mutual information with domains.",
            citation="",
            inputs_description=(
                "\nArgs:\n"
                "    predictions: the expert of each sequence or token, -1 for the base (int64).\n"
                "    references: the name of its domain (string).\n"
            ),
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: Sequence[int], references: Sequence[str]) -> dict[str, float]:
        return routing_purity(predictions, references)


__all__ = ["RoutingPurity", "routing_purity", "sequence_routes"]
