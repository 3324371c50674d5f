# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of the list of runs: a killed run goes on, no line is worked on twice, a failed one is not called done."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from longtail_tiny import EXAMPLES, build_corpus, losses, write_settings, write_text


# In place of train.py: notes that it has begun and ended, and behaves as its first argument says.
SCRIPT = """
import os, sys, time
kind, folder = sys.argv[1:3]
def note(word):
    with open(os.path.join(folder, kind + ".notes"), "a") as file:
        file.write(word + "\\n")
note("begins")
if kind.startswith("slow"):
    time.sleep(1)
if kind == "memory":
    note(os.environ["MALLOC_MMAP_THRESHOLD_"] + "," + os.environ["MALLOC_TRIM_THRESHOLD_"])
if kind == "fails":
    sys.exit("cannot be")
if kind == "killed" and not os.path.exists(os.path.join(folder, "again")):
    open(os.path.join(folder, "again"), "w").close()
    time.sleep(60)
note("ends")
"""


@pytest.fixture
def worker(tmp_path):
    """Starts a worker on the list of the folder, beside a train.py of the test's."""
    place = tmp_path / "example"
    place.mkdir()
    (place / "work.py").write_text((EXAMPLES / "work.py").read_text())
    (place / "train.py").write_text(SCRIPT)

    (place / "tasks.py").write_text(SCRIPT.replace("kind +", "'tasks_' + kind +"))

    def begin(*lines: str) -> subprocess.Popen:
        queue = tmp_path / "queue.txt"
        queue.write_text("\n".join(f"{line} {tmp_path}" for line in lines) + "\n# no run\n")
        command = [sys.executable, str(place / "work.py"), str(queue)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)

    return begin


def notes(folder: Path, kind: str) -> list[str]:
    path = folder / f"{kind}.notes"
    return path.read_text().split() if path.is_file() else []


def wait_for(found) -> None:
    deadline = time.monotonic() + 60
    while not found() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert found()


def test_two_workers_share_a_list_without_doing_a_line_twice(tmp_path, worker):
    kinds = [f"slow{number}" for number in range(4)]
    workers = [worker(*kinds), worker(*kinds)]
    said = [process.communicate(timeout=60)[0].splitlines() for process in workers]
    assert all(notes(tmp_path, kind) == ["begins", "ends"] for kind in kinds)
    assert all(said) and sum(map(len, said)) == 4
    assert worker(*kinds).communicate(timeout=60)[0] == ""


def test_a_failed_line_is_reported_and_tried_again_by_another_worker_only(tmp_path, worker):
    said = worker("fails", "good").communicate(timeout=60)[0]
    assert "failed with 1: fails" in said and "s: good" in said
    assert notes(tmp_path, "fails") == ["begins"]
    (done,) = (tmp_path / "queue").glob("*.done")
    assert done.read_text().startswith("good")
    assert any("cannot be" in log.read_text() for log in (tmp_path / "queue").glob("*.log"))
    worker("fails", "good").communicate(timeout=60)
    assert notes(tmp_path, "fails") == ["begins"] * 2 and notes(tmp_path, "good") == ["begins", "ends"]


def test_a_line_may_name_another_script(tmp_path, worker):
    said = worker("good", "tasks.py good").communicate(timeout=60)[0]
    assert "s: good" in said and "s: tasks.py good" in said
    assert notes(tmp_path, "good") == notes(tmp_path, "tasks_good") == ["begins", "ends"]


def test_runs_keep_the_memory_of_a_step(tmp_path, worker, monkeypatch):
    """glibc is told so, unless it has been told something else."""
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "65536")
    worker("memory").communicate(timeout=60)
    assert notes(tmp_path, "memory") == ["begins", f"{2**32},65536", "ends"]


def test_a_killed_worker_leaves_its_line_to_the_next(tmp_path, worker):
    first = worker("killed")
    wait_for((tmp_path / "again").exists)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    assert notes(tmp_path, "killed") == ["begins"]
    worker("killed").communicate(timeout=60)
    assert notes(tmp_path, "killed") == ["begins", "begins", "ends"]


@pytest.mark.slow
def test_a_real_run_that_was_killed_goes_on(tmp_path):
    """SIGKILL amid a training under work.py; the list is worked through all the same, to the unbroken run's losses."""
    build_corpus(write_text(tmp_path / "text"), tmp_path / "corpus")
    arms, size = write_settings(tmp_path, max_steps=200, save_steps=20)
    line = f"--arms {arms} --size {size} --corpus {tmp_path / 'corpus'} --arm cse --output {tmp_path}"
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parents[1]), "OMP_NUM_THREADS": "1"}

    def work(name: str) -> subprocess.Popen:
        queue = tmp_path / f"{name}.txt"
        queue.write_text(f"{line}/{name}\n")
        command = [sys.executable, str(EXAMPLES / "work.py"), str(queue)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, start_new_session=True)

    folders = [tmp_path / name / "tiny" / "corpus" / "cse-0" for name in ("whole", "killed")]
    work("whole").communicate(timeout=300)
    process = work("killed")
    wait_for(lambda: any((folders[1] / "checkpoints").glob("checkpoint-*/trainer_state.json")))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (folders[1] / "result.json").exists()
    work("killed").communicate(timeout=300)
    whole, killed = map(losses, folders)
    assert list(whole) == list(range(1, 201)) and whole == killed
    assert len(list((tmp_path / "killed").glob("*.done"))) == 1
