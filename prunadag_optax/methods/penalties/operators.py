"""Proximal operators on arrays, in the Euclidean or a diagonal metric.

All have one signature: the point, the penalty's own arguments, then `scaling`, the
factor (a step size) on the penalty, and the `metric` where there is a closed form in
one. They are pure functions that compute in at least float32, return the dtype they
are given, and make exact zeros. A ValueError names the argument that is out of range.

A group operator is told by `axis` which axis (or axes) numbers the groups: all entries
that share an index there are one group. In a Flax kernel [..., in, out] axis -2 makes
one group of all weights of an input channel, axis -1 one of an output channel.
"""

import math
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from prunadag_optax._common import checks
from prunadag_optax._common.dtypes import cast_like, working
from prunadag_optax.methods import balls
from prunadag_optax.methods.penalties.dual_ball import dual_projection, remainder
from prunadag_optax.methods.penalties.groups import (
    Axis,
    group_axes,
    group_norms,
    group_weight,
    secular_root,
)

# Where MCP is as concave as a group's metric is convex, or more, its gamma is raised to
# this multiple of the limit.
MARGIN = 1.01


def prox_l1(
    x: jax.Array,
    strength: chex.Numeric = 1.0,
    scaling: chex.Numeric = 1.0,
    *,
    metric: jax.Array | None = None,
) -> jax.Array:
    r"""Soft threshold, the proximal operator of the l1 norm.

    .. math::
      \arg\min_z \tfrac12 \sum_i d_i (z_i - x_i)^2 + \eta \lambda \|z\|_1
      = \mathrm{sign}(x_i) (|x_i| - \eta \lambda / d_i)_+

    Args:
      x: array of any shape.
      strength: lambda >= 0, number or scalar array.
      scaling: eta >= 0, number or scalar array.
      metric: d >= 0, array of that shape; where d = 0 the result is 0. None is d = 1.

    Returns:
      Array like `x`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax.methods.penalties import operators
      >>> operators.prox_l1(jnp.array([3.0, -1.0, 0.5]), 1.0)
      Array([2., 0., 0.], dtype=float32)
      >>> operators.prox_l1(jnp.array([3.0, -1.0]), 2.0, metric=jnp.array([1.0, 4.0]))
      Array([ 1. , -0.5], dtype=float32)
    """
    _check_metric(metric, x)

    def minimise(x, lam):
        d = jnp.ones_like(x) if metric is None else working(metric)
        moved = jnp.sign(x) * (jnp.abs(x) - lam / d)
        # |x| d <= lam, not |x| <= lam / d: a metric of zero is no division by zero.
        return jnp.where(jnp.abs(x) * d <= lam, 0, moved)

    return _minimiser(minimise, x, strength, scaling)


def prox_group_lasso(
    x: jax.Array,
    strength: chex.Numeric = 1.0,
    scaling: chex.Numeric = 1.0,
    *,
    metric: jax.Array | None = None,
    axis: Axis = -2,
    reweight: bool = True,
) -> jax.Array:
    r"""Block soft threshold, the proximal operator of the group lasso.

    .. math::
      \arg\min_z \tfrac12 \sum_i d_i (z_i - x_i)^2 + \eta \sum_g \lambda_g \|z_g\|_2

    This is :math:`x_g (1 - \eta \lambda_g / \|x_g\|)_+` where d = 1; see
    `prox_group_mcp`, of which it is the case of an infinite gamma.

    Args:
      x: array with the axes named in `axis`.
      strength: lambda >= 0, number or scalar array.
      scaling: eta >= 0, number or scalar array.
      metric: d >= 0, array of the shape of `x`; None is d = 1.
      axis: the axis or axes that number the groups; () makes one group of all.
      reweight: lambda_g = lambda sqrt(group size), else lambda.

    Returns:
      Array like `x`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax.methods.penalties import operators
      >>> kernel = jnp.array([[3.0, 4.0], [0.3, 0.4]])
      >>> operators.prox_group_lasso(kernel, 1.0, reweight=False)
      Array([[2.4, 3.2],
             [0. , 0. ]], dtype=float32)

    References:
      M. Yuan, Y. Lin, Model selection and estimation in regression with grouped
      variables, J. R. Stat. Soc. B 68 (2006) 49-67.
    """
    return prox_group_mcp(
        x, strength, math.inf, scaling, metric=metric, axis=axis, reweight=reweight
    )


