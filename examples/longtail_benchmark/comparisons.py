# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Arms against each other, paired by seed, from the records of runs."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from corpus import GENERAL
from cost import ReadAhead, read_ahead
from run_records import LONG_TAIL

from modeling_cse.evaluation import Estimate, difference, mean_interval, ratio, share_of_gain


Record = dict[str, Any]
# The benchmark's tasks, by the domain whose text helps with them; the paper's five among them.
TASKS = {
    "overruling": "legal",
    "casehold": "legal",
    "casehold_style_nm": "legal",
    "gad": "medical",
    "euadr": "medical",
    "chemprot": "medical",
    "pubmedqa_roles": "medical",
    "citation_intent": "academic",
    "scicite": "academic",
    "cola": GENERAL,
    "sst2": GENERAL,
    "mrpc": GENERAL,
    "qnli": GENERAL,
    "qqp": GENERAL,
    "rte": GENERAL,
}
JUDGED_GENERAL_TASKS = ("cola", "sst2", "mrpc", "qnli", "qqp")


@dataclass(frozen=True)
class Roles:
    """Which arm is what, by name; arms that have no run are "not measured"."""

    baseline: str = "dense"
    default: str = "cse_wide_counted"
    oracle: str = "oracle_wide"
    random: str = "random_wide"
    switch: str = "switch_wide"
    wide: str = "dense_wider"


class Comparisons:
    """
    Args:
        records: of the finished runs of a size and corpus (`run_records.record_of`).
        roles: which arm is what.
    """

    def __init__(self, records: list[Record], roles: Roles):
        self.records, self.roles = records, roles
        self.arms = list(dict.fromkeys(record["arm"] for record in records))

    def of(self, arm: str) -> list[Record]:
        """The records of an arm, by seed."""
        return [record for record in self.records if record["arm"] == arm]

    def values(self, arm: str, read: Callable[[Record], float | None]) -> dict[int, float]:
        """Seed to a number of its record, without those that lack it."""
        found = {record["seed"]: read(record) for record in self.of(arm)}
        return {seed: value for seed, value in found.items() if value is not None}

    def mean(self, arm: str, read: Callable[[Record], float | None]) -> Estimate | None:
        """Over the seeds of an arm; None where it has no such number."""
        values = list(self.values(arm, read).values())
        return mean_interval(values) if values else None

    def ratio(self, arm: str, read: Callable[[Record], float | None], against: str | None = None) -> Estimate | None:
        """Geometric mean ratio to another arm, the baseline by default; None without a common seed."""
        own, other = (self.values(name, read) for name in (arm, against or self.roles.baseline))
        return ratio(own, other) if own.keys() & other.keys() else None

    def difference(self, arm: str, read: Callable[[Record], float | None], against: str) -> Estimate | None:
        """Mean difference to another arm; None without a common seed."""
        own, other = (self.values(name, read) for name in (arm, against))
        return difference(own, other) if own.keys() & other.keys() else None

    def share_of_oracle(self, arm: str, read: Callable[[Record], float | None]) -> Estimate | None:
        """Of the oracle's gain over the baseline; None where it was not measured, or the oracle gains nothing."""
        own, best, base = (self.values(name, read) for name in (arm, self.roles.oracle, self.roles.baseline))
        return share_of_gain(own, best, base) if own.keys() & best.keys() & base.keys() else None

    def apart(self, arm: str, against: str) -> list[int]:
        """Seeds whose runs of two arms were made on different machines: there rounding alone can be a difference."""
        own, other = ({record["seed"]: record["machine"] for record in self.of(name)} for name in (arm, against))
        return [seed for seed in own if seed in other and own[seed] != other[seed]]

    def as_large(self, arm: str, other: str) -> bool:
        """Whether two arms have the same number of parameters, but for 1 %."""
        sizes = [self.mean(name, lambda record: record["cost"]["per_token"]["total"]) for name in (arm, other)]
        return None not in sizes and abs(sizes[0].value / sizes[1].value - 1) <= 0.01

    @property
    def oracle_gains_nothing(self) -> bool:
        """Whether the oracle was measured, and is no better than the baseline."""
        best = self.ratio(self.roles.oracle, perplexity(LONG_TAIL))
        return best is not None and best.value >= 1

    @property
    def machine(self) -> str | None:
        """Where most of the baseline's runs were, or of all where it has none: seconds compare on one processor."""
        machines = Counter(record["machine"] for record in self.of(self.roles.baseline) or self.records)
        return machines.most_common(1)[0][0] if machines else None

    @property
    def domains(self) -> list[str]:
        """The long-tail domains."""
        return sorted(set(self.records[0]["perplexity"]) - {GENERAL, LONG_TAIL}) if self.records else []

    @property
    def stages(self) -> list[str]:
        """Arms that went on from another on one domain's text."""
        return [arm for arm in self.arms if self.of(arm)[0]["start"] is not None]

    @property
    def scratch(self) -> list[str]:
        """The other arms."""
        return [arm for arm in self.arms if arm not in self.stages]


