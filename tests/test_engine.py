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


@pytest.fixture(params=["one CPU device", "plain"])
def form(request, monkeypatch):
    """Which form of the engine is compiled."""
    if request.param == "plain":
        use_the_plain_form(monkeypatch)
    jax.clear_caches()
    yield request.param
    jax.clear_caches()


def use_the_plain_form(monkeypatch):
    def choose(on_one_cpu, plain, *operands):
        del on_one_cpu
        return plain(*operands)

    monkeypatch.setattr(engine, "_choose", choose)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.usefixtures("form")
def test_counts():
    leaves = [normal(i, size) for i, size in enumerate(SIZES)]

    @jax.jit
    def count(leaves):
        return engine.sums_by_leaf(
            lambda x: [(x > t).astype(jnp.int32) for t in (-1.0, 0.0, 1.0)], [leaves]
        )

    expected = [[np.sum(x > t) for x in leaves] for t in (-1.0, 0.0, 1.0)]
    np.testing.assert_array_equal(jnp.stack(count(leaves)), expected)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sums_of_pairs(dtype):
    x, y = ([normal(seed, 1, size).astype(dtype) for size in SIZES] for seed in (0, 1))
    factors = np.arange(len(SIZES), dtype=dtype)

    @jax.jit
    def sums(x, y, factors):
        def pair(x, y, factor):
            return jnp.where(x > 0, y * y, 0), factor * x * x

        return engine.sums_by_leaf(pair, [x, y], [factors])

    with enable_x64(dtype == "float64"):
        first, second = sums(x, y, factors)
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
            lambda x: engine.sums_by_leaf(lambda x: (x * x, jnp.abs(x)), [x])
        )(x)
    expected = [[np.sum(v * v) for v in x], [np.sum(np.abs(v)) for v in x]]
    np.testing.assert_allclose(jnp.stack(sums), expected, rtol=1e-4)


@pytest.mark.usefixtures("form")
def test_small_leaves_of_one_size_keep_their_places_and_scalars():
    # On one CPU device the leaves of one size are copied into one array.
    shapes = [(2, 3), (70_000,), (6,), (0,), (5,), (6,), (70_000,), (3, 2)]
    x = [normal(i, *shape) for i, shape in enumerate(shapes)]
    level = np.linspace(-1, 1, len(x)).astype(np.float32)

    @jax.jit
    def sums(x, level):
        counts = engine.sums_by_leaf(
            lambda x, t, u: [(x > t).astype(jnp.int32), (x > u).astype(jnp.int32)],
            [x],
            [level, jnp.float32(0.5)],
        )
        squares = engine.sums_by_leaf(lambda x, t: (x * x, t * x * x), [x], [level])
        return *counts, *squares

    of_leaf, of_all, squares, weighted = sums(x, level)
    np.testing.assert_array_equal(
        of_leaf, [np.sum(v > t) for v, t in zip(x, level, strict=True)]
    )
    np.testing.assert_array_equal(of_all, [np.sum(v > 0.5) for v in x])
    expected = np.array([np.sum(v.astype(float) ** 2) for v in x])
    np.testing.assert_allclose(squares, expected, rtol=1e-5)
    np.testing.assert_allclose(weighted, level * expected, rtol=1e-5)


@pytest.mark.usefixtures("form")
def test_sums_under_vmap():
    x = normal(0, 3, 3 * 2**17)

    @jax.jit
    @jax.vmap
    def sums(x):
        (count,) = engine.sums_by_leaf(lambda x: [(x > 0).astype(jnp.int32)], [[x]])
        return count, *engine.sums_by_leaf(lambda x: (x * x, -x * x), [[x]])

    count, positive, negative = sums(x)
    np.testing.assert_array_equal(count[:, 0], np.sum(x > 0, axis=1))
    np.testing.assert_allclose(positive[:, 0], np.sum(x * x, axis=1), 1e-4)
    np.testing.assert_array_equal(negative, -positive)


