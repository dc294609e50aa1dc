"""Pruning masks: made by magnitude, applied, held during training, finalised.

A mask is a pytree like the parameters with True where a weight is kept and False where
it is pruned. A None in place of a leaf means that the leaf is not prunable. Masks live
beside the parameters; nothing here changes a parameter in place.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from optax._src.base import NO_PARAMS_MSG

from prunadag_optax import _validation, selection

Where = Callable[[tuple[Any, ...], jax.Array], bool]


def magnitude_mask(
    params: optax.Params,
    sparsity: float | jax.Array,
    *,
    scope: str = "global",
    where: Where | None = None,
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
      where: predicate (path, leaf) -> bool, False for leaves never to prune, such as
        biases; paths are those of `jax.tree_util.tree_map_with_path`. None: all leaves.

    Returns:
      Pytree like `params`: bool arrays, True = keep, None where `where` is False.

    Raises:
      ValueError: if `sparsity` is outside [0, 1], `scope` is unknown, or a leaf to
        prune is not a real float.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax import masks
      >>> params = {"kernel": jnp.array([3.0, -1.0, 2.0, 0.5]), "bias": jnp.zeros(2)}
      >>> mask = masks.magnitude_mask(params, 0.5, where=lambda path, x: x.size > 2)
      >>> mask["kernel"].tolist(), mask["bias"]
      ([True, False, True, False], None)
    """
    if not _validation.is_scalar_array(sparsity):
        _validation.check_scalar("sparsity", sparsity, least=0, most=1)
    _validation.check_choice("scope", scope, ("global", "leaf"))
    paths_leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    chosen = [
        i
        for i, (path, leaf) in enumerate(paths_leaves)
        if where is None or where(path, leaf)
    ]
    for i in chosen:
        _validation.check_real_leaf("params", *paths_leaves[i])
    masks: list[Any] = [None] * len(paths_leaves)
    groups = [chosen] if scope == "global" else [[i] for i in chosen]
    for group in groups:
        members = [jnp.asarray(paths_leaves[i][1]) for i in group]
        count = _pruned_count(sparsity, sum(leaf.size for leaf in members))
        for i, mask in zip(group, _keep_largest(members, count), strict=True):
            masks[i] = mask
    return treedef.unflatten(masks)


def _pruned_count(sparsity: Any, size: int) -> Any:
    if _validation.is_scalar_array(sparsity):
        fraction = jnp.clip(sparsity, 0, 1)
        return jnp.round(fraction * size).astype(selection.count_dtype(size))
    return round(float(sparsity) * size)


@jax.jit
def _keep_largest(leaves: list[jax.Array], count: jax.Array) -> list[jax.Array]:
    """Masks that leave out the `count` smallest magnitudes of all leaves."""
    keys = selection.magnitude_keys(leaves)
    size = sum(key.size for key in keys)
    if not size:
        return [jnp.ones(key.shape, bool) for key in keys]
    count = jnp.asarray(count, selection.count_dtype(size))
    # The count-th smallest is the (n - count + 1)-th largest.
    threshold = selection.kth_largest_key(leaves, jnp.clip(size - count + 1, 1, size))
    below = sum(jnp.sum(key < threshold, dtype=count.dtype) for key in keys)
    # Of the magnitudes that tie at the threshold the first (count - below) go. Where
    # the last of these stands is a selection again, over positions counted from the
    # end (so that the first is the largest), with 0 where there is no tie.
    unsigned = jnp.uint32 if count.dtype == jnp.int32 else jnp.uint64
    positions, offset = [], 0
    for key in keys:
        positions.append(unsigned(size - offset) - _row_major_index(key, unsigned))
        offset += key.size
    tied = [
        jnp.where(key == threshold, position, unsigned(0))
        for key, position in zip(keys, positions, strict=True)
    ]
    last = selection.kth_largest_key(tied, jnp.maximum(count - below, 1), keys_of=list)
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
        jnp.zeros(x.shape, dtype),
    )


def _map(function: Callable[..., Any], mask: Any, *trees: Any) -> Any:
    # None is a leaf here: it marks what is not prunable, whatever stands there.
    return jax.tree.map(function, mask, *trees, is_leaf=lambda leaf: leaf is None)


def check_mask(mask: Any, params: optax.Params) -> None:
    """Raises a ValueError unless `mask` fits `params`.

    Args:
      mask: pytree of bool arrays and Nones.
      params: pytree of arrays.

    Raises:
      ValueError: naming the first leaf that is missing, of another shape, or not bool.
    """
    treedef = jax.tree.structure(mask, is_leaf=lambda leaf: leaf is None)
    paths = jax.tree_util.tree_leaves_with_path(mask, is_leaf=lambda leaf: leaf is None)
    try:
        parts = treedef.flatten_up_to(params)
        for (_, keep), part in zip(paths, parts, strict=True):
            if keep is not None and not jax.tree_util.all_leaves([part]):
                raise ValueError("one array where params have a tree")
    except (ValueError, TypeError) as error:
        raise ValueError(
            "mask must have the tree structure of params, with None for leaves that "
            f"are not prunable; got {jax.tree.structure(mask)} for "
            f"{jax.tree.structure(params)}."
        ) from error
    for (path, keep), part in zip(paths, parts, strict=True):
        if keep is None:
            continue
        name = f"mask{jax.tree_util.keystr(path)}"
        if jnp.result_type(keep) != jnp.bool_:
            raise ValueError(
                f"{name} must be bool (True = keep) or None; got dtype "
                f"{jnp.result_type(keep)}."
            )
        if jnp.shape(keep) != jnp.shape(part):
            raise ValueError(
                f"{name} must have the shape {jnp.shape(part)} of its parameter; got "
                f"{jnp.shape(keep)}."
            )


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
    check_mask(mask, params)
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
    kept = sum(jnp.sum(nonzero(x), dtype=selection.count_dtype(size)) for x in leaves)
    return jnp.asarray(1 - kept / size, jnp.float32)


def nonzero(x: jax.Array) -> jax.Array:
    """Where an array is not zero, subnormal numbers included; a mask is itself.

    Args:
      x: array of bool or of a real floating dtype.

    Returns:
      Bool array of the same shape.
    """
    x = jnp.asarray(x)
    # `x != 0` takes a subnormal for a zero on XLA's CPU backend; the bits do not.
    return x if x.dtype == jnp.bool_ else selection.magnitude_keys(x)[0] != 0


def prune(
    params: optax.Params,
    sparsity: float | jax.Array,
    *,
    scope: str = "global",
    where: Where | None = None,
) -> tuple[Any, Any]:
    r"""Prunes by magnitude in one shot.

    .. math:: (x_{pruned}, mask), \quad
       x_{pruned} = \text{apply\_mask}(x, \text{magnitude\_mask}(x, \sigma))

    Args:
      params: pytree of real floating arrays.
      sparsity: share of the prunable components to prune, in [0, 1].
      scope: "global" or "leaf", as in `magnitude_mask`.
      where: predicate (path, leaf) -> bool, as in `magnitude_mask`.

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
    mask = magnitude_mask(params, sparsity, scope=scope, where=where)
    return apply_mask(params, mask), mask


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
            check_mask(tree, params)
        # A copy: donating the state must not delete the caller's mask.
        return KeepPrunedState(jax.tree.map(jnp.array, tree))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError(NO_PARAMS_MSG)
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
