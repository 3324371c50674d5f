# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""One picture of a run and its dense twin, drawn from the log entries that the Trainer keeps."""

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from .style import DOMAIN_COLOURS, LEGEND, RUN_COLOURS, expert_colour, new_figure, plain, save_figure


# Dotted is left to the vertical lines.
STYLES = ("-", "--", "-.", (0, (6, 1, 1, 1, 1, 1)))
PERPLEXITY_KEY = re.compile(r"eval_(?:(.+)_)?perplexity", re.DOTALL)

Entries = list[dict]


def read_metrics(path: str | Path) -> Entries:
    """Read log entries from a file of JSON lines.

    A last line without its newline that is not valid JSON was being written when the run was killed: it is dropped.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: on any other line that is not a JSON object; names the file and the line.
    """
    entries = []
    # A kill can fall inside a multi-byte character, so the torn line is cut off before anything is decoded.
    lines = Path(path).read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line.decode("utf-8"))
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"`path` {str(path)!r}, line {number} is not JSON: {error}") from error
        if not isinstance(entry, dict):
            raise ValueError(f"`path` {str(path)!r}, line {number} is a {type(entry).__name__}, allowed are objects")
        entries.append(entry)
    return entries


def plot_run(runs: dict[str, Entries], routing: dict[str, list[float]] | None, path: str | Path) -> None:
    """Draw training loss, validation perplexity by domain, and who is routed where, as one PNG.

    Matplotlib's global state (backend, styles, open figures) is neither used nor changed.

    Args:
        runs: run name to log entries, as in the Trainer's `state.log_history`: "step" with "loss",
            "eval_<domain>_perplexity", or cluster entries. The first run is drawn solid, the second dashed. Where a
            step was logged twice (a resumed run), the later entry counts. At the steps with a key that ends in
            "/clusters" the experts were fitted: dotted vertical lines.
        routing: domain to the shares of its tokens that each expert slot takes, from 0 to 1; what is missing to 1
            goes to the common module. `None` leaves the panel out.
        path: the PNG to write; its folder is made if need be.

    Raises:
        ValueError: if there is no run, or on shares that are not shares.
    """
    if not runs:
        raise ValueError("`runs` is empty, allowed is at least one run name with its log entries")
    if routing is not None:
        _check_routing(routing)
    panels = 3 if routing else 2
    figure = new_figure(5.4 * panels, 4.6)
    axes = figure.subplots(1, panels)
    axes[1].sharex(axes[0])
    fitted = sorted({step for entries in runs.values() for step in _fitted_steps(entries)})
    _draw_loss(axes[0], runs)
    _draw_perplexity(axes[1], runs)
    for axis in axes[:2]:
        _mark_fits(axis, fitted)
    if routing:
        _draw_routing(axes[2], routing)
    save_figure(figure, path)


def _check_routing(routing: dict[str, list[float]]) -> None:
    counts = {domain: len(shares) for domain, shares in routing.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"`routing` has {counts} shares by domain, allowed is the same number for each")
    for domain, shares in routing.items():
        if not all(-1e-6 <= share <= 1 + 1e-6 for share in shares) or sum(shares) > 1 + 1e-6:
            raise ValueError(f"`routing` has {list(shares)} for {domain!r}, allowed are shares from 0 with a sum <= 1")


def _series(entries: Iterable[dict], key: str) -> tuple[list[float], list[float]]:
    """Steps in order, and the values of `key` at them; the last entry of a step wins."""
    points = {entry["step"]: entry[key] for entry in entries if "step" in entry and entry.get(key) is not None}
    steps = sorted(points)
    return steps, [points[step] for step in steps]


def _fitted_steps(entries: Iterable[dict]) -> set[float]:
    return {entry["step"] for entry in entries if "step" in entry and any(key.endswith("/clusters") for key in entry)}


def _domains(runs: dict[str, Entries]) -> list[str | None]:
    """Domains with a validation perplexity, in the order of their first appearance; `None` is the unnamed one."""
    keys = (key for entries in runs.values() for entry in entries for key in entry)
    return list(dict.fromkeys(match[1] for key in keys if (match := PERPLEXITY_KEY.fullmatch(key))))


def _style(index: int) -> dict:
    return {"linestyle": STYLES[index % len(STYLES)], "linewidth": 1.8}


def _marker(index: int, colour: str) -> dict:
    """Hollow for all but the first run, whose line would else vanish where two runs agree."""
    return {"marker": "o", "markersize": 4.5, "markerfacecolor": colour if index == 0 else "white"}


