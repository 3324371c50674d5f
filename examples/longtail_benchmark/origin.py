# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""When, where and with what a run was made."""

import datetime
import hashlib
import os
import platform
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import modeling_cse


PACKAGES = ("torch", "transformers", "datasets", "accelerate", "evaluate", "numpy", "scipy", "scikit-learn")


def origin() -> dict[str, Any]:
    """`date`, `machine` (the GPU, or how many cores of which processor), `versions` and `code`, of now and here.

    A processor is told with the instructions that torch uses of it: generations of one make have the same name. `code`
    tells the package's files from others, as its version does not between two releases.
    """
    processor = torch.cpu.get_capabilities().get("cpu_name", platform.machine())
    cpu = f"{os.cpu_count()} CPU cores ({processor}, {torch.backends.cpu.get_cpu_capability()})"
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu,
        "versions": {"modeling_cse": modeling_cse.__version__, **{name: version(name) for name in PACKAGES}},
        "code": code(),
    }


@cache  # a run is of the files that it began with
def code() -> str:
    """A digest of the files of `modeling_cse`."""
    folder, found = Path(modeling_cse.__file__).parent, hashlib.blake2b(digest_size=4)
    for path in sorted(folder.rglob("*.py")):
        found.update(str(path.relative_to(folder).as_posix()).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()
