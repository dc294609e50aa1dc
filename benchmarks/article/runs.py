"""Runs of a method on a problem: one compiled loop, all runs at once.

A run is a scan over the intervals between recording points, with a while loop over the
iterations of an interval inside it. So what is recorded costs nothing in between, and a
run that has converged stays where it is, also when `jax.vmap` carries it along with
others that have not.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.article.methods import METHODS, VARIANTS, Setting, Settings, settings_of
from benchmarks.article.pruning import Robustness, evaluate
from benchmarks.problems import Problem
from prunadag_optax._core import algorithm

TOLERANCE = 1e-9
# Tolerances whose first iteration is noted, the last of them that of the stop.
TOLERANCES = (1e-3, 1e-6, TOLERANCE)
# Levels below which a component counts as small.
DELTAS = (1e-8, 1e-6, 1e-4, 1e-2)
# Of the runs, at each recording point: lower quartile, median, upper quartile.
QUANTILES = (0.25, 0.5, 0.75)
POINTS = 200


class Trace(NamedTuple):
    """What is seen of a run at its recording points, arrays [points, ...]."""

    gradient_norm: jax.Array
    below: jax.Array  # share of components with |x| < delta, [points, deltas]
    classes: jax.Array | None  # |O|, |A|, |D|, [points, 3]; None without classes


class Outcome(NamedTuple):
    """The end of a run, and the way to it."""

    x: jax.Array  # [n]
    iterations: jax.Array
    reached: jax.Array  # the iteration that reached each of TOLERANCES, or -1
    trace: Trace


class _Carry(NamedTuple):
    done: jax.Array  # iterations
    x: jax.Array
    state: Any
    gradient: jax.Array
    norm: jax.Array
    reached: jax.Array


def recording_points(limit: int, points: int = POINTS) -> np.ndarray:
    """The iterations at which to record: 0, then spaced evenly on a logarithmic axis.

    Args:
      limit: the last of them, at least 1.
      points: how many there are at most.

    Returns:
      Rising integers from 0 to `limit`.

    Examples:
      >>> recording_points(100, 6).tolist()
      [0, 1, 3, 10, 32, 100]
    """
    spaced = np.round(np.geomspace(1, limit, points - 1)).astype(int)
    return np.unique(np.concatenate([[0], spaced, [limit]]))


def solve(
    loss: Callable[[jax.Array], jax.Array],
    method: str,
    settings: Settings,
    start: jax.Array,
    points: jax.Array | np.ndarray,
) -> Outcome:
    r"""One run, until ||grad f|| is at most the tolerance or the last point is reached.

    Args:
      loss: f, from x of shape [n] to a scalar.
      method: a key of METHODS.
      settings: its numbers.
      start: x_0, shape [n].
      points: the iterations at which to record, rising; the last one is the limit.

    Returns:
      The `Outcome`. After the end of the run the trace repeats its last values.
    """
    tx = optax.with_extra_args_support(METHODS[method](settings))
    gradient_of = jax.grad(loss)
    tolerances = jnp.array(TOLERANCES)

    def at(done, x, state, reached) -> _Carry:
        gradient = gradient_of(x)
        norm = jnp.linalg.norm(gradient)
        reached = jnp.where((reached < 0) & (norm <= tolerances), done, reached)
        return _Carry(done, x, state, gradient, norm, reached)

    def step(now: _Carry) -> _Carry:
        updates, state = tx.update(now.gradient, now.state, now.x)
        x: Any = optax.apply_updates(now.x, updates)
        return at(now.done + 1, x, state, now.reached)

    def interval(now: _Carry, until: jax.Array) -> tuple[_Carry, Trace]:
        def unfinished(now: _Carry) -> jax.Array:
            return (now.done < until) & (now.norm > TOLERANCE)

        now = jax.lax.while_loop(unfinished, step, now)
        return now, record(now)

    def record(now: _Carry) -> Trace:
        below = jnp.abs(now.x)[:, None] < jnp.array(DELTAS)[None]
        classes = None
        if method in VARIANTS:
            found = algorithm.classification_at(
                now.gradient,
                now.state[0],
                now.x,
                algorithm.Settings(relevant=settings.relevant, variant=method),
            )
            sets = (found.optimisable, found.acceptable, found.decreasable)
            classes = jnp.stack([jnp.sum(s) for s in sets])
        return Trace(now.norm, jnp.mean(below, axis=0, dtype=now.x.dtype), classes)

    never = jnp.full(len(TOLERANCES), -1)
    first = at(jnp.zeros((), int), start, tx.init(start), never)
    last, trace = jax.lax.scan(interval, first, jnp.asarray(points))
    return Outcome(last.x, last.done, last.reached, trace)


# Functions of the problem are static: problems that share them are compiled once.
@functools.partial(jax.jit, static_argnames=("loss", "method"))
def _solve_all(loss, method, settings, shared, instances, starts, points) -> Outcome:
    return jax.vmap(
        lambda instance, start: solve(
            functools.partial(loss, shared, instance), method, settings, start, points
        )
    )(instances, starts)


@functools.partial(jax.jit, static_argnames=("loss", "accuracy"))
def _evaluate_all(loss, accuracy, shared, instances, x) -> Robustness:
    def one(instance, x):
        own = (
            None if accuracy is None else functools.partial(accuracy, shared, instance)
        )
        return evaluate(functools.partial(loss, shared, instance), own, x)

    return jax.vmap(one)(instances, x)


class Batch(NamedTuple):
    """The arrays of a problem for several runs, on the device."""

    shared: Any
    instances: Any  # stacked along a first axis
    starts: jax.Array  # [runs, n]


# What the entries of x_0 are before they are scaled to length 1.
STARTS = {
    "sparse": "T standard normal entries at random places, the others zero",
    "dense": "n standard normal entries",
}
# A stream of random numbers of its own; 0 and 1 are those of the problems.
_DENSE = 2


def start_of(problem: Problem, seed: int, start: str) -> np.ndarray:
    """The start of a run, of length 1.

    Args:
      problem: what is to be run.
      seed: number of the run.
      start: a key of STARTS; "sparse" is the problem's own.

    Returns:
      float64 of shape [n].

    Raises:
      ValueError: for another `start`.
    """
    if start not in STARTS:
        raise ValueError(f"start must be one of {list(STARTS)}, got {start!r}")
    if start == "sparse":
        return problem.start(seed)
    x = np.random.default_rng((seed, _DENSE)).normal(size=problem.size)
    return x / np.linalg.norm(x)


def batch(problem: Problem, runs: int, start: str) -> Batch:
    """The instances and starts of runs 0, 1, ..., stacked.

    Args:
      problem: what is to be run.
      runs: how many, at least 1.
      start: a key of STARTS.

    Returns:
      The `Batch`.
    """
    instances = [problem.instance(seed) for seed in range(runs)]
    starts = [start_of(problem, seed, start) for seed in range(runs)]
    return Batch(
        jax.tree.map(jnp.asarray, problem.shared),
        jax.tree.map(lambda *arrays: jnp.asarray(np.stack(arrays)), *instances),
        jnp.asarray(np.stack(starts)),
    )


def run(
    problem: Problem,
    data: Batch,
    method: str,
    limit: int,
    setting: Setting,
    relevant: int | None = None,
) -> tuple[Outcome, Robustness]:
    """All runs of a method on a problem, and what pruning does to their results.

    Args:
      problem: what to minimise.
      data: its arrays, from `batch`.
      method: a key of METHODS.
      limit: iterations at most.
      setting: of `methods.SETTINGS`; its start is that of `data`.
      relevant: T; None is the problem's own.

    Returns:
      Outcomes and robustness, arrays [runs, ...].
    """
    outcome = _solve_all(
        problem.loss,
        method,
        settings_of(problem, setting, relevant),
        *data,
        recording_points(limit),
    )
    measured = _evaluate_all(
        problem.loss, problem.accuracy, data.shared, data.instances, outcome.x
    )
    return outcome, measured


def quantities(outcome: Outcome, measured: Robustness) -> dict[str, np.ndarray]:
    """What is kept of the runs of a method on a problem: arrays by name.

    Args:
      outcome: arrays [runs, ...].
      measured: arrays [runs, sparsities].

    Returns:
      "iterations" [runs], "reached" [runs, tolerances], "rho", "omega" and "accuracy"
      [runs, sparsities], and of the trace the QUANTILES over the runs: "norms"
      [quantiles, points], "below" [quantiles, points, deltas], "classes"
      [quantiles, points, 3]. What there is none of is left out.
    """

    def spread(recorded):
        if recorded is None:
            return None
        return np.quantile(recorded, QUANTILES, axis=0).astype(np.float32)

    found = {
        "iterations": outcome.iterations,
        "reached": outcome.reached,
        "rho": measured.rho,
        "omega": measured.omega,
        "accuracy": measured.accuracy,
        "norms": spread(outcome.trace.gradient_norm),
        "below": spread(outcome.trace.below),
        "classes": spread(outcome.trace.classes),
    }
    return {
        name: np.asarray(array) for name, array in found.items() if array is not None
    }
