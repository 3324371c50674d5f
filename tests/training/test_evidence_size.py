# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of `evidence_size`: tokens of texts before the sample are counted too, and nothing else changes."""

import shutil

import numpy as np
import pytest
import torch
from tiny import tiny_model
from tiny_runs import fit_steps, history, make_trainer, note_samples, rows, settings, train

from modeling_cse import ClusterExpertsCallback
from modeling_cse.clustering.evidence import Evidence
from modeling_cse.evidence_cse import LARGEST
from modeling_cse.training.collecting import TEXTS, FeatureCollector


DATA = rows(length=24)
TEXT = {"common_share": 0.4, "num_clusters": 3, "sample_size": 16, "warmup": 2, "recluster_every": 2}


def evidence_model():
    return tiny_model("gpt2", cse_routing="evidence")


def callback(**changes) -> ClusterExpertsCallback:
    return ClusterExpertsCallback(**settings(**{**TEXT, **changes}))


@pytest.fixture
def samples(monkeypatch) -> list:
    """What the fits of a run look at."""
    return note_samples(monkeypatch)


@pytest.mark.parametrize(
    ("size", "counted"), [(24, [16, 24, 24, 24]), (40, [16, 32, 40, 40]), (None, [16, 32, 48, 48])]
)
def test_the_texts_before_a_sample_are_kept(tmp_path, samples, size, counted):
    """A step reads eight texts. By default three samples are counted."""
    trainer = train(tmp_path, callback(evidence_size=size), model=evidence_model(), data=DATA, max_steps=9)
    assert fit_steps(trainer) == [2, 4, 6, 8]
    texts = [sample.pop(TEXTS) for sample in samples]
    assert [len(each) for sample in samples for each in sample.values()] == [16] * 8
    assert [len(each) for each in texts] == counted
    assert torch.equal(texts[1].ids[: counted[1] - 16], texts[0].ids[16 - counted[1] :][: counted[1] - 16])
    for sample, text in zip(samples, texts, strict=True):
        for states in sample.values():
            assert torch.equal(states.passes, text.passes[-16:]), "the last ones are the sample"
            assert states.ids.numel() == states.tokens.numel() == 0, "once for all sites; no state of a single token"
        assert text.embeddings.shape[1] == text.tokens.shape[2] == 0


def test_texts_and_states_of_a_sample_are_of_the_same_sequences():
    """Batches of five rows, of which the last six are the sample and the last ten are counted."""
    model, ids = evidence_model().eval(), torch.stack([row["input_ids"] for row in DATA[:15]])

    def collect(batches):
        collector = FeatureCollector(model, 6, training_only=False, with_ids=True, texts=10)
        collector.attach()
        collector.enabled = True
        with torch.no_grad():
            for batch in batches:
                model(input_ids=batch)
        collector.detach()
        return collector

    collector = collect(ids.split(5))
    texts = collector.texts.all()
    assert torch.equal(texts.ids, ids[-10:].int())
    alone = collect(text.long().unsqueeze(0) for text in texts.ids[-6:])
    for site, store in collector.stores.items():
        torch.testing.assert_close(store.all().embeddings, alone.stores[site].all().embeddings)


def test_between_distant_fits_texts_are_read_as_long_as_they_are_wanted(tmp_path, samples):
    seldom = callback(evidence_size=32, recluster_every=6)
    train(tmp_path, seldom, model=evidence_model(), data=DATA, max_steps=9)
    assert [len(sample[TEXTS]) for sample in samples] == [16, 32]
    assert samples[1][TEXTS].passes.unique().numel() == 4, "the last four of six steps"


