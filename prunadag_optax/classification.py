"""Sorts components into optimisable and decreasable, at every step anew.

The relevant components are those with the T largest scores. Of the others, a component
is acceptable when the Adagrad step would shrink it by an amount between two bounds a
and b. Relevant and acceptable components are optimisable and take the Adagrad step;
the rest are decreasable. A variant is nothing but a choice of a and b (Table 1).
"""

import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from prunadag_optax import _backend, selection
from prunadag_optax._precision import working
from prunadag_optax._validation import (
    check_choice,
    check_relevant,
    check_same_trees,
)


class Statistics(NamedTuple):
    """The scalars that the bounds a and b may depend on, of one iteration.

    Attributes:
      decrease: d_k, the value of the decrease schedule.
      gradient_norm: ||g_k||_{R_k}, Euclidean, over the relevant components.
      parameter_norm: ||x_k||_{S_k}, over the components outside R_k whose parameter and
        gradient have the same sign.
      balance: the first norm over the second, and 0 where the second is 0.
    """

    decrease: chex.Numeric
    gradient_norm: jax.Array
    parameter_norm: jax.Array
    balance: jax.Array


Bound = Callable[[jax.Array, Statistics], jax.Array]


class Bounds(NamedTuple):
    """The bounds a (`lower`) and b (`upper`) of equations (6) and (7).

    Each is a function (|x_k| of one leaf, Statistics) -> bound of the same shape (or a
    scalar), in units of the parameter. The convergence theory asks of them only that
    they are never negative.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax import Bounds, prunadag
      >>> halving = Bounds(lower=lambda x, s: s.decrease * x / 2, upper=lambda x, s: x)
      >>> tx = prunadag(0.1, variant=halving)
    """

    lower: Bound
    upper: Bound


class Classification(NamedTuple):
    """The classes of one iteration, as pytrees like the parameters.

    Attributes:
      relevant: bool, True on R_k, the components with the T largest scores.
      acceptable: bool, True on A_k.
      decreasable: bool, True on D_k, the complement of `optimisable`.
      lower: float, the bound a_k, which also limits the decreasable step (17).
      upper: float, the bound b_k.
      threshold: float32, the T-th largest score (to the precision of float32), which
        is the least that is relevant; shape () with scope "global", else (leaves,).
    """

    relevant: Any
    acceptable: Any
    decreasable: Any
    lower: Any
    upper: Any
    threshold: jax.Array

    @property
    def optimisable(self) -> Any:
        """Pytree of bool, True on O_k, the union of R_k and A_k."""
        return jax.tree.map(jnp.logical_not, self.decreasable)


def _plain(magnitude, statistics):
    return magnitude * statistics.decrease


def _balanced(magnitude, statistics):
    factor = statistics.decrease * statistics.balance
    # Where x = 0 the bound is 0, even if the balance overflows.
    return jnp.where(magnitude > 0, magnitude * factor, 0)


def _unbounded(magnitude, statistics):
    del statistics
    return jnp.full_like(magnitude, jnp.inf)


def _magnitude(magnitude, statistics):
    del statistics
    return magnitude


def _nothing(magnitude, statistics):
    # No length is <= -inf, so no component is acceptable.
    del statistics
    return jnp.full_like(magnitude, -jnp.inf)


VARIANTS: dict[str, Bounds] = {
    "v1": Bounds(_balanced, _unbounded),
    "v2": Bounds(_plain, _unbounded),
    "v3": Bounds(_balanced, _magnitude),
    "v4": Bounds(_plain, _magnitude),
    "relevant_only": Bounds(_balanced, _nothing),
}

RELEVANCE: dict[str, Callable[[Any, Any], Any]] = {
    "gradient": lambda gradients, params: gradients,
    "magnitude": lambda gradients, params: params,
    "taylor": lambda gradients, params: jax.tree.map(
        lambda g, x: working(g) * working(x), gradients, params
    ),
}


