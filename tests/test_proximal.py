"""Proximal operators and optimizers: optimality, identities, transcriptions.

An operator's result is right if it is stationary: every residual here is that of the
optimality conditions, relative to the terms that cancel in it, and computed in float64
from what the operator returned.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from prunadag_optax import masks
from prunadag_optax.methods import proximal
from prunadag_optax.methods.penalties import groups, operators, regularisers
from prunadag_optax.methods.penalties.operators import MARGIN
from tests import prox_reference as reference
from tests.helpers import enable_x64, refused

few = settings(max_examples=30, deadline=None)
TOLERANCE = {"float32": 1e-6, "float64": 1e-12}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE)


@pytest.fixture(autouse=True)
def _double():
    with enable_x64():
        yield


# Optimality. Arrays are [groups, entries], lambda is 1 and x covers the rest.


def random_groups(seed, dtype, spread, size=40, number=300):
    """x and d with d over `spread` powers of ten, and ||d x|| from 0.1 to 1e6."""
    rng = np.random.default_rng(seed)
    d = 10 ** rng.uniform(-spread / 2, spread / 2, (number, size))
    x = rng.normal(size=(number, size)) * 10 ** rng.uniform(-1, 1, (number, size))
    # A third close to the border of zero.
    wanted = 10 ** np.where(
        rng.random((number, 1)) < 1 / 3,
        rng.uniform(-0.01, 0.01, (number, 1)),
        rng.uniform(-1, 6, (number, 1)),
    )
    x *= wanted / np.linalg.norm(d * x, axis=1, keepdims=True)
    return jnp.asarray(x, dtype), jnp.asarray(d, dtype)


def norms(x):
    return np.linalg.norm(x, axis=1, keepdims=True)


def group_residual(z, x, d, slope, lam=1.0):
    """Of a penalty eta p(||z||): `slope` is eta p' / lam as a function of ||z||."""
    z, x, d = (np.asarray(v, np.float64) for v in (z, x, d))
    length = norms(z)
    unit = z / np.where(length == 0, 1, length)
    stationary = d * (z - x) + lam * slope(length) * unit
    inside = np.maximum(norms(d * x) - lam, 0) / (norms(d * x) + lam)
    return np.max(
        np.where(length == 0, inside, np.abs(stationary) / (d * np.abs(x) + lam))
    )


def is_nontrivial(z):
    """Groups at zero and others."""
    zero = np.all(np.asarray(z) == 0, axis=1)
    return 0.1 < zero.mean() < 0.9


@dtypes
@pytest.mark.parametrize("spread", [0, 2, 5, 8])
def test_weighted_l1_is_stationary(dtype, spread):
    x, d = random_groups(1, dtype, spread)
    z = operators.prox_l1(x, 4.0, 0.25, metric=d)
    assert z.dtype == dtype
    z, x, d = (np.asarray(v, np.float64) for v in (z, x, d))
    residual = np.where(
        z == 0, np.maximum(d * np.abs(x) - 1, 0), np.abs(d * (z - x) + np.sign(z))
    )
    assert np.max(residual / (d * np.abs(x) + 1)) < TOLERANCE[dtype]
    assert 0.1 < np.mean(z == 0) < 0.9


@dtypes
@pytest.mark.parametrize("spread", [0, 2, 5, 8])
def test_weighted_group_lasso_is_stationary(dtype, spread):
    x, d = random_groups(2, dtype, spread)
    z = operators.prox_group_lasso(x, 4.0, 0.25, metric=d, axis=0, reweight=False)
    assert z.dtype == dtype
    assert is_nontrivial(z)
    assert group_residual(z, x, d, np.ones_like) < TOLERANCE[dtype]


@dtypes
@pytest.mark.parametrize("spread", [0, 2, 5, 8])
def test_weighted_group_mcp_is_stationary(dtype, spread):
    x, d = random_groups(3, dtype, spread)
    eta = 0.25
    # Convex for every group, and flat for some.
    gamma = 1.5 * eta / float(d.min())
    z = operators.prox_group_mcp(x, 4.0, gamma, eta, metric=d, axis=0, reweight=False)
    flat = gamma * 4.0
    assert is_nontrivial(z)
    assert spread > 5 or 0 < np.mean(norms(np.asarray(x)) > flat) < 1

    def slope(length):
        return np.maximum(1 - length / flat, 0)

    assert group_residual(z, x, d, slope) < TOLERANCE[dtype]


@dtypes
@pytest.mark.parametrize("name", ["l1", "lasso", "mcp"])
def test_plain_operators_are_stationary(dtype, name):
    x, d = random_groups(4, dtype, 0)
    if name == "l1":
        # Groups of one.
        x, d = x.reshape(-1, 1), d.reshape(-1, 1)
        z = operators.prox_l1(x, 4.0, 0.25)
        residual = group_residual(z, x, d, np.ones_like)
    elif name == "lasso":
        z = operators.prox_group_lasso(x, 4.0, 0.25, axis=0, reweight=False)
        residual = group_residual(z, x, d, np.ones_like)
    else:
        z = operators.prox_group_mcp(x, 4.0, 2.0, 0.25, axis=0, reweight=False)
        residual = group_residual(z, x, d, lambda u: np.maximum(1 - u / 8, 0))
    assert is_nontrivial(z)
    assert residual < TOLERANCE[dtype]


@dtypes
@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (3, 2, 7)])
def test_nuclear_is_stationary(dtype, shape):
    x = np.random.default_rng(5).normal(size=shape)
    z = operators.prox_nuclear(jnp.asarray(x, dtype), 4.0, 0.5)
    assert z.dtype == dtype
    z = np.asarray(z, np.float64).reshape(-1, shape[-1])
    x = np.asarray(x, dtype).astype(np.float64).reshape(-1, shape[-1])
    sigma = np.linalg.svd(z, compute_uv=False)
    assert 0 < np.sum(sigma > 1e-5) < len(sigma)
    # x - z = lam u v^T + what is orthogonal to it and shorter than lam.
    scale = np.linalg.norm(x, 2)
    assert (np.linalg.norm(x - z, 2) - 2) / scale < TOLERANCE[dtype]
    gap = np.sum((x - z) * z) - 2 * sigma.sum()
    assert abs(gap) / scale**2 < TOLERANCE[dtype]


