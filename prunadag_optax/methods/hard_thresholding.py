"""Iterative hard thresholding: after every step only the k largest weights stay.

The step of any optimizer is followed by H_k, the projection on the vectors with no more
than k nonzeros. For gradient descent with a step of 1/L the fixed points of this
iteration are known, and which of them it can converge to: `stability` tells them apart.
"""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from prunadag_optax import masks
from prunadag_optax._common import checks
from prunadag_optax._common.dtypes import cast_like, value_at, working
from prunadag_optax._common.leaves import parts_of
from prunadag_optax._common.transformation import checked
from prunadag_optax._ranking.counts import target_count
from prunadag_optax._ranking.exact import mask_of_parts
from prunadag_optax._ranking.threshold import kth_largest_magnitude


def hard_threshold(
    params: optax.Params,
    k: chex.Numeric,
    *,
    scope: str = "global",
    where: masks.Where | None = None,
) -> optax.Params:
    r"""The k components with the largest magnitudes; zero in place of the others.

    .. math:: H_k(x) \in \arg\min_{\|z\|_0 \le k} \|z - x\|_2

    Exactly k components stay. Of magnitudes that tie at the border the later stay, in
    the order of the leaves and row-major within a leaf, as in `masks`.

    Args:
      params: pytree of real floating arrays.
      k: a fraction of the components in (0, 1] as a float, or a count as an integer. A
        scalar array may be traced.
      scope: "global" takes the k largest of all leaves together; "leaf" those of each
        leaf, at most all of it.
      where: predicate (path, leaf) -> bool, False for leaves to leave as they are;
        None: `masks.prunable`.

    Returns:
      Pytree like `params`.

    Raises:
      ValueError: for an argument out of range, or a leaf that is no real float.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax.methods import hard_thresholding
      >>> hard_thresholding.hard_threshold(jnp.array([1.0, -3.0, 1.0, 2.0]), 2).tolist()
      [0.0, -3.0, 0.0, 2.0]

    References:
      T. Blumensath, M. E. Davies, Iterative thresholding for sparse approximations,
      J. Fourier Anal. Appl. 14 (2008) 629-654.
    """
    _check(k, scope)
    return masks.apply_mask(params, _mask(params, k, scope, where))


class IterativeHardThresholdingState(NamedTuple):
    """State of `iterative_hard_thresholding`."""

    # The iterations done, shape=(), dtype=int32. optax's states have the same name.
    count: jax.typing.ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride]
    base: optax.OptState  # of the optimizer whose steps are thresholded