def perplexity(name: str) -> Callable[[Record], float | None]:
    """Reads the perplexity of a domain, or of the long tail."""
    return lambda record: record["perplexity"].get(name)


def all_text(record: Record) -> float:
    """Reads the perplexity over the whole mixture: each domain counts by its share of the training
    text."""
    shares = record["settings"]["mixture"]["shares"]
    # what is not finite stands in a record as text
    logs = [share * np.log(float(record["perplexity"][domain])) for domain, share in shares.items()]
    return float(np.exp(sum(logs)))


def at_position(place: str, name: str = LONG_TAIL) -> Callable[[Record], float | None]:
    """Reads a perplexity at a range of positions."""
    return lambda record: record["by_position"][place][name]


def in_bin(place: int, order: str = "1") -> Callable[[Record], float | None]:
    """Reads the perplexity of a bin of sentence frequency."""
    return lambda record: record["by_frequency"][order][place]


def accuracy(tasks: list[str] | tuple[str, ...], method: str = "probe") -> Callable[[Record], float | None]:
    """Reads the mean accuracy of some tasks; None where one of them was not measured."""

    def read(record: Record) -> float | None:
        found = [record["tasks"].get(method, {}).get(task) for task in tasks]
        return None if not found or None in found else sum(found) / len(found)

    return read


def own_metric(task: str, method: str = "probe") -> Callable[[Record], float | None]:
    """Reads the metric that a task's penalty or learning rate is chosen by; None where that is its accuracy, and in
    records that hold accuracies alone (those until 2026-11-29)."""

    def read(record: Record) -> float | None:
        numbers = record.get("task_numbers", {}).get(method, {}).get(task)
        return None if numbers is None or numbers["metric"] == "accuracy" else numbers["test"][numbers["metric"]]

    return read


def metric_names(records: list[Record], method: str = "probe") -> dict[str, str]:
    """Task to that metric, of the tasks that have another one than accuracy."""
    numbers = [found for record in records for found in record.get("task_numbers", {}).get(method, {}).items()]
    return {task: found["metric"] for task, found in numbers if found["metric"] != "accuracy"}


def flops_ratio(comparisons: Comparisons, arm: str) -> Estimate | None:
    """Operations a token over the baseline's."""
    return comparisons.ratio(arm, lambda record: record["cost"]["per_token"]["flops"])


def ahead_of(record: Record) -> ReadAhead:
    """What a run from scratch read ahead; by its settings in records that lack it (those until 2026-11-29)."""
    kept = record["cost"].get("read_ahead")
    return read_ahead(record["settings"]) if kept is None else ReadAhead(**kept)


def total_flops(record: Record) -> float:
    """Reads the operations of a training from scratch, with what was read ahead for it."""
    known = "read_ahead" in record["cost"]
    return record["cost"]["flops"] + (0.0 if known else ahead_of(record).flops)


def share_read_ahead(record: Record) -> float:
    """Reads which share of these operations trained nothing."""
    return ahead_of(record).flops / total_flops(record)


def share_curve(corpora: dict[str, list[Record]], roles: Roles) -> list[dict]:
    """
    The gain by a domain's share of the training text.

    Args:
        corpora: name of a corpus to the records of its runs.
        roles: which arm is what.

    Returns:
        A row for each domain of each corpus, sorted by share: ratios of the default arm and of the oracle to dense,
        None where not measured.
    """
    rows = []
    for corpus, records in corpora.items():
        comparisons = Comparisons(records, roles)
        for domain in comparisons.domains:
            read = perplexity(domain)
            row = {"corpus": corpus, "domain": domain, "share": _share(records, domain)}
            row |= {"default": comparisons.ratio(roles.default, read), "oracle": comparisons.ratio(roles.oracle, read)}
            rows.append(row)
    return sorted(rows, key=lambda row: (row["share"], row["domain"], row["corpus"]))


def _share(records: list[Record], domain: str) -> float:
    return records[0]["settings"]["mixture"]["shares"][domain]


__all__ = [
    "JUDGED_GENERAL_TASKS",
    "TASKS",
    "Comparisons",
    "Roles",
    "accuracy",
    "ahead_of",
    "all_text",
    "at_position",
    "flops_ratio",
    "in_bin",
    "metric_names",
    "own_metric",
    "perplexity",
    "share_curve",
    "share_read_ahead",
    "total_flops",
]
