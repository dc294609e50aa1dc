"""The pages, each made from the CSV of its experiment and nothing else."""

import math
from collections.abc import Iterable, Sequence

from benchmarks.bench import tables
from benchmarks.bench.races import Race
from benchmarks.bench.records import Rows

# Differences are told from chance by this many standard errors.
ERRORS = 2.0


def race_page(
    name: str,
    title: str,
    about: str,
    race: Race,
    rows: Rows,
    pairs: Sequence[tuple[str, str, str, str]],
) -> str:
    """The page of a race.

    Args:
      name: of the experiment.
      title: of the page.
      about: what it is about, a paragraph.
      race: the race.
      rows: of the CSV.
      pairs: methods to compare: method and setting of one, then of the other, whose
        accuracy is said to be no larger.

    Returns:
      Markdown.
    """
    parts = [f"# {title}", about, _protocol(race), "## Accuracy", _accuracy(race, rows)]
    if compared := _pairs(rows, pairs):
        parts += ["## Differences", compared]
    parts += ["## Learning rates and cost", _settings(rows), "## Methods"]
    parts += [_methods(race, rows), "## How to remake this page", _commands(name)]
    return "\n\n".join(parts) + "\n"


def _protocol(race: Race) -> str:
    task = race.task
    tuned = f"{100 * race.tuned_at:g}%"
    grid = race.contenders[0].grid
    return (
        f"The task is {task.title}: {task.train:,} examples to train on, "
        f"{task.validation:,} to choose the learning rate by, {task.test:,} to report. "
        f"Minibatches have {task.batch} examples, and a training has {task.epochs} "
        f"epochs, {task.epochs * task.steps_per_epoch:,} steps. The learning rate is "
        "constant for 60% of the training, then it falls linearly to 1%.\n\n"
        "The grid of the learning rate is geometric with the factor 2. Each contender "
        f"begins with {grid.first} values, trained for half the length with one seed. "
        "The grid is extended until the best value has a worse one on either side. "
        f"Where the cap of {grid.most} values came first, the learning rate is marked "
        f"*open*. A method that trains for a sparsity is tuned at {tuned}; one that "
        "trains once is tuned by the mean over all sparsities of the table but 0. "
        "Momentum SGD has momentum 0.9 and no weight decay. The recipes' l1 norm and "
        "weight decay are at their defaults.\n\n"
        "Every network is evaluated by `masks.prune(eval_params(state, params), "
        "sparsity)`: what a method has set to zero stays zero."
    )


def _key(row: dict[str, str]) -> tuple[str, str, str]:
    return row["method"], row["setting"], row["base"]


def _contenders(rows: Rows) -> list[tuple[str, str, str]]:
    return list(dict.fromkeys(map(_key, rows)))


def _label(method: str, setting: str) -> str:
    return f"{method}, {setting}" if setting else method


def _accuracy(race: Race, rows: Rows) -> str:
    seeds = ", ".join(map(str, race.seeds))
    text = (
        f"Test accuracy in %, mean and standard deviation over the seeds {seeds}. "
        "Columns are the share of the weights that is pruned."
    )
    asked = [0.0, *race.sparsities]
    found = {(_key(row), row["sparsity"]): row for row in rows}
    lines = []
    for one in _contenders(rows):
        cells = []
        for sparsity in asked:
            row = found.get((one, f"{sparsity:g}"))
            cells.append(
                tables.spread(tables.numbers(row["accuracy by seed"])) if row else ""
            )
        own = next(row for row in rows if _key(row) == one)
        lines.append((_label(*one[:2]), one[2], own["trainings"], *cells))
    columns = ["method", "base", "trainings", *(f"{100 * s:g}%" for s in asked)]
    return f"{text}\n\n{tables.markdown(columns, lines)}"


def _pairs(rows: Rows, pairs: Iterable[tuple[str, str, str, str]]) -> str:
    found = {(r["method"], r["setting"], r["sparsity"]): r for r in rows}
    lines = []
    for method, setting, other, others_setting in pairs:
        for sparsity in dict.fromkeys(row["sparsity"] for row in rows):
            first = found.get((method, setting, sparsity))
            second = found.get((other, others_setting, sparsity))
            if first is None or second is None:
                continue
            mean, error = tables.paired(
                tables.numbers(first["accuracy by seed"]),
                tables.numbers(second["accuracy by seed"]),
            )
            lines.append(
                (
                    f"{_label(method, setting)} less {_label(other, others_setting)}",
                    f"{100 * float(sparsity):g}%",
                    f"{mean:+.2f}",
                    "" if math.isnan(error) else f"{error:.2f}",
                    _verdict(mean, error),
                )
            )
    if not lines:
        return ""
    text = (
        "Points of test accuracy, the mean over pairs of equal seeds, with its "
        "standard error. The published order is that no difference is negative. A "
        f"difference within {ERRORS:g} standard errors of zero says nothing."
    )
    columns = ("difference", "sparsity", "mean", "standard error", "verdict")
    return f"{text}\n\n{tables.markdown(columns, lines)}"


