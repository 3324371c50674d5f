# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of clustering fed badly: arguments are taken or refused by name, fits are finite or say why not."""

import tempfile

import torch
from hypothesis import given, note
from hypothesis import strategies as st
from outcomes import count, examples, names
from random_samples import ARGUMENTS, Sample, callback_arguments, fit_data, samples
from tiny import routed_modules, tiny_config, tiny_model
from tiny_runs import make_trainer

from modeling_cse import ClusterExpertsCallback, fit_experts
from modeling_cse.clustering import ClusterSettings, fit_layer, identities_of
from modeling_cse.routing_cse import ClusterRouter, RoutingContext


# What the fits of random samples may complain of.
COMPLAINTS = ("routing features", "num_clusters", "given_clusters", "projection", "sequences", "sequence reached")
COMPLAINTS += ("input_ids", "algorithm")
ALGORITHMS = [{"num_clusters": 2}, {"num_clusters": 1}, {}, {"algorithm": "given"}, {"algorithm": "hdbscan"}]


@examples(4)
@given(drawn=callback_arguments(), step=st.integers(0, 40), steps=st.integers(1, 40))
def test_arguments_of_the_callback_are_taken_or_refused_by_name(drawn, step, steps):
    arguments, wrong = drawn
    try:
        callback = ClusterExpertsCallback(**arguments)
    except ValueError as error:
        note(repr(error))
        told = [name for name in ARGUMENTS if f"{name}=" in str(error)]
        assert told and " not allowed" in str(error)
        return count("callback", "refused by name: wrong" if wrong else "refused by name: not with the others")
    assert not wrong, "a value that is not allowed was taken"
    first = callback.schedule.first_fit(steps)
    fit = callback.schedule.next_fit(3 if first is None else first, step, steps)
    assert fit is None or (isinstance(fit, int) and fit > step)
    count("callback", "taken")


@examples(2)
@given(sample=samples(), routing=st.sampled_from(["discriminant", "sequence", "given"]), drifting=st.booleans())
def test_a_fit_ends_in_finite_buffers_or_says_why_not(sample: Sample, routing, drifting):
    """Twice: the second fit is matched to the clusters of the first."""
    flags = {"n_embd": sample.width, "cse_routing": routing, "cse_max_clusters": sample.max_clusters}
    router = ClusterRouter(tiny_config("gpt2", **flags))
    settings = ClusterSettings(**sample.settings)
    for part in (sample, sample._replace(seed=sample.seed + 1)):
        features = part.features()
        try:
            fit = fit_layer(router, features, settings, identities_of(router), 4, drifting)
        except ValueError as error:
            note(repr(error))
            assert names(error, *COMPLAINTS)
            return count("fits", "refused by name")
        router.write(**fit.router_state())
        assert 1 <= router.num_clusters <= sample.max_clusters
        for name, buffer in router.named_buffers():
            assert buffer.isfinite().all(), name
        for name, value in fit.metrics.items():
            assert value == value and abs(value) < float("inf"), name
        scores, clusters, *_ = router(features.tokens, RoutingContext(given_clusters=features.labels))
        assert scores.isfinite().all()
        assert -1 <= clusters.min() and clusters.max() < router.num_clusters
    count("fits", "finite")


@examples(0.5)
@given(
    batches=fit_data(),
    family=st.sampled_from(["gpt2", "bert"]),
    routing=st.sampled_from(["discriminant", "sequence", "given"]),
    settings=st.sampled_from(ALGORITHMS),
    sample_size=st.sampled_from([2048, 8, 1]),
)
def test_fit_experts_makes_do_with_what_it_gets_or_says_why_not(batches, family, routing, settings, sample_size):
    model = tiny_model(family, cse_routing=routing)
    try:
        metrics = fit_experts(model, batches, sample_size=sample_size, **settings)
    except ValueError as error:
        note(repr(error))
        assert names(error, *COMPLAINTS)
        return count("fit_experts", "refused by name")
    assert all(value == value and abs(value) < float("inf") for value in metrics.values())
    for module in routed_modules(model).values():
        assert module.router.num_clusters
        assert all(buffer.isfinite().all() for buffer in module.router.buffers())
    count("fit_experts", "fitted")


@examples(0.1)
@given(
    lengths=st.lists(st.integers(0, 8), max_size=24),
    warmup=st.sampled_from([1, 2, 0.5]),
    num_clusters=st.sampled_from([1, 2, 6]),
    update=st.sampled_from(["recluster", "recluster+ema", "ema", "frozen"]),
)
def test_a_run_on_rows_that_may_be_empty_ends_well_or_says_why_not(lengths, warmup, num_clusters, update):
    """Every row has eight places, and tokens in the first of them, or in none."""
    torch.manual_seed(0)
    data = []
    for number, length in enumerate(lengths):
        ids, mask = torch.arange(8) + 5 + number, (torch.arange(8) < length).long()
        data.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    callback = ClusterExpertsCallback(
        warmup=warmup, recluster_every=1, num_clusters=num_clusters, sample_size=8, update=update
    )
    options = {"model": tiny_model("gpt2"), "max_steps": 4, "per_device_train_batch_size": 4}
    with tempfile.TemporaryDirectory() as folder:
        try:
            trainer = make_trainer(folder, callback, data=data, **options)
            trainer.train()
        except ValueError as error:
            note(repr(error))
            assert names(error, *COMPLAINTS) or not data
            return count("runs", "refused by name")
    for module in routed_modules(trainer.model).values():
        assert module.router.num_clusters
        assert all(buffer.isfinite().all() for buffer in module.router.buffers())
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
    count("runs", "trained")
