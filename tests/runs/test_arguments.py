# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Recipes and flags."""

import logging
from pathlib import Path

import pytest
import torch

from modeling_cse import ClusterExpertsCallback
from modeling_cse.runs import arguments
from modeling_cse.runs.arguments import has_bf16, parse_arguments, steps_or_share
from modeling_cse.runs.recipes import find_config


RECIPES = Path(__file__).parents[2] / "configuration" / "recipes"


def recipe(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_parse(path):
    model, data, clusters, training = parse_arguments([str(path)])
    if path.stem == "compare":  # its script sets text and model
        assert clusters.compare_with_dense and model.config_name is None and data.train_file is None
        return
    assert Path(model.config_name).name in {p.name for p in RECIPES.parent.iterdir()}
    assert clusters.compare_with_dense and training.output_dir.startswith("runs/")
    if path.stem == "own_text":  # its user names the text
        assert data.train_file is None and data.domain_column is None
    else:
        assert data.train_file and data.domain_column == "domain"


def test_flags_win_over_the_recipe_and_the_recipe_over_defaults(tmp_path):
    path = recipe(tmp_path, "num_clusters: 9\nlearning_rate: 1e-3\nblock_size: 64\n")
    _, data, clusters, training = parse_arguments([path, "--num_clusters", "3", "--use_cpu"])
    assert (clusters.num_clusters, data.block_size, training.learning_rate) == (3, 64, 1e-3)
    assert clusters.callback_arguments(seed=0)["recluster_every"] == 0.1


@pytest.mark.parametrize("found", [True, False])
def test_bf16_auto_asks_the_machine(tmp_path, monkeypatch, found):
    asked = []
    monkeypatch.setattr(arguments, "has_bf16", lambda use_cpu: asked.append(use_cpu) or found)
    path = recipe(tmp_path, "bf16: auto\nuse_cpu: true\n")
    assert parse_arguments([path])[3].bf16 is found
    assert parse_arguments([recipe(tmp_path, "bf16: auto\n"), "--use_cpu"])[3].bf16 is found
    assert parse_arguments([recipe(tmp_path, "bf16: auto\n"), "--use_cpu=true"])[3].bf16 is found
    assert set(asked) == {True}
    assert not parse_arguments([path, "--bf16", "false"])[3].bf16


def test_bf16_auto_asks_of_the_device_that_is_meant(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(arguments, "has_bf16", lambda use_cpu: asked.append(use_cpu))
    parse_arguments([recipe(tmp_path, "bf16: auto\nuse_cpu: true\n"), "--use_cpu", "false"])
    parse_arguments([recipe(tmp_path, "bf16: auto\n")])
    assert asked == [False, False]


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("native", [True, False])
def test_a_gpu_has_bf16_if_it_is_there_and_says_so(monkeypatch, there, native):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native or including_emulation)
    assert has_bf16(use_cpu=False) is (there and native)


def test_what_a_flag_names_takes_the_place_of_the_recipes(tmp_path):
    own_text = str(RECIPES / "own_text.yaml")
    model = parse_arguments([own_text, "--tokenizer_name", "somewhere"])[0]
    assert (model.tokenizer_name, model.tokenizer_vocab_size) == ("somewhere", None) and model.config_name
    model = parse_arguments([own_text, "--model_name_or_path", "there"])[0]
    assert (model.model_name_or_path, model.config_name, model.tokenizer_vocab_size) == ("there", None, None)
    both = parse_arguments([own_text, "--tokenizer_name", "somewhere", "--tokenizer_vocab_size", "9"])[0]
    assert both.tokenizer_vocab_size == 9  # two flags: refused when the run begins


@pytest.mark.parametrize("name", ["avx512_bf16", "amx_bf16", "bf16", None])
def test_a_processor_has_bf16_if_it_says_so(monkeypatch, name):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "amx_bf16": False, name: True})
    assert has_bf16(use_cpu=True) is (name is not None)


