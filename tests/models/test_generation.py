# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Every way to generate gives what full forward passes give, for prompts of different lengths in one batch."""

from itertools import product

import pytest
import torch
from promises import COMBINES, MODULES, TOLERANCE, Cell, clear_rows, model_of, run
from tiny import activate, tiny_model, token_ids
from transformers import ContinuousBatchingConfig, GenerationConfig


NEW = 8
LENGTHS = (4, 9, 13)
CLUSTERS = torch.tensor([1, 0, 4])  # of the three prompts, where routes are given; 0 is common


def generating(routing: str | None, combine: str | None, modules: tuple, number: int, dtype=torch.float32) -> Cell:
    return Cell("gpt2", routing, combine, modules, ("sdpa", "eager")[number % 2], "left", dtype)


EVERY = [generating("discriminant", *flags, i) for i, flags in enumerate(product(COMBINES, MODULES))]
GIVEN = [generating("given", *flags, i) for i, flags in enumerate(zip(COMBINES, MODULES[1:], strict=True))]
STOCK = [generating(None, None, (), number) for number in (0, 1)]


def generator_of(cell: Cell):
    """The model, greedy and without an end, so that all ways give as many tokens."""
    model = model_of(cell)
    model.generation_config = GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    return model


def prompts() -> list[torch.Tensor]:
    return [token_ids(1, length, seed=length) for length in LENGTHS]


def inputs_of(cell: Cell, rows: slice = slice(None)) -> dict[str, torch.Tensor]:
    """Prompts padded on the left."""
    chosen = prompts()[rows]
    width = max(prompt.shape[1] for prompt in chosen)
    ids = torch.cat([torch.nn.functional.pad(prompt, (width - prompt.shape[1], 0)) for prompt in chosen])
    labels = {"given_clusters": CLUSTERS[rows]} if cell.routing == "given" else {}
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), **labels}


@torch.no_grad()
def by_full_forwards(cell: Cell) -> torch.Tensor:
    """(prompts, NEW): the likeliest token, again and again, each prompt alone and without a cache."""
    found = []
    for row, prompt in enumerate(prompts()):
        labels = {"given_clusters": CLUSTERS[row : row + 1]} if cell.routing == "given" else {}
        for _ in range(NEW):
            logits = model_of(cell)(prompt, use_cache=False, **labels).logits
            prompt = torch.cat([prompt, logits[:, -1:].argmax(-1)], 1)
        found.append(prompt[0, -NEW:])
    return torch.stack(found)


def in_one_batch(cell: Cell, **options) -> torch.Tensor:
    return generator_of(cell).generate(**inputs_of(cell), **options)[:, -NEW:]


def with_a_draft_model(cell: Cell) -> torch.Tensor:
    """Another model with experts guesses, sometimes right and sometimes wrong. Upstream takes one prompt at a time."""
    draft = activate(tiny_model("gpt2"), noise=0.11)
    draft.generation_config = GenerationConfig(pad_token_id=0)
    rows = [inputs_of(cell, slice(row, row + 1)) for row in range(len(LENGTHS))]
    found = [generator_of(cell).generate(**row, assistant_model=draft)[0, -NEW:] for row in rows]
    return torch.stack(found)


def with_an_offloaded_cache(cell: Cell) -> torch.Tensor:
    if not torch.accelerator.is_available():
        pytest.skip("an offloaded cache copies on a stream of its own, which only an accelerator has")
    device = torch.accelerator.current_accelerator()
    model = generator_of(cell).to(device)
    inputs = {name: tensor.to(device) for name, tensor in inputs_of(cell).items()}
    try:
        return model.generate(**inputs, cache_implementation="offloaded")[:, -NEW:].cpu()
    finally:
        model.cpu()


def by_continuous_batching(cell: Cell) -> torch.Tensor:
    sizes = {"num_blocks": 16, "page_size": 16, "max_batch_tokens": 16}
    settings = ContinuousBatchingConfig(use_cuda_graph=False, use_async_batching=False, **sizes)
    ids = [prompt[0].tolist() for prompt in prompts()]
    found = generator_of(cell).generate_batch(ids, continuous_batching_config=settings)
    assert [found[f"req_{row}"].prompt_ids for row in range(len(ids))] == ids
    return torch.tensor([found[f"req_{row}"].generated_tokens for row in range(len(ids))])


