# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of the long-tail report's tables, on made-up records: what a cell is a mean of stands beside it, and costs
are told alike of old records and new ones."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from longtail_tiny import ROLES


# the benchmark is a folder of scripts, which find each other there
sys.path.append(str(Path(__file__).resolve().parents[2] / "examples" / "longtail_benchmark"))

import report  # noqa: E402
import report_tables  # noqa: E402
from comparisons import Comparisons, all_text, share_read_ahead, total_flops  # noqa: E402
from cost import read_ahead  # noqa: E402
from judgement import judge  # noqa: E402


BLOCK, BATCH, STEPS = 32, 4, 20
SHARES = {"general": 0.8, "legal": 0.15, "medical": 0.05}
CONFIG = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": BLOCK}
CLUSTERS = {"warmup": 5, "num_clusters": 3, "sample_size": 50}  # of 50 rows the warm-up reads 20
MODEL = {"cse_layers": [1], "cse_num_experts": 2, "cse_routing": "evidence"}
FLOPS = 1e9


def record(arm: str, seed: int, legal: float = 100.0, machine: str = "one abacus", seconds: float = 100.0, **model):
    """A record whose perplexities are 100 but for that of legal text."""
    cse = arm not in ("dense", "switch")
    about = {"name": arm, "kind": "cse" if cse else "dense", "model": {**MODEL, **model} if cse else {}}
    about |= {"clusters": CLUSTERS if cse else {}, "control": "oracle" if arm == "oracle" else None}
    mixture = {"shares": SHARES, "tokens": 4096, "block_size": BLOCK, "vocab_size": 300, "packed_together": False}
    size = {"family": "gpt2", "config": CONFIG}
    size["training"] = {"per_device_train_batch_size": BATCH, "max_steps": STEPS}
    perplexity = {"general": 100.0, "legal": legal, "medical": 100.0, "long-tail": math.sqrt(100 * legal)}
    per_token = {"total": 1000, "active": 900.0, "flops": 6000.0, "dense_flops": 6000.0}
    return {
        "arm": arm,
        "seed": seed,
        "machine": machine,
        "start": None,
        "settings": {"arm": about, "seed": seed, "size": size, "mixture": mixture, "steps": None},
        "perplexity": perplexity,
        "by_position": {"0-8": perplexity, "8-32": perplexity},
        "cost": {"per_token": per_token, "tokens": STEPS * BATCH * BLOCK, "flops": FLOPS, "seconds": seconds},
    }


def cells(table: str, arm: str) -> dict[str, str]:
    """The row of an arm, by the head."""
    head, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines())
    return dict(zip(head, next(row for row in rows if row[0] == arm), strict=True))


@pytest.fixture
def mixed() -> Comparisons:
    """Four seeds of `cse` and `dense`, three of the oracle, of `wide` two and on another machine."""
    records = [record("cse", seed, 80.0 + seed) for seed in range(4)]
    records += [record("dense", seed) for seed in range(4)]
    records += [record("oracle", seed, 64.0 + seed) for seed in range(3)]
    records += [record("wide", 0, 90.0, seconds=50.0), record("wide", 1, 90.0, "two abaci", 10.0)]
    return Comparisons(records, ROLES)


def test_a_cell_of_other_seeds_than_its_row_says_so(mixed):
    row = cells(report_tables.main_table(mixed), "cse")
    assert row["seeds"] == "4" and row["% of oracle's gain [95 %]"].endswith("], 3 seeds")
    assert not any("seed" in value for name, value in row.items() if "oracle" not in name)
    assert "seed" not in "".join(cells(report_tables.main_table(mixed), "oracle").values())
    places = report_tables.position_table(mixed)
    assert cells(places, "cse")["seeds"] == "4 (3)" and cells(places, "wide")["seeds"] == "2"
    assert cells(report_tables.absolute_table(mixed), "oracle")["seeds"] == "3"


def test_seconds_are_of_the_processor_that_the_baseline_had(mixed):
    row = cells(report_tables.main_table(mixed), "wide")
    assert row["seconds"] == "50, 1 seed" and row["seeds"] == "2"
    assert "on one abacus alone, where most of `dense` ran" in report.seconds_from(mixed)
    alike = Comparisons([each for each in mixed.records if each["machine"] == "one abacus"], ROLES)
    assert report.seconds_from(alike) == "Seconds: of runs that were not resumed."
    elsewhere = Comparisons([record("dense", 0, machine="two abaci"), record("cse", 0)], ROLES)
    assert cells(report_tables.main_table(elsewhere), "cse")["seconds"] == "not measured"


def test_all_text_counts_domains_by_their_share(mixed):
    row = cells(report_tables.main_table(mixed), "wide")
    assert row["all text [95 %]"] == f"{0.9**0.15:.3f} [{0.9**0.15:.3f}, {0.9**0.15:.3f}]"
    estimate = report.compare(_with_bins(mixed))["cse"]
    ratio = estimate["perplexity_over_baseline"]["all text"]
    legal = estimate["perplexity_over_baseline"]["legal"]
    assert ratio.value == pytest.approx(legal.value**0.15) and ratio.upper == pytest.approx(legal.upper**0.15)
    assert all_text({**record("cse", 0), "perplexity": {**dict.fromkeys(SHARES, 9.0), "legal": "inf"}}) == math.inf


WIDE = replace(ROLES, wide="wide")


