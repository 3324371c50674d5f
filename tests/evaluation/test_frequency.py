# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of the sentence frequency score, and of perplexity in its bins."""

import math

import numpy as np
import pytest
import torch

from modeling_cse.evaluation import NGramCounts, Perplexity, PerplexityByBin
from modeling_cse.evaluation.frequency import quantile_bins
from modeling_cse.training.gradients import NO_TOKEN, sentence_frequency_scores


TRAIN = np.array([[1, 1, 2, 3], [1, 2, 1, NO_TOKEN]])  # 7 tokens: four 1, two 2, one 3


def test_a_score_is_the_mean_relative_frequency_of_tokens():
    scores = NGramCounts(TRAIN, 5).scores(np.array([[1, 2, 3, 4], [1, 1, NO_TOKEN, NO_TOKEN]]))
    assert scores == pytest.approx([(4 + 2 + 1 + 0) / 7 / 4, 4 / 7])


def test_unigrams_are_scored_as_during_training():
    generator = np.random.default_rng(0)
    train, test = generator.integers(0, 50, (20, 16)), generator.integers(0, 50, (8, 16))
    counts = torch.from_numpy(np.bincount(train.ravel(), minlength=50))
    expected = sentence_frequency_scores(torch.from_numpy(test), counts).numpy()
    assert NGramCounts(train, 50).scores(test) == pytest.approx(expected)


@pytest.mark.parametrize("n", [2, 3])
def test_n_grams_are_counted_within_rows(n):
    train, test = np.random.default_rng(n).integers(0, 4, (2, 30, 9))

    def grams(row):
        return [tuple(row[i : i + n]) for i in range(len(row) - n + 1)]

    text = [gram for row in train for gram in grams(row)]
    expected = [np.mean([text.count(gram) / len(text) for gram in grams(row)]) for row in test]
    assert NGramCounts(train, 4, n).scores(test) == pytest.approx(expected)


def test_n_grams_over_padding_do_not_exist():
    counts = NGramCounts(TRAIN, 5, 2)  # 11 12 23 | 12 21
    assert counts.scores(np.array([[1, 2, NO_TOKEN, 1], [1, NO_TOKEN, 2, NO_TOKEN]])) == pytest.approx(
        [2 / 5, math.nan], nan_ok=True
    )


@pytest.mark.parametrize("arguments", [(TRAIN, 3), (TRAIN, 5, 0), (TRAIN, 2**16, 4), (TRAIN, 5, 5), (TRAIN[0], 5)])
def test_impossible_counts_are_refused(arguments):
    with pytest.raises(ValueError, match="is not allowed"):
        NGramCounts(*arguments)


def test_bins_hold_equally_many_and_equal_scores_share_one():
    places, ends = quantile_bins([8, 1, 7, 2, 6, 3, 5, 4], 4)
    assert places.tolist() == [3, 0, 3, 0, 2, 1, 2, 1] and ends.tolist() == [[1, 2], [3, 4], [5, 6], [7, 8]]
    places, ends = quantile_bins([1, 1, 1, 2], 2)
    assert len(set(places[:3].tolist())) == 1 and len(ends) == places.max() + 1
    assert quantile_bins([3, 3, 3], 5)[0].tolist() == [0, 0, 0]


@pytest.mark.parametrize(("scores", "bins"), [([], 2), ([1.0, math.nan], 2), ([1.0], 0), ([1.0], 2.0)])
def test_bins_of_nothing_are_refused(scores, bins):
    with pytest.raises(ValueError, match="is not allowed"):
        quantile_bins(scores, bins)


def test_perplexity_by_bin_is_exp_of_each_bins_token_mean_loss():
    metric = PerplexityByBin()
    metric.add_batch(predictions=[2.0, 30.0], references=[1, 10], scores=[0.4, 0.1])
    result = metric.compute(predictions=[5.0, 9.0], references=[5, 2], scores=[0.2, 0.3], bins=2)
    assert result["perplexity_by_bin"] == pytest.approx([math.exp(35 / 15), math.exp(11 / 3)])
    assert result["tokens_by_bin"] == [15, 3] and result["sequences_by_bin"] == [2, 2]
    assert result["score_ranges"] == [[0.1, 0.2], [0.3, 0.4]]
    whole = Perplexity().compute(predictions=[2.0, 30.0, 5.0, 9.0], references=[1, 10, 5, 2])
    assert (result["perplexity"], result["loss"]) == (whole["perplexity"], whole["loss"])


def test_bins_stay_in_order_beyond_ten():
    scores = np.arange(24.0)[::-1]
    result = PerplexityByBin().compute(predictions=scores, references=[1] * 24, scores=scores, bins=12)
    assert result["perplexity_by_bin"] == sorted(result["perplexity_by_bin"])
    assert result["sequences_by_bin"] == [2] * 12