@dtypes
@pytest.mark.parametrize("spread", [0, 3])
@pytest.mark.parametrize("k", [1, 7, 40])
def test_k_support_is_stationary(dtype, spread, k):
    rng = np.random.default_rng(6)
    zeros = 0
    for share in (1e-4, 0.1, 0.5, 0.9, 1 - 1e-4, 1.1):
        x = rng.normal(size=40) * 10 ** rng.uniform(-spread, spread, 40)
        x = np.asarray(jnp.asarray(x, dtype), np.float64)
        length = np.linalg.norm(np.sort(np.abs(x))[-k:])
        lam = share * length
        z = operators.prox_k_support(jnp.asarray(x, dtype), k, lam / 2, 2.0)
        assert z.dtype == dtype
        zeros += int(np.all(np.asarray(z) == 0))
        z = np.asarray(z, np.float64)
        # x - z = lam times a point of the dual ball that touches z.
        dual = np.linalg.norm(np.sort(np.abs(x - z))[-k:])
        assert (dual - lam) / length < TOLERANCE[dtype]
        if np.any(z):
            gap = (x - z) @ z - lam * reference.k_support(z, k)
            assert abs(gap) / length**2 < TOLERANCE[dtype]
    assert zeros == 1


# Against a minimiser that knows nothing of the problem.

SHAPE = (2, 3)
KERNEL = {"axis": 0, "reweight": False}
# Name -> (operator with metric, penalty at strength 0.7), scaling 0.6.
WEIGHTED = {
    "l1": (
        lambda x, d: operators.prox_l1(x, 0.7, 0.6, metric=d),
        lambda z: 0.7 * np.abs(z).sum(),
    ),
    "group lasso": (
        lambda x, d: operators.prox_group_lasso(x, 0.7, 0.6, metric=d, **KERNEL),
        lambda z: 0.7 * norms(z).sum(),
    ),
    "group MCP": (
        lambda x, d: operators.prox_group_mcp(x, 0.7, 6.0, 0.6, metric=d, **KERNEL),
        lambda z: sum(reference.mcp(u, 0.7, 6.0) for u in norms(z).ravel()),
    ),
}
PLAIN = {
    "l1": (lambda x: operators.prox_l1(x, 0.7, 0.6), WEIGHTED["l1"][1]),
    "group lasso": (
        lambda x: operators.prox_group_lasso(x, 0.7, 0.6, **KERNEL),
        WEIGHTED["group lasso"][1],
    ),
    "group MCP": (
        lambda x: operators.prox_group_mcp(x, 0.7, 6.0, 0.6, **KERNEL),
        WEIGHTED["group MCP"][1],
    ),
    "nuclear": (
        lambda x: operators.prox_nuclear(x, 0.7, 0.6),
        lambda z: 0.7 * np.linalg.svd(z, compute_uv=False).sum(),
    ),
    "k-support": (
        lambda x: operators.prox_k_support(x, 3, 0.7, 0.6),
        lambda z: 0.7 * reference.k_support(z, 3),
    ),
}


def assert_no_minimiser_is_better(z, x, d, penalty):
    def objective(z):
        z = np.reshape(z, x.shape)
        return 0.5 * np.sum(d * (z - x) ** 2) + 0.6 * penalty(z)

    ours = objective(np.asarray(z))
    for method in ("Powell", "Nelder-Mead"):
        for start in (x, np.asarray(z) + 0.01):
            found = scipy.optimize.minimize(
                objective,
                start.ravel(),
                method=method,
                options={"xtol": 1e-12, "ftol": 1e-15, "maxiter": 400}
                if method == "Powell"
                else {"xatol": 1e-12, "fatol": 1e-15, "maxiter": 400},
            )
            assert ours <= found.fun * (1 + 1e-14)


@pytest.mark.parametrize("name", WEIGHTED)
@pytest.mark.parametrize("seed", range(2))
def test_no_minimiser_beats_a_weighted_operator(name, seed):
    rng = np.random.default_rng(seed)
    x, d = rng.normal(size=SHAPE), 10 ** rng.uniform(-0.5, 1, SHAPE)
    operator, penalty = WEIGHTED[name]
    assert_no_minimiser_is_better(operator(x, d), x, d, penalty)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("seed", range(2))
def test_no_minimiser_beats_a_plain_operator(name, seed):
    x = 1.5 * np.random.default_rng(seed).normal(size=SHAPE)
    operator, penalty = PLAIN[name]
    assert_no_minimiser_is_better(operator(x), x, np.ones(SHAPE), penalty)


# Properties.

entries = st.floats(-100, 100).map(lambda value: round(value, 4))
arrays = hnp.arrays(np.float64, SHAPE, elements=entries)
exponents = hnp.arrays(np.float64, SHAPE, elements=st.floats(-4, 4))
positive = st.floats(1e-3, 50)


@few
@given(arrays, positive, positive)
def test_a_constant_metric_scales_the_penalty(x, d, lam):
    metric = np.full(SHAPE, d)
    for operator, options in (
        (operators.prox_l1, {}),
        (operators.prox_group_lasso, KERNEL),
    ):
        np.testing.assert_allclose(
            operator(x, lam, metric=metric, **options),
            operator(x, lam, 1 / d, **options),
            rtol=1e-10,
            atol=1e-10,
        )
    gamma = 2 / d
    np.testing.assert_allclose(
        operators.prox_group_mcp(x, lam, gamma, metric=metric, **KERNEL),
        operators.prox_group_mcp(x, lam, gamma, 1 / d, **KERNEL),
        rtol=1e-10,
        atol=1e-10,
    )


@few
@given(arrays, exponents, positive)
def test_a_group_is_zero_where_its_gradient_at_zero_is_short(x, exponents, lam):
    d = 10**exponents
    length = norms(d * x)
    for z in (
        operators.prox_group_lasso(x, lam, metric=d, **KERNEL),
        operators.prox_group_mcp(x, lam, 1e9, metric=d, **KERNEL),
    ):
        zero = np.all(np.asarray(z) == 0, axis=1, keepdims=True)
        assert np.all(zero[length < lam * (1 - 1e-12)])
        assert not np.any(zero[length > lam * (1 + 1e-12)])


@few
@given(arrays, arrays, exponents, positive)
def test_operators_of_norms_are_firmly_nonexpansive(x, y, exponents, lam):
    d = 10**exponents
    plain = np.ones(SHAPE)
    for operator, metric in (
        (lambda v: operators.prox_l1(v, lam, metric=d), d),
        (lambda v: operators.prox_group_lasso(v, lam, metric=d, **KERNEL), d),
        (lambda v: operators.prox_k_support(v, 3, lam), plain),
        (lambda v: operators.prox_nuclear(v, lam), plain),
    ):
        change = np.asarray(operator(x)) - np.asarray(operator(y))
        inner = np.sum(metric * change * (x - y))
        scale = np.sum(metric * (np.abs(x) + np.abs(y)) ** 2)
        assert np.sum(metric * change**2) <= inner + 1e-12 * scale


