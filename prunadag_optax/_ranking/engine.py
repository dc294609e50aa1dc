"""Sums over leaves, and what is to be stored: the two things a compiler has to be told.

Here they are a sum and a function call. On accelerators and on meshes they are compiled
as that; a single CPU device has forms of its own in `xla_cpu`. Which of the two a
program gets is decided in `_choose` and nowhere else.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from prunadag_optax._ranking import xla_cpu


def _traced(operands: Any) -> bool:
    """Whether there is a program to improve: not outside jit and the like."""
    return any(isinstance(x, Tracer) for x in jax.tree.leaves(operands))


def on_one_device(operands: Any) -> bool:
    """Whether no other device may hold any of the operands, so that data may be moved.

    Args:
      operands: pytree of arrays.

    Returns:
      Whether there is one device, and no array is sharded over a mesh of it.
    """
    sharded = any(
        axis is not None
        for x in jax.tree.leaves(operands)
        for axis in jax.typeof(x).sharding.spec
    )
    return jax.device_count() == 1 and not sharded


def _choose(on_one_cpu: Callable, plain: Callable, *operands: Any) -> Any:
    """Calls one of two functions that compute the same.

    The form for one CPU device moves data about.
    """
    if not (_traced(operands) and on_one_device(operands)):
        return plain(*operands)
    return lax.platform_dependent(*operands, cpu=on_one_cpu, default=plain)


def sums_by_leaf(
    function: Callable[..., Sequence[jax.Array]],
    columns: Sequence[Sequence[jax.Array]],
    of_leaf: Sequence[jax.Array] = (),
) -> list[jax.Array]:
    """The sums of several values over the elements of each leaf, in one pass.

    Args:
      function: from the operands of a leaf, arrays of any one shape, and the scalars of
        the leaf to arrays of that shape and of one dtype, element by element.
      columns: the leaves of each operand; those of one index have one shape.
      of_leaf: arrays with one scalar for each leaf, shape (leaves,), or with the one
        for all of them, shape ().

    Returns:
      For each value its sums, shape (leaves,).
    """

    def plain(columns, of_leaf):
        rows = []
        for i, leaf in enumerate(zip(*columns, strict=True)):
            values = function(*leaf, *(s[i] if s.ndim else s for s in of_leaf))
            rows.append([jnp.sum(x, dtype=x.dtype) for x in values])
        return [jnp.stack(column) for column in zip(*rows, strict=True)]

    def on_one_cpu(columns, of_leaf):
        return xla_cpu.sums_by_leaf(function, columns, of_leaf)

    return _choose(on_one_cpu, plain, list(columns), list(of_leaf))


def stored(function: Callable[..., Any], *operands: Any) -> Any:
    """Calls a function whose results are stored, not computed where they are read.

    Args:
      function: from the operands to a pytree of arrays.
      *operands: pytrees of arrays.

    Returns:
      `function(*operands)`.
    """
    if not _traced(operands):
        return function(*operands)
    function = jax.jit(function)  # traced once for both forms

    def on_one_cpu(*operands):
        return xla_cpu.stored(function, *operands)

    return _choose(on_one_cpu, function, *operands)
