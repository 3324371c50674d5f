# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Full fine-tuning for tasks, the same for every base model: the mean of the last hidden states and a linear layer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import Subset
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.trainer_pt_utils import get_length_grouped_indices

from .embedding import check_routes, embed, mean_states, pad
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

    def predict(self, input_ids: Sequence, batch_size: int, bf16: bool = False) -> np.ndarray:
        """Token ids as in `Examples` give (N,) int64, classes or the indices of choices."""
        questions = not isinstance(input_ids[0][0], int)
        texts = [ids for choices in input_ids for ids in choices] if questions else input_ids
        states = embed(self.base, texts, batch_size=batch_size, bf16=bf16)
        with torch.no_grad():
            logits = self.score(torch.from_numpy(states).to(self.score.weight.device))
        return logits.view(len(input_ids), -1).argmax(-1).cpu().numpy()


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

    def lengths(self) -> list[int]:
        """Tokens of each row; of a question those of its longest choice."""
        return [len(ids) if isinstance(ids[0], int) else max(map(len, ids)) for ids in self.input_ids]


@dataclass(frozen=True)
class FineTuning:
    """How it is done: AdamW at `Trainer`'s defaults but for what is here, a linear schedule after 10 % warm-up,
    batches of rows of like length."""

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
    rows = _ordered(train, settings)
    best: float | None = None
    chosen: Tuned  # the first one at least, as there is a learning rate
    for learning_rate in sorted(settings.learning_rates):
        base = load()
        set_seed(settings.seed)
        model = MeanPoolClassifier(base, num_classes)
        _train(model, rows, learning_rate, settings)
        told = model.predict(validation.input_ids, settings.batch_size, settings.bf16)
        reached = score(told, validation.labels)
        if best is None or reached > best:
            best = reached
            chosen = Tuned(learning_rate, told, model.predict(test.input_ids, settings.batch_size, settings.bf16))
    return chosen


def _ordered(train: Examples, settings: FineTuning) -> Subset:
    """The rows of all epochs, one behind the other. A sampler would draw from the generator that dropout draws from
    too, and bases of different kinds could see different batches."""
    generator, lengths = torch.Generator().manual_seed(settings.seed), train.lengths()
    epochs = [
        get_length_grouped_indices(lengths, settings.batch_size, generator=generator) for _ in range(settings.epochs)
    ]
    return Subset(train, [index for epoch in epochs for index in epoch])


def _train(model: MeanPoolClassifier, rows: Subset, learning_rate: float, settings: FineTuning) -> None:
    token = model.config.pad_token_id or 0
    with TemporaryDirectory() as folder:
        arguments = _arguments(learning_rate, settings, folder)
        Trainer(model, arguments, train_dataset=rows, data_collator=lambda batch: _collate(batch, token)).train()


def _arguments(learning_rate: float, settings: FineTuning, folder: str) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        learning_rate=learning_rate,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        per_device_train_batch_size=settings.batch_size,
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
