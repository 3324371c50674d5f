# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""What a model makes of single sequences agrees with what it makes of them one by one."""

import numpy as np
import pytest
import torch
from tiny import activate, dense_model, routed_modules, tiny_model, token_ids

from modeling_cse.evaluation import expert_shares, sequence_clusters, sequence_losses


@pytest.fixture(scope="module")
def model():
    return activate(tiny_model("gpt2"), noise=0.0)


def batches(ids, mask=None, size=3):
    mask = torch.ones_like(ids) if mask is None else mask
    labels = ids.masked_fill(mask == 0, -100)
    for part in range(0, len(ids), size):
        rows = slice(part, part + size)
        yield {"input_ids": ids[rows], "attention_mask": mask[rows], "labels": labels[rows]}


def test_losses_are_those_of_each_sequence(model):
    ids = token_ids(7, 20)
    nll, tokens = sequence_losses(model, batches(ids), shift=True)
    alone = [float(model(input_ids=row[None], labels=row[None]).loss) * 19 for row in ids]
    np.testing.assert_allclose(nll, alone, rtol=1e-5)
    assert tokens.tolist() == [19] * 7


def test_clusters_are_the_nearest_centroids_of_mean_states(model):
    ids, mask = token_ids(8, 40), torch.ones(8, 40, dtype=torch.long)
    mask[1, 35:] = mask[2, 10:] = 0
    found = sequence_clusters(model, batches(ids, mask))
    module = list(routed_modules(model).values())[-1]
    states = []
    hook = module.router.register_forward_hook(lambda router, args, output: states.append(args[0]))
    ids_of = model(input_ids=ids, attention_mask=mask, output_cluster_ids=True).cluster_ids[-1]
    hook.remove()
    for row, count in enumerate(mask.sum(1).tolist()):
        mean = states[0][row, :count].mean(0)
        distances = (mean - module.router.centroids[:5]).norm(dim=-1)
        np.testing.assert_allclose(found.embeddings[row], mean.detach(), atol=1e-5)
        np.testing.assert_allclose(found.distances[row], distances.detach(), rtol=1e-4)
        own = int(distances.argmin())
        counted = slice(32, count) if count > 32 else slice(0, count)
        assert found.clusters[row] == own
        assert found.agreement[row] == pytest.approx((ids_of[row, counted] == own).double().mean().item())
    np.testing.assert_array_equal(found.ids, ids.masked_fill(mask == 0, -1))
    assert found.experts.tolist() == module.router.cluster_expert[:5].tolist()
    assert not model.base_model._forward_pre_hooks


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("gate", ["hard", "posterior"])
def test_clusters_by_evidence_are_the_likeliest_of_the_whole_text(gate, side):
    """Whatever the gate makes of it: a rare expert that answers a little is not the cluster."""
    model = activate(tiny_model("gpt2", cse_routing="evidence", cse_combine="add", cse_gate=gate))
    texts = [token_ids(1, length, seed=length + 2)[0] for length in (40, 35, 10, 38, 33, 36, 39)]
    ids, mask = torch.zeros(2, 7, 40, dtype=torch.long)
    for row, text in enumerate(texts):
        place = slice(0, len(text)) if side == "right" else slice(40 - len(text), 40)
        ids[row, place], mask[row, place] = text, 1
    found, router = sequence_clusters(model, batches(ids, mask)), model.base_model.evidence_router
    for row, text in enumerate(texts):
        counts = torch.arange(1.0, len(text) + 1).double().unsqueeze(-1)
        sums = router.evidence[text, :5].double().cumsum(0) / (1 + counts / 16).sqrt()
        posterior = (sums + router.log_shares[:5].double()).log_softmax(-1)
        own = int(posterior[-1].argmax())
        assert found.clusters[row] == own
        np.testing.assert_allclose(found.distances[row], -posterior[-1], rtol=1e-5, atol=1e-6)
        late = posterior[32:] if len(text) > 32 else posterior
        assert found.agreement[row] == pytest.approx((late.argmax(-1) == own).double().mean().item())
    assert len(set(found.clusters)) > 2 and found.agreement.min() < 1
    np.testing.assert_array_equal(found.ids, ids.masked_fill(mask == 0, -1))
    assert found.embeddings.shape[0] == 7 and found.centroids.shape == (5, found.embeddings.shape[1])
    assert (
        found.experts.tolist()
        == routed_modules(model)[list(routed_modules(model))[-1]].router.cluster_expert[:5].tolist()
    )


@pytest.mark.parametrize("routing", ["evidence", "discriminant"])
def test_a_row_is_one_sequence_whatever_it_holds(routing):
    ids = token_ids(6, 40)
    found = []
    for separator in (None, int(ids[0, 20])):
        model = activate(tiny_model("gpt2", cse_routing=routing, cse_separator_token_id=separator))
        found.append(sequence_clusters(model, batches(ids)))
    for name in ("embeddings", "distances", "clusters", "agreement"):
        np.testing.assert_array_equal(getattr(found[0], name), getattr(found[1], name))


def test_sure_texts_are_told_apart_too():
    """Their posterior is 1 in fp64, and they are still in order."""
    model = activate(tiny_model("gpt2", cse_routing="evidence"))
    table = torch.zeros(99, 2)
    table[5], table[6] = torch.tensor([8.0, -8.0]), torch.tensor([8.0, -7.0])
    model.base_model.evidence_router.write(table, torch.tensor([0.5, 0.5]))
    for module in routed_modules(model).values():
        module.router.cluster_sizes[2:] = 0
    ids = torch.tensor([[6] * 40, [5] * 40, [6] * 39 + [5]])
    found = sequence_clusters(model, batches(ids))
    assert found.clusters.tolist() == [0, 0, 0] and found.distances[:, 0].argsort().tolist() == [1, 2, 0]
    assert 0 < found.distances[:, 0].min() < 1e-16


def test_a_model_without_clusters_is_named():
    with pytest.raises(ValueError, match="model has no clusters in its last routed module"):
        sequence_clusters(tiny_model("gpt2"), batches(token_ids()))


def test_shares_are_of_experts_and_a_model_without_any_is_named():
    with pytest.raises(ValueError, match="CSEGPT2Model has no layer with experts: set cse_layers"):
        expert_shares(tiny_model("gpt2", cse_layers=[]), batches(token_ids()))
    with pytest.raises(ValueError, match="model=GPT2LMHeadModel is not allowed: it must be a CSE"):
        expert_shares(dense_model("gpt2"), batches(token_ids()))
