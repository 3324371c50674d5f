# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of runs with clusters of texts: found, resumed to the bit, kept without memory, refused where wrong."""

import json
import shutil
from dataclasses import fields

import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.metrics import adjusted_rand_score
from tiny import dense_model, expert_ids, first_tensor, routed_module, routed_modules, tiny_model
from tiny_runs import history, make_trainer, rows, settings, train

from modeling_cse import ClusterExpertsCallback, fit_experts, from_dense
from modeling_cse.clustering import RoutingFeatures
from modeling_cse.training import memory
from modeling_cse.training.checkpoints import CHECKSUMS
from modeling_cse.training.collecting import TEXTS
from modeling_cse.training.memory import ClusterMemory


# Of three domains the first is common.
TEXT = {"algorithm": "text", "common_share": 0.4, "num_clusters": 3, "sample_size": 32}
LENGTH = 24  # of a text: in fewer tokens these vocabularies hardly meet themselves again
FIELDS = [field.name for field in fields(RoutingFeatures)]
DOMAINS = torch.tensor((0, 0, 0, 0, 1, 1, 2, 2))


@torch.no_grad()
def knowing(model):
    """A model whose embeddings tell the three vocabularies apart, as those of a trained model do."""
    table = model.get_input_embeddings().weight
    for domain in range(3):
        table[5 + 31 * domain : 36 + 31 * domain] += 0.5 * torch.eye(32)[domain]
    return model


def callback(**changes) -> ClusterExpertsCallback:
    return ClusterExpertsCallback(**settings(**{**TEXT, **changes}))


def run(folder, model=None, *, resume=None, data=None, changes=None, **options):
    model = tiny_model("gpt2", cse_routing="evidence") if model is None else model
    data = rows(length=LENGTH) if data is None else data
    return train(folder, callback(**(changes or {})), model=model, resume=resume, data=data, **options)


def experts_of_held_out(model, seed: int = 5) -> torch.Tensor:
    """(layers, rows, T) experts of sixteen rows that were not trained on."""
    ids = torch.stack([row["input_ids"] for row in rows(16, LENGTH, seed=seed)])
    with torch.no_grad():
        return expert_ids(model, model.eval()(ids, output_cluster_ids=True).cluster_ids)


def owners(model) -> list[int]:
    """The expert of each domain at the end of its texts, the same in all layers."""
    experts = experts_of_held_out(model)[:, :, -1]
    domains = DOMAINS.repeat(2)
    found = [experts[:, domains == domain].unique().tolist() for domain in range(3)]
    assert all(len(each) == 1 for each in found), found
    return [each[0] for each in found]


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_held_out_texts_go_to_the_expert_of_their_domain(tmp_path, family):
    trainer = run(tmp_path, tiny_model(family, cse_routing="evidence"))
    common, *rare = owners(trainer.model)
    assert common == -1 and sorted(rare) == [0, 1]
    last = [entry for entry in trainer.state.log_history if "cse/layer_1/ffn/clusters" in entry][-1]
    for site in ("layer_1/ffn", "layer_2/ffn"):
        assert last[f"cse/{site}/clusters"] == 3 and last[f"cse/{site}/agreement"] > 0.8
        assert last[f"cse/{site}/churn"] == 0 and 0.3 < last[f"cse/{site}/share_routed"] < 0.7
    states = [module.router.cluster_expert for module in routed_modules(trainer.model).values()]
    assert torch.equal(*states)


@pytest.mark.parametrize("routing", ["discriminant", "sequence"])
def test_other_routings_take_clusters_of_texts_too(tmp_path, routing):
    family = "gpt2" if routing == "discriminant" else "bert"
    trainer = run(tmp_path, knowing(tiny_model(family, cse_routing=routing)))
    domains = DOMAINS.repeat(2)
    for experts in experts_of_held_out(trainer.model):
        assert adjusted_rand_score(domains, experts.mode(1).values) > 0.8
    assert not hasattr(trainer.model.base_model, "evidence_router")


# ---- going on -------------------------------------------------------------------------------------------------------


SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 8}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder, **SAVING)


def checkpoint(whole, folder, step: int):
    place = folder / f"checkpoint-{step}"
    shutil.copytree(whole[0] / f"checkpoint-{step}", place)
    return place


