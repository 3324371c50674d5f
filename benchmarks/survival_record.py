# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""What a record of `benchmarks.kills` and `benchmarks.long_run` says besides its results: command, date, versions."""

import datetime
import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any


RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "scikit-learn", "numpy")


def write_record(path: Path, module: str, results: dict[str, Any]) -> None:
    """Writes results as JSON, with where they come from."""
    record = {
        "command": " ".join(["python -m", module, *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} CPU cores",
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        **results,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
