# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""What the report shows, as Markdown tables. What no run stands behind is "not measured"."""

import math
from collections.abc import Callable

from comparisons import (
    TASKS,
    Comparisons,
    accuracy,
    ahead_of,
    all_text,
    at_position,
    flops_ratio,
    in_bin,
    metric_names,
    own_metric,
    perplexity,
    share_read_ahead,
    total_flops,
)
from corpus import GENERAL
from judgement import NOT_MEASURED, Verdict
from run_records import LONG_TAIL

from modeling_cse.evaluation import Estimate


def number(value: Estimate | None, digits: int = 3, scale: float = 1.0) -> str:
    """An estimate with its interval, if it has one."""
    if value is None:
        return NOT_MEASURED
    if not math.isfinite(value.value):
        return "diverged"
    text, *ends = (f"{scale * x:.{digits}f}" for x in (value.value, value.lower, value.upper) if x is not None)
    return f"{text} [{', '.join(ends)}]" if ends else text


def bare(value: Estimate | None, digits: int = 3, scale: float = 1.0) -> str:
    """An estimate without its interval."""
    return number(None if value is None else Estimate(value.value, None, None, value.seeds), digits, scale)


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown; the first column is text, the others are numbers."""
    if not rows:
        return f"{NOT_MEASURED.capitalize()}.\n"
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main_table(comparisons: Comparisons) -> str:
    """Perplexity over dense, how much of the oracle's gain it is, and what it costs. A cell of other seeds than its
    row says of how many."""
    rows = []
    for arm in comparisons.scratch:
        seeds = len(comparisons.of(arm))

        def told(value: Estimate | None, digits: int = 3, scale: float = 1.0, show=bare, seeds: int = seeds) -> str:
            return show(value, digits, scale) + _other_seeds(value, seeds)

        tails = [comparisons.ratio(arm, read) for read in (perplexity(LONG_TAIL), perplexity(GENERAL), all_text)]
        share = comparisons.share_of_oracle(arm, perplexity(LONG_TAIL))
        bound = "at most " if any(ahead_of(record).at_most for record in comparisons.of(arm)) else ""
        rows.append(
            [
                arm,
                str(seeds),
                *(told(comparisons.ratio(arm, perplexity(domain))) for domain in comparisons.domains),
                *(told(value, show=number) for value in tails),
                "oracle gains nothing" if comparisons.oracle_gains_nothing else told(share, 0, 100, number),
                told(comparisons.mean(arm, _cost_reader("per_token", "total")), 2, 1e-6),
                told(comparisons.mean(arm, _cost_reader("per_token", "active")), 2, 1e-6),
                told(flops_ratio(comparisons, arm)),
                bound + told(comparisons.ratio(arm, total_flops)),
                bound + told(comparisons.mean(arm, share_read_ahead), 1, 100),
                told(comparisons.mean(arm, _seconds_on(comparisons.machine)), 0),
            ]
        )
    head = ["arm", "seeds", *comparisons.domains, "long tail [95 %]", "general [95 %]", "all text [95 %]"]
    head += ["% of oracle's gain [95 %]", "parameters, M", "active, M", "FLOPs a token", "FLOPs in all"]
    return table([*head, "% read ahead", "seconds"], rows)


def _other_seeds(value: Estimate | None, seeds: int) -> str:
    """How many seeds an estimate is of, where its row has another number of them."""
    if value is None or value.seeds == seeds:
        return ""
    return f", {value.seeds} seed" + ("s" if value.seeds > 1 else "")


def _cost_reader(*path: str) -> Callable[[dict], float | None]:
    def read(record: dict) -> float | None:
        value = record["cost"]
        for name in path:
            value = value[name]
        return value

    return read


def _seconds_on(machine: str | None) -> Callable[[dict], float | None]:
    return lambda record: record["cost"]["seconds"] if record["machine"] == machine else None


def absolute_table(comparisons: Comparisons) -> str:
    """Perplexities themselves, means over seeds."""
    names = [*comparisons.domains, LONG_TAIL, GENERAL]
    rows = [
        [arm, str(len(comparisons.of(arm))), *(bare(comparisons.mean(arm, perplexity(name)), 2) for name in names)]
        for arm in comparisons.arms
    ]
    return table(["arm", "seeds", *names], rows)


def position_table(comparisons: Comparisons) -> str:
    """Long-tail perplexity over dense by position in the block, and the share of the oracle's gain there."""
    places = list(comparisons.records[0]["by_position"]) if comparisons.records else []
    rows = []
    for arm in _without_baseline(comparisons):
        cells, seeds = [], {"ratios": 0, "shares": 0}
        for place in places:
            ratio = comparisons.ratio(arm, at_position(place))
            share = comparisons.share_of_oracle(arm, at_position(place))
            known = share is not None and arm != comparisons.roles.oracle and math.isfinite(share.value)
            cells.append(bare(ratio) + (f" ({100 * share.value:.0f} %)" if known else ""))
            seeds["ratios"] = max(seeds["ratios"], ratio.seeds if ratio else 0)
            seeds["shares"] = max(seeds["shares"], share.seeds if known else 0)
        other = f" ({seeds['shares']})" if seeds["shares"] not in (0, seeds["ratios"]) else ""
        rows.append([arm, f"{seeds['ratios']}{other}", *cells])
    return table(["arm", "seeds", *places], rows)


