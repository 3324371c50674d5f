# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of the flags: wrong values are refused by name, right ones survive saving, defaults are the paper's."""

import copy
from itertools import product

import numpy as np
import pytest
from tiny import CONFIGS, SIZES, model_class, tiny_config, tiny_model
from transformers import AutoConfig

from modeling_cse import CONFIGURATION


WRONG = [
    ("cse_layers", "last", "list of ints"),
    ("cse_layers", 2, "list of ints"),
    ("cse_layers", [1.0], "list of ints"),
    ("cse_layers", {0, 1}, "list of ints"),
    ("cse_layers", {1: 2}, "list of ints"),
    ("cse_layers", range(2), "list of ints"),
    ("cse_layers", np.array([0, 1]), "list of ints"),
    ("cse_layers", [True], "list of ints"),
    ("cse_layers", [3], "from -3 to 2"),
    ("cse_layers", [-4], "from -3 to 2"),
    ("cse_layers", [1, 1], "twice"),
    ("cse_layers", [2, -1], "twice"),
    ("cse_modules", [], "ffn"),
    ("cse_modules", "ffn", "ffn"),
    ("cse_modules", None, "ffn"),
    ("cse_modules", ["ffn", "embedding"], "ffn"),
    ("cse_modules", [["ffn"]], "ffn"),
    ("cse_modules", ["attention", "head"], "'attention', 'ffn'"),
    ("cse_modules", {"attention": "ffn"}, "'attention', 'ffn'"),
    ("cse_modules", ["ffn", "ffn"], "at most once"),
    ("cse_modules", [np.array(["ffn"])], "ffn"),
    ("cse_combine", "sum", "'replace', 'add'"),
    ("cse_combine", ["add"], "'replace', 'add'"),
    ("cse_combine", None, "'replace', 'add'"),
    ("cse_combine", np.array(["add", "add"]), "'replace', 'add'"),
    ("cse_routing", "prefix", "'discriminant', 'evidence', 'sequence'"),
    ("cse_routing", None, "'discriminant', 'evidence', 'sequence'"),
    ("cse_routing", ["given"], "'sequence', 'given'"),
    ("cse_num_experts", 0, "int >= 1"),
    ("cse_num_experts", -2, "int >= 1"),
    ("cse_num_experts", 2.0, "int >= 1"),
    ("cse_num_experts", "4", "int >= 1"),
    ("cse_num_experts", True, "int >= 1"),
    ("cse_num_experts", None, "int >= 1"),
    ("cse_num_experts", 1024, "at most 1023"),
    ("cse_expert_size", 0, "multiple of 8"),
    ("cse_expert_size", -8, "multiple of 8"),
    ("cse_expert_size", 132, "multiple of 8"),
    ("cse_expert_size", 256.0, "multiple of 8"),
    ("cse_expert_size", "256", "multiple of 8"),
    ("cse_expert_size", 8, "at least the base width"),
    ("cse_max_clusters", 0, "int >= 1"),
    ("cse_max_clusters", True, "int >= 1"),
    ("cse_max_clusters", "16", "int >= 1"),
    ("cse_max_clusters", 16.0, "int >= 1"),
    ("cse_max_clusters", 2**50, "at most 65536"),
    ("cse_separator_token_id", -1, "from 0 to 98"),
    ("cse_separator_token_id", 99, "from 0 to 98"),
    ("cse_separator_token_id", 3.0, "None or an int"),
    ("cse_separator_token_id", True, "None or an int"),
    ("cse_separator_token_id", [3], "None or an int"),
    ("cse_gate", "soft", "one of"),
    ("cse_gate", ["hard"], "one of"),
    ("cse_radius_scaling", "yes", "bool"),
    ("cse_radius_scaling", 1, "bool"),
    ("cse_radius_scaling", None, "bool"),
    ("output_cluster_ids", "yes", "bool"),
    ("output_router_logits", "yes", "bool"),
]
CHANGED = {
    "cse_layers": [0, -1],
    "cse_modules": ["ffn", "attention"],
    "cse_combine": "add",
    "cse_num_experts": 3,
    "cse_expert_size": 24,
    "cse_radius_scaling": False,
    "cse_max_clusters": 9,
    "cse_separator_token_id": 3,
    "output_router_logits": True,
    "output_cluster_ids": True,
}


