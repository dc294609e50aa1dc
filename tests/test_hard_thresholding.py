"""Iterative hard thresholding: the operator, the iteration, and where it can end.

The references are plain NumPy: the best of all supports, the iteration with a stable
sort, and for least squares every stationary point there is, one for each support.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from prunadag_optax import masks
from prunadag_optax.methods.hard_thresholding import (
    hard_threshold,
    ht_stable,
    iterative_hard_thresholding,
    stability,
)
from tests.helpers import enable_x64, refused, run

SIZE = 7
# Small integers over 4 tie often; the others cover the magnitudes.
entries = st.integers(-8, 8).map(lambda i: i / 4) | st.floats(-1e3, 1e3).map(
    lambda value: round(value, 6)
)
vectors = hnp.arrays(np.float64, SIZE, elements=entries)
counts = st.integers(1, SIZE)
few = settings(max_examples=40, deadline=None)


@pytest.fixture(autouse=True)
def _double():
    with enable_x64():
        yield


def reference(x: np.ndarray, k: int) -> np.ndarray:
    """H_k by a stable sort, which puts the later of equal magnitudes last."""
    result, last = np.zeros_like(x), np.argsort(np.abs(x), kind="stable")[x.size - k :]
    result[last] = x[last]
    return result


# The operator.


@few
@given(vectors, counts)
def test_no_vector_with_k_nonzeros_is_closer(x, k):
    z = np.asarray(hard_threshold(x, k))
    np.testing.assert_array_equal(z, reference(x, k))
    assert np.count_nonzero(z) == min(k, np.count_nonzero(x))
    distances = [
        np.sum(np.delete(x, support) ** 2)
        for support in itertools.combinations(range(SIZE), k)
    ]
    np.testing.assert_allclose(np.sum((z - x) ** 2), min(distances), rtol=1e-12)


@few
@given(vectors, counts)
def test_thresholding_twice_changes_nothing_and_k_is_monotone(x, k):
    z = hard_threshold(x, k)
    np.testing.assert_array_equal(hard_threshold(z, k), z)
    np.testing.assert_array_equal(hard_threshold(z, min(k + 1, SIZE)), z)
    np.testing.assert_array_equal(hard_threshold(x, SIZE), x)


@few
@given(vectors, counts)
def test_the_operator_is_pruning_by_magnitude(x, k):
    pruned, _ = masks.prune(x, 1 - k / SIZE)
    np.testing.assert_array_equal(hard_threshold(x, k), pruned)


def test_ties_leave_exactly_k():
    np.testing.assert_array_equal(
        hard_threshold(jnp.array([1.0, -3.0, 1.0]), 2), [0, -3, 1]
    )
    np.testing.assert_array_equal(hard_threshold(jnp.ones(4), 3), [0, 1, 1, 1])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_a_fraction_a_count_and_an_array_are_the_same(dtype):
    x = jnp.array([4.0, -3.0, 2.0, 1.0], dtype)
    half = jax.jit(hard_threshold)
    for k in (0.5, 2, jnp.asarray(2), jnp.asarray(0.5)):
        z = hard_threshold(x, k)
        assert z.dtype == x.dtype
        np.testing.assert_array_equal(z, jnp.array([4.0, -3.0, 0.0, 0.0], dtype))
        np.testing.assert_array_equal(half(x, jnp.asarray(k)), z)


def test_scopes_and_leaves_left_out():
    tree = {"a": jnp.array([1.0, 2.0]), "b": [jnp.array([3.0, 4.0, 5.0]), None]}

    def thresholded(k, where=masks.everything, **options):
        return jax.tree.map(
            lambda x: x.tolist(), hard_threshold(tree, k, where=where, **options)
        )

    assert thresholded(2) == {"a": [0, 0], "b": [[0, 4, 5], None]}
    assert thresholded(1, scope="leaf") == {"a": [0, 2], "b": [[0, 0, 5], None]}
    assert thresholded(2, scope="leaf") == {"a": [1, 2], "b": [[0, 4, 5], None]}
    only_b = thresholded(1, where=lambda path, leaf: leaf.size > 2)
    assert only_b == {"a": [1, 2], "b": [[0, 0, 5], None]}
    assert hard_threshold({}, 3) == {}
    # Biases stay as they are unless `where` says otherwise.
    matrix = {**tree, "c": jnp.array([[6.0, 7.0]])}
    np.testing.assert_array_equal(hard_threshold(matrix, 1)["a"], tree["a"])


# The iteration.


def least_squares(seed, n=12, m=30):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(m, n)) / np.sqrt(m)
    b = a @ rng.normal(size=n)
    return a, b


@pytest.mark.parametrize("scope", ["global", "leaf"])
@pytest.mark.parametrize("seed", range(3))
def test_iteration_is_its_transcription(seed, scope):
    a, b = least_squares(seed)
    start = np.random.default_rng(seed).normal(size=12)
    blocks = [slice(0, 12)] if scope == "global" else [slice(0, 4), slice(4, 12)]

    def gradient(x):
        flat = a.T @ (a @ jnp.concatenate(x) - b)
        return [flat[:4], flat[4:]]

    tx = iterative_hard_thresholding(
        optax.sgd(0.1), 3, scope=scope, where=masks.everything
    )
    x = [jnp.asarray(start[:4]), jnp.asarray(start[4:])]
    path = [np.concatenate(point) for point in run(tx, gradient, x, 20)]
    expected = [start]
    for _ in range(20):
        moved = expected[-1] - 0.1 * a.T @ (a @ expected[-1] - b)
        expected.append(np.concatenate([reference(moved[s], 3) for s in blocks]))
    np.testing.assert_allclose(path, expected, rtol=1e-10, atol=1e-12)
    for point in path[1:]:
        for block in blocks:
            assert np.count_nonzero(point[block]) == 3


BASES = {
    "sgd": functools.partial(optax.sgd, 0.1),
    "momentum": functools.partial(optax.sgd, 0.1, momentum=0.9, nesterov=True),
    "adam": functools.partial(optax.adam, 0.05),
    "adamw": functools.partial(optax.adamw, 0.05, weight_decay=0.1),
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("k", [12, 1.0])
def test_to_keep_all_is_the_base_exactly(base, k):
    a, b = least_squares(3)
    x = jnp.asarray(np.random.default_rng(3).normal(size=12))
    tx = iterative_hard_thresholding(BASES[base](), k)
    paths = [run(tx, lambda x: a.T @ (a @ x - b), x, 20) for tx in (tx, BASES[base]())]
    np.testing.assert_array_equal(*paths)


@few
@given(vectors, vectors, counts)
@pytest.mark.parametrize("base", BASES)
def test_every_step_is_the_bases_step_thresholded(base, x, g, k):
    # Twice, so that the state of the base counts.
    tx, plain = iterative_hard_thresholding(BASES[base](), k), BASES[base]()
    state, plain_state = tx.init(x), plain.init(x)
    for gradient in (g, -g[::-1]):
        updates, state = tx.update(gradient, state, x)
        steps, plain_state = plain.update(gradient, plain_state, x)
        expected = hard_threshold(optax.apply_updates(x, steps), k)
        x = optax.apply_updates(x, updates)
        np.testing.assert_array_equal(x, expected)


def test_leaves_left_out_take_the_bases_step():
    x = {"bias": jnp.array([0.1, 0.2]), "kernel": jnp.array([[3.0, 1.0], [2.0, 4.0]])}
    tx = iterative_hard_thresholding(
        optax.sgd(0.5), 2, where=lambda path, leaf: leaf.ndim > 1
    )
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, x), tx.init(x), x)
    moved = optax.apply_updates(x, updates)
    np.testing.assert_allclose(moved["bias"], [-0.4, -0.3])
    np.testing.assert_array_equal(moved["kernel"], [[2.5, 0], [0, 3.5]])


def test_k_may_follow_a_schedule():
    tx = iterative_hard_thresholding(optax.sgd(0.1), lambda count: 5 - count)
    path = run(tx, jnp.zeros_like, jnp.arange(1.0, 7.0), 4)
    assert [np.count_nonzero(x) for x in path] == [6, 5, 4, 3, 2]


# Where it ends.


class Points(NamedTuple):
    """The stationary points of a least-squares problem with exactly k nonzeros."""

    points: np.ndarray
    gradients: np.ndarray
    margins: np.ndarray


class Problem(NamedTuple):
    """f(x) = |A x - b|^2 / 2."""

    a: np.ndarray
    b: np.ndarray

    def f(self, x):
        return 0.5 * jnp.sum((self.a @ x - self.b) ** 2)

    def gradient(self, x):
        return self.a.T @ (self.a @ x - self.b)

    def curvature(self, size):
        """L over the vectors with no more than `size` nonzeros."""
        n = self.a.shape[1]
        supports = itertools.combinations(range(n), min(size, n))
        return max(np.linalg.norm(self.a[:, s], 2) ** 2 for s in map(list, supports))

    def stationary(self, k, rate):
        n, points = self.a.shape[1], []
        for support in map(list, itertools.combinations(range(n), k)):
            x = np.zeros(n)
            x[support] = np.linalg.lstsq(self.a[:, support], self.b)[0]
            points.append(x)
        points = np.array(points)
        gradients = np.array([self.gradient(x) for x in points])
        on = points != 0
        smallest = np.min(np.abs(points), axis=1, where=on, initial=np.inf)
        largest = np.max(np.abs(gradients), axis=1, where=~on, initial=0)
        return Points(points, gradients, smallest - rate * largest)


def problem(m, n, k, seed):
    rng = np.random.default_rng(seed)
    a, x = rng.normal(size=(m, n)), np.zeros(n)
    x[rng.permutation(n)[:k]] = rng.normal(size=k)
    return Problem(a, a @ x + 0.1 * rng.normal(size=m))


sizes = pytest.mark.parametrize(("m", "n", "k"), [(5, 3, 2), (20, 10, 3), (40, 30, 2)])
# 1 / L for L on all vectors, and on those with 2k nonzeros: the longest step for which
# the descent is proven.
rates = pytest.mark.parametrize("restricted", [False, True])


@functools.cache
def with_unstable_points(m, n, k, restricted):
    """The first problem that has HT-unstable points, the step, and all points."""
    for seed in itertools.count():
        least = problem(m, n, k, seed)
        rate = 1 / least.curvature(2 * k if restricted else n)
        found = least.stationary(k, rate)
        if np.any(found.margins < 0):
            return least, rate, found


@sizes
@rates
def test_stability_of_every_stationary_point(m, n, k, restricted):
    _, rate, found = with_unstable_points(m, n, k, restricted)
    points, gradients = jnp.asarray(found.points), jnp.asarray(found.gradients)

    def at(x, g):
        return stability(x, g, k, rate), ht_stable(x, g, k, rate)

    got, stable = jax.jit(jax.vmap(at))(points, gradients)
    np.testing.assert_allclose(got.margin, found.margins, rtol=1e-9, atol=1e-12)
    np.testing.assert_array_less(got.residual, 1e-10)
    np.testing.assert_array_equal(stable, found.margins >= 0)
    assert 0 < np.sum(stable) < len(stable)


@sizes
@rates
def test_400_starts_leave_an_unstable_point_and_none_ends_at_one(m, n, k, restricted):
    least, rate, found = with_unstable_points(m, n, k, restricted)
    # The least unstable of all, which is the hardest to leave.
    x = found.points[np.argmax(np.where(found.margins < 0, found.margins, -np.inf))]
    rng = np.random.default_rng(1)
    away = rng.normal(size=(400, n)) * (x != 0)
    away *= 1e-6 / np.linalg.norm(away, axis=1, keepdims=True)
    tx = iterative_hard_thresholding(optax.sgd(rate), k)

    @jax.jit
    @jax.vmap
    def trajectory(x):
        def step(carry, _):
            x, state = carry
            updates, state = tx.update(least.gradient(x), state, x)
            return (optax.apply_updates(x, updates), state), (least.f(x), x != 0)

        (end, _), (values, supports) = jax.lax.scan(step, (x, tx.init(x)), length=100)
        gradient = least.gradient(end)
        return values, supports[5], stability(end, gradient, k, rate)

    values, supports, last = trajectory(x[None] + away)
    # Every start has another support within five steps and never comes back: f falls
    # below its value at x.
    assert np.all(np.any(np.asarray(supports) != (x != 0)[None], axis=1))
    assert np.all(np.asarray(values[:, -1]) < float(least.f(x)) - 1e-9)
    rounding = 1e-12 * np.max(np.abs(values))
    assert np.all(np.diff(values, axis=1) <= rounding)
    # The ends are stationary, and none is HT-unstable.
    assert np.all(np.asarray(last.residual) < 1e-7)
    assert np.all(np.asarray(last.margin) >= 0)


def test_started_exactly_at_an_unstable_point_the_iteration_leaves():
    least, rate, found = with_unstable_points(20, 10, 3, False)
    tx = iterative_hard_thresholding(optax.sgd(rate), 3)

    @jax.jit
    @jax.vmap
    def step(x):
        updates, _ = tx.update(least.gradient(x), tx.init(x), x)
        return optax.apply_updates(x, updates)

    moved = np.asarray(step(jnp.asarray(found.points)))
    stays = np.all((moved != 0) == (found.points != 0), axis=1)
    np.testing.assert_array_equal(stays, found.margins >= 0)


@few
@given(st.integers(0, 10**6), st.integers(1, 6), st.floats(0.05, 1))
def test_the_objective_falls_by_the_gradient_on_the_support(seed, k, share):
    # f(y) <= f(x) - gamma/2 |g_I|^2 - (1/gamma - L)/2 |y - x|^2 for gamma <= 1/L.
    least = problem(12, 8, k, seed)
    L = np.linalg.norm(least.a, 2) ** 2
    rate = share / L
    x = reference(np.random.default_rng(seed).normal(size=8), k)
    tx = iterative_hard_thresholding(optax.sgd(rate), k)
    for _ in range(5):
        g = least.gradient(x)
        updates, _ = tx.update(g, tx.init(x), x)
        y = np.asarray(optax.apply_updates(x, updates))
        bound = least.f(x) - rate / 2 * np.sum(g[x != 0] ** 2)
        bound -= (1 / rate - L) / 2 * np.sum((y - x) ** 2)
        assert least.f(y) <= bound + 1e-12 * (1 + abs(float(least.f(x))))
        x = y


def test_points_with_other_numbers_of_nonzeros():
    x, g = jnp.array([2.0, 0.0, 0.0]), jnp.array([0.0, 0.0, 0.5])
    # Fewer than k: stationary only where the whole gradient is zero.
    point = stability(x, g, 2, 0.1)
    assert (float(point.residual), float(point.margin)) == (0.05, 0)
    assert not ht_stable(x, g, 2, 0.1)
    assert ht_stable(x, 0 * g, 2, 0.1)
    # More than k: no such point is an outcome of the thresholding.
    assert stability(x.at[1].set(1.0), g, 1, 0.1).margin == -np.inf
    # All of them: there is no other support.
    np.testing.assert_allclose(stability(x[:1], g[:1], 1, 0.1).margin, 2)
    # The worst leaf counts; a leaf that is left out has only a residual.
    tree, gradient = {"a": x, "b": 3 * x}, {"a": 4 * g, "b": 8 * g}
    point = stability(tree, gradient, 1, 1.0, scope="leaf", where=masks.everything)
    assert point.margin == 0
    point = stability(tree, gradient, 1, 1.0, where=lambda path, leaf: leaf[0] < 3)
    assert (float(point.residual), float(point.margin)) == (4, 0)


# In optax.


def test_inject_hyperparams_changes_k_without_recompiling():
    x, g = jnp.array([1.0, -2.0, 3.0]), jnp.zeros(3)
    tx = optax.inject_hyperparams(iterative_hard_thresholding)(optax.sgd(0.1), k=2)
    update, state = jax.jit(tx.update), tx.init(x)
    for k in (2, 1, 3):
        state.hyperparams["k"] = jnp.asarray(k)
        updates, state = update(g, state, x)
        moved = optax.apply_updates(x, updates)
        np.testing.assert_array_equal(moved, reference(np.asarray(x), k))
    assert update._cache_size() == 1


def test_extra_arguments_reach_the_base():
    def scale_by_value(updates, state, params=None, *, value):
        return jax.tree.map(lambda u: value * u, updates), state

    base = optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), scale_by_value
    )
    x = jnp.array([1.0, -2.0, 3.0])
    tx = iterative_hard_thresholding(base, 3)
    updates, _ = tx.update(x, tx.init(x), x, value=5.0)
    np.testing.assert_array_equal(updates, 5 * x)


K = "k must be a fraction in (0, 1] as a float or a count >= 1 as an integer; got"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"k": 0}, [K, "0."]),
        ({"k": -2}, [K, "-2."]),
        ({"k": 1.5}, [K, "1.5."]),
        ({"k": 0.0}, [K, "0.0."]),
        ({"k": True}, [K, "True."]),
        ({"k": float("nan")}, [K, "nan."]),
        ({"k": "all"}, [K, "'all'."]),
        ({"scope": "tree"}, ["scope must be 'global' or 'leaf'; got 'tree'."]),
    ],
)
def test_bad_arguments(arguments, parts):
    x = jnp.ones(3)
    k, scope = arguments.get("k", 2), arguments.get("scope", "global")
    for call in (
        lambda k, scope: hard_threshold(x, k, scope=scope),
        lambda k, scope: iterative_hard_thresholding(optax.sgd(1.0), k, scope=scope),
        lambda k, scope: stability(x, x, k, 1.0, scope=scope),
        lambda k, scope: ht_stable(x, x, k, 1.0, scope=scope),
    ):
        call(2, "leaf")
        with refused(*parts):
            call(k, scope)


def test_bad_trees():
    x = jnp.ones(3)
    tx = iterative_hard_thresholding(optax.sgd(1.0), 2)
    state = tx.init(x)
    with refused("params", "complex64"):
        hard_threshold(jnp.ones(2, jnp.complex64), 1, where=masks.everything)
    with refused("updates and params must have the same tree"):
        tx.update({"a": x}, state, x)
    with refused("updates and params must have the same shape"):
        tx.update(jnp.ones(4), state, x)
    with refused("gradients and params must have the same shape"):
        stability(x, jnp.ones(4), 2, 1.0)
    with refused("learning_rate must be a finite number > 0", "0"):
        stability(x, x, 2, 0)
    with refused("tolerance must be a finite number >= 0", "-1"):
        ht_stable(x, x, 2, 1.0, tolerance=-1)
