# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""A run's folder."""

import json
from types import SimpleNamespace

import pytest
from transformers import TrainerState, TrainingArguments

from modeling_cse.runs.folder import JsonLinesCallback, SettingsCallback, check_folder, ends_with, write_settings


def test_a_folder_with_a_run_is_only_taken_to_resume_it(tmp_path):
    settings = {"model.cse_layers": [1], "training.seed": 0}
    check_folder(tmp_path, settings, resume=False)
    write_settings(tmp_path, settings)
    with pytest.raises(ValueError, match="holds a run already"):
        check_folder(tmp_path, settings, resume=False)
    check_folder(tmp_path, settings, resume=True)
    with pytest.raises(ValueError, match=r"other settings of \['training.seed'\]"):
        check_folder(tmp_path, {**settings, "training.seed": 1}, resume=True)


def test_a_run_that_did_not_note_its_text_is_gone_on_with(tmp_path):
    write_settings(tmp_path, {"training.seed": 0})
    check_folder(tmp_path, {"training.seed": 0, "data.content": "ab"}, resume=True)
    write_settings(tmp_path, {"training.seed": 0, "data.content": "ab"})
    for content in ("cd", None):
        with pytest.raises(ValueError, match=r"other settings of \['data.content'\]"):
            check_folder(tmp_path, {"training.seed": 0, "data.content": content}, resume=True)


def test_metrics_of_steps_that_are_run_again_are_dropped(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    callback = JsonLinesCallback(path)
    state = SimpleNamespace(is_world_process_zero=True, log_history=[])
    callback.on_train_begin(None, state, None)
    for step in (1, 2, 3):
        state.log_history.append({"step": step, "loss": 1.0 / step})
        callback.on_log(None, state, None)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
    resumed = SimpleNamespace(is_world_process_zero=True, log_history=state.log_history[:2])
    callback.on_train_begin(None, resumed, None)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_a_folder_becomes_a_run_s_home_when_its_training_begins(tmp_path):
    callback = SettingsCallback(tmp_path, {"training.seed": 0})
    check_folder(tmp_path, {"training.seed": 1}, resume=False)
    callback.on_train_begin(None, SimpleNamespace(is_world_process_zero=False), None)
    check_folder(tmp_path, {"training.seed": 1}, resume=False)
    callback.on_train_begin(None, SimpleNamespace(is_world_process_zero=True), None)
    with pytest.raises(ValueError, match="holds a run already"):
        check_folder(tmp_path, {"training.seed": 1}, resume=False)


@pytest.mark.parametrize(("asked", "best", "ends"), [(True, 2, 2), (True, None, 8), (False, 2, 8)])
def test_a_run_that_is_over_ends_with_its_best_checkpoint_where_that_was_asked_for(tmp_path, asked, best, ends):
    """Its folder has been moved since."""
    last = tmp_path / "checkpoint-8"
    last.mkdir()
    known = None if best is None else f"elsewhere/checkpoint-{best}"
    TrainerState(global_step=8, best_model_checkpoint=known).save_to_json(str(last / "trainer_state.json"))
    steps = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    args = TrainingArguments(str(tmp_path), load_best_model_at_end=asked, use_cpu=True, **steps)
    assert ends_with(str(last), args) == str(tmp_path / f"checkpoint-{ends}")
