"""What XLA has to be told so that a step touches no more memory than it must.

The sums here are sums and `stored` is a function call; on accelerators and on meshes
they are compiled as that. The other forms are for XLA's CPU backend, which runs a
reduction to a scalar on one thread, writes one output per loop, and computes anew in
every loop what it takes for cheap (measured by `python -m benchmarks.speed`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax

# Below this size starting threads costs more than they save.
_WORTH_THREADS = 1 << 16


def _traced(tree: Any) -> bool:
    """Whether this runs under jit or the like; else there is nothing to compile."""
    return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree))


def _may_reshape(tree: Any) -> bool:
    """Whether reshaping moves no data between devices, and is allowed."""
    return jax.device_count() == 1 and not any(
        axis is not None
        for x in jax.tree.leaves(tree)
        for axis in jax.typeof(x).sharding.spec
    )


def _reduce(values: Sequence[jax.Array], axis: int) -> list[jax.Array]:
    # One variadic reduction reads what the values are computed from once, and the CPU
    # backend vectorises it where the values are integers.
    zeros = tuple(jnp.zeros((), x.dtype) for x in values)
    return list(
        lax.reduce(
            tuple(values),
            zeros,
            lambda a, b: tuple(i + j for i, j in zip(a, b, strict=True)),
            (axis,),
        )
    )


def _in_rows(values: Sequence[jax.Array]) -> list[jax.Array]:
    """The sums of arrays of one shape, in (rows,) parts for as many threads."""
    values = [x.reshape(-1) for x in values]
    size = values[0].size
    rows = 16 if size >= _WORTH_THREADS else 1
    even = size // rows * rows
    parts = _reduce([x[:even].reshape(rows, even // rows) for x in values], 1)
    if even == size:
        return parts
    rest = _reduce([x[even:].reshape(1, size - even) for x in values], 1)
    return [lax.concatenate(pair, 0) for pair in zip(parts, rest, strict=True)]


def _of_leaves(parts: Sequence[Sequence[jax.Array]]) -> list[jax.Array]:
    """For each value its sums, shape (leaves,), from each leaf's parts of them."""
    sums, order = [], []
    rows = [values[0].size for values in parts]
    for n in sorted(set(rows)):
        members = [i for i, m in enumerate(rows) if m == n]
        columns = zip(*(parts[i] for i in members), strict=True)
        sums.append(_reduce([jnp.stack(column) for column in columns], 1))
        order += members
    back = np.argsort(order)
    return [lax.concatenate(column, 0)[back] for column in zip(*sums, strict=True)]


def sums_by_leaf(leaves: Sequence[Sequence[jax.Array]]) -> list[jax.Array]:
    """The sums of several values over the elements of each leaf, in one pass.

    Args:
      leaves: for each leaf its values, arrays of the leaf's shape; as many for each
        leaf, all of one dtype.

    Returns:
      For each value its sums, shape (leaves,).
    """

    def plain(leaves):
        return [
            jnp.stack([jnp.sum(x, dtype=x.dtype) for x in column])
            for column in zip(*leaves, strict=True)
        ]

    def on_one_cpu(leaves):
        return _of_leaves([_in_rows(values) for values in leaves])

    if not _traced(leaves) or not _may_reshape(leaves):
        return plain(leaves)
    return lax.platform_dependent(leaves, cpu=on_one_cpu, default=plain)


def pair_sums_by_leaf(
    function: Callable[..., tuple[jax.Array, jax.Array]],
    *columns: Sequence[jax.Array],
) -> list[jax.Array]:
    """The sums of two floating values over the elements of each leaf, in one pass.

    Args:
      function: from a leaf's index and its operands, of any one shape, to two arrays of
        that shape and of one floating dtype, element by element.
      *columns: the leaves of each operand; those of one index have one shape.

    Returns:
      Two arrays, shape (leaves,).
    """

    def plain(*columns):
        pairs = [function(i, *row) for i, row in enumerate(zip(*columns, strict=True))]
        return [
            jnp.stack([jnp.sum(x, dtype=x.dtype) for x in column])
            for column in zip(*pairs, strict=True)
        ]

    def of_leaf(i, *operands):
        # The CPU backend does not vectorise a sum of floats, whose order would change,
        # but it does add arrays; and as complex numbers the two share one loop. So
        # large leaves are added up in chunks that stay in the cache.
        operands = [x.reshape(-1) for x in operands]
        size = operands[0].size
        # Not too small for two threads; an odd length would not be vectorised.
        length = 1 << (17 if size >= 1 << 20 else 16)
        even = size // length * length
        if even < 2 * length:
            return _in_rows(function(i, *operands))

        def add(chunk, total):
            start = chunk * length
            cut = (lax.dynamic_slice_in_dim(x, start, length) for x in operands)
            return total + lax.complex(*function(i, *cut))

        like = jax.eval_shape(lambda *x: lax.complex(*function(i, *x)), *operands)
        zero = jnp.zeros(length, like.dtype)
        total = lax.fori_loop(0, even // length, add, zero)
        parts = _in_rows([lax.real(total), lax.imag(total)])
        if even == size:
            return parts
        rest = _in_rows(function(i, *(x[even:] for x in operands)))
        return [lax.concatenate(pair, 0) for pair in zip(parts, rest, strict=True)]

    def on_one_cpu(*columns):
        rows = enumerate(zip(*columns, strict=True))
        return _of_leaves([of_leaf(i, *row) for i, row in rows])

    if not _traced(columns) or not _may_reshape(columns):
        return plain(*columns)
    return lax.platform_dependent(*columns, cpu=on_one_cpu, default=plain)


def stored(function: Callable[..., Any], *operands: Any) -> Any:
    """Calls a function, and keeps what it computes apart from what comes after.

    The CPU backend would compute some of it anew in each loop that reads the outputs,
    and store what the two have in common, which costs more than the outputs do.

    Args:
      function: from the operands to a pytree of arrays.
      *operands: pytrees of arrays, which are stored too if they are not already.

    Returns:
      `function(*operands)`.
    """
    if not _traced(operands):
        return function(*operands)
    function = jax.jit(function)  # traced once for all branches

    def otherwise(*operands):
        return jax.tree.map(jnp.zeros_like, function(*operands))

    # The branches of a conditional are compiled each on its own, and XLA cannot know
    # which is taken: the barrier hides it until after it has simplified the program.
    def on_cpu(*operands):
        always = lax.optimization_barrier(jnp.ones((), bool))
        return lax.cond(always, function, otherwise, *operands)

    return lax.platform_dependent(*operands, cpu=on_cpu, default=function)
