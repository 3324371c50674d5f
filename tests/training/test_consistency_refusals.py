# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""What the measurement of gradient consistency refuses, by name."""

import pytest
import torch
from tiny import LANGUAGE_HEAD, activate, labelled, tiny_model

from modeling_cse.training.consistency import GradientConsistency


def training_model(family: str = "gpt2", **flags):
    return tiny_model(family, **flags).train()


def batch(family: str = "gpt2") -> dict[str, torch.Tensor]:
    return labelled(family, LANGUAGE_HEAD[family], rows=8)


@pytest.mark.parametrize(
    ("name", "value"),
    [("window", 1), ("window", 2.5), ("tail_share", 0), ("tail_share", 1.1), ("sketch_size", 0), ("seed", -1)],
)
def test_wrong_argument_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r} is not allowed: "):
        GradientConsistency(training_model("gpt2"), **{name: value})


def attached(model) -> None:
    GradientConsistency(model).attach()


def test_routed_tokens_are_refused():
    model = activate(training_model("gpt2", cse_combine="replace"))
    attached(model)
    with pytest.raises(ValueError, match=r"must see whole batches \(B, T, f\).*before experts are switched on"):
        model(**batch())


def test_a_chunked_ffn_is_refused():
    model = training_model("bert", chunk_size_feed_forward=4)
    attached(model)
    with pytest.raises(ValueError, match="set chunk_size_feed_forward=0"):
        model(**batch("bert"))


def test_embeddings_in_place_of_tokens_are_refused(family):
    model = training_model(family)
    attached(model)
    with pytest.raises(ValueError, match="input_ids=None is not allowed"):
        model(inputs_embeds=torch.randn(2, 8, 32))


def test_a_frozen_layer_is_refused(family):
    model = training_model(family).requires_grad_(False)
    attached(model)
    with pytest.raises(ValueError, match="no gradient reaches the layer"):
        model(**batch(family))


def test_a_layer_that_does_not_run_is_refused(family):
    """As when compilation has taken its hooks away: without a word the window would never fill."""
    model = training_model(family)
    GradientConsistency(model, layer=torch.nn.Linear(64, 32)).attach()
    model(**batch(family))
    with pytest.raises(ValueError, match="was not reached by the last batch"):
        model(**batch(family))
