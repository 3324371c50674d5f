# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""What an arm costs, by counting: parameters and floating-point operations a token, tokens, seconds.

Counted are matrix products: 2 operations for each weight that a token meets on the way forward and 4 on the way back,
and 4 * T * d forward for the attention of each layer over all T positions of a block, the masked ones too, as a plain
implementation computes them; 8 * T * d on the way back. The linear map of a router goes forward only. Left out are
embeddings, norms, biases and activations. Experts count by the share of tokens that go to them, so that means over
routes need not be integers. A stage that trains experts alone is counted as if it trained all weights: it costs less.
Rows that are read ahead for the first clusters go forward through the base model, without its head.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from arms import CLASSES, Arm, build_callback, build_config
from run_folders import Run
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from modeling_cse.evaluation.switch import SwitchExperts
from modeling_cse.training.ahead import STATELESS


FORWARD_AND_BACKWARD = 3


@dataclass(frozen=True)
class TokenCost:
    """
    Fields:
        total: parameters, tied ones once.
        active: parameters that a token meets, the mean over routes.
        flops: forward and backward operations a token once experts are on, the mean over routes.
        dense_flops: the same before that, when all tokens are the base's.
    """

    total: int
    active: float
    flops: float
    dense_flops: float


@dataclass(frozen=True)
class ReadAhead:
    """
    What a run reads before training does, to fill the first sample that clusters are found in.

    Fields:
        rows: of the training data, one forward pass each.
        flops: of these passes.
        at_most: whether rows hold several texts (`cse_separator_token_id`). Reading stops when there are enough texts,
            so that rows and operations are an upper bound then.
    """

    rows: int = 0
    flops: float = 0.0
    at_most: bool = False


@dataclass(frozen=True)
class RunCost:
    """
    Fields:
        per_token: of the trained model.
        tokens: it was trained on, of the run it started from too.
        flops: of all these tokens, and of what was read ahead.
        seconds: of training, of the run it started from too; None where one of them is not known
            (`Run.seconds`).
        read_ahead: the part of `flops` that trained nothing, of the run it started from.
    """

    per_token: TokenCost
    tokens: int
    flops: float
    seconds: float | None
    read_ahead: ReadAhead


def _matrices(parameters) -> int:
    return sum(parameter.numel() for parameter in parameters if parameter.dim() > 1)


def token_cost(model: nn.Module, block_size: int, routed: dict[str, float]) -> TokenCost:
    """
    Args:
        model: of an arm; its parameters are counted, not read, so that they may be on the meta device.
        block_size: T.
        routed: site to the share of tokens with an expert. Of Switch experts every token has one.

    Raises:
        ValueError: `routed` names other sites than the model has.
    """
    config = model.config
    sites = getattr(model.base_model, "routed_modules", dict)()
    if set(routed) != {str(site) for site in sites}:
        raise ValueError(f"routed={routed!r} is not allowed: the model's sites are {[str(site) for site in sites]}.")
    total = sum(parameter.numel() for parameter in model.parameters())
    attention, plain = _attention(config, block_size), _plain_matrices(model)
    active, products, router = total, plain, 0
    for site, module in sites.items():
        share, slots, replace = routed[str(site)], module.num_experts, module.combine == "replace"
        base = list(module.base_weights(of=lambda parameter: parameter).values()) if replace else []
        products += share * (_matrices_of_slot(module.experts) - _matrices(base))
        active += (share / slots - 1) * _numel(module.experts.parameters()) - share * _numel(base)
        router += module.router.discriminant_weight.numel() if config.cse_routing == "discriminant" else 0
    for experts in (module for module in model.modules() if isinstance(module, SwitchExperts)):
        products += _matrices_of_slot(experts)
        plain += _matrices_of_slot(experts)
        active += (1 / experts.num_experts - 1) * _numel(experts.parameters())
    return TokenCost(
        total,
        active,
        FORWARD_AND_BACKWARD * (2 * products + attention) + 2 * router,
        FORWARD_AND_BACKWARD * (2 * plain + attention),
    )


def _attention(config, block_size: int) -> int:
    """Forward operations a token of scores and weighted sums, in all layers."""
    return config.num_hidden_layers * 4 * block_size * config.hidden_size


def _plain_matrices(model: nn.Module) -> int:
    """Weights of all matrices outside of experts."""
    return _matrices(module.weight for module in model.modules() if isinstance(module, nn.Linear | Conv1D))


def _numel(parameters) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _matrices_of_slot(experts: nn.Module) -> int:
    """Weights of one expert, without its biases: those have two dimensions, the slot being the first."""
    return sum(parameter[0].numel() for parameter in experts.parameters() if parameter.dim() == 3)


