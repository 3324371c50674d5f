# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of from_dense: the dense model, to the logit, with experts that are on, and a Trainer that goes on."""

import pytest
import torch
from datasets import Dataset, IterableDataset
from tiny import (
    EVERY_HEAD,
    FLAGS,
    dense_model,
    first_tensor,
    labelled,
    model_class,
    routed_modules,
    tiny_model,
    token_ids,
)
from tiny_runs import fit_steps, make_trainer, rows

from modeling_cse import ClusterExpertsCallback, fit_experts, from_dense
from modeling_cse.clustering import find_clusters
from modeling_cse.experts_cse import FusedExperts


CLUSTERS = {"num_clusters": 3, "common_share": 0.3}
BY_SIZE = {"num_clusters": 3, "common_share": 0.4, "common_by": "size"}


@torch.no_grad()
def knowing(family: str, head: str | None = None, **fields):
    """A dense model whose embeddings tell the three vocabularies of `rows` apart, as a trained model's do."""
    model = dense_model(family, head, **fields)
    table = model.get_input_embeddings().weight
    for domain in range(3):
        table[5 + 31 * domain : 36 + 31 * domain] += torch.eye(32)[domain]
    return model


def batches_of(data, size: int = 8) -> list[dict]:
    groups = [data[start : start + size] for start in range(0, len(data), size)]
    return [{name: torch.stack([row[name] for row in group]) for name in group[0]} for group in groups]