@pytest.mark.parametrize(("flag", "value", "allowed"), WRONG, ids=lambda part: repr(part))
def test_wrong_value_is_refused_by_name(family, flag, value, allowed):
    with pytest.raises(ValueError) as error:
        tiny_config(family, **{flag: value})
    for part in (flag, repr(value), allowed):
        assert part in str(error.value)


@pytest.mark.parametrize(("flag", "value", "allowed"), WRONG[:-2], ids=lambda part: repr(part))
def test_wrong_value_set_afterwards_is_refused_by_the_model(family, flag, value, allowed):
    """`from_pretrained(..., flag=value)` sets flags on a config that is finished."""
    config = tiny_config(family)
    setattr(config, flag, value)
    with pytest.raises(ValueError, match=flag):
        model_class(family, "Model")(config)


def test_a_wrong_width_of_experts_is_refused_without_a_layer_that_reads_it(family):
    with pytest.raises(ValueError, match="cse_expert_size=-8.*multiple of 8"):
        tiny_config(family, cse_layers=[], cse_expert_size=-8)


def test_override_is_checked_when_a_model_is_loaded(family, tmp_path):
    tiny_model(family).save_pretrained(tmp_path)
    for head in ("Model", "ForSequenceClassification"):
        with pytest.raises(ValueError, match=r"cse_layers=\[7\].*from -3 to 2"):
            model_class(family, head).from_pretrained(tmp_path, cse_layers=[7])
        loaded = model_class(family, head).from_pretrained(tmp_path, cse_layers=[-3])
        assert list(loaded.base_model.routed_modules()) == [(0, "ffn")]


