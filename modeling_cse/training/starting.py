# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""From a dense checkpoint to a model with experts in one call, as in the paper's appendix."""

import copy
import os
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from .. import modeling_cse_bert, modeling_cse_gpt2
from ..clustering import ClusterSettings
from ..configuration_cse import BERT_AUTO_MAP, GPT2_AUTO_MAP, WIDTH_MULTIPLE, CSEFlags
from ..dispatch_cse import is_quantized
from .fitting import fit_experts
from .reading import read_batches


logger = logging.get_logger(__name__)

# As many as `cse_layers=None` means.
DEFAULT_BUDGET = 2
# What a dense checkpoint lacks, as it stands in the names of parameters and buffers.
NEW_PARTS = {"router", "experts", "evidence_router"}


def _stock_heads() -> dict[str, tuple[type[PreTrainedModel], type[PreTrainedModel]]]:
    """By name of the stock class: the stock class, and the class with experts that derives from it."""
    heads = {}
    for module, auto_map in ((modeling_cse_gpt2, GPT2_AUTO_MAP), (modeling_cse_bert, BERT_AUTO_MAP)):
        for auto_class, name in auto_map.items():
            if auto_class != "AutoConfig":
                ours = getattr(module, name.split(".")[-1])
                stock = next(base for base in ours.__mro__ if base.__module__.startswith("transformers.models."))
                heads[stock.__name__] = (stock, ours)
    return heads


HEADS = _stock_heads()
SETTINGS = [field.name for field in fields(ClusterSettings)]


def from_dense(
    checkpoint: str | os.PathLike | PreTrainedModel,
    data: Iterable[Mapping[str, Any]],
    *,
    batch_size: int | None = 8,
    cse_layers: list[int] | str | None = None,
    layer_budget: int | None = None,
    sample_size: int = 2048,
    seed: int = 0,
    output_fit_info: bool = False,
    **kwargs,
) -> PreTrainedModel | tuple[PreTrainedModel, dict[str, Any]]:
    """
    Makes a CSE model of a dense GPT-2 or BERT: takes over its weights, finds clusters in `data`, and switches the
    experts on. No logit changes by it (`cse_combine="add"`: to the bit; `"replace"`: but for rounding), and a Trainer
    goes on from there, with `ClusterExpertsCallback()` to keep the clusters up to date.

    The head is the checkpoint's. Only the sequences that are clustered are held in memory, and the dense model a
    second time while its weights are copied.

    Args:
        checkpoint: a folder or a name on the Hub, whose config names one of the 13 stock classes in `architectures`;
            or a model of such a class, of one dtype and on one device. It is left as it is, and shares nothing with
            the result.
        data: text like that which the model is going to see, tokenised; read as far as `sample_size` asks.
            With a `batch_size`, rows: a `datasets.Dataset`, a list, a stream (`IterableDataset`, generator) of dicts
            with `input_ids` (T,), and with `attention_mask` (T,) where they are padded; rows of a batch are of one
            length, as `data.pack` makes them. Of data that have a length a seeded random sample is taken, so that
            they may be sorted; of a stream the first rows.
            With `batch_size=None`, batches as `fit_experts` takes them, dicts of tensors (B, T), in their order.
            Other columns, labels among them, are ignored.
        batch_size: rows in a forward pass of the fit; `None` if `data` gives batches already (as in `DataLoader`).
        cse_layers: as in the config; or `"auto"` for the layers in which clusters are clearest (`Clustering.clarity`
            of what enters the modules that get experts, the mean over them), measured on the dense model. The config
            holds the list that was chosen.
        layer_budget: with `"auto"`, how many layers to choose; 2 if `None`.
        sample_size: sequences to fit on.
        seed: of the sample, of clustering, and of fresh expert weights.
        output_fit_info: return what was found too.
        **kwargs: flags of the config (`cse_combine`, ...); settings of the clusters as `fit_experts` takes them
            (`num_clusters`, `common_share`, ...); for a folder or name, whatever else `from_pretrained` takes
            (`dtype`, `device_map` of one device, `revision`, ...).

    Returns:
        The model, in the dtype, on the device and in the mode of the dense one (evaluation mode from a folder). With
        `output_fit_info` also a dict: `cse_layers` (list of int), `clarity` by layer (empty without `"auto"`) and
        `metrics`, as the callback logs them. They are logged at level info in any case.

    Raises:
        ValueError: a checkpoint of another architecture, or one that has experts already; data of a wrong form; fewer
            sequences than clusters; a wrong flag or setting.
    """
    settings = {"sample_size": sample_size, "seed": seed, **_taken(kwargs, SETTINGS)}
    flags = _taken(kwargs, CSEFlags.__dataclass_fields__)
    stock, ours, config = _head_of(checkpoint, kwargs)
    budget = _check_budget(cse_layers, layer_budget, config.num_hidden_layers)
    _cse_config(ours, config, {**flags, "cse_layers": None if budget else cse_layers})  # a wrong flag shows here
    batches = read_batches(data, batch_size, sample_size, seed)
    dense = checkpoint if isinstance(checkpoint, PreTrainedModel) else stock.from_pretrained(checkpoint, **kwargs)
    clarity = {}
    if budget:
        clarity = _clarity_by_layer(dense, ours, flags, batches, settings)
        cse_layers = sorted(sorted(clarity, key=clarity.__getitem__, reverse=True)[:budget])
        logger.info(f"cse_layers={cse_layers}: clearest clusters of {clarity}.")
    model = _with_experts(dense, ours, {**flags, "cse_layers": cse_layers}, seed)
    metrics = fit_experts(model, batches, **settings)
    logger.info(f"Experts of {ours.__name__} are on: {metrics}.")
    info = {"cse_layers": model.config.cse_layer_indices, "clarity": clarity, "metrics": metrics}
    return (model, info) if output_fit_info else model


