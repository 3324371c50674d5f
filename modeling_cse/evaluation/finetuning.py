# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Full fine-tuning for tasks, the same for every base model: the mean of the last hidden states and a linear layer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed
from transformers.modeling_outputs import SequenceClassifierOutput

from .embedding import check_routes, mean_states, pad
from .probe import Score


class MeanPoolClassifier(nn.Module):
    """
    A linear layer on the mean of a base model's last hidden states, as the probe reads them.

    Args:
        base: a model without its head. A Switch model is tuned without its balancing loss, routers of CSE stay as
            they are.
        num_classes: classes of a text; None for questions with choices, each of which gets one score.

    Raises:
        ValueError: the base's routes come with the data.
    """

    def __init__(self, base: PreTrainedModel, num_classes: int | None):
        super().__init__()
        check_routes(base.config)
        self.base, self.config = base, base.config
        self.score = nn.Linear(base.config.hidden_size, num_classes or 1)
        nn.init.normal_(self.score.weight, std=base.config.initializer_range)
        nn.init.zeros_(self.score.bias)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor | None = None
    ) -> SequenceClassifierOutput:
        """(B, T) token ids give logits (B, classes), those of questions (B, choices, T) give (B, choices); labels (B,)
        are classes or the indices of right choices, and give the mean cross entropy as loss."""
        pooled = mean_states(self.base, input_ids.flatten(0, -2), attention_mask.flatten(0, -2))
        logits = self.score(pooled)
        logits = logits.view(input_ids.shape[:2]) if input_ids.dim() == 3 else logits
        loss = None if labels is None else functional.cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


@dataclass(frozen=True)
class Examples:
    """
    Encoded rows.

    Fields:
        input_ids: token ids of each text; for questions one such list a choice, of equally many choices.
        labels: (N,) int64, classes or the indices of right choices.
    """

    input_ids: list
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict:
        return {"input_ids": self.input_ids[index], "labels": int(self.labels[index])}


@dataclass(frozen=True)
class FineTuning:
    """How it is done: AdamW at `Trainer`'s defaults but for what is here, a linear schedule after 10 % warm-up."""

    learning_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    epochs: int = 3
    batch_size: int = 16
    weight_decay: float = 0.01
    seed: int = 0
    bf16: bool = False


@dataclass(frozen=True)
class Tuned:
    """
    What the best model says.

    Fields:
        learning_rate: of the grid, the best on validation; of equals, the lowest.
        validation, test: (N,) int64 predictions.
    """

    learning_rate: float
    validation: np.ndarray
    test: np.ndarray


def fine_tune(
    load: Callable[[], PreTrainedModel],
    num_classes: int | None,
    train: Examples,
    validation: Examples,
    test: Examples,
    score: Score,
    settings: FineTuning | None = None,
) -> Tuned:
    """
    Tunes all parameters of a fresh model for each learning rate, and takes the best one on validation. Every base sees
    the same rows in the same order, from a head with the same weights. The models are given up.

    Args:
        load: makes the base model, every time anew.
        num_classes: as in `MeanPoolClassifier`.
        score: what is chosen by.

    Returns:
        The predictions of the best model.

    Raises:
        ValueError: no learning rate, or a base whose routes come with the data.
    """
    settings = settings or FineTuning()
    if not settings.learning_rates:
        raise ValueError("learning_rates=() is not allowed: it must hold at least one.")
    best: float | None = None
    chosen: Tuned  # the first one at least, as there is a learning rate
    for learning_rate in sorted(settings.learning_rates):
        base = load()
        set_seed(settings.seed)
        with TemporaryDirectory() as folder:
            trainer = _trainer(MeanPoolClassifier(base, num_classes), train, learning_rate, settings, folder)
            trainer.train()
            told = [trainer.predict(split).predictions.argmax(-1) for split in (validation, test)]
        reached = score(told[0], validation.labels)
        if best is None or reached > best:
            best, chosen = reached, Tuned(learning_rate, *told)
    return chosen


def _trainer(
    model: MeanPoolClassifier, train: Examples, learning_rate: float, settings: FineTuning, folder: str
) -> Trainer:
    arguments = TrainingArguments(
        output_dir=folder,
        learning_rate=learning_rate,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        weight_decay=settings.weight_decay,
        warmup_steps=0.1,
        seed=settings.seed,
        bf16=settings.bf16,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        label_names=["labels"],
    )
    token = model.config.pad_token_id or 0
    return Trainer(model, arguments, train_dataset=train, data_collator=lambda rows: _collate(rows, token))


def _collate(rows: Sequence[dict], token: int) -> dict[str, torch.Tensor]:
    labels = torch.tensor([row["labels"] for row in rows])
    sequences = [row["input_ids"] for row in rows]
    if isinstance(sequences[0][0], int):
        ids, mask = pad(sequences, token)
    else:
        ids, mask = pad([ids for choices in sequences for ids in choices], token)
        ids, mask = (tensor.view(len(rows), -1, tensor.shape[-1]) for tensor in (ids, mask))
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


__all__ = ["Examples", "FineTuning", "MeanPoolClassifier", "Tuned", "fine_tune"]
