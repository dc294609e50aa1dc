"""Linearised Bregman iterations: the steps, where they lead, and the controller.

The references are plain NumPy: the dual variable, the proximal point and the rule for
the strength, one equation at a time.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from prunadag_optax import masks
from prunadag_optax.methods.bregman import (
    Controller,
    adabreg,
    linbreg,
    linearised_bregman,
    sparse_init,
)
from prunadag_optax.methods.penalties import regularisers
from tests.helpers import enable_x64, refused

# Small integers over 4 tie often and are zero often.
entries = st.integers(-8, 8).map(lambda i: i / 4) | st.floats(-1e3, 1e3).map(
    lambda value: round(value, 6)
)
matrices = hnp.arrays(np.float64, (3, 4), elements=entries)
few = settings(max_examples=15, deadline=None)

CONVEX = {
    "l1": regularisers.l1(0.5),
    "group_lasso": regularisers.group_lasso(0.5),
    "nuclear": regularisers.nuclear(0.5),
    "k_support": regularisers.k_support(0.5, 3),
    "zero": regularisers.zero(),
}
convex = pytest.mark.parametrize("name", CONVEX)


@pytest.fixture(autouse=True)
def _double():
    with enable_x64():
        yield


def tree_of(seed, zeros=0.5):
    """Sparse parameters; 64 weights are regularised, so that shares are exact."""
    rng = np.random.default_rng(seed)
    params = {
        "first": {"bias": rng.normal(size=4), "kernel": rng.normal(size=(8, 4))},
        "second": {"kernel": rng.normal(size=(4, 2, 4))},
    }
    for layer in params.values():
        layer["kernel"] = np.where(
            rng.random(layer["kernel"].shape) < zeros, 0, layer["kernel"]
        )
    return params


def quadratic(seed):
    """The gradient of sum_i c_i (x_i - t_i)^2 / 2."""
    target = tree_of(seed, zeros=0)
    curvature = jax.tree.map(lambda t: np.abs(t) + 0.1, tree_of(seed + 1, zeros=0))
    return lambda x: jax.tree.map(lambda c, x, t: c * (x - t), curvature, x, target)


def run(tx, gradient, x, steps):
    x = jax.tree.map(jnp.asarray, x)
    state = tx.init(x)

    @jax.jit
    def step(x, state):
        updates, state = tx.update(gradient(x), state, x)
        return optax.apply_updates(x, updates), state

    path = [(x, state)]
    for _ in range(steps):
        path.append(step(*path[-1]))
    return path


def assert_close(actual, expected, rtol=1e-10):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-12),
        actual,
        expected,
    )


# The steps against their transcription.


def soft(v, t):
    return np.sign(v) * np.maximum(np.abs(v) - t, 0)


def prox_input_channels(v, t):
    axes = tuple(a for a in range(v.ndim) if a != v.ndim - 2)
    norms = np.sqrt(np.sum(v**2, axis=axes, keepdims=True))
    t = t * np.sqrt(v.size / v.shape[-2])
    return v * np.maximum(1 - t / np.where(norms == 0, 1, norms), 0)


def sign_of_input_channels(x):
    axes = tuple(a for a in range(x.ndim) if a != x.ndim - 2)
    norms = np.sqrt(np.sum(x**2, axis=axes, keepdims=True))
    return np.sqrt(x.size / x.shape[-2]) * x / np.where(norms == 0, 1, norms)


REFERENCES = {
    "l1": (regularisers.l1(0.5), soft, np.sign),
    "group_lasso": (
        regularisers.group_lasso(0.5),
        prox_input_channels,
        sign_of_input_channels,
    ),
}


def reference_run(gradient, x, prox, sign, step_of, *, delta, strength, controller):
    """The iteration in NumPy: the parameters, v and the strength after every step."""

    def proximal(path, v, s):
        # The regularisers have the strength 1/2 themselves.
        kernel = "kernel" in jax.tree_util.keystr(path)
        return prox(delta * v, delta * s / 2) if kernel else delta * v

    def start(path, x):
        kernel = "kernel" in jax.tree_util.keystr(path)
        return x / delta + (strength / 2 * sign(x) if kernel else 0)

    path, side, changes = [], 0, 0
    v = jax.tree_util.tree_map_with_path(start, x)
    memory = jax.tree.map(lambda x: (0 * x, 0 * x), x)
    for count in range(20):
        g = gradient(x)
        step = functools.partial(step_of, count)
        both = jax.tree.map(lambda g, old, step=step: step(g, *old), g, memory)
        memory = jax.tree.map(lambda g, b: b[1:], g, both)
        v = jax.tree.map(lambda v, b: v + b[0], v, both)
        x = jax.tree_util.tree_map_with_path(functools.partial(proximal, s=strength), v)
        if controller is not None and (count + 1) % controller.every == 0:
            kernels = [x["first"]["kernel"], x["second"]["kernel"]]
            share = np.mean(np.concatenate([k.ravel() for k in kernels]) == 0)
            gap, a = controller.target - share, controller.acceleration
            if np.sign(gap) * side < 0:
                changes += 1
            side = np.sign(gap) or side
            if controller.decay is not None:
                a = a * controller.decay ** max(changes - 1, 0)
            if gap > 0:
                strength = strength * (1 + a * abs(gap))
            if gap < 0:
                strength = strength / (1 + a * abs(gap))
            strength = min(max(strength, controller.lower), controller.upper)
        path.append((x, v, strength))
    return path


def linear(count, g, b, _, momentum=None):
    if momentum is None:
        return -0.1 * g / (count + 1) ** 0.5, b, b
    b = momentum * b + (1 - momentum) * -0.1 * g / (count + 1) ** 0.5
    return b, b, b


def adaptive_moments(count, g, m, q):
    m, q = 0.8 * m + 0.2 * g, 0.9 * q + 0.1 * g**2
    m_hat, q_hat = m / (1 - 0.8 ** (count + 1)), q / (1 - 0.9 ** (count + 1))
    return -0.05 * m_hat / (np.sqrt(q_hat) + 1e-6), m, q


def rate(count):
    return 0.1 / (count + 1.0) ** 0.5


METHODS = {
    "linbreg": (functools.partial(linbreg, rate), linear),
    "momentum": (
        functools.partial(linbreg, rate, momentum=0.7),
        functools.partial(linear, momentum=0.7),
    ),
    "adabreg": (
        functools.partial(adabreg, 0.05, b1=0.8, b2=0.9, eps=1e-6),
        adaptive_moments,
    ),
}
CONTROLLERS = {
    "none": None,
    "constant": Controller(0.6, every=2, acceleration=1.0),
    "decayed": Controller(0.6, acceleration=2.0, every=1, decay=0.9),
}


@pytest.mark.parametrize(
    ("method", "name", "controller"),
    [
        ("linbreg", "l1", "none"),
        ("linbreg", "l1", "constant"),
        ("linbreg", "group_lasso", "none"),
        ("linbreg", "group_lasso", "decayed"),
        ("momentum", "l1", "decayed"),
        ("adabreg", "l1", "none"),
        ("adabreg", "l1", "decayed"),
        ("adabreg", "group_lasso", "constant"),
    ],
)
def test_iteration_is_its_transcription(method, name, controller):
    (make, step_of), (regulariser, prox, sign) = METHODS[method], REFERENCES[name]
    tx = make(regulariser, delta=0.5, strength=0.8, adaptive=CONTROLLERS[controller])
    path = run(tx, quadratic(0), tree_of(2), 20)
    expected = reference_run(
        quadratic(0), tree_of(2), prox, sign, step_of, delta=0.5, strength=0.8,
        controller=CONTROLLERS[controller],
    )  # fmt: skip
    for (x, state), (wanted, v, strength) in zip(path[1:], expected, strict=True):
        assert_close((x, state.dual), (wanted, v))
        np.testing.assert_allclose(state.strength, strength, rtol=1e-12)
        # What is zero is exactly zero, and there is some to see.
        kernel = x["first"]["kernel"]
        np.testing.assert_array_equal(kernel == 0, wanted["first"]["kernel"] == 0)
    strengths = {float(state.strength) for _, state in path}
    assert (len(strengths) > 5) == (controller != "none")


# What becomes of the methods without a regulariser.

PARENTS = {
    "sgd": (functools.partial(linbreg, 0.125), optax.sgd(0.125)),
    "schedule": (functools.partial(linbreg, rate), optax.sgd(rate)),
    "momentum": (
        functools.partial(linbreg, 0.125, momentum=0.75),
        # An average of gradients is a sum of them times 1 - mu.
        optax.sgd(0.125 * 0.25, 0.75),
    ),
    "adam": (functools.partial(adabreg, 0.05), optax.adam(0.05)),
    "any": (
        functools.partial(linearised_bregman, optax.rmsprop(0.05, momentum=0.9)),
        optax.rmsprop(0.05, momentum=0.9),
    ),
}
NOTHING = {
    "zero": regularisers.zero(),
    "no strength": regularisers.l1(0.0),
    "no leaf": regularisers.l1(1.0, where=lambda path, leaf: False),
}


@pytest.mark.parametrize(
    ("parent", "nothing"),
    [(parent, "zero") for parent in PARENTS]
    + [(parent, "no strength") for parent in ("sgd", "adam")]
    + [("sgd", "no leaf")],
)
def test_without_a_regulariser_it_is_its_parent(parent, nothing):
    make, plain = PARENTS[parent]
    ends = [
        run(tx, quadratic(3), tree_of(4), 20)[-1][0]
        for tx in (make(NOTHING[nothing]), plain)
    ]
    assert_close(*ends, rtol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_without_a_regulariser_and_rounding_it_is_sgd_to_the_last_bit(dtype):
    # Integers over 64, whose sums and products with 1/8 are exact.
    def exact(tree):
        return jax.tree.map(lambda x: jnp.asarray(np.round(4 * x) / 64, dtype), tree)

    x = exact(tree_of(5))
    txs = linbreg(0.125, regularisers.zero()), optax.sgd(0.125)
    states = [tx.init(x) for tx in txs]
    points = [x, x]
    for seed in range(5):
        gradients = exact(tree_of(seed))
        for i, tx in enumerate(txs):
            updates, states[i] = tx.update(gradients, states[i], points[i])
            points[i] = optax.apply_updates(points[i], updates)
        jax.tree.map(np.testing.assert_array_equal, *points)


def test_weight_decay_in_the_gradient_reaches_the_dual():
    tx = optax.chain(optax.add_decayed_weights(0.1), adabreg(0.05, regularisers.zero()))
    parent = optax.chain(optax.add_decayed_weights(0.1), optax.adam(0.05))
    ends = [run(t, quadratic(3), tree_of(4), 20)[-1][0] for t in (tx, parent)]
    assert_close(*ends, rtol=1e-12)


# The dual variable.


@few
@given(matrices, st.floats(0.1, 10), st.floats(0.1, 10))
@convex
def test_the_start_is_the_proximal_point_of_the_dual(name, x, delta, strength):
    tx = linbreg(0.1, CONVEX[name], delta, strength=strength)
    state = tx.init(x)
    # A step without a gradient returns W = prox(delta v).
    updates, _ = tx.update(np.zeros_like(x), state, x)
    np.testing.assert_allclose(updates, 0 * x, atol=1e-9 * (1 + np.max(np.abs(x))))
    # (v - W / delta) / s is a subgradient: R(y) >= R(x) + <p, y - x>.
    p = (np.asarray(state.dual) - x / delta) / strength
    value, scale = CONVEX[name].value, 1 + np.sum(np.abs(x))
    for y in (0 * x, -x, x + 1, np.roll(x, 1)):
        assert value(y) - value(x) - np.sum(p * (y - x)) >= -1e-9 * scale


@pytest.mark.parametrize("name", ["l1", "group_lasso"])
def test_groups_at_zero_start_with_a_dual_of_zero(name):
    x = np.where(np.arange(4)[:, None] < 2, 0, np.ones((4, 3)))
    state = linbreg(0.1, CONVEX[name]).init(x)
    np.testing.assert_array_equal(state.dual[:2], np.zeros((2, 3)))
    assert np.all(np.asarray(state.dual[2:]) > 1)


@few
@given(matrices, st.floats(0.1, 4))
def test_on_its_support_it_is_gradient_descent_without_shrinkage(x, delta):
    # Steps too small to change a sign or to wake a weight.
    g = np.where(np.arange(12).reshape(3, 4) % 2, 1.0, -1.0) * 1e-3
    tx = linbreg(0.01, regularisers.l1(0.5), delta)
    x = np.where(np.abs(x) < 0.25, 0, x)
    updates, _ = tx.update(g, tx.init(x), x)
    expected = np.where(x == 0, 0, -delta * 0.01 * g)
    np.testing.assert_allclose(updates, expected, atol=1e-12)


def test_a_weight_wakes_when_its_dual_exceeds_the_strength():
    # v = -0.125 t, so |v| > 1/2 first at t = 5; then W moves at the full rate.
    tx = linbreg(0.125, regularisers.l1(0.5))
    path = run(tx, jnp.ones_like, np.zeros((1, 1)), 8)
    moved = [float(x[0, 0]) for x, _ in path]
    assert moved == [0, 0, 0, 0, 0, -0.125, -0.25, -0.375, -0.5]


def test_the_limit_is_the_solution_of_least_penalty():
    # min s R(x) + |x|^2 / (2 delta) subject to A x = b: A x = b, and v in the range of
    # A^T with x = prox(delta v).
    rng = np.random.default_rng(0)
    a, solution = rng.normal(size=(18, 30)), np.zeros((1, 30))
    solution[0, rng.permutation(30)[:3]] = [2.0, -3.0, 1.5]
    b = solution @ a.T
    L = np.linalg.norm(a, 2) ** 2
    delta = 20.0
    tx = linbreg(1 / (delta * L), regularisers.l1(1.0), delta)

    @jax.jit
    def train(x):
        def step(carry, _):
            x, state = carry
            updates, state = tx.update((x @ a.T - b) @ a, state, x)
            return (optax.apply_updates(x, updates), state), None

        return jax.lax.scan(step, (x, tx.init(x)), length=20_000)[0]

    x, state = train(jnp.zeros((1, 30)))
    np.testing.assert_allclose(x @ a.T, b, atol=1e-6)
    y = np.linalg.lstsq(a.T, state.dual[0])[0]
    np.testing.assert_allclose(a.T @ y, state.dual[0], atol=1e-9)
    # The penalty is the l1 norm almost alone: it finds the sparse solution.
    np.testing.assert_array_equal(x != 0, solution != 0)
    np.testing.assert_allclose(x, solution, atol=1e-5)


def test_what_changes_the_parameters_elsewhere_is_undone():
    tx = linbreg(0.1, regularisers.l1(0.5))
    x = jnp.ones((2, 2))
    state, zero = tx.init(x), jnp.zeros((2, 2))
    updates, _ = tx.update(zero, state, x / 2)
    np.testing.assert_allclose(x / 2 + updates, x)


def test_strength_may_follow_a_schedule():
    schedule = optax.linear_schedule(1.0, 0.0, 4)
    tx = linbreg(0.1, regularisers.l1(1.0), strength=schedule)
    path = run(tx, jnp.zeros_like, np.array([[0.5, -0.25, 0.0]]), 6)
    # v = W + sign(W) stays, and W = soft(v, s) grows as s falls.
    for count, (x, state) in enumerate(path[1:]):
        s = max(1 - count / 4, 0)
        assert float(state.strength) == s
        np.testing.assert_allclose(x, [[1.5 - s, s - 1.25, 0]], atol=1e-12)


# The controller.


def trained(target, method, controller, seed, steps=1500):
    """The sparsity, the strength and the loss after training on digits."""
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    images = jnp.asarray(images / 16, jnp.float32)
    labels = jnp.asarray(labels, jnp.int32)
    shapes = {"hidden": (64, 60), "out": (60, 10)}
    keys = jax.random.split(jax.random.key(seed), 4)
    dense = {
        name: {
            "kernel": jax.random.normal(key, shape, jnp.float32) * shape[0] ** -0.5,
            "bias": jnp.zeros(shape[1], jnp.float32),
        }
        for (name, shape), key in zip(shapes.items(), keys[:2], strict=True)
    }
    params = sparse_init(keys[2], dense, 0.02)

    def loss(params, batch):
        h = images[batch] @ params["hidden"]["kernel"] + params["hidden"]["bias"][None]
        out = jax.nn.relu(h) @ params["out"]["kernel"] + params["out"]["bias"][None]
        return optax.softmax_cross_entropy_with_integer_labels(
            out, labels[batch]
        ).mean()

    tx = method(adaptive=controller._replace(target=target))

    def step(carry, key):
        params, state = carry
        batch = jax.random.randint(key, (100,), 0, len(labels))
        updates, state = tx.update(jax.grad(loss)(params, batch), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, state), _ = jax.lax.scan(
        step, (params, tx.init(params)), jax.random.split(keys[3], steps)
    )
    kernels = [layer["kernel"] for layer in params.values()]
    return masks.sparsity(kernels), state.strength, loss(params, jnp.arange(1797))


@pytest.mark.parametrize(
    ("method", "controller"),
    [
        (
            functools.partial(linbreg, 0.1, regularisers.l1(1.0), strength=1e-2),
            Controller(0.0, every=10),
        ),
        (
            functools.partial(adabreg, 1e-3, regularisers.l1(1.0), strength=0.1),
            Controller(0.0, every=10, decay=0.95),
        ),
    ],
    ids=["linbreg", "adabreg"],
)
def test_the_controller_reaches_its_target(method, controller):
    with enable_x64(False):
        targets = jnp.array([0.75, 0.9, 0.95])
        train = jax.jit(jax.vmap(lambda target: trained(target, method, controller, 0)))
        sparsity, strength, loss = train(targets)
    np.testing.assert_allclose(sparsity, targets, atol=0.01)
    assert np.all(np.diff(strength) > 0)
    # A guess has log 10 = 2.3.
    assert np.all(np.asarray(loss) < 1.5)


def test_the_controller_rests_between_its_steps_and_during_the_warmup():
    controller = Controller(1.0, every=3, acceleration=1.0, warmup=5)
    tx = linbreg(0.0, regularisers.l1(1.0), strength=0.5, adaptive=controller)
    path = run(tx, jnp.zeros_like, np.ones((1, 2)), 9)
    strengths = [float(state.strength) for _, state in path]
    # S = 0, so that each change doubles it; W = 1 + 1/2 - s, zero from s = 2 on.
    assert strengths == [0.5] * 6 + [1.0] * 3 + [2.0]
    assert [int(state.controller.side) for _, state in path] == [0] * 6 + [1] * 4


# Sides of the target on which the sparsity is, one a step, and the changes of sign.
@pytest.mark.parametrize(
    ("sides", "changes"),
    [
        ([-1, 0, -1, 0, -1], 0),
        ([0, 0, -1, 0, 0], 0),
        ([1, 0, 1, 0], 0),
        ([-1, 0, 1], 1),
        ([-1, 1, -1, 0, 1, 0, 1], 3),
    ],
)
@pytest.mark.parametrize("zeros", [1, 3, 5, 7, 9])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_controller_counts_changes_of_sign_only(dtype, zeros, sides, changes):
    # Without the guard a target of 0.9 is 2e-8 from 9 zeros of 10.
    controller = Controller(zeros / 10, every=1, decay=0.5, acceleration=2.0)
    tx = linearised_bregman(
        optax.identity(), regularisers.l1(1.0), strength=0.5, adaptive=controller
    )
    w = jnp.ones((10, 1), dtype)
    state, update = tx.init(w), jax.jit(tx.update)
    strength, a, counted, last = 0.5, 2.0, 0, 0
    for side in sides:
        v = jnp.where(jnp.arange(10) < zeros + side, 0, 1e5)[:, None].astype(dtype)
        updates, state = update(v - state.dual, state, w)
        w = optax.apply_updates(w, updates)
        counted += side * last < 0
        last = side or last
        factor = 1 + a * 0.5 ** max(counted - 1, 0) * 0.1
        strength *= {-1: factor, 0: 1, 1: 1 / factor}[side]
        assert int(state.controller.changes) == counted
        assert int(state.controller.side) == -last
        np.testing.assert_allclose(state.strength, strength, rtol=1e-5)
    assert counted == changes


def test_the_controller_counts_regularised_leaves_only():
    x = {"bias": np.zeros(100), "kernel": np.array([[1.0, 0.0, 0.0, 0.0]])}
    for where, expected in ((None, 0.75), (masks.everything, 103 / 104)):
        controller = Controller(0.5, every=1)
        tx = linbreg(0.1, regularisers.l1(1.0, where=where), adaptive=controller)
        _, state = run(tx, lambda x: jax.tree.map(jnp.zeros_like, x), x, 1)[-1]
        np.testing.assert_allclose(state.controller.sparsity, expected, rtol=1e-6)


@pytest.mark.parametrize(("target", "limit"), [(0.0, 1e-2), (1.0, 7.0)])
def test_the_strength_stays_within_its_limits(target, limit):
    controller = Controller(target, every=1, acceleration=5.0, lower=1e-2, upper=7.0)
    tx = linbreg(0.0, regularisers.l1(1.0), adaptive=controller)
    x = np.array([[0.0, 100.0]])
    _, state = run(tx, jnp.zeros_like, x, 20)[-1]
    np.testing.assert_allclose(state.strength, limit)


# The start.


@few
@given(st.floats(0.05, 1), st.floats(0.1, 3), st.integers(0, 2**30))
def test_sparse_init_keeps_the_share_and_the_variance(density, gain, seed):
    params = {
        "conv": {"kernel": jnp.ones((3, 3, 20, 30))},
        "dense": {"kernel": jnp.ones((50, 80)), "bias": jnp.ones(80)},
    }
    for whole in (False, True):
        new = sparse_init(
            jax.random.key(seed), params, density, gain=gain, whole_kernels=whole
        )
        np.testing.assert_array_equal(new["dense"]["bias"], np.ones(80))
        for layer, independent in (("conv", 600 if whole else 5400), ("dense", 4000)):
            kernel = np.asarray(new[layer]["kernel"])
            scaled = gain / density**0.5
            np.testing.assert_allclose(kernel[kernel != 0], scaled, rtol=1e-6)
            share = np.mean(kernel != 0)
            deviation = (density * (1 - density) / independent) ** 0.5
            assert abs(share - density) <= 6 * deviation + 1e-12
        alive = np.any(np.asarray(new["conv"]["kernel"]) != 0, axis=(0, 1))
        if whole:
            np.testing.assert_array_equal(
                alive, np.all(np.asarray(new["conv"]["kernel"]) != 0, axis=(0, 1))
            )


def test_sparse_init_keeps_dtypes_and_structure():
    params = [jnp.ones((8, 8), jnp.bfloat16), None, jnp.ones(3, jnp.int32)]
    new = sparse_init(jax.random.key(0), params, 0.5)
    assert jax.tree.map(lambda x: x.dtype, new) == jax.tree.map(
        lambda x: x.dtype, params
    )
    assert sparse_init(jax.random.key(0), {}, 0.5) == {}


# In optax.


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("controller", [None, Controller(0.5, every=1)])
def test_dtypes_are_kept(dtype, method, controller):
    x = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree_of(0))
    tx = METHODS[method][0](regularisers.l1(0.01), adaptive=controller)
    before = tx.init(x)
    updates, after = tx.update(x, before, x)
    dtypes = [[leaf.dtype for leaf in jax.tree.leaves(s)] for s in (before, after)]
    assert dtypes[0] == dtypes[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    # Small steps add up in v, however coarse the parameters are.
    wide = jnp.promote_types(dtype, jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(after.dual)} == {wide}


def test_steps_below_the_precision_of_the_parameters_add_up():
    x = jnp.ones((1, 1), jnp.bfloat16)
    tx = linbreg(2.0**-12, regularisers.zero())
    path = run(tx, jnp.ones_like, x, 256)
    assert float(path[-1][0][0, 0]) == 1 - 2.0**-4


def test_inject_hyperparams():
    x, g = jnp.array([[1.0, -2.0, 0.0]]), jnp.array([[1.0, 2.0, 3.0]])
    make = optax.inject_hyperparams(linbreg)
    tx = make(0.25, regularisers.l1(1.0), 0.5, 0.5, strength=2.0)
    updates, state = tx.update(g, tx.init(x), x)
    plain = linbreg(0.25, regularisers.l1(1.0), 0.5, 0.5, strength=2.0)
    np.testing.assert_allclose(updates, plain.update(g, plain.init(x), x)[0])
    state.hyperparams["strength"] = jnp.asarray(100.0)
    updates, _ = tx.update(g, state, x)
    np.testing.assert_array_equal(updates, -x)


def test_the_state_of_shapes_is_a_state_of_shapes():
    tx = adabreg(0.1, regularisers.group_lasso(1.0), adaptive=Controller(0.5))
    x = jax.tree.map(jnp.asarray, tree_of(0))
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), x)

    def described(state):
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)

    assert described(tx.init(shapes)) == described(tx.init(x))


@pytest.mark.parametrize("tree", [{}, {"a": None}, jnp.ones((0, 3)), jnp.ones(())])
def test_small_trees(tree):
    tx = linbreg(0.5, regularisers.l1(0.0), adaptive=Controller(0.5, every=1))
    updates, _ = tx.update(tree, tx.init(tree), tree)
    assert jax.tree.structure(updates) == jax.tree.structure(tree)
    jax.tree.map(lambda u, x: np.testing.assert_allclose(u, -x / 2), updates, tree)


def test_extra_arguments_reach_the_base_and_unknown_ones_do_not_hurt():
    base = optax.chain(optax.sgd(1.0), optax.contrib.reduce_on_plateau(factor=0.5))
    x = jnp.ones((1, 2))
    tx = linearised_bregman(base, regularisers.zero())
    updates, _ = tx.update(x, tx.init(x), x, value=3.0)
    np.testing.assert_allclose(updates, -x)
    tx = linbreg(1.0, regularisers.zero())
    updates, _ = tx.update(x, tx.init(x), x, value=3.0, anything="else")
    np.testing.assert_allclose(updates, -x)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"learning_rate": -1}, ["learning_rate must be a finite number >= 0", "-1"]),
        ({"regulariser": 1e-3}, ["regulariser must be a Regulariser", "0.001"]),
        ({"delta": 0}, ["delta must be a finite number > 0", "0"]),
        ({"strength": -1}, ["strength must be a finite number >= 0", "-1"]),
        (
            {"strength": rate, "adaptive": Controller(0.5)},
            ["strength must be a number >= 0 where a Controller"],
        ),
        ({"adaptive": 0.5}, ["adaptive must be a Controller or None; got 0.5."]),
        (
            {"adaptive": Controller(1.5)},
            ["adaptive.target must be a finite number >= 0 and <= 1", "1.5"],
        ),
        (
            {"adaptive": Controller(0.5, every=0)},
            ["adaptive.every must be a finite number >= 1", "0"],
        ),
        (
            {"adaptive": Controller(0.5, acceleration=0)},
            ["adaptive.acceleration must be a finite number > 0", "0"],
        ),
        (
            {"adaptive": Controller(0.5, decay=1.5)},
            ["adaptive.decay must be a finite number > 0 and <= 1", "1.5"],
        ),
        (
            {"adaptive": Controller(0.5, lower=0)},
            ["adaptive.lower must be a finite number > 0", "0"],
        ),
        (
            {"adaptive": Controller(0.5, lower=2.0, upper=1.0)},
            ["adaptive.upper must be a finite number >= 2.0", "1.0"],
        ),
        (
            {"adaptive": Controller(0.5, warmup=-1)},
            ["adaptive.warmup must be a finite number >= 0", "-1"],
        ),
    ],
)
@pytest.mark.parametrize("make", [linbreg, adabreg])
def test_bad_arguments(make, arguments, parts):
    good = {"learning_rate": 0.1, "regulariser": regularisers.l1(1.0)}
    make(**good)
    with refused(*parts):
        make(**(good | arguments))


def test_more_bad_arguments():
    l1 = regularisers.l1(1.0)
    with refused("momentum must be a finite number >= 0 and < 1", "1.0"):
        linbreg(0.1, l1, momentum=1.0)
    for name in ("b1", "b2"):
        with refused(f"{name} must be a finite number >= 0 and < 1", "1.0"):
            adabreg(0.1, l1, **{name: 1.0})
    with refused("eps must be a finite number >= 0", "-1"):
        adabreg(0.1, l1, eps=-1)
    key = jax.random.key(0)
    with refused("density must be a finite number > 0 and <= 1", "0"):
        sparse_init(key, jnp.ones(3), 0)
    with refused("gain must be a finite number > 0", "-1"):
        sparse_init(key, jnp.ones(3), 0.5, gain=-1)
    with refused("params['kernel'] has dtype int32"):
        sparse_init(
            key,
            {"kernel": jnp.ones((2, 2), jnp.int32)},
            0.5,
            where=masks.everything,
        )


def test_bad_trees():
    x = jnp.ones((3, 2))
    tx = linbreg(0.1, regularisers.l1(1.0))
    state = tx.init(x)
    with refused("updates and params must have the same tree"):
        tx.update({"a": x}, state, x)
    with refused("updates and params must have the same shape"):
        tx.update(jnp.ones((3, 3)), state, x)
    with refused("state.dual and params must have the same shape"):
        tx.update(jnp.ones((4, 2)), state, jnp.ones((4, 2)))
