# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""
How random inputs fared: tests count each example under one name, and a session can write the counts down.

    RANDOM_INPUTS_JSON=benchmarks/results/random_inputs.json \\
        python -m pytest tests/fed --hypothesis-profile=thorough --hypothesis-seed=0
"""

import datetime
import json
import os
import platform
from collections import Counter, defaultdict
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from hypothesis import HealthCheck, settings


COUNTS: dict[str, Counter] = defaultdict(Counter)
FILE = "RANDOM_INPUTS_JSON"
PACKAGES = ("torch", "transformers", "huggingface_hub", "scikit-learn", "hypothesis")
# Models take their time, and some inputs are refused.
UNCHECKED = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


def examples(share: float) -> settings:
    """Settings of a test with this share of the examples that the profile names (tests/conftest.py)."""
    return settings(max_examples=max(round(share * settings().max_examples), 2), suppress_health_check=UNCHECKED)


def count(test: str, outcome: str) -> None:
    COUNTS[test][outcome] += 1


def write_counts(arguments: Iterable[str]) -> None:
    """Writes what was counted to the file that the environment names, if any. Counts of other tests stay there."""
    if FILE not in os.environ:
        return
    path = Path(os.environ[FILE])
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    counted = {test: {"examples": found.total(), **dict(sorted(found.items()))} for test, found in COUNTS.items()}
    record |= {
        "command": " ".join(["python -m pytest", *arguments]),
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} CPU cores",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "outcomes": record.get("outcomes", {}) | counted,
    }
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def names(error: Exception, *words: str) -> bool:
    """Whether a refusal is a `ValueError`, or the error of a strict dataclass, that names one of the words."""
    return isinstance(error, ValueError | StrictDataclassError) and any(word in str(error) for word in words)
