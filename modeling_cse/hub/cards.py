# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""The model card: what a checkpoint is, how it was made and how it did, written from what the run knows.

Nothing here talks to the Hub. Whatever comes from data (names, values, descriptions) is shown as plain text: it can
neither start a heading, a link or a tag, nor leave its table cell, nor end the metadata block.
"""

import math
import re
from collections.abc import Mapping, Sequence
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PretrainedConfig

from .. import HUB_CARDS
from .experts import COMMON, ExpertDescription


TEMPLATE = HUB_CARDS / "model_card.md"
TAGS = ["cluster-guided-sparse-experts", "mixture-of-experts"]
TRAINING_TIME = "training time"
# Of the Trainer's arguments those that a reader of a card wants.
RECIPE = (
    "learning_rate",
    "lr_scheduler_type",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "warmup_steps",
    "weight_decay",
    "adam_beta2",
    "bf16",
    "fp16",
    "seed",
)
DOMAINS_SHOWN = 3
THIS_MODEL, TWIN = "cse", "dense"
VERSIONED = ("modeling_cse", "torch", "transformers")
# Flags whose `None` means a default that the configuration works out, and the property that holds it.
DEFAULTED = {
    "cse_layers": "cse_layer_indices",
    "cse_expert_size": "expert_size",
    "cse_max_clusters": "max_clusters",
    "cse_gate": "gate",
}
# Ends of the names of saved classes, the Hub's task, and the Auto class that loads them. `LANGUAGE_TASKS` answer with
# tokens.
HEADS = {
    "ForCausalLM": ("text-generation", "AutoModelForCausalLM"),
    "LMHeadModel": ("text-generation", "AutoModelForCausalLM"),
    "ForMaskedLM": ("fill-mask", "AutoModelForMaskedLM"),
    "ForPreTraining": ("fill-mask", "AutoModelForMaskedLM"),
    "ForSequenceClassification": ("text-classification", "AutoModelForSequenceClassification"),
    "ForNextSentencePrediction": ("text-classification", "AutoModelForNextSentencePrediction"),
    "ForTokenClassification": ("token-classification", "AutoModelForTokenClassification"),
    "ForQuestionAnswering": ("question-answering", "AutoModelForQuestionAnswering"),
    "ForMultipleChoice": ("multiple-choice", "AutoModelForMultipleChoice"),
    "Model": ("feature-extraction", "AutoModel"),
}
LANGUAGE_TASKS = ("text-generation", "fill-mask")
# What Markdown, HTML or formulas take for markup within a line; what counts only where a line begins may stay.
MARKUP = re.compile(r"[\\`*_\[\]<>|~$&]")
ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;", "|": "&#124;", "`": "&#96;", "$": "&#36;"}


def write_model_card(
    folder: str | Path,
    *,
    config: PretrainedConfig,
    results: dict[str, dict[str, float]],
    recipe: dict,
    data: dict,
    base_model: str | None = None,
    license: str | None = None,
    language: str | list[str] | None = None,
    template: str | Path | None = None,
    repo_id: str | None = None,
    name: str | None = None,
    experts: Sequence[ExpertDescription] = (),
    tags: Sequence[str] = (),
    datasets: Sequence[str] = (),
    token_mean: bool = True,
) -> ModelCard:
    """Write `README.md` with its Hub metadata into a checkpoint's folder.

    Args:
        folder: the checkpoint; made if need be. Its name is the model's name, unless `repo_id` or `name` is given.
        config: the model's configuration; every `cse_*` field of it is listed.
        results: run name to {domain: validation perplexity}. The run "cse" is this model and must be there unless
            the whole is empty; "dense", its twin without experts (same data, order and recipe), adds a column with
            the ratio; any others follow.
        recipe: how it was trained; nested dicts are shown with dotted names.
        data: domain to what it was made of: a description, or a dict of facts in which "dataset" may name a dataset
            on the Hub.
        base_model: the Hub id of the model it was grown from. Of a local path only the last part is shown, and
            nothing is put into the metadata.
        license: a Hub license identifier. None: the card says that none is named.
        language: one or several ISO 639 codes of the text. None: the card names none.
        template: another Jinja2 template, see `hub_cards/README.md`. Default: that of the repository.
        repo_id: where it will live on the Hub, for the usage block. Default: the folder that the card lies in.
        name: the model's name, for the title.
        experts: what each expert is for, by `describe_experts`.
        tags: more tags for the metadata.
        datasets: more Hub ids of data sets for the metadata.
        token_mean: whether the perplexities of this model are of means over tokens; otherwise the card says that they
            are of the Trainer's `eval_loss`, a mean over batches.

    Returns:
        The card that was written. Perplexities that are not finite are in its table but not in its metadata, which
        the Hub would refuse.

    Raises:
        FileNotFoundError: if there is no template.
        ValueError: if results lack "cse", or if the model has another head than those of GPT-2 and BERT.
    """
    name = name or (repo_id.rsplit("/", 1)[-1] if repo_id else Path(folder).resolve().name)
    task, auto_class = head_of(config)
    if results and THIS_MODEL not in results:
        raise ValueError(f"`results` has the runs {list(results)}, allowed is a dict with {THIS_MODEL!r}, this model")
    if repo_id is not None and not _is_valid_id(repo_id):
        raise ValueError(f"`repo_id` is {repo_id!r}, allowed is the name of a Hub repository, as in 'user/model'")
    path = template_path(template)
    evaluated = _eval_results(results.get(THIS_MODEL, {}), data, task)
    card_data = ModelCardData(
        language=language,
        license=license,
        library_name="transformers",
        pipeline_tag=task,
        tags=list(dict.fromkeys([*TAGS, str(config.model_type), *tags])),
        datasets=list(dict.fromkeys([*_hub_datasets(data), *datasets])) or None,
        metrics=["perplexity"] if results else None,
        base_model=base_model if base_model and _is_hub_id(base_model) else None,
        model_name=name if evaluated else None,
        eval_results=evaluated or None,
    )
    card = ModelCard.from_template(
        card_data,
        template_path=str(path),
        title=escape(name),
        model_type=escape(config.model_type),
        base_model_name=escape(base_model if _is_hub_id(base_model) else Path(base_model).name) if base_model else "",
        causal=getattr(config, "reads_left_to_right", task == "text-generation"),
        task=task,
        auto_class=auto_class,
        language_model=task in LANGUAGE_TASKS,
        routing=getattr(config, "cse_routing", None) if _has_experts(config) else None,
        combine=getattr(config, "cse_combine", None) if _has_experts(config) else None,
        load_from=repo_id or ".",
        flags=_rows(_flags(config)),
        recipe=_rows(recipe),
        data=_rows(data),
        results=_results_table(results),
        token_mean=token_mean,
        experts=_experts_table(experts),
        versions=[(escape(package), escape(_version(package))) for package in VERSIONED],
        license_name=escape(license or ""),
    )
    # Jinja drops the last newline of a template.
    card.text = card.text.rstrip() + "\n"
    card.save(Path(folder) / "README.md")
    return card


def escape(value: Any) -> str:
    """Make one line of Markdown that shows a value and does nothing else, inside a table cell too."""
    text = MARKUP.sub(lambda match: ENTITIES.get(match[0]) or "\\" + match[0], one_line(value))
    # Without a dot there is no address, without the full address no automatic link.
    return re.sub(r"(?i)(https?|ftp):|www\.", lambda match: match[0][:-1] + f"&#{ord(match[0][-1])};", text)


def hours(seconds: float) -> str:
    """A training time in words: below a tenth of an hour in minutes."""
    return f"{seconds / 60:.1f} minutes" if seconds < 360 else f"{seconds / 3600:.2f} hours"


def one_line(value: Any) -> str:
    """One line without control characters, nor the invisible ones that turn the direction of text."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())


