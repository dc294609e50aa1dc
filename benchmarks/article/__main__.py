"""Runs the article's experiments: `python -m benchmarks.article all`.

Writes into the output folder (default: benchmarks/results) the page article.md and the
folder article: per family the numbers (.npz), the tables (.csv) and the figures (.png);
with --setting written, article_as_written.md and article_as_written. The page is made
from all families that have numbers there, so that each can be run on its own.
Data sets come from the folder in PRUNADAG_DATA, or are downloaded; a problem whose data
are missing is left out, and the message says how to get them.
"""

import argparse
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from tqdm.auto import tqdm

from benchmarks.article import report, results, runs
from benchmarks.article.methods import METHODS, SETTINGS, Setting
from benchmarks.datasets import MissingData
from benchmarks.problems import NAMES, Problem, problems, sparse_coding
from benchmarks.speed import environment
from prunadag_optax import masks

RESULTS = pathlib.Path(__file__).parents[1] / "results"
# The figure on the influence of T has n over these, beside n/10.
DIVISORS = (50, 20, 5, 2)
INFLUENCED = ("v1", "v2", "v3", "v4")
# The digit is shown pruned by these shares.
SHOWN = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
# Of the page and the folder.
STEMS = {"published": "article", "written": "article_as_written"}
QUICK_RUNS, QUICK_LIMIT, QUICK_CLASSIFICATION = 3, 1000, 300


def limit_of(problem: Problem, quick: bool) -> int:
    """Iterations at most."""
    if not quick:
        return problem.max_iterations
    shorter = problem.family == "classification"
    return min(problem.max_iterations, QUICK_CLASSIFICATION if shorter else QUICK_LIMIT)


def digits(data: runs.Batch, x: jax.Array) -> np.ndarray:
    """The digit of the first run, and its reconstructions, pruned by SHOWN."""
    codes = [masks.prune(x[0], s, where=masks.everything)[0] for s in SHOWN]
    images = [sparse_coding.digit(data.shared, code).ravel() for code in codes]
    return np.stack([np.asarray(data.instances[0]), *images]).astype(np.float32)


def solve(
    problem: Problem, data: runs.Batch, setting: Setting, limit: int, bar: tqdm
) -> tuple[results.Methods, dict[str, float]]:
    """All methods on a problem: quantities, and seconds of each."""
    found, seconds = {}, {}
    for method in METHODS:
        bar.set_description(f"{problem.name}, {method}")
        began = time.perf_counter()
        outcome, measured = runs.run(problem, data, method, limit, setting)
        found[method] = runs.quantities(outcome, measured)
        if problem.family == "sparse_coding":
            found[method]["digits"] = digits(data, outcome.x)
        seconds[method] = round(time.perf_counter() - began, 2)
        bar.update()
    return found, seconds


def influence(
    problem: Problem, data: runs.Batch, setting: Setting, limit: int, bar: tqdm
) -> dict[str, results.Methods]:
    """The variants on a problem under other T, by "n/20" and the like."""
    found: dict[str, results.Methods] = {}
    for divisor in DIVISORS:
        bar.set_description(f"{problem.name}, T = n/{divisor}")
        methods = found[f"n/{divisor}"] = {}
        for method in INFLUENCED:
            relevant = max(1, problem.size // divisor)
            _, measured = runs.run(problem, data, method, limit, setting, relevant)
            methods[method] = {"rho": np.asarray(measured.rho)}
        bar.update()
    return found


def measure(
    name: str,
    count: int,
    quick: bool,
    build: Callable[..., list[Problem]] = problems,
    setting: str = "published",
) -> results.Family:
    """Runs a family.

    Args:
      name: of the family.
      count: runs of each method on each problem.
      quick: fewer iterations, and a small dictionary.
      build: makes the problems of a family, as `problems` does.
      setting: a key of `methods.SETTINGS`.

    Returns:
      The results; `about` has yet to hear of the command.
    """
    family = results.Family(
        {
            "family": name,
            "runs": count,
            "quick": quick,
            "setting": setting,
            "missing": {},
            "problems": {},
            "digits": SHOWN,
        },
        {},
        {},
    )
    began = time.perf_counter()
    steps = len(NAMES[name]) * len(METHODS)
    steps += len(DIVISORS) * (name == "least_squares")
    with tqdm(total=steps, disable=None) as bar:
        for problem_name in NAMES[name]:
            bar.set_description(f"{problem_name}, data")
            try:
                [problem] = build(name, [problem_name], quick=quick)
            except MissingData as error:
                tqdm.write(f"{problem_name} is left out: {error}", file=sys.stderr)
                family.about["missing"][problem_name] = str(error)
                bar.update(len(METHODS))
                continue
            limit = limit_of(problem, quick)
            chosen = SETTINGS[setting]
            data = runs.batch(problem, count, chosen.start)
            found, seconds = solve(problem, data, chosen, limit, bar)
            family.problems[problem_name] = found
            family.about["problems"][problem_name] = {
                "size": problem.size,
                "relevant": problem.relevant,
                "limit": limit,
                "seconds": seconds,
            }
            if name == "least_squares" and not family.influence:
                family.influence.update(influence(problem, data, chosen, limit, bar))
    family.about["seconds"] = time.perf_counter() - began
    return family


def main() -> None:
    """Runs what the command line asks for and writes the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("family", choices=[*NAMES, "all"])
    parser.add_argument(
        "--setting",
        choices=SETTINGS,
        default="published",
        help="what the text leaves open: as the published figures need it, or as "
        "written, with a page and folder of its own",
    )
    parser.add_argument("--runs", type=int, help="20; with --quick 3")
    parser.add_argument(
        "--quick", action="store_true", help="few runs and iterations, in 5 minutes"
    )
    parser.add_argument(
        "--output", type=pathlib.Path, help="folder; with --quick a temporary one"
    )
    parser.add_argument(
        "--figures-only", action="store_true", help="from the numbers that are there"
    )
    arguments = parser.parse_args()
    if arguments.runs is not None and arguments.runs < 1:
        parser.error(f"--runs must be at least 1, got {arguments.runs}")
    jax.config.update("jax_enable_x64", True)
    output = arguments.output
    if output is None:
        temporary = arguments.quick and not arguments.figures_only
        output = pathlib.Path(tempfile.mkdtemp()) if temporary else RESULTS
    stem = STEMS[arguments.setting]
    folder, page = output / stem, output / f"{stem}.md"
    folder.mkdir(parents=True, exist_ok=True)

    if not arguments.figures_only:
        count = arguments.runs or (QUICK_RUNS if arguments.quick else 20)
        known: Any = environment(
            " ".join(["python -m benchmarks.article", *sys.argv[1:]])
        )
        command = known.pop("command")
        names = NAMES if arguments.family == "all" else [arguments.family]
        for name in names:
            family = measure(name, count, arguments.quick, setting=arguments.setting)
            family.about.update(command=command, environment=known)
            results.save(family, folder / f"{name}.npz")
    found = results.load_all(folder, tuple(NAMES))
    report.write(found, page, folder, arguments.setting)
    print(f"{'A quick run, in ' if arguments.quick else ''}{page}")


if __name__ == "__main__":
    main()
