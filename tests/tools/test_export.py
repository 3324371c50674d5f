# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""torch.export: one program for every batch and length, whose routes follow its buffers."""

import warnings
from itertools import product

import pytest
import torch
from tiny import activate, labelled, routed_modules, tiny_model, token_ids
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import Dim, ExportedProgram
from transformers.integrations.executorch import TorchExportableModuleForDecoderOnlyLM

from modeling_cse.dispatch_cse import RoutedAttention
from modeling_cse.routing_cse import RoutingContext


DEPTH = {"gpt2": "n_layer", "bert": "num_hidden_layers"}
# Tracing takes seconds: what can stand in another's place takes turns.
MODULES = (["attention", "ffn"], ["attention"], ["ffn"], ["attention", "ffn"])
CASES = [
    (family, routing, ("replace", "add")[turn % 2], MODULES[turn % 4])
    for turn, (family, routing) in enumerate(product(("gpt2", "bert"), ("discriminant", "sequence", "given")))
] + [("gpt2", "evidence", "add", MODULES[0]), ("bert", "evidence", "replace", MODULES[2])]


def one_layer(family: str, **flags):
    return tiny_model(family, cse_layers=[0], **{DEPTH[family]: 1}, **flags)


def inputs(model, rows: int, length: int, seed: int) -> dict:
    """A batch with padding, as a keyword call takes it."""
    batch = labelled(model.config.model_type.removeprefix("cse_"), "Model", rows, length, seed)
    if model.config.cse_routing == "given":
        batch["given_clusters"] = torch.arange(rows) - 1
    return batch | ({"use_cache": False} if model.config.model_type == "cse_gpt2" else {})


def export(model, strict: bool = False) -> ExportedProgram:
    example = inputs(model, 3, 9, seed=0)
    tokens = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    shapes = {"input_ids": tokens, "attention_mask": tokens, "given_clusters": {0: Dim.DYNAMIC}}
    with torch.no_grad():
        return torch.export.export(
            model, (), example, dynamic_shapes={name: shapes.get(name) for name in example}, strict=strict
        )


@torch.no_grad()
def assert_equal_everywhere(program: nn.Module, model) -> None:
    for rows, length in ((3, 9), (2, 5), (5, 17)):
        batch = inputs(model, rows, length, seed=rows)
        torch.testing.assert_close(
            program(**batch).logits, model(**batch).logits, atol=1e-5, rtol=1e-5, msg=f"{rows} x {length}"
        )


@pytest.mark.parametrize(("family", "routing", "combine", "modules"), CASES, ids=str)
def test_a_program_takes_every_shape_and_every_later_fit(family, routing, combine, modules):
    """Exported before there is any cluster; what a fit writes afterwards is loaded as buffers."""
    model = one_layer(family, cse_routing=routing, cse_combine=combine, cse_modules=modules)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # about state that tracing leaves behind, for example
        program = export(model).module()
    assert_equal_everywhere(program, model)
    before = program(**inputs(model, 5, 17, seed=5)).logits
    for seed in (0, 1):
        activate(model, seed=seed)
        program.load_state_dict(model.state_dict())
        assert_equal_everywhere(program, model)
    assert (program(**inputs(model, 5, 17, seed=5)).logits - before).abs().max() > 0.01


@pytest.mark.parametrize("family", ["gpt2", pytest.param("bert", marks=pytest.mark.slow)])
def test_a_strict_program_too(family):
    model = activate(one_layer(family, cse_modules=["attention", "ffn"]))
    assert_equal_everywhere(export(model, strict=True).module(), model)


def with_a_static_cache(model) -> nn.Module:
    """What transformers' recipe for executorch makes: one token a call."""
    model.generation_config.cache_implementation = "static"
    model.generation_config.cache_config = {"batch_size": 1, "max_cache_len": 12}
    model.generation_config.use_cache = True
    recipe = TorchExportableModuleForDecoderOnlyLM(model, batch_size=1, max_cache_len=12)
    return recipe.export(input_ids=token_ids(1, 1), cache_position=torch.arange(1)).module()


def test_a_program_with_a_static_cache_decodes_as_the_model_does():
    model = activate(one_layer("gpt2", cse_modules=["attention", "ffn"]))
    program, ids, places = with_a_static_cache(model), token_ids(1, 8), torch.arange(8)
    with torch.no_grad():
        steps = [program(input_ids=ids[:, i : i + 1], cache_position=places[i : i + 1]) for i in range(8)]
        whole = model(ids).logits
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("routing", "complaint"),
    [("evidence", "past_key_values without given_clusters"), ("sequence", "past_key_values is not empty")],
)
def test_routes_of_whole_texts_are_not_exported_with_a_cache(routing, complaint):
    """The recipe hands on one token and no text. torch wraps what is raised while it traces."""
    with pytest.raises(RuntimeError, match=complaint):
        with_a_static_cache(activate(one_layer("gpt2", cse_routing=routing)))


@pytest.mark.parametrize("traced", [False, True], ids=["forward", "export"])
def test_nothing_of_a_forward_pass_stays_behind(family, traced):
    model = activate(one_layer(family, cse_routing="sequence", cse_modules=["attention", "ffn"]))
    if traced:
        export(model)
    else:
        model(**inputs(model, 3, 9, seed=0))
    for module in routed_modules(model).values():
        assert module.context == RoutingContext()
        left = [module.contexts, *([module.dispatch.routes] if isinstance(module, RoutedAttention) else [])]
        assert all(each.values == {} and each.last is None for each in left)
    assert not any(isinstance(tensor, FakeTensor) for tensor in model.state_dict().values())
