# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of the class metrics: the textbook's numbers, without network or files."""

import math

import evaluate
import numpy as np
import pytest

from modeling_cse.evaluation import Accuracy, MacroF1, MatthewsCorrelation


METRICS = [Accuracy, MacroF1, MatthewsCorrelation]
# 3 true positives, 1 false positive, 2 false negatives, 2 true negatives
TOLD, RIGHT = [1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 1, 1, 0, 0]


def test_they_are_the_numbers_of_the_textbook():
    assert Accuracy().compute(predictions=TOLD, references=RIGHT) == {"accuracy": 5 / 8, "rows": 8}
    expected = (3 * 2 - 1 * 2) / math.sqrt(4 * 5 * 3 * 4)
    result = MatthewsCorrelation().compute(predictions=TOLD, references=RIGHT)
    assert result == {"matthews_correlation": pytest.approx(expected)}
    mean = ((2 * 3 / (2 * 3 + 1 + 2)) + (2 * 2 / (2 * 2 + 2 + 1))) / 2
    assert MacroF1().compute(predictions=TOLD, references=RIGHT) == {"macro_f1": pytest.approx(mean)}


def test_a_class_that_is_never_told_counts_as_zero_and_a_constant_does_not_correlate():
    told, right = [0, 0, 0, 0], [0, 0, 0, 2]
    assert MacroF1().compute(predictions=told, references=right)["macro_f1"] == pytest.approx((6 / 7 + 0) / 2)
    assert MatthewsCorrelation().compute(predictions=told, references=right)["matthews_correlation"] == 0.0


@pytest.mark.parametrize("metric", METRICS)
def test_batches_add_up_without_files_and_compute_forgets_them(metric, tmp_path):
    made = metric(cache_dir=str(tmp_path))
    assert isinstance(made, evaluate.Metric)
    made.add_batch(predictions=np.array(TOLD[:3]), references=np.array(RIGHT[:3]))
    made.add_batch(predictions=TOLD[3:], references=RIGHT[3:])
    assert made.compute() == metric().compute(predictions=TOLD, references=RIGHT)
    assert made.compute(predictions=[1, 0], references=[1, 0]).popitem()[1] in (1.0, 2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("metric", METRICS)
def test_no_row_is_an_error(metric):
    with pytest.raises(ValueError, match="`references` has 0 rows"):
        metric().compute(predictions=[], references=[])
    with pytest.raises(ValueError, match="are empty"):
        metric().compute()
