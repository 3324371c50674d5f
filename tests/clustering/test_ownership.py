# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of ownership: an expert keeps its domain, does not flicker, and is never given to a stranger as it is."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from modeling_cse.clustering import Identities, assign_experts, find_clusters, long_tail, match_clusters


CENTROIDS = (10 * np.eye(4, 6)).astype(np.float32)
RADII = np.ones(4, np.float32)
SHARES = np.array([0.6, 0.2, 0.15, 0.05])


def assign(
    identities=None, centroids=CENTROIDS, shares=SHARES, *, slots: int = 4, share: float | str = 0.5, patience=3
):
    identities = Identities.none(6) if identities is None else identities
    radii = np.ones(len(centroids), np.float32)
    return assign_experts(
        identities, centroids, radii, np.asarray(shares), common_share=share, num_experts=slots, patience=patience
    )


@pytest.mark.parametrize(
    ("common_share", "tail"),
    [(0.0, [1, 1, 1, 1]), (0.1, [0, 1, 1, 1]), (0.6, [0, 1, 1, 1]), (0.61, [0, 0, 1, 1]), (1.0, [0, 0, 0, 0])],
)
def test_common_are_the_largest_until_they_hold_the_share(common_share, tail):
    assert long_tail(SHARES, common_share).tolist() == [bool(flag) for flag in tail]


def test_long_tail_does_not_ask_for_an_order():
    assert long_tail(np.array([0.05, 0.6, 0.15, 0.2]), 0.7).tolist() == [True, False, True, False]


def test_share_of_one_is_common_in_spite_of_rounding():
    shares = np.full(10, 0.1)
    assert not long_tail(shares / shares.sum(), 1.0).any()


@pytest.mark.parametrize(
    ("separations", "common_share", "tail"),
    [
        ([0.1, 0.2, 0.3, 0.4], 0.5, [0, 1, 1, 1]),
        ([0.4, 0.1, 0.2, 0.3], 0.4, [1, 0, 0, 0]),  # the largest stands apart, the others hold 0.4
        ([0.4, 0.1, 0.3, 0.0], 0.4, [1, 0, 0, 0]),
        ([0.0, 0.0, 0.0, 0.0], 0.5, [0, 1, 1, 1]),
    ],
)
def test_with_separations_the_least_separated_are_common(separations, common_share, tail):
    found = long_tail(SHARES, common_share, np.array(separations))
    assert found.tolist() == [bool(flag) for flag in tail]


def test_with_separations_the_first_slots_are_for_what_tells_most_in_all():
    """Share times separation: 0.2 * 0.1, 0.15 * 0.3, 0.05 * 0.5."""
    options = {"common_share": 0.5, "num_experts": 2, "patience": 3, "separations": np.array([0.05, 0.1, 0.3, 0.5])}
    found = assign_experts(Identities.none(6), CENTROIDS, RADII, SHARES, **options)
    assert found.experts.tolist() == [-1, -1, 0, 1] and found.unserved == 1


# Shares, and how many of them are at or under their elbow.
ELBOWS = {
    "one large, several small": ([0.62, 0.1, 0.09, 0.08, 0.06, 0.05], 5),
    "two large, several small": ([0.45, 0.3, 0.08, 0.07, 0.06, 0.04], 4),
    "the largest of equally deep ones": ([0.5, 0.125, 0.125, 0.125, 0.125], 4),
    "a long slope after the drop": ([0.4, 0.22, 0.12, 0.1, 0.08, 0.05, 0.03], 5),
    "three, the middle one deep": ([0.8, 0.15, 0.05], 2),
    "three, the middle one high": ([0.5, 0.45, 0.05], 0),
    "several large, one small": ([0.33, 0.32, 0.3, 0.05], 0),
    "along a line": ([0.4, 0.3, 0.2, 0.1], 0),
    "equal": ([0.1] * 10, 0),
    "two": ([0.9, 0.1], 0),
    "one": ([1.0], 0),
}


@pytest.mark.parametrize("name", ELBOWS)
def test_long_tail_begins_at_the_elbow(name):
    shares, count = ELBOWS[name]
    expected = np.arange(len(shares)) >= len(shares) - count
    np.testing.assert_array_equal(long_tail(np.array(shares), "elbow"), expected)
    order = np.random.default_rng(0).permutation(len(shares))
    np.testing.assert_array_equal(long_tail(np.array(shares)[order], "elbow"), expected[order])


def test_the_elbow_is_furthest_below_the_chord_of_the_sorted_shares():
    random = np.random.default_rng(0)
    for count in range(3, 12):
        shares = np.sort(random.dirichlet(np.full(count, 0.5)))[::-1]
        chord = [shares[0] + (shares[-1] - shares[0]) * rank / (count - 1) for rank in range(count)]
        below = [line - share for line, share in zip(chord, shares, strict=True)]
        expected = count - below.index(max(below)) if max(below) > 1e-6 else 0
        assert long_tail(shares, "elbow").sum() == expected


def test_clusters_of_equal_share_are_on_one_side_of_the_elbow():
    sizes = np.array([700, 60, 60, 60, 60, 60])
    assert long_tail(sizes / sizes.sum(), "elbow").tolist() == [False] + [True] * 5


def test_experts_go_to_what_is_under_the_elbow():
    ownership = assign(shares=np.array([0.5, 0.35, 0.08, 0.07]), share="elbow")
    assert ownership.experts.tolist() == [-1, -1, 0, 1]


def test_first_fit_gives_slots_to_the_largest_of_the_tail():
    ownership = assign()
    assert ownership.experts.tolist() == [-1, 0, 1, 2]
    assert ownership.filled == [0, 1, 2] and ownership.unserved == 0


