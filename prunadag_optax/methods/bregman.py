"""Linearised Bregman iterations: training that starts sparse and lets weights in.

The gradient steps are taken by a dual variable v, and the parameters are its proximal
point: W = prox(v). A weight is zero until its v, which adds up gradients, exceeds the
regulariser's strength; from then on it moves as in the plain method, without the
shrinkage of proximal gradient descent. `linearised_bregman` does this for the steps of
any optimizer; `linbreg` is the one of SGD and `adabreg` the one of Adam. Instead of a
strength one may give the sparsity to reach, and leave the strength to a `Controller`.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from prunadag_optax import masks
from prunadag_optax._common import checks
from prunadag_optax._common.dtypes import cast_like, value_at, working
from prunadag_optax._common.leaves import Where, chosen
from prunadag_optax._common.transformation import checked
from prunadag_optax.methods.penalties.regularisers import (
    Regulariser,
    check_regulariser,
)


class Controller(NamedTuple):
    r"""Drives the strength of the regulariser so that the sparsity becomes the target.

    Every `every` steps, with S the share of exact zeros in the regularised leaves,

    .. math::
      s \leftarrow \begin{cases}
        s \, (1 + a |S - S^*|) & S < S^* \\ s / (1 + a |S - S^*|) & S > S^*
      \end{cases}, \quad
      a = \alpha \text{ or } \alpha \gamma^{\max(c - 1, 0)}

    within the limits, where c is how often S - S* has changed its sign. Steps exactly
    on the target do not count: below, on it, below is no change; below, on it, above is
    one. With the decay gamma < 1 the strength settles. The dual variable stays as it
    is, so the weights jump when the strength changes, by delta times the change.

    Attributes:
      target: S* in [0, 1].
      every: the number of steps between changes, >= 1.
      acceleration: alpha > 0. While v grows, the sparsity lags behind the target the
        less, the larger it is.
      decay: gamma in (0, 1], 0.95 is usual, or None.
      lower: least strength, > 0.
      upper: largest strength.
      warmup: steps until the first change at the earliest.

    Examples:
      >>> from prunadag_optax.methods import bregman
      >>> from prunadag_optax.methods.penalties import regularisers
      >>> controller = bregman.Controller(target=0.9)
      >>> tx = bregman.linbreg(
      ...     0.1, regularisers.l1(1.0), strength=1e-2, adaptive=controller
      ... )

    References:
      A. Aloradi et al., Adaptive regularization for sparsity control in Bregman-based
      optimizers, arXiv:2605.07892 (2026).
    """

    target: chex.Numeric
    every: chex.Numeric = 50
    acceleration: chex.Numeric = 1.0
    decay: chex.Numeric | None = None
    lower: chex.Numeric = 1e-6
    upper: chex.Numeric = 1e3
    warmup: chex.Numeric = 0


class ControllerState(NamedTuple):
    """What a `Controller` remembers."""

    sparsity: jax.Array  # S when last measured, shape=(), float32; 0 before
    side: jax.Array  # sign of S* - S when it last was not 0, shape=(), int32
    changes: jax.Array  # c, shape=(), int32


class BregmanState(NamedTuple):
    """State of `linearised_bregman`."""

    # The steps done, shape=(), dtype=int32. optax's states have the same name.
    count: jax.typing.ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride]
    dual: optax.Updates  # v, shapes of params, at least float32
    base: optax.OptState  # of the optimizer whose steps v takes
    strength: jax.Array  # s of the next step, of the last with a schedule; shape=()
    controller: ControllerState | None  # None without


def linearised_bregman(
    base: optax.GradientTransformation,
    regulariser: Regulariser,
    *,
    delta: chex.Numeric = 1.0,
    strength: optax.ScalarOrSchedule = 1.0,
    adaptive: Controller | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The linearised Bregman iteration with the steps of any optimizer.

    .. math::
      v_0 &= W_0 / \delta + p, \quad p \in s \, \partial R(W_0) \\
      v_{t+1} &= v_t + u_t \\
      W_{t+1} &= \mathrm{prox}_{\delta s R}(\delta v_{t+1})
        = \arg\min_W \tfrac12 \|W - \delta v_{t+1}\|_2^2 + \delta s R(W)

    with u the update of the base. Without a regulariser and with delta = 1 it is the
    base. The parameters are a function of v: what else changes them, such as a mask
    applied between steps, is undone by the next step. Weight decay belongs into the
    gradient: put `optax.add_decayed_weights` into a chain, ahead of this.

    Args:
      base: the optimizer. It sees gradients and parameters in at least float32.
      regulariser: R, a convex `Regulariser` such as `regularisers.l1(1.0)`.
      delta: > 0, the length of a step of W for one of v.
      strength: s >= 0, a factor on the regulariser: number or schedule count -> value;
        with `adaptive` the number to start from.
      adaptive: the `Controller` that sets s; None: nothing does.

    Returns:
      An `optax.GradientTransformationExtraArgs` with `BregmanState`. Its `update` needs
      `params`, hands extra arguments to the base, and returns updates in the
      parameters' dtypes. Weights that become zero are exactly zero.

    Raises:
      ValueError: for an argument out of range, and for trees that do not match.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from prunadag_optax.methods import bregman
      >>> from prunadag_optax.methods.penalties import regularisers
      >>> loss = lambda x: jnp.sum((x - jnp.array([3.0, 0.1, 0.0, -2.0])) ** 2) / 2
      >>> tx = bregman.linearised_bregman(optax.sgd(0.1), regularisers.l1(1.0))
      >>> x = jnp.zeros(4)
      >>> state = tx.init(x)
      >>> for _ in range(100):
      ...     updates, state = tx.update(jax.grad(loss)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> (x == 0).tolist(), bool(jnp.allclose(x[::3], jnp.array([3.0, -2.0]), 1e-3))
      ([False, True, True, False], True)

    References:
      L. Bungert, T. Roith, D. Tenbrinck, M. Burger, A Bregman learning framework for
      sparse neural networks, JMLR 23(192) (2022) 1-43.
    """
    checks.transformation("base", base)
    check_regulariser(regulariser)
    checks.scalar("delta", delta, above=0)
    checks.scalar_or_schedule("strength", strength, least=0)
    if callable(strength) and adaptive is not None:
        raise ValueError(
            "strength must be a number >= 0 where a Controller changes it; got the "
            f"schedule {strength!r}."
        )
    if adaptive is not None:
        _check_controller(adaptive)
    extended = optax.with_extra_args_support(base)

    def init(params: optax.Params) -> BregmanState:
        x = jax.tree.map(working, params)
        # A copy: an injected strength is in the state of `inject_hyperparams`, too.
        start = jnp.array(
            value_at(strength, jnp.zeros([], jnp.int32)),
            jnp.result_type(jnp.float32, *jax.tree.leaves(x)),
        )
        dual = jax.tree.map(
            lambda x, p: (x / delta + start * p).astype(x.dtype),
            x,
            jax.grad(regulariser.value)(x),
        )
        controller = None
        if adaptive is not None:
            # Three arrays: a donated state must not hold one buffer twice.
            controller = ControllerState(
                jnp.zeros([], jnp.float32),
                jnp.zeros([], jnp.int32),
                jnp.zeros([], jnp.int32),
            )
        return BregmanState(
            jnp.zeros([], jnp.int32), dual, extended.init(x), start, controller
        )

    def update(updates, state, params, **extra_args):
        gradients, x = (jax.tree.map(working, tree) for tree in (updates, params))
        steps, inner = extended.update(gradients, state.base, x, **extra_args)
        dual = jax.tree.map(lambda v, u: v + u.astype(v.dtype), state.dual, steps)
        now = value_at(strength, state.count) if adaptive is None else state.strength
        now = jnp.asarray(now, state.strength.dtype)
        scaled = jax.tree.map(lambda v: (delta * v).astype(v.dtype), dual)
        # In the parameters' dtypes, in which the controller is to count zeros.
        moved = cast_like(regulariser.prox(scaled, delta * now), params)
        count = optax.safe_increment(state.count)
        controller = state.controller
        if adaptive is not None:
            now, controller = _controlled(
                adaptive, count, now, controller, regulariser.covered(moved)
            )
        # Where the new weight is zero this is -x, and x + (-x) is exactly zero.
        moves = jax.tree.map(jnp.subtract, moved, params)
        return moves, BregmanState(count, dual, inner, now, controller)

    return checked(init, update, like_params="dual")


