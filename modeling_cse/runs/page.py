# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""The page of a comparison, from what its seeds have measured; nothing is trained or evaluated here."""

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import adjusted_mutual_info_score

from ..analysis import (
    CLARITY,
    Gain,
    Losses,
    Verdict,
    cluster_names,
    judge,
    measure_gain,
    plot_found_clusters,
    plot_gains,
    plot_run,
    read_metrics,
    rules,
)
from ..hub.cards import escape, one_line
from .extract import Extract
from .measuring import read_measured
from .pretraining import RUNS


TAIL, COMMON, ALL = "long tail (text with an expert)", "common text", "all held-out text"

Arrays = dict[str, np.ndarray]


def write_page(folder: Path, extract: Extract, parts: list[Path], settings: dict[str, Any]) -> dict[str, Any]:
    """
    Writes `page.md`, its pictures and `page.json` into the folder of a comparison, and prints the short of it.

    Args:
        parts: folders of the seeds, each with what `measure` writes.
        settings: of the comparison.

    Returns:
        What `page.json` holds.
    """
    arrays, facts = map(list, zip(*map(read_measured, parts), strict=True))
    gains = group_gains(arrays, with_domains=extract.domains is not None)
    agreement = float(np.mean([part["agreement"].mean() for part in arrays]))
    clarities = [clearest(fact["clusters"]) for fact in facts]
    known = [clarity for clarity in clarities if clarity is not None]
    clarity = float(np.mean(known)) if len(known) == len(clarities) else None
    kind = facts[0]["kind"]
    verdict = judge(gains.get(TAIL), gains.get(COMMON), clarity, agreement, len(parts), kind)
    found: dict[str, Any] = {
        "settings": settings,
        "extract": {name: value for name, value in asdict(extract).items() if name != "folder"},
        "interval": _interval(len(parts)),
        CLARITY[kind].name: clarity,
        "agreement": agreement,
        "gains": {name: asdict(gain) for name, gain in gains.items()},
        "verdict": asdict(verdict),
        "seeds": facts,
        "domains": None if extract.domains is None else domain_table(arrays[0]),
    }
    _draw(folder, parts, arrays[0], gains, kind, extract.domains is not None)
    (folder / "page.json").write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    sections = [
        _head(extract, settings, len(parts)),
        _verdict_section(verdict, found, kind),
        _gains_section(gains, facts[0], len(parts)),
        _clusters_section(facts[0], agreement, len(parts)),
        *([] if found["domains"] is None else [_domains_section(found["domains"], facts[0], extract)]),
        _cost_section(facts),
    ]
    (folder / "page.md").write_text("\n".join(sections), encoding="utf-8", errors="replace")
    _print_short(folder, verdict, gains)
    return found


def group_gains(arrays: list[Arrays], with_domains: bool) -> dict[str, Gain]:
    """
    Gains by group: all text, long tail and common text (by each seed's own clusters), domains, and the clusters of
    the first seed, which other seeds' models are measured on as they are.
    """
    first = arrays[0]
    routed = [part["experts"][part["clusters"]] >= 0 for part in arrays]
    groups = {
        ALL: [np.ones(len(part["tokens"]), bool) for part in arrays],
        TAIL: routed,
        COMMON: [~inside for inside in routed],
    }
    if with_domains:
        for domain in np.unique(first["domains"]):
            groups[f"domain: {domain}"] = [part["domains"] == domain for part in arrays]
    for label, name in enumerate(cluster_names(first["experts"])):
        groups[name] = [first["clusters"] == label] * len(arrays)
    gains = {
        name: measure_gain(
            [Losses(p["dense"], p["cse"], p["tokens"], inside) for p, inside in zip(arrays, masks, strict=True)]
        )
        for name, masks in groups.items()
    }
    return {name: gain for name, gain in gains.items() if gain is not None}


def clearest(clusters: list[dict[str, Any]]) -> float | None:
    """Clarity of the clearest cluster with an expert: common text may well be one cloud that is cut somewhere, and
    one rare domain that stands apart is enough. None without such a cluster."""
    found = [part["clarity"] for part in clusters if part["expert"] >= 0 and part["clarity"] is not None]
    return max(found, default=None)


def domain_table(part: Arrays) -> dict[str, Any]:
    """Clusters by domains of the training sample, and how well they agree, there and on held-out text."""
    domains, clusters = part["sample_domains"], part["sample_clusters"]
    names, count = np.unique(domains), len(part["experts"])
    table = np.array([[np.sum((clusters == k) & (domains == name)) for name in names] for k in range(count)])
    return {
        "names": names.tolist(),
        "table": table.tolist(),
        "purity": float(table.max(axis=1).sum() / table.sum()),
        "largest_domain": float(table.sum(axis=0).max() / table.sum()),
        "ami": float(adjusted_mutual_info_score(domains, clusters)),
        "ami_held_out": float(adjusted_mutual_info_score(part["domains"], part["clusters"])),
    }


