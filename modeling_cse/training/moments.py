# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""What an optimizer remembers of expert slots: at their start, and while no cluster routes to them."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import nn
from transformers.utils import logging

from ..dispatch_cse import RoutedModule
from ..sharding_cse import slots_here, values_here, whole, write_slot
from .zero import MOMENTS, has_copies, moments_of, write_copies, write_moments


logger = logging.get_logger(__name__)

# Second moments of the Adam family: they say how large gradients are, which for fresh weights is not zero.
SQUARES = ("exp_avg_sq", "max_exp_avg_sq")
# What holds one value per weight that can be laid out like the weight, and what only counts steps; by PyTorch's names.
PER_WEIGHT = ("exp_avg", *SQUARES, "exp_inf", "momentum_buffer", "square_avg", "grad_avg", "acc_delta", "sum")
COUNTS = ("step", "mu_product")
# Of these, what carries a weight on in the direction it went: nothing of it is a new owner's.
CARRIES = ("exp_avg", "momentum_buffer", "grad_avg")


@torch.no_grad()
def start_moments(
    optimizer: torch.optim.Optimizer, module: RoutedModule, slots: Mapping[int, int | None]
) -> None:
    """
    Gives expert slots that start anew the moments of the base, and copies of an expert those of that expert.

    A copy of the base (`"replace"`) takes over the base's moments, so that its next step is the one that the base
    would have made. A fresh expert (`"add"`) has no past; its second moments start at the mean of those of the base's
    matrix in the same place. From zero, Adam would divide by next to nothing and take its first steps several times
    too large: (1 - beta1^n) / sqrt(1 - beta2^n) is 6.5 after n = 10 steps at beta2 = 0.999.

    Where the base's state cannot be read (it is frozen, or its state is not one plain value per weight, as that of
    Adafactor and of optimizers in eight bits), experts start by themselves; slots that had another owner lose its
    momentum, if that is plain.

    Args:
        optimizer: of the run.
        module: whose experts start.
        slots: the expert slots that changed hands, each with the slot of which it is a copy, None for the base.
    """
    if slots and has_copies(module):
        _start_in_zero(module, slots)
        return
    if not slots:
        return
    names = _state_names(optimizer, module)
    if not names:
        _change_owners(optimizer, module, slots)
        return
    for parameter in module.experts.parameters():
        _begin_state(optimizer, parameter, like=_first_base_state(optimizer, module))
    for name in names:
        base = module.base_weights(of=partial(_whole_state, optimizer, name))
        start = _start_of_slot(module, name, base)
        for key, parameter in module.experts.named_parameters():
            state = optimizer.state[parameter][name]
            before = whole(state).clone() if any(parent is not None for parent in slots.values()) else state
            for slot, parent in slots.items():
                write_slot(state, slot, start[key] if parent is None else before[parent])


def _change_owners(
    optimizer: torch.optim.Optimizer, module: RoutedModule, slots: Mapping[int, int | None]
) -> None:
    """Without the base's state: a copy takes over what is known of its parent, a fresh expert no momentum."""
    for parameter in module.experts.parameters():
        state = optimizer.state.get(parameter, {})
        for name in (name for name, value in state.items() if name in PER_WEIGHT and _is_plain(value, parameter)):
            before = whole(state[name]).clone()
            for slot, parent in slots.items():
                if parent is not None:
                    write_slot(state[name], slot, before[parent])
                elif name in CARRIES:
                    write_slot(state[name], slot, torch.zeros_like(before[slot]))


def _whole_state(optimizer: torch.optim.Optimizer, name: str, parameter: nn.Parameter) -> torch.Tensor:
    return whole(optimizer.state[parameter][name])


def _start_in_zero(module: RoutedModule, slots: Mapping[int, int | None]) -> None:
    write_copies(module, list(slots))
    for name in MOMENTS:
        start = _start_of_slot(module, name, module.base_weights(of=partial(moments_of, name=name)))
        for key, parameter in module.experts.named_parameters():
            before = moments_of(parameter, name)
            values = [start[key] if parent is None else before[parent].to(start[key]) for parent in slots.values()]
            write_moments(parameter, name, list(slots), torch.stack(values))