def iterative_hard_thresholding(
    base: optax.GradientTransformation,
    k: optax.ScalarOrSchedule,
    *,
    scope: str = "global",
    where: masks.Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Any optimizer, with all but the k largest weights set to zero after each step.

    .. math:: x_{t+1} \in H_k(x_t + u_t), \quad
       u_t = - \gamma \nabla f(x_t) \text{ for base = sgd}(\gamma)

    With gradient descent at :math:`\gamma \le 1/L`, where L bounds the curvature of f
    on vectors with few nonzeros, f never rises:

    .. math:: f(x_{t+1}) \le f(x_t) - \tfrac{\gamma}{2} \|\nabla_I f(x_t)\|_2^2
       - \tfrac12 \left(\tfrac1\gamma - L\right) \|x_{t+1} - x_t\|_2^2

    with I the support of x_t; so the gradient on the support tends to zero. A weight at
    zero returns when its step is longer than the smallest weight that stays. With
    momentum or noise nothing is promised, but pruned weights can return likewise.

    Args:
      base: the optimizer; it sees the gradients of all weights, pruned ones included.
      k: how many weights stay: a fraction in (0, 1] as a float, a count as an integer,
        or a schedule count -> value of either.
      scope: "global" keeps the k largest of all leaves together; "leaf" those of each.
      where: predicate (path, leaf) -> bool, False for leaves never to prune; None:
        `masks.prunable`.

    Returns:
      An `optax.GradientTransformationExtraArgs` with
      `IterativeHardThresholdingState`. Its `update` needs `params`, hands extra
      arguments to the base, and returns updates in the parameters' dtypes. A weight
      that stays moves exactly as the base moves it.

    Raises:
      ValueError: naming an argument out of range, or trees that do not match.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from prunadag_optax.methods import hard_thresholding
      >>> loss = lambda x: jnp.sum((x - jnp.array([3.0, 0.1, 0.0, -2.0])) ** 2) / 2
      >>> tx = hard_thresholding.iterative_hard_thresholding(optax.sgd(1.0), 2)
      >>> x = jnp.zeros(4)
      >>> updates, state = tx.update(jax.grad(loss)(x), tx.init(x), x)
      >>> optax.apply_updates(x, updates).tolist()
      [3.0, 0.0, 0.0, -2.0]

    References:
      S. Damadi, J. Shen, Gradient properties of hard thresholding operator,
      arXiv:2209.08247 (2022).
    """
    _check(k, scope)
    checks.transformation("base", base)
    extended = optax.with_extra_args_support(base)

    def init(params: optax.Params) -> IterativeHardThresholdingState:
        start = jnp.zeros([], jnp.int32)
        return IterativeHardThresholdingState(start, extended.init(params))

    def update(updates, state, params, **extra_args):
        steps, inner = extended.update(updates, state.base, params, **extra_args)
        # What the loop would hold, rounded to its dtypes, is ranked.
        moved = optax.apply_updates(params, cast_like(steps, params))
        mask = _mask(moved, value_at(k, state.count), scope, where)
        # x + (-x) is exactly zero; a weight that stays takes the base's own step.
        held, _ = masks.keep_pruned(mask).update(
            steps, masks.KeepPrunedState(mask), params
        )
        count = optax.safe_increment(state.count)
        return held, IterativeHardThresholdingState(count, inner)

    return checked(init, update)


class Stability(NamedTuple):
    """How far a point is from being stationary, and from leaving its support.

    Attributes:
      residual: how far the step moves the weights on the support, the largest of
        them, in units of the parameter; over all weights where fewer than k are not
        zero. 0 at a stationary point.
      margin: the smallest weight on the support minus the longest step off it, in units
        of the parameter; negative at an HT-unstable point. 0 where fewer than k weights
        are not zero, -inf where more are.
    """

    residual: jax.Array
    margin: jax.Array


def stability(
    params: optax.Params,
    gradients: optax.Updates,
    k: chex.Numeric,
    learning_rate: chex.Numeric,
    *,
    scope: str = "global",
    where: masks.Where | None = None,
) -> Stability:
    r"""What decides whether hard thresholding stays at a point.

    .. math::
      \text{residual} = \gamma \max_{i \in I} |\nabla_i f(x)|, \quad
      \text{margin} = \min_{i \in I} |x_i| - \gamma \max_{j \notin I} |\nabla_j f(x)|

    with I the support of x. A stationary point has residual 0. One with margin >= 0 is
    HT-stable: it is a fixed point of :math:`H_k(x - \gamma \nabla f(x))`. One with a
    negative margin is HT-unstable: the iteration changes its support at once, from
    every start in a neighbourhood. The smaller the step, the more points are stable.

    Args:
      params: pytree of x, with at most k nonzeros.
      gradients: pytree of the gradient of f at x, same structure and shapes.
      k: a fraction in (0, 1] as a float, or a count as an integer.
      learning_rate: gamma > 0, of the gradient step before the thresholding.
      scope: "global", or "leaf" for a k of each leaf; then the worst leaf counts.
      where: predicate (path, leaf) -> bool, False for leaves that are not thresholded,
        which only have a residual; None: `masks.prunable`.

    Returns:
      The `Stability`.

    Raises:
      ValueError: for an argument out of range, or trees that do not match.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax.methods import hard_thresholding
      >>> x, g = jnp.array([2.0, 0.0, 0.0]), jnp.array([0.0, 1.0, -6.0])
      >>> float(hard_thresholding.stability(x, g, 1, 0.5).margin)
      -1.0

    References:
      Damadi, Shen (2022). A. Beck, Y. C. Eldar, Sparsity constrained nonlinear
      optimization: optimality conditions and algorithms, SIAM J. Optim. 23 (2013)
      1480-1509, there as L-stationarity.
    """
    _check(k, scope)
    checks.scalar("learning_rate", learning_rate, above=0)
    checks.real_leaves("gradients", gradients)
    checks.same_trees("gradients", gradients, "params", params)
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(params)]
    steps = [
        jnp.asarray(learning_rate * jnp.abs(working(leaf)))
        for leaf in jax.tree.leaves(gradients)
    ]
    groups = parts_of(params, where, scope).groups
    inside = {i for group, *_ in groups for i in group}
    free = [_largest([u]) for i, u in enumerate(steps) if i not in inside]
    parts = [
        _stability_of([leaves[i] for i in group], [steps[i] for i in group], k)
        for group, _, size in groups
        if size
    ]
    residuals = [part.residual for part in parts] + free
    return Stability(
        functools.reduce(jnp.maximum, residuals, jnp.zeros(())),
        functools.reduce(
            jnp.minimum, [part.margin for part in parts], jnp.asarray(jnp.inf)
        ),
    )


def ht_stable(
    params: optax.Params,
    gradients: optax.Updates,
    k: chex.Numeric,
    learning_rate: chex.Numeric,
    *,
    tolerance: float = 1e-6,
    scope: str = "global",
    where: masks.Where | None = None,
) -> jax.Array:
    r"""Whether a point is stationary and HT-stable, a fixed point of the iteration.

    .. math:: x \in H_k(x - \gamma \nabla f(x))

    Args:
      params: pytree of x.
      gradients: pytree of the gradient of f at x, same structure and shapes.
      k: a fraction in (0, 1] as a float, or a count as an integer.
      learning_rate: gamma > 0.
      tolerance: the largest `Stability.residual` that is taken for 0, in units of the
        parameter. The margin has no tolerance.
      scope: "global" or "leaf".
      where: predicate (path, leaf) -> bool, as for `stability`.

    Returns:
      Scalar bool array.

    Raises:
      ValueError: for an argument out of range, or trees that do not match.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax.methods import hard_thresholding
      >>> x, g = jnp.array([2.0, 0.0, 0.0]), jnp.array([0.0, 1.0, -6.0])
      >>> [bool(hard_thresholding.ht_stable(x, g, 1, rate)) for rate in (0.5, 0.25)]
      [False, True]

    References:
      Damadi, Shen (2022).
    """
    checks.scalar("tolerance", tolerance, least=0)
    point = stability(params, gradients, k, learning_rate, scope=scope, where=where)
    return (point.residual <= tolerance) & (point.margin >= 0)


def _stability_of(leaves: list[Any], steps: list[Any], k: Any) -> Stability:
    """The `Stability` of leaves that are thresholded together."""
    size = sum(leaf.size for leaf in leaves)
    k = jnp.asarray(target_count(k, size))
    support = [masks.nonzero(leaf) for leaf in leaves]
    number = sum(jnp.sum(s, dtype=k.dtype) for s in support)
    on = [jnp.where(s, u, 0) for s, u in zip(support, steps, strict=True)]
    off = [jnp.where(s, 0, u) for s, u in zip(support, steps, strict=True)]
    # With k nonzeros, the k-th largest magnitude is the smallest on the support.
    smallest = working(kth_largest_magnitude(leaves, k))
    margin = jnp.where(number == k, smallest - _largest(off), -jnp.inf)
    return Stability(
        jnp.where(number < k, _largest(steps), _largest(on)),
        jnp.where(number < k, 0, margin),
    )


def _mask(params: Any, k: Any, scope: str, where: masks.Where | None) -> Any:
    """Pytree of bool, True on the k largest; None for leaves that are left out."""
    return mask_of_parts(
        params,
        parts_of(params, where, scope),
        lambda group, size: size - target_count(k, size),
    )


def _largest(leaves: list[jax.Array]) -> Any:
    largest = (jnp.max(leaf, initial=0) for leaf in leaves)
    return functools.reduce(jnp.maximum, largest, jnp.zeros(()))


def _check(k: Any, scope: str) -> None:
    checks.choice("scope", scope, ("global", "leaf"))
    if not callable(k):
        checks.fraction_or_count("k", k)
