"""prunAdag: Algorithm 2.1 on one page, and the optax transformation around it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from prunadag_optax._common import checks
from prunadag_optax._common.dtypes import cast_like, value_at, working
from prunadag_optax._common.transformation import checked
from prunadag_optax._core.accumulators import accumulate, accumulate_where, initial
from prunadag_optax._core.classes import (
    Classification,
    acceptable,
    checked_scores,
    classify,
    relevant_set,
    statistics,
)
from prunadag_optax._core.steps import decreasable_step, optimisable_step, trust_radius
from prunadag_optax._core.variants import Bounds, Score, bounds_of, scores_of
from prunadag_optax._ranking import engine


@dataclasses.dataclass(frozen=True)
class Settings:
    """The arguments of `prunadag`, checked; see there."""

    learning_rate: optax.ScalarOrSchedule = 1.0
    relevant: optax.ScalarOrSchedule = 0.1
    variant: str | Bounds = "v3"
    relevance: str | Score = "gradient"
    initial_weight: chex.Numeric = 0.01
    decrease_schedule: optax.ScalarOrSchedule | None = None
    momentum: chex.Numeric | None = None
    scope: str = "global"
    accumulation: str = "optimisable"
    accumulator_dtype: Any = None

    def __post_init__(self) -> None:
        """Raises a ValueError for an argument out of range; the message names it."""
        bounds_of(self.variant)
        scores_of(self.relevance)
        checks.relevant(self.relevant)
        checks.choice("scope", self.scope, ("global", "leaf"))
        checks.choice("accumulation", self.accumulation, ("optimisable", "all"))
        checks.dtype("accumulator_dtype", self.accumulator_dtype)
        checks.scalar("initial_weight", self.initial_weight, above=0)
        checks.scalar_or_schedule("learning_rate", self.learning_rate, least=0)
        if self.decrease_schedule is not None:
            checks.scalar_or_schedule(
                "decrease_schedule", self.decrease_schedule, least=0
            )
        if self.momentum is not None:
            checks.scalar("momentum", self.momentum, least=0, below=1)

    @property
    def by_leaf(self) -> bool:
        """Whether each leaf is ranked on its own."""
        return self.scope == "leaf"

    def at(self, k: jax.typing.ArrayLike) -> tuple[Any, Any, Any]:
        """eta_k, T (or T / n) and d_k of iteration k."""
        decrease = 1.0 / (k + 1.0)
        if self.decrease_schedule is not None:
            decrease = value_at(self.decrease_schedule, k)
        return value_at(self.learning_rate, k), value_at(self.relevant, k), decrease

    def direction(self, grad: Any, mu: Any, k: jax.typing.ArrayLike) -> tuple[Any, Any]:
        r"""g_k, with momentum its average without bias, and mu, the average with it.

        .. math:: \mu_k = \beta \mu_{k-1} + (1 - \beta) g_k, \quad
           \mu_k / (1 - \beta^{k+1})
        """
        beta = self.momentum
        if beta is None:
            return grad, mu
        mu = jax.tree.map(
            lambda m, g: beta * working(m) + (1 - beta) * working(g), mu, grad
        )
        return jax.tree.map(lambda m: m / (1 - beta ** (k + 1)), mu), mu


class ScaleByPrunadagState(NamedTuple):
    """State of `scale_by_prunadag`: two accumulators and a counter."""

    # The iterations done, shape=(), dtype=int32. optax's states have the same name.
    count: jax.typing.ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride]
    optimisable_weight: optax.Params  # w^O, shapes of params
    decreasable_weight: optax.Params  # w^D, shapes of params
    mu: optax.Updates | None  # with momentum: the average before bias correction
    # The last `Classification.threshold`, where the next search for it starts; it has
    # no influence on the result. None does without.
    threshold_hint: jax.Array | None = None


def each(function: Callable[..., Any], *columns: Any) -> list[Any]:
    """The function on every leaf: `columns` hold one item a leaf."""
    return [function(*leaf) for leaf in zip(*columns, strict=True)]


def update(settings: Settings, state: Any, gradients: Any, params: Any) -> Any:
    """Iteration k of Algorithm 2.1: the steps s_k, and where the next one starts."""
    k = state.count
    eta, T, d = settings.at(k)
    lower, upper = bounds_of(settings.variant)  # a and b as functions of |x|, Table 1
    direction, mu = settings.direction(gradients, state.mu, k)
    score = checked_scores(settings.relevance, direction, params)
    x, treedef = jax.tree.flatten(params)  # from here on: lists, one array a leaf
    before = state.optimisable_weight, state.decreasable_weight  # w_{k-1}
    w_O, w_D = map(treedef.flatten_up_to, before)
    grad, g, score = map(treedef.flatten_up_to, (gradients, direction, score))

    # Step 1: the relevant components.
    R = relevant_set(score, T, settings.by_leaf, state.threshold_hint)  # (4)

    # Steps 2 and 3: the optimisable components.
    table = statistics(g, x, score, R, d, settings.by_leaf)  # Table 1

    def optimisable(grad, g, x, score, t, w_O, table):
        w_O = accumulate(w_O, grad)  # (9)
        a, b = lower(jnp.abs(working(x)), table), upper(jnp.abs(working(x)), table)
        in_R = R(score, t)
        in_A = acceptable(g, x, in_R, a, b, optimisable_step(g, w_O, eta))  # (6) (7)
        return in_R | in_A

    # Only O is stored. (9) is evaluated again below, which is cheaper than to store w^O
    # here: the step takes 0.64 times as long (10^7 parameters, v4, 2 CPU cores).
    O = engine.stored(  # noqa: E741
        functools.partial(each, optimisable), grad, g, x, score, R.keys, w_O, table
    )
    D = each(jnp.logical_not, O)

    # The accumulators that are carried on. The steps below need each in its own class
    # only; dividing by what is stored anyway lets all arrays be updated in place.
    if settings.accumulation == "all":
        w_O = each(accumulate, w_O, grad)
    else:
        w_O = each(accumulate_where, O, w_O, grad)  # (9) on O, (16) on D
    w_D = each(accumulate_where, D, w_D, x)  # (12) on D, (15) on O

    # Step 4.
    s_O = each(lambda g, w_O: optimisable_step(g, w_O, eta), g, w_O)  # (10)

    # Step 5.
    a = each(lambda x, table: lower(jnp.abs(working(x)), table), x, table)
    s_L = each(trust_radius, x, w_D)  # (11)
    s_D = each(decreasable_step, g, x, a, s_L)  # (17)

    # Step 6, x + s, is optax.apply_updates.
    s = each(jnp.where, O, s_O, s_D)
    s, w_O, w_D = map(treedef.unflatten, (s, w_O, w_D))
    return s, ScaleByPrunadagState(k, w_O, w_D, mu, R.magnitude)


def scale_by_prunadag(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    relevant: optax.ScalarOrSchedule = 0.1,
    *,
    variant: str | Bounds = "v3",
    relevance: str | Score = "gradient",
    initial_weight: chex.Numeric = 0.01,
    decrease_schedule: optax.ScalarOrSchedule | None = None,
    momentum: chex.Numeric | None = None,
    scope: str = "global",
    accumulation: str = "optimisable",
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """The steps of `prunadag`, with the sign that optax's `scale_by_*` have.

    .. math:: u_{i,k} = - s_{i,k}

    Unlike other `scale_by_*` it takes the learning rate itself, because the
    classification compares the actual optimisable step; do not scale its updates by
    anything but -1. See `prunadag` for the method and for every argument.

    Args:
      learning_rate: eta_k, number or schedule.
      relevant: target number of relevant components: fraction, count or schedule.
      variant: the bounds a and b, by name or as a pair of functions.
      relevance: the score whose largest values are relevant.
      initial_weight: zeta > 0.
      decrease_schedule: d_k, number or schedule; None is 1/(k+1).
      momentum: decay of the gradient average in [0, 1), or None.
      scope: "global" or "leaf".
      accumulation: where w^O grows: "optimisable" or "all".
      accumulator_dtype: dtype of the weights; None keeps the parameters'.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is
      `ScaleByPrunadagState`.

    Raises:
      ValueError: for an argument out of range; the message names it.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from prunadag_optax import scale_by_prunadag
      >>> tx = optax.chain(scale_by_prunadag(0.1), optax.scale(-1.0))
      >>> state = tx.init(jnp.ones(3))

    References:
      Porcelli, Seraghiti, Toint (2026), Algorithm 2.1.
    """
    return _transformation(
        Settings(
            learning_rate=learning_rate,
            relevant=relevant,
            variant=variant,
            relevance=relevance,
            initial_weight=initial_weight,
            decrease_schedule=decrease_schedule,
            momentum=momentum,
            scope=scope,
            accumulation=accumulation,
            accumulator_dtype=accumulator_dtype,
        )
    )


def prunadag(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    relevant: optax.ScalarOrSchedule = 0.1,
    *,
    variant: str | Bounds = "v3",
    relevance: str | Score = "gradient",
    initial_weight: chex.Numeric = 0.01,
    decrease_schedule: optax.ScalarOrSchedule | None = None,
    momentum: chex.Numeric | None = None,
    scope: str = "global",
    accumulation: str = "optimisable",
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The prunAdag optimizer: Adagrad that keeps the model fit for pruning.

    At every iteration the components with the T largest scores are *relevant*; of the
    others, those whose Adagrad step would shrink them by an amount between a and b are
    *acceptable*. These two classes are *optimisable* and take the Adagrad step; the
    rest are *decreasable* and shrink within a trust region:

    .. math::
      w^O_{i,k} &= \sqrt{(w^O_{i,k-1})^2 + g_{i,k}^2}, \quad
      s_{i,k} = - \eta_k g_{i,k} / w^O_{i,k} & i \in O_k \\
      w^D_{i,k} &= \sqrt{(w^D_{i,k-1})^2 + x_{i,k}^2}, \quad
      s_{i,k} = - \mathrm{sign}(x_{i,k}) \min(a_{i,k}, |x_{i,k}| / w^D_{i,k})
      & i \in D_k,\ \mathrm{sign}(x_{i,k}) = \mathrm{sign}(g_{i,k})

    and s = 0 on the rest of D_k. With d_k the decrease schedule and S_k the components
    outside R_k where x and g have the same sign, the variants are

    ============= ================================================ ==========
    variant       a                                                b
    ============= ================================================ ==========
    v1            \|x\| d_k \|\|g\|\|_R / \|\|x\|\|_S               infinity
    v2            \|x\| d_k                                        infinity
    v3            as v1                                            \|x\|
    v4            as v2                                            \|x\|
    relevant_only as v1                                            none acceptable
    ============= ================================================ ==========

    At its defaults this is Algorithm 2.1 with T = n/10. A non-finite gradient gives
    non-finite updates, as in other optimizers; with a norm in the bounds (v1, v3) and
    global scope, one NaN reaches every decreasable component. Wrap the optimizer in
    `optax.apply_if_finite` where that can happen.

    Args:
      learning_rate: eta_k >= 0, number or schedule count -> value. It scales the
        optimisable step, as classified; the decreasable step has its own schedule.
        The article has 1; for networks start at 0.05.
      relevant: T: a fraction of the components in (0, 1] as a float, a count as an
        integer, or a schedule of either. With scope "leaf" it holds for each leaf,
        a count no higher than the leaf's size.
      variant: "v1", "v2", "v3", "v4", "relevant_only", or a pair of functions
        `Bounds(lower, upper)`.
      relevance: the score: "gradient" |g| (the article), "magnitude" |x|, "taylor"
        |g x|, or a function (gradients, params) -> pytree of scores >= 0. With
        minibatches the largest gradients are mostly noise; prefer "magnitude" there.
      initial_weight: zeta > 0, the weights before the first iteration.
      decrease_schedule: d_k >= 0, number or schedule count -> value; None is 1/(k+1).
      momentum: decay in [0, 1) of a bias-corrected average of gradients that takes the
        gradient's place in the classification and in both steps; w^O still
        accumulates the raw gradient. None keeps no average.
      scope: "global": all leaves are one vector, as in the article; "leaf": T and the
        norms are per leaf.
      accumulation: where w^O grows: on the "optimisable" components (the article: step
        5 takes it back on D_k), or on "all". With "all" and `variant=capped("v3")` the
        article's least squares can be pruned further (readings.md in
        benchmarks/archive/results).
      accumulator_dtype: dtype of the weights and of the average, as a `jnp.dtype` or a
        name; None keeps the parameters'. Use "float32" for half-precision parameters.

    Returns:
      An `optax.GradientTransformationExtraArgs`. Its `update` needs `params`, ignores
      extra arguments, and returns updates in the parameters' dtypes. For
      `optax.inject_hyperparams` pass a `relevance` function as a static argument.

    Raises:
      ValueError: for an argument out of range, by name; from `init` and `update` for
        leaves that are not real floats, for trees that do not match, and without
        `params`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from prunadag_optax import prunadag
      >>> loss = lambda x: jnp.sum((x - jnp.array([2.0, 0.0, 0.0, 0.1])) ** 2)
      >>> tx = prunadag(0.5, relevant=1)
      >>> x = jnp.full(4, 0.5)
      >>> state = tx.init(x)
      >>> for _ in range(200):
      ...     updates, state = tx.update(jax.grad(loss)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> bool(loss(x) < 1e-3)
      True

    References:
      M. Porcelli, G. Seraghiti, Ph. L. Toint, prunAdag: an adaptive pruning-aware
      gradient method, Computational Optimization and Applications 93 (2026) 85-119,
      Algorithm 2.1, equations (4)-(17), Table 1.
    """
    return optax.chain(
        scale_by_prunadag(
            learning_rate=learning_rate,
            relevant=relevant,
            variant=variant,
            relevance=relevance,
            initial_weight=initial_weight,
            decrease_schedule=decrease_schedule,
            momentum=momentum,
            scope=scope,
            accumulation=accumulation,
            accumulator_dtype=accumulator_dtype,
        ),
        optax.scale(-1.0),
    )


