# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""What a user may set on the command line or in a recipe, in the groups of transformers' own example scripts."""

import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser, TrainingArguments
from transformers.utils import logging

from ..training import ClusterExpertsCallback
from .recipes import read_recipe


logger = logging.get_logger(__name__)


def _flag(default: Any, help: str, **kwargs) -> Any:
    metadata = {"help": help, **kwargs}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


# What `--smoke` puts behind all other flags: the whole way in seconds. Four steps hold enough text for ten clusters.
SMOKE = {
    "max_steps": 8,
    "warmup": 4,
    "recluster_every": 2,
    "per_device_train_batch_size": 8,
    "max_train_samples": 80,
    "max_eval_samples": 20,
    "warmup_steps": 2,
    "logging_steps": 2,
    "eval_steps": 4,
    "save_steps": 8,
}
CONTROLS = ("oracle", "random")
# What a flag puts out of force in a recipe, which may hold only one of them.
REPLACED = {
    "train_file": ("validation_file",),
    "tokenizer_name": ("tokenizer_vocab_size",),
    "model_name_or_path": ("config_name", "config_overrides", "tokenizer_name", "tokenizer_vocab_size"),
}
# Cluster arguments that are not the callback's.
OF_THE_RUN = ("compare_with_dense", "control", "random_shares", "prompt")


@dataclass
class ModelArguments:
    """Which model, config and tokenizer to start from."""

    model_name_or_path: str | None = _flag(None, "Checkpoint to start from, dense or CSE. None: from scratch.")
    config_name: str | None = _flag(None, "Config to start from scratch with, a folder or a name on the Hub.")
    model_type: str | None = _flag(None, "cse_gpt2 or cse_bert; only needed without a config or checkpoint.")
    config_overrides: str | None = _flag(None, "Config values to change from scratch: 'n_embd=128,n_layer=4'.")
    tokenizer_name: str | None = _flag(None, "Tokenizer, a folder or a name on the Hub.")
    tokenizer_vocab_size: int | None = _flag(None, "Train a tokenizer of this size on the training text instead.")
    cache_dir: str | None = _flag(None, "Where to keep what is downloaded.")
    model_revision: str = _flag("main", "Branch, tag or commit on the Hub.")
    token: str | None = _flag(None, "Token for private repositories on the Hub.")
    trust_remote_code: bool = _flag(False, "Allow code from the Hub to run.")
    cse_layers: list[str] | None = _flag(None, "Layers with experts, or auto; default: as the config says.", nargs="+")
    cse_modules: list[str] | None = _flag(None, "attention, ffn or both; default: as the config says.", nargs="+")
    cse_combine: str | None = _flag(None, "replace or add; default: as the config says.")
    cse_num_experts: int | None = _flag(None, "Expert slots a layer; default: as the config says.")
    cse_expert_size: int | None = _flag(None, "Width of an expert; default: as the config says.")
    cse_routing: str | None = _flag(None, "discriminant, evidence or sequence; default: as the config says.")
    cse_gate: str | None = _flag(None, "hard or posterior; default: as the config says.")
    cse_max_clusters: int | None = _flag(None, "Clusters a router can hold; default: as the config says.")
    separate_documents: bool | None = _flag(
        None,
        "Routes and clusters begin anew at each document of a block. Default: where no domain_column parts documents; "
        "a trained CSE model, or a config that names a token, as it is.",
    )

    def __post_init__(self):
        layers = self.cse_layers
        if layers in ("auto", ["auto"]):
            self.cse_layers = "auto"  # type: ignore[assignment]  # the annotation is what the parser reads
        elif layers is not None:
            try:
                self.cse_layers = [int(layer) for layer in layers]  # type: ignore[misc]  # likewise
            except (TypeError, ValueError) as error:
                raise ValueError(f"cse_layers={layers!r} is not allowed: it must be ints, or 'auto'.") from error


