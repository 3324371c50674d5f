# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""The file of results: records by key, and the runs they come from."""

import datetime
import json
import os
import platform
import subprocess
from pathlib import Path

import torch
import transformers

from .measures import Options


# Records that agree in these are the same result, measured again.
KEY = ("shape", "measure", "contender", "device", "dtype", "batch", "length", "cache", "compiled", "allocator")


def complete(record: dict, shape: str, measure: str, options: Options, run: dict) -> dict:
    """A record with all that its run knows about it. `batch` and `length` are null where they mean nothing, as is
    `cache` except in decoding."""
    decoding = measure == "decoding"
    length = options.tokens if decoding else options.length
    return {
        "shape": shape,
        "measure": measure,
        "contender": record["contender"],
        "device": options.device,
        "dtype": options.dtype,
        "batch": record["batch"],
        "length": None if record["batch"] is None else length,
        "cache": options.cache if decoding else None,
        "compiled": options.compile,
        "allocator": run["allocator"],
        **record,
        "date": run["date"],
        "commit": run["commit"],
        "run": run["id"],
    }


def key_of(record: dict) -> tuple:
    return tuple(record[name] for name in KEY)


def describe_run(command: str, device: str) -> dict:
    """Where and with what a run was done."""
    now = datetime.datetime.now(datetime.UTC)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "id": f"{now:%Y%m%dT%H%M%S}-{os.getpid()}",
        "date": now.date().isoformat(),
        "commit": commit,
        "command": command,
        "allocator": allocator(),
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "accelerator": None if device == "cpu" else torch.cuda.get_device_name(device),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def allocator() -> str | None:
    """What the environment tells glibc's allocator, None for its defaults. By default every tensor above 32 MiB is
    given back to the system and faulted in again page by page."""
    told = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("MALLOC_")]
    return " ".join(told) or None


def processor() -> str:
    """The model of the processor, as the system names it."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def read(path: Path) -> dict:
    """Results so far, `{"runs": [], "records": []}` where there are none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"runs": [], "records": []}


def merge(results: dict, run: dict, records: list[dict]) -> dict:
    """Results in which new records stand for those of the same key; runs that no record comes from any more are left
    out."""
    newest = {key_of(record): record for record in [*results["records"], *records]}
    used = {record["run"] for record in newest.values()}
    runs = [each for each in results["runs"] if each["id"] != run["id"]] + [run]
    return {"runs": [each for each in runs if each["id"] in used], "records": list(newest.values())}


def write(path: Path, results: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