def test_slots_run_out():
    ownership = assign(slots=2)
    assert ownership.experts.tolist() == [-1, 0, 1, -1]
    assert ownership.filled == [0, 1] and ownership.unserved == 1
    again = assign(ownership.identities, slots=2)
    assert again.experts.tolist() == [-1, 0, 1, -1] and again.filled == [] and again.unserved == 1


@pytest.mark.parametrize("order", [[3, 2, 1, 0], [1, 0, 3, 2], [2, 3, 0, 1]])
def test_clusters_in_another_order_keep_their_experts(order):
    first = assign()
    again = assign(first.identities, CENTROIDS[order], SHARES[order])
    assert again.experts.tolist() == first.experts[order].tolist() and again.filled == []


def test_drift_of_all_states_keeps_experts():
    first = assign()
    moved = CENTROIDS[[2, 0, 3, 1]] + 25
    again = assign(first.identities, moved.astype(np.float32), SHARES[[2, 0, 3, 1]])
    assert again.experts.tolist() == [1, -1, 2, 0] and again.filled == []


def test_a_stranger_does_not_inherit():
    """Its domain is another one: the slot of the old one waits for it, and a fresh slot is filled."""
    first = assign()
    centroids = CENTROIDS.copy()
    centroids[2] = [0, 0, 0, 0, 9, 9]
    matched = match_clusters(CENTROIDS, RADII, centroids, RADII)
    assert matched[2] == -1
    again = assign(first.identities, centroids)
    assert again.experts[2] not in first.experts and again.filled == [int(again.experts[2])]


def test_nothing_matches_nothing():
    assert match_clusters(np.zeros((0, 6)), np.zeros(0), CENTROIDS, RADII).tolist() == [-1] * 4


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_an_owner_that_turns_common_keeps_its_expert_for_a_while(patience):
    state = assign().identities
    common = np.array([0.3, 0.5, 0.15, 0.05])  # the second cluster, owner of slot 0, now is the largest
    for fit in range(1, patience + 1):
        ownership = assign(state, shares=common, patience=patience)
        assert ownership.experts[1] == (0 if fit < patience else -1)
        state = ownership.identities
    back = assign(state, patience=patience)
    assert back.experts[1] >= 0 and back.filled == [int(back.experts[1])]


def test_coming_back_from_common_starts_the_count_anew():
    state, common = assign().identities, np.array([0.3, 0.5, 0.15, 0.05])
    for shares in (common, common, SHARES, common, common, SHARES):
        ownership = assign(state, shares=shares)
        assert ownership.experts[1] == 0 and 0 not in ownership.filled
        state = ownership.identities


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_an_absent_owner_keeps_its_expert_for_a_while(patience):
    state = assign().identities
    present, shares = CENTROIDS[:3], SHARES[:3] / SHARES[:3].sum()
    for _ in range(patience - 1):
        state = assign(state, present, shares, patience=patience).identities
    back = assign(state, patience=patience)
    assert back.experts.tolist() == [-1, 0, 1, 2] and back.filled == []
    for _ in range(patience):
        state = assign(state, present, shares, patience=patience).identities
    late = assign(state, patience=patience)
    assert late.filled == [int(late.experts[3])]


def test_the_slot_of_an_absent_owner_is_not_given_away_while_it_is_kept():
    first = assign(slots=3)
    centroids = CENTROIDS.copy()
    centroids[3] = [0, 0, 0, 0, 9, 9]
    state = first.identities
    for fit in (1, 2, 3):
        ownership = assign(state, centroids, slots=3)
        assert ownership.unserved == (1 if fit < 3 else 0)
        state = ownership.identities
    assert ownership.experts[3] == 2 and ownership.filled == [2]


def test_no_slot_has_two_owners():
    random = np.random.default_rng(0)
    state = Identities.none(6)
    for _ in range(60):
        count = random.integers(1, 8)
        shares = random.dirichlet(np.ones(count))
        centroids = (3 * random.standard_normal((count, 6))).astype(np.float32)
        ownership = assign(state, centroids, shares, share=random.random())
        owned = [expert for expert in ownership.identities.experts if expert >= 0]
        assert len(set(owned)) == len(owned) and set(ownership.filled) <= set(ownership.experts)
        assert ((0 <= ownership.identities.idle) & (ownership.identities.idle < 3)).all()
        state = ownership.identities


def test_without_matching_most_sequences_would_change_their_expert():
    """Ten fits of the same text, each on a sample of its own: k-means numbers its clusters anew every time, and sizes
    of rare domains trade places. Matched, every held sequence of the long tail keeps its expert."""
    random = np.random.default_rng(0)
    centres = 6 * np.eye(8)[:5]

    def sample(count: int) -> tuple[np.ndarray, np.ndarray]:
        domains = random.choice(5, size=count, p=[0.52, 0.12, 0.12, 0.12, 0.12])
        return centres[domains] + random.normal(size=(count, 8)), domains

    held, domains = sample(300)
    held = held[domains > 0]
    remembered, owners = Identities.none(8), {"matched": [], "by size": []}
    options = {"common_share": 0.4, "num_experts": 4, "patience": 3}
    for fit in range(10):
        found = find_clusters(sample(400)[0].astype(np.float32), "kmeans", 5, seed=fit)
        own = cdist(held, found.centroids).argmin(1)
        described = (found.centroids, found.radii, found.shares)
        matched = assign_experts(remembered, *described, **options)
        remembered = matched.identities
        owners["matched"].append(matched.experts[own])
        owners["by size"].append(assign_experts(Identities.none(8), *described, **options).experts[own])
    churn = {way: np.mean(np.diff(experts, axis=0) != 0) for way, experts in owners.items()}
    assert churn["matched"] < 0.02 and churn["by size"] > 0.5