def judged(comparisons: Comparisons) -> list[dict]:
    """Records with what the judgement reads of them."""
    return [{"tasks": {}, "reads_ahead": False, "kind": "", **each} for each in comparisons.records]


def _with_bins(comparisons: Comparisons) -> Comparisons:
    bins = {"by_frequency": {"1": [100.0]}}
    return Comparisons([{**each, **bins} for each in comparisons.records], comparisons.roles)


def test_old_records_tell_what_was_read_ahead_as_new_ones_do(mixed):
    old = record("cse", 0)
    ahead = read_ahead(old["settings"])
    assert ahead.rows == 30 and total_flops(old) == FLOPS + ahead.flops
    new = record("cse", 0)
    new["cost"] |= {"flops": FLOPS + ahead.flops, "read_ahead": vars(ahead)}
    assert total_flops(new) == total_flops(old) and share_read_ahead(new) == share_read_ahead(old) > 0
    row = cells(report_tables.main_table(mixed), "cse")
    assert row["FLOPs in all"] == f"{1 + ahead.flops / FLOPS:.3f}"
    assert row["% read ahead"] == f"{100 * ahead.flops / (FLOPS + ahead.flops):.1f}"
    assert cells(report_tables.main_table(mixed), "dense")["% read ahead"] == "0.0"


def test_rows_of_several_texts_give_a_bound():
    documents = [record("dense", 0), record("documents", 0, cse_separator_token_id="end")]
    row = cells(report_tables.main_table(Comparisons(documents, ROLES)), "documents")
    assert row["% read ahead"].startswith("at most ") and row["FLOPs in all"].startswith("at most 1.")


def test_runs_of_two_machines_and_of_two_states_of_the_code_are_told(mixed):
    told = report.pairs_of_two_machines(mixed)
    assert told == "On another machine than their `dense`: `wide` (seed 1).\n"
    alike = Comparisons([each for each in mixed.records if each["machine"] == "one abacus"], ROLES)
    assert report.pairs_of_two_machines(alike) == "Every run is compared with a `dense` of its own machine.\n"
    made = {"date": "2026-02-03", "versions": {"torch": "9.9"}}
    records = [{**each, **made, **({"code": "abc"} if each["arm"] == "dense" else {})} for each in mixed.records]
    assert "code abc (4 runs), 9 runs do not say of which code" in report.origins(records)
    assert "9 runs do not say" not in report.origins([each for each in records if "code" in each])


def found(comparisons: Comparisons, measure: str):
    return next(each for each in judge(comparisons) if each.measure.startswith(measure))


def test_an_opponent_of_another_size_is_none(mixed):
    """A dense model that nobody has widened, under the name of one that was."""
    measure = "long-tail perplexity, default CSE / dense widened"
    records = [dict(each) for each in judged(mixed) if each["arm"] != "wide"]
    wide = [record("wide", seed, 90.0) for seed in range(4)]
    assert found(Comparisons([*records, *wide], WIDE), measure).must_verdict == "reached"
    for each in wide:
        each["cost"]["per_token"] = {**each["cost"]["per_token"], "total": 900}
    verdict = found(Comparisons([*records, *wide], WIDE), measure)
    assert verdict.must_verdict == verdict.aim_verdict == "not measured"
    assert "`wide` has not as many parameters as `cse`" in verdict.note


def test_a_verdict_on_two_machines_says_so(mixed):
    verdict = found(Comparisons(judged(mixed), WIDE), "long-tail perplexity, default CSE / dense widened")
    assert "on two machines with seed 1" in verdict.note
    assert found(Comparisons(judged(mixed), WIDE), "general perplexity").note == ""


def test_an_interval_that_hides_a_loss_says_so(mixed):
    """No loss beyond the interval is what was asked for; a wide one proves little."""
    records = judged(mixed)
    for each in records:
        noise = 0.06 * (each["seed"] % 2) if each["arm"] == "cse" else 0.0
        each["tasks"] = {"probe": {"sst2": 0.7 + noise, "qnli": 0.7 - 0.1 * (each["arm"] == "cse"), "mrpc": 0.7}}
    notes = {task: found(Comparisons(records, WIDE), f"probe accuracy on {task}") for task in ("sst2", "qnli", "mrpc")}
    assert notes["sst2"].must_verdict == "reached" and "exclude a loss of 0.0" in notes["sst2"].note
    assert notes["qnli"].must_verdict == "missed" and notes["mrpc"].note == notes["qnli"].note == ""


def test_a_task_that_fewer_seeds_have_says_so(mixed):
    records = [dict(each) for each in mixed.records]
    for each in records:
        known = {"gad": 0.6} if each["seed"] < 3 else {}
        each["tasks"] = {"probe": {"cola": 0.7, **known}} if each["arm"] != "wide" else {}
        if each["arm"] == "oracle":
            each["tasks"] = {"probe": {"gad": 0.65}}
    records = [each for each in records if each["seed"] > 0 or each["arm"] != "dense"]
    table = report_tables.task_table(Comparisons(records, ROLES), "probe")
    assert cells(table, "cse") == {
        "arm": "cse",
        "seeds": "4",
        "gad": "60.0, 3 seeds (0.0 [0.0, 0.0], 2 seeds)",
        "cola": "70.0 (0.0 [0.0, 0.0], 3 seeds)",
    }
    assert cells(table, "dense")["seeds"] == "3" and cells(table, "dense")["gad"] == "60.0, 2 seeds"
