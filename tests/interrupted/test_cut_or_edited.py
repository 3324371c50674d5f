# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""
Promises about checkpoints that were cut short or edited: a run goes on from them bit for bit or says what is wrong,
and `from_pretrained` does not build a model out of them.

The environment variable EDITS sets how many random edits a file gets; a large run is recorded in
docs/evidence/robustness.md.
"""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import activate, tiny_model
from tiny_runs import history, make_trainer, settings
from transformers import AutoModelForCausalLM

from modeling_cse import ClusterExpertsCallback, check_checkpoint
from modeling_cse.training import memory


EDITS = int(os.environ.get("EDITS", "4"))
CLUSTERS, WEIGHTS, SUMS = "cluster_state_rank0.safetensors", "model.safetensors", "checksums.json"
NEEDED = ("trainer_state.json", WEIGHTS, "optimizer.pt", "scheduler.pt", "rng_state.pth", CLUSTERS)


def train(folder, resume=None):
    """Seven steps with fits at 4 and 6, and a checkpoint at step 5, inside the window of the second fit."""
    callback = ClusterExpertsCallback(**settings())
    saving = {"save_strategy": "steps", "save_steps": 5} if resume is None else {}
    trainer = make_trainer(folder, callback, max_steps=7, **saving)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, train(folder)


@pytest.fixture
def place(whole, tmp_path):
    return Path(shutil.copytree(whole[0] / "checkpoint-5", tmp_path / "checkpoint-5"))


def edits(content: bytes, count: int, seed: str):
    """Contents cut short anywhere, and with one bit changed anywhere, half of those among the first bytes."""
    generator = random.Random(seed)
    yield b""
    for _ in range(count):
        yield content[: generator.randrange(len(content))]
        changed = bytearray(content)
        changed[generator.randrange(generator.choice([len(content), min(200, len(content))]))] ^= (
            1 << generator.randrange(8)
        )
        yield bytes(changed)


def test_any_edit_of_any_file_is_named(place):
    check_checkpoint(place)
    names = sorted(path.name for path in place.iterdir() if path.name != SUMS)
    assert {*NEEDED} <= {*names}
    for name in names:
        content = (place / name).read_bytes()
        for edited in edits(content, EDITS, name):
            (place / name).write_bytes(edited)
            with pytest.raises(ValueError, match=name):
                check_checkpoint(place)
        (place / name).write_bytes(content)
    check_checkpoint(place)


def test_edited_checksums_pass_no_edited_file(place):
    content = (place / SUMS).read_bytes()
    (place / WEIGHTS).write_bytes((place / WEIGHTS).read_bytes()[:-1] + b"\0")
    for edited in edits(content, 5 * EDITS, SUMS):
        (place / SUMS).write_bytes(edited)
        with pytest.raises(ValueError, match="checkpoint"):
            check_checkpoint(place)


@pytest.mark.parametrize("name", NEEDED)
def test_without_checksums_too_no_file_may_be_cut(place, name):
    """A kill just before the checksums are written leaves a checkpoint without."""
    (place / SUMS).unlink()
    check_checkpoint(place)
    content = (place / name).read_bytes().rstrip(b"\n")
    generator = random.Random(name)
    for left in [0, 1, len(content) - 1, *(generator.randrange(len(content)) for _ in range(3 * EDITS))]:
        (place / name).write_bytes(content[:left])
        with pytest.raises(ValueError, match=name):
            check_checkpoint(place)


@pytest.mark.parametrize("name", [*NEEDED, "config.json", "training_args.bin"])
def test_a_run_goes_on_bit_for_bit_or_not_at_all(whole, place, name):
    """Whatever the Trainer itself makes of an edited file."""
    content = (place / name).read_bytes()
    for edited in [*edits(content, max(1, EDITS // 4), f"run {name}"), content]:
        (place / name).write_bytes(edited)
        try:
            resumed = train(place.parent, str(place))
        except Exception:  # the Trainer reads its files before anybody else
            assert edited != content
            continue
        assert edited == content, "an edited checkpoint was taken"
        assert history(resumed) == history(whole[1])
        wanted = whole[1].model.state_dict()
        assert all(torch.equal(value, wanted[key]) for key, value in resumed.model.state_dict().items())


def rewrite(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


ROUTER = "transformer.h.1.mlp.router."
BAD_ROUTERS = {
    "lacks a buffer": lambda tensors: tensors.pop(ROUTER + "radii"),
    "NaN": lambda tensors: tensors[ROUTER + "centroids"].fill_(float("nan")),
    "infinite": lambda tensors: tensors[ROUTER + "discriminant_bias"].fill_(float("inf")),
    "radius": lambda tensors: tensors[ROUTER + "radii"].fill_(0.0),
    "owner": lambda tensors: tensors[ROUTER + "cluster_expert"].fill_(9),
    "negative size": lambda tensors: tensors[ROUTER + "cluster_sizes"].fill_(-1),
    "owner of nothing": lambda tensors: tensors[ROUTER + "cluster_sizes"].fill_(0),
}


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("change", BAD_ROUTERS.values(), ids=BAD_ROUTERS.keys())
def test_a_run_refuses_weights_with_an_edited_router(place, change, sealed):
    if not sealed:
        (place / SUMS).unlink()
    rewrite(place / WEIGHTS, change)
    with pytest.raises(ValueError, match="cut or edited"):
        train(place.parent, str(place))


def test_a_run_refuses_weights_with_other_clusters(place):
    """A routing state that could be right, but is not the one of this checkpoint."""
    (place / SUMS).unlink()
    rewrite(place / WEIGHTS, lambda tensors: tensors[ROUTER + "centroids"].add_(1e-6))
    with pytest.raises(ValueError, match="routing state in the weights of .* is not the one"):
        train(place.parent, str(place))


def with_metadata(path: Path, change) -> None:
    """The same tensors, other metadata, and a checksum that fits again."""
    tensors, metadata = load_file(path), memory.read_metadata(path)
    change(tensors, metadata)
    metadata["sha256"] = memory._digest(tensors, metadata)
    save_file(tensors, path, metadata=metadata)


FOREIGN = {
    "version '3'": lambda tensors, said: said.update(version="3"),
    "written at step 4": lambda tensors, said: said.update(step="4"),
    "written by a run of 2 processes": lambda tensors, said: said.update(ranks="2"),
    "not the clustering state of this model": lambda tensors, said: said.update(shapes='{"layer_1/ffn": [64, 16, 4]}'),
}


@pytest.mark.parametrize("complaint", FOREIGN)
def test_a_clustering_state_from_elsewhere_is_told(place, complaint):
    (place / SUMS).unlink()
    with_metadata(place / CLUSTERS, FOREIGN[complaint])
    with pytest.raises(ValueError, match=f"{CLUSTERS} .*{complaint}"):
        train(place.parent, str(place))


def test_a_clustering_state_of_the_first_release_is_taken_up(place, whole):
    """It did not say whether training began with clusters."""
    (place / SUMS).unlink()
    with_metadata(place / CLUSTERS, lambda tensors, said: said.pop("at_once") and said.update(version="1"))
    assert history(train(place.parent, str(place))) == history(whole[1])


def first(tensors: dict, kind: str) -> str:
    return next(name for name in sorted(tensors) if name.startswith(kind))


EDITED_STATES = {
    "missing": lambda tensors: tensors.pop(first(tensors, "identities")),
    "shape": lambda tensors: tensors.update({(name := first(tensors, "features")): tensors[name][:1].clone()}),
    "dtype": lambda tensors: tensors.update({(name := first(tensors, "discriminants")): tensors[name].float()}),
    "NaN": lambda tensors: tensors[first(tensors, "features")].fill_(float("nan")),
    "more": lambda tensors: tensors.update(x=torch.zeros(1)),
}


@pytest.mark.parametrize("change", EDITED_STATES.values(), ids=EDITED_STATES.keys())
def test_an_edited_clustering_state_is_told(place, change):
    (place / SUMS).unlink()
    tensors = load_file(place / CLUSTERS)
    metadata = memory.safe_open(place / CLUSTERS, framework="pt").metadata()
    change(tensors)
    save_file(tensors, place / CLUSTERS, metadata=metadata)
    with pytest.raises(ValueError, match=f"{CLUSTERS} was changed after it was written"):
        train(place.parent, str(place))


# ---- what a user loads -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    activate(tiny_model("gpt2")).save_pretrained(folder)
    return folder


@pytest.fixture
def model(published, tmp_path):
    return Path(shutil.copytree(published, tmp_path / "model"))


def test_cut_weights_build_no_model(model):
    content = (model / WEIGHTS).read_bytes()
    generator = random.Random(0)
    for left in [0, 7, len(content) - 1, *(generator.randrange(len(content)) for _ in range(3 * EDITS))]:
        (model / WEIGHTS).write_bytes(content[:left])
        with pytest.raises(ValueError, match=r"model\*.safetensors\) cannot be read"):
            AutoModelForCausalLM.from_pretrained(model)


@pytest.mark.parametrize("change", BAD_ROUTERS.values(), ids=BAD_ROUTERS.keys())
def test_edited_routers_build_no_model(model, change):
    rewrite(model / WEIGHTS, change)
    with pytest.raises(ValueError, match="cut or edited"):
        AutoModelForCausalLM.from_pretrained(model)


@pytest.mark.parametrize("field, value", [("cse_max_clusters", 7), ("cse_num_experts", 2), ("n_embd", 16)])
def test_a_config_that_does_not_fit_its_weights_builds_no_model(model, field, value):
    """Upstream reports each tensor whose shape differs."""
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(RuntimeError, match="mismatched"):
        AutoModelForCausalLM.from_pretrained(model)


def test_a_whole_model_is_built(model):
    loaded = AutoModelForCausalLM.from_pretrained(model)
    wanted = load_file(model / WEIGHTS)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in wanted.items())
