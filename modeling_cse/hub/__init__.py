# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Hub: what goes beside the weights when a checkpoint is published. Needs the `train` extra."""

from .callback import ModelCardCallback, hardware
from .cards import write_model_card
from .experts import COMMON, ExpertDescription, describe_experts


__all__ = ["COMMON", "ExpertDescription", "ModelCardCallback", "describe_experts", "hardware", "write_model_card"]
