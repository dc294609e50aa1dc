"""Groups of an array's entries: their sizes, their norms, and their secular equation.

Which axis (or axes) numbers the groups is told by `axis`: all entries that share an
index there are one group.
"""

import functools
import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from prunadag_optax._common.dtypes import working

# Steps of the secular Newton iteration. To rounding in float64 it takes 7 at most on
# random groups with metrics that spread to 1e8, and 12 on the worst that a search of
# such metrics found.
NEWTON_STEPS = 12

Axis = int | tuple[int, ...]


def group_axes(shape: tuple[int, ...], axis: Axis) -> tuple[int, ...]:
    """The axes along which a group extends: all but those that number the groups.

    Args:
      shape: shape of the array.
      axis: the axis or axes that number the groups.

    Returns:
      The other axes, counted from 0.

    Raises:
      ValueError: if the array lacks one of `axis`.

    Examples:
      >>> from prunadag_optax.methods.penalties import groups
      >>> groups.group_axes((3, 3, 16, 32), -2)
      (0, 1, 3)
    """
    axes: tuple[Any, ...] = tuple(axis) if isinstance(axis, tuple | list) else (axis,)
    ndim = len(shape)
    if not all(
        isinstance(a, numbers.Integral) and -ndim <= int(a) < ndim for a in axes
    ):
        raise ValueError(
            f"axis must name axes of an array of shape {shape}; got {axis!r}."
        )
    kept = {a % ndim for a in axes}
    return tuple(a for a in range(ndim) if a not in kept)


def group_weight(shape: tuple[int, ...], axis: Axis, reweight: bool) -> float:
    """The factor on lambda: the root of the group size, or 1.

    Args:
      shape: shape of the array.
      axis: the axis or axes that number the groups.
      reweight: whether the factor is not 1.

    Returns:
      The factor.
    """
    size = math.prod(shape[a] for a in group_axes(shape, axis))
    return math.sqrt(size) if reweight else 1.0


def group_norms(x: jax.Array, axis: Axis) -> jax.Array:
    """The Euclidean norm of each group, without overflow or underflow.

    Its gradient is x / ||x||, and 0 at x = 0.

    Args:
      x: array with the axes named in `axis`.
      axis: the axis or axes that number the groups.

    Returns:
      Array in at least float32, with size 1 along the axes of a group.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax.methods.penalties import groups
      >>> groups.group_norms(jnp.array([[3.0, 4.0], [0.0, 2.0]]), 0)
      Array([[5.],
             [2.]], dtype=float32)
    """
    x, axes = working(x), group_axes(jnp.shape(x), axis)
    largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True, initial=0)
    # The norm does not depend on the scale.
    scale = lax.stop_gradient(jnp.where(largest == 0, 1, largest))
    squares = jnp.sum((x / scale) ** 2, axis=axes, keepdims=True)
    # At zero the derivative is to be the subgradient 0, not that of the root.
    root = jnp.sqrt(jnp.where(squares == 0, 1, squares))
    return jnp.where(squares == 0, 0, scale * root)


# Compiled as one: outside jit a loop would be compiled anew in every call.
@functools.partial(jax.jit, static_argnames="axis")
def secular_root(
    b: jax.Array, norm: jax.Array, e: jax.Array, lam: jax.Array, axis: Axis
) -> jax.Array:
    r"""The root of each group's secular equation.

    .. math:: \theta \ge 0: \quad \sum_i \Bigl( \frac{b_i}{e_i \theta + \lambda}
       \Bigr)^2 = 1

    Newton's method on 1 / phi = 1 with phi the root of the sum: as in the secular
    equation of trust regions, 1 / phi is concave and nearly linear, so that the
    iterates rise to the root monotonically and fast. Each term alone, and all of them
    with the largest e in place of their own, give a theta where phi >= 1. From the
    largest of these no term exceeds 1: nothing overflows, phi starts at sqrt(n) at
    most.

    Args:
      b: array >= 0.
      norm: the `group_norms` of b.
      e: array >= 0 of that shape, 0 only where b is.
      lam: lambda > 0, scalar.
      axis: the axis or axes that number the groups.

    Returns:
      Array with size 1 along the axes of a group; 0 if the norm is at most lambda.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax.methods.penalties import groups
      >>> b = jnp.array([3.0, 4.0])
      >>> norm = groups.group_norms(b, ())
      >>> float(groups.secular_root(b, norm, jnp.ones(2), jnp.float32(2), ())[0])
      3.0

    References:
      D. C. Sorensen, J. J. More, Computing a trust region step, SIAM J. Sci. Stat.
      Comput. 4 (1983) 553-572, section 3, for the iteration.
    """
    axes = group_axes(b.shape, axis)
    largest = functools.partial(jnp.max, axis=axes, keepdims=True)
    total = functools.partial(jnp.sum, axis=axes, keepdims=True)
    steepest = largest(e)
    alone = largest(jnp.where(b > lam, b - lam, 0) / jnp.where(e == 0, 1, e))
    together = (norm - lam) / jnp.where(steepest == 0, 1, steepest)
    start = jnp.maximum(jnp.maximum(alone, together), 0)

    def step(_: int, theta: jax.Array) -> jax.Array:
        inverse = 1 / (e * theta + lam)
        squares = (b * inverse) ** 2
        phi2, slope = total(squares), total(squares * (e * inverse))
        rise = phi2 * (jnp.sqrt(phi2) - 1) / jnp.where(slope == 0, 1, slope)
        return jnp.maximum(theta + rise, 0)

    return lax.fori_loop(0, NEWTON_STEPS, step, start)
