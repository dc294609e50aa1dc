"""Finished runs, one JSON line each: what makes resuming and the page possible."""

import hashlib
import json
import pathlib
from typing import Any, NamedTuple

from benchmarks.networks.plans import Contender
from benchmarks.networks.tasks import Settings


class Run(NamedTuple):
    """A run that is to be made, or was.

    Attributes:
      contender: its name.
      phase: "trial" of a hyperparameter, or "test".
      target: sparsity trained for, or None.
      hyperparameter: what was set.
      seed: of initial weights and minibatches.
    """

    contender: str
    phase: str
    target: float | None
    hyperparameter: float
    seed: int


def key_of(run: Run, contender: Contender, settings: Settings) -> str:
    """What a finished run is found again by: all that its numbers depend on."""
    if run.phase == "test":  # how long the trials were has no part in it
        settings = settings._replace(trial_epochs=0)
    known = run._asdict() | {
        "version": contender.version,
        "settings": settings._asdict(),
    }
    text = json.dumps(known, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def append(path: pathlib.Path, record: dict[str, Any]) -> None:
    """Adds a finished run to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def load(path: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The finished runs of a file by their keys; of equal keys the last."""
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    return {record["key"]: record for record in map(json.loads, lines)}


def forget(path: pathlib.Path, contenders: set[str]) -> None:
    """Removes the runs of some contenders from a file."""
    kept = [r for r in load(path).values() if r["contender"] not in contenders]
    if path.is_file():
        text = "".join(json.dumps(record) + "\n" for record in kept)
        path.write_text(text, encoding="utf-8")
