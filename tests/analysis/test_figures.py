# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of the run picture: it shows what was logged, reads what a killed run left, and touches nothing else."""

import json
import math

import matplotlib
import pytest
from matplotlib import pyplot

from modeling_cse.analysis import plot_run, read_metrics


def log_history(gain: float = 0.0) -> list[dict]:
    entries = []
    for step in range(10, 110, 10):
        entries.append({"step": step, "loss": 3 + 5 * math.exp(-step / 30) - gain})
        if step % 20 == 0:
            entries.append({"step": step, "eval_law_loss": 3.0, "eval_law_perplexity": 40 - step / 5 - gain})
            entries.append({"step": step, "eval_old_law_loss": 3.0, "eval_old_law_perplexity": 60 - step / 5})
        if gain and step in (30, 60):
            entries.append({"step": step, "cse/layer_5/ffn/clusters": 6, "cse/layer_5/ffn/share_routed": 0.1})
    return entries + [{"step": 100, "train_loss": 4.0, "train_runtime": 1.0}]


def curves(axis) -> list:
    """Lines with a curve's points, so without the two-point vertical lines."""
    return [line for line in axis.get_lines() if len(line.get_xdata()) > 2]


def test_every_run_domain_and_expert_is_in_the_picture(tmp_path, drawn):
    path = tmp_path / "new folder" / "run.png"
    routing = {"law": [0.5, 0.25], "old_law": [0.0, 1.0]}
    plot_run({"cse": log_history(0.5), "dense": log_history()}, routing, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    loss, perplexity, routed = drawn[0].axes
    assert [line.get_linestyle() for line in curves(loss)] == ["-", "--"]
    assert list(curves(loss)[0].get_ydata()) == [entry["loss"] for entry in log_history(0.5) if "loss" in entry]
    assert len(curves(perplexity)) == 4 and perplexity.get_yscale() == "log"
    labels = [text.get_text() for text in perplexity.get_legend().get_texts()]
    assert labels == ["law", "old law", "cse", "dense"]
    heights = [[bar.get_height() for bar in bars] for bars in routed.containers]
    assert heights == [[0.5, 0.0], [0.25, 1.0], [0.25, 0.0]]
    assert [bars.get_label() for bars in routed.containers] == ["expert 0", "expert 1", "common"]


def test_fits_are_dotted_and_only_the_first_is_named(tmp_path, drawn):
    plot_run({"cse": log_history(0.5), "dense": log_history()}, None, tmp_path / "run.png")
    assert len(drawn[0].axes) == 2
    for axis in drawn[0].axes:
        marks = [line for line in axis.get_lines() if line.get_linestyle() == ":"]
        assert [line.get_xdata()[0] for line in marks] == [30, 60]
        assert marks[0].get_linewidth() > marks[1].get_linewidth()
        assert [text.get_text() for text in axis.texts] == ["experts on"]


def test_of_a_step_that_was_logged_twice_the_later_entry_counts(tmp_path, drawn):
    entries = [{"step": step, "loss": 9.0} for step in (1, 2, 3)] + [{"step": step, "loss": 1.0} for step in (2, 3, 4)]
    plot_run({"resumed": entries}, None, tmp_path / "run.png")
    assert list(curves(drawn[0].axes[0])[0].get_ydata()) == [9.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "entries",
    [
        [],
        [{"step": 1, "loss": 2.0}],
        [{"step": 1, "loss": math.nan}, {"step": 2, "eval_perplexity": math.inf}],
        [{"step": 1, "eval_$x$_perplexity": 3.0}, {"step": 2, "eval__perplexity": 3.0}],
    ],
)
def test_short_diverged_and_oddly_named_runs_are_drawn_too(tmp_path, entries):
    plot_run({"_$": entries}, {"a$": [], "b": []}, tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 1000


def test_wrong_input_is_named(tmp_path):
    with pytest.raises(ValueError, match="`runs` is empty"):
        plot_run({}, None, tmp_path / "run.png")
    with pytest.raises(ValueError, match="`routing` has .* for 'law'"):
        plot_run({"cse": []}, {"law": [0.9, 0.9]}, tmp_path / "run.png")
    with pytest.raises(ValueError, match="the same number for each"):
        plot_run({"cse": []}, {"law": [0.9], "medicine": [0.1, 0.1]}, tmp_path / "run.png")


def test_matplotlib_is_left_as_it_was(tmp_path):
    before, figures = dict(matplotlib.rcParams), pyplot.get_fignums()
    plot_run({"cse": log_history(0.5)}, {"law": [0.5]}, tmp_path / "run.png")
    assert dict(matplotlib.rcParams) == before
    assert pyplot.get_fignums() == figures


def test_json_lines_come_back_without_the_line_a_kill_tore(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = "".join(json.dumps(entry) + "\n" for entry in log_history(0.5))
    path.write_text(whole)
    assert read_metrics(path) == log_history(0.5)
    path.write_bytes(whole.encode() + '{"step": 7, "note": "ä'.encode()[:-1])
    assert read_metrics(path) == log_history(0.5)
    path.write_text('{"step": 1}\n\n{"step": 2}')
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize(
    "text, line", [('{"step": 1}\n{"st\n{"step": 2}\n', 2), ("[1]\n", 1), ('{"step": 1}\n{"st\n', 2)]
)
def test_any_other_broken_line_is_an_error_with_its_number(tmp_path, text, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"metrics.jsonl', line {line} is"):
        read_metrics(path)
    with pytest.raises(FileNotFoundError):
        read_metrics(tmp_path / "none.jsonl")
