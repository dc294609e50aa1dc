"""The article's claims, each judged by the measured results.

Sparsities are those of the article's tables: "below 50%" is 10, 20, 30 and 40%. A
method is best where its mean over the runs is the lowest (accuracy: the highest); means
of rho up to 1e-8 count as equal.
"""

from collections.abc import Callable, Iterable

import numpy as np

from benchmarks.article import published, tables
from benchmarks.article.checks import Check, Claim, claim, percent
from benchmarks.article.results import (
    Family,
    Methods,
    Results,
    best,
    means,
)
from benchmarks.article.runs import TOLERANCES
from benchmarks.article.tables import number

BELOW_HALF = (0.1, 0.2, 0.3, 0.4)
FACTOR, POINTS = 3.0, 2.5  # how near to a published figure counts as reproduced


def _by_problem(
    family: Family, check: Callable[[str, Methods], Iterable[Check]]
) -> list[Check]:
    return [
        c for name, methods in family.problems.items() for c in check(name, methods)
    ]


def v3_below_half(family: Family, text: str, needed: float) -> Claim:
    """Least squares and SPARCO: v3 is most robust in most cases below 50%."""

    def check(name: str, methods: Methods) -> Iterable[Check]:
        shown, lost = [], 0
        for sparsity in BELOW_HALF:
            winners = best(means(methods, "rho", sparsity))
            won = 100 * tables.shares_won(methods, "rho", sparsity)["v3"]
            shown.append(f"{percent(sparsity)} {' and '.join(winners)} ({won:.0f})")
            lost += "v3" not in winners
        yield Check(name, not lost, ", ".join(shown))

    return claim(
        family,
        text,
        "v3 has the lowest mean rho at all of 10, 20, 30 and 40%, in as many cases as "
        "the claim says. Shown are the best, and in brackets the percentage of the "
        "runs that v3 won",
        _by_problem(family, check),
        needed,
    )


def v1_to_30(family: Family) -> Claim:
    """Least squares: v1 is very robust to 30% pruned and then degrades quickly."""

    def check(name: str, methods: Methods) -> Iterable[Check]:
        for sparsity in (0.1, 0.2, 0.3):
            mean = means(methods, "rho", sparsity)
            others = {m: mean[m] for m in ("v2", "v4", "FW1", "FW2", "Adagrad")}
            rival = min(others, key=lambda method: others[method])
            yield Check(
                f"{name} at {percent(sparsity)}",
                "v1" in best({"v1": mean["v1"], **others}),
                f"{number(mean['v1'])}, {rival} {number(mean[rival])}",
            )
        low, high = (means(methods, "rho", s)["v1"] for s in (0.3, 0.5))
        figures = f"{number(low)} to {number(high)}"
        yield Check(f"{name} from 30 to 50%", high >= 10 * low, figures)

    return claim(
        family,
        "v1 is very robust to 30% pruned and then degrades quickly",
        "at 10, 20 and 30% the mean rho of v1 is below that of v2, v4, FW1, FW2 and "
        "Adagrad, in each case; and from 30 to 50% it grows at least tenfold",
        _by_problem(family, check),
    )


def _ranked(methods: Methods, name: str, named: tuple[str, ...], sparsity: float):
    """Checks that the named methods have the lowest mean rho, in whatever order."""
    mean = means(methods, "rho", sparsity)
    order = sorted(mean, key=lambda method: mean[method])
    for method in named:
        rank = order.index(method) + 1
        cell = f"{name}{method} at {percent(sparsity)}"
        figures = f"rank {rank} ({number(mean[method])})"
        yield Check(cell, rank <= len(named), figures)


def best_near_70(family: Family) -> Claim:
    """Least squares: near 70% FW1, FW2 and v4 are best."""
    return claim(
        family,
        "Near 70% pruned FW1, FW2 and v4 are best",
        "each of them is among the three lowest mean rho at 70%, in each case",
        _by_problem(
            family,
            lambda name, methods: _ranked(
                methods, f"{name}, ", ("FW1", "FW2", "v4"), 0.7
            ),
        ),
    )


def relevant_only_worse(family: Family) -> Claim:
    """Least squares: relevant_only is far less robust than any of v1 to v4."""

    def check(name: str, methods: Methods) -> Iterable[Check]:
        for variant in ("v1", "v2", "v3", "v4"):
            ratios = []
            for sparsity in (*BELOW_HALF, 0.5):
                mean = means(methods, "rho", sparsity)
                ratios.append(mean["relevant_only"] / mean[variant])
            figures = f"x {number(min(ratios))} to x {number(max(ratios))}"
            yield Check(f"{name}, {variant}", min(ratios) >= 10, figures)

    return claim(
        family,
        "relevant_only is far less robust than any of v1 to v4",
        "its mean rho is at least ten times that of each of them at 10, 20, 30, 40 and "
        "50%, in each case",
        _by_problem(family, check),
    )


def v1_as_fast(family: Family) -> Claim:
    """Least squares: v1 is about as fast as Adagrad."""

    def check(name: str, methods: Methods) -> list[Check]:
        found = []
        for i, tolerance in enumerate(TOLERANCES):
            reached = [methods[m]["reached"][:, i] for m in ("v1", "Adagrad")]
            # A run that does not get there takes for ever.
            v1, adagrad = (np.median(np.where(r < 0, np.inf, r)) for r in reached)
            shown = ("never" if np.isinf(k) else f"{k:.0f}" for k in (v1, adagrad))
            figures = " against ".join(shown)
            passed = bool(np.isfinite(v1) and v1 <= 1.5 * adagrad)
            found.append(Check(f"{name} to {tolerance:g}", passed, figures))
        return found

    return claim(
        family,
        "v1 is about as fast as Adagrad",
        "the median of its iterations to ||g|| <= 1e-3, 1e-6 and 1e-9 is at most 1.5 "
        "times that of Adagrad, in each case",
        _by_problem(family, check),
    )


