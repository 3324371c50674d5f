# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""What all pictures share: colours, legends, and figures made without matplotlib's global state."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


# Palettes that readers with any colour vision tell apart: Okabe and Ito's (its yellow is too pale for lines) and Tol's
# "muted". Domains, runs and experts never share a colour, because they have nothing to do with each other.
DOMAIN_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
RUN_COLOURS = ("#000000", "#7A7A7A", "#444444", "#A8A8A8")
EXPERT_COLOURS = ("#332288", "#DDCC77", "#AA4499", "#88CCEE", "#882255", "#44AA99", "#999933", "#CC6677", "#117733")
COMMON_COLOUR = "#C8C8C8"

LONGEST_LABEL = 40
LEGEND = {"loc": "upper right", "framealpha": 0.85, "edgecolor": "none", "handlelength": 3, "fontsize": 9}


def expert_colour(expert: int) -> str:
    """The colour of an expert slot; -1 is the common module."""
    return COMMON_COLOUR if expert < 0 else EXPERT_COLOURS[expert % len(EXPERT_COLOURS)]


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches, with a canvas of its own: pyplot's backend and figures stay untouched."""
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: str | Path) -> None:
    """Writes a PNG; its folder is made if need be."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def plain(text: str) -> str:
    """A label of one line that shows a name from data. Matplotlib takes text between dollar signs for formulas, hides
    labels that begin with an underscore, cannot draw lone surrogates, and gives a long label all the room there is."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text.replace("_", " ")).split())
    shown = line if len(line) <= LONGEST_LABEL else line[: LONGEST_LABEL - 1] + "…"
    return shown.replace("$", r"\$") or "unnamed"