def _prepare(axis: Axes, title: str, label: str, x_label: str = "optimizer step") -> None:
    axis.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axis.set_xlabel(x_label)
    axis.set_ylabel(label)
    axis.grid(axis="y", color="#E4E4E4", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _draw_loss(axis: Axes, runs: dict[str, Entries]) -> None:
    _prepare(axis, "Training loss", "loss (nats per token)")
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    for index, (name, entries) in enumerate(runs.items()):
        steps, losses = _series(entries, "loss")
        # A single point makes no line.
        marker = "o" if len(steps) == 1 else None
        colour = RUN_COLOURS[index % len(RUN_COLOURS)]
        axis.plot(steps, losses, color=colour, marker=marker, label=plain(name), **_style(index))
    axis.legend(**LEGEND)


def _draw_perplexity(axis: Axes, runs: dict[str, Entries]) -> None:
    _prepare(axis, "Validation perplexity by domain", "perplexity (log scale)")
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    domains = _domains(runs)
    if not domains:
        axis.text(0.5, 0.5, "no validation perplexity was logged", transform=axis.transAxes, ha="center")
        return
    values = []
    for index, entries in enumerate(runs.values()):
        for number, domain in enumerate(domains):
            steps, found = _series(entries, "eval_perplexity" if domain is None else f"eval_{domain}_perplexity")
            colour = DOMAIN_COLOURS[number % len(DOMAIN_COLOURS)]
            axis.plot(steps, found, color=colour, **_marker(index, colour), **_style(index))
            values += [value for value in found if 0 < value < math.inf]
    if values:
        _scale_log(axis, min(values), max(values))
    colours = [DOMAIN_COLOURS[number % len(DOMAIN_COLOURS)] for number in range(len(domains))]
    handles = [Line2D([], [], color=colour, linewidth=4) for colour in colours]
    labels = ["all" if domain is None else plain(domain) for domain in domains]
    if len(runs) > 1:
        handles += [Line2D([], [], color="#444444", **_marker(i, "#444444"), **_style(i)) for i in range(len(runs))]
        labels += [plain(name) for name in runs]
    axis.legend(handles, labels, ncols=1 if len(labels) < 8 else 2, **LEGEND)


def _scale_log(axis: Axes, low: float, high: float) -> None:
    """Log scale with plain numbers at few enough ticks: the default labels only powers of ten, of which a narrow
    range may hold none."""
    axis.set_yscale("log")
    axis.set_ylim(low / 1.08, high * 1.08)
    dense, wide = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8), (1, 2, 5)
    decades = math.log10(high / low)
    axis.yaxis.set_major_locator(LogLocator(subs=dense if decades < 1 else wide if decades < 2.5 else (1,)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}" if value < 1e4 else f"{value:.0e}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _mark_fits(axis: Axes, steps: list[float]) -> None:
    """The first fit switches the experts on and is named; later ones move the clusters and are only hinted at."""
    for index, step in enumerate(steps):
        strong = index == 0
        axis.axvline(step, color="#555555", linestyle=":", linewidth=1.6 if strong else 0.7, zorder=1)
    if not steps:
        return
    # Curves fall, so the lower left is the free corner; beside a late line the label has to stand on its left.
    low, high = axis.get_xlim()
    late = steps[0] > low + 0.75 * (high - low)
    axis.annotate(
        "experts on",
        xy=(steps[0], 0),
        xycoords=axis.get_xaxis_transform(),
        xytext=(-5 if late else 5, 6),
        textcoords="offset points",
        ha="right" if late else "left",
        fontsize=9,
        color="#333333",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5},
    )


def _draw_routing(axis: Axes, routing: dict[str, list[float]]) -> None:
    _prepare(axis, "Where each domain's tokens go", "share of the domain's tokens", "")
    domains, slots = list(routing), len(next(iter(routing.values())))
    bars = {f"expert {slot}": [routing[domain][slot] for domain in domains] for slot in range(slots)}
    bars["common"] = [max(0.0, 1.0 - sum(routing[domain])) for domain in domains]
    width = 0.84 / len(bars)
    for index, (label, shares) in enumerate(bars.items()):
        colour = expert_colour(-1 if label == "common" else index)
        places = [place + (index - (len(bars) - 1) / 2) * width for place in range(len(domains))]
        axis.bar(places, shares, width * 0.92, color=colour, label=label)
    names = [plain(domain) for domain in domains]
    crowded = sum(len(name) for name in names) > 40
    axis.set_xticks(range(len(names)), names, rotation=30 if crowded else 0, ha="right" if crowded else "center")
    axis.tick_params(axis="x", length=0)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    # Bars end at 1, so the legend gets room of its own above them.
    columns = min(len(bars), 4 if len(bars) > 5 else 3)
    axis.set_ylim(0, 1.04 + 0.075 * math.ceil(len(bars) / columns))
    axis.legend(ncols=columns, **LEGEND | {"loc": "upper center", "handlelength": 1.5})
