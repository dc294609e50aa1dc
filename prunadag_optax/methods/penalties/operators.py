"""Proximal operators on arrays, plain and in a diagonal metric.

All have one signature: the point, the penalty's own arguments, then `scaling`, the
factor (a step size) on the penalty; the weighted ones take the metric after the point.
They are pure functions that compute in at least float32, return the dtype they are
given, and make exact zeros.

A group operator is told by `axis` which axis (or axes) numbers the groups: all entries
that share an index there are one group. In a Flax kernel [..., in, out] axis -2 makes
one group of all weights of an input channel, axis -1 one of an output channel.
"""

import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from prunadag_optax._common import checks
from prunadag_optax._common.dtypes import working
from prunadag_optax.methods import frank_wolfe
from prunadag_optax.methods.penalties.dual_ball import dual_projection, remainder
from prunadag_optax.methods.penalties.groups import (
    Axis,
    group_axes,
    group_norms,
    group_weight,
    secular_root,
)

# Where MCP is more concave than a group's metric is convex, its gamma is raised to
# this multiple of the least with a convex problem.
MARGIN = 1.01


def prox_l1(
    x: jax.Array, strength: chex.Numeric = 1.0, scaling: chex.Numeric = 1.0
) -> jax.Array:
    r"""Soft threshold, the proximal operator of the l1 norm.

    .. math::
      \arg\min_z \tfrac12 \|z - x\|^2 + \eta \lambda \|z\|_1
      = \mathrm{sign}(x) (|x| - \eta \lambda)_+

    Args:
      x: array of any shape.
      strength: lambda >= 0, number or scalar array.
      scaling: eta >= 0, number or scalar array.

    Returns:
      Array like `x`.

    Raises:
      ValueError: for an argument out of range; the message names it.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax.methods import proximal
      >>> proximal.prox_l1(jnp.array([3.0, -1.0, 0.5]), 1.0)
      Array([2., 0., 0.], dtype=float32)
    """
    return weighted_prox_l1(x, jnp.ones_like(x), strength, scaling)


def weighted_prox_l1(
    x: jax.Array,
    metric: jax.Array,
    strength: chex.Numeric = 1.0,
    scaling: chex.Numeric = 1.0,
) -> jax.Array:
    r"""Soft threshold in a diagonal metric.

    .. math::
      \arg\min_z \tfrac12 \sum_i d_i (z_i - x_i)^2 + \eta \lambda \|z\|_1
      = \mathrm{sign}(x_i) (|x_i| - \eta \lambda / d_i)_+

    Args:
      x: array of any shape.
      metric: d >= 0, array of that shape; where d = 0 the result is 0.
      strength: lambda >= 0, number or scalar array.
      scaling: eta >= 0, number or scalar array.

    Returns:
      Array like `x`.

    Raises:
      ValueError: for an argument out of range; the message names it.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax.methods import proximal
      >>> x, metric = jnp.array([3.0, -1.0]), jnp.array([1.0, 4.0])
      >>> proximal.weighted_prox_l1(x, metric, 2.0)
      Array([ 1. , -0.5], dtype=float32)
    """
    _check(strength, scaling)
    given, x, d = x, working(x), working(metric)
    lam = _threshold(strength, scaling, x)
    moved = jnp.sign(x) * (jnp.abs(x) - lam / d)
    # |x| d <= lam, not |x| <= lam / d: a metric of zero is no division by zero.
    z = jnp.where(jnp.abs(x) * d <= lam, 0, moved)
    return jnp.where(lam == 0, x, z).astype(jnp.result_type(given))


