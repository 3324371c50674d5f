# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""What is measured of each shape. A measure takes contenders and options, and gives records."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from statistics import median

import torch
from torch.utils.benchmark import timer
from transformers import DynamicCache, StaticCache

from modeling_cse.dispatch_cse import RoutedModule
from modeling_cse.routing_cse import RoutingContext

from .calibration import calibrate, entering
from .contenders import DENSE, Contender
from .interleaving import Ratio, Stopwatch, interleave
from .memory import measure_training
from .shapes import Shape


PROMPT = 32
# So small that states, and with them the routes that were calibrated, stay where they are.
LEARNING_RATE = 1e-7


@dataclass(frozen=True)
class Options:
    """What the command line says, see there."""

    device: str = "cpu"
    dtype: str = "fp32"
    batch_sizes: tuple[int, ...] = (4, 1)
    decoding_batch_sizes: tuple[int, ...] = (1, 8)
    length: int = 512
    tokens: int = 48
    cache: str = "dynamic"
    rounds: int = 10
    share: float = 0.3
    compile: bool = False

    @property
    def arithmetic(self) -> AbstractContextManager:
        """Of training: fp32, or autocast to bf16."""
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.dtype == "bf16")

    def batch(self, shape: Shape, rows: int, length: int) -> torch.Tensor:
        return shape.token_ids(rows, length).to(self.device)


def record(contender: str, rows: int | None, seconds: list[float], ratio: Ratio | None, **details) -> dict:
    """One result; `results.complete` adds what all results of a measure and a run have in common."""
    return {
        "contender": contender,
        "batch": rows,
        "seconds": median(seconds) if seconds else None,
        "ratio": None if ratio is None else ratio.median,
        "quartiles": None if ratio is None else [ratio.low, ratio.high],
        "rounds": max(len(seconds), 1),
        "details": details,
    }


def compare(rows: int, samplers: dict[str, Callable[[], float]], shares: dict, options: Options) -> Iterator[dict]:
    """Records of contenders that are timed in turn."""
    samples = interleave(samplers, options.rounds)
    for name, seconds in samples.items():
        yield record(name, rows, seconds, Ratio.paired(seconds, samples[DENSE]), routed=shares[name])


