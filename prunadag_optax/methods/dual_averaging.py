r"""Regularised dual averaging for networks: RMDA, and RAMDA with an adaptive metric.

Dual averaging goes back to the start in every step: the new point minimises the sum of
all gradients so far, the penalty as often, and the distance to the start. The noise of
the gradients averages out of that sum, so that what the penalty makes zero stays zero,
where proximal gradient methods keep changing it.

The parameters are averages of such points, and averages of zeros and numbers are
numbers: `unaveraged` returns the last point itself, whose zeros are exact.
"""

import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from prunadag_optax._common import checks
from prunadag_optax._common.dtypes import cast_like, value_at, working
from prunadag_optax._common.transformation import checked, find_state
from prunadag_optax.methods.penalties.regularisers import (
    Regulariser,
    check_regulariser,
    weighted_prox,
)


class DualAveragingState(NamedTuple):
    """State of `rmda` and `ramda`."""

    # The iterations done, shape=(), dtype=int32. optax's states have the same name.
    count: jax.typing.ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride]
    stage_count: jax.Array  # t, those since the last restart, shape=(), dtype=int32
    weight_sum: jax.Array  # alpha, shape=(), at least float32
    initial: optax.Params  # W^0, shapes and dtypes of params
    gradient_sum: optax.Updates  # V, shapes of params
    square_sum: optax.Updates | None  # U, shapes of params; None for rmda
    eps: jax.Array | None  # epsilon of this stage, shape=(); None for rmda