def test_evidence_is_of_all_texts_and_clusters_are_of_the_sample(tmp_path, monkeypatch):
    found = []
    counted_on = Evidence.counted_on

    def note(evidence, ids, labels, more, of_more):
        found.append((evidence, len(ids), more, counted_on(evidence, ids, labels, more, of_more)))
        return found[-1][-1]

    monkeypatch.setattr(Evidence, "counted_on", note)
    whole = train(tmp_path / "a", callback(evidence_size=40), model=evidence_model(), data=DATA, max_steps=9)
    alone = train(tmp_path / "b", callback(evidence_size=16), model=evidence_model(), data=DATA, max_steps=9)
    assert [len(more) for _, _, more, _ in found] == [16, 24, 24], "the first fit has the sample only"
    of_sample, _, more, of_all = found[-1]
    router = whole.model.base_model.evidence_router
    bounded = of_all.table.clip(-LARGEST, LARGEST)
    np.testing.assert_allclose(router.evidence[:, :3].numpy(), bounded, atol=2**-11)
    assert not np.allclose(of_all.table, of_sample.table, atol=0.01)
    np.testing.assert_array_equal(of_all.shares, of_sample.shares)
    assert (of_all.smoothing, of_all.temper) == (of_sample.smoothing, of_sample.temper)
    assert len(more) == 24 and fit_steps(whole) == fit_steps(alone)


def test_of_the_sample_alone_nothing_else_is_kept(tmp_path, samples):
    trainer = train(tmp_path, callback(evidence_size=16), model=evidence_model(), data=DATA, max_steps=9)
    assert fit_steps(trainer) == [2, 4, 6, 8] and [len(sample[TEXTS]) for sample in samples] == [16] * 4


@pytest.mark.parametrize(("algorithm", "texts"), [("text", [16] * 4), ("kmeans", [None] * 4)])
def test_routes_that_count_no_tokens_keep_the_sample_alone(tmp_path, samples, algorithm, texts):
    model, by_size = tiny_model("gpt2", cse_routing="discriminant"), {"common_by": None}
    train(tmp_path, callback(algorithm=algorithm, **by_size), model=model, data=DATA, max_steps=9)
    assert [sample[TEXTS] and len(sample[TEXTS]) for sample in samples] == texts
    states = next(iter(samples[0].values()))
    assert len(states) == 16 and states.tokens.shape[1] == 8, "for the discriminant"


def test_labels_that_come_with_the_texts_count_them(tmp_path, monkeypatch):
    """Not the clusters that evidence would give them: labels are known."""
    told = []
    counted_on = Evidence.counted_on

    def note(evidence, ids, labels, more, of_more):
        told.append((more, of_more))
        return counted_on(evidence, ids, labels, more, of_more)

    monkeypatch.setattr(Evidence, "counted_on", note)
    data = [{**row, "given_clusters": torch.tensor(number // 2 % 3)} for number, row in enumerate(DATA)]
    known = {tuple(row["input_ids"].tolist()): int(row["given_clusters"]) for row in data}
    own = callback(algorithm="given", num_clusters=None, common_share=0.4, common_by="size", update="recluster")
    train(tmp_path, own, model=evidence_model(), data=data, max_steps=9)
    assert [len(of_more) for _, of_more in told] == [16, 32, 32]
    for more, of_more in told:
        assert [known[tuple(row)] for row in more] == of_more.tolist()


@pytest.mark.parametrize("step", [3, 6])
def test_a_resumed_run_counts_the_same_texts(tmp_path, step):
    saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 9, "data": DATA}
    whole = train(tmp_path / "whole", callback(evidence_size=40), model=evidence_model(), **saving)
    place = tmp_path / "again" / f"checkpoint-{step}"
    shutil.copytree(tmp_path / "whole" / place.name, place)
    again = train(tmp_path / "again", callback(evidence_size=40), model=evidence_model(), resume=str(place), **saving)
    assert history(again) == history(whole)
    ours, theirs = again.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("size", [15, 0, 16.0, True, "32"])
def test_less_than_a_sample_is_refused(size):
    with pytest.raises(ValueError, match=f"evidence_size={size!r} is not allowed.*sample_size=16"):
        callback(evidence_size=size)


def test_routes_that_count_no_tokens_refuse_it(tmp_path):
    trainer = make_trainer(tmp_path, callback(evidence_size=32), model=tiny_model("gpt2"), data=DATA)
    with pytest.raises(ValueError, match="evidence_size=32 is not allowed with cse_routing='discriminant'"):
        trainer.train()
