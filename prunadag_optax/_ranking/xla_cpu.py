"""The engine on a single CPU device: what XLA has to be told to move few bytes.

XLA's CPU backend runs a reduction to a scalar on one thread, adds up floats one by one,
writes one output per loop, computes anew in every loop what it takes for cheap, and
spends more on starting a loop for a small leaf than on the loop. The forms here compute
the same without that (measured by `python -m benchmarks.speed`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Below this size starting threads costs more than they save.
_WORTH_THREADS = 1 << 16


def sums_by_leaf(
    function: Callable[..., Sequence[jax.Array]],
    columns: Sequence[Sequence[jax.Array]],
    of_leaf: Sequence[jax.Array],
) -> list[jax.Array]:
    """`engine.sums_by_leaf`, with small leaves of one size together and for threads."""
    blocks = _blocks(columns)
    # The sums of each block in parts, shape (leaves, rows), to be added up along rows.
    parts = []
    for block in blocks:
        if len(block) == 1:
            (i,) = block
            leaf = [column[i].reshape(-1) for column in columns]
            scalars = [s[i] if s.ndim else s for s in of_leaf]
            parts.append(_large(function, leaf, scalars))
        else:
            leaf = [jnp.stack([x[i].reshape(-1) for i in block]) for x in columns]
            of_block = np.array(block)
            scalars = [s[of_block, None] if s.ndim else s for s in of_leaf]
            values = function(*leaf, *scalars)
            parts.append([x[:, None] for x in _reduce(values, 1)])
    # Blocks with as many rows are added up in one reduction.
    sums, order = [], []
    for rows in sorted({part[0].shape[1] for part in parts}):
        members = [i for i, part in enumerate(parts) if part[0].shape[1] == rows]
        together = zip(*(parts[i] for i in members), strict=True)
        sums.append(_reduce([jnp.concatenate(column) for column in together], 1))
        order += [leaf for i in members for leaf in blocks[i]]
    back = np.argsort(order)
    return [jnp.concatenate(column)[back] for column in zip(*sums, strict=True)]


def _blocks(columns: Sequence[Sequence[jax.Array]]) -> list[list[int]]:
    """Which leaves to copy into one array: small ones of one size, by their indices."""
    groups: dict[Any, list[int]] = {}
    for i, leaf in enumerate(zip(*columns, strict=True)):
        small = 0 < leaf[0].size < _WORTH_THREADS
        key = (leaf[0].size, *(x.dtype for x in leaf)) if small else i
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def _large(function: Callable, leaf: list[jax.Array], scalars: list) -> list[jax.Array]:
    """The sums of one leaf in parts, shape (1, rows)."""
    size = leaf[0].size
    # Not too small for two threads; an odd length would not be vectorised.
    length = 1 << (17 if size >= 1 << 20 else 16)
    if size < 2 * length:
        return _in_rows(function(*leaf, *scalars))
    like = jax.eval_shape(function, *leaf, *scalars)
    if len(like) != 2 or not jnp.issubdtype(like[0].dtype, jnp.floating):
        return _in_rows(function(*leaf, *scalars))
    # The backend does not vectorise a sum of floats, whose order would change, but it
    # does add arrays; and as complex numbers the two share one loop. So the leaf is
    # added up in chunks that stay in the cache.
    even = size // length * length

    def add(chunk, total):
        cut = (lax.dynamic_slice_in_dim(x, chunk * length, length) for x in leaf)
        return total + lax.complex(*function(*cut, *scalars))

    zero = lax.complex(*(jnp.zeros(length, x.dtype) for x in like))
    total = lax.fori_loop(0, even // length, add, zero)
    parts = _in_rows([lax.real(total), lax.imag(total)])
    if even == size:
        return parts
    rest = _in_rows(function(*(x[even:] for x in leaf), *scalars))
    return [lax.concatenate(pair, 1) for pair in zip(parts, rest, strict=True)]


def _in_rows(values: Sequence[jax.Array]) -> list[jax.Array]:
    """The sums of vectors, shape (1, rows), a row for each thread and more."""
    size = values[0].size
    rows = 16 if size >= _WORTH_THREADS else 1
    even = size // rows * rows
    parts = _reduce([x[:even].reshape(rows, even // rows) for x in values], 1)
    if even < size:
        rest = _reduce([x[even:].reshape(1, size - even) for x in values], 1)
        parts = [lax.concatenate(pair, 0) for pair in zip(parts, rest, strict=True)]
    return [x[None] for x in parts]


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _reduce(values: Sequence[jax.Array], axis: int) -> list[jax.Array]:
    # One variadic reduction reads what the values are computed from once, and is
    # vectorised where they are integers. jax differentiates no such reduction.
    zeros = tuple(jnp.zeros((), x.dtype) for x in values)

    def add(a, b):
        return tuple(i + j for i, j in zip(a, b, strict=True))

    return list(lax.reduce(tuple(values), zeros, add, (axis,)))


@_reduce.defjvp
def _(axis, primals, tangents):
    return _reduce(*primals, axis), [jnp.sum(x, axis) for x in tangents[0]]


def stored(function: Callable[..., Any], *operands: Any) -> Any:
    """`engine.stored`, as a branch that is always taken.

    The branches of a conditional are compiled each on its own, and XLA cannot know
    which is taken: the barrier hides it until after it has simplified the program.
    Bools are stored as bytes, whose loops the backend vectorises.
    """

    def as_bytes(*operands):
        return jax.tree.map(
            lambda x: x.astype(jnp.int8) if x.dtype == jnp.bool_ else x,
            function(*operands),
        )

    as_bytes = jax.jit(as_bytes)  # traced once for all branches
    kinds = jax.eval_shape(function, *operands)

    def never(*operands):
        shapes = jax.eval_shape(as_bytes, *operands)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    always = lax.optimization_barrier(jnp.ones((), bool))
    results = lax.cond(always, as_bytes, never, *operands)
    return jax.tree.map(
        lambda x, kind: x != 0 if kind.dtype == jnp.bool_ else x, results, kinds
    )