def _verdict(mean: float, error: float) -> str:
    if math.isnan(error) or abs(mean) <= ERRORS * error:
        return "not told apart"
    return "as published" if mean > 0 else "**the other way round**"


def _settings(rows: Rows) -> str:
    text = (
        "Gradients in all are those of all trainings that the accuracies of a row "
        "take, tuning left out. The time of a step is that of a run's fastest epoch, "
        "with the gradient, while other runs shared the machine; costs.md has timings "
        "made for comparison."
    )
    lines = []
    for one in _contenders(rows):
        row = next(row for row in rows if _key(row) == one)
        total = int(row["trainings"]) * int(row["steps"]) * int(row["gradients"])
        rate = row["learning rate"] + (" *open*" if row["open"] else "")
        lines.append(
            (
                _label(*one[:2]),
                one[2],
                rate,
                f"{row['tried from']} to {row['tried to']}",
                row["trainings"],
                row["steps"],
                row["gradients"],
                str(total),
                row["step ms"],
            )
        )
    columns = (
        "method",
        "base",
        "learning rate",
        "tried",
        "trainings",
        "steps of each",
        "gradients a step",
        "gradients in all",
        "ms a step",
    )
    return f"{text}\n\n{tables.markdown(columns, lines)}"


def _methods(race: Race, rows: Rows) -> str:
    there = {one[:2] for one in _contenders(rows)}
    lines = {
        (row.method, row.setting): (row.label, row.about)
        for row in race.contenders
        if (row.method, row.setting) in there
    }
    return tables.markdown(("method", "what it does"), list(lines.values()))


def _commands(name: str) -> str:
    return (
        "```\n"
        f"python -m benchmarks run {name} --jobs 2  # all runs, this page, the figure\n"
        f"python -m benchmarks page {name}          # this page, from {name}.csv\n"
        f"python -m benchmarks figure {name}        # the figure, from {name}.csv\n"
        "```\n\n"
        "Raw runs are kept out of the tree, in the folder that the environment "
        "variable PRUNADAG_RUNS names, else in the folder `runs` of the cache "
        "(`~/.cache/prunadag_optax`). A run that is there is not made again."
    )


def costs_page(name: str, rows: Rows) -> str:
    """The page of the costs of a step."""
    first = rows[0]
    text = (
        "What an optimizer's step costs, the gradient left out: its state in bytes a "
        "weight and its time, on the float32 parameters of LeNet-300-100 "
        f"({int(first['weights']):,} weights and biases). All take turns in one run "
        f"with `optax.adam`, {first['rounds']} rounds from the middle of a training "
        "on; the ratio is that of the medians. Methods that change a mask now and then "
        "pay for it in few steps, which a median leaves out and the ratio of means "
        "does not. CrAM+ changes the gradient and not the step: its second gradient "
        f"is not in these times. Device: {first['device']}; jax {first['jax']}."
    )
    columns = (
        "method",
        "base",
        "gradients a step",
        "bytes a weight",
        "ms",
        "quartiles",
        "/ Adam",
        "/ Adam, means",
    )
    lines = [
        (
            _label(row["method"], row["setting"]),
            row["base"],
            row["gradients"],
            row["bytes a weight"],
            row["ms"],
            row["quartiles"],
            row["/ adam"],
            row["/ adam, means"],
        )
        for row in rows
    ]
    commands = _commands(name).split("\n\n")[0].replace(" --jobs 2", "")
    commands = "\n".join(x for x in commands.split("\n") if "figure " not in x)
    commands = commands.replace("all runs, this page, the figure", "all of it")
    return (
        "\n\n".join(
            [
                "# What a step costs",
                text,
                tables.markdown(columns, lines),
                "## How to remake this page",
                commands,
            ]
        )
        + "\n"
    )
