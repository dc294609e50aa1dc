"""Which weights the largest magnitudes are: exactly k, ties by index."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from prunadag_optax._common import checks
from prunadag_optax._common.dtypes import widen, widest
from prunadag_optax._common.leaves import Parts, contracted_axes
from prunadag_optax._ranking import counts, engine, keys, threshold

# A leaf of fewer elements costs more to compile a program for than to copy.
_SMALL = 1 << 20


def mask_of_parts(
    params: Any,
    parts: Parts,
    left_out: Callable[[Sequence[int], int], Any],
    held: Any = None,
    scores: Any = None,
) -> Any:
    """The mask that leaves out the smallest magnitudes of what is ranked together.

    Args:
      params: pytree of arrays.
      parts: what is ranked, as `parts_of` has it.
      left_out: function (leaves, n) -> how many to leave out of n components: of these
        leaves, or of each layer stacked in this leaf, for which it may be an array.
      held: a mask of every leaf, or None for leaves that have none. What it leaves out
        comes first, even where that is more.
      scores: pytree like `params` of what is ranked in its place, or None.

    Returns:
      Pytree like `params`: bool arrays, True = keep; as `held` has it for leaves that
      are in no part.

    Raises:
      ValueError: if a leaf in a part is not a real float.
    """
    paths_leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    for i, *_ in parts.leaves:
        checks.real_leaf("params", *paths_leaves[i])
    ranked = [leaf for _, leaf in paths_leaves] if scores is None else scores
    ranked = jax.tree.leaves(ranked)
    masks: list[Any] = [None] * len(paths_leaves)
    if held is not None:
        masks = treedef.flatten_up_to(held)
    alone = []  # the leaves that are ranked on their own, or by layer
    for group, axes, size in parts.groups:
        count = left_out(group, size)
        if held is None and isinstance(count, int) and count == 0:
            for i in group:
                # Like the leaf, so that it is sharded as the leaf is.
                masks[i] = jnp.ones_like(paths_leaves[i][1], bool)
            continue
        count = jnp.asarray(count, counts.count_dtype(size))
        if parts.together:
            leaves = [jnp.asarray(ranked[i]) for i in group]
            kept = keep_largest(leaves, count, [masks[i] for i in group])
            for i, mask in zip(group, kept, strict=True):
                masks[i] = mask
        else:
            alone.append((group[0], axes, count))
    if alone:
        order, axes, of_each = zip(*alone, strict=True)
        leaves = [jnp.asarray(ranked[i]) for i in order]
        kept = _keep_of_each(leaves, of_each, [masks[i] for i in order], axes)
        for i, mask in zip(order, kept, strict=True):
            masks[i] = mask
    return treedef.unflatten(masks)


@jax.jit
def keep_largest(
    leaves: Sequence[jax.Array], count: Any, held: Sequence[Any] | None = None
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
    dtype = counts.count_dtype(size)
    columns: list[list[jax.Array]] = [list(leaves)]
    count = jnp.asarray(count, dtype)
    if held is not None and any(mask is not None for mask in held):
        kept = [
            jnp.ones_like(x, bool) if mask is None else jnp.asarray(mask)
            for x, mask in zip(leaves, held, strict=True)
        ]
        columns.append(kept)
        pruned = sum(jnp.sum(jnp.logical_not(keep), dtype=dtype) for keep in kept)
        count = jnp.maximum(count, pruned)
    runs = _runs(leaves)
    rank = functools.partial(_rank, widest(leaves))
    joined = [[_joined(column, run) for run in runs] for column in columns]
    last, starts = _bounds(rank, joined, count)
    masks: list[Any] = [None] * len(leaves)
    for run, start in zip(runs, starts, strict=True):
        sizes = np.array([leaves[i].size for i in run])
        offsets = np.cumsum(sizes) - sizes
        partial = (start > 0) & (start < sizes.sum())
        own = jnp.clip(start - offsets.astype(dtype), 0)
        of_leaf = [start] if len(run) == 1 else _unstacked(own, start, partial)
        for i, start_of_leaf in zip(run, of_leaf, strict=True):
            found = rank(*(column[i] for column in columns))
            masks[i] = _reaches(found, last, start_of_leaf)
    return masks


def _rank(dtype: Any, x: jax.Array, keep: jax.Array | None = None) -> jax.Array:
    """Keys in the order of the magnitudes, with -1 for what is pruned already."""
    key = keys.key_of(x, dtype)
    return key if keep is None else jnp.where(keep, key, -1)


def _bounds(
    rank: Callable[..., jax.Array], columns: list[list[jax.Array]], count: jax.Array
) -> tuple[jax.Array, list[jax.Array]]:
    """The rank and, for each array, the index from which on `_reaches` keeps.

    Args:
      rank: function from the operands of an array to its ranks.
      columns: the arrays of each operand.
      count: how many to leave out.

    Returns:
      The rank of the last that is left out, and for each array the index of the first
      that is kept among those of this rank.
    """
    dtype = count.dtype
    size = sum(x.size for x in columns[0])
    # The count-th smallest is the (n - count + 1)-th largest.
    last = threshold.kth_largest(
        columns, jnp.clip(size - count + 1, 1, size)[None], key=rank
    )[0]

    def compared(*leaf):
        found = rank(*leaf[:-1])
        return [(found < leaf[-1]).astype(dtype), (found == leaf[-1]).astype(dtype)]

    # Of the magnitudes that tie at the threshold the first (count - below) go.
    below, tied = engine.sums_by_leaf(compared, columns, [last])
    first = jnp.cumsum(tied, dtype=dtype) - tied
    left = jnp.clip(count - jnp.sum(below, dtype=dtype) - first, 0, tied)
    starts = [
        _after(rank(*leaf) == last, left[i], tied[i])
        for i, leaf in enumerate(zip(*columns, strict=True))
    ]
    return last, starts


def _reaches(rank: jax.Array, last: jax.Array, start: jax.Array) -> jax.Array:
    """Where a rank is above the last, or equal to it from an index on."""
    later = _row_major_index(rank, start.dtype) >= start
    return (rank > last) | ((rank == last) & later)


def _after(tied: jax.Array, left: jax.Array, total: jax.Array) -> jax.Array:
    """The least index before which there are `left` of the `total` that are tied."""
    index = _row_major_index(tied, left.dtype)

    def unfinished(bounds):
        low, high = bounds
        return low < high

    def narrow(bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        before = jnp.sum(tied & (index < middle), dtype=left.dtype)
        low = jnp.where(before >= left, low, middle + 1)
        return low, jnp.where(before >= left, middle, high)

    # Where all of them go, or none, there is nothing to search for.
    size = jnp.asarray(tied.size, left.dtype)
    low = jnp.where(left == total, size, 0)
    high = jnp.where(left == 0, 0, size)
    return lax.while_loop(unfinished, narrow, (jnp.minimum(low, high), high))[0]


def _runs(leaves: Sequence[jax.Array]) -> list[list[int]]:
    """Which neighbours to search as one array, by their indices, in their order.

    The time to compile a search goes with its number of leaves, so small ones are
    copied into one where all are on one device.
    """
    movable = engine.on_one_device(leaves)

    def run(i):
        return -1 if movable and leaves[i].size < _SMALL else i

    return [list(members) for _, members in itertools.groupby(range(len(leaves)), run)]


def _joined(column: Sequence[jax.Array], run: Sequence[int]) -> jax.Array:
    if len(run) == 1:
        return column[run[0]]
    members = [column[i] for i in run]
    if members[0].dtype != jnp.bool_:
        dtype = widest(members)
        members = [widen(x, dtype) for x in members]
    return jnp.concatenate([x.reshape(-1) for x in members])


def _unstacked(
    vector: jax.Array, default: jax.Array, needed: jax.typing.ArrayLike = True
) -> list[jax.Array]:
    """The elements of a vector, each in a place of its own.

    An element that is read where it is used makes a kernel of its own of every use, as
    its index is another constant. The outcomes of a loop leave the kernels equal, which
    are then compiled once: for hundreds of leaves this is a matter of seconds.

    Args:
      vector: shape (n,).
      default: what all elements are where `needed` is False.
      needed: bool, may be traced.

    Returns:
      n arrays of shape ().
    """

    def shift(carry):
        done, rest, *elements = carry
        return done + 1, jnp.roll(rest, -1), *elements[1:], rest[0]

    start = jnp.where(needed, 0, vector.size), vector, *[default] * vector.size
    return [*lax.while_loop(lambda carry: carry[0] < vector.size, shift, start)[2:]]


def _of_each_layer(count: jax.Array, x: jax.Array, axes: int) -> jax.Array:
    """The count of each of the layers that x stacks, and placed as they are."""
    if not axes:
        return count
    like = jnp.max(x, range(axes, x.ndim))  # only its shape and its place are used
    return jnp.broadcast_to(count, like.shape) + jnp.zeros_like(like, count.dtype)


@functools.partial(jax.jit, static_argnames="axes")
def _keep_of_each(
    leaves: Sequence[jax.Array],
    count: Sequence[jax.Array],
    held: Sequence[Any],
    axes: Sequence[int],
) -> list[jax.Array]:
    """`keep_largest` of each leaf, or of each layer that is stacked in it.

    Args:
      leaves: arrays of real floating dtypes.
      count: how many to leave out, of each leaf or of each of its layers.
      held: the bool mask that each has already, or None.
      axes: how many leading axes of each stack layers.

    Returns:
      Bool arrays like `leaves`, True = keep.
    """

    def keep(x, count, held):
        return keep_largest([x], count, [held])[0]

    masks: list[Any] = [None] * len(leaves)
    rows: dict[Any, list[int]] = {}
    movable = engine.on_one_device(leaves)
    for i, x in enumerate(leaves):
        if not x.size:
            masks[i] = jnp.ones(x.shape, bool)
        elif movable and not axes[i] and x.size < _SMALL:
            length = 1 << (x.size - 1).bit_length()
            rows.setdefault((length, x.dtype), []).append(i)
        else:
            of_layer = keep
            for _ in range(axes[i]):
                of_layer = jax.vmap(of_layer)
            masks[i] = of_layer(x, _of_each_layer(count[i], x, axes[i]), held[i])
    for (length, dtype), members in rows.items():
        rank = functools.partial(_rank, dtype)
        operands = [
            (x, jnp.ones_like(x, bool) if mask is None else jnp.asarray(mask))
            for x, mask in ((leaves[i], held[i]) for i in members)
        ]

        def bounds(x, keep, count, rank=rank):
            pruned = jnp.sum(jnp.logical_not(keep), dtype=count.dtype)
            last, (start,) = _bounds(rank, [[x], [keep]], jnp.maximum(count, pruned))
            return last, start

        # What a row is filled up with counts as pruned already.
        x, kept = (
            jnp.stack([jnp.pad(x.reshape(-1), (0, length - x.size)) for x in column])
            for column in zip(*operands, strict=True)
        )
        of_row = jnp.stack([count[i] + length - leaves[i].size for i in members])
        found = jax.vmap(bounds)(x, kept, of_row)
        lasts, starts = (_unstacked(vector, vector[0]) for vector in found)
        for i, operand, last, start in zip(
            members, operands, lasts, starts, strict=True
        ):
            masks[i] = _reaches(rank(*operand), last, start)
    return masks


def _row_major_index(x: jax.Array, dtype: Any) -> jax.Array:
    strides = np.cumprod((1, *x.shape[:0:-1]))[::-1] if x.ndim else ()
    return functools.reduce(
        jnp.add,
        (
            lax.broadcasted_iota(dtype, x.shape, axis) * np.asarray(stride, dtype)
            for axis, stride in enumerate(strides)
        ),
        # Like x, so that the sum is sharded as x is.
        jnp.zeros_like(x, dtype),
    )


def mask_of_groups(
    params: Any,
    members: Sequence[int],
    n: int,
    m: int,
    axis: Any = None,
    otherwise: bool | None = None,
) -> Any:
    """The N:M mask: of every m weights along the contracted axes the n largest.

    Args:
      params: pytree of arrays of real floating dtypes.
      members: which leaves have a mask, by their indices.
      n: weights kept in a group.
      m: size of a group.
      axis: the axes that a layer contracts, as `masks.n_m_mask` has it.
      otherwise: what other leaves have: a mask of True, or None.

    Returns:
      Pytree like `params`: bool arrays, True = keep.

    Raises:
      ValueError: if m does not divide the axes of a leaf, or if it is not known which
        axes a leaf contracts.
    """
    paths_leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    contracted = contracted_axes([path for path, _ in paths_leaves])

    def leaf_mask(path, leaf):
        checks.real_leaf("params", path, leaf)
        given = axis(path, leaf) if callable(axis) else axis
        shape = jnp.shape(leaf)
        axes = contracted(path, leaf) if given is None else _axes(given, len(shape))
        known = all(-len(shape) <= i < len(shape) for i in axes)
        if not known or np.prod([shape[i] for i in axes], dtype=int) % m:
            name = f"axis {axes[0]}" if len(axes) == 1 else f"axes {axes}"
            raise ValueError(
                f"m must divide {name} of params{jax.tree_util.keystr(path)}, which "
                f"has the shape {shape}; got m={m}. Leave it out with `where`, or name "
                "the axis that the layer contracts with `axis`."
            )
        return keep_largest_in_groups(jnp.asarray(leaf), n, m, axes)

    rest = [jnp.ones_like(x, bool) if otherwise else None for _, x in paths_leaves]
    return treedef.unflatten(
        leaf_mask(*paths_leaves[i]) if i in members else other
        for i, other in enumerate(rest)
    )


def _axes(given: Any, ndim: int) -> tuple[int, ...]:
    """The argument `axis` of an array of so many axes, as a tuple."""
    axes = (given,) if not isinstance(given, Sequence) else tuple(given)
    whole = all(isinstance(i, int) for i in axes)
    if not (whole and axes and len({i % max(ndim, 1) for i in axes}) == len(axes)):
        raise ValueError(
            "axis must be an integer, several different ones, or a function (path, "
            f"leaf) -> either; got {given!r:.80}."
        )
    return axes


# Of more in a group a sort is faster than to compare each with each.
_FEW = 16


@functools.partial(jax.jit, static_argnames=("n", "m", "axes"))
def keep_largest_in_groups(
    x: jax.Array, n: int, m: int, axes: Sequence[int]
) -> jax.Array:
    """The mask of the n largest magnitudes in every m consecutive along some axes."""
    last = range(-len(axes), 0)
    key = jnp.moveaxis(keys.key_of(x, x.dtype), axes, last)
    length = np.prod([x.shape[axis] for axis in axes], dtype=int)
    groups = key.reshape(*key.shape[: x.ndim - len(axes)], length // m, m)
    if m <= _FEW:
        # How many of the group are larger, or equal and of a higher index.
        members = [groups[..., j : j + 1] for j in range(m)]
        index = lax.broadcasted_iota(jnp.int32, groups.shape, groups.ndim - 1)
        larger = jnp.zeros(groups.shape, jnp.int8)
        for j, other in enumerate(members):
            larger += (other > groups) | ((other == groups) & (index < j))
        kept = larger < n
    else:
        # The rank of each within its group; a stable sort puts the lowest index first.
        rank = jnp.argsort(jnp.argsort(groups, axis=-1, stable=True), axis=-1)
        kept = rank >= m - n
    return jnp.moveaxis(kept.reshape(key.shape), last, axes)
