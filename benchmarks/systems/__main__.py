"""Runs the experiments of the other systems: `python -m benchmarks.systems all`.

Writes into the output folder (default: benchmarks/results) the page systems.md and the
folder systems: of each experiment its numbers (.json) and its figure (.png). The page
is made from all experiments that have numbers there, so that each can be run on its
own; an experiment that is interrupted leaves the others' numbers alone.

MNIST comes from the folder in PRUNADAG_DATA, or is downloaded. --quick takes
scikit-learn's digits and small settings instead, to see that everything runs.
"""

import argparse
import pathlib
import sys
import tempfile
import time
from typing import Any

from benchmarks.speed import environment
from benchmarks.systems import records, report, training

RESULTS = pathlib.Path(__file__).parents[1] / "results"


def run(name: str, data: Any, seeds: int, quick: bool, command: str) -> records.Result:
    """Runs an experiment.

    Args:
      name: key of `report.EXPERIMENTS`.
      data: `training.Data`, which "costs" does without.
      seeds: how many runs.
      quick: whether in the small settings.
      command: what the user has typed.

    Returns:
      The result.
    """
    module = report.EXPERIMENTS[name]
    settings = module.QUICK if quick else module.Settings()
    began = time.perf_counter()
    rows, curves = module.run(settings, data, seeds)
    known: dict[str, Any] = environment(command)
    about = {
        "command": known.pop("command"),
        "environment": known,
        "seeds": seeds,
        "quick": quick,
        "settings": settings._asdict(),
        "seconds": time.perf_counter() - began,
    }
    return records.Result(about, rows, curves)


def main(arguments: list[str] | None = None) -> None:
    """Runs what the command line asks for and writes the page."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.systems",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("experiment", choices=[*report.EXPERIMENTS, "all", "page"])
    parser.add_argument(
        "--seeds", type=int, help="3, of lottery 5; with --quick 2 of each"
    )
    parser.add_argument("--quick", action="store_true", help="small, in two minutes")
    parser.add_argument(
        "--output", type=pathlib.Path, help="folder; with --quick a temporary one"
    )
    chosen = parser.parse_args(arguments)
    if chosen.seeds is not None and chosen.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {chosen.seeds}")
    output = chosen.output
    if output is None:
        output = pathlib.Path(tempfile.mkdtemp()) if chosen.quick else RESULTS
    names = {"all": list(report.EXPERIMENTS), "page": []}.get(
        chosen.experiment, [chosen.experiment]
    )
    training.wait_for_epochs()
    typed = " ".join(sys.argv[1:] if arguments is None else arguments)
    data = None
    for name in names:
        if name != "costs" and data is None:
            data = training.digits() if chosen.quick else training.mnist()
        seeds = chosen.seeds or (2 if chosen.quick else {"lottery": 5}.get(name, 3))
        command = f"python -m benchmarks.systems {typed}"
        result = run(name, data, seeds, chosen.quick, command)
        records.save(result, output / "systems" / f"{name}.json")
    report.write(output / "systems", output / "systems.md")
    print(f"{'A quick run, in ' if chosen.quick else ''}{output / 'systems.md'}")


if __name__ == "__main__":
    main()
