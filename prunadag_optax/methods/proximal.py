"""Proximal optimizers: a smooth step, then the proximal operator in its metric.

`proxgen` makes one from any optax transformation that preconditions gradients;
`prox_adam` and `prox_sgd` are those of Adam and of gradient descent. The operators on
arrays and the regularisers of parameter trees have modules of their own and are found
here, too.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from prunadag_optax._common import checks
from prunadag_optax._common.dtypes import value_at, working
from prunadag_optax.methods.penalties.operators import (
    prox_group_lasso as prox_group_lasso,
)
from prunadag_optax.methods.penalties.operators import prox_group_mcp as prox_group_mcp
from prunadag_optax.methods.penalties.operators import prox_k_support as prox_k_support
from prunadag_optax.methods.penalties.operators import prox_l1 as prox_l1
from prunadag_optax.methods.penalties.operators import prox_nuclear as prox_nuclear
from prunadag_optax.methods.penalties.operators import (
    weighted_prox_group_lasso as weighted_prox_group_lasso,
)
from prunadag_optax.methods.penalties.operators import (
    weighted_prox_group_mcp as weighted_prox_group_mcp,
)
from prunadag_optax.methods.penalties.operators import (
    weighted_prox_l1 as weighted_prox_l1,
)
from prunadag_optax.methods.penalties.regularisers import Regulariser as Regulariser
from prunadag_optax.methods.penalties.regularisers import group_lasso as group_lasso
from prunadag_optax.methods.penalties.regularisers import group_mcp as group_mcp
from prunadag_optax.methods.penalties.regularisers import (
    group_sparsity as group_sparsity,
)
from prunadag_optax.methods.penalties.regularisers import is_kernel as is_kernel
from prunadag_optax.methods.penalties.regularisers import k_support as k_support
from prunadag_optax.methods.penalties.regularisers import l1 as l1
from prunadag_optax.methods.penalties.regularisers import nuclear as nuclear
from prunadag_optax.methods.penalties.regularisers import weighted_prox as weighted_prox
from prunadag_optax.methods.penalties.regularisers import zero as zero


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
      regulariser: R, see `Regulariser`. One without a weighted operator is solved by
        proximal-gradient steps, see `weighted_prox`.
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
      ValueError: for an argument out of range, by name; from `init` and `update` for
        leaves that are not real floats, for trees that do not match, and without
        `params`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from prunadag_optax.methods import proximal
      >>> tx = proximal.proxgen(
      ...     0.5,
      ...     proximal.l1(0.5),
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
    if direction is None:
        return prox_adam(
            learning_rate,
            regulariser,
            weight_decay=weight_decay,
            relaxation=relaxation,
        )
    check_regulariser(regulariser)
    if not callable(learning_rate):
        checks.scalar("learning_rate", learning_rate, least=0)
    if not (relaxation is None or callable(relaxation)):
        checks.scalar("relaxation", relaxation, above=0, most=1)
    checks.scalar("weight_decay", weight_decay, least=0)

    def init_fn(params: optax.Params) -> Any:
        checks.real_leaves("params", params)
        point = None if relaxation is None else copy(params)
        inner = direction.init(jax.tree.map(_wide, params))
        return ProxState(jnp.zeros([], jnp.int32), inner, point)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> Any:
        del extra_args
        if params is None:
            raise ValueError(checks.NO_PARAMS_MSG)
        checks.real_leaves("params", params)
        checks.real_leaves("updates", updates)
        checks.same_trees("updates", updates, "params", params)
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
            point = jax.tree.map(lambda z, x: z.astype(jnp.result_type(x)), z, params)
        step = jax.tree.map(lambda s, x: s.astype(jnp.result_type(x)), step, params)
        return step, ProxState(optax.safe_increment(state.count), inner, point)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


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
      An `optax.GradientTransformationExtraArgs` with `ProxState`, see `proxgen`.

    Raises:
      ValueError: for an argument out of range; see `proxgen`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from prunadag_optax.methods import proximal
      >>> target = jnp.array([[2.0, -2.0], [0.05, 0.0]])
      >>> loss = lambda x: jnp.sum((x - target) ** 2)
      >>> tx = proximal.prox_adam(0.1, proximal.group_lasso(0.2))
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
      An `optax.GradientTransformationExtraArgs` with `ProxState`, see `proxgen`.

    Raises:
      ValueError: for an argument out of range; see `proxgen`.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from prunadag_optax.methods import proximal
      >>> tx = proximal.prox_sgd(0.5, proximal.l1(1.0))
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


def check_regulariser(regulariser: Any) -> None:
    """Raises a ValueError unless it is a `Regulariser`.

    Args:
      regulariser: what was given.

    Raises:
      ValueError: naming the value and what is allowed.
    """
    if not isinstance(regulariser, Regulariser):
        raise ValueError(
            "regulariser must be a Regulariser, such as proximal.group_lasso(1e-3); "
            f"got {regulariser!r}."
        )


def copy(params: optax.Params) -> Any:
    """Parameters for a state; without a copy, donating it would delete the caller's.

    Args:
      params: pytree of arrays, or of their shapes and dtypes.

    Returns:
      Pytree of arrays like `params`; zeros where only a shape is given.
    """

    def leaf(x):
        is_shape = isinstance(x, jax.ShapeDtypeStruct)
        return jnp.zeros_like(x) if is_shape else jnp.array(x)

    return jax.tree.map(leaf, params)


def _wide(x: Any) -> Any:
    """An array in working precision, or the shape of one."""
    if isinstance(x, jax.ShapeDtypeStruct):
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)
    return working(x)


def _to_point(x: jax.Array, step: jax.Array, half: jax.Array, z: jax.Array):
    """The step from x to z: exactly -x if z = 0, exactly `step` if z = x + step."""
    return jnp.where(z == 0, -x, step + (z - half))
