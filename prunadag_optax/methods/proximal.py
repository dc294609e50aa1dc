"""Proximal optimizers: a smooth step, then the proximal operator in its metric.

`proxgen` makes one from any optax transformation that preconditions gradients;
`prox_adam` and `prox_sgd` are those of Adam and of gradient descent. The penalties are
in `prunadag_optax.methods.penalties`: regularisers of parameter trees, and proximal
operators on arrays.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from prunadag_optax._common import checks
from prunadag_optax._common.dtypes import cast_like, value_at, working
from prunadag_optax._common.transformation import checked
from prunadag_optax.methods.penalties.regularisers import (
    Regulariser,
    check_regulariser,
    weighted_prox,
)


class ProxState(NamedTuple):
    """State of `proxgen`, `prox_adam` and `prox_sgd`."""

    # The iterations done, shape=(), dtype=int32. optax's states have the same name.
    count: jax.typing.ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride]
    direction: Any  # state of the direction, in at least float32
    # The proximal point of the last step, shapes and dtypes of params, where steps
    # lead only part of the way to it: that is where the exact zeros are. Else None.
    proximal_point: optax.Params | None


def proxgen(
    learning_rate: optax.ScalarOrSchedule,
    regulariser: Regulariser,
    *,
    direction: optax.GradientTransformation | None = None,
    metric: Callable[[Any], Any] | None = None,
    weight_decay: chex.Numeric = 0.0,
    relaxation: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""ProxGen: any preconditioned method, made proximal in its own metric.

    .. math::
      \hat x_k &= \arg\min_z \langle m_k, z \rangle
      + \frac{1}{2 \eta_k} (z - x_k)^T D_k (z - x_k) + R(z) \\
      &= \mathrm{prox}^{D_k}_{\eta_k R}
      \bigl( x_k - \eta_k (D_k^{-1} m_k + w x_k) \bigr), \quad
      x_{k+1} = x_k + \epsilon_k (\hat x_k - x_k)

    with decoupled weight decay w. Without a penalty it is the method that `direction`
    and the learning rate make, to the bit.

    Args:
      learning_rate: eta >= 0, number or schedule count -> value.
      regulariser: R, a `Regulariser`. One without a closed form in the metric is solved
        by proximal-gradient steps, see `regularisers.weighted_prox`.
      direction: optax transformation whose updates are D^-1 m, such as
        `optax.scale_by_rms()`; None is `optax.scale_by_adam()`. Its state is held in at
        least float32.
      metric: function from the state of `direction` after an update to D, a pytree like
        the parameters; None is D = 1, and Adam's if `direction` is None.
      weight_decay: w >= 0.
      relaxation: epsilon in (0, 1], number or schedule count -> value; None is 1. With
        one the exact zeros of x-hat are only in the state's `proximal_point`.

    Returns:
      An `optax.GradientTransformationExtraArgs` with `ProxState`. Its `update` needs
      `params` and returns updates in the parameters' dtypes; where the new parameter is
      zero it is exactly so.

    Raises:
      ValueError: naming the argument or the leaf that is not as it has to be.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from prunadag_optax.methods import proximal
      >>> from prunadag_optax.methods.penalties import regularisers
      >>> tx = proximal.proxgen(
      ...     0.5,
      ...     regularisers.l1(0.5),
      ...     direction=optax.scale_by_rss(),
      ...     metric=lambda state: jax.tree.map(jnp.sqrt, state.sum_of_squares),
      ... )
      >>> x = jnp.array([1.0, 0.1])
      >>> updates, _ = tx.update(jnp.array([0.0, 0.01]), tx.init(x), x)
      >>> float(optax.apply_updates(x, updates)[1])
      0.0

    References:
      J. Yun, A. C. Lozano, E. Yang, Adaptive proximal gradient methods for structured
      neural networks, NeurIPS 2021, algorithm 1. Relaxation: Y. Yang, Y. Yuan,
      A. Chatzimichailidis, R. J. G. van Sloun, L. Lei, S. Chatzinotas, ProxSGD:
      training structured neural networks under regularization and constraints, ICLR
      2020, algorithm 1.
    """
    if metric is not None:
        checks.function("metric", metric, "state of direction")
    if direction is None:
        return prox_adam(
            learning_rate,
            regulariser,
            weight_decay=weight_decay,
            relaxation=relaxation,
        )
    check_regulariser(regulariser)
    checks.scalar_or_schedule("learning_rate", learning_rate, least=0)
    if relaxation is not None:
        checks.scalar_or_schedule("relaxation", relaxation, above=0, most=1)
    checks.scalar("weight_decay", weight_decay, least=0)
    checks.transformation("direction", direction)

    def init(params: optax.Params) -> ProxState:
        # A copy: a donated state must not hold the caller's parameters.
        point = None if relaxation is None else jax.tree.map(jnp.array, params)
        inner = direction.init(jax.tree.map(working, params))
        return ProxState(jnp.zeros([], jnp.int32), inner, point)

    def update(updates, state, params, **_):
        rate, share = (value_at(f, state.count) for f in (learning_rate, relaxation))
        x = jax.tree.map(working, params)
        smooth, inner = direction.update(
            jax.tree.map(working, updates), state.direction, x
        )
        # In the order of optax's own chains, so that the sums round alike.
        step = jax.tree.map(lambda u, x: -rate * (u + weight_decay * x), smooth, x)
        half = jax.tree.map(jnp.add, x, step)
        if metric is None:
            z = regulariser.prox(half, rate)
        else:
            z = weighted_prox(regulariser, half, metric(inner), rate)
        step, point = jax.tree.map(_to_point, x, step, half, z), None
        if relaxation is not None:
            step = jax.tree.map(lambda s: share * s, step)
            point = cast_like(z, params)
        return step, ProxState(optax.safe_increment(state.count), inner, point)

    return checked(init, update)


