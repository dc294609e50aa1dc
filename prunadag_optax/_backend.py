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

# Indices of the leaves that are treated together.
Blocks = Sequence[tuple[int, ...]]

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


def _in_rows(values: Sequence[jax.Array], stacked: bool) -> list[jax.Array]:
    """The sums of arrays of one shape, in parts for as many threads.

    Args:
      values: arrays of one shape.
      stacked: whether each is several small leaves along its first axis.

    Returns:
      For each value its parts, shape (leaves, rows), to be added up along the rows.
    """
    if stacked:
        return [x[:, None] for x in _reduce(values, 1)]
    values = [x.reshape(-1) for x in values]
    size = values[0].size
    rows = 16 if size >= _WORTH_THREADS else 1
    even = size // rows * rows
    parts = _reduce([x[:even].reshape(rows, even // rows) for x in values], 1)
    if even < size:
        rest = _reduce([x[even:].reshape(1, size - even) for x in values], 1)
        parts = [lax.concatenate(pair, 0) for pair in zip(parts, rest, strict=True)]
    return [x[None] for x in parts]


def _of_leaves(parts: Sequence[Sequence[jax.Array]]) -> list[jax.Array]:
    """For each value its sums, shape (leaves,), from their parts (leaves, rows)."""
    sums, order = [], []
    shapes = [values[0].shape for values in parts]
    firsts = np.cumsum([0, *(leaves for leaves, _ in shapes)])
    for n in sorted({rows for _, rows in shapes}):
        members = [i for i, (_, rows) in enumerate(shapes) if rows == n]
        columns = zip(*(parts[i] for i in members), strict=True)
        sums.append(_reduce([jnp.concatenate(column) for column in columns], 1))
        order += [j for i in members for j in range(firsts[i], firsts[i + 1])]
    back = np.argsort(order)
    return [jnp.concatenate(column)[back] for column in zip(*sums, strict=True)]


def blocks_of(*columns: Sequence[jax.Array]) -> list[tuple[int, ...]]:
    """Which leaves to treat together, as blocks of leaf indices.

    A tree has many small leaves, and a loop for each of them costs more to compile and
    to start than to run. Where that moves nothing between devices, small leaves of one
    size make a block, which `stack` copies into one array; others stay as they are.

    Args:
      *columns: the leaves of each tree in question; those of one index have one size.

    Returns:
      The blocks, every leaf in one of them.
    """
    together = _traced(columns) and _may_reshape(columns)
    groups: dict[Any, list[int]] = {}
    for i, leaves in enumerate(zip(*columns, strict=True)):
        small = together and 0 < leaves[0].size < _WORTH_THREADS
        key = (leaves[0].size, *(x.dtype for x in leaves)) if small else i
        groups.setdefault(key, []).append(i)
    return [tuple(block) for block in groups.values()]


def stack(leaves: Sequence[jax.Array], blocks: Blocks) -> list[jax.Array]:
    """One array for each block: a leaf, or several as rows of shape (leaves, size)."""
    return [
        leaves[block[0]]
        if len(block) == 1
        else jnp.stack([leaves[i].reshape(-1) for i in block])
        for block in blocks
    ]


def sums_by_leaf(
    leaves: Sequence[Sequence[jax.Array]], stacked: Sequence[bool] | None = None
) -> list[jax.Array]:
    """The sums of several values over the elements of each leaf, in one pass.

    Args:
      leaves: for each leaf its values, arrays of the leaf's shape; as many for each
        leaf, all of one dtype.
      stacked: which of them are several leaves along their first axis; None: none.

    Returns:
      For each value its sums, shape (leaves,).
    """
    rows = stacked or [False] * len(leaves)

    def on_one_cpu(leaves):
        return _of_leaves([_in_rows(*pair) for pair in zip(leaves, rows, strict=True)])

    def plain(leaves):
        return [_plain_sums(column, rows) for column in zip(*leaves, strict=True)]

    if not _traced(leaves) or not _may_reshape(leaves):
        return plain(leaves)
    return lax.platform_dependent(leaves, cpu=on_one_cpu, default=plain)


def _plain_sums(leaves: Sequence[jax.Array], stacked: Sequence[bool]) -> jax.Array:
    sums = [
        jnp.sum(x, axis=tuple(range(rows, x.ndim)), dtype=x.dtype).reshape(-1)
        for x, rows in zip(leaves, stacked, strict=True)
    ]
    return jnp.concatenate(sums)


def pair_sums_by_leaf(
    function: Callable[..., tuple[jax.Array, jax.Array]],
    *columns: Sequence[jax.Array],
    stacked: Sequence[bool] | None = None,
) -> list[jax.Array]:
    """The sums of two floating values over the elements of each leaf, in one pass.

    Args:
      function: from a leaf's index and its operands, of any one shape, to two arrays of
        that shape and of one floating dtype, element by element.
      *columns: the leaves of each operand; those of one index have one shape.
      stacked: as for `sums_by_leaf`.

    Returns:
      Two arrays, shape (leaves,).
    """
    rows = stacked or [False] * len(columns[0])

    def plain(*columns):
        pairs = [function(i, *row) for i, row in enumerate(zip(*columns, strict=True))]
        return [_plain_sums(column, rows) for column in zip(*pairs, strict=True)]

    def of_leaf(i, *operands):
        # The CPU backend does not vectorise a sum of floats, whose order would change,
        # but it does add arrays; and as complex numbers the two share one loop. So
        # large leaves are added up in chunks that stay in the cache.
        if rows[i]:
            return _in_rows(function(i, *operands), True)
        operands = [x.reshape(-1) for x in operands]
        size = operands[0].size
        # Not too small for two threads; an odd length would not be vectorised.
        length = 1 << (17 if size >= 1 << 20 else 16)
        even = size // length * length
        if even < 2 * length:
            return _in_rows(function(i, *operands), False)

        def add(chunk, total):
            start = chunk * length
            cut = (lax.dynamic_slice_in_dim(x, start, length) for x in operands)
            return total + lax.complex(*function(i, *cut))

        like = jax.eval_shape(lambda *x: lax.complex(*function(i, *x)), *operands)
        zero = jnp.zeros(length, like.dtype)
        total = lax.fori_loop(0, even // length, add, zero)
        parts = _in_rows([lax.real(total), lax.imag(total)], False)
        if even == size:
            return parts
        rest = _in_rows(function(i, *(x[even:] for x in operands)), False)
        return [lax.concatenate(pair, 1) for pair in zip(parts, rest, strict=True)]

    def on_one_cpu(*columns):
        leaves = enumerate(zip(*columns, strict=True))
        return _of_leaves([of_leaf(i, *leaf) for i, leaf in leaves])

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
