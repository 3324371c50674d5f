# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""What scaling.py shows of its results: Markdown tables and one picture, a panel a part."""

from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from modeling_cse.analysis.style import DOMAIN_COLOURS, LEGEND, new_figure, save_figure


STYLES = ("-", "--")


def spread(value: dict[str, float]) -> str:
    """A median with its quartiles."""
    return f"{value['median']:.3g} ({value['lower']:.3g} to {value['upper']:.3g})"


def megabytes(value: int | None) -> str:
    """Bytes in units of 10 ** 6; a dash where they could not be told."""
    return "-" if value is None else f"{value / 1e6:.1f}"


# Of each curve the columns: a heading, and what of a point stands below it.
COLUMNS: dict[str, dict[str, Callable[[dict], str]]] = {
    "experts": {
        "experts": lambda p: str(p["experts"]),
        "tokens": lambda p: f"{p['tokens']:,}",
        "routed": lambda p: f"{p['routed']:.0%}",
        "precision": lambda p: p["precision"],
        "µs a routed token": lambda p: spread(p["microseconds"]),
        "over the fewest": lambda p: spread(p["over_fewest"]),
        "router alone, µs a token": lambda p: spread(p["router"]),
        "without products, µs a routed token": lambda p: f"{p['without_products']:.3g}",
        "products": lambda p: f"{p['products']:.3g}",
    },
    "clusters": {
        "clusters": lambda p: f"{p['clusters']:,}",
        "width": lambda p: str(p["width"]),
        "routing": lambda p: p["routing"],
        "µs a token": lambda p: spread(p["microseconds"]),
        "peak, MB": lambda p: megabytes(p["peak_bytes"]),
    },
    "reclustering": {
        "reservoir": lambda p: f"{p['reservoir']:,}",
        "width": lambda p: str(p["width"]),
        "seconds a fit and site": lambda p: spread(p["seconds"]),
        "peak, MB": lambda p: megabytes(p["peak_bytes"]),
        "reservoir, MB": lambda p: megabytes(p["reservoir_bytes"]),
    },
    "kmeans": {
        "method": lambda p: f"`{p['method']}`",
        "rows": lambda p: f"{p['rows']:,}",
        "width": lambda p: str(p["width"]),
        "k": lambda p: str(p["clusters"]),
        "seconds": lambda p: spread(p["seconds"]),
        "inertia over the least": lambda p: f"{p['excess']:+.2%}",
        "within 1 %": lambda p: "yes" if p["close"] else "no",
    },
}


def tables(results: dict) -> str:
    """Markdown: a table a curve, a row a point."""
    texts = []
    for part in results.values():
        for curve, points in part["curves"].items():
            columns = COLUMNS[curve]
            rows = [list(columns), ["---:"] * len(columns)]
            rows += [[cell(point) for cell in columns.values()] for point in points]
            head = f"{curve} ({part['machine']}, commit {part['commit']}, {part['date']}, {part['rounds']} rounds)\n\n"
            texts.append(head + "".join(f"| {' | '.join(row)} |\n" for row in rows))
    return "\n".join(texts)


def draw(results: dict, path: Path) -> None:
    """Writes the picture: a panel for each part there is, medians as lines, quartiles as bands."""
    figure = new_figure(5.4 * len(results), 4.6)
    axes = figure.subplots(1, len(results), squeeze=False)[0]
    for axis, (part, result) in zip(axes, results.items(), strict=True):
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        PANELS[part](axis, result["curves"][part])
        axis.grid(alpha=0.25)
        axis.legend(**{**LEGEND, "loc": "best"})
    save_figure(figure, path)


def draw_experts(axis: Axes, points: list[dict]) -> None:
    _lines(
        axis,
        points,
        "experts",
        "microseconds",
        lambda p: f"{p['tokens']:,} tokens, {p['routed']:.0%} routed",
        lambda p: p["precision"],
    )
    axis.set(title="Experts of one FFN", xlabel="experts", ylabel="µs a routed token, forward and backward")


def draw_clusters(axis: Axes, points: list[dict]) -> None:
    _lines(axis, points, "clusters", "microseconds", lambda p: f"width {p['width']}", lambda p: p["routing"])
    axis.set(title="Clusters of one router", xlabel="clusters", ylabel="µs a token, forward")


def draw_reclustering(axis: Axes, points: list[dict]) -> None:
    _lines(axis, points, "reservoir", "seconds", lambda p: f"width {p['width']}", lambda p: "")
    axis.set(title="One fit of one site", xlabel="sequences in the reservoir", ylabel="seconds")


PANELS = {"experts": draw_experts, "clusters": draw_clusters, "reclustering": draw_reclustering}


def _lines(axis: Axes, points: list[dict], x: str, y: str, colour: Callable, style: Callable) -> None:
    """A line for each pair of what `colour` and `style` say of a point, in the order in which they come."""
    colours, styles = (list(dict.fromkeys(map(say, points))) for say in (colour, style))
    for name in colours:
        for kind in styles:
            line = [point for point in points if (colour(point), style(point)) == (name, kind)]
            look = DOMAIN_COLOURS[colours.index(name)]
            place, label = [point[x] for point in line], ", ".join(filter(None, (name, kind)))
            middle, lower, upper = ([point[y][part] for point in line] for part in ("median", "lower", "upper"))
            axis.plot(place, middle, color=look, linestyle=STYLES[styles.index(kind)], marker="o", ms=3, label=label)
            axis.fill_between(place, lower, upper, color=look, alpha=0.15, linewidth=0)
    ticks = sorted({point[x] for point in points})
    axis.set_xticks(ticks)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    middles = [point[y]["median"] for point in points]
    if max(middles) < 10 * min(middles):  # within one power of ten its first digits have to be named too
        axis.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
