"""The optimisation problems of the article, by family.

Least squares with random matrices, SPARCO's sparse recovery problems, sparse coding of
handwritten digits in a learned dictionary, and binary classification by logistic
regression. A run needs a problem's `shared` arrays, one `instance` and one `start`.

References:
  M. Porcelli, G. Seraghiti, Ph. L. Toint, prunAdag: an adaptive pruning-aware gradient
  method, Comput. Optim. Appl. 93 (2026) 85-119, section 4.
"""

from collections.abc import Sequence

from benchmarks.problems import classification, least_squares, sparco, sparse_coding
from benchmarks.problems.base import Problem

__all__ = ["NAMES", "Problem", "problems"]

# The problems of each family, in the order of the article.
NAMES: dict[str, tuple[str, ...]] = {
    "least_squares": tuple(least_squares.MATRICES),
    "sparco": tuple(sparco.OPERATORS),
    "sparse_coding": ("MNIST",),
    "classification": classification.NAMES,
}


def problems(
    family: str, names: Sequence[str] | None = None, *, quick: bool = False
) -> list[Problem]:
    """Builds the problems of a family.

    Args:
      family: "least_squares", "sparco", "sparse_coding" or "classification".
      names: which of `NAMES[family]`; all of them by default.
      quick: learn a small dictionary for sparse coding, in seconds; the other families
        stay as they are.

    Returns:
      The problems, in the order of `names`.

    Raises:
      MissingData: for a problem whose data set is not to be had; its message says how
        to get it. Ask for one name at a time to go on with those that are there.
      ValueError: for a family or a name that there is not.

    Examples:
      >>> [problem.size for problem in problems("sparco", ["SPARCO 3", "SPARCO 9"])]
      [2048, 128]
      >>> problems("sparco", ["SPARCO 4"])
      Traceback (most recent call last):
      ...
      ValueError: names must be among ['SPARCO 3', 'SPARCO 5', 'SPARCO 7', 'SPARCO 9',
      'SPARCO 11'], got ['SPARCO 4']
    """
    if family not in NAMES:
        raise ValueError(f"family must be one of {list(NAMES)}, got {family!r}")
    names = NAMES[family] if names is None else names
    if strange := [name for name in names if name not in NAMES[family]]:
        raise ValueError(f"names must be among {list(NAMES[family])}, got {strange}")
    return [_problem(family, name, quick) for name in names]


def _problem(family: str, name: str, quick: bool) -> Problem:
    if family == "least_squares":
        return least_squares.problem(name)
    if family == "sparco":
        return sparco.problem(name)
    if family == "sparse_coding":
        return sparse_coding.problem(**(sparse_coding.QUICK if quick else {}))
    return classification.problem(name)
