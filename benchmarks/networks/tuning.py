"""Which hyperparameter a contender gets: the best of its trials on validation data."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks.networks.evaluation import SPARSITIES
from benchmarks.networks.plans import TUNED_AT, Contender
from benchmarks.networks.records import Run, key_of
from benchmarks.networks.tasks import Settings

TRIAL_SEED = 100
# Of the runs to report: those below are of earlier rounds, see `words.HISTORY`.
FIRST_SEED = 10


def _mean(*sparsities: float, of: str = "") -> Callable[[Any], float]:
    """Over some sparsities; over none: at the target that the trial trained for."""

    def mean(record: dict[str, Any]) -> float:
        places = [SPARSITIES.index(s) for s in sparsities or (record["target"],)]
        found = record["validation"]
        # Where there are batch statistics, they are those of the pruned network.
        kind = "recalibrated" if "recalibrated" in found else "one-shot"
        return float(np.mean(np.asarray(found[kind + of])[places]))

    return mean


def _least_loss(*sparsities: float) -> Callable[[dict[str, Any]], float]:
    loss = _mean(*sparsities, of=" loss")

    def score(record: dict[str, Any]) -> float:
        found = loss(record)
        return -found if np.isfinite(found) else -np.inf

    return score


# On validation data, before fine-tuning: by name, function record of a trial -> number,
# the larger the better. Contenders that train for a sparsity have trials at several,
# each judged at its own, by the loss and by the metric: the first is smoother, the
# second what is reported. Dense networks are chosen by the metric, and so are
# `often_whole` and `mostly_whole`, which are for those to whom the whole network
# matters most; `any_sparsity` by the loss over the sparsities.
SCORES: dict[str, Callable[[dict[str, Any]], float]] = {
    "dense": _mean(0.0),
    "pruning": _mean(*(s for s in SPARSITIES if s >= 0.8)),
    "every": _least_loss(0.0, 0.9, 0.95, 0.98, 0.99),
    "loss": _least_loss(),
    "accuracy": _mean(),
}


def trial_seeds(settings: Settings) -> range:
    """The seeds of the trials: several where one fold's images cannot choose."""
    return range(TRIAL_SEED, TRIAL_SEED + max(1, settings.folds // 2))


def seeds_of(contender: Contender, settings: Settings) -> int:
    """How many runs to report there are: every fold has its turns as test images."""
    return max(3, settings.folds * contender.rounds)


def trials_of(
    name: str, contender: Contender, settings: Settings, trials: int
) -> list[Run]:
    """The trials that choose; none where there is nothing to choose from."""
    grid = contender.grid[:trials]
    if len(grid) == 1:
        return []
    return [
        Run(name, "trial", target, h, seed)
        for h in grid
        for target in (TUNED_AT if contender.targets else (None,))
        for seed in trial_seeds(settings)
    ]


def finished(
    name: str,
    contender: Contender,
    settings: Settings,
    trials: int,
    known: Mapping[str, Any],
) -> list[dict[str, Any]] | None:
    """The records of the trials that choose; None while some are missing."""
    runs = trials_of(name, contender, settings, trials)
    keys = [key_of(run, contender, settings) for run in runs]
    return [known[key] for key in keys] if all(key in known for key in keys) else None


def scores(records: list[dict[str, Any]], choice: str) -> dict[float, float]:
    """By hyperparameter, the mean score of its trials, the larger the better.

    Args:
      records: of the trials.
      choice: by what they are judged, key of `SCORES`.
    """
    found = defaultdict(list)
    for record in records:
        found[record["hyperparameter"]].append(SCORES[choice](record))
    return {h: float(np.mean(values)) for h, values in found.items()}


def chosen(
    name: str,
    contender: Contender,
    settings: Settings,
    trials: int,
    known: Mapping[str, Any],
) -> dict[str, float] | None:
    """The hyperparameter by each of the contender's choices.

    Args:
      name: of the contender.
      contender: the method.
      settings: of the task.
      trials: how many hyperparameters each contender may try.
      known: finished runs by key.

    Returns:
      By name of the choice; None while trials are missing.
    """
    if len(contender.grid[:trials]) == 1:
        return dict.fromkeys(contender.choices, contender.grid[0])
    records = finished(name, contender, settings, trials, known)
    if records is None:
        return None
    judged = {choice: scores(records, choice) for choice in contender.choices}
    return {
        choice: max(found, key=found.__getitem__) for choice, found in judged.items()
    }


def tests_of(
    name: str, contender: Contender, chosen: Mapping[str, float], seeds: int
) -> list[Run]:
    """The runs to report, each hyperparameter once."""
    return [
        Run(name, "test", target, hyperparameter, seed)
        for hyperparameter in dict.fromkeys(chosen.values())
        for seed in range(FIRST_SEED, FIRST_SEED + seeds)
        for target in contender.targets or (None,)
    ]
