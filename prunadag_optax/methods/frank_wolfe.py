"""Frank-Wolfe methods, whose iterates stay in a ball with sparse extreme points.

A step moves towards the point of the ball where the linearised objective is least. For
the balls here that point has k nonzeros, so the parameters are drawn to what few of
them can carry, and can be pruned after training. `fw1` and `fw2` are deterministic, on
one ball around all parameters; `frank_wolfe` is the stochastic form, with momentum and
a ball for each leaf.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from prunadag_optax._common import checks
from prunadag_optax._common.dtypes import value_at, working
from prunadag_optax._ranking import exact
from prunadag_optax._ranking.counts import target_count


class FrankWolfeState(NamedTuple):
    """State of `frank_wolfe`."""

    # The iterations done, shape=(), dtype=int32. optax's states have the same name.
    count: jax.typing.ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride]
    momentum: optax.Updates | None  # m, shapes of params; None without


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
      >>> from prunadag_optax.methods import frank_wolfe
      >>> frank_wolfe.lmo_k_support(jnp.array([3.0, -1.0, -4.0]), 10.0, 2)
      Array([-6., -0.,  8.], dtype=float32)

    References:
      A. Argyriou, R. Foygel, N. Srebro, Sparse prediction with the k-support norm,
      NeurIPS 2012, section 2.
    """
    m = _largest(gradients, support)
    # Scaled first, or the squares of small gradients would underflow.
    scale = _largest_of([jnp.abs(leaf) for leaf in jax.tree.leaves(m)])
    m = jax.tree.map(lambda leaf: leaf / jnp.where(scale == 0, 1, scale), m)
    norm = _norm(m)
    length = radius / jnp.where(norm == 0, 1, norm)
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
      >>> from prunadag_optax.methods import frank_wolfe
      >>> frank_wolfe.lmo_k_sparse(jnp.array([3.0, -1.0, -4.0]), 10.0, 2)
      Array([-10.,  -0.,  10.], dtype=float32)

    References:
      S. Pokutta, C. Spiegel, M. Zimmer, Deep neural network training with Frank-Wolfe,
      arXiv:2010.07243 (2020), section 2.
    """
    return jax.tree.map(
        lambda leaf: radius * -jnp.sign(leaf), _largest(gradients, support)
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
      >>> from prunadag_optax.methods import frank_wolfe
      >>> x = jnp.array([4.0, 2.0, 1.0])
      >>> [float(frank_wolfe.k_support_norm(x, k)) for k in (1, 2)]
      [7.0, 5.0]

    References:
      Argyriou, Foygel, Srebro (2012), proposition 2.1, there with sorted magnitudes.
    """
    return _k_support_norm(
        jax.tree.leaves(params), jnp.asarray(_count(support, params))
    )


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
      >>> from prunadag_optax.methods import frank_wolfe
      >>> x = jnp.array([3.0, 2.0, 1.0])
      >>> [float(frank_wolfe.k_sparse_norm(x, k)) for k in (1, 3)]
      [6.0, 3.0]

    References:
      Pokutta, Spiegel, Zimmer (2020), section 2.
    """
    magnitudes = [jnp.abs(working(x)) for x in jax.tree.leaves(params)]
    mean = _total(magnitudes) / jnp.maximum(_count(support, params), 1)
    return jnp.maximum(mean, _largest_of(magnitudes))


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
      >>> from prunadag_optax.methods import frank_wolfe
      >>> float(frank_wolfe.diameter(5.0, 4, "k_sparse"))
      20.0
    """
    checks.choice("ball", ball, tuple(_BALLS))
    return 2 * radius * _BALLS[ball].half_diameter(support)


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
      >>> from prunadag_optax.methods import frank_wolfe
      >>> frank_wolfe.make_feasible(jnp.array([3.0, 4.0]), 1.0, 2)
      Array([0.6, 0.8], dtype=float32)
    """
    _check(radius, support, ball, scope)
    checks.real_leaves("params", params)

    def scale(x, r):
        norm = _BALLS[ball].norm(x, support)
        factor = jnp.where(norm > r, r / jnp.where(norm > r, norm, 1), 1)
        return [(working(leaf) * factor).astype(jnp.result_type(leaf)) for leaf in x]

    return _by_block(scale, scope, radius, params)


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
      `frank_wolfe` takes as `radius`.

    Raises:
      ValueError: for an argument out of range; the message names it.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from prunadag_optax.methods import frank_wolfe
      >>> init = lambda key: {"w": jnp.ones(4), "b": jnp.zeros(2)}
      >>> key = jax.random.key(0)
      >>> radii = frank_wolfe.initialization_radius(init, key, 1, width=10)
      >>> {name: float(radius) for name, radius in sorted(radii.items())}
      {'b': 10.0, 'w': 20.0}

    References:
      Pokutta, Spiegel, Zimmer (2020); L. Miao et al., Learning pruning-friendly
      networks via Frank-Wolfe: one-shot, any-sparsity, and no retraining, ICLR 2022.
    """
    _check(width, support, ball, scope, name="width")
    checks.scalar("samples", samples, least=1)

    def norms(key):
        params = init(key)
        return _norm(params) if scope == "global" else jax.tree.map(_norm, params)

    means = jax.tree.map(
        lambda norm: jnp.mean(norm, axis=0),
        lax.map(norms, jax.random.split(key, samples)),
    )
    shapes = jax.eval_shape(init, key)

    def radius(mean, shape):
        k = _count(support, shape)
        return width * jnp.where(mean == 0, 1, mean) / _BALLS[ball].half_diameter(k)

    if scope == "global":
        return radius(means, shapes)
    return jax.tree.map(radius, means, shapes)


