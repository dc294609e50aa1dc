"""Schedules of sparsity for magnitude pruning during training.

A schedule is a function from the number of steps done to the share of weights to prune,
as optax's schedules are: it can be called inside a compiled step.
"""

import jax
import jax.numpy as jnp
import optax

from prunadag_optax import _validation


def cubic_sparsity(
    final: float, *, begin: int, end: int, initial: float = 0.0
) -> optax.Schedule:
    r"""The sparsity schedule of gradual magnitude pruning.

    .. math:: \sigma_t = \sigma_f + (\sigma_i - \sigma_f)
       \left(1 - \frac{t - t_0}{t_1 - t_0}\right)^3, \quad t_0 \le t \le t_1

    Args:
      final: sigma_f in [0, 1], the share pruned from step `end` on.
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
    _validation.check_scalar("final", final, least=0, most=1)
    _validation.check_scalar("initial", initial, least=0, most=final)
    _validation.check_scalar("begin", begin, least=0)
    _validation.check_scalar("end", end, above=begin)
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
    _validation.check_scalar("sparsity", sparsity, least=0, most=1)
    _validation.check_scalar("step", step, least=0)

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        return jnp.where(jnp.asarray(count) >= step, sparsity, 0.0)

    return schedule
