"""How often v1 and v3 step past zero, and what `capped` changes.

`python -m benchmarks.archive.capped` runs the article's least squares A1 (m = 100, n =
1000, Gaussian A, T = 100, learning rate 1, float64, until ||g|| <= 1e-9) from the same
random starts for v1 and v3 with and without the cap a <= |x|, all runs batched by vmap.
"""

import argparse
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm.auto import tqdm

from prunadag_optax import capped, evaluation, masks, prunadag
from prunadag_optax._core.algorithm import Settings, classification_at

RESULTS = pathlib.Path(__file__).parent / "results"
ROWS, COLUMNS, RELEVANT = 100, 1000, 100
ITERATIONS, TOLERANCE = 10_000, 1e-9
WINDOWS = ((0, 10), (10, 100), (100, 500), (500, ITERATIONS))
SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5)
VARIANTS: dict[str, Any] = {
    "v1": "v1",
    "v1, capped": capped("v1"),
    "v3": "v3",
    "v3, capped": capped("v3"),
}


def problem(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A, b = A x* and a start with T nonzeros of norm 1."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(ROWS, COLUMNS))
    b = a @ rng.normal(size=COLUMNS)
    start = np.zeros(COLUMNS)
    start[rng.choice(COLUMNS, RELEVANT, replace=False)] = rng.normal(size=RELEVANT)
    return a, b, start / np.linalg.norm(start)


def solve(variant: Any, a: jax.Array, b: jax.Array, start: jax.Array):
    """One run: its iterations, its rho, and per window the counts (D, past zero)."""
    settings = Settings(relevant=RELEVANT, variant=variant)
    tx = prunadag(1.0, RELEVANT, variant=variant)

    def loss(x):
        return 0.5 * jnp.sum((a @ x - b) ** 2)

    def unfinished(carry):
        k, _, _, gradient, _ = carry
        return (k < ITERATIONS) & (jnp.linalg.norm(gradient) > TOLERANCE)

    def step(carry: Any) -> Any:
        k, x, state, gradient, counts = carry
        classes = classification_at(gradient, state[0], x, settings)
        updates, state = tx.update(gradient, state, x)
        new = optax.apply_updates(x, updates)
        past = classes.decreasable & (x * new < 0)
        window = jnp.searchsorted(jnp.array([w[1] for w in WINDOWS]), k, side="right")
        counts = counts.at[window].add(
            jnp.stack([classes.decreasable.sum(), past.sum()])
        )
        return k + 1, new, state, jax.grad(loss)(new), counts

    counts = jnp.zeros((len(WINDOWS), 2), int)
    first: Any = 0, start, tx.init(start), jax.grad(loss)(start), counts
    k, x, _, _, counts = jax.lax.while_loop(unfinished, step, first)
    rho = evaluation.pruning_error(loss, x, SPARSITIES, where=masks.everything).rho
    return k, rho, counts


def main() -> None:
    """Runs the four variants, prints the table and writes it to results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS)
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    problems = [
        np.stack(p) for p in zip(*map(problem, range(arguments.runs)), strict=True)
    ]
    lines = [
        f"`python -m benchmarks.archive.capped --runs {arguments.runs}`: least squares "
        f"A1, {arguments.runs} runs. Share of the decreasable components that a step "
        "carries past zero, by iteration; and rho after pruning, mean (median).",
        "",
        "| variant | iterations | "
        + " | ".join(f"past zero, {low}-{high - 1}" for low, high in WINDOWS)
        + " | "
        + " | ".join(f"rho at {100 * s:.0f}%" for s in SPARSITIES)
        + " |",
        "|---" * (2 + len(WINDOWS) + len(SPARSITIES)) + "|",
    ]
    for name, variant in tqdm(VARIANTS.items()):
        run = jax.jit(jax.vmap(lambda a, b, x, v=variant: solve(v, a, b, x)))
        k, rho, counts = (np.asarray(part) for part in run(*problems))
        total = counts.sum(0)
        share = 100 * total[:, 1] / np.maximum(total[:, 0], 1)
        cells = [name, f"{k.min()}-{k.max()}"]
        cells += [f"{s:.2f}%" for s in share]
        cells += [
            f"{m:.1e} ({d:.1e})"
            for m, d in zip(rho.mean(0), np.median(rho, 0), strict=True)
        ]
        lines.append("| " + " | ".join(cells) + " |")
    text = "\n".join(lines) + "\n"
    print(text)
    (arguments.output / "capped.md").write_text(text)


if __name__ == "__main__":
    main()