@pytest.mark.usefixtures("form")
def test_what_is_stored_is_what_was_computed():
    x = normal(0, 70_000)

    def function(tree, level):
        return {"above": tree["x"] > level, "double": 2 * tree["x"]}

    for call in (function, jax.jit(lambda *a: engine.stored(function, *a))):
        found = call({"x": x}, 0.5)
        assert found["above"].dtype == bool
        np.testing.assert_array_equal(found["above"], x > 0.5)
        np.testing.assert_array_equal(found["double"], 2 * x)


def test_one_cpu_device_takes_its_form_and_others_the_plain_one():
    assert jax.device_count() == 1

    def barriers(platform):
        step = jax.jit(lambda x: engine.stored(lambda x: 2 * x, x))
        program = jax.export.export(step, platforms=[platform])(jnp.ones(3))
        return "optimization_barrier" in program.mlir_module()

    assert [barriers(name) for name in ("cpu", "cuda", "tpu")] == [True, False, False]


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
    # are exact, so there the classes are the same; but only in the first step.
    count, grid = (3, 2.0**20) if variant == "v4" else (1, 4)

    def tree(seed):
        leaves = (
            normal(10 * seed + i, *shape) for i, shape in enumerate(shapes.values())
        )
        return {
            n: np.round(x * grid) / grid for n, x in zip(shapes, leaves, strict=True)
        }

    runs = []
    for plain in (False, True):
        if plain:
            use_the_plain_form(monkeypatch)
        jax.clear_caches()
        tx = prunadag(0.1, variant=variant, scope=scope)
        gradients = [tree(step) for step in range(1, count + 1)]
        runs.append(list(steps(tx, tree(0), gradients)))
    # The compiler may fuse a product and a sum in one form and not in the other.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-6, 3e-7), *runs)


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
def test_no_hint_changes_the_outcome(values, k, hint, by_leaf):
    x = np.array(values, np.float32)
    ordered = np.sort(x.view(np.int32) & 0x7FFFFFFF)
    for start in (None, jnp.float32(hint)):
        found = threshold.kth_largest_keys([x], [k], start, by_leaf=by_leaf)
        np.testing.assert_array_equal(found, ordered[[-k]])


def test_at_least_kth_counts_ties_and_empty_leaves():
    x = [jnp.array([1.0, -2.0, 2.0]), jnp.zeros((0,)), jnp.array([0.5])]
    inside, last = threshold.at_least_kth(x, [1])
    assert [leaf.tolist() for leaf in inside] == [[False, True, True], [], [False]]
    assert float(last) == 2.0
    inside, last = threshold.at_least_kth(x, [3, 1, 1], by_leaf=True)
    assert [leaf.tolist() for leaf in inside] == [[True] * 3, [], [True]]
    assert last.tolist() == [1.0, 0.0, 0.5]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_passes_over_the_data_are_few(dtype, monkeypatch):
    passes = []
    plain = engine.sums_by_leaf

    def counted(*arguments):
        jax.debug.callback(lambda: passes.append(None))
        return plain(*arguments)

    monkeypatch.setattr(engine, "sums_by_leaf", counted)
    rng = np.random.default_rng(0)
    with enable_x64(dtype == "float64"):
        x = [jnp.asarray(rng.normal(size=100_000), dtype)]
        bits = 8 * x[0].dtype.itemsize
        key = threshold.kth_largest_keys(x, [10_000])
        jax.effects_barrier()
        # No worse than the thirds of the bracket alone would be.
        assert len(passes) <= bits / np.log2(3) + 2
        passes.clear()
        hint = 1.1 * keys.key_to_magnitude(key, x).astype(jnp.float32)
        near = threshold.kth_largest_keys(x, [10_000], hint)
        jax.effects_barrier()
        # In float64 two neighbours lie some 2^40 keys apart, of which one is asked for.
        assert len(passes) <= (25 if dtype == "float64" else 10)
        np.testing.assert_array_equal(near, key)
    jax.clear_caches()
