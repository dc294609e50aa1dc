"""Which weights the smallest magnitudes are, with exact counts and ties by index."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from prunadag_optax import selection


def _ranks(leaves_and_held: tuple[list[jax.Array], list[Any]]) -> list[jax.Array]:
    """Keys in the order of the magnitudes, with -1 for what is pruned already."""
    leaves, held = leaves_and_held
    return [
        key if keep is None else jnp.where(keep, key, -1)
        for key, keep in zip(selection.magnitude_keys(leaves), held, strict=True)
    ]


@jax.jit
def keep_largest(
    leaves: list[jax.Array], count: jax.Array, held: list[Any]
) -> list[jax.Array]:
    """Masks that leave out the `count` smallest magnitudes of all leaves."""
    ranked = (leaves, held)
    keys = _ranks(ranked)
    size = sum(key.size for key in keys)
    if not size:
        return [jnp.ones(key.shape, bool) for key in keys]
    dtype = selection.count_dtype(size)
    pruned = sum(jnp.sum(key < 0, dtype=dtype) for key in keys)
    count = jnp.maximum(jnp.asarray(count, dtype), pruned)
    # The count-th smallest is the (n - count + 1)-th largest.
    threshold = selection.kth_largest_keys(
        ranked, jnp.clip(size - count + 1, 1, size)[None], keys_of=_ranks
    )[0]
    below = sum(jnp.sum(key < threshold, dtype=dtype) for key in keys)
    # Of the magnitudes that tie at the threshold the first (count - below) go. Where
    # the last of these stands is a selection again, over positions counted from the
    # end (so that the first is the largest), with 0 where there is no tie.
    positions, offset = [], 0
    for key in keys:
        positions.append(dtype(size - offset) - _row_major_index(key, dtype))
        offset += key.size
    tied = [
        jnp.where(key == threshold, position, dtype(0))
        for key, position in zip(keys, positions, strict=True)
    ]
    left = jnp.maximum(count - below, 1)[None]
    last = selection.kth_largest_keys(tied, left, keys_of=list)[0]
    return [
        (count == 0) | (key > threshold) | ((key == threshold) & (position < last))
        for key, position in zip(keys, positions, strict=True)
    ]


def _row_major_index(x: jax.Array, dtype: Any) -> jax.Array:
    strides = np.cumprod((1, *x.shape[:0:-1]))[::-1] if x.ndim else ()
    return functools.reduce(
        jnp.add,
        (
            lax.broadcasted_iota(dtype, x.shape, axis) * dtype(stride)
            for axis, stride in enumerate(strides)
        ),
        # Like x, so that the sum is sharded as x is.
        jnp.zeros_like(x, dtype),
    )


@functools.partial(jax.jit, static_argnames=("n", "m", "axis"))
def keep_largest_in_groups(x: jax.Array, n: int, m: int, axis: int) -> jax.Array:
    """The mask of the n largest magnitudes in every m consecutive along an axis."""
    key = jnp.moveaxis(selection.magnitude_keys(x)[0], axis, -1)
    groups = key.reshape(*key.shape[:-1], key.shape[-1] // m, m)
    # The rank of each within its group; a stable sort puts the lowest index first.
    rank = jnp.argsort(jnp.argsort(groups, axis=-1, stable=True), axis=-1)
    return jnp.moveaxis((rank >= m - n).reshape(key.shape), -1, axis)
