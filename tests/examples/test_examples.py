# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Every example runs from the first command of its own text, in a small size, and says what it promises."""

import json
import os
import re
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from datasets import Dataset
from tiny import dense_model, tiny_model

from modeling_cse.data import train_tokenizer


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
    """A folder that looks like a checkout: what the examples write goes there."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("examples", "configuration", "hub_cards", "modeling_cse"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def first_command(path: Path) -> list[str]:
    """The first line of its text that calls it."""
    found = re.search(rf"^#? *((?:python|bash) examples/{re.escape(path.name)}.*)$", path.read_text(), re.MULTILINE)
    return found[1].split("#")[0].split()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(name for name in SAYS if name.endswith(".py")))
def test_it_runs_from_its_first_command(checkout, name, monkeypatch, capsys):
    """In this process, which has loaded the libraries already."""
    _, script, *arguments = first_command(ROOT / "examples" / name)
    monkeypatch.chdir(checkout)
    monkeypatch.setattr(sys, "argv", [script, *arguments, "--smoke"])
    monkeypatch.syspath_prepend(str(checkout / "examples"))
    monkeypatch.delitem(sys.modules, "small_model", raising=False)  # it knows the place that it was loaded from
    runpy.run_path(script, run_name="__main__")
    assert SAYS[name] in capsys.readouterr().out


def test_a_smoke_run_leaves_the_models_of_a_real_one_alone(monkeypatch):
    parse = runpy.run_path(str(ROOT / "examples" / "start_from_dense.py"))["parse"]
    places = []
    for flags in ([], ["--smoke"], ["--smoke", "--output_dir", "runs/mine"]):
        monkeypatch.setattr(sys, "argv", ["start_from_dense.py", *flags])
        places.append(parse().output_dir.as_posix())
    assert places == ["runs/start_from_dense", "runs/start_from_dense_smoke", "runs/mine_smoke"]


@pytest.mark.parametrize("make", [partial(tiny_model, cse_layers=[]), dense_model], ids=["twin", "stock"])
def test_a_dense_model_is_measured_and_writes_without_a_word_of_experts(tmp_path, monkeypatch, capsys, make):
    rows = [{"text": f"the court held that claim {n} fails", "domain": ("law", "other")[n % 2]} for n in range(20)]
    tokenizer = train_tokenizer(Dataset.from_list(rows)["text"], kind="gpt2", vocab_size=300)
    make("gpt2", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    flags = {"perplexity_by_domain.py": ["--data", str(data), "--block_size", "16"], "serve_with_pipeline.py": ["the"]}
    for name, words in flags.items():
        monkeypatch.setattr(sys, "argv", [name, "--model", str(tmp_path / "dense"), *words])
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    printed = capsys.readouterr().out
    assert "law " in printed and "other " in printed and "\nthe" in printed and "experts" not in printed


def test_several_processes_start_in_the_folder_of_the_call(tmp_path):
    """Paths of one's own are relative to it; those of the repository are absolute."""
    environment = {**os.environ, "PYTHON": "echo", "PROCESSES": "3"}
    for arguments in (["my.yaml", "--train_file", "texts"], ["--smoke"]):
        command = ["bash", os.path.relpath(ROOT / "examples" / "train_on_several_gpus.sh", tmp_path), *arguments]
        said = subprocess.check_output(command, cwd=tmp_path, env=environment, text=True)
        paths = [part for part in said.split() if part.startswith("/")]
        assert str(ROOT / "examples" / "run_clm.py") in paths and all(Path(path).is_file() for path in paths)
        assert not re.search(r" (configuration|examples)/", said)
        assert len(paths) == (5 if arguments == ["--smoke"] else 2)


@pytest.mark.slow
def test_several_processes_start_from_the_command_in_the_script(checkout):
    environment = {**os.environ, "PYTHONPATH": str(checkout), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = ["bash", "examples/train_on_several_gpus.sh", "--smoke"]
    result = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr[-3000:]
    assert SAYS["train_on_several_gpus.sh"] in result.stdout