def bounds_of(variant: str | Bounds) -> Bounds:
    """The bounds that a `variant` argument stands for: a name or a pair of functions.

    Args:
      variant: a key of Table 1, or `Bounds`, or any pair (lower, upper) of functions.

    Returns:
      The `Bounds`.

    Raises:
      ValueError: if it is neither.
    """
    if isinstance(variant, str):
        if variant in VARIANTS:
            return VARIANTS[variant]
    elif (
        isinstance(variant, tuple | list)
        and len(variant) == 2
        and all(callable(bound) for bound in variant)
    ):
        return Bounds(*variant)
    raise ValueError(
        f"variant must be one of {sorted(VARIANTS)} or a pair of functions "
        f"(lower, upper); got {variant!r}."
    )


def capped(variant: str | Bounds) -> Bounds:
    r"""A variant whose lower bound a never exceeds |x|.

    .. math:: a_{i,k} \leftarrow \min(a_{i,k}, |x_{i,k}|)

    A decreasable step then never carries a component past zero, which v1, v3 and
    relevant_only can do early in a run, where ||g||_R is far above ||x||_S.

    Args:
      variant: what `prunadag` takes as `variant`.

    Returns:
      Bounds to pass as `variant`.

    Raises:
      ValueError: if `variant` is neither a known name nor a pair of functions.

    Examples:
      >>> from prunadag_optax import capped, prunadag
      >>> tx = prunadag(0.1, variant=capped("v3"))
    """
    bounds = bounds_of(variant)
    return Bounds(lambda x, s: jnp.minimum(bounds.lower(x, s), x), bounds.upper)


def target_count(relevant: Any, size: int) -> int | jax.Array:
    """T, the target number of relevant components among `size`.

    Args:
      relevant: a fraction of `size` in (0, 1] when it is a float or a float array, T
        itself when it is an integer or an integer array.
      size: n >= 1, the number of components.

    Returns:
      max(1, round(relevant * n)) or min(relevant, n). A Python int for a Python number;
      otherwise a scalar array, clipped to 1..n.
    """
    if isinstance(relevant, numbers.Integral):
        return min(int(relevant), size)
    if isinstance(relevant, numbers.Real):
        return min(max(1, round(float(relevant) * size)), size)
    count = jnp.asarray(relevant)
    if jnp.issubdtype(count.dtype, jnp.floating):
        # float32 at least: a bfloat16 product would round T to 8 significant bits.
        count = jnp.round(jnp.minimum(working(count), 1) * size)
    return jnp.clip(count.astype(selection.count_dtype(size)), 1, size)


def adagrad_ratio(
    gradient: jax.Array, weight: jax.Array, learning_rate: chex.Numeric
) -> jax.Array:
    """The optimisable step of one leaf up to its sign, eta g / w^O.

    The classification compares its magnitude with the bounds a and b, and the step (10)
    takes it, so both call this function.

    Args:
      gradient: g_k, any shape.
      weight: w^O_k by (9), same shape.
      learning_rate: eta_k >= 0, dimensionless.

    Returns:
      Array of the same shape, in at least float32, in units of the parameter.
    """
    return jnp.asarray(learning_rate * (working(gradient) / working(weight)))


def _squares(g, x, in_relevant) -> tuple[jax.Array, jax.Array]:
    """What ||g||_R^2 and ||x||_S^2 are sums of, in one leaf."""
    # The zeros among them add nothing; so this does, cheaper than comparing the signs.
    same_sign = jnp.where(g > 0, x, jnp.where(g < 0, -x, 0)) > 0
    in_s = ~in_relevant & same_sign
    g, x = working(g), working(x)
    dtype = jnp.promote_types(g.dtype, x.dtype)
    g, x = (
        jnp.where(in_relevant, g, 0).astype(dtype),
        jnp.where(in_s, x, 0).astype(dtype),
    )
    return g * g, x * x


# The class of a component, one byte.
_RELEVANT, _ACCEPTABLE, _DECREASABLE = (np.int8(i) for i in range(3))


def _kind(g, x, weight, in_relevant, bounds, statistics, learning_rate) -> jax.Array:
    """The classes of the components of one leaf."""
    magnitude = jnp.abs(working(x))
    length = jnp.abs(adagrad_ratio(g, weight, learning_rate))
    acceptable = (
        (jnp.sign(x) == jnp.sign(g))
        & (bounds.lower(magnitude, statistics) <= length)
        & (length <= bounds.upper(magnitude, statistics))
    )
    return jnp.where(
        in_relevant, _RELEVANT, jnp.where(acceptable, _ACCEPTABLE, _DECREASABLE)
    )


