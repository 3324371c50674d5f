# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of one run of the long-tail benchmark: every kind of arm trains, is measured and goes on after a stop; a
domain stage starts from a finished run and keeps two models."""

import json

import numpy as np
import pytest
import torch
from longtail_tiny import ARMS, SHARES, build_corpus, losses, write_settings, write_text
from safetensors.numpy import load_file
from transformers import TrainerCallback, default_data_collator


from arms import Arm, label, read_arms  # isort: skip
from blocks import held_out_blocks, training_blocks  # isort: skip
import train as train_module  # isort: skip
from measure import measure  # isort: skip
from stage import rows_read  # isort: skip
from train import Size, build_parser, run, train  # isort: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Arms, size, and a corpus of each family."""
    folder = tmp_path_factory.mktemp("longtail")
    text = write_text(folder / "text")
    corpora = {family: build_corpus(text, folder / family, family=family) for family in ("gpt2", "bert")}
    return folder, corpora


def start(made, tmp_path, family, name, seed=0, callbacks=(), **training):
    folder, corpora = made
    arms, size = write_settings(tmp_path, family, **training)
    arm, size = read_arms(arms)[name], Size.load(str(size))
    return train(arm, seed, size, corpora[family], tmp_path / f"{name}-{seed}", callbacks=callbacks)


class StopAt(TrainerCallback):
    """Ends a training after a step, as a time limit would, or raises as a kill would."""

    def __init__(self, step, kill=False):
        self.step, self.kill = step, kill

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            if self.kill:
                raise KeyboardInterrupt
            control.should_save = control.should_training_stop = True


@pytest.mark.parametrize("name", ["dense", "switch", "cse", "oracle"])
def test_every_kind_of_arm_is_trained_and_measured(made, tmp_path, family, name):
    record = start(made, tmp_path, family, name)
    assert set(record) >= {"parameters", "seconds", "validation", "test"} and record["arm"] == name
    trained = losses(tmp_path / f"{name}-0")
    assert list(trained) == list(range(1, 13)) and trained[12] < trained[1] - 0.2
    for split in ("validation", "test"):
        perplexities = record[split]["perplexity"]
        assert set(perplexities) == set(SHARES) and all(1 < value < 400 for value in perplexities.values())
        kept = load_file(tmp_path / f"{name}-0" / f"{split}.safetensors")
        assert kept["nll"].shape == (24, 31 if family == "gpt2" else 32)
        assert ("predicted" in kept) == (family == "bert")
    routing = record["test"]["routing"]
    assert bool(routing) == (name in ("cse", "oracle"))
    if name == "oracle":
        (site,) = routing.values()
        # general text, the largest cluster, has no expert; the other domains have one each, and all of their text
        assert [site[domain]["routed"] for domain in sorted(SHARES)] == [0, 1, 1]
    assert json.loads((tmp_path / f"{name}-0" / "result.json").read_text()) == record
    assert start(made, tmp_path, family, name) == record


@pytest.mark.parametrize("name, kill", [("cse", True), ("dense_legal", True), ("dense_legal", False)])
def test_a_stopped_run_goes_on_as_if_nothing_had_been(made, tmp_path, family, name, kill):
    records = []
    for folder in (tmp_path / "whole", tmp_path / "stopped"):
        folder.mkdir()
        if name == "dense_legal":
            start(made, folder, family, "dense")
        if folder.name == "stopped":
            if kill:
                with pytest.raises(KeyboardInterrupt):
                    start(made, folder, family, name, callbacks=[StopAt(7, kill=True)])
            else:
                assert start(made, folder, family, name, callbacks=[StopAt(7)]) is None
            assert not (folder / f"{name}-0" / "result.json").exists()
        records.append(start(made, folder, family, name))
    whole, stopped = records
    assert stopped["resumed"] and not whole["resumed"]
    assert losses(tmp_path / "whole" / f"{name}-0") == losses(tmp_path / "stopped" / f"{name}-0")
    assert whole["test"] == stopped["test"] and whole["validation"] == stopped["validation"]


def test_a_run_that_stopped_after_its_last_step_takes_no_further_one(made, tmp_path):
    before = start(made, tmp_path, "gpt2", "dense")
    (tmp_path / "dense-0" / "result.json").unlink()
    again = start(made, tmp_path, "gpt2", "dense")
    assert again["test"] == before["test"] and again["seconds"] >= 0.5 * before["seconds"]
    assert list(losses(tmp_path / "dense-0")) == list(range(1, 13))


def test_a_stage_needs_a_finished_run_of_its_seed(made, tmp_path):
    with pytest.raises(ValueError, match="start='dense' is not allowed yet"):
        start(made, tmp_path, "gpt2", "dense_legal")
    start(made, tmp_path, "gpt2", "dense", seed=1)
    with pytest.raises(ValueError, match="start='dense' is not allowed yet"):
        start(made, tmp_path, "gpt2", "dense_legal", seed=0)


