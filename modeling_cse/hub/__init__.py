# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Hub: what goes beside the weights when a checkpoint is published. A leaf package; needs the `train` extra."""

from .cards import write_model_card


__all__ = ["write_model_card"]
