# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""The verdict follows its rules, whatever anyone hopes for."""

from dataclasses import replace

import pytest

from modeling_cse.analysis import CLARITY, Gain, judge, rules


def gain(low, ratio, high) -> Gain:
    return Gain(50, 30.0, 30.0 * ratio, ratio, low, high, seeds=3)


GAINS, LITTLE, LOSES = gain(0.9, 0.95, 0.98), gain(0.992, 0.995, 0.998), gain(1.01, 1.03, 1.05)
NOTHING, WIDE, FEW = gain(0.995, 1.0, 1.005), gain(0.9, 0.98, 1.07), gain(None, 0.9, None)


@pytest.mark.parametrize(
    ("tail", "common", "answer"),
    [
        (GAINS, NOTHING, "yes"),
        (GAINS, WIDE, "yes"),
        (GAINS, GAINS, "yes"),
        (GAINS, None, "yes"),
        (LITTLE, NOTHING, "hardly"),
        (GAINS, LOSES, "mixed"),
        (LOSES, NOTHING, "no"),
        (NOTHING, NOTHING, "no"),
        (WIDE, LOSES, "no"),
        (WIDE, NOTHING, "cannot tell"),
        (NOTHING, GAINS, "cannot tell"),
        (FEW, NOTHING, "cannot tell"),
    ],
)
def test_intervals_decide(tail, common, answer):
    verdict = judge(tail, common, clearest=0.6, agreement=0.9, seeds=3, kind="evidence")
    assert verdict.answer == answer
    assert len(verdict.reasons) == (1 if common is None else 2)
    assert bool(verdict.advice) == (answer != "yes")


@pytest.mark.parametrize(
    ("tail", "clearest", "agreement", "kind", "reason"),
    [
        (GAINS, 0.25, 0.9, "states", "silhouette of 0.25, under 0.28"),
        (GAINS, 0.15, 0.9, "evidence", "separation in nats a token of 0.15, under 0.2"),
        (GAINS, None, 0.9, "evidence", "no cluster with an expert has text"),
        (GAINS, 0.6, 0.4, "evidence", "40% of the tokens"),
        (None, 0.6, 0.9, "states", "no held-out sequence belongs"),
    ],
)
def test_without_clear_clusters_there_is_no_yes(tail, clearest, agreement, kind, reason):
    assert judge(FEW, NOTHING, None, 0.9, 1, kind).answer == "cannot tell", "nothing was measured"
    assert "--validation" in judge(FEW, NOTHING, None, 0.9, 1, kind).advice[0]
    verdict = judge(tail, NOTHING, clearest, agreement, 3, kind)
    assert verdict.answer == ("no" if tail is None else "cannot tell") and reason in verdict.reasons[0]
    assert judge(NOTHING, NOTHING, clearest, agreement, 3, kind).answer == "no" or tail is None
    assert judge(WIDE, NOTHING, 0.1, 0.9, 3, kind).answer == "no"


def test_a_training_that_found_no_long_tail_forbids_a_yes():
    """It would be left out of the mean: what failed would not count."""
    some = replace(GAINS, seeds=2)
    verdict = judge(some, NOTHING, clearest=0.6, agreement=0.9, seeds=3, kind="evidence")
    assert verdict.answer == "cannot tell" and "2 of 3 trainings have held-out sequences" in verdict.reasons[0]
    assert "(2 of 3 seeds): a gain" in verdict.reasons[1]
    one = judge(replace(FEW, seeds=1), NOTHING, clearest=0.6, agreement=0.9, seeds=2, kind="states")
    assert one.answer == "no" and one.reasons[1] == "The long tail (text with an expert): ratio 0.900 (1 of 2 seeds)."


def test_each_kind_of_cluster_has_a_threshold_of_its_own():
    """0.25 is clear by separation, and not by silhouette; the rules that are printed say the same."""
    assert judge(GAINS, NOTHING, 0.25, 0.9, 3, "evidence").answer == "yes"
    assert judge(GAINS, NOTHING, 0.25, 0.9, 3, "states").answer == "cannot tell"
    for kind, clarity in CLARITY.items():
        assert f"{clarity.phrase} {clarity.clear} or more" in rules(kind)


def test_one_seed_is_told_to_be_one():
    advice = " ".join(judge(GAINS, NOTHING, 0.6, 0.9, 1, "evidence").advice)
    assert "--seeds" in advice and "noise of training" in advice
    assert "More seeds than 3" in " ".join(judge(WIDE, NOTHING, 0.6, 0.9, 3, "evidence").advice)
    assert "--validation" in " ".join(judge(FEW, NOTHING, 0.6, 0.9, 1, "evidence").advice)
