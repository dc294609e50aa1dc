"""What the Flax helpers share: pruning again, and pruning on a schedule."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from prunadag_optax import masks
from prunadag_optax._common import checks


def check_not_lower(
    params: Any, sparsity: Any, held: Any, scope: str, where: masks.Where | None
) -> None:
    """Raises a ValueError if less is to be pruned than is pruned already.

    Args:
      params: pytree of parameters.
      sparsity: share to prune. An array is not looked at: it may be traced.
      held: the masks held, or None.
      scope: "global" or "leaf".
      where: predicate (path, leaf) -> bool for the leaves to prune; None: all.

    Raises:
      ValueError: naming both sparsities.
    """
    if held is None or checks.is_scalar_array(sparsity):
        return
    checks.scalar("sparsity", sparsity, least=0, most=1)
    checks.mask(held, params)
    paths_leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    chosen = [
        (leaf.size, mask)
        for (path, leaf), mask in zip(
            paths_leaves, treedef.flatten_up_to(held), strict=True
        )
        if where is None or where(path, leaf)
    ]
    if any(isinstance(mask, Tracer) for _, mask in chosen):
        return
    sizes = [size for size, _ in chosen]
    groups = [sum(sizes)] if scope == "global" else sizes
    wanted = sum(round(float(sparsity) * size) for size in groups)
    pruned = sum(size - int(mask.sum()) for size, mask in chosen if mask is not None)
    if wanted < pruned:
        raise ValueError(
            f"sparsity must be at least {pruned / sum(sizes):.6g}, what is pruned "
            f"already; got {sparsity!r}. Pruned weights are gone: go back to a "
            "checkpoint from before pruning."
        )


def check_same_choice(new: Any, held: Any) -> None:
    """Raises a ValueError unless new masks are for the leaves that have masks.

    Args:
      new: pytree of masks, or of their shapes.
      held: pytree of the masks held.

    Raises:
      ValueError: naming both structures.
    """
    structure, held_structure = jax.tree.structure(new), jax.tree.structure(held)
    if structure != held_structure:
        raise ValueError(
            "where must choose the parameters that have masks already; got masks for "
            f"{structure}, held are {held_structure}. Make new masks with `prune`."
        )


def where_held(where: masks.Where | None, held: Any) -> masks.Where | None:
    """The predicate to prune again with: as given, else the leaves that have masks.

    Args:
      where: predicate (path, leaf) -> bool, or None.
      held: the masks held, or None.

    Returns:
      A predicate, or None where both are None.
    """
    if where is not None or held is None:
        return where
    paths = {path for path, _ in jax.tree_util.tree_leaves_with_path(held)}
    return lambda path, leaf: path in paths


def masks_on_schedule(
    params: Any,
    held: Any,
    step: Any,
    schedule: optax.Schedule,
    *,
    every: int,
    scope: str,
    where: masks.Where | None,
) -> tuple[Any, Any]:
    """Parameters and masks after pruning to `schedule(step)`, if it is the time to.

    Args:
      params: pytree of parameters.
      held: the masks held, or None for masks that keep everything.
      step: number of steps done, may be traced.
      schedule: function step -> sparsity.
      every: number of steps from one change of the masks to the next.
      scope: "global" or "leaf".
      where: predicate (path, leaf) -> bool.

    Returns:
      The parameters and the masks.

    Raises:
      ValueError: if `every` is not at least 1.
    """
    checks.scalar("every", every, least=1)
    where = where_held(where, held)
    if held is None:
        held = masks.magnitude_mask(params, 0.0, scope=scope, where=where)

    check_same_choice(
        jax.eval_shape(
            lambda tree: masks.magnitude_mask(tree, 0.0, scope=scope, where=where),
            params,
        ),
        held,
    )
    # Signed: nnx.Optimizer counts in uint32, where a schedule's step - begin wraps.
    step = jnp.asarray(step, jnp.int32)

    def pruned(params, held):
        sparsity = jnp.asarray(schedule(step), jnp.float32)
        return masks.prune(params, sparsity, scope=scope, where=where, previous=held)

    def unchanged(params, held):
        return params, held

    return jax.lax.cond(step % every == 0, pruned, unchanged, params, held)
