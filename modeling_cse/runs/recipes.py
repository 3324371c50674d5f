# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Recipes: YAML files of the settings that a command line takes too."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from .. import CONFIGURATION


# Flags that are text because a word may stand in place of a number.
NUMBERS: dict[str, set[type]] = {
    **dict.fromkeys(("warmup", "recluster_every", "recluster_until", "common_share", "projection"), {int, float}),
    "cse_layers": {int},
}


def read_recipe(path: Path, groups: Sequence[type]) -> dict[str, Any]:
    """
    Args:
        path: of the recipe.
        groups: dataclasses that the settings are fields of.

    Returns:
        Settings by name. Text stays text, which argparse converts, since YAML reads 1e-3 as text.

    Raises:
        ValueError: the recipe does not exist, is no mapping, names a setting that there is not, or gives one a value
            of a type that it does not take.
    """
    if not path.is_file():
        raise ValueError(f"the recipe {str(path)!r} does not exist.")
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"the recipe {str(path)!r} cannot be read: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"the recipe {str(path)!r} is not allowed: it must be a mapping of settings to values.")
    hints: dict[str, Any] = {}
    for group in groups:
        own = get_type_hints(group)
        hints |= {field.name: own[field.name] for field in fields(group) if field.init}
    unknown = sorted(map(str, set(recipe) - set(hints)))
    if unknown:
        raise ValueError(f"the recipe {str(path)!r} has unknown settings {unknown}: see the script's --help.")
    for name, value in recipe.items():
        kinds = _kinds(hints[name]) | NUMBERS.get(name, set())
        if not _fits(value, kinds):
            words = " or ".join(sorted("null" if kind is NoneType else kind.__name__ for kind in kinds))
            hint = " YAML takes no, yes, numbers and dates for text only within quotes." if str in kinds else ""
            raise ValueError(
                f"{name}={value!r} is not allowed in the recipe {str(path)!r}: it must be {words}.{hint}"
            )
    return recipe


def find_config(config_name: str | None) -> str | None:
    """Recipes name the shipped configurations from the root of the repository; they may be called from elsewhere, and
    by their names alone."""
    if config_name is None or Path(config_name).is_dir():
        return config_name
    shipped = [place / config_name for place in (CONFIGURATION.parent, CONFIGURATION)]
    return next((str(place) for place in shipped if (place / "config.json").is_file()), config_name)


def _kinds(hint: Any) -> set[type]:
    """The plain types of an annotation. A flag with several values takes one without a list too."""
    origin = get_origin(hint)
    if origin in (list, dict):
        return {origin, *(kind for inner in get_args(hint) for kind in _kinds(inner) if origin is list)}
    if origin is None:
        return {hint if isinstance(hint, type) else type(hint)}  # the latter within Literal
    return {kind for inner in get_args(hint) for kind in _kinds(inner)}


def _fits(value: Any, kinds: set[type]) -> bool:
    if isinstance(value, str):
        return _reads(value, kinds)
    if isinstance(value, list):
        return list in kinds and all(_fits(inner, kinds - {list, NoneType}) for inner in value)
    if isinstance(value, bool):
        return bool in kinds
    if isinstance(value, int):
        return bool(kinds & {int, float})
    return type(value) in kinds


def _reads(value: str, kinds: set[type]) -> bool:
    """Whether argparse can make a number of a text, where there is to be one. Of words it knows which are allowed."""
    if not kinds <= {int, float, list, NoneType}:
        return True
    try:
        (float if float in kinds else int)(value)
    except ValueError:
        return False
    return True
