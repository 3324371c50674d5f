# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""A block that is computed again in the backward pass gives what it gave, and takes the way it took."""

from itertools import product

import pytest
import torch
from promises import COMBINES, FAMILIES, MODULES, ROUTINGS
from tiny import LANGUAGE_HEAD, OWNERS, activate, labelled, routed_modules, router_state, tiny_model


REENTRANT = (False, True)
# The full product but for `cse_combine`, which takes turns.
CASES = [
    pytest.param(
        family,
        reentrant,
        {"cse_routing": routing, "cse_modules": list(modules), "cse_combine": COMBINES[number % 2]},
        id=f"{family}-{routing}-{'+'.join(modules)}-{'reentrant' if reentrant else 'not reentrant'}",
    )
    for number, (family, routing, modules, reentrant) in enumerate(product(FAMILIES, ROUTINGS, MODULES, REENTRANT))
]
every_case = pytest.mark.parametrize(("family", "reentrant", "flags"), CASES)


def training(family: str, flags: dict, reentrant: bool | None = None):
    """A model in training, activations checkpointed unless `reentrant` is None."""
    model = activate(tiny_model(family, **flags)).train()
    if reentrant is not None:
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        assert model.is_activation_checkpointing
    return model


def loss_of(model, family: str, seed: int = 0) -> torch.Tensor:
    """Of a batch with padding, which whole-sequence routes need again in the backward pass."""
    batch = labelled(family, LANGUAGE_HEAD[family], seed=seed)
    if model.config.cse_routing == "given":
        batch["given_clusters"] = batch["input_ids"] % 6 - 1
    return model(**batch, use_cache=False).loss


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert any(".experts." in name and gradient.abs().sum() > 0 for name, gradient in found.items())
    return found


def assert_same_gradients(model, plain) -> None:
    got, wanted = gradients(model), gradients(plain)
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-6, rtol=1e-5, msg=name)


@every_case
def test_checkpointing_changes_neither_loss_nor_gradients(family, reentrant, flags):
    plain, model = training(family, flags), training(family, flags, reentrant)
    losses = [loss_of(each, family) for each in (plain, model)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    assert_same_gradients(model, plain)


@every_case
def test_a_block_computed_again_takes_its_first_way(family, reentrant, flags):
    """Even if the routers have changed meanwhile, to send nothing to experts or other tokens, let alone the rounding
    (transformers issue 47467)."""
    owners = [-1] * 5 if reentrant else [3, -1, 2, 0, -1]
    plain, model = training(family, flags), training(family, flags, reentrant)
    loss_of(plain, family).backward()
    loss = loss_of(model, family)
    for module in routed_modules(model).values():
        module.router.write(**router_state(model.config, seed=50, owners=owners))
    loss.backward()
    assert_same_gradients(model, plain)


@every_case
def test_two_forwards_before_one_backward(family, reentrant, flags):
    plain, model = training(family, flags), training(family, flags, reentrant)
    for each in (plain, model):
        (loss_of(each, family) + loss_of(each, family, seed=1)).backward()
    assert_same_gradients(model, plain)


def test_routers_that_changed_would_show():
    """The check above can fail: without what the first pass noted, the gradients are others."""
    plain, other = (training("gpt2", {"cse_modules": ["attention", "ffn"]}) for _ in range(2))
    for module in routed_modules(other).values():
        module.router.write(**router_state(other.config, seed=50, owners=OWNERS))
    for each in (plain, other):
        loss_of(each, "gpt2").backward()
    with pytest.raises(AssertionError):
        assert_same_gradients(other, plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_routes_are_noted_only_while_activations_are_checkpointed(family):
    """Elsewhere a second forward pass reads the routers anew."""
    model = training(family, {"cse_routing": "discriminant"}, reentrant=False)
    before = loss_of(model, family)
    for module in routed_modules(model).values():
        module.router.write(**router_state(model.config, seed=50, owners=OWNERS))
    assert not torch.equal(loss_of(model, family), before)