def _of_nothing(params, treedef, by_leaf) -> Classification:
    """The classification of a tree without elements."""
    masks, bounds = (
        treedef.unflatten([jnp.zeros(jnp.shape(x), dtype) for x in params])
        for dtype in (bool, jnp.float32)
    )
    threshold = jnp.zeros(len(params) if by_leaf else ())
    return Classification(masks, masks, masks, bounds, bounds, threshold)


def classify_accumulated(
    gradients: Any,
    params: Any,
    accumulated: tuple[Any, ...],
    weight_of: Callable[..., Any],
    *,
    relevant: chex.Numeric,
    decrease: chex.Numeric,
    learning_rate: chex.Numeric,
    variant: str | Bounds,
    relevance: str | Callable[[Any, Any], Any],
    scope: str,
    guess: jax.Array | None,
) -> Classification:
    """`classify` with w^O_k as `weight_of(*accumulated)`, which need not be stored."""
    check_choice("scope", scope, ("global", "leaf"))
    check_relevant(relevant)
    score = scores_of(relevance)(gradients, params)
    if callable(relevance):
        check_same_trees("relevance(gradients, params)", score, "params", params)
    bounds = bounds_of(variant)
    treedef = jax.tree.structure(params)
    gradients, params, score = (
        treedef.flatten_up_to(tree) for tree in (gradients, params, score)
    )
    by_leaf, sizes = scope == "leaf", [jnp.size(x) for x in params]
    if not any(sizes):
        return _of_nothing(params, treedef, by_leaf)
    blocks = _backend.blocks_of(params, gradients, score)
    # Where each leaf is among the leaves in the order of the blocks.
    order = np.concatenate([np.array(block) for block in blocks])
    place = np.argsort(order) * by_leaf
    dtype = selection.widest(score)
    targets = [
        jnp.asarray(target_count(relevant, size), selection.count_dtype(size))
        for size in ([sizes[i] for i in order] if by_leaf else [sum(sizes)])
    ]
    if guess is not None:
        guess = guess[order] if by_leaf else jnp.reshape(guess, 1)
        guess = selection.magnitude_to_key(guess, score)
    stacked = tuple(len(block) > 1 for block in blocks)
    columns = [_backend.stack(leaves, blocks) for leaves in (gradients, params, score)]
    found = selection.kth_largest_keys(
        columns[2], jnp.stack(targets), guess, by_leaf=by_leaf, stacked=stacked
    )

    def is_relevant(score, last):
        return selection.key_of(score, dtype) >= last

    def norms(*columns):
        def squares(i, g, x, score):
            last = found[place[blocks[i][0]]]
            if by_leaf and stacked[i]:
                last = found[place[np.array(blocks[i])], None]
            return _squares(g, x, is_relevant(score, last))

        sums = _backend.pair_sums_by_leaf(squares, *columns, stacked=stacked)
        g, x = (jnp.sqrt(s if by_leaf else jnp.sum(s, keepdims=True)) for s in sums)
        return g, x, jnp.where(x > 0, g / jnp.where(x > 0, x, 1), 0)

    measured = _backend.stored(norms, *columns)
    statistics = [Statistics(decrease, *(v[i] for v in measured)) for i in place]

    def kinds(g, x, accumulated, score):
        weight = treedef.flatten_up_to(weight_of(*accumulated))
        columns = zip(g, x, weight, score, place, statistics, strict=True)
        return [
            _kind(g, x, w, is_relevant(s, found[i]), bounds, statistics, learning_rate)
            for g, x, w, s, i, statistics in columns
        ]

    # Leaf by leaf: equal kernels are compiled once, and parts of a block are not equal.
    kind = _backend.stored(kinds, gradients, params, accumulated, score)
    lower, upper = (
        [
            bound(jnp.abs(working(x)), of_leaf)
            for x, of_leaf in zip(params, statistics, strict=True)
        ]
        for bound in bounds
    )
    threshold = selection.key_to_magnitude(found, score).astype(jnp.float32)
    return Classification(
        relevant=treedef.unflatten([k == _RELEVANT for k in kind]),
        acceptable=treedef.unflatten([k == _ACCEPTABLE for k in kind]),
        decreasable=treedef.unflatten([k == _DECREASABLE for k in kind]),
        lower=treedef.unflatten(lower),
        upper=treedef.unflatten(upper),
        threshold=threshold[place] if by_leaf else threshold[0],
    )