def _start_of_slot(module: RoutedModule, name: str, base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One kind of moment for one slot, by the names of the fused tensors."""
    shapes = {key: parameter.shape[1:] for key, parameter in module.experts.named_parameters()}
    device = next(iter(base.values())).device
    means = {key: base[key].float().mean() if name in SQUARES else 0.0 for key in shapes}
    slot = {key: torch.ones(shape, device=device) * means[key] for key, shape in shapes.items()}
    if module.experts.combine == "replace":
        module.experts.lay_base(base, slot)
    return slot


def _state_names(optimizer: torch.optim.Optimizer, module: RoutedModule) -> list[str]:
    """The entries of the optimizer's state that hold one value per weight of the base; none if there is anything in it
    that could not be begun for an expert, like the scales of moments in eight bits."""
    found: list[list[str]] = []

    def look(parameter: nn.Parameter) -> torch.Tensor:
        state = optimizer.state.get(parameter, {})
        names = [name for name, value in state.items() if name in PER_WEIGHT and _is_plain(value, parameter)]
        found.append(names if set(state) <= {*names, *COUNTS} else [])
        return parameter

    module.base_weights(of=look)
    return found[0] if all(names == found[0] for names in found) else []


def _is_plain(value: object, parameter: nn.Parameter) -> bool:
    """Whether it holds a number for each weight: codes of eight bits have the shape too, as bytes or as a subclass."""
    if not isinstance(value, torch.Tensor) or value.shape != parameter.shape or not value.is_floating_point():
        return False
    return type(values_here(value)) is torch.Tensor


def _first_base_state(optimizer: torch.optim.Optimizer, module: RoutedModule) -> dict:
    states: list[dict] = []

    def look(parameter: nn.Parameter) -> torch.Tensor:
        states.append(optimizer.state[parameter])
        return parameter

    module.base_weights(of=look)
    return states[0]


def _begin_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, like: dict) -> None:
    """Until the first fit experts have no gradient, so that the optimizer knows nothing of them. Their step count
    starts with the base's: bias correction is for moments that start at zero."""
    if optimizer.state.get(parameter):
        return
    state = {}
    for name, value in like.items():
        per_weight = torch.is_tensor(value) and value.dim() > 0
        state[name] = torch.zeros_like(parameter, dtype=value.dtype) if per_weight else _copy(value)
    optimizer.state[parameter] = state


def _copy(value):
    return value.clone() if torch.is_tensor(value) else value


class IdleSlots:
    """
    Keeps expert slots that no cluster routes to exactly as they are. Slots are fused in one parameter, so that an
    optimizer step would decay them, and carry them along with what is left of their momentum: an expert whose cluster
    is absent for a while would come back as another.
    """

    def __init__(self):
        self.held: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self.idle: list[tuple[RoutedModule, list[int]]] = []

    @torch.no_grad()
    def take(self, modules: list[RoutedModule], optimizer: torch.optim.Optimizer) -> None:
        """Notes idle slots and what they hold; after every fit. Reads the device."""
        for module, slots in self.idle:
            if has_copies(module):
                write_copies(module, slots)  # which have moved on meanwhile
        self.held, self.idle = [], []
        for module in modules:
            if not module.router.num_clusters:
                continue
            used = set(module.router.cluster_expert.tolist())
            idle = [slot for slot in range(module.num_experts) if slot not in used]
            if not idle:
                continue
            self.idle.append((module, idle))
            for parameter in module.experts.parameters():
                numbers = slots_here(parameter)
                rows = torch.isin(numbers, torch.tensor(idle, device=numbers.device)).nonzero().flatten()
                state = optimizer.state.get(parameter, {})
                per_weight = [value for value in state.values() if _is_plain(value, parameter)]
                self.held += [(tensor, rows, values_here(tensor)[rows].clone()) for tensor in (parameter, *per_weight)]

    @torch.no_grad()
    def restore(self) -> None:
        """Puts them back; after every optimizer step."""
        for tensor, rows, values in self.held:
            values_here(tensor)[rows] = values
