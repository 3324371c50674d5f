# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""
Writes docs/reference.md from the docstrings of the public names.

    python docs/make_reference.py
"""

import inspect
import re
from importlib import import_module
from pathlib import Path
from types import ModuleType

from transformers import PreTrainedConfig, PreTrainedModel


PAGE = Path(__file__).parent / "reference.md"
ROOMS = ("training", "data", "evaluation", "analysis", "hub", "runs")
EVALUATION = ("embedding", "probe", "finetuning", "switch")  # what wants more than its room's other modules
MODULES = (
    "modeling_cse",
    *(f"modeling_cse.{room}" for room in ROOMS),
    *(f"modeling_cse.evaluation.{module}" for module in EVALUATION),
)
HEAD = """# Reference

*Public names and what their docstrings say; made by `python docs/make_reference.py`, and compared by a test.*
"""


def reference() -> str:
    """The text of the page."""
    shown: set[str] = set()
    return "\n".join([HEAD, *(part for name in MODULES for part in _module(import_module(name), shown))])


def _module(module: ModuleType, shown: set[str]) -> list[str]:
    """The names of a module that no module before it has."""
    parts = [f"## {module.__name__}\n", f"{_first_line(module)}\n"]
    for name in sorted(set(module.__all__) - shown):
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            parts += _entry(name, value)
    known = sorted(shown & set(module.__all__))
    shown |= set(module.__all__)
    if known:
        parts.append(f"Also here, described above: {', '.join(f'`{name}`' for name in known)}.\n")
    constants = [name for name in sorted(module.__all__) if not callable(getattr(module, name))]
    if constants:
        parts.append(f"Constants: {', '.join(f'`{name}`' for name in constants)}.\n")
    return parts


def _entry(name: str, value) -> list[str]:
    if inspect.isclass(value) and issubclass(value, PreTrainedModel):
        stock = next(base for base in value.__mro__ if base.__module__.startswith("transformers.models."))
        flag = "cse_layers" if name.startswith("CSE") else "switch_layers"
        text = f"`{stock.__name__}` of transformers, with experts in the layers of `{flag}`."
        return [f"### `{name}`\n", f"{text}\n"]
    if inspect.isclass(value) and issubclass(value, PreTrainedConfig):
        return [f"### `{name}`\n", _block(inspect.getdoc(value) or "")]
    parts = [f"### `{name}`\n", _block(f"{name}{_signature(value)}\n\n{inspect.getdoc(value) or ''}".rstrip())]
    if inspect.isclass(value):
        for method, function in sorted(vars(value).items()):
            if not method.startswith(("_", "on_")) and inspect.isfunction(function) and function.__doc__:
                parts.append(_block(f"{name}.{method}{_signature(function)}\n\n{inspect.getdoc(function)}"))
    return parts


def _signature(value) -> str:
    try:
        signature = str(inspect.signature(value))
    except ValueError:
        return ""
    return re.sub(r" at 0x[0-9a-f]+", "", signature)


def _first_line(value) -> str:
    return (inspect.getdoc(value) or "").split("\n\n")[0].replace("\n", " ")


def _block(text: str) -> str:
    return f"```text\n{text}\n```\n"


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
