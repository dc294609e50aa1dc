"""CrAM+: its two gradients against a plain double call."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prunadag_optax import masks
from prunadag_optax.methods.cram import cram_plus
from tests.helpers import enable_x64, exact_leaves, refused

DENSITIES = (0.1, 0.3, 0.5, 0.8)
KEPT = (3, 8, 14, 22)  # of 27
SHAPES = {"bias": (3,), "first": (4, 3), "second": (3, 5)}


def loss(x, scale):
    """Not quadratic, so that gradients depend on where they are taken."""
    return sum(
        jnp.sum(scale * (leaf - 0.5 - i) ** 2 / 2 + jnp.cos(leaf))
        for i, leaf in enumerate(jax.tree.leaves(x))
    )


def gradient(x, scale):
    """That of `loss`, in NumPy."""
    return {
        name: scale * (leaf - 0.5 - i) - np.sin(leaf)
        for i, (name, leaf) in enumerate(sorted(x.items()))
    }


def plain(x, scale, kept, rho):
    """g + h of one step, and its mask, in float64."""
    g = gradient(x, scale)
    y = {name: x[name] + rho * g[name] for name in x}
    flat = np.concatenate([abs(y[name]).ravel() for name in ("first", "second")])
    least = np.sort(flat)[-kept]
    keep = {n: (abs(y[n]) >= least) | (n == "bias") for n in y}
    h = gradient({n: np.where(keep[n], y[n], 0) for n in y}, scale)
    return {n: g[n] + np.where(keep[n], h[n], 0) for n in y}


def tree(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("rho", [0.0, 0.05])
def test_is_what_numpy_makes_of_it(rho):
    start = tree(0)
    keys = jax.random.split(jax.random.key(0), 100)
    with enable_x64():
        scales = np.random.default_rng(1).uniform(0.5, 1.5, size=100)
        grad = cram_plus(jax.grad(loss), DENSITIES, rho=rho)
        tx = optax.sgd(0.01, momentum=0.5)

        @jax.jit
        def trained(x):
            def step(carry, inputs):
                x, state = carry
                updates, state = tx.update(grad(x, *inputs), state)
                return (optax.apply_updates(x, updates), state), None

            return jax.lax.scan(step, (x, tx.init(x)), (keys, scales))[0][0]

        found = trained(jax.tree.map(jnp.asarray, start))
        drawn = np.asarray(
            jax.vmap(lambda key: jax.random.randint(key, (), 0, 4))(keys)
        )
        assert set(drawn) == {0, 1, 2, 3}
        x, velocity = start, dict.fromkeys(start, 0.0)
        for scale, k in zip(scales, drawn, strict=True):
            total = plain(x, scale, KEPT[k], rho)
            velocity = {n: 0.5 * velocity[n] + total[n] for n in x}
            x = {n: x[n] - 0.01 * velocity[n] for n in x}
        for name in x:
            np.testing.assert_allclose(found[name], x[name], rtol=1e-10, atol=1e-12)


def with_average(x, batch):
    """A loss whose auxiliary output tells where it was taken."""
    return jnp.sum((x - batch) ** 2) / 2, {"average": x.mean()}


def test_value_and_auxiliary_output_are_of_the_clean_pass():
    x, batch, key = jnp.array([2.0, 1.0]), jnp.array([1.0, 1.0]), jax.random.key(0)

    def only(x, batch):
        return with_average(x, batch)[0]

    total = [2.05, 0.0]
    g = cram_plus(jax.grad(only), (0.5,))(x, key, batch)
    np.testing.assert_allclose(g, total, rtol=1e-6)
    g, aux = cram_plus(jax.grad(with_average, has_aux=True), (0.5,), has_aux=True)(
        x, key, batch
    )
    np.testing.assert_allclose(g, total, rtol=1e-6)
    assert float(aux["average"]) == 1.5
    value, g = cram_plus(jax.value_and_grad(only), (0.5,), value_and_grad=True)(
        x, key, batch
    )
    np.testing.assert_allclose(g, total, rtol=1e-6)
    assert float(value) == 0.5
    (value, aux), g = cram_plus(
        jax.value_and_grad(with_average, has_aux=True), (0.5,), value_and_grad=True
    )(x, key, batch=batch)
    np.testing.assert_allclose(g, total, rtol=1e-6)
    assert (float(value), float(aux["average"])) == (0.5, 1.5)


def points(densities, x, keys, jit, **settings):
    """Where `grad` is called, for each key."""
    found = []

    def grad(y):
        jax.debug.callback(lambda y: found.append(np.asarray(y)), y)
        return jnp.zeros_like(y)

    step = cram_plus(grad, densities, **settings)
    step = jax.jit(step) if jit else step
    for key in keys:
        jax.block_until_ready(step(x, key))
        jax.effects_barrier()
    return found


@pytest.mark.parametrize("jit", [True, False])
def test_densities_and_patterns_are_drawn(jit):
    x = exact_leaves("float32", 0)((8, 4)) + jnp.arange(2.0, 34.0).reshape(8, 4)
    keys = jax.random.split(jax.random.key(1), 12)
    found = points((0.25, "2:4", "1:4"), x, keys, jit)
    wanted = [
        masks.apply_mask(x, mask)
        for mask in (
            masks.magnitude_mask(x, 0.75),
            masks.n_m_mask(x, 2, 4),
            masks.n_m_mask(x, 1, 4),
        )
    ]
    drawn = [int(jax.random.randint(key, (), 0, 3)) for key in keys]
    assert set(drawn) == {0, 1, 2}
    assert len(found) == 2 * len(keys)
    for y, k in zip(found[1::2], drawn, strict=True):
        np.testing.assert_array_equal(y, wanted[k])
    np.testing.assert_array_equal(found[0], x)


def test_patterns_alone_need_no_ranking():
    x = exact_leaves("float32", 0)((8, 4))
    (_, y) = points(("2:4",), x, [jax.random.key(0)], True)
    np.testing.assert_array_equal(y, masks.apply_mask(x, masks.n_m_mask(x, 2, 4)))


def test_scores_scopes_and_budgets():
    x = jnp.arange(1.0, 33.0).reshape(8, 4)
    key = [jax.random.key(0)]
    (_, y) = points((0.25,), x, key, True, score=lambda params: 1 / params)
    np.testing.assert_array_equal(np.flatnonzero(y), range(8))
    (_, y) = points(("1:2",), x, key, True, score=lambda params: 1 / params)
    np.testing.assert_array_equal(np.flatnonzero(y.any(1)), [0, 2, 4, 6])
    (_, y) = points((0.25,), x, key, True, scope=lambda path, leaf: 1)
    np.testing.assert_array_equal((y != 0).sum(1), np.ones(8))


def test_budgets_by_layer():
    params = {"p": jnp.arange(1.0, 9.0).reshape(2, 4)}
    params["q"] = params["p"] / 100

    def kept(**settings):
        grad = cram_plus(lambda y: jax.tree.map(jnp.ones_like, y), (0.5,), **settings)
        total = grad(params, jax.random.key(0))
        return [int((total[leaf] == 2).sum()) for leaf in "pq"]

    assert kept(rho=0.0) == [8, 0]
    assert kept(rho=0.0, scope="leaf") == [4, 4]
    assert kept(rho=0.0, layer_budget={"p": 0.25}) == [2, 6]
    assert kept(rho=0.0, where=masks.named("q")) == [8, 4]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtypes_stay_and_members_of_an_ensemble_have_their_own(dtype):
    x = exact_leaves(dtype, 0)((2, 4, 3)) + jnp.arange(24).reshape(2, 4, 3).astype(
        dtype
    )
    step = cram_plus(lambda y: y / 8, (0.25, 0.5))
    keys = jax.random.split(jax.random.key(2), 2)
    total = jax.jit(jax.vmap(step))(x, keys)
    assert total.dtype == dtype
    for one, own, key in zip(total, x, keys, strict=True):
        np.testing.assert_array_equal(one, jax.jit(step)(own, key))


def test_bad_input_is_named():
    x, key = jnp.ones((2, 2)), jax.random.key(0)
    grad = jax.grad(lambda x: jnp.sum(x**2))
    with refused("grad must be a function", "got 1.0"):
        cram_plus(1.0, (0.5,))  # pyright: ignore
    with refused("densities must", "0.5"):
        cram_plus(grad, 0.5)  # pyright: ignore
    with refused("densities must hold at least one", "got none"):
        cram_plus(grad, ())
    with refused("densities must be", "got 1.5"):
        cram_plus(grad, (0.5, 1.5))
    with refused("densities must be", "got '4:2'"):
        cram_plus(grad, ("4:2",))
    with refused("rho must be", "got -1"):
        cram_plus(grad, (0.5,), rho=-1)
    with refused("score must be", "got 'largest'"):
        cram_plus(grad, (0.5,), score="largest")
    with refused("scope must be", "got 'all'"):
        cram_plus(grad, (0.5,), scope="all")
    with refused("layer_budget must be", "got 'even'"):
        cram_plus(grad, (0.5,), layer_budget="even")
    with refused("has_aux must be False with value_and_grad=True"):
        cram_plus(grad, (0.5,), value_and_grad=True, has_aux=True)
    with refused("key must be a key of jax.random"):
        cram_plus(grad, (0.5,))(x, 3)
    with refused("grad must return a pair"):
        cram_plus(grad, (0.5,), has_aux=True)(x, key)
    with refused("grad(params, ...) and params", "with value_and_grad=True"):
        cram_plus(jax.value_and_grad(lambda x: jnp.sum(x)), (0.5,))(x, key)
