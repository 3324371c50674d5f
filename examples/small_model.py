# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""A model for the examples that start from one: that of the quickstart, or with `--smoke` one of eight steps."""

import argparse
from pathlib import Path

from transformers import PreTrainedConfig

from modeling_cse.runs import GPT2, pretrain


ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "runs" / "quickstart"


def parser_for(description: str) -> argparse.ArgumentParser:
    """With `--model` and `--smoke`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(QUICKSTART / "cse"), help="a CSE model: folder, or name on the Hub")
    parser.add_argument("--smoke", action="store_true", help="with a model of eight steps, to see that it runs")
    return parser


def model_of(options: argparse.Namespace) -> str:
    """The model that was asked for.

    Raises:
        SystemExit: it is that of the quickstart, which has not been run.
    """
    if options.smoke:
        return str(smoke_model())
    if options.model == str(QUICKSTART / "cse") and not Path(options.model).is_dir():
        raise SystemExit(f"There is no {options.model} yet: run `make quickstart` first, or name a --model.")
    return options.model


def has_experts(config: PreTrainedConfig) -> bool:
    """Whether a model of this configuration has a layer with experts. A dense twin has none, nor has a stock model."""
    return bool(getattr(config, "cse_layer_indices", []))


def smoke_model() -> Path:
    """Trains the quickstart for eight steps, once, and returns its folder."""
    folder = QUICKSTART.with_name("small_model_smoke")
    if not (folder / "report.json").is_file():
        recipe = ROOT / "configuration" / "recipes" / "quickstart.yaml"
        data = {name: ROOT / "examples" / "data" / f"{name}.jsonl.gz" for name in ("train", "validation")}
        files = [part for name, path in data.items() for part in (f"--{name}_file", str(path))]
        config = ["--config_name", str(ROOT / "configuration" / "cse-gpt2-1m")]
        place = ["--output_dir", str(QUICKSTART.with_name("small_model"))]
        pretrain(GPT2, [str(recipe), *config, *files, *place, "--smoke"])
    return folder / "cse"
