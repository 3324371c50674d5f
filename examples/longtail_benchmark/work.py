# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Works through a list of runs, each in a process of its own; several workers may share one list.

    python examples/longtail_benchmark/work.py runs/longtail/queue.txt

A line of the list is what one calls train.py with: `--arm cse_wide_counted --seed 0`; or another script of this folder
by name, and what it is called with: `tasks.py --model ...`. A worker takes the first line that is neither done nor in
work. A run that was killed goes on from its last checkpoint when its line is taken again. Lines may be
added, or moved, while workers run; `--follow` waits for more instead of ending.
"""

import argparse
import fcntl
import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path


HERE = Path(__file__).parent
# By default glibc returns the buffers of a step to the system and fetches them again in the next one, page by page:
# about a tenth of the time of a step in bf16. Losses are the same.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**32)}


def read_lines(path: Path) -> list[str]:
    """The runs of a list, without comments."""
    lines = [line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line]


def command_of(line: str) -> list[str]:
    """What a line stands for."""
    words = line.split()
    script, rest = (words[0], words[1:]) if words[0].endswith(".py") else ("train.py", words)
    return [sys.executable, str(HERE / script), *rest]


def work(queue: Path, follow: bool) -> None:
    """Runs what is left of the list. A failed run is noted beside the list and not tried again by this worker."""
    places = queue.with_suffix("")
    places.mkdir(exist_ok=True)
    failed: set[str] = set()
    while True:
        line = next((each for each in read_lines(queue) if each not in failed and _run(each, places, failed)), None)
        if line is None:
            if not follow:
                return
            time.sleep(10)


def _run(line: str, places: Path, failed: set[str]) -> bool:
    """Whether this worker has run the line; not if it is done, or in work elsewhere."""
    name = hashlib.blake2b(line.encode(), digest_size=6).hexdigest()
    done = places / f"{name}.done"
    if done.is_file():
        return False
    with (places / f"{name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a killed worker leaves no lock behind
        except BlockingIOError:
            return False
        if done.is_file():
            return False
        start = time.time()
        with (places / f"{name}.log").open("a") as log:
            log.write(f"# {line}\n")
            log.flush()
            environment = {**KEEP_MEMORY, **os.environ}
            code = subprocess.run(command_of(line), stdout=log, stderr=subprocess.STDOUT, env=environment).returncode
        if code:
            failed.add(line)
            print(f"failed with {code}: {line} ({places / name}.log)", flush=True)
        else:
            done.write_text(f"{line}\n{time.time() - start:.0f} s\n")
            print(f"{time.time() - start:.0f} s: {line}", flush=True)
    return True


def main() -> None:
    """Works from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("queue", type=Path)
    parser.add_argument("--follow", action="store_true")
    parser.add_argument("--core", type=int, help="keep to this core")
    arguments = parser.parse_args()
    if arguments.core is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {arguments.core})
    work(arguments.queue, arguments.follow)


if __name__ == "__main__":
    main()