def head_of(config: PretrainedConfig) -> tuple[str, str]:
    """
    The Hub's task and the Auto class of a model: of the saved class if there is one, else of the language model of its
    type.

    Raises:
        ValueError: a class with another head than those of GPT-2 and BERT, or another type.
    """
    for architecture in getattr(config, "architectures", None) or []:
        for ending, found in HEADS.items():
            if architecture.endswith(ending):
                return found
        raise ValueError(f"`config` has the architecture {architecture!r}, allowed are those that end with {[*HEADS]}")
    for family, head in (("gpt2", "ForCausalLM"), ("bert", "ForMaskedLM")):
        if str(config.model_type).endswith(family):
            return HEADS[head]
    raise ValueError(f"`config` is of type {config.model_type!r}, allowed are GPT-2 and BERT")


def _has_experts(config: PretrainedConfig) -> bool:
    # An empty list is the dense model; `None` stands for the default layers.
    return hasattr(config, "cse_routing") and getattr(config, "cse_layers", None) != []


def template_path(template: str | Path | None) -> Path:
    """
    The file of a card's template, that of the repository where none is named.

    Raises:
        FileNotFoundError: there is none.
    """
    path = TEMPLATE if template is None else Path(template)
    if not path.is_file():
        raise FileNotFoundError(f"`template`: there is no file {str(path)!r}")
    return path


