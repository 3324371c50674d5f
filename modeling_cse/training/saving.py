# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""When clustering state goes into the Trainer's checkpoints, and where it is found again."""

import json
from collections.abc import Callable
from pathlib import Path

from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from .checkpoints import begin_checkpoint, seal_checkpoint
from .gathering import rank
from .memory import file_name


logger = logging.get_logger(__name__)

Write = Callable[[Path], None]


class CheckpointSaves:
    """
    Clustering state is written first where the Trainer is about to save: before `on_save` it deletes older
    checkpoints, and a kill in between must leave a complete one. With `save_only_model` none is written: it holds
    training text, and whoever saves only the model may want to share the checkpoint.
    """

    def __init__(self):
        self.begun: Path | None = None

    def begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, write: Write) -> None:
        """Where a save is due, writes what it is to hold of clustering."""
        folder = checkpoint_folder(args, state)
        if not control.should_save or state.is_hyper_param_search or self.begun == folder:
            return
        if args.should_save:
            begin_checkpoint(folder)
        self._write(args, folder, write)
        self.begun = folder

    def end(self, args: TrainingArguments, state: TrainerState, write: Write) -> None:
        """After the Trainer has saved."""
        folder = checkpoint_folder(args, state)
        if state.is_hyper_param_search or not folder.is_dir():  # of a trial the Trainer keeps no checkpoint there
            return
        if self.begun != folder:  # the wish to save came later: from `save_strategy="best"`, or another callback
            self._write(args, folder, write)
        self.begun = None
        if args.should_save:
            seal_checkpoint(folder)

    def give_up(self) -> None:
        """Takes back what was begun where no checkpoint followed, because another callback did not want it: a folder
        of that name would be taken for one."""
        if self.begun is not None:
            (self.begun / file_name(rank())).unlink(missing_ok=True)
            if self.begun.is_dir() and not any(self.begun.iterdir()):
                self.begun.rmdir()
            self.begun = None

    @staticmethod
    def _write(args: TrainingArguments, folder: Path, write: Write) -> None:
        if args.save_only_model:
            (folder / file_name(rank())).unlink(missing_ok=True)  # an earlier run's
        else:
            write(folder)


def find_state(args: TrainingArguments, state: TrainerState, base: nn.Module) -> Path | None:
    """
    The checkpoint that the Trainer has just loaded into a model, if it holds clustering state.

    Returns:
        Its folder; None for a checkpoint of a dense warm-up that was saved without the callback.

    Raises:
        ValueError: the model's routers hold what no clustering writes, there is no clustering state for clusters that
            the model has, or what is found is of another run.
    """
    modules = base.routed_modules()
    flaw = base.routing_flaw()
    if flaw is not None:
        raise ValueError(f"the weights of the checkpoint of step {state.global_step} were cut or edited: {flaw}.")
    if state.global_step >= state.max_steps:
        logger.warning(
            f"the checkpoint is of step {state.global_step}, and training ends at {state.max_steps}: nothing is "
            "left to do, but the Trainer may make one more step. Load the model from the checkpoint instead."
        )
    places = [checkpoint_folder(args, state)]
    if isinstance(args.resume_from_checkpoint, str):
        places.insert(0, Path(args.resume_from_checkpoint))
    folder = next((place for place in places if (place / file_name(rank())).is_file()), None)
    clustered = any(module.router.num_clusters for module in modules.values())
    if folder is None and (clustered or not any(place.is_dir() for place in places)):
        raise ValueError(
            f"{file_name(rank())} was not found in {[str(place) for place in places]}, so clustering cannot go on "
            f"from step {state.global_step}. Name the checkpoint in TrainingArguments(resume_from_checkpoint=...) "
            "too, or resume from a complete one (save_only_model leaves it out)."
        )
    if folder is not None and _is_of_another_run(folder, state):
        raise ValueError(
            f"{str(folder)!r} holds another run than the checkpoint of step {state.global_step} that the Trainer has "
            "loaded: name that one in TrainingArguments(resume_from_checkpoint=...) too, or another output_dir."
        )
    return folder


def _is_of_another_run(folder: Path, state: TrainerState) -> bool:
    """Whether the log of a checkpoint is not the one that the Trainer goes on with: it tells callbacks no folder."""
    path = folder / TRAINER_STATE_NAME
    if not path.is_file():
        return False
    try:
        known = json.loads(path.read_text(encoding="utf-8"))["log_history"]
    except (ValueError, KeyError):
        return True
    return json.dumps(known) != json.dumps(state.log_history[: len(known)])  # others may have logged by now


def checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


__all__ = ["CheckpointSaves", "checkpoint_folder", "find_state"]
