# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of routing purity: how well routes agree with known domains."""

import math

import numpy as np
import pytest
from sklearn.metrics import adjusted_mutual_info_score

from modeling_cse.evaluation import RoutingPurity, routing_purity, sequence_routes


ROUTES = [-1, -1, -1, 0, 0, 0, 1, 1]
DOMAINS = ["general", "general", "legal", "legal", "legal", "general", "medical", "medical"]


def test_purity_is_the_share_that_a_majority_vote_of_each_route_gets_right():
    result = routing_purity(ROUTES, DOMAINS)
    assert result["purity"] == pytest.approx(6 / 8)  # 2 of 3, 2 of 3, 2 of 2
    assert result["normalised_purity"] == pytest.approx((6 / 8 - 3 / 8) / (1 - 3 / 8))
    assert result["adjusted_mutual_information"] == pytest.approx(adjusted_mutual_info_score(DOMAINS, ROUTES))


def test_perfect_routes_reach_one_and_a_single_route_nothing():
    perfect = routing_purity([{"general": -1, "legal": 3, "medical": 0}[name] for name in DOMAINS], DOMAINS)
    assert list(perfect.values()) == pytest.approx([1, 1, 1])
    single = routing_purity([2] * 8, DOMAINS)
    assert single == pytest.approx({"purity": 3 / 8, "normalised_purity": 0, "adjusted_mutual_information": 0})


def test_a_single_domain_has_no_normalised_purity():
    assert math.isnan(routing_purity([0, 1], ["general", "general"])["normalised_purity"])


def test_the_metric_says_the_same_in_batches():
    metric = RoutingPurity()
    metric.add_batch(predictions=ROUTES[:5], references=DOMAINS[:5])
    metric.add_batch(predictions=ROUTES[5:], references=DOMAINS[5:])
    assert metric.compute() == routing_purity(ROUTES, DOMAINS)
    assert metric.compute(predictions=[0, 1], references=["a", "b"])["purity"] == 1


def test_a_sequences_route_is_its_most_frequent_expert():
    experts = np.array([[-1, 0, 0, 2], [-1, -1, 1, 1], [3, 3, 2, 2], [5, -1, 5, -1]], np.int8)
    assert sequence_routes(experts).tolist() == [0, -1, 2, -1]
    assert sequence_routes(np.full((2, 3), -1)).tolist() == [-1, -1]


def test_impossible_routes_are_refused():
    for routes, domains in (([], []), ([1], ["a", "b"]), ([[1]], [["a"]])):
        with pytest.raises(ValueError, match="is not allowed"):
            routing_purity(routes, domains)
    for experts in ([1, 2], np.zeros((2, 0)), [[-2, 0]]):
        with pytest.raises(ValueError, match="is not allowed"):
            sequence_routes(np.asarray(experts))
