# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of random batches: each gives finite numbers, or says by name what is wrong with it."""

from contextlib import ExitStack, contextmanager
from functools import cache, lru_cache
from unittest.mock import patch

import torch
from hypothesis import assume, given, note
from hypothesis import strategies as st
from outcomes import count, examples, names
from random_batches import NAMED, RandomBatch, random_batches
from tiny import LANGUAGE_HEAD, activate, dense_model, first_tensor, tiny_model

from modeling_cse import dispatch_cse, experts_cse, routing_cse


@lru_cache(maxsize=128)
def model_of(family, head, routing, combine, modules, dtype, owners):
    flags = {"cse_routing": routing, "cse_combine": combine, "cse_modules": list(modules)}
    return activate(tiny_model(family, head, **flags), owners=list(owners)).to(dtype)


@cache
def twin_of(family, head, dtype):
    return dense_model(family, head).to(dtype)


@contextmanager
def shapes(static: bool):
    """The way for accelerators and compilers, or that for CPUs."""
    with ExitStack() as stack:
        for module in (dispatch_cse, experts_cse, routing_cse) if static else ():
            stack.enter_context(patch.object(module, "shapes_may_depend_on_data", lambda tensor: False))
        yield


def run(model, batch: RandomBatch, inputs: dict) -> dict[str, torch.Tensor]:
    """Forward, and where the model learns also backward. Returns what must be finite."""
    model.train(batch.training)
    model.zero_grad()
    model.config.problem_type = None  # classifiers remember the kind of labels they met first
    with torch.set_grad_enabled(batch.training):
        outputs = in_two_chunks(model, inputs) if batch.chunked else model(**inputs)
        found = {"output": first_tensor(outputs)}
        if outputs.get("loss") is not None:
            found["loss"] = outputs.loss
        if batch.training and "loss" in found and found["loss"].isfinite():
            found["loss"].backward()
            gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            found["gradients"] = torch.stack([gradient.float().abs().max() for gradient in gradients])
    model.zero_grad()
    return {name: tensor.detach() for name, tensor in found.items()}


def in_two_chunks(model, inputs: dict):
    """The first half goes into a cache, the second goes on from it."""
    tokens = inputs.get("input_ids", inputs.get("inputs_embeds"))
    length = 0 if tokens is None else tokens.shape[1]
    half = length // 2
    if not half:  # there is nothing to cut
        return model(**inputs)

    def part(places: slice) -> dict:  # without what belongs to whole rows
        cut = {"input_ids", "inputs_embeds", "position_ids", "token_type_ids"}
        found = {name: tensor[:, places] if name in cut else tensor for name, tensor in inputs.items()}
        labels = found.get("given_clusters")
        if labels is not None and labels.dim() == 2:
            found["given_clusters"] = labels[:, places]
        mask = found.get("attention_mask")
        if mask is not None and mask.dim() == 2:
            found["attention_mask"] = mask[:, : places.stop]
        found.pop("labels", None)
        return found

    cache = model(**part(slice(0, half)), use_cache=True).past_key_values
    return model(**part(slice(half, length)), past_key_values=cache, use_cache=True)


def attempt(model, batch: RandomBatch, inputs: dict) -> tuple[dict[str, torch.Tensor], Exception | None]:
    try:
        return run(model, batch, inputs), None
    except AssertionError:
        raise
    except Exception as error:  # noqa: BLE001 - which error it may be is what the test is about
        return {}, error


def cannot_be_routed(batch: RandomBatch, error: Exception) -> bool:
    """What the docs say of routes over whole sequences."""
    if batch.routing != "sequence":
        return False
    return names(error, "past_key_values") if batch.chunked else names(error, "attention_mask of shape")


def nothing_is_labelled(batch: RandomBatch) -> bool:
    """Whether a mean is taken of nothing."""
    beyond_the_text = batch.head == "ForQuestionAnswering" and batch.parts["labels"] == "far"
    return batch.parts["labels"] == "ignored" or beyond_the_text or batch.parts["length"] == "1"


