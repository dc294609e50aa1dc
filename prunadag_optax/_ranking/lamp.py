r"""LAMP: magnitudes that know how much of their layer is left.

.. math:: s(u) = \frac{x_u^2}{\sum_{v : |x_v| \ge |x_u|} x_v^2}

The scores of all layers are ranked together. Within a layer their order is that of the
magnitudes, and the largest weight of every layer has the score 1: no layer is emptied
before all others are.

References:
  J. Lee, S. Park, S. Mo, S. Ahn, J. Shin, Layer-adaptive sparsity for the
  magnitude-based pruning, ICLR 2021.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from prunadag_optax._common.dtypes import working
from prunadag_optax._ranking import engine
from prunadag_optax._ranking.keys import key_of
from prunadag_optax._ranking.threshold import (
    _varying_like,
    kth_largest_magnitudes,
    search,
)

# The slope that a search starts with, - d log S / d log t / 2: that of a normal layer
# with 1% of its weights left. Too large a slope makes the search slower, not wrong.
_SLOPE = 3.0
_ROUNDS = 30
_ACCURACY = 1e-6


def lamp_scores(x: jax.Array) -> jax.Array:
    """The score of every weight of a layer, by sorting.

    Args:
      x: array of a real floating dtype.

    Returns:
      Scores in [0, 1], in at least float32; 0 for a weight that is 0.
    """
    magnitude = jnp.abs(working(x)).ravel()
    ordered = jnp.sort(magnitude)
    left = jnp.cumsum(ordered[::-1] ** 2)[::-1]
    # The sum over ties includes all of them: look the first of them up.
    left = left[jnp.searchsorted(ordered, magnitude)] if x.size else left
    score = magnitude**2 / jnp.where(left > 0, left, 1)
    return score.reshape(jnp.shape(x))


@jax.jit
def lamp_thresholds(
    parts: Sequence[jax.Array],
    ranks: Sequence[jax.Array],
    alone: jax.Array,
    hint: jax.Array,
    most: jax.Array | None = None,
) -> jax.Array:
    r"""The least magnitude in each layer among the k largest scores, without a sort.

    Those are the :math:`t_l` of one score tau, :math:`t_l^2 / S_l(t_l) = \tau` with
    :math:`S_l(t) = \sum_{|x_v| \ge t} x_v^2`, at which k magnitudes reach them. Around
    the last :math:`t_l` S_l is taken for a power of t, which gives t_l as a function of
    tau; tau is found by counting; then S_l is summed at the new t_l, and its slope
    taken anew, until the t_l stay.

    Args:
      parts: the layers.
      ranks: k, the same for all layers that are ranked together, or the layer's own.
      alone: bool, shape (layers,), whether a layer is ranked on its own, by magnitude.
      hint: magnitudes near the outcome, shape (layers,), or zeros.
      most: for each layer a magnitude above which its threshold is not; None: that of
        its largest weight.

    Returns:
      Array like `hint`.
    """
    x = [working(part) for part in parts]
    dtype = jnp.result_type(*x)
    rank = jnp.max(jnp.where(alone, 1, jnp.stack([*ranks])))[None]
    largest = most
    if largest is None:
        largest = jnp.stack([jnp.max(jnp.abs(leaf), initial=0) for leaf in x])
    largest = largest.astype(dtype)
    # Weights that are zero reach no threshold but zero.
    tiny = jnp.finfo(dtype).tiny
    largest = jnp.maximum(largest, tiny)

    def sums(t):
        def squares(x, t):
            inside = jnp.abs(x) >= t
            return jnp.where(inside, x * x, 0), jnp.where(inside, 1, 0).astype(dtype)

        return jnp.maximum(engine.sums_by_leaf(squares, [x], [t])[0], tiny)

    def at(tau, t, s, slope):
        """t_l at the score tau, from the power law through (t, s)."""
        moved = t * (tau / (t * t / s)) ** (0.5 / (1 + slope))
        return jnp.clip(moved, tiny, jnp.broadcast_to(largest, moved.shape))

    def unfinished(carry):
        rounds, change, *_ = carry
        return (rounds < _ROUNDS) & (change > _ACCURACY)

    def improve(carry):
        rounds, _, t, s, slope, last = carry

        def to_leaf(pivots):
            tau = lax.bitcast_convert_type(pivots, dtype)
            return key_of(at(tau, t[None], s[None], slope[None]), dtype)

        found = search(
            [x], rank, last, key=functools.partial(key_of, dtype=dtype),
            to_leaf=to_leaf, together=~alone,
        )  # fmt: skip
        tau = lax.bitcast_convert_type(jnp.maximum(found, 0), dtype)
        new = at(tau, t, s, slope)
        sum_new = sums(new)
        step = jnp.log(new / t)
        secant = -0.5 * jnp.log(sum_new / s) / jnp.where(step == 0, 1, step)
        slope = jnp.where(jnp.abs(step) > 1e-4, jnp.clip(secant, 0, 100), slope)
        change = jnp.max(jnp.where(alone, 0, jnp.abs(step)))
        return rounds + 1, change, new, sum_new, slope, found

    t = jnp.clip(jnp.where(hint > 0, hint.astype(dtype), largest / 2), tiny, largest)
    s = sums(t)
    slope = jnp.full_like(t, _SLOPE)
    centre = jnp.exp(jnp.mean(jnp.log(t * t / s), keepdims=True))
    start = jnp.asarray(jnp.inf, dtype), t, s, slope, key_of(centre, dtype)
    start = 0, *_varying_like(x, start)
    *_, t, _, _, found = lax.while_loop(unfinished, improve, start)
    t = jnp.where(found < 1, 0, t)  # not even all that is not zero is enough

    def with_own(t):
        own = kth_largest_magnitudes(parts, ranks, jnp.ones_like(alone), hint)
        return jnp.where(alone, own.astype(t.dtype), t)

    return lax.cond(jnp.any(alone), with_own, lambda t: t, t).astype(hint.dtype)