def rmda(
    learning_rate: optax.ScalarOrSchedule,
    regulariser: Regulariser,
    momentum: optax.ScalarOrSchedule = 0.1,
    *,
    milestones: Sequence[int] = (),
    decay: chex.Numeric = 0.1,
    growth: str | None = "final",
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""RMDA, regularised modernised dual averaging.

    .. math::
      s_t &= \eta_t \sqrt t, \quad \alpha_t = \alpha_{t-1} + s_t, \quad
      V_t = V_{t-1} + s_t g_t \\
      \tilde W_t &= \arg\min_W \langle V_t, W \rangle + \alpha_t R(W)
      + \tfrac12 \sqrt t\, \|W - W_0\|^2
      = \mathrm{prox}_{(\alpha_t / \sqrt t) R} (W_0 - V_t / \sqrt t) \\
      W_t &= (1 - c_t) W_{t-1} + c_t \tilde W_t

    A run has stages: at each milestone the learning rate is multiplied by `decay` and
    dual averaging starts again at the current point, with t, alpha and V at zero.

    Args:
      learning_rate: eta >= 0, number or schedule count -> value, before `decay`.
      regulariser: R, such as `regularisers.l1(1e-3)`. Leave weight decay out.
      momentum: c in (0, 1], number or schedule count -> value: the share of the new
        point in the average. 1 does not average.
      milestones: the numbers of steps after which a new stage begins, rising.
      decay: gamma in (0, 1], the learning rate's factor from stage to stage.
      growth: how c grows to 1, where the zeros of the average become exact. "final": in
        the stage after the last milestone it is min(c sqrt(t), 1), elsewhere c;
        "stages": c / gamma^stage, at most 1; None: not at all.
      accumulator_dtype: dtype of V; None is each parameter's, but at least float32: the
        sum grows like t^1.5.

    Returns:
      An `optax.GradientTransformationExtraArgs` with `DualAveragingState`. Its `update`
      needs `params` and returns updates in the parameters' dtypes. See `unaveraged` for
      the point to read the structure from.

    Raises:
      ValueError: naming the argument, or the leaf, that is not as it has to be.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from prunadag_optax.methods import dual_averaging
      >>> from prunadag_optax.methods.penalties import regularisers
      >>> penalty = regularisers.group_lasso(0.2)
      >>> target = jnp.array([[2.0, -2.0], [0.05, 0.0]])
      >>> loss = lambda x: jnp.sum((x - target) ** 2)
      >>> tx = dual_averaging.rmda(0.1, penalty, milestones=[100])
      >>> x = jnp.ones((2, 2))
      >>> state = tx.init(x)
      >>> for _ in range(200):
      ...     updates, state = tx.update(jax.grad(loss)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> (dual_averaging.unaveraged(state, penalty) == 0).tolist()
      [[False, False], [True, True]]

    References:
      Z.-S. Huang, C.-p. Lee, Training structured neural networks through manifold
      identification and variance reduction, ICLR 2022, algorithm 1. The growth "final"
      is that of Huang, Lee (2024).
    """
    return _dual_averaging(
        learning_rate, regulariser, momentum, None,
        milestones, decay, growth, accumulator_dtype,
    )  # fmt: skip


def ramda(
    learning_rate: optax.ScalarOrSchedule,
    regulariser: Regulariser,
    momentum: optax.ScalarOrSchedule = 0.01,
    *,
    eps: chex.Numeric = 1e-6,
    milestones: Sequence[int] = (),
    decay: chex.Numeric = 0.1,
    growth: str | None = "final",
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""RAMDA, regularised adaptive momentum dual averaging.

    .. math::
      s_t &= \eta_t \sqrt t, \quad \alpha_t = \alpha_{t-1} + s_t, \quad
      V_t = V_{t-1} + s_t g_t, \quad U_t = U_{t-1} + s_t g_t^2 \\
      \tilde W_t &= \arg\min_W \langle V_t, W \rangle + \alpha_t R(W)
      + \tfrac12 (W - W_0)^T P_t (W - W_0), \quad P_t = \sqrt[3]{U_t} + \epsilon \\
      W_t &= (1 - c_t) W_{t-1} + c_t \tilde W_t

    The minimiser is the proximal operator of alpha R in the metric P, at W_0 - V / P:
    exact for the l1 norm, group lasso and group MCP, by proximal-gradient steps
    otherwise. Without a penalty this is MADGRAD. Stages as in `rmda`; epsilon, too, is
    multiplied by `decay`, and U starts again at zero.

    Args:
      learning_rate: as in `rmda`.
      regulariser: as in `rmda`.
      momentum: c as in `rmda`, usually smaller.
      eps: epsilon > 0, the metric of weights that have had no gradient.
      milestones: as in `rmda`.
      decay: gamma in (0, 1], the factor of eta and epsilon from stage to stage.
      growth: as in `rmda`.
      accumulator_dtype: dtype of V and U; None is each parameter's, at least float32.

    Returns:
      As `rmda`: the transformation with `DualAveragingState`, and the errors.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax.methods import dual_averaging
      >>> from prunadag_optax.methods.penalties import regularisers
      >>> penalty = regularisers.l1(0.25)
      >>> tx, x = dual_averaging.ramda(0.5, penalty), jnp.array([1.0, 0.25])
      >>> _, state = tx.update(jnp.array([1.0, 0.1]), tx.init(x), x)
      >>> [round(float(w), 3) for w in dual_averaging.unaveraged(state, penalty)]
      [0.213, 0.0]

    References:
      Z.-S. Huang, C.-p. Lee, Regularized adaptive momentum dual averaging with an
      efficient inexact subproblem solver for training structured neural network,
      NeurIPS 2024, algorithms 1 and 2. MADGRAD: A. Defazio, S. Jelassi, JMLR 23 (2022).
    """
    checks.scalar("eps", eps, above=0)
    return _dual_averaging(
        learning_rate, regulariser, momentum, eps,
        milestones, decay, growth, accumulator_dtype,
    )  # fmt: skip


def unaveraged(state: Any, regulariser: Regulariser) -> optax.Params:
    r"""The last point of `rmda` or `ramda` before averaging, with its exact zeros.

    .. math:: \tilde W_t = \arg\min_W \langle V_t, W \rangle + \alpha_t R(W)
       + \tfrac12 \|W - W_0\|^2_{P_t}

    It is computed from the sums in the state, so that no step has to keep it.

    Args:
      state: the optimizer's state, or that of a chain or wrapper around it.
      regulariser: the regulariser that the optimizer has.

    Returns:
      Pytree of parameters, in their dtypes; before the first step the initial ones.

    Raises:
      ValueError: if there is not exactly one `DualAveragingState` in `state`.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from prunadag_optax.methods import dual_averaging
      >>> from prunadag_optax.methods.penalties import regularisers
      >>> penalty = regularisers.l1(1.0)
      >>> tx, x = dual_averaging.rmda(0.5, penalty), jnp.array([1.0, 0.25])
      >>> _, state = tx.update(jnp.zeros(2), tx.init(x), x)
      >>> dual_averaging.unaveraged(state, penalty)
      Array([0.5, 0. ], dtype=float32)

    References:
      Huang, Lee (2022), section 3: the active manifold is identified by this point.
    """
    check_regulariser(regulariser)
    own = find_state(state, DualAveragingState)
    return cast_like(_minimiser(own, regulariser), own.initial)


def _dual_averaging(
    learning_rate, regulariser, momentum, eps,
    milestones, decay, growth, accumulator_dtype,
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    """`ramda`, and with `eps` None `rmda`."""
    check_regulariser(regulariser)
    checks.scalar_or_schedule("learning_rate", learning_rate, least=0)
    checks.scalar_or_schedule("momentum", momentum, above=0, most=1)
    checks.scalar("decay", decay, above=0, most=1)
    checks.dtype("accumulator_dtype", accumulator_dtype)
    if growth is not None:
        checks.choice("growth", growth, ("final", "stages"))
    milestones = _rising(milestones)

    def init(params: optax.Params) -> DualAveragingState:
        dtypes = [jnp.result_type(x) for x in jax.tree.leaves(params)]
        dtype = jnp.result_type(jnp.float32, *dtypes)

        def zeros_like(x):
            wide = jnp.promote_types(jnp.result_type(x), jnp.float32)
            return jnp.zeros_like(x, accumulator_dtype or wide)

        zeros = jax.tree.map(zeros_like, params)
        adaptive = eps is not None
        return DualAveragingState(
            count=jnp.zeros([], jnp.int32),
            stage_count=jnp.zeros([], jnp.int32),
            weight_sum=jnp.zeros([], dtype),
            # A copy: a donated state must not hold the caller's parameters.
            initial=jax.tree.map(jnp.array, params),
            gradient_sum=zeros,
            square_sum=jax.tree.map(jnp.zeros_like, zeros) if adaptive else None,
            # A copy: an injected one is in the state of `inject_hyperparams`, too.
            eps=jnp.array(eps, dtype) if adaptive else None,
        )

    def update(updates, state, params, **_):
        dtype = state.weight_sum.dtype
        # The stage counts from 0; the factor is 1 in the first.
        stage = sum((state.count >= m for m in milestones), start=jnp.int32(0))
        factor = jnp.asarray(decay, dtype) ** stage
        rate, share = (
            jnp.asarray(value_at(value, state.count), dtype)
            for value in (learning_rate, momentum)
        )
        if milestones:
            state = _restart(state, params, milestones)
        state = _accumulate(state, updates, rate * factor)
        if eps is not None:
            state = state._replace(eps=jnp.asarray(eps, dtype) * factor)
        if growth == "stages":
            share = jnp.minimum(share / factor, 1)
        elif growth == "final" and milestones:
            grown = jnp.minimum(share * jnp.sqrt(state.stage_count.astype(dtype)), 1)
            share = jnp.where(stage == len(milestones), grown, share)
        # With share = 1 and w = 0 this is -x, and the parameter exactly 0.
        step = jax.tree.map(
            lambda w, x: share.astype(w.dtype) * (w - working(x)),
            _minimiser(state, regulariser),
            params,
        )
        return step, state

    return checked(init, update, like_params="initial")


def _rising(milestones: Any) -> tuple[int, ...]:
    def is_count(value):
        return isinstance(value, numbers.Integral) and not isinstance(value, bool)

    try:
        counts: tuple[Any, ...] = tuple(milestones)
    except TypeError:
        counts = (None,)
    rising = all(map(is_count, counts)) and all(
        a < b for a, b in zip((0, *counts), counts, strict=False)
    )
    if not rising:
        raise ValueError(
            f"milestones must be rising integers >= 1, as a sequence; got "
            f"{milestones!r}."
        )
    return tuple(int(count) for count in counts)


def _restart(state, params, milestones) -> DualAveragingState:
    """The state at the start of a step, anew if a stage begins with it.

    Not at the end of the step before, after which `unaveraged` has to find the sums.
    """
    begins = sum((state.count == m for m in milestones), start=jnp.zeros((), bool))

    def anew(tree):
        return jax.tree.map(lambda v: jnp.where(begins, jnp.zeros_like(v), v), tree)

    return state._replace(
        stage_count=anew(state.stage_count),
        weight_sum=anew(state.weight_sum),
        initial=jax.tree.map(
            lambda w, x: jnp.where(begins, x, w).astype(w.dtype), state.initial, params
        ),
        gradient_sum=anew(state.gradient_sum),
        square_sum=anew(state.square_sum),
    )


def _accumulate(state, gradients, rate) -> DualAveragingState:
    """One more gradient in the sums."""
    t: Any = optax.safe_increment(state.stage_count)
    weight = rate * jnp.sqrt(t.astype(rate.dtype))

    def add(sums, terms):
        return jax.tree.map(
            lambda v, g: (working(v) + weight.astype(g.dtype) * g).astype(v.dtype),
            sums,
            terms,
        )

    gradients = jax.tree.map(working, gradients)
    squares = state.square_sum
    if squares is not None:
        squares = add(squares, jax.tree.map(jnp.square, gradients))
    return state._replace(
        count=optax.safe_increment(state.count),
        stage_count=t,
        weight_sum=state.weight_sum + weight,
        gradient_sum=add(state.gradient_sum, gradients),
        square_sum=squares,
    )


def _minimiser(state: DualAveragingState, regulariser: Regulariser) -> Any:
    """The point W-tilde of a state, in at least float32."""
    initial, sums = (
        jax.tree.map(working, tree) for tree in (state.initial, state.gradient_sum)
    )
    if state.square_sum is None:
        # Before the first step the sums are 0 and the point is W^0.
        t = jnp.maximum(state.stage_count, 1).astype(state.weight_sum.dtype)
        root = jnp.sqrt(t)
        half = jax.tree.map(lambda w, v: w - v / root.astype(v.dtype), initial, sums)
        return regulariser.prox(half, state.weight_sum / root)
    metric = jax.tree.map(
        lambda u: jnp.cbrt(working(u)) + jnp.asarray(state.eps, working(u).dtype),
        state.square_sum,
    )
    half = jax.tree.map(lambda w, v, p: w - v / p, initial, sums, metric)
    return weighted_prox(regulariser, half, metric, state.weight_sum)
