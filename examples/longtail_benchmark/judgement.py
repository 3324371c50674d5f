# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""What was found against what was asked for before: reached, missed, or not measured.

A comparison of fewer than three seeds is no measurement here; what it gave stands beside it.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

from comparisons import (
    JUDGED_GENERAL_TASKS,
    TASKS,
    Comparisons,
    accuracy,
    flops_ratio,
    metric_names,
    own_metric,
    perplexity,
)
from corpus import GENERAL
from run_records import LONG_TAIL

from modeling_cse.evaluation import Estimate, difference


LEAST_SEEDS = 3
# A loss of accuracy as large as this that an interval does not exclude is said beside the verdict.
LOSS = 0.02
REACHED, MISSED, NOT_MEASURED = "reached", "missed", "not measured"


@dataclass(frozen=True)
class Verdict:
    """
    Fields:
        measure, must, aim: what was asked for; no aim: "".
        value: what was found; None where nothing was.
        must_verdict, aim_verdict: "reached", "missed" or "not measured"; "" without an aim.
        note: what else belongs to it.
    """

    measure: str
    must: str
    aim: str
    value: dict | None
    must_verdict: str
    aim_verdict: str
    note: str = ""


def _verdict(measured: bool, reached: Callable[[], bool]) -> str:
    return NOT_MEASURED if not measured else REACHED if reached() else MISSED


def _judge(
    measure: str,
    must: tuple[str, Callable[[Estimate], bool]],
    aim: tuple[str, Callable[[Estimate], bool]] | None,
    value: Estimate | None,
    note: str = "",
    allowed: bool = True,
    aim_allowed: bool = True,
) -> Verdict:
    measured = value is not None and value.seeds >= LEAST_SEEDS and allowed
    if value is not None and value.seeds < LEAST_SEEDS:
        note = _notes(f"{value.seeds} of {LEAST_SEEDS} seeds", note)
    return Verdict(
        measure,
        must[0],
        aim[0] if aim else "",
        None if value is None else asdict(value),
        _verdict(measured, lambda: must[1](value)),
        _verdict(measured and aim_allowed, lambda: aim[1](value)) if aim else "",
        note,
    )


def _hidden_loss(change: Estimate | None) -> str:
    if change is None or change.lower is None or change.lower >= -LOSS or change.upper < 0:
        return ""
    return f"too few seeds to exclude a loss of {-change.lower:.3f}"


def _notes(*notes: str) -> str:
    return "; ".join(note for note in notes if note)


def _machines(comparisons: Comparisons, arm: str, against: str) -> str:
    seeds = comparisons.apart(arm, against)
    return f"on two machines with seed {', '.join(map(str, seeds))}" if seeds else ""


def _sizes(comparisons: Comparisons, arm: str, against: str) -> str:
    """That an opponent is no opponent, for it has another number of parameters."""
    if not comparisons.of(arm) or not comparisons.of(against) or comparisons.as_large(arm, against):
        return ""
    return f"`{against}` has not as many parameters as `{arm}`"


def _under_one(value: Estimate) -> bool:
    return value.upper is not None and value.upper < 1


def judge(comparisons: Comparisons) -> list[Verdict]:
    """The table of issue 6, on the test split."""
    return [*_perplexities(comparisons), *_opponents(comparisons), _oracle(comparisons), *_tasks(comparisons)]


def _perplexities(comparisons: Comparisons) -> list[Verdict]:
    default = comparisons.roles.default
    ahead = any(record["reads_ahead"] for record in comparisons.of(default))
    pairs = _machines(comparisons, default, comparisons.roles.baseline)
    return [
        _judge(
            "long-tail perplexity, default CSE / dense",
            ("<= 0.95, interval under 1", lambda v: v.value <= 0.95 and _under_one(v)),
            ("<= 0.88", lambda v: v.value <= 0.88),
            comparisons.ratio(default, perplexity(LONG_TAIL)),
            _notes("the default arm's routes see later tokens" if ahead else "", pairs),
            allowed=not ahead,
        ),
        _judge(
            "general perplexity, default CSE / dense",
            ("<= 1.005", lambda v: v.value <= 1.005),
            ("<= 0.995", lambda v: v.value <= 0.995),
            comparisons.ratio(default, perplexity(GENERAL)),
            pairs,
        ),
    ]


