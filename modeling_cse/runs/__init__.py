# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Whole runs, from arguments to report. The top storey: it knows every other one; needs the `train` extra."""

from .arguments import parse_arguments
from .comparison import compare
from .pretraining import BERT, GPT2, pretrain
from .report import write_run_card


__all__ = ["BERT", "GPT2", "compare", "parse_arguments", "pretrain", "write_run_card"]
