"""What one step costs: in time, in bytes moved, in compilation and in memory.

A copy (x + 1 in place of x) timed in the same run gives the bandwidth there is, and so
the time that a method's floor of bytes (`methods`) would take.
"""

import os
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import timing, trees
from benchmarks.methods import (
    COPY,
    PRUNADAG,
    RATE,
    Optimizer,
    compile_all,
    floor_bytes,
    optimizers,
)
from prunadag_optax import prunadag

REFERENCES = ("copy", "optax.adagrad", "optax.adam")


def memory_needed(size: int, method: Optimizer) -> int:
    """Bytes that timing a method takes: carry, data, temporaries (estimated).

    Args:
      size: n.
      method: what is timed.

    Returns:
      Bytes.
    """
    item = jnp.dtype(method.dtype).itemsize
    return size * (item + 4 * method.accumulators + 4)


def memory_available() -> int:
    """Bytes free on the device, or in the host's memory where jax does not say."""
    statistics = jax.local_devices()[0].memory_stats()
    if statistics and "bytes_limit" in statistics:
        return statistics["bytes_limit"] - statistics["bytes_in_use"]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def groups(needed: dict[str, int], available: int) -> list[list[str]]:
    """Splits methods into groups that fit into memory, the references in each.

    Args:
      needed: bytes by method, `REFERENCES` among them.
      available: bytes.

    Returns:
      Names, in as few groups as taking them in turn gives; methods that do not fit
      even alone with the references are in none.
    """
    base = sum(needed[name] for name in REFERENCES)
    found: list[list[str]] = []
    left = -1
    for name in needed:
        if name in REFERENCES or base + needed[name] > available:
            continue
        if needed[name] > left:
            found.append([*REFERENCES])
            left = available - base
        found[-1].append(name)
        left -= needed[name]
    return found


def rounds(size: int, repeats: int) -> int:
    """Timed rounds at a size: `repeats` at 10^7 and above, more below it."""
    return repeats * int(np.clip(1e7 / size, 1, 10))


def steps(
    size: int,
    repeats: int,
    shapes: dict[str, trees.Shapes | None],
    only: Collection[str] | None = None,
) -> list[dict[str, Any]]:
    """Times every method on every tree, all by turns.

    Args:
      size: n.
      repeats: timed rounds at n = 10^7.
      shapes: the trees, each of n elements, "flat" among them.
      only: on trees other than "flat" these methods only, beside the references.

    Returns:
      A row a method and tree, all that is known of it. Methods that do not fit into
      memory have a row with the key "skipped".
    """
    methods = {
        (tree, name): method
        for tree in shapes
        for name, method in optimizers(None if tree == "flat" else only).items()
    }
    total = sum(memory_needed(size, method) for method in methods.values())
    if total <= memory_available():
        return _measured_rows(methods, size, repeats, shapes)
    found: dict[tuple[str, str], dict[str, Any]] = {
        (tree, name): _skipped(tree, size, name) for tree, name in methods
    }
    for tree in shapes:
        own = {name: method for (t, name), method in methods.items() if t == tree}
        needed = {name: memory_needed(size, method) for name, method in own.items()}
        # The references are in each group; the last that is measured is shown.
        for group in groups(needed, memory_available()):
            part = {(tree, name): own[name] for name in group}
            for row in _measured_rows(part, size, repeats, shapes):
                if "skipped" not in row:
                    found[tree, row["optimizer"]] = row
    return list(found.values())


def _skipped(tree: str, size: int, name: str) -> dict[str, Any]:
    return {"parameters": tree, "n": size, "optimizer": name, "skipped": "memory"}


def _measured_rows(methods, size, repeats, shapes) -> list[dict[str, Any]]:
    try:
        return _rows(_measure(methods, size, repeats, shapes), size, methods)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return [_skipped(tree, size, name) for tree, name in methods]


