# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of saving: at every moment a complete checkpoint exists, and it can be told from one cut short."""

import ast
import json
import shutil
from pathlib import Path

import pytest
import transformers.trainer
from tiny_runs import fit_steps, make_trainer, settings
from transformers import TrainerCallback

import modeling_cse
from modeling_cse import ClusterExpertsCallback, check_checkpoint, last_complete_checkpoint
from modeling_cse.training.memory import replace_whole


CLUSTERS = "cluster_state_rank0.safetensors"


def run(folder, callbacks=(), **changes):
    """Eight steps, the first fit at the fourth, a checkpoint at every second."""
    callback = ClusterExpertsCallback(**settings())
    trainer = make_trainer(folder, callback, **{"max_steps": 8, "save_strategy": "steps", "save_steps": 2, **changes})
    for late in callbacks:  # behind the callback under test
        trainer.add_callback(late)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "run"))


def test_the_newest_complete_checkpoint_is_found(folder):
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-8")
    (folder / "checkpoint-8" / "trainer_state.json").unlink()
    (folder / "checkpoint-6" / CLUSTERS).unlink()
    (folder / "checkpoint-final").mkdir()
    (folder / "checkpoint-12").mkdir()
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-4")
    assert last_complete_checkpoint(folder, clusters=False) == str(folder / "checkpoint-4")  # by its checksums
    (folder / "checkpoint-6" / "checksums.json").unlink()
    assert last_complete_checkpoint(folder, clusters=False) == str(folder / "checkpoint-6")


def test_without_a_checkpoint_training_starts_anew(tmp_path):
    assert last_complete_checkpoint(tmp_path) is None and last_complete_checkpoint(tmp_path / "nowhere") is None
    with pytest.raises(ValueError, match="no such folder"):
        check_checkpoint(tmp_path / "checkpoint-3")


@pytest.mark.parametrize("missing", ["trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt"])
@pytest.mark.parametrize("sealed", [True, False])
def test_what_is_missing_is_named(folder, missing, sealed):
    place = folder / "checkpoint-8"
    (place / missing).unlink()
    if not sealed:
        (place / "checksums.json").unlink()
    with pytest.raises(ValueError, match=missing.split(".")[0]):
        check_checkpoint(place)


def test_a_state_of_another_step_is_no_checkpoint(folder):
    (folder / "checkpoint-7").mkdir()
    for path in (folder / "checkpoint-6").iterdir():
        shutil.copy(path, folder / "checkpoint-7")
    with pytest.raises(ValueError, match="trainer_state.json is of step 6"):
        check_checkpoint(folder / "checkpoint-7")


def test_before_old_checkpoints_are_deleted_the_new_one_is_complete(tmp_path, monkeypatch):
    """The Trainer rotates before it calls `on_save`: a kill in between must not leave nothing."""
    found, rotate = [], transformers.trainer.rotate_checkpoints

    def watched(output_dir, **options):
        found.append(last_complete_checkpoint(output_dir))
        rotate(output_dir=output_dir, **options)

    monkeypatch.setattr(transformers.trainer, "rotate_checkpoints", watched)
    run(tmp_path, save_total_limit=1)
    assert found == [str(tmp_path / f"checkpoint-{step}") for step in (2, 4, 6, 8)]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-8"]


class Cut(TrainerCallback):
    """Ends the process's run inside a save, as seen from the disk."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            raise KeyboardInterrupt


def test_an_old_checkpoint_of_the_same_name_is_never_mixed_with_a_new_one(folder):
    with pytest.raises(KeyboardInterrupt):
        run(folder, [Cut()])
    assert (folder / "checkpoint-4" / "model.safetensors").is_file()  # the old run's
    with pytest.raises(ValueError, match="saving was cut short"):
        check_checkpoint(folder / "checkpoint-4")


class Veto(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = False


def test_a_save_that_another_callback_forbids_leaves_nothing(tmp_path):
    run(tmp_path, [Veto()])
    assert not list(tmp_path.glob("checkpoint-*"))


class SaveAtFive(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = state.global_step == 5


def test_a_save_that_another_callback_wants_is_complete(tmp_path):
    run(tmp_path, [SaveAtFive()], save_strategy="no")
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-5")


def test_saving_by_epochs_is_complete(tmp_path):
    run(tmp_path, save_strategy="epoch", max_steps=-1, num_train_epochs=2)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-16")
    assert (tmp_path / "checkpoint-8" / CLUSTERS).is_file()


def test_a_checkpoint_of_the_model_alone_holds_no_sample_of_the_text(folder, tmp_path):
    """`save_only_model`: the run fits as ever, and what an earlier one left in the same folders goes too."""
    assert fit_steps(run(folder, save_only_model=True)) == [4, 6]
    assert len(list(folder.glob("checkpoint-*/model.safetensors"))) == 4 and not list(folder.glob(f"*/{CLUSTERS}"))
    run(tmp_path / "late", [SaveAtFive()], save_strategy="no", save_only_model=True)
    names = {path.name for path in (tmp_path / "late" / "checkpoint-5").iterdir()}
    assert "model.safetensors" in names and CLUSTERS not in names
    run(tmp_path / "never", [Veto()], save_only_model=True)
    assert not list((tmp_path / "never").glob("checkpoint-*"))


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "state"
    replace_whole(path, lambda place: place.write_text("first"))

    def fail(place):
        place.write_text("sec")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_whole(path, fail)
    assert path.read_text() == "first"


def test_our_files_are_safetensors_and_json(saved):
    ours = {CLUSTERS, "checksums.json"}
    place = saved / "checkpoint-8"
    assert ours <= {path.name for path in place.iterdir()}
    files = json.loads((place / "checksums.json").read_text())["files"]
    assert files.keys() == {path.name for path in place.iterdir()} - {"checksums.json"}


def test_nothing_of_ours_is_pickled():
    """Names that write or read pickles occur nowhere in the package."""
    forbidden = {"pickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}
    for path in Path(modeling_cse.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not forbidden & {alias.name.split(".")[0] for alias in node.names}, path
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in forbidden, path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in {("torch", "save"), ("torch", "load"), ("np", "save")}, path
            if isinstance(node, ast.keyword):
                assert node.arg != "allow_pickle", path
