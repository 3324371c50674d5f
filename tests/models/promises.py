# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""
What every model must do, whatever its flags: one routine a promise, for a cell of the matrix.

The in-tree models are cells too (`routing=None`), held to the same tolerances.
"""

from functools import cache
from itertools import product
from typing import NamedTuple

import torch
from tiny import (
    OWNERS,
    activate,
    dense_model,
    expert_ids,
    routed_modules,
    tiny_model,
    token_ids,
)
from transformers import DynamicCache


FAMILIES = ("gpt2", "bert")
ROUTINGS = ("discriminant", "sequence", "given")
COMBINES = ("replace", "add")
MODULES = (("ffn",), ("attention",), ("attention", "ffn"))
ATTENTIONS = ("eager", "sdpa")
SIDES = ("left", "right")
DTYPES = (torch.float32, torch.bfloat16)

ROWS, LENGTH = 4, 16

# How far logits may move, in fp32 and bf16; logits have a standard deviation of 0.56 in every cell, so that a unit in
# the last place of most of them is 6e-8 and 0.004. Behind each line what it needs here, the in-tree models / ours
# (torch 2.13, x86 CPU). fp32 lines stay a factor of two to four above, for other machines; where the in-tree models
# need nothing and ours a few units, the number of rows of a product depends on the routes of other tokens.
TOLERANCE = {
    "later tokens": {torch.float32: 2e-6, torch.bfloat16: 0.0},  # 0, 0 / 3.6e-7, 0
    "rows": {torch.float32: 2e-6, torch.bfloat16: 0.0},  # 0, 0 / 8.3e-7, 0
    "padding": {torch.float32: 4e-6, torch.bfloat16: 2**-5},  # 9.5e-7, 0.019 / 1.0e-6, 0.023
    "packing": {torch.float32: 4e-6, torch.bfloat16: 2**-5},  # 1.1e-6, 0.016 / 1.2e-6, 0.022
    "cache": {torch.float32: 4e-6, torch.bfloat16: 2**-5},  # 9.5e-7, 0.021 / 1.3e-6, 0.023
    "switching on": {torch.float32: 2e-6, torch.bfloat16: 0.0},  # as "rows", with which it shares its cause
    "saving": {torch.float32: 1e-6, torch.bfloat16: 0.0},  # 0, 0 / 3.6e-7, 0
}


class Cell(NamedTuple):
    """A corner of the matrix."""

    family: str
    routing: str | None  # None: the in-tree model
    combine: str | None
    modules: tuple[str, ...]
    attention: str  # how attention is computed
    side: str  # where padding goes
    dtype: torch.dtype

    def __str__(self) -> str:
        flags = [self.routing, self.combine, "+".join(self.modules)] if self.routing else ["stock"]
        return "-".join([self.family, *flags, self.attention, self.side, str(self.dtype).removeprefix("torch.")])

    @property
    def causal(self) -> bool:
        return self.family == "gpt2" and self.routing != "sequence"

    def flags(self) -> dict:
        return {"cse_routing": self.routing, "cse_combine": self.combine, "cse_modules": list(self.modules)}


def _cells() -> list[Cell]:
    """Every routing with every module in every dtype; the other axes take turns, so that every pair of values of any
    two axes is met in each family. The in-tree models in full."""
    cells = []
    others = list(product(COMBINES, ATTENTIONS, SIDES))
    for family in FAMILIES:
        for number, (routing, modules, dtype) in enumerate(product(ROUTINGS, MODULES, DTYPES)):
            combine, attention, side = others[(3 * number + number // 8) % 8]
            cells.append(Cell(family, routing, combine, modules, attention, side, dtype))
        stock = product(ATTENTIONS, SIDES, DTYPES)
        cells += [Cell(family, None, None, (), *axes) for axes in stock]
    return cells


CELLS = _cells()


class Seen(NamedTuple):
    logits: torch.Tensor  # (B, T, vocabulary) fp32
    routes: torch.Tensor  # (sites, B, T): the expert of every token; no sites in the in-tree model
    scores: torch.Tensor  # (sites, B, T, clusters in use): what the routers chose by
    gap: torch.Tensor  # (B,): the least lead of a chosen cluster over the next one, over tokens and sites


@cache
def model_of(cell: Cell):
    if cell.routing is None:
        model = dense_model(cell.family, attn_implementation=cell.attention)
    else:
        model = activate(tiny_model(cell.family, attn_implementation=cell.attention, **cell.flags()), noise=0.1)
    return model.to(cell.dtype)


@torch.no_grad()
def run(cell: Cell, ids: torch.Tensor, model=None, **inputs) -> Seen:
    """A forward pass. Labels, where the cell wants them, follow from the token, so that they move with it."""
    model = model_of(cell) if model is None else model
    endless = torch.full((len(ids),), torch.inf)
    if cell.routing is None:
        none = torch.empty(0, *ids.shape)
        return Seen(model(input_ids=ids, **inputs).logits.float(), none, none, endless)
    outputs = model(input_ids=ids, output_cluster_ids=True, output_router_logits=True, **labels(cell, ids), **inputs)
    scores = torch.stack(outputs.router_logits).view(-1, *ids.shape, model.config.max_clusters)[..., : len(OWNERS)]
    best = scores.topk(2).values
    gap = endless if cell.routing == "given" else (best[..., 0] - best[..., 1]).amin((0, 2))
    return Seen(outputs.logits.float(), expert_ids(model, outputs.cluster_ids), scores, gap)


def labels(cell: Cell, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"given_clusters": ids % 6 - 1} if cell.routing == "given" else {}


@cache
def clear_rows(cell: Cell, length: int = LENGTH, model=None) -> torch.Tensor:
    """Token ids (ROWS, length), chosen among many so that no route hangs on the last bits of a state: where two
    clusters are equally near, every router flips with the rounding, and a flip is a finite jump. At every site some
    token goes to an expert."""
    ids = token_ids(16 * ROWS, length)
    seen = run(cell, ids, model)
    order = seen.gap.argsort(descending=True).tolist()
    routed = (seen.routes >= 0).any(-1)
    clearest_routed = [next(row for row in order if site[row]) for site in routed]
    return ids[list(dict.fromkeys(clearest_routed + order))[:ROWS]]


def assert_same(cell: Cell, promise: str, got: Seen, wanted: Seen) -> None:
    """Rows are chosen so that routes do not hang on the last bits: hence routers' scores are compared too, which are
    some six times as large as logits."""
    tolerance = TOLERANCE[promise][cell.dtype]
    assert torch.equal(got.routes, wanted.routes), "a token took another way"
    torch.testing.assert_close(got.scores, wanted.scores, atol=6 * tolerance, rtol=0)
    torch.testing.assert_close(got.logits, wanted.logits, atol=tolerance, rtol=0)


def at(seen: Seen, rows: slice = slice(None), places: slice = slice(None)) -> Seen:
    return Seen(seen.logits[rows, places], seen.routes[:, rows, places], seen.scores[:, rows, places], seen.gap[rows])


def later_tokens_change_nothing(cell: Cell) -> None:
    ids, other = clear_rows(cell), token_ids(ROWS, LENGTH, seed=1)
    wanted = run(cell, ids)
    for cut in (1, 2, 7, LENGTH - 1):
        got = run(cell, torch.cat([ids[:, :cut], other[:, cut:]], 1))
        assert_same(cell, "later tokens", at(got, places=slice(cut)), at(wanted, places=slice(cut)))
        assert (got.logits - wanted.logits)[:, cut:].abs().max() > 0.5


def a_cache_changes_nothing(cell: Cell) -> None:
    """A prompt in two chunks, then token by token."""
    ids = clear_rows(cell)
    wanted, cache = run(cell, ids), DynamicCache(config=model_of(cell).config)
    stop = 0
    for length in [5, 4, *[1] * (LENGTH - 9)]:
        start, stop = stop, stop + length
        got = run(cell, ids[:, start:stop], past_key_values=cache)
        assert_same(cell, "cache", got, at(wanted, places=slice(start, stop)))
    assert cache.get_seq_length() == LENGTH


def rows_are_independent(cell: Cell) -> None:
    ids = clear_rows(cell)
    wanted = run(cell, ids)
    for row in range(ROWS):
        assert_same(cell, "rows", run(cell, ids[row : row + 1]), at(wanted, slice(row, row + 1)))


def padding_changes_nothing(cell: Cell) -> None:
    """Whatever stands at padded places; on the right also where nobody gives positions, as in most training."""
    ids, width = clear_rows(cell), 9
    wanted, left = run(cell, ids), cell.side == "left"
    mask = torch.ones(ROWS, LENGTH + width, dtype=torch.long)
    mask[:, :width] = 0
    mask = mask if left else mask.flip(1)
    places = slice(width, None) if left else slice(LENGTH)
    positions = {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
    for filler, given in ((0, positions), (7, positions if left else {})):
        padded = torch.full_like(mask, filler)
        padded[:, places] = ids
        got = run(cell, padded, attention_mask=mask, **given)
        assert_same(cell, "padding", at(got, places=places), wanted)


def packed_documents_are_independent(cell: Cell) -> None:
    """GPT-2 reads documents from positions that start again, BERT from a 4-D mask."""
    lengths = (7, 4, LENGTH)
    documents = [clear_rows(cell, length=length) for length in lengths]
    inputs = {"position_ids": torch.cat([torch.arange(length) for length in lengths]).expand(ROWS, -1)}
    if cell.family == "gpt2":
        inputs["use_cache"] = False
    else:
        number = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
        other = (number.unsqueeze(0) != number.unsqueeze(1)) * torch.finfo(cell.dtype).min
        inputs["attention_mask"] = other.to(cell.dtype).expand(ROWS, 1, -1, -1)
    packed = run(cell, torch.cat(documents, 1), **inputs)
    stop = 0
    for document, length in zip(documents, lengths, strict=True):
        start, stop = stop, stop + length
        assert_same(cell, "packing", at(packed, places=slice(start, stop)), run(cell, document))


def switching_on_changes_nothing(cell: Cell) -> None:
    """Experts that were just filled, under a router that uses them, against the in-tree model."""
    dense = dense_model(cell.family, attn_implementation=cell.attention)
    model = tiny_model(cell.family, seed=1, attn_implementation=cell.attention, **cell.flags())
    model.load_state_dict(dense.state_dict(), strict=False)
    activate(model, noise=0.0).to(cell.dtype)
    ids = clear_rows(cell, model=model)
    got, wanted = run(cell, ids, model), dense.to(cell.dtype)(ids).logits.float()
    assert (got.routes >= 0).any((1, 2)).all(), "a site routes nothing"
    if cell.combine == "add":
        assert torch.equal(got.logits, wanted)
    else:
        assert_same(cell, "switching on", got, got._replace(logits=wanted))


def saving_changes_nothing(cell: Cell, folder) -> None:
    model, ids = model_of(cell), clear_rows(cell)
    model.save_pretrained(folder)
    loaded = type(model).from_pretrained(folder, dtype=cell.dtype, attn_implementation=cell.attention)
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name
    assert_same(cell, "saving", run(cell, ids, loaded), run(cell, ids))


def gradients_reach_used_experts_and_no_router(cell: Cell) -> None:
    model, ids = model_of(cell), clear_rows(cell)
    assert not any(".router." in name for name, _ in model.named_parameters())
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    routes = run(cell, ids).routes
    model.zero_grad()
    model(input_ids=ids, **labels(cell, ids)).logits.float().square().mean().backward()
    for (site, module), used in zip(routed_modules(model).items(), routes, strict=True):
        for name, parameter in module.experts.named_parameters():
            reached = [slot for slot, gradient in enumerate(parameter.grad) if gradient.abs().sum() > 0]
            assert reached == sorted(set(used.flatten().tolist()) - {-1}) != [], f"{site}: {name}"
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]) and not buffer.requires_grad, name
