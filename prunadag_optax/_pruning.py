"""What the Flax helpers share: pruning again, and pruning on a schedule."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from prunadag_optax import _validation, masks

# Sparsities are float32 quotients of counts; the next lower count is further away.
_ROUNDING = 1e-6


def check_not_lower(sparsity: Any, held: Any) -> None:
    """Raises a ValueError if less is to be pruned than is pruned already.

    Args:
      sparsity: share to prune. An array is not looked at: it may be traced.
      held: the masks held, or None.

    Raises:
      ValueError: naming both sparsities.
    """
    if held is None or _validation.is_scalar_array(sparsity):
        return
    _validation.check_scalar("sparsity", sparsity, least=0, most=1)
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(held)):
        return
    size = sum(leaf.size for leaf in jax.tree.leaves(held))
    current = float(masks.sparsity(held))
    if round(sparsity * size) < round(current * size) - _ROUNDING * size:
        raise ValueError(
            f"sparsity must be at least {current:.6g}, what is pruned already; got "
            f"{sparsity!r}. Pruned weights are gone: go back to a checkpoint from "
            "before pruning."
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
    _validation.check_scalar("every", every, least=1)
    where = where_held(where, held)
    if held is None:
        held = masks.magnitude_mask(params, 0.0, scope=scope, where=where)

    # Signed: nnx.Optimizer counts in uint32, where a schedule's step - begin wraps.
    step = jnp.asarray(step, jnp.int32)

    def pruned(params, held):
        sparsity = jnp.asarray(schedule(step), jnp.float32)
        return masks.prune(params, sparsity, scope=scope, where=where, previous=held)

    def unchanged(params, held):
        return params, held

    return jax.lax.cond(step % every == 0, pruned, unchanged, params, held)
