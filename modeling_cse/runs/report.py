# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""The end of a run: one evaluation of what was saved, a table, a picture, a card, and a sentence."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset, concatenate_datasets
from huggingface_hub import ModelCard
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, PreTrainedModel

from ..analysis import plot_run, read_metrics
from ..evaluation import PerplexityByDomain, expert_shares, token_losses
from ..hub import ExpertDescription, describe_experts, write_model_card
from ..hub.cards import RECIPE, TRAINING_TIME, escape, hours, one_line
from .folder import training_seconds


Batches = Callable[[Dataset], Iterable[dict[str, torch.Tensor]]]


def report_run(
    folder: Path,
    models: dict[str, PreTrainedModel],
    validation: dict[str, Dataset],
    batches: Batches,
    *,
    settings: dict[str, Any],
    prompt: str,
    base_model: str | None = None,
    data: dict[str, str],
    datasets: Sequence[str] = (),
    hardware: str,
) -> dict[str, Any]:
    """
    Evaluates the models of a run and writes `report.json`, `report.md`, `figure.png` and the model card.

    Args:
        folder: of the run; each model lies in a folder of its name there.
        models: by run name, "cse" among them.
        validation: packed and labelled blocks by domain.
        batches: makes batches of such blocks.
        settings: of the run, for the card.
        prompt: beginning of the sentence to complete.
        base_model: what the run started from.
        data: domain to what it was made of, for the card.
        datasets: names of the data sets on the Hub.
        hardware: what it ran on, in words.

    Returns:
        What `report.json` holds.
    """
    causal = models["cse"].can_generate()
    perplexity = {name: evaluate_by_domain(model, validation, batches, causal) for name, model in models.items()}
    routing = {domain: expert_shares(models["cse"], batches(blocks)) for domain, blocks in validation.items()}
    experts = _experts(models["cse"], folder / "cse", validation)
    seconds = training_seconds(folder, "cse")
    time = {} if seconds is None else {TRAINING_TIME: hours(seconds)}
    report = {
        "perplexity": perplexity,
        "routing": routing,
        "sentence": complete(folder / "cse", prompt, causal),
        "recipe": {**_used(settings), **time, "hardware": hardware},
        "data": data,
        "datasets": list(datasets),
        "base_model": base_model,
        "experts": [asdict(expert) for expert in experts],
    }
    text = json.dumps(report, indent=2, sort_keys=True, default=str) + "\n"
    (folder / "report.json").write_text(text, encoding="utf-8")
    table = perplexity_table(perplexity)
    (folder / "report.md").write_text(table, encoding="utf-8")
    plot_run({name: read_metrics(folder / name / "metrics.jsonl") for name in models}, routing, folder / "figure.png")
    write_run_card(folder)
    print(f"\n{table}\nroutes:   share of tokens that go to experts  " + _routing_line(routing))
    print(f"sentence: {one_line(report['sentence'])}\nrun:      {folder} (figure.png, report.json, cse/)")
    return json.loads(text)


def write_run_card(folder: str | Path, **options) -> ModelCard:
    """
    Writes the model card of a finished run into its folder `cse`, from what lies there: the report and the model's
    configuration.

    Args:
        folder: of the run, with `report.json`.
        options: of `write_model_card`: `repo_id`, `license`, `language`, `template`, `tags`, `datasets`, `name`.

    Raises:
        ValueError: the folder holds no report.
    """
    path = Path(folder) / "report.json"
    if not path.is_file():
        raise ValueError(f"folder={str(folder)!r} is not allowed: it must be a finished run's, with report.json.")
    report = json.loads(path.read_text(encoding="utf-8"))
    return write_model_card(
        Path(folder) / "cse",
        config=AutoConfig.from_pretrained(Path(folder) / "cse"),
        results=report["perplexity"],
        recipe=report["recipe"],
        data=report["data"],
        base_model=report["base_model"],
        experts=[ExpertDescription(**expert) for expert in report["experts"]],
        **{"datasets": report["datasets"], **options},
    )


@torch.no_grad()
def evaluate_by_domain(
    model: PreTrainedModel, validation: dict[str, Dataset], batches: Batches, causal: bool
) -> dict[str, float]:
    """Perplexity of each domain, and under "all" that of their union."""
    metric = PerplexityByDomain()
    model.eval()
    for domain, blocks in validation.items():
        for batch in batches(blocks):
            batch = {name: value.to(model.device) for name, value in batch.items()}
            labels = batch.pop("labels")
            losses, tokens = token_losses(model(**batch).logits, labels, shift=causal)
            metric.add_batch(predictions=losses.tolist(), references=tokens.tolist(), domains=[domain] * len(losses))
    result = cast(dict, metric.compute())  # None on other processes than the first
    by_domain = result["perplexity_by_domain"]
    return by_domain if list(by_domain) == ["all"] else {**by_domain, "all": result["perplexity"]}


def perplexity_table(perplexity: dict[str, dict[str, float]]) -> str:
    """Markdown: a row a domain, a column a run, and how far CSE is from its dense twin."""
    runs = list(perplexity)
    twin = {"cse", "dense"} <= set(runs)
    rows = [["validation perplexity", *map(escape, runs), *(["cse / dense"] if twin else [])]]
    rows.append(["---", *["---:"] * (len(rows[0]) - 1)])
    for domain in perplexity[runs[0]]:
        values = [perplexity[run][domain] for run in runs]
        ratio = [f"{perplexity['cse'][domain] / perplexity['dense'][domain]:.3f}"] if twin else []
        rows.append([escape(domain), *(f"{value:.2f}" for value in values), *ratio])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def complete(folder: Path, prompt: str, causal: bool) -> str:
    """Loads a saved model as a stranger would, and lets it complete a prompt: greedily, or one masked word."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not causal:
        model = AutoModelForMaskedLM.from_pretrained(folder).eval()
        inputs = tokenizer(f"{prompt} {tokenizer.mask_token} .", return_tensors="pt")
        place = (inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero()[0, 0]
        inputs.update(_common_labels(model))
        with torch.no_grad():
            inputs["input_ids"][0, place] = model(**inputs).logits[0, place].argmax()
        return tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=True)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    inputs = tokenizer(prompt, return_tensors="pt")
    inputs.update(_common_labels(model))
    tokens = model.generate(
        **inputs, max_new_tokens=30, do_sample=False, repetition_penalty=1.3, pad_token_id=tokenizer.eos_token_id
    )
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


def _common_labels(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """A prompt is of no known cluster, which models that are told their clusters want to hear."""
    return {"given_clusters": torch.tensor([-1])} if model.config.cse_routing == "given" else {}


def _routing_line(routing: dict[str, list[float]]) -> str:
    return ", ".join(f"{one_line(domain)} {sum(shares):.1%}" for domain, shares in routing.items())


def _experts(model: PreTrainedModel, folder: Path, validation: dict[str, Dataset]) -> list[ExpertDescription]:
    """What each expert is for, by validation text; nothing where clusters come with the batch or are yet to come."""
    modules = model.base_model.routed_modules().values()
    if model.config.cse_routing == "given" or not any(module.router.num_clusters for module in modules):
        return []
    rows = [
        blocks.select_columns("input_ids").add_column("domain", [domain] * len(blocks))
        for domain, blocks in validation.items()
    ]
    return describe_experts(model, AutoTokenizer.from_pretrained(folder), concatenate_datasets(rows))


def _used(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings a reader wants in a card: what is set, without the Trainer's many unused ones."""
    shown = ("clusters.", *(f"training.{name}" for name in RECIPE))
    return {name: value for name, value in settings.items() if name.startswith(shown) and value is not None}