def test_bf16_without_instructions_is_warned_of(monkeypatch, caplog):
    monkeypatch.setattr(arguments, "has_bf16", lambda use_cpu: False)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    parse_arguments(["--bf16", "--use_cpu"])
    assert "no instructions for bf16" in caplog.text
    caplog.clear()
    parse_arguments(["--use_cpu"])
    assert not caplog.text


def test_negative_layers_are_numbers_not_flags(tmp_path):
    model, *_ = parse_arguments(["--cse_layers", "-2", "-1", "--use_cpu"])
    assert model.cse_layers == [-2, -1]
    assert parse_arguments([recipe(tmp_path, "cse_layers: []\nuse_cpu: true\n")])[0].cse_layers == []


def test_a_share_of_the_text_need_not_be_whole(tmp_path):
    assert parse_arguments(["--validation_split_percentage", "2.5", "--use_cpu"])[1].validation_split_percentage == 2.5


def test_max_seq_length_is_block_size_to_users_of_run_mlm():
    assert parse_arguments(["--max_seq_length", "64", "--use_cpu"])[1].block_size == 64


@pytest.mark.parametrize(
    "text, complaint", [("learning_rat: 1\n", "learning_rat"), ("- 1\n", "mapping"), (None, "does not exist")]
)
def test_wrong_recipes_are_refused(tmp_path, text, complaint):
    path = str(tmp_path / "missing.yaml") if text is None else recipe(tmp_path, text)
    with pytest.raises(ValueError, match=complaint):
        parse_arguments([path])


@pytest.mark.parametrize(
    "text",
    [
        "max_steps: 4.0",
        "max_steps: null",
        "max_steps: many",
        "max_steps: true",
        "max_steps: [4]",
        "learning_rate: fast",
        "block_size: {a: 1}",
        "use_cpu: 1",
        "prompt: 5",
        "output_dir: 2026-01-01",
        "eval_strategy: no",
        "train_file: [1]",
        "num_clusters: [2, 8.5]",
        "cse_layers: [1.5]",
        "warmup: true",
        "help: true",
        "smoke: true",
    ],
)
def test_values_of_another_type_are_refused_by_name(tmp_path, text):
    name = text.split(":")[0]
    with pytest.raises(ValueError, match=f"{name}=.* is not allowed in the recipe|unknown settings .*'{name}'"):
        parse_arguments([recipe(tmp_path, text + "\n")])


def test_values_that_can_be_read_are_taken(tmp_path):
    text = "max_steps: '4'\nlearning_rate: 1\neval_strategy: 'no'\ntoken: null\ncse_layers: [1, -1]\n"
    text += "lr_scheduler_kwargs: {a: 1}\ntrain_file: one.txt\nreport_to: none\nlogging_steps: 5\nuse_cpu: true\n"
    model, data, _, training = parse_arguments([recipe(tmp_path, text)])
    assert (training.max_steps, training.learning_rate, training.logging_steps) == (4, 1, 5)
    assert (model.cse_layers, data.train_file, training.lr_scheduler_kwargs) == ([1, -1], "one.txt", {"a": 1})


@pytest.mark.parametrize("given, meant", [("200", 200), ("0.1", 0.1), (7, 7), (0.25, 0.25)])
def test_warmup_is_steps_or_a_share(given, meant):
    result = steps_or_share(given)
    assert result == meant and type(result) is type(meant)


def test_warmup_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="warmup='soon'"):
        steps_or_share("soon")


def test_layers_are_numbers_or_auto(tmp_path):
    assert parse_arguments(["--cse_layers", "auto", "--use_cpu"])[0].cse_layers == "auto"
    assert parse_arguments([recipe(tmp_path, "cse_layers: auto\nuse_cpu: true\n")])[0].cse_layers == "auto"
    with pytest.raises(ValueError, match="cse_layers=.*'top'.* is not allowed"):
        parse_arguments(["--cse_layers", "top", "--use_cpu"])