def frequency_table(comparisons: Comparisons) -> str:
    """Perplexity over dense by sentence frequency, rarest first."""
    bins = range(len(comparisons.records[0]["by_frequency"]["1"])) if comparisons.records else []
    arms = _without_baseline(comparisons)
    ratios = {arm: [comparisons.ratio(arm, in_bin(place)) for place in bins] for arm in arms}
    ratios = {arm: own for arm, own in ratios.items() if None not in own}
    rows = [[arm, str(max(each.seeds for each in own)), *map(bare, own)] for arm, own in ratios.items()]
    return table(["arm", "seeds", *(f"{place + 1} of {len(bins)}" for place in bins)], rows)


def bin_table(bins: list[dict]) -> str:
    """What the bins of sentence frequency hold."""
    rows = [
        [f"{row['bin']} of {len(bins)}", f"{row['lowest']:.5f}", f"{row['highest']:.5f}", str(row["blocks"])]
        + [f"{share:.0%}" for share in row["domains"].values()]
        for row in bins
    ]
    return table(["bin", "lowest score", "highest score", "blocks", *(bins[0]["domains"] if bins else [])], rows)


def _without_baseline(comparisons: Comparisons) -> list[str]:
    """Arms that have something to be compared with."""
    if comparisons.roles.baseline not in comparisons.arms:
        return []
    return [arm for arm in comparisons.scratch if arm != comparisons.roles.baseline]


def purity_table(comparisons: Comparisons) -> str:
    """How well routes agree with domains, and which share of tokens has an expert."""
    rows = []
    for arm in comparisons.arms:
        for site in comparisons.of(arm)[0]["purity"]:
            seeds = comparisons.mean(arm, _purity_reader(site, "sequences", "purity")).seeds
            cells = [
                number(comparisons.mean(arm, _purity_reader(site, level, name)), 2)
                for level, name in (
                    ("sequences", "adjusted_mutual_information"),
                    ("tokens", "adjusted_mutual_information"),
                    ("sequences", "purity"),
                    ("sequences", "normalised_purity"),
                )
            ]
            shares = [
                bare(comparisons.mean(arm, lambda record, s=site, d=domain: record["routed"][s][d]), 0, 100)
                for domain in (*comparisons.domains, GENERAL)
            ]
            rows.append([arm, site, str(seeds), *cells, *shares])
    head = ["arm", "site", "seeds", "AMI, blocks", "AMI, tokens", "purity, blocks", "normalised"]
    return table([*head, *(f"% routed: {domain}" for domain in (*comparisons.domains, GENERAL))], rows)


