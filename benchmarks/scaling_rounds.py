# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Rounds: how the points of a curve are timed beside each other, and what memory a call takes at its peak."""

import ctypes
import gc
import sys
import time
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np


def interleaved(
    calls: dict[Hashable, Callable[[], Any]], rounds: int, warm: bool = True
) -> dict[Hashable, list[float]]:
    """Seconds of each call, a number a round. Every call runs once to warm up, if `warm`; then all of them run in each
    round, so that what else the machine does meets all points of a curve alike."""
    for call in calls.values() if warm else ():
        call()
    seconds: dict[Hashable, list[float]] = {key: [] for key in calls}
    for _ in range(rounds):
        for key, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[key].append(time.perf_counter() - start)
    return seconds


def quartiles(values: list[float] | np.ndarray, unit: float = 1.0) -> dict[str, float]:
    """Median and quartiles of values times `unit`, to four digits."""
    lower, median, upper = np.percentile(np.asarray(values) * unit, [25, 50, 75])
    return {name: float(f"{x:.4g}") for name, x in (("median", median), ("lower", lower), ("upper", upper))}


def peak_bytes(call: Callable[[], Any]) -> int | None:
    """
    Bytes of memory that a call takes at its peak, beyond what is resident when it starts, of all libraries alike. None
    where Linux and glibc do not tell. Resolution: pages, and some 100 kB of the kernel's own counting. Run the call
    once before: the first one also loads libraries.
    """
    if not sys.platform.startswith("linux"):
        return None
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what is free but kept would hide what the call takes
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the high-water mark starts again from here
        before = _status("VmRSS")
        call()
        return max(_status("VmHWM") - before, 0)
    except (OSError, AttributeError):
        return None


def _status(name: str) -> int:
    """A figure of the process in bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))