def prox_group_mcp(
    x: jax.Array,
    strength: chex.Numeric,
    gamma: chex.Numeric,
    scaling: chex.Numeric = 1.0,
    *,
    metric: jax.Array | None = None,
    axis: Axis = -2,
    reweight: bool = True,
) -> jax.Array:
    r"""The proximal operator of the group MCP, a group lasso that large groups escape.

    .. math::
      \arg\min_z \tfrac12 \sum_i d_i (z_i - x_i)^2 + \eta \sum_g p_g(\|z_g\|_2), \quad
      p_g(u) = \lambda_g u - \frac{u^2}{2 \gamma} \text{ for } u \le \gamma \lambda_g,
      \text{ else } \tfrac12 \gamma \lambda_g^2

    A group with :math:`\|d x\| \le \eta \lambda_g` becomes zero, one beyond
    :math:`\gamma \lambda_g` is left alone. Between them, with :math:`\theta = \|z\|`,

    .. math::
      z_i = \frac{d_i \theta}{(d_i - \eta / \gamma) \theta + \eta \lambda_g} x_i, \quad
      \sum_i \Bigl( \frac{d_i x_i}{(d_i - \eta / \gamma) \theta + \eta \lambda_g}
      \Bigr)^2 = 1.

    With d = 1 this is :math:`\theta = (\|x\| - \eta \lambda_g) / (1 - \eta / \gamma)`;
    otherwise theta is found to rounding by a fixed number of Newton steps.

    A group's problem is convex if :math:`\gamma \min_i d_i > \eta`, and its solution is
    the one above. Where it is not, as for weights whose gradients have always been
    zero, that group's gamma is raised to :math:`1.01\, \eta / \min_i d_i`: a step
    towards the group lasso that leaves the operator continuous.

    Args:
      x: array with the axes named in `axis`.
      strength: lambda >= 0, number or scalar array.
      gamma: > 0, number or scalar array; infinity makes it the group lasso.
      scaling: eta >= 0, number or scalar array.
      metric: as in `prox_group_lasso`.
      axis: as in `prox_group_lasso`.
      reweight: as in `prox_group_lasso`.

    Returns:
      Array like `x`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax.methods.penalties import operators
      >>> kernel = jnp.array([[3.0, 4.0], [0.9, 1.2], [0.3, 0.4]])
      >>> z = operators.prox_group_mcp(kernel, 1.0, 3.0, reweight=False)
      >>> [round(float(x), 3) for x in z.ravel()]
      [3.0, 4.0, 0.45, 0.6, 0.0, 0.0]

    References:
      C.-H. Zhang, Nearly unbiased variable selection under minimax concave penalty,
      Ann. Stat. 38 (2010) 894-942. In a metric: T. Deleu, Y. Bengio, Structured
      sparsity inducing adaptive optimizers for deep learning, arXiv:2102.03869 (2021).
    """
    check_gamma(gamma)
    _check_metric(metric, x)
    concave = not (checks.is_number(gamma) and gamma == math.inf)

    def minimise(x, lam):
        lam = lam * group_weight(x.shape, axis, reweight)
        d = jnp.ones_like(x) if metric is None else working(metric)
        # What the penalty's own curvature takes off the metric, eta / gamma.
        bend = jnp.zeros_like(lam)
        if concave:
            least = jnp.min(d, axis=group_axes(x.shape, axis), keepdims=True)
            bend = _product(1 / gamma, scaling, x)
            bend = jnp.where(bend < least, bend, least / MARGIN)
        b = jnp.abs(d * x)
        norm = group_norms(b, axis)
        if metric is None:
            share = (1 - lam / jnp.where(norm == 0, 1, norm)) / (1 - bend)
        else:
            positive = jnp.where(lam == 0, 1, lam)
            theta = secular_root(b, norm, d - bend, positive, axis)
            share = d * theta / ((d - bend) * theta + positive)
        # No share exceeds 1 below gamma lambda. Near the limit of convexity it is a
        # quotient of small differences, and rounding would raise it.
        z = jnp.where(norm <= lam, 0, x * jnp.minimum(share, 1))
        if concave:
            # ||x|| > gamma lambda, in terms that stay finite where gamma is not.
            z = jnp.where(group_norms(x, axis) * bend > lam, x, z)
        return z

    return _minimiser(minimise, x, strength, scaling)


def prox_nuclear(
    x: jax.Array, strength: chex.Numeric = 1.0, scaling: chex.Numeric = 1.0
) -> jax.Array:
    r"""Soft threshold of the singular values.

    .. math::
      \arg\min_Z \tfrac12 \|Z - X\|_F^2 + \eta \lambda \|Z\|_*
      = U \, \mathrm{diag}(\sigma_i - \eta \lambda)_+ V^T

    Args:
      x: array with at least two axes. More than two, as of a convolution's kernel, are
        one matrix [product of all but the last, last].
      strength: lambda >= 0, number or scalar array.
      scaling: eta >= 0, number or scalar array.

    Returns:
      Array like `x`, of lower rank.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax.methods.penalties import operators
      >>> operators.prox_nuclear(jnp.diag(jnp.array([3.0, 1.0])), 2.0)
      Array([[1., 0.],
             [0., 0.]], dtype=float32)

    References:
      J.-F. Cai, E. J. Candes, Z. Shen, A singular value thresholding algorithm for
      matrix completion, SIAM J. Optim. 20 (2010) 1956-1982, theorem 2.1.
    """

    def minimise(x, lam):
        u, sigma, v = jnp.linalg.svd(as_matrix(x), full_matrices=False)
        return ((u * jnp.maximum(sigma - lam, 0)[None]) @ v).reshape(x.shape)

    return _minimiser(minimise, x, strength, scaling)


