"""Tables of named columns, as text and as CSV."""

import csv
import dataclasses
import io
import pathlib
from typing import Any


@dataclasses.dataclass(frozen=True)
class Table:
    """Named columns of equal length, which print and export.

    Attributes:
      columns: column name -> cells.
    """

    columns: dict[str, list[Any]]

    def to_dict(self) -> dict[str, list[Any]]:
        """The columns by name."""
        return {name: list(column) for name, column in self.columns.items()}

    def to_csv(self, path: str | pathlib.Path | None = None) -> str:
        """The table as CSV text, also written to `path` when one is given."""
        return to_csv(self.columns, path)

    def __str__(self) -> str:
        return to_text(self.columns)


def to_csv(columns: dict[str, list[Any]], path: str | pathlib.Path | None) -> str:
    """Columns as CSV text, also written to `path` unless it is None.

    Args:
      columns: column name -> cells.
      path: file to write, or None.

    Returns:
      The text.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    if path is not None:
        pathlib.Path(path).write_text(buffer.getvalue())
    return buffer.getvalue()


def to_text(columns: dict[str, list[Any]]) -> str:
    """Columns as aligned text: text to the left, numbers to the right.

    Args:
      columns: column name -> cells, not empty.

    Returns:
      The text, one line a row under the line of names.
    """
    cells = {name: _cells(name, column) for name, column in columns.items()}
    lines = []
    for row in zip(*cells.values(), strict=True):
        lines.append("  ".join(row).rstrip())
    return "\n".join(lines)


def _cells(name: str, column: list[Any]) -> list[str]:
    if name == "sparsity" and all(v == round(v, 3) for v in column):
        # Sparsities that were asked for: as many digits as they have.
        digits = max(len(str(round(v, 3)).partition(".")[2]) for v in column)
        texts = [f"{v:.{digits}f}" for v in column]
    else:
        texts = [f"{v:.4f}" if isinstance(v, float) else str(v) for v in column]
    width = max(map(len, [name, *texts]))
    if isinstance(column[0], str):
        return [text.ljust(width) for text in [name, *texts]]
    return [text.rjust(width) for text in [name, *texts]]