def empty_model(run: Run, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    """The model of a run without memory for its weights."""
    config = build_config(run.arm, run.family, run.settings["size"]["config"], tokenizer)
    with torch.device("meta"):
        return CLASSES[run.family, "switch" if run.arm.kind == "switch" else "cse"][1](config)


def routed_shares(run: Run) -> dict[str, float]:
    """Site to the share of training tokens with an expert: the shares measured on each domain's test blocks, weighed
    by how much of the training text is that domain's."""
    shares = run.shares if run.arm.domain is None else {run.arm.domain: 1.0}
    return {
        site: sum(share * domains[domain]["routed"] for domain, share in shares.items())
        for site, domains in run.result["test"]["routing"].items()
    }


def steps_of(run: Run) -> tuple[int, int]:
    """Optimizer steps of a run, and how many of them came before the experts were switched on."""
    steps = max(entry["step"] for entry in run.log)
    if run.arm.start is not None:
        return steps, 0
    on = [entry["step"] for entry in run.log if any(name.endswith("/clusters") for name in entry)]
    return steps, min([*on, steps])


def read_ahead(settings: dict[str, Any]) -> ReadAhead:
    """
    What a run reads ahead, by its settings alone: so it is told alike of runs and of records that lack it.

    Args:
        settings: of a run (`run.json`) or a record. A stage keeps the clusters that it starts with, and reads nothing.
    """
    arm, size = Arm(**settings["arm"]), settings["size"]
    if arm.kind != "cse" or arm.start is not None:
        return ReadAhead()
    config_class, model_class = CLASSES[size["family"], "cse"]
    separator = "cse_separator_token_id"
    values = {**size["config"], **{name: value for name, value in arm.model.items() if name != separator}}
    # the base model's matrix products do not depend on the vocabulary
    values |= {"vocab_size": settings["mixture"]["vocab_size"]}
    values |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    config = config_class(**values | ({"cse_routing": "given"} if arm.control else {}))
    callback = build_callback(arm, settings["seed"])
    # the callback's own conditions: routes look at no state, and layers are not chosen by states
    if config.cse_routing not in STATELESS or config.cse_layers == "auto" or callback.layer_budget is not None:
        return ReadAhead()
    steps, step_rows, rows = _planned_steps(arm, settings)
    first_fit = callback.schedule.resolve(at_once=False).first_fit(steps)
    missing = 0 if first_fit is None else callback.sample_size - first_fit * step_rows
    rows = min(max(missing, 0), rows)
    with torch.device("meta"):
        base = model_class(config).base_model
    block_size = settings["mixture"]["block_size"]
    a_token = 2 * _plain_matrices(base) + _attention(config, block_size)
    return ReadAhead(rows, rows * block_size * a_token, rows > 0 and arm.model.get(separator) is not None)


def _planned_steps(arm: Arm, settings: dict[str, Any]) -> tuple[int, int, int]:
    """Optimizer steps of a run by its settings, rows of one step, and rows of the training data."""
    mixture, training = settings["mixture"], {**settings["size"]["training"], **arm.training}
    parts = [1.0] if mixture["packed_together"] else mixture["shares"].values()
    rows = sum(round(mixture["tokens"] * share) // mixture["block_size"] for share in parts)
    accumulated = training.get("gradient_accumulation_steps", 1)
    batch = training["per_device_train_batch_size"]
    steps = settings["steps"] or training.get("max_steps")
    if steps is None:
        an_epoch = math.ceil(math.ceil(rows / batch) / accumulated)
        steps = math.ceil(an_epoch * training["num_train_epochs"])
    return steps, batch * accumulated, rows


def run_cost(run: Run, start: Run | None, tokenizer: PreTrainedTokenizerBase) -> RunCost:
    """
    Args:
        run: a finished run.
        start: the run it went on from; None for one from scratch.
        tokenizer: of its corpus, for the size of the vocabulary.

    Raises:
        ValueError: `start` is not the arm that it names.
    """
    if run.arm.start != (start.arm.name if start else None):
        raise ValueError(f"start={start!r} is not allowed: {run.arm.name!r} starts from {run.arm.start!r}.")
    block_size = run.settings["mixture"]["block_size"]
    per_token = token_cost(empty_model(run, tokenizer), block_size, routed_shares(run))
    if per_token.total != run.result["parameters"]["total"]:
        raise ValueError(
            f"folder={str(run.folder)!r} is not allowed: its model had {run.result['parameters']['total']} "
            f"parameters, its settings make one of {per_token.total}."
        )
    training = run.training
    per_step = training["per_device_train_batch_size"] * training.get("gradient_accumulation_steps", 1) * block_size
    steps, dense_steps = steps_of(run)
    flops = per_step * (dense_steps * per_token.dense_flops + (steps - dense_steps) * per_token.flops)
    seconds = run.seconds
    if start is None:
        ahead = read_ahead(run.settings)
        return RunCost(per_token, steps * per_step, flops + ahead.flops, seconds, ahead)
    before = run_cost(start, None, tokenizer)
    together = None if None in (seconds, before.seconds) else seconds + before.seconds
    tokens = before.tokens + steps * per_step
    return RunCost(per_token, tokens, before.flops + flops, together, before.read_ahead)


__all__ = [
    "ReadAhead",
    "RunCost",
    "TokenCost",
    "empty_model",
    "read_ahead",
    "routed_shares",
    "run_cost",
    "steps_of",
    "token_cost",
]
