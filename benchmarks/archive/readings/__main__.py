"""Which reading of the article gives its published rows.

`python -m benchmarks.archive.readings [--runs 20]` solves A1 (least squares) and REGED0
(classification) under readings that differ from the literal one in a point or two that
the text leaves open or that an implementation may well do otherwise. A few runs of each
are held against the published rows of v1 and v2; the readings nearest to them, and the
literal one, are run again with all runs, on A2 too. Writes readings.md and
readings.json into archive/results.

The algorithm is written out here on its own, with a switch for each point; the literal
reading is checked against the package before anything else. Adagrad and Frank-Wolfe,
which know no classes, are run under the starts and first weights apart.
"""

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from benchmarks.archive.readings import others, report
from benchmarks.archive.readings.algorithm import Reading
from benchmarks.archive.readings.cases import VARIANTS, Case, Outcome, cases, check, run
from benchmarks.archive.readings.catalogue import ALSO, READINGS, changes
from benchmarks.timing import progress

RESULTS = pathlib.Path(__file__).parents[1] / "results"


def study(
    readings: Sequence[str],
    studied: dict[str, Case],
    variants: Sequence[str],
    runs: int,
    label: str,
) -> report.Results:
    """Runs some variants under some readings, on all cases."""
    done: dict[Any, Outcome] = {}

    def outcome(title: str, variant: str, reading: Reading) -> Outcome:
        # What makes no difference to a variant is run once.
        if variant in ("v2", "v4"):  # a has no norms
            reading = dataclasses.replace(reading, g_over="R", x_over="S")
        if variant in ("v3", "v4") and reading.agree == "not opposite":
            # With b = |x| a component at zero is not acceptable whatever agrees.
            reading = dataclasses.replace(reading, agree="same")
        key = title, variant, reading
        if key not in done:
            done[key] = run(studied[title], variant, reading, runs)
        return done[key]

    return {
        name: {
            title: {v: outcome(title, v, READINGS[name]) for v in variants}
            for title in studied
        }
        for name in progress(readings, label)
    }


def plain(found: report.Results) -> Any:
    """The results as JSON has them."""
    return jax.tree.map(
        lambda part: part.tolist(),
        {
            name: {
                title: {v: outcome._asdict() for v, outcome in by_variant.items()}
                for title, by_variant in outcomes.items()
            }
            for name, outcomes in found.items()
        },
    )


def main() -> None:
    """Studies all readings, confirms the nearest, and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20, help="to confirm with")
    parser.add_argument("--few", type=int, default=3, help="runs to search with")
    parser.add_argument("--nearest", type=int, default=3, help="readings to confirm")
    parser.add_argument("--many", type=int, default=200, help="runs for the scatter")
    parser.add_argument("--also", nargs="*", default=list(ALSO), choices=READINGS)
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS)
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    studied = cases()
    for case in studied.values():
        check(case)
    few = {title: studied[title] for title in ("A1", "REGED0")}
    searched = study(list(READINGS), few, VARIANTS[:2], arguments.few, "readings")
    single = [name for name in READINGS if changes(READINGS[name]) == 1]
    single.sort(key=lambda name: report.distance(searched[name], few))
    nearest = ["literal", *single[: arguments.nearest], *arguments.also]
    nearest = list(dict.fromkeys(nearest))
    confirmed = study(nearest, studied, VARIANTS, arguments.runs, "confirmation")
    squares = {name: studied[name].problem for name in ("A1", "A2")}
    rows = others.study(squares, arguments.runs)
    spread = others.scatter(squares["A1"], "A1", arguments.many, report.FACTOR)
    text = report.page(searched, confirmed, studied, rows, spread)
    print(text)
    arguments.output.mkdir(exist_ok=True)
    (arguments.output / "readings.md").write_text(text)
    data = {
        "searched": plain(searched),
        "confirmed": plain(confirmed),
        **others.plain(rows, spread),
    }
    (arguments.output / "readings.json").write_text(json.dumps(data) + "\n")


if __name__ == "__main__":
    main()
