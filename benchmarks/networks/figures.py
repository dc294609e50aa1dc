"""The figure of a task: metric against sparsity."""

from typing import Any

import numpy as np

from benchmarks.networks.contenders import CONTENDERS
from benchmarks.networks.results import FINE_TUNED, ONE_SHOT, RECALIBRATED, Row
from benchmarks.networks.verdicts import DENSE_RIVALS, GRADUAL, GRADUAL_L1

# In inches; beside the panels there is room for the names of forty lines.
SIZE = (15.0, 5.0)
# Percentage points below the best line that are shown.
DEPTH = 30.0
TICKS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99)
RECIPES = {
    "any_sparsity": "black",
    "any_sparsity_sgd": "dimgray",
    "any_sparsity_sgd_strong": "gray",
    "seldom_whole": "darkred",
    "seldom_whole_sgd": "indianred",
    "often_whole": "darkgreen",
    "often_whole_sgd": "limegreen",
    "mostly_whole": "navy",
    "mostly_whole_sgd": "royalblue",
    "quarter_whole": "teal",
    "quarter_whole_sgd": "turquoise",
    "any_sparsity_sgd_4x": "sienna",
    "seldom_whole_sgd_4x": "peru",
    "quarter_whole_sgd_4x": "tan",
    "targeted": "deeppink",
    "targeted_sgd": "orchid",
    "targeted_l1": "mediumvioletred",
    "targeted_sgd_l1": "purple",
}


def draw(axes: Any, rows: list[Row], normalised: bool, metric: str) -> None:
    """One-shot; beside it recalibrated, or fine-tuned without batch normalisation.

    Args:
      axes: two matplotlib axes.
      rows: of the task.
      normalised: whether the network has batch normalisation.
      metric: what the ordinate is called.
    """
    kinds = (ONE_SHOT, RECALIBRATED if normalised else FINE_TUNED)
    for ax, kind in zip(axes, kinds, strict=True):
        for row in rows:
            _line(ax, row, kind)
        # The share of weights left, as a logarithm: what is near 100% is spread.
        ax.set_xscale("log")
        ax.invert_xaxis()
        ticks = [t for t in TICKS if kind != FINE_TUNED or t >= 0.9]
        ax.set_xticks([1 - t for t in ticks], [f"{100 * t:g}" for t in ticks])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
        ax.set_title(kind)
        ax.set_xlabel("weights pruned (%)")
        ax.set_ylabel(metric)
        top = max((v for row in rows for v in row.means(kind).values()), default=100)
        ax.set_ylim(max(0, top - DEPTH), top + 1)
    handles, labels = axes[0].get_legend_handles_labels()
    axes[0].figure.legend(
        handles, labels, loc="outside right upper", ncols=2, fontsize="x-small",
        frameon=False,
    )  # fmt: skip


def _line(ax: Any, row: Row, kind: str) -> None:
    values = row.values(kind)
    if not values:
        return
    density = [1 - sparsity for sparsity in values]
    means = [np.mean(each) for each in values.values()]
    known = row.contender in (*DENSE_RIVALS, *GRADUAL, *GRADUAL_L1, *RECIPES)
    family = bool(CONTENDERS[row.contender].targets)
    style: dict[str, Any] = {
        "linestyle": "--" if family else "-",
        "marker": "o" if family else None,
        "markersize": 4 if known else 2,
        "linewidth": 1.4 if known else 0.6,
        "alpha": 1.0 if known else 0.5,
        "label": row.name,
    }
    if row.contender in RECIPES:
        style |= {"color": RECIPES[row.contender], "linewidth": 2.4, "zorder": 5}
    [line] = ax.plot(density, means, **style)
    if known:
        low, high = ([f(v) for v in values.values()] for f in (min, max))
        ax.fill_between(density, low, high, color=line.get_color(), alpha=0.12)
