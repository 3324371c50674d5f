# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""The annotations that `py.typed` promises."""

from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]


def test_the_package_is_typed_as_it_says(monkeypatch):
    api = pytest.importorskip("mypy.api")
    monkeypatch.chdir(ROOT)
    told, failed, status = api.run(["--config-file", "pyproject.toml"])
    assert status == 0, told + failed
    assert (ROOT / "modeling_cse" / "py.typed").is_file()
