"""The forms that XLA's CPU backend is given compute what the plain ones do."""

import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prunadag_optax import classify, prunadag
from prunadag_optax._ranking import engine, keys, threshold
from tests.helpers import enable_x64

# Below and above the size that is worth threads and chunks; a prime has no rows.
SIZES = [0, 1, 5, 65_536, 65_537, 98_304, 2**18, 3 * 2**18, 1_000_003]


@pytest.fixture(params=["one device", "many devices"])
def form(request, monkeypatch):
    """Which forms to compile, whatever devices this process has."""
    one = request.param == "one device"
    monkeypatch.setattr(_backend, "_may_reshape", lambda tree: one)
    jax.clear_caches()
    yield request.param
    jax.clear_caches()


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.usefixtures("form")
def test_counts():
    leaves = [normal(i, size) for i, size in enumerate(SIZES)]

    @jax.jit
    def count(leaves):
        return engine.sums_by_leaf(
            [[(x > t).astype(jnp.int32) for t in (-1.0, 0.0, 1.0)] for x in leaves]
        )

    expected = [[np.sum(x > t) for x in leaves] for t in (-1.0, 0.0, 1.0)]
    np.testing.assert_array_equal(jnp.stack(count(leaves)), expected)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sums_of_pairs(dtype):
    x, y = ([normal(seed, 1, size).astype(dtype) for size in SIZES] for seed in (0, 1))

    @jax.jit
    def sums(x, y):
        def pair(i, x, y):
            return jnp.where(x > 0, y * y, 0), i * x * x

        return engine.pair_sums_by_leaf(pair, x, y)

    with enable_x64(dtype == "float64"):
        first, second = sums(x, y)
    assert first.dtype == second.dtype == dtype
    x, y = ([leaf.astype(float) for leaf in leaves] for leaves in (x, y))
    # Rounding errors of 10^6 terms of one sign, as if drawn at random: their root.
    rtol = 1e3 * np.finfo(dtype).eps
    np.testing.assert_allclose(
        first, [np.sum(b * b, where=a > 0) for a, b in zip(x, y, strict=True)], rtol
    )
    np.testing.assert_allclose(
        second, [i * np.sum(a * a) for i, a in enumerate(x)], rtol
    )


@pytest.mark.usefixtures("form")
def test_sums_of_mixed_dtypes():
    with enable_x64(True):
        x = [normal(0, 70_000), normal(1, 70_000).astype(float), normal(2, 5)]
        sums = jax.jit(
            lambda x: engine.pair_sums_by_leaf(lambda i, x: (x * x, jnp.abs(x)), x)
        )(x)
    expected = [[np.sum(v * v) for v in x], [np.sum(np.abs(v)) for v in x]]
    np.testing.assert_allclose(jnp.stack(sums), expected, rtol=1e-4)


@pytest.mark.usefixtures("form")
def test_sums_of_stacked_leaves():
    x = [normal(0, 3, 7), normal(1, 2, 2), normal(2, 4, 5)]
    stacked, values = (True, False, True), [*x[0], x[1], *x[2]]

    @jax.jit
    def sums(x):
        counts = engine.sums_by_leaf(
            [[(x > t).astype(jnp.int32) for t in (-0.5, 0.5)] for x in x], stacked
        )
        squares = engine.pair_sums_by_leaf(
            lambda i, x: (x * x, -2 * x * x), x, stacked=stacked
        )
        return counts, squares

    counts, squares = sums(x)
    expected = [[np.sum(v > t) for v in values] for t in (-0.5, 0.5)]
    np.testing.assert_array_equal(jnp.stack(counts), expected)
    expected = [[f * np.sum(v * v) for v in values] for f in (1, -2)]
    np.testing.assert_allclose(jnp.stack(squares), expected, rtol=1e-5)


def test_blocks_are_of_small_leaves_of_one_size_and_dtype(monkeypatch):
    leaves = [np.zeros((2, 3)), np.zeros(70_000), np.zeros(6), np.zeros(0), np.zeros(5)]
    leaves += [np.zeros(6, np.float16), np.zeros(70_000), np.zeros(0)]
    separate = [(i,) for i in range(len(leaves))]
    seen = []

    @jax.jit
    def blocks(leaves):
        seen.append(engine.blocks_of(leaves, leaves))
        return engine.stack(leaves, seen[-1])

    monkeypatch.setattr(_backend, "_may_reshape", lambda tree: True)
    shapes = [array.shape for array in blocks(leaves)]
    assert seen.pop() == [(0, 2), (1,), (3,), (4,), (5,), (6,), (7,)]
    assert shapes == [(2, 6), (70_000,), (0,), (5,), (6,), (70_000,), (0,)]
    assert engine.blocks_of(leaves) == separate  # not compiled
    monkeypatch.setattr(_backend, "_may_reshape", lambda tree: False)
    jax.clear_caches()
    blocks(leaves)
    assert seen.pop() == separate


@pytest.mark.usefixtures("form")
def test_sums_under_vmap():
    x = normal(0, 3, 3 * 2**17)

    @jax.jit
    @jax.vmap
    def sums(x):
        (count,) = engine.sums_by_leaf([[(x > 0).astype(jnp.int32)]])
        return count, *engine.pair_sums_by_leaf(lambda i, x: (x * x, -x * x), [x])

    count, positive, negative = sums(x)
    np.testing.assert_array_equal(count[:, 0], np.sum(x > 0, axis=1))
    np.testing.assert_allclose(positive[:, 0], np.sum(x * x, axis=1), 1e-4)
    np.testing.assert_array_equal(negative, -positive)


