"""Gradual magnitude pruning: the optimizer against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunadag_optax import masks, schedules
from prunadag_optax.methods.gradual_pruning import gradual_magnitude_pruning
from tests.helpers import enable_x64, refused

STEPS = 20
SHAPES = {"bias": (3,), "first": (4, 3), "second": (3, 5)}


def reference(params, gradients, *, rate, momentum, density, every):
    """Heavy-ball SGD in float64, one step for each gradient, matrices pruned."""
    x = {name: leaf.copy() for name, leaf in params.items()}
    velocity = {name: np.zeros_like(leaf) for name, leaf in x.items()}
    kept = {name: np.ones_like(leaf, bool) for name, leaf in x.items()}
    names = [name for name in sorted(x) if x[name].ndim > 1]
    size = sum(x[name].size for name in names)
    for count, gradient in enumerate(gradients):
        # Every so many steps, and where the density stops falling.
        ends = density(count) == density(count + every) < density(count - 1)
        if count % every == 0 or ends:
            flat = np.concatenate([abs(x[name]).ravel() for name in names])
            held = np.concatenate([kept[name].ravel() for name in names])
            # What is pruned goes first; of the others the smallest, lowest index first.
            order = np.argsort(np.where(held, flat, -1), kind="stable")
            held[order[: size - max(1, round(density(count) * size))]] = False
            begin = 0
            for name in names:
                part = held[begin : begin + x[name].size]
                kept[name] = part.reshape(x[name].shape)
                begin += x[name].size
        for name in x:
            g = np.where(kept[name], gradient[name], 0)
            velocity[name] = momentum * velocity[name] + g
            x[name] = np.where(kept[name], x[name] - rate * velocity[name], 0)
    return x, kept


def tree(rng):
    return {name: rng.normal(size=shape) for name, shape in SHAPES.items()}


@given(
    seed=st.integers(0, 2**20),
    every=st.integers(1, 4),
    final=st.sampled_from([1.0, 0.7, 0.5, 0.1, 0.01]),
)
@settings(max_examples=6, deadline=None)
def test_is_what_numpy_makes_of_it(seed, every, final):
    rng = np.random.default_rng(seed)
    params, gradients = tree(rng), [tree(rng) for _ in range(STEPS)]
    with enable_x64():
        # Of seven steps: none has a share of the 27 weights that ends in a half, which
        # the compiled schedule may round the other way.
        density = schedules.cubic_density(final, begin=2, end=9)
        tx = gradual_magnitude_pruning(
            optax.sgd(0.1, momentum=0.9), density, every=every
        )
        x = jax.tree.map(jnp.asarray, params)
        state = tx.init(x)
        update = jax.jit(tx.update)
        for gradient in gradients:
            updates, state = update(jax.tree.map(jnp.asarray, gradient), state, x)
            x = optax.apply_updates(x, updates)
        wanted, kept = reference(
            params,
            gradients,
            rate=0.1,
            momentum=0.9,
            density=lambda count: float(density(count)),
            every=every,
        )
        for name in SHAPES:
            np.testing.assert_allclose(x[name], wanted[name], rtol=1e-10, atol=1e-12)
            if name != "bias":
                np.testing.assert_array_equal(state.mask[name], kept[name])
    assert state.mask["bias"] is None


@pytest.mark.parametrize("scope", ["global", "leaf"])
def test_counts_are_exact_and_nothing_returns(scope):
    rng = np.random.default_rng(1)
    x = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree(rng))
    density = schedules.cubic_density(0.2, begin=1, end=9)
    tx = gradual_magnitude_pruning(optax.adamw(0.1), density, scope=scope)
    state, update = tx.init(x), jax.jit(tx.update)
    before = state.mask
    for count in range(STEPS):
        gradient = jax.tree.map(
            lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), x
        )
        updates, state = update(gradient, state, x)
        x = optax.apply_updates(x, updates)
        share = np.float32(density(count))  # the product is rounded in float32, too
        parts = {name: np.asarray(state.mask[name]) for name in ("first", "second")}
        kept = {name: int(part.sum()) for name, part in parts.items()}
        if scope == "leaf":
            assert kept == {
                n: round(share * np.float32(part.size)) for n, part in parts.items()
            }
        else:
            assert sum(kept.values()) == round(share * np.float32(27))
        for name, part in parts.items():
            assert not np.any(part & ~np.asarray(before[name]))
            # Exactly +0.
            zeros = np.asarray(x[name])[~part]
            assert np.all(zeros == 0)
            assert not np.any(np.signbit(zeros))
        before = state.mask
    assert int(state.count) == STEPS
    if scope == "global":
        np.testing.assert_allclose(masks.sparsity(state.mask), 22 / 27, rtol=1e-6)


@pytest.mark.parametrize(("final", "kept"), [(0.1, 100), (0.001, 1), (0.9, 900)])
def test_the_density_is_exact_at_both_ends(final, kept):
    x = jnp.arange(1.0, 1001.0)
    tx = gradual_magnitude_pruning(
        optax.sgd(0.0), schedules.cubic_density(final, begin=1, end=3)
    )
    state, found = tx.init(x), []
    for _ in range(5):
        _, state = jax.jit(tx.update)(x, state, x)
        found.append(int(state.mask.sum()))
    assert found[:2] == [1000, 1000]
    assert found[3:] == [kept, kept]


def test_weights_that_stay_move_as_the_base_moves_them():
    x = jnp.array([3.0, -0.1, 2.0, 0.2])
    gradient = jnp.array([0.5, 1.0, -1.0, 2.0])
    tx = gradual_magnitude_pruning(optax.sgd(0.1), lambda count: 0.5)
    updates, _ = tx.update(gradient, tx.init(x), x)
    plain, _ = optax.sgd(0.1).update(gradient, optax.sgd(0.1).init(x), x)
    np.testing.assert_array_equal(updates[jnp.array([0, 2])], plain[jnp.array([0, 2])])
    np.testing.assert_array_equal((x + updates)[jnp.array([1, 3])], [0.0, 0.0])


def test_a_density_that_rises_undoes_nothing():
    x = jnp.arange(1.0, 11.0)
    tx = gradual_magnitude_pruning(
        optax.sgd(0.0), lambda count: jnp.where(count == 0, 0.4, 0.8)
    )
    state = tx.init(x)
    for _ in range(3):
        updates, state = tx.update(jnp.ones(10), state, x)
        x = optax.apply_updates(x, updates)
    assert int((x == 0).sum()) == 6


def test_the_target_may_be_traced():
    x = jnp.arange(1.0, 21.0)

    @jax.jit
    def pruned(final):
        density = schedules.cubic_density(final, begin=0, end=3)
        tx = gradual_magnitude_pruning(optax.sgd(0.01), density)

        def step(carry, _):
            x, state = carry
            updates, state = tx.update(x, state, x)
            return (optax.apply_updates(x, updates), state), None

        (last, _), _ = jax.lax.scan(step, (x, tx.init(x)), length=5)
        return last

    for final in (0.5, 0.1):
        assert int((pruned(final) != 0).sum()) == round(20 * final)
    assert pruned._cache_size() == 1


def test_extra_arguments_reach_the_base():
    def update(updates, state, params=None, *, factor, **extra):
        return jax.tree.map(lambda g: factor * g, updates), state

    base = optax.GradientTransformationExtraArgs(lambda params: (), update)
    tx = gradual_magnitude_pruning(base, lambda count: 1.0)
    x = jnp.ones(3)
    updates, _ = tx.update(x, tx.init(x), x, factor=-2.0)
    np.testing.assert_array_equal(updates, [-2.0, -2.0, -2.0])


def test_biases_are_kept_unless_where_says_otherwise():
    x = {"bias": jnp.array([1.0, 2.0]), "kernel": jnp.array([[3.0, 4.0]])}
    for where, bias in ((None, [1, 2]), (masks.everything, [0, 0])):
        tx = gradual_magnitude_pruning(optax.sgd(0.0), lambda count: 0.5, where=where)
        updates, _ = tx.update(x, tx.init(x), x)
        np.testing.assert_array_equal((x["bias"] + updates["bias"]), bias)


def test_bad_input_is_named():
    base, density = optax.sgd(0.1), schedules.one_shot_density(0.5, step=0)
    with refused("every must be an integer >= 1; got 0"):
        gradual_magnitude_pruning(base, density, every=0)
    with refused("scope must be 'global', 'leaf' or a function", "got 'all'"):
        gradual_magnitude_pruning(base, density, scope="all")
    with refused("density must be a schedule", "got 0.5"):
        gradual_magnitude_pruning(base, 0.5)  # pyright: ignore
    tx = gradual_magnitude_pruning(base, density)
    with refused("updates and params must have the same tree"):
        tx.update({"a": jnp.ones(2)}, tx.init(jnp.ones(2)), jnp.ones(2))