GREEDY = {
    "greedy": in_one_batch,
    "without a cache": lambda cell: in_one_batch(cell, use_cache=False),
    "static cache": lambda cell: in_one_batch(cell, cache_implementation="static"),
    "chunked prefill": lambda cell: in_one_batch(cell, prefill_chunk_size=4),
}
# Slower, or not possible everywhere: modules and ways to combine take turns.
SLOW = {
    "offloaded cache": with_an_offloaded_cache,
    "assisted": with_a_draft_model,
    "continuous batching": by_continuous_batching,
}
SOME = [EVERY[0], EVERY[4], EVERY[2], STOCK[0]]
WAYS = [*product(GREEDY.items(), EVERY + STOCK), *product(SLOW.items(), SOME)]


@pytest.mark.parametrize(("way", "cell"), WAYS, ids=lambda part: part[0] if len(part) == 2 else str(part))
def test_greedy_equals_full_forwards(way, cell):
    wanted = by_full_forwards(cell)
    assert torch.equal(way[1](cell), wanted)
    assert len(wanted.unique()) > 5


@pytest.mark.parametrize("cell", GIVEN, ids=str)
@pytest.mark.parametrize("way", GREEDY)
def test_given_routes_reach_every_step(way, cell):
    wanted = by_full_forwards(cell)
    assert torch.equal(GREEDY[way](cell), wanted)
    other = generator_of(cell).generate(**(inputs_of(cell) | {"given_clusters": torch.zeros(3, dtype=torch.long)}))
    assert (other[:, -NEW:] != wanted).any(1).tolist() == [True, False, True]


SEARCHES = {"sampling": {"do_sample": True, "top_k": 0}, "beams": {"num_beams": 3}}


@pytest.mark.parametrize("cell", EVERY + GIVEN + STOCK, ids=str)
@pytest.mark.parametrize("search", SEARCHES)
def test_searches_with_a_cache_equal_those_without(search, cell):
    generator_of(cell)  # made once, with random numbers of its own
    results = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        results.append(in_one_batch(cell, use_cache=use_cache, **SEARCHES[search]))
    assert torch.equal(*results) and len(results[0].unique()) > 3


@pytest.mark.parametrize("cell", EVERY[2:4] + GIVEN, ids=str)
def test_beams_of_a_prompt_do_not_see_those_of_others(cell):
    """Its label, where routes are given, goes to each of its beams."""
    together = in_one_batch(cell, num_beams=3)
    for row in range(len(LENGTHS)):
        alone = generator_of(cell).generate(**inputs_of(cell, slice(row, row + 1)), num_beams=3)
        assert torch.equal(alone[0, -NEW:], together[row])


HALF = [cell._replace(dtype=torch.bfloat16) for cell in EVERY + STOCK]


@pytest.mark.parametrize("cell", HALF, ids=str)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_cached_logits_in_half_precision_equal_those_of_a_full_forward(cache, cell):
    """Tokens themselves tie in bf16, in the in-tree models too; routes that are clear must not flip."""
    ids = token_ids(48, 6)
    options = {"cache_implementation": "static"} if cache == "static" else {}
    found = generator_of(cell).generate(
        ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, output_logits=True, **options
    )
    full = run(cell, found.sequences[:, :-1])
    clear = full.gap.topk(8).indices
    cached = torch.stack(found.logits, 1).float()
    tolerance = TOLERANCE["cache"][torch.bfloat16]
    torch.testing.assert_close(cached[clear], full.logits[clear, 5:], atol=tolerance, rtol=0)


@pytest.mark.parametrize("cell", EVERY[:3], ids=str)
def test_a_cache_holds_one_key_and_one_value_a_token(cell):
    """Experts of attention have keys and values of their own, but a token has one expert."""
    ids = clear_rows(cell)
    with torch.no_grad():
        ours, stock = (model_of(each)(ids, use_cache=True).past_key_values for each in (cell, STOCK[0]))
    for layer, other in zip(ours.layers, stock.layers, strict=True):
        assert layer.keys.shape == other.keys.shape and layer.values.shape == other.values.shape


@pytest.mark.parametrize("method", ["generate", "generate_batch"])
def test_given_routes_refuse_to_generate_without_labels(method):
    with pytest.raises(ValueError, match="given_clusters"):
        getattr(generator_of(GIVEN[0]), method)(token_ids(1, 4))