@few
@given(arrays, exponents)
def test_the_secular_equation_is_solved(x, exponents):
    b, e = np.abs(x), 10**exponents
    length = groups.group_norms(b, 0)
    theta = np.asarray(groups.secular_root(b, length, e, jnp.float64(1.0), 0))
    phi = norms(b / (e * theta + 1))
    outside = np.asarray(length) > 1
    np.testing.assert_allclose(phi[outside], 1, rtol=1e-12)
    np.testing.assert_array_equal(theta[~outside], 0)


@few
@given(arrays, st.integers(1, 6), positive)
def test_k_support_between_l1_and_the_block_threshold(x, k, lam):
    z = operators.prox_k_support(x, k, lam)
    if k == 1:
        np.testing.assert_allclose(z, operators.prox_l1(x, lam), atol=1e-12)
    if k == 6:
        block = operators.prox_group_lasso(x, lam, axis=(), reweight=False)
        np.testing.assert_allclose(z, block, rtol=1e-12, atol=1e-12)
    # What is left shrinks no sign and grows no magnitude.
    z = np.asarray(z)
    assert np.all(z * x >= 0)
    assert np.all(np.abs(z) <= np.abs(x))


def test_k_support_of_a_tree_is_that_of_one_vector():
    rng = np.random.default_rng(7)
    tree = {"a": rng.normal(size=(6, 5)), "b": [rng.normal(size=10), np.ones((0, 2))]}
    flat = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])
    z = operators.prox_k_support(tree, 0.3, 0.8)
    assert jax.tree.structure(z) == jax.tree.structure(tree)
    np.testing.assert_allclose(
        np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(z)]),
        operators.prox_k_support(flat, 0.3, 0.8),
        rtol=1e-12,
    )


@few
@given(arrays, exponents, positive, positive)
def test_scaling_multiplies_the_strength(x, exponents, lam, eta):
    d = 10**exponents
    for once, twice in (
        (operators.prox_l1(x, lam * eta), operators.prox_l1(x, lam, eta)),
        (
            operators.prox_group_lasso(x, lam * eta, metric=d, axis=0),
            operators.prox_group_lasso(x, lam, eta, metric=d, axis=0),
        ),
        (operators.prox_nuclear(x, lam * eta), operators.prox_nuclear(x, lam, eta)),
        (
            operators.prox_k_support(x, 2, lam * eta),
            operators.prox_k_support(x, 2, lam, eta),
        ),
    ):
        np.testing.assert_allclose(once, twice, rtol=1e-9, atol=1e-9)


# MCP.


def test_infinite_gamma_is_the_group_lasso():
    x, d = random_groups(8, "float64", 4)
    lasso = operators.prox_group_lasso(x, 1.0, metric=d, axis=0)
    mcp = operators.prox_group_mcp(x, 1.0, np.inf, metric=d, axis=0)
    np.testing.assert_array_equal(mcp, lasso)
    np.testing.assert_allclose(
        operators.prox_group_mcp(x, 1.0, np.inf, axis=0),
        operators.prox_group_lasso(x, 1.0, axis=0),
        rtol=1e-14,
    )


@pytest.mark.parametrize("spread", [0, 3])
def test_mcp_is_continuous_where_it_becomes_flat(spread):
    rng = np.random.default_rng(9)
    d = 10 ** rng.uniform(0, spread, (50, 8))
    x = rng.normal(size=(50, 8))
    x *= 3.0 / norms(x)  # gamma lambda = 3
    below, above = (
        np.asarray(
            operators.prox_group_mcp(
                factor * x, 1.0, 3.0, metric=d, axis=0, reweight=False
            )
        )
        for factor in (1 - 1e-9, 1 + 1e-9)
    )
    np.testing.assert_allclose(below, above, rtol=1e-7)
    np.testing.assert_array_equal(above, (1 + 1e-9) * x)


@dtypes
@pytest.mark.parametrize("dead", [1e-2, 1e-8, 0.0])
def test_mcp_guard(dtype, dead):
    # gamma min(d) <= eta in groups of all sizes: without a guard d - eta / gamma < 0.
    rng = np.random.default_rng(10)
    eta, gamma, lam = 1.0, 2.0, 0.1
    d = 10 ** rng.uniform(0, 2, (60, 8))
    d[:30, 0] = dead
    d[30:] *= 1 + dead  # the others are convex as they are
    x = rng.normal(size=(60, 8)) * 10 ** rng.uniform(-2, 2, (60, 1))
    x, d = jnp.asarray(x, dtype), jnp.asarray(d, dtype)
    operator = functools.partial(
        operators.prox_group_mcp, metric=d, axis=0, reweight=False
    )
    z = np.asarray(operator(x, lam, gamma, eta), np.float64)
    assert np.all(np.isfinite(z))
    assert np.all(z * np.asarray(x) >= 0)
    assert np.all(np.abs(z) <= np.abs(x))
    # Where it is not convex, it is the operator of a gamma that is, by the margin.
    least = np.asarray(d, np.float64).min(axis=1)
    with np.errstate(divide="ignore"):
        raised = np.where(gamma * least > eta, gamma, MARGIN * eta / least)
    assert (raised[:30] > gamma).all()
    assert (raised[30:] == gamma).all()
    for row in range(60):
        part = slice(row, row + 1)
        residual = group_residual(
            z[part],
            x[part],
            d[part],
            lambda u, row=row: np.maximum(1 - u / (raised[row] * lam), 0),
            eta * lam,
        )
        assert residual < TOLERANCE[dtype]


# gamma d / eta, from the limit of convexity to where it was once raised to.
RATIOS = [1 + 1e-6, 1 + 1e-4, 1.001, 1.005, 1.0099, 1.01, 1.0101, 1.5]


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("d", [1.0, 0.2, 7.0])
def test_mcp_is_exact_down_to_the_convex_limit(d, ratio):
    eta, lam = 0.3, 2.0
    gamma = ratio * eta / d
    # Between zero and flat, where the formula of the docstring holds.
    zero, flat = eta * lam / d, gamma * lam
    x = zero + (flat - zero) * np.array([0.1, 0.5, 0.9])
    wanted = (d * x - eta * lam) / (d - eta / gamma)
    # Both are quotients of small differences.
    tolerance = 1e-13 / (ratio - 1)
    for sign in (1, -1):
        points = sign * x[:, None]
        for z in (
            operators.prox_group_mcp(
                points, lam, gamma, eta, metric=np.full((3, 1), d), axis=0
            ),
            # The same problem, divided by d.
            operators.prox_group_mcp(points, lam, gamma, eta / d, axis=0),
        ):
            np.testing.assert_allclose(z[:, 0], sign * wanted, rtol=tolerance)