def _draw(
    folder: Path, parts: list[Path], first: Arrays, gains: dict[str, Gain], kind: str, with_domains: bool
) -> None:
    runs = {name: read_metrics(parts[0] / name / "metrics.jsonl") for name in RUNS}
    plot_run(runs, None, folder / "losses.png")
    plot_gains(gains, _short_interval(len(parts)), folder / "gains.png")
    domains = first["sample_domains"].tolist() if with_domains else None
    by = {"evidence": "words", "states": "mean state"}[kind]
    names = ("sample_embeddings", "sample_clusters", "centroids", "experts")
    embeddings, clusters, centroids, experts = (first[name] for name in names)
    plot_found_clusters(embeddings, clusters, centroids, experts, domains, folder / "clusters.png", by)


# ---- sections ------------------------------------------------------------------------------------------------------


def _table(rows: list[list[str]], left: int = 1) -> str:
    """Markdown; the first row is the head, the first `left` columns hold text."""
    rule = ["---"] * left + ["---:"] * (len(rows[0]) - left)
    return "".join(f"| {' | '.join(row)} |\n" for row in [rows[0], rule, *rows[1:]])


def _head(extract: Extract, settings: dict[str, Any], seeds: int) -> str:
    blocks = extract.blocks
    files = ", ".join(escape(Path(name).name) for name in settings["train"])
    note = ""
    if extract.merged:
        note += f" Too small for results of their own, and one domain here: {', '.join(map(escape, extract.merged))}."
    if extract.left_out:
        note += f" Left out, less than one sequence: {', '.join(map(escape, extract.left_out))}."
    return (
        f"# Is CSE worth it on {files}?\n\n"
        f"A dense GPT-2 and one with cluster-guided sparse experts (size {escape(settings['size'])}), same start and "
        f"same batches, {settings['steps']} steps, {_count(seeds, 'seed')}; {blocks['train']} sequences to train on, "
        f"{blocks['validation']} held out.{note}\n"
    )


def _verdict_section(verdict: Verdict, found: dict[str, Any], kind: str) -> str:
    lines = [f"## Worth it? {verdict.answer[0].upper()}{verdict.answer[1:]}.\n"]
    lines += [f"- {sentence}" for sentence in verdict.reasons]
    lines += [f"- What to do: {sentence}" for sentence in verdict.advice]
    lines.append(f"- Intervals are {found['interval']}.")
    return "\n".join(lines) + f"\n\n{rules(kind)}\n"


def _gains_section(gains: dict[str, Gain], first: dict[str, Any], seeds: int) -> str:
    rows = [["validation perplexity", "sequences", "dense", "CSE", "CSE / dense", "95 % interval"]]
    for name, gain in gains.items():
        few = "too few sequences" if seeds == 1 else ""
        span = few if gain.low is None else f"{gain.low:.3f} to {gain.high:.3f}"
        if gain.seeds < seeds:
            span += f" ({gain.seeds} of {seeds} seeds)"
        numbers = [f"{gain.dense:.2f}", f"{gain.cse:.2f}", f"{gain.ratio:.3f}", span]
        rows.append([escape(name), str(gain.sequences), *numbers])
    text = {
        "evidence": "A held-out sequence belongs to the cluster that is likeliest by all of its tokens; that looks at "
        "its text and not at its loss. The model itself routes a token by what it has read so far.",
        "states": "A held-out sequence belongs to the cluster whose centroid is nearest to its mean state in the last "
        "layer with experts; that looks at its text and not at its loss.",
    }[first["kind"]]
    if first["posterior_gate"]:
        text += (
            " An expert counts for the probability of its cluster, so that tokens of common text may get a part of "
            "one."
        )
    return f"## Who gains what\n\n{_table(rows)}\n{text}\n\n![Ratio by group](gains.png)\n\n![Losses](losses.png)\n"