def _is_valid_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _is_hub_id(name: str) -> bool:
    # "runs/dense" could be either; a path that exists is meant as a path.
    return _is_valid_id(name) and not Path(name).exists()


def _flags(config: PretrainedConfig) -> dict[str, Any]:
    flags = {key: value for key, value in config.to_dict().items() if key.startswith("cse_")}
    for flag, worked_out in DEFAULTED.items():
        if flag in flags and flags[flag] is None and hasattr(config, worked_out):
            flags[flag] = f"{getattr(config, worked_out)} (default)"
    return flags


def _hub_datasets(data: Mapping[str, Any]) -> list[str]:
    named = [facts.get("dataset") for facts in data.values() if isinstance(facts, Mapping)]
    return list(dict.fromkeys(name for name in named if isinstance(name, str) and _is_hub_id(name)))


def _eval_results(perplexities: Mapping[str, float], data: Mapping[str, Any], task: str) -> list[EvalResult]:
    results = []
    for domain, value in perplexities.items():
        facts = data.get(domain)
        dataset = facts.get("dataset") if isinstance(facts, Mapping) else None
        if math.isfinite(value):
            results.append(
                EvalResult(
                    task_type=task,
                    dataset_type=dataset if isinstance(dataset, str) and _is_hub_id(dataset) else "custom",
                    dataset_name=one_line(domain),
                    # Entries that share type, config and split are merged into one by the library.
                    dataset_config=one_line(domain),
                    dataset_split="validation",
                    metric_type="perplexity",
                    metric_name="Validation perplexity",
                    metric_value=float(value),
                )
            )
    return results


def _rows(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Escaped (name, value) pairs; nested dicts become dotted names."""
    rows = []
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            rows += _rows(value, f"{prefix}{key}.")
        else:
            value = value.value if isinstance(value, Enum) else value
            rows.append((escape(f"{prefix}{key}"), escape("none" if value is None else value)))
    return rows


def _results_table(results: Mapping[str, Mapping[str, float]]) -> dict[str, list]:
    """Escaped head and rows: domain, this model, its twin, their ratio, other runs. Empty without results."""
    if not results:
        return {}
    runs = [THIS_MODEL, *[TWIN] * (TWIN in results), *(run for run in results if run not in (THIS_MODEL, TWIN))]
    head = ["this model", *[f"{run} twin" if run == TWIN else run for run in runs[1:]]]
    rows = []
    for domain in dict.fromkeys(domain for run in runs for domain in results[run]):
        values = [results[run].get(domain) for run in runs]
        cells = ["–" if value is None else f"{value:.2f}" for value in values]
        if TWIN in results:
            own, twin = values[:2]
            cells.insert(2, f"{own / twin:.3f}" if own is not None and twin else "–")
        rows.append([escape(domain), *cells])
    if TWIN in results:
        head.insert(2, "ratio to the twin")
    return {"head": ["domain", *(escape(name) for name in head)], "rows": rows}


def _experts_table(experts: Sequence[ExpertDescription]) -> dict[str, list]:
    """Escaped head and rows, a row an expert. Empty without experts."""
    if not experts:
        return {}
    domains = any(expert.domains for expert in experts)
    rows = []
    for expert in experts:
        known = ", ".join(f"{name} {part:.0%}" for name, part in list(expert.domains.items())[:DOMAINS_SHOWN])
        cells = ["none (common text)" if expert.expert == COMMON else str(expert.expert)]
        cells += [f"{expert.share:.1%}", f"{expert.tokens:.1%}"]
        cells += [known or "–"] if domains else []
        rows.append([escape(cell) for cell in [*cells, ", ".join(expert.terms) or "–", expert.typical or "–"]])
    head = ["expert", "of the texts", "of the tokens", *["domains"] * domains, "telling words", "a typical text"]
    return {"head": head, "rows": rows}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed as a package (run from a checkout)"
