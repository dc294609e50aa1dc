"""Markdown tables, and numbers as they are printed."""

import statistics
from collections.abc import Sequence
from typing import Any


def markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; columns of numbers are aligned to the right.

    Args:
      columns: names.
      rows: cells, one sequence a row.

    Returns:
      Its lines.

    Examples:
      >>> print(markdown(("method", "%"), [("dense", "98.2")]))
      | method | % |
      |---|--:|
      | dense | 98.2 |
    """
    cells = [[str(cell).replace("|", r"\|") for cell in row] for row in rows]
    numeric = [
        all(_is_number(row[i]) for row in cells if row[i]) and bool(cells)
        for i in range(len(columns))
    ]
    rule = "|".join("--:" if right else "---" for right in numeric)
    lines = [f"| {' | '.join(columns)} |", f"|{rule}|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in cells)])


def _is_number(text: str) -> bool:
    first = text.strip("*-<>").split(" ")[0]
    return first.replace(".", "", 1).isdigit()


def joined(values: Sequence[float], digits: int) -> str:
    """Numbers in a cell of a CSV.

    Examples:
      >>> joined([98.2, 98.125], 2), numbers("98.20 98.12")
      ('98.20 98.12', [98.2, 98.12])
    """
    return " ".join(f"{value:.{digits}f}" for value in values)


def numbers(cell: str) -> list[float]:
    """The numbers that `joined` wrote."""
    return [float(word) for word in cell.split()]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean and standard deviation.

    Examples:
      >>> spread([1.0, 2.0, 3.0]), spread([1.5], 1)
      ('2.00 ± 1.00', '1.5')
    """
    mean = f"{statistics.fmean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values):.{digits}f}"


def paired(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """The mean difference of pairs, and its standard error (NaN for one pair).

    Examples:
      >>> paired([3.0, 5.0], [1.0, 1.0])
      (3.0, 1.0)
    """
    differences = [x - y for x, y in zip(first, second, strict=True)]
    mean = statistics.fmean(differences)
    if len(differences) == 1:
        return mean, float("nan")
    return mean, statistics.stdev(differences) / len(differences) ** 0.5
