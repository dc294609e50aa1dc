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

from prunadag_optax._common import checks
from prunadag_optax._common.dtypes import value_at, working
from prunadag_optax._common.leaves import Parts, chosen, contracted_axes, parts_of
from prunadag_optax._common.leaves import Scope as Scope
from prunadag_optax._common.leaves import Where as Where
from prunadag_optax._common.leaves import everything as everything
from prunadag_optax._common.leaves import named as named
from prunadag_optax._common.leaves import prunable as prunable
from prunadag_optax._common.transformation import find_states
from prunadag_optax._core.pruning_aware import (
    GradientAtPrunedState,
    PruningAwareState,
)
from prunadag_optax._ranking import counts, exact, keys
from prunadag_optax._ranking.lamp import lamp_scores

# "magnitude", "lamp", a function params -> tree of scores, or that tree.
Score = Any
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

    Returns:
      Pytree like `params`: bool arrays, True = keep, None where `where` is False.

    Raises:
      ValueError: if `sparsity` is outside [0, 1], `scope` or `score` is unknown, where
        `where` chooses no leaf, or a leaf that is not a real float, or if `params` are
        no pytree of parameters but a model or a state.

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
    if not checks.is_scalar_array(sparsity):
        checks.scalar("sparsity", sparsity, least=0, most=1)

    def pruned(size: int) -> Any:
        if checks.is_scalar_array(sparsity):
            count = jnp.round(jnp.clip(sparsity, 0, 1) * size)
            return count.astype(counts.count_dtype(size))
        return round(float(sparsity) * size)

    return _mask(params, pruned, scope, where, previous, score, opt_state)


def _mask(
    params: optax.Params,
    pruned: Callable[[int], Any],
    scope: Scope,
    where: Where | None,
    previous: Any,
    score: Score,
    opt_state: Any,
) -> Any:
    """The mask that prunes `pruned(n)` of every n components ranked together."""
    parts = parts_of(params, where, scope)
    if previous is not None:
        checks.mask(previous, params)
    scores = _scores(params, parts, score)
    alone = _alone(opt_state, params, parts)
    if alone is None:
        return exact.mask_of_parts(
            params, parts, lambda group, size: pruned(size), previous, scores
        )
    return _each_or_together(params, parts, pruned, previous, scores, alone)


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


def _each_or_together(
    params: optax.Params,
    parts: Parts,
    pruned: Callable[[int], Any],
    previous: Any,
    scores: Any,
    alone: jax.Array,
) -> Any:
    """The mask with some leaves ranked on their own; these take their share first."""
    treedef = jax.tree.structure(params)
    flags = dict(zip((i for i, *_ in parts.leaves), alone, strict=True))
    each = exact.mask_of_parts(
        params,
        dataclasses.replace(parts, together=False),
        lambda group, size: pruned(size),
        previous,
        scores,
    )
    # Among the others, those on their own are the largest, and so are not pruned.
    ranked = jax.tree.leaves(params if scores is None else scores)
    held = [None] * len(ranked)
    if previous is not None:
        held = treedef.flatten_up_to(previous)
    for i, flag in flags.items():
        ranked[i] = jnp.where(flag, jnp.inf, ranked[i])
        held[i] = None if held[i] is None else flag | held[i]
    own = sum(
        jnp.where(flag, pruned(size), 0)
        for flag, size in zip(alone, parts.sizes, strict=True)
    )
    others = exact.mask_of_parts(
        params,
        parts,
        lambda group, size: jnp.maximum(pruned(size) - own, 0),
        treedef.unflatten(held) if previous is not None else None,
        treedef.unflatten(ranked),
    )
    each, others = map(treedef.flatten_up_to, (each, others))
    for i, flag in flags.items():
        each[i] = jnp.where(flag, each[i], others[i])
    return treedef.unflatten(each)


def _scores(params: optax.Params, parts: Parts, score: Score) -> Any:
    """The tree that is ranked in place of the parameters; None: they themselves."""
    if isinstance(score, str):
        checks.score(score)
        # Within a layer the two have one order.
        if score == "magnitude" or not parts.together:
            return None
        return parts.map(lamp_scores, params, otherwise=params)
    scores = score
    if checks.is_function(score):
        checks.takes("score", score, "params")
        scores = score(params)
    checks.same_trees("score", scores, "params", params)
    paths_leaves = jax.tree_util.tree_leaves_with_path(scores)
    for i, *_ in parts.leaves:
        checks.real_leaf("score", *paths_leaves[i])
    return scores


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
    paths_leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    contracted = contracted_axes([path for path, _ in paths_leaves])

    def leaf_mask(path, leaf):
        checks.real_leaf("params", path, leaf)
        given = axis(path, leaf) if callable(axis) else axis
        shape = jnp.shape(leaf)
        axes = contracted(path, leaf) if given is None else _axes(given, len(shape))
        known = all(-len(shape) <= i < len(shape) for i in axes)
        if not known or math.prod(shape[i] for i in axes) % m:
            name = f"axis {axes[0]}" if len(axes) == 1 else f"axes {axes}"
            raise ValueError(
                f"m must divide {name} of params{jax.tree_util.keystr(path)}, which "
                f"has the shape {shape}; got m={m}. Leave it out with `where`, or name "
                "the axis that the layer contracts with `axis`."
            )
        return exact.keep_largest_in_groups(jnp.asarray(leaf), n, m, axes)

    members = chosen(params, where)
    return treedef.unflatten(
        leaf_mask(path, leaf) if member else None
        for member, (path, leaf) in zip(members, paths_leaves, strict=True)
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

    Returns:
      The pruned parameters and their mask.

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
    where = where_held(where, held)
    if held is not None and not checks.is_scalar_array(sparsity):
        checks.scalar("sparsity", sparsity, least=0, most=1)
        checks.mask(held, params)
        _check_not_lower(params, float(sparsity), held, scope, where)
    return prune(
        params,
        sparsity,
        scope=scope,
        where=where,
        previous=held,
        score=score,
        opt_state=opt_state,
    )


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
    paths = {path for path, _ in jax.tree_util.tree_leaves_with_path(held)}
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

    Returns:
      The mask, `held` itself at all other steps.

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
    where = where_held(where, held)
    if held is None:
        held = magnitude_mask(params, 0.0, scope=scope, where=where)
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
        return _mask(
            params,
            lambda n: n - counts.target_count(share, n),
            scope,
            where,
            held,
            score,
            opt_state,
        )

    due = count % every == 0
    if callable(density) and every > 1:
        before, now, later = (
            jnp.asarray(density(k)) for k in (count - 1, count, count + every)
        )
        due |= (now < before) & (now == later)
    if isinstance(due, Tracer):
        return jax.lax.cond(due, new, lambda: held)
    return new() if due else held


class KeepPrunedState(NamedTuple):
    """State of `keep_pruned`: the mask, so that it is saved with the optimizer."""

    mask: Any  # bool, shapes of params; None for leaves that are not prunable


def keep_pruned(
    mask: Any | Callable[[optax.Params], Any],
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
            tree = mask(params) if callable(mask) and computed else mask
            checks.mask(tree, params)
        elif like_params:
            tree = params
        # A copy: donating the state must not delete the caller's mask.
        return KeepPrunedState(jax.tree.map(jnp.array, tree))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError(checks.NO_PARAMS_MSG)
        checks.same_trees("updates", updates, "params", params)
        held = _map(
            lambda keep, u, x: u if keep is None else jnp.where(keep, u, -x),
            state.mask,
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