def test_flags_survive_saving(family, routing, tmp_path):
    changed = CHANGED if routing == "sequence" else {**CHANGED, "cse_gate": "posterior"}
    tiny_config(family, cse_routing=routing, **changed).save_pretrained(tmp_path)
    for loaded in (CONFIGS[family].from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is CONFIGS[family]
        assert {flag: getattr(loaded, flag) for flag in changed} == changed
        assert loaded.cse_routing == routing


def test_config_can_be_copied(family):
    config = tiny_config(family, **CHANGED)
    for twin in (copy.deepcopy(config), type(config).from_dict(config.to_dict()), type(config)(**config.to_dict())):
        assert twin.to_dict() == config.to_dict()


def test_both_families_have_the_same_defaults(family):
    config = CONFIGS[family](**SIZES[family])
    assert config.cse_layers is None and config.cse_layer_indices == [1, 2]
    assert config.cse_modules == ["ffn"] and config.cse_radius_scaling is True
    assert (config.cse_combine, config.cse_routing, config.gate) == ("add", "evidence", "posterior")
    assert config.cse_num_experts == 4 and config.max_clusters == 16 and config.cse_gate is None
    assert not config.output_router_logits and not config.output_cluster_ids
    assert config.model_type == {"gpt2": "cse_gpt2", "bert": "cse_bert"}[family]
    assert CONFIGS[family]().cse_layer_indices == [10, 11]


@pytest.mark.parametrize(
    ("layers", "indices"), [([-1], [2]), ([-1, 0], [0, 2]), ((1, 0), [0, 1]), ([], []), ([-3, -2, -1], [0, 1, 2])]
)
def test_layers_count_from_either_end(family, layers, indices):
    config = tiny_config(family, cse_layers=layers)
    assert config.cse_layer_indices == indices
    assert list(model_class(family, "Model")(config).routed_modules()) == [(index, "ffn") for index in indices]


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("modules", [["attention"], ["ffn"], ["attention", "ffn"]], ids="+".join)
def test_modules_stand_as_data_meets_them_however_they_are_named(family, modules, order):
    """A layer has experts where the flag says and nowhere else; the flag itself stays as it was written."""
    config = tiny_config(family, cse_modules=tuple(modules[::order]), cse_layers=[-1, 0])
    assert config.cse_modules == modules[::order]
    model = model_class(family, "Model")(config)
    assert list(model.routed_modules()) == list(product((0, 2), modules))
    per_site = {"attention": 4, "ffn": 4}
    experts = [name for name, _ in model.named_parameters() if ".experts." in name]
    assert len(experts) == 2 * sum(per_site[module] for module in modules)


def test_attention_experts_have_the_shapes_of_the_base(family):
    """In `nn.Linear` layout, three projections in one; `cse_expert_size` is of FFN experts alone."""
    config = tiny_config(family, cse_modules=["attention", "ffn"], cse_combine="add", cse_expert_size=8)
    experts = model_class(family, "Model")(config).routed_modules()[2, "attention"].experts
    shapes = {name: tuple(parameter.shape) for name, parameter in experts.named_parameters()}
    inner = {"qkv_proj": (4, 96, 32), "qkv_proj_bias": (4, 96)}
    assert shapes == inner | {"out_proj": (4, 32, 32), "out_proj_bias": (4, 32)}


def test_a_model_of_one_layer_has_experts_there(family):
    depth = {"gpt2": "n_layer", "bert": "num_hidden_layers"}[family]
    assert tiny_config(family, **{depth: 1}).cse_layer_indices == [0]


@pytest.mark.parametrize(
    ("flags", "base", "width"),
    [
        ({}, 64, 64),
        ({}, 60, 64),
        ({"cse_expert_size": 72}, 64, 72),
        ({"cse_combine": "add"}, 64, 64),
        ({"cse_combine": "add", "cse_num_experts": 3}, 60, 64),
        ({"cse_combine": "add", "cse_expert_size": 8}, 64, 8),
    ],
)
def test_width_of_an_expert(family, flags, base, width):
    inner = {"gpt2": "n_inner", "bert": "intermediate_size"}[family]
    config = tiny_config(family, **{inner: base}, **flags)
    assert config.expert_size == width
    experts = model_class(family, "Model")(config).routed_modules()[2, "ffn"].experts
    assert experts.up_proj.shape == (config.cse_num_experts, width, 32)
    assert experts.down_proj.shape == (config.cse_num_experts, 32, width)


def test_hidden_size_must_suit_grouped_products_only_where_there_are_experts(family):
    size = {"gpt2": "n_embd", "bert": "hidden_size"}[family]
    with pytest.raises(ValueError, match="hidden_size=36.*multiple of 8"):
        tiny_config(family, **{size: 36})
    assert tiny_config(family, **{size: 36}, cse_layers=[]).cse_layer_indices == []


def test_a_router_holds_at_least_its_slots(family):
    assert tiny_config(family, cse_num_experts=10).max_clusters == 20
    assert tiny_config(family, cse_max_clusters=5).max_clusters == 5
    router = tiny_model(family, cse_max_clusters=5).base_model.routed_modules()[2, "ffn"].router
    assert router.centroids.shape == (5, 32)


def test_saved_config_names_every_head(family, tmp_path):
    config = tiny_config(family)
    config.save_pretrained(tmp_path)
    assert CONFIGS[family].from_pretrained(tmp_path).auto_map == config._heads_auto_map


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_a_flag_that_is_spelt_wrong_is_refused(family):
    with pytest.raises(ValueError, match="cse_seperator_token_id is not allowed.*'cse_separator_token_id'"):
        tiny_config(family, cse_seperator_token_id=0)
    with pytest.raises(ValueError, match="cse_num_expert is not allowed"):
        AutoConfig.from_pretrained(CONFIGURATION / f"cse-{family}-1m", cse_num_expert=8)
