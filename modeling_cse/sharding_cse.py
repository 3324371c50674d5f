# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Tensors that are spread over processes (FSDP2's `DTensor`): reading them whole, and writing single expert slots."""

import torch


if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor, Replicate


def is_sharded(tensor: torch.Tensor) -> bool:
    return torch.distributed.is_available() and isinstance(tensor, DTensor)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with all its values. Every process must ask for the same tensors in the same order."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def values_here(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor; in the same memory."""
    return tensor.detach().to_local() if is_sharded(tensor) else tensor.detach()


def slots_here(tensor: torch.Tensor) -> torch.Tensor:
    """
    The slots of a fused tensor (E, ...) that this process holds: (e,) int64, ascending.

    Raises:
        ValueError: it is spread over another dimension than the slots.
    """
    device = tensor.device
    if not is_sharded(tensor):
        return torch.arange(len(tensor), device=device)
    for placement in tensor.placements:
        if not (placement.is_replicate() or placement.is_shard(0)):
            raise ValueError(
                f"placements={tensor.placements} of an expert tensor is not allowed: experts must be whole or spread "
                "by slot (the first dimension), as fully_shard does."
            )
    mesh = tensor.device_mesh
    numbers = DTensor.from_local(torch.arange(len(tensor), device=device), mesh, [Replicate()] * mesh.ndim)
    return numbers.redistribute(placements=tensor.placements).to_local()


@torch.no_grad()
def write_slot(tensor: torch.Tensor, slot: int, values: torch.Tensor) -> None:
    """Writes one slot of a fused tensor (E, ...), where it lies; values (...) are whole on every process."""
    held = values_here(tensor)
    for place in (slots_here(tensor) == slot).nonzero().flatten().tolist():
        held[place] = values.to(held)


__all__ = ["is_sharded", "slots_here", "values_here", "whole", "write_slot"]
