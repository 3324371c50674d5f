# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of evidence: its table is what counts say, its sums agree, smoothing and temper suit texts held out."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.special import log_softmax
from text_rows import VOCAB, texts

from modeling_cse.clustering import Evidence, evidence_agreement
from modeling_cse.clustering.evidence import SMOOTHINGS, TEMPERS, log_ratios, separation, separations
from modeling_cse.clustering.texts import count_tokens


def fitted(own: float = 0.5, every: int = 5):
    ids, domains = texts(count=160, own=own)
    held = np.arange(len(ids)) % every == every - 1
    return Evidence.fit(ids, domains, np.bincount(domains) / len(domains), VOCAB, held), ids, domains, held


def test_the_table_is_what_counts_say():
    """Two texts, three tokens of the vocabulary, by hand. The third is in none of them, and says nothing."""
    ids = np.array([[0, 0, 1, -1], [1, 1, 1, 1]])
    evidence = Evidence.fit(ids, np.array([0, 1]), np.array([0.5, 0.5]), 3, np.zeros(2, bool))
    background = [3 / 10, 6 / 10, 1 / 10]  # seen 2, 5 and 0 times, one more of each
    prior = SMOOTHINGS[0] * 7
    for token in range(3):
        for cluster, (count, total) in enumerate(zip(((2, 1, 0), (0, 4, 0)), (3, 4), strict=True)):
            frequency = (count[token] + prior * background[token]) / (total + prior)
            wanted = math.log(frequency / background[token]) if token < 2 else 0.0
            assert evidence.table[token, cluster] == pytest.approx(wanted, rel=1e-5)
    assert (evidence.smoothing, evidence.temper) == (SMOOTHINGS[0], 1) and evidence.table.dtype == np.float32


def test_sums_and_whole_texts_agree():
    evidence, ids, _, _ = fitted()
    sums = evidence.sums(ids)
    for row in (0, 7):
        length = (ids[row] >= 0).sum()
        for place in range(length):
            wanted = evidence.table[ids[row, : place + 1]].astype(np.float64).sum(0)
            wanted /= math.sqrt(1 + (place + 1) / 16)
            np.testing.assert_allclose(sums[row, place], wanted, atol=1e-9)
        np.testing.assert_array_equal(
            sums[row, length - 1 :], np.broadcast_to(sums[row, length - 1], (21 - length, 3))
        )
    np.testing.assert_array_equal(evidence.clusters(ids)[:, -1], evidence.of_texts(ids))


def test_texts_that_were_held_out_are_told():
    evidence, ids, domains, held = fitted()
    np.testing.assert_array_equal(evidence.of_texts(ids[held]), domains[held])
    fresh, wanted = texts(seed=4)
    np.testing.assert_array_equal(evidence.of_texts(fresh), wanted)


def test_agreement_is_of_the_routes_that_a_model_reads():
    evidence, ids, domains, held = fitted(own=0.2)
    joint = SimpleNamespace(evidence=evidence, labels=domains, held=held)
    prefixes, whole = (evidence_agreement(joint, ids, causal) for causal in (True, False))
    inside = ids[held] >= 0
    right = np.broadcast_to((evidence.of_texts(ids[held]) == domains[held])[:, None], inside.shape)
    assert whole["agreement"] == pytest.approx(right[inside].mean())
    assert whole["agreement_0_8"] > prefixes["agreement_0_8"] + 0.1


def test_held_out_texts_do_not_enter_the_table(monkeypatch):
    """They only choose."""
    monkeypatch.setattr("modeling_cse.clustering.evidence.SMOOTHINGS", SMOOTHINGS[:1])
    ids, domains = texts()
    held, shares = np.arange(64) % 5 == 4, np.bincount(domains) / 64
    other = ids.copy()
    other[held] = np.where(ids[held] >= 0, 98, -1)
    first, second = (Evidence.fit(each, domains, shares, VOCAB, held) for each in (ids, other))
    np.testing.assert_allclose(first.table / first.temper, second.table / second.temper, rtol=1e-6)


def log_likelihood(evidence: Evidence, ids: np.ndarray, domains: np.ndarray) -> float:
    posterior = log_softmax(evidence.sums(ids) + np.log(evidence.shares), axis=-1)
    right = np.stack([posterior[row, :, domain] for row, domain in enumerate(domains)])
    return right[ids >= 0].mean()


