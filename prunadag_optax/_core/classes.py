"""Sorts components into optimisable and decreasable, at every step anew.

The relevant components are those with the T largest scores. Of the others, a component
is acceptable when the Adagrad step would shrink it by an amount between two bounds a
and b. Relevant and acceptable components are optimisable and take the Adagrad step;
the rest are decreasable. A variant is nothing but a choice of a and b (Table 1).
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from prunadag_optax._common import checks
from prunadag_optax._common.dtypes import widest, working
from prunadag_optax._core.steps import optimisable_step
from prunadag_optax._core.variants import (
    Bounds,
    Score,
    Statistics,
    bounds_of,
    scores_of,
)
from prunadag_optax._ranking import engine, keys, threshold
from prunadag_optax._ranking.counts import target_count

Leaves = list[jax.Array]


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


class Relevant(NamedTuple):
    """R_k of equation (4): the components whose score reaches the T-th largest.

    R_k is not stored: whoever reads it compares the scores anew, which is cheaper.

    Attributes:
      keys: the T-th largest score as a key, shape (); one for each leaf.
      dtype: the dtype among whose keys they are.
      magnitude: the T-th largest score, float32, shape () or by leaf (leaves,).
    """

    keys: Leaves
    dtype: Any
    magnitude: jax.Array

    def __call__(self, score: jax.Array, key: jax.Array) -> jax.Array:
        """Bool array, True where the scores of one leaf reach the leaf's key."""
        return threshold.reaches(score, key, self.dtype)


def relevant_set(
    score: Leaves, relevant: chex.Numeric, by_leaf: bool, hint: jax.Array | None
) -> Relevant:
    """The components with the T largest scores, and those that tie with the T-th.

    Args:
      score: scores of each leaf, taken in magnitude.
      relevant: T, or the share T / n.
      by_leaf: whether each leaf is ranked on its own.
      hint: the magnitude of an iteration before, for speed.

    Returns:
      R_k.
    """
    sizes = [x.size for x in score]
    groups = sizes if by_leaf else [sum(sizes)]
    targets = [target_count(relevant, size) for size in groups]
    found = threshold.kth_largest_keys(score, targets, hint, by_leaf=by_leaf)
    magnitude = keys.key_to_magnitude(found, score).astype(jnp.float32)
    if by_leaf:
        return Relevant([*found], widest(score), magnitude)
    return Relevant([found[0]] * len(score), widest(score), magnitude[0])


def squares(g: jax.Array, x: jax.Array, in_r: jax.Array) -> tuple[jax.Array, ...]:
    """What ||g||_R^2 and ||x||_S^2 are sums of, in one leaf.

    Args:
      g: gradients g_k.
      x: parameters x_k, same shape.
      in_r: bool, True on R_k.

    Returns:
      g^2 on R_k and x^2 on S_k, 0 elsewhere, in one dtype of at least float32.
    """
    # The zeros among them add nothing; so this does, cheaper than to compare the signs.
    same_sign = jnp.where(g > 0, x, jnp.where(g < 0, -x, 0)) > 0
    g, x = working(g), working(x)
    dtype = jnp.promote_types(g.dtype, x.dtype)
    g = jnp.where(in_r, g, 0).astype(dtype)
    x = jnp.where(~in_r & same_sign, x, 0).astype(dtype)
    return g * g, x * x


def statistics(
    g: Leaves,
    x: Leaves,
    score: Leaves,
    relevant: Relevant,
    decrease: chex.Numeric,
    by_leaf: bool,
) -> list[Statistics]:
    r"""What the bounds of Table 1 depend on, for each leaf.

    .. math:: \|g_k\|_{R_k}, \quad \|x_k\|_{S_k}, \quad
       S_k = \{ i \notin R_k : \mathrm{sign}(x_{i,k}) = \mathrm{sign}(g_{i,k}) \}

    Args:
      g: gradients g_k of each leaf.
      x: parameters x_k.
      score: the scores that R_k is chosen by.
      relevant: R_k.
      decrease: d_k.
      by_leaf: whether the norms are those of each leaf, or of all leaves.

    Returns:
      The `Statistics` of each leaf.
    """

    def of_leaf(g, x, score, key):
        return squares(g, x, relevant(score, key))

    key = jnp.stack(relevant.keys) if by_leaf else relevant.keys[0]

    def norms(g, x, score, key):
        sums = engine.sums_by_leaf(of_leaf, [g, x, score], [key])
        total = (s if by_leaf else jnp.sum(s, keepdims=True) for s in sums)
        g_R, x_S = (jnp.sqrt(s) for s in total)
        return g_R, x_S, jnp.where(x_S > 0, g_R / jnp.where(x_S > 0, x_S, 1), 0)

    found = engine.stored(norms, g, x, score, key)
    rows = range(len(g)) if by_leaf else [0] * len(g)
    return [Statistics(decrease, *(value[i] for value in found)) for i in rows]


