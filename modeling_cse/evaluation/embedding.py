# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""The embedding of a text: the mean of a model's last hidden states over its tokens."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from .switch import SwitchBertForMaskedLM, SwitchGPT2ForCausalLM


SWITCH = {cls.config_class.model_type: cls for cls in (SwitchGPT2ForCausalLM, SwitchBertForMaskedLM)}


def load_base_model(folder: str | Path) -> PreTrainedModel:
    """
    The model of a saved language model without its head, in evaluation mode: any that the Auto classes know, and the
    Switch models, which they do not know.

    Args:
        folder: what `save_pretrained` or `Trainer.save_model` wrote.

    Raises:
        ValueError: there is no config, or its routes come with the data (`check_routes`).
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"folder={str(folder)!r} is not allowed: it must hold a saved model, but has no config.json.")
    fields, _ = PreTrainedConfig.get_config_dict(folder)
    auto = SWITCH.get(fields.get("model_type"))
    if auto is None:
        config = AutoConfig.from_pretrained(folder)
        check_routes(config)
        auto = AutoModelForMaskedLM if type(config) in MODEL_FOR_MASKED_LM_MAPPING else AutoModelForCausalLM
    return auto.from_pretrained(folder).base_model.eval()


def check_routes(config: PreTrainedConfig) -> None:
    """
    Whether routes can be read from text alone.

    Raises:
        ValueError: `cse_routing` is "given", so that a text without its cluster has no route.
    """
    if getattr(config, "cse_routing", None) == "given" and config.cse_layer_indices:
        raise ValueError(
            "cse_routing='given' is not allowed for tasks: their texts come without clusters. It must be 'evidence', "
            "'discriminant' or 'sequence'."
        )


def pad(sequences: Sequence[Sequence[int]], token: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Args:
        sequences: token ids of texts.
        token: what stands behind the end of the shorter ones.

    Returns:
        Token ids and attention mask, (len(sequences), length of the longest) int64.
    """
    lengths = torch.tensor([len(ids) for ids in sequences])
    mask = (torch.arange(int(lengths.max())) < lengths.unsqueeze(1)).long()
    ids = torch.full_like(mask, token)
    ids[mask.bool()] = torch.tensor([each for ids in sequences for each in ids])
    return ids, mask


def mean_states(base: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """(B, T) token ids and mask give the (B, d) fp32 mean of the last hidden states over the tokens of the mask."""
    states = base(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state.float()
    mask = attention_mask.unsqueeze(-1)
    return (states * mask).sum(1) / mask.sum(1)


@torch.no_grad()
def embed(
    base: PreTrainedModel, sequences: Sequence[Sequence[int]], *, batch_size: int = 32, bf16: bool = False
) -> np.ndarray:
    """
    Embeds texts. An embedding depends neither on the other texts nor on padding, up to rounding.

    Args:
        base: a model without its head (`base_model`); its parameters and its mode are kept.
        sequences: token ids of each text, special tokens included; no longer than the model's positions.
        batch_size: texts at a time. They are sorted by length, so that little is padded.
        bf16: whether the model runs under bf16 autocast; the mean is taken in fp32 in any case.

    Returns:
        (len(sequences), d) float32, in the order of `sequences`.

    Raises:
        ValueError: no text or one without a token, or routes that come with the data.
    """
    check_routes(base.config)
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    if not order or not len(sequences[order[0]]):
        raise ValueError("sequences is not allowed: it must hold at least one text, and each at least one token.")
    training, token = base.training, base.config.pad_token_id or 0
    base.eval()
    embeddings = np.empty((len(sequences), base.config.hidden_size), dtype=np.float32)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        ids, mask = pad([sequences[row] for row in rows], token)
        with torch.autocast(base.device.type, torch.bfloat16, enabled=bf16):
            states = mean_states(base, ids.to(base.device), mask.to(base.device))
        embeddings[rows] = states.float().cpu().numpy()
    base.train(training)
    return embeddings


__all__ = ["check_routes", "embed", "load_base_model", "mean_states", "pad"]