def training_step(contender: Contender, ids: torch.Tensor, options: Options):
    """A contender's optimizer, and its forward and backward pass on a batch (B, T)."""
    contender.model.train()
    optimizer = torch.optim.AdamW(contender.model.parameters(), lr=LEARNING_RATE, fused=True)
    forward = contender.timed(contender.model)

    def backward():
        with options.arithmetic:
            loss = forward(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()

    return optimizer, backward


def training(shape: Shape, contenders: list[Contender], options: Options) -> Iterator[dict]:
    """Forward pass, backward pass, AdamW."""
    for rows in options.batch_sizes:
        ids = options.batch(shape, rows, options.length)
        shares, samplers = {}, {}
        for contender in contenders:
            with options.arithmetic:
                shares[contender.name] = calibrate(contender, ids, options.share)
            optimizer, backward = training_step(contender, ids, options)

            def step(optimizer=optimizer, backward=backward):
                backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            samplers[contender.name] = Stopwatch(step)
        yield from compare(rows, samplers, shares, options)


def layer(shape: Shape, contenders: list[Contender], options: Options) -> Iterator[dict]:
    """Forward and backward pass of the last FFN alone, on the states that enter it."""
    for rows in options.batch_sizes:
        ids = options.batch(shape, rows, options.length)
        shares, samplers = {}, {}
        for contender in contenders:
            contender.model.train()
            with options.arithmetic:
                shares[contender.name] = calibrate(contender, ids, options.share)
                states = entering(contender, contender.ffns[-1], ids).requires_grad_()
            if isinstance(contender.ffns[-1], RoutedModule):
                contender.ffns[-1].contexts.put(RoutingContext(**contender.told(ids, options.length)))
            samplers[contender.name] = Stopwatch(_layer_step(contender, states, options))
        yield from compare(rows, samplers, shares, options)


def _layer_step(contender: Contender, states: torch.Tensor, options: Options) -> Callable[[], object]:
    ffn = contender.timed(contender.ffns[-1])
    inputs = [states, *contender.ffns[-1].parameters()]
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(states.shape, generator=generator).to(states.device)

    def step():
        with options.arithmetic:
            output = ffn(states)
        torch.autograd.grad(output, inputs, direction.to(output.dtype), allow_unused=True)

    return step


def memory(shape: Shape, contenders: list[Contender], options: Options) -> Iterator[dict]:
    """
    Peak of a training step over the dense twin's, without what only this contender has: `ratio` is its peak minus its
    own parameters, gradients and AdamW moments. Where the peak comes before gradients of experts exist, that takes off
    more than was there; `ratio_with_gradients` leaves their gradients in, and the truth lies between.
    """
    for rows in options.batch_sizes:
        ids = options.batch(shape, rows, options.length)
        dense = None
        for contender in contenders:
            with options.arithmetic:
                routed = calibrate(contender, ids, options.share)
            measured = measure_training(contender.model, *training_step(contender, ids, options), ids)
            dense = dense or measured  # the first contender
            own, gradients = measured.state - dense.state, measured.gradients - dense.gradients
            over = (measured.peak - own) / dense.peak
            details = {"peak_bytes": measured.peak, "own_bytes": own, "own_gradient_bytes": gradients}
            details["ratio_with_gradients"] = (measured.peak - own + gradients) / dense.peak
            yield record(contender.name, rows, [], Ratio(over, over, over), routed=routed, **details)


def for_inference(contenders: list[Contender], options: Options, decoding: bool = False) -> None:
    """Evaluation mode, weights in the type that is measured; to decode, what `generate` would set."""
    for contender in contenders:
        contender.model.eval()
        contender.model.to(torch.bfloat16 if options.dtype == "bf16" else torch.float32)
        if contender.experts_config is not None:
            # `generate` switches so too, on accelerators only
            fewer = decoding and options.device != "cpu"
            contender.experts_config._experts_implementation = "batched_mm" if fewer else "grouped_mm"


def prefill(shape: Shape, contenders: list[Contender], options: Options) -> Iterator[dict]:
    """A prompt into an empty cache, and the logits of its last token."""
    for_inference(contenders, options)
    for rows in options.batch_sizes:
        ids = options.batch(shape, rows, options.length)
        shares = {contender.name: calibrate(contender, ids, options.share) for contender in contenders}
        samplers = {}
        for contender in contenders:
            forward = contender.timed(contender.model)

            @torch.inference_mode()
            def pass_once(forward=forward):
                forward(input_ids=ids, use_cache=True, logits_to_keep=1)  # noqa: B023 (called within this round)

            samplers[contender.name] = Stopwatch(pass_once)
        yield from compare(rows, samplers, shares, options)


def decoding(shape: Shape, contenders: list[Contender], options: Options) -> Iterator[dict]:
    """Seconds a token after a prompt, the same given tokens for all: a mean over tokens, because those that are routed
    and those that are not cost differently, and a median over rounds."""
    for_inference(contenders, options, decoding=True)
    for rows in options.decoding_batch_sizes:
        ids = options.batch(shape, rows, PROMPT + options.tokens)
        shares = {each.name: calibrate(each, ids, options.share, first=PROMPT) for each in contenders}
        samplers = {each.name: _decoder(each, ids, options) for each in contenders}
        yield from compare(rows, samplers, shares, options)


def _decoder(contender: Contender, ids: torch.Tensor, options: Options) -> Callable[[], float]:
    forward = contender.timed(contender.model)
    config = contender.model.config

    @torch.inference_mode()
    def decode() -> float:
        static = options.cache == "static"
        cache = StaticCache(config, max_cache_len=ids.shape[1]) if static else DynamicCache(config=config)
        contender.model(input_ids=ids[:, :PROMPT], past_key_values=cache, use_cache=True, logits_to_keep=1)
        start = timer()
        for place in range(PROMPT, ids.shape[1]):
            told = contender.told(ids[:, : place + 1], 1)
            forward(input_ids=ids[:, place : place + 1], past_key_values=cache, use_cache=True, **told)
        return (timer() - start) / (ids.shape[1] - PROMPT)

    return decode


MEASURES = {"training": training, "layer": layer, "memory": memory, "prefill": prefill, "decoding": decoding}
