# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Results as a Markdown table and as a picture."""

from pathlib import Path

from modeling_cse.analysis.style import DOMAIN_COLOURS, LEGEND, new_figure, save_figure

from .contenders import DENSE, NAMES
from .shapes import SHAPES


OTHERS = [name for name in NAMES if name != DENSE]
LABELS = {
    "cse_replace": "CSE, replace",
    "cse_add": "CSE, add",
    "cse_evidence": "CSE, default (add, by evidence)",
    "mixtral": "in-tree sparse layer (Mixtral)",
    "naive": "loop over samples",
}
UNITS = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6))


def case_of(record: dict) -> tuple[str, ...]:
    """What contenders are compared in: shape, measure, batch, and how it was computed."""
    how = [record["device"], record["dtype"], record["cache"], "compiled" if record["compiled"] else None]
    how.append("memory kept" if record["allocator"] else None)
    size = None if record["batch"] is None else f"{record['batch']} x {record['length']}"
    return (record["shape"], record["measure"], size or "", " ".join(word for word in how if word))


def cases(records: list[dict]) -> dict[tuple[str, ...], dict[str, dict]]:
    """Records by case and contender."""
    found: dict[tuple[str, ...], dict[str, dict]] = {}
    for record in records:
        found.setdefault(case_of(record), {})[record["contender"]] = record
    return found


def table(records: list[dict]) -> str:
    """Markdown: a row a case; time (or memory) of the dense twin, and the ratio of the others to it with quartiles."""
    rows = [["shape", "measure", "batch x tokens", "", DENSE, *OTHERS], ["---"] * 4 + ["---:"] * len(NAMES)]
    for case, by_name in cases(records).items():
        rows.append([*case, *(_cell(by_name.get(name)) for name in NAMES)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _cell(record: dict | None) -> str:
    if record is None:
        return ""
    details = record["details"]
    if record["measure"] == "reclustering":
        shares = [f"{share:.1%}" for share in details["share_of_training"].values()]
        return " / ".join([_time(record["seconds"]), *shares])
    if record["contender"] == DENSE:
        return _time(record["seconds"]) if record["seconds"] else f"{details['peak_bytes'] / 2**20:.0f} MiB"
    if record["measure"] == "memory":
        return f"{record['ratio']:.3f} to {details['ratio_with_gradients']:.3f}"
    low, high = record["quartiles"]
    return f"{record['ratio']:.3f} ({low:.3f} to {high:.3f})"


def _time(seconds: float) -> str:
    unit, size = next(((unit, size) for unit, size in UNITS if seconds >= size), UNITS[-1])
    return f"{seconds / size:.3g} {unit}"


def plot(records: list[dict], path: Path) -> None:
    """Dots with quartile whiskers: a panel a shape, a row a case, a colour a contender; the line is the dense twin."""
    compared = [record for record in records if record["ratio"] is not None]
    shapes = [name for name in SHAPES if any(record["shape"] == name for record in compared)]
    labels = sorted({case_of(record)[1:] for record in compared})
    figure = new_figure(2.2 + 3.2 * len(shapes), 1.2 + 0.6 * len(labels))
    panels = figure.subplots(1, len(shapes), sharey=True, squeeze=False)[0]
    for panel, shape in zip(panels, shapes, strict=True):
        for place, name in enumerate(OTHERS):
            chosen = [record for record in compared if (record["shape"], record["contender"]) == (shape, name)]
            if chosen:
                heights = [labels.index(case_of(record)[1:]) + 0.14 * (place - 2) for record in chosen]
                _dots(panel, chosen, heights, DOMAIN_COLOURS[place], LABELS[name])
        panel.axvline(1.0, color="black", linewidth=0.8)
        panel.set(title=shape, xlabel="time or memory over the dense model's", xscale="log")
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter("{x:g}")
        panel.tick_params(axis="x", which="both", labelsize=7)
        panel.grid(axis="x", which="both", alpha=0.25)
    panels[0].set_yticks(range(len(labels)), [", ".join(word for word in label if word) for label in labels])
    panels[0].invert_yaxis()
    # a contender may be in some panels only
    labelled = [zip(*panel.get_legend_handles_labels(), strict=True) for panel in panels]
    handles = {name: dots for pairs in labelled for dots, name in pairs}
    place = {"loc": "outside upper center", "ncols": 2, "handlelength": 1}
    figure.legend(handles.values(), handles.keys(), **{**LEGEND, **place})
    save_figure(figure, path)


def _dots(panel, records: list[dict], heights: list[float], colour: str, label: str) -> None:
    ratios = [record["ratio"] for record in records]
    below = [record["ratio"] - record["quartiles"][0] for record in records]
    above = [record["quartiles"][1] - record["ratio"] for record in records]
    panel.errorbar(ratios, heights, xerr=[below, above], fmt="o", color=colour, label=label, markersize=4, capsize=2)