@pytest.mark.parametrize("ratio", RATIOS)
def test_mcp_is_the_least_on_a_fine_grid(ratio):
    d, eta, lam, spacing = np.array([0.5, 0.501]), 0.3, 1.0, 1e-3
    gamma = ratio * eta / d.min()
    flat = gamma * lam
    grid = np.arange(0, 1.3 * flat, spacing)
    first, second = np.meshgrid(grid, grid, indexing="ij")
    length = np.hypot(first, second)
    penalty = np.where(
        length <= flat, lam * length - length**2 / (2 * gamma), flat * lam / 2
    )
    for angle in (0.0, 0.3, 1.2):
        direction = np.array([np.cos(angle), np.sin(angle)])
        zero = eta * lam / np.linalg.norm(d * direction)
        for share in (-0.5, 0.1, 0.5, 0.9, 1.5):
            # Between them, if the direction is not one in which zero is beyond flat.
            x = (zero + share * abs(flat - zero)) * direction

            def value(a, b, penalty, x=x):
                square = d[0] * (a - x[0]) ** 2 + d[1] * (b - x[1]) ** 2
                return square / 2 + eta * penalty

            z = np.asarray(
                operators.prox_group_mcp(
                    x, lam, gamma, eta, metric=d, axis=(), reweight=False
                )
            )
            values = value(first, second, penalty)
            reached = value(*z, reference.mcp(np.hypot(*z), lam, gamma))
            assert reached <= values.min() + 1e-15
            # Along the group the problem is flatter than across by 1 - 1 / ratio.
            best = grid[np.array(np.unravel_index(values.argmin(), values.shape))]
            assert np.abs(z - best).max() < spacing * (1 - 1 / ratio) ** -0.5


@dtypes
def test_mcp_at_the_convex_limit_moves_nothing_outwards(dtype):
    # There the differences are of the size of their rounding.
    eps = float(jnp.finfo(dtype).eps)
    x = jnp.asarray(np.linspace(0.9, 1.1, 2001)[:, None], dtype)
    for ratio in (1 - eps, 1.0, 1 + eps, 1 + 4 * eps, 1 + 100 * eps):
        for metric in (None, jnp.ones_like(x)):
            z = operators.prox_group_mcp(x, 1.0, ratio, metric=metric, axis=0)
            assert bool(jnp.all((z >= 0) & (z <= x)))
            np.testing.assert_array_equal(z[x < 0.999], 0)
            np.testing.assert_array_equal(z[x > 1.011], x[x > 1.011])


def test_plain_mcp_guard():
    x = np.array([[3.0, 4.0], [0.3, 0.4], [0.6, 0.8]])
    z = operators.prox_group_mcp(x, 1.0, 0.5, 1.0, **KERNEL)
    # As with gamma = 1.01: zero up to 1, almost hard from there.
    expected = operators.prox_group_mcp(x, 1.0, MARGIN, 1.0, **KERNEL)
    np.testing.assert_allclose(z, expected, rtol=1e-12)
    np.testing.assert_array_equal(z[0], x[0])
    np.testing.assert_array_equal(z[1], 0)


# Numbers at the edges.


def test_no_penalty_changes_nothing():
    x = jnp.array([[1.0, -2.0, 0.0], [1e-300, 1e300, 3.0]])
    d = jnp.array([[1.0, 0.0, 2.0], [1e-8, 1e8, 1.0]])
    for z in (
        operators.prox_l1(x, 0.0),
        operators.prox_l1(x, 1.0, 0.0, metric=d),
        operators.prox_group_lasso(x, 0.0),
        operators.prox_group_lasso(x, 0.0, metric=d),
        operators.prox_group_mcp(x, 0.0, 2.0),
        operators.prox_group_mcp(x, 1.0, 2.0, 0.0, metric=d),
        operators.prox_nuclear(x, 0.0),
        operators.prox_k_support(x, 2, 0.0),
    ):
        np.testing.assert_array_equal(z, x)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_squares_that_overflow_or_underflow(dtype):
    for scale in (1e-4, 1.0, 1e4):
        x = jnp.asarray(scale * np.array([[3.0, 4.0], [0.3, 0.4]]), dtype)
        metric = jnp.full_like(x, 2.0)
        for z in (
            operators.prox_group_lasso(x, scale, **KERNEL),
            operators.prox_group_lasso(x, 2 * scale, metric=metric, **KERNEL),
            operators.prox_k_support(x, 4, scale, 1.0).at[1].set(0),
        ):
            assert z.dtype == dtype
            expected = np.array([[2.4, 3.2], [0, 0]])
            np.testing.assert_allclose(
                np.asarray(z, np.float64) / scale, expected, rtol=0.02
            )
    tiny = jnp.array([[3e-30, 4e-30]], "float32")
    z = operators.prox_group_lasso(tiny, 1e-30, **KERNEL)
    np.testing.assert_allclose(z / tiny, 0.8, rtol=1e-6)
    z = operators.prox_group_lasso(tiny, 1e-35, metric=jnp.full((1, 2), 1e-5), **KERNEL)
    np.testing.assert_allclose(z / tiny, 0.8, rtol=1e-6)


def test_nan_shows_in_its_group_only():
    x = jnp.array([[1.0, jnp.nan], [3.0, 4.0]])
    for z in (
        operators.prox_group_lasso(x, 1.0, **KERNEL),
        operators.prox_group_lasso(x, 1.0, metric=jnp.ones((2, 2)), **KERNEL),
        operators.prox_group_mcp(x, 1.0, 9.0, metric=jnp.ones((2, 2)), **KERNEL),
    ):
        assert bool(jnp.isnan(z[0]).all())
        assert bool(jnp.isfinite(z[1]).all())
    assert bool(jnp.isnan(operators.prox_k_support(x, 2, 1.0)).all())


# Groups of kernels, and regularisers of trees.


def test_axes_of_groups():
    x = np.random.default_rng(11).normal(size=(2, 3, 4, 5))
    for axis, size in ((-2, 30), (-1, 24), ((0, 1, 2), 5), ((), 120)):
        z = operators.prox_group_lasso(x, 0.3, axis=axis)
        kept = [a % 4 for a in ((axis,) if isinstance(axis, int) else axis)]
        rows = np.moveaxis(x, kept, range(len(kept))).reshape(-1, size)
        lam = 0.3 * np.sqrt(size)
        expected = [reference.block(row, np.ones(size), lam) for row in rows]
        got = np.moveaxis(np.asarray(z), kept, range(len(kept))).reshape(-1, size)
        np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-12)


def network(seed=12):
    rng = np.random.default_rng(seed)
    return {
        "conv": {"kernel": rng.normal(size=(2, 2, 3, 4)), "bias": rng.normal(size=4)},
        "dense": {"kernel": rng.normal(size=(6, 5)), "bias": rng.normal(size=5)},
        "norm": {"scale": rng.normal(size=5)},
        "embed": {"embedding": rng.normal(size=(7, 3))},
        "nothing": None,
    }


