# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""What a model can be fed, said by name before a layer stumbles over it."""

import torch
from torch import nn
from transformers import Cache

from .routing_cse import known_ends, shapes_may_depend_on_data


def holds_tokens(past_key_values: Cache | None) -> bool:
    """Whether tokens stand before those of a call. A static cache counts them in a tensor: a program that is exported
    with one is taken to go on, as all of its calls but the first do."""
    length = 0 if past_key_values is None else past_key_values.get_seq_length()
    if torch.compiler.is_exporting() and isinstance(length, torch.Tensor):
        return True
    return bool(length > 0)


def check_inputs(
    tables: dict[str, nn.Embedding],
    hidden_size: int,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    token_type_ids: torch.Tensor | None,
    past_key_values: Cache | None,
) -> None:
    """
    Says by name what would otherwise end as "index out of range" or "cannot reshape". Values are looked at only
    where they are read for nothing: an accelerator is not waited for, and stops with an assertion of its own.

    Args:
        tables: the embedding that answers to each of `input_ids`, `position_ids` and `token_type_ids`.
        hidden_size: width of the embeddings.
        input_ids, position_ids, token_type_ids (..., T) int64 or int32; inputs_embeds (..., T, d).
        past_key_values: the tokens that stand before.

    Raises:
        ValueError: a batch without a token, indices of a wrong dtype or length or outside their table, embeddings
            of a wrong width, or more tokens than there are positions.
    """
    name, tokens = ("input_ids", input_ids) if input_ids is not None else ("inputs_embeds", inputs_embeds)
    if tokens is None or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return
    if not tokens.numel():
        raise ValueError(f"{name} of shape {tuple(tokens.shape)} is not allowed: it must have at least one token.")
    if input_ids is None and tokens.shape[-1] != hidden_size:
        raise ValueError(
            f"inputs_embeds of shape {tuple(tokens.shape)} is not allowed: its last dimension must be the hidden "
            f"size {hidden_size}."
        )
    length = tokens.shape[-1 if input_ids is not None else -2]
    # what a tool has put in the place of an embedding answers for itself
    rows = {argument: getattr(table, "num_embeddings", None) for argument, table in tables.items()}
    given = {"input_ids": input_ids, "position_ids": position_ids, "token_type_ids": token_type_ids}
    for argument, indices in given.items():
        if indices is not None:
            _check_indices(argument, indices, rows[argument], length)
    most = rows["position_ids"]
    if position_ids is None and most is not None and shapes_may_depend_on_data(tokens):
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        if past + length > most:
            raise ValueError(
                f"{name} of shape {tuple(tokens.shape)} after {past} cached tokens is not allowed: a sequence "
                f"must have at most {most} tokens, the positions of this model."
            )


def _check_indices(name: str, indices: torch.Tensor, rows: int | None, length: int) -> None:
    """Whether an embedding of so many rows (None: nobody knows) can answer these indices (..., T), one a token."""
    if indices.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} of dtype {indices.dtype} is not allowed: it must be int64 or int32.")
    if indices.shape[-1] != length:
        raise ValueError(
            f"{name} of shape {tuple(indices.shape)} is not allowed: the batch has {length} tokens a row, so its last "
            f"dimension must be {length}."
        )
    ends = known_ends(indices)
    if rows is not None and ends is not None and (ends[0] < 0 or ends[1] >= rows):
        raise ValueError(f"{name} from {ends[0]} to {ends[1]} is not allowed: it must be from 0 to {rows - 1}.")


__all__ = ["check_inputs", "holds_tokens"]
