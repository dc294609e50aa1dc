"""RMDA and RAMDA: transcriptions, parents, stages, and the point before averaging."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prunadag_optax import masks
from prunadag_optax.methods import dual_averaging, proximal
from prunadag_optax.methods.penalties import regularisers
from prunadag_optax.methods.penalties.operators import MARGIN
from tests import prox_reference as reference
from tests.helpers import enable_x64, refused

METHODS = {"rmda": dual_averaging.rmda, "ramda": dual_averaging.ramda}
methods = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(autouse=True)
def _double():
    with enable_x64():
        yield


def rounded(rng, shape):
    return rng.normal(size=shape).round(3)


def task(seed=1):
    """Parameters and the noisy gradient of a quadratic, in NumPy."""
    rng = np.random.default_rng(seed)
    params = {"kernel": rounded(rng, (4, 3)), "bias": rounded(rng, 3)}
    target = {"kernel": rounded(rng, (4, 3)), "bias": rounded(rng, 3)}
    target["kernel"][[1, 3]] *= 0.05
    noise = jax.tree.map(lambda x: 0.3 * rng.normal(size=(40, *x.shape)), params)

    def gradient(params, count):
        return jax.tree.map(lambda x, t, e: x - t + e[count], params, target, noise)

    return params, gradient


def run(tx, params, gradient, steps):
    """Parameters and state after each step."""
    state = tx.init(params)
    step = jax.jit(tx.update)
    path = []
    for count in range(steps):
        updates, state = step(gradient(params, count), state, params)
        params = optax.apply_updates(params, updates)
        path.append((params, state))
    return path


# Regulariser -> operator on a kernel [4, 3] in NumPy: (x, d, eta) -> z.
ROOT = 3**0.5
PENALTIES = {
    "l1": (regularisers.l1(0.4), lambda x, d, eta: reference.soft(x, 0.4 * eta / d)),
    "group lasso": (
        regularisers.group_lasso(0.4),
        lambda x, d, eta: reference.by_rows(
            lambda x, d: reference.block(x, d, 0.4 * ROOT * eta), x, d
        ),
    ),
    "group MCP": (
        regularisers.group_mcp(0.4, 9.0),
        lambda x, d, eta: reference.by_rows(
            lambda x, d: reference.block_mcp(
                x, d, 0.4 * ROOT, max(9.0, MARGIN * eta / d.min()), eta
            ),
            x,
            d,
        ),
    ),
    "none": (regularisers.zero(), lambda x, d, eta: x),
}


def reference_run(method, params, gradient, steps, lr, c, prox, options):
    """Both methods, one equation at a time; returns W and W-tilde of each step."""
    milestones = options.get("milestones", ())
    decay, growth = options.get("decay", 0.1), options.get("growth", "final")
    path, stage, t = [], 0, 0
    for count in range(steps):
        if count in milestones:
            stage, t = stage + 1, 0
        if t == 0:
            start, alpha = params, 0.0
            v = {name: 0.0 * x for name, x in params.items()}
            u = {name: 0.0 * x for name, x in params.items()}
        t += 1
        s = lr(count) * decay**stage * np.sqrt(t)
        alpha += s
        g, point = gradient(params, count), {}
        for name in params:
            v[name] = v[name] + s * g[name]
            u[name] = u[name] + s * g[name] ** 2
            if method == "rmda":
                p = np.full(v[name].shape, np.sqrt(t))
            else:
                p = np.cbrt(u[name]) + options["eps"] * decay**stage
            z = start[name] - v[name] / p
            # argmin <V, W> + alpha R(W) + 1/2 ||W - W_0||_P^2
            point[name] = prox(z, p, alpha) if name == "kernel" else z
        share = c
        if growth == "stages":
            share = min(c / decay**stage, 1)
        elif growth == "final" and milestones and stage == len(milestones):
            share = min(c * np.sqrt(t), 1)
        params = {
            name: (1 - share) * params[name] + share * point[name] for name in params
        }
        path.append((params, point))
    return path


SCHEDULES = {
    "one stage": {},
    "final": {"milestones": (5, 12), "decay": 0.5},
    "stages": {"milestones": [4, 11], "decay": 0.5, "growth": "stages"},
    "no growth": {"milestones": np.array([7]), "decay": 0.25, "growth": None},
}


def assert_same(got, expected, tolerance=1e-10):
    for name in expected:
        np.testing.assert_allclose(
            got[name], expected[name], tolerance, tolerance, err_msg=name
        )


@pytest.mark.parametrize(
    ("penalty", "schedule"),
    [
        *(("group lasso", schedule) for schedule in SCHEDULES),
        *((penalty, "final") for penalty in PENALTIES if penalty != "group lasso"),
    ],
)
@methods
def test_transcription(method, penalty, schedule):
    params, gradient = task()
    regulariser, prox = PENALTIES[penalty]
    options = dict(SCHEDULES[schedule])
    if method == "ramda":
        options["eps"] = 1e-3

    def lr(count):
        return 0.2 / (count + 1.0) ** 0.25

    tx = METHODS[method](lr, regulariser, 0.4, **options)
    path = run(tx, params, gradient, 20)
    expected = reference_run(method, params, gradient, 20, lr, 0.4, prox, options)
    read = jax.jit(lambda state: dual_averaging.unaveraged(state, regulariser))
    for (got, state), (wanted, point) in zip(path, expected, strict=True):
        assert_same(got, wanted)
        structure = read(state)
        assert_same(structure, point)
        np.testing.assert_array_equal(
            np.asarray(structure["kernel"]) == 0, point["kernel"] == 0
        )
    if penalty != "none":
        zeros = [np.mean(point["kernel"] == 0) for _, point in expected]
        assert 0 < max(zeros) < 1


# Without a penalty.


def test_rmda_without_a_penalty_is_modernised_dual_averaging():
    # W~ = W_0 - V / sqrt(t): no operator at all.
    start, gradient = task()
    for regulariser in (regularisers.zero(), regularisers.group_lasso(0.0)):
        path = run(dual_averaging.rmda(0.3, regulariser, 0.2), start, gradient, 20)
        x, v = start, jax.tree.map(np.zeros_like, start)
        for t, (got, _) in enumerate(path, start=1):
            g = gradient(x, t - 1)
            v = {name: v[name] + 0.3 * np.sqrt(t) * g[name] for name in x}
            x = {
                name: 0.8 * x[name] + 0.2 * (start[name] - v[name] / np.sqrt(t))
                for name in x
            }
            assert_same(got, x)


@pytest.mark.parametrize(
    "regulariser",
    [regularisers.zero(), regularisers.group_lasso(0.0), regularisers.nuclear(0.0)],
    ids=["zero", "strength 0", "not closed"],
)
def test_ramda_without_a_penalty_is_madgrad(regulariser):
    params, gradient = task()
    # optax adds eps to the learning rate, and takes roots of the count in float32.
    lr, eps = 0.1, 1e-6
    parent = optax.contrib.madgrad(lr - eps, momentum=0.9, eps=eps)
    ours = run(
        dual_averaging.ramda(lr, regulariser, 0.1, eps=eps), params, gradient, 20
    )
    for (got, _), (expected, _) in zip(
        ours, run(parent, params, gradient, 20), strict=True
    ):
        assert_same(got, expected, 1e-7)


# Stages.


@methods
def test_a_stage_starts_like_a_new_run(method):
    params, gradient = task()
    regulariser = regularisers.group_lasso(0.1)
    make = functools.partial(METHODS[method], 0.1, regulariser, 0.3, decay=0.5)
    path = run(make(milestones=[6]), params, gradient, 12)
    eps = {"eps": 0.5e-6} if method == "ramda" else {}
    later = run(
        METHODS[method](
            0.05, regulariser, lambda t: jnp.minimum(0.3 * jnp.sqrt(t + 1.0), 1), **eps
        ),
        path[5][0],
        lambda x, count: gradient(x, count + 6),
        6,
    )
    for (got, _), (expected, _) in zip(path[6:], later, strict=True):
        assert_same(got, expected)


@methods
def test_what_a_stage_found_is_readable_until_the_next_begins(method):
    params, gradient = task()
    regulariser = regularisers.group_lasso(0.1)
    make = METHODS[method]
    staged = run(make(0.1, regulariser, milestones=[8]), params, gradient, 9)
    plain = run(make(0.1, regulariser), params, gradient, 9)
    points = [
        [dual_averaging.unaveraged(path[i][1], regulariser) for i in (7, 8)]
        for path in (staged, plain)
    ]
    jax.tree.map(np.testing.assert_array_equal, points[0][0], points[1][0])
    assert np.any(points[0][1]["bias"] != points[1][1]["bias"])


@pytest.mark.parametrize("growth", ["final", "stages"])
@methods
def test_growth_makes_the_zeros_of_the_average_exact(method, growth):
    params, gradient = task()
    regulariser = regularisers.group_lasso(0.3)
    tx = METHODS[method](
        0.1, regulariser, 0.25, milestones=[15], decay=0.25, growth=growth
    )
    path = run(tx, params, gradient, 35)
    for (before, _), (got, state) in itertools.pairwise(path[30:]):
        point = dual_averaging.unaveraged(state, regulariser)
        zero = np.asarray(point["kernel"]) == 0
        assert 0 < zero.mean() < 1
        np.testing.assert_array_equal(got["kernel"][zero], 0)
        # Where it is not zero it is the point up to the rounding of x + (w - x).
        np.testing.assert_allclose(
            got["kernel"], point["kernel"], atol=1e-15 * np.abs(before["kernel"]).max()
        )
    constant = METHODS[method](0.1, regulariser, 0.25, milestones=[15], growth=None)
    average, _ = run(constant, params, gradient, 35)[-1]
    assert np.all(np.asarray(average["kernel"]) != 0)


@methods
def test_a_momentum_of_one_does_not_average(method):
    params, gradient = task()
    regulariser = regularisers.group_lasso(0.3)
    for got, state in run(METHODS[method](0.1, regulariser, 1.0), params, gradient, 9):
        point = dual_averaging.unaveraged(state, regulariser)
        assert_same(got, point)
        np.testing.assert_array_equal(got["kernel"] == 0, point["kernel"] == 0)


# What the method is for.


@methods
def test_the_structure_stays_where_proximal_gradients_change_it(method):
    # Noise around a target with rows that are small, some below the penalty.
    rng = np.random.default_rng(2)
    target = rng.normal(size=(12, 5))
    target *= np.linspace(0, 0.6, 12)[:, None] / np.linalg.norm(
        target, axis=1, keepdims=True
    )
    noise = jnp.asarray(0.1 * rng.normal(size=(400, 12, 5)))
    regulariser = regularisers.group_lasso(0.3, reweight=False)

    def zero_rows(tx, read):
        def step(carry, e):
            x, state = carry
            updates, state = tx.update(x - target + e, state, x)
            x = optax.apply_updates(x, updates)
            return (x, state), (read(x, state) == 0).all(axis=1)

        start = jnp.zeros((12, 5))
        return np.asarray(jax.lax.scan(step, (start, tx.init(start)), noise)[1])

    def changes(rows):
        return np.sum(rows[201:] != rows[200:-1])

    averaged = zero_rows(
        METHODS[method](0.02, regulariser),
        lambda x, state: dual_averaging.unaveraged(state, regulariser),
    )
    proximal_gradient = zero_rows(
        proximal.prox_sgd(0.1, regulariser), lambda x, state: x
    )
    assert changes(averaged) < 0.1 * changes(proximal_gradient)
    # The rows below the penalty are zero, those far above are not.
    length = np.linalg.norm(target, axis=1)
    last = averaged[-1]
    assert last[length < 0.2].all()
    assert not last[length > 0.5].any()


@pytest.mark.parametrize(
    "regulariser",
    [regularisers.nuclear(0.2), regularisers.k_support(0.2, 4)],
    ids=["nuclear", "k-support"],
)
@methods
def test_regularisers_without_a_weighted_operator(method, regulariser):
    params, gradient = task()
    path = run(METHODS[method](0.1, regulariser, 0.2), params, gradient, 30)
    got, state = path[-1]
    point = dual_averaging.unaveraged(state, regulariser)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves((got, point)))
    if regulariser.separable:
        sigma = np.linalg.svd(point["kernel"], compute_uv=False)
        free = np.linalg.svd(
            dual_averaging.unaveraged(state, regularisers.zero())["kernel"],
            compute_uv=False,
        )
        assert np.sum(sigma > 1e-6) < np.sum(free > 1e-6)
    else:
        assert np.any(np.asarray(point["kernel"]) == 0)
        assert np.all(np.asarray(point["bias"]) != 0)


# In optax.

ALL = regularisers.group_lasso(
    0.5, lambda path, x: -1 if x.ndim else (), where=masks.everything
)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@methods
def test_dtypes_are_kept(method, dtype):
    # Squares of such gradients are infinite in float16.
    x, g = jnp.array([1.0, -2.0, 3.0], dtype), jnp.array([1e3, 2e3, 3e-3], dtype)
    for accumulator in (None, "float32", "float64"):
        tx = METHODS[method](1e-3, ALL, milestones=[1], accumulator_dtype=accumulator)
        before = tx.init(x)
        updates, after = tx.update(g, before, x)
        updates, after = tx.update(g, after, x)
        assert updates.dtype == dtype
        assert bool(jnp.isfinite(updates).all())
        shapes = jax.tree.map(lambda v: (v.shape, v.dtype), (before, after))
        assert shapes[0] == shapes[1]
        assert after.initial.dtype == dtype
        wide = accumulator or jnp.promote_types(dtype, "float32")
        assert after.gradient_sum.dtype == wide
        assert dual_averaging.unaveraged(after, ALL).dtype == dtype


@methods
def test_wrapped_states_are_found(method):
    params, gradient = task()
    regulariser = regularisers.group_lasso(0.2)
    make = METHODS[method]
    plain = make(0.1, regulariser)
    _, own = plain.update(gradient(params, 0), plain.init(params), params)
    expected = dual_averaging.unaveraged(own, regulariser)
    for tx in (
        optax.chain(optax.clip(1e9), plain),
        optax.inject_hyperparams(make)(0.1, regulariser),
        optax.apply_if_finite(plain, 3),
    ):
        _, state = tx.update(gradient(params, 0), tx.init(params), params)
        got = dual_averaging.unaveraged(state, regulariser)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-12), got, expected
        )
    start = dual_averaging.unaveraged(plain.init(params), regulariser)
    jax.tree.map(np.testing.assert_array_equal, start, params)
    with refused("state must hold one DualAveragingState; got 0"):
        dual_averaging.unaveraged(optax.sgd(0.1).init(params), regulariser)
    with refused("one DualAveragingState", "got 2"):
        dual_averaging.unaveraged([own, own], regulariser)
    with refused("regulariser must be a Regulariser"):
        dual_averaging.unaveraged(own, params)


@pytest.mark.parametrize(
    "tree",
    [{}, {"a": None, "kernel": np.ones((2, 2))}, [np.ones((2, 0))], np.float64(2.0)],
    ids=str,
)
@methods
def test_trees_of_all_kinds(method, tree):
    tx = METHODS[method](0.1, ALL, milestones=[1])
    state = tx.init(tree)
    for count in (1, 2):
        updates, state = tx.update(tree, state, tree)
        assert jax.tree.structure(updates) == jax.tree.structure(tree)
        assert int(state.count) == count
        assert int(state.stage_count) == 1
    assert jax.tree.structure(dual_averaging.unaveraged(state, ALL)) == (
        jax.tree.structure(tree)
    )


# Bad input.


RISING = "milestones must be rising integers >= 1, as a sequence; got "


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"learning_rate": -1}, ["learning_rate must be a finite number >= 0", "-1"]),
        ({"regulariser": 1e-3}, ["regulariser must be a Regulariser", "0.001"]),
        ({"momentum": 0}, ["momentum must be a finite number > 0 and <= 1", "0"]),
        ({"momentum": 1.1}, ["momentum must be", "1.1"]),
        ({"milestones": 5}, [RISING, "5"]),
        ({"milestones": [3, 3]}, [RISING, "[3, 3]"]),
        ({"milestones": [0, 3]}, [RISING, "[0, 3]"]),
        ({"milestones": [1.5]}, [RISING, "[1.5]"]),
        ({"decay": 0}, ["decay must be a finite number > 0 and <= 1", "0"]),
        ({"growth": "all"}, ["growth must be 'final' or 'stages'; got 'all'."]),
        ({"accumulator_dtype": int}, ["accumulator_dtype must be None or one of"]),
    ],
)
@methods
def test_bad_arguments(method, arguments, parts):
    good = {"learning_rate": 0.1, "regulariser": ALL}
    METHODS[method](**good)
    with refused(*parts):
        METHODS[method](**(good | arguments))


@methods
def test_bad_trees(method):
    x = jnp.ones(3)
    tx = METHODS[method](0.1, ALL)
    state = tx.init(x)
    with refused("updates and params must have the same"):
        tx.update({"a": x}, state, x)
    with refused("state.initial and params must have the same shape"):
        tx.update(jnp.ones(4), state, jnp.ones(4))


def test_eps_has_to_be_positive():
    with refused("eps must be a finite number > 0", "0"):
        dual_averaging.ramda(0.1, ALL, eps=0)
