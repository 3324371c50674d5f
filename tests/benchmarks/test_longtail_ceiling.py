# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of the bound on routes that read from left to right: near the oracle where words tell the domain at
once, and no gain where evidence says nothing."""

import json

import pytest
from longtail_tiny import build_corpus, write_settings, write_text


from arms import read_arms  # isort: skip
from train import Size, train  # isort: skip
import ceiling  # isort: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Runs of the dense model and the oracle whose domains have words of their own."""
    folder = tmp_path_factory.mktemp("ceiling")
    corpus = build_corpus(write_text(folder / "text"), folder / "main")
    arms, size = write_settings(folder, max_steps=30)
    for name in ("dense", "oracle"):
        train(read_arms(arms)[name], 0, Size.load(str(size)), corpus, folder / "runs/tiny/main" / f"{name}-0")
    return folder, corpus


def test_routes_that_were_taught_come_near_the_oracle(made, tmp_path):
    folder, _ = made
    arguments = ["--size", "tiny", "--corpus", folder / "main", "--runs", folder / "runs", "--seeds", 0]
    arguments += ["--oracle", "oracle", "--texts", 100, "--output", tmp_path / "ceiling.json"]
    ceiling.main([*map(str, arguments)])
    record = json.loads((tmp_path / "ceiling.json").read_text())
    (row,) = record["rows"]
    assert record["oracle"] == "oracle" and row["texts"] == 100 and 0.5 < row["share_of_oracle"]["value"] < 1.05
    assert set(row["over_dense"]["0"]) == {"general", "legal", "medical", "long-tail"}
    assert row["over_dense"]["0"]["long-tail"] < 1
    first, then = (row["by_position"][place]["value"] for place in ("0-8", "8-32"))
    assert first < then < 1.05


def test_evidence_that_says_nothing_leaves_the_base_alone(made):
    """Beside its share nothing speaks for a domain: both rare ones stay below the probability that answers."""
    folder, corpus = made
    evidence = ceiling.teach(corpus, 100, seed=0)
    evidence.table[:] = 0
    evidence.shares[:] = [0.98, 0.01, 0.01]
    found = ceiling.taught(folder / "runs/tiny/main/oracle-0", corpus, evidence).perplexity
    told = ceiling.told(folder / "runs/tiny/main/oracle-0", corpus).perplexity
    assert found["general"] == pytest.approx(told["general"], rel=1e-5)
    assert found["legal"] > told["legal"] and found["medical"] > told["medical"]


def test_taught_routes_are_measured_in_the_precision_of_training(made, tmp_path):
    """In that of the figures beside it, which train.py has measured."""
    _, corpus = made
    arms, size = write_settings(tmp_path, max_steps=12, bf16=True)
    run = tmp_path / "oracle-0"
    train(read_arms(arms)["oracle"], 0, Size.load(str(size)), corpus, run)
    evidence = ceiling.teach(corpus, 100, seed=0)
    in_bf16 = ceiling.taught(run, corpus, evidence).perplexity
    settings = json.loads((run / "run.json").read_text())
    settings["size"]["training"]["bf16"] = None
    (run / "run.json").write_text(json.dumps(settings))
    in_fp32 = ceiling.taught(run, corpus, evidence).perplexity
    assert in_bf16 != in_fp32 and in_bf16 == pytest.approx(in_fp32, rel=1e-2)


def test_what_is_not_there_is_named(made):
    folder, corpus = made
    with pytest.raises(ValueError, match="'dense-7' is not there, or not finished"):
        ceiling.compare(folder / "runs/tiny/main", corpus, [7], [100])
    with pytest.raises(ValueError, match="'oracle_wide-0' is not there, or not finished"):
        ceiling.compare(folder / "runs/tiny/main", corpus, [0], [100])
    with pytest.raises(ValueError, match="texts=1 is not allowed: they are of"):
        ceiling.teach(corpus, 1, seed=0)
