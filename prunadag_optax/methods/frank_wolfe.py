"""Frank-Wolfe methods, whose iterates stay in a ball with sparse extreme points.

A step moves towards the point of the ball where the linearised objective is least; see
`balls`. `fw1` and `fw2` are deterministic, on one ball around all parameters;
`conditional_gradient` is the stochastic form, with momentum and a ball for each leaf.
The parameters can be pruned after training.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from prunadag_optax._common import checks
from prunadag_optax._common.dtypes import cast_like, value_at, working
from prunadag_optax._common.transformation import checked
from prunadag_optax.methods import balls


class FrankWolfeState(NamedTuple):
    """State of `conditional_gradient`."""

    # The iterations done, shape=(), dtype=int32. optax's states have the same name.
    count: jax.typing.ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride]
    mu: optax.Updates | None  # the momentum m, shapes of params; None without


def conditional_gradient(
    learning_rate: optax.ScalarOrSchedule,
    radius: Any,
    support: chex.Numeric,
    *,
    ball: str = "k_support",
    rescale: str | None = "gradient",
    momentum: chex.Numeric | None = 0.9,
    dampening: chex.Numeric = 0.0,
    scope: str = "leaf",
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The stochastic Frank-Wolfe method with momentum.

    .. math::
      m_0 &= g_0, \quad m_k = \rho m_{k-1} + (1 - d) g_k \\
      v_k &= \arg\min_{v \in C} \langle v, m_k \rangle \\
      x_{k+1} &= x_k + \eta_k (v_k - x_k), \quad
      \eta_k = \min(\mathrm{lr}_k f_k, 1)

    with the factor f of `rescale`:

    ============= =============================================================
    None          1
    diameter      1 / diam(C)
    gradient      \|\|m\|\| / \|\|v - x\|\|: a step is lr \|\|m\|\| long, as SGD's
    fast_gradient 2 \|\|m\|\| / diam(C)
    relevant      \|\|m\|\|_T / \|\|v - x\|\|, T the components where v is not 0
    ============= =============================================================

    The iterates stay in C if x_0 is in C: see `balls.make_feasible`. Leave weight decay
    out; the ball takes its place.

    Args:
      learning_rate: lr >= 0, number or schedule count -> value. With momentum and no
        dampening ||m|| is about 1 / (1 - rho) times ||g||, which calls for a learning
        rate that much smaller.
      radius: r > 0 of every ball, or a pytree like the parameters of one radius a leaf,
        such as `balls.initialization_radius` returns.
      support: k, the number of nonzeros of v: a fraction in (0, 1] as a float, or a
        count as an integer; with scope "leaf" it holds for each leaf, where it is at
        least 1 and at most the leaf's size.
      ball: C: "k_support", see `balls.lmo_k_support`, or "k_sparse", see
        `balls.lmo_k_sparse`.
      rescale: None, "diameter", "gradient", "fast_gradient" or "relevant".
      momentum: rho in [0, 1), or None for m = g.
      dampening: d in [0, 1]: 0 adds gradients up, d = rho averages them. The first
        gradient is taken whole.
      scope: "leaf": a ball for each leaf, with a step size of its own; "global": one
        ball around all parameters as one vector.
      accumulator_dtype: dtype of m; None keeps the parameters'.

    Returns:
      An `optax.GradientTransformationExtraArgs` with `FrankWolfeState`. Its `update`
      needs `params` and returns updates in the parameters' dtypes.

    Raises:
      ValueError: naming an argument out of range, or trees that do not match.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from prunadag_optax.methods import frank_wolfe
      >>> loss = lambda x: jnp.sum((x - jnp.array([3.0, 0.1, 0.0, -2.0])) ** 2)
      >>> tx = frank_wolfe.conditional_gradient(0.01, radius=5.0, support=2)
      >>> x = jnp.zeros(4)
      >>> state = tx.init(x)
      >>> for _ in range(200):
      ...     updates, state = tx.update(jax.grad(loss)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> bool(loss(x) < 0.1)
      True

    References:
      Pokutta, Spiegel, Zimmer (2020), algorithms 1 and 2. Miao et al., ICLR 2022.
      M. Zimmer, C. Spiegel, S. Pokutta, Compression-aware training of neural networks
      using Frank-Wolfe, arXiv:2205.11921 (2022).
    """
    balls.check(radius, support, ball, scope)
    checks.scalar_or_schedule("learning_rate", learning_rate, least=0)
    if rescale is not None:
        choices = ("diameter", "gradient", "fast_gradient", "relevant")
        checks.choice("rescale", rescale, choices)
    if momentum is not None:
        checks.scalar("momentum", momentum, least=0, below=1)
    checks.scalar("dampening", dampening, least=0, most=1)
    checks.dtype("accumulator_dtype", accumulator_dtype)

    def init(params: optax.Params) -> FrankWolfeState:
        mu = None
        if momentum is not None:
            mu = optax.tree.zeros_like(params, dtype=accumulator_dtype)
        return FrankWolfeState(jnp.zeros([], jnp.int32), mu)

    def update(updates, state, params, **extra_args):
        del extra_args
        m = jax.tree.map(working, updates)
        if momentum is not None:
            m = _accumulated(state, m, momentum, dampening)
        rate = value_at(learning_rate, state.count)

        def towards_vertex(m, x, r):
            v = balls.BALLS[ball].lmo(m, r, support)
            move = jax.tree.map(lambda v, x: v - working(x), v, x)
            half = r * balls.BALLS[ball].half_diameter(balls.count_among(x, support))
            eta = jnp.clip(rate * _factor(rescale, m, v, move, half), 0, 1)
            return [eta * d for d in move]

        steps = balls.for_each_ball(towards_vertex, scope, radius, m, params)
        mu = None if momentum is None else cast_like(m, state.mu)
        return steps, FrankWolfeState(optax.safe_increment(state.count), mu)

    return checked(init, update, like_params=None if momentum is None else "mu")


