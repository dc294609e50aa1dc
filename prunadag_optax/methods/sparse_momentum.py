"""Global sparse momentum: the weights that matter least only decay.

Momentum SGD in which a few weights get their gradient, those with the largest
first-order influence on the loss, chosen anew at every step. All others get weight
decay alone, and momentum carries them to zero; when training ends they can be cut off
without loss. How many there are to be is chosen before training, for all layers
together.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from prunadag_optax._common import checks
from prunadag_optax._common.dtypes import cast_like
from prunadag_optax._common.leaves import Where, ranked_together
from prunadag_optax._common.transformation import checked
from prunadag_optax._core.variants import scores_of
from prunadag_optax._ranking.counts import one_in
from prunadag_optax._ranking.threshold import at_least_kth


class ActiveGradientsState(NamedTuple):
    """State of `active_gradients`: where the next search begins, for its speed."""

    threshold_hint: jax.Array  # the Q-th largest score, shape=(), dtype=float32


def active_gradients(
    compression: chex.Numeric, *, where: Where | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Passes the gradients of the weights with the largest scores, and no others.

    .. math::
      B_i = \begin{cases} 1 & |g_i x_i| \ge \tau \\ 0 & \text{else} \end{cases}, \quad
      \tau = \text{the } Q\text{-th largest } |g_i x_i|, \quad
      Q = \lfloor n / C \rfloor

    The score is how much the loss changes, to first order, when the weight is set to
    zero. Weights whose scores tie with the Q-th largest are all active; where fewer
    than Q scores are positive, all are.

    Args:
      compression: C >= 1, the number of prunable weights for each that stays. A scalar
        array may be traced; float32 then bounds how exact Q is.
      where: predicate (path, leaf) -> bool, True for the prunable leaves, which are
        ranked together; the gradients of the others pass. None: `masks.prunable`.

    Returns:
      An `optax.GradientTransformationExtraArgs` with `ActiveGradientsState`. Its
      `update` needs `params`.

    Raises:
      ValueError: naming an argument out of range, or trees that do not match.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax.methods import sparse_momentum
      >>> tx = sparse_momentum.active_gradients(2)
      >>> x, g = jnp.array([[1.0, 2.0, 0.1, -4.0]]), jnp.array([[1.0, -1.0, 8.0, 0.1]])
      >>> tx.update(g, tx.init(x), x)[0]
      Array([[ 1., -1.,  0.,  0.]], dtype=float32)

    References:
      X. Ding et al., Global sparse momentum SGD for pruning very deep neural networks,
      NeurIPS 2019, equations (6)-(8).
    """
    checks.scalar("compression", compression, least=1)

    def init(params: optax.Params) -> ActiveGradientsState:
        del params
        return ActiveGradientsState(jnp.zeros((), jnp.float32))

    def update(updates, state, params, **extra_args):
        del extra_args
        gradients, treedef = jax.tree.flatten(updates)
        scores = jax.tree.leaves(scores_of("taylor")(updates, params))
        [prunable] = ranked_together(params, where)
        size = sum(scores[i].size for i in prunable)
        if not size:
            return updates, state
        active, last = at_least_kth(
            [scores[i] for i in prunable],
            [one_in(compression, size)],
            state.threshold_hint,
        )
        for i, kept in zip(prunable, active, strict=True):
            gradients[i] = jnp.where(kept, gradients[i], 0)
        return treedef.unflatten(gradients), ActiveGradientsState(last)

    return checked(init, update)


def gsm(
    learning_rate: optax.ScalarOrSchedule,
    compression: chex.Numeric,
    momentum: chex.Numeric = 0.98,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    *,
    nesterov: bool = False,
    where: Where | None = None,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Global sparse momentum SGD (GSM): momentum SGD with few gradients.

    .. math::
      z_{t+1} &= \beta z_t + \eta x_t + B_t \circ g_t \\
      x_{t+1} &= x_t - \alpha z_{t+1}

    with B as in `active_gradients`: 1 for the n/C weights with the largest |g x|. A
    weight that stays passive shrinks like :math:`e^{-\alpha \eta t / (1 - \beta)}`, so
    the method wants a long momentum, a weight decay that is not zero, and training of
    a length to match. It starts from a trained network; afterwards
    `masks.prune(params, 1 - 1 / C)` cuts the small weights off. With C = 1 it is
    momentum SGD.

    Args:
      learning_rate: alpha >= 0, number or schedule count -> value.
      compression: C >= 1, the number of prunable weights for each that stays.
      momentum: beta in [0, 1); 0.98 for residual networks, 0.99 for LeNets.
      weight_decay: eta >= 0, number or schedule count -> value, in the gradient of
        every weight, prunable or not; 1e-4 for residual networks, 5e-4 for LeNets.
      nesterov: whether to step along :math:`\eta x + B \circ g + \beta z_{t+1}`.
      where: predicate (path, leaf) -> bool, True for the prunable leaves; the others
        are trained by momentum SGD. None: `masks.prunable`.
      accumulator_dtype: dtype of z, as a `jnp.dtype` or a name; None keeps the
        parameters'. Use "float32" for half-precision parameters.

    Returns:
      An `optax.GradientTransformationExtraArgs`. Its `update` needs `params` and
      returns updates in the parameters' dtypes.

    Raises:
      ValueError: naming an argument out of range, or trees that do not match.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from prunadag_optax import masks
      >>> from prunadag_optax.methods import sparse_momentum
      >>> target = jnp.array([[2.0, 0.1], [0.05, -3.0]])
      >>> loss = lambda x: jnp.sum((x - target) ** 2) / 2
      >>> tx = sparse_momentum.gsm(0.1, 2, momentum=0.9, weight_decay=0.05)
      >>> x = target
      >>> state = tx.init(x)
      >>> for _ in range(300):
      ...     updates, state = tx.update(jax.grad(loss)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> pruned, mask = masks.prune(x, 1 - 1 / 2)
      >>> mask.tolist()
      [[True, False], [False, True]]

    References:
      Ding et al. (2019), equations (6)-(8), algorithm 1.
    """
    checks.scalar_or_schedule("learning_rate", learning_rate, least=0)
    checks.scalar("momentum", momentum, least=0, below=1)
    checks.scalar_or_schedule("weight_decay", weight_decay, least=0)
    checks.dtype("accumulator_dtype", accumulator_dtype)
    return optax.chain(
        active_gradients(compression, where=where),
        optax.add_decayed_weights(weight_decay),
        optax.sgd(learning_rate, momentum, nesterov, accumulator_dtype),
        # An accumulator or a traced number of more precision makes updates of more.
        optax.stateless(cast_like),
    )
