# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""
A long run of a tiny model through Trainer and callback: does memory grow, does anything become NaN, and what does the
log say when domains come and go?

    python -m benchmarks.long_run --steps 20000                        # twenty minutes on a busy core
    python -m benchmarks.long_run --steps 20000 --algorithm dbscan

Five phases: three domains; a fourth appears; one of the first vanishes; nothing but one repeated text; the three
again, with the late one gone. Writes `benchmarks/results/long_run.json`, one entry an algorithm.
"""

import argparse
import gc
import json
import logging
import math
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from benchmarks.survival_record import RESULTS, write_record
from modeling_cse import CSEGPT2Config, CSEGPT2ForCausalLM
from modeling_cse.training import ClusterExpertsCallback


VOCAB, LENGTH, BATCH = 128, 12, 8
# Where in the run a phase ends, and the shares of domains A to D in it; None: one text again and again.
PHASES = (
    (0.25, (0.55, 0.25, 0.2, 0.0)),
    (0.5, (0.4, 0.2, 0.2, 0.2)),
    (0.65, (0.5, 0.25, 0.0, 0.25)),
    (0.75, None),
    (1.0, (0.55, 0.25, 0.2, 0.0)),
)
# Memory is judged from here on: until then caches fill and experts come on.
SETTLED = 2000
SAMPLE = 64


class Phases(torch.utils.data.Dataset):
    """Rows made from their number alone, so that data take no memory: 28 token ids of its own for each domain."""

    def __init__(self, steps: int):
        self.steps = steps

    def __len__(self) -> int:
        return self.steps * BATCH

    def shares(self, row: int) -> tuple[float, ...] | None:
        return next(shares for end, shares in PHASES if row < end * len(self) or end == 1.0)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        shares = self.shares(row)
        generator = np.random.default_rng(0 if shares is None else row + 1)
        domain = 0 if shares is None else int(generator.choice(len(shares), p=shares))
        ids = torch.from_numpy(generator.integers(8 + 28 * domain, 8 + 28 * (domain + 1), LENGTH))
        return {"input_ids": ids, "labels": ids}


# A look at the process after `step`: resident memory in KiB; and of what was made since training began, live tensors,
# their bytes, and objects that the garbage collector tracks.
STEP, RESIDENT, TENSORS, TENSOR_BYTES, OBJECTS = range(5)


class Watch(TrainerCallback):
    """Looks at the process every `every` steps, at every loss, and at every number that the model and the callback
    hold. It keeps no more at the end than at the start, and empties the Trainer's `log_history`, which grows with
    every log by design, so that what is left to grow is what should not."""

    def __init__(self, clusters: ClusterExpertsCallback, every: int, steps: int):
        self.clusters, self.every = clusters, every
        self.samples = np.ones((steps // every, 5), np.int64)
        self.bad: list[str] = []
        self.losses, self.step, self.fits, self.history_bytes = 0, 0, 0, 0
        self.clusters_found: Counter[int] = Counter()
        self.largest_share = 0.0
        self.process = psutil.Process()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "cse/seconds" in logs:
            self.fits += 1
            self.clusters_found[int(logs["cse/layer_1/ffn/clusters"])] += 1
            self.largest_share = max(self.largest_share, float(logs["cse/layer_1/ffn/largest_share"]))

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.hook = model.register_forward_hook(self.after_forward)
        gc.collect()
        gc.freeze()  # half a million objects of imports, which every look would walk through

    def after_forward(self, module, args, outputs):
        self.losses += 1
        if not math.isfinite(float(outputs.loss.detach())):
            self.bad.append(f"loss after step {self.step}")

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.step = state.global_step
        if self.step % self.every:
            return
        self.check_numbers(model)
        gc.collect()
        found = gc.get_objects()
        tensors = [item for item in found if issubclass(type(item), torch.Tensor)]
        held = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
        resident = self.process.memory_info().rss // 1024
        self.samples[self.step // self.every - 1] = self.step, resident, len(tensors), held, len(found)
        self.history_bytes += len(json.dumps(state.log_history))
        state.log_history.clear()

    def check_numbers(self, model) -> None:
        named = {**model.state_dict(), **self.clusters.memory.tensors()}
        for place, store in self.clusters.collector.named_stores().items():
            named |= {f"features.{place}.{n}": t for part in store.parts for n, t in vars(part).items()}
        wrong = [name for name, tensor in named.items() if not torch.isfinite(tensor).all()]
        self.bad += [f"{name} after step {self.step}" for name in wrong]

    def on_train_end(self, args, state, control, **kwargs):
        self.hook.remove()
        gc.unfreeze()


class Lines(logging.Handler):
    """Counts the lines that the library logs, by what they tell."""

    def __init__(self):
        super().__init__(logging.INFO)
        self.told: Counter[str] = Counter()

    def emit(self, record):
        line = record.getMessage()
        self.told.update(name for name, mark in EVENTS.items() if mark in line)

    def __enter__(self) -> "Lines":
        self.logger = logging.getLogger("modeling_cse")
        self.before = self.logger.level
        self.logger.setLevel(logging.INFO)
        self.logger.addHandler(self)
        return self

    def __exit__(self, *error):
        self.logger.removeHandler(self)
        self.logger.setLevel(self.before)


EVENTS = {
    "owners not found, experts kept": "were not found",
    "owners that lost their expert": "lost them",
    "fits with one cluster only": "are in one cluster",
    "poor agreement": "held-out tokens",
}


def growth(samples: np.ndarray, settled: int, blocks: int = 9) -> dict[str, float | list[float]]:
    """
    How memory moves after `settled` steps: the mean of each of `blocks` equal parts in KiB, a straight line through
    them in KiB per 1,000 steps with the standard error of its slope, and the scatter about it.
    """
    kept = samples[samples[:, STEP] > settled][:, [STEP, RESIDENT]].astype(float)
    parts = np.array_split(kept, blocks)
    steps, means = np.array([part.mean(axis=0) for part in parts]).T
    (slope, start), covariance = np.polyfit(steps / 1000, means, 1, cov=True)
    return {
        "block_means_kib": [round(mean, 1) for mean in means],
        "slope_kib_per_1000_steps": round(float(slope), 3),
        "standard_error": round(float(covariance[0, 0] ** 0.5), 3),
        "scatter_kib": round(float((means - slope * steps / 1000 - start).std()), 1),
        "highest_minus_first_kib": int(kept[:, 1].max() - kept[0, 1]),
    }


def run(
    steps: int, fit_every: int, look_every: int, folder: Path, algorithm: str = "kmeans"
) -> tuple[Watch, Counter[str]]:
    """
    One run.

    Args:
        steps: optimizer steps.
        fit_every: steps of the warm-up, and between fits.
        look_every: steps between two looks at the process.
        folder: for checkpoints, of which the last two stay.
        algorithm: of the clustering.

    Returns:
        The `Watch`, and how often the log told what.
    """
    torch.manual_seed(0)
    config = CSEGPT2Config(
        vocab_size=VOCAB,
        n_positions=LENGTH,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=1,
        eos_token_id=2,
        cse_layers=[1],
        cse_combine="replace",
        cse_routing="discriminant",
    )
    clusters = ClusterExpertsCallback(
        warmup=fit_every,
        recluster_every=fit_every,
        update="recluster+ema",
        algorithm=algorithm,
        num_clusters=4 if algorithm in ("kmeans", "spherical") else None,
        common_share=0.5,
        sample_size=SAMPLE,
    )
    watch = Watch(clusters, look_every, steps)
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=BATCH,
        max_steps=steps,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        logging_steps=max(steps // 20, 1),
        save_steps=max(steps // 10, 1),
        save_total_limit=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(CSEGPT2ForCausalLM(config), arguments, train_dataset=Phases(steps), callbacks=[watch])
    clusters.attach(trainer)
    with Lines() as lines:
        trainer.train()
    return watch, lines.told


def summary(watch: Watch, told: Counter[str], steps: int, algorithm: str) -> dict[str, Any]:
    """What is recorded of a run."""
    samples = watch.samples
    ends = samples[samples[:, STEP] > SETTLED][[0, -1]]
    return {
        "algorithm": algorithm,
        "steps": steps,
        "fits": watch.fits,
        "losses_checked": watch.losses,
        "not_finite": watch.bad,
        "memory": growth(samples, SETTLED),
        "live_tensors": ends[:, TENSORS].tolist(),
        "live_tensor_bytes": ends[:, TENSOR_BYTES].tolist(),
        "tracked_objects": ends[:, OBJECTS].tolist(),
        "log_history_bytes": watch.history_bytes,
        "log_lines": {name: told[name] for name in EVENTS},
        "clusters_found": dict(sorted(watch.clusters_found.items())),
        "largest_share_highest": round(watch.largest_share, 3),
        "resident_kib_every_1000_steps": samples[samples[:, STEP] % 1000 == 0][:, RESIDENT].tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--fit_every", type=int, default=190, help="steps between fits")
    parser.add_argument("--look_every", type=int, default=100, help="steps between looks at the process")
    parser.add_argument("--algorithm", default="kmeans")
    parser.add_argument("--output", type=Path, default=RESULTS / "long_run.json")
    options = parser.parse_args()
    if options.steps < 2 * SETTLED:
        parser.error(f"--steps {options.steps} is not allowed: memory is judged after {SETTLED}, take twice as many.")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        watch, told = run(options.steps, options.fit_every, options.look_every, Path(folder), options.algorithm)
    before = json.loads(options.output.read_text())["runs"] if options.output.is_file() else {}
    runs = before | {options.algorithm: summary(watch, told, options.steps, options.algorithm)}
    write_record(options.output, "benchmarks.long_run", {"runs": runs})
    print(json.dumps(runs[options.algorithm], indent=1))


if __name__ == "__main__":
    main()
