# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""The card of a run that the Trainer makes: in place of its own draft, and beside the final model."""

import copy
import math
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import ModelCard
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from ..sharding_cse import is_sharded
from ..training import ClusterExpertsCallback, routed_base_model
from .cards import RECIPE, THIS_MODEL, TRAINING_TIME, hours, template_path, write_model_card
from .experts import check_dataset, describe_experts


logger = logging.get_logger(__name__)


class ModelCardCallback(TrainerCallback):
    """
    Writes the model card into the run's folder when training ends, and whenever the Trainer would write its draft
    (`trainer.create_model_card`, `trainer.push_to_hub`): with the results of the last evaluation, the recipe, the
    machine and, given texts, what each expert is for.

        ModelCardCallback(texts=train_dataset, license="mit").attach(trainer)

    Args:
        texts: rows for `describe_experts`. None: the card says nothing of single experts.
        tokenizer: of those rows. None: the Trainer's `processing_class`.
        data: domain to what it was made of, as in `write_model_card`.
        results: run name to {domain: validation perplexity} of other models, "dense" for the twin without experts.
        base_model: what the model was grown from, a Hub id or a path.
        license, language, template: as in `write_model_card`.
        domain_column: of `texts`.
    """

    def __init__(
        self,
        *,
        texts: Sequence[Mapping[str, Any]] | None = None,
        tokenizer=None,
        data: dict | None = None,
        results: dict[str, dict[str, float]] | None = None,
        base_model: str | None = None,
        license: str | None = None,
        language: str | list[str] | None = None,
        template: str | Path | None = None,
        domain_column: str = "domain",
    ):
        if results and THIS_MODEL in results:
            raise ValueError(f"results has the run {THIS_MODEL!r}, this model: its figures are those of the Trainer.")
        self.texts, self.tokenizer, self.domain_column = texts, tokenizer, domain_column
        self.data, self.results, self.base_model = data or {}, results or {}, base_model
        self.license, self.language, self.template = license, language, template
        self.trainer: Trainer | None = None
        self._resumed = False

    def attach(self, trainer: Trainer) -> "ModelCardCallback":
        """Adds itself to a trainer, whose `create_model_card` it takes over."""
        self.trainer = trainer
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        trainer.create_model_card = self.create_model_card
        return self

    def on_train_begin(self, args: TrainingArguments, state, control, **kwargs):
        if self.trainer is None:
            raise ValueError("ModelCardCallback knows no trainer: call ModelCardCallback(...).attach(trainer).")
        # here, because an error at the end of training would take what was trained along
        template_path(self.template)
        if self.texts is not None:
            check_dataset(self.texts)
            self._names()
        self._resumed = state.global_step > 0  # the Trainer's clock knows this process alone

    def on_train_end(self, args: TrainingArguments, state, control, **kwargs):
        # The experts are settled when the callback that finds them has seen the end of training too.
        callbacks = self._attached.callback_handler.callbacks
        for callback in callbacks[callbacks.index(self) + 1 :]:
            if isinstance(callback, ClusterExpertsCallback):
                callback.finish(kwargs["model"])
        self.create_model_card()

    def create_model_card(
        self,
        language: str | list[str] | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> ModelCard | None:
        """
        Writes `README.md` into the Trainer's output folder, on the main process only.

        Args: those of `Trainer.create_model_card`; what is given wins over what the callback was made with. `tasks` is
        not read: the task of these models follows from their class.

        Returns:
            The card; None on other processes.
        """
        trainer = self._attached
        if not trainer.is_world_process_zero():
            return None
        model = trainer.accelerator.unwrap_model(trainer.model)
        config = copy.deepcopy(model.config)
        config.architectures = [self._class_name]  # which saving the model would write there
        named = zip_longest(_list(dataset) or _list(dataset_tags), _list(dataset_args), fillvalue="training text")
        own, token_mean = self._perplexities()
        return write_model_card(
            trainer.args.output_dir,
            config=config,
            results={THIS_MODEL: own, **self.results} if own else {},
            token_mean=token_mean,
            recipe=self._recipe(),
            data={**self.data, **dict(named)},
            base_model=finetuned_from or self.base_model,
            license=license or self.license,
            language=language or self.language,
            template=self.template,
            repo_id=trainer.hub_model_id,
            name=model_name,
            experts=self._experts(model),
            tags=_list(tags),
            datasets=_list(dataset_tags),
        )

    @property
    def _attached(self) -> Trainer:
        """The trainer, which is there from `attach` on."""
        return cast(Trainer, self.trainer)

    @property
    def _class_name(self) -> str:
        """Of the model that is trained, whatever wraps it."""
        parts = self._attached.model.modules()
        return next(type(part).__name__ for part in parts if isinstance(part, PreTrainedModel))

    def _perplexities(self) -> tuple[dict[str, float], bool]:
        """Those of the last evaluation of this model by data set, and whether all are of means over tokens. Of the
        loss of other heads, and of one that holds the next sentence's, there is no perplexity."""
        own: dict[str, float] = {}
        over_tokens: dict[str, bool] = {}
        if not self._class_name.endswith(("ForCausalLM", "LMHeadModel", "ForMaskedLM")):
            return {}, True
        for entry in self._evaluations():
            for key, value in entry.items():
                found = re.fullmatch(r"eval_(?:(.+)_)?loss", key)
                if found:
                    exact = entry.get(key.removesuffix("loss") + "perplexity")
                    name = found[1] or "all"
                    own[name], over_tokens[name] = _exp(value) if exact is None else exact, exact is not None
        return own, all(over_tokens.values())

    def _evaluations(self) -> list[dict[str, float]]:
        """The log, without evaluations of models that the Trainer has left for its best one."""
        state, log = self._attached.state, self._attached.state.log_history
        end = max((place for place, entry in enumerate(log) if "train_runtime" in entry), default=len(log))
        if not self._attached.args.load_best_model_at_end or state.best_global_step is None:
            return log
        return [entry for entry in log[:end] if entry.get("step") == state.best_global_step] + log[end:]

    def _recipe(self) -> dict[str, Any]:
        trainer, state = self._attached, self._attached.state
        recipe = {name: getattr(trainer.args, name) for name in RECIPE}
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ClusterExpertsCallback):
                recipe["clusters"] = {**asdict(callback.schedule), **asdict(callback.settings)}
                recipe["clusters"]["sample_size"] = callback.sample_size
        recipe["steps taken"] = state.global_step
        seconds = [entry["train_runtime"] for entry in state.log_history if "train_runtime" in entry]
        if seconds and not self._resumed:
            recipe[TRAINING_TIME] = hours(seconds[-1])
        if state.total_flos:
            recipe["floating point operations"] = f"{state.total_flos:.3g} (the Trainer's estimate)"
        recipe["hardware"] = hardware(trainer.args)
        return recipe

    def _experts(self, model) -> list:
        if self.texts is None:
            return []
        base = routed_base_model(model) if model.config.cse_layer_indices else None
        if base is None or base.config.cse_routing == "given":
            why = "no layer has any" if base is None else "with cse_routing='given' texts do not tell their clusters"
            logger.warning(f"The card says nothing of single experts: {why}.")
            return []
        if any(is_sharded(parameter) for parameter in model.parameters()):
            logger.warning("The card says nothing of single experts: FSDP has spread them over the processes.")
            return []
        if not any(module.router.num_clusters for module in base.routed_modules().values()):
            logger.warning("The card says nothing of single experts: the model has no clusters yet.")
            return []
        return describe_experts(model, self._names(), self.texts, domain_column=self.domain_column)

    def _names(self):
        """The tokenizer of the texts.

        Raises:
            ValueError: there is none.
        """
        tokenizer = self.tokenizer or self._attached.processing_class
        if tokenizer is None:
            raise ValueError("tokenizer=None is not allowed with texts: the Trainer has no processing_class either.")
        return tokenizer


def hardware(args: TrainingArguments) -> str:
    """The machines of a run in words: how many processes, and what each of them computes on."""
    device = args.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    if device.type == "cpu":
        name = f"CPU ({platform.machine()}), {torch.get_num_threads()} threads"
    return f"{args.world_size} x {name}"


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def _list(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])
