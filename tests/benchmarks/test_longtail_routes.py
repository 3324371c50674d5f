# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of the look at routes without a model: what it counts, and that domains with their own words are found."""

import json
import sys

import numpy as np
import pytest
from longtail_tiny import EXAMPLES, build_corpus, write_text


sys.path.append(str(EXAMPLES))

import routes  # noqa: E402


def test_what_is_found_and_how_pure_by_hand():
    """Expert 0 gets 3 of 4 legal tokens and 1 of 4 general ones, expert 1 the rest of general; one legal has none."""
    experts = np.array([[0, 0, 0, -1], [0, 1, 1, 1]])
    found = routes.quality(experts, np.array(["legal", "general"]), {"general": 0.8, "legal": 0.2})
    assert found["domains"]["legal"]["found"] == 0 and found["purity"] == 0, "general has the larger part of it"
    found = routes.quality(experts, np.array(["legal", "general"]), {"general": 0.5, "legal": 0.5})
    assert found["domains"]["legal"]["found"] == found["found"] == 0.75
    assert found["purity"] == pytest.approx(0.75) and found["general_routed"] == 1
    assert found["domains"]["legal"]["found_by_position"][0] == 0.75


def test_domains_with_words_of_their_own_are_found(tmp_path, monkeypatch):
    build_corpus(write_text(tmp_path / "text"), tmp_path / "corpus", tokens=16384, vocab_size=500)
    output = tmp_path / "routes.json"
    arguments = ["--corpus", tmp_path / "corpus", "--texts", 500, "--clusters", 3, "--seeds", 2, "--orders", 2]
    arguments += ["--output", output]
    monkeypatch.setattr(sys, "argv", ["routes.py", *map(str, arguments), "--common_share", "0.5"])
    routes.main()
    record = json.loads(output.read_text())
    assert [row["rule"] for row in record["rules"]] == list(routes.RULES)
    found = [(row["common_by"], row["seed"]) for row in record["samples"]]
    assert found == [("size", 0), ("size", 1), ("separation", 0), ("separation", 1)]
    for row in record["samples"]:
        assert row["found"] > 0.9 and row["purity"] > 0.9 and row["general_routed"] < 0.2
    for row in record["rules"]:
        assert row["held_out_log_likelihood"] < 0 and row["found"] > 0.8
    assert [row["common_by"] for row in record["replays"]] == ["size", "separation"]
    for row in record["replays"]:
        for name, domain in row["domains"].items():
            by_seed = np.array(domain["by_seed"])
            assert by_seed.shape == (2, len(routes.REPLAYED))
            assert domain["mean"] == pytest.approx(by_seed.mean(), abs=1e-4)
            assert domain["least"] == pytest.approx(by_seed.min(), abs=1e-4)
            assert domain["mean"] > 0.9 if name != "general" else domain["mean"] < 0.2
