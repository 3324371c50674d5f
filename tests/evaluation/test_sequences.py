# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""What a model makes of single sequences agrees with what it makes of them one by one."""

import numpy as np
import pytest
import torch
from tiny import activate, routed_modules, tiny_model, token_ids

from modeling_cse.evaluation import sequence_clusters, sequence_losses


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
    assert found.experts.tolist() == module.router.cluster_expert[:5].tolist()
    assert not model.base_model._forward_pre_hooks


def test_a_model_without_clusters_is_named():
    with pytest.raises(ValueError, match="model has no clusters in its last routed module"):
        sequence_clusters(tiny_model("gpt2"), batches(token_ids()))