@pytest.mark.parametrize(
    ("text", "name", "meant"),
    [
        ("num_clusters: 4\n", "num_clusters", 4),
        ("num_clusters: [2, 8]\n", "num_clusters", (2, 8)),
        ("", "num_clusters", None),
        ("common_share: elbow\n", "common_share", "elbow"),
        ("common_share: 0.6\n", "common_share", 0.6),
        ("projection: none\n", "projection", None),
        ("projection: 16\n", "projection", 16),
        ("projection: null\n", "projection", None),
        ("common_share: 1e-1\n", "common_share", 0.1),
        ("warmup: auto\n", "warmup", "auto"),
        ("warmup: 0\n", "warmup", 0),
        ("", "warmup", None),
        ("recluster_until: '0.8'\n", "recluster_until", 0.8),
        ("recluster_until: '80'\n", "recluster_until", 80),
        ("control: oracle\nnum_clusters: 4\nupdate: ema\n", "algorithm", "given"),
        ("control: oracle\nnum_clusters: 4\nupdate: ema\n", "update", "frozen"),
        ("control: oracle\nnum_clusters: 4\nupdate: ema\n", "num_clusters", None),
    ],
)
def test_cluster_arguments_are_what_the_callback_takes(tmp_path, text, name, meant):
    arguments = parse_arguments([recipe(tmp_path, text + "use_cpu: true\n")])[2].callback_arguments(seed=3)
    assert arguments[name] == meant and type(arguments[name]) is type(meant) and arguments["seed"] == 3
    ClusterExpertsCallback(**arguments)


@pytest.mark.parametrize(
    "text",
    [
        "control: random\n",
        "random_shares: [0.5, 0.5]\n",
        "control: sorted\n",
        "common_share: half\n",
        "projection: true\n",
        "recluster_every: null\n",
    ],
)
def test_cluster_arguments_that_cannot_be_are_refused(tmp_path, text):
    with pytest.raises(ValueError, match=f"{text.split(':')[0]}|random_shares"):
        parse_arguments([recipe(tmp_path, text + "use_cpu: true\n")])[2].callback_arguments(seed=0)


def test_smoke_shortens_any_run_and_gives_it_a_folder_of_its_own(tmp_path):
    path = recipe(tmp_path, "max_steps: 600\noutput_dir: runs/mine\nuse_cpu: true\n")
    _, data, clusters, training = parse_arguments([path, "--smoke", "--max_steps", "50", "--recluster_until", "0.3"])
    assert clusters.recluster_until is None, "which may lie before the first fit of so short a run"
    assert training.max_steps == 8 and training.output_dir == "runs/mine_smoke"
    assert data.max_train_samples == 80 and (clusters.warmup, clusters.recluster_every) == ("4", "2")
    _, data, _, training = parse_arguments([path])
    assert training.max_steps == 600 and training.output_dir == "runs/mine" and data.max_train_samples is None


@pytest.mark.parametrize(
    "flag, value, complaint",
    [
        ("recluster_every", "-3", "recluster_every=-3"),
        ("warmup", "soon", "warmup='soon'"),
        ("logging_steps", "few", "logging_steps"),
    ],
)
def test_smoke_refuses_what_the_run_would(tmp_path, capsys, flag, value, complaint):
    with pytest.raises((ValueError, SystemExit)) as refused:
        parse_arguments([recipe(tmp_path, "output_dir: runs/mine\nuse_cpu: true\n"), f"--{flag}", value, "--smoke"])
    assert complaint in str(refused.value) + capsys.readouterr().err


def test_text_of_one_s_own_is_not_validated_on_that_of_the_recipe():
    recipe = str(RECIPES / "quickstart.yaml")
    validation = [parse_arguments([recipe, *flags])[1].validation_file for flags in ([], ["--train_file", "my.txt"])]
    assert validation[0] is not None and validation[1] is None


def test_shipped_configurations_are_found_by_their_names():
    for name in ("cse-gpt2-1m", "configuration/cse-gpt2-1m"):
        assert Path(find_config(name)).samefile(RECIPES.parent / "cse-gpt2-1m")
    assert find_config("of/another") == "of/another" and find_config(None) is None