def prox_group_lasso(
    x: jax.Array,
    strength: chex.Numeric = 1.0,
    scaling: chex.Numeric = 1.0,
    *,
    axis: Axis = -2,
    reweight: bool = True,
) -> jax.Array:
    r"""Block soft threshold, the proximal operator of the group lasso.

    .. math::
      \arg\min_z \tfrac12 \|z - x\|^2 + \eta \sum_g \lambda_g \|z_g\|_2, \quad
      z_g = x_g (1 - \eta \lambda_g / \|x_g\|)_+

    Args:
      x: array with the axes named in `axis`.
      strength: lambda >= 0, number or scalar array.
      scaling: eta >= 0, number or scalar array.
      axis: the axis or axes that number the groups; () makes one group of all.
      reweight: lambda_g = lambda sqrt(group size), else lambda.

    Returns:
      Array like `x`.

    Raises:
      ValueError: for an argument out of range; the message names it.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax.methods import proximal
      >>> kernel = jnp.array([[3.0, 4.0], [0.3, 0.4]])
      >>> proximal.prox_group_lasso(kernel, 1.0, reweight=False)
      Array([[2.4, 3.2],
             [0. , 0. ]], dtype=float32)

    References:
      M. Yuan, Y. Lin, Model selection and estimation in regression with grouped
      variables, J. R. Stat. Soc. B 68 (2006) 49-67.
    """
    _check(strength, scaling)
    return _plain(x, strength, None, scaling, axis, reweight)


def weighted_prox_group_lasso(
    x: jax.Array,
    metric: jax.Array,
    strength: chex.Numeric = 1.0,
    scaling: chex.Numeric = 1.0,
    *,
    axis: Axis = -2,
    reweight: bool = True,
) -> jax.Array:
    r"""The proximal operator of the group lasso in a diagonal metric.

    .. math::
      \arg\min_z \tfrac12 \sum_i d_i (z_i - x_i)^2
      + \eta \sum_g \lambda_g \|z_g\|_2

    A group is zero where :math:`\|d x\| \le \eta \lambda_g`; elsewhere
    :math:`z_i = d_i \theta x_i / (d_i \theta + \eta \lambda_g)` with the theta = ||z||
    at which :math:`\sum_i (d_i x_i / (d_i \theta + \eta \lambda_g))^2 = 1`, found to
    rounding by a fixed number of Newton steps.

    Args:
      x: array with the axes named in `axis`.
      metric: d >= 0, array of the shape of `x`.
      strength: lambda >= 0, number or scalar array.
      scaling: eta >= 0, number or scalar array.
      axis: the axis or axes that number the groups; () makes one group of all.
      reweight: lambda_g = lambda sqrt(group size), else lambda.

    Returns:
      Array like `x`.

    Raises:
      ValueError: for an argument out of range; the message names it.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax.methods import proximal
      >>> x, metric = jnp.array([[3.0, 4.0]]), jnp.array([[2.0, 2.0]])
      >>> z = proximal.weighted_prox_group_lasso(x, metric, 5.0, reweight=False)
      >>> [round(float(x), 3) for x in z.ravel()]
      [1.5, 2.0]

    References:
      T. Deleu, Y. Bengio, Structured sparsity inducing adaptive optimizers for deep
      learning, arXiv:2102.03869 (2021).
    """
    _check(strength, scaling)
    return _weighted(x, metric, strength, None, scaling, axis, reweight)


def prox_group_mcp(
    x: jax.Array,
    strength: chex.Numeric,
    gamma: chex.Numeric,
    scaling: chex.Numeric = 1.0,
    *,
    axis: Axis = -2,
    reweight: bool = True,
) -> jax.Array:
    r"""The proximal operator of the group MCP, a group lasso that large groups escape.

    .. math::
      \arg\min_z \tfrac12 \|z - x\|^2 + \eta \sum_g p_g(\|z_g\|_2), \quad
      p_g(u) = \lambda_g u - \frac{u^2}{2 \gamma} \text{ for } u \le \gamma \lambda_g,
      \text{ else } \tfrac12 \gamma \lambda_g^2

    .. math::
      z_g = x_g \min \Bigl( 1, \frac{\gamma}{\gamma - \eta}
      \bigl( 1 - \eta \lambda_g / \|x_g\| \bigr)_+ \Bigr)

    Only for gamma > eta is the problem convex; a smaller gamma is raised to 1.01 eta.

    Args:
      x: array with the axes named in `axis`.
      strength: lambda >= 0, number or scalar array.
      gamma: > 0, number or scalar array; infinity makes it the group lasso.
      scaling: eta >= 0, number or scalar array.
      axis: the axis or axes that number the groups; () makes one group of all.
      reweight: lambda_g = lambda sqrt(group size), else lambda.

    Returns:
      Array like `x`.

    Raises:
      ValueError: for an argument out of range; the message names it.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax.methods import proximal
      >>> kernel = jnp.array([[3.0, 4.0], [0.9, 1.2], [0.3, 0.4]])
      >>> z = proximal.prox_group_mcp(kernel, 1.0, 3.0, reweight=False)
      >>> [round(float(x), 3) for x in z.ravel()]
      [3.0, 4.0, 0.45, 0.6, 0.0, 0.0]

    References:
      C.-H. Zhang, Nearly unbiased variable selection under minimax concave penalty,
      Ann. Stat. 38 (2010) 894-942.
    """
    _check(strength, scaling)
    _check_gamma(gamma)
    return _plain(x, strength, 1 / gamma, scaling, axis, reweight)


