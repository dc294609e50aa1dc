"""The published rows of the methods that know no classes, and how far means scatter.

Adagrad and the Frank-Wolfe methods share with prunAdag the start, Adagrad the first
weight too. So their rows tell of those two points apart from Algorithm 2.1.
"""

from typing import NamedTuple

import numpy as np

from benchmarks.article import published, runs
from benchmarks.article.methods import SETTINGS, Setting
from benchmarks.article.pruning import SPARSITIES
from benchmarks.problems import Problem

# What is varied for each method; what it does not know stays as it is.
GRID: dict[str, list[Setting]] = {
    "Adagrad": [Setting(s, z, 1.0) for s in runs.STARTS for z in (0.01, 0.1)],
    "FW1": [Setting(s, 0.1, c) for s in runs.STARTS for c in (1.0, 2.0)],
    "FW2": [Setting(s, 0.1, 1.0) for s in runs.STARTS],
}
SAMPLE, RESAMPLED = 20, 10_000


class Row(NamedTuple):
    """The runs of a method on a case in a setting."""

    method: str
    case: str
    setting: Setting
    sparsities: tuple[float, ...]
    published: tuple[float, ...]
    rho: np.ndarray  # [runs, sparsities]


def _cells(case: str, method: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    cells = {
        sparsity: row[method]
        for (name, sparsity), row in published.TABLE_2.items()
        if name == case and method in row
    }
    return tuple(cells), tuple(cells.values())


def rho(
    problem: Problem,
    method: str,
    setting: Setting,
    count: int,
    sparsities: tuple[float, ...],
) -> np.ndarray:
    """Rho after pruning, of shape [count, sparsities]."""
    data = runs.batch(problem, count, setting.start)
    _, measured = runs.run(problem, data, method, problem.max_iterations, setting)
    return np.asarray(measured.rho)[:, [SPARSITIES.index(s) for s in sparsities]]


def study(problems: dict[str, Problem], count: int) -> list[Row]:
    """Runs each method in each of its settings on each case.

    Args:
      problems: the cases by name.
      count: runs of each.

    Returns:
      The rows, by method, case and setting.
    """
    rows = []
    for method, settings in GRID.items():
        for case, problem in problems.items():
            sparsities, figures = _cells(case, method)
            for setting in settings:
                found = rho(problem, method, setting, count, sparsities)
                rows.append(Row(method, case, setting, sparsities, figures, found))
    return rows


class Scatter(NamedTuple):
    """How means over 20 runs are distributed, arrays [sparsities]."""

    sparsities: tuple[float, ...]
    published: np.ndarray
    low: np.ndarray  # 5% of the means are below it
    middle: np.ndarray
    high: np.ndarray  # 5% of the means are above it
    near: np.ndarray  # share of the means within `factor` of the published


def scatter(problem: Problem, case: str, count: int, factor: float) -> Scatter:
    """Means of v3 over 20 runs, drawn again and again from many runs.

    Args:
      problem: the case.
      case: its name.
      count: runs, from which samples of 20 are drawn.
      factor: how near counts as near.

    Returns:
      The `Scatter`.
    """
    sparsities, figures = _cells(case, "v3")
    values = rho(problem, "v3", SETTINGS["published"], count, sparsities)
    drawn = np.random.default_rng(0).integers(count, size=(RESAMPLED, SAMPLE))
    means = values[drawn].mean(1)
    target = np.array(figures)
    near = np.abs(np.log(means / target)) <= np.log(factor)
    low, middle, high = np.quantile(means, (0.05, 0.5, 0.95), axis=0)
    return Scatter(sparsities, target, low, middle, high, near.mean(0))


def plain(rows: list[Row], found: Scatter) -> dict[str, object]:
    """The results as JSON has them."""
    return {
        "others": [{**row._asdict(), "rho": row.rho.tolist()} for row in rows],
        "scatter": {k: np.asarray(v).tolist() for k, v in found._asdict().items()},
    }