def _clusters_section(first: dict[str, Any], agreement: float, seeds: int) -> str:
    clarity = CLARITY[first["kind"]]
    rows = [["cluster", "telling words", "share", clarity.name, "tokens that find it"]]
    clusters = first["clusters"]
    names = cluster_names(np.array([cluster["expert"] for cluster in clusters]))
    for name, cluster in zip(names, clusters, strict=True):
        words = escape(", ".join(cluster["terms"])) or "–"
        found = "–" if cluster["agreement"] is None else f"{cluster['agreement']:.0%}"
        clear = "–" if cluster["clarity"] is None else f"{cluster['clarity']:.2f}"
        rows.append([name, words, f"{cluster['share']:.0%}", clear, found])
    passages = [
        f"- {name}: " + " / ".join(f"“{escape(text)}”" for text in cluster["typical"])
        for name, cluster in zip(names, clusters, strict=True)
    ]
    fit, whose = first["fit"], "the only seed" if seeds == 1 else "seed 0"
    if first["kind"] == "evidence":
        where = f"of {whose}, the same in all layers with experts, found at step {fit['step']}"
        how, nearest = "by what is read up to them", "Surest of each cluster"
        common = "has few words of its own"
    else:
        where = (
            f"of {whose}, {escape(first['site'])}, the last fit at step {fit['step']} (distance between centroids "
            f"over the radius {fit['clarity']:.2f})"
        )
        how, nearest = "from their own state", "Nearest to each centroid"
        common = "is one of the largest"
    text = (
        f"{clarity.meaning}. Of the held-out tokens behind the first 32 of their sequence {agreement:.0%} find its "
        f"cluster {how}. A common cluster owns no expert: it {common}, or none was free. Clusters "
        f"{where}; shares, words and passages of a sample of training sequences. Words: log-odds against all other "
        f"sequences. {nearest}:"
    )
    return f"## Clusters\n\n{_table(rows, 2)}\n{text}\n\n" + "\n".join(passages) + "\n\n![Clusters](clusters.png)\n"


def _domains_section(found: dict[str, Any], first: dict[str, Any], extract: Extract) -> str:
    names = cluster_names(np.array([cluster["expert"] for cluster in first["clusters"]]))
    rows = [["training sequences", *map(escape, found["names"])]]
    rows += [[name, *map(str, row)] for name, row in zip(names, found["table"], strict=True)]
    agreed = (
        f"Purity {found['purity']:.2f} (the largest domain alone: {found['largest_domain']:.2f}); adjusted mutual "
        f"information {found['ami']:.2f}, on held-out sequences {found['ami_held_out']:.2f} (1: clusters are domains, "
        "0: no better than chance). Training never sees a domain's name."
    )
    if len(found["names"]) == 1:
        agreed = "There is one domain only, so that nothing can agree with it."
    return f"## Clusters and domains\n\n{_table(rows)}\n{agreed}\n"


def _cost_section(facts: list[dict[str, Any]]) -> str:
    rows = [["cost", "dense", "CSE"]]
    seconds = {name: [fact["seconds"][name] for fact in facts] for name in RUNS}
    shown = {
        name: "not known (interrupted)" if None in values else f"{np.mean(values):.0f} s"
        for name, values in seconds.items()
    }
    rows.append(["training, wall clock a seed, evaluations included", shown["dense"], shown["cse"]])
    parameters = facts[0]["parameters"]
    rows.append(["parameters", f"{parameters['dense']:,}", f"{parameters['cse']:,}"])
    rows.append(["working for one token", f"{parameters['dense']:,}", f"up to {facts[0]['active_parameters']:,}"])
    text = ""
    if facts[0]["evidence"] is not None:
        tokens, columns = facts[0]["evidence"]
        text += f"The table of evidence ({tokens:,} tokens by {columns} clusters) is counted, no parameter. "
    text += (
        "More parameters alone help too: a dense model widened to as many would spend them on every token, and is not "
        "measured here. Small models answer for small models."
    )
    return f"## Cost\n\n{_table(rows)}\n{text}\n"


def _interval(seeds: int) -> str:
    if seeds > 1:
        return f"Student's t over {seeds} seeds (95 %): they show the noise of training"
    return (
        "a paired bootstrap over held-out sequences (95 %, 2,000 draws, one seed): they show how much hangs on the "
        "choice of held-out text, and nothing of the noise of training. Sequences of one document are alike, so that "
        "they are rather too narrow"
    )


def _short_interval(seeds: int) -> str:
    return f"95 %, Student's t over {seeds} seeds" if seeds > 1 else "95 %, bootstrap over sequences, one seed"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _print_short(folder: Path, verdict: Verdict, gains: dict[str, Gain]) -> None:
    print(f"\nworth it: {verdict.answer}")
    for sentence in verdict.reasons + verdict.advice:
        print(f"  {sentence}")
    width = max(len(one_line(name)) for name in gains)
    counts = Counter(gain.low is None for gain in gains.values())
    for name, gain in gains.items():
        span = "" if gain.low is None else f"  ({gain.low:.3f} to {gain.high:.3f})"
        print(f"  {one_line(name):<{width}}  {gain.dense:8.2f} -> {gain.cse:8.2f}  x {gain.ratio:.3f}{span}")
    print(f"page:     {folder / 'page.md'}" + (" (some groups are small)" if counts[True] else ""))
