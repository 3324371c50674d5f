# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""What every metric here shares: an `evaluate.Metric` without network and, by default, without files."""

import evaluate


class InMemoryMetric(evaluate.Metric):
    """
    `evaluate` keeps what `add_batch` brings in Arrow files of a shared folder. Here it stays in the memory of this
    instance, so instances and processes cannot meet; pass `keep_in_memory=False` (and an `experiment_id`) for the
    library's own gathering over processes. `compute` always empties the instance, also when it fails.
    """

    def __init__(self, config_name: str | None = None, keep_in_memory: bool = True, **kwargs) -> None:
        super().__init__(config_name=config_name, keep_in_memory=keep_in_memory, **kwargs)

    def _build_data_dir(self) -> str:
        # The base class makes a folder under the user's cache even when it will never write there.
        return "" if self.keep_in_memory else super()._build_data_dir()

    def compute(self, *, predictions=None, references=None, **kwargs) -> dict | None:
        """Compute over what is given and all that was added before, then forget it.

        Returns:
            The numbers, or `None` on the processes other than 0 of a distributed metric.

        Raises:
            ValueError: if nothing was given or added, or on impossible values.
        """
        if predictions is None and references is None and len(self) == 0:
            raise ValueError("`predictions` and `references` are empty: no sequence was given to `compute` or added")
        try:
            return super().compute(predictions=predictions, references=references, **kwargs)
        finally:
            # The base class leaves its buffer behind on an error, and would count those sequences again.
            if self.keep_in_memory:
                self.writer = self.buf_writer = self.data = None


__all__ = ["InMemoryMetric"]
