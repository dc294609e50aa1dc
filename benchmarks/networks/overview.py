"""What the page says of all tasks: verdicts, their main lines, what is missing."""

from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.networks import others, records, tuning
from benchmarks.networks.contenders import CONTENDERS, CORE
from benchmarks.networks.evaluation import FINE_TUNED
from benchmarks.networks.results import (
    ONE_SHOT,
    RECALIBRATED,
    Row,
    best,
    by_contender,
    trials_known,
)
from benchmarks.networks.tasks import Settings
from benchmarks.networks.verdicts import (
    DENSE_RIVALS,
    GRADUAL,
    GRADUAL_L1,
    TARGETED,
    TARGETED_L1,
    Verdict,
)
from benchmarks.networks.words import NAMES, SOURCES

# What the overview shows, in the form that is judged best in its trials. The page was
# made when two cycles of densities had names: OFTEN_WHOLE is `DENSE_2_OF_3` of
# measured_recipes now, MOSTLY_WHOLE `DENSE_7_OF_8`.
OVERVIEW = {
    "`any_sparsity`, one training": ("any_sparsity", "any_sparsity_sgd"),
    "the same, three times the l1 norm": ("any_sparsity_sgd_strong",),
    "the same, of the length of four": ("any_sparsity_sgd_4x",),
    "the same without the l1 norm": ("seldom_whole", "seldom_whole_sgd"),
    "the same without it, of the length of four": ("seldom_whole_sgd_4x",),
    "without it, `OFTEN_WHOLE`": ("often_whole", "often_whole_sgd"),
    "without it, `MOSTLY_WHOLE`": ("mostly_whole", "mostly_whole_sgd"),
}

# The best of them at each sparsity.
OTHERS = {
    "best of the other methods, a training for each ({winners})": tuple(
        name for name, contender in others.CONTENDERS.items() if contender.targets
    ),
    "best of the other methods, one training each ({winners})": tuple(
        name for name, contender in others.CONTENDERS.items() if not contender.targets
    ),
}


def table(columns: Mapping[str, list[str]]) -> str:
    """Markdown of columns by their names."""
    lines = [columns, ["---"] * len(columns), *zip(*columns.values(), strict=True)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def summary(found: Mapping[str, list[Verdict]]) -> str:
    """Markdown: whose claims all hold, for each criterion and task.

    Args:
      found: the verdicts of the tasks.
    """
    criteria = dict.fromkeys(v.criterion for judged in found.values() for v in judged)
    columns = {"": list(criteria)}
    for task, judged in found.items():
        columns[task] = []
        for criterion in criteria:
            part = [v for v in judged if v.criterion == criterion]
            names = dict.fromkeys(v.contender for v in part)
            holds = [
                name
                for name in names
                if all(v.claim.holds for v in part if v.contender == name)
            ]
            columns[task].append(", ".join(holds) or ("none" if names else ""))
    return table(columns)


def preferred(
    names: tuple[str, ...], settings: Settings, known: Mapping[str, Any]
) -> str:
    """The contender with the best trial; empty where none has its trials."""
    found = {}
    for name in names:
        contender = CONTENDERS[name]
        trials = trials_known(name, settings, known)
        if done := tuning.finished(name, contender, settings, trials, known):
            found[name] = max(tuning.scores(done, contender.choices[0]).values())
    return max(found, key=found.__getitem__, default="")


def left_out(
    settings: Settings, known: Mapping[str, Any], names: Iterable[str] = CORE
) -> list[str]:
    """The rows of contenders that a task has not, or not with all seeds."""
    missing = []
    for name in names:
        contender = CONTENDERS[name]
        seeds = tuning.seeds_of(contender, settings)
        trials = len(contender.grid)
        chosen = tuning.chosen(name, contender, settings, trials, known)
        if chosen is None:
            missing.append(name)
            continue
        choices: dict[float, list[str]] = {}
        for choice, hyperparameter in chosen.items():
            choices.setdefault(hyperparameter, []).append(choice)
        for hyperparameter, by in choices.items():
            runs = tuning.tests_of(name, contender, {by[0]: hyperparameter}, seeds)
            if any(records.key_of(r, contender, settings) not in known for r in runs):
                told = f" ({by[0]})" if len(choices) > 1 else ""
                missing.append(f"{name}{told}")
    return missing


def main_lines(
    found: Mapping[str, list[Row]],
    known: Mapping[str, Mapping[str, Any]],
    tasks: Mapping[str, Settings],
) -> str:
    """Markdown: the main lines of every task in one table, as the README has it.

    Args:
      found: the rows of the tasks.
      known: their finished runs.
      tasks: their settings.
    """
    sparsities = (0.0, *FINE_TUNED)
    lines: list[list[str]] = []
    for task, its_rows in found.items():
        settings = tasks[task]
        kind = RECALIBRATED if settings.normalised else ONE_SHOT
        data = SOURCES[settings.data].split(", ")[0]
        lines.append([f"*{NAMES[settings.model]}, {data}*", *[""] * len(sparsities)])

        def add(name: str, contenders: Iterable[str], rows=its_rows, kind=kind) -> None:
            values = best(by_contender(rows, *contenders), kind)
            if values:
                shown = [values.get(s, (None, "")) for s in sparsities]
                winners = ", ".join(dict.fromkeys(who for _, who in shown if who))
                cells = ("" if x is None else f"{x:.1f}" for x, _ in shown)
                lines.append([name.format(winners=winners), *cells])

        add("best of Adam, AdamW, Adagrad, SGD", DENSE_RIVALS)
        add("gradual magnitude pruning, a training for each", GRADUAL)
        add("the same with the l1 norm", GRADUAL_L1)
        add("`targeted`, a training for each", TARGETED_L1)
        add("the same without the l1 norm", TARGETED)
        for name, contenders in OVERVIEW.items():
            chosen = preferred(contenders, settings, known[task])
            steps = "SGD" if "_sgd" in chosen else "Adam"
            add(f"{name} ({steps})", (chosen,))
        for name, contenders in OTHERS.items():
            add(name, contenders)
    head = ["", *(f"{100 * s:g}" for s in sparsities)]
    head[-1] += "%"
    return table({name: [line[i] for line in lines] for i, name in enumerate(head)})


def not_run(
    tasks: Mapping[str, Settings], known: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Which contenders have no runs yet: of the core, and of the others which have.

    Args:
      tasks: settings of the tasks.
      known: their finished runs.
    """
    found = {task: left_out(tasks[task], runs) for task, runs in known.items()}
    told = [f"{task}: {', '.join(names)}" for task, names in found.items() if names]
    core = f"Not run of `--methods core`, or not yet: {'; '.join(told)}."
    run = {task: _others_run(tasks[task], runs) for task, runs in known.items()}
    told = [f"{task}: {', '.join(names) or 'none'}" for task, names in run.items()]
    other = f"Of the other methods these were run: {'; '.join(told)}."
    return [core] * any(found.values()) + [other]


def _others_run(settings: Settings, known: Mapping[str, Any]) -> list[str]:
    outside = [name for name in CONTENDERS if name not in CORE]
    run = [name for name in outside if not left_out(settings, known, [name])]
    return ["all"] if run == outside else run