def test_a_stage_learns_its_domain_alone_and_keeps_the_best_and_the_last(made, tmp_path, family):
    dense = start(made, tmp_path, family, "dense")
    best = start(made, tmp_path, family, "dense_legal")
    last = json.loads((tmp_path / "dense_legal_last-0" / "result.json").read_text())
    by_step = {int(step): loss for step, loss in best["validation_loss_by_step"].items()}
    train_rows = made[1][family].train
    read = train_rows.select(rows_read(tmp_path / "dense-0", len(train_rows)))["domain"]
    assert len(read) == 96 < len(train_rows)
    steps = 3 * -(-sum(domain == "legal" for domain in read) // 8)
    assert best["blocks"] == sum(domain == "legal" for domain in read)
    assert list(by_step) == [*range(2, steps, 2), steps]
    assert last["step"] == steps and best["step"] == min(by_step, key=by_step.get)
    for record, name in ((best, "dense_legal"), (last, "dense_legal_last")):
        assert record["arm"] == name and set(record["test"]["perplexity"]) == set(SHARES)
        assert record["parameters"] == dense["parameters"]
        kept = load_file(tmp_path / f"{name}-0" / "test.safetensors")["nll"]
        assert np.isfinite(kept).all() and kept.shape[0] == 24
        # the loss that the Trainer found for the kept model is that of the model which is measured
        measured = torch.tensor(record["validation"]["perplexity"]["legal"]).log().item()
        assert measured == pytest.approx(by_step[record["step"]], rel=0.02)
        assert record["test"]["perplexity"]["legal"] < dense["test"]["perplexity"]["legal"]
        assert record["test"]["perplexity"]["medical"] > record["test"]["perplexity"]["legal"]
    learnt = losses(tmp_path / "dense_legal-0")
    assert learnt[1] == pytest.approx(torch.tensor(dense["validation"]["perplexity"]["legal"]).log().item(), abs=0.4)


def test_a_stage_of_cse_trains_the_expert_of_its_domain_and_nothing_else(made, tmp_path):
    before = start(made, tmp_path, "gpt2", "cse")
    after = start(made, tmp_path, "gpt2", "cse_legal")
    routes = {domain: next(iter(before["test"]["routing"].values()))[domain]["routed"] for domain in SHARES}
    assert routes["legal"] > 0.5, "the test wants an expert for legal text"
    weights = [load_file(tmp_path / f"{name}-0" / "model" / "model.safetensors") for name in ("cse", "cse_legal")]
    changes = {name: weight != weights[1][name] for name, weight in weights[0].items()}
    moved = {name: change.reshape(len(change), -1).any(1) for name, change in changes.items() if change.any()}
    assert moved and all(".experts." in name for name in moved)
    assert not any(slots.all() for slots in moved.values()), "experts that get no legal text stay"
    assert after["test"]["perplexity"]["legal"] < before["test"]["perplexity"]["legal"]
    assert after["test"]["routing"] == before["test"]["routing"]


@pytest.mark.parametrize("name", ["dense", "cse"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_blocks_of_a_stage_are_those_that_its_start_has_read(made, tmp_path, monkeypatch, name, accumulation):
    read = []

    def noting(rows):
        read.extend(tuple(row["input_ids"]) for row in rows)
        return default_data_collator(rows)

    monkeypatch.setattr(train_module, "default_data_collator", noting)
    batches = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    start(made, tmp_path, "gpt2", name, seed=3, **batches)
    blocks = made[1]["gpt2"].train
    rows = rows_read(tmp_path / f"{name}-3", len(blocks))
    assert rows == sorted(rows) and len(rows) == 96 and rows != list(range(96))
    assert {tuple(ids) for ids in blocks.select(rows)["input_ids"]} == {*read[:96]}


def test_after_an_epoch_all_blocks_were_read(made, tmp_path):
    start(made, tmp_path, "gpt2", "dense", max_steps=17)
    assert rows_read(tmp_path / "dense-0", 128) == list(range(128))


class Spoil(TrainerCallback):
    """Makes a model worse than it ever was, after a step."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 5:
            with torch.no_grad():
                model.get_input_embeddings().weight.mul_(20)


def test_the_best_model_is_not_the_last_when_validation_grows_worse(made, tmp_path):
    start(made, tmp_path, "gpt2", "dense")
    best = start(made, tmp_path, "gpt2", "dense_legal", callbacks=[Spoil()])
    last = json.loads((tmp_path / "dense_legal_last-0" / "result.json").read_text())
    assert best["step"] == 4 < last["step"]
    assert best["validation"]["perplexity"]["legal"] < last["validation"]["perplexity"]["legal"]


def test_a_stage_refuses_what_it_cannot_do(made, tmp_path):
    packed = build_corpus(made[0] / "text", tmp_path / "packed", packed_together=True)
    arms, size = write_settings(tmp_path)
    start(made, tmp_path, "gpt2", "dense")
    with pytest.raises(ValueError, match="domain='legal' is not allowed: no block is of it alone"):
        train(read_arms(arms)["dense_legal"], 0, Size.load(str(size)), packed, tmp_path / "dense_legal-0")
    for changes, message in (
        ({"kind": "cse", "clusters": {"num_clusters": 3}}, "a stage keeps the clusters of its start"),
        ({"kind": "cse", "control": "oracle"}, "a stage keeps the clusters of its start"),
        ({"training": {"learning_rate": 1.0}}, "a stage needs"),
        ({"domain": None}, "belong together"),
    ):
        fields = {name: value for name, value in ARMS["dense_legal"].items() if name != "like"}
        arms.write_text(json.dumps({"stage": {"kind": "dense", **fields, **changes}}))
        with pytest.raises(ValueError, match=message):
            read_arms(arms)


def test_held_out_masks_are_the_same_for_every_arm_and_fresh_ones_are_not(made):
    corpus = made[1]["bert"]
    dense, oracle = Arm("dense", "dense"), Arm("oracle", "cse", control="oracle")
    plain = held_out_blocks(label(dense, corpus.test, SHARES, 0), corpus)
    labelled = held_out_blocks(label(oracle, corpus.test, SHARES, 5), corpus)
    assert plain["input_ids"] == labelled["input_ids"] and plain["labels"] == labelled["labels"]
    asked = torch.tensor(plain["labels"]) != -100
    assert 0.1 < asked.float().mean() < 0.2
    assert (torch.tensor(plain["labels"])[asked] == torch.tensor(corpus.test["input_ids"])[asked]).all()
    blocks, callbacks = training_blocks(corpus.train, corpus, seed=0)
    first = [blocks[row]["labels"] for row in range(8)]
    assert len(callbacks) == 1
    blocks.set_epoch(1)
    assert not torch.equal(torch.stack(first), torch.stack([blocks[row]["labels"] for row in range(8)]))


def test_only_what_was_asked_counts_for_bert(made):
    """The perplexity of a model that knows nothing is the vocabulary, whatever share of the tokens is masked."""
    corpus = made[1]["bert"]
    blocks, vocabulary, precisions = held_out_blocks(corpus.test, corpus), len(corpus.tokenizer), set()

    class Knows(torch.nn.Module):
        base_model, device = torch.nn.Module(), torch.device("cpu")

        def forward(self, input_ids):
            precisions.add(torch.is_autocast_enabled("cpu"))
            return type("Output", (), {"logits": torch.zeros(*input_ids.shape, vocabulary)})

    found = measure(Knows(), blocks, causal=False, bf16=True)
    assert precisions == {True}
    found = measure(Knows(), blocks, causal=False)
    assert precisions == {True, False}
    assert found.perplexity("legal") == pytest.approx(vocabulary, rel=1e-4)
    assert found.predicted.sum() == (torch.tensor(blocks["labels"]) != -100).sum()


def test_a_corpus_of_another_family_and_unknown_arms_are_refused(made, tmp_path):
    arms, size = write_settings(tmp_path, "bert")
    flags = ["--arms", str(arms), "--size", str(size), "--output", str(tmp_path), "--corpus", str(made[0] / "gpt2")]
    with pytest.raises(ValueError, match="size='tiny' is not allowed: it is of the family 'bert'"):
        run(build_parser().parse_args([*flags, "--arm", "dense"]))
    with pytest.raises(ValueError, match="arm='other' is not allowed: it must be one of"):
        run(build_parser().parse_args([*flags, "--arm", "other"]))


def test_a_size_may_be_like_another(tmp_path):
    arms, size = write_settings(tmp_path, bf16=True)
    (tmp_path / "short.yaml").write_text("like: tiny\ntraining: {max_steps: 2, bf16: null}\nconfig: {n_layer: 1}\n")
    tiny, short = Size.load(str(size)), Size.load(str(tmp_path / "short.yaml"))
    assert (short.name, short.family) == ("short", "gpt2")
    assert short.config == {**tiny.config, "n_layer": 1} and "bf16" not in short.training
    assert short.training == {k: v for k, v in tiny.training.items() if k != "bf16"} | {"max_steps": 2}


def test_the_command_line_names_the_folder(made, tmp_path):
    arms, size = write_settings(tmp_path)
    flags = ["--arms", str(arms), "--size", str(size), "--output", str(tmp_path), "--corpus", str(made[0] / "gpt2")]
    record = run(build_parser().parse_args([*flags, "--arm", "dense", "--seed", "3", "--steps", "2"]))
    assert json.loads((tmp_path / "tiny" / "gpt2" / "dense-3" / "result.json").read_text()) == record
    assert list(losses(tmp_path / "tiny" / "gpt2" / "dense-3")) == [1, 2]
