"""Trains the contenders on the tasks: `python -m benchmarks.networks --task all`.

Writes into the output folder (default: benchmarks/results) the page networks.md and
the folder networks: of each task its finished runs, one JSON line each, and its figure.
A run that is there is not made again, so an interrupted command can be repeated, and
contenders and seeds can be added later. `page` makes the page anew from what is there.

MNIST, CIFAR-10 and Tiny Shakespeare come from the folder in PRUNADAG_DATA, or are
downloaded. --quick takes scikit-learn's digits and the text of pydoc's topics, and
small networks, to see that everything runs.
"""

import argparse
import pathlib
import sys
import tempfile
import time
from typing import Any

from tqdm.auto import tqdm

from benchmarks.networks import evaluation, records, report, tasks, training, tuning
from benchmarks.networks.contenders import CONTENDERS, CORE
from benchmarks.networks.records import Run
from benchmarks.speed import environment

RESULTS = pathlib.Path(__file__).parents[1] / "results"


def make(run: Run, task: str, settings: tasks.Settings) -> dict[str, Any]:
    """Makes a run.

    Args:
      run: what to do.
      task: name of the task.
      settings: of the task.

    Returns:
      Its record, JSON.
    """
    began = time.perf_counter()
    contender, data = CONTENDERS[run.contender], tasks.load(settings, run.seed)
    trial = run.phase == "trial"
    epochs = settings.trial_epochs if trial else settings.epochs * contender.length
    fitted = training.fit(
        settings,
        contender,
        data,
        hyperparameter=run.hyperparameter,
        target=run.target,
        seed=run.seed,
        epochs=epochs,
    )
    trained = time.perf_counter()
    split, at = "test", (evaluation.FINE_TUNED if run.target is None else (run.target,))
    if trial:
        split, at = "validation", ()
    found = evaluation.measured(settings, data, fitted, split, at, run.seed)
    return {
        "key": records.key_of(run, contender, settings),
        "task": task,
        **run._asdict(),
        "version": contender.version,
        "epochs": epochs,
        "sparsities": evaluation.SPARSITIES,
        split: found,
        "zeros": float(f"{evaluation.zeros(fitted.params):.6g}"),
        "seconds": {
            "step": fitted.step_seconds,
            "training": trained - began,
            "all": time.perf_counter() - began,
        },
        "settings": settings._asdict(),
    }


def compete(
    task: str,
    settings: tasks.Settings,
    names: list[str],
    seeds: int | None,
    trials: int,
    path: pathlib.Path,
) -> None:
    """Makes the runs of a task that are not there yet.

    Args:
      task: its name.
      settings: of the task.
      names: of the contenders.
      seeds: how many test runs each has; None: as many as `tuning.seeds_of` says.
      trials: how many hyperparameters each may try.
      path: file of the finished runs.
    """
    known = records.load(path)
    bar = tqdm(total=0, desc=task, unit="run", disable=None)

    def go(runs: list[Run]) -> None:
        missing = [
            (run, key)
            for run in runs
            if (key := records.key_of(run, CONTENDERS[run.contender], settings))
            not in known
        ]
        bar.total += len(missing)
        for run, key in missing:
            target = "" if run.target is None else f" at {run.target:g}"
            bar.set_postfix_str(
                f"{run.contender}{target}, {run.hyperparameter:g}, {run.phase}, "
                f"seed {run.seed}"
            )
            known[key] = make(run, task, settings)
            records.append(path, known[key])
            bar.update()

    with bar:
        for name in names:
            contender = CONTENDERS[name]
            go(tuning.trials_of(name, contender, settings, trials))
            chosen = tuning.chosen(name, contender, settings, trials, known)
            assert chosen is not None
            count = seeds or tuning.seeds_of(contender, settings)
            go(tuning.tests_of(name, contender, chosen, count))


def _names(given: list[str], known: list[str], groups: dict[str, list[str]]) -> Any:
    """The names, groups resolved; argparse has a word for what is unknown."""
    found = [n for name in given for n in groups.get(name, [name])]
    if strange := [name for name in found if name not in known]:
        raise ValueError(
            f"{', '.join(strange)}: choose from {', '.join([*groups, *known])}"
        )
    return list(dict.fromkeys(found))


def main(arguments: list[str] | None = None) -> None:
    """Runs what the command line asks for and writes the page."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.networks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("page", nargs="?", choices=["page"], help="make the page only")
    parser.add_argument("--task", nargs="+", default=["all"], help="all, or names")
    parser.add_argument(
        "--methods", nargs="+", default=["all"], help="all, core, or names"
    )
    parser.add_argument("--seeds", type=int, help="3, or as folds need; with --quick 2")
    parser.add_argument(
        "--trials", type=int, help="hyperparameters each may try: 4; with --quick 1"
    )
    parser.add_argument("--quick", action="store_true", help="small, in minutes")
    parser.add_argument(
        "--redo", action="store_true", help="forget the runs of these methods first"
    )
    parser.add_argument(
        "--output", type=pathlib.Path, help="folder; with --quick a temporary one"
    )
    chosen = parser.parse_args(arguments)
    for name in ("seeds", "trials"):
        if getattr(chosen, name) is not None and getattr(chosen, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(chosen, name)}")
    try:
        task_names = _names(chosen.task, list(tasks.TASKS), {"all": list(tasks.TASKS)})
        names = _names(
            chosen.methods,
            list(CONTENDERS),
            {"all": list(CONTENDERS), "core": list(CORE)},
        )
    except ValueError as error:
        parser.error(str(error))
    output = chosen.output
    if output is None:
        output = pathlib.Path(tempfile.mkdtemp()) if chosen.quick else RESULTS
    folder = output / "networks"
    if not chosen.page:
        typed = " ".join(sys.argv[1:] if arguments is None else arguments)
        known = environment(f"python -m benchmarks.networks {typed}")
        records.append(folder / "commands.jsonl", known)
        for task in task_names:
            settings = (tasks.QUICK if chosen.quick else tasks.TASKS)[task]
            path = folder / f"{task}.jsonl"
            if chosen.redo:
                records.forget(path, set(names))
            seeds = chosen.seeds or (2 if chosen.quick else None)
            trials = chosen.trials or (1 if chosen.quick else 4)
            compete(task, settings, names, seeds, trials, path)
    report.write(folder, output / "networks.md", chosen.quick)
    print(f"{'A quick run, in ' if chosen.quick else ''}{output / 'networks.md'}")


if __name__ == "__main__":
    main()
