"""How near the readings come to the published rows: tables and verdict."""

from collections.abc import Callable

import numpy as np

from benchmarks.archive.readings import others
from benchmarks.archive.readings.cases import VARIANTS, Case, Outcome
from benchmarks.article.methods import Setting
from benchmarks.article.runs import STARTS

CONVERGED = 1e-8
FACTOR, POINTS = 3.0, 2.5  # how near to a published figure counts as agreement


def agreeing(case: Case, variant: str, figures: np.ndarray) -> tuple[int, int]:
    """How many means are near the published ones, and how many there are."""
    published, mean = np.array(case.published[variant]), figures.mean(0)
    legible = np.isfinite(published)
    if case.problem.accuracy is None:
        near = np.abs(np.log(mean / published)) <= np.log(FACTOR)
        near |= (mean < CONVERGED) & (published < CONVERGED)
    else:
        near = np.abs(mean - published) <= POINTS
    return int(np.sum(near & legible)), int(np.sum(legible))


Results = dict[str, dict[str, dict[str, Outcome]]]  # by reading, case, variant


def distance(found: dict[str, dict[str, Outcome]], studied: dict[str, Case]) -> float:
    """How far the v1 and v2 rows are from the published, in units of the tolerance."""
    far = []
    for name, case in studied.items():
        for variant in ("v1", "v2"):
            mean = found[name][variant].figures.mean(0)
            published = np.array(case.published[variant])
            if case.problem.accuracy is None:
                far.append(np.abs(np.log(mean / published)) / np.log(FACTOR))
            else:
                far.append(np.abs(mean - published) / POINTS)
    return float(np.nanmean(np.concatenate(far)))


def _cell(name: str) -> str:
    """A reading's name in a Markdown table, where | ends a cell."""
    return name.replace("|", r"\|")


def _figure(value: float, case: Case) -> str:
    if not np.isfinite(value):
        return "-"
    return f"{value:.2g}" if case.problem.accuracy is None else f"{value:.1f}"


def overview(found: Results, studied: dict[str, Case]) -> list[str]:
    """A line a reading: the mean rows of v1 and v2, and how many cells agree."""
    columns = [(title, variant) for title in studied for variant in VARIANTS[:2]]
    published = [
        ", ".join(_figure(value, studied[t]) for value in studied[t].published[v])
        for t, v in columns
    ]
    lines = [
        "| reading | " + " | ".join(f"{t} {v}" for t, v in columns) + " | distance |",
        "|---" * (len(columns) + 2) + "|",
        "| **published** | " + " | ".join(published) + " | 0 |",
    ]
    for name, outcomes in found.items():
        cells = []
        for title, variant in columns:
            case, figures = studied[title], outcomes[title][variant].figures
            near, of = agreeing(case, variant, figures)
            mean = ", ".join(_figure(value, case) for value in figures.mean(0))
            cells.append(f"{mean} ({near} of {of})")
        cells.append(f"{distance(outcomes, studied):.2f}")
        lines.append(f"| {_cell(name)} | " + " | ".join(cells) + " |")
    return lines


def details(found: Results, studied: dict[str, Case]) -> list[str]:
    """A line a reading, variant and case: mean, standard deviation, median."""
    lines = []
    for title, case in studied.items():
        sparsities = [f"{100 * s:.0f}%" for s in case.sparsities]
        lines += [
            "",
            f"{title}: mean +- standard deviation over the runs (median).",
            "",
            "| variant | reading | iterations | "
            + " | ".join([*sparsities, "agree"])
            + " |",
            "|---" * (len(sparsities) + 4) + "|",
        ]
        for variant in VARIANTS:
            row = [_figure(value, case) for value in case.published[variant]]
            lines.append(f"| {variant} | **published** | | {' | '.join(row)} | |")
            for name, outcomes in found.items():
                k, figures = outcomes[title][variant]
                columns = (figures.mean(0), figures.std(0), np.median(figures, 0))
                row = [
                    "{} +- {} ({})".format(*(_figure(value, case) for value in column))
                    for column in zip(*columns, strict=True)
                ]
                near, of = agreeing(case, variant, figures)
                lines.append(
                    f"| {variant} | {_cell(name)} | {k.min()}-{k.max()} | "
                    f"{' | '.join(row)} | {near} of {of} |"
                )
    return lines


