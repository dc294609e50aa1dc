"""The pages, each made from the CSV of its experiment and nothing else."""

import math
import statistics
from collections.abc import Iterable, Sequence

from benchmarks.bench import tables
from benchmarks.bench.races import Race
from benchmarks.bench.records import Rows
from benchmarks.bench.tasks import CALIBRATION

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
    tuned = "each" if race.tuned_at is None else f"{100 * race.tuned_at:g}%"
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
        f"*open*. A method that trains for a sparsity is tuned at {tuned}; one "
        "that trains once is tuned by the mean over all sparsities of the table but 0. "
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
        "Several learning rates are those for the columns above, in their order. "
        "Gradients in all are those of all trainings that the accuracies of a row "
        "take, tuning left out. The time of a step is that of a run's fastest epoch, "
        "with the gradient, while other runs shared the machine; costs.md has timings "
        "made for comparison."
    )
    lines = []
    for one in _contenders(rows):
        own = [row for row in rows if _key(row) == one]
        row = own[0]
        total = int(row["trainings"]) * int(row["steps"]) * int(row["gradients"])
        low = min(own, key=lambda row: float(row["tried from"]))["tried from"]
        high = max(own, key=lambda row: float(row["tried to"]))["tried to"]
        lines.append(
            (
                _label(*one[:2]),
                one[2],
                _rate(own),
                f"{low} to {high}",
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


def _rate(rows: Rows) -> str:
    """The learning rates of a row's sparsities, one if they agree."""
    found = [r["learning rate"] + (" *open*" if r["open"] else "") for r in rows]
    return found[0] if len(set(found)) == 1 else ", ".join(found)


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


def regret_page(name: str, races: Sequence[Race], rows: Rows, method: str) -> str:
    r"""What each base and score of a recipe lacks to the best of them, task by task.

    Args:
      name: of the experiment.
      races: one a task.
      rows: of the CSV.
      method: the recipe.

    Returns:
      Markdown.
    """
    there = [r for r in races if any(row["task"] == r.task.title for row in rows)]
    parts = [
        f"# Bases and scores of `recipes.{method}`",
        "Each base optimizer and each score trains one network a task and a seed, at "
        "the learning rate that is best on validation data. Accuracies are those of "
        "test data, in %, mean and standard deviation over the seeds, of the network "
        "pruned once to each share; the statistics of batch normalisation are then "
        f"computed anew on {CALIBRATION:,} training images. Beside them stand gradual "
        "pruning, which trains anew for each sparsity, and a dense training.",
        "## Learning rates",
        _rates(there, rows),
        "## Regret",
        "Points of accuracy that a row lacks to the best row of the recipe, the mean "
        "over 0, 90, 95 and 98%. Every row has the best learning rate of its own.",
        _regrets(there, rows, method),
    ]
    for race in there:
        own = [row for row in rows if row["task"] == race.task.title]
        parts += [f"## {race.task.title}", _accuracy(race, own)]
    missing = [race.task.title for race in races if race not in there]
    if missing:
        parts += ["## Not run yet", "".join(f"* {title}\n" for title in missing)]
    parts += ["## How to remake this page", _commands(name)]
    text = "\n\n".join(parts) + "\n"
    return text.replace("this page, the figure\n", "this page\n")


def _rates(races: Sequence[Race], rows: Rows) -> str:
    """The chosen learning rates, a column a task."""
    columns = ["method", "base", *(race.task.title for race in races)]
    lines = []
    for one in _contenders(rows):
        cells = []
        for race in races:
            own = [r for r in rows if (r["task"], *_key(r)) == (race.task.title, *one)]
            cells.append(_rate(own) if own else "")
        lines.append((_label(*one[:2]), one[2], *cells))
    return (
        "The grids are geometric with the factor 2 and are extended until the best "
        "value has a worse one on either side. Where the cap came first, the rate is "
        f"marked *open*.\n\n{tables.markdown(columns, lines)}"
    )


def _regrets(races: Sequence[Race], rows: Rows, method: str) -> str:
    def scores(title: str, one: tuple[str, str, str]) -> list[float]:
        return [
            statistics.fmean(tables.numbers(row["accuracy by seed"]))
            for row in rows
            if (row["task"], *_key(row)) == (title, *one) and row["sparsity"] != "0.99"
        ]

    own = [one for one in _contenders(rows) if one[0] == method]
    columns = ["method", "base", *(race.task.title for race in races)]
    best = {
        race.task.title: [
            max(each)
            for each in zip(
                *filter(None, (scores(race.task.title, one) for one in own)),
                strict=True,
            )
        ]
        for race in races
    }
    lines = []
    for one in own:
        cells = []
        for title, top in best.items():
            found = scores(title, one)
            lacks = [x - y for x, y in zip(top, found, strict=True)] if found else []
            cells.append(f"{statistics.fmean(lacks):.2f}" if lacks else "")
        lines.append((_label(*one[:2]), one[2], *cells))
    return tables.markdown(columns, lines)


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
