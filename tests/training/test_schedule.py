# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""When fits happen."""

import pytest
from tiny_runs import Watcher, fit_steps, settings, train

from modeling_cse import ClusterExpertsCallback
from modeling_cse.training.schedule import FitSchedule


WRONG = [
    ({"update": "online"}, "update='online'"),
    ({"recluster_growth": 0.5}, "recluster_growth=0.5"),
    ({"recluster_growth": float("inf")}, "recluster_growth=inf"),
    ({"recluster_growth": "2"}, "recluster_growth='2'"),
    ({"recluster_every": 1.0}, "recluster_every=1.0"),
    ({"recluster_every": -1}, "recluster_every=-1"),
    ({"recluster_until": -1}, "recluster_until=-1"),
    ({"recluster_until": 1.5}, "recluster_until=1.5"),
    ({"recluster_until": 0.5, "update": "frozen"}, "recluster_until=0.5"),
    ({"recluster_growth": 2.0, "update": "ema"}, "recluster_growth=2.0"),
    ({"warmup": "soon"}, "warmup='soon'"),
]


@pytest.mark.parametrize(("wrong", "complaint"), WRONG, ids=lambda part: str(part))
def test_wrong_times_are_refused_by_name(wrong, complaint):
    with pytest.raises(ValueError, match=f"{complaint} is not allowed"):
        FitSchedule(**wrong)


def fits(schedule: FitSchedule, max_steps: int) -> list[int]:
    """Every step at whose end the schedule wants a fit."""
    first = schedule.first_fit(max_steps)
    return [step for step in range(1, max_steps + 1) if schedule.next_fit(first, step - 1, max_steps) == step]


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, [10, 30, 50, 70, 90]),
        ({"warmup": 0.25}, [25, 45, 65, 85]),
        ({"recluster_growth": 2.0}, [10, 30, 70]),
        ({"recluster_growth": 1.5, "recluster_every": 3}, [10, 13, 17, 24, 34, 49, 72]),
        ({"recluster_until": 50}, [10, 30, 50]),
        ({"recluster_until": 0.69}, [10, 30, 50]),
        ({"recluster_until": 5}, [10]),
        ({"update": "recluster+ema"}, [10, 30, 50, 70, 90]),
        ({"update": "ema"}, [10]),
        ({"update": "frozen"}, [10]),
        ({"recluster_every": 0.25}, [10, 35, 60, 85]),
        ({"recluster_every": 0.07, "recluster_until": 30}, [10, 17, 24]),  # 0.07 * 100 is a little more than 7
        ({"recluster_every": 0.101, "recluster_growth": 2.0}, [10, 21, 43, 87]),
        ({"recluster_every": 90}, [10]),  # 100 is the last step: nothing would be left to train
    ],
    ids=str,
)
def test_fits_come_when_they_should(options, wanted):
    assert fits(FitSchedule(**{"warmup": 10, "recluster_every": 20, **options}), 100) == wanted


def test_a_run_keeps_to_its_schedule(tmp_path):
    callback = ClusterExpertsCallback(**settings(warmup=2, recluster_every=1, recluster_growth=2.0))
    assert fit_steps(train(tmp_path, callback)) == [2, 3, 5, 9]


def test_centroids_move_between_fits_with_both(tmp_path):
    """`recluster+ema`: at every step after the first fit, by the step's own sequences, and anew at each fit."""
    watcher = Watcher(lambda model: model.transformer.h[2].mlp.router.centroids.clone())
    options = settings(warmup=3, recluster_every=4, update="recluster+ema", ema_decay=0.9)
    trainer = train(tmp_path, ClusterExpertsCallback(**options), callbacks=[watcher])
    assert fit_steps(trainer) == [3, 7]
    moved = [float((watcher.seen[step + 1] - watcher.seen[step]).norm()) for step in range(3, 9)]
    assert all(distance > 0 for distance in moved) and not watcher.seen[2].any()


def test_moving_averages_take_each_sequence_once(tmp_path):
    """Also those of a step that is larger than the sample of a fit, after a fit whose sample reaches over the one
    before, and whatever the micro-batches are."""
    counts = []

    class Counting(ClusterExpertsCallback):
        def _move(self):
            store = next(iter(self.collector.stores.values()))
            counts.append(store.seen - store._taken)
            super()._move()

    for update, sample_size, every in (("ema", 6, 4), ("recluster+ema", 6, 4), ("recluster+ema", 24, 2)):
        for batch, accumulate in ((8, 1), (2, 4)):
            options = settings(update=update, sample_size=sample_size, recluster_every=every)
            sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulate}
            train(tmp_path, Counting(**options), **sizes)
    assert counts and set(counts) == {8}
