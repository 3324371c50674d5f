# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of the benchmark's corpus: documents that hold test rows are found, by the same rule as by looking at every
place; mixtures that are there can be read and turn the shares round."""

import gzip
import json

import numpy as np
import pytest
from longtail_tiny import EXAMPLES


from corpus import TEN_FOLDS, HeldOutOverlap, Mixture, normalised_words, test_texts as texts_of_tests  # isort: skip


def task_by_looking_everywhere(tasks: dict[str, list[str]], text: str) -> str | None:
    """The rule without any table: runs of 13 words first, then whole rows, the shorter ones first."""
    words = normalised_words(text)
    for length in (13, *range(8, 13)):
        for start in range(len(words) - length + 1):
            run, found = words[start : start + length], None
            for task, rows in tasks.items():
                for row in map(normalised_words, rows):
                    if length == 13:
                        hit = any(row[place : place + 13] == run for place in range(len(row) - 12))
                    else:
                        hit = row == run
                    found = task if hit else found
            if found:
                return found
    return None


def test_all_rows_of_a_task_in_ten_folds_are_looked_for(tmp_path):
    for task in ("gad", *TEN_FOLDS):
        (tmp_path / task).mkdir()
        for name in ("train", "test", "all_10fold"):
            with gzip.open(tmp_path / task / f"{name}.jsonl.gz", "wt") as file:
                file.write(json.dumps({"text": f"{task} {name}", "label": 0}) + "\n")
    assert texts_of_tests(tmp_path) == {"gad": ["gad test"], "euadr": ["euadr all_10fold"]}


def test_overlap_is_found_as_by_looking_everywhere():
    draws = np.random.default_rng(0)
    words = [f"w{number}" for number in range(30)]
    rows = [" ".join(draws.choice(words, length)) for length in (5, 7, 8, 9, 12, 13, 14, 30)]
    tasks = {"a": rows[:5], "b": rows[5:], "c": [rows[3], rows[6]]}
    overlap, found = HeldOutOverlap(tasks), []
    for number in range(200):
        row = rows[number % len(rows)].split()
        cut = row[draws.integers(0, 2) : len(row) - draws.integers(0, 2)]
        text = ", ".join([*draws.choice(words, 20), *cut, *draws.choice(words, 20)]).upper()
        found.append(overlap.task_of(text))
        assert found[-1] == task_by_looking_everywhere(tasks, text)
    assert {None, "a", "b", "c"} == set(found)
    assert overlap.task_of("") is None and HeldOutOverlap({}).task_of(" ".join(words)) is None


@pytest.mark.parametrize("path", sorted((EXAMPLES / "mixtures").glob("*.json")), ids=lambda path: path.stem)
def test_every_mixture_can_be_read(path):
    assert Mixture(**json.loads(path.read_text())).shares["general"] == 0.85


def test_each_domain_has_each_share_once():
    mixtures = [json.loads((EXAMPLES / "mixtures" / f"share-{name}.json").read_text()) for name in "abcd"]
    for domain in ("court", "contracts", "medical", "academic"):
        assert sorted(mixture["shares"][domain] for mixture in mixtures) == [0.01, 0.02, 0.04, 0.08]
    assert all(mixture["domains"] == mixtures[0]["domains"] for mixture in mixtures)
