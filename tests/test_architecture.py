# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""The arrows between the rooms of the package, read from its imports."""

import ast
from pathlib import Path

import pytest


PACKAGE = Path(__file__).resolve().parents[1] / "modeling_cse"
GROUND = sorted(path.name for path in PACKAGE.glob("*_cse*.py"))
# What each room may import of the package, itself apart. The ground floor is open to all but data.
ALLOWED = {
    "clustering": {"ground"},
    "training": {"ground", "clustering", "data"},
    "data": set(),
    "evaluation": {"ground", "clustering", "training", "data"},
    "analysis": {"ground", "clustering", "training", "data"},
    "hub": {"ground", "clustering", "training", "data", "evaluation", "analysis"},
    "runs": {"ground", "clustering", "training", "data", "evaluation", "analysis", "hub"},
}
ROOMS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> list[tuple[int, str, list[str]]]:
    """(level, module, names) of every import in a file, also of those inside functions."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(0, alias.name, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or "", [alias.name for alias in node.names]))
    return found


def rooms_used(path: Path) -> set[str]:
    """The rooms of the package that a file imports."""
    place = ("modeling_cse", *path.relative_to(PACKAGE).parts[:-1])
    used = set()
    for level, module, names in imports(path):
        whole = [*place[: len(place) - level + 1], *filter(None, module.split("."))] if level else module.split(".")
        if whole[0] != "modeling_cse":
            continue
        for part in whole[1:2] or names:
            used.add(part if part in ROOMS else "ground")
    return used


def test_the_ground_floor_is_there():
    assert {"configuration_cse.py", "modeling_cse_gpt2.py", "modeling_cse_bert.py", "routing_cse.py"} <= set(GROUND)
    assert sorted(path.name for path in PACKAGE.glob("*.py")) == sorted([*GROUND, "__init__.py", "__main__.py"])


@pytest.mark.parametrize("name", GROUND)
def test_files_that_travel_need_nothing_but_each_other(name):
    """Only `from .x import y` is followed when code is copied beside a checkpoint."""
    for level, module, names in imports(PACKAGE / name):
        if level:
            assert level == 1 and f"{module}.py" in GROUND, f"{name}: from {'.' * level}{module} import {names}"
        else:
            standard = {"collections", "dataclasses", "functools", "inspect", "threading", "typing"}
            allowed = {"torch", "transformers", "huggingface_hub", *standard}
            assert module.split(".")[0] in allowed, f"{name}: {module}"
            assert not module.startswith("huggingface_hub") or module == "huggingface_hub.dataclasses"


def test_every_room_has_its_arrows_written_down():
    assert set(ROOMS) <= set(ALLOWED)


@pytest.mark.parametrize("path", [p for p in FILES if p.parent != PACKAGE], ids=lambda p: str(p.relative_to(PACKAGE)))
def test_arrows_point_down(path):
    room = path.relative_to(PACKAGE).parts[0]
    assert rooms_used(path) - {room} <= ALLOWED[room]


def test_arrows_are_really_read():
    assert "ground" in rooms_used(PACKAGE / "clustering" / "fitting.py")
    assert "clustering" in rooms_used(PACKAGE / "training" / "callback.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_start_with_the_licence_and_stay_short(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# Copyright 2026 The modeling_cse authors.") and len(lines) < 400
