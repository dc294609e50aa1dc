"""What the finished runs of a task say, arranged for tables, figures and verdicts."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from benchmarks.networks import tuning
from benchmarks.networks.contenders import CONTENDERS
from benchmarks.networks.evaluation import SPARSITIES
from benchmarks.networks.records import key_of
from benchmarks.networks.tasks import Settings

ONE_SHOT, RECALIBRATED, FINE_TUNED = "one-shot", "recalibrated", "fine-tuned"


class Row(NamedTuple):
    """The runs of a contender with one hyperparameter.

    Attributes:
      contender: its name.
      choices: by what the hyperparameter was chosen.
      hyperparameter: what was set.
      runs: records of the test runs.
      first: whether it is the contender's first row.
    """

    contender: str
    choices: tuple[str, ...]
    hyperparameter: float
    runs: list[dict[str, Any]]
    first: bool

    @property
    def name(self) -> str:
        """Name of the row: the contender, and how chosen where there are several."""
        told = len(CONTENDERS[self.contender].choices) > 1 and len(self.choices) == 1
        return f"{self.contender} ({self.choices[0]})" if told else self.contender

    def values(self, kind: str) -> dict[float, list[float]]:
        """By sparsity, a number for each seed; of a contender with targets at those.

        Args:
          kind: ONE_SHOT, RECALIBRATED, FINE_TUNED, or one of them with " loss".
        """
        found: dict[float, list[float]] = {}
        # By seed, so that rows can be compared seed by seed.
        for run in sorted(self.runs, key=lambda run: run["seed"]):
            measured = run["test"].get(kind, {})
            if isinstance(measured, list):
                measured = dict(zip(run["sparsities"], measured, strict=True))
            for text, value in measured.items():
                sparsity = float(text)
                if run["target"] is None or np.isclose(run["target"], sparsity):
                    found.setdefault(sparsity, []).append(value)
        return dict(sorted(found.items()))

    def means(self, kind: str) -> dict[float, float]:
        """By sparsity, the mean over the seeds."""
        return {s: float(np.mean(values)) for s, values in self.values(kind).items()}


def step_seconds(contender: str, known: Mapping[str, dict[str, Any]]) -> float:
    """Wall time of a step, of the fastest epoch of all a contender's runs."""
    return min(
        record["seconds"]["step"]
        for record in known.values()
        if record["contender"] == contender
    )


def trials_known(
    name: str, settings: Settings, known: Mapping[str, dict[str, Any]]
) -> int:
    """The largest number of trials of a contender that are all there; at least 1."""
    contender = CONTENDERS[name]
    for trials in range(len(contender.grid), 1, -1):
        if tuning.finished(name, contender, settings, trials, known) is not None:
            return trials
    return 1


def rows(
    settings: Settings,
    known: Mapping[str, dict[str, Any]],
) -> list[Row]:
    """The rows of a task, of every contender that has finished runs.

    Args:
      settings: of the task.
      known: its finished runs by key.

    Returns:
      A row for each contender, and for each hyperparameter where its choices differ.
    """
    found = []
    for name, contender in CONTENDERS.items():
        trials = trials_known(name, settings, known)
        chosen = tuning.chosen(name, contender, settings, trials, known)
        assert chosen is not None
        first = True
        for hyperparameter in dict.fromkeys(chosen.values()):
            choices = tuple(c for c, h in chosen.items() if h == hyperparameter)
            runs = [
                record
                for key, record in known.items()
                if record["phase"] == "test"
                and record["contender"] == name
                and record["hyperparameter"] == hyperparameter
                and key == _current_key(record, settings)
            ]
            if runs:
                found.append(Row(name, choices, hyperparameter, runs, first))
                first = False
    return found


def _current_key(record: dict[str, Any], settings: Settings) -> str:
    """The key that the record's run would have now."""
    fields = ("contender", "phase", "target", "hyperparameter", "seed")
    run = tuning.Run(**{field: record[field] for field in fields})
    return key_of(run, CONTENDERS[run.contender], settings)


def by_contender(rows: list[Row], *names: str) -> list[Row]:
    """The rows of some contenders."""
    return [row for row in rows if row.contender in names]


def best(rows: list[Row], kind: str) -> dict[float, tuple[float, str]]:
    """By sparsity, the largest of the rows' means, and whose it is."""
    found: dict[float, tuple[float, str]] = {}
    for row in rows:
        for sparsity, mean in row.means(kind).items():
            if sparsity not in found or mean > found[sparsity][0]:
                found[sparsity] = (mean, row.name)
    return found


def measured_sparsities(least: float) -> list[float]:
    """The sparsities of the curves from one on."""
    return [sparsity for sparsity in SPARSITIES if sparsity >= least]