def verdict(found: Results, studied: dict[str, Case]) -> list[str]:
    """How many cells of each row agree, and which readings bring out v1 and v2."""
    columns = [(title, variant) for title in studied for variant in VARIANTS]
    lines = [
        "| cells that agree | " + " | ".join(f"{t} {v}" for t, v in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    whole: dict[str, list[str]] = {title: [] for title in studied}
    for name, outcomes in found.items():
        counts = {
            (title, variant): agreeing(
                studied[title], variant, outcomes[title][variant].figures
            )
            for title, variant in columns
        }
        cells = [f"{near} of {of}" for near, of in counts.values()]
        lines.append(f"| {_cell(name)} | " + " | ".join(cells) + " |")
        for title, names in whole.items():
            if all(counts[title, v][0] == counts[title, v][1] for v in VARIANTS[:2]):
                names.append(f'"{name}"')
    lines += ["", "The published rows of v1 and v2, all cells of both:", ""]
    lines += [
        f"- {title}: {', '.join(names) or 'under none of these readings'}"
        for title, names in whole.items()
    ]
    return lines


def _near(row: others.Row) -> tuple[int, int]:
    """How many means are near the published ones, and how many there are."""
    ratio = row.rho.mean(0) / np.array(row.published)
    return int(np.sum(np.abs(np.log(ratio)) <= np.log(FACTOR))), len(ratio)


# What of a setting a method knows.
_KNOWN: dict[str, Callable[[Setting], str]] = {
    "Adagrad": lambda setting: f"zeta = {setting.zeta:g}",
    "FW1": lambda setting: f"step {setting.shift:g}/(k+{setting.shift:g})",
    "FW2": lambda setting: "",
}


def methods_without_classes(rows: list[others.Row]) -> list[str]:
    """A line a method, case and setting: the mean row, and how many cells agree."""
    lines = ["| method | case | setting | rho | agree |", "|---" * 5 + "|"]
    for method, case in dict.fromkeys((row.method, row.case) for row in rows):
        own = [row for row in rows if (row.method, row.case) == (method, case)]
        shown = ", ".join(f"{value:.3g}" for value in own[0].published)
        lines.append(f"| {method} | {case} | **published** | {shown} | |")
        for row in own:
            known = _KNOWN[method](row.setting)
            setting = f"{row.setting.start} start" + (known and f", {known}")
            mean = ", ".join(f"{value:.3g}" for value in row.rho.mean(0))
            near, of = _near(row)
            lines.append(f"| {method} | {case} | {setting} | {mean} | {near} of {of} |")
    return lines


def scattered(found: others.Scatter) -> list[str]:
    """A line a sparsity: where means over 20 runs lie."""
    lines = [
        "| pruned | published | 5% of the means below | median mean | 5% above | "
        f"within a factor of {FACTOR:g} |",
        "|---" * 6 + "|",
    ]
    for sparsity, *figures, near in zip(*found, strict=True):
        cells = " | ".join(f"{value:.2g}" for value in figures)
        lines.append(f"| {100 * sparsity:.0f}% | {cells} | {100 * near:.0f}% |")
    return lines


def page(
    searched: Results,
    confirmed: Results,
    studied: dict[str, Case],
    rows: list[others.Row],
    spread: others.Scatter,
) -> str:
    """The text of results/readings.md."""
    runs, few = (
        len(found["literal"]["A1"]["v1"].iterations) for found in (confirmed, searched)
    )
    return "\n".join(
        [
            "# Readings of the article",
            "",
            f"`python -m benchmarks.archive.readings --runs {runs}`: rho on A1 after "
            "pruning 10, 20, 30, 40, 50% (A2: 20, 40, 60%), test accuracy on REGED0 "
            "after 70, 85, 90%. A mean agrees with a published rho within a factor of "
            f"{FACTOR:g} (or where both are below {CONVERGED:g}), with a published "
            f"accuracy within {POINTS:g} points. The readings are ranked by their "
            "distance, the mean over the cells of v1 and v2 in those units; of those "
            "that change one point the nearest are confirmed, and two more: the one "
            "that the methods without classes point to as well, and one that comes out "
            "more robust than the article's.",
            "",
            f"## Confirmation, {runs} runs",
            "",
            *verdict(confirmed, studied),
            *details(confirmed, studied),
            "",
            f"## Methods without classes, {runs} runs",
            "",
            "The start and the first weight are no part of Algorithm 2.1: Frank-Wolfe "
            "shows the first, Adagrad the second. Starts: "
            + "; ".join(f"{name}, {text}" for name, text in STARTS.items())
            + ".",
            "",
            *methods_without_classes(rows),
            "",
            f"## Means of v3 on A1 over {others.SAMPLE} runs, in the published setting",
            "",
            "The largest of the runs decide the mean where only some have converged.",
            "",
            *scattered(spread),
            "",
            f"## All readings, {few} runs",
            "",
            *overview(searched, {t: studied[t] for t in searched["literal"]}),
            "",
        ]
    )
