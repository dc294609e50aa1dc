"""What prunAdag costs beside optax's Adagrad and Adam (`python -m benchmarks.speed`).

Everything compared takes turns in one run (`timing`), jitted and warmed up, parameters
and state donated, on gradients whose scale changes from step to step. Sections, each a
table or more in results/speed.md, the numbers in results/speed.json:

* steps: every variant, scope and relevance at several sizes; at 10^7 on a flat array, a
  transformer and a ResNet of the same size. Time, ratios, bytes moved against the floor
  and the bandwidth of a copy, compile time, memory.
* linearity: the cost of a parameter as their number grows.
* rivals: the same step with `lax.top_k`, and in PyTorch as its public implementation
  goes about it (`pip install "prunadag_optax[rivals]"`; left out without).
* compilations: how often a step with three schedules is compiled.
* masks: a magnitude mask and a pruning curve beside one sort.
* ensemble: 32 networks trained at once under `jax.vmap`.

`--quick` goes through all of it at small sizes. The machine should be doing nothing
else.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm.auto import tqdm

from benchmarks import other_costs, rivals, speed_report, step_cost, trees
from benchmarks.speed_report import Table

RESULTS = pathlib.Path(__file__).parent / "results"
_TIMES = (
    "parameters", "n", "optimizer", "median ms", "quartiles ms", "ns a parameter",
    "/ adagrad", "/ adagrad, paired", "/ adam", "/ flat",
)  # fmt: skip
_BYTES = (
    "parameters", "n", "optimizer", "floor MB", "floor ms", "median ms",
    "% of copy bandwidth", "XLA MB",
)  # fmt: skip
_COMPILED = (
    "parameters", "n", "optimizer", "compile s", "temp MB", "argument MB", "output MB",
    "alias MB",
)  # fmt: skip


class Settings(NamedTuple):
    """How much to measure.

    Attributes:
      sizes: values of n of the flat arrays.
      main: the one of `sizes` at which trees, rivals and masks are measured, to the
        nearest size that the trees have in common.
      linear_sizes: values of n of the section on linearity.
      repeats: timed rounds at 10^7.
      quick: fewer methods and calls on trees.
    """

    sizes: list[int]
    main: int
    linear_sizes: list[int]
    repeats: int
    quick: bool


def steps(settings: Settings) -> list[Table]:
    """Time, bytes and compilation of a step, the main comparison first."""
    exact, shapes = trees.same_size(settings.main)
    only = ("v4, global",) if settings.quick else None
    rows = step_cost.steps(exact, settings.repeats, shapes, only)
    for size in settings.sizes:
        if size != settings.main:
            flat: dict[str, trees.Shapes | None] = {"flat": None}
            rows += step_cost.steps(size, settings.repeats, flat)
    return [
        Table(
            "One step",
            "Ratios are of medians in the same run; paired: the median of the ratios "
            "within a round. / flat: to the same optimizer on one array.",
            rows,
            _TIMES,
        ),
        Table(
            "Bytes moved",
            "Floor: the bytes that a method must move (for prunAdag nine passes over "
            "arrays: g and x for the threshold and norms; g, x, w^O, w^D read, x, w^O, "
            "w^D written), and the time they take at the bandwidth of the copy of the "
            "flat array. More than 100% is possible where arrays fit into caches. XLA: "
            "the compiler's estimate, with the body of a loop counted once.",
            rows,
            _BYTES,
        ),
        Table(
            "Compile time and memory",
            "Lowering and compiling, in a process where other steps have been compiled "
            "before. Temp: what a step allocates beside its arguments; alias: outputs "
            "in the place of donated arguments.",
            rows,
            _COMPILED,
        ),
    ]


def linearity(settings: Settings) -> list[Table]:
    """The cost of a parameter at growing sizes."""
    rows = step_cost.linearity(settings.linear_sizes, 2 * settings.repeats)
    note = (
        "All sizes by turns in one run. / line: to the line t = c n that is nearest to "
        "the sizes of this optimizer."
    )
    return [Table("Linearity", note, rows)]


def rival_forms(settings: Settings) -> list[Table]:
    """The step in other forms."""
    exact, shapes = trees.same_size(settings.main)
    names = ("flat",) if settings.quick else ("flat", "transformer")
    rows = other_costs.rival_forms(
        exact, settings.repeats, {name: shapes[name] for name in names}
    )
    note = (
        "lax.top_k: |g| concatenated, its T largest. PyTorch: eager, in place, "
        "torch.topk and boolean indexing, tensor by tensor (scope leaf)."
    )
    return [Table("Rivals", f"{note} {rivals.torch_missing()}".strip(), rows)]


def compilations(settings: Settings) -> list[Table]:
    """How often a step is compiled."""
    rows = step_cost.compilations(min(settings.sizes))
    note = "learning_rate, relevant and decrease_schedule all follow schedules."
    return [Table("Compilations", note, rows)]


def mask_costs(settings: Settings) -> list[Table]:
    """Masks and pruning curves."""
    exact, shapes = trees.same_size(settings.main)
    names = ("flat",) if settings.quick else ("flat", "transformer")
    rows = other_costs.mask_costs(
        exact, settings.repeats, {name: shapes[name] for name in names}
    )
    note = "The curve's metric costs nothing; jnp.sort sorts the flat |x| once."
    return [Table("Masks and pruning curves", note, rows)]


def ensemble(settings: Settings) -> list[Table]:
    """Many networks at once."""
    rows = other_costs.ensemble(4 if settings.quick else 32, settings.repeats)
    note = (
        "Whole training steps of 784-64-10 networks, batch 128, under jax.vmap with "
        "donation; ratios / adagrad are of whole training steps."
    )
    return [Table("Ensembles", note, rows)]


SECTIONS: dict[str, Callable[[Settings], list[Table]]] = {
    "steps": steps,
    "linearity": linearity,
    "rivals": rival_forms,
    "compilations": compilations,
    "masks": mask_costs,
    "ensemble": ensemble,
}


def environment(command: str) -> dict[str, Any]:
    """The machine, the versions and the command."""
    versions = {"python": platform.python_version()}
    for package in ("prunadag_optax", "jax", "jaxlib", "optax", "numpy", "torch"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    device = jax.local_devices()[0]
    return {
        "command": command,
        "backend": jax.default_backend(),
        "device": device.device_kind,
        "cores": os.cpu_count(),
        "architecture": platform.machine(),
        "versions": versions,
    }


def settings_of(arguments: argparse.Namespace) -> Settings:
    """The settings that the command line asks for."""
    if arguments.sizes:
        sizes = [int(size) for size in arguments.sizes]
    elif arguments.quick:
        sizes = [100_000]
    else:
        sizes = [10**5, 10**6, 10**7]
        if jax.default_backend() == "gpu":
            sizes += [10**8, 10**9]
    main = min(sizes, key=lambda size: abs(np.log(size / 1e7)))
    linear = [10_000, 100_000] if arguments.quick else [10**6, 10**7, 10**8]
    repeats = arguments.repeats or (3 if arguments.quick else 20)
    return Settings(sizes, main, linear, repeats, arguments.quick)


def main() -> None:
    """Measures, prints the tables and writes them, the numbers and the plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=float, nargs="+", help="values of n")
    parser.add_argument("--repeats", type=int, help="timed rounds at 10^7 (20)")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=[*SECTIONS])
    parser.add_argument("--quick", action="store_true", help="small and short")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS)
    arguments = parser.parse_args()
    # A program from an earlier run would falsify compile times.
    jax.config.update("jax_enable_compilation_cache", False)
    began = time.perf_counter()
    settings = settings_of(arguments)
    known = environment(" ".join(["python -m benchmarks.speed", *sys.argv[1:]]))
    measured: dict[str, list[Table]] = {}
    for name in tqdm(arguments.sections, desc="sections", disable=None):
        measured[name] = SECTIONS[name](settings)
    statistics = jax.local_devices()[0].memory_stats() or {}
    known["peak_bytes_in_use"] = statistics.get("peak_bytes_in_use")
    known["seconds"] = time.perf_counter() - began

    versions = ", ".join(f"{k} {v}" for k, v in known["versions"].items())
    header = (
        f"# Speed\n\n`{known['command']}` on {known['backend']} ({known['device']}, "
        f"{known['architecture']}, {known['cores']} cores), {versions}; "
        f"{settings.repeats} rounds at 10^7, more at smaller sizes; "
        f"{known['seconds']:.0f} s in all."
    )
    tables = [table for made in measured.values() for table in made]
    text = "\n\n".join([header, *map(speed_report.to_markdown, tables)]) + "\n"
    print(text)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "speed.md").write_text(text)
    # The three tables of the first section show columns of the same rows.
    rows = {name: made[0].rows for name, made in measured.items()}
    (arguments.output / "speed.json").write_text(
        json.dumps({**known, **rows}, indent=1) + "\n"
    )
    if "steps" in rows:
        exact, _ = trees.same_size(settings.main)
        speed_report.plot(rows["steps"], exact, arguments.output / "speed.png")


if __name__ == "__main__":
    main()
