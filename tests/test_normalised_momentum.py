"""Normalised momentum against its formulas in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prunadag_optax import masks, pruning_aware, recipes, scale_by_normalised_momentum
from tests.helpers import enable_x64

SHAPES = {"a": {"bias": (3,), "kernel": (4, 3)}, "b": {"kernel": (3, 5)}}
B1, B2, EPS = 0.8, 0.95, 1e-6


def drawn(seed, make):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: make(rng, shape), SHAPES, is_leaf=lambda x: isinstance(x, tuple)
    )


def normal(rng, shape):
    return rng.normal(size=shape)


def transcription(gradients, relevant):
    """The steps: one v for the kernels, one a weight for the bias."""
    m, v = {}, {"kernels": 0.0, "bias": np.zeros(3)}
    for k, (g, inside) in enumerate(zip(gradients, relevant, strict=True), 1):
        kernels = g["a"]["kernel"], g["b"]["kernel"]
        counted = inside["a"]["kernel"], inside["b"]["kernel"]
        squares = sum((x[r] ** 2).sum() for x, r in zip(kernels, counted, strict=True))
        mean = squares / max(1, sum(r.sum() for r in counted))
        v["kernels"] = B2 * v["kernels"] + (1 - B2) * mean
        v["bias"] = B2 * v["bias"] + (1 - B2) * g["a"]["bias"] ** 2
        steps = {}
        for name, x, own in (
            ("a", kernels[0], "kernels"),
            ("b", kernels[1], "kernels"),
            ("bias", g["a"]["bias"], "bias"),
        ):
            m[name] = B1 * m.get(name, 0.0) + (1 - B1) * x
            root = np.sqrt(v[own] / (1 - B2**k))
            steps[name] = m[name] / (1 - B1**k) / (root + EPS)
        yield {
            "a": {"bias": steps["bias"], "kernel": steps["a"]},
            "b": {"kernel": steps["b"]},
        }


@pytest.mark.parametrize("given", [True, False])
def test_equals_the_transcription(given):
    gradients = [drawn(k, normal) for k in range(100)]
    share = [[1.0, 0.3, 0.0][k % 3] if given else 1.0 for k in range(100)]
    relevant = [
        drawn(200 + k, lambda rng, shape, p=p: rng.uniform(size=shape) < p)
        for k, p in enumerate(share)
    ]
    with enable_x64():
        tx = scale_by_normalised_momentum(B1, B2, EPS)
        params = jax.tree.map(jnp.asarray, drawn(1000, normal))
        state = tx.init(params)
        assert [x.size for x in jax.tree.leaves((state.nu, state.others))] == [1, 3]

        @jax.jit
        def update(g, state, inside):
            extra = {"relevant": inside} if given else {}
            return tx.update(g, state, params, **extra)

        for g, inside, expected in zip(
            gradients, relevant, transcription(gradients, relevant), strict=True
        ):
            steps, state = update(g, state, inside)
            jax.tree.map(
                lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-14),
                steps,
                expected,
            )


def test_a_loss_in_other_units_gives_the_same_steps():
    tx = scale_by_normalised_momentum(eps=0.0)
    params = jax.tree.map(jnp.float32, drawn(0, normal))
    first, second = tx.init(params), tx.init(params)
    for k in range(5):
        g = jax.tree.map(jnp.float32, drawn(1 + k, normal))
        steps, first = tx.update(g, first, params)
        # A power of two is exact.
        scaled, second = tx.update(jax.tree.map(lambda x: 1024 * x, g), second, params)
        jax.tree.map(np.testing.assert_array_equal, steps, scaled)


def test_only_relevant_gradients_are_averaged():
    params = {"kernel": jnp.array([[4.0, 3.0, 2.0, 1.0]])}
    g = {"kernel": jnp.array([[3.0, -3.0, 100.0, 100.0]])}
    tx = pruning_aware(
        optax.chain(scale_by_normalised_momentum(), optax.scale(-0.1)), 2
    )
    steps, state = tx.update(g, tx.init(params), params)
    np.testing.assert_allclose(steps["kernel"][0, :2], [-0.1, 0.1], rtol=1e-5)
    np.testing.assert_allclose(state.base[0].nu, 9 * 1e-3, rtol=1e-5)
    np.testing.assert_array_equal(state.base[0].mu["kernel"][0, 2:], 0)


def test_no_relevant_weight_and_no_gradient_make_no_step():
    params = {"kernel": jnp.ones((2, 2))}
    tx = scale_by_normalised_momentum()
    none = {"kernel": jnp.zeros((2, 2), bool)}
    for g in (params, jax.tree.map(jnp.zeros_like, params)):
        steps, _ = tx.update(
            jax.tree.map(jnp.zeros_like, g), tx.init(params), params, relevant=none
        )
        np.testing.assert_array_equal(steps["kernel"], 0)


@pytest.mark.parametrize("make", [recipes.any_sparsity, recipes.targeted])
def test_a_base_of_the_recipes(make):
    target = jnp.arange(12.0).reshape(3, 4) % 5
    params = {"kernel": jnp.ones((3, 4)) * 0.5}
    extra = {"sparsity": 0.5} if make is recipes.targeted else {}
    tx = make(400, base="normalised_momentum", learning_rate=0.05, **extra)

    @jax.jit
    def run(params):
        def step(carry, _):
            params, state = carry
            g = jax.tree.map(lambda x: x - target, params)
            updates, state = tx.update(g, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=400)[0]

    params, _ = run(params)
    pruned, mask = masks.prune(params, 0.5)
    assert (mask["kernel"] <= (target >= 2)).all()
    kept = jnp.where(mask["kernel"], target, 0)
    np.testing.assert_allclose(pruned["kernel"], kept, atol=0.1)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [({"b1": 1.0}, "b1"), ({"b2": -0.1}, "b2"), ({"eps": -1.0}, "eps"),
     ({"where": 3}, "where")],
)  # fmt: skip
def test_bad_arguments(arguments, name):
    with pytest.raises(ValueError, match=name):
        scale_by_normalised_momentum(**arguments)