def _opponents(comparisons: Comparisons) -> list[Verdict]:
    roles, read, rows = comparisons.roles, perplexity(LONG_TAIL), []
    gain = comparisons.ratio(roles.default, read)
    for name, opponent in (("Switch", roles.switch), ("random routing", roles.random)):
        sizes = _sizes(comparisons, roles.default, opponent)
        rows.append(
            _judge(
                f"long-tail perplexity, default CSE / {name}",
                ("< 1, interval under 1", _under_one),
                ("by half of the gain over dense", lambda v: v.value <= min(gain.value**0.5, 1)),
                comparisons.ratio(roles.default, read, opponent),
                _notes(sizes, _machines(comparisons, roles.default, opponent)),
                allowed=not sizes,
                aim_allowed=gain is not None and gain.seeds >= LEAST_SEEDS,
            )
        )
    wide, own = flops_ratio(comparisons, roles.wide), flops_ratio(comparisons, roles.default)
    sizes, cost = _sizes(comparisons, roles.default, roles.wide), ""
    if own and wide:
        cost = f"operations a token over dense: {own.value:.3f} and {wide.value:.3f}"
    rows.append(
        _judge(
            "long-tail perplexity, default CSE / dense widened to equal total parameters",
            ("stated", lambda v: True),
            ("<= 1", lambda v: v.value <= 1),
            comparisons.ratio(roles.default, read, roles.wide),
            _notes(cost, sizes, _machines(comparisons, roles.default, roles.wide)),
            allowed=not sizes,
        )
    )
    return rows


def _oracle(comparisons: Comparisons) -> Verdict:
    roles = comparisons.roles
    pairs = (_machines(comparisons, arm, roles.baseline) for arm in (roles.default, roles.oracle))
    return _judge(
        "share of the oracle's gain on the long tail",
        (">= 70 %", lambda v: v.value >= 0.7),
        (">= 90 %", lambda v: v.value >= 0.9),
        comparisons.share_of_oracle(roles.default, perplexity(LONG_TAIL)),
        _notes("the oracle gains nothing" if comparisons.oracle_gains_nothing else "", *dict.fromkeys(pairs)),
    )


def stage_accuracies(comparisons: Comparisons, tasks: list[str]) -> dict[str, dict[int, float]]:
    """
    What dense and Switch models reach with a domain stage: each task is answered by the model that went on with the
    text of its domain.

    Returns:
        By kind of stage (the arms' name with `*` for the domain), seed to mean accuracy. Kinds that lack a task, or a
        domain, are left out.
    """
    kinds: dict[str, dict[str, str]] = {}
    for arm in comparisons.stages:
        record = comparisons.of(arm)[0]
        if record["kind"] != "cse":
            kinds.setdefault(arm.replace(record["domain"], "*"), {})[record["domain"]] = arm
    found = {}
    for kind, arms in kinds.items():
        if not {TASKS[task] for task in tasks} <= set(arms):
            continue
        each = [comparisons.values(arms[TASKS[task]], accuracy([task])) for task in tasks]
        seeds = set.intersection(*(set(values) for values in each)) if each else set()
        if seeds:
            found[kind] = {seed: sum(values[seed] for values in each) / len(each) for seed in sorted(seeds)}
    return found


def _tasks(comparisons: Comparisons) -> list[Verdict]:
    default, baseline = comparisons.roles.default, comparisons.roles.baseline
    measured = {task for record in comparisons.of(default) for task in record["tasks"].get("probe", {})}
    rare = sorted(task for task in measured if TASKS.get(task, GENERAL) != GENERAL)
    own, stages = comparisons.values(default, accuracy(rare)), stage_accuracies(comparisons, rare)
    best = max(stages, key=lambda kind: sum(stages[kind].values()) / len(stages[kind]), default=None)
    gain = difference(own, stages[best]) if best and own.keys() & stages[best].keys() else None
    rows = [
        _judge(
            "mean probe accuracy on long-tail tasks, default CSE minus the best dense or Switch with its domain stage",
            (">= 0", lambda v: v.value >= 0),
            (">= +3 points", lambda v: v.value >= 0.03),
            gain,
            f"against `{best}`; {', '.join(rare)}" if gain else "",
        )
    ]
    names = metric_names(comparisons.records)
    for task in JUDGED_GENERAL_TASKS:
        read = {"accuracy": accuracy([task])} | ({names[task]: own_metric(task)} if task in names else {})
        for metric, each in read.items():
            change = comparisons.difference(default, each, baseline)
            rows.append(
                _judge(
                    f"probe {metric.replace('_', ' ')} on {task}, default CSE minus dense",
                    ("no loss beyond the interval", lambda v: v.upper is not None and v.upper >= 0),
                    None,
                    change,
                    _hidden_loss(change),
                )
            )
    return rows


__all__ = ["LEAST_SEEDS", "MISSED", "NOT_MEASURED", "REACHED", "Verdict", "judge", "stage_accuracies"]
