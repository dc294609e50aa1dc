"""Which weights the largest magnitudes are: exactly k, ties by index."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from prunadag_optax._common import checks
from prunadag_optax._common.dtypes import widest
from prunadag_optax._ranking import counts, keys, threshold


def mask_by_groups(
    params: Any,
    groups: Sequence[Sequence[int]],
    left_out: Callable[[Sequence[int], int], Any],
    held: Any = None,
) -> Any:
    """The mask that leaves out the smallest magnitudes in each group of leaves.

    Args:
      params: pytree of arrays.
      groups: lists of indices into `jax.tree.leaves(params)`, as `ranked_together` has
        them.
      left_out: function (group, its number of components) -> how many to leave out.
      held: a mask of every leaf, or None for leaves that have none. What it leaves out
        comes first, even where that is more.

    Returns:
      Pytree like `params`: bool arrays, True = keep; as `held` has it for leaves that
      are in no group.

    Raises:
      ValueError: if a leaf in a group is not a real float.
    """
    paths_leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    masks: list[Any] = [None] * len(paths_leaves)
    if held is not None:
        masks = treedef.flatten_up_to(held)
    for group in groups:
        for i in group:
            checks.real_leaf("params", *paths_leaves[i])
        leaves = [jnp.asarray(paths_leaves[i][1]) for i in group]
        count = left_out(group, sum(leaf.size for leaf in leaves))
        if held is None and isinstance(count, int) and count == 0:
            kept = [jnp.ones_like(leaf, bool) for leaf in leaves]  # sharded as they
        else:
            kept = keep_largest(leaves, count, [masks[i] for i in group])
        for i, mask in zip(group, kept, strict=True):
            masks[i] = mask
    return treedef.unflatten(masks)


def _rank(dtype: Any, x: jax.Array, keep: jax.Array) -> jax.Array:
    """Keys in the order of the magnitudes, with -1 for what is pruned already."""
    return jnp.where(keep, keys.key_of(x, dtype), -1)


def _itself(key: jax.Array) -> jax.Array:
    return key


@jax.jit
def keep_largest(
    leaves: list[jax.Array], count: jax.Array, held: list[Any] | None = None
) -> list[jax.Array]:
    """Masks that leave out the `count` smallest magnitudes of all leaves.

    Args:
      leaves: arrays of real floating dtypes.
      count: how many to leave out, 0..n. What `held` leaves out comes first, even where
        that is more.
      held: for each leaf the bool mask that it has already, or None; None: none has.

    Returns:
      Bool arrays like `leaves`, True = keep.
    """
    size = sum(x.size for x in leaves)
    if not size:
        return [jnp.ones(x.shape, bool) for x in leaves]
    kept = [
        jnp.ones_like(x, bool) if mask is None else mask
        for x, mask in zip(leaves, held or [None] * len(leaves), strict=True)
    ]
    rank = functools.partial(_rank, widest(leaves))
    ranks = [rank(x, keep) for x, keep in zip(leaves, kept, strict=True)]
    dtype = counts.count_dtype(size)
    pruned = sum(jnp.sum(key < 0, dtype=dtype) for key in ranks)
    count = jnp.maximum(jnp.asarray(count, dtype), pruned)
    # The count-th smallest is the (n - count + 1)-th largest.
    last = threshold.kth_largest(
        [leaves, kept], jnp.clip(size - count + 1, 1, size)[None], key=rank
    )[0]
    below = sum(jnp.sum(key < last, dtype=dtype) for key in ranks)
    # Of the magnitudes that tie at the threshold the first (count - below) go. Where
    # the last of these stands is a selection again, over positions counted from the
    # end (so that the first is the largest), with 0 where there is no tie.
    positions, offset = [], 0
    for key in ranks:
        positions.append(dtype(size - offset) - _row_major_index(key, dtype))
        offset += key.size
    tied = [
        jnp.where(key == last, position, dtype(0))
        for key, position in zip(ranks, positions, strict=True)
    ]
    left = jnp.maximum(count - below, 1)[None]
    first = threshold.kth_largest([tied], left, key=_itself)[0]
    return [
        (count == 0) | (key > last) | ((key == last) & (position < first))
        for key, position in zip(ranks, positions, strict=True)
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
    key = jnp.moveaxis(keys.key_of(x, x.dtype), axis, -1)
    groups = key.reshape(*key.shape[:-1], key.shape[-1] // m, m)
    # The rank of each within its group; a stable sort puts the lowest index first.
    rank = jnp.argsort(jnp.argsort(groups, axis=-1, stable=True), axis=-1)
    return jnp.moveaxis((rank >= m - n).reshape(key.shape), -1, axis)