def v1_best_to_70(family: Family) -> Claim:
    """Sparse coding: v1 is most robust up to 70%, with rho below 0.1 to 40%."""

    def check(name: str, methods: Methods) -> Iterable[Check]:
        del name
        for sparsity in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7):
            mean = means(methods, "rho", sparsity)
            own, winners = number(mean["v1"]), best(mean)
            rival = f", {winners[0]} {number(mean[winners[0]])}"
            won = "v1" in winners
            cell = f"best at {percent(sparsity)}"
            yield Check(cell, won, own if won else own + rival)
            if sparsity <= 0.4:
                yield Check(f"< 0.1 at {percent(sparsity)}", mean["v1"] < 0.1, own)

    return claim(
        family,
        "v1 is most robust up to 70% pruned, with rho < 0.1 up to 40%",
        "v1 has the lowest mean rho at 10, 20, ..., 70%; it is below 0.1 at 10 to 40%",
        _by_problem(family, check),
    )


def v3_v4_beyond_80(family: Family) -> Claim:
    """Sparse coding: v3 and v4 are best beyond 80%."""

    def check(name: str, methods: Methods) -> Iterable[Check]:
        del name
        for sparsity in (0.85, 0.9, 0.95):
            yield from _ranked(methods, "", ("v3", "v4"), sparsity)

    return claim(
        family,
        "v3 and v4 are best beyond 80% pruned",
        "each is among the two lowest mean rho at 85, 90 and 95%",
        _by_problem(family, check),
    )


def near_table_2(family: Family, variants: tuple[str, ...], case: str) -> Claim:
    """Least squares: the published means of rho."""
    rows = [
        row
        for row in tables.table_2(family)
        if row["published"] is not None
        and row["method"] in variants
        and row["problem"] == case
    ]
    checks = []
    for row in rows:
        near = 1 / FACTOR <= row["ratio"] <= FACTOR or tables.converged(row)
        about = "~" if tables.approximate(row) else ""
        figure = about + number(row["published"], 3)
        checks.append(
            Check(
                f"{row['method']} on {row['problem']} at {percent(row['sparsity'])}",
                near,
                f"{number(row['mean'])} (runs {number(row['least'])} to "
                f"{number(row['largest'])}, median {number(row['median'])}), article "
                f"{figure}",
            )
        )
    names = ", ".join(variants)
    return claim(
        family,
        f"The mean rho of {names} on {case} is that of table 2",
        f"within a factor of {FACTOR:g} of the article's, or both up to 1e-8",
        checks,
        counted=True,
    )


def near_table_4(family: Family, problems: tuple[str, ...]) -> Claim:
    """Classification: the published accuracies."""
    rows = [
        row
        for row in tables.table_4(family)
        if row["published"] is not None and row["problem"] in problems
    ]
    checks = []
    for row in rows:
        difference = row["mean"] - row["published"]
        error = row["deviation"] / np.sqrt(row["runs"])
        checks.append(
            Check(
                f"{row['method']} on {row['problem']} at {percent(row['sparsity'])}",
                abs(difference) <= POINTS,
                f"{row['mean']:.1f} (runs {row['least']:.1f} to {row['largest']:.1f}, "
                f"standard error {error:.1f}), article {row['published']:.2f}",
            )
        )
    return claim(
        family,
        f"The mean accuracies on {', '.join(problems)} are those of table 4 (Musk1: "
        "MOLECULE)",
        f"within {POINTS} points of the article's; asked for in 80% of the cells",
        checks,
        needed=0.8,
        counted=True,
    )


_LISTS: dict[str, Callable[[Family], list[Claim]]] = {
    "least_squares": lambda family: [
        v3_below_half(
            family,
            "v3 is the most robust in five of six cases below 50% pruned",
            5 / 6,
        ),
        v1_to_30(family),
        best_near_70(family),
        relevant_only_worse(family),
        v1_as_fast(family),
        near_table_2(family, ("v2", "v3", "v4"), "A1"),
        near_table_2(family, ("v1", "FW1", "FW2", "Adagrad"), "A1"),
        near_table_2(family, tuple(published.COLUMNS), "A2"),
    ],
    "sparco": lambda family: [
        v3_below_half(
            family,
            "v3 is the most robust in four of five problems below 50% pruned (table 3)",
            4 / 5,
        )
    ],
    "sparse_coding": lambda family: [v1_best_to_70(family), v3_v4_beyond_80(family)],
    "classification": lambda family: [
        near_table_4(family, (mnist, "A9A", "REGED0", "Musk1"))
        for mnist in ("MNIST", "MNIST 30:70")
    ],
}


def claims(results: Results) -> list[Claim]:
    """Judges the article's claims.

    Args:
      results: the families that were run; a problem that is missing in one does not
        take part in its checks, and a family without problems is "not measured".

    Returns:
      The claims, in the order of the article.
    """
    found: list[Claim] = []
    for name, judge in _LISTS.items():
        about = {"family": name}
        found += judge(results.get(name, Family(about, {}, {})))
    return found