def _measure(methods, size, repeats, shapes):
    """(the compiled steps, their wall times in ms) by (tree, method)."""
    compiled = {}
    used = dict.fromkeys(tree for tree, _ in methods)
    for tree in used:
        own = {key: method for key, method in methods.items() if key[0] == tree}
        compiled |= compile_all(own, size, shapes[tree])
    runs = {key: step.run for key, step in compiled.items()}
    times = timing.interleave(runs, rounds(size, repeats), label=f"n = {size}")
    return compiled, times


def _rows(measured, size, methods) -> list[dict[str, Any]]:
    compiled, times = measured
    rows = []
    for (tree, name), step in compiled.items():
        method, own = methods[tree, name], times[tree, name]
        median = float(np.nanmedian(own))
        flat = "flat" if ("flat", name) in times else tree
        copied = np.nanmedian(times[flat, "copy"])
        floor = floor_bytes(size, method.passes, method.dtype)
        # Bytes in proportion to those of a copy.
        floor_ms = copied * floor / floor_bytes(size, COPY)
        row: dict[str, Any] = {"parameters": tree, "n": size, "optimizer": name}
        row |= timing.spread(own)
        row |= {
            "ns a parameter": 1e6 * median / size,
            "/ adagrad": timing.ratio(own, times[tree, "optax.adagrad"]),
            "/ adagrad, paired": timing.paired_ratio(own, times[tree, "optax.adagrad"]),
            "/ adam": timing.ratio(own, times[tree, "optax.adam"]),
            "/ flat": timing.ratio(own, times[flat, name]),
            "floor MB": floor / 1e6,
            "floor ms": float(floor_ms),
            "% of copy bandwidth": 100 * float(floor_ms) / median,
            "XLA MB": None if step.accessed is None else step.accessed / 1e6,
            "compile s": step.compile_s,
        }
        rows.append(row | {f"{k} MB": v / 1e6 for k, v in step.memory.items()})
    return rows


def linearity(sizes: list[int], repeats: int) -> list[dict[str, Any]]:
    """The cost of a parameter at several sizes, all by turns.

    Args:
      sizes: values of n; the first is what the others are compared with.
      repeats: timed rounds.

    Returns:
      A row a method and size; sizes that do not fit into memory are "skipped".
    """
    methods = {
        name: method
        for name, method in optimizers(("v3, global", "v4, global")).items()
        if name not in ("copy", "optax.adam")
    }
    left, fitting = memory_available(), []
    for size in sizes:
        needed = sum(memory_needed(size, method) for method in methods.values())
        if needed <= left:
            fitting.append(size)
            left -= needed
    runs = {
        (name, size): step.run
        for size in fitting
        for name, step in compile_all(methods, size).items()
    }
    times = timing.interleave(runs, repeats, label="linearity")
    rows = []
    for name in methods:
        costs = {n: 1e6 * float(np.nanmedian(times[name, n])) / n for n in fitting}
        # Of all t = c n the one whose largest relative deviation is least.
        line = np.sqrt(min(costs.values()) * max(costs.values())) if costs else np.nan
        for size in sizes:
            row: dict[str, Any] = {"optimizer": name, "n": size}
            if size in fitting:
                row |= timing.spread(times[name, size]) | {
                    "ns a parameter": costs[size],
                    f"/ at {fitting[0]:.0e}": costs[size] / costs[fitting[0]],
                    "/ line": costs[size] / line,
                }
            else:
                row["skipped"] = "memory"
            rows.append(row)
    return rows


def compilations(size: int, count: int = 10) -> list[dict[str, Any]]:
    """How often a step with three schedules is compiled over several steps.

    Args:
      size: n.
      count: steps taken.

    Returns:
      A row a variant: "compilations", which should be 1.
    """
    rows = []
    for variant in ("v1", "v2", "v3", "v4"):
        tx = prunadag(
            optax.cosine_decay_schedule(RATE, count),
            optax.linear_schedule(1.0, 0.1, count),
            variant=variant,
            decrease_schedule=lambda k: (k + 1.0) ** -0.5,
        )
        method = Optimizer(tx, PRUNADAG, 2)
        step = compile_all({variant: method}, size)[variant]
        for _ in range(count):
            step.run()
        rows.append({"variant": variant, "steps": count, "compilations": step.traced()})
    return rows