def _purity_reader(site: str, level: str, name: str) -> Callable[[dict], float | None]:
    return lambda record: record["purity"][site][level][name] if site in record["purity"] else None


def task_table(comparisons: Comparisons, method: str) -> str:
    """Accuracies in percent of a method ("probe", "finetune"), and the differences to dense in points, by task; arms
    without a task are left out."""
    found = {task for record in comparisons.records for task in record["tasks"].get(method, {})}
    return _by_task(comparisons, {task: accuracy([task], method) for task in sorted(found, key=_task_order)}, 1, 100)


def own_metric_table(comparisons: Comparisons, method: str) -> str:
    """The same of the metrics that penalties or learning rates are chosen by, where they are not accuracies."""
    names = metric_names(comparisons.records, method)
    tasks = sorted(names, key=_task_order)
    return _by_task(comparisons, {f"{task}, {names[task]}": own_metric(task, method) for task in tasks}, 3, 1)


def _by_task(
    comparisons: Comparisons, readers: dict[str, Callable[[dict], float | None]], digits: int, scale: float
) -> str:
    """A row an arm, a column a reader; in brackets the difference to dense."""
    rows = []
    for arm in comparisons.arms:
        means = [comparisons.mean(arm, read) for read in readers.values()]
        if not any(means):
            continue
        seeds, cells = max(mean.seeds for mean in means if mean), []
        for mean, read in zip(means, readers.values(), strict=True):
            change = comparisons.difference(arm, read, comparisons.roles.baseline)
            told, beside = bare(mean, digits, scale) + _other_seeds(mean, seeds), ""
            if change and arm != comparisons.roles.baseline:
                beside = f" ({number(change, digits, scale)}{_other_seeds(change, mean.seeds)})"
            cells.append(told + beside)
        rows.append([arm, str(seeds), *cells])
    return table(["arm", "seeds", *readers], rows)


def _task_order(task: str) -> tuple[bool, str, str]:
    return TASKS.get(task, GENERAL) == GENERAL, TASKS.get(task, GENERAL), task


def forgetting_table(comparisons: Comparisons) -> str:
    """Perplexity after a domain stage over that before."""
    rows = []
    for arm in comparisons.stages:
        first = comparisons.of(arm)[0]
        names = (*comparisons.domains, GENERAL)
        cells = [number(comparisons.ratio(arm, perplexity(name), first["start"])) for name in names]
        rows.append([arm, first["start"], first["domain"], str(len(comparisons.of(arm))), *cells])
    return table(["arm", "went on from", "with", "seeds", *comparisons.domains, GENERAL], rows)


def share_table(rows: list[dict]) -> str:
    """The gain by a domain's share of the training text."""
    cells = []
    for row in rows:
        own, oracle = row["default"], row["oracle"]
        if own is not None:
            told = [str(own.seeds), number(own), number(oracle) + _other_seeds(oracle, own.seeds)]
            cells.append([row["corpus"], row["domain"], f"{row['share']:.1%}", *told])
    return table(["corpus", "domain", "share", "seeds", "default / dense [95 %]", "oracle / dense [95 %]"], cells)


def judgement_table(verdicts: list[Verdict]) -> str:
    """Reached, missed, or not measured."""
    rows = []
    for verdict in verdicts:
        found = number(Estimate(**verdict.value)) if verdict.value else NOT_MEASURED
        found += f" ({verdict.note})" if verdict.note else ""
        aim = f"{verdict.aim}: {verdict.aim_verdict}" if verdict.aim else "-"
        rows.append([verdict.measure, found, f"{verdict.must}: {verdict.must_verdict}", aim])
    return table(["measure", "found [95 %]", "must", "aim"], rows)


__all__ = [
    "absolute_table",
    "bin_table",
    "forgetting_table",
    "frequency_table",
    "judgement_table",
    "main_table",
    "own_metric_table",
    "position_table",
    "purity_table",
    "share_table",
    "task_table",
]
