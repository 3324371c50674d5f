# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of sdist and wheel: they hold what a user needs, and the README works with them outside the repository."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import modeling_cse


ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
# A data set as the README describes it, and a dense model.
BEFORE = """
import torch
from transformers import GPT2Config, GPT2LMHeadModel
ids = torch.randint(0, 2048, (128, 32), generator=torch.Generator().manual_seed(0))
train_dataset = [{"input_ids": row, "labels": row} for row in ids]
GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=32, n_head=2, vocab_size=2048)).save_pretrained("runs/mine/dense")
"""
AFTER = """
import modeling_cse
from modeling_cse.hub import write_model_card
write_model_card("card", config=model.config, results={}, recipe={}, data={})
print(modeling_cse.__file__)
"""


def test_every_room_is_packaged():
    rooms = {f"modeling_cse.{path.parent.name}" for path in (ROOT / "modeling_cse").glob("*/__init__.py")}
    shipped = {"modeling_cse", "modeling_cse.configuration", "modeling_cse.hub_cards"}
    shipped |= {f"modeling_cse.configuration.{name}" for name in ("accelerate", "recipes")}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == rooms | shipped


def test_versions_agree():
    cited = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert PROJECT["project"]["version"] == modeling_cse.__version__ == cited


def test_in_a_checkout_the_folders_are_those_at_the_top():
    assert modeling_cse.CONFIGURATION == ROOT / "configuration" and modeling_cse.HUB_CARDS == ROOT / "hub_cards"


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """What the source distribution unpacks to."""
    folder = tmp_path_factory.mktemp("sdist")
    for name in tracked():
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    build = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(folder)], cwd=folder / "source", check=True, capture_output=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return unpacked


def tracked() -> list[str]:
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in names.split("\0") if name and (ROOT / name).is_file()]


@pytest.mark.slow
def test_the_sdist_holds_all_that_is_tracked(sdist):
    assert [name for name in tracked() if not (sdist / name).is_file()] == []


@pytest.mark.slow
def test_the_readme_works_with_the_wheel_outside_of_the_repository(sdist, tmp_path):
    """With the wheel that the source distribution builds."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path / "dist"), str(sdist)]
    subprocess.run([*pip, *build], check=True)
    (wheel,) = (tmp_path / "dist").iterdir()
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = ("py.typed", "configuration/cse-gpt2-1m/config.json", "configuration/recipes/quickstart.yaml")
    for name in (*wanted, "configuration/accelerate/ddp_gpu.yaml", "hub_cards/model_card.md"):
        assert f"modeling_cse/{name}" in names
    assert {name.split("/")[0] for name in names} == {"modeling_cse", f"{wheel.name.rsplit('-', 3)[0]}.dist-info"}

    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    elsewhere.mkdir()
    readme = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    result = subprocess.run(
        [sys.executable, "-c", "\n".join([BEFORE, *readme, AFTER])],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert Path(result.stdout.strip().splitlines()[-1]).is_relative_to(site)
