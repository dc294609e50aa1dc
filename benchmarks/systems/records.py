"""What an experiment gives: rows of a table, curves, claims; kept as JSON."""

import json
import pathlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np


class Row(NamedTuple):
    """A method's figures.

    Attributes:
      method: its name.
      values: by metric, one number for each seed.
      published: by metric, the figure that the authors report, as they write it.
      seconds: wall time of all seeds together, compilation included.
    """

    method: str
    values: dict[str, list[float]]
    published: dict[str, str]
    seconds: float


class Result(NamedTuple):
    """An experiment's outcome.

    Attributes:
      about: command, machine, seeds, settings, time; JSON.
      rows: of the table.
      curves: by name, the ordinates by metric, [seeds, points], and their abscissae
        under "x".
    """

    about: dict[str, Any]
    rows: list[Row]
    curves: dict[str, dict[str, Any]]


class Claim(NamedTuple):
    """A published statement and whether it holds here.

    Attributes:
      text: the statement, with its thresholds.
      holds: whether the measured means say so.
      evidence: the numbers.
    """

    text: str
    holds: bool
    evidence: str


def row(method: str, values: dict[str, Any], seconds: float, **published: str) -> Row:
    """A row, from arrays of shape [seeds].

    Args:
      method: its name.
      values: by metric.
      seconds: wall time.
      **published: by metric, with "_" for each space in its name.

    Returns:
      The `Row`.
    """
    lists = {name: np.asarray(v, float).tolist() for name, v in values.items()}
    said = {name.replace("_", " "): text for name, text in published.items()}
    return Row(method, lists, said, seconds)


def curve(x: Iterable[float], **ordinates: jax.Array) -> dict[str, Any]:
    """A curve, from arrays of shape [seeds, points].

    Args:
      x: the abscissae.
      **ordinates: by metric, with "_" for each space in its name.

    Returns:
      What `Result.curves` holds, numbers of five digits.
    """
    rounded = {
        name.replace("_", " "): [[float(f"{v:.5g}") for v in run] for run in runs]
        for name, runs in ((k, np.asarray(v)) for k, v in ordinates.items())
    }
    return {"x": [float(f"{v:.5g}") for v in x], **rounded}


def mean(rows: list[Row], method: str, metric: str) -> float:
    """The mean over the seeds of a method's metric."""
    [found] = [r for r in rows if r.method == method]
    return float(np.mean(found.values[metric]))


def spread(values: list[float], digits: int) -> str:
    """Mean, standard deviation and range over the seeds, as text.

    Examples:
      >>> spread([1.0, 2.0, 3.0], 1)
      '2.0 ± 1.0 (1.0-3.0)'
      >>> spread([1.5], 1)
      '1.5'
    """
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    low, high = min(values), max(values)
    return (
        f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f} "
        f"({low:.{digits}f}-{high:.{digits}f})"
    )


def save(result: Result, path: pathlib.Path) -> None:
    """Writes a result to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = result._asdict() | {"rows": [r._asdict() for r in result.rows]}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def load(path: pathlib.Path) -> Result:
    """Reads a result from a file that `save` wrote."""
    content = json.loads(path.read_text(encoding="utf-8"))
    rows = [Row(**r) for r in content["rows"]]
    return Result(content["about"], rows, content["curves"])