KERNELS = (("conv", "kernel"), ("dense", "kernel"), ("embed", "embedding"))
# Name of the groups -> axes that number them in a conv kernel and in matrices.
AXES = {
    "input": ((2,), (0,), (0,)),
    "output": ((3,), (1,), (1,)),
    "rows": ((0, 1, 2), (0,), (0,)),
    "columns": ((0, 1, 3), (1,), (1,)),
}


@pytest.mark.parametrize("choice", AXES)
def test_group_lasso_of_a_network(choice):
    params = network()
    regulariser = regularisers.group_lasso(0.2, choice)
    metric = jax.tree.map(lambda x: 1 + np.abs(x), params)
    plain = regulariser.prox(params, 0.5)
    weighted = regulariser.prox(params, 0.5, metric)
    total = 0.0
    for (layer, name), kept in zip(KERNELS, AXES[choice], strict=True):
        x, d = params[layer][name], metric[layer][name]
        size = x.size // np.prod([x.shape[axis] for axis in kept])

        def rows(array, kept=kept, size=size):
            return np.moveaxis(array, kept, range(len(kept))).reshape(-1, size)

        lam = 0.2 * np.sqrt(size)
        total += lam * norms(rows(x)).sum()
        for got, m in ((plain, np.ones_like(x)), (weighted, d)):
            expected = reference.by_rows(
                lambda x, d, lam=lam: reference.block(x, d, 0.5 * lam), rows(x), rows(m)
            )
            np.testing.assert_allclose(
                rows(np.asarray(got[layer][name])), expected, rtol=1e-10, atol=1e-12
            )
    np.testing.assert_allclose(regulariser.value(params), total, rtol=1e-12)
    for got in (plain, weighted):
        assert jax.tree.structure(got) == jax.tree.structure(params)
        for layer, name in (("conv", "bias"), ("norm", "scale")):
            assert got[layer][name] is params[layer][name]


def test_values_are_the_penalties():
    params = network()
    kernels = [params[a][b] for a, b in KERNELS]
    flat = np.concatenate([x.ravel() for x in kernels])
    conv, dense, embedding = kernels
    rows = [
        (norms(np.moveaxis(conv, 2, 0).reshape(3, 16)), 4),
        (norms(dense), 5**0.5),
        (norms(embedding), 3**0.5),
    ]
    expected = {
        regularisers.l1(0.3): 0.3 * np.abs(flat).sum(),
        regularisers.group_mcp(0.3, 4.0): sum(
            reference.mcp(u, 0.3 * weight, 4.0)
            for us, weight in rows
            for u in us.ravel()
        ),
        regularisers.nuclear(0.3): 0.3
        * sum(
            np.linalg.svd(x.reshape(-1, x.shape[-1]), compute_uv=False).sum()
            for x in kernels
        ),
        regularisers.k_support(0.3, 7): 0.3 * reference.k_support(flat, 7),
        regularisers.zero(): 0.0,
    }
    for regulariser, value in expected.items():
        np.testing.assert_allclose(regulariser.value(params), value, rtol=1e-12)


def test_values_have_subgradients_at_zero():
    params = {"kernel": jnp.zeros((2, 3)).at[1].set(jnp.array([3.0, 0.0, 4.0]))}
    gradient = jax.grad(regularisers.group_lasso(2.0, reweight=False).value)(params)
    expected = [[0, 0, 0], [1.2, 0, 1.6]]
    np.testing.assert_allclose(gradient["kernel"], expected, rtol=1e-12)
    for regulariser in (
        regularisers.l1(2.0),
        regularisers.group_mcp(2.0, 3.0),
        regularisers.nuclear(2.0),
        regularisers.k_support(2.0, 1),
        regularisers.k_support(2.0, 4),
    ):
        gradient = jax.grad(regulariser.value)(params)["kernel"]
        assert bool(jnp.isfinite(gradient).all())
        np.testing.assert_allclose(gradient[0], 0, atol=1e-15)
        assert abs(gradient[1, 0]) > 0.1


@pytest.mark.parametrize(
    "regulariser",
    [
        regularisers.l1(0.7),
        regularisers.group_lasso(0.7),
        regularisers.nuclear(0.7),
        regularisers.k_support(0.7, 3),
    ],
    ids=["l1", "group lasso", "nuclear", "k-support"],
)
def test_gradients_of_values_are_subgradients(regulariser):
    value_and_gradient = jax.jit(jax.value_and_grad(regulariser.value))

    @few
    @given(arrays, arrays)
    def check(x, y):
        x = np.where(np.abs(x) < 30, 0, x)  # zeros, too
        (here, gradient), (there, _) = value_and_gradient(x), value_and_gradient(y)
        bound = here + np.sum(gradient * (y - x))
        assert there >= bound - 1e-10 * (1 + abs(bound))

    check()


def test_a_function_chooses_groups_and_leaves():
    params = network()

    def choose(path, leaf):
        name = path[-1].key
        return {"embedding": 0, "scale": ()}.get(name)

    regulariser = regularisers.group_lasso(100.0, choose, where=masks.everything)
    z = regulariser.prox(params, 1.0)
    changed = jax.tree.map(lambda z, x: bool(np.any(np.asarray(z) != x)), z, params)
    assert changed == {
        "conv": {"kernel": False, "bias": False},
        "dense": {"kernel": False, "bias": False},
        "norm": {"scale": True},
        "embed": {"embedding": True},
        "nothing": None,
    }
    # `where` takes leaves away from it.
    only = regularisers.group_lasso(
        100.0, choose, where=lambda path, x: path[-1].key == "scale"
    )
    assert only.prox(params, 1.0)["embed"]["embedding"] is params["embed"]["embedding"]
    expected = 100 * (
        np.sqrt(3) * norms(params["embed"]["embedding"]).sum()
        + np.sqrt(5) * np.linalg.norm(params["norm"]["scale"])
    )
    np.testing.assert_allclose(regulariser.value(params), expected, rtol=1e-12)


def test_group_sparsity_is_weighted_by_size():
    params = network()
    params["conv"]["kernel"][:, :, 1] = 0
    params["dense"]["kernel"][[0, 2, 3]] = 0
    params["dense"]["kernel"][4, 1:] = 0
    got = regularisers.group_sparsity(params)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, (16 + 3 * 5) / (48 + 30 + 21), rtol=1e-6)
    np.testing.assert_allclose(
        regularisers.group_sparsity(
            params, where=lambda path, x: path[0].key == "dense" and x.ndim > 1
        ),
        0.5,
        rtol=1e-6,
    )
    assert float(regularisers.group_sparsity(params, "output")) == 0
    assert float(regularisers.group_sparsity({"bias": jnp.zeros(3)})) == 0
    # A subnormal number is none.
    assert float(regularisers.group_sparsity({"kernel": jnp.full((2, 2), 5e-324)})) == 0


