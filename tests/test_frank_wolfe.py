"""Frank-Wolfe: the balls, their linear minimisers, and the steps.

The references are plain NumPy: the k-support norm by its sorted formula, the minimiser
by trying every support, and the three methods one equation at a time.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from prunadag_optax.methods import balls, frank_wolfe
from tests.helpers import enable_x64, refused, run

SIZE = 7
BALLS = ("k_support", "k_sparse")
LMO = {"k_support": balls.lmo_k_support, "k_sparse": balls.lmo_k_sparse}
NORM = {"k_support": balls.k_support_norm, "k_sparse": balls.k_sparse_norm}
RESCALE = (None, "diameter", "gradient", "fast_gradient", "relevant")

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


def reference_norm(ball: str, x: np.ndarray, k: int) -> float:
    """The norm by sorted magnitudes."""
    a = np.sort(np.abs(x))[::-1]
    if ball == "k_sparse":
        return max(a[0], a.sum() / k)
    # Argyriou, Foygel, Srebro (2012), proposition 2.1; a_0 is infinite.
    padded = np.concatenate([[np.inf], a])
    for r in range(k):
        s = padded[k - r :].sum()
        if padded[k - r - 1] > s / (r + 1) * (1 + 1e-13) or r == k - 1:
            break
    return np.sqrt(np.sum(a[: k - r - 1] ** 2) + s**2 / (r + 1))


def reference_lmo(ball: str, m: np.ndarray, radius: float, k: int) -> np.ndarray:
    v, order = np.zeros(m.size), np.argsort(np.abs(m), kind="stable")
    largest = order[m.size - k :]
    if ball == "k_sparse":
        v[largest] = -radius * np.sign(m[largest])
    elif np.any(m):
        v[largest] = -radius * m[largest] / np.linalg.norm(m[largest])
    return v


def extreme_points(ball: str, m: np.ndarray, radius: float, k: int) -> list:
    """The best point of the ball on every support of k components."""
    points = []
    for support in map(list, itertools.combinations(range(m.size), k)):
        v = np.zeros(m.size)
        if ball == "k_sparse":
            v[support] = -radius * np.sign(m[support])
        elif np.any(m[support]):
            v[support] = -radius * m[support] / np.linalg.norm(m[support])
        points.append(v)
    return points


def quadratic(seed, n=12, m=9):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(m, n))
    b = a @ rng.normal(size=n)
    return lambda x: a.T @ (a @ x - b)


# The balls.


@few
@given(vectors, counts)
@pytest.mark.parametrize("ball", BALLS)
def test_norm_is_the_sorted_formula(ball, x, k):
    np.testing.assert_allclose(
        NORM[ball](x, k), reference_norm(ball, x, k), rtol=1e-12, atol=1e-300
    )


@few
@given(vectors)
def test_the_extreme_counts_are_the_l1_and_the_other_norm(x):
    l1, l2 = np.abs(x).sum(), np.linalg.norm(x)
    largest = np.abs(x).max()
    for ball, last in (("k_support", l2), ("k_sparse", max(largest, l1 / SIZE))):
        np.testing.assert_allclose(NORM[ball](x, 1), l1, rtol=1e-12)
        np.testing.assert_allclose(NORM[ball](x, SIZE), last, rtol=1e-12, atol=1e-300)


@few
@given(vectors, vectors, counts, st.floats(-5, 5))
@pytest.mark.parametrize("ball", BALLS)
def test_norm_is_a_norm(ball, x, y, k, factor):
    norm = NORM[ball]
    assert norm(x + y, k) <= (norm(x, k) + norm(y, k)) * (1 + 1e-12) + 1e-12
    np.testing.assert_allclose(
        norm(factor * x, k), abs(factor) * norm(x, k), rtol=1e-10, atol=1e-10
    )
    # The ball grows with k.
    assert norm(x, min(k + 1, SIZE)) <= norm(x, k) * (1 + 1e-12)


@few
@given(vectors, counts)
def test_norm_of_a_sparse_vector_is_its_length(x, k):
    sparse = np.where(np.arange(SIZE) < k, x, 0)
    np.testing.assert_allclose(
        balls.k_support_norm(sparse, k),
        np.linalg.norm(sparse),
        rtol=1e-12,
        atol=1e-300,
    )


@few
@given(vectors, counts, st.floats(0.1, 100))
@pytest.mark.parametrize("ball", BALLS)
def test_minimiser_is_the_best_of_all_supports(ball, m, k, radius):
    v = np.asarray(LMO[ball](m, radius, k))
    assert np.count_nonzero(v) <= k
    np.testing.assert_allclose(v, reference_lmo(ball, m, radius, k), rtol=1e-12)
    assert NORM[ball](v, k) <= radius * (1 + 1e-12)
    best = min(point @ m for point in extreme_points(ball, m, radius, k))
    np.testing.assert_allclose(v @ m, best, rtol=1e-12, atol=1e-300)


@few
@given(vectors, st.floats(0.1, 100))
@pytest.mark.parametrize("ball", BALLS)
def test_the_extreme_counts_are_vertices_of_the_l1_and_points_of_the_other_ball(
    ball, m, radius
):
    m = np.concatenate([[2 * np.abs(m).max() + 1], m[1:]])  # one vertex only
    first = np.where(np.arange(SIZE) == 0, -radius, 0)
    np.testing.assert_allclose(LMO[ball](m, radius, 1), first, rtol=1e-12)
    # The Euclidean ball and the cube.
    last = m / np.linalg.norm(m) if ball == "k_support" else np.sign(m)
    np.testing.assert_allclose(LMO[ball](m, radius, SIZE), -radius * last, rtol=1e-12)


@few
@given(vectors, vectors, counts)
@pytest.mark.parametrize("ball", BALLS)
def test_no_point_of_the_ball_is_better(ball, m, x, k):
    # <x, m> <= ||x|| ||m||_*, with the dual norm -<v, m> at radius 1.
    dual = -np.asarray(LMO[ball](m, 1.0, k)) @ m
    assert x @ m <= float(NORM[ball](x, k)) * dual * (1 + 1e-12) + 1e-9


@pytest.mark.parametrize("ball", BALLS)
def test_norm_is_attained_by_the_dual(ball):
    # ||x|| = max <x, m> over m of dual norm 1; its gradient is such an m.
    x = np.random.default_rng(0).normal(size=SIZE)
    for k in range(1, SIZE + 1):
        m = np.asarray(jax.grad(NORM[ball])(x, k))
        np.testing.assert_allclose(m @ x, NORM[ball](x, k), rtol=1e-12)
        dual = -np.asarray(LMO[ball](m, 1.0, k)) @ m
        np.testing.assert_allclose(dual, 1, rtol=1e-12)


def test_tiny_gradients_have_a_minimiser_of_full_length():
    m = jnp.array([3e-30, -1e-30, -4e-30], jnp.float32)
    v = balls.lmo_k_support(m, 10.0, 2)
    np.testing.assert_allclose(v, [-6, 0, 8], rtol=1e-6)


@pytest.mark.parametrize("ball", BALLS)
def test_ties_leave_exactly_k(ball):
    v = LMO[ball](jnp.ones(6), 1.0, 4)
    assert np.count_nonzero(v) == 4
    np.testing.assert_allclose(NORM[ball](v, 4), 1, rtol=1e-6)


@pytest.mark.parametrize("ball", BALLS)
def test_a_tree_is_one_vector(ball):
    rng = np.random.default_rng(1)
    tree = {"a": rng.normal(size=(2, 3)), "b": [rng.normal(size=4), np.zeros((0, 2))]}
    flat = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])
    np.testing.assert_allclose(NORM[ball](tree, 3), NORM[ball](flat, 3), rtol=1e-12)
    v = LMO[ball](tree, 2.0, 3)
    assert jax.tree.structure(v) == jax.tree.structure(tree)
    v = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(v)])
    np.testing.assert_allclose(v, LMO[ball](flat, 2.0, 3), rtol=1e-12)


@pytest.mark.parametrize("ball", BALLS)
def test_diameter_is_the_distance_of_opposite_points(ball):
    m = np.random.default_rng(2).normal(size=SIZE)
    v = np.asarray(LMO[ball](m, 3.0, 4))
    np.testing.assert_allclose(
        np.linalg.norm(2 * v), balls.diameter(3.0, 4, ball), rtol=1e-12
    )


# The steps.


def reference_run(gradient, x, steps, radius, k, step_size):
    """The deterministic methods of the article, in NumPy."""
    path = [x]
    for count in range(steps):
        g = gradient(x)
        relevant = np.argsort(np.abs(g), kind="stable")[-k:]
        norm = np.linalg.norm(g[relevant])
        v = np.zeros(x.size)
        v[relevant] = -radius * g[relevant] / norm
        x = x + step_size(count, norm, np.linalg.norm(v - x)) * (v - x)
        path.append(x)
    return path


@pytest.mark.parametrize("seed", range(3))
def test_fw1_and_fw2_are_the_articles(seed):
    gradient = quadratic(seed)
    x = np.random.default_rng(seed).normal(size=12)
    for tx, radius, step_size in (
        (frank_wolfe.fw1(6.0, 4), 6.0, lambda k, norm, distance: 1 / (k + 1)),
        (
            frank_wolfe.fw2(9.0, 4, 0.02),
            9.0,
            lambda k, norm, distance: min(0.02 * norm / distance, 1),
        ),
    ):
        path = run(tx, gradient, jnp.asarray(x), 20)
        expected = reference_run(gradient, x, 20, radius, 4, step_size)
        np.testing.assert_allclose(path, expected, rtol=1e-10, atol=1e-12)


def reference_stochastic(gradient, x, steps, radius, k, lr, options):
    """The stochastic form on one leaf, in NumPy."""
    ball, rescale = options["ball"], options["rescale"]
    rho, damp = options["momentum"], options["dampening"]
    diameter = 2 * radius * (np.sqrt(k) if ball == "k_sparse" else 1)
    m, path = None, [x]
    for count in range(steps):
        g = gradient(x)
        m = g if m is None or rho is None else rho * m + (1 - damp) * g
        v = reference_lmo(ball, m, radius, k)
        distance = np.linalg.norm(v - x)
        factor = {
            None: 1,
            "diameter": 1 / diameter,
            "gradient": np.linalg.norm(m) / distance,
            "fast_gradient": np.linalg.norm(m) / (diameter / 2),
            "relevant": np.linalg.norm(m[v != 0]) / distance,
        }[rescale]
        x = x + min(max(lr(count) * factor, 0), 1) * (v - x)
        path.append(x)
    return path


@pytest.mark.parametrize("ball", BALLS)
@pytest.mark.parametrize("rescale", RESCALE)
@pytest.mark.parametrize(("momentum", "dampening"), [(None, 0), (0.8, 0), (0.8, 0.8)])
def test_stochastic_form_is_its_transcription(ball, rescale, momentum, dampening):
    options = {
        "ball": ball,
        "rescale": rescale,
        "momentum": momentum,
        "dampening": dampening,
    }
    gradient, start = quadratic(4), np.random.default_rng(4).normal(size=12)

    # About as long steps in every scale.
    scale = {None: 0.3, "diameter": 2.0}.get(rescale, 0.02)

    def lr(count):
        return scale / (count + 2.0)

    tx = frank_wolfe.conditional_gradient(lr, 4.0, 0.25, **options)
    path = run(tx, gradient, jnp.asarray(start), 20)
    expected = reference_stochastic(gradient, start, 20, 4.0, 3, lr, options)
    np.testing.assert_allclose(path, expected, rtol=1e-10, atol=1e-12)


@few
@given(vectors, vectors, counts)
@pytest.mark.parametrize("ball", BALLS)
def test_iterates_stay_in_the_ball(ball, x, g, k):
    x = balls.make_feasible(x, 2.0, k, ball=ball)
    assert NORM[ball](x, k) <= 2 * (1 + 1e-12)
    tx = frank_wolfe.conditional_gradient(0.3, 2.0, k, ball=ball)
    state = tx.init(x)
    for gradient in (g, -g[::-1]):
        updates, state = tx.update(gradient, state, x)
        x = optax.apply_updates(x, updates)
        assert NORM[ball](x, k) <= 2 * (1 + 1e-12)


@pytest.mark.parametrize("ball", BALLS)
def test_feasible_points_are_left_alone_and_others_scaled_to_the_border(ball):
    x = np.random.default_rng(3).normal(size=SIZE)
    norm = float(NORM[ball](x, 3))
    same = balls.make_feasible(x, 2 * norm, 3, ball=ball)
    np.testing.assert_array_equal(same, x)
    np.testing.assert_allclose(
        balls.make_feasible(x, norm / 2, 3, ball=ball), x / 2, rtol=1e-12
    )


@few
@given(vectors, vectors, counts)
@pytest.mark.parametrize("ball", BALLS)
def test_gradient_rescaling_moves_as_far_as_sgd(ball, x, g, k):
    tx = frank_wolfe.conditional_gradient(1e-4, 5.0, k, ball=ball, momentum=None)
    updates, _ = tx.update(g, tx.init(x), x)
    v = np.asarray(LMO[ball](g, 5.0, k))
    expected = min(1e-4 * np.linalg.norm(g), np.linalg.norm(v - x))
    np.testing.assert_allclose(np.linalg.norm(updates), expected, rtol=1e-10)


def test_a_step_is_never_longer_than_the_way_to_the_vertex():
    x, g = jnp.array([0.1, -0.2, 0.3]), jnp.array([5.0, 1.0, -2.0])
    tx = frank_wolfe.conditional_gradient(1e6, 1.0, 2)
    updates, _ = tx.update(g, tx.init(x), x)
    v = balls.lmo_k_support(g, 1.0, 2)
    np.testing.assert_allclose(x + updates, v, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("rescale", RESCALE)
def test_at_the_vertex_nothing_moves(rescale):
    g = jnp.array([5.0, 1.0, -2.0])
    x = balls.lmo_k_support(g, 1.0, 2)
    tx = frank_wolfe.conditional_gradient(0.1, 1.0, 2, rescale=rescale)
    updates, _ = tx.update(g, tx.init(x), x)
    np.testing.assert_array_equal(updates, jnp.zeros(3))


@pytest.mark.parametrize("scope", ["leaf", "global"])
def test_scopes(scope):
    # "leaf" is each leaf on its own, "global" the leaves as one vector.
    rng = np.random.default_rng(5)
    x = {"a": rng.normal(size=(3, 2)), "b": rng.normal(size=4)}
    g = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), x)
    radius = {"a": 2.0, "b": 7.0} if scope == "leaf" else 2.0
    tx = frank_wolfe.conditional_gradient(0.1, radius, 0.5, scope=scope)
    updates, _ = tx.update(g, tx.init(x), x)

    def alone(x, g, r):
        tx = frank_wolfe.conditional_gradient(0.1, r, 0.5)
        return tx.update(g.ravel(), tx.init(x.ravel()), x.ravel())[0]

    def flat(tree):
        return np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])

    if scope == "leaf":
        expected = flat(jax.tree.map(alone, x, g, radius))
    else:
        expected = alone(flat(x), flat(g), radius)
    np.testing.assert_allclose(flat(updates), expected, rtol=1e-12)


def test_every_leaf_keeps_at_least_one_and_at_most_all():
    x = {"bias": jnp.ones(2), "kernel": jnp.ones(40), "nothing": jnp.ones(0)}
    g = jax.tree.map(lambda leaf: jnp.arange(leaf.size) + 1.0, x)
    for support, expected in ((0.1, [1, 4, 0]), (5, [2, 5, 0])):
        tx = frank_wolfe.conditional_gradient(1e9, 1.0, support)
        updates, _ = tx.update(g, tx.init(x), x)
        moved = optax.apply_updates(x, updates)
        number = [int(jnp.sum(jnp.abs(v) > 1e-9)) for v in jax.tree.leaves(moved)]
        assert number == expected


def test_fw1_solves_a_problem_whose_solution_is_in_the_ball():
    gradient = quadratic(7, n=6, m=12)
    solution = run(optax.sgd(0.02), gradient, jnp.zeros(6), 3000)[-1]
    np.testing.assert_allclose(gradient(solution), np.zeros(6), atol=1e-8)
    radius = 1.5 * float(balls.k_support_norm(solution, 2))
    x = run(frank_wolfe.fw1(radius, 2), gradient, jnp.zeros(6), 2000)[-1]
    start = np.linalg.norm(gradient(np.zeros(6)))
    assert np.linalg.norm(gradient(x)) < 0.02 * start


@pytest.mark.parametrize("ball", BALLS)
def test_radii_of_initialisations(ball):
    def init(key):
        return {"w": 3 * jax.random.normal(key, (20, 5)), "b": jnp.zeros(4)}

    key = jax.random.key(0)
    norms = [np.linalg.norm(init(k)["w"]) for k in jax.random.split(key, 10)]
    for scope, means in (
        ("leaf", {"w": np.mean(norms), "b": 1}),
        ("global", np.mean(norms)),
    ):
        radii = balls.initialization_radius(
            init, key, 0.5, width=4.0, ball=ball, scope=scope, samples=10
        )
        sizes = {"w": 50, "b": 2} if scope == "leaf" else 52
        diameters = jax.tree.map(
            lambda r, k: float(balls.diameter(r, k, ball)), radii, sizes
        )
        expected = jax.tree.map(lambda mean: float(2 * 4 * mean), means)
        assert diameters == pytest.approx(expected, rel=1e-12)


# In optax.


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("rescale", RESCALE)
@pytest.mark.parametrize("ball", BALLS)
def test_dtypes_are_kept(dtype, rescale, ball):
    # Squares of such gradients are infinite in float16.
    x, g = jnp.array([1.0, -2.0, 3.0], dtype), jnp.array([1e3, 2e3, 3e3], dtype)
    tx = frank_wolfe.conditional_gradient(0.01, 2.0, 2, rescale=rescale, ball=ball)
    before = tx.init(x)
    updates, after = tx.update(g, before, x)
    assert updates.dtype == x.dtype
    assert after.mu.dtype == before.mu.dtype == x.dtype
    assert bool(jnp.all(jnp.isfinite(updates)))
    if dtype in ("float16", "bfloat16"):
        wide = frank_wolfe.conditional_gradient(
            0.01, 2.0, 2, rescale=rescale, ball=ball, accumulator_dtype="float32"
        )
        updates, after = wide.update(g, wide.init(x), x)
        assert updates.dtype == x.dtype
        assert after.mu.dtype == jnp.float32


SUPPORT = "support must be a fraction in (0, 1] as a float or a count >= 1"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"learning_rate": -1}, ["learning_rate must be a finite number >= 0", "-1"]),
        ({"radius": 0.0}, ["radius must be a finite number > 0", "0.0"]),
        ({"radius": {"a": 1.0, "b": -2}}, ["radius['b'] must be a finite", "-2"]),
        (
            {"radius": {"a": 1.0}, "scope": "global"},
            ["radius must be a finite number > 0; got {'a': 1.0}"],
        ),
        ({"support": 0}, [SUPPORT, "got 0."]),
        ({"support": 1.5}, [SUPPORT, "got 1.5."]),
        ({"support": True}, [SUPPORT, "got True."]),
        ({"support": "all"}, [SUPPORT, "got 'all'."]),
        ({"ball": "l2"}, ["ball must be 'k_support' or 'k_sparse'; got 'l2'."]),
        ({"rescale": "norm"}, ["rescale must be 'diameter' or 'gradient'", "'norm'"]),
        ({"momentum": 1.0}, ["momentum must be a finite number >= 0 and < 1", "1.0"]),
        ({"dampening": 2}, ["dampening must be a finite number >= 0 and <= 1", "2"]),
        ({"scope": "tree"}, ["scope must be 'leaf' or 'global'; got 'tree'."]),
        ({"accumulator_dtype": int}, ["accumulator_dtype must be None or one of"]),
    ],
)
def test_bad_arguments(arguments, parts):
    good = {"learning_rate": 0.1, "radius": 1.0, "support": 2}
    frank_wolfe.conditional_gradient(**good)
    with refused(*parts):
        frank_wolfe.conditional_gradient(**(good | arguments))


def test_bad_trees():
    x = jnp.ones(3)
    tx = frank_wolfe.conditional_gradient(0.1, 1.0, 2)
    state = tx.init(x)
    with refused("updates and params must have the same shape"):
        tx.update(jnp.ones(4), state, x)
    with refused("state.mu and params must have the same shape"):
        tx.update(jnp.ones(4), state, jnp.ones(4))
    with refused("radius must be a number > 0 or a pytree", "structure of params"):
        tx = frank_wolfe.conditional_gradient(0.1, {"a": 1.0}, 2)
        tx.update({"b": x}, tx.init({"b": x}), {"b": x})
    with refused("width must be a finite number > 0", "-1"):
        balls.initialization_radius(jnp.ones, None, 2, width=-1)
    key = jax.random.key(0)
    with refused("samples must be an integer >= 1", "0"):
        balls.initialization_radius(jnp.ones, key, 2, width=1, samples=0)
    with refused("ball must be 'k_support' or 'k_sparse'"):
        balls.diameter(1.0, 2, "l1")
