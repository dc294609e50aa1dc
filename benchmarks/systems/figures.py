"""The figures of the page."""

import pathlib
from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import numpy as np


def curves(
    ax: Any, found: dict[str, dict[str, Any]], metric: str, **style: Any
) -> None:
    """Draws the means over the seeds, and their range, of every curve with a metric.

    Args:
      ax: matplotlib axes.
      found: `Result.curves`, or some of them.
      metric: its name.
      **style: of the lines.
    """
    for name, curve in found.items():
        if metric not in curve:
            continue
        runs = np.asarray(curve[metric])
        [line] = ax.plot(curve["x"], runs.mean(0), label=name, **style)
        ax.fill_between(
            curve["x"], runs.min(0), runs.max(0), color=line.get_color(), alpha=0.15
        )
    ax.grid(alpha=0.3)


def write(
    draw: Callable[..., None],
    path: pathlib.Path,
    *arguments: Any,
    size: tuple[float, float] = (10.4, 4.0),
) -> None:
    """Draws two panels and writes them.

    Args:
      draw: function (axes, *arguments); a legend is made if it makes none.
      path: of the file.
      *arguments: see `draw`.
      size: of the figure, in inches.
    """
    figure, axes = plt.subplots(1, 2, figsize=size, layout="constrained")
    draw(axes, *arguments)
    if axes[0].get_legend_handles_labels()[0] and not figure.legends:
        axes[0].legend(frameon=False, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