@dataclass
class DataArguments:
    """Which text to train on and how to cut it."""

    dataset_name: str | None = _flag(None, "Data set on the Hub, or a local folder of one.")
    dataset_config_name: str | None = _flag(None, "Configuration of that data set.")
    train_file: list[str] | None = _flag(
        None, "Training text: txt, json(l), csv or parquet, gz too; or folders of txt files.", nargs="+"
    )
    validation_file: list[str] | None = _flag(None, "Validation text, likewise.", nargs="+")
    validation_split_percentage: float = _flag(5, "Share of the training text to validate on without such a file.")
    text_column: str = _flag("text", "Column that holds the text.")
    domain_column: str | None = _flag(None, "Column that names a document's domain: results are then by domain.")
    streaming: bool = _flag(False, "Read the training text while training; needs max_steps.")
    max_train_samples: int | None = _flag(None, "Use only so many training documents.")
    max_eval_samples: int | None = _flag(None, "Use only so many validation documents.")
    block_size: int = _flag(256, "Tokens of a training sequence.", aliases=["--max_seq_length"])
    mlm_probability: float = _flag(0.15, "Share of the tokens to predict (masked language models).")
    preprocessing_num_workers: int | None = _flag(None, "Processes that tokenise.")
    smoke: bool | None = field(default=None, init=False)  # of `--smoke`, which is no setting of a recipe


