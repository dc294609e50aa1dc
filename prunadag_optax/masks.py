"""Pruning masks: made by magnitude, made anew, applied, held in training, finalised.

A mask is a pytree like the parameters with True where a weight is kept and False where
it is pruned. A None in place of a leaf means that the leaf is not prunable. Masks live
beside the parameters; nothing here changes a parameter in place.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from prunadag_optax._common import budgets, checks
from prunadag_optax._common.budgets import LayerBudget as LayerBudget
from prunadag_optax._common.dtypes import value_at, working
from prunadag_optax._common.leaves import Parts, chosen, parts_of
from prunadag_optax._common.leaves import Scope as Scope
from prunadag_optax._common.leaves import Where as Where
from prunadag_optax._common.leaves import everything as everything
from prunadag_optax._common.leaves import named as named
from prunadag_optax._common.leaves import prunable as prunable
from prunadag_optax._common.packing import is_packed, packed_like
from prunadag_optax._common.packing import pack as pack
from prunadag_optax._common.packing import unpack as unpack
from prunadag_optax._common.patterns import n_of_m
from prunadag_optax._common.transformation import find_states
from prunadag_optax._core.pruning_aware import (
    GradientAtPrunedState,
    PruningAwareState,
)
from prunadag_optax._ranking import counts, engine, exact, keys
from prunadag_optax._ranking.scoring import Score as Score
from prunadag_optax._ranking.scoring import tree_of_scores

Budget = budgets.Budget
# The last sizes of a block, or a function (path, leaf) -> its size in every axis.
Block = Sequence[int] | Callable[[tuple[Any, ...], Any], Sequence[int]]
# An axis, several, or a function (path, leaf) -> either.
Axis = int | Sequence[int] | Callable[[tuple[Any, ...], Any], Any]


def magnitude_mask(
    params: optax.Params,
    sparsity: chex.Numeric,
    *,
    scope: Scope = "global",
    where: Where | None = None,
    previous: Any = None,
    score: Score = "magnitude",
    opt_state: Any = None,
    layer_budget: Budget = "global",
) -> Any:
    r"""The mask that prunes the smallest magnitudes, with exact counts.

    .. math:: m = \mathrm{round}(\sigma n) \text{ components with the smallest } |x_i|

    Among equal magnitudes the one with the lowest index (in the order of the leaves,
    row-major within a leaf) is pruned first, so masks at rising sparsity are nested.

    Args:
      params: pytree of real floating arrays.
      sparsity: sigma in [0, 1], the share of the prunable components to prune. A scalar
        array is clipped to that range and may be traced, so that a compiled training
        step can follow a schedule; its float32 then bounds how exact the count is.
      scope: "global" ranks all prunable leaves together; "leaf" prunes the share
        sigma of each; a function (path, leaf) -> how many leading axes of the leaf
        stack layers prunes the share sigma of each layer.
      where: predicate (path, leaf) -> bool, False for leaves never to prune, such as
        `named("kernel")`; paths are those of `jax.tree_util.tree_map_with_path`. None
        is `prunable`.
      previous: the mask already held, or None. What it prunes stays pruned, ahead of
        every live weight, even where that is more than `sparsity` asks for.
      score: whose smallest magnitudes are pruned: "magnitude", the parameters; "lamp",
        the share of a weight in the squares of its layer that are no smaller; a
        function params -> tree of scores like `params`; or that tree.
      opt_state: the optimizer's state, or an `nnx.Optimizer`, or None. A leaf that
        `pruning_aware` in it ranks on its own, as it was all zero at the start, is
        ranked on its own here, too, if `where` and the global scope are the same.
      layer_budget: how many each leaf keeps of what is kept in all: "global", as many
        as the ranking gives it; "uniform"; "erk" or "er", in proportion to the sum of
        its dimensions over their product, the last two with "er"; a mapping from
        patterns of paths, such as "*/embedding", to densities, the other leaves sharing
        the rest; or a `LayerBudget` of one of these and of a least number that every
        leaf keeps. The total is exact, and each leaf within one of its share.

    Returns:
      Pytree like `params`: bool arrays, True = keep, None where `where` is False.

    Raises:
      ValueError: if `sparsity` is outside [0, 1], `scope`, `score` or `layer_budget` is
        unknown, if the budget and the sparsity contradict each other, if `where`
        chooses no leaf, or a leaf that is not a real float, or if `params` are no
        pytree of parameters but a model or a state.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax import masks
      >>> params = {"kernel": jnp.array([[3.0, -1.0, 2.0, 0.5]]), "bias": jnp.zeros(2)}
      >>> mask = masks.magnitude_mask(params, 0.5)
      >>> mask["kernel"].tolist(), mask["bias"]
      ([[True, False, True, False]], None)
      >>> layers = {"kernel": jnp.arange(8.0).reshape(2, 4)}  # two layers in one leaf
      >>> masks.magnitude_mask(layers, 0.75, scope=lambda path, leaf: 1)["kernel"]
      Array([[False, False, False,  True],
             [False, False, False,  True]], dtype=bool)
    """
    pruned = _share_of("sparsity", sparsity)
    ranked = _Ranked(scope, where, score, layer_budget, opt_state)
    return ranked.mask(params, pruned, unpack(previous))


def _share_of(name: str, sparsity: Any) -> Callable[[int], Any]:
    """The function n -> how many that share of n is."""
    if not checks.is_scalar_array(sparsity):
        checks.scalar(name, sparsity, least=0, most=1)
        return lambda size: round(float(sparsity) * size)

    def of(size: int) -> Any:
        count = jnp.round(jnp.clip(sparsity, 0, 1) * size)
        return count.astype(counts.count_dtype(size))

    return of


class _Ranked(NamedTuple):
    """What is ranked, and how; the arguments of `magnitude_mask` and `block_mask`."""

    scope: Scope
    where: Where | None
    score: Score
    layer_budget: Budget
    opt_state: Any = None
    block: Block | None = None
    pooling: str = "average"

    def mask(self, params: Any, pruned: Callable[[int], Any], held: Any) -> Any:
        """The mask that prunes `pruned(n)` of every n components ranked together."""
        parts = parts_of(params, self.where, self.scope, self.layer_budget)
        if held is not None:
            checks.mask(held, params)
        scores = tree_of_scores(params, parts, self.score)
        if self.block is not None:
            return self._of_blocks(self.block, params, parts, pruned, held, scores)
        if not parts.together:
            return _each(params, parts, pruned, held, scores)
        own = _alone(self.opt_state, params, parts)
        if own is None and not parts.budget.least:
            return exact.mask_of_parts(
                params, parts, lambda group, size: pruned(size), held, scores
            )
        kept = _protected(params, parts, pruned, held, scores, own)
        return _others(params, parts, pruned, held, scores, *kept)

    def _of_blocks(self, block, params, parts, pruned, held, scores) -> Any:
        """The mask of a tree with a number for each block, spread over the blocks."""
        checks.choice("pooling", self.pooling, ("average", "max"))
        paths_leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
        ranked = jax.tree.leaves(params if scores is None else scores)
        masks: list[Any] = [None] * len(ranked)
        if held is not None:
            masks = treedef.flatten_up_to(held)
        sizes = {}
        for i, *_ in parts.leaves:
            path, leaf = paths_leaves[i]
            checks.real_leaf("params", path, leaf)
            sizes[i] = _block_of(block, path, leaf)
            x = jnp.abs(working(jnp.asarray(ranked[i])))
            ranked[i] = _pooled(x, sizes[i], self.pooling)
            if masks[i] is not None:
                masks[i] = _pooled(masks[i], sizes[i], "max")
        members = {path for i, (path, _) in enumerate(paths_leaves) if i in sizes}
        of_blocks = self._replace(
            where=lambda path, leaf: path in members,
            score="magnitude",
            opt_state=None,
            block=None,
        ).mask(
            treedef.unflatten(ranked),
            pruned,
            None if held is None else treedef.unflatten(masks),
        )
        spread = treedef.flatten_up_to(of_blocks)
        for i, size in sizes.items():
            for axis, n in enumerate(size):
                spread[i] = jnp.repeat(spread[i], n, axis)
            shape: Any = jnp.shape(paths_leaves[i][1])
            spread[i] = spread[i][tuple(map(slice, shape))]
        mask = treedef.unflatten(spread)
        return mask if held is None else _both(mask, held)


def _both(mask: Any, held: Any) -> Any:
    return _map(lambda keep, old: keep if keep is None else keep & old, mask, held)


def _alone(opt_state: Any, params: Any, parts: Parts) -> jax.Array | None:
    """Which leaves `pruning_aware` ranks on their own; None: none."""
    if opt_state is None or not parts.together:
        return None
    checks.opt_state(opt_state, params)
    opt_state = getattr(opt_state, "opt_state", opt_state)  # nnx.Optimizer
    for kind in (PruningAwareState, GradientAtPrunedState):
        for state in find_states(opt_state, kind):
            (alone,) = jax.tree.leaves(state.alone)
            # All are where its own scope is by leaf.
            alone = alone & ~jnp.all(alone)
            some = isinstance(alone, Tracer) or jnp.any(alone)
            if alone.shape == (len(parts),) and some:
                return alone
    return None


def _each(
    params: optax.Params, parts: Parts, pruned: Any, held: Any, scores: Any
) -> Any:
    """The mask with every part ranked on its own."""
    # What is pruned already counts, so that the total stays exact.
    alive = None if held is None else _alive(params, parts, held)
    kept = parts.by_leaf(parts.kept(lambda n: n - pruned(n), alive))
    return exact.mask_of_parts(
        params, parts, lambda group, size: size - kept[group[0]], held, scores
    )


def _alive(params: optax.Params, parts: Parts, held: Any) -> list[Any]:
    """How many weights of each part a mask keeps."""
    masks = jax.tree.structure(params).flatten_up_to(held)
    alive: list[Any] = []
    for i, axes, shape in parts.leaves:
        size = math.prod(shape[axes:])
        if masks[i] is None:
            alive += [size] * math.prod(shape[:axes])
            continue
        inside = tuple(range(axes, len(shape)))
        if isinstance(masks[i], Tracer):
            number = jnp.sum(masks[i], inside, counts.count_dtype(size))
            if engine.on_one_device([number]):
                alive += [*number.reshape(-1)]
                continue
            # A layer cannot be taken out of a sharded axis, but all others can be zero.
            alone = np.eye(number.size, dtype=bool).reshape(-1, *number.shape)
            alive += [
                jnp.sum(jnp.where(one, number, 0), dtype=number.dtype) for one in alone
            ]
        else:
            alive += np.sum(masks[i], inside, int).reshape(-1).tolist()
    return alive


def _protected(
    params: optax.Params, parts: Parts, pruned: Any, held: Any, scores: Any, own: Any
) -> tuple[dict[int, Any], dict[int, Any]]:
    """What is kept whatever the common ranking says, and what is not in the ranking.

    Returns:
      By the index of a leaf: the mask of the least number that it keeps, and whether it
      is ranked on its own, with its mask.
    """
    alone = dataclasses.replace(parts, together=False)
    least, apart = {}, {}
    if parts.budget.least:
        floor = exact.mask_of_parts(
            params,
            alone,
            lambda group, size: size - min(parts.budget.least, size),
            held,
            scores,
        )
        floor = jax.tree.structure(params).flatten_up_to(floor)
        least = {i: floor[i] for i, *_ in parts.leaves}
    if own is not None:
        each = exact.mask_of_parts(
            params, alone, lambda group, size: pruned(size), held, scores
        )
        each = jax.tree.structure(params).flatten_up_to(each)
        flags = zip((i for i, *_ in parts.leaves), own, strict=True)
        apart = {i: (flag, each[i]) for i, flag in flags}
    return least, apart


def _others(
    params: optax.Params,
    parts: Parts,
    pruned: Callable[[int], Any],
    held: Any,
    scores: Any,
    least: dict[int, Any],
    apart: dict[int, Any],
) -> Any:
    """The mask of the common ranking, in which what is protected is the largest."""
    treedef = jax.tree.structure(params)
    ranked = jax.tree.leaves(params if scores is None else scores)
    masks = [None] * len(ranked) if held is None else treedef.flatten_up_to(held)
    for i, floor in least.items():
        ranked[i] = jnp.where(floor, jnp.inf, ranked[i])
    for i, (flag, _) in apart.items():
        ranked[i] = jnp.where(flag, jnp.inf, ranked[i])
        masks[i] = None if masks[i] is None else flag | masks[i]
    sizes = [math.prod(shape) for _, _, shape in parts.leaves]
    most = sum(size - min(parts.budget.least, size) for size in sizes)

    def left_out(group, size):
        del group
        # What is ranked on its own takes its share first.
        flags = [flag for flag, _ in apart.values()]
        own = [jnp.where(f, pruned(n), 0) for f, n in zip(flags, sizes, strict=False)]
        count = pruned(size) - sum(own)
        return min(count, most) if isinstance(count, int) else jnp.clip(count, 0, most)

    kept = treedef.flatten_up_to(
        exact.mask_of_parts(
            params,
            parts,
            left_out,
            None if held is None else treedef.unflatten(masks),
            treedef.unflatten(ranked),
        )
    )
    for i, (flag, mask) in apart.items():
        kept[i] = jnp.where(flag, mask, kept[i])
    return treedef.unflatten(kept)


def n_m_mask(
    params: optax.Params,
    n: int,
    m: int,
    *,
    axis: Axis | None = None,
    where: Where | None = None,
) -> Any:
    r"""The N:M mask: of every m consecutive weights the n largest magnitudes are kept.

    .. math:: |\{ i \in \text{group} : \text{kept} \}| = n \text{ in each group of } m

    Groups lie along the axes that the layer contracts, as hardware with 2:4 sparsity
    wants them. Among equal magnitudes the one with the lowest index is pruned first.

    Args:
      params: pytree of real floating arrays.
      n: weights kept in a group, 0 <= n <= m.
      m: size of a group, a divisor of the axis or of the product of the axes.
      axis: the axes that are contracted: one, several, which are taken as one, the last
        of them running fastest, or a function (path, leaf) -> either. None goes by what
        a leaf is called: -3 for the kernels of query, key and value in Flax's
        attention, [in, heads, features], and (-3, -2) for that of out beside them; 1
        for a `weight`, [out, in, ...] in Equinox and PyTorch; else -2, [..., in, out].
        Three axes may be a convolution's, layers stacked in one leaf, or a projection:
        without such a name, and without "conv" in that of the module, they are refused.
      where: predicate (path, leaf) -> bool; None is `prunable`.

    Returns:
      Pytree like `params`: bool arrays, True = keep, None for leaves not to prune.

    Raises:
      ValueError: if not 0 <= n <= m, if m does not divide the axes of a leaf, or if it
        is not known which axes a leaf contracts.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax import masks
      >>> kernel = jnp.array([[4.0], [1.0], [3.0], [2.0]])
      >>> masks.n_m_mask(kernel, 2, 4).ravel().tolist()
      [True, False, True, False]
    """
    if not (isinstance(n, int) and isinstance(m, int) and 0 <= n <= m and m > 0):
        raise ValueError(
            f"n and m must be integers, 0 <= n <= m; got n={n!r}, m={m!r}."
        )
    members = [i for i, member in enumerate(chosen(params, where)) if member]
    return exact.mask_of_groups(params, members, n, m, axis)


def block_mask(
    params: optax.Params,
    sparsity: chex.Numeric,
    block: Block,
    *,
    pooling: str = "average",
    scope: Scope = "global",
    where: Where | None = None,
    previous: Any = None,
    score: Score = "magnitude",
    layer_budget: Budget = "global",
) -> Any:
    r"""The mask that prunes whole blocks of weights, with an exact number of blocks.

    .. math::
       s_B = \frac{1}{|B|} \sum_{i \in B} |x_i| \text{ or } \max_{i \in B} |x_i|, \quad
       \mathrm{round}(\sigma N) \text{ of } N \text{ blocks, with the smallest } s_B

    Args:
      params: pytree of real floating arrays.
      sparsity: sigma in [0, 1], the share of the blocks to prune, as in
        `magnitude_mask`.
      block: (height, width), in the last axes of a leaf; a block covers one index of
        each other axis, and what is left at an edge is a smaller block. Or a function
        (path, leaf) -> the size in every axis.
      pooling: "average" or "max", of the magnitudes or scores in a block.
      scope: "global", "leaf" or a function, as in `magnitude_mask`.
      where: predicate (path, leaf) -> bool; None is `prunable`.
      previous: the mask already held, or None. What it prunes stays pruned; a block
        counts as pruned when all of it is.
      score: as in `magnitude_mask`, before pooling.
      layer_budget: as in `magnitude_mask`, in blocks.

    Returns:
      Pytree like `params`: bool arrays, True = keep, None for leaves not to prune.

    Raises:
      ValueError: as `magnitude_mask`, and for a block that does not fit a leaf.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax import masks
      >>> kernel = jnp.array([[1.0, 1.0, 3.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
      >>> masks.block_mask(kernel, 0.5, (2, 2))
      Array([[ True,  True, False, False],
             [ True,  True, False, False]], dtype=bool)
    """
    pruned = _share_of("sparsity", sparsity)
    ranked = _Ranked(scope, where, score, layer_budget, None, block, pooling)
    return ranked.mask(params, pruned, unpack(previous))


def _block_of(block: Block, path: Any, leaf: Any) -> tuple[int, ...]:
    """The size of a leaf's blocks in every axis."""
    shape: Any = jnp.shape(leaf)
    given: Any = block(path, leaf) if callable(block) else block
    sizes = (given,) if isinstance(given, int) else tuple(given)
    if not callable(block):
        sizes = (1,) * (len(shape) - len(sizes)) + sizes
    if len(sizes) != len(shape) or not all(isinstance(n, int) and n > 0 for n in sizes):
        raise ValueError(
            "block must be the sizes of a block in the last axes of a leaf, such as "
            "(4, 4), or a function (path, leaf) -> its sizes in all axes; got "
            f"{given!r:.80} for params{jax.tree_util.keystr(path)} of shape {shape}."
        )
    return tuple(min(n, max(size, 1)) for n, size in zip(sizes, shape, strict=True))


def _pooled(x: jax.Array, block: tuple[int, ...], pooling: str) -> jax.Array:
    """The mean or the maximum over the blocks of an array, smaller ones at its ends."""
    whole = [(-n % size) for n, size in zip(x.shape, block, strict=True)]
    pairs = [(-(-n // size), size) for n, size in zip(x.shape, block, strict=True)]

    def of_blocks(x):
        x = jnp.pad(x, [(0, n) for n in whole])
        x = x.reshape([n for pair in pairs for n in pair])
        axes = tuple(range(1, 2 * len(block), 2))
        return jnp.max(x, axes) if pooling == "max" else jnp.sum(x, axes)

    if pooling == "max":
        return of_blocks(x)
    return of_blocks(x) / of_blocks(jnp.ones_like(x))


def channels(axis: int = -1) -> Block:
    """The `block` of `block_mask` that is a channel: all of an index along one axis.

    Args:
      axis: the axis whose indices are the channels; -1, the outputs of a kernel
        [..., in, out].

    Returns:
      A function (path, leaf) -> the size of a block in every axis.

    Raises:
      ValueError: when it is called, for an axis that a leaf does not have.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax import masks
      >>> masks.channels(0)((), jnp.ones((3, 5)))
      [1, 5]
    """

    def block(path, leaf):
        shape: Any = jnp.shape(leaf)
        if not (isinstance(axis, int) and -len(shape) <= axis < len(shape)):
            raise ValueError(
                f"axis must be one of params{jax.tree_util.keystr(path)}, which has "
                f"the shape {shape}; got {axis!r}."
            )
        own = axis % len(shape)
        return [1 if i == own else max(n, 1) for i, n in enumerate(shape)]

    return block


def channel_mask(
    params: optax.Params,
    sparsity: chex.Numeric,
    *,
    axis: int = -1,
    pooling: str = "average",
    scope: Scope = "global",
    where: Where | None = None,
    previous: Any = None,
    score: Score = "magnitude",
    layer_budget: Budget = "global",
) -> Any:
    r"""The mask that prunes whole channels: all weights of an index along one axis.

    It masks each leaf on its own. To remove units from a model, with all that belongs
    to them, take `prunadag_optax.structure`.

    .. math:: \mathrm{round}(\sigma N) \text{ of the } N \text{ channels are pruned}

    Args:
      params: pytree of real floating arrays.
      sparsity: sigma in [0, 1], the share of the channels to prune.
      axis: the axis whose indices are the channels; -1, the outputs of a kernel
        [..., in, out].
      pooling: "average" or "max", of the magnitudes or scores in a channel.
      scope: as in `magnitude_mask`.
      where: predicate (path, leaf) -> bool; None is `prunable`.
      previous: as in `block_mask`.
      score: as in `magnitude_mask`, before pooling.
      layer_budget: as in `magnitude_mask`, in channels.

    Returns:
      Pytree like `params`: bool arrays, True = keep, None for leaves not to prune.

    Raises:
      ValueError: as `magnitude_mask`, and for an axis that a leaf does not have.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax import masks
      >>> masks.channel_mask(jnp.array([[1.0, 0.0], [2.0, 2.5]]), 0.5)
      Array([[ True, False],
             [ True, False]], dtype=bool)
    """
    return block_mask(
        params,
        sparsity,
        channels(axis),
        pooling=pooling,
        scope=scope,
        where=where,
        previous=previous,
        score=score,
        layer_budget=layer_budget,
    )


def _map(function: Callable[..., Any], mask: Any, *trees: Any) -> Any:
    # None is a leaf here: it marks what is not prunable, whatever stands there.
    return jax.tree.map(function, mask, *trees, is_leaf=lambda leaf: leaf is None)


def apply_mask(params: optax.Params, mask: Any) -> Any:
    r"""The parameters with every pruned weight at exactly zero.

    .. math:: x_i \leftarrow x_i \text{ where kept, } +0 \text{ where pruned}

    A selection, not a product: a pruned NaN, infinity or negative number gives +0.0.

    Args:
      params: pytree of arrays.
      mask: pytree of bool like `params`, None for leaves that are not prunable.

    Returns:
      Pytree like `params`, dtypes kept.

    Raises:
      ValueError: if `mask` does not fit `params`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax import masks
      >>> masks.apply_mask(jnp.array([1.0, -2.0]), jnp.array([True, False]))
      Array([1., 0.], dtype=float32)
    """
    mask = unpack(mask)
    checks.mask(mask, params)
    kept, treedef = jax.tree.flatten(mask, is_leaf=lambda leaf: leaf is None)
    parts = treedef.flatten_up_to(params)
    masked = [i for i, keep in enumerate(kept) if keep is not None]
    selected = _selected([kept[i] for i in masked], [parts[i] for i in masked])
    for i, x in zip(masked, selected, strict=True):
        parts[i] = x
    return treedef.unflatten(parts)


# Compiled as one program where it is called outside jit, not one for each shape.
@jax.jit
def _selected(kept: list[Any], leaves: list[Any]) -> list[jax.Array]:
    return [
        jnp.where(keep, x, jnp.zeros_like(x))
        for keep, x in zip(kept, leaves, strict=True)
    ]


def sparsity(mask_or_params: Any) -> jax.Array:
    r"""The share of pruned weights in a mask, or of exact zeros in parameters.

    .. math:: 1 - \frac{\text{kept (or nonzero) components}}{\text{components}}

    Args:
      mask_or_params: a mask, whose None leaves do not count, or a pytree of arrays.

    Returns:
      float32 scalar in [0, 1]; 0 for a tree without components.

    Raises:
      ValueError: for a model or a state, or a leaf that is neither bool nor a real
        float.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax import masks
      >>> float(masks.sparsity(jnp.array([0.0, 1.0, 0.0, 2.0])))
      0.5
    """
    mask_or_params = unpack(mask_or_params)
    checks.parameters("mask_or_params", mask_or_params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(mask_or_params):
        if checks.dtype_of(leaf) != jnp.bool_:
            checks.real_leaf("mask_or_params", path, leaf)
    return _share_of_zeros(
        [jnp.asarray(leaf) for leaf in jax.tree.leaves(mask_or_params)]
    )


@jax.jit
def _share_of_zeros(leaves: list[jax.Array]) -> jax.Array:
    size = sum(leaf.size for leaf in leaves)
    if not size:
        return jnp.zeros((), jnp.float32)
    kept = sum(jnp.sum(nonzero(x), dtype=counts.count_dtype(size)) for x in leaves)
    # Compiled, a division by a constant is a product with its reciprocal, which rounds:
    # 0 is exact as a count of what is pruned, and 1 is set.
    share = jnp.asarray((size - kept) / size, jnp.float32)
    return jnp.where(kept == 0, jnp.ones_like(share), share)


def nonzero(x: jax.Array) -> jax.Array:
    """Where an array is not zero, subnormal numbers included; a mask is itself.

    Args:
      x: array of bool or of a real floating dtype.

    Returns:
      Bool array of the same shape.
    """
    x = jnp.asarray(x)
    # `x != 0` takes a subnormal for a zero on XLA's CPU backend; the bits do not.
    return x if x.dtype == jnp.bool_ else keys.magnitude_keys(x)[0] != 0


def prune(
    params: optax.Params,
    sparsity: chex.Numeric,
    *,
    scope: Scope = "global",
    where: Where | None = None,
    previous: Any = None,
    score: Score = "magnitude",
    opt_state: Any = None,
    layer_budget: Budget = "global",
) -> tuple[Any, Any]:
    r"""Prunes by magnitude in one shot.

    .. math:: (x_{pruned}, mask), \quad
       x_{pruned} = \text{apply\_mask}(x, \text{magnitude\_mask}(x, \sigma))

    Args:
      params: pytree of real floating arrays.
      sparsity: share of the prunable components to prune, in [0, 1].
      scope: "global", "leaf" or a function, as in `magnitude_mask`.
      where: predicate (path, leaf) -> bool; None is `prunable`.
      previous: the mask already held, or None, as in `magnitude_mask`.
      score: "magnitude", "lamp", a function or a tree, as in `magnitude_mask`.
      opt_state: as in `magnitude_mask`.
      layer_budget: as in `magnitude_mask`.

    Returns:
      The pruned parameters and their mask.

    Raises:
      ValueError: as `magnitude_mask`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax import masks
      >>> pruned, mask = masks.prune(jnp.array([1.0, -3.0, 2.0, 0.5]), 0.5)
      >>> pruned.tolist()
      [0.0, -3.0, 2.0, 0.0]
    """
    mask = magnitude_mask(
        params,
        sparsity,
        scope=scope,
        where=where,
        previous=previous,
        score=score,
        opt_state=opt_state,
        layer_budget=layer_budget,
    )
    return apply_mask(params, mask), mask


def prune_further(
    params: optax.Params,
    sparsity: chex.Numeric,
    held: Any,
    *,
    scope: Scope = "global",
    where: Where | None = None,
    score: Score = "magnitude",
    opt_state: Any = None,
    layer_budget: Budget = "global",
) -> tuple[Any, Any]:
    """Prunes on top of a mask that is held: `prune`, but never to a lower sparsity.

    Args:
      params: pytree of real floating arrays.
      sparsity: share of the chosen components to be pruned afterwards, in [0, 1]. An
        array, which may be traced, is not compared with what is pruned already.
      held: the mask held; None: no weight is pruned yet.
      scope: "global", "leaf" or a function, as in `magnitude_mask`.
      where: predicate (path, leaf) -> bool; None: the leaves that have masks or, where
        nothing is held, `prunable`.
      score: "magnitude", "lamp", a function or a tree, as in `magnitude_mask`.
      opt_state: as in `magnitude_mask`.
      layer_budget: as in `magnitude_mask`.

    Returns:
      The pruned parameters and their mask, packed where `held` is.

    Raises:
      ValueError: as `magnitude_mask`, or if more is pruned already.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax import masks
      >>> pruned, mask = masks.prune(jnp.array([1.0, -3.0, 2.0, 0.5]), 0.25)
      >>> pruned, mask = masks.prune_further(pruned, 0.5, mask)
      >>> pruned.tolist()
      [0.0, -3.0, 2.0, 0.0]
    """
    where, kept = where_held(where, held), held
    held = unpack(held)
    if held is not None and not checks.is_scalar_array(sparsity):
        checks.scalar("sparsity", sparsity, least=0, most=1)
        checks.mask(held, params)
        _check_not_lower(params, float(sparsity), held, scope, where)
    params, mask = prune(
        params,
        sparsity,
        scope=scope,
        where=where,
        previous=held,
        score=score,
        opt_state=opt_state,
        layer_budget=layer_budget,
    )
    return params, packed_like(mask, kept)


def _check_not_lower(
    params: Any, sparsity: float, held: Any, scope: Scope, where: Where | None
) -> None:
    masks = jax.tree.structure(params).flatten_up_to(held)
    if any(isinstance(mask, Tracer) for mask in masks):
        return
    parts = parts_of(params, where, scope)
    ranked = [sum(parts.sizes)] if parts.together else parts.sizes
    wanted = sum(round(sparsity * size) for size in ranked)
    pruned = sum(
        int(np.sum(np.logical_not(masks[i])))
        for i, *_ in parts.leaves
        if masks[i] is not None
    )
    if wanted < pruned:
        least = pruned / sum(parts.sizes)
        raise ValueError(
            f"sparsity must be at least {least:.6g}, what is pruned already; got "
            f"{sparsity!r}. Pruned weights are gone: go back to a "
            "checkpoint from before pruning."
        )


def where_held(where: Where | None, held: Any) -> Where | None:
    """The predicate to prune again with: as given, else the leaves that have masks.

    Args:
      where: predicate (path, leaf) -> bool, or None.
      held: the mask held, or None.

    Returns:
      A predicate, or None where both are None.
    """
    if where is not None or held is None:
        return where
    paths_leaves = jax.tree_util.tree_leaves_with_path(held, is_leaf=is_packed)
    paths = {path for path, _ in paths_leaves}
    return lambda path, leaf: path in paths


def mask_on_schedule(
    params: optax.Params,
    held: Any,
    count: jax.typing.ArrayLike,
    density: optax.ScalarOrSchedule,
    *,
    every: int = 1,
    scope: Scope = "global",
    where: Where | None = None,
    score: Score = "magnitude",
    opt_state: Any = None,
    layer_budget: Budget = "global",
    n_m: str | None = None,
    block: Block | None = None,
    pooling: str = "average",
) -> Any:
    r"""The mask to hold after so many steps, inside a compiled step or outside.

    .. math:: \max(1, \mathrm{round}(\delta_k n)) \text{ components kept, for the step }
       k \text{ a multiple of } \texttt{every}

    The mask also changes at a step at which the density stops falling, :math:`\delta_k
    < \delta_{k-1}` and :math:`\delta_k = \delta_{k + \texttt{every}}`: a schedule that
    ends between two changes reaches its last density when it ends. What is pruned stays
    pruned: where the density rises, nothing is undone.

    Args:
      params: pytree of real floating arrays.
      held: the mask held; None: no weight is pruned yet.
      count: k, the number of steps done; may be traced.
      density: delta_k in (0, 1], the share of the prunable components to keep: a
        schedule k -> share such as `schedules.cubic_density`, or a number.
      every: number of steps from one change of the mask to the next.
      scope: "global", "leaf" or a function, as in `magnitude_mask`.
      where: predicate (path, leaf) -> bool; None: the leaves that have masks or, where
        nothing is held, `prunable`.
      score: "magnitude", "lamp", a function or a tree, as in `magnitude_mask`.
      opt_state: as in `magnitude_mask`.
      layer_budget: as in `magnitude_mask`.
      n_m: an N:M pattern, such as "2:4", in place of the ranking: of every M weights
        that a layer contracts max(N, round(delta_k M)) are kept.
      block: the blocks that are pruned as one, as in `block_mask`; None: no blocks.
      pooling: as in `block_mask`.

    Returns:
      The mask, `held` itself at all other steps; packed where `held` is.

    Raises:
      ValueError: for an argument out of range, or if `where` chooses a leaf for which
        no mask is held.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax import masks, schedules
      >>> density = schedules.cubic_density(0.5, begin=0, end=10)
      >>> mask = masks.mask_on_schedule(jnp.arange(4.0), None, 10, density, every=5)
      >>> mask.tolist()
      [False, False, True, True]
    """
    checks.integer("every", every, least=1)
    checks.scalar_or_schedule("density", density, above=0, most=1)
    pattern = None if n_m is None else n_of_m("n_m", n_m)
    where = where_held(where, held)
    ranked = _Ranked(scope, where, score, layer_budget, opt_state, block, pooling)
    kept = held
    if held is None:
        held = kept = magnitude_mask(params, 0.0, scope=scope, where=where)
    held = unpack(held)
    checks.masks_for(chosen(params, where), held, params)
    # Signed: nnx.Optimizer counts in uint32, where a schedule's count - begin wraps.
    count = jnp.asarray(count, jnp.int32)

    def new() -> Any:
        # Not 1 - density, which rounds: 0.1 of 1000 is 100 in float32 too.
        share = working(value_at(density, count))
        known = share
        if isinstance(share, Tracer) and callable(density):
            known = checks.at_start("density", density)
        if not isinstance(known, Tracer):
            # To a thousandth: rounding may carry a schedule past 1.
            checks.scalar("density", round(float(known), 3), least=0, most=1)
        if pattern is None:
            mask = ranked.mask(
                params, lambda n: n - counts.target_count(share, n), held
            )
        else:
            mask = _gradual_n_m(params, share, pattern, where, held)
        return packed_like(mask, kept)

    due = count % every == 0
    if callable(density) and every > 1:
        before, now, later = (
            jnp.asarray(density(k)) for k in (count - 1, count, count + every)
        )
        due |= (now < before) & (now == later)
    if isinstance(due, Tracer):
        return jax.lax.cond(due, new, lambda: kept)
    return new() if due else kept


def _gradual_n_m(
    params: optax.Params, share: Any, pattern: Any, where: Where | None, held: Any
) -> Any:
    """Of every m the share, at least n; what is pruned already goes first."""
    n, m = pattern
    ranked = _map(
        lambda keep, x: x if keep is None else jnp.where(keep, x, 0), held, params
    )
    members = [i for i, member in enumerate(chosen(params, where)) if member]
    count = jnp.clip(jnp.round(share * m), n, m).astype(jnp.int32)
    new = jax.lax.switch(
        count - n,
        [
            lambda j=j: exact.mask_of_groups(ranked, members, j, m)
            for j in range(n, m + 1)
        ],
    )
    return _both(new, held)


class KeepPrunedState(NamedTuple):
    """State of `keep_pruned`: the mask, so that it is saved with the optimizer."""

    mask: Any  # bool or packed, as params; None for leaves that are not prunable


def keep_pruned(
    mask: Any | Callable[[optax.Params], Any],
    *,
    packed: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps pruned weights at exactly zero under any optimizer it ends the chain of.

    .. math:: u_i \leftarrow u_i \text{ where kept, } -x_i \text{ where pruned}

    Put last in `optax.chain`, it overrules momentum, weight decay and every other
    source of an update; a pruned weight that is not zero yet becomes zero. The mask is
    part of the state: it is saved with it, and can be replaced there without
    recompilation. For `optax.tree.map_params` it is like the parameters if it has all
    their leaves, with no None, or comes from a function.

    Args:
      mask: pytree of bool like the parameters (None for leaves that are not prunable),
        or a function params -> mask, called by `init`. A module of arrays that can be
        called, such as Equinox's, is a mask.
      packed: whether the state has one bit a weight, as `pack` makes it, and not a
        byte. Not for sharded parameters.

    Returns:
      An `optax.GradientTransformationExtraArgs`; its state is `KeepPrunedState`.

    Raises:
      ValueError: from `init` if the mask does not fit the parameters; from `update`
        without `params`.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from prunadag_optax import masks
      >>> params, mask = masks.prune(jnp.array([1.0, -3.0]), 0.5)
      >>> tx = optax.chain(optax.adamw(0.1), masks.keep_pruned(mask))
      >>> state = tx.init(params)
      >>> updates, state = tx.update(jnp.ones(2), state, params)
      >>> float(optax.apply_updates(params, updates)[0])
      0.0
    """
    computed = checks.is_function(mask)
    leaves = jax.tree.leaves(mask, is_leaf=lambda leaf: leaf is None)
    like_params = computed or all(leaf is not None for leaf in leaves)

    def init_fn(params):
        tree: Any = mask
        # tree.map_params calls init with a placeholder, which has no leaves, to see
        # where it comes back.
        if jax.tree.leaves(params):
            tree = unpack(mask(params) if callable(mask) and computed else mask)
            checks.mask(tree, params)
        elif like_params:
            return KeepPrunedState(params)
        if packed:
            return KeepPrunedState(pack(tree))
        # A copy: donating the state must not delete the caller's mask.
        return KeepPrunedState(jax.tree.map(jnp.array, tree))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError(checks.NO_PARAMS_MSG)
        checks.same_trees("updates", updates, "params", params)
        held = _map(
            lambda keep, u, x: u if keep is None else jnp.where(keep, u, -x),
            unpack(state.mask),
            updates,
            params,
        )
        return held, state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def finalise(params: optax.Params, mask: Any) -> Any:
    r"""The parameters to ship: pruned weights at +0.0, the mask no longer needed.

    .. math:: x_i \leftarrow x_i \text{ where kept, } +0 \text{ where pruned}

    Args:
      params: pytree of arrays.
      mask: pytree of bool like `params`, None for leaves that are not prunable; None
        alone where nothing was pruned.

    Returns:
      Pytree like `params` of plain arrays. Applying it twice changes nothing.

    Raises:
      ValueError: if `mask` does not fit `params`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax import masks
      >>> mask = jnp.array([True, False])
      >>> once = masks.finalise(jnp.array([1.0, -0.0]), mask)
      >>> masks.finalise(once, mask).tolist()
      [1.0, 0.0]
    """
    checks.parameters("params", params)
    return apply_mask(jax.tree.map(jnp.asarray, params), mask)
