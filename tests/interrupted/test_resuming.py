# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of a resumed run: it is the uninterrupted one, or it says why it cannot be."""

import logging
import shutil
from functools import partial

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from tiny_runs import fit_steps, history, make_trainer, settings, train

from modeling_cse import ClusterExpertsCallback


NAME = "cluster_state_rank0.safetensors"
SAVING = {"max_steps": 20, "save_strategy": "steps", "save_steps": 1}
# Fits are at steps 6, 12 and 18, over the sixteen sequences of the two steps before.
SLOW = settings(warmup=6, recluster_every=6)


def run(folder, update: str, resume=None, **options):
    decay = {"ema_decay": 0.95} if "ema" in update else {}
    callback = ClusterExpertsCallback(**{**SLOW, "update": update, **decay})
    return train(folder, callback, resume=resume, **{**SAVING, **options})


@pytest.fixture(scope="module", params=["recluster", "ema", "recluster+ema", "frozen"])
def whole(request, tmp_path_factory):
    """An uninterrupted run that saved every step."""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, run(folder, request.param)


# 3: before any window; 5: inside that of the first fit; 6: at it; 9: between fits; 11, 17: inside later windows
@pytest.mark.parametrize("step", [3, 5, 6, 9, 11, 12, 17])
def test_resumed_run_is_the_uninterrupted_one(whole, step, tmp_path):
    update, folder, wanted = whole
    shutil.copytree(folder / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    resumed = run(tmp_path, update, resume=str(tmp_path / f"checkpoint-{step}"))
    assert history(resumed) == history(wanted)
    ours, theirs = resumed.model.state_dict(), wanted.model.state_dict()
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name


def checkpoint(tmp_path, step: int = 8):
    """A folder with one checkpoint from the middle of a run."""
    run(tmp_path, "recluster", save_steps=step, max_steps=10)
    return tmp_path / f"checkpoint-{step}"


def test_a_checkpoint_elsewhere_is_found_by_its_name(tmp_path):
    place = checkpoint(tmp_path / "first")
    callback = ClusterExpertsCallback(**SLOW)
    trainer = make_trainer(tmp_path / "second", callback, max_steps=10, resume_from_checkpoint=str(place))
    trainer.train(resume_from_checkpoint=str(place))
    assert callback.memory.fits == 1 and trainer.state.global_step == 10


def test_a_dense_checkpoint_of_the_warm_up_is_taken_up(tmp_path):
    """One that a run without the callback saved: there is nothing to remember yet."""
    make_trainer(tmp_path, **{**SAVING, "save_steps": 3, "max_steps": 4}).train()
    trainer = run(tmp_path, "frozen", resume=str(tmp_path / "checkpoint-3"), save_strategy="no")
    assert fit_steps(trainer) == [6]


@pytest.mark.parametrize(
    ("update", "fits"), [("frozen", [10]), ("ema", [10]), ("recluster", [10, 12]), ("recluster+ema", [10, 12])]
)
def test_a_dense_checkpoint_from_behind_the_first_fit_is_made_up_for(tmp_path, caplog, monkeypatch, update, fits):
    """The first fit was due at step 6: two steps read the sample, and later fits are those of the unbroken run."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    make_trainer(tmp_path, **{**SAVING, "save_steps": 8, "max_steps": 9}).train()
    resumed = str(tmp_path / "checkpoint-8")
    trainer = run(tmp_path, update, resume=resumed, max_steps=16, save_strategy="no")
    assert fit_steps(trainer) == fits
    assert "checkpoint of step 8 has no clusters, and the first fit was due at step 6" in caplog.text


def test_what_is_made_up_for_is_not_put_off_by_another_stop(tmp_path):
    """Again resumed two steps before the fit, which takes four steps to sample for."""
    make_trainer(tmp_path / "dense", **{**SAVING, "save_steps": 2, "max_steps": 9}).train()
    resumed = str(tmp_path / "dense" / "checkpoint-8")
    saving = {"max_steps": 16, "save_strategy": "steps", "save_steps": 2}
    slow = partial(ClusterExpertsCallback, **{**SLOW, "sample_size": 32, "update": "frozen"})
    whole = train(tmp_path / "whole", slow(), resume=resumed, resume_from_checkpoint=resumed, **saving)
    place = str(tmp_path / "whole" / "checkpoint-10")
    again = train(tmp_path / "again", slow(), resume=place, resume_from_checkpoint=place, **saving)
    assert fit_steps(whole) == [12] and history(again) == history(whole)


def test_a_dense_checkpoint_goes_on_with_clusters_at_once_where_text_can_be_read_ahead(tmp_path):
    model = partial(tiny_model, "gpt2", cse_routing="evidence")
    make_trainer(tmp_path, model=model(), **{**SAVING, "save_steps": 3, "max_steps": 4}).train()
    own = ClusterExpertsCallback(**{**SLOW, "warmup": 0, "update": "frozen"})
    trainer = train(tmp_path, own, model=model(), resume=str(tmp_path / "checkpoint-3"))
    assert fit_steps(trainer) == [3]


@pytest.mark.parametrize("warmup", [6, "auto"])
def test_where_nothing_is_left_to_make_up_for_it_is_refused(tmp_path, warmup):
    make_trainer(tmp_path, **{**SAVING, "save_steps": 8, "max_steps": 8}).train()
    with pytest.raises(ValueError, match="max_steps=9 is not allowed with a checkpoint of step 8 that has no cluster"):
        callback = ClusterExpertsCallback(**{**SLOW, "warmup": warmup, "update": "frozen"})
        train(tmp_path, callback, resume=str(tmp_path / "checkpoint-8"), max_steps=9)


@pytest.mark.parametrize("step", [4, 8], ids=["before the first fit", "behind it"])
def test_the_state_of_another_run_is_not_taken(tmp_path, step):
    """A checkpoint of the same step in the folder that the run writes to."""
    saving = {"save_steps": 4, "save_strategy": "steps"}
    for name, seed in (("one", 1), ("other", 2)):
        train(tmp_path / name, ClusterExpertsCallback(**SLOW), seed=seed, **saving)
    loaded = str(tmp_path / "one" / f"checkpoint-{step}")
    own, options = partial(ClusterExpertsCallback, **SLOW), {**saving, "save_steps": 99, "max_steps": 12}
    with pytest.raises(ValueError, match=r"other.checkpoint-\d' holds another run .*resume_from_checkpoint="):
        train(tmp_path / "other", own(), resume=loaded, **options)
    train(tmp_path / "other", own(), resume=loaded, resume_from_checkpoint=loaded, **options)


def test_missing_file_is_named(tmp_path):
    place = checkpoint(tmp_path)
    (place / NAME).unlink()
    with pytest.raises(ValueError, match=f"{NAME} was not found.*from step 8"):
        run(tmp_path, "recluster", resume=str(place))


@pytest.mark.parametrize("left", [0, 7, 200, -9])
def test_cut_file_is_named(tmp_path, left):
    place = checkpoint(tmp_path)
    content = (place / NAME).read_bytes()
    (place / NAME).write_bytes(content[:left])
    with pytest.raises(ValueError, match=f"{NAME} cannot be read"):
        run(tmp_path, "recluster", resume=str(place))


def test_file_of_another_step_is_refused(tmp_path):
    place = checkpoint(tmp_path)
    run(tmp_path / "other", "recluster", save_steps=7, max_steps=10)
    shutil.copy(tmp_path / "other" / "checkpoint-7" / NAME, place / NAME)
    with pytest.raises(ValueError, match="written at step 7, but the checkpoint is of step 8"):
        run(tmp_path, "recluster", resume=str(place))


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_foreign_file_is_refused(tmp_path, metadata):
    """Any other safetensors file under this name."""
    place = checkpoint(tmp_path)
    save_file({"x": torch.zeros(1)}, place / NAME, metadata=metadata)
    with pytest.raises(ValueError, match=NAME):
        run(tmp_path, "recluster", resume=str(place))


def test_file_of_experts_elsewhere_is_refused(tmp_path):
    """The model of the checkpoint had experts elsewhere."""
    place = checkpoint(tmp_path)
    with safe_open(place / NAME, framework="pt") as file:
        metadata = file.metadata()
    tensors = {name.replace("layer_1", "layer_0"): tensor for name, tensor in load_file(place / NAME).items()}
    metadata["seen"] = metadata["seen"].replace("layer_1", "layer_0")
    save_file(tensors, place / NAME, metadata=metadata)
    with pytest.raises(ValueError, match=NAME):
        run(tmp_path, "recluster", resume=str(place))


def test_saving_leaves_no_partial_file_and_no_pickle_of_ours(tmp_path):
    place = checkpoint(tmp_path)
    assert (place / NAME).is_file() and not list(place.glob("*.partial"))
    assert all(name.split(".")[0] in ("identities", "discriminants", "features") for name in load_file(place / NAME))
