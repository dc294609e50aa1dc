"""Balls with sparse extreme points: their norms, and where linear functions are least.

For a Frank-Wolfe method (`frank_wolfe`) the parameters stay in such a ball, and a step
goes towards the point of the ball where the linearised objective is least. That point
has k nonzeros, so the parameters are drawn to what few of them can carry.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from prunadag_optax._common import checks
from prunadag_optax._common.dtypes import cast_like, working
from prunadag_optax._ranking import exact
from prunadag_optax._ranking.counts import target_count


def lmo_k_support(
    gradients: Any, radius: chex.Numeric, support: chex.Numeric
) -> optax.Params:
    r"""The point of the k-support ball where a linear function is least.

    .. math::
      v = \arg\min_{v \in C} \langle v, m \rangle = - r \, m_T / \|m_T\|_2, \quad
      C = \mathrm{conv} \{ v : \|v\|_0 \le k, \|v\|_2 \le r \}

    with T the k largest magnitudes of m, exactly k: of equal magnitudes at the border
    the later are in T, as in `masks`, since all of them together would leave the
    ball. With k = 1 this is the l1 ball, with k = n the l2 ball.

    Args:
      gradients: pytree of m, one vector of n elements over all leaves.
      radius: r > 0, in units of the parameter.
      support: k: a fraction of n in (0, 1] as a float, or a count as an integer.

    Returns:
      Pytree like `gradients`, in at least float32. Zeros if m = 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax.methods import balls
      >>> balls.lmo_k_support(jnp.array([3.0, -1.0, -4.0]), 10.0, 2)
      Array([-6., -0.,  8.], dtype=float32)

    References:
      A. Argyriou, R. Foygel, N. Srebro, Sparse prediction with the k-support norm,
      NeurIPS 2012, section 2.
    """
    checks.scalar("radius", radius, above=0)
    m = largest(gradients, support, "gradients")
    # Scaled first, or the squares of small gradients would underflow.
    scale = optax.tree.norm(m, ord="inf")
    m = jax.tree.map(lambda leaf: leaf / jnp.where(scale == 0, 1, scale), m)
    size = norm(m)
    length = radius / jnp.where(size == 0, 1, size)
    return jax.tree.map(lambda leaf: -length * leaf, m)


def lmo_k_sparse(
    gradients: Any, radius: chex.Numeric, support: chex.Numeric
) -> optax.Params:
    r"""The point of the k-sparse polytope where a linear function is least.

    .. math::
      v_i = \arg\min_{v \in C} \langle v, m \rangle_i = - r \, \mathrm{sign}(m_i)
      \text{ on } T, \text{ else } 0, \quad C = B_1(r k) \cap B_\infty(r)

    with T the k largest magnitudes of m as in `lmo_k_support`.

    Args:
      gradients: pytree of m, one vector of n elements over all leaves.
      radius: r > 0, in units of the parameter.
      support: k: a fraction of n in (0, 1] as a float, or a count as an integer.

    Returns:
      Pytree like `gradients`, in at least float32.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax.methods import balls
      >>> balls.lmo_k_sparse(jnp.array([3.0, -1.0, -4.0]), 10.0, 2)
      Array([-10.,  -0.,  10.], dtype=float32)

    References:
      S. Pokutta, C. Spiegel, M. Zimmer, Deep neural network training with Frank-Wolfe,
      arXiv:2010.07243 (2020), section 2.
    """
    checks.scalar("radius", radius, above=0)
    return jax.tree.map(
        lambda leaf: radius * -jnp.sign(leaf), largest(gradients, support, "gradients")
    )


def k_support_norm(params: optax.Params, support: chex.Numeric) -> jax.Array:
    r"""The norm whose unit ball is the convex hull of short k-sparse vectors.

    .. math::
      \|x\|^2 = \min_{\theta \in [0, 1]^n, \sum \theta_i \le k} \sum_i x_i^2 / \theta_i
      = \sum_{|x_i| > \lambda} x_i^2 + \frac{1}{k - c}
      \Bigl( \sum_{|x_i| \le \lambda} |x_i| \Bigr)^2

    with c the number of magnitudes above the lambda at which
    :math:`\sum_i \min(1, |x_i| / \lambda) = k`. The l1 norm for k = 1, the Euclidean
    norm for k = n, and for vectors with no more than k nonzeros.

    Args:
      params: pytree of real floating arrays, one vector of n elements.
      support: k: a fraction of n in (0, 1] as a float, or a count as an integer.

    Returns:
      Scalar, in at least float32, in units of the parameter.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax.methods import balls
      >>> x = jnp.array([4.0, 2.0, 1.0])
      >>> [float(balls.k_support_norm(x, k)) for k in (1, 2)]
      [7.0, 5.0]

    References:
      Argyriou, Foygel, Srebro (2012), proposition 2.1, there with sorted magnitudes.
    """
    checks.real_leaves("params", params)
    k = jnp.asarray(count_among(params, support))
    return _k_support_norm(jax.tree.leaves(params), k)


def k_sparse_norm(params: optax.Params, support: chex.Numeric) -> jax.Array:
    r"""The norm whose unit ball is the k-sparse polytope.

    .. math:: \|x\| = \max(\|x\|_\infty, \|x\|_1 / k)

    Args:
      params: pytree of real floating arrays, one vector of n elements.
      support: k: a fraction of n in (0, 1] as a float, or a count as an integer.

    Returns:
      Scalar, in at least float32, in units of the parameter.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax.methods import balls
      >>> x = jnp.array([3.0, 2.0, 1.0])
      >>> [float(balls.k_sparse_norm(x, k)) for k in (1, 3)]
      [6.0, 3.0]

    References:
      Pokutta, Spiegel, Zimmer (2020), section 2.
    """
    checks.real_leaves("params", params)
    params = jax.tree.map(working, params)
    mean = optax.tree.norm(params, ord=1) / jnp.maximum(count_among(params, support), 1)
    return jnp.maximum(mean, optax.tree.norm(params, ord="inf"))


def diameter(radius: Any, support: Any, ball: str = "k_support") -> Any:
    r"""The largest distance between two points of a ball.

    .. math:: 2 r \text{ (k-support)}, \quad 2 r \sqrt{k} \text{ (k-sparse)}

    Args:
      radius: r, in units of the parameter.
      support: k, as a count.
      ball: "k_support" or "k_sparse".

    Returns:
      The diameter, in units of the parameter.

    Raises:
      ValueError: for an unknown `ball`.

    Examples:
      >>> from prunadag_optax.methods import balls
      >>> float(balls.diameter(5.0, 4, "k_sparse"))
      20.0
    """
    checks.choice("ball", ball, tuple(BALLS))
    return 2 * radius * BALLS[ball].half_diameter(support)


def make_feasible(
    params: optax.Params,
    radius: Any,
    support: chex.Numeric,
    *,
    ball: str = "k_support",
    scope: str = "leaf",
) -> optax.Params:
    r"""Scales parameters into the ball, where a Frank-Wolfe run has to start.

    .. math:: x \min(1, r / \|x\|_C)

    This is no projection: the direction of x stays as it is.

    Args:
      params: pytree of parameters.
      radius: r > 0, or a pytree like `params` of one radius a leaf.
      support: k: a fraction in (0, 1] as a float, or a count as an integer.
      ball: "k_support" or "k_sparse".
      scope: "leaf": a ball for each leaf; "global": one for all parameters.

    Returns:
      Pytree like `params`, of the same dtypes.

    Raises:
      ValueError: for an argument out of range; the message names it.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax.methods import balls
      >>> balls.make_feasible(jnp.array([3.0, 4.0]), 1.0, 2)
      Array([0.6, 0.8], dtype=float32)
    """
    check(radius, support, ball, scope)
    checks.real_leaves("params", params)

    def scale(x, r):
        size = BALLS[ball].norm(x, support)
        factor = jnp.where(size > r, r / jnp.where(size > r, size, 1), 1)
        return [working(leaf) * factor for leaf in x]

    return cast_like(for_each_ball(scale, scope, radius, params), params)


def initialization_radius(
    init: Callable[[jax.Array], optax.Params],
    key: jax.Array,
    support: chex.Numeric,
    *,
    width: float,
    ball: str = "k_support",
    scope: str = "leaf",
    samples: int = 100,
) -> Any:
    r"""Radii that give each ball a diameter in proportion to the initial parameters.

    .. math:: \mathrm{diam}(C) = 2 w \, E \|x_0\|_2

    with the expectation as a mean over random initialisations, and 1 in its place for
    leaves that start at zero.

    Args:
      init: function from a random key to parameters.
      key: a key of `jax.random`.
      support: k: a fraction in (0, 1] as a float, or a count as an integer.
      width: w > 0, the ball's radius in units of the mean norm; tens are usual.
      ball: "k_support" or "k_sparse".
      scope: "leaf": a radius for each leaf; "global": one for all parameters.
      samples: number of initialisations in the mean.

    Returns:
      Pytree like the parameters of scalars, or with scope "global" one scalar: what
      `frank_wolfe.conditional_gradient` takes as `radius`.

    Raises:
      ValueError: for an argument out of range; the message names it.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from prunadag_optax.methods import balls
      >>> init = lambda key: {"w": jnp.ones(4), "b": jnp.zeros(2)}
      >>> key = jax.random.key(0)
      >>> radii = balls.initialization_radius(init, key, 1, width=10)
      >>> {name: float(radius) for name, radius in sorted(radii.items())}
      {'b': 10.0, 'w': 20.0}

    References:
      Pokutta, Spiegel, Zimmer (2020); L. Miao et al., Learning pruning-friendly
      networks via Frank-Wolfe: one-shot, any-sparsity, and no retraining, ICLR 2022.
    """
    check(width, support, ball, scope, name="width")
    checks.function("init", init, "key")
    checks.key("key", key)
    checks.integer("samples", samples, least=1)

    def norms(key):
        params = init(key)
        return norm(params) if scope == "global" else jax.tree.map(norm, params)

    means = jax.tree.map(
        lambda sizes: jnp.mean(sizes, axis=0),
        lax.map(norms, jax.random.split(key, samples)),
    )
    shapes = jax.eval_shape(init, key)

    def radius(mean, shape):
        half = BALLS[ball].half_diameter(count_among(shape, support))
        return width * jnp.where(mean == 0, 1, mean) / half

    if scope == "global":
        return radius(means, shapes)
    return jax.tree.map(radius, means, shapes)


class Ball(NamedTuple):
    """What a Frank-Wolfe method asks of a ball."""

    lmo: Callable[[Any, Any, Any], Any]  # (m, r, k) -> v
    norm: Callable[[Any, Any], jax.Array]  # (x, k) -> ||x||, 1 on the border at r = 1
    half_diameter: Callable[[Any], Any]  # k -> the diameter at r = 1/2


BALLS = {
    "k_support": Ball(lmo_k_support, k_support_norm, lambda k: 1.0),
    "k_sparse": Ball(
        lmo_k_sparse, k_sparse_norm, lambda k: jnp.sqrt(jnp.maximum(k, 1) * 1.0)
    ),
}


def check(
    radius: Any, support: Any, ball: str, scope: str, name: str = "radius"
) -> None:
    """Raises a ValueError unless the arguments say which balls are meant.

    Args:
      radius: a number > 0, or with scope "leaf" a pytree of them.
      support: a fraction or a count.
      ball: a name in `BALLS`.
      scope: "leaf" or "global".
      name: of the argument `radius`, for the message.

    Raises:
      ValueError: naming the argument, the value and what is allowed.
    """
    checks.choice("ball", ball, tuple(BALLS))
    checks.choice("scope", scope, ("leaf", "global"))
    if scope == "global" or checks.is_number(radius):
        checks.scalar(name, radius, above=0)
    else:
        for path, leaf in jax.tree_util.tree_leaves_with_path(radius):
            checks.scalar(name + jax.tree_util.keystr(path), leaf, above=0)
    checks.fraction_or_count("support", support)


def for_each_ball(
    function: Callable[..., Any], scope: str, radius: Any, *trees: Any
) -> Any:
    """Calls a function on the leaves within each ball.

    Args:
      function: from lists of leaves, one for each tree, and a radius to a list.
      scope: "global" or "leaf".
      radius: a scalar, or a pytree of them for the leaves.
      *trees: pytrees of one structure.

    Returns:
      Pytree like each of the trees, of what the function returns.

    Raises:
      ValueError: if `radius` is a pytree of another structure.
    """
    treedef = jax.tree.structure(trees[-1])
    columns = [treedef.flatten_up_to(tree) for tree in trees]
    if scope == "global":
        return treedef.unflatten(function(*columns, radius))
    radii = [radius] * treedef.num_leaves
    if not (checks.is_number(radius) or checks.is_scalar_array(radius)):
        if jax.tree.structure(radius) != treedef:
            raise ValueError(
                "radius must be a number > 0 or a pytree of them with the structure "
                f"of params, {treedef}; got {jax.tree.structure(radius)}."
            )
        radii = jax.tree.leaves(radius)
    rows = zip(*columns, radii, strict=True)
    return treedef.unflatten(
        [function(*([leaf] for leaf in row), r)[0] for *row, r in rows]
    )


def count_among(tree: Any, support: chex.Numeric) -> int | jax.Array:
    """The count k among the elements of a tree: at least 1, unless there are none.

    Args:
      tree: pytree of arrays, or of their shapes and dtypes.
      support: a fraction in (0, 1] as a float, or a count as an integer.

    Returns:
      The count.

    Raises:
      ValueError: if `support` is neither.
    """
    checks.fraction_or_count("support", support)
    return target_count(support, sum(np.size(leaf) for leaf in jax.tree.leaves(tree)))


def largest(tree: Any, support: chex.Numeric, name: str = "tree") -> Any:
    """A tree with all but its k largest magnitudes at zero, exactly k.

    Args:
      tree: pytree of real floating arrays.
      support: k, as in `count_among`.
      name: the name of `tree` for messages.

    Returns:
      Pytree like `tree`, in at least float32.
    """
    checks.real_leaves(name, tree)
    leaves, treedef = jax.tree.flatten(jax.tree.map(jnp.asarray, tree))
    left_out = sum(leaf.size for leaf in leaves) - count_among(tree, support)
    kept = exact.keep_largest(leaves, jnp.asarray(left_out))
    return treedef.unflatten(
        [jnp.where(keep, working(x), 0) for keep, x in zip(kept, leaves, strict=True)]
    )


def norm(tree: Any) -> jax.Array:
    """The Euclidean norm of all leaves as one vector, in at least float32."""
    return optax.tree.norm(jax.tree.map(working, tree))


@jax.jit
def _k_support_norm(leaves: list[jax.Array], k: jax.Array) -> jax.Array:
    dtype = jnp.result_type(jnp.float32, *leaves)
    magnitudes = [jnp.abs(x.astype(dtype)) for x in leaves]
    k = k.astype(dtype)

    def parts(magnitudes, level):
        """How many are above the level, and the sum of the others."""
        above = [x > level for x in magnitudes]
        rest = [jnp.where(a, 0, x) for a, x in zip(above, magnitudes, strict=True)]
        return optax.tree.sum([a.astype(dtype) for a in above]), optax.tree.sum(rest)

    # Newton's method on sum_i min(level, |x_i|) - k level, which is concave and
    # piecewise linear: from above it descends to the root in finitely many steps.
    # Where the root lies has no influence on the derivative of the norm.
    fixed = lax.stop_gradient(magnitudes)

    def lower(levels):
        above, rest = parts(fixed, levels[0])
        return rest / jnp.maximum(k - above, 1), levels[0]

    total = jnp.asarray(optax.tree.sum(fixed), dtype)
    start = total / jnp.maximum(k, 1), jnp.full((), jnp.inf, dtype)
    _, level = lax.while_loop(lambda levels: levels[0] < levels[1], lower, start)
    above, rest = parts(magnitudes, level)
    large = [jnp.where(x > level, x, 0) for x in magnitudes]
    return norm([*large, rest / jnp.sqrt(jnp.maximum(k - above, 1))])