def steps(tx, params, gradients):
    """Parameters and state after each jitted step."""
    update = jax.jit(tx.update)
    state = tx.init(params)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        yield params, state


@pytest.mark.parametrize(
    ("variant", "scope"),
    [
        ("v3", "leaf"),
        ("v4", "global"),
        pytest.param("v3", "global", marks=pytest.mark.slow),
        pytest.param("v4", "leaf", marks=pytest.mark.slow),
    ],
)
def test_forms_agree_on_whole_steps(variant, scope, monkeypatch):
    shapes = {"large": (512, 768), "odd": (257, 257), "bias": (768,), "scalar": ()}
    # Not all in a row: leaves of one size are counted together on one device.
    shapes |= {"kernel": (3, 5), "scale": (768,), "head": (15,), "last": (5, 3)}
    # v3 takes sums of squares, in another order in each form. On a grid of 1/4 these
    # are exact, so there too every bit is the same; but only in the first step.
    exact = variant == "v4"
    count, grid = (3, 2.0**20) if exact else (1, 4)

    def tree(seed):
        leaves = (
            normal(10 * seed + i, *shape) for i, shape in enumerate(shapes.values())
        )
        return {
            n: np.round(x * grid) / grid for n, x in zip(shapes, leaves, strict=True)
        }

    runs = []
    for one in (True, False):
        monkeypatch.setattr(_backend, "_may_reshape", lambda tree, one=one: one)
        jax.clear_caches()
        tx = prunadag(0.1, variant=variant, scope=scope)
        gradients = [tree(step) for step in range(1, count + 1)]
        runs.append(list(steps(tx, tree(0), gradients)))
    jax.tree.map(np.testing.assert_array_equal, *runs)


@pytest.mark.parametrize("scope", ["global", "leaf"])
def test_jitted_and_eager_classes_agree(scope):
    x, g, w = ([normal(i, 70_000), normal(i + 9, 3, 5)] for i in (0, 1, 2))
    w = jax.tree.map(np.abs, w)
    arguments = {"relevant": 0.2, "decrease": 0.3, "variant": "v4", "scope": scope}
    eager = classify(g, x, w, **arguments)
    jitted = jax.jit(lambda *args: classify(*args, **arguments))(g, x, w)
    for a, b in zip(eager[:3], jitted[:3], strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)
    np.testing.assert_array_equal(eager.threshold, jitted.threshold)


def test_threshold_is_reached_by_the_relevant_and_no_others():
    x, g = normal(0, 999), normal(1, 999)
    for scope, relevant in itertools.product(("global", "leaf"), (1, 0.1, 0.5, 999)):
        classes = classify([g], [x], [np.ones(999)], relevant=relevant, scope=scope)
        reached = np.abs(g) >= np.ravel(classes.threshold)
        np.testing.assert_array_equal(classes.relevant[0], reached)


def test_gradients_pass_through_the_update():
    # With respect to the learning rate, for meta-learning: the classes are constant.
    x, g = jnp.array([1.0, -2.0, 3.0, 0.5]), jnp.array([3.0, 1.0, 0.1, 0.2])

    @jax.jit
    def after(rate):
        tx = prunadag(rate, relevant=1, variant="v4")
        params, state = x, tx.init(x)
        for _ in range(3):
            updates, state = tx.update(g, state, params)
            params = optax.apply_updates(params, updates)
        return jnp.sum(params**2)

    derivative = jax.grad(after)(0.1)
    difference = (after(0.1 + 1e-3) - after(0.1 - 1e-3)) / 2e-3
    np.testing.assert_allclose(derivative, difference, rtol=1e-2)


FLOATS = st.floats(width=32, allow_nan=True, allow_infinity=True)


@hypothesis.settings(deadline=None, max_examples=200)
@hypothesis.given(
    st.lists(FLOATS, min_size=12, max_size=12),
    st.integers(1, 12),
    FLOATS,
    st.booleans(),
)
def test_no_guess_changes_the_outcome(values, k, guess, by_leaf):
    x = np.array(values, np.float32)
    keys = np.sort(x.view(np.int32) & 0x7FFFFFFF)
    guess = jnp.atleast_1d(keys.magnitude_to_key(guess, x))
    for start in (None, guess):
        found = threshold.kth_largest_keys([x], jnp.array([k]), start, by_leaf=by_leaf)
        np.testing.assert_array_equal(found, keys[[-k]])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_passes_over_the_data_are_few(dtype, monkeypatch):
    passes = []
    plain = engine.sums_by_leaf

    def counted(*arguments):
        jax.debug.callback(lambda: passes.append(None))
        return plain(*arguments)

    monkeypatch.setattr(_backend, "sums_by_leaf", counted)
    rng = np.random.default_rng(0)
    with enable_x64(dtype == "float64"):
        x = jnp.asarray(rng.normal(size=100_000), dtype)
        bits = 8 * x.dtype.itemsize
        k = jnp.array([10_000])
        key = threshold.kth_largest_keys(x, k)
        jax.effects_barrier()
        # No worse than the thirds of the bracket alone would be.
        assert len(passes) <= bits / np.log2(3) + 2
        passes.clear()
        guess = keys.magnitude_to_key(
            1.1 * keys.key_to_magnitude(key, x).astype(jnp.float32), x
        )
        near = threshold.kth_largest_keys(x, k, guess)
        jax.effects_barrier()
        # In float64 two neighbours lie some 2^40 keys apart, of which one is asked for.
        assert len(passes) <= (25 if dtype == "float64" else 10)
        np.testing.assert_array_equal(near, key)
    jax.clear_caches()
