# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""When, where and with what a run was made."""

import datetime
import os
import platform
from importlib.metadata import version
from typing import Any

import torch

import modeling_cse


PACKAGES = ("torch", "transformers", "datasets", "accelerate", "evaluate", "numpy", "scipy", "scikit-learn")


def origin() -> dict[str, Any]:
    """`date`, `machine` (the GPU, or how many cores of which processor) and `versions`, of now and here.

    A processor is told with the instructions that torch uses of it: generations of one make have the same name.
    """
    processor = torch.cpu.get_capabilities().get("cpu_name", platform.machine())
    cpu = f"{os.cpu_count()} CPU cores ({processor}, {torch.backends.cpu.get_cpu_capability()})"
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu,
        "versions": {"modeling_cse": modeling_cse.__version__, **{name: version(name) for name in PACKAGES}},
    }