def fw1(
    radius: Any, support: chex.Numeric, shift: chex.Numeric = 1.0
) -> optax.GradientTransformationExtraArgs:
    r"""FW1: deterministic Frank-Wolfe on the k-support ball, open-loop steps.

    .. math::
      x_{k+1} = x_k + \eta_k (v_k - x_k), \quad \eta_k = c / (k + c), \quad c = 1

    The first step leads to v_0 wherever x_0 is. With c = 2, the usual step of
    Frank-Wolfe, x_k forgets the first vertices faster, as the average of the vertices
    that it is has weights that grow with k; with c = 1 it is their plain mean.

    Args:
      radius: tau > 0, of the one ball around all parameters.
      support: T: a fraction of n in (0, 1] as a float, or a count as an integer.
      shift: c > 0.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: for an argument out of range; the message names it.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from prunadag_optax.methods import frank_wolfe
      >>> tx, x = frank_wolfe.fw1(10.0, 2), jnp.zeros(3)
      >>> updates, _ = tx.update(jnp.array([3.0, -1.0, -4.0]), tx.init(x), x)
      >>> updates
      Array([-6., -0.,  8.], dtype=float32)

    References:
      M. Porcelli, G. Seraghiti, Ph. L. Toint, prunAdag: an adaptive pruning-aware
      gradient method, Comput. Optim. Appl. 93 (2026) 85-119, section 4.

      M. Jaggi, Revisiting Frank-Wolfe: projection-free sparse convex optimization,
      ICML 2013, Algorithm 1 (c = 2).
    """
    checks.scalar("shift", shift, above=0)
    return conditional_gradient(
        lambda count: shift / (count + shift),
        radius,
        support,
        rescale=None,
        momentum=None,
        scope="global",
    )


def fw2(
    radius: Any, support: chex.Numeric, beta: optax.ScalarOrSchedule
) -> optax.GradientTransformationExtraArgs:
    r"""FW2: deterministic Frank-Wolfe on the k-support ball, steps like the gradient.

    .. math:: x_{k+1} = x_k + \eta_k (v_k - x_k), \quad
       \eta_k = \min(\beta \|g_k\|_{R_k} / \|v_k - x_k\|, 1)

    with R_k the T largest gradients, where v_k is not zero.

    Args:
      radius: tau > 0, of the one ball around all parameters.
      support: T: a fraction of n in (0, 1] as a float, or a count as an integer.
      beta: >= 0, number or schedule.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: for an argument out of range; the message names it.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from prunadag_optax.methods import frank_wolfe
      >>> tx, x = frank_wolfe.fw2(10.0, 2, 0.1), jnp.zeros(3)
      >>> updates, _ = tx.update(jnp.array([3.0, -1.0, -4.0]), tx.init(x), x)
      >>> updates.round(3)
      Array([-0.3, -0. ,  0.4], dtype=float32)

    References:
      Porcelli, Seraghiti, Toint (2026), section 4.
    """
    return conditional_gradient(
        beta, radius, support, rescale="relevant", momentum=None, scope="global"
    )


def _accumulated(state, gradients, momentum, dampening) -> Any:
    """The momentum m_k, in working precision."""

    def leaf(m, g):
        later = momentum * working(m) + (1 - dampening) * g
        return jnp.where(state.count == 0, g, later)

    return jax.tree.map(leaf, state.mu, gradients)


def _factor(rescale, m, v, move, half_diameter) -> Any:
    """What multiplies the learning rate."""
    if rescale is None:
        return 1.0
    if rescale == "diameter":
        return 0.5 / half_diameter
    if rescale == "fast_gradient":
        return balls.norm(m) / half_diameter
    if rescale == "relevant":
        m = jax.tree.map(lambda m, v: jnp.where(v == 0, 0, m), m, v)
    distance = balls.norm(move)
    # Where v = x nothing is left to move.
    return balls.norm(m) / jnp.where(distance == 0, 1, distance)
