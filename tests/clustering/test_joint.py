# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of a clustering that all sites share: owners keep their texts, however clusters are numbered."""

import numpy as np
import pytest
from text_rows import VOCAB, texts

from modeling_cse.clustering import ClusterSettings, Identities, fit_texts, held_out
from modeling_cse.clustering.evidence import log_ratios
from modeling_cse.clustering.joint import LEAST_OVERLAP, match_texts
from modeling_cse.clustering.texts import count_tokens


def fit(ids, given=None, identities=None, num_experts: int = 4, older=None, older_given=None, **settings):
    options = {"algorithm": "text", "num_clusters": 3, "common_share": 0.4, **settings}
    if given is None:
        given = np.full(len(ids), -1, np.int64)
    identities = Identities.none(VOCAB) if identities is None else identities
    sizes = {"vocab_size": VOCAB, "num_experts": num_experts, "max_clusters": 16}
    more = {"older": older, "older_given": older_given}
    return fit_texts(ids, given, held_out(len(ids)), ClusterSettings(**options), identities, **sizes, **more)


def expert_of_domains(found, domains) -> list[int]:
    """The expert of each domain, -1 for the base."""
    assert all(len(set(found.labels[domains == domain])) == 1 for domain in set(domains))
    return [int(found.ownership.experts[found.labels[domains == domain][0]]) for domain in sorted(set(domains))]


def test_the_largest_cluster_is_common_and_the_others_own_an_expert():
    ids, domains = texts()
    found = fit(ids)
    experts = expert_of_domains(found, domains)
    assert experts[0] == -1 and sorted(experts[1:]) == [0, 1] and sorted(found.ownership.filled) == [0, 1]
    assert found.metrics["text_clarity"] > 1 and "churn" not in found.metrics
    np.testing.assert_array_equal(found.evidence.of_texts(ids), found.labels)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_owners_stay_when_clusters_are_numbered_anew(seed):
    ids, domains = texts()
    first = fit(ids)
    fresh, others = texts((2, 3, 3), seed=seed)
    second = fit(fresh, identities=first.ownership.identities, seed=seed, common_share=0.0)
    wanted = expert_of_domains(first, domains)
    assert expert_of_domains(second, others)[1:] == wanted[1:]
    assert 0 <= second.metrics["churn"] <= 1 and second.ownership.filled == [2]


def test_older_texts_are_counted_for_the_cluster_that_evidence_gives_them():
    ids, domains = texts(count=48)
    older, _ = texts(count=400, seed=9)
    found, more = fit(ids), fit(ids, older=older)
    np.testing.assert_array_equal(more.labels, found.labels)
    np.testing.assert_array_equal(more.ownership.experts, found.ownership.experts)
    every = np.concatenate([ids[~found.held], np.pad(older, ((0, 0), (0, ids.shape[1] - older.shape[1])))])
    labels = np.concatenate([found.labels[~found.held], found.evidence.of_texts(older)])
    table = log_ratios(count_tokens(every, VOCAB), labels, 3, found.evidence.smoothing) * found.evidence.temper
    seen = np.isin(np.arange(VOCAB), every)
    np.testing.assert_allclose(more.evidence.table[seen], table[seen], rtol=1e-5, atol=1e-6)
    assert not more.evidence.table[~seen].any()
    unseen, of_unseen = texts(count=400, seed=11)
    right = [(each.evidence.of_texts(unseen) == found.labels[[0, 4, 6]][of_unseen]).mean() for each in (found, more)]
    assert right[1] >= right[0] and right[1] > 0.95


def test_labels_of_older_texts_are_believed_where_labels_are_the_clusters():
    """Also where they say what the tokens do not; texts without a label, or of a cluster that the sample has none
    of, say nothing. Where clusters are found labels are not read."""
    ids, domains = texts(count=48)
    older, of_older = texts(count=400, seed=9)
    turned = (of_older + 1) % 3
    options = {"given": domains, "algorithm": "given", "num_clusters": None}
    found = fit(ids, older=older, older_given=turned, **options)
    every = np.concatenate([ids[~found.held], np.pad(older, ((0, 0), (0, ids.shape[1] - older.shape[1])))])
    labels = np.concatenate([domains[~found.held], turned])
    table = log_ratios(count_tokens(every, VOCAB), labels, 3, found.evidence.smoothing) * found.evidence.temper
    seen = np.isin(np.arange(VOCAB), every)
    np.testing.assert_allclose(found.evidence.table[seen], table[seen], rtol=1e-5, atol=1e-6)
    unknown = np.where(np.arange(400) % 2, 3, -1)
    alone, none = fit(ids, **options), fit(ids, older=older, older_given=unknown, **options)
    np.testing.assert_array_equal(none.evidence.table, alone.evidence.table)
    plain, told = fit(ids, older=older), fit(ids, older=older, older_given=turned)
    np.testing.assert_array_equal(told.evidence.table, plain.evidence.table)


def test_the_same_texts_churn_nothing():
    ids, _ = texts()
    first = fit(ids)
    assert fit(ids, identities=first.ownership.identities).metrics["churn"] == 0


def test_shared_texts_match_clusters():
    old = np.array([0] * 10 + [1] * 10 + [2] * 10)
    new = np.array([2] * 10 + [0] * 10 + [1] * 10)
    lengths = np.full(30, 20)
    assert match_texts(old, 3, new, 3, lengths).tolist() == [1, 2, 0]
    assert match_texts(old, 0, new, 3, lengths).tolist() == [-1, -1, -1]
    assert match_texts(old, 3, np.where(new == 2, -1, new), 2, lengths).tolist() == [1, 2]