def acceptable(
    g: jax.Array,
    x: jax.Array,
    in_r: jax.Array,
    a: jax.Array,
    b: jax.Array,
    s: jax.Array,
) -> jax.Array:
    r"""A_k in one leaf: outside R_k, and the Adagrad step shrinks x by a to b.

    .. math:: A_k = \{ i \notin R_k : \mathrm{sign}(x_{i,k}) = \mathrm{sign}(g_{i,k}),\;
       a_{i,k} \le |s_{i,k}| \le b_{i,k} \}

    Args:
      g: gradients g_k.
      x: parameters x_k, same shape as all others.
      in_r: bool, True on R_k.
      a: lower bounds, in units of the parameter.
      b: upper bounds.
      s: the Adagrad steps (10) of all components.

    Returns:
      Bool array.

    References:
      Porcelli, Seraghiti, Toint (2026), equations (6) and (7).
    """
    length = jnp.abs(s)
    return ~in_r & (jnp.sign(x) == jnp.sign(g)) & (a <= length) & (length <= b)


def classify(
    gradients: optax.Updates,
    params: optax.Params,
    weight: Any,
    *,
    relevant: chex.Numeric = 0.1,
    decrease: chex.Numeric = 1.0,
    learning_rate: chex.Numeric = 1.0,
    variant: str | Bounds = "v3",
    relevance: str | Score = "gradient",
    scope: str = "global",
    hint: jax.Array | None = None,
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
      hint: `Classification.threshold` of an iteration before, for speed; it does not
        change the result.

    Returns:
      The `Classification`.

    Raises:
      ValueError: for an unknown `variant`, `relevance` or `scope`, or for trees that
        do not match.

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
    checks.choice("scope", scope, ("global", "leaf"))
    checks.relevant(relevant)
    for name, tree in (("gradients", gradients), ("weight", weight)):
        checks.same_trees(name, tree, "params", params)
    score = checked_scores(relevance, gradients, params)
    treedef, by_leaf = jax.tree.structure(params), scope == "leaf"
    g, x, w, score = map(treedef.flatten_up_to, (gradients, params, weight, score))
    if not any(leaf.size for leaf in x):
        nothing = treedef.unflatten([jnp.zeros(jnp.shape(leaf)) for leaf in x])
        empty = jax.tree.map(lambda leaf: leaf > 0, nothing)
        last = jnp.zeros(len(x) if by_leaf else ())
        return Classification(empty, empty, empty, nothing, nothing, last)
    bounds = bounds_of(variant)
    found = relevant_set(score, relevant, by_leaf, hint)
    measured = statistics(g, x, score, found, decrease, by_leaf)
    rows = []
    for g_i, x_i, w_i, score_i, key, stats in zip(
        g, x, w, score, found.keys, measured, strict=True
    ):
        a, b = (bound(jnp.abs(working(x_i)), stats) for bound in bounds)
        in_r = found(score_i, key)
        step = optimisable_step(g_i, w_i, learning_rate)
        in_a = acceptable(g_i, x_i, in_r, a, b, step)
        rows.append((in_r, in_a, ~(in_r | in_a), a, b))
    in_r, in_a, in_d, a, b = map(treedef.unflatten, zip(*rows, strict=True))
    return Classification(in_r, in_a, in_d, a, b, found.magnitude)


def checked_scores(relevance: str | Score, gradients: Any, params: Any) -> Any:
    """The scores of step 1 as a tree like the parameters.

    Args:
      relevance: a name or a function (gradients, params) -> tree of scores.
      gradients: pytree of gradients.
      params: pytree of parameters.

    Returns:
      Pytree of scores.

    Raises:
      ValueError: if a function returns another tree.
    """
    score = scores_of(relevance)(gradients, params)
    if callable(relevance):
        checks.same_trees("relevance(gradients, params)", score, "params", params)
    return score
