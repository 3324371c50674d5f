# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of a lent device: a leg stops at its limit, the next one goes on, and all ends as an unbroken run does."""

import json

import pytest
from longtail_tiny import build_corpus, losses, write_settings, write_text


import keep  # isort: skip
import lease  # isort: skip


@pytest.fixture
def plan(tmp_path):
    build_corpus(write_text(tmp_path / "text"), tmp_path / "corpus")
    arms, size = write_settings(tmp_path, max_steps=30, save_steps=1000)
    flags = f"--arms {arms} --size {size} --corpus {tmp_path / 'corpus'}"
    (tmp_path / "plan.txt").write_text(f"{flags} --arm cse\n{flags} --arm dense  # second\n")
    return str(tmp_path / "plan.txt")


class Clock:
    """In place of the time module: every look at it takes a second."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        self.now += 1
        return self.now


def test_legs_end_where_an_unbroken_run_does(plan, tmp_path, monkeypatch):
    flags = ["--state", str(tmp_path / "whole"), "--output", str(tmp_path / "kept")]
    assert lease.main([plan, "--minutes", "9", *flags]) == 0
    flags = ["--state", str(tmp_path / "legs"), "--output", str(tmp_path / "kept_legs"), "--minutes", str(12 / 60)]
    codes, read = [], []
    load = lease.Corpus.load
    monkeypatch.setattr(lease.Corpus, "load", lambda folder: read.append(folder) or load(folder))
    while (not codes or codes[-1]) and len(codes) < 20:
        monkeypatch.setattr(lease, "time", Clock())
        codes.append(lease.main([plan, *flags]))
    assert 5 <= len(codes) < 20 and codes == [lease.MORE_TO_DO] * (len(codes) - 1) + [0]
    assert len(read) == len(codes)  # once a leg, though the plan names it twice
    for arm in ("cse", "dense"):
        whole, legs = (tmp_path / name / "tiny" / "corpus" / f"{arm}-0" for name in ("kept", "kept_legs"))
        assert losses(whole) == losses(legs) and list(losses(whole)) == list(range(1, 31))
        results = [json.loads((folder / "result.json").read_text()) for folder in (whole, legs)]
        assert results[0]["test"] == results[1]["test"] and results[1]["resumed"]
        assert "model" not in {path.name for path in legs.iterdir()}
    noted = json.loads((tmp_path / "kept_legs" / "lease.json").read_text())
    assert len(noted) == len(codes) and len(noted[-1]["finished"]) == 2 and not noted[-1]["left"]
    assert set(noted[0]) == {"begun", "seconds", "finished", "left", "date", "machine", "versions", "code"}


    records = keep.keep(tmp_path / "kept_legs" / "tiny", tmp_path / "corpus", tmp_path / "results")
    assert [path.name for path in records] == ["cse-0.json", "dense-0.json"]


def test_no_run_begins_after_the_limit(plan, tmp_path):
    flags = ["--state", str(tmp_path / "state"), "--output", str(tmp_path / "kept"), "--minutes", "0"]
    assert lease.main([plan, *flags]) == lease.MORE_TO_DO
    assert not (tmp_path / "state").exists()
    (leg,) = json.loads((tmp_path / "kept" / "lease.json").read_text())
    assert len(leg["left"]) == 2 and not leg["finished"]
