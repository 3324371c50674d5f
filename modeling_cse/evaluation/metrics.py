# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""How well classes are told, as `evaluate` metrics around scikit-learn's functions."""

from collections.abc import Sequence

import datasets
import evaluate
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from .metric import InMemoryMetric


_INPUTS = """
Args:
    predictions: the class of each row (int64).
    references: the right class of each row (int64).
"""


class _ClassMetric(InMemoryMetric):
    """Classes against classes; the first line of a subclass's docstring describes it."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=str(self.__doc__).strip().splitlines()[0],
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float | int]:
        if not len(references):
            raise ValueError("`references` has 0 rows, allowed is at least 1")
        return self._score(references, predictions)


class Accuracy(_ClassMetric):
    """The share of rows whose class is told: {"accuracy", "rows"}."""

    def _score(self, references: Sequence[int], predictions: Sequence[int]) -> dict[str, float | int]:
        return {"accuracy": float(accuracy_score(references, predictions)), "rows": len(references)}


class MatthewsCorrelation(_ClassMetric):
    """Correlation of told and right classes, the metric of CoLA: {"matthews_correlation"}, from -1 to 1.

    0 where all rows are told or are of one class.
    """

    def _score(self, references: Sequence[int], predictions: Sequence[int]) -> dict[str, float]:
        return {"matthews_correlation": float(matthews_corrcoef(references, predictions))}


class MacroF1(_ClassMetric):
    """The mean over classes of each one's F1, whatever its share of the rows: {"macro_f1"}.

    Classes are those that are right, or told, for at least one row; one that is never told has F1 0.
    """

    def _score(self, references: Sequence[int], predictions: Sequence[int]) -> dict[str, float]:
        return {"macro_f1": float(f1_score(references, predictions, average="macro", zero_division=0))}


__all__ = ["Accuracy", "MacroF1", "MatthewsCorrelation"]
