# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""The Trainer callback: a dense warm-up, the first fit, and clusters kept up to date while the model trains."""

from functools import partial
from pathlib import Path
from typing import cast

from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..clustering import ClusterSettings, move_clusters
from ..clustering.settings import is_count, is_share
from ..dispatch_cse import RoutedModule, Site
from ..sharding_cse import is_sharded
from .ahead import can_read_ahead, read_ahead
from .checking import (
    check_late,
    check_layer_budget,
    check_model,
    check_sizes,
    check_until,
    check_warmup,
    is_joint,
    refuse_replicas,
)
from .checkpoints import check_sums
from .collecting import FeatureCollector, refuse_adapters, refuse_parallel_plans, routed_base_model
from .fitting import fit_layers
from .gathering import gather_features, gather_texts, local_capacity, rank, world_size
from .memory import ClusterMemory, load_state, save_state
from .moments import IdleSlots, start_moments
from .plan import FitPlan
from .saving import CheckpointSaves, find_state
from .schedule import FitSchedule
from .warmup import AutomaticWarmup, detach_what_is_left
from .zero import check_stage


logger = logging.get_logger(__name__)

EMA_DECAY = 0.999
LAYER_BUDGET = 2
# Samples that evidence is counted on: by more of them routes gain little (docs/evidence/longtail-trials.md).
EVIDENCE_SAMPLES = 3


