"""Global sparse momentum SGD: which gradients pass, and the steps that follow."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from prunadag_optax import masks
from prunadag_optax.methods.sparse_momentum import active_gradients, gsm
from tests.helpers import enable_x64, refused, run

# Small integers over 4 tie often; the others cover the magnitudes.
entries = st.integers(-8, 8).map(lambda i: i / 4) | st.floats(-1e3, 1e3).map(
    lambda value: round(value, 6)
)
matrices = hnp.arrays(np.float64, (3, 4), elements=entries)
few = settings(max_examples=40, deadline=None)


@pytest.fixture(autouse=True)
def _double():
    with enable_x64():
        yield


def tree_of(seed):
    rng = np.random.default_rng(seed)
    shapes = {"bias": (5,), "conv": (3, 2, 2, 4), "kernel": (6, 5)}
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def quadratic(seed):
    """The gradient of sum_i c_i (x_i - t_i)^2 / 2."""
    curvature, target = jax.tree.map(np.abs, tree_of(seed)), tree_of(seed + 1)
    return lambda x: jax.tree.map(lambda c, x, t: c * (x - t), curvature, x, target)


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


# Which gradients pass.


@few
@given(matrices, matrices, st.floats(1, 20))
def test_the_largest_scores_are_active(x, g, compression):
    tx = active_gradients(compression)
    passed, _ = tx.update(g, tx.init(x), x)
    passed, scores = np.asarray(passed), np.abs(g * x)
    threshold = np.sort(scores, axis=None)[-max(1, int(12 / compression))]
    np.testing.assert_array_equal(passed, np.where(scores >= threshold, g, 0))


@few
@given(matrices, matrices, matrices)
def test_the_last_threshold_changes_no_result(x, g, other):
    tx = active_gradients(4)
    _, state = tx.update(other, tx.init(x), x)
    assert_equal(tx.update(g, state, x), tx.update(g, tx.init(x), x))


def test_prunable_leaves_are_ranked_together_and_the_others_pass():
    x, g = tree_of(0), tree_of(1)
    tx = active_gradients(6)
    passed, _ = tx.update(g, tx.init(x), x)
    assert_equal(passed["bias"], g["bias"])
    names = ("conv", "kernel")
    scores = np.concatenate([np.abs(g[n] * x[n]).ravel() for n in names])
    threshold = np.sort(scores)[-(scores.size // 6)]
    for name in names:
        active = np.abs(g[name] * x[name]) >= threshold
        assert_equal(passed[name], np.where(active, g[name], 0))
    assert sum(np.count_nonzero(passed[n]) for n in names) == scores.size // 6
    # A predicate overrules the default.
    tx = active_gradients(5, where=lambda path, leaf: leaf.ndim == 1)
    passed, _ = tx.update(g, tx.init(x), x)
    assert_equal([passed[n] for n in names], [g[n] for n in names])
    assert np.count_nonzero(passed["bias"]) == 1


def test_a_tree_that_is_one_array_is_prunable():
    x, g = jnp.array([1.0, 2.0, 3.0, 4.0]), jnp.ones(4)
    tx = active_gradients(2)
    np.testing.assert_array_equal(tx.update(g, tx.init(x), x)[0], [0, 0, 1, 1])
    with refused("masks.prunable, the default where, must choose at least one leaf"):
        tx.update([g], tx.init([x]), [x])


def test_scores_do_not_overflow_in_half_precision():
    x = jnp.array([[300.0, 400.0, 500.0, 1.0]], jnp.float16)
    tx = active_gradients(4)
    passed, _ = tx.update(x, tx.init(x), x)
    np.testing.assert_array_equal(passed, [[0, 0, 500, 0]])


def test_a_weight_at_zero_counts_for_nothing():
    x, g = jnp.array([[0.0, 1.0, 2.0, 0.0]]), jnp.array([[9.0, 1.0, 1.0, 9.0]])
    tx = active_gradients(2)
    passed, _ = tx.update(g, tx.init(x), x)
    np.testing.assert_array_equal(passed, [[0, 1, 1, 0]])
    # With fewer than Q positive scores the threshold is 0, which all reach.
    tx = active_gradients(4 / 3)
    np.testing.assert_array_equal(tx.update(g, tx.init(x), x)[0], g)


# The steps.


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_gsm_is_its_transcription(seed, nesterov):
    x, beta, eta, compression = tree_of(seed), 0.9, 0.01, 8.0
    gradient = quadratic(seed)

    def rate(count):
        return 0.1 / (count + 1.0)

    tx = gsm(rate, compression, beta, eta, nesterov=nesterov)
    path = run(tx, gradient, jax.tree.map(jnp.asarray, x), 20)
    z = jax.tree.map(np.zeros_like, x)
    for count in range(20):
        g = gradient(x)
        scores = {n: np.abs(g[n] * x[n]) for n in ("conv", "kernel")}
        flat = np.sort(np.concatenate([t.ravel() for t in scores.values()]))
        threshold = flat[flat.size - int(flat.size / compression)]
        for name in x:
            active = scores[name] >= threshold if name in scores else True
            masked = np.where(active, g[name], 0) + eta * x[name]
            z[name] = beta * z[name] + masked
            direction = masked + beta * z[name] if nesterov else z[name]
            x[name] = x[name] - rate(count) * direction
        jax.tree.map(
            lambda got, wanted: np.testing.assert_allclose(
                got, wanted, rtol=1e-10, atol=1e-12
            ),
            path[count + 1],
            x,
        )


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_without_compression_it_is_momentum_sgd_exactly(dtype, nesterov, weight_decay):
    parent = optax.chain(
        optax.add_decayed_weights(weight_decay), optax.sgd(0.1, 0.9, nesterov)
    )
    paths = []
    # Not compiled: a compiler may round w + alpha z once or twice.
    for tx in (gsm(0.1, 1, 0.9, weight_decay, nesterov=nesterov), parent):
        path = [jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree_of(2))]
        state = tx.init(path[0])
        for seed in range(20):
            g = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree_of(seed))
            updates, state = tx.update(g, state, path[-1])
            path.append(optax.apply_updates(path[-1], updates))
        paths.append(path)
    assert_equal(*paths)


def test_a_passive_weight_decays_as_its_recurrence():
    # w_{k+1} = (1 + beta - alpha eta) w_k - beta w_{k-1} without a gradient; about
    # e^{-alpha eta k / (1 - beta)} in the long run.
    alpha, beta, eta = 0.1, 0.9, 0.005
    tx = gsm(alpha, 2, beta, eta)
    # The score of the second weight is zero.
    path = run(tx, lambda x: jnp.array([[1e-9, 0]]), jnp.array([[1.0, 1e-3]]), 400)
    path = [float(w[0, 1]) for w in path]
    for before, now, after in zip(path, path[1:], path[2:], strict=False):
        expected = (1 + beta - alpha * eta) * now - beta * before
        np.testing.assert_allclose(after, expected, rtol=1e-9)
    rate = np.log(path[300] / path[400]) / 100
    np.testing.assert_allclose(rate, alpha * eta / (1 - beta), rtol=0.1)


def test_what_is_pruned_in_the_end_is_small():
    # f = |A x - b|^2 / 2 with a sparse solution, from a dense start near it.
    rng = np.random.default_rng(0)
    a, solution = rng.normal(size=(60, 20)) / 8, np.zeros((20, 1))
    solution[:4] = [[2.0], [-3.0], [1.5], [4.0]]
    start = jnp.asarray(solution + 0.2 * rng.normal(size=solution.shape))

    def cut(x):
        pruned, mask = masks.prune(x, 1 - 1 / 5)
        np.testing.assert_array_equal(mask, solution != 0)
        return float(jnp.linalg.norm(pruned - x))

    tx = gsm(0.05, 5, 0.9, 0.01)
    end = run(tx, lambda x: a.T @ (a @ (x - solution)), start, 2000)[-1]
    assert cut(end) < 1e-3 * cut(start)


# In optax.


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("accumulator_dtype", [None, "float32"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_dtypes_are_kept(dtype, accumulator_dtype, nesterov):
    x = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree_of(0))
    tx = gsm(0.1, 4, nesterov=nesterov, accumulator_dtype=accumulator_dtype)
    before = tx.init(x)
    updates, after = tx.update(x, before, x)
    dtypes = [[leaf.dtype for leaf in jax.tree.leaves(s)] for s in (before, after)]
    assert dtypes[0] == dtypes[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    trace = optax.tree.get(after, "trace")
    assert {leaf.dtype for leaf in jax.tree.leaves(trace)} == {
        jnp.dtype(accumulator_dtype or dtype)
    }


@pytest.mark.parametrize("tree", [{}, {"a": None}, jnp.ones((0, 3)), jnp.ones(())])
def test_trees_with_nothing_to_prune(tree):
    tx = gsm(0.5, 10, 0.9, 0.0)
    updates, _ = tx.update(tree, tx.init(tree), tree)
    assert_equal(updates, jax.tree.map(lambda x: -x / 2, tree))


def test_inject_hyperparams_changes_the_compression_without_recompiling():
    x, g = tree_of(0), tree_of(1)
    tx = optax.inject_hyperparams(gsm)(0.125, 6, 0.5, 0.25)
    update, state = jax.jit(tx.update), tx.init(x)
    for compression in (6.0, 2.5, 1.0):
        state.hyperparams["compression"] = jnp.asarray(compression)
        got, _ = update(g, state, x)
        plain = gsm(0.125, compression, 0.5, 0.25)
        expected, _ = plain.update(g, plain.init(x), x)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), got, expected
        )
    assert update._cache_size() <= 2  # the compression was an integer, then a float


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"learning_rate": -1}, ["learning_rate must be a finite number >= 0", "-1"]),
        ({"compression": 0.5}, ["compression must be a finite number >= 1", "0.5"]),
        ({"compression": "x"}, ["compression must be a finite number >= 1", "'x'"]),
        ({"momentum": 1.0}, ["momentum must be a finite number >= 0 and < 1", "1.0"]),
        ({"momentum": None}, ["momentum must be a finite number", "None"]),
        ({"weight_decay": -1}, ["weight_decay must be a finite number >= 0", "-1"]),
        ({"accumulator_dtype": int}, ["accumulator_dtype must be None or one of"]),
    ],
)
def test_bad_arguments(arguments, parts):
    good = {"learning_rate": 0.1, "compression": 2}
    gsm(**good)
    with refused(*parts):
        gsm(**(good | arguments))


def test_bad_trees():
    x = jnp.ones((3, 2))
    tx = active_gradients(2)
    state = tx.init(x)
    with refused("updates and params must have the same tree"):
        tx.update({"a": x}, state, x)
    with refused("updates and params must have the same shape"):
        tx.update(jnp.ones((3, 3)), state, x)