@pytest.mark.parametrize("step", [3, 4, 5, 7])
def test_a_resumed_run_is_the_uninterrupted_one(whole, tmp_path, step):
    place, wanted = checkpoint(whole, tmp_path, step), whole[1]
    resumed = run(tmp_path, resume=str(place), **SAVING)
    assert history(resumed) == history(wanted)
    for (name, ours), theirs in zip(
        resumed.model.state_dict().items(), wanted.model.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    ours, theirs = (
        load_file(each / "checkpoint-8" / "cluster_state_rank0.safetensors") for each in (tmp_path, whole[0])
    )
    assert ours.keys() == theirs.keys() and any(name.startswith("texts.") for name in ours)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_memory_of_texts_comes_back_from_its_tensors(whole):
    named = load_file(whole[0] / "checkpoint-8" / "cluster_state_rank0.safetensors")
    memory = ClusterMemory()
    memory.load(named)
    assert len(memory.texts) == 3 and memory.texts.centroids.shape == (3, 99) and not memory.identities
    again = memory.tensors()
    assert sorted(again) == ["texts.centroids", "texts.experts", "texts.idle", "texts.radii"]
    assert all(torch.equal(again[name], named[name]) for name in again)
    memory.load({})
    assert memory.texts is None


def test_a_clustering_state_of_the_first_release_is_taken_up(whole, tmp_path):
    """There each site had the texts, and states of single tokens."""
    place = checkpoint(whole, tmp_path, 5)
    path = place / "cluster_state_rank0.safetensors"
    named, metadata = load_file(path), memory.read_metadata(path)
    texts = {name: named.pop(f"features.{TEXTS}.{name}") for name in FIELDS}
    seen, passes = json.loads(metadata["seen"]), json.loads(metadata["passes"])
    sample = len(named["features.layer_1/ffn.embeddings"])
    assert len(texts["ids"]) == 40 and sample == 32 and seen.pop(TEXTS) == 40 and passes.pop(TEXTS)
    for site in seen:
        for name, tensor in texts.items():
            named[f"older.{site}.{name}"] = tensor[:-sample].clone()
        named[f"features.{site}.ids"] = texts["ids"][-sample:].clone()
        named[f"features.{site}.tokens"] = torch.ones(sample, 8, 32)
        named[f"features.{site}.positions"] = torch.zeros(sample, 8, dtype=torch.int64)
    metadata |= {"version": "1", "seen": json.dumps(seen), "passes": json.dumps(passes)}
    metadata["sha256"] = memory._digest(named, metadata)
    save_file(named, path, metadata=metadata)
    (place / CHECKSUMS).unlink(missing_ok=True)
    assert history(run(tmp_path, resume=str(place), **SAVING)) == history(whole[1])


def test_a_sample_of_states_alone_is_refused_where_texts_are_clustered(tmp_path):
    """They could not be told from its states."""
    model = tiny_model("gpt2", cse_routing="discriminant")
    train(tmp_path, callback(algorithm="kmeans", common_by=None), model=model, **SAVING)
    again = callback(algorithm="text")
    with pytest.raises(ValueError, match="checkpoint-3.*holds no texts: algorithm='text' cannot go on"):
        train(tmp_path, again, model=model, resume=str(tmp_path / "checkpoint-3"), **SAVING)


def test_evidence_of_another_fit_is_refused(whole, tmp_path):
    """Finite, and within its bounds: only the checksum tells."""
    place = checkpoint(whole, tmp_path, 5)
    weights = load_file(place / "model.safetensors")
    weights["transformer.evidence_router.evidence"][7, 0] += 0.5
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="routing state in the weights"):
        run(tmp_path, resume=str(place), **SAVING)


def test_evidence_that_no_fit_writes_is_refused(whole, tmp_path):
    place = checkpoint(whole, tmp_path, 5)
    weights = load_file(place / "model.safetensors")
    weights["transformer.evidence_router.evidence"][7, 0] = torch.nan
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="evidence_router.evidence is not finite"):
        run(tmp_path, resume=str(place), **SAVING)


@pytest.mark.parametrize("routing", ["evidence", "discriminant"])
def test_a_saved_model_goes_on_with_its_owners(tmp_path, routing):
    """Without memory and with another seed."""
    model = knowing(tiny_model("gpt2", cse_routing=routing))
    first = run(tmp_path / "first", model, changes={"update": "frozen"}).model
    first.save_pretrained(tmp_path / "saved")
    before = [int(owner) for owner in experts_of_held_out(first)[0].mode(1).values]
    again = type(first).from_pretrained(tmp_path / "saved")
    going_on = callback(warmup=0, recluster_every=4, seed=3)
    train(tmp_path / "second", going_on, model=again, data=rows(length=LENGTH), max_steps=5, learning_rate=1e-6)
    assert going_on.memory.fits == 1
    assert [int(owner) for owner in experts_of_held_out(again)[0].mode(1).values] == before
    assert len(set(before)) == 3


def test_layers_that_were_not_chosen_hide_no_owner(tmp_path):
    """The first candidate holds no clusters; those of the chosen layer are what is known."""
    model = tiny_model("gpt2", cse_routing="evidence", cse_layers=[0, 1, 2])
    fit_experts(model, batches(), **TEXT)
    wanted = routed_module(model, 2).router.cluster_expert.clone()
    for layer in (0, 1):
        router = routed_module(model, layer).router
        router.write(**{name: rows[:0] for name, rows in router.empty_state().items()})
    going_on = callback(warmup=0, recluster_every=4, seed=3)
    train(tmp_path, going_on, model=model, data=rows(length=LENGTH), max_steps=5)
    router = routed_module(model, 2).router
    assert going_on.memory.fits == 1 and sorted(router.cluster_expert[:3].tolist()) == sorted(wanted[:3].tolist())
    assert not routed_module(model, 0).router.num_clusters


