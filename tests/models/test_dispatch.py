# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""What makes dispatch fast: work only for tokens that are routed, nothing read on the host, one graph."""

from collections import Counter
from itertools import product

import pytest
import torch
from tiny import (
    LANGUAGE_HEADS,
    ONE_GRAPH,
    activate,
    dense_model,
    labelled,
    routed_module,
    routed_modules,
    tiny_model,
    token_ids,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import StaticCache

from modeling_cse import dispatch_cse, experts_cse
from modeling_cse.dispatch_cse import RoutedProjection, RoutedTokens
from modeling_cse.routing_cse import ClusterRouter, RoutingContext
from modeling_cse.training import FeatureCollector


def choose_shapes(monkeypatch, static: bool) -> None:
    """Takes the way for accelerators, or that for CPUs."""
    for module in (dispatch_cse, experts_cse):
        monkeypatch.setattr(module, "shapes_may_depend_on_data", lambda tensor: not static)


class CountOperators(TorchDispatchMode):
    """Counts operator calls, those of the backward pass too."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.calls[str(operator)] += 1
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("owners", [[-1, 2, 0, -1, 3], [1, 2, 0], [-1, -1]], ids=["some", "all", "none"])
def test_static_shapes_give_what_gathering_gives(family, combine, owners, monkeypatch):
    """The path for accelerators, compilation and export, and its gradients, whatever share of the tokens is routed."""
    model = activate(tiny_model(family, cse_combine=combine), owners=owners)
    ffn = routed_module(model, 2)
    expert_ids = torch.tensor(owners)[torch.randint(len(owners), (3, 10))]
    monkeypatch.setattr(ffn.router, "forward", lambda states, context: (None, None, expert_ids, None))
    results = []
    for static in (False, True):
        choose_shapes(monkeypatch, static)
        states = torch.randn(3, 10, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
        mixed = ffn.routed_ffn(states, RoutingContext())
        gradients = torch.autograd.grad(
            mixed.square().sum(), [states, *ffn.parameters()], allow_unused=True, materialize_grads=True
        )
        results.append((mixed, *gradients))
    for gathered, static in zip(*results, strict=True):
        torch.testing.assert_close(gathered, static, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("owners", [[-1, 2, 0, -1, 3], [1, 2, 0], [-1, -1]], ids=["some", "all", "none"])
def test_static_shapes_give_what_gathering_gives_in_attention(family, combine, owners, monkeypatch):
    model = activate(tiny_model(family, cse_combine=combine, cse_modules=["attention"]), owners=owners)
    attention = routed_module(model, 2, "attention")
    projections = [module for module in attention.modules() if isinstance(module, RoutedProjection)]
    expert_ids = torch.tensor(owners)[torch.randint(len(owners), (3, 10))]
    results = []
    for static in (False, True):
        choose_shapes(monkeypatch, static)
        attention.dispatch.group(attention, RoutedTokens.of(expert_ids, attention.experts.num_experts))
        states = torch.randn(3, 10, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
        mixed = torch.cat([projection(states) for projection in projections], -1)
        gradients = torch.autograd.grad(
            mixed.square().sum(), [states, *attention.parameters()], allow_unused=True, materialize_grads=True
        )
        results.append((mixed, *gradients))
    assert results[0][0].shape[-1] == 128
    for gathered, static in zip(*results, strict=True):
        torch.testing.assert_close(gathered, static, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("modules", [["ffn"], ["attention", "ffn"]], ids="+".join)
@pytest.mark.parametrize(("family", "head"), LANGUAGE_HEADS)
def test_on_an_accelerator_nothing_waits_for_the_device(family, head, combine, routing, modules):
    """Forward, backward and collecting features. Tensors on the meta device have no values: whatever reads one on the
    host, or makes a shape depend on one, raises."""
    model = activate(tiny_model(family, head, cse_modules=modules, cse_combine=combine, cse_routing=routing))
    model = model.to("meta").to(torch.bfloat16).train()  # what grouped products want there
    model.config.pad_token_id = None  # otherwise upstream looks for padding, on the host
    collector = FeatureCollector(model, capacity=6)
    collector.attach()
    collector.enabled = True
    for _ in range(2):
        ids = token_ids().to("meta")
        model(input_ids=ids, labels=ids).loss.backward()
    assert {store.seen for store in collector.stores.values()} == {8}
    assert all(parameter.grad is not None for parameter in model.base_model.routed_modules().popitem()[1].parameters())


def test_the_check_for_waiting_does_find_it():
    # what has no data cannot be read: torch says so with the one error or the other
    states = torch.ones(2, 3, device="meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool((states > 0).any())
    with pytest.raises((RuntimeError, NotImplementedError)):
        (states > 0).nonzero()


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize(("family", "head"), LANGUAGE_HEADS)
def test_operator_calls_do_not_grow_with_samples_or_experts(family, head, combine, implementation):
    calls = []
    for rows, experts in ((2, 4), (8, 4), (8, 8)):
        flags = {"cse_combine": combine, "cse_num_experts": experts, "cse_routing": "discriminant"}
        model = tiny_model(family, head, experts_implementation=implementation, **flags)
        activate(model, owners=[-1, *range(experts)])
        batch = labelled(family, head, rows=rows)
        with CountOperators() as counter:
            outputs = model(**batch, output_cluster_ids=True)
            outputs.loss.backward()
        assert all(len(layer.unique()) > 2 for layer in outputs.cluster_ids)
        calls.append(counter.calls)
    assert calls[0] == calls[1] == calls[2]



def grouped_products(left, right, *args, out_shape, **kwargs) -> int:
    """Operations of a grouped product, which torch's counter does not know: rows by weights of their group; or, for
    the gradient of the weights, columns by rows of their group."""
    return 2 * left[0] * left[1] * right[-1]


@pytest.mark.parametrize("modules", [["ffn"], ["attention"]], ids="+".join)
@pytest.mark.parametrize(("family", "head"), LANGUAGE_HEADS)
def test_a_replaced_token_costs_what_it_costs_in_the_dense_model(family, head, modules):
    """Matrix products of forward and backward, counted: beside those of the dense model there is the router's, one a
    layer and forward."""
    flags = {"cse_combine": "replace", "cse_routing": "discriminant", "cse_modules": modules}
    model, dense = activate(tiny_model(family, head, **flags)), dense_model(family, head)
    batch, counted = labelled(family, head), []
    for each in (model, dense):
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: grouped_products}) as flops:
            each(**batch).loss.backward()
        counted.append(flops.get_total_flops())
    routers = [module for module in model.modules() if isinstance(module, ClusterRouter)]
    tokens = batch["input_ids"].numel()
    assert counted[0] == counted[1] + sum(2 * tokens * router.discriminant_weight.numel() for router in routers)


@pytest.mark.parametrize(("family", "head"), LANGUAGE_HEADS)
def test_without_clusters_a_router_computes_nothing(family, head, routing, modules):
    model = tiny_model(family, head, cse_routing=routing, cse_modules=modules)
    batch = labelled(family, head)
    for each in routed_modules(model).values():
        with CountOperators() as counter:
            logits, clusters, experts, _ = each.router(torch.ones(2, 3, 32), RoutingContext())
        assert not [name for name in counter.calls if "mm" in name or "cdist" in name or "linear" in name]
        assert logits.shape == (6, each.router.max_clusters) and (logits == torch.finfo(torch.float32).min).all()
        assert (clusters == -1).all() and (experts == -1).all() and clusters.shape == experts.shape == (2, 3)
    assert model(**batch).loss.isfinite()


# Compiling takes seconds: modules take turns instead of multiplying.
COMPILED = [
    (*head, {"cse_combine": combine, "cse_routing": routing, "cse_modules": modules, "cse_layers": [-1]})
    for (head, routing, combine), modules in zip(
        product(LANGUAGE_HEADS, ("discriminant", "sequence"), ("replace", "add")),
        2 * (["attention", "ffn"], ["attention"], ["ffn"], ["attention", "ffn"]),
        strict=True,
    )
]


@ONE_GRAPH
@pytest.mark.parametrize(("family", "head", "flags"), COMPILED, ids=str)
def test_compiled_training_is_one_graph_and_stays_it_when_clusters_change(family, head, flags):
    """The whole model with its loss; the backend runs the graphs of both passes as they are."""
    model, batch = activate(tiny_model(family, head, **flags)), labelled(family, head)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for seed, owners in enumerate(([-1, 0, 1], [2, -1, -1, 3, 0], [-1])):
        activate(model, seed=seed, owners=owners)
        results = []
        with torch.compiler.set_stance("default" if seed == 0 else "fail_on_recompile"):
            for each in (model, compiled):
                model.zero_grad()
                outputs = each(**batch)
                outputs.loss.backward()
                gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
                sizes = {name: 0.0 if g is None else g.norm().item() for name, g in gradients.items()}
                results.append((outputs.logits, sizes))
        torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


@ONE_GRAPH
def test_compiled_decoding_with_a_static_cache_is_one_graph(combine):
    """Also when clusters change in the middle of a text."""
    model = activate(tiny_model("gpt2", "ForCausalLM", cse_combine=combine, cse_modules=["attention", "ffn"])).eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    ids = token_ids(2, 12)
    caches = [StaticCache(config=model.config, max_cache_len=12) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            model(ids[:, :4], past_key_values=cache)
        for place in range(4, 12):
            if place == 8:
                activate(model, seed=1)
            with torch.compiler.set_stance("default" if place == 4 else "fail_on_recompile"):
                eager, fast = (
                    each(ids[:, place : place + 1], past_key_values=cache).logits
                    for each, cache in zip((model, compiled), caches, strict=True)
                )
            torch.testing.assert_close(eager, fast, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_inductor_gives_the_same():
    model = activate(tiny_model("gpt2", n_layer=1))
    ids = token_ids()
    torch._dynamo.reset()
    compiled = torch.compile(model)
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)




@pytest.mark.parametrize("modules", [["ffn"], ["attention"]], ids="+".join)
@pytest.mark.parametrize(("family", "head"), LANGUAGE_HEADS)
def test_a_single_token_gets_what_it_gets_among_others(family, head, combine, modules, monkeypatch):
    """Decoding at batch 1 goes past the grouped product."""
    model = activate(tiny_model(family, head, cse_modules=modules, cse_combine=combine, cse_routing="discriminant"))
    module = routed_module(model, 2, modules[0])
    states = torch.randn(24, 1, 32, generator=torch.Generator().manual_seed(0))
    parts = [m for m in module.modules() if isinstance(m, RoutedProjection)]

    def outputs(rows):
        with torch.no_grad():
            if modules == ["ffn"]:
                return [module.routed_ffn(rows, RoutingContext())]
            module.route(rows, RoutingContext())
            return [part(rows) for part in parts]

    experts = module.router(states)[2].flatten()
    assert len(experts.unique()) > 2 and (experts < 0).any()
    together = outputs(states)
    alone = [outputs(states[row : row + 1]) for row in range(len(states))]
    for whole, *rows in zip(together, *alone, strict=True):
        torch.testing.assert_close(torch.cat(rows), whole, atol=1e-5, rtol=1e-5)
