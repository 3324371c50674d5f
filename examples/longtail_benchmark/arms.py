# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""The opponents: what each arm of the benchmark is, and the model it trains."""

from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from modeling_cse import ClusterExpertsCallback, CSEBertConfig, CSEBertForMaskedLM, CSEGPT2Config, CSEGPT2ForCausalLM
from modeling_cse.data import end_token_id, label_at_random, label_by_domain
from modeling_cse.evaluation.switch import (
    SwitchBertConfig,
    SwitchBertForMaskedLM,
    SwitchGPT2Config,
    SwitchGPT2ForCausalLM,
)


KINDS = ("dense", "switch", "cse")
CONTROLS = (None, "oracle", "random")
# What a domain stage must say, as the size does not: how long, how fast, how often it is validated. The warm-up of a
# pretraining would be most of a stage, and some sizes' all of it.
STAGE_TRAINING = {"num_train_epochs", "learning_rate", "warmup_steps", "eval_steps"}
# The FFN's width in a config.
WIDTH = {"gpt2": "n_inner", "bert": "intermediate_size"}
CLASSES = {
    ("gpt2", "cse"): (CSEGPT2Config, CSEGPT2ForCausalLM),
    ("gpt2", "switch"): (SwitchGPT2Config, SwitchGPT2ForCausalLM),
    ("bert", "cse"): (CSEBertConfig, CSEBertForMaskedLM),
    ("bert", "switch"): (SwitchBertConfig, SwitchBertForMaskedLM),
}