def weighted_prox_group_mcp(
    x: jax.Array,
    metric: jax.Array,
    strength: chex.Numeric,
    gamma: chex.Numeric,
    scaling: chex.Numeric = 1.0,
    *,
    axis: Axis = -2,
    reweight: bool = True,
) -> jax.Array:
    r"""The proximal operator of the group MCP in a diagonal metric.

    .. math::
      \arg\min_z \tfrac12 \sum_i d_i (z_i - x_i)^2 + \eta \sum_g p_g(\|z_g\|_2)

    with the p_g of `prox_group_mcp`. A group beyond gamma lambda_g is left alone, one
    with :math:`\|d x\| \le \eta \lambda_g` is zero, and between
    :math:`z_i = d_i \theta x_i / ((d_i - \eta / \gamma) \theta + \eta \lambda_g)`, with
    theta = ||z|| as in `weighted_prox_group_lasso`.

    A group's problem is convex if :math:`\gamma \min_i d_i > \eta`. Where it is not, as
    for weights whose gradients have always been zero, that group's gamma is raised to
    :math:`1.01\, \eta / \min_i d_i`: a step towards the group lasso, no further than
    needed.

    Args:
      x: array with the axes named in `axis`.
      metric: d >= 0, array of the shape of `x`.
      strength: lambda >= 0, number or scalar array.
      gamma: > 0, number or scalar array; infinity makes it the group lasso.
      scaling: eta >= 0, number or scalar array.
      axis: the axis or axes that number the groups; () makes one group of all.
      reweight: lambda_g = lambda sqrt(group size), else lambda.

    Returns:
      Array like `x`.

    Raises:
      ValueError: for an argument out of range; the message names it.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax.methods import proximal
      >>> x, metric = jnp.array([[3.0, 4.0], [0.3, 0.4]]), jnp.ones((2, 2))
      >>> proximal.weighted_prox_group_mcp(x, metric, 1.0, 3.0, reweight=False)
      Array([[3., 4.],
             [0., 0.]], dtype=float32)

    References:
      Deleu, Bengio (2021); Zhang (2010).
    """
    _check(strength, scaling)
    _check_gamma(gamma)
    return _weighted(x, metric, strength, 1 / gamma, scaling, axis, reweight)


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
      Array like `x`.

    Raises:
      ValueError: for an argument out of range or an array with fewer axes.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax.methods import proximal
      >>> proximal.prox_nuclear(jnp.diag(jnp.array([3.0, 1.0])), 2.0)
      Array([[1., 0.],
             [0., 0.]], dtype=float32)

    References:
      J.-F. Cai, E. J. Candes, Z. Shen, A singular value thresholding algorithm for
      matrix completion, SIAM J. Optim. 20 (2010) 1956-1982, theorem 2.1.
    """
    _check(strength, scaling)
    given, x = x, working(x)
    if not x.size:
        return given
    lam = _threshold(strength, scaling, x)
    u, sigma, v = jnp.linalg.svd(as_matrix(x), full_matrices=False)
    z = (u * jnp.maximum(sigma - lam, 0)[None]) @ v
    return jnp.where(lam == 0, x, z.reshape(x.shape)).astype(jnp.result_type(given))


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

    The norm is `frank_wolfe.k_support_norm`; its dual is the Euclidean norm of the k
    largest magnitudes, and x - z is the projection of x on that norm's ball with radius
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

    Raises:
      ValueError: for an argument out of range; the message names it.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax.methods import proximal
      >>> z = proximal.prox_k_support(jnp.array([3.0, 4.0, 0.1]), 2, 1.0)
      >>> [round(float(x), 3) for x in z]
      [2.4, 3.2, 0.0]

    References:
      A. Argyriou, R. Foygel, N. Srebro, Sparse prediction with the k-support norm,
      NeurIPS 2012, section 4, for the square of the norm.
    """
    _check(strength, scaling)
    leaves, treedef = jax.tree.flatten(x)
    if not sum(jnp.size(leaf) for leaf in leaves):
        return x
    largest = jax.tree.leaves(frank_wolfe._largest(leaves, support))
    wide = [working(leaf) for leaf in leaves]
    dtype = jnp.result_type(*wide)
    lam = jnp.asarray(strength * scaling, dtype)
    plateau, factor = dual_projection(
        [jnp.abs(leaf).astype(dtype) for leaf in wide],
        [jnp.abs(leaf).astype(dtype) for leaf in largest],
        lam,
    )
    rest = [remainder(leaf, plateau, factor, lam) for leaf in wide]
    return treedef.unflatten(
        [z.astype(jnp.result_type(leaf)) for z, leaf in zip(rest, leaves, strict=True)]
    )