def test_strengths_may_be_traced():
    params = {"kernel": jnp.array([[3.0, 4.0], [0.3, 0.4]])}

    @jax.jit
    def moved(strength, gamma):
        return [
            regulariser.prox(params, 1.0)["kernel"]
            for regulariser in (
                regularisers.l1(strength),
                regularisers.group_lasso(strength),
                regularisers.group_mcp(strength, gamma),
                regularisers.nuclear(strength),
                regularisers.k_support(strength, 2),
            )
        ]

    traced = moved(0.5, 3.0)
    for a, b in zip(traced, moved.__wrapped__(0.5, 3.0), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


# The weighted operator where there is no closed form.


@pytest.mark.parametrize("separable", [True, False])
@pytest.mark.parametrize("make", [regularisers.l1, regularisers.group_lasso])
def test_gradient_steps_find_the_closed_form(make, separable):
    params = network()
    rng = np.random.default_rng(13)
    metric = jax.tree.map(lambda x: rng.uniform(0.5, 2, x.shape), params)
    regulariser = make(0.3)
    exact = regulariser.prox(params, 0.4, metric)
    stepwise = regularisers.weighted_prox(
        regulariser._replace(takes_metric=False, separable=separable),
        params,
        metric,
        0.4,
        tolerance=0.0,
        steps=300,
    )
    for got, expected in zip(
        jax.tree.leaves(stepwise), jax.tree.leaves(exact), strict=True
    ):
        # The objective is flat at its minimum: half its digits.
        np.testing.assert_allclose(got, expected, atol=1e-7)
    np.testing.assert_array_equal(stepwise["conv"]["bias"], params["conv"]["bias"])


def test_gradient_steps_minimise_the_nuclear_problem():
    rng = np.random.default_rng(14)
    x, d = rng.normal(size=(3, 2)), rng.uniform(0.5, 3, (3, 2))
    z = regularisers.weighted_prox(regularisers.nuclear(0.7), x, d, 0.6)

    def objective(z):
        z = np.reshape(z, x.shape)
        nuclear = np.linalg.svd(z, compute_uv=False).sum()
        return 0.5 * np.sum(d * (z - x) ** 2) + 0.42 * nuclear

    found = scipy.optimize.minimize(objective, np.asarray(z).ravel(), method="Powell")
    assert objective(np.asarray(z)) <= found.fun * (1 + 1e-7)
    assert objective(np.asarray(z)) < objective(x)


# The optimizers.


def rounded(rng, shape):
    return rng.normal(size=shape).round(3)


def task(seed=15):
    """Parameters and the gradient of a quadratic, in NumPy."""
    rng = np.random.default_rng(seed)
    params = {"kernel": rounded(rng, (4, 3)), "bias": rounded(rng, 3)}
    target = {"kernel": rounded(rng, (4, 3)), "bias": rounded(rng, 3)}
    target["kernel"][[1, 3]] *= 0.05
    scale = {"kernel": 10 ** rng.uniform(-2, 1, (4, 3)), "bias": np.ones(3)}

    def gradient(params):
        return jax.tree.map(lambda s, x, t: s * (x - t), scale, params, target)

    return params, gradient


def run(tx, params, gradient, steps):
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(gradient(params), state, params)
        return optax.apply_updates(params, updates), state

    path = []
    for _ in range(steps):
        params, state = step(params, state)
        path.append((params, state))
    return path


def assert_follows(path, expected):
    for (got, _), wanted in zip(path, expected, strict=True):
        for name in wanted:
            np.testing.assert_allclose(
                got[name], wanted[name], rtol=1e-10, atol=1e-10, err_msg=name
            )
            # Zeros are exact.
            np.testing.assert_array_equal(got[name][wanted[name] == 0], 0)


# Regulariser -> operator on a kernel [4, 3] in NumPy: (x, d, eta) -> z.
PENALTIES = {
    "l1": (regularisers.l1(0.3), lambda x, d, eta: reference.soft(x, 0.3 * eta / d)),
    "group lasso": (
        regularisers.group_lasso(0.3),
        lambda x, d, eta: reference.by_rows(
            lambda x, d: reference.block(x, d, 0.3 * 3**0.5 * eta), x, d
        ),
    ),
    "group MCP": (
        regularisers.group_mcp(0.3, 5.0),
        lambda x, d, eta: reference.by_rows(
            lambda x, d: reference.block_mcp(
                x,
                d,
                0.3 * 3**0.5,
                5.0 if 5.0 * d.min() > eta else MARGIN * eta / d.min(),
                eta,
            ),
            x,
            d,
        ),
    ),
}


def reference_adam(params, gradient, steps, lr, prox, corrected, decay):
    b1, b2, eps = 0.8, 0.95, 1e-3
    m = {name: 0.0 * x for name, x in params.items()}
    v = {name: 0.0 * x for name, x in params.items()}
    path = []
    for t in range(1, steps + 1):
        g, eta, later = gradient(params), lr(t - 1), {}
        for name, x in params.items():
            m[name] = b1 * m[name] + (1 - b1) * g[name]
            v[name] = b2 * v[name] + (1 - b2) * g[name] ** 2
            d = np.sqrt(v[name] / (1 - b2**t)) + eps
            z = x * (1 - eta * decay) - eta * m[name] / (1 - b1**t) / d
            d = d if corrected else np.sqrt(v[name]) + eps
            later[name] = prox(z, d, eta) if name == "kernel" else z
        params = later
        path.append(params)
    return path


@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("name", PENALTIES)
def test_prox_adam_is_its_transcription(name, corrected):
    params, gradient = task()
    regulariser, prox = PENALTIES[name]

    def lr(count):
        return 0.3 / (count + 1.0) ** 0.5

    tx = proximal.prox_adam(
        lr,
        regulariser,
        0.8,
        0.95,
        1e-3,
        weight_decay=0.1,
        corrected_metric=corrected,
    )
    expected = reference_adam(params, gradient, 20, lr, prox, corrected, 0.1)
    assert np.any(expected[-1]["kernel"] == 0)
    assert np.any(expected[-1]["kernel"] != 0)
    assert_follows(run(tx, params, gradient, 20), expected)


@pytest.mark.parametrize("name", PENALTIES)
def test_prox_sgd_is_its_transcription(name):
    params, gradient = task()
    regulariser, prox = PENALTIES[name]
    start, m = params, {key: 0.0 * x for key, x in params.items()}
    expected = []
    for _ in range(20):
        g = gradient(params)
        m = {key: 0.75 * m[key] + 0.25 * g[key] for key in m}
        z = {key: params[key] - 0.3 * m[key] for key in m}
        params = {"kernel": prox(z["kernel"], np.ones((4, 3)), 0.3), "bias": z["bias"]}
        expected.append(params)
    tx = proximal.prox_sgd(0.3, regulariser, 0.75)
    assert any(np.any(x["kernel"] == 0) for x in expected)
    assert_follows(run(tx, start, gradient, 20), expected)


def test_proxgen_with_relaxation_is_adaptive_proxsgd():
    # Yang et al. (2020), algorithm 1: v and r are averages of g and of g^2, tau is
    # sqrt(r / (1 - beta^t)) + delta, and x moves a share eps towards the minimiser.
    params, gradient = task()
    regulariser, prox = PENALTIES["l1"]
    beta, delta = 0.9, 1e-2

    def share(count):
        return 0.6 / (count + 4.0) ** 0.5

    def init(params):
        return (
            jnp.zeros((), jnp.int32),
            optax.tree.zeros_like(params),
            (optax.tree.zeros_like(params)),
        )

    def metric(state):
        count, _, r = state
        return jax.tree.map(lambda r: jnp.sqrt(r / (1 - beta**count)) + delta, r)

    def update(g, state, params=None):
        count, v, r = state
        rho = 0.9 / (count + 4.0) ** 0.5
        v = jax.tree.map(lambda v, g: (1 - rho) * v + rho * g, v, g)
        r = jax.tree.map(lambda r, g: beta * r + (1 - beta) * g**2, r, g)
        state = count + 1, v, r
        return jax.tree.map(jnp.divide, v, metric(state)), state

    tx = proximal.proxgen(
        1.0,
        regulariser,
        direction=optax.GradientTransformation(init, update),
        metric=metric,
        relaxation=share,
    )
    path = run(tx, params, gradient, 20)
    v = r = {key: 0.0 * x for key, x in params.items()}
    x = params
    for t, (got, state) in enumerate(path, start=1):
        g, rho = gradient(x), 0.9 / (t + 3.0) ** 0.5
        v = {key: (1 - rho) * v[key] + rho * g[key] for key in v}
        r = {key: beta * r[key] + (1 - beta) * g[key] ** 2 for key in r}
        tau = {key: np.sqrt(r[key] / (1 - beta**t)) + delta for key in r}
        point = {key: x[key] - v[key] / tau[key] for key in x}
        point["kernel"] = prox(point["kernel"], tau["kernel"], 1.0)
        x = {key: x[key] + share(t - 1) * (point[key] - x[key]) for key in x}
        for key in x:
            np.testing.assert_allclose(got[key], x[key], rtol=1e-10, atol=1e-10)
            np.testing.assert_allclose(
                state.proximal_point[key], point[key], rtol=1e-10, atol=1e-10
            )
    assert np.any(point["kernel"] == 0)
    np.testing.assert_array_equal(
        np.asarray(state.proximal_point["kernel"]) == 0, point["kernel"] == 0
    )


NO_PENALTY = {
    "zero": regularisers.zero(),
    "strength 0": regularisers.group_lasso(0.0),
    "not closed": regularisers.nuclear(0.0),
}


def parents(regulariser):
    """Each optimizer with a regulariser, and the one it has to be without."""
    rms = optax.scale_by_rms(0.9)
    return {
        "prox_adam": (
            proximal.prox_adam(0.05, regulariser, weight_decay=0.01),
            optax.adamw(0.05, weight_decay=0.01),
        ),
        "proxgen": (
            proximal.proxgen(optax.linear_schedule(0.1, 0, 9), regulariser),
            optax.adam(optax.linear_schedule(0.1, 0, 9)),
        ),
        "proxgen of RMSProp": (
            proximal.proxgen(
                0.05,
                regulariser,
                direction=rms,
                metric=lambda state: jax.tree.map(
                    lambda nu: jnp.sqrt(nu + 1e-8), state.nu
                ),
            ),
            optax.chain(rms, optax.scale_by_learning_rate(0.05)),
        ),
        "prox_sgd": (proximal.prox_sgd(0.05, regulariser), optax.sgd(0.05)),
        "prox_sgd with momentum": (
            proximal.prox_sgd(0.05, regulariser, 0.9),
            optax.chain(optax.ema(0.9, debias=False), optax.sgd(0.05)),
        ),
    }


@pytest.mark.parametrize(
    ("name", "penalty", "dtype"),
    [
        *(("prox_adam", penalty, "float64") for penalty in NO_PENALTY),
        *((name, "strength 0", "float32") for name in parents(regularisers.zero())),
    ],
)
def test_without_a_penalty_it_is_the_parent(name, penalty, dtype):
    params, gradient = task()
    ours, parent = parents(NO_PENALTY[penalty])[name]
    x = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)
    state, parent_state = ours.init(x), parent.init(x)
    for _ in range(4):
        g = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), gradient(x))
        updates, state = ours.update(g, state, x)
        expected, parent_state = parent.update(g, parent_state, x)
        jax.tree.map(np.testing.assert_array_equal, updates, expected)
        x = optax.apply_updates(x, updates)