def routers(model) -> dict[str, torch.Tensor]:
    return {name: buffer for name, buffer in model.named_buffers() if ".router." in name}


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def owner_by_domain(model) -> list[list[int]]:
    """For each site the expert that most tokens of each of the three vocabularies go to."""
    batch = torch.stack([row["input_ids"] for row in rows(16, seed=5)])
    with torch.no_grad():
        ids = model.eval()(batch, output_cluster_ids=True).cluster_ids
    found = []
    for module, clusters in zip(routed_modules(model).values(), ids, strict=True):
        experts = torch.where(clusters >= 0, module.router.cluster_expert[clusters], -1)
        found.append([int(experts[(batch - 5) // 31 == domain].mode().values) for domain in range(3)])
    return found


@pytest.mark.parametrize(("source", "combine"), [("instance", "add"), ("folder", "replace")])
@pytest.mark.parametrize(("family", "head"), EVERY_HEAD)
def test_every_head_keeps_its_logits_and_its_weights(family, head, source, combine, tmp_path):
    dense = knowing(family, head)
    if source == "folder":
        dense.save_pretrained(tmp_path)
    model = from_dense(tmp_path if source == "folder" else dense, rows(24), cse_combine=combine, **CLUSTERS)
    assert type(model) is model_class(family, head) and not model.training
    assert all((module.router.cluster_expert >= 0).any() for module in routed_modules(model).values())
    ours = model.state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in dense.state_dict().items())
    batch = labelled(family, head)
    with torch.no_grad():
        got, wanted = first_tensor(model(**batch)), first_tensor(dense(**batch))
    if combine == "add":
        assert torch.equal(got, wanted)
    else:
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)


def test_tokens_of_rare_domains_do_reach_experts(family):
    """Without this the tests of unchanged logits would mean little."""
    for owners in owner_by_domain(from_dense(knowing(family), rows(), num_clusters=3, common_share=0.4)):
        assert owners[0] == -1 and sorted(owners[1:]) == [0, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_dtype_mode_attention_and_what_is_frozen_are_kept(family, dtype):
    dense = knowing(family, attn_implementation="eager").to(dtype).train()
    dense.get_input_embeddings().weight.requires_grad_(False)
    model = from_dense(dense, rows(24), **CLUSTERS)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype} and model.dtype == dtype
    assert {buffer.dtype for buffer in routers(model).values()} == {torch.float32, torch.int64}
    assert all(torch.equal(model.get_parameter(name), weight) for name, weight in dense.named_parameters())
    assert model.training and model.device == dense.device
    assert model.config._attn_implementation == dense.config._attn_implementation
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == [name for name, parameter in dense.named_parameters() if not parameter.requires_grad] != []


def test_a_folder_is_loaded_with_what_from_pretrained_takes(family, tmp_path):
    knowing(family).save_pretrained(tmp_path)
    model = from_dense(str(tmp_path), rows(24), dtype=torch.bfloat16, initializer_range=0.3, **CLUSTERS)
    assert model.dtype == torch.bfloat16 and model.config.initializer_range == 0.3


def test_code_that_the_dense_config_names_is_not_that_of_the_result(family, tmp_path):
    """Whose folder has none of it: without this package `AutoModel` would look for it there."""
    dense = knowing(family)
    dense.config.auto_map = {"AutoModel": "modeling_own.Own"}
    from_dense(dense, rows(24), **CLUSTERS).save_pretrained(tmp_path)
    assert "modeling_own" not in (tmp_path / "config.json").read_text(encoding="utf-8")


def test_a_base_model_without_its_pooler_gets_none():
    dense = knowing("bert", "Model")
    dense = type(dense)(dense.config, add_pooling_layer=False)
    assert from_dense(dense, rows(24), **CLUSTERS).pooler is None


def test_the_dense_model_shares_nothing_with_the_result(family):
    dense = knowing(family)
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    model = from_dense(dense, rows(24), **CLUSTERS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    model.config.update({"id2label": {0: "x"}})
    assert same(before, dense.state_dict()) and dense.config.id2label != {0: "x"}


def test_the_seed_alone_decides_and_nobody_elses_random_numbers_move():
    dense, states = knowing("gpt2"), []
    for number, seed in enumerate((4, 4, 5)):
        torch.manual_seed(number)
        before = torch.random.get_rng_state()
        states.append(from_dense(dense, rows(), seed=seed, sample_size=24, **CLUSTERS).state_dict())
        assert torch.equal(torch.random.get_rng_state(), before)
    assert same(states[0], states[1]) and not same(states[0], states[2])


def test_the_trainer_goes_on_and_experts_keep_their_domains(family, combine, tmp_path, monkeypatch):
    model = from_dense(knowing(family), rows(), cse_combine=combine, num_clusters=3, common_share=0.4)
    owners, experts = owner_by_domain(model), {n: p.clone() for n, p in model.named_parameters() if ".experts." in n}
    filled = []
    monkeypatch.setattr(FusedExperts, "fill", lambda self, slot, *rest: filled.append(slot))
    settings = {"num_clusters": 3, "common_share": 0.4, "sample_size": 64}
    callback = ClusterExpertsCallback(warmup=0, recluster_every=4, **settings)
    # four steps see the rows once, all of them
    sizes = {"per_device_train_batch_size": 16, "max_steps": 5}
    # slowly: at 1e-3 a centroid of this tiny model moves beyond its cluster's radius in four steps, and counts as new
    trainer = make_trainer(tmp_path, callback, model=model, learning_rate=3e-4, **sizes)
    trainer.train()
    assert fit_steps(trainer) == [4] and filled == []
    assert owner_by_domain(model) == owners
    assert all(not torch.equal(model.get_parameter(name), before) for name, before in experts.items())


# ---- which layers -----------------------------------------------------------------------------------------------


@torch.no_grad()
def clarity_by_hand(dense, data, clusters: int) -> list[float]:
    """Clarity of the mean FFN inputs of a stock model, layer by layer."""
    layers = dense.transformer.h if hasattr(dense, "transformer") else dense.bert.encoder.layer
    inputs = [layer.mlp if hasattr(layer, "mlp") else layer.intermediate for layer in layers]
    means = [[] for _ in inputs]
    hooks = [
        module.register_forward_pre_hook(lambda _, args, store=store: store.append(args[0].mean(1)))
        for module, store in zip(inputs, means, strict=True)
    ]
    for batch in batches_of(data):
        dense(batch["input_ids"])
    for hook in hooks:
        hook.remove()
    return [find_clusters(torch.cat(store).numpy(), "kmeans", clusters, 0).clarity for store in means]


@pytest.mark.parametrize("budget", [1, None])
def test_auto_takes_the_layers_of_the_clearest_clusters(family, budget):
    """Against a calculation by hand, on the stock model."""
    dense, data = knowing(family, **{"n_layer" if family == "gpt2" else "num_hidden_layers": 5}), rows()
    expected = clarity_by_hand(dense, data, 3)
    model, info = from_dense(
        dense, data, cse_layers="auto", layer_budget=budget, num_clusters=3, output_fit_info=True, **FLAGS[family]
    )
    assert [info["clarity"][layer] for layer in range(5)] == pytest.approx(expected, rel=0.02)
    best = sorted(sorted(range(5), key=lambda layer: -expected[layer])[: budget or 2])
    assert model.config.cse_layers == info["cse_layers"] == best
    assert model.config.cse_num_experts == 4 and model.config.cse_combine == "replace"
    for layer in best:
        assert info["metrics"][f"cse/layer_{layer}/ffn/clarity"] == pytest.approx(info["clarity"][layer], rel=1e-3)


def test_auto_finds_planted_layers(tmp_path):
    """In layers 0 and 2 of four the FFN sees little but the dimensions that tell the domains apart."""
    dense = knowing("gpt2", n_layer=4)
    for layer in (0, 2):
        dense.transformer.h[layer].ln_2.weight.data[3:] = 0.05
    dense.save_pretrained(tmp_path)
    for checkpoint in (dense, tmp_path):
        assert from_dense(checkpoint, rows(), cse_layers="auto", num_clusters=3).config.cse_layers == [0, 2]


def test_auto_looks_at_the_modules_that_get_experts():
    """Here attention and FFN of a layer see the same but for their norms."""
    dense = knowing("gpt2")
    dense.transformer.h[0].ln_2.weight.data[3:] = 0.05
    dense.transformer.h[1].ln_1.weight.data[3:] = 0.05
    chosen = {
        module: from_dense(dense, rows(), cse_layers="auto", layer_budget=1, cse_modules=[module], **CLUSTERS)
        for module in ("ffn", "attention")
    }
    assert {module: model.config.cse_layers for module, model in chosen.items()} == {"ffn": [0], "attention": [1]}


def test_auto_has_room_for_as_many_clusters_as_the_model():
    model = from_dense(knowing("gpt2"), rows(), cse_layers="auto", cse_num_experts=10, num_clusters=20)
    assert model.config.cse_max_clusters is None and len(model.config.cse_layers) == 2


def test_one_layer_is_enough_for_auto():
    assert from_dense(knowing("gpt2", n_layer=1), rows(), cse_layers="auto", num_clusters=3).config.cse_layers == [0]


# ---- data -------------------------------------------------------------------------------------------------------


def test_batches_are_taken_as_fit_experts_takes_them(family):
    dense, batches = knowing(family), batches_of(rows())
    wanted = tiny_model(family)
    wanted.load_state_dict(dense.state_dict(), strict=False)
    metrics = fit_experts(wanted, batches, **CLUSTERS)
    got, info = from_dense(dense, iter(batches), batch_size=None, output_fit_info=True, **CLUSTERS, **FLAGS[family])
    assert same(routers(got), routers(wanted))
    assert {**info["metrics"], "cse/seconds": 0} == {**metrics, "cse/seconds": 0}
    assert info["cse_layers"] == [1, 2] and info["clarity"] == {}


def test_streams_give_their_first_rows_and_no_more():
    data, read = rows(), []

    def stream():
        for row in data:
            read.append(1)
            yield {**row, "domain": "text", "word_ids": list(range(len(read)))}

    def wanted(count):
        return routers(from_dense(knowing("gpt2"), batches_of(data[:count]), batch_size=None, **CLUSTERS))

    got = from_dense(knowing("gpt2"), stream(), sample_size=20, **CLUSTERS)
    assert len(read) == 20 and same(routers(got), wanted(20))
    listed = [{name: value.tolist() for name, value in row.items()} for row in data]
    got = from_dense(knowing("gpt2"), IterableDataset.from_generator(lambda: iter(listed)), sample_size=20, **CLUSTERS)
    assert same(routers(got), wanted(20))


def test_data_with_a_length_may_be_sorted():
    """A sample of a fifth sees all three domains, though the first fifth of the rows is of one."""
    data = sorted(rows(120), key=lambda row: int(row["input_ids"][0]))
    ids = Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in data])
    for form in (data, ids):
        owners = owner_by_domain(from_dense(knowing("gpt2"), form, sample_size=24, cse_layers=[0, 1], **BY_SIZE))
        assert all(sorted(site) == [-1, 0, 1] for site in owners)


def test_padding_is_left_out():
    data = rows()
    padded = [
        {
            "input_ids": torch.cat([row["input_ids"], torch.zeros(4, dtype=torch.long)]),
            "attention_mask": torch.cat([row["attention_mask"], torch.zeros(4, dtype=torch.long)]),
        }
        for row in data
    ]
    first, second = (routers(from_dense(knowing("gpt2"), each, **CLUSTERS)) for each in (data, padded))
    for name in first:
        if name.endswith("centroids"):
            torch.testing.assert_close(first[name], second[name], atol=1e-4, rtol=1e-4)


def test_unequal_rows_can_go_one_by_one():
    unequal = [{"input_ids": token_ids(1, length)[0]} for length in (8, 6, 5, 9)]
    assert from_dense(knowing("gpt2"), unequal, batch_size=1, num_clusters=2) is not None


@pytest.mark.parametrize("routing", ["given", "discriminant"])
@pytest.mark.parametrize("batch_size", [8, None])
def test_clusters_that_come_with_the_data_are_taken(routing, batch_size):
    """In rows and in batches; with labels for routes, or only for the fit."""
    labels = (0, 0, 0, 0, 1, 1, 2, 2)
    data = [{**row, "given_clusters": torch.tensor(labels[number % 8])} for number, row in enumerate(rows(24))]
    data = data if batch_size else batches_of(data)
    flags = {"cse_routing": routing, "algorithm": "given", "common_share": 0.4}
    model = from_dense(knowing("gpt2"), data, batch_size=batch_size, **flags)
    for module in routed_modules(model).values():
        assert module.router.cluster_sizes[:4].tolist() == [12, 6, 6, 0]
        experts = module.router.cluster_expert[:3].tolist()
        assert experts[0] == -1 and sorted(experts[1:]) == [0, 1]
