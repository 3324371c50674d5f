# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""What a run refuses: settings of which one would silently be passed over, or fail long after its start."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedModel, TrainingArguments

from .arguments import ModelArguments


def check_arguments(model: ModelArguments, args: TrainingArguments, causal: bool, folders: list[Path]) -> None:
    """
    Refuses settings that do not go together, before anything is read.

    Args:
        model, args: of the run.
        causal: whether it models language from left to right.
        folders: of its models, in which its checkpoints lie.

    Raises:
        ValueError: one setting puts another out of force, or the run cannot do what one asks for.
    """
    for name in ("config_overrides", "tokenizer_vocab_size"):
        if model.model_name_or_path is not None and getattr(model, name) is not None:
            raise ValueError(
                f"{name}={getattr(model, name)!r} is not allowed with model_name_or_path: a checkpoint has its own."
            )
    if model.tokenizer_name is not None and model.tokenizer_vocab_size is not None:
        raise ValueError(
            f"tokenizer_vocab_size={model.tokenizer_vocab_size} is not allowed with tokenizer_name: choose one."
        )
    if args.max_steps <= 0 and args.num_train_epochs <= 0:
        raise ValueError(
            f"num_train_epochs={args.num_train_epochs} is not allowed with max_steps={args.max_steps}: one of the two "
            "must be above 0."
        )
    if not causal and args.dataloader_persistent_workers:
        raise ValueError(
            "dataloader_persistent_workers=True is not allowed for a masked language model: masks change with the "
            "epoch, of which such workers are not told."
        )
    if args.do_eval and not args.do_train and args.eval_strategy == "no":
        raise ValueError(
            "do_eval=True is not allowed without do_train: this script trains, and evaluates when it has. Leave it "
            "out, or set do_train; eval_strategy says when to evaluate in between."
        )
    asked = args.resume_from_checkpoint
    if asked in (None, "last"):
        return
    own = [folder.resolve() for folder in folders]
    if not Path(asked).is_dir() or Path(asked).resolve().parent not in own:
        raise ValueError(
            f"resume_from_checkpoint={asked!r} is not allowed: it must be 'last' or an existing checkpoint of this "
            f"run, like {str(folders[0] / 'checkpoint-100')!r}."
        )


@contextmanager
def called(setting: str, argument: str) -> Iterator[None]:
    """
    Lets an error of the library name the setting of the run that it is about.

    Args:
        setting: as the user knows it.
        argument: what the function within calls it; an error that begins otherwise stays as it is.
    """
    try:
        yield
    except ValueError as error:
        if not str(error).startswith(f"{argument}="):
            raise
        raise ValueError(setting + str(error).removeprefix(argument)) from error


def check_best_metric(args: TrainingArguments, domains: Collection[str]) -> None:
    """
    Whether evaluation measures what the best checkpoint is told by; the Trainer finds out after training up to it.

    Args:
        args: of the run.
        domains: of the validation text; "all" alone where it has none.

    Raises:
        ValueError: a metric that there is not, or of which more is worse.
    """
    asked = args.metric_for_best_model
    if asked is None or args.eval_strategy == "no":
        return
    places = [""] if list(domains) == ["all"] else [f"{domain}_" for domain in domains]
    measured = [f"eval_{place}{name}" for place in places for name in ("loss", "perplexity")]
    if (asked if asked.startswith("eval_") else f"eval_{asked}") not in measured:
        raise ValueError(f"metric_for_best_model={asked!r} is not allowed: it must be one of {measured}.")
    if args.greater_is_better:
        raise ValueError(
            f"greater_is_better=True is not allowed with metric_for_best_model={asked!r}: less is better, so it must "
            "be False."
        )


def check_twin(model: PreTrainedModel, source: str | None) -> None:
    """
    Whether a dense twin would start from all that a model knows.

    Raises:
        ValueError: the model has clusters, so that text goes through experts that the twin has not.
    """
    if any(module.router.num_clusters for module in model.base_model.routed_modules().values()):
        raise ValueError(
            f"compare_with_dense=True is not allowed with model_name_or_path={source!r}, whose routers hold clusters: "
            "the dense twin would lack what its experts have learned. Start from a dense checkpoint, or leave "
            "compare_with_dense out."
        )
