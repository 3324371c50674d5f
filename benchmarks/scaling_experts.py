# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""The experts of one FFN layer: what a routed token costs with few and with many of them."""

import statistics
from contextlib import AbstractContextManager, nullcontext
from itertools import product

import torch
from scaling_rounds import interleaved, quartiles
from torch.profiler import ProfilerActivity, profile

from modeling_cse import CSEGPT2Config, CSEGPT2Model


# Operators that are matrix products, by the last part of their name.
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "grouped_mm", "linear", "matmul", "mkldnn_linear", "linear_backward")
LENGTH = 256  # tokens of a row
PRECISIONS = ("fp32", "bf16")


class Layer:
    """A routed FFN whose E experts are owned by E clusters, beside one common cluster without an expert."""

    def __init__(self, experts: int, width: int, expert_width: int):
        torch.manual_seed(0)
        config = CSEGPT2Config(
            **{"n_embd": width, "n_inner": expert_width, "n_layer": 1, "n_head": 4, "n_positions": LENGTH},
            **{"vocab_size": 8, "bos_token_id": 0, "eos_token_id": 0, "resid_pdrop": 0.0},
            **{"cse_layers": [0], "cse_num_experts": experts, "cse_expert_size": expert_width},
            **{"cse_max_clusters": experts + 1, "cse_combine": "replace", "cse_routing": "discriminant"},
        )
        self.module = next(iter(CSEGPT2Model(config).train().routed_modules().values()))
        self.experts = experts
        # Directions at random are nearly orthogonal: a state along one is told from all others by its score.
        self.directions = torch.nn.functional.normalize(torch.randn(experts + 1, width), dim=1)
        self.module.router.write(
            centroids=self.directions,
            radii=torch.ones(experts + 1),
            cluster_sizes=torch.ones(experts + 1, dtype=torch.int64),
            discriminant_weight=self.directions,
            discriminant_bias=torch.zeros(experts + 1),
            cluster_expert=torch.cat([torch.arange(experts), torch.tensor([-1])]),
        )

    def states(self, tokens: int, routed: float) -> torch.Tensor:
        """States (tokens / LENGTH, LENGTH, d), of which the share `routed` goes to experts, as many to each as to any
        other, in random order.

        Raises:
            ValueError: the router sends them elsewhere.
        """
        generator = torch.Generator().manual_seed(1)
        clusters = torch.arange(tokens) % self.experts
        clusters[round(tokens * routed) :] = self.experts
        clusters = clusters[torch.randperm(tokens, generator=generator)].view(-1, LENGTH)
        noise = torch.randn(*clusters.shape, self.directions.shape[1], generator=generator)
        states = 8 * self.directions[clusters] + 0.02 * noise
        wanted = torch.where(clusters < self.experts, clusters, -1)
        if not torch.equal(self.module.router(states)[2], wanted):
            raise ValueError(f"experts={self.experts} is not allowed: the router takes some tokens elsewhere.")
        return states

    def step(self, states: torch.Tensor, precision: str) -> None:
        """Forward and backward; gradients start from nothing, as after an optimizer step."""
        self.module.zero_grad(set_to_none=True)
        states = states.detach().requires_grad_()
        with autocast(precision):
            output = self.module(states)
        output.backward(torch.ones_like(output))
        self.module.zero_grad(set_to_none=True)


def autocast(precision: str) -> AbstractContextManager:
    return torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()


def measure_experts(sizes: dict, rounds: int) -> list[dict]:
    """
    A point for each number of experts, tokens a step, share of them that is routed, and precision. Fields:

        microseconds: of a forward and backward pass, over routed tokens (the base's work for the others included).
        over_fewest: that time over the one with the fewest experts, in the same round.
        router: microseconds of the router's forward pass, over all tokens.
        without_products: microseconds of all operators that are no matrix product (routing, sorting, gathering,
            activations, biases, zeros for gradients), over routed tokens, the median of profiled passes (which are
            slower); and `products`, the rest.
    """
    layers = {count: Layer(count, sizes["width"], sizes["expert_width"]) for count in sizes["experts"]}
    points = []
    for precision, tokens, routed in product(sizes["precisions"], sizes["tokens"], sizes["routed"]):
        states = {count: layer.states(tokens, routed) for count, layer in layers.items()}
        calls = {(count, "step"): _step(layers[count], states[count], precision) for count in layers}
        calls |= {(count, "router"): _route(layers[count], states[count]) for count in layers}
        seconds = interleaved(calls, rounds)
        fewest = seconds[min(layers), "step"]
        for count, layer in layers.items():
            times, per_token = seconds[count, "step"], 1e6 / round(tokens * routed)
            split = _split(layer, states[count], precision, sizes["profiled"])
            points.append(
                {"experts": count, "tokens": tokens, "routed": routed, "precision": precision}
                | {"microseconds": quartiles(times, per_token)}
                | {"over_fewest": quartiles([t / first for t, first in zip(times, fewest, strict=True)])}
                | {"router": quartiles(seconds[count, "router"], 1e6 / tokens)}
                | {name: float(f"{value * per_token:.4g}") for name, value in split.items()}
            )
    return points


def _step(layer: Layer, states: torch.Tensor, precision: str):
    return lambda: layer.step(states, precision)


def _route(layer: Layer, states: torch.Tensor):
    return lambda: layer.module.router(states)


def _split(layer: Layer, states: torch.Tensor, precision: str, passes: int) -> dict[str, float]:
    """Seconds of a step inside matrix products and outside of them."""
    spent: dict[str, list[float]] = {"products": [], "without_products": []}
    for _ in range(passes):
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            layer.step(states, precision)
        events = profiler.key_averages()
        for name, wanted in (("products", True), ("without_products", False)):
            own = [e.self_cpu_time_total for e in events if (e.key.split("::")[-1].lstrip("_") in PRODUCTS) == wanted]
            spent[name].append(sum(own) * 1e-6)
    return {name: statistics.median(values) for name, values in spent.items()}