def prox_adam(
    learning_rate: optax.ScalarOrSchedule,
    regulariser: Regulariser,
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    eps: chex.Numeric = 1e-8,
    *,
    weight_decay: chex.Numeric = 0.0,
    corrected_metric: bool = True,
    relaxation: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW with a proximal step in Adam's metric.

    .. math::
      x_{k+1} = \mathrm{prox}^{D_k}_{\eta_k R}
      \bigl( x_k - \eta_k (D_k^{-1} \hat m_k + w x_k) \bigr), \quad
      D_k = \sqrt{\hat v_k} + \epsilon

    with Adam's bias-corrected moments. Weights with small gradients have a small D and
    are thresholded more strongly; those that never had one are zero after the first
    step. Without a penalty it is `optax.adamw`.

    Args:
      learning_rate: eta >= 0, number or schedule count -> value.
      regulariser: R, such as `group_lasso(1e-3)`.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: epsilon >= 0, in the units of a gradient.
      weight_decay: w >= 0, decoupled.
      corrected_metric: whether the metric of the proximal step has the bias-corrected
        second moment that the gradient step has. False is ProxSSI as its authors run
        it, D = sqrt(v) + epsilon there: the first steps threshold up to
        1 / sqrt(1 - b2) times as much.
      relaxation: see `proxgen`.

    Returns:
      What `proxgen` returns; it raises the same errors, too.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from prunadag_optax.methods import proximal
      >>> from prunadag_optax.methods.penalties import regularisers
      >>> target = jnp.array([[2.0, -2.0], [0.05, 0.0]])
      >>> loss = lambda x: jnp.sum((x - target) ** 2)
      >>> tx = proximal.prox_adam(0.1, regularisers.group_lasso(0.2))
      >>> x = jnp.ones((2, 2))
      >>> state = tx.init(x)
      >>> for _ in range(200):
      ...     updates, state = tx.update(jax.grad(loss)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> (x == 0).tolist()
      [[False, False], [True, True]]

    References:
      Yun, Lozano, Yang (2021). T. Deleu, Y. Bengio, Structured sparsity inducing
      adaptive optimizers for deep learning, arXiv:2102.03869 (2021).
    """
    checks.scalar("b1", b1, least=0, below=1)
    checks.scalar("b2", b2, least=0, below=1)
    checks.scalar("eps", eps, least=0)

    def metric(state: optax.ScaleByAdamState) -> Any:
        v = state.nu
        if corrected_metric:
            v = optax.tree.bias_correction(v, b2, state.count)
        return jax.tree.map(lambda v: jnp.sqrt(v) + eps, v)

    return proxgen(
        learning_rate,
        regulariser,
        direction=optax.scale_by_adam(b1, b2, eps),
        metric=metric,
        weight_decay=weight_decay,
        relaxation=relaxation,
    )


def prox_sgd(
    learning_rate: optax.ScalarOrSchedule,
    regulariser: Regulariser,
    momentum: chex.Numeric | None = None,
    *,
    weight_decay: chex.Numeric = 0.0,
    relaxation: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Proximal stochastic gradient descent.

    .. math::
      m_k = \rho m_{k-1} + (1 - \rho) g_k, \quad
      x_{k+1} = \mathrm{prox}_{\eta_k R} (x_k - \eta_k (m_k + w x_k))

    Without a penalty it is `optax.sgd` on an average of gradients, from m = 0 and
    without bias correction. The penalty shrinks what survives in every step, and the
    noise of the gradients keeps moving weights in and out of zero.

    Args:
      learning_rate: eta >= 0, number or schedule count -> value.
      regulariser: R, such as `group_lasso(1e-3)`.
      momentum: rho in [0, 1), or None for m = g.
      weight_decay: w >= 0.
      relaxation: see `proxgen`.

    Returns:
      What `proxgen` returns; it raises the same errors, too.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from prunadag_optax.methods import proximal
      >>> from prunadag_optax.methods.penalties import regularisers
      >>> tx = proximal.prox_sgd(0.5, regularisers.l1(1.0))
      >>> x = jnp.array([1.0, 0.25])
      >>> updates, _ = tx.update(jnp.zeros(2), tx.init(x), x)
      >>> optax.apply_updates(x, updates)
      Array([0.5, 0. ], dtype=float32)

    References:
      Yang et al. (2020), algorithm 1, with the metric 1 / eta.
    """
    direction = optax.identity()
    if momentum is not None:
        checks.scalar("momentum", momentum, least=0, below=1)
        direction = optax.ema(momentum, debias=False)  # pyright: ignore[reportArgumentType]
    return proxgen(
        learning_rate,
        regulariser,
        direction=direction,
        weight_decay=weight_decay,
        relaxation=relaxation,
    )


def _to_point(x: jax.Array, step: jax.Array, half: jax.Array, z: jax.Array):
    """The step from x to z: exactly -x if z = 0, exactly `step` if z = x + step."""
    return jnp.where(z == 0, -x, step + (z - half))
