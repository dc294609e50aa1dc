"""Races: contenders train for a task, each at the best learning rate of its grid.

The learning rate is chosen on validation data, by trainings of half the length with one
seed: contenders that train for a sparsity at each of them, or all at one, the others by
the mean over all. The final runs have other seeds and the full length, and report test
data.
"""

import functools
import statistics
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from benchmarks.bench import records, tables, tasks, training, tuning
from benchmarks.bench.contenders import Contender
from prunadag_optax import masks

TRIAL_SEED = 100
# What tells a row of the CSV from the others.
BY = ("method", "setting", "base", "sparsity")


class Race(NamedTuple):
    """A task, who competes, and at which sparsities.

    Attributes:
      task: the task.
      contenders: who competes.
      sparsities: what is asked of each.
      tuned_at: the one at which contenders that train for a sparsity are tuned; None:
        each at its own.
      seeds: of the final runs.
    """

    task: tasks.Task
    contenders: tuple[Contender, ...]
    sparsities: tuple[float, ...]
    tuned_at: float | None
    seeds: tuple[int, ...] = (0, 1, 2)


class Run(NamedTuple):
    """A run that is to be made, or was.

    Attributes:
      contender: `Contender.name`.
      phase: "trial" of a learning rate, or "final".
      sparsity: trained for, or None.
      rate: the learning rate.
      seed: of everything random.
    """

    contender: str
    phase: str
    sparsity: float | None
    rate: float
    seed: int


class Due(NamedTuple):
    """What a contender has yet to do.

    Attributes:
      runs: those that can be made now.
      choices: of the learning rate, by the sparsity that is trained for, or None; those
        of which no trial is missing.
    """

    runs: list[Run]
    choices: dict[float | None, tuning.Choice]


Known = Mapping[str, dict[str, Any]]


def epochs_of(race: Race, run: Run) -> int:
    """The epochs of a run, of those who train the usual length."""
    return race.task.epochs // 2 if run.phase == "trial" else race.task.epochs


def key_of(race: Race, contender: Contender, run: Run) -> str:
    """What a finished run is found again by."""
    return records.key_of(
        {
            **run._asdict(),
            "task": race.task._replace(title="")._asdict(),
            "epochs": epochs_of(race, run),
            "sparsities": race.sparsities,
            "version": contender.version,
        }
    )


def due(
    race: Race,
    contender: Contender,
    known: Known,
    seeds: tuple[int, ...] | None = None,
) -> Due:
    """What a contender has yet to do: trials first, then the final runs.

    Args:
      race: the race.
      contender: the contender.
      known: finished runs by key.
      seeds: of the final runs; None: those of the race.

    Returns:
      The runs that are missing, and the choices that are made.
    """
    targets = race.sparsities if contender.each else (None,)
    runs: list[Run] = []
    choices: dict[float | None, tuning.Choice] = {}
    for target in targets:
        tuned = target if race.tuned_at is None or target is None else race.tuned_at
        rates, choice = tuning.search(
            contender.grid, functools.partial(_score, race, contender, known, tuned)
        )
        if choice is None:
            runs += [_trial(contender, tuned, rate) for rate in rates]
            continue
        choices[target] = choice
        runs += [
            Run(contender.name, "final", target, choice.value, seed)
            for seed in (race.seeds if seeds is None else seeds)
        ]
    missing = [r for r in runs if key_of(race, contender, r) not in known]
    return Due(list(dict.fromkeys(missing)), choices)


def _trial(contender: Contender, target: float | None, rate: float) -> Run:
    return Run(contender.name, "trial", target, rate, TRIAL_SEED)


def _score(
    race: Race, contender: Contender, known: Known, target: float | None, rate: float
) -> float | None:
    record = known.get(key_of(race, contender, _trial(contender, target, rate)))
    if record is None:
        return None
    judged = race.sparsities if target is None else (target,)
    return statistics.fmean(record["found"][f"{s:g}"]["accuracy"] for s in judged)


def make(race: Race, contender: Contender, run: Run) -> dict[str, Any]:
    """Makes a run.

    Returns:
      Its record, JSON.
    """
    fitted = training.fit(
        race.task,
        contender,
        sparsity=run.sparsity,
        sparsities=race.sparsities,
        rate=run.rate,
        seed=run.seed,
        epochs=epochs_of(race, run),
    )
    asked = (0.0, *race.sparsities) if run.sparsity is None else (run.sparsity,)
    part = "validation" if run.phase == "trial" else "test"
    return {
        "key": key_of(race, contender, run),
        **run._asdict(),
        "found": training.measured(race.task, fitted, part, asked, contender.score),
        "zeros": float(f"{_zeros(fitted.params):.6g}"),
        "steps": training.steps_of(race.task, contender, epochs_of(race, run)),
        "step ms": float(f"{fitted.step_ms:.4g}"),
    }


def _zeros(params: Any) -> float:
    """The share of the prunable weights that is exactly zero."""
    prunable = masks.magnitude_mask(params, 0.0)
    zeros = jax.tree.map(
        lambda mask, x: None if mask is None else x != 0,
        prunable,
        params,
        is_leaf=lambda leaf: leaf is None,
    )
    return float(masks.sparsity(zeros))


def summary(race: Race, known: Known) -> list[dict[str, Any]]:
    """The rows of the CSV, of those contenders that have made all their runs."""
    rows = []
    for contender in race.contenders:
        runs, choices = due(race, contender, known)
        if runs:
            continue
        asked = race.sparsities if contender.each else (0.0, *race.sparsities)
        rows += [
            _row(race, contender, known, choices[s if contender.each else None], s)
            for s in asked
        ]
    return rows


def _row(
    race: Race,
    contender: Contender,
    known: Known,
    choice: tuning.Choice,
    sparsity: float,
) -> dict[str, Any]:
    target = sparsity if contender.each else None
    finals = [
        known[
            key_of(
                race,
                contender,
                Run(contender.name, "final", target, choice.value, seed),
            )
        ]
        for seed in race.seeds
    ]
    tried = list(choice.scores)
    return {
        "task": race.task.title,
        "method": contender.method,
        "setting": contender.setting,
        "base": contender.base,
        "sparsity": f"{sparsity:g}",
        "trainings": len(race.sparsities) if contender.each else 1,
        "gradients": contender.passes,
        "steps": finals[0]["steps"],
        "learning rate": f"{choice.value:g}",
        "tried from": f"{tried[0]:g}",
        "tried to": f"{tried[-1]:g}",
        "open": "open" if choice.open else "",
        "accuracy by seed": tables.joined(
            [record["found"][f"{sparsity:g}"]["accuracy"] for record in finals], 2
        ),
        "zeros": f"{statistics.fmean(record['zeros'] for record in finals):.4f}",
        "step ms": f"{statistics.median(record['step ms'] for record in finals):.2f}",
    }
