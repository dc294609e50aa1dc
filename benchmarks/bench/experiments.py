"""The experiments by name."""

import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.bench import costs, figures, pages, races, records, runner, tasks
from benchmarks.bench.contenders import (
    DEFAULTS,
    SPARSE_TRAINING,
    Contender,
    chosen,
)
from benchmarks.bench.races import Race, Run
from benchmarks.bench.records import Rows


class Options(NamedTuple):
    """What the command line asks for.

    Attributes:
      methods: names of methods, or None for all.
      seeds: of the final runs, or None for those of the experiment.
      quick: in seconds, to see that everything runs.
      jobs: processes.
      runs: folder of raw runs.
    """

    methods: list[str] | None = None
    seeds: tuple[int, ...] | None = None
    quick: bool = False
    jobs: int = 1
    runs: pathlib.Path = pathlib.Path()


class Experiment(NamedTuple):
    """What can be run, and what is made of it.

    Attributes:
      about: what it is, in a line.
      contenders: who takes part.
      by: columns that tell a row of the CSV from the others.
      order: function quick -> what the cells of `by` can be, in the order of the CSV.
      rows: function (options) -> new rows of the CSV, and the names of who failed.
      page: function (rows, quick) -> Markdown.
      figure: function (rows, quick) -> matplotlib figure, or None.
      together: whether the rows of a table must be of one run, as timings must.
    """

    about: str
    contenders: tuple[Contender, ...]
    by: tuple[str, ...]
    order: Callable[[bool], list[tuple[Any, ...]]]
    rows: Callable[[Options], tuple[list[dict[str, Any]], list[str]]]
    page: Callable[[Rows, bool], str]
    figure: Callable[[Rows, bool], Any] | None = None
    together: bool = False


SPARSITIES = (0.8, 0.9, 0.95, 0.98)
# Of each experiment one race, or one for each task.
_RACES: dict[str, tuple[Race, ...]] = {
    "sparse_training": (Race(tasks.LENET_MNIST, SPARSE_TRAINING, SPARSITIES, None),),
    "defaults": tuple(
        Race(task, DEFAULTS, (0.9, 0.95, 0.98, 0.99), 0.95, seeds=(0, 1, 2))
        for task in (*tasks.CHOSEN_ON, *tasks.CONFIRMED_ON)
    ),
}
_LINES = (
    ("gradual pruning", "", "momentum SGD"),
    ("RigL", "ERK", "momentum SGD"),
    ("targeted", "", "Adam"),
    ("any_sparsity", "", "Adam"),
    ("CrAM+", "equal gradients", "momentum SGD"),
    ("dense", "", "momentum SGD"),
)
_PUBLISHED_ORDER = (
    ("RigL", "ERK", "SET", "ERK"),
    ("SET", "ERK", "static", "ERK"),
    ("RigL", "ERK", "static", "ERK"),
)
_SPARSE_TRAINING = (
    "Methods that train sparse networks, on the network and the data that the "
    "literature on pruning begins with. Most train anew for each sparsity; those with "
    "one training are pruned afterwards, to all of them."
)


def races_of(name: str, quick: bool) -> tuple[Race, ...]:
    """The races of an experiment; quick: on digits, with less of everything."""
    found = _RACES[name]
    if not quick:
        return found
    return tuple(
        race._replace(
            task=tasks.in_small(race.task),
            contenders=tuple(
                row._replace(grid=row.grid._replace(first=3, most=3))
                for row in race.contenders
            ),
            sparsities=(0.9, 0.95),
            seeds=(0, 1),
        )
        for race in found[:2]
    )


def make_run(name: str, quick: bool, number: int, run: Run) -> dict[str, Any]:
    """Makes a run of a race; what worker processes call."""
    race = races_of(name, quick)[number]
    [contender] = [row for row in race.contenders if row.name == run.contender]
    return races.make(race, contender, run)


def _race_rows(name: str, options: Options) -> tuple[list[dict[str, Any]], list[str]]:
    path = options.runs / f"{name}.jsonl"
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    for number, race in enumerate(races_of(name, options.quick)):
        failed += runner.finish(
            race,
            chosen(race.contenders, options.methods),
            path,
            functools.partial(make_run, name, options.quick, number),
            seeds=options.seeds,
            jobs=options.jobs,
        )
        rows += races.summary(race, records.load(path))
    return rows, failed


def _race_order(name: str, quick: bool) -> list[tuple[Any, ...]]:
    return [
        (race.task.title, row.method, row.setting, row.base, f"{sparsity:g}")
        for race in races_of(name, quick)
        for row in race.contenders
        for sparsity in ((0.0,) if not row.each else ()) + race.sparsities
    ]


def _race_experiment(
    name: str,
    title: str,
    page: Callable[[tuple[Race, ...], Rows], str],
    lines: Any = None,
) -> Experiment:
    first = _RACES[name][0]
    several = len(_RACES[name]) > 1

    def figure(rows: Rows, quick: bool) -> Any:
        return figures.accuracy(races_of(name, quick)[0].task.title, rows, lines)

    return Experiment(
        f"{title}: {'several tasks' if several else first.task.title}",
        first.contenders,
        ("task", *races.BY),
        functools.partial(_race_order, name),
        functools.partial(_race_rows, name),
        lambda rows, quick: page(races_of(name, quick), rows),
        None if lines is None else figure,
    )


def _cost_rows(options: Options) -> tuple[list[dict[str, Any]], list[str]]:
    rows = costs.rows(
        chosen(SPARSE_TRAINING, options.methods),
        tasks.DIGITS if options.quick else tasks.LENET_MNIST,
        SPARSITIES,
        20 if options.quick else 400,
    )
    return rows, []


EXPERIMENTS: dict[str, Experiment] = {
    "sparse_training": _race_experiment(
        "sparse_training",
        "Sparse training",
        lambda races, rows: pages.race_page(
            "sparse_training",
            "Sparse training",
            _SPARSE_TRAINING,
            races[0],
            rows,
            _PUBLISHED_ORDER,
        ),
        _LINES,
    ),
    "defaults": _race_experiment(
        "defaults",
        "Bases and scores of one training for any sparsity",
        lambda races, rows: pages.regret_page("defaults", races, rows, "any_sparsity"),
    ),
    "costs": Experiment(
        "What a step of each method costs, beside Adam's",
        SPARSE_TRAINING,
        ("method", "setting", "base"),
        lambda quick: [
            costs.REFERENCE,
            *((row.method, row.setting, row.base) for row in SPARSE_TRAINING),
        ],
        _cost_rows,
        lambda rows, quick: pages.costs_page("costs", rows),
        together=True,
    ),
}