# ---- outside the Trainer --------------------------------------------------------------------------------------------


def batches(count: int = 64) -> list[dict]:
    data = rows(count, LENGTH)
    return [
        {name: torch.stack([row[name] for row in data[at : at + 8]]) for name in ("input_ids", "attention_mask")}
        for at in range(0, count, 8)
    ]


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_fit_experts_finds_texts_and_changes_no_logit(family):
    model = tiny_model(family, cse_routing="evidence")
    with torch.no_grad():
        before = first_tensor(model(**batches()[0]))
    metrics = fit_experts(model, batches(), **TEXT)
    assert metrics["cse/layer_1/ffn/agreement"] > 0.9 and sorted(owners(model)) == [-1, 0, 1]
    with torch.no_grad():
        torch.testing.assert_close(first_tensor(model(**batches()[0])), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layers", [None, "auto"])
def test_from_dense_takes_evidence(layers):
    options = {"cse_routing": "evidence", "cse_layers": layers, **TEXT}
    model = from_dense(dense_model("gpt2"), rows(64, LENGTH), batch_size=8, **options)
    assert sorted(owners(model)) == [-1, 0, 1] and len(model.config.cse_layer_indices) == 2


@pytest.mark.parametrize("told_by", ["positions", "separator"])
def test_packed_documents_are_sampled_as_texts(told_by, caplog):
    separator = 3 if told_by == "separator" else None
    model = tiny_model("gpt2", cse_routing="evidence", cse_separator_token_id=separator)
    ids = torch.cat([row["input_ids"] for row in rows(64, LENGTH)]).view(32, 48)
    if told_by == "separator":
        ids[:, LENGTH - 1 :: LENGTH] = 3
        batch = {"input_ids": ids}
    else:
        batch = {"input_ids": ids, "position_ids": torch.arange(LENGTH).repeat(2).expand(32, -1)}
    fit_experts(model, [batch], **{**TEXT, "sample_size": 64})
    assert sorted(owners(model)) == [-1, 0, 1]
    assert routed_module(model, 1).router.cluster_sizes[:3].sort().values.tolist() == [16, 16, 32]
    assert "cse_separator_token_id" not in caplog.text


def test_a_separator_that_no_row_has_is_told_of(caplog):
    with caplog.at_level("WARNING"):
        fit_experts(
            tiny_model("gpt2", cse_routing="evidence", cse_separator_token_id=4),
            [{"input_ids": torch.stack([row["input_ids"] for row in rows(64, LENGTH)])}],
            **TEXT,
        )
    assert "cse_separator_token_id=4 is in none of the 32 sequences" in caplog.text


def test_samples_of_other_lengths_are_joined():
    def sample(length):
        ids = torch.arange(2 * length, dtype=torch.int32).view(2, length)
        return RoutingFeatures(torch.zeros(2, 4), torch.zeros(2, 1, 4), torch.zeros(2, 1, dtype=torch.int64), ids=ids)

    joined = RoutingFeatures.concatenate([sample(2), sample(3)])
    assert joined.ids.tolist() == [[0, 1, -1], [2, 3, -1], [0, 1, 2], [3, 4, 5]]


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "changes", "complaint"),
    [
        ({}, {"update": "ema"}, "update='ema' is not allowed with algorithm='text' and cse_routing='discriminant'"),
        ({"cse_routing": "evidence"}, {"update": "recluster+ema"}, "clusters of texts do not drift"),
        ({"cse_routing": "evidence"}, {"algorithm": "kmeans"}, "algorithm='kmeans' .*cse_routing='evidence'.*'text'"),
        ({"cse_routing": "given"}, {}, "algorithm='text' is not allowed with cse_routing='given'"),
        ({"cse_routing": "evidence", "cse_layers": []}, {}, "has no layer with experts"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, flags, changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        make_trainer(tmp_path, callback(**changes), model=tiny_model("gpt2", **flags)).train()


@pytest.mark.parametrize("routing", ["evidence", "discriminant"])
def test_embeddings_have_no_tokens_to_cluster(routing):
    model = tiny_model("gpt2", cse_routing=routing)
    states = model.get_input_embeddings()(batches()[0]["input_ids"]).detach()
    with pytest.raises(ValueError, match="inputs_embeds"):
        fit_experts(model, [{"inputs_embeds": states}], **TEXT)


def test_fit_experts_refuses_other_clusters_for_evidence():
    with pytest.raises(ValueError, match="algorithm='kmeans' is not allowed with cse_routing='evidence'"):
        fit_experts(tiny_model("gpt2", cse_routing="evidence"), batches(), algorithm="kmeans", num_clusters=3)


def test_fit_experts_clusters_texts_for_evidence_unless_told_otherwise():
    found = []
    for told in ({"algorithm": "text"}, {}):
        model = tiny_model("gpt2", cse_routing="evidence")
        fit_experts(model, batches(), num_clusters=3, common_share=0.5, **told)
        found.append(model.base_model.evidence_router.evidence)
    assert torch.equal(*found) and found[0].any()
