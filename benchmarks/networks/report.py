"""The page of all tasks that there are runs of, `networks.md`, and its figures."""

import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.networks import figures, overview, records, words
from benchmarks.networks.contenders import CONTENDERS
from benchmarks.networks.evaluation import FINE_TUNED, SPARSITIES
from benchmarks.networks.overview import table
from benchmarks.networks.results import (
    FINE_TUNED as TUNED,
)
from benchmarks.networks.results import (
    ONE_SHOT,
    RECALIBRATED,
    Row,
    rows,
    step_seconds,
    trials_known,
)
from benchmarks.networks.tasks import QUICK, TASKS, Settings
from benchmarks.networks.verdicts import verdicts
from benchmarks.systems import figures as panels
from benchmarks.systems import report as systems_report
from benchmarks.systems.records import Claim


def cell(values: list[float]) -> str:
    """Mean ± standard deviation over the seeds.

    Examples:
      >>> cell([1.0, 2.0, 3.0]), cell([2.0]), cell([])
      ('2.00 ± 1.00', '2.00', '')
    """
    if not values:
        return ""
    spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{spread}"


def by_sparsity(
    rows: list[Row], kind: str, sparsities: tuple[float, ...], scale: float = 1.0
) -> str:
    """Markdown: a row for each of those that have such values."""
    known = [(row.name, row.values(kind)) for row in rows]
    known = [(name, values) for name, values in known if values]
    columns = {"": [name for name, _ in known]}
    for sparsity in sparsities:
        columns[f"{100 * sparsity:g}%"] = [
            cell([scale * value for value in values.get(sparsity, [])])
            for _, values in known
        ]
    return table(columns)


def costs(rows: list[Row], settings: Settings, known: Mapping[str, Any]) -> str:
    """Markdown: what each contender is, what it tried and chose, what a step costs."""
    names = dict.fromkeys(row.contender for row in rows)
    fastest = {name: step_seconds(name, known) for name in names}
    columns: dict[str, list[str]] = {
        name: []
        for name in ("", "method", "tried", "chosen", "seeds", "step (ms)", "/ adam")
    }
    for row in rows:
        contender = CONTENDERS[row.contender]
        trials = trials_known(row.contender, settings, known)
        grid = ", ".join(f"{h:g}" for h in sorted(contender.grid[:trials]))
        seconds = fastest[row.contender]
        values = (
            row.name,
            contender.about,
            f"{contender.tries} {grid}",
            f"{row.hyperparameter:g}",
            str(len({run["seed"] for run in row.runs})),
            f"{1000 * seconds:.2f}",
            f"{seconds / fastest['adam']:.2f}" if "adam" in fastest else "",
        )
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
    return table(columns)


def _claims(found: list[Row], settings: Settings) -> list[Claim]:
    return [verdict.claim for verdict in verdicts(found, settings.normalised)]


def section(
    task: str,
    settings: Settings,
    known: Mapping[str, dict[str, Any]],
    folder: pathlib.Path,
    page: pathlib.Path,
) -> str:
    """Markdown of one task; its figure is drawn."""
    found = rows(settings, known)
    metric = "next-character accuracy (%)" if settings.context else "test accuracy (%)"
    picture = folder / f"{task}.png"
    panels.write(
        figures.draw, picture, found, settings.normalised, metric, size=figures.SIZE
    )
    where = picture.relative_to(page.parent).as_posix()
    hours = sum(record["seconds"]["all"] for record in known.values()) / 3600
    parts = [
        f"## {task}",
        words.about(settings),
        f"{len(known)} runs, trials among them: {hours:.2f} hours one after another.",
        f"### {metric[:-4].capitalize()}, one-shot (%)",
        by_sparsity(found, ONE_SHOT, SPARSITIES),
    ]
    if settings.normalised:
        parts += [
            "### Recalibrated (%)",
            by_sparsity(found, RECALIBRATED, SPARSITIES),
        ]
    parts += [
        "### After an epoch of fine-tuning with the mask held (%)",
        by_sparsity(found, TUNED, FINE_TUNED),
    ]
    if settings.context:
        parts += [
            "### Bits per character, one-shot",
            by_sparsity(found, f"{ONE_SHOT} loss", SPARSITIES, 1 / math.log(2)),
        ]
    parts += [
        f"![{task}]({where})",
        "### Verdicts",
        systems_report.verdicts(_claims(found, settings)),
        "### Hyperparameters and costs",
        costs(found, settings, known),
    ]
    return "\n\n".join(part for part in parts if part)


def write(folder: pathlib.Path, page: pathlib.Path, quick: bool = False) -> None:
    """Makes the figures and the page from the runs that are there.

    Args:
      folder: with `<task>.jsonl`.
      page: the file to write.
      quick: whether the runs have the small settings.
    """
    sections, judged, hours = [], {}, 0.0
    found, known = {}, {}
    tasks = QUICK if quick else TASKS
    for task, settings in tasks.items():
        runs = records.load(folder / f"{task}.jsonl")
        if its_rows := rows(settings, runs):
            found[task], known[task] = its_rows, runs
            sections.append(section(task, settings, runs, folder, page))
            judged[task] = verdicts(its_rows, settings.normalised)
            hours += sum(record["seconds"]["all"] for record in runs.values()) / 3600
    parts = [
        words.introduction(folder, quick),
        "## Verdicts",
        "Who keeps all of a claim, by task; the claims and their numbers are in the "
        "sections.",
        overview.summary(judged),
        "## Overview",
        "The main lines of all tasks: networks with batch normalisation recalibrated; "
        "gradual pruning, `targeted` and the optimizers of everyday with the best of "
        "their rows at each sparsity, the networks of one training with the steps, "
        "Adam's or SGD's, that have the better trial.",
        overview.main_lines(found, known, tasks),
        *(() if quick else overview.not_run(tasks, known)),
        f"All runs together took {hours:.2f} hours, one after another, each on one "
        "core, which at times two shared. `python -m benchmarks.networks` makes all "
        "that are missing, and of all other methods too.",
        *sections,
    ]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