class ClusterExpertsCallback(TrainerCallback):
    """
    Switches cluster-guided experts on during an ordinary `Trainer` run, and keeps their clusters.

    The model trains densely for a warm-up. Then clusters are found among the routing features of the last training
    batches (no second forward pass), long-tail clusters get an expert each, and every `recluster_every` they are
    found again, matched to the old ones so that an expert keeps its domain. Where the first sample would not be full,
    it is filled up with text that is read ahead, if routes look at no hidden state (`training.ahead`). A model that
    has clusters already keeps them until then; where nothing can be read ahead, until training has read a sample.

    Args:
        warmup (`int`, `float` or `"auto"`): dense steps, or share of training (below 1). 0: the model has clusters, or
            they are found before the first step, on text that is read ahead: training data with a length,
            `cse_routing="evidence"` or `"given"`, no `layer_budget`. `"auto"`: until the gradient consistency of rare
            sequences has passed its peak (`training.consistency`), at the latest at 30 % of training. Default: 0 for a
            model that has clusters, otherwise 0.1.
        recluster_every (`int` or `float`): from the first fit to the second, optimizer steps or share of training
            (below 1).
        update (`str`): `"recluster"`, `"ema"` (after the first fit centroids follow their members as moving averages,
            the paper's rule), `"recluster+ema"` (they do so between the fits) or `"frozen"` (the first fit stays).
        algorithm (`str`): `"kmeans"`, `"spherical"`, `"dbscan"`, `"hdbscan"`; `"text"`: k-means on the
            tokens of the texts, one clustering for all sites; or `"given"`: the `given_clusters` of the batches.
            Default: `"text"` for `cse_routing="evidence"`, otherwise `"kmeans"`.
        num_clusters (`int`, pair of `int`): clusters to look for, or a range of which the silhouette chooses. Default:
            6 where the algorithm wants a number, 10 for `"text"`.
        common_share (`float` or `"elbow"`): clusters are common, in the order of `common_by`, until together they hold
            this share; the others are long-tail. Default: 0.75 for `"text"`, otherwise 0.7.
        sample_size (`int`): sequences kept per fit, over all processes.
        evidence_size (`int`): sequences whose tokens are counted for `cse_routing="evidence"`: those of the sample,
            and the ones before them, each for the cluster that the sample's evidence gives it (or that came with it).
            Default: three times the sample.
        seed (`int`): of clustering and fresh expert weights.
        patience (`int`): fits in a row a cluster may be absent or common before it loses its expert.
        ema_decay (`float`): weight of the past for one sequence, where centroids move. Default 0.999.
        projection, min_cluster_share: see `ClusterSettings`.
        recluster_growth (`float`): each interval between fits is so many times the one before.
        recluster_until (`int` or `float`): no fit after this step, or share of training, so that experts settle.
        common_by (`str`): `"size"`: the largest clusters are common. `"separation"` (`"text"` only, and its default):
            those whose words are most like all text's.
        layer_budget (`int`): how many of the layers in `cse_layers` get experts: those with the largest cluster
            clarity at the end of the warm-up. The others become stock layers when training ends. Default: all layers
            of a list, 2 of `cse_layers="auto"`.

    Metrics go to `state.log_history`, and with `callback.attach(trainer)` through `Trainer.log` to every integration:
    `cse/layer_<i>/<module>/{clusters, experts, share_routed, churn, clarity, agreement, unserved, absent, released,
    largest_share}`, of clusters of texts `inherited` too (experts that begin as copies of the one that has served most
    of their texts), `cse/seconds`, and `cse/gradient_consistency` during an automatic warm-up. A cluster that loses
    its expert, and a fit that finds one cluster only, are warned of.
    """

    def __init__(
        self,
        warmup: int | float | str | None = None,
        recluster_every: int | float = 0.1,
        update: str = "recluster",
        algorithm: str | None = None,
        num_clusters: int | tuple[int, int] | None = None,
        common_share: float | str | None = None,
        sample_size: int = 2048,
        seed: int = 0,
        patience: int = 3,
        ema_decay: float | None = None,
        projection: int | str | None = "auto",
        min_cluster_share: float | None = None,
        recluster_growth: float = 1.0,
        recluster_until: int | float | None = None,
        layer_budget: int | None = None,
        common_by: str | None = None,
        evidence_size: int | None = None,
    ):
        self._asked = self.settings = ClusterSettings(
            algorithm, num_clusters, common_share, patience, seed, projection, min_cluster_share, common_by
        )
        times = warmup, recluster_every, recluster_growth, recluster_until
        self._asked_schedule = self.schedule = FitSchedule(*times, update)
        least = (self.settings.cluster_range or (1,))[0]
        check_sizes(sample_size, evidence_size, least)
        if ema_decay is not None and not self.schedule.moves:
            raise ValueError(f"ema_decay={ema_decay!r} is not allowed with update={update!r}, which moves nothing.")
        if ema_decay is not None and not is_share(ema_decay):
            raise ValueError(f"ema_decay={ema_decay!r} is not allowed: it must be from 0 to 1.")
        if layer_budget is not None and not is_count(layer_budget, 1):
            raise ValueError(f"layer_budget={layer_budget!r} is not allowed: it must be None or an int >= 1.")
        self.sample_size, self.evidence_size, self.layer_budget = sample_size, evidence_size, layer_budget
        self.ema_decay = EMA_DECAY if ema_decay is None else ema_decay
        self.memory = ClusterMemory()
        self.idle = IdleSlots()
        self.plan: FitPlan | None = None
        self.trainer: Trainer | None = None
        self.collector: FeatureCollector | None = None
        self.saves = CheckpointSaves()

    def attach(self, trainer: Trainer) -> "ClusterExpertsCallback":
        """Adds itself to a trainer, and logs through it from then on. A trainer takes one; another is a ValueError."""
        callbacks = trainer.callback_handler.callbacks
        if any(isinstance(each, ClusterExpertsCallback) and each is not self for each in callbacks):
            raise ValueError("trainer has another ClusterExpertsCallback, and takes one: remove_callback that first.")
        self.trainer = trainer
        if self not in callbacks:
            trainer.add_callback(self)
        return self

    # ---- events, in the order in which they come -----------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model, optimizer=None, **kwargs
    ):
        if self.trainer is not None and self.trainer.args is not args:
            raise ValueError(
                "trainer is another one than the callback was last attached to, to which its metrics would go: call "
                "attach(trainer) with the one that trains."
            )
        refuse_replicas(args)
        self.detach()
        self.plan, self.saves = None, CheckpointSaves()
        refuse_adapters(model)
        refuse_parallel_plans(model)
        self.base = routed_base_model(model)
        detach_what_is_left(self.base)
        self.settings = self._asked.resolve(self.base.config.cse_routing)
        check_model(self.base, self.settings, self.schedule, self.sample_size, self.evidence_size)
        check_layer_budget(self.base, self.layer_budget)
        check_stage(model)
        # with auto_find_batch_size the arguments keep the first guess
        self._rows = (state.train_batch_size if args.auto_find_batch_size else None) or args.train_batch_size
        capacity = local_capacity(self.sample_size, self._rows)
        room = max(capacity, self._rows * args.gradient_accumulation_steps) if self.schedule.moves else capacity
        texts = local_capacity(self._kept, self._rows)
        self.collector = FeatureCollector(model, room, with_ids=is_joint(self.base, self.settings), texts=texts)
        self.memory = ClusterMemory()
        dataloader = kwargs.get("train_dataloader")
        # of what was trained before, a checkpoint that was saved without this callback tells nothing
        begun_at = state.global_step if state.global_step > 0 and not self._resume(args, state) else 0
        ahead = state.global_step == begun_at and self._may_read_ahead(dataloader)
        self.plan = self._begin_plan(args, state, begun_at)
        self._begin_warmup(state, kwargs.get("processing_class"), ahead)
        if self.plan.first == 0 and self._has_clusters() and not self._may_read_ahead(dataloader):
            self._warn(self.plan.keep_until_sampled())
        if self.trainer is None and args.report_to:
            logger.warning(
                f"report_to={args.report_to}: cluster metrics are only in the trainer state. Use "
                "ClusterExpertsCallback(...).attach(trainer) to log them to your integrations as well."
            )
        self.collector.attach(self._sites())
        self.idle.take(self._modules(), optimizer)
        missing = self.plan.missing(self._has_clusters())
        if ahead and missing > 0:
            read_ahead(self.collector, model, dataloader, self._rows, missing, self.settings.seed)
        if self.plan.first_fit == 0 and not self._has_clusters():
            self._fit_and_log(args, state, control, optimizer)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self.saves.give_up()
        if self._planned.automatic is not None:
            self._planned.automatic.begin(state.global_step)
        # Features drift while the model trains, so a fit sees the last batches before it: of older ones no states.
        self._sampler.enabled = self._moves() or self._planned.is_near(state.global_step, self._kept)

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self.idle.restore()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model, optimizer, **kwargs
    ):
        if self._planned.automatic is not None:
            metrics = self._planned.automatic.end(state.global_step)
            if metrics:
                self._log(state, control, metrics)
        if self._planned.next_fit(state.global_step - 1) == state.global_step:
            self._fit_and_log(args, state, control, optimizer)
        elif self._moves():
            self._move()
        self.saves.begin(args, state, control, partial(self._save, state=state))

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self.saves.begin(args, state, control, partial(self._save, state=state))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self.saves.end(args, state, partial(self._save, state=state))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self.detach()
        self.saves.give_up()
        self.finish(self.base)

    def finish(self, model) -> None:
        """Turns layers that were not chosen into stock layers, as at the end of training; for one that was killed
        after its last step."""
        self.base = routed_base_model(model)
        if self._budget() is None or not any(module.router.num_clusters for module in self._modules()):
            return
        if any(is_sharded(parameter) for parameter in self.base.parameters()):
            logger.warning(
                "Layers without clusters stay layers with experts, because FSDP has spread them. Load the saved model "
                "and call drop_idle_layers() of its base model: no logit changes by it."
            )
        else:
            self.base.drop_idle_layers()

    # ---- what they do --------------------------------------------------------------------------------------------

    def _sites(self) -> list[Site]:
        """Where clusters are kept: all candidates before the first fit, afterwards those that have some."""
        modules = self.base.routed_modules()
        return [site for site, module in modules.items() if module.router.num_clusters] or list(modules)

    def _budget(self) -> int | None:
        """How many layers get experts; None for all."""
        if self.layer_budget is None and self.base.config.cse_layers == "auto":
            return LAYER_BUDGET
        return self.layer_budget

    @property
    def _sampler(self) -> FeatureCollector:
        """The collector, which is there once training has begun."""
        return cast(FeatureCollector, self.collector)

    @property
    def _planned(self) -> FitPlan:
        """The fits of the run, which are there once training has begun."""
        return cast(FitPlan, self.plan)

    def _modules(self) -> list[RoutedModule]:
        return list(self.base.routed_modules().values())

    def _has_clusters(self) -> bool:
        return any(module.router.num_clusters for module in self._modules())

    @property
    def _kept(self) -> int:
        """Sequences of which a fit reads anything."""
        if self.base.config.cse_routing != "evidence":
            return self.sample_size
        return self.evidence_size or EVIDENCE_SAMPLES * self.sample_size

    def _moves(self) -> bool:
        return self.schedule.moves and bool(self.memory.discriminants)

    def _may_read_ahead(self, dataloader) -> bool:
        """Whether a fit may look at text that training has not seen yet. Layers are chosen by states, that only
        training has; where there are clusters they are chosen."""
        chosen = self._has_clusters() or self._budget() is None
        return chosen and can_read_ahead(self.base, dataloader)

    def _begin_plan(self, args: TrainingArguments, state: TrainerState, begun_at: int) -> FitPlan:
        if state.global_step == 0:  # otherwise the checkpoint says it; averages start from a fit in this run
            self.memory.at_once = self._has_clusters() and self.schedule.update != "ema"
        self.schedule = self._asked_schedule.resolve(self.memory.at_once)
        sequences = self._rows * args.gradient_accumulation_steps * world_size()
        return FitPlan(self.schedule, state.max_steps, sequences, self.sample_size, begun_at)

    def _begin_warmup(self, state: TrainerState, tokenizer, ahead: bool) -> None:
        plan = self._planned
        if state.global_step > 0 and not self._has_clusters():
            check_late(state.global_step, state.max_steps)
        self.memory.at_once = plan.first == 0
        if plan.first is not None and self.memory.fits:
            plan.first = min(plan.first, state.global_step)  # over, also where training has become longer since
        if plan.first is not None:
            begins = ahead or self.memory.made_up is not None or self._has_clusters()
            check_warmup(self.schedule, plan.first, state.max_steps, begins, bool(self.memory.discriminants))
            plan.made_up = self.memory.made_up
            if plan.made_up is None and not self._has_clusters():
                self._warn(plan.make_up_for_first_fit(state.global_step, ahead))
                self.memory.made_up = plan.made_up
            return
        if self._has_clusters() and not self.memory.warmup:
            raise ValueError("warmup='auto' is not allowed for a model that has clusters: use warmup=0.")
        special, steps = getattr(tokenizer, "all_special_ids", ()), plan.steps_for(self.sample_size)
        plan.automatic = AutomaticWarmup(self.base, state.max_steps, plan.step_sequences, steps, special)
        check_until(self.schedule, plan.automatic.latest, state.max_steps)
        if self.memory.warmup:
            plan.automatic.load(self.memory.warmup)
        plan.automatic.warn_of_room(self.sample_size)
        plan.automatic.attach()

    @staticmethod
    def _warn(message: str | None) -> None:
        if message is not None:
            logger.warning(message)

    def detach(self) -> None:
        """Takes the hooks off the model."""
        if self.collector is not None:
            self.collector.detach()
        if self.plan is not None and self.plan.automatic is not None:
            self.plan.automatic.detach()

    def _fit_and_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer) -> None:
        self._log(state, control, self._fit(optimizer))
        for store in self._sampler.stores.values():
            store.newest()  # what was fitted moves nothing afterwards
        following = self._planned.next_fit(state.global_step)
        if following is None or following - state.global_step >= self._planned.steps_for(self._kept):
            self._sampler.clear()  # the next fit has a sample of its own

    def _fit(self, optimizer: Optimizer) -> dict[str, float]:
        sites, first = self._sites(), not self._has_clusters()
        features = gather_features({site: self._sampler.stores[site].as_it_is() for site in sites}, self.sample_size)
        texts = gather_texts(self._sampler.texts.as_it_is(), self._kept)
        budget = self._budget() if first else None
        metrics, filled = fit_layers(
            self.base, features, self.settings, self.memory, budget, drifting=True, texts=texts
        )
        for site, slots in filled.items():
            start_moments(optimizer, self.base.routed_modules()[site], slots)
        self.idle.take(self._modules(), optimizer)
        if first:
            self._sampler.attach(self._sites())
        return metrics

    def _move(self) -> None:
        newest = {site: self._sampler.stores[site].newest() for site in self.memory.discriminants}
        # not "part and ...": a process whose rows were all padding has features, but of no sequence
        newest = gather_features({s: None if part is None else part.without_tokens() for s, part in newest.items()})
        for site, features in newest.items():
            if features is not None:
                self.memory.discriminants[site] = move_clusters(
                    self.base.routed_modules()[site].router,
                    self.memory.discriminants[site],
                    features.embeddings,
                    self.ema_decay,
                )
        if not self.schedule.repeats:  # nothing will ever be fitted on what was collected
            self._sampler.clear()

    def _log(self, state: TrainerState, control: TrainerControl, metrics: dict[str, float]) -> None:
        if self.trainer is None:
            state.log_history.append({**metrics, "epoch": state.epoch, "step": state.global_step})
            return
        # Logging resets the wish to log, and with it the training loss that is due at the end of this very step.
        due = control.should_log
        self.trainer.log(metrics)
        control.should_log = due

    def _save(self, folder: Path, state: TrainerState) -> None:
        automatic = self._planned.automatic
        self.memory.warmup = {} if automatic is None else automatic.state()
        save_state(folder, rank(), state.global_step, self.memory, self._sampler.named_stores(), self.base)

    def _resume(self, args: TrainingArguments, state: TrainerState) -> bool:
        """Takes up the memory of the checkpoint the Trainer has just loaded, and says whether it has one."""
        folder = find_state(args, state, self.base)
        if folder is not None:
            load_state(folder, rank(), state.global_step, self.memory, self._sampler.named_stores(), self.base)
            check_sums(folder)
        return folder is not None


__all__ = ["ClusterExpertsCallback"]
