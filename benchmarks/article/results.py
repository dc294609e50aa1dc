"""The numbers of a family's runs: kept in one file, and read from there.

A family's file `<family>.npz` has an array for each quantity of each method on each
problem (`runs.quantities`), and what there is to say of the runs as JSON.
"""

import json
import pathlib
from typing import Any, NamedTuple

import numpy as np

from benchmarks.article.pruning import SPARSITIES

# A rho up to here is that of a run that has converged, give or take rounding: two of
# them count as equal.
CONVERGED = 1e-8

Quantities = dict[str, np.ndarray]  # by name
Methods = dict[str, Quantities]  # by method


class Family(NamedTuple):
    """What a family's runs have given.

    Attributes:
      about: command, machine, time, number of runs, problems left out, ...; JSON.
      problems: quantities by problem and by method.
      influence: the same of the first problem under other T, by "n/20" and the like;
        empty where that was not asked for.
    """

    about: dict[str, Any]
    problems: dict[str, Methods]
    influence: dict[str, Methods]


# By the family's name; families that were not run are not there.
Results = dict[str, Family]


def save(family: Family, path: pathlib.Path) -> None:
    """Writes a family to a file.

    Args:
      family: what to write; no name in it may have a "|".
      path: of the .npz file.
    """
    arrays = {
        f"{part}|{problem}|{method}|{name}": array
        for part in ("problems", "influence")
        for problem, methods in getattr(family, part).items()
        for method, quantities in methods.items()
        for name, array in quantities.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, about=np.array(json.dumps(family.about)), **arrays)


def load(path: pathlib.Path) -> Family:
    """Reads a family from a file that `save` wrote."""
    with np.load(path) as file:
        family = Family(json.loads(str(file["about"])), {}, {})
        for key in file.files:
            if key != "about":
                part, problem, method, name = key.split("|")
                methods = getattr(family, part).setdefault(problem, {})
                methods.setdefault(method, {})[name] = file[key]
    return family


def load_all(folder: pathlib.Path, families: tuple[str, ...]) -> Results:
    """The families that have a file in a folder."""
    files = {family: folder / f"{family}.npz" for family in families}
    return {family: load(file) for family, file in files.items() if file.is_file()}


def at(quantities: Quantities, name: str, sparsity: float) -> np.ndarray:
    """The values of all runs at one sparsity.

    Args:
      quantities: of a method on a problem.
      name: "rho", "omega" or "accuracy".
      sparsity: one of SPARSITIES.

    Returns:
      Shape [runs].
    """
    return quantities[name][:, SPARSITIES.index(sparsity)]


def means(methods: Methods, name: str, sparsity: float) -> dict[str, float]:
    """The mean over the runs at one sparsity, by method."""
    return {
        method: float(at(q, name, sparsity).mean()) for method, q in methods.items()
    }


def best(values: dict[str, float], largest: bool = False) -> list[str]:
    """The methods with the best value, several where they tie.

    Args:
      values: by method.
      largest: whether large is good. Otherwise small is, and values up to CONVERGED
        tie with each other.

    Returns:
      The names, in the order of `values`.

    Examples:
      >>> best({"v1": 3.0, "v2": 2e-9, "v3": 1e-9})
      ['v2', 'v3']
    """
    signed = {
        name: -value if largest else max(value, CONVERGED)
        for name, value in values.items()
    }
    return [name for name, value in signed.items() if value == min(signed.values())]
