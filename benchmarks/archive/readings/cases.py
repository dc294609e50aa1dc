"""The problems on which the readings are run, and the published rows."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.archive.readings.algorithm import Reading, solve
from benchmarks.article import published
from benchmarks.problems import Problem, problems
from prunadag_optax import masks, prunadag

VARIANTS = ("v1", "v2", "v3", "v4")


class Case(NamedTuple):
    """A problem and what the article publishes of it."""

    problem: Problem
    measure: Callable[[Any, jax.Array, Sequence[float]], jax.Array]
    sparsities: tuple[float, ...]
    published: dict[str, tuple[float, ...]]  # by variant; NaN where illegible


class Outcome(NamedTuple):
    """What the runs of one variant on one case gave."""

    iterations: np.ndarray  # [runs]
    figures: np.ndarray  # [runs, sparsities]: rho, or accuracy in per cent


def everything_pruned(x: jax.Array, sparsity: float) -> jax.Array:
    """Prunes x by that share of all its components, the smallest ones."""
    return masks.prune(x, sparsity, where=masks.everything)[0]


def cases() -> dict[str, Case]:
    """A1 and A2 with rho and REGED0 with the accuracy, and their published rows."""
    a1, a2 = problems("least_squares", ["A1", "A2"])
    (reged0,) = problems("classification", ["REGED0"])

    def rho(instance, x, sparsities):
        pruned = (everything_pruned(x, sparsity) for sparsity in sparsities)
        # A1 and A2 have one loss.
        gradients = (jax.grad(a1.loss, 2)(a1.shared, instance, y) for y in pruned)
        return jnp.stack([jnp.linalg.norm(gradient) for gradient in gradients])

    def accuracy(instance, x, sparsities):
        share: Any = reged0.accuracy
        pruned = (everything_pruned(x, sparsity) for sparsity in sparsities)
        return 100 * jnp.stack([share(reged0.shared, instance, y) for y in pruned])

    return {
        "A1": _case(a1, rho, published.TABLE_2),
        "A2": _case(a2, rho, published.TABLE_2),
        "REGED0": _case(reged0, accuracy, published.TABLE_4),
    }


def _case(problem: Problem, measure: Any, table: published.Cells) -> Case:
    rows = {s: row for (name, s), row in table.items() if name == problem.name}
    return Case(
        problem,
        measure,
        tuple(rows),
        {v: tuple(row.get(v, np.nan) for row in rows.values()) for v in VARIANTS},
    )


def start_of(problem: Problem, seed: int, reading: Reading) -> np.ndarray:
    """The start of a run, of shape [n]."""
    x = problem.start(seed)
    normal = np.random.default_rng((seed, 2)).normal(size=problem.size)
    return {
        "sparse": x,
        "long": x * problem.relevant**0.5,
        "tiny": np.where(x == 0, 1e-8 * normal, x),
        "dense": normal / np.linalg.norm(normal),
    }[reading.start]


def stacked(problem: Problem, runs: int) -> Any:
    """The instances of the first runs, along a new first axis."""
    instances = [problem.instance(seed) for seed in range(runs)]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *instances)


def run(case: Case, variant: str, reading: Reading, runs: int) -> Outcome:
    """Runs one variant under one reading."""
    problem, target = case.problem, round(reading.target * case.problem.relevant)

    def one(instance, start):
        def gradient(x):
            return jax.grad(problem.loss, 2)(problem.shared, instance, x)

        k, x = solve(gradient, start, variant, reading, target, problem.max_iterations)
        return k, case.measure(instance, x, case.sparsities)

    starts = np.stack([start_of(problem, seed, reading) for seed in range(runs)])
    k, figures = jax.jit(jax.vmap(one))(stacked(problem, runs), starts)
    return Outcome(np.asarray(k), np.asarray(figures))


def check(case: Case, iterations: int = 25) -> None:
    """Raises unless the literal reading takes the package's steps.

    Not too many of them: a component near the border of a set goes to one side or the
    other by the rounding of a norm, and runs that differ in that soon differ in all.
    """
    problem = case.problem
    instance, start = problem.instance(0), jnp.asarray(problem.start(0))

    def gradient(x):
        return jax.grad(problem.loss, 2)(problem.shared, instance, x)

    for variant in VARIANTS:
        tx = prunadag(1.0, problem.relevant, variant=variant)

        @jax.jit
        def packaged(x, tx=tx):
            def step(carry, _):
                x, state = carry
                updates, state = tx.update(gradient(x), state, x)
                return (optax.apply_updates(x, updates), state), None

            return jax.lax.scan(step, (x, tx.init(x)), length=iterations)[0][0]

        here = jax.jit(
            lambda x, v=variant: solve(
                gradient, x, v, Reading(), problem.relevant, iterations
            )[1]
        )
        np.testing.assert_allclose(
            here(start), packaged(start), rtol=1e-8, atol=1e-10, err_msg=variant
        )
