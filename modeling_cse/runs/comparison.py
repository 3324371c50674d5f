# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Is CSE worth it on a corpus? A dense and a CSE model on an extract of it, for one seed or several, and a page."""

import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, HfArgumentParser

from .. import CONFIGURATION
from .arguments import _flag, parse_arguments
from .extract import Extract, digest, make_extract
from .folder import check_folder, write_settings
from .measuring import measure
from .page import write_page
from .pretraining import GPT2, Pretraining


# What goes with a configuration: vocabulary of the tokenizer that is trained on the text, and learning rate.
SIZES = {"1m": (2048, 2.0e-3), "7m": (8192, 1.0e-3)}
MOST_STEPS = 900
# In a tenth of them the recipe must read more sequences than it looks for clusters.
LEAST_STEPS = 20
MOST_EPOCHS = 2


@dataclass
class ComparisonArguments:
    """What a user says."""

    train: list[str] = _flag(
        None, "Text to train on: txt, json(l), csv or parquet, gz too; or folders of txt files.", nargs="+"
    )
    validation: list[str] | None = _flag(None, "Held-out text; default: a tenth of the documents.", nargs="+")
    text_column: str = _flag("text", "Column that holds the text.")
    domain_column: str | None = _flag(None, "Column that names a document's domain, if there is one.")
    output: str = _flag("runs/compare", "Folder of the runs and of the page; a finished part is not done again.")
    size: str = _flag("1m", "1m, 7m, or a folder with a configuration of type cse_gpt2.")
    steps: int | None = _flag(None, "Optimizer steps of each model; default: two passes, at most 900 steps.")
    seeds: int = _flag(1, "Trainings of each model: from two on, intervals show the noise of training.")
    smoke: bool = _flag(False, "As few steps as there can be, in a folder of its own, to see that it runs.")
    recipe: str = _flag(str(CONFIGURATION / "recipes" / "compare.yaml"), "Clusters and training.")

    def __post_init__(self):
        if self.smoke:
            self.steps, self.output = LEAST_STEPS, f"{self.output}_smoke"
        for name, value in (("seeds", self.seeds), ("steps", self.steps)):
            least = 1 if name == "seeds" else LEAST_STEPS
            if value is not None and value < least:
                raise ValueError(f"{name}={value} is not allowed: it must be at least {least}.")
        if not self.train:
            raise ValueError("train=None is not allowed: name the text to train on, --train my.jsonl.")


class Comparison:
    """One comparison, in the order of its steps. Everything lies in its folder, and what lies there is not redone."""

    def __init__(self, arguments: ComparisonArguments):
        self.arguments = arguments
        self.folder = Path(arguments.output)

    def run(self) -> dict[str, Any]:
        """
        Returns:
            What `page.json` holds: settings, clusters, gains, verdict and cost.

        Raises:
            ValueError: text that cannot be read or is too short, or a folder with another comparison.
        """
        settings = self._settings()
        check_folder(self.folder, settings, resume=True)
        self.extract = self._cut()
        write_settings(self.folder, settings)
        self.steps = self._steps()
        parts = [self._one_seed(seed) for seed in range(self.arguments.seeds)]
        return write_page(self.folder, self.extract, parts, {**asdict(self.arguments), "steps": self.steps})

    def _settings(self) -> dict[str, Any]:
        """What must not change in a folder. More seeds may come later."""
        own = {name: value for name, value in asdict(self.arguments).items() if name not in ("output", "seeds")}
        files = self.arguments.train + (self.arguments.validation or [])
        own["recipe"] = Path(own["recipe"]).read_text(encoding="utf-8") if Path(own["recipe"]).is_file() else None
        config = (self._size()[0] / "config.json").read_text(encoding="utf-8")
        # the recipe may leave it to the machine, and seeds may come on another one
        return {**own, "bf16": self._recipe()[3].bf16, "content": digest(files), "config": config}

    def _size(self) -> tuple[Path, int, float]:
        """Configuration, size of the vocabulary, learning rate."""
        size = self.arguments.size
        folder = CONFIGURATION / f"cse-gpt2-{size}" if size in SIZES else Path(size)
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"size={size!r} is not allowed: it must be one of {list(SIZES)} or a folder with a config.json."
            )
        config, block_size = AutoConfig.from_pretrained(folder), self._recipe()[1].block_size
        if config.max_position_embeddings < block_size:
            raise ValueError(
                f"size={size!r} is not allowed: it has {config.max_position_embeddings} positions, and must have at "
                f"least those of a sequence, block_size={block_size} of the recipe."
            )
        return folder, *SIZES.get(size, (config.vocab_size, SIZES["1m"][1]))

    def _recipe(self) -> tuple:
        return parse_arguments([self.arguments.recipe, "--output_dir", str(self.folder)])

    def _cut(self) -> Extract:
        data = self._recipe()[1]
        steps = self.arguments.steps or MOST_STEPS
        return make_extract(
            self.folder / "data",
            train=self.arguments.train,
            validation=self.arguments.validation,
            text_column=self.arguments.text_column,
            domain_column=self.arguments.domain_column,
            tokens=steps * self._step_blocks() * data.block_size,
            block_size=data.block_size,
            vocab_size=self._size()[1],
        )

    def _step_blocks(self) -> int:
        """Blocks that an optimizer step reads."""
        training = self._recipe()[3]
        return training.per_device_train_batch_size * training.gradient_accumulation_steps

    def _steps(self) -> int:
        if self.arguments.steps is not None:
            return self.arguments.steps
        a_pass = self.extract.blocks["train"] / self._step_blocks()
        return min(MOST_STEPS, math.ceil(MOST_EPOCHS * a_pass))

    def _one_seed(self, seed: int) -> Path:
        """Trains and measures both models of a seed; the folder then holds all that the page needs of it."""
        folder = self.folder / f"seed_{seed}"
        if (folder / "measured.json").is_file():
            return folder
        run = Pretraining(GPT2, *parse_arguments(self._flags(folder, seed)))
        run.run()
        measure(run, folder)
        return folder

    def _flags(self, folder: Path, seed: int) -> list[str]:
        config, _, rate = self._size()
        data, steps = Path(self.extract.folder), self.steps
        flags = {
            "config_name": config,
            "tokenizer_name": data / "tokenizer",
            "train_file": data / "train.jsonl",
            "validation_file": data / "validation.jsonl",
            "output_dir": folder,
            "resume_from_checkpoint": "last",
            "seed": seed,
            "max_steps": steps,
            "learning_rate": rate,
            "warmup_steps": steps // 12,
            "recluster_every": steps // 6,
            "logging_steps": max(1, steps // 60),
            "eval_steps": steps // 4,
            "save_steps": steps // 4,
        }
        if self.extract.domains is not None:
            flags["domain_column"] = "domain"
        return [self.arguments.recipe, *(part for name, value in flags.items() for part in (f"--{name}", str(value)))]


def compare(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs a comparison from its command line, and returns what `page.json` holds."""
    (arguments,) = HfArgumentParser(ComparisonArguments).parse_args_into_dataclasses(
        args=list(sys.argv[1:] if argv is None else argv)
    )
    return Comparison(arguments).run()
