"""Raw runs, out of the tree, and the small tables that are committed.

A finished run is a JSON line in a file of its experiment, in the folder that the
environment variable PRUNADAG_RUNS names, else in `runs` in the cache folder of
`datasets.cache_folder`. What is committed is a CSV for each experiment, and what is
made of it.
"""

import csv
import hashlib
import io
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from benchmarks import datasets

RESULTS = pathlib.Path(__file__).parents[1] / "results"
Rows = list[dict[str, str]]


def folder() -> pathlib.Path:
    """Where raw runs are kept.

    Examples:
      >>> import os, pathlib
      >>> os.environ["PRUNADAG_RUNS"] = "somewhere"
      >>> folder() == pathlib.Path("somewhere")
      True
      >>> del os.environ["PRUNADAG_RUNS"]
    """
    if chosen := os.environ.get("PRUNADAG_RUNS"):
        return pathlib.Path(chosen)
    return datasets.cache_folder() / "runs"


def key_of(known: dict[str, Any]) -> str:
    """What a finished run is found again by, from all that its numbers depend on."""
    text = json.dumps(known, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def append(path: pathlib.Path, record: dict[str, Any]) -> None:
    """Adds a finished run to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def load(path: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The finished runs of a file by their keys; of equal keys the last.

    A last line that was cut off, as when the machine went down, is left out.
    """
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8")
    whole, _, cut = text.rpartition("\n")
    if cut:
        # What is appended next begins a line of its own.
        path.write_text(f"{whole}\n" if whole else "", encoding="utf-8")
    found = map(json.loads, whole.splitlines())
    return {record["key"]: record for record in found}


def write_csv(path: pathlib.Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes rows of the same columns."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(buffer.getvalue(), encoding="utf-8")


def read_csv(path: pathlib.Path) -> Rows:
    """Reads rows, all cells as text; without the file there are none."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def merged(
    old: Rows, new: Sequence[dict[str, Any]], by: tuple[str, ...], order: Sequence[Any]
) -> Rows:
    """New rows in place of the old ones with equal cells in some columns.

    Args:
      old: rows that are there.
      new: rows to add; all old rows that agree with one of them in `by` go.
      by: columns.
      order: what the cells of `by` can be, as tuples, in the order to give; other rows
        go too.

    Returns:
      The rows, all cells as text.
    """
    text = [{name: str(cell) for name, cell in row.items()} for row in new]
    replaced = {tuple(row[name] for name in by) for row in text}
    kept = [row for row in old if tuple(row[name] for name in by) not in replaced]
    if text and kept and list(kept[0]) != list(text[0]):
        kept = []  # of an earlier form of the table
    places = {tuple(map(str, cells)): i for i, cells in enumerate(order)}
    found = [r for r in (*kept, *text) if tuple(r[name] for name in by) in places]
    return sorted(found, key=lambda row: places[tuple(row[name] for name in by)])
