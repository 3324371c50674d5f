# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Every example runs from the first command of its own text, in a small size, and says what it promises."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
# Each example, and what it prints or leaves.
SAYS = {
    "compare.py": "worth it:",
    "finetune_with_peft.py": "after:",
    "look_at_experts.py": "no expert",
    "perplexity_by_domain.py": "of them to experts",
    "run_clm.py": "| legal |",
    "run_mlm.py": "| legal |",
    "serve_with_pipeline.py": "experts:",
    "share_on_the_hub.py": "modeling_cse_gpt2.py",
    "start_from_dense.py": "end: perplexity",
    "train_on_several_gpus.sh": "| legal |",
}


def test_every_example_is_run():
    names = {path.name for path in (ROOT / "examples").iterdir() if path.suffix in (".py", ".sh")}
    assert names - {"small_model.py"} == set(SAYS)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A folder that looks like a checkout, and keeps what the examples write out of this one."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("examples", "configuration", "hub_cards", "modeling_cse"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def first_command(path: Path) -> list[str]:
    """The first line of its text that calls it."""
    found = re.search(rf"^#? *((?:python|bash) examples/{re.escape(path.name)}.*)$", path.read_text(), re.MULTILINE)
    words = found[1].split("#")[0].split()
    return [sys.executable if word == "python" else word for word in words]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SAYS))
def test_it_runs_from_its_first_command(checkout, name):
    command = first_command(ROOT / "examples" / name)
    if name == "train_on_several_gpus.sh":
        command = command[:2]  # the small size names its own recipe
    environment = {**os.environ, "PYTHONPATH": str(checkout), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, "--smoke"], cwd=checkout, env=environment, capture_output=True, text=True, timeout=500
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert SAYS[name] in result.stdout