def _taken(kwargs: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Takes the arguments of these names out of `kwargs`."""
    return {name: kwargs.pop(name) for name in names if name in kwargs}


def _head_of(
    checkpoint: str | os.PathLike | PreTrainedModel, kwargs: dict[str, Any]
) -> tuple[type[PreTrainedModel], type[PreTrainedModel], PreTrainedConfig]:
    """The stock class of a checkpoint, the class with experts that stands for it, and the checkpoint's config."""
    if isinstance(checkpoint, PreTrainedModel):
        if kwargs:
            raise ValueError(
                f"{sorted(kwargs)} are not allowed with a model in memory: they must be flags of the config or "
                "settings of the clusters. Change the model itself before, or name a folder."
            )
        # the exact class: one that derives from it may compute something else
        what, named, config = type(checkpoint).__name__, [type(checkpoint).__name__], checkpoint.config
        known = what in HEADS and type(checkpoint) is HEADS[what][0]
        _check_uniform(checkpoint)
    elif isinstance(checkpoint, str | os.PathLike):
        refused = sorted({"config", "output_loading_info"} & kwargs.keys())
        if refused:
            raise ValueError(f"{refused} are not allowed: the config is the checkpoint's, and flags change it.")
        config, _ = AutoConfig.from_pretrained(checkpoint, return_unused_kwargs=True, **kwargs)
        what, named = str(checkpoint), config.architectures or []
        known = len(named) == 1 and named[0] in HEADS and HEADS[named[0]][0].config_class is type(config)
    else:
        raise ValueError(
            f"checkpoint of type {type(checkpoint).__name__} is not allowed: it must be a folder, a name on the Hub, "
            "or a PreTrainedModel."
        )
    if config.model_type.startswith("cse_"):
        raise ValueError(
            f"checkpoint={what!r} is not allowed: it has experts already. Load it with from_pretrained, and fit its "
            "clusters anew with fit_experts(model, batches)."
        )
    if not known:
        raise ValueError(
            f"checkpoint={what!r} is not allowed: its architecture is {named} of model type {config.model_type!r}, "
            f"and it must be one of {sorted(HEADS)}. Load it as one of them and pass the model."
        )
    return *HEADS[named[0]], config


def _check_uniform(model: PreTrainedModel) -> None:
    if any(is_quantized(parameter) for parameter in model.parameters()):
        raise ValueError(
            f"checkpoint={type(model).__name__} with quantised weights is not allowed: all parameters must be plain "
            "floating tensors. Take experts over first, save, and load with a quantization_config then."
        )
    for name, found in (
        ("dtypes", {str(parameter.dtype) for parameter in model.parameters()}),
        ("devices", {str(parameter.device) for parameter in model.parameters()}),
    ):
        if len(found) != 1 or found == {"meta"}:
            raise ValueError(
                f"checkpoint={type(model).__name__} with {name} {sorted(found)} is not allowed: all parameters must "
                "be of one floating dtype and on one device."
            )


def _check_budget(cse_layers: list[int] | str | None, budget: int | None, depth: int) -> int | None:
    """The number of layers to choose, `None` if they are given."""
    if not isinstance(cse_layers, str):
        if budget is not None:
            raise ValueError(f"layer_budget={budget!r} is not allowed without cse_layers='auto'.")
        return None
    if cse_layers != "auto":
        raise ValueError(f"cse_layers={cse_layers!r} is not allowed: it must be None, a list of ints, or 'auto'.")
    if budget is None:
        return min(DEFAULT_BUDGET, depth)
    if not isinstance(budget, int) or isinstance(budget, bool) or not 1 <= budget <= depth:
        raise ValueError(f"layer_budget={budget!r} is not allowed: it must be an int from 1 to {depth}, the layers.")
    return budget


def _cse_config(ours: type[PreTrainedModel], dense: PreTrainedConfig, flags: dict[str, Any]) -> PreTrainedConfig:
    foreign = {"model_type", "architectures", "transformers_version", "auto_map"}  # the last one: code of its own
    values = {name: value for name, value in dense.to_dict().items() if name not in foreign}
    return ours.config_class(**{**values, **flags})


def _with_experts(
    dense: PreTrainedModel, ours: type[PreTrainedModel], flags: dict[str, Any], seed: int
) -> PreTrainedModel:
    """A model with experts, none of them in use, that holds a copy of the dense model's weights."""
    _check_uniform(dense)
    config = _cse_config(ours, dense.config, flags)
    # a base BERT may have been made without its pooler
    parts = {"add_pooling_layer": False} if hasattr(dense, "pooler") and dense.pooler is None else {}
    implementation = dense.config._attn_implementation
    # what no cluster owns yet is drawn too; that must depend on the seed, and disturb nobody else's random numbers
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        model = ours._from_config(config, dtype=dense.dtype, attn_implementation=implementation, **parts)
    keys = model.load_state_dict(dense.state_dict(), strict=False)
    lost = [key for key in keys.missing_keys if not NEW_PARTS & set(key.split("."))]
    if lost or keys.unexpected_keys:
        raise ValueError(
            f"checkpoint={type(dense).__name__} is not allowed: it lacks {lost} and has {keys.unexpected_keys}, "
            f"which a {type(dense).__name__} of its config has not. Was it changed after it was made?"
        )
    trained = {name: parameter.requires_grad for name, parameter in dense.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained.get(name, True))
    if getattr(dense, "generation_config", None) is not None:
        model.generation_config = copy.deepcopy(dense.generation_config)
    return model.to(dense.device).train(dense.training)


def _clarity_by_layer(
    dense: PreTrainedModel,
    ours: type[PreTrainedModel],
    flags: dict[str, Any],
    batches: list[dict[str, torch.Tensor]],
    settings: dict[str, Any],
) -> dict[int, float]:
    """
    How clear the clusters are in each layer of a dense model.

    All layers of a throw-away model get routers, and one expert of the smallest width, which costs next to nothing.
    While it is looked at no cluster exists, so that it computes what the dense model computes.
    """
    depth = dense.config.num_hidden_layers
    room = _cse_config(ours, dense.config, flags).max_clusters
    smallest = {"cse_combine": "add", "cse_num_experts": 1, "cse_expert_size": WIDTH_MULTIPLE}
    everywhere = {**flags, **smallest, "cse_layers": list(range(depth)), "cse_max_clusters": room}
    candidates = _with_experts(dense, ours, everywhere, settings["seed"])
    metrics = fit_experts(candidates, batches, **settings)
    return {
        layer: sum(metrics[f"cse/{site}/clarity"] for site in sites) / len(sites)
        for layer in range(depth)
        if (sites := [site for site in candidates.base_model.routed_modules() if site.layer == layer])
    }


__all__ = ["from_dense"]
