"""Runs experiments and makes their pages: `python -m benchmarks list`.

run EXPERIMENT makes the runs that are missing, then the table (CSV), the page and the
figure in benchmarks/results. page and figure make these anew from the table. Raw runs
are kept in the folder that the environment variable PRUNADAG_RUNS names, else in the
cache folder; a run that is there is not made again, so an interrupted command can be
repeated. With --quick all is small and goes into a temporary folder.
"""

import argparse
import pathlib
import sys
import tempfile

from benchmarks.bench import records
from benchmarks.bench.contenders import chosen
from benchmarks.bench.experiments import EXPERIMENTS, Experiment, Options


def main(arguments: list[str] | None = None) -> int:
    """Does what the command line asks for.

    Args:
      arguments: of the command line; None: those of the process.

    Returns:
      The exit status: 1 if a method failed.
    """
    asked, parser = _parsed(arguments)
    if asked.command == "list":
        _list()
        return 0
    experiment = EXPERIMENTS[asked.experiment]
    if asked.command == "run":
        try:
            chosen(experiment.contenders, asked.method)
        except ValueError as error:
            parser.error(str(error))
        return _run(asked, experiment, parser)
    output = asked.output or records.RESULTS
    rows = records.read_csv(output / f"{asked.experiment}.csv")
    if not rows:
        parser.error(
            f"there is no {output / asked.experiment}.csv: make it by "
            f"`python -m benchmarks run {asked.experiment}`"
        )
    make = _page if asked.command == "page" else _figure
    print(make(asked.experiment, experiment, rows, output, False))
    return 0


def _parsed(
    arguments: list[str] | None,
) -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="experiments and their methods")
    for name, about in (
        ("run", "make the runs that are missing, table, page and figure"),
        ("page", "make the page from the table"),
        ("figure", "make the figure from the table"),
    ):
        command = commands.add_parser(name, help=about)
        command.add_argument("experiment", choices=list(EXPERIMENTS))
        command.add_argument("--output", type=pathlib.Path, help="folder of results")
        if name == "run":
            command.add_argument("--method", nargs="+", help="names; default: all")
            command.add_argument("--seed", nargs="+", type=int, help="of final runs")
            command.add_argument("--quick", action="store_true", help="small")
            command.add_argument(
                "--jobs", type=int, default=1, help="processes of one thread each"
            )
    return parser.parse_args(arguments), parser


def _list() -> None:
    for name, experiment in EXPERIMENTS.items():
        print(f"{name}: {experiment.about}")
        for row in experiment.contenders:
            kind = "a training for each sparsity" if row.each else "one training"
            print(f"    {row.label} ({row.base}; {kind})")


def _run(
    asked: argparse.Namespace, experiment: Experiment, parser: argparse.ArgumentParser
) -> int:
    if asked.jobs < 1:
        parser.error(f"--jobs must be at least 1; got {asked.jobs}")
    output = asked.output or records.RESULTS
    if asked.quick:
        output = asked.output or pathlib.Path(tempfile.mkdtemp())
        if output.resolve() == records.RESULTS.resolve():
            parser.error(
                "--quick must not write over committed results: leave out "
                "--output, or name another folder"
            )
    if experiment.together and asked.method and not (asked.quick or asked.output):
        parser.error(
            f"the methods of {asked.experiment} are compared within one run: leave out "
            "--method, or name a folder by --output"
        )
    options = Options(
        asked.method,
        None if asked.seed is None else tuple(asked.seed),
        asked.quick,
        asked.jobs,
        output if asked.quick else records.folder(),
    )
    new, failed = experiment.rows(options)
    table = output / f"{asked.experiment}.csv"
    old = [] if experiment.together else records.read_csv(table)
    order = experiment.order(asked.quick)
    rows = records.merged(old, new, experiment.by, order)
    if rows:
        records.write_csv(table, rows)
        print(_page(asked.experiment, experiment, rows, output, asked.quick))
        if experiment.figure is not None:
            print(_figure(asked.experiment, experiment, rows, output, asked.quick))
    print(f"Raw runs: {options.runs}")
    if failed:
        print(f"Failed: {'; '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _page(name, experiment, rows, output, quick) -> pathlib.Path:
    path = output / f"{name}.md"
    path.write_text(experiment.page(rows, quick), encoding="utf-8")
    return path


def _figure(name, experiment, rows, output, quick) -> str | pathlib.Path:
    if experiment.figure is None:
        return f"{name} has no figure"
    path = output / f"{name}.png"
    # Without the date and the versions, so that the file is the same each time.
    experiment.figure(rows, quick).savefig(path, dpi=150, metadata={"Software": None})
    return path


if __name__ == "__main__":
    sys.exit(main())
