"""Projection on the ball of the k-support norm's dual, the length of the k largest.

The projection of x has the magnitudes min(a_i, max(c, f a_i)), a_i those of x: the
largest shrink by a factor f, those below a plateau c stay, and what lies between is cut
down to the plateau. With w = 1/f - 1, c and f belong to the same point where

    sum_i min((a_i - c)_+, w c) = k w c,

since shares of k are distributed there; the one unknown left follows from the radius.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from prunadag_optax.methods.penalties.groups import group_norms, secular_root


def remainder(
    x: jax.Array, plateau: jax.Array, factor: jax.Array, radius: jax.Array
) -> jax.Array:
    """What is left of an array when the projection is taken off.

    Args:
      x: array, part of the vector that was projected.
      plateau: c, scalar.
      factor: f, scalar.
      radius: that of the ball, scalar; at 0 all of x is left.

    Returns:
      Array like `x`, with exact zeros below the plateau.
    """
    a, f = jnp.abs(x), factor.astype(x.dtype)
    left = jnp.where(f * a >= plateau, (1 - f) * a, a - plateau)
    z = jnp.sign(x) * jnp.where(a <= plateau, 0, left)
    return jnp.where(radius == 0, x, z).astype(x.dtype)


@jax.jit
def dual_projection(
    a: list[jax.Array], largest: list[jax.Array], radius: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The plateau c and the factor f of a projection.

    Between c and its neighbours the sets (shrunk, cut, left alone) do not change, and
    the radius is a secular equation in w. So the search goes from c to the c of that
    equation, which ends as soon as the sets are right, and halves a bracket where that
    leads out of it.

    Args:
      a: magnitudes, leaves of one dtype.
      largest: the k largest of them, zeros elsewhere.
      radius: that of the ball, scalar > 0.

    Returns:
      c, infinite inside the ball, and f.
    """
    scale = jnp.maximum(_largest(largest), jnp.finfo(radius.dtype).tiny)
    a, largest = ([x / scale for x in leaves] for leaves in (a, largest))
    lam = radius / scale
    # More than the nonzero components cannot be in the support.
    k = jnp.maximum(_sum([x > 0 for x in largest], lam.dtype), 1)

    def solve(c):
        """The dual norm at a plateau, and the c and f that its sets would have."""
        level = _level([jnp.maximum(x - c, 0) for x in a], k)
        shrunk = [x - c >= level for x in a]
        cut = [(x > c) & ~s for x, s in zip(a, shrunk, strict=True)]
        squares = _sum(_only(shrunk, [x * x for x in a]))
        rest, least = _sum(_only(cut, a)), _smallest(shrunk, a)
        p, m = _sum(shrunk, lam.dtype), _sum(cut, lam.dtype)
        left = jnp.maximum(k - p, 0)
        factor = c / (c + level)
        norm = jnp.sqrt(squares * factor**2 + left * c**2)
        # c = rest / (m + left w), and squares / (1 + w)^2 + left c^2 = lam^2.
        w = _root(
            jnp.stack([jnp.sqrt(squares), jnp.sqrt(left) * rest]),
            jnp.stack([jnp.ones_like(m), left]),
            jnp.stack([jnp.ones_like(m), m]),
            lam,
        )
        factor = 1 / (1 + w)
        # With all k shares among the shrunk any c from the rest to here will do.
        c = jnp.where(left > 0, rest / jnp.maximum(m + left * w, 1), factor * least)
        return norm, c, factor

    def narrow(carry):
        count, low, high, c, _, _ = carry
        norm, wanted, factor = solve(c)
        low, high = jnp.where(norm <= lam, c, low), jnp.where(norm <= lam, high, c)
        ends = wanted == c
        inside = ends | ((wanted > low) & (wanted < high))
        later = jnp.where(inside, wanted, (low + high) / 2)
        return count + 1, low, high, later, factor, ends

    def unfinished(carry):
        return (carry[0] < 100) & ~carry[-1]

    zero, no = jnp.zeros_like(lam), jnp.zeros((), bool)
    highest = _smallest([x > 0 for x in largest], largest)
    first = jnp.minimum(lam / jnp.sqrt(k), highest) / 2
    start = jnp.zeros((), jnp.int32), zero, highest, first, zero, no
    _, _, _, c, factor, _ = lax.while_loop(unfinished, narrow, start)
    norm = jnp.sqrt(_sum([x * x for x in largest]))
    # A NaN among the components reaches all of them, as through any norm.
    plateau = jnp.where(norm <= lam, jnp.inf, c * scale + 0 * norm)
    return plateau, jnp.where(norm <= lam, 0, factor)


def _level(a: list[jax.Array], k: jax.Array) -> jax.Array:
    """The largest level at which sum_i min(level, a_i) = k level."""

    # The sum is concave and piecewise linear: from above Newton's method descends to
    # the root in finitely many steps.
    def lower(levels):
        level, _ = levels
        above = [x > level for x in a]
        rest = _sum(_only([~s for s in above], a))
        return rest / jnp.maximum(k - _sum(above, k.dtype), 1), level

    start = _sum(a) / k, jnp.full((), jnp.inf, k.dtype)
    return lax.while_loop(lambda levels: levels[0] < levels[1], lower, start)[1]


def _root(
    terms: jax.Array, slopes: jax.Array, shifts: jax.Array, lam: jax.Array
) -> jax.Array:
    """The w >= 0 at which sum_i (terms_i / (slopes_i w + shifts_i))^2 = lam^2."""
    present = terms > 0
    shifts = jnp.where(present, shifts, 1)
    # Divided by shifts_i lam: a sum of (b_i / (e_i w + 1))^2.
    b = jnp.where(present, terms / (shifts * lam), 0)
    e = jnp.where(present, slopes / shifts, 0)
    return jnp.squeeze(secular_root(b, group_norms(b, ()), e, jnp.ones_like(lam), ()))


def _only(sets: list[jax.Array], leaves: list[jax.Array]) -> list[jax.Array]:
    return [jnp.where(s, x, 0) for s, x in zip(sets, leaves, strict=True)]


def _sum(leaves: list[jax.Array], dtype: Any = None) -> jax.Array:
    """The sum of all leaves; of sets, how many they hold in that float dtype."""
    return functools.reduce(jnp.add, [jnp.sum(x, dtype=dtype) for x in leaves])


def _largest(leaves: list[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.maximum, [jnp.max(x, initial=0) for x in leaves])


def _smallest(sets: list[jax.Array], leaves: list[jax.Array]) -> jax.Array:
    kept = [jnp.where(s, x, jnp.inf) for s, x in zip(sets, leaves, strict=True)]
    least = [jnp.min(x, initial=jnp.inf) for x in kept]
    return functools.reduce(jnp.minimum, least)