def test_smoothing_and_temper_are_the_likeliest_on_texts_held_out(monkeypatch):
    """Tokens that come eight times each are no eight witnesses."""
    texts_once, domains = texts(count=160, own=0.15)
    shares, held, tempers = np.bincount(domains) / 160, np.arange(160) % 5 == 4, []
    for repeats in (1, 8):
        ids = texts_once.repeat(repeats, axis=1)
        chosen = Evidence.fit(ids, domains, shares, VOCAB, held)
        found = {}
        for smoothing in SMOOTHINGS:
            for temper in TEMPERS:
                with monkeypatch.context() as only:
                    only.setattr("modeling_cse.clustering.evidence.SMOOTHINGS", (smoothing,))
                    only.setattr("modeling_cse.clustering.evidence.TEMPERS", (temper,))
                    one = Evidence.fit(ids, domains, shares, VOCAB, held)
                assert (one.smoothing, one.temper) == (smoothing, temper)
                found[smoothing, temper] = log_likelihood(one, ids[held], domains[held])
        assert (chosen.smoothing, chosen.temper) == max(found, key=found.get)
        tempers.append(chosen.temper)
    assert tempers[1] < tempers[0]


def test_texts_of_no_cluster_teach_nothing():
    ids, domains = texts()
    some = np.where(np.arange(64) % 7 == 0, -1, domains)
    shares, none = np.bincount(domains) / 64, np.zeros(64, bool)
    whole = Evidence.fit(ids, some, shares, VOCAB, none)
    part = Evidence.fit(ids[some >= 0], some[some >= 0], shares, VOCAB, none[some >= 0])
    np.testing.assert_array_equal(whole.table, part.table)


def test_without_clusters_no_text_has_one():
    none = Evidence(np.zeros((VOCAB, 0), np.float32), np.zeros(0))
    assert none.of_texts(texts()[0]).tolist() == [-1] * 64


def test_separation_is_what_a_clusters_own_words_save():
    """Mean log ratio of the tokens of its held-out texts; domains with words of their own have much, one cloud cut by
    chance has none, and a cluster without a held-out text no figure."""
    ids, domains = texts(count=400)
    fresh, own = texts(count=200, seed=4)
    found = separation(ids, domains, fresh, own, 4, VOCAB)
    assert np.isnan(found[3]) and found[:3].min() > 0.25
    table, rows = log_ratios(count_tokens(ids, VOCAB), domains, 3, 0.02), fresh[own == 1]
    assert found[1] == pytest.approx(table[rows[rows >= 0], 1].mean(), rel=1e-5)
    chance = np.random.default_rng(0)
    cut, of_fresh = chance.permutation(domains), chance.permutation(own)
    assert np.abs(separation(ids, cut, fresh, of_fresh, 3, VOCAB)).max() < 0.05


def test_separations_within_one_sample():
    """Each text by what its cluster says without it: texts of no cluster are left out, one that is alone is told as
    all text is, and clusters cut by chance mislead."""
    ids, domains = texts(count=400)
    labels = np.where(np.arange(400) % 7 == 0, -1, domains)
    alone = int(np.flatnonzero(labels == 2)[0])
    labels[alone] = 3
    found = separations(ids, labels, 5, VOCAB)
    assert found[3] == pytest.approx(0) and found[4] == 0 and found[:3].min() > 0.2
    inside = labels >= 0
    np.testing.assert_allclose(separations(ids[inside], labels[inside], 5, VOCAB), found)
    cut = np.random.default_rng(0).permutation(domains)
    assert separations(ids, cut, 3, VOCAB).max() < 0.05


def test_separations_are_those_of_a_table_without_each_text():
    ids, labels = texts(count=40, seed=2)
    found = separations(ids, labels, 3, VOCAB)
    gains, tokens = np.zeros(3), np.zeros(3)
    total = np.asarray(count_tokens(ids, VOCAB).sum(axis=0))[0]
    background = (total + 1) / (total + 1).sum()
    prior = SMOOTHINGS[0] * total.sum()
    for row, label in enumerate(labels):
        others = np.flatnonzero((labels == label) & (np.arange(len(ids)) != row))
        rest = np.asarray(count_tokens(ids[others], VOCAB).sum(axis=0))[0]
        ratios = np.log((rest + prior * background) / (rest.sum() + prior) / background)
        own = ids[row][ids[row] >= 0]
        gains[label] += ratios[own].sum()
        tokens[label] += len(own)
    np.testing.assert_allclose(found, gains / tokens)
