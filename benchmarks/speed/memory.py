# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Peak memory of a training step, counted tensor by tensor.

What is counted. On a CPU: the bytes of every tensor storage that is alive, after every operation of forward pass,
backward pass and optimizer step: parameters, buffers, gradients, AdamW moments, activations, and tensors that live for
a moment between two operations. What one kernel takes and gives back inside of itself is not seen. On CUDA:
`torch.cuda.max_memory_allocated`, which sees that too, rounded up to 512 bytes a tensor; what other contenders
and libraries hold meanwhile is taken off.

torch's own `torch.distributed._tools.mem_tracker.MemTracker` counts the same, but puts hooks on parameters and fails
where a module is called with cast ones (`torch.func.functional_call`), as experts are under autocast.
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveStorages(TorchDispatchMode):
    """
    Bytes of the storages that are alive, and the most there ever were: of all that operations give while this is
    entered, and of what was told to `add` before. A storage counts once, however many tensors look at it, until the
    last of them is gone.
    """

    def __init__(self):
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: set[weakref.ref] = set()

    def add(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            size = storage.nbytes()

            def gone(reference, size=size):
                self._known.discard(reference)
                self.live -= size

            # equal to the reference of before, if there is one: torch keeps one Python object a storage
            reference = weakref.ref(storage, gone)
            if reference not in self._known:
                self._known.add(reference)
                self.live += size
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        self.add(leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor))
        return output


@dataclass(frozen=True)
class TrainingMemory:
    """
    Bytes.

    Fields:
        peak: the most that was alive during a step.
        gradients: after the backward pass, of all parameters that have one.
        state: parameters, their gradients and AdamW's moments.
    """

    peak: int
    gradients: int
    state: int


def measure_training(
    model: nn.Module, optimizer: Optimizer, backward: Callable[[], None], batch: torch.Tensor
) -> TrainingMemory:
    """
    Memory of a step in which optimizer states exist already: two steps run, the second counts.

    Args:
        model: on the device where it is measured.
        optimizer: of its parameters.
        backward: forward and backward pass of one step.
        batch: what the step reads.
    """

    def step():
        backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    moments = [value for state in optimizer.state.values() for value in state.values()]
    own = [*model.parameters(), *model.buffers(), batch, *moments]
    # after the first step, so that workspaces that libraries keep from then on count for nobody
    others = torch.cuda.memory_allocated(batch.device) - _bytes(own) if batch.is_cuda else 0
    peak = peak_bytes(step, batch.device, own)
    backward()
    gradients = _bytes(parameter.grad for parameter in model.parameters() if parameter.grad is not None)
    optimizer.zero_grad(set_to_none=True)
    return TrainingMemory(peak - others, gradients, _bytes(model.parameters()) + gradients + _bytes(moments))


def peak_bytes(call: Callable[[], object], device: torch.device, known: Iterable[torch.Tensor]) -> int:
    """The most bytes alive on a device during a call. On a CPU of what the call makes, and of what is `known` before
    it; on CUDA of everything."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device)
    with LiveStorages() as storages:
        storages.add(known)
        call()
    return storages.peak


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Of distinct storages."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
