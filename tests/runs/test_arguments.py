# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Recipes and flags."""

from pathlib import Path

import pytest

from modeling_cse.runs.arguments import parse_arguments, steps_or_share


RECIPES = Path(__file__).parents[2] / "configuration" / "recipes"


def recipe(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_parse(path):
    model, data, clusters, training = parse_arguments([str(path)])
    assert Path(model.config_name).name in {p.name for p in RECIPES.parent.iterdir()}
    assert data.domain_column == "domain" and clusters.compare_with_dense and training.output_dir.startswith("runs/")


def test_flags_win_over_the_recipe_and_the_recipe_over_defaults(tmp_path):
    path = recipe(tmp_path, "num_clusters: 9\nlearning_rate: 1e-3\nblock_size: 64\n")
    _, data, clusters, training = parse_arguments([path, "--num_clusters", "3", "--use_cpu"])
    assert (clusters.num_clusters, data.block_size, training.learning_rate) == (3, 64, 1e-3)
    assert clusters.recluster_every == 500


def test_negative_layers_are_numbers_not_flags(tmp_path):
    model, *_ = parse_arguments(["--cse_layers", "-2", "-1", "--use_cpu"])
    assert model.cse_layers == [-2, -1]
    assert parse_arguments([recipe(tmp_path, "cse_layers: []\nuse_cpu: true\n")])[0].cse_layers == []


def test_max_seq_length_is_block_size_to_users_of_run_mlm():
    assert parse_arguments(["--max_seq_length", "64", "--use_cpu"])[1].block_size == 64


@pytest.mark.parametrize(
    "text, complaint", [("learning_rat: 1\n", "learning_rat"), ("- 1\n", "mapping"), (None, "does not exist")]
)
def test_wrong_recipes_are_refused(tmp_path, text, complaint):
    path = str(tmp_path / "missing.yaml") if text is None else recipe(tmp_path, text)
    with pytest.raises(ValueError, match=complaint):
        parse_arguments([path])


@pytest.mark.parametrize("given, meant", [("200", 200), ("0.1", 0.1), (7, 7), (0.25, 0.25)])
def test_warmup_is_steps_or_a_share(given, meant):
    result = steps_or_share(given)
    assert result == meant and type(result) is type(meant)


def test_warmup_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="warmup='soon'"):
        steps_or_share("soon")