@dataclass(frozen=True)
class Arm:
    """
    One opponent.

    Fields:
        kind: "dense", "switch" (learned top-1 routing) or "cse".
        model: config values beside those of the size. `cse_separator_token_id: end` is the token that ends a document
            of the corpus.
        clusters: arguments of `ClusterExpertsCallback` (kind "cse"). Without `evidence_size` evidence is counted on
            the sample alone, as it was by default when most records were made.
        control: clusters that come with the data in place of found ones: "oracle" (the domain) or "random" (of the
            domains' sizes).
        training: `TrainingArguments` beside those of the size.
        start: name of the arm whose final model this one goes on from, on the text of `domain` alone (stage.py);
            `training` must then say how. Of kind "cse" only the experts are trained, with the clusters they have.
        domain: the long-tail domain of such a stage.
        as_large_as: a dense arm is widened until it has as many parameters as this one, in whatever size (`for_size`).
    """

    name: str
    kind: str
    model: dict[str, Any] = field(default_factory=dict)
    clusters: dict[str, Any] = field(default_factory=dict)
    control: str | None = None
    training: dict[str, Any] = field(default_factory=dict)
    start: str | None = None
    domain: str | None = None
    as_large_as: "Arm | None" = None

    def __post_init__(self):
        for name, allowed in (("kind", KINDS), ("control", CONTROLS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not allowed: it must be one of {allowed}.")
        if self.kind != "cse" and (self.clusters or self.control):
            raise ValueError(f"clusters={self.clusters!r}, control={self.control!r} is not allowed for {self.kind!r}.")
        if self.as_large_as is not None and (self.kind != "dense" or self.model):
            raise ValueError(
                f"as_large_as={self.as_large_as.name!r} is not allowed with kind={self.kind!r} and "
                f"model={self.model!r}: what is widened is a dense model, of which nothing else is said."
            )
        if (self.start is None) != (self.domain is None):
            raise ValueError(f"start={self.start!r} and domain={self.domain!r} belong together.")
        if self.start is not None and (self.clusters or self.control):
            raise ValueError(
                f"clusters={self.clusters!r}, control={self.control!r} is not allowed with start={self.start!r}: a "
                "stage keeps the clusters of its start."
            )
        if self.start is not None and not STAGE_TRAINING <= self.training.keys():
            raise ValueError(f"training={self.training!r} is not allowed: a stage needs {sorted(STAGE_TRAINING)}.")

    def settings(self) -> dict[str, Any]:
        """What a run says of its arm, from which `Arm(**settings)` makes it again; of one that is made `for_size`."""
        if self.as_large_as is not None:
            name = self.as_large_as.name
            raise ValueError(f"as_large_as={name!r} is not allowed here: make the arm for_size() first.")
        return {name: value for name, value in asdict(self).items() if name != "as_large_as"}


def read_arms(path: Path) -> dict[str, Arm]:
    """
    The arms of a YAML file: name to fields. `like: other` takes over the fields of an arm above it, and merges
    mappings; null takes a field away. `as_large_as` names an arm above it.

    Raises:
        ValueError: an arm that is not there, or a wrong field.
    """
    fields: dict[str, dict] = {}
    for name, own in yaml.safe_load(path.read_text(encoding="utf-8")).items():
        own = dict(own or {})
        like = own.pop("like", None)
        if like is not None and like not in fields:
            raise ValueError(f"like={like!r} is not allowed in {name!r}: it must be one of {sorted(fields)}.")
        merged = deepcopy(fields[like]) if like else {}
        for key, value in own.items():
            merged[key] = {**merged.get(key, {}), **value} if isinstance(value, dict) else value
        fields[name] = {key: value for key, value in merged.items() if value is not None}
    arms: dict[str, Arm] = {}
    for name, values in fields.items():
        other = values.pop("as_large_as", None)
        if other is not None and other not in arms:
            raise ValueError(f"as_large_as={other!r} is not allowed in {name!r}: it must be one of {sorted(arms)}.")
        arms[name] = Arm(name, **values, as_large_as=arms.get(other))
    return arms


def for_size(arm: Arm, family: str, size: dict[str, Any]) -> Arm:
    """
    An arm as models of one size have it, in numbers: `as_large_as` becomes the FFN's width that comes nearest to it,
    layers of a Switch that are counted from the end are counted from the front.

    Args:
        arm: any; one that says nothing of the kind stays as it is.
        family: "gpt2" or "bert".
        size: config values of the size.
    """
    if "switch_layers" in arm.model:
        depth = CLASSES[family, "switch"][0](**size).num_hidden_layers
        arm = replace(arm, model={**arm.model, "switch_layers": [i % depth for i in arm.model["switch_layers"]]})
    if arm.as_large_as is None:
        return arm

    def count(one: Arm) -> int:
        config_class, of_class = CLASSES[family, "switch" if one.kind == "switch" else "cse"]
        with torch.device("meta"):  # the vocabulary counts the same for both
            return count_parameters(of_class(config_class(**{**size, **_own_values(one)})))["total"]

    narrow, wider = (Arm(arm.name, "dense", model={WIDTH[family]: width}) for width in (1, 2))
    each = count(wider) - count(narrow)
    width = 1 + round((count(arm.as_large_as) - count(narrow)) / each)
    return replace(arm, model={WIDTH[family]: width}, as_large_as=None)


def model_class(arm: Arm, family: str) -> type[PreTrainedModel]:
    """The class of an arm's model."""
    return CLASSES[family, "switch" if arm.kind == "switch" else "cse"][1]


def build_config(arm: Arm, family: str, size: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """The config of an arm's model; a dense model is a CSE model without layers."""
    config_class, _ = CLASSES[family, "switch" if arm.kind == "switch" else "cse"]
    values = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    values |= {"vocab_size": len(tokenizer), **size, **_own_values(arm)}
    if values.get("cse_separator_token_id") == "end":
        values["cse_separator_token_id"] = end_token_id(tokenizer)
    unknown = sorted(arm.model.keys() - config_class().to_dict().keys() - {"attn_implementation"})
    if unknown:
        raise ValueError(f"model={unknown} of {arm.name!r} is not allowed: {config_class.__name__} has no such value.")
    return config_class(**values)


def _own_values(arm: Arm) -> dict[str, Any]:
    """Config values of an arm, beside those of the size."""
    layers = {"cse_layers": []} if arm.kind == "dense" else {}
    routes = {"cse_routing": "given"} if arm.control else {}
    return {**layers, **arm.settings()["model"], **routes}


def build_model(
    arm: Arm, family: str, size: dict[str, Any], tokenizer: PreTrainedTokenizerBase, seed: int
) -> PreTrainedModel:
    """The model of an arm before training: every weight that the dense model has too starts as the dense one's."""
    dense = Arm("dense", "dense")
    set_seed(seed)
    start = CLASSES[family, "cse"][1](build_config(dense, family, size, tokenizer)).state_dict()
    set_seed(seed + 1)
    model = model_class(arm, family)(build_config(arm, family, size, tokenizer))
    own = model.state_dict()
    model.load_state_dict(
        {name: weight for name, weight in start.items() if name in own and own[name].shape == weight.shape},
        strict=False,
    )
    return model


def build_callback(arm: Arm, seed: int) -> ClusterExpertsCallback | None:
    """What keeps the clusters of an arm; None for arms without."""
    if arm.kind != "cse":
        return None
    clusters = {"seed": seed, **arm.clusters}
    if arm.control:
        kept = ("warmup", "sample_size", "common_share", "seed")
        clusters = {name: clusters[name] for name in kept if name in clusters}
        clusters |= {"algorithm": "given", "update": "frozen"}
    elif arm.model.get("cse_routing", "evidence") == "evidence":
        clusters.setdefault("evidence_size", clusters.get("sample_size", ClusterExpertsCallback().sample_size))
    return ClusterExpertsCallback(**clusters)


def label(arm: Arm, blocks: Dataset, shares: dict[str, float], seed: int) -> Dataset:
    """The clusters of a control as a column, the others without. Text of the general domain has the largest one."""
    if arm.control == "oracle":
        return label_by_domain(blocks, sorted(shares))
    if arm.control == "random":
        return label_at_random(blocks, [shares[domain] for domain in sorted(shares)], seed)
    return blocks


def count_parameters(model: nn.Module) -> dict[str, int]:
    """`total`: all parameters, tied ones once; `active`: the mean over routes is in the results, this is the most that
    one token uses."""
    total = sum(parameter.numel() for parameter in model.parameters())
    idle = 0
    for module in model.modules():
        if hasattr(module, "num_experts") and isinstance(getattr(module, "up_proj", None), nn.Parameter):
            idle += sum(parameter[1:].numel() for parameter in module.parameters())
    return {"total": total, "active": total - idle}


__all__ = [
    "Arm",
    "build_callback",
    "build_config",
    "build_model",
    "count_parameters",
    "for_size",
    "label",
    "model_class",
    "read_arms",
]