@dataclass
class ClusterArguments:
    """How clusters are found and kept (`ClusterExpertsCallback`), and what the run is compared with."""

    warmup: str | None = _flag(
        None, "Dense training before the first fit: steps, a share below 1, or auto. Default: 0.1; 0 with clusters."
    )
    recluster_every: str = _flag("0.1", "From the first fit to the second: steps, or a share of training below 1.")
    recluster_growth: float = _flag(1.0, "Each interval between fits is so many times the one before.")
    recluster_until: str | None = _flag(None, "No fit after it: steps, or a share of training below 1.")
    update: str = _flag("recluster", "recluster, ema, recluster+ema or frozen.")
    algorithm: str | None = _flag(
        None, "kmeans, spherical, dbscan, hdbscan, text, or given. Default: text for evidence, else kmeans."
    )
    num_clusters: list[int] | None = _flag(
        None, "Clusters to look for, or a range: 2 8. Default: 6, or 10 for text.", nargs="+"
    )
    common_share: str | None = _flag(
        None, "Clusters are common until they hold it, by common_by; or elbow. Default: 0.7, or 0.75 for text."
    )
    common_by: str | None = _flag(
        None, "size: the largest are common; separation: the least separated. Default: separation for text, else size."
    )
    projection: str | None = _flag("auto", "Dimensions of a random projection before clustering, none, or auto.")
    min_cluster_share: float | None = _flag(None, "Smallest share that dbscan and hdbscan call a cluster.")
    sample_size: int = _flag(2048, "Sequences kept for a fit.")
    evidence_size: int | None = _flag(
        None, "Sequences whose tokens are counted for evidence, the sample and those before it. Default: 3 samples."
    )
    patience: int = _flag(3, "Fits a cluster may be absent or common before it loses its expert.")
    ema_decay: float | None = _flag(None, "Weight of the past for one sequence with ema. Default 0.999.")
    layer_budget: int | None = _flag(None, "Of the layers, how many get experts. Default: all; 2 with auto.")
    compare_with_dense: bool = _flag(False, "Train the dense twin too: same start, same batches.")
    control: str | None = _flag(None, "In place of clusters: oracle (by domain column) or random (random_shares).")
    random_shares: list[float] | None = _flag(None, "Sizes of the random clusters, with sum 1.", nargs="+")
    prompt: str = _flag("The", "Beginning of the sentence that the reloaded model completes.")

    def __post_init__(self):
        if isinstance(self.num_clusters, list):
            clusters = self.num_clusters
            # the annotation is what the parser reads
            self.num_clusters = clusters[0] if len(clusters) == 1 else tuple(clusters)  # type: ignore[assignment]
        if self.control not in (None, *CONTROLS):
            raise ValueError(f"control={self.control!r} is not allowed: it must be one of {list(CONTROLS)}.")
        if (self.random_shares is None) == (self.control == "random"):
            raise ValueError(
                f"random_shares={self.random_shares!r} is not allowed with control={self.control!r}: the sizes belong "
                "to control='random'."
            )
        if self.control is not None:
            self._use_given_labels()

    def _use_given_labels(self) -> None:
        """A control has its clusters from the batch: what says how to find and keep them is replaced, on purpose, so
        that one recipe serves a run and its controls."""
        self.algorithm, self.update, self.num_clusters, self.projection = "given", "frozen", None, "auto"
        self.min_cluster_share, self.ema_decay, self.recluster_until, self.recluster_growth = None, None, None, 1.0
        self.common_by, self.evidence_size = None, None

    def callback_arguments(self, seed: int) -> dict[str, Any]:
        """Arguments of `ClusterExpertsCallback`."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in OF_THE_RUN}
        until = self.recluster_until
        return {
            **own,
            "warmup": self.warmup if self.warmup in ("auto", None) else steps_or_share(self.warmup),
            "recluster_every": steps_or_share(self.recluster_every, "recluster_every"),
            "recluster_until": None if until is None else steps_or_share(until, "recluster_until"),
            "common_share": _number_or_word("common_share", self.common_share, {"elbow": "elbow", None: None}),
            "projection": _number_or_word("projection", self.projection, {"auto": "auto", "none": None, None: None}),
            "seed": seed,
        }


def _number_or_word(name: str, value: Any, words: dict[str | None, Any]) -> Any:
    if value in words:
        return words[value]
    for kind in (int, float):  # YAML reads 1e-1 as text
        try:
            return kind(str(value))
        except ValueError:
            continue
    raise ValueError(f"{name}={value!r} is not allowed: it must be a number or one of {list(words)}.")


def steps_or_share(value: str | int | float, name: str = "warmup") -> int | float:
    """Reads "200" as 200 steps and "0.1" as a tenth of training.

    Raises:
        ValueError: it is no number.
    """
    try:
        return int(value) if str(value).strip().isdigit() else float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}={value!r} is not allowed: it must be steps (int) or a share (float).") from error


def parse_arguments(
    argv: list[str] | None = None,
) -> tuple[ModelArguments, DataArguments, ClusterArguments, TrainingArguments]:
    """
    Reads `[recipe.yaml] [--flag value ...]`: flags go before the recipe, the recipe before the defaults. A tokenizer
    or checkpoint that a flag names takes the place of the recipe's. `bf16: auto` in a recipe asks `has_bf16`.
    `--smoke` makes eight steps of it on little text, in a folder of its own: that of the run with `_smoke` behind it.

    Raises:
        ValueError: the recipe does not exist, is no mapping, names a setting that there is not, or gives one a value
            of a type that it does not take; with `--smoke` also a setting of the clusters that the run would refuse.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    kinds = (ModelArguments, DataArguments, ClusterArguments, TrainingArguments)
    parser = HfArgumentParser(kinds)
    if argv and argv[0].endswith((".yaml", ".yml")):
        recipe = read_recipe(Path(argv.pop(0)), kinds)
        given, _ = parser.parse_known_args(argv)
        for name, replaced in REPLACED.items():
            if getattr(given, name) is not None:
                recipe = {setting: value for setting, value in recipe.items() if setting not in replaced}
        automatic = recipe.get("bf16") == "auto" and recipe.pop("bf16")
        parser.set_defaults(**recipe)
        if automatic:
            parser.set_defaults(bf16=has_bf16(parser.parse_known_args(argv)[0].use_cpu))
    parser.add_argument("--smoke", action="store_true", help="Eight steps on little text, to see that it runs.")
    if "--smoke" in argv:
        _check_replaced(parser, argv)
        argv += [part for name, value in SMOKE.items() for part in (f"--{name}", str(value))]
    *groups, rest = parser.parse_args_into_dataclasses(args=argv)
    training = groups[-1]
    if rest.smoke:
        groups[2].recluster_until = None  # a step or share of a long run may lie before the first fit of a short one
        training.output_dir += "_smoke"
        groups[1].smoke = True
    if training.bf16 and not has_bf16(training.use_cpu):
        logger.warning("bf16=True: this machine has no instructions for bf16, fp32 (bf16=False) is many times faster.")
    return tuple(groups)


def _check_replaced(parser: HfArgumentParser, argv: list[str]) -> None:
    """Refuses what the run itself would refuse: `--smoke`, which replaces such values, is there to find them."""
    _, _, clusters, training, _ = parser.parse_args_into_dataclasses(args=argv)
    ClusterExpertsCallback(**clusters.callback_arguments(training.seed))


def has_bf16(use_cpu: bool) -> bool:
    """
    Whether bf16 is worth it here: without instructions for it PyTorch takes plain loops (its issue 118499), and an
    AVX2 processor trains a small GPT-2 20 times slower than in fp32.

    Args:
        use_cpu: whether to ask about the processor, else about the GPU, if there is one.
    """
    if not use_cpu:
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # the last one: ARM's
