"""Regularisers of parameter trees: a value and its proximal operator.

A `Regulariser` is what the proximal optimizers, dual averaging and the Bregman methods
take. Each of the functions here makes one from a strength, which may be traced, and
from a choice of leaves. The other leaves are free, as biases and normalisation scales
are by default. A ValueError names the argument that is out of range.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax import lax

from prunadag_optax import masks
from prunadag_optax._common import checks
from prunadag_optax._common.dtypes import cast_like, working
from prunadag_optax._common.leaves import Where, chosen, prunable, ranked_together
from prunadag_optax.methods import balls
from prunadag_optax.methods.penalties import operators
from prunadag_optax.methods.penalties.groups import (
    Axis,
    group_axes,
    group_norms,
    group_weight,
)

# What numbers the groups of a leaf; a function gives None for a leaf without groups.
Groups = str | Callable[[tuple[Any, ...], jax.Array], Axis | None]

GROUPS = ("input", "output", "rows", "columns")


class Regulariser(NamedTuple):
    """A penalty R on a parameter tree, as pure functions.

    Attributes:
      value: params -> R(params), a scalar in at least float32. Its gradient is the
        shortest subgradient, 0 for what is zero.
      prox: (params, scaling) -> argmin_z 1/2 ||z - params||^2 + scaling R(z), a pytree
        like params.
      where: predicate (path, leaf) -> bool, True for the leaves that R covers. R does
        not depend on the others, and `prox` returns them as they are.
      takes_metric: whether `prox` takes a third argument, a pytree d like params or
        None, and returns argmin_z 1/2 sum_i d_i (z_i - params_i)^2 + scaling R(z).
      separable: whether R is a sum over the leaves.
    """

    value: Callable[[optax.Params], jax.Array]
    prox: Callable[..., optax.Params]
    where: Where
    takes_metric: bool = False
    separable: bool = True

    def covered(self, params: optax.Params) -> Any:
        """The parameters that R covers.

        Args:
          params: pytree of arrays.

        Returns:
          Pytree like `params`, with None in place of the leaves that are free.
        """
        leaves, treedef = jax.tree.flatten(params)
        covers = chosen(params, self.where)
        return treedef.unflatten(
            [x if covered else None for x, covered in zip(leaves, covers, strict=True)]
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
            "regulariser must be a Regulariser, such as regularisers.l1(1e-3); got "
            f"{regulariser!r}."
        )


def zero() -> Regulariser:
    """No penalty: R = 0, with which every method is its smooth parent.

    Returns:
      The `Regulariser`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax.methods.penalties import regularisers
      >>> regularisers.zero().prox(jnp.ones(2), 1.0)
      Array([1., 1.], dtype=float32)
    """
    return _by_leaf(
        lambda path, leaf: False,
        lambda path, x: 0.0,
        lambda path, x, scaling, d=None: x,
        takes_metric=True,
    )


def l1(strength: chex.Numeric, *, where: Where | None = None) -> Regulariser:
    r"""The l1 norm.

    .. math:: R(x) = \lambda \|x\|_1

    Args:
      strength: lambda >= 0, number or scalar array.
      where: predicate (path, leaf) -> bool, True for the leaves to regularise; None is
        `masks.prunable`.

    Returns:
      The `Regulariser`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax.methods.penalties import regularisers
      >>> params = {"kernel": jnp.array([[3.0, -0.5]]), "bias": jnp.ones(2)}
      >>> regulariser = regularisers.l1(1.0)
      >>> float(regulariser.value(params))
      3.5
      >>> regulariser.prox(params, 1.0)["kernel"]
      Array([[2., 0.]], dtype=float32)
    """
    checks.scalar("strength", strength, least=0)
    return _by_leaf(
        where,
        lambda path, x: strength * jnp.sum(_magnitudes(x)),
        lambda path, x, scaling, d=None: operators.prox_l1(
            x, strength, scaling, metric=d
        ),
        takes_metric=True,
    )


def group_lasso(
    strength: chex.Numeric,
    groups: Groups = "input",
    *,
    reweight: bool = True,
    where: Where | None = None,
) -> Regulariser:
    r"""The group lasso, which makes all weights of a group zero together.

    .. math:: R(x) = \lambda \sum_g \sqrt{|g|}\, \|x_g\|_2

    Args:
      strength: lambda >= 0, number or scalar array.
      groups: "input": a group is all weights of one input channel, axis -2 of a Flax
        kernel; "output": of one output channel, axis -1; "rows" and "columns": each row
        and column of each matrix [..., row, column], in kernels of more than two axes
        for each position apart; or a function (path, leaf) -> the axis or axes that
        number the groups, None for a leaf without.
      reweight: whether the factor :math:`\sqrt{|g|}`, the root of the group's size, is
        there; it makes groups of all sizes as likely to vanish.
      where: predicate (path, leaf) -> bool, True for the leaves to regularise, of those
        that have groups; None is `masks.prunable`.

    Returns:
      The `Regulariser`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax.methods.penalties import regularisers
      >>> params = {"kernel": jnp.array([[3.0, 4.0], [0.3, 0.4]]), "bias": jnp.ones(2)}
      >>> regulariser = regularisers.group_lasso(1.0, reweight=False)
      >>> float(regulariser.value(params))
      5.5
      >>> regulariser.prox(params, 1.0)["kernel"]
      Array([[2.4, 3.2],
             [0. , 0. ]], dtype=float32)

    References:
      Yuan, Lin (2006); reweight as in equation (1.3) there.
    """
    return group_mcp(strength, math.inf, groups, where=where, reweight=reweight)


def group_mcp(
    strength: chex.Numeric,
    gamma: chex.Numeric,
    groups: Groups = "input",
    *,
    reweight: bool = True,
    where: Where | None = None,
) -> Regulariser:
    r"""The group MCP: a group lasso that does not shrink large groups.

    .. math::
      R(x) = \sum_g p_g(\|x_g\|_2), \quad
      p_g(u) = \lambda_g u - \frac{u^2}{2 \gamma} \text{ for } u \le \gamma \lambda_g,
      \text{ else } \tfrac12 \gamma \lambda_g^2, \quad \lambda_g = \lambda \sqrt{|g|}

    Args:
      strength: lambda >= 0, number or scalar array.
      gamma: > 0, number or scalar array: where a group's penalty is flat, in units of
        its lambda_g. A proximal step is convex only if the metric times gamma exceeds
        the step size; see `operators.prox_group_mcp` for what happens elsewhere.
      groups: as in `group_lasso`.
      reweight: whether lambda_g has the factor :math:`\sqrt{|g|}`.
      where: as in `group_lasso`.

    Returns:
      The `Regulariser`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax.methods.penalties import regularisers
      >>> regulariser = regularisers.group_mcp(1.0, 2.0, reweight=False)
      >>> x = jnp.array([[3.0, 4.0], [0.3, 0.4]])
      >>> float(regulariser.value(x)), regulariser.prox(x, 1.0).tolist()
      (1.4375, [[3.0, 4.0], [0.0, 0.0]])

    References:
      Zhang (2010); Deleu, Bengio (2021).
    """
    checks.scalar("strength", strength, least=0)
    operators.check_gamma(gamma)
    _check_groups(groups)
    if not isinstance(reweight, bool):
        raise ValueError(f"reweight must be True or False; got {reweight!r}.")

    def value(path, x):
        axis = _axis(groups, path, x)
        lam = strength * group_weight(x.shape, axis, reweight)
        # No penalty, not inf * 0, where gamma is infinite.
        flat = jnp.where(lam == 0, 0, gamma * lam)
        u = jnp.minimum(group_norms(x, axis), flat)
        return jnp.sum(lam * u - u * u / (2 * gamma))

    def prox(path, x, scaling, d=None):
        axis = _axis(groups, path, x)
        return operators.prox_group_mcp(
            x, strength, gamma, scaling, metric=d, axis=axis, reweight=reweight
        )

    return _by_leaf(_with_groups(groups, where), value, prox, takes_metric=True)


def nuclear(strength: chex.Numeric, *, where: Where | None = None) -> Regulariser:
    r"""The nuclear norm of every kernel, which makes them of low rank.

    .. math:: R(x) = \lambda \sum_{\text{leaves}} \sum_i \sigma_i(X)

    A kernel of more than two axes is one matrix [product of all but the last, last].

    Args:
      strength: lambda >= 0, number or scalar array.
      where: as in `l1`.

    Returns:
      The `Regulariser`, without a closed form in a metric.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax.methods.penalties import regularisers
      >>> regulariser = regularisers.nuclear(2.0)
      >>> x = jnp.diag(jnp.array([3.0, 1.0]))
      >>> float(regulariser.value(x)), regulariser.prox(x, 1.0).tolist()
      (8.0, [[1.0, 0.0], [0.0, 0.0]])
    """
    checks.scalar("strength", strength, least=0)
    return _by_leaf(
        where,
        lambda path, x: strength * _nuclear_norm(operators.as_matrix(working(x))),
        lambda path, x, scaling: operators.prox_nuclear(x, strength, scaling),
    )


def k_support(
    strength: chex.Numeric, support: chex.Numeric, *, where: Where | None = None
) -> Regulariser:
    r"""The k-support norm of all regularised leaves as one vector.

    .. math:: R(x) = \lambda \|x\|_k^{sp}

    Args:
      strength: lambda >= 0, number or scalar array.
      support: k: a fraction of the components in (0, 1] as a float, or a count as an
        integer; 1 is the l1 norm, all of them the Euclidean norm.
      where: as in `l1`.

    Returns:
      The `Regulariser`: no sum over leaves, no closed form in a metric.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax.methods.penalties import regularisers
      >>> params = {"kernel": jnp.array([[4.0, 2.0, 1.0]]), "bias": jnp.ones(3)}
      >>> float(regularisers.k_support(1.0, 2).value(params))
      5.0

    References:
      Argyriou, Foygel, Srebro (2012).
    """
    checks.scalar("strength", strength, least=0)
    checks.fraction_or_count("support", support)
    if where is not None:
        checks.where(where)

    def value(params):
        magnitudes = jax.tree.map(_magnitudes, regulariser.covered(params))
        if not jax.tree.leaves(magnitudes):
            return _nothing(params)
        nothing = optax.tree.sum(magnitudes) == 0
        # At 0 the norm's own derivative is 0 / 0.
        safe = jax.tree.map(lambda m: jnp.where(nothing, 1, m), magnitudes)
        norm = balls.k_support_norm(safe, support)
        return strength * jnp.where(nothing, 0, norm)

    def prox(params, scaling=1.0):
        moved = operators.prox_k_support(
            regulariser.covered(params), support, strength, scaling
        )
        return jax.tree.map(
            lambda z, x: x if z is None else z, moved, params, is_leaf=_is_none
        )

    regulariser = Regulariser(value, prox, where or prunable, separable=False)
    return regulariser


def weighted_prox(
    regulariser: Regulariser,
    params: optax.Params,
    metric: Any,
    scaling: chex.Numeric = 1.0,
    *,
    steps: int = 100,
    tolerance: float = 1e-8,
) -> optax.Params:
    r"""A regulariser's proximal operator in a diagonal metric, by whatever way it has.

    .. math:: \arg\min_z Q(z), \quad
       Q(z) = \tfrac12 \sum_i d_i (z_i - x_i)^2 + \eta R(z)

    In closed form where the regulariser has one. Else by proximal-gradient steps from
    z = x,

    .. math:: z \leftarrow \mathrm{prox}_{\theta \eta R} (z - \theta d (z - x)), \quad
       \theta = 1 / \max_i d_i

    with a theta for each leaf if R is separable, until one step lowers Q by less than
    `tolerance` of (\|Q\| + 1), after two steps at least. The wider the metric spreads,
    the less far the small d get.

    Args:
      regulariser: R.
      params: pytree of x.
      metric: pytree of d > 0.
      scaling: eta >= 0.
      steps: most steps to take.
      tolerance: see above.

    Returns:
      Pytree like `params`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax.methods.penalties import regularisers
      >>> x, d = jnp.diag(jnp.array([3.0, 1.0])), jnp.full((2, 2), 2.0)
      >>> regularisers.weighted_prox(regularisers.nuclear(4.0), x, d)
      Array([[1., 0.],
             [0., 0.]], dtype=float32)

    References:
      Z.-S. Huang, C.-p. Lee, Regularized adaptive momentum dual averaging with an
      efficient inexact subproblem solver for training structured neural network,
      NeurIPS 2024, algorithm 2 and the stopping rule of its experiments.
    """
    check_regulariser(regulariser)
    if metric is not None:
        checks.same_trees("metric", metric, "params", params)
    if regulariser.takes_metric:
        return regulariser.prox(params, scaling, metric)
    leaves, treedef = jax.tree.flatten(params)
    metrics = treedef.flatten_up_to(metric)
    scope = "leaf" if regulariser.separable else "global"
    for block in ranked_together(params, regulariser.where, scope):
        x, d = (
            treedef.unflatten([v if i in block else None for i, v in enumerate(row)])
            for row in (leaves, metrics)
        )
        z = _by_gradient(regulariser, x, d, scaling, steps, tolerance)
        for i, leaf in zip(block, jax.tree.leaves(z), strict=True):
            leaves[i] = leaf
    return treedef.unflatten(leaves)


def _by_gradient(regulariser, params, metric, scaling, steps, tolerance) -> Any:
    """Proximal-gradient steps of one length for all leaves."""
    if not sum(jnp.size(leaf) for leaf in jax.tree.leaves(params)):
        return params
    x, d = (jax.tree.map(working, tree) for tree in (params, metric))
    largest = functools.reduce(jnp.maximum, [jnp.max(v) for v in jax.tree.leaves(d)])
    length = 1 / jnp.where(largest == 0, 1, largest)

    def objective(z):
        distances = jax.tree.map(lambda z, x, d: jnp.sum(d * (z - x) ** 2), z, x, d)
        return sum(jax.tree.leaves(distances)) / 2 + scaling * regulariser.value(z)

    def step(carry):
        count, z, before, _ = carry
        z = jax.tree.map(
            lambda z, x, d: z - (length * d).astype(z.dtype) * (z - x), z, x, d
        )
        z = regulariser.prox(z, length * scaling)
        after = objective(z)
        small = before - after < tolerance * (jnp.abs(after) + 1)
        return count + 1, z, after, small & (count > 0)

    def unfinished(carry):
        return (carry[0] < steps) & ~carry[-1]

    start = jnp.zeros((), jnp.int32), x, objective(x), jnp.zeros((), bool)
    _, z, _, _ = lax.while_loop(unfinished, step, start)
    return cast_like(z, params)


def group_sparsity(
    params: optax.Params, groups: Groups = "input", *, where: Where | None = None
) -> jax.Array:
    r"""The weighted group sparsity: the share of weights in groups that are all zero.

    .. math:: \frac{\sum_{g:\, x_g = 0} |g|}{\sum_g |g|}

    Args:
      params: pytree of arrays.
      groups: as in `group_lasso`.
      where: as in `group_lasso`.

    Returns:
      float32 scalar in [0, 1]; 0 if no leaf has groups.

    Raises:
      ValueError: for unknown `groups`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax.methods.penalties import regularisers
      >>> params = {"kernel": jnp.array([[3.0, 0.0], [0.0, 0.0]]), "bias": jnp.ones(2)}
      >>> float(regularisers.group_sparsity(params))
      0.5

    References:
      Huang, Lee (2024), section 4.
    """
    _check_groups(groups)
    covers = _with_groups(groups, where)
    dead, size = jnp.zeros((), jnp.float32), 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not covers(path, leaf):
            continue
        axes = group_axes(jnp.shape(leaf), _axis(groups, path, leaf))
        # Over groups of one leaf all sizes are the same.
        alive = jnp.any(masks.nonzero(leaf), axis=axes)
        dead += leaf.size * (1 - jnp.mean(alive)) if leaf.size else 0
        size += leaf.size
    return jnp.asarray(dead / max(size, 1), jnp.float32)


def _check_groups(groups: Any) -> None:
    if callable(groups):
        checks.takes("groups", groups, "path", "leaf")
    else:
        checks.choice("groups", groups, GROUPS)


def _with_groups(groups: Groups, where: Where | None) -> Where:
    """The leaves that are chosen and in groups."""
    where = where or prunable
    checks.where(where)
    if callable(groups):
        return lambda path, leaf: where(path, leaf) and groups(path, leaf) is not None
    return where


def _axis(groups: Groups, path: tuple[Any, ...], leaf: Any) -> Axis:
    """What numbers the groups of a leaf that has them."""
    shape = jnp.shape(leaf)
    if callable(groups):
        axis = groups(path, leaf)
        assert axis is not None
        return axis
    if len(shape) < 2:
        raise ValueError(
            f"groups={groups!r} needs leaves with at least two axes; "
            f"params{jax.tree_util.keystr(path)} has shape {shape}. Leave it out with "
            "`where`, or give a function for `groups`."
        )
    last = len(shape) - 1
    return {
        "input": last - 1,
        "output": last,
        "rows": tuple(range(last)),
        "columns": (*range(last - 1), last),
    }[groups]


def _by_leaf(
    where: Where | None, value: Any, prox: Any, *, takes_metric: bool = False
) -> Regulariser:
    """A sum over leaves, from functions of (path, x) and (path, x, scaling[, d])."""
    where = where or prunable
    checks.where(where)

    def value_of(params):
        leaves = jax.tree_util.tree_leaves_with_path(params)
        values = [value(path, x) for path, x in leaves if where(path, x)]
        return sum(values, start=_nothing(params))

    def prox_of(params, scaling=1.0, metric=None):
        return jax.tree_util.tree_map_with_path(
            lambda path, x, *d: prox(path, x, scaling, *d) if where(path, x) else x,
            *((params,) if metric is None else (params, metric)),
        )

    return Regulariser(value_of, prox_of, where, takes_metric)


def _magnitudes(x: jax.Array) -> jax.Array:
    """|x|, with the derivative 0 at 0: jax's own is 1 there."""
    x = working(x)
    return x * lax.stop_gradient(jnp.sign(x))


def _nuclear_norm(x: jax.Array) -> jax.Array:
    """The sum of the singular values, with the subgradient U V^T of those not 0."""
    if not x.size:
        return jnp.zeros((), x.dtype)
    u, sigma, v = jnp.linalg.svd(lax.stop_gradient(x), full_matrices=False)
    rounding = jnp.max(sigma) * max(x.shape) * jnp.finfo(x.dtype).eps
    return jnp.sum(x * ((u * (sigma > rounding)[None]) @ v))


def _nothing(params: optax.Params) -> jax.Array:
    """The value 0 of a regulariser, in its dtype."""
    return jnp.zeros((), jnp.result_type(jnp.float32, *jax.tree.leaves(params)))


def _is_none(node: Any) -> bool:
    return node is None