def test_dead_weights_are_zero_after_one_step():
    x = jnp.ones((3, 2))
    g = jnp.ones((3, 2)).at[1].set(0)
    tx = proximal.prox_adam(1e-3, regularisers.group_lasso(1e-4))
    updates, _ = tx.update(g, tx.init(x), x)
    zero = (optax.apply_updates(x, updates) == 0).all(axis=1)
    assert zero.tolist() == [False, True, False]


def test_the_uncorrected_metric_thresholds_more_at_first():
    x, g = jnp.full((1, 2), 0.5), jnp.full((1, 2), 1e-3)
    moved = []
    for corrected in (True, False):
        tx = proximal.prox_adam(
            1e-3, regularisers.group_lasso(0.01), corrected_metric=corrected
        )
        updates, _ = tx.update(g, tx.init(x), x)
        moved.append(np.asarray(updates) + 1e-3)  # without Adam's step
    ratio = moved[1] / moved[0]
    np.testing.assert_allclose(ratio, 1 / np.sqrt(1 - 0.999), rtol=1e-2)


def test_no_regularised_group_of_a_quadratic_is_left_at_the_end():
    # min 1/2 ||x - t||^2 + R(x) has the solution prox_R(t).
    target = {"kernel": rounded(np.random.default_rng(16), (4, 3)), "bias": np.ones(3)}
    target["kernel"][1:3] *= 0.1
    regulariser = regularisers.group_lasso(0.3)

    def gradient(x):
        return jax.tree.map(jnp.subtract, x, target)

    expected = regulariser.prox(target, 1.0)
    for tx in (
        proximal.prox_sgd(0.3, regulariser),
        proximal.prox_adam(optax.exponential_decay(0.1, 100, 0.1), regulariser),
    ):
        start = jax.tree.map(np.ones_like, target)
        x, _ = run(tx, start, gradient, 400)[-1]
        np.testing.assert_allclose(x["kernel"], expected["kernel"], atol=5e-3)
        np.testing.assert_array_equal(x["kernel"][1:3], 0)
        np.testing.assert_allclose(x["bias"], target["bias"], atol=1e-3)


