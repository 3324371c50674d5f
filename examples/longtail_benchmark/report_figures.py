# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""What the report shows as pictures: each is drawn only if there is something to draw."""

import math
from pathlib import Path

from comparisons import Comparisons, at_position, perplexity
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter
from run_records import LONG_TAIL

from modeling_cse.analysis.style import DOMAIN_COLOURS, LEGEND, new_figure, plain, save_figure
from modeling_cse.evaluation import Estimate


FAR = 2.0  # times dense's perplexity


def _prepare(axis: Axes, title: str, grid: str) -> None:
    axis.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axis.grid(axis=grid, color="#E4E4E4", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _arms(value: Estimate) -> tuple[float, float]:
    """How far an interval reaches below and above its value."""
    return (0.0, 0.0) if value.lower is None else (value.value - value.lower, value.upper - value.value)


def draw_ratios(comparisons: Comparisons, path: Path) -> bool:
    """
    Long-tail perplexity over dense by arm, with intervals. Stages of one domain have a table of their own; arms of
    `FAR` and more, diverged or untrained ones, would leave the others no room. Returns whether there was something to
    draw.
    """
    found = {arm: comparisons.ratio(arm, perplexity(LONG_TAIL)) for arm in comparisons.scratch}
    found = {arm: value for arm, value in found.items() if value is not None and value.value < FAR}
    found.pop(comparisons.roles.baseline, None)
    if not found:
        return False
    order = sorted(found, key=lambda arm: found[arm].value, reverse=True)
    figure = new_figure(7.2, 1.3 + 0.34 * len(order))
    axis = figure.subplots()
    _prepare(axis, f"Long-tail test perplexity over {plain(comparisons.roles.baseline)}'s", "x")
    for place, arm in enumerate(order):
        value = found[arm]
        low, high = _arms(value)
        interval = [[low], [high]] if value.lower is not None else None
        axis.errorbar(value.value, place, xerr=interval, fmt="o", color=DOMAIN_COLOURS[0], capsize=3, markersize=5)
    axis.axvline(1.0, color="#555555", linestyle=":", linewidth=1.2)
    axis.set_yticks(range(len(order)), [f"{plain(arm)} ({found[arm].seeds})" for arm in order])
    axis.set_xlabel("perplexity ratio (seeds in parentheses, 95 % over seeds)")
    save_figure(figure, path)
    return True


def draw_positions(comparisons: Comparisons, path: Path) -> bool:
    """Long-tail gain over dense by position in the block, of the arms that have a role."""
    roles = comparisons.roles
    named = (roles.default, roles.oracle, roles.wide, roles.switch, roles.random)
    places = list(comparisons.records[0]["by_position"]) if comparisons.records else []
    curves = {arm: [comparisons.ratio(arm, at_position(place)) for place in places] for arm in dict.fromkeys(named)}
    curves = {arm: values for arm, values in curves.items() if values and None not in values}
    if not curves:
        return False
    figure = new_figure(6.4, 4.4)
    axis = figure.subplots()
    _prepare(axis, "Long-tail gain by position in the block", "y")
    for index, (arm, values) in enumerate(curves.items()):
        shift = 0.06 * (index - (len(curves) - 1) / 2)
        x = [place + shift for place in range(len(places))]
        bars = list(zip(*(_arms(value) for value in values), strict=True))
        colour = DOMAIN_COLOURS[index % len(DOMAIN_COLOURS)]
        axis.errorbar(x, [v.value for v in values], yerr=bars, color=colour, marker="o", capsize=3, label=plain(arm))
    axis.axhline(1.0, color="#555555", linestyle=":", linewidth=1.2)
    axis.set_xticks(range(len(places)), places)
    axis.set_xlabel("position of the token that predicts")
    axis.set_ylabel(f"perplexity over {plain(roles.baseline)}'s")
    axis.legend(**LEGEND | {"loc": "best"})
    save_figure(figure, path)
    return True


def draw_shares(rows: list[dict], path: Path) -> bool:
    """Perplexity over dense by a domain's share, a line a domain; drawn from two shares on."""
    rows = [row for row in rows if row["default"] is not None and math.isfinite(row["default"].value)]
    if len({row["share"] for row in rows}) < 2:
        return False
    figure = new_figure(6.4, 4.4)
    axis = figure.subplots()
    _prepare(axis, "Gain by a domain's share of the training text", "y")
    for index, domain in enumerate(sorted({row["domain"] for row in rows})):
        mine = [row for row in rows if row["domain"] == domain]
        values = [row["default"] for row in mine]
        bars = list(zip(*(_arms(value) for value in values), strict=True))
        colour = DOMAIN_COLOURS[index % len(DOMAIN_COLOURS)]
        shares = [row["share"] for row in mine]
        axis.errorbar(
            shares, [v.value for v in values], yerr=bars, color=colour, marker="o", capsize=3, label=plain(domain)
        )
    axis.axhline(1.0, color="#555555", linestyle=":", linewidth=1.2)
    axis.set_xscale("log", base=2)
    axis.set_xticks(sorted({row["share"] for row in rows}))
    axis.xaxis.set_major_formatter(PercentFormatter(1.0))
    axis.set_xlabel("share of the training tokens")
    axis.set_ylabel("perplexity of the default arm over dense")
    axis.legend(**LEGEND | {"loc": "best"})
    save_figure(figure, path)
    return True


__all__ = ["draw_positions", "draw_ratios", "draw_shares"]
