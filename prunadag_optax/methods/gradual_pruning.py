"""Gradual magnitude pruning: any optimizer, on ever fewer weights.

How many weights are kept is a schedule, such as those of `schedules`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from prunadag_optax import masks
from prunadag_optax._common import checks
from prunadag_optax._common.dtypes import working
from prunadag_optax._common.transformation import checked


class GradualPruningState(NamedTuple):
    """State of `gradual_magnitude_pruning`."""

    # The iterations done, shape=(), dtype=int32. optax's states have the same name.
    count: jax.typing.ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride]
    mask: Any  # held; bool or packed, as params; None where a leaf is not prunable
    base: optax.OptState  # of the optimizer whose steps are taken
    gradients: Any  # their sums since the last change, for "saliency"; else None


def gradual_magnitude_pruning(
    base: optax.GradientTransformation,
    density: optax.Schedule,
    *,
    every: int = 1,
    scope: masks.Scope = "global",
    where: masks.Where | None = None,
    score: masks.Score = "magnitude",
    layer_budget: masks.Budget = "global",
    n_m: str | None = None,
    block: masks.Block | None = None,
    pooling: str = "average",
    packed: bool = False,
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
      score: what is ranked, as in `masks.magnitude_mask`; or "saliency", the magnitude
        of the weight times the gradients summed since the last change of the mask.
      layer_budget: how many each leaf keeps, as in `masks.magnitude_mask`.
      n_m: an N:M pattern such as "2:4" in place of the ranking: of every M weights that
        a layer contracts max(N, round(f_k M)) are kept.
      block: blocks or channels that are pruned as one, as in `masks.block_mask`.
      pooling: as in `masks.block_mask`.
      packed: whether the state has one bit a weight for the mask, and not a byte. Not
        for sharded parameters.

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
    saliency = isinstance(score, str) and score == "saliency"

    def init(params: optax.Params) -> GradualPruningState:
        start = jnp.zeros([], jnp.int32)
        mask = masks.magnitude_mask(params, 0.0, scope=scope, where=where)
        mask = masks.pack(mask) if packed else mask
        sums = jax.tree.map(_sum_of, params) if saliency else None
        return GradualPruningState(start, mask, extended.init(params), sums)

    def update(updates, state, params, **extra_args):
        sums = state.gradients
        scores = score
        if saliency:
            sums = jax.tree.map(lambda total, g: total + g, sums, updates)
            scores = jax.tree.map(lambda x, total: working(x) * total, params, sums)
        mask = masks.mask_on_schedule(
            params,
            state.mask,
            state.count,
            density,
            every=every,
            scope=scope,
            where=where,
            score=scores,
            layer_budget=layer_budget,
            n_m=n_m,
            block=block,
            pooling=pooling,
        )
        if saliency:
            due = state.count % every == 0
            sums = jax.tree.map(lambda total: jnp.where(due, 0, total), sums)
        kept = masks.unpack(mask)
        steps, inner = extended.update(
            masks.apply_mask(updates, kept), state.base, params, **extra_args
        )
        # x + (-x) is exactly zero; a weight that stays takes the base's own step.
        held, _ = masks.keep_pruned(kept).update(
            steps, masks.KeepPrunedState(kept), params
        )
        count = optax.safe_increment(state.count)
        return held, GradualPruningState(count, mask, inner, sums)

    return checked(init, update)


def _sum_of(x: jax.Array) -> jax.Array:
    return jnp.zeros_like(working(x))
