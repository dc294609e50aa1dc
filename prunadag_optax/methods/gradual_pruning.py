"""Magnitude pruning during training: schedules of sparsity, and an optimizer on them.

A schedule is a function from the number of steps done to the share of weights to prune,
as optax's schedules are: it can be called inside a compiled step.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from prunadag_optax import masks
from prunadag_optax._common import checks


class GradualPruningState(NamedTuple):
    """State of `gradual_pruning`: a counter, the mask held, and the base's state."""

    # The iterations done, shape=(), dtype=int32. optax's states have the same name.
    count: jax.typing.ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride]
    mask: Any  # bool, shapes of params; None for leaves that are not prunable
    base: optax.OptState


def gradual_pruning(
    base: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    every: int = 1,
    scope: str = "global",
    where: masks.Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Gradual magnitude pruning: any optimizer, on ever fewer weights.

    .. math::
       m_k &= \text{the mask of } |x_k| \text{ that prunes the share } \sigma_k
       \text{, what } m_{k-1} \text{ prunes first} \\
       x_{k+1} &= m_k \odot (x_k + u_k), \quad u_k = \text{base}(m_k \odot g_k)

    with sigma_k the schedule. A pruned weight never returns. The base sees zero
    gradients where weights are pruned, so they stay out of norms and moments that it
    may compute over the whole tree.

    Args:
      base: the optimizer.
      schedule: function count -> sparsity in [0, 1], such as `cubic_sparsity`. Where it
        falls, nothing is undone.
      every: number of steps from one change of the mask to the next, the first change
        at the first step.
      scope: "global" ranks all prunable leaves together; "leaf" prunes the share of
        each.
      where: predicate (path, leaf) -> bool, False for leaves never to prune, such as
        biases; None: all leaves.

    Returns:
      An `optax.GradientTransformationExtraArgs` with `GradualPruningState`. Its
      `update` needs `params`, hands extra arguments to the base, and returns updates in
      the parameters' dtypes. A weight that stays moves exactly as the base moves it.

    Raises:
      ValueError: for an argument out of range, by name; from `init` and `update` for
        leaves that are not real floats, for trees that do not match, and without
        `params`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from prunadag_optax.methods import gradual_pruning as gradual
      >>> loss = lambda x: jnp.sum((x - jnp.array([3.0, 0.1, 0.2, -2.0])) ** 2) / 2
      >>> schedule = gradual.cubic_sparsity(0.5, begin=0, end=10)
      >>> tx = gradual.gradual_pruning(optax.sgd(0.5), schedule)
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
    checks.scalar("every", every, least=1)
    checks.choice("scope", scope, ("global", "leaf"))
    if not callable(schedule):
        raise ValueError(
            "schedule must be a function count -> sparsity, such as "
            f"cubic_sparsity(0.9, begin=0, end=1000); got {schedule!r}."
        )
    extended = optax.with_extra_args_support(base)

    def mask_at(params, sparsity, held):
        return masks.magnitude_mask(
            params, sparsity, scope=scope, where=where, previous=held
        )

    # With a name: outside jit a new function would be compiled in every step.
    def held_at(params, sparsity, held):
        del params, sparsity
        return held

    def init_fn(params: optax.Params) -> Any:
        checks.real_leaves("params", params)
        return GradualPruningState(
            jnp.zeros([], jnp.int32), _dense(params, where), extended.init(params)
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> Any:
        if params is None:
            raise ValueError(checks.NO_PARAMS_MSG)
        checks.real_leaves("params", params)
        checks.real_leaves("updates", updates)
        checks.same_trees("updates", updates, "params", params)
        sparsity = jnp.asarray(schedule(state.count), jnp.float32)
        mask = jax.lax.cond(
            jnp.asarray(state.count) % every == 0,
            mask_at,
            held_at,
            params,
            sparsity,
            state.mask,
        )
        steps, inner = extended.update(
            masks.apply_mask(updates, mask), state.base, params, **extra_args
        )
        steps = jax.tree.map(lambda u, x: u.astype(jnp.result_type(x)), steps, params)
        # x + (-x) is exactly zero; a weight that stays takes the base's own step.
        held, _ = masks.keep_pruned(mask).update(
            steps, masks.KeepPrunedState(mask), params
        )
        count = optax.safe_increment(state.count)
        return held, GradualPruningState(count, mask, inner)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _dense(params: Any, where: masks.Where | None) -> Any:
    """The mask that keeps everything, None for leaves that are not prunable."""

    def leaf(path, x):
        if where is not None and not where(path, x):
            return None
        return jnp.ones_like(x, bool)  # sharded as x

    return jax.tree_util.tree_map_with_path(leaf, params)


def cubic_sparsity(
    final: chex.Numeric, *, begin: int, end: int, initial: float = 0.0
) -> optax.Schedule:
    r"""The sparsity schedule of gradual magnitude pruning.

    .. math:: \sigma_t = \sigma_f + (\sigma_i - \sigma_f)
       \left(1 - \frac{t - t_0}{t_1 - t_0}\right)^3, \quad t_0 \le t \le t_1

    Args:
      final: sigma_f in [0, 1], the share pruned from step `end` on. A scalar array may
        be traced.
      begin: t_0 >= 0, the step at which pruning starts.
      end: t_1 > t_0, the step at which it ends.
      initial: sigma_i in [0, `final`], the share pruned until `begin`.

    Returns:
      Schedule count -> sparsity.

    Raises:
      ValueError: for an argument out of range.

    Examples:
      >>> from prunadag_optax.methods import gradual_pruning
      >>> schedule = gradual_pruning.cubic_sparsity(0.8, begin=10, end=20)
      >>> [round(float(schedule(step)), 2) for step in (0, 10, 15, 20, 30)]
      [0.0, 0.0, 0.7, 0.8, 0.8]

    References:
      M. Zhu, S. Gupta, To prune, or not to prune, arXiv:1710.01878, equation (1).
    """
    checks.scalar("final", final, least=0, most=1)
    most: Any = 1 if checks.is_scalar_array(final) else final
    checks.scalar("initial", initial, least=0, most=most)
    checks.scalar("begin", begin, least=0)
    checks.scalar("end", end, above=begin)
    cubic = optax.polynomial_schedule(
        init_value=initial,
        end_value=final,
        power=3,
        transition_begin=begin,
        transition_steps=end - begin,
    )
    # Signed: an unsigned count minus `begin` would wrap.
    return lambda count: cubic(jnp.asarray(count, jnp.int32))


def one_shot_sparsity(sparsity: float, *, step: int) -> optax.Schedule:
    r"""The schedule that prunes once.

    .. math:: \sigma_t = \sigma \text{ for } t \ge t_0, \text{ else } 0

    Args:
      sparsity: sigma in [0, 1].
      step: t_0 >= 0, the step from which the weights are pruned.

    Returns:
      Schedule count -> sparsity.

    Raises:
      ValueError: for an argument out of range.

    Examples:
      >>> from prunadag_optax.methods import gradual_pruning
      >>> schedule = gradual_pruning.one_shot_sparsity(0.5, step=10)
      >>> [float(schedule(step)) for step in (9, 10)]
      [0.0, 0.5]
    """
    checks.scalar("sparsity", sparsity, least=0, most=1)
    checks.scalar("step", step, least=0)

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        return jnp.where(jnp.asarray(count) >= step, sparsity, 0.0)

    return schedule
