"""The measured rows as Markdown tables and as a plot."""

import pathlib
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np

_LINES = {
    "optax.adagrad": ("tab:gray", "o"),
    "optax.adam": ("black", "s"),
    "v1, global": ("tab:green", "D"),
    "v2, global": ("tab:purple", "v"),
    "v3, global": ("tab:orange", "^"),
    "v4, global": ("tab:blue", "P"),
}
_TREES = {"flat": "tab:blue", "transformer": "tab:orange", "ResNet": "tab:gray"}


class Table(NamedTuple):
    """Rows and what to say of them.

    Attributes:
      title: heading.
      note: a sentence or two above the table.
      rows: column name -> value; a row that was not measured says why in "skipped".
      columns: names of the columns to show; None shows all.
    """

    title: str
    note: str
    rows: list[dict[str, Any]]
    columns: tuple[str, ...] | None = None


def cell(value: Any) -> str:
    """A value as the text of a table's cell."""
    if value is None:
        return ""
    if isinstance(value, list):
        return "-".join(map(cell, value))
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def to_markdown(table: Table) -> str:
    """A table as Markdown, its title and note above it.

    Args:
      table: what to show; columns that no row has are left out.

    Returns:
      The text.
    """
    names = list(dict.fromkeys(name for row in table.rows for name in row))
    if table.columns is not None:
        names = [name for name in (*table.columns, "skipped") if name in names]
    lines = [f"## {table.title}", "", table.note, ""]
    if names:
        lines += ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for row in table.rows:
        lines.append("| " + " | ".join(cell(row.get(n)) for n in names) + " |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], size: int, path: pathlib.Path) -> None:
    """Time a parameter against n, and ratios to optax.adagrad at one n.

    Args:
      rows: from `step_cost.steps`, of one or more sizes.
      size: the n of the ratios.
      path: of the PNG file.
    """
    rows = [row for row in rows if "median ms" in row]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11.0, 5.2), layout="constrained"
    )
    for name, (color, marker) in _LINES.items():
        own = [r for r in rows if (r["optimizer"], r["parameters"]) == (name, "flat")]
        own = sorted(own, key=lambda row: row["n"])
        left.plot(
            [row["n"] for row in own],
            [row["ns a parameter"] for row in own],
            marker=marker,
            markersize=4,
            color=color,
            label=name,
        )
    left.set_xscale("log")
    left.set_yscale("log")
    left.set_xlabel("parameters, one flat float32 array")
    left.set_ylabel("time of a step (ns a parameter)")
    left.legend(frameon=False, fontsize="small")
    left.grid(alpha=0.3)

    at_size = [row for row in rows if row["n"] == size and row["optimizer"] != "copy"]
    names = list(dict.fromkeys(row["optimizer"] for row in at_size))
    for i, (tree, color) in enumerate(_TREES.items()):
        ratios = {r["optimizer"]: r for r in at_size if r["parameters"] == tree}
        right.barh(
            [names.index(name) + 0.27 * (i - 1) for name in ratios],
            [row["/ adagrad"] for row in ratios.values()],
            height=0.25,
            color=color,
            alpha=0.8,
            label=tree,
        )
    right.axvline(1, color="black", linewidth=0.8)
    right.set_yticks(np.arange(len(names)), names, fontsize="small")
    right.invert_yaxis()
    right.set_xlabel(f"time of a step / optax.adagrad's, n = {size:,}")
    right.legend(frameon=False, fontsize="small")
    right.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=150)
    plt.close(figure)
