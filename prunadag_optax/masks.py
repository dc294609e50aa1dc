"""Pruning masks: made by magnitude, made anew, applied, held in training, finalised.

A mask is a pytree like the parameters with True where a weight is kept and False where
it is pruned. A None in place of a leaf means that the leaf is not prunable. Masks live
beside the parameters; nothing here changes a parameter in place.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from prunadag_optax._common import checks
from prunadag_optax._common.dtypes import value_at, working
from prunadag_optax._common.leaves import Where as Where
from prunadag_optax._common.leaves import chosen, ranked_together
from prunadag_optax._common.leaves import everything as everything
from prunadag_optax._common.leaves import prunable as prunable
from prunadag_optax._ranking import counts, exact, keys


def magnitude_mask(
    params: optax.Params,
    sparsity: chex.Numeric,
    *,
    scope: str = "global",
    where: Where | None = None,
    previous: Any = None,
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
        sigma of each.
      where: predicate (path, leaf) -> bool, False for leaves never to prune; paths are
        those of `jax.tree_util.tree_map_with_path`. None is `prunable`.
      previous: the mask already held, or None. What it prunes stays pruned, ahead of
        every live weight, even where that is more than `sparsity` asks for.

    Returns:
      Pytree like `params`: bool arrays, True = keep, None where `where` is False.

    Raises:
      ValueError: if `sparsity` is outside [0, 1], `scope` is unknown, or a leaf to
        prune is not a real float.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax import masks
      >>> params = {"kernel": jnp.array([[3.0, -1.0, 2.0, 0.5]]), "bias": jnp.zeros(2)}
      >>> mask = masks.magnitude_mask(params, 0.5)
      >>> mask["kernel"].tolist(), mask["bias"]
      ([[True, False, True, False]], None)
    """
    if not checks.is_scalar_array(sparsity):
        checks.scalar("sparsity", sparsity, least=0, most=1)

    def pruned(size: int) -> Any:
        if checks.is_scalar_array(sparsity):
            count = jnp.round(jnp.clip(sparsity, 0, 1) * size)
            return count.astype(counts.count_dtype(size))
        return round(float(sparsity) * size)

    return _mask(params, pruned, scope, where, previous)


def _mask(
    params: optax.Params,
    pruned: Callable[[int], Any],
    scope: str,
    where: Where | None,
    previous: Any,
) -> Any:
    """The mask that prunes `pruned(n)` of every n components ranked together."""
    checks.choice("scope", scope, ("global", "leaf"))
    if previous is not None:
        checks.mask(previous, params)
    groups = ranked_together(params, where, scope)
    return exact.mask_by_groups(
        params, groups, lambda group, size: pruned(size), previous
    )


def n_m_mask(
    params: optax.Params,
    n: int,
    m: int,
    *,
    axis: int = -2,
    where: Where | None = None,
) -> Any:
    r"""The N:M mask: of every m consecutive weights the n largest magnitudes are kept.

    .. math:: |\{ i \in \text{group} : \text{kept} \}| = n \text{ in each group of } m

    Groups lie along the input axis, which is -2 in Flax kernels ([..., in, out]), as
    hardware with 2:4 sparsity wants them. Among equal magnitudes the one with the
    lowest index is pruned first.

    Args:
      params: pytree of real floating arrays.
      n: weights kept in a group, 0 <= n <= m.
      m: size of a group, a divisor of the axis.
      axis: axis along which the groups lie.
      where: predicate (path, leaf) -> bool; None is `prunable`.

    Returns:
      Pytree like `params`: bool arrays, True = keep, None for leaves not to prune.

    Raises:
      ValueError: if not 0 <= n <= m, or if m does not divide the axis of a leaf.

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

    def leaf_mask(path, leaf):
        if not (where or prunable)(path, leaf):
            return None
        checks.real_leaf("params", path, leaf)
        shape = jnp.shape(leaf)
        if not -len(shape) <= axis < len(shape) or shape[axis] % m:
            raise ValueError(
                f"m must divide axis {axis} of params{jax.tree_util.keystr(path)}, "
                f"which has the shape {shape}; got m={m}. Leave it out with `where`."
            )
        return exact.keep_largest_in_groups(jnp.asarray(leaf), n, m, axis)

    return jax.tree_util.tree_map_with_path(leaf_mask, params)


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
    return _map(
        lambda keep, x: x if keep is None else jnp.where(keep, x, jnp.zeros_like(x)),
        mask,
        params,
    )


def sparsity(mask_or_params: Any) -> jax.Array:
    r"""The share of pruned weights in a mask, or of exact zeros in parameters.

    .. math:: 1 - \frac{\text{kept (or nonzero) components}}{\text{components}}

    Args:
      mask_or_params: a mask, whose None leaves do not count, or a pytree of arrays.

    Returns:
      float32 scalar in [0, 1]; 0 for a tree without components.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax import masks
      >>> float(masks.sparsity(jnp.array([0.0, 1.0, 0.0, 2.0])))
      0.5
    """
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(mask_or_params)]
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
    scope: str = "global",
    where: Where | None = None,
    previous: Any = None,
) -> tuple[Any, Any]:
    r"""Prunes by magnitude in one shot.

    .. math:: (x_{pruned}, mask), \quad
       x_{pruned} = \text{apply\_mask}(x, \text{magnitude\_mask}(x, \sigma))

    Args:
      params: pytree of real floating arrays.
      sparsity: share of the prunable components to prune, in [0, 1].
      scope: "global" or "leaf", as in `magnitude_mask`.
      where: predicate (path, leaf) -> bool; None is `prunable`.
      previous: the mask already held, or None, as in `magnitude_mask`.

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
    mask = magnitude_mask(params, sparsity, scope=scope, where=where, previous=previous)
    return apply_mask(params, mask), mask


