# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of random configs: each builds, learns a step, is saved, loaded and generates, or is refused by name."""

import tempfile
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, note
from outcomes import count, examples, names
from random_configs import RandomConfig, random_configs
from tiny import LANGUAGE_HEAD, dense_model, model_class

from modeling_cse.configuration_cse import CSEFlags


FLAGS = list(CSEFlags.__dataclass_fields__)


def flags_of(config) -> dict[str, Any]:
    """As they are after JSON, which knows no tuples."""
    values = {name: getattr(config, name) for name in FLAGS}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def batch_of(case: RandomConfig, config) -> dict[str, torch.Tensor]:
    """Two rows, the second padded, as long as the config allows."""
    length = max(min(8, config.max_position_embeddings), 1)
    ids = torch.randint(0, max(config.vocab_size, 1), (2, length), generator=generator_of(case))
    mask = torch.ones_like(ids)
    mask[1, (length + 1) // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def generator_of(case: RandomConfig) -> torch.Generator:
    return torch.Generator().manual_seed(case.seed)


@torch.no_grad()
def cluster(model, case: RandomConfig) -> None:
    """Switches the experts on, with as many clusters and owners as were drawn."""
    most, experts, generator = model.config.max_clusters, model.config.cse_num_experts, generator_of(case)
    number = {"none": 0, "one": 1, "full": most}.get(case.clusters, min(3, most))
    owners = torch.arange(number) % (experts + 1) - 1
    if case.clusters in ("one", "all long tail"):
        owners = torch.arange(number) % experts
    elif case.clusters == "all common":
        owners = owners.fill_(-1)
    for module in model.base_model.routed_modules().values():
        width = model.config.hidden_size
        module.router.write(
            centroids=torch.randn(number, width, generator=generator),
            radii=torch.rand(number, generator=generator) + 0.5,
            cluster_sizes=torch.arange(1, number + 1),
            discriminant_weight=torch.randn(number, width, generator=generator),
            discriminant_bias=torch.randn(number, generator=generator),
            cluster_expert=owners,
        )
        for slot in range(experts):
            module.fill_expert(slot, generator)


def given_clusters(config, rows: int) -> dict[str, torch.Tensor]:
    if getattr(config, "cse_routing", None) != "given":
        return {}
    return {"given_clusters": torch.arange(rows) % (config.max_clusters + 1) - 1}


def learn(model, batch: dict[str, torch.Tensor]) -> bool:
    """A step of training; whether loss and gradients are finite."""
    model.train()
    torch.manual_seed(0)
    loss = model(**batch).loss
    if loss.requires_grad:
        loss.backward()
    found = [loss, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    return all(bool(tensor.isfinite().all()) for tensor in found)


def live(case: RandomConfig, ours: bool) -> str:
    """Everything that a model of this config is asked for, ours or the stock twin. Returns how it fared; errors come
    out as they are."""
    torch.manual_seed(case.seed)
    if ours:
        config = case.make()
        model = model_class(case.family, LANGUAGE_HEAD[case.family])(config)
        cluster(model, case)
    else:
        config = case.dense()
        model = type(dense_model(case.family))(config)
    batch = batch_of(case, config) | (given_clusters(config, 2) if ours else {})
    if not learn(model, batch):
        return "not finite"
    model.eval()
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        wanted = model(**batch).logits
        if not wanted.isfinite().all():
            return "not finite"
        model.save_pretrained(folder)
        ways = {"experts_implementation": config._experts_implementation} if ours else {}
        loaded = type(model).from_pretrained(folder, attn_implementation=config._attn_implementation, **ways)
        if ours:
            assert flags_of(loaded.config) == flags_of(config)
        assert loaded.state_dict().keys() == model.state_dict().keys()
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
        # products of odd widths are rounded by where their operands lie in memory
        torch.testing.assert_close(loaded(**batch).logits, wanted, atol=1e-6, rtol=1e-5)
    return generate(case, model, batch, ours) if case.family == "gpt2" else "works"


def generate(case: RandomConfig, model, batch: dict[str, torch.Tensor], ours: bool) -> str:
    room = model.config.n_positions - batch["input_ids"].shape[1]
    prompt = {"input_ids": batch["input_ids"][:1], "attention_mask": batch["attention_mask"][:1]}
    prompt |= given_clusters(model.config, 1)
    arguments = {"max_new_tokens": max(min(room, 3), 1), "do_sample": False, "pad_token_id": 0}
    if ours and model.config.cse_routing == "sequence" and model.config.cse_layer_indices:
        with pytest.raises(ValueError, match="cse_routing='sequence'"):
            model.generate(**prompt, **arguments)
        return "works, refuses to generate"
    ids = model.generate(**prompt, **arguments)
    assert ids.shape[1] > prompt["input_ids"].shape[1] and 0 <= ids.min() and ids.max() < model.config.vocab_size
    return "works"


def attempt(case: RandomConfig, ours: bool) -> tuple[str, Exception | None]:
    try:
        return live(case, ours), None
    except AssertionError:
        raise
    except Exception as error:  # noqa: BLE001 - which error it may be is what the test is about
        return "fails", error


@examples(1)
@given(case=random_configs())
def test_a_config_works_or_is_refused_by_name(case):
    outcome, error = attempt(case, ours=True)
    note(f"{outcome}: {error!r}")
    wrong_flags = case.wrong & case.flags.keys()
    if error is None and outcome != "not finite":
        assert not wrong_flags, "a flag that is not allowed was taken"
        return count("configs", outcome)
    if isinstance(error, ValueError) and any(
        f"{name}={case.flags[name]!r}" in str(error) and "must" in str(error) for name in wrong_flags
    ):
        return count("configs", "refused by name: flag")
    if isinstance(error, StrictDataclassError | ValueError) and names(error, *case.wrong):
        return count("configs", "refused by name: stock field")
    dense_outcome, dense_error = attempt(case, ours=False)
    note(f"stock: {dense_outcome}: {dense_error!r}")
    assert (outcome, type(error)) == (dense_outcome, type(dense_error)), f"the stock twin does better than {error!r}"
    if error is not None:
        return count("configs", f"the stock twin's own {type(error).__name__}")
    assert case.wrong, "numbers are not finite, and nothing was wrong"
    count("configs", "not finite, as the stock twin")