# In optax.

MAKERS = {
    "prox_adam": proximal.prox_adam,
    "proxgen": proximal.proxgen,
    "prox_sgd": functools.partial(proximal.prox_sgd, momentum=0.5),
    "relaxed": functools.partial(proximal.prox_adam, relaxation=0.5),
}
ALL = regularisers.group_lasso(
    0.5, lambda path, x: -1 if x.ndim else (), where=masks.everything
)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("name", MAKERS)
def test_dtypes_are_kept(name, dtype):
    # Squares of such gradients are infinite in float16.
    x, g = jnp.array([1.0, -2.0, 3.0], dtype), jnp.array([1e3, 2e3, 3e-3], dtype)
    tx = MAKERS[name](0.01, ALL)
    before = tx.init(x)
    updates, after = tx.update(g, before, x)
    assert updates.dtype == dtype
    assert bool(jnp.isfinite(updates).all())
    shapes = jax.tree.map(lambda v: (v.shape, v.dtype), (before, after))
    assert shapes[0] == shapes[1]
    wide = jnp.promote_types(dtype, "float32")
    floats = [v.dtype for v in jax.tree.leaves(after.direction) if v.ndim]
    assert floats == [wide] * len(floats)


def test_injected_hyperparameters_can_be_changed():
    x, g = jnp.ones((2, 3)), jnp.ones((2, 3))
    regulariser = regularisers.group_lasso(0.5)
    tx = optax.inject_hyperparams(proximal.prox_adam)(0.1, regulariser)
    state = tx.init(x)
    plain = proximal.prox_adam(0.1, regulariser)
    updates, _ = tx.update(g, state, x)
    expected, _ = plain.update(g, plain.init(x), x)
    np.testing.assert_allclose(updates, expected, rtol=1e-12)
    state.hyperparams["learning_rate"] = jnp.zeros(())
    updates, _ = tx.update(g, state, x)
    np.testing.assert_array_equal(updates, 0)


@pytest.mark.parametrize(
    "tree",
    [{}, {"a": None, "kernel": np.ones((2, 2))}, [np.ones((2, 0))], np.ones((2, 2))],
    ids=str,
)
@pytest.mark.parametrize(
    "make",
    [functools.partial(regularisers.k_support, support=1), regularisers.nuclear],
    ids=["k-support", "nuclear"],
)
def test_trees_of_all_kinds(make, tree):
    regulariser = make(0.5, where=lambda path, x: np.ndim(x) == 2)
    for tx in (
        proximal.prox_adam(0.1, regulariser),
        proximal.prox_sgd(0.1, regulariser),
    ):
        updates, state = tx.update(tree, tx.init(tree), tree)
        assert jax.tree.structure(updates) == jax.tree.structure(tree)
        assert int(state.count) == 1
    assert bool(jnp.isfinite(regulariser.value(tree)))
    metric = jax.tree.map(np.ones_like, tree)
    moved = regularisers.weighted_prox(regulariser, tree, metric)
    assert jax.tree.structure(moved) == jax.tree.structure(tree)


# Bad input.


X = np.ones((2, 2))


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (lambda: operators.prox_l1(X, -1), ["strength must be", ">= 0", "-1"]),
        (lambda: operators.prox_l1(X, 1, -2), ["scaling must be", ">= 0", "-2"]),
        (lambda: operators.prox_l1(X, "a", metric=X), ["strength", "'a'"]),
        (
            lambda: operators.prox_group_lasso(X, 1, axis=2),
            ["axis must name axes of an array of shape (2, 2)", "2"],
        ),
        (lambda: operators.prox_group_mcp(X, 1, 0), ["gamma must be", "> 0", "0"]),
        (lambda: operators.prox_nuclear(np.ones(3)), ["two axes", "(3,)"]),
        (lambda: operators.prox_k_support(X, 0), ["support must be", "got 0."]),
        (lambda: regularisers.l1(-1), ["strength must be", "-1"]),
        (lambda: regularisers.group_mcp(1, -1), ["gamma must be", "-1"]),
        (lambda: regularisers.k_support(1, 2.0), ["support must be", "got 2.0."]),
        (
            lambda: regularisers.group_lasso(1, "in"),
            ["groups must be 'input' or 'output' or 'rows' or 'columns'; got 'in'."],
        ),
        (
            lambda: regularisers.group_lasso(1, reweight=2),
            ["reweight must be True or False; got 2."],
        ),
        (
            lambda: regularisers.group_lasso(1).prox(np.ones(3), 1.0),
            ["groups='input' needs leaves with at least two axes", "(3,)"],
        ),
        (
            lambda: proximal.prox_adam(0.1, 1e-3),
            ["regulariser must be a Regulariser", "0.001"],
        ),
        (lambda: proximal.prox_sgd(-1, ALL), ["learning_rate must be", "-1"]),
        (lambda: proximal.prox_sgd(0.1, ALL, 1.0), ["momentum must be", "1.0"]),
        (lambda: proximal.prox_adam(0.1, ALL, 1.0), ["b1 must be", "1.0"]),
        (lambda: proximal.prox_adam(0.1, ALL, b2=-1), ["b2 must be", "-1"]),
        (lambda: proximal.prox_adam(0.1, ALL, eps=-1), ["eps must be", "-1"]),
        (
            lambda: proximal.proxgen(0.1, ALL, weight_decay=-1),
            ["weight_decay must be", "-1"],
        ),
        (
            lambda: proximal.proxgen(0.1, ALL, relaxation=0),
            ["relaxation must be", "> 0 and <= 1", "0"],
        ),
    ],
)
def test_bad_arguments(call, parts):
    with refused(*parts):
        call()


def test_bad_trees():
    x = jnp.ones(3)
    tx = proximal.prox_adam(0.1, ALL)
    state = tx.init(x)
    with refused("params", "int"):
        tx.init(jnp.ones(2, int))
    with refused("updates and params must have the same"):
        tx.update({"a": x}, state, x)
    with refused("updates and params must have the same shape"):
        tx.update(jnp.ones(4), state, x)
