# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""The Trainer callback: a dense warm-up, the first fit, and clusters kept up to date while the model trains."""

import math
from pathlib import Path

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..clustering import ClusterSettings, move_clusters
from ..routing_cse import ClusterRouter
from .collecting import FeatureCollector
from .fitting import fit_layers
from .gathering import gather_features, local_capacity, rank, world_size
from .memory import ClusterMemory, file_name, load_state, save_state
from .moments import clear_moments


logger = logging.get_logger(__name__)

UPDATES = ("recluster", "ema", "frozen")


class ClusterExpertsCallback(TrainerCallback):
    """
    Switches cluster-guided experts on during an ordinary `Trainer` run, and keeps their clusters.

    The model trains densely for a warm-up. Then clusters are found among the routing features of the last training
    batches (no second forward pass), long-tail clusters get an expert each, and every `recluster_every` steps they are
    found again, matched to the old ones so that an expert keeps its domain.

    Args:
        warmup (`int` or `float`): dense steps, or share of training (below 1). 0 only if the model has clusters.
        recluster_every (`int`): optimizer steps between two fits (`update="recluster"`).
        update (`str`): `"recluster"`, `"ema"` (after the first fit centroids follow their members as moving averages,
            the paper's rule) or `"frozen"` (the first fit stays).
        algorithm (`str`): `"kmeans"`.
        num_clusters (`int`): clusters to look for.
        common_share (`float`): the largest clusters are common until together they hold this share; the others are
            long-tail.
        sample_size (`int`): sequences kept per fit, over all processes.
        seed (`int`): of clustering and fresh expert weights.
        patience (`int`): fits in a row a cluster may be absent or common before it loses its expert.
        ema_decay (`float`): weight of the past for one sequence (`update="ema"`).

    Metrics go to `state.log_history`, and with `callback.attach(trainer)` through `Trainer.log` to every integration:
    `cse/layer_<i>/<module>/{clusters, experts, share_routed, churn, clarity, agreement, unserved}` and `cse/seconds`.
    """

    def __init__(
        self,
        warmup: int | float = 0.1,
        recluster_every: int = 500,
        update: str = "recluster",
        algorithm: str = "kmeans",
        num_clusters: int = 6,
        common_share: float = 0.7,
        sample_size: int = 2048,
        seed: int = 0,
        patience: int = 3,
        ema_decay: float = 0.999,
    ):
        self.settings = ClusterSettings(algorithm, num_clusters, common_share, patience, seed)
        if isinstance(warmup, bool) or not isinstance(warmup, int | float) or warmup < 0:
            raise ValueError(f"warmup={warmup!r} is not allowed: it must be steps (int >= 0) or a share (0 to 1).")
        if isinstance(warmup, float) and not 0 < warmup < 1:
            raise ValueError(f"warmup={warmup!r} is not allowed: as a float it is a share of training, 0 to 1.")
        if not isinstance(recluster_every, int) or isinstance(recluster_every, bool) or recluster_every < 1:
            raise ValueError(f"recluster_every={recluster_every!r} is not allowed: it must be an int >= 1.")
        if update not in UPDATES:
            raise ValueError(f"update={update!r} is not allowed: it must be one of {list(UPDATES)}.")
        if not isinstance(sample_size, int) or sample_size < num_clusters:
            raise ValueError(
                f"sample_size={sample_size!r} is not allowed: it must be an int >= num_clusters={num_clusters}."
            )
        if not isinstance(ema_decay, int | float) or not 0 <= ema_decay <= 1:
            raise ValueError(f"ema_decay={ema_decay!r} is not allowed: it must be from 0 to 1.")
        self.warmup, self.recluster_every, self.update = warmup, recluster_every, update
        self.sample_size, self.ema_decay = sample_size, ema_decay
        self.memory = ClusterMemory()
        self.trainer: Trainer | None = None
        self.collector: FeatureCollector | None = None

    def attach(self, trainer: Trainer) -> "ClusterExpertsCallback":
        """Adds itself to a trainer, and logs through it from then on."""
        self.trainer = trainer
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        return self

    # ---- events, in the order in which they come -----------------------------------------------------------------

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model, **kwargs):
        self.detach()
        self.collector = FeatureCollector(model, local_capacity(self.sample_size))
        self.memory = ClusterMemory()
        routers = [module.router for module in self.collector.base.routed_modules().values()]
        self._check_sizes(routers)
        if state.global_step > 0:
            self._resume(args, state, clustered=any(router.num_clusters for router in routers))
        self.warmup_steps = math.ceil(self.warmup * state.max_steps) if isinstance(self.warmup, float) else self.warmup
        if self.warmup_steps >= state.max_steps:
            raise ValueError(
                f"warmup={self.warmup!r} is not allowed: it ends at step {self.warmup_steps}, but training has only "
                f"{state.max_steps} steps, so no expert would ever be switched on."
            )
        if self.warmup_steps == 0 and not all(router.num_clusters for router in routers):
            raise ValueError(
                "warmup=0 is not allowed for a model without clusters: fit them first (fit_experts), or let the model "
                "train densely for a while."
            )
        if self.warmup_steps == 0 and self.update == "ema" and not self.memory.discriminants:
            raise ValueError("warmup=0 is not allowed with update='ema': averages start from a fit in this run.")
        if self.trainer is None and args.report_to:
            logger.warning(
                f"report_to={args.report_to}: cluster metrics are only in the trainer state. Use "
                "ClusterExpertsCallback(...).attach(trainer) to log them to your integrations as well."
            )
        self.collector.attach()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if self.update == "ema" and self.memory.fits:
            self.collector.enabled = True
            return
        # Features drift while the model trains, so a fit sees the last batches before it and no older ones.
        sequences = args.train_batch_size * args.gradient_accumulation_steps * world_size()
        window = math.ceil(self.sample_size / sequences)
        fit = self._next_fit(state.global_step, state.max_steps)
        self.collector.enabled = fit is not None and fit - state.global_step <= window

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model, optimizer, **kwargs
    ):
        if self.update == "ema" and self.memory.fits:
            self._move()
        elif self._next_fit(state.global_step - 1, state.max_steps) == state.global_step:
            features = gather_features(self.collector.take())
            features = {site: part and part.detrended() for site, part in features.items()}
            metrics, filled = fit_layers(model, features, self.settings, self.memory)
            for site, slots in filled.items():
                clear_moments(optimizer, self.collector.base.routed_modules()[site].experts, slots)
            self._log(state, control, metrics)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if folder.is_dir():
            save_state(folder, rank(), state.global_step, self.memory, self.collector.stores)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self.detach()

    # ---- what they do --------------------------------------------------------------------------------------------

    def _check_sizes(self, routers: list[ClusterRouter]) -> None:
        """Says at the start what would otherwise fail at the end of warm-up."""
        most = min(router.max_clusters for router in routers)
        if self.settings.num_clusters > most:
            raise ValueError(
                f"num_clusters={self.settings.num_clusters} is not allowed: the routers of this model hold at most "
                f"cse_max_clusters={most}."
            )

    def detach(self) -> None:
        """Takes the hooks off the model."""
        if self.collector is not None:
            self.collector.detach()

    def _next_fit(self, step: int, max_steps: int) -> int | None:
        """The first step after `step` at whose end clusters are fitted; never the last one, because nothing would be
        left to train what changed."""
        if step < self.warmup_steps:
            return self.warmup_steps
        if self.update != "recluster":
            return None
        fit = self.warmup_steps + ((step - self.warmup_steps) // self.recluster_every + 1) * self.recluster_every
        return fit if fit < max_steps else None

    def _move(self) -> None:
        features = gather_features(self.collector.take())
        for site, module in self.collector.base.routed_modules().items():
            if features[site] is not None:
                self.memory.discriminants[site] = move_clusters(
                    module.router, self.memory.discriminants[site], features[site].embeddings, self.ema_decay
                )

    def _log(self, state: TrainerState, control: TrainerControl, metrics: dict[str, float]) -> None:
        if self.trainer is None:
            state.log_history.append({**metrics, "epoch": state.epoch, "step": state.global_step})
            return
        # Logging resets the wish to log, and with it the training loss that is due at the end of this very step.
        due = control.should_log
        self.trainer.log(metrics)
        control.should_log = due

    def _resume(self, args: TrainingArguments, state: TrainerState, clustered: bool) -> None:
        """Takes up the memory of the checkpoint the Trainer has just loaded."""
        places = [Path(args.output_dir) / f"checkpoint-{state.global_step}"]
        if isinstance(args.resume_from_checkpoint, str):
            places.insert(0, Path(args.resume_from_checkpoint))
        folder = next((place for place in places if (place / file_name(rank())).is_file()), None)
        if folder is not None:
            load_state(folder, rank(), state.global_step, self.memory, self.collector.stores)
        elif clustered or not any(place.is_dir() for place in places):
            raise ValueError(
                f"{file_name(rank())} was not found in {[str(place) for place in places]}, so clustering cannot go on "
                f"from step {state.global_step}. Name the checkpoint in TrainingArguments(resume_from_checkpoint=...) "
                "too, or resume from a complete one."
            )


__all__ = ["ClusterExpertsCallback"]