def frank_wolfe(
    learning_rate: optax.ScalarOrSchedule,
    radius: Any,
    support: chex.Numeric,
    *,
    ball: str = "k_support",
    rescale: str | None = "gradient",
    momentum: chex.Numeric | None = 0.9,
    dampening: chex.Numeric = 0.0,
    scope: str = "leaf",
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The stochastic Frank-Wolfe method with momentum.

    .. math::
      m_0 &= g_0, \quad m_k = \rho m_{k-1} + (1 - d) g_k \\
      v_k &= \arg\min_{v \in C} \langle v, m_k \rangle \\
      x_{k+1} &= x_k + \eta_k (v_k - x_k), \quad
      \eta_k = \min(\mathrm{lr}_k f_k, 1)

    with the factor f of `rescale`:

    ============= =============================================================
    None          1
    diameter      1 / diam(C)
    gradient      \|\|m\|\| / \|\|v - x\|\|: a step is lr \|\|m\|\| long, as SGD's
    fast_gradient 2 \|\|m\|\| / diam(C)
    relevant      \|\|m\|\|_T / \|\|v - x\|\|, T the components where v is not 0
    ============= =============================================================

    The iterates stay in C if x_0 is in C: see `make_feasible`. Leave weight decay out;
    the ball takes its place.

    Args:
      learning_rate: lr >= 0, number or schedule count -> value. With momentum and no
        dampening ||m|| is about 1 / (1 - rho) times ||g||, which calls for a learning
        rate that much smaller.
      radius: r > 0 of every ball, or a pytree like the parameters of one radius a leaf,
        such as `initialization_radius` returns.
      support: k, the number of nonzeros of v: a fraction in (0, 1] as a float, or a
        count as an integer; with scope "leaf" it holds for each leaf, where it is at
        least 1 and at most the leaf's size.
      ball: C: "k_support", see `lmo_k_support`, or "k_sparse", see `lmo_k_sparse`.
      rescale: None, "diameter", "gradient", "fast_gradient" or "relevant".
      momentum: rho in [0, 1), or None for m = g.
      dampening: d in [0, 1]: 0 adds gradients up, d = rho averages them. The first
        gradient is taken whole.
      scope: "leaf": a ball for each leaf, with a step size of its own; "global": one
        ball around all parameters as one vector.
      accumulator_dtype: dtype of m; None keeps the parameters'.

    Returns:
      An `optax.GradientTransformationExtraArgs` with `FrankWolfeState`. Its `update`
      needs `params` and returns updates in the parameters' dtypes.

    Raises:
      ValueError: for an argument out of range, by name; from `init` and `update` for
        leaves that are not real floats, for trees that do not match, and without
        `params`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from prunadag_optax.methods import frank_wolfe
      >>> loss = lambda x: jnp.sum((x - jnp.array([3.0, 0.1, 0.0, -2.0])) ** 2)
      >>> tx = frank_wolfe.frank_wolfe(0.01, radius=5.0, support=2)
      >>> x = jnp.zeros(4)
      >>> state = tx.init(x)
      >>> for _ in range(200):
      ...     updates, state = tx.update(jax.grad(loss)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> bool(loss(x) < 0.1)
      True

    References:
      Pokutta, Spiegel, Zimmer (2020), algorithms 1 and 2. Miao et al., ICLR 2022.
      M. Zimmer, C. Spiegel, S. Pokutta, Compression-aware training of neural networks
      using Frank-Wolfe, arXiv:2205.11921 (2022).
    """
    _check(radius, support, ball, scope)
    if not callable(learning_rate):
        checks.scalar("learning_rate", learning_rate, least=0)
    if rescale is not None:
        choices = ("diameter", "gradient", "fast_gradient", "relevant")
        checks.choice("rescale", rescale, choices)
    if momentum is not None:
        checks.scalar("momentum", momentum, least=0, below=1)
    checks.scalar("dampening", dampening, least=0, most=1)
    checks.dtype("accumulator_dtype", accumulator_dtype)

    def init_fn(params: optax.Params) -> Any:
        checks.real_leaves("params", params)
        m = None
        if momentum is not None:
            m = optax.tree.zeros_like(params, dtype=accumulator_dtype)
        return FrankWolfeState(jnp.zeros([], jnp.int32), m)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> Any:
        del extra_args
        if params is None:
            raise ValueError(checks.NO_PARAMS_MSG)
        checks.real_leaves("params", params)
        checks.real_leaves("updates", updates)
        checks.same_trees("updates", updates, "params", params)
        m = jax.tree.map(working, updates)
        if momentum is not None:
            checks.same_shapes("state.momentum", state.momentum, "params", params)
            m = _accumulate(state, m, momentum, dampening)
        rate = value_at(learning_rate, state.count)

        def towards(m, x, r):
            k = _count(support, x)
            v = _BALLS[ball].lmo(m, r, support)
            move = jax.tree.map(lambda v, x: v - working(x), v, x)
            half = r * _BALLS[ball].half_diameter(k)
            eta = jnp.clip(rate * _factor(rescale, m, v, move, half), 0, 1)
            return [
                (eta * d).astype(jnp.result_type(leaf))
                for d, leaf in zip(move, x, strict=True)
            ]

        moves = _by_block(towards, scope, radius, m, params)
        if momentum is not None:
            m = jax.tree.map(lambda m, old: m.astype(old.dtype), m, state.momentum)
        return moves, FrankWolfeState(
            optax.safe_increment(state.count), None if momentum is None else m
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def fw1(
    radius: Any, support: chex.Numeric, shift: chex.Numeric = 1.0
) -> optax.GradientTransformationExtraArgs:
    r"""FW1: deterministic Frank-Wolfe on the k-support ball, open-loop steps.

    .. math::
      x_{k+1} = x_k + \eta_k (v_k - x_k), \quad \eta_k = c / (k + c), \quad c = 1

    The first step leads to v_0 wherever x_0 is. With c = 2, the usual step of
    Frank-Wolfe, x_k forgets the first vertices faster, as the average of the vertices
    that it is has weights that grow with k; with c = 1 it is their plain mean.

    Args:
      radius: tau > 0, of the one ball around all parameters.
      support: T: a fraction of n in (0, 1] as a float, or a count as an integer.
      shift: c > 0.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: for an argument out of range; the message names it.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from prunadag_optax.methods import frank_wolfe
      >>> tx, x = frank_wolfe.fw1(10.0, 2), jnp.zeros(3)
      >>> updates, _ = tx.update(jnp.array([3.0, -1.0, -4.0]), tx.init(x), x)
      >>> updates
      Array([-6., -0.,  8.], dtype=float32)

    References:
      M. Porcelli, G. Seraghiti, Ph. L. Toint, prunAdag: an adaptive pruning-aware
      gradient method, Comput. Optim. Appl. 93 (2026) 85-119, section 4.

      M. Jaggi, Revisiting Frank-Wolfe: projection-free sparse convex optimization,
      ICML 2013, Algorithm 1 (c = 2).
    """
    checks.scalar("shift", shift, above=0)
    return frank_wolfe(
        lambda count: shift / (count + shift),
        radius,
        support,
        rescale=None,
        momentum=None,
        scope="global",
    )


def fw2(
    radius: Any, support: chex.Numeric, beta: optax.ScalarOrSchedule
) -> optax.GradientTransformationExtraArgs:
    r"""FW2: deterministic Frank-Wolfe on the k-support ball, steps like the gradient.

    .. math:: x_{k+1} = x_k + \eta_k (v_k - x_k), \quad
       \eta_k = \min(\beta \|g_k\|_{R_k} / \|v_k - x_k\|, 1)

    with R_k the T largest gradients, where v_k is not zero.

    Args:
      radius: tau > 0, of the one ball around all parameters.
      support: T: a fraction of n in (0, 1] as a float, or a count as an integer.
      beta: >= 0, number or schedule.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: for an argument out of range; the message names it.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from prunadag_optax.methods import frank_wolfe
      >>> tx, x = frank_wolfe.fw2(10.0, 2, 0.1), jnp.zeros(3)
      >>> updates, _ = tx.update(jnp.array([3.0, -1.0, -4.0]), tx.init(x), x)
      >>> updates.round(3)
      Array([-0.3, -0. ,  0.4], dtype=float32)

    References:
      Porcelli, Seraghiti, Toint (2026), section 4.
    """
    return frank_wolfe(
        beta, radius, support, rescale="relevant", momentum=None, scope="global"
    )


class _Ball(NamedTuple):
    lmo: Callable[[Any, Any, Any], Any]  # (m, r, k) -> v
    norm: Callable[[Any, Any], jax.Array]  # (x, k) -> ||x||, 1 on the border at r = 1
    half_diameter: Callable[[Any], Any]  # k -> the diameter at r = 1/2


_BALLS = {
    "k_support": _Ball(lmo_k_support, k_support_norm, lambda k: 1.0),
    "k_sparse": _Ball(
        lmo_k_sparse, k_sparse_norm, lambda k: jnp.sqrt(jnp.maximum(k, 1) * 1.0)
    ),
}


def _accumulate(state, gradients, momentum, dampening) -> Any:
    """The momentum m_k, in working precision."""

    def leaf(m, g):
        later = momentum * working(m) + (1 - dampening) * g
        return jnp.where(state.count == 0, g, later)

    return jax.tree.map(leaf, state.momentum, gradients)


def _factor(rescale, m, v, move, half_diameter) -> Any:
    """What multiplies the learning rate."""
    if rescale is None:
        return 1.0
    if rescale == "diameter":
        return 0.5 / half_diameter
    if rescale == "fast_gradient":
        return _norm(m) / half_diameter
    if rescale == "relevant":
        m = jax.tree.map(lambda m, v: jnp.where(v == 0, 0, m), m, v)
    distance = _norm(move)
    # Where v = x nothing is left to move.
    return _norm(m) / jnp.where(distance == 0, 1, distance)


def _by_block(function, scope, radius, *trees) -> Any:
    """Calls a function on the leaves of each ball, and returns a tree of what it does.

    Args:
      function: from lists of leaves, one for each tree, and a radius to a list.
      scope: "global" or "leaf".
      radius: a scalar, or a pytree of them for the leaves.
      *trees: pytrees of one structure.
    """
    treedef = jax.tree.structure(trees[-1])
    columns = [treedef.flatten_up_to(tree) for tree in trees]
    if scope == "global":
        return treedef.unflatten(function(*columns, radius))
    radii = [radius] * treedef.num_leaves
    if not _is_scalar(radius):
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


def _is_scalar(value: Any) -> bool:
    return checks.is_number(value) or checks.is_scalar_array(value)


def _check(radius, support, ball, scope, name="radius") -> None:
    checks.choice("ball", ball, tuple(_BALLS))
    checks.choice("scope", scope, ("leaf", "global"))
    if scope == "global" or checks.is_number(radius):
        checks.scalar(name, radius, above=0)
    else:
        for path, leaf in jax.tree_util.tree_leaves_with_path(radius):
            where = name + jax.tree_util.keystr(path)
            checks.scalar(where, leaf, above=0)
    checks.fraction_or_count("support", support)


def _count(support, tree) -> int | jax.Array:
    """The count k among the elements of a tree: at least 1, unless there are none."""
    checks.fraction_or_count("support", support)
    size = sum(np.size(leaf) for leaf in jax.tree.leaves(tree))
    return target_count(support, size)


@jax.jit
def _k_support_norm(leaves: list[jax.Array], k: jax.Array) -> jax.Array:
    leaves = [jnp.abs(working(x)) for x in leaves]
    dtype = jnp.result_type(jnp.float32, *leaves)
    magnitudes = [x.astype(dtype) for x in leaves]
    k = k.astype(dtype)

    def parts(magnitudes, level):
        """How many are above the level, and the sum of the others."""
        above = [x > level for x in magnitudes]
        rest = [jnp.where(a, 0, x) for a, x in zip(above, magnitudes, strict=True)]
        return _total([a.astype(dtype) for a in above]), _total(rest)

    # Newton's method on sum_i min(level, |x_i|) - k level, which is concave and
    # piecewise linear: from above it descends to the root in finitely many steps.
    # Where the root lies has no influence on the derivative of the norm.
    fixed = lax.stop_gradient(magnitudes)

    def lower(levels):
        above, rest = parts(fixed, levels[0])
        return rest / jnp.maximum(k - above, 1), levels[0]

    start = _total(fixed) / jnp.maximum(k, 1), jnp.full((), jnp.inf, dtype)
    _, level = lax.while_loop(lambda levels: levels[0] < levels[1], lower, start)
    above, rest = parts(magnitudes, level)
    large = [jnp.where(x > level, x, 0) for x in magnitudes]
    return _norm([*large, rest / jnp.sqrt(jnp.maximum(k - above, 1))])


def _largest(tree, support) -> Any:
    """The tree in working precision, with all but its k largest magnitudes at zero."""
    leaves, treedef = jax.tree.flatten(tree)
    size = sum(np.size(leaf) for leaf in leaves)
    masks = exact.keep_largest(
        [jnp.asarray(leaf) for leaf in leaves],
        jnp.asarray(size - _count(support, tree)),
        [None] * len(leaves),
    )
    return treedef.unflatten(
        [jnp.where(m, working(x), 0) for m, x in zip(masks, leaves, strict=True)]
    )


def _total(leaves: list[jax.Array]) -> Any:
    return sum((jnp.sum(leaf) for leaf in leaves), start=0.0)


def _largest_of(leaves: list[jax.Array]) -> Any:
    largest = (jnp.max(leaf, initial=0) for leaf in leaves)
    return functools.reduce(jnp.maximum, largest, 0.0)


def _norm(tree: Any) -> jax.Array:
    """The Euclidean norm of all leaves as one vector."""
    return jnp.sqrt(_total([working(x) ** 2 for x in jax.tree.leaves(tree)]))
