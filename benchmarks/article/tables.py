"""Tables of the article: the published figure beside each measured one.

Every table is rows in long form, one a cell of the article's table, which are written
as CSV, and from which `markdown` makes the article's form.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from benchmarks.article import published
from benchmarks.article.pruning import SPARSITIES
from benchmarks.article.results import CONVERGED, Family, Methods, at, best, means

Rows = list[dict[str, Any]]

# The sparsities of tables that the article has no figures for at hand.
TENTHS = tuple(s for s in SPARSITIES if s > 0 and round(100 * s) % 10 == 0)
# Of classification: where the article has figures for some problem.
CLASSIFIED = (0.65, 0.7, 0.75, 0.85, 0.9, 0.95)


def cells(
    family: Family,
    quantity: str,
    known: published.Cells,
    problems: Iterable[str],
    sparsities: tuple[float, ...],
) -> Rows:
    """Measured and published figures, one row a problem, sparsity and method.

    Args:
      family: the runs.
      quantity: "rho", or "accuracy", which becomes percent.
      known: the published figures.
      problems: which problems; those not among the runs are left out.
      sparsities: which, beside those with published figures.

    Returns:
      Rows with mean, standard deviation (over the runs, n - 1), median, the published
      figure or None, and the ratio of mean to published or None.
    """
    rows: Rows = []
    factor = 100 if quantity == "accuracy" else 1
    for problem in problems:
        article = published.NAMED.get(problem, problem)
        own = [s for s in SPARSITIES if s in sparsities or (article, s) in known]
        for sparsity in own if problem in family.problems else ():
            for method, quantities in family.problems[problem].items():
                values = factor * at(quantities, quantity, sparsity)
                figure = known.get((article, sparsity), {}).get(method)
                mean = float(values.mean())
                rows.append(
                    {
                        "problem": problem,
                        "sparsity": sparsity,
                        "method": method,
                        "mean": mean,
                        "deviation": float(
                            np.std(values, ddof=min(1, len(values) - 1))
                        ),
                        "median": float(np.median(values)),
                        "least": float(values.min()),
                        "largest": float(values.max()),
                        "runs": len(values),
                        "published": figure,
                        "ratio": None if figure is None else mean / figure,
                    }
                )
    return rows


def table_2(family: Family) -> Rows:
    """Rho on the random least squares."""
    cases = [f"A{i}" for i in range(1, 7)]
    return cells(family, "rho", published.TABLE_2, cases, TENTHS)


def table_3(family: Family) -> Rows:
    """Rho on SPARCO; the published figures are not at hand."""
    return cells(family, "rho", {}, family.problems, TENTHS)


def table_4(family: Family) -> Rows:
    """Test accuracy, in percent, of the pruned classifiers."""
    return cells(family, "accuracy", published.TABLE_4, family.problems, CLASSIFIED)


def converged(row: dict[str, Any]) -> bool:
    """Whether mean and published figure both count as converged."""
    return row["mean"] <= CONVERGED and row["published"] <= CONVERGED


def approximate(row: dict[str, Any]) -> bool:
    """Whether the published figure is an approximate one."""
    key = (row["problem"], row["sparsity"], row["method"])
    return key in published.APPROXIMATE


def number(value: float, digits: int = 2) -> str:
    """A figure as text, rounded to so many digits.

    Args:
      value: any.
      digits: significant ones.

    Returns:
      Text, without an exponent where that is short.

    Examples:
      >>> number(1377.8), number(0.0123, 1), number(9.49e-10), number(0.0)
      ('1400', '0.01', '9.5e-10', '0')
    """
    rounded = f"{value:.{digits}g}"
    if value == 0 or not 1e-3 <= abs(value) < 1e5:
        return rounded
    return np.format_float_positional(float(rounded), trim="-")


def _rho_cell(row: dict[str, Any]) -> str:
    mean, deviation, median = (row[n] for n in ("mean", "deviation", "median"))
    text = f"{number(mean)} ± {number(deviation, 1)} ({number(median)})"
    if row["published"] is None:
        return text
    about = "~" if approximate(row) else ""
    ratio = "converged" if converged(row) else f"x {number(row['ratio'])}"
    return f"{text}<br>article {about}{number(row['published'], 3)}: {ratio}"


def _accuracy_cell(row: dict[str, Any]) -> str:
    text = f"{row['mean']:.2f} ± {row['deviation']:.1f}"
    if row["published"] is None:
        return text
    difference = row["mean"] - row["published"]
    return f"{text}<br>article {row['published']:.2f}: {difference:+.1f}"


def markdown(rows: Rows, quantity: str) -> str:
    """Rows in the form of the article's tables, a column a method.

    Args:
      rows: from `cells`.
      quantity: "rho" or "accuracy".

    Returns:
      A Markdown table.
    """
    cell = _accuracy_cell if quantity == "accuracy" else _rho_cell
    methods = list(dict.fromkeys(row["method"] for row in rows))
    lines: dict[tuple[str, float], dict[str, str]] = {}
    for row in rows:
        line = lines.setdefault((row["problem"], row["sparsity"]), {})
        line[row["method"]] = cell(row)
    shown: Rows = [
        {"problem": problem, "pruned": f"{100 * sparsity:.0f}%", **line}
        for (problem, sparsity), line in lines.items()
    ]
    return plain(shown, ["problem", "pruned", *methods])


def plain(rows: Rows, names: list[str]) -> str:
    """Rows of texts as a Markdown table."""
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    lines += ["| " + " | ".join(row.get(n, "") for n in names) + " |" for row in rows]
    return "\n".join(lines)


def columns(rows: Rows) -> dict[str, list[Any]]:
    """Rows as columns by name, for CSV, floats to six digits."""

    def short(value: Any) -> Any:
        return float(f"{value:.6g}") if isinstance(value, float) else value

    return {name: [short(row[name]) for row in rows] for name in rows[0]}


def shares_won(methods: Methods, name: str, sparsity: float) -> dict[str, float]:
    """The share of the runs in which each method is best; several can tie in a run."""
    largest = name == "accuracy"
    values = {method: at(q, name, sparsity) for method, q in methods.items()}
    runs = len(next(iter(values.values())))
    won = [
        best({method: float(v[run]) for method, v in values.items()}, largest)
        for run in range(runs)
    ]
    return {method: sum(method in w for w in won) / runs for method in methods}


def ranking(family: Family, name: str) -> Rows:
    """Who is best on each problem at each sparsity.

    Args:
      family: the runs.
      name: "rho", where small is good, or "accuracy".

    Returns:
      Rows with the mean of each method, whether it is the best of them, and the share
      of runs in which the method was best.
    """
    rows: Rows = []
    for problem, methods in family.problems.items():
        for sparsity in SPARSITIES[1:]:
            mean = means(methods, name, sparsity)
            winners = best(mean, largest=name == "accuracy")
            won = shares_won(methods, name, sparsity)
            rows += [
                {
                    "problem": problem,
                    "sparsity": sparsity,
                    "method": method,
                    "mean": mean[method],
                    "best mean": int(method in winners),
                    "share of runs won": won[method],
                }
                for method in methods
            ]
    return rows


def ranking_markdown(rows: Rows) -> str:
    """Of a ranking, the method with the best mean, a row a problem.

    Args:
      rows: from `ranking`.

    Returns:
      A Markdown table; in brackets the percentage of the runs that the method won.
    """
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        if row["best mean"]:
            line = lines.setdefault(row["problem"], {"problem": row["problem"]})
            percent = f"{100 * row['sparsity']:.0f}%"
            won = f"{row['method']} ({100 * row['share of runs won']:.0f})"
            line[percent] = f"{line[percent]}, {won}" if percent in line else won
    names = list(dict.fromkeys(name for line in lines.values() for name in line))
    return plain(list(lines.values()), names)