def _check(strength: chex.Numeric, scaling: chex.Numeric) -> None:
    checks.scalar("strength", strength, least=0)
    checks.scalar("scaling", scaling, least=0)


def _check_gamma(gamma: chex.Numeric) -> None:
    if not (checks.is_number(gamma) and gamma == math.inf):
        checks.scalar("gamma", gamma, above=0)


def _threshold(strength: Any, scaling: Any, x: jax.Array) -> jax.Array:
    # At once in the precision of x: under float64 parameters a float32 strength and
    # scaling would otherwise be multiplied in float32.
    return jnp.asarray(strength, x.dtype) * jnp.asarray(scaling, x.dtype)


def _plain(x, strength, concavity, scaling, axis, reweight) -> jax.Array:
    """Group lasso (concavity None) and group MCP (1 / gamma), where the metric is 1."""
    given, x = x, working(x)
    if not x.size:
        return given
    lam = _threshold(strength, scaling, x) * group_weight(x.shape, axis, reweight)
    norm = group_norms(x, axis)
    factor = jnp.maximum(1 - lam / jnp.where(norm == 0, 1, norm), 0)
    if concavity is not None:
        bend = jnp.minimum(_threshold(concavity, scaling, x), 1 / MARGIN)
        factor = jnp.minimum(factor / (1 - bend), 1)
    z = jnp.where(factor == 0, 0, x * factor)
    return jnp.where(lam == 0, x, z).astype(jnp.result_type(given))


def _weighted(x, d, strength, concavity, scaling, axis, reweight) -> jax.Array:
    """Group lasso (concavity None) and group MCP (1 / gamma) in the metric d."""
    given, x, d = x, working(x), working(d)
    if not x.size:
        return given
    lam = _threshold(strength, scaling, x) * group_weight(x.shape, axis, reweight)
    bend = jnp.zeros_like(lam)
    if concavity is not None:
        least = jnp.min(d, axis=group_axes(x.shape, axis), keepdims=True)
        bend = jnp.minimum(_threshold(concavity, scaling, x), least / MARGIN)
    # What -bend ||z||^2 / 2 leaves of the metric; bend = eta / gamma.
    bent = d - bend
    b = jnp.abs(d * x)
    norm = group_norms(b, axis)
    positive = jnp.where(lam == 0, 1, lam)
    theta = secular_root(b, norm, bent, positive, axis)
    z = x * (d * theta / (bent * theta + positive))
    z = jnp.where(norm <= lam, 0, z)
    if concavity is not None:
        # ||x|| > gamma lambda, in terms that stay finite where gamma is not.
        z = jnp.where(group_norms(x, axis) * bend > lam, x, z)
    return jnp.where(lam == 0, x, z).astype(jnp.result_type(given))
