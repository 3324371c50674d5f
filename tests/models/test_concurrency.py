# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises to servers: threads that share a model get what each of them would get alone."""

import copy
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from tiny import EVIDENCE, LANGUAGE_HEADS, activate, routed_modules, tiny_model, token_ids

from modeling_cse.dispatch_cse import RoutedProjection, RoutedTokens
from modeling_cse.routing_cse import ClusterRouter
from modeling_cse.threads_cse import PerThread


FLAGS = [
    {**EVIDENCE, "cse_modules": ["ffn"]},
    {**EVIDENCE, "cse_modules": ["attention"]},
    {"cse_routing": "sequence", "cse_modules": ["attention", "ffn"]},
    {"cse_routing": "given", "cse_modules": ["attention", "ffn"]},
]


def batches(flags) -> list[dict]:
    """Two batches whose routes differ, one of them with padding; only the first asks for them."""
    found = []
    for thread in range(2):
        ids = token_ids(seed=thread)
        mask = torch.ones_like(ids)
        mask[:, 12:] = thread
        batch = {"input_ids": ids, "attention_mask": mask, "output_cluster_ids": thread == 0}
        if flags["cse_routing"] == "given":
            batch["given_clusters"] = torch.arange(4) + thread
        found.append(batch)
    return found


@torch.no_grad()
@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: f"{flags['cse_routing']}-{'+'.join(flags['cse_modules'])}")
@pytest.mark.parametrize(("family", "head"), LANGUAGE_HEADS)
def test_threads_that_share_a_model_do_not_read_each_other(family, head, flags):
    model = activate(tiny_model(family, head, **flags))
    alone = [model(**batch) for batch in batches(flags)]
    barrier = Barrier(2)

    def meet(module, inputs):
        """Both are behind what a block leaves for its modules before either reads it."""
        barrier.wait(timeout=60)

    for module in model.modules():
        if isinstance(module, RoutedProjection | ClusterRouter):
            module.register_forward_pre_hook(meet)
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda batch: model(**batch), batches(flags)))
    for own, shared in zip(alone, together, strict=True):
        torch.testing.assert_close(shared.logits, own.logits, rtol=0, atol=0)
    assert all(torch.equal(*ids) for ids in zip(alone[0].cluster_ids, together[0].cluster_ids, strict=True))
    assert together[1].cluster_ids is None
    assert not torch.equal(alone[0].logits, alone[1].logits)


@torch.no_grad()
@pytest.mark.parametrize(("family", "head"), LANGUAGE_HEADS)
def test_a_copy_that_shares_the_dispatch_asks_its_own_experts(family, head):
    """`nn.DataParallel` copies modules, but not what they point to."""
    model = activate(tiny_model(family, head, cse_modules=["attention"], cse_combine="add"))
    attention = next(iter(routed_modules(model).values()))
    other = copy.deepcopy(attention)
    for parameter in other.experts.parameters():
        parameter.zero_()
    projection = next(part for part in attention.modules() if isinstance(part, RoutedProjection))
    states = torch.randn(2, 5, 32)
    answers = []
    for each in (attention, other):
        attention.dispatch.group(each, RoutedTokens.of(torch.zeros(2, 5, dtype=torch.int64), each.num_experts))
        answers.append(projection(states))
        attention.dispatch.clear()
    base = super(RoutedProjection, projection).forward(states)
    assert torch.equal(answers[1], base) and not torch.equal(answers[0], base)


def test_a_thread_reads_what_it_left_itself():
    place = PerThread()
    place.put("mine")
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(place.get).result() is None
        pool.submit(place.put, "other").result()
        assert place.get() == "mine" and pool.submit(place.get).result() == "other"
        place.drop()
        assert place.get() is None and pool.submit(place.get).result() == "other"
        pool.submit(place.drop).result()
    assert place.values == {}
