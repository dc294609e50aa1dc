"""Figures: few lines, each named at its end, one colour a method everywhere."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.bench import tables
from benchmarks.bench.records import Rows

# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = {
    "any_sparsity": "#D55E00",
    "targeted": "#CC79A7",
    "gradual pruning": "#0072B2",
    "RigL": "#009E73",
    "CrAM+": "#E69F00",
    "dense": "#555555",
}
MOST_LINES = 6
SIZE = (7.5, 4.5)
# Room for names, as a share of the axis, and between them, as a share of its height.
_APART = 0.055


def accuracy(title: str, rows: Rows, lines: Sequence[tuple[str, str, str]]) -> Any:
    """Accuracy against sparsity; the axis is the logarithm of the errors.

    Args:
      title: what the task is.
      rows: of the CSV of a race.
      lines: method, setting and base of each line, at most six.

    Returns:
      A matplotlib figure.

    Raises:
      ValueError: for more lines than can be told apart.
    """
    import matplotlib.figure

    if len(lines) > MOST_LINES:
        raise ValueError(f"lines must be at most {MOST_LINES}; got {len(lines)}.")
    figure = matplotlib.figure.Figure(SIZE, layout="constrained")
    axes = figure.subplots()
    ends = []
    for method, setting, base in lines:
        own = [
            row
            for row in rows
            if (row["method"], row["setting"], row["base"]) == (method, setting, base)
            and float(row["sparsity"]) > 0
        ]
        if not own:
            continue
        kept = [100 - 100 * float(row["sparsity"]) for row in own]
        errors = [100 - np.array(tables.numbers(r["accuracy by seed"])) for r in own]
        means = [float(e.mean()) for e in errors]
        colour = COLOURS[method]
        each = int(own[0]["trainings"]) > 1
        axes.plot(
            kept, means, color=colour, marker="o", linestyle="--" if each else "-"
        )
        low, high = ([float(f(e)) for e in errors] for f in (np.min, np.max))
        axes.fill_between(kept, low, high, color=colour, alpha=0.15, linewidth=0)
        name = f"{method}, {setting}" if setting else method
        ends.append((means[-1], kept[-1], name, colour))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.invert_xaxis()
    axes.invert_yaxis()
    ticks = sorted({100 - 100 * float(r["sparsity"]) for r in rows} - {100.0})
    axes.set_xticks(ticks, [f"{100 - tick:g}%" for tick in ticks])
    low, high = sorted(axes.get_ylim())
    shown = [e for e in (1, 1.5, 2, 3, 5, 10, 20, 50, 90) if low <= e <= high]
    axes.set_yticks(shown, [f"{100 - e:g}%" for e in shown])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("weights pruned")
    axes.set_ylabel("test accuracy")
    axes.set_title(f"{title} (dashed: a training for each sparsity)", fontsize="medium")
    _name_ends(axes, ends)
    return figure


def _name_ends(axes: Any, ends: list[tuple[float, float, str, str]]) -> None:
    """Names beside the ends of lines, pushed apart where they would overlap."""
    if not ends:
        return
    bottom, top = axes.get_ylim()
    places = [float(np.log(y / bottom) / np.log(top / bottom)) for y, *_ in ends]
    last = -np.inf
    for i in np.argsort(places):
        last = max(places[i], last + _APART)
        places[i] = last
    for place, (_, x, name, colour) in zip(places, ends, strict=True):
        axes.annotate(
            name,
            (x, place),
            xycoords=("data", "axes fraction"),
            xytext=(8, 0),
            textcoords="offset points",
            color=colour,
            va="center",
            annotation_clip=False,
        )
