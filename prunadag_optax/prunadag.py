"""prunAdag as an optax gradient transformation: Algorithm 2.1, assembled.

Every line of the method lives in `classification`, `weights` and `steps`; here they
meet the schedules, the state and the conventions of optax, and nothing more.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from optax._src.base import NO_PARAMS_MSG

from prunadag_optax import _validation, steps, weights
from prunadag_optax._precision import working
from prunadag_optax.classification import (
    Bounds,
    Classification,
    bounds_of,
    classify_accumulated,
    scores_of,
)
from prunadag_optax.schedules import value_at


class ScaleByPrunadagState(NamedTuple):
    """State of `scale_by_prunadag`: two accumulators and a counter."""

    # The iterations done, shape=(), dtype=int32. optax's states have the same name.
    count: jax.typing.ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride]
    optimisable_weight: optax.Params  # w^O, shapes of params
    decreasable_weight: optax.Params  # w^D, shapes of params
    gradient_average: optax.Updates | None  # with momentum: before bias correction
    # The last `Classification.threshold`, where the next search for it starts; it has
    # no influence on the result. None does without.
    threshold: jax.Array | None = None


def scale_by_prunadag(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    relevant: optax.ScalarOrSchedule = 0.1,
    *,
    variant: str | Bounds = "v3",
    relevance: str | Callable[[Any, Any], Any] = "gradient",
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
    bounds_of(variant)
    scores_of(relevance)
    _validation.check_relevant(relevant)
    _validation.check_choice("scope", scope, ("global", "leaf"))
    _validation.check_choice("accumulation", accumulation, ("optimisable", "all"))
    _validation.check_dtype("accumulator_dtype", accumulator_dtype)
    _validation.check_scalar("initial_weight", initial_weight, above=0)
    if not callable(learning_rate):
        _validation.check_scalar("learning_rate", learning_rate, least=0)
    if not (decrease_schedule is None or callable(decrease_schedule)):
        _validation.check_scalar("decrease_schedule", decrease_schedule, least=0)
    if momentum is not None:
        _validation.check_scalar("momentum", momentum, least=0, below=1)

    def init_fn(params: optax.Params) -> Any:
        _validation.check_real_leaves("params", params)
        if scope == "global":
            # eval_shape: `init` also takes trees of shapes, without arrays.
            shapes = jax.tree.leaves(jax.eval_shape(lambda tree: tree, params))
            _validation.check_relevant(relevant, sum(x.size for x in shapes))
        leaves = jax.tree.leaves(params)
        dtypes = [accumulator_dtype or jnp.result_type(leaf) for leaf in leaves]
        average = None
        if momentum is not None:
            average = weights.initial(params, 0, accumulator_dtype)
        return ScaleByPrunadagState(
            count=jnp.zeros([], jnp.int32),
            optimisable_weight=weights.initial(
                params, initial_weight, accumulator_dtype
            ),
            decreasable_weight=weights.initial(
                params, initial_weight, accumulator_dtype
            ),
            gradient_average=average,
            threshold=jnp.zeros(
                () if scope == "global" else (len(leaves),),
                jnp.result_type(*dtypes) if dtypes else jnp.float32,
            ),
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> Any:
        del extra_args
        if params is None:
            raise ValueError(NO_PARAMS_MSG)
        _validation.check_real_leaves("params", params)
        _validation.check_real_leaves("updates", updates)
        _validation.check_same_trees("updates", updates, "params", params)
        _validation.check_same_shapes(
            "state.optimisable_weight", state.optimisable_weight, "params", params
        )
        sorted_ = _sort(
            updates,
            state,
            params,
            learning_rate=learning_rate,
            relevant=relevant,
            variant=variant,
            relevance=relevance,
            decrease_schedule=decrease_schedule,
            momentum=momentum,
            scope=scope,
        )
        classes, direction = sorted_.classes, sorted_.direction
        # Both steps divide by the weights that are carried on, which are (9) on O_k and
        # (12) on D_k: so XLA can update every array in place, one loop for each.
        if accumulation == "all":
            optimisable_weight = weights.accumulate(state.optimisable_weight, updates)
        else:
            optimisable_weight = weights.accumulate_on(
                classes.optimisable, state.optimisable_weight, updates
            )
        decreasable_weight = weights.accumulate_on(
            classes.decreasable, state.decreasable_weight, params
        )
        # Step 4.
        optimisable = steps.optimisable_step(
            direction, optimisable_weight, sorted_.learning_rate
        )
        optimisable = steps.limit(classes.acceptable, optimisable, classes.upper)
        # Step 5.
        radius = steps.trust_radius(params, decreasable_weight)
        decreasable = steps.decreasable_step(direction, params, classes.lower, radius)
        # Step 6 is optax.apply_updates; the sign is that of scale_by_*.
        scaled = jax.tree.map(
            lambda d, low, opt, x: -jnp.where(d, low, opt).astype(jnp.result_type(x)),
            classes.decreasable,
            decreasable,
            optimisable,
            params,
        )
        return scaled, ScaleByPrunadagState(
            count=optax.safe_increment(state.count),
            optimisable_weight=optax.tree.cast_like(
                optimisable_weight, state.optimisable_weight
            ),
            decreasable_weight=optax.tree.cast_like(
                decreasable_weight, state.decreasable_weight
            ),
            gradient_average=sorted_.gradient_average,
            threshold=None
            if state.threshold is None
            else optax.tree.cast_like(classes.threshold, state.threshold),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def prunadag(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    relevant: optax.ScalarOrSchedule = 0.1,
    *,
    variant: str | Bounds = "v3",
    relevance: str | Callable[[Any, Any], Any] = "gradient",
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
        article's least squares can be pruned further (benchmarks/results/readings.md).
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
            learning_rate,
            relevant,
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


def classification_at(
    gradients: optax.Updates,
    state: ScaleByPrunadagState,
    params: optax.Params,
    *,
    learning_rate: optax.ScalarOrSchedule = 1.0,
    relevant: optax.ScalarOrSchedule = 0.1,
    variant: str | Bounds = "v3",
    relevance: str | Callable[[Any, Any], Any] = "gradient",
    decrease_schedule: optax.ScalarOrSchedule | None = None,
    momentum: chex.Numeric | None = None,
    scope: str = "global",
) -> Classification:
    """The classification that `update` would make from this state, for inspection.

    Args:
      gradients: pytree of gradients g_k.
      state: the transformation's state before that update.
      params: pytree of parameters x_k.
      learning_rate: this and the others as given to `prunadag`.
      relevant: see `prunadag`.
      variant: see `prunadag`.
      relevance: see `prunadag`.
      decrease_schedule: see `prunadag`.
      momentum: see `prunadag`.
      scope: see `prunadag`.

    Returns:
      The `Classification`.

    Raises:
      ValueError: for trees that do not match.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax import scale_by_prunadag
      >>> from prunadag_optax.prunadag import classification_at
      >>> x, g = jnp.ones(3), jnp.array([3.0, -1.0, -2.0])
      >>> state = scale_by_prunadag(relevant=1).init(x)
      >>> classification_at(g, state, x, relevant=1).optimisable.tolist()
      [True, False, False]
    """
    _validation.check_same_trees("gradients", gradients, "params", params)
    return _sort(
        gradients,
        state,
        params,
        learning_rate=learning_rate,
        relevant=relevant,
        variant=variant,
        relevance=relevance,
        decrease_schedule=decrease_schedule,
        momentum=momentum,
        scope=scope,
    ).classes


class _Sorted(NamedTuple):
    """The outcome of steps 1 to 3 of one iteration."""

    classes: Classification
    direction: Any  # what takes the place of g_k: itself, or its average
    learning_rate: Any
    gradient_average: Any


def _sort(
    gradients, state, params, *, learning_rate, relevant, decrease_schedule, momentum,
    **settings,
) -> _Sorted:  # fmt: skip
    count = state.count
    learning_rate = value_at(learning_rate, count)
    direction, average = _average(gradients, state, momentum)
    classes = classify_accumulated(
        direction,
        params,
        (state.optimisable_weight, gradients),
        weights.accumulate,
        relevant=value_at(relevant, count),
        decrease=value_at(
            _harmonic if decrease_schedule is None else decrease_schedule, count
        ),
        learning_rate=learning_rate,
        guess=state.threshold,
        **settings,
    )
    return _Sorted(classes, direction, learning_rate, average)


def _average(gradients, state, momentum):
    """The direction of this iteration and the average to keep."""
    if momentum is None:
        return gradients, None
    average = jax.tree.map(
        lambda m, g: momentum * working(m) + (1 - momentum) * working(g),
        state.gradient_average,
        gradients,
    )
    correction = 1 - momentum ** (state.count + 1)
    direction = jax.tree.map(lambda m: m / correction, average)
    return direction, optax.tree.cast_like(average, state.gradient_average)


def _harmonic(count):
    return 1.0 / (count + 1.0)
