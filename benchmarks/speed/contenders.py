# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Six models of one shape with the same base weights, that differ in the FFNs of the same two layers."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedConfig, PreTrainedModel

from modeling_cse import CSEGPT2Config, CSEGPT2ForCausalLM

from .opponents import MixtralFFN, NaiveFFN, mixtral_config
from .shapes import Shape


DENSE = "dense"
# What a CSE GPT-2 is by default; `cse_replace` and `cse_add` route each token by its own state.
EVIDENCE = "cse_evidence"
NAMES = (DENSE, "cse_replace", "cse_add", EVIDENCE, "mixtral", "naive")
# Python decides there which module runs, sample by sample: a compiler has nothing to gain from it.
NEVER_COMPILED = ("naive",)
# Fresh experts are the base or zero; these are moved, so that no product is with zeros or with equal matrices.
NOISE = 0.02


@dataclass
class Contender:
    """
    Fields:
        name: one of `NAMES`.
        model: with a language head.
        ffns: the FFNs by which contenders differ, in the order of the layers.
        experts_config: the configuration in which the experts look up their implementation; None without such.
        compile: put `torch.compile` around whatever is timed.
    """

    name: str
    model: PreTrainedModel
    ffns: list[nn.Module]
    experts_config: PreTrainedConfig | None = None
    compile: bool = False

    @property
    def device(self) -> torch.device:
        return self.model.device

    def told(self, token_ids: torch.Tensor, new: int) -> dict[str, torch.Tensor]:
        """What a forward pass over the last `new` of these tokens (B, T) is told if the others are in a cache, as
        `generate` tells it."""
        if self.name != EVIDENCE:
            return {}
        return {"given_clusters": self.model.base_model.read_clusters(token_ids)[:, -new:]}

    def timed(self, module: nn.Module) -> Callable:
        """What is called in a timing."""
        return torch.compile(module) if self.compile else module


def cse_config(shape: Shape, combine: str, **flags) -> CSEGPT2Config:
    """A configuration with experts, through the grouped matrix product on every device."""
    flags = {"cse_routing": "discriminant", **flags}
    config = CSEGPT2Config(**shape.fields, cse_layers=shape.sparse_layers, cse_combine=combine, **flags)
    config._experts_implementation = "grouped_mm"
    return config


def build(name: str, shape: Shape, base: dict[str, torch.Tensor], device: str, compile: bool = False) -> Contender:
    """
    A contender with the weights of a dense twin.

    Args:
        base: state dict of the dense twin (`dense_weights`).
    """
    torch.manual_seed(0)
    contender = _build_cse(name, shape, base) if name.startswith("cse_") else _build_on_stock(name, shape, base)
    contender.model.to(device)
    contender.compile = compile
    return contender


def dense_weights(shape: Shape, seed: int = 0) -> dict[str, torch.Tensor]:
    """What all contenders have in common: the state dict of a stock GPT-2."""
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(**shape.fields)).state_dict()


def _build_cse(name: str, shape: Shape, base: dict[str, torch.Tensor]) -> Contender:
    flags = {"cse_routing": "evidence"} if name == EVIDENCE else {}
    combine = "replace" if name == "cse_replace" else "add"
    model = CSEGPT2ForCausalLM(cse_config(shape, combine, **flags))
    unexpected = model.load_state_dict(base, strict=False).unexpected_keys
    if unexpected:
        raise RuntimeError(f"{name} has no place for the weights {unexpected} of its dense twin.")
    generator = torch.Generator().manual_seed(0)
    modules = list(model.base_model.routed_modules().values())
    with torch.no_grad():
        for module in modules:
            for slot in range(model.config.cse_num_experts):
                module.fill_expert(slot, generator)
            for parameter in module.experts.parameters():
                parameter += NOISE * torch.randn(parameter.shape, generator=generator)
    return Contender(name, model, modules, model.config)


def _build_on_stock(name: str, shape: Shape, base: dict[str, torch.Tensor]) -> Contender:
    model = GPT2LMHeadModel(GPT2Config(**shape.fields))
    model.load_state_dict(base)
    blocks = [model.transformer.h[layer] for layer in shape.sparse_layers]
    config, experts_config = cse_config(shape, "replace"), None
    if name == "mixtral":
        experts_config = mixtral_config(config)
        for block in blocks:
            block.mlp = MixtralFFN(experts_config)
    elif name == "naive":
        for block in blocks:
            block.mlp = NaiveFFN.of(block.mlp, config.cse_num_experts, config.hidden_size, config.max_clusters)
    elif name != DENSE:
        raise ValueError(f"name={name!r} is not allowed: it must be one of {list(NAMES)}.")
    return Contender(name, model, [block.mlp for block in blocks], experts_config)
