"""Gradual magnitude pruning: any optimizer, on ever fewer weights.

How many weights are kept is a schedule, such as those of `schedules`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from prunadag_optax import masks
from prunadag_optax._common import checks
from prunadag_optax._common.transformation import checked


class GradualPruningState(NamedTuple):
    """State of `gradual_magnitude_pruning`."""

    # The iterations done, shape=(), dtype=int32. optax's states have the same name.
    count: jax.typing.ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride]
    mask: Any  # held; bool, shapes of params; None for leaves that are not prunable
    base: optax.OptState  # of the optimizer whose steps are taken


def gradual_magnitude_pruning(
    base: optax.GradientTransformation,
    density: optax.Schedule,
    *,
    every: int = 1,
    scope: masks.Scope = "global",
    where: masks.Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Gradual magnitude pruning: any optimizer, on ever fewer weights.

    .. math::
       m_k &= \text{the mask of } |x_k| \text{ that keeps the share } f_k
       \text{, what } m_{k-1} \text{ prunes goes first} \\
       x_{k+1} &= m_k \odot (x_k + u_k), \quad u_k = \text{base}(m_k \odot g_k)

    with f_k the schedule. A pruned weight never returns. The base sees zero
    gradients where weights are pruned, so they stay out of norms and moments that it
    may compute over the whole tree.

    Args:
      base: the optimizer.
      density: schedule count -> share of the prunable weights to keep, in (0, 1], such
        as `schedules.cubic_density`. Where it rises, nothing is undone.
      every: number of steps from one change of the mask to the next, the first change
        at the first step.
      scope: "global" ranks all prunable leaves together; "leaf" keeps the share of
        each.
      where: predicate (path, leaf) -> bool, False for leaves never to prune; None:
        `masks.prunable`.

    Returns:
      An `optax.GradientTransformationExtraArgs` with `GradualPruningState`. Its
      `update` needs `params`, hands extra arguments to the base, and returns updates in
      the parameters' dtypes. A weight that stays moves exactly as the base moves it.

    Raises:
      ValueError: naming an argument out of range, or trees that do not match.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from prunadag_optax import schedules
      >>> from prunadag_optax.methods.gradual_pruning import gradual_magnitude_pruning
      >>> loss = lambda x: jnp.sum((x - jnp.array([3.0, 0.1, 0.2, -2.0])) ** 2) / 2
      >>> density = schedules.cubic_density(0.5, begin=0, end=10)
      >>> tx = gradual_magnitude_pruning(optax.sgd(0.5), density)
      >>> x = jnp.zeros(4)
      >>> state, update = tx.init(x), jax.jit(tx.update)
      >>> for _ in range(20):
      ...     updates, state = update(jax.grad(loss)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> [round(value, 3) for value in x.tolist()]
      [3.0, 0.0, 0.0, -2.0]

    References:
      M. Zhu, S. Gupta, To prune, or not to prune, arXiv:1710.01878, section 3.
    """
    checks.integer("every", every, least=1)
    checks.scope(scope)
    if not callable(density):
        raise ValueError(
            "density must be a schedule count -> share kept, such as "
            f"schedules.cubic_density(0.1, begin=0, end=1000); got {density!r}."
        )
    checks.transformation("base", base)
    extended = optax.with_extra_args_support(base)
    where = where or masks.prunable

    def init(params: optax.Params) -> GradualPruningState:
        start = jnp.zeros([], jnp.int32)
        mask = masks.magnitude_mask(params, 0.0, scope=scope, where=where)
        return GradualPruningState(start, mask, extended.init(params))

    def update(updates, state, params, **extra_args):
        mask = masks.mask_on_schedule(
            params,
            state.mask,
            state.count,
            density,
            every=every,
            scope=scope,
            where=where,
        )
        steps, inner = extended.update(
            masks.apply_mask(updates, mask), state.base, params, **extra_args
        )
        # x + (-x) is exactly zero; a weight that stays takes the base's own step.
        held, _ = masks.keep_pruned(mask).update(
            steps, masks.KeepPrunedState(mask), params
        )
        count = optax.safe_increment(state.count)
        return held, GradualPruningState(count, mask, inner)

    return checked(init, update)
