# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of the documents: links lead somewhere, the reference is that of the code, and what a page shows runs."""

import re
import runpy
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
    + [*(ROOT / "configuration").rglob("*.md"), *(ROOT / "hub_cards").glob("README.md"), *ROOT.glob("benchmarks/*.md")]
)
GUIDES = [ROOT / "docs" / "tour.md", *sorted((ROOT / "docs" / "how-to").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Scripts that train, and so have a small size.
SMALL = ("run_clm", "run_mlm", "start_from_dense", "finetune_with_peft")
# Commands of other programs that a page may name; they are not run.
FOREIGN = ("hf auth login", "make ", "source ", "pip install ")
# Too long for a guide, even in its small size: tests/examples runs it.
LONG = "examples/compare.py"


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def anchors(path: Path) -> set[str]:
    """The places of a page that a link may name, as GitHub spells them."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_lead_somewhere(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        place, _, anchor = target.partition("#")
        found = (path.parent / place).resolve() if place else path
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


def test_the_reference_is_that_of_the_code():
    found = runpy.run_path(str(ROOT / "docs" / "make_reference.py"))["reference"]()
    assert found == (ROOT / "docs" / "reference.md").read_text(encoding="utf-8"), "run python docs/make_reference.py"


def test_every_guide_is_in_the_index_and_every_page_of_code_is_run():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for path in GUIDES:
        assert f"({path.relative_to(ROOT / 'docs')})" in index
    inside = [path for path in PAGES if "```python" in path.read_text(encoding="utf-8")]
    # README.md: test_readme.py and test_packaging.py; docs/distributed.md: distributed/test_parallel_plans.py
    known = {name_of(path) for path in GUIDES} | {"README.md", "configuration/README.md", "docs/distributed.md"}
    assert {name_of(path) for path in inside} <= known | {"examples/data/README.md"}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A folder that looks like a checkout, with a small folder of text; what the pages make goes there."""
    from datasets import load_dataset

    folder = tmp_path_factory.mktemp("checkout")
    for name in ("examples", "configuration", "hub_cards", "modeling_cse"):
        (folder / name).symlink_to(ROOT / name)
    sample = load_dataset("json", data_files=str(ROOT / "examples" / "data" / "train.jsonl.gz"), split="train")
    for number, row in enumerate(sample.select(range(0, len(sample), 12))):
        place = "my_held_out_texts" if number % 12 == 5 else "my_texts"
        path = folder / place / row["domain"] / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(row["text"][:6000], encoding="utf-8")
    return folder


def run_command(command: str, checkout: Path, monkeypatch) -> None:
    """An example in this process, in its small size; what it leaves gets the name that the page goes on with."""
    words = command.split()
    if not (words[0] == "python" and words[1].startswith("examples/")):
        assert command.startswith(FOREIGN), f"{command}: neither an example nor a known command"
        return
    if words[1] == LONG:
        return
    arguments = [*words[1:], *["--smoke"] * Path(words[1]).stem.startswith(SMALL)]
    if "--repo" in arguments:  # the Hub is not at hand; test_pushing.py has a stand-in
        place = arguments.index("--repo")
        arguments = [each for each in arguments[:place] + arguments[place + 2 :] if each != "--private"]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.delitem(sys.modules, "small_model", raising=False)
    runpy.run_path(words[1], run_name="__main__")
    for made in (checkout / "runs").glob("*_smoke"):
        usual = made.with_name(made.name.removesuffix("_smoke"))
        if not usual.exists():
            usual.symlink_to(made)


@pytest.mark.slow
@pytest.mark.parametrize("path", GUIDES, ids=name_of)
def test_a_guide_runs_from_its_first_block_to_its_last(path, checkout, monkeypatch):
    monkeypatch.chdir(checkout)
    monkeypatch.syspath_prepend(str(checkout / "examples"))
    if path != GUIDES[0] and not (checkout / "runs" / "mine").exists():
        blocks = BLOCK.findall(GUIDES[0].read_text(encoding="utf-8"))
        run_command(blocks[0][1].strip(), checkout, monkeypatch)  # the model that the other pages start from
    names: dict = {}
    for kind, text in BLOCK.findall(path.read_text(encoding="utf-8")):
        assert kind in ("python", "bash"), kind
        if kind == "python":
            exec(compile(text, str(path), "exec"), names)
        else:
            for command in text.strip().splitlines():
                run_command(command, checkout, monkeypatch)


@pytest.mark.parametrize("page", ["configuration/README.md", "examples/data/README.md"])
def test_the_python_of_other_pages_runs(page, monkeypatch):
    monkeypatch.chdir(ROOT)  # they write nothing
    for kind, text in BLOCK.findall((ROOT / page).read_text(encoding="utf-8")):
        if kind == "python":
            exec(compile(text, page, "exec"), {})