def test_a_text_counts_by_its_tokens():
    """Six short texts of another cluster are less than two long ones: for shares, what is common, and matching."""
    ids, domains = np.full((8, 40), -1), np.array([0, 0, 1, 1, 1, 1, 1, 1])
    ids[:2] = np.arange(40, 60).repeat(2)
    ids[2:, :8] = np.arange(60, 68)
    found = fit(ids, given=domains, algorithm="given", num_clusters=None, common_share=0.5, common_by="size")
    np.testing.assert_allclose(found.shares, [80 / 128, 48 / 128])
    assert found.ownership.experts.tolist() == [-1, 0]
    lengths = (ids >= 0).sum(axis=1)
    joined = np.zeros(8, np.int64)
    assert match_texts(domains, 2, joined, 1, lengths).tolist() == [0]
    assert match_texts(domains, 2, joined, 1, np.ones(8)).tolist() == [1]


@pytest.mark.parametrize("shared", [3, 4])
def test_too_little_overlap_is_a_new_cluster(shared):
    """Two clusters of ten with three texts in common share 3 of 17, with four 4 of 16."""
    old = np.array([0] * 10 + [1] * (10 - shared))
    new = np.array([1] * (10 - shared) + [0] * 10)
    assert shared / (20 - shared) < LEAST_OVERLAP or shared == 4
    found = match_texts(np.where(old == 1, 1, 0), 1, new, 1, np.full(len(new), 20))
    assert found.tolist() == [-1 if shared == 3 else 0]


def test_an_absent_cluster_is_waited_for_until_patience_ends():
    ids, domains = texts()
    first = fit(ids, patience=2)
    rare = expert_of_domains(first, domains)[2]
    without = fit(ids[domains < 2], identities=first.ownership.identities, num_clusters=2, patience=2)
    assert without.ownership.absent == [rare] and not without.ownership.released
    back = fit(ids, identities=without.ownership.identities, patience=2)
    assert expert_of_domains(back, domains) == expert_of_domains(first, domains) and not back.ownership.filled
    again = fit(ids[domains < 2], identities=without.ownership.identities, num_clusters=2, patience=2)
    assert not again.ownership.absent and again.ownership.released == [rare]


def test_labels_that_are_given_are_the_clusters():
    ids, domains = texts()
    given = np.where(np.arange(64) % 9 == 0, -1, domains)
    found = fit(ids, given=given, algorithm="given", num_clusters=None)
    np.testing.assert_array_equal(found.labels, given)
    np.testing.assert_array_equal(found.evidence.of_texts(ids), domains)
    assert found.ownership.experts[0] == -1


@pytest.mark.parametrize("labels", [[-1] * 64, [0, 2] * 32, [17] * 64])
def test_labels_with_gaps_or_none_are_refused(labels):
    with pytest.raises(ValueError, match="given_clusters"):
        fit(texts()[0], given=np.array(labels), algorithm="given", num_clusters=None)


def test_every_text_of_a_cluster_may_be_held_out():
    """It is fitted on them nevertheless."""
    ids, _ = texts((1,), count=10)
    other = np.where(ids >= 0, ids + 45, -1)
    ids[4], ids[9] = other[4], other[9]
    labels = np.array([0, 0, 0, 0, 1, 0, 0, 0, 0, 1])
    assert held_out(len(ids), ids).tolist() == labels.astype(bool).tolist()
    found = fit(ids, given=labels, algorithm="given", num_clusters=None, common_share=0.0)
    assert found.evidence.of_texts(ids).tolist() == found.labels.tolist() == labels.tolist()
    assert np.isfinite(found.evidence.table).all()


def test_a_domain_keeps_the_base_no_longer_for_its_size():
    """Two rare domains and a cloud that k-means cuts into clusters of their size: by size chance decides, by
    separation those with words of their own get experts."""
    ids, domains = texts((4, 1, 1), count=240, own=0.7)
    plain = np.random.default_rng(5).integers(5, 35, ids.shape)
    ids = np.where((domains == 0)[:, None] & (ids >= 0), plain, ids).astype(np.int32)
    owners = {}
    for common_by in ("size", "separation"):
        found = fit(ids, num_clusters=6, common_share=0.65, common_by=common_by)
        owned = np.isin(found.labels, np.flatnonzero(found.ownership.experts >= 0))
        owners[common_by] = [float(owned[domains == domain].mean()) for domain in range(3)]
    assert owners["separation"] == [0, 1, 1] and owners["size"][0] > 0 and min(owners["size"][1:]) == 0
    assert found.metrics["separation"] > 0.2


def test_copies_of_a_text_lie_on_one_side():
    """Of what training has read after it was read ahead, or in two epochs."""
    ids = np.arange(40).reshape(20, 2)
    np.testing.assert_array_equal(held_out(20, ids), held_out(20))
    first, copy = int(np.flatnonzero(held_out(20))[0]), int(np.flatnonzero(held_out(20))[1])
    ids[copy], ids[copy + 1] = ids[0], ids[first]
    held = held_out(20, ids)
    assert not held[0] and not held[copy] and held[first] and held[copy + 1]
    assert held.sum() == held_out(20).sum()


def test_no_text_is_counted_that_evidence_is_measured_on():
    """Of an epoch before, or read ahead and then by training."""
    ids, _ = texts(count=48)
    older, _ = texts(count=100, seed=9)
    held = ids[held_out(len(ids))]
    assert len(held) >= 2
    longer = np.pad(np.concatenate([held, older]), ((0, 0), (0, 3)), constant_values=-1)
    found, wanted = fit(ids, older=longer), fit(ids, older=older)
    np.testing.assert_array_equal(found.evidence.table, wanted.evidence.table)
    assert found.metrics == wanted.metrics
    nothing = fit(ids, older=held)
    assert np.isfinite(nothing.evidence.table).all() and nothing.metrics["smoothing"] == wanted.metrics["smoothing"]