def classify(
    gradients: optax.Updates,
    params: optax.Params,
    weight: Any,
    *,
    relevant: chex.Numeric = 0.1,
    decrease: chex.Numeric = 1.0,
    learning_rate: chex.Numeric = 1.0,
    variant: str | Bounds = "v3",
    relevance: str | Callable[[Any, Any], Any] = "gradient",
    scope: str = "global",
    guess: jax.Array | None = None,
) -> Classification:
    r"""Sorts every component into relevant, acceptable or decreasable.

    .. math::
      R_k &= \text{the components with the } T \text{ largest scores} \\
      A_k &= \{ i \notin R_k : \mathrm{sign}(x_{i,k}) = \mathrm{sign}(g_{i,k}),\;
             a_{i,k} \le \eta_k |g_{i,k}| / w^O_{i,k} \le b_{i,k} \} \\
      O_k &= R_k \cup A_k, \qquad D_k = \text{the complement of } O_k

    Components whose scores tie with the T-th largest are all relevant, so |R_k| can
    exceed T; where that score is 0 every component is relevant.

    Args:
      gradients: pytree of gradients g_k.
      params: pytree of parameters x_k, same structure and shapes.
      weight: pytree of w^O_k, this iteration's gradient added in already (9).
      relevant: T as an integer, or as a fraction in (0, 1] of the components.
      decrease: d_k >= 0, the factor of |x| in a; 1/(k+1) in the article.
      learning_rate: eta_k >= 0, scales the step that a and b are compared with.
      variant: "v1", "v2", "v3", "v4", "relevant_only" or a pair of functions `Bounds`.
      relevance: the score: "gradient" |g|, "magnitude" |x|, "taylor" |g x|, or a
        function (gradients, params) -> pytree of scores, taken in magnitude.
      scope: "global" treats all leaves as one vector; "leaf" each leaf on its own,
        with T and both norms per leaf.
      guess: `Classification.threshold` of an iteration before, for speed; it does not
        change the result.

    Returns:
      The `Classification`.

    Raises:
      ValueError: for an unknown `variant`, `relevance` or `scope`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax import classify
      >>> x = jnp.array([1.0, 1.0, -1.0, 1.0])
      >>> g = jnp.array([9.0, 0.1, 0.2, 0.3])
      >>> classes = classify(g, x, jnp.ones(4), relevant=1, decrease=0.2, variant="v4")
      >>> classes.relevant.tolist()
      [True, False, False, False]
      >>> classes.acceptable.tolist()
      [False, False, False, True]
      >>> classes.decreasable.tolist()
      [False, True, True, False]

    References:
      Porcelli, Seraghiti, Toint (2026), equations (4), (6), (7) and Table 1.
    """
    return classify_accumulated(
        gradients,
        params,
        (weight,),
        lambda weight: weight,
        relevant=relevant,
        decrease=decrease,
        learning_rate=learning_rate,
        variant=variant,
        relevance=relevance,
        scope=scope,
        guess=guess,
    )


def scores_of(relevance: str | Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """The function (gradients, params) -> scores that a `relevance` stands for.

    Args:
      relevance: "gradient", "magnitude", "taylor", or such a function.

    Returns:
      The function.

    Raises:
      ValueError: if it is neither.
    """
    if callable(relevance):
        return relevance
    if isinstance(relevance, str) and relevance in RELEVANCE:
        return RELEVANCE[relevance]
    raise ValueError(
        f"relevance must be one of {sorted(RELEVANCE)} or a function (gradients, "
        f"params) -> scores; got {relevance!r}."
    )