def linbreg(
    learning_rate: optax.ScalarOrSchedule,
    regulariser: Regulariser,
    delta: chex.Numeric = 1.0,
    momentum: chex.Numeric | None = None,
    *,
    strength: optax.ScalarOrSchedule = 1.0,
    adaptive: Controller | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""LinBreg: stochastic gradient descent on the dual variable.

    .. math::
      b_{t+1} &= \mu b_t + (1 - \mu) \tau_t g_t \\
      v_{t+1} &= v_t - b_{t+1}, \quad
      W_{t+1} = \mathrm{prox}_{\delta s R}(\delta v_{t+1})

    For :math:`R = \|W\|_1` the proximal point is soft(delta v, delta s): a weight is
    zero while \|v\| <= s, and moves with the step delta tau from there. Leaves that R
    leaves free are trained by SGD. Start from few weights, see `sparse_init`.

    Args:
      learning_rate: tau >= 0, number or schedule count -> value.
      regulariser: R, a convex `Regulariser`.
      delta: as in `linearised_bregman`.
      momentum: mu in [0, 1), of an average of steps; None: no average.
      strength: as in `linearised_bregman`.
      adaptive: as in `linearised_bregman`.

    Returns:
      As `linearised_bregman`, with its errors.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from prunadag_optax.methods import bregman
      >>> from prunadag_optax.methods.penalties import regularisers
      >>> params = {"kernel": jnp.array([[0.5, 0.0]]), "bias": jnp.zeros(2)}
      >>> tx = bregman.linbreg(0.5, regularisers.l1(1.0))
      >>> state = tx.init(params)
      >>> state.dual["kernel"].tolist()
      [[1.5, 0.0]]
      >>> gradients = {"kernel": jnp.array([[0.5, 1.0]]), "bias": jnp.ones(2)}
      >>> updates, state = tx.update(gradients, state, params)
      >>> optax.apply_updates(params, updates)["kernel"].tolist()
      [[0.25, 0.0]]

    References:
      Bungert et al. (2022), algorithms 1 and 2.
    """
    checks.scalar_or_schedule("learning_rate", learning_rate, least=0)
    if momentum is not None:
        checks.scalar("momentum", momentum, least=0, below=1)
    base = optax.scale_by_learning_rate(learning_rate)
    if momentum is not None:
        base = optax.chain(base, optax.ema(momentum, debias=False))
    return linearised_bregman(
        base, regulariser, delta=delta, strength=strength, adaptive=adaptive
    )


def adabreg(
    learning_rate: optax.ScalarOrSchedule,
    regulariser: Regulariser,
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    eps: chex.Numeric = 1e-8,
    delta: chex.Numeric = 1.0,
    *,
    strength: optax.ScalarOrSchedule = 1.0,
    adaptive: Controller | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdaBreg: Adam on the dual variable.

    .. math::
      v_{t+1} = v_t - \tau_t \hat m_{t+1} / (\sqrt{\hat q_{t+1}} + \epsilon), \quad
      W_{t+1} = \mathrm{prox}_{\delta s R}(\delta v_{t+1})

    with the bias-corrected averages of Adam. The proximal point is the plain one, not
    that in Adam's metric. A step of v is about tau whatever the gradient, so
    a weight comes in after s / tau steps of one sign: the strength has to be two orders
    of magnitude larger than LinBreg's.

    Args:
      learning_rate: tau >= 0, number or schedule count -> value.
      regulariser: R, a convex `Regulariser`.
      b1: decay of m, in [0, 1).
      b2: decay of q, in [0, 1).
      eps: epsilon >= 0.
      delta: as in `linearised_bregman`.
      strength: as in `linearised_bregman`.
      adaptive: as in `linearised_bregman`.

    Returns:
      As `linearised_bregman`, with its errors.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax.methods import bregman
      >>> from prunadag_optax.methods.penalties import regularisers
      >>> tx, x = bregman.adabreg(0.25, regularisers.l1(1.0)), jnp.array([0.5, 0.0])
      >>> updates, state = tx.update(jnp.array([2.0, 2.0]), tx.init(x), x)
      >>> updates.round(2).tolist(), state.dual.round(2).tolist()
      ([-0.25, 0.0], [1.25, -0.25])

    References:
      Bungert et al. (2022), algorithm 3.
    """
    checks.scalar_or_schedule("learning_rate", learning_rate, least=0)
    checks.scalar("b1", b1, least=0, below=1)
    checks.scalar("b2", b2, least=0, below=1)
    checks.scalar("eps", eps, least=0)
    base = optax.adam(learning_rate, b1, b2, eps)
    return linearised_bregman(
        base, regulariser, delta=delta, strength=strength, adaptive=adaptive
    )


def sparse_init(
    key: chex.PRNGKey,
    params: optax.Params,
    density: float,
    *,
    gain: float = 1.0,
    whole_kernels: bool = False,
    where: Where | None = None,
) -> optax.Params:
    r"""Few of the initial weights, scaled up: where a Bregman iteration starts.

    .. math:: W_i \leftarrow \frac{c}{\sqrt{s}} W_i
       \text{ with probability } s, \text{ else } 0

    A gain of c = 1 leaves the variance of what a layer puts out as it was.

    Args:
      key: a key of `jax.random`.
      params: pytree of parameters as a model initialises them.
      density: s in (0, 1], the expected share of weights that stay; 0.01 is usual.
      gain: c > 0.
      whole_kernels: whether in leaves with more than two axes, such as convolutions',
        all weights between one input and one output channel, the last two axes, stay or
        go together.
      where: predicate (path, leaf) -> bool, True for the leaves to make sparse; None is
        `masks.prunable`.

    Returns:
      Pytree like `params`, dtypes kept.

    Raises:
      ValueError: for an argument out of range, or a leaf that is no real float.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from prunadag_optax import masks
      >>> from prunadag_optax.methods import bregman
      >>> params = {"kernel": jnp.ones((100, 100)), "bias": jnp.ones(100)}
      >>> params = bregman.sparse_init(jax.random.key(0), params, 0.01)
      >>> round(float(params["kernel"].max()), 3)
      10.0
      >>> bool(0.985 < masks.sparsity(params["kernel"]) < 0.995)
      True

    References:
      Bungert et al. (2022), section 3.2.
    """
    checks.key("key", key)
    checks.scalar("density", density, above=0, most=1)
    checks.scalar("gain", gain, above=0)
    paths_leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    keys = jax.random.split(key, max(1, len(paths_leaves)))

    def leaf(key, path, x):
        checks.real_leaf("params", path, x)
        x = jnp.asarray(x)
        shape = x.shape
        if whole_kernels and x.ndim > 2:
            shape = (1,) * (x.ndim - 2) + x.shape[-2:]
        stays = jax.random.bernoulli(key, density, shape)
        scaled = (gain / density**0.5 * working(x)).astype(x.dtype)
        return jnp.where(stays, scaled, jnp.zeros_like(x))

    leaves = [x for _, x in paths_leaves]
    for i, sparse in enumerate(chosen(params, where)):
        if sparse:
            leaves[i] = leaf(keys[i], *paths_leaves[i])
    return treedef.unflatten(leaves)


def _controlled(
    controller: Controller, count: Any, strength: jax.Array, state: Any, params: Any
) -> tuple[jax.Array, ControllerState]:
    """The strength and the state after a step, in most of which nothing changes."""

    def change(strength, state):
        sparsity = masks.sparsity(params)
        gap = jnp.asarray(controller.target, strength.dtype) - sparsity
        # Both are rounded: on the target the difference may be of either sign.
        gap = jnp.where(jnp.abs(gap) <= jnp.finfo(sparsity.dtype).eps, 0, gap)
        side = jnp.sign(gap).astype(jnp.int32)
        changes = state.changes + (side * state.side < 0)
        rate = controller.acceleration
        if controller.decay is not None:
            rate = rate * controller.decay ** jnp.maximum(changes - 1, 0)
        factor = 1 + rate * jnp.abs(gap)
        changed = jnp.where(gap > 0, strength * factor, strength / factor)
        changed = jnp.clip(changed, controller.lower, controller.upper)
        side = jnp.where(side == 0, state.side, side)
        return changed.astype(strength.dtype), ControllerState(sparsity, side, changes)

    due = (count % controller.every == 0) & (count >= controller.warmup)
    return jax.lax.cond(due, change, lambda *same: same, strength, state)


def _check_controller(controller: Any) -> None:
    if not isinstance(controller, Controller):
        raise ValueError(f"adaptive must be a Controller or None; got {controller!r}.")
    check = checks.scalar
    check("adaptive.target", controller.target, least=0, most=1)
    check("adaptive.every", controller.every, least=1)
    check("adaptive.acceleration", controller.acceleration, above=0)
    if controller.decay is not None:
        check("adaptive.decay", controller.decay, above=0, most=1)
    check("adaptive.lower", controller.lower, above=0)
    least = controller.lower if checks.is_number(controller.lower) else None
    check("adaptive.upper", controller.upper, least=least)  # pyright: ignore
    check("adaptive.warmup", controller.warmup, least=0)