@examples(4)
@given(batch=random_batches())
def test_a_batch_gives_finite_numbers_or_a_clear_error(batch):
    inputs = batch.inputs()
    ours = {**inputs, **batch.given_clusters()}
    if batch.recorded:
        ours |= {"output_router_logits": True, "output_cluster_ids": True}
    model = model_of(batch.family, batch.head, batch.routing, batch.combine, batch.modules, batch.dtype, batch.owners)
    with shapes(batch.static):
        found, error = attempt(model, batch, ours)
    note(f"ours: {error!r}")
    if error is not None and isinstance(error, ValueError):
        if cannot_be_routed(batch, error):
            return count("batches", "refused by name: sequence routes")
        if any(names(error, *NAMED[part]) for part in batch.wrong):
            return count("batches", "refused by name")
    wanted, twin_error = attempt(twin_of(batch.family, batch.head, batch.dtype), batch, inputs)
    note(f"stock: {twin_error!r}")
    if error is not None:
        assert type(twin_error) is type(error), f"the stock twin does better than {error!r}"
        return count("batches", f"the stock twin's own {type(error).__name__}")
    for name, tensor in found.items():
        finite = tensor.isfinite()
        if name in wanted and wanted[name].shape == tensor.shape:
            finite |= ~wanted[name].isfinite()
        assert finite.all(), f"{name} is not finite, that of the stock twin is"
    endless = [name for name, tensor in found.items() if not tensor.isfinite().all()]
    if not endless:
        return count("batches", "finite")
    if endless == ["loss"] and nothing_is_labelled(batch):
        return count("batches", "finite but for the loss of no label, as the stock twin")
    assert batch.parts["inputs_embeds"] in ("nan", "inf", "1e30"), "finite numbers went in, others came out"
    count("batches", "not finite, as its inputs_embeds, as the stock twin")


PADDED = ["none", "right", "left", "middle", "ragged", "all padding"]
CLEAR = 1e-3  # of two scores: a route that hangs on less may flip with the rounding


@st.composite
def padded_rows(draw) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask (B, T), each row padded in its own way, the first with a token at least."""
    length, seed = draw(st.integers(2, 24)), draw(st.integers(0, 999))
    kinds = [draw(st.sampled_from(PADDED[:-1])), *draw(st.lists(st.sampled_from(PADDED), min_size=1, max_size=3))]
    generator = torch.Generator().manual_seed(seed)
    ids, places = torch.randint(5, 99, (len(kinds), length), generator=generator), torch.arange(length)
    mask = []
    for kind in kinds:
        edge = draw(st.integers(1, length - 1))
        real = {
            "none": places >= 0,
            "right": places < edge,
            "left": places >= edge,
            "middle": (places < edge // 2) | (places >= edge),
            "ragged": torch.rand(length, generator=generator) > 0.5,
            "all padding": places < 0,
        }[kind]
        mask.append(real)
    return ids, torch.stack(mask).long()


@examples(1)
@given(
    rows=padded_rows(),
    family=st.sampled_from(["gpt2", "bert"]),
    routing=st.sampled_from(["discriminant", "sequence", "given"]),
    combine=st.sampled_from(["replace", "add"]),
    modules=st.sampled_from([("ffn",), ("attention",), ("attention", "ffn")]),
    filler=st.integers(0, 98),
)
def test_what_stands_at_padded_places_changes_nothing(rows, family, routing, combine, modules, filler):
    """Nor does a row without any token change the others."""
    ids, mask = rows
    model = model_of(family, LANGUAGE_HEAD[family], routing, combine, modules, torch.float32, (-1, 2, 0, -1, 3)).eval()
    labels = torch.arange(len(ids)) % 6 - 1
    present = mask.any(-1)
    assume(bool(present.any()))

    @torch.no_grad()
    def look(ids, kept):
        given = {"given_clusters": labels[kept]} if routing == "given" else {}
        outputs = model(input_ids=ids[kept], attention_mask=mask[kept], output_router_logits=True, **given)
        scores = torch.stack(outputs.router_logits).view(len(outputs.router_logits), *ids[kept].shape, -1)
        best = scores[:, mask[kept] > 0].topk(2).values
        if routing != "given":
            assume(bool((best[..., 0] - best[..., 1]).min() > CLEAR))
        return outputs.logits[mask[kept] > 0]

    wanted = look(ids, torch.ones(len(ids), dtype=torch.bool))
    assert wanted.isfinite().all()
    torch.testing.assert_close(look(ids.masked_fill(mask == 0, filler), present), wanted, atol=1e-5, rtol=0)
    count("padding", "the same")
