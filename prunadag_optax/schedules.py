"""Schedules over a training: densities, the share of weights kept, and learning rates.

A schedule is a function from the number of steps done, as optax's schedules are: it can
be called inside a compiled step.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from prunadag_optax._common import checks
from prunadag_optax._common.dtypes import value_at
from prunadag_optax._common.patterns import NOfM, share

# Part of the training in which `stable_decay` does not fall.
STABLE = 0.6
# What of a learning rate is left after the training.
FINAL = 0.01
# The sparse turns of a cycle: those who prune, prune to 90, 95 or 98%.
SPARSE_TURNS = (0.1, 0.05, 0.02, 0.1, 0.05, 0.02, 0.01, 0.1, 0.05)


def density_cycle(
    dense_share: float = 0.1, turns: Sequence[float | str] = SPARSE_TURNS
) -> tuple[float | str, ...]:
    """The turns of `recipes.any_sparsity`: the dense network's among the sparse ones.

    Args:
      dense_share: share of the turns that train the dense network, in [0, 1), to the
        nearest number of turns; they lie evenly among the others.
      turns: the other densities, in (0, 1], or N:M patterns such as "2:4", in their
        order.

    Returns:
      The densities of a cycle.

    Raises:
      ValueError: for an argument out of range.

    Examples:
      >>> from prunadag_optax import schedules
      >>> schedules.density_cycle(0.5, (0.1, 0.05))
      (1.0, 0.1, 1.0, 0.05)
    """
    if checks.is_scalar_array(dense_share):
        raise ValueError(
            "dense_share must be a Python number; got an array. Under "
            "optax.inject_hyperparams name it: static_args=('dense_share', ...)."
        )
    checks.scalar("dense_share", dense_share, least=0, below=1)
    turns = checks.sequence("turns", turns, "(0.1, 0.05)")
    for turn in turns:
        share("turns", turn)
    number = len(turns)
    dense = round(number * dense_share / (1 - dense_share))
    cycle: list[float | str] = []
    for i, turn in enumerate(turns):
        before, after = (-(-j * dense // number) for j in (i, i + 1))
        cycle += [1.0] * (after - before) + [turn]
    return tuple(cycle)


def cubic_density(
    final: chex.Numeric, *, begin: float, end: float, initial: chex.Numeric = 1.0
) -> optax.Schedule:
    r"""A density that falls quickly at first, then slowly: gradual magnitude pruning's.

    .. math:: f_k = f + (i - f) (1 - u)^3, \quad
       u = \min(\max((k - k_0) / (k_1 - k_0), 0), 1)

    Args:
      final: f in (0, 1], the share kept from step `end` on. A scalar array may be
        traced.
      begin: k_0 >= 0, the step until which it is `initial`.
      end: k_1 > k_0, the step from which it is `final`.
      initial: i in (0, 1].

    Returns:
      Schedule count -> density.

    Raises:
      ValueError: for an argument out of range.

    Examples:
      >>> from prunadag_optax import schedules
      >>> density = schedules.cubic_density(0.1, begin=10, end=20)
      >>> [round(float(density(step)), 3) for step in (0, 10, 15, 20, 30)]
      [1.0, 1.0, 0.213, 0.1, 0.1]

    References:
      M. Zhu, S. Gupta, To prune, or not to prune, arXiv:1710.01878, equation (1), for
      the sparsity 1 - f_k.
    """
    checks.scalar("final", final, above=0, most=1)
    checks.scalar("initial", initial, above=0, most=1)
    checks.scalar("begin", begin, least=0)
    checks.scalar("end", end, above=begin)

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        done = (jnp.asarray(count, jnp.float32) - begin) / (end - begin)
        low, high = jnp.asarray(final), jnp.asarray(initial)
        falling = low + (high - low) * (1 - jnp.clip(done, 0, 1)) ** 3
        # Rounding must not prune before the beginning.
        return jnp.where(done <= 0, high, falling)

    return schedule


def one_shot_density(density: chex.Numeric, *, step: int) -> optax.Schedule:
    r"""The density of a network that is pruned once.

    .. math:: f_k = f \text{ for } k \ge k_0, \text{ else } 1

    Args:
      density: f in (0, 1].
      step: k_0 >= 0, the step from which the weights are pruned.

    Returns:
      Schedule count -> density.

    Raises:
      ValueError: for an argument out of range.

    Examples:
      >>> from prunadag_optax import schedules
      >>> density = schedules.one_shot_density(0.5, step=10)
      >>> [float(density(step)) for step in (9, 10)]
      [1.0, 0.5]
    """
    checks.scalar("density", density, above=0, most=1)
    checks.scalar("step", step, least=0)
    return lambda count: jnp.where(jnp.asarray(count) >= step, density, 1.0)


class CyclicDensity(NamedTuple):
    """The schedule of `cyclic_density`, with the N:M patterns that take turns in it."""

    shares: tuple[float, ...]
    of_turn: tuple[int, ...]  # the pattern of each turn, by its index; -1: none
    patterns: tuple[NOfM, ...]
    least: optax.ScalarOrSchedule

    def __call__(self, count: jax.typing.ArrayLike) -> jax.Array:
        """The density in a step."""
        return jnp.maximum(self._turn(self.shares, count), value_at(self.least, count))

    def pattern_at(self, count: jax.typing.ArrayLike) -> jax.Array:
        """The index of the pattern in a step; -1: none, or more is to be kept."""
        share, index = (self._turn(of, count) for of in (self.shares, self.of_turn))
        return jnp.where(value_at(self.least, count) > share, -1, index)

    def _turn(self, of_turn: tuple[float, ...], count: Any) -> jax.Array:
        values = np.array(of_turn)
        values = values.astype(np.float32 if values.dtype.kind == "f" else np.int32)
        return jnp.asarray(values)[jnp.asarray(count, jnp.int32) % len(values)]


def cyclic_density(
    densities: Sequence[float | str], *, least: optax.ScalarOrSchedule = 0.0
) -> CyclicDensity:
    r"""Densities that take turns, so that each of them is trained all the time.

    .. math:: \max(\ell_{k \bmod L}, f_k)

    Args:
      densities: l_0 .. l_{L-1} in (0, 1]; one that comes up twice has two turns. An N:M
        pattern such as "2:4" is a turn of the density N / M with that pattern, once f_k
        is no more than it.
      least: f_k, number or schedule, that no density goes below, such as a
        `cubic_density` which lets the smaller ones come in one after another.

    Returns:
      Schedule count -> density.

    Raises:
      ValueError: if there is no density or one out of range.

    Examples:
      >>> from prunadag_optax import schedules
      >>> density = schedules.cyclic_density((1.0, 0.1, 0.01))
      >>> [round(float(density(step)), 2) for step in range(4)]
      [1.0, 0.1, 0.01, 1.0]
    """
    densities = checks.sequence("densities", densities, "(1.0, 0.1)")
    if not densities:
        raise ValueError("densities must hold at least one in (0, 1]; got none.")
    checks.scalar_or_schedule("least", least, least=0, most=1)
    shares, of_turn = zip(*(share("densities", d) for d in densities), strict=True)
    patterns = tuple(dict.fromkeys(p for p in of_turn if p is not None))
    indices = tuple(-1 if p is None else patterns.index(p) for p in of_turn)
    return CyclicDensity(tuple(map(float, shares)), indices, patterns, least)


def staircase_density(
    finals: Sequence[float], *, ends: Sequence[int], settle: float = 0.4
) -> optax.Schedule:
    r"""A density that comes down in stages, each with a plateau at its end.

    Stage j begins where stage j - 1 ended, at its density, and goes down to f_j like
    `cubic_density` in all but the last part of its steps.

    Args:
      finals: f_1 > f_2 > ... in (0, 1], the densities of the plateaus.
      ends: the steps at which the stages end, rising, one for each plateau.
      settle: part of a stage, in [0, 1), for which its plateau lasts.

    Returns:
      Schedule count -> density.

    Raises:
      ValueError: for an argument out of range or out of order.

    Examples:
      >>> from prunadag_optax import schedules
      >>> density = schedules.staircase_density((0.5, 0.25), ends=(10, 20))
      >>> [round(float(density(step)), 3) for step in (0, 3, 6, 9, 10, 16, 30)]
      [1.0, 0.562, 0.5, 0.5, 0.5, 0.25, 0.25]
    """
    checks.scalar("settle", settle, least=0, below=1)
    begins = _begins_of_stages(finals, ends)
    parts = [
        cubic_density(final, begin=begin, end=end - settle * (end - begin), initial=i)
        for final, begin, end, i in zip(
            finals, begins, ends, (1.0, *finals), strict=False
        )
    ]
    return optax.join_schedules(
        # Each part counts from the beginning, join_schedules from each boundary.
        [
            lambda count, part=part, begin=begin: part(count + begin)
            for part, begin in zip(parts, begins, strict=True)
        ],
        begins[1:],
    )


def stable_decay(
    learning_rate: chex.Numeric,
    total_steps: int,
    *,
    stable: float = STABLE,
    final: float = FINAL,
) -> optax.Schedule:
    r"""A learning rate that is constant for most of the training, then falls to 1%.

    .. math:: \eta_k = \eta \left( f + (1 - f)
       \min\left(1, \max\left(0, \frac{N - k}{N - N_0}\right)\right) \right), \quad
       N_0 = \lfloor s N \rfloor

    After the training it stays at f eta, so that a training that goes on still learns.

    Args:
      learning_rate: eta >= 0.
      total_steps: N >= 1.
      stable: s in [0, 1), the part of the training for which it is constant.
      final: f in [0, 1], what is left of eta after the training.

    Returns:
      Schedule count -> learning rate.

    Raises:
      ValueError: for an argument out of range.

    Examples:
      >>> from prunadag_optax import schedules
      >>> rate = schedules.stable_decay(0.5, 10)
      >>> [round(float(rate(step)), 3) for step in (0, 6, 7, 9, 10)]
      [0.5, 0.5, 0.376, 0.129, 0.005]

    References:
      A. Haegele and others, Scaling laws and compute-optimal training beyond fixed
      training durations, arXiv:2405.18392 (constant rate with cooldown).
    """
    checks.scalar("learning_rate", learning_rate, least=0)
    checks.integer("total_steps", total_steps, least=1)
    checks.scalar("stable", stable, least=0, below=1)
    checks.scalar("final", final, least=0, most=1)
    begin = int(stable * total_steps)
    last = final * learning_rate
    return optax.linear_schedule(learning_rate, last, total_steps - begin, begin)


def _begins_of_stages(finals: Sequence[float], ends: Sequence[int]) -> list[int]:
    """The steps at which stages begin; ValueError if the stages are not in order."""
    finals = checks.sequence("finals", finals, "(0.5, 0.1)")
    ends = checks.sequence("ends", ends, "(500, 1000)")
    if not finals or len(finals) != len(ends):
        raise ValueError(
            f"finals and ends must have one entry for each stage; got {len(finals)} "
            f"and {len(ends)}."
        )
    for final in finals:
        checks.scalar("finals", final, above=0, most=1)
    for end in ends:
        checks.scalar("ends", end)
    begins = [0, *ends[:-1]]
    if any(begin >= end for begin, end in zip(begins, ends, strict=True)):
        raise ValueError(f"ends must rise from above 0; got {tuple(ends)!r}.")
    if any(a <= b for a, b in itertools.pairwise(finals)):
        raise ValueError(f"finals must fall; got {tuple(finals)!r}.")
    return begins