def _transformation(settings: Settings) -> optax.GradientTransformationExtraArgs:
    """`update` on trees, with the state and the conventions of optax."""

    def init(params: optax.Params) -> ScaleByPrunadagState:
        # eval_shape: `init` also takes trees of shapes, without arrays.
        shapes = jax.tree.leaves(jax.eval_shape(lambda tree: tree, params))
        if not settings.by_leaf:
            checks.relevant(settings.relevant, sum(x.size for x in shapes))
        zeta, dtype = settings.initial_weight, settings.accumulator_dtype
        dtypes = [dtype or x.dtype for x in shapes] or [jnp.float32]
        return ScaleByPrunadagState(
            jnp.zeros([], jnp.int32),
            initial(params, zeta, dtype),
            initial(params, zeta, dtype),
            None if settings.momentum is None else initial(params, 0, dtype),
            jnp.zeros(
                (len(shapes),) if settings.by_leaf else (), jnp.result_type(*dtypes)
            ),
        )

    def update_fn(
        updates: optax.Updates,
        state: ScaleByPrunadagState,
        params: optax.Params,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByPrunadagState]:
        del extra_args
        count = optax.safe_increment(state.count)
        if not any(jnp.size(x) for x in jax.tree.leaves(params)):
            return updates, state._replace(count=count)
        steps, after = update(settings, state, updates, params)
        if state.threshold_hint is None:
            after = after._replace(threshold_hint=None)
        # Accumulators may be in a narrower dtype than the one to compute in.
        after = cast_like(after._replace(count=count), state)
        return jax.tree.map(jnp.negative, steps), after

    return checked(init, update_fn, like_params="optimisable_weight")


def classification_at(
    gradients: optax.Updates,
    state: ScaleByPrunadagState,
    params: optax.Params,
    settings: Settings,
) -> Classification:
    """The classification that `update` would make from this state, for inspection.

    Args:
      gradients: pytree of gradients g_k.
      state: the transformation's state before that update.
      params: pytree of parameters x_k.
      settings: the settings of the transformation.

    Returns:
      The `Classification`.

    Raises:
      ValueError: for trees that do not match.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax import scale_by_prunadag
      >>> x, g = jnp.ones(3), jnp.array([3.0, -1.0, -2.0])
      >>> state = scale_by_prunadag(relevant=1).init(x)
      >>> classification_at(g, state, x, Settings(relevant=1)).optimisable.tolist()
      [True, False, False]
    """
    checks.same_trees("gradients", gradients, "params", params)
    eta, relevant, decrease = settings.at(state.count)
    return classify(
        settings.direction(gradients, state.mu, state.count)[0],
        params,
        jax.tree.map(accumulate, state.optimisable_weight, gradients),
        relevant=relevant,
        decrease=decrease,
        learning_rate=eta,
        variant=settings.variant,
        relevance=settings.relevance,
        scope=settings.scope,
        hint=state.threshold_hint,
    )