def prune_further(
    params: optax.Params,
    sparsity: chex.Numeric,
    held: Any,
    *,
    scope: str = "global",
    where: Where | None = None,
) -> tuple[Any, Any]:
    """Prunes on top of a mask that is held: `prune`, but never to a lower sparsity.

    Args:
      params: pytree of real floating arrays.
      sparsity: share of the chosen components to be pruned afterwards, in [0, 1]. An
        array, which may be traced, is not compared with what is pruned already.
      held: the mask held; None: no weight is pruned yet.
      scope: "global" or "leaf", as in `magnitude_mask`.
      where: predicate (path, leaf) -> bool; None: the leaves that have masks or, where
        nothing is held, `prunable`.

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
    return prune(params, sparsity, scope=scope, where=where, previous=held)


def _check_not_lower(
    params: Any, sparsity: float, held: Any, scope: str, where: Where | None
) -> None:
    leaves, treedef = jax.tree.flatten(params)
    masks = treedef.flatten_up_to(held)
    if any(isinstance(mask, Tracer) for mask in masks):
        return
    groups = ranked_together(params, where, scope)
    sizes = [sum(jnp.size(leaves[i]) for i in group) for group in groups]
    wanted = sum(round(sparsity * size) for size in sizes)
    pruned = sum(
        int(jnp.sum(jnp.logical_not(masks[i])))
        for group in groups
        for i in group
        if masks[i] is not None
    )
    if wanted < pruned:
        raise ValueError(
            f"sparsity must be at least {pruned / sum(sizes):.6g}, what is pruned "
            f"already; got {sparsity!r}. Pruned weights are gone: go back to a "
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
    scope: str = "global",
    where: Where | None = None,
) -> Any:
    r"""The mask to hold after so many steps, inside a compiled step or outside.

    .. math:: \max(1, \mathrm{round}(\delta_k n)) \text{ components kept, for the step }
       k \text{ a multiple of } \texttt{every}

    What is pruned stays pruned: where the density rises, nothing is undone.

    Args:
      params: pytree of real floating arrays.
      held: the mask held; None: no weight is pruned yet.
      count: k, the number of steps done; may be traced.
      density: delta_k in (0, 1], the share of the prunable components to keep: a
        schedule k -> share such as `schedules.cubic_density`, or a number.
      every: number of steps from one change of the mask to the next.
      scope: "global" or "leaf", as in `magnitude_mask`.
      where: predicate (path, leaf) -> bool; None: the leaves that have masks or, where
        nothing is held, `prunable`.

    Returns:
      The mask, `held` itself where the step is not a multiple of `every`.

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
    checks.scalar("every", every, least=1)
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
        return _mask(
            params, lambda n: n - counts.target_count(share, n), scope, where, held
        )

    due = count % every == 0
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
    recompilation.

    Args:
      mask: pytree of bool like the parameters (None for leaves that are not prunable),
        or a function params -> mask, called by `init`.

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

    def init_fn(params):
        tree = mask(params) if callable(mask) else mask
        # tree.map_params calls init with a placeholder, which has no leaves to check.
        if jax.tree.leaves(params):
            checks.mask(tree, params)
        # A copy: donating the state must not delete the caller's mask.
        return KeepPrunedState(jax.tree.map(jnp.array, tree))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError(checks.NO_PARAMS_MSG)
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
    return apply_mask(jax.tree.map(jnp.asarray, params), mask)
