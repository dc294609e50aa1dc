"""What a step costs, against optax's Adagrad and Adam (`python -m benchmarks.speed`).

Every optimizer takes jitted steps with parameters and state donated, on the same
gradient. The optimizers take turns within each repeat, so that a change of the
machine's speed falls on all of them; the table gives medians, the middle half of the
repeats as the spread, and ratios to optax.adagrad in the same run.
"""

import argparse
import json
import pathlib
import platform
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm.auto import tqdm

from prunadag_optax import prunadag

RESULTS = pathlib.Path(__file__).parent / "results"


def optimizers() -> dict[str, optax.GradientTransformation]:
    """What is timed: optax's own first, then prunAdag in every variant."""
    own = {
        f"prunadag {variant}, {scope}": prunadag(0.05, variant=variant, scope=scope)
        for scope in ("global", "leaf")
        for variant in ("v1", "v2", "v3", "v4")
    }
    return {"optax.adagrad": optax.adagrad(0.05), "optax.adam": optax.adam(1e-3), **own}


def stepper(tx: optax.GradientTransformation, params: Any, gradient: Any) -> Callable:
    """A function that takes one step and returns its wall time in seconds."""

    def step(gradient, params, state):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=(1, 2))
    # Copies: each optimizer donates buffers of its own.
    carry = jax.tree.map(jnp.copy, params), tx.init(params)

    def run() -> float:
        nonlocal carry
        began = time.perf_counter()
        carry = jax.block_until_ready(compiled(gradient, *carry))
        return time.perf_counter() - began

    return run


def measure(size: int, repeats: int, progress: bool = True) -> list[dict[str, Any]]:
    """Times every optimizer on one flat float32 array.

    Args:
      size: number of parameters.
      repeats: timed rounds, after three that warm up.
      progress: whether to show a bar.

    Returns:
      One row an optimizer: name, median, quartiles (ms), ratio to optax.adagrad.
    """
    keys = jax.random.split(jax.random.key(0))
    params = 0.1 * jax.random.normal(keys[0], (size,))
    gradient = jax.random.normal(keys[1], (size,))
    runs = {n: stepper(tx, params, gradient) for n, tx in optimizers().items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in tqdm(range(repeats + 3), desc=f"n = {size}", disable=not progress):
        for name, run in runs.items():
            seconds = run()
            if repeat >= 3:
                times[name].append(1e3 * seconds)
    base = np.median(times["optax.adagrad"])
    return [
        {
            "optimizer": name,
            "size": size,
            "median_ms": float(np.median(values)),
            "quartiles_ms": [float(q) for q in np.quantile(values, (0.25, 0.75))],
            "ratio_to_adagrad": float(np.median(values) / base),
        }
        for name, values in times.items()
    ]


def to_markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = ["| optimizer | n | median, ms (quartiles) | ratio |", "|---|---|---|---|"]
    for row in rows:
        low, high = row["quartiles_ms"]
        lines.append(
            f"| {row['optimizer']} | {row['size']:.0e} | {row['median_ms']:.3g} "
            f"({low:.3g}-{high:.3g}) | {row['ratio_to_adagrad']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measures, prints the table, writes it as JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=float, nargs="+", default=[1e5, 1e6, 1e7])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS)
    arguments = parser.parse_args()
    rows = []
    for size in arguments.sizes:
        rows += measure(int(size), arguments.repeats)
    machine = (
        f"{jax.devices()[0].device_kind}, {platform.machine()}, jax {jax.__version__}, "
        f"optax {optax.__version__}"
    )
    text = f"`python -m benchmarks.speed` on {machine}\n\n{to_markdown(rows)}\n"
    print(text)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "speed.md").write_text(text)
    (arguments.output / "speed.json").write_text(
        json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