def as_matrix(x: jax.Array) -> jax.Array:
    """A kernel as one matrix.

    Args:
      x: array with at least two axes, [..., out].

    Returns:
      Matrix [product of all axes but the last, out].

    Raises:
      ValueError: for fewer axes.
    """
    if jnp.ndim(x) < 2:
        raise ValueError(
            f"x must have at least two axes to be a matrix; got shape {jnp.shape(x)}."
        )
    return x if jnp.ndim(x) == 2 else jnp.reshape(x, (-1, jnp.shape(x)[-1]))


def prox_k_support(
    x: Any,
    support: chex.Numeric,
    strength: chex.Numeric = 1.0,
    scaling: chex.Numeric = 1.0,
) -> optax.Params:
    r"""The proximal operator of the k-support norm.

    .. math::
      \arg\min_z \tfrac12 \|z - x\|^2 + \eta \lambda \|z\|_k^{sp}

    The norm is `balls.k_support_norm`; its dual is the Euclidean norm of the k largest
    magnitudes, and x - z is the projection of x on that norm's ball with radius
    eta lambda. Magnitudes a_i become :math:`\min(a_i, \max(c, f a_i))` there: the
    largest shrink by one factor f, those below the plateau c stay (so z is 0), and c
    and f < 1 follow from a root of one variable. k = 1 is `prox_l1`; k = n is
    `prox_group_lasso` with all of x as one group.

    Args:
      x: pytree of real floating arrays, one vector of n elements.
      support: k: a fraction of n in (0, 1] as a float, or a count as an integer.
      strength: lambda >= 0, number or scalar array.
      scaling: eta >= 0, number or scalar array.

    Returns:
      Pytree like `x`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax.methods.penalties import operators
      >>> z = operators.prox_k_support(jnp.array([3.0, 4.0, 0.1]), 2, 1.0)
      >>> [round(float(x), 3) for x in z]
      [2.4, 3.2, 0.0]

    References:
      A. Argyriou, R. Foygel, N. Srebro, Sparse prediction with the k-support norm,
      NeurIPS 2012, section 4, for the square of the norm.
    """
    _check(strength, scaling)
    if not sum(jnp.size(leaf) for leaf in jax.tree.leaves(x)):
        return x
    wide = jax.tree.map(working, x)
    dtype = jnp.result_type(*jax.tree.leaves(wide))
    lam = jnp.asarray(strength * scaling, dtype)
    plateau, factor = dual_projection(
        *(
            [jnp.abs(leaf).astype(dtype) for leaf in jax.tree.leaves(tree)]
            for tree in (wide, balls.largest(x, support))
        ),
        lam,
    )
    rest = jax.tree.map(lambda leaf: remainder(leaf, plateau, factor, lam), wide)
    return cast_like(rest, x)


def check_gamma(gamma: chex.Numeric) -> None:
    """Raises a ValueError unless it is a number > 0 or infinity.

    Args:
      gamma: the argument of the group MCP.

    Raises:
      ValueError: naming the value and what is allowed.
    """
    if not (checks.is_number(gamma) and gamma == math.inf):
        checks.scalar("gamma", gamma, above=0)


def _check(strength: chex.Numeric, scaling: chex.Numeric) -> None:
    checks.scalar("strength", strength, least=0)
    checks.scalar("scaling", scaling, least=0)


def _check_metric(metric: Any, x: Any) -> None:
    if metric is None:
        return
    for name, array in (("x", x), ("metric", metric)):
        checks.real_leaf(name, (), array)
    if jnp.shape(metric) != jnp.shape(x):
        raise ValueError(
            f"metric must have the shape {jnp.shape(x)} of x; got {jnp.shape(metric)}."
        )


def _product(strength: Any, scaling: Any, x: jax.Array) -> jax.Array:
    # At once in the precision of x: under float64 parameters a float32 strength and
    # scaling would otherwise be multiplied in float32.
    return jnp.asarray(strength, x.dtype) * jnp.asarray(scaling, x.dtype)


def _minimiser(
    minimise: Callable[[jax.Array, jax.Array], jax.Array],
    x: jax.Array,
    strength: chex.Numeric,
    scaling: chex.Numeric,
) -> jax.Array:
    """`minimise`, made for x in working precision and eta lambda > 0, for any."""
    _check(strength, scaling)
    checks.real_leaf("x", (), x)
    if not jnp.size(x):
        return x
    wide = working(x)
    lam = _product(strength, scaling, wide)
    z = jnp.where(lam == 0, wide, minimise(wide, lam))
    return z.astype(jnp.result_type(x))
