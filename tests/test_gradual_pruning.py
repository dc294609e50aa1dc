"""Gradual magnitude pruning: the schedules, and the optimizer against plain NumPy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunadag_optax import masks
from prunadag_optax._common.checks import NO_PARAMS_MSG
from prunadag_optax.methods import gradual_pruning as gradual
from prunadag_optax.methods.lottery_ticket import matrices
from tests.precision import enable_x64

STEPS = 20
SHAPES = {"bias": (3,), "first": (4, 3), "second": (3, 5)}


def cubic(count, final, begin, end, initial=0.0):
    u = min(max((count - begin) / (end - begin), 0), 1)
    return final + (initial - final) * (1 - u) ** 3


def reference(params, gradients, *, rate, momentum, sparsity, every):
    """Heavy-ball SGD in float64, one step for each gradient, matrices pruned."""
    x = {name: leaf.copy() for name, leaf in params.items()}
    velocity = {name: np.zeros_like(leaf) for name, leaf in x.items()}
    kept = {name: np.ones_like(leaf, bool) for name, leaf in x.items()}
    names = [name for name in sorted(x) if x[name].ndim > 1]
    size = sum(x[name].size for name in names)
    for count, gradient in enumerate(gradients):
        if count % every == 0:
            flat = np.concatenate([abs(x[name]).ravel() for name in names])
            held = np.concatenate([kept[name].ravel() for name in names])
            # What is pruned goes first; of the others the smallest, lowest index first.
            order = np.argsort(np.where(held, flat, -1), kind="stable")
            wanted = round(sparsity(count) * size)
            held[order[:wanted]] = False
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
    final=st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]),
)
@settings(max_examples=6, deadline=None)
def test_is_what_numpy_makes_of_it(seed, every, final):
    rng = np.random.default_rng(seed)
    params, gradients = tree(rng), [tree(rng) for _ in range(STEPS)]
    with enable_x64():
        schedule = gradual.cubic_sparsity(final, begin=2, end=8)
        tx = gradual.gradual_pruning(
            optax.sgd(0.1, momentum=0.9), schedule, every=every, where=matrices
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
            sparsity=lambda count: float(schedule(count)),
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
    schedule = gradual.cubic_sparsity(0.8, begin=1, end=9)
    tx = gradual.gradual_pruning(
        optax.adamw(0.1), schedule, scope=scope, where=matrices
    )
    state, update = tx.init(x), jax.jit(tx.update)
    before = state.mask
    for count in range(STEPS):
        gradient = jax.tree.map(
            lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), x
        )
        updates, state = update(gradient, state, x)
        x = optax.apply_updates(x, updates)
        share = float(schedule(count))
        parts = {name: np.asarray(state.mask[name]) for name in ("first", "second")}
        pruned = {name: int((~part).sum()) for name, part in parts.items()}
        if scope == "leaf":
            assert pruned == {n: round(share * part.size) for n, part in parts.items()}
        else:
            assert sum(pruned.values()) == round(share * 27)
        for name, part in parts.items():
            assert not np.any(part & ~np.asarray(before[name]))
            # Exactly +0.
            zeros = np.asarray(x[name])[~part]
            assert np.all(zeros == 0)
            assert not np.any(np.signbit(zeros))
        before = state.mask
    assert int(state.count) == STEPS
    np.testing.assert_allclose(masks.sparsity(state.mask), round(0.8 * 27) / 27, 0.05)


def test_weights_that_stay_move_as_the_base_moves_them():
    x = jnp.array([3.0, -0.1, 2.0, 0.2])
    gradient = jnp.array([0.5, 1.0, -1.0, 2.0])
    tx = gradual.gradual_pruning(optax.sgd(0.1), lambda count: 0.5)
    updates, _ = tx.update(gradient, tx.init(x), x)
    plain, _ = optax.sgd(0.1).update(gradient, optax.sgd(0.1).init(x), x)
    np.testing.assert_array_equal(updates[jnp.array([0, 2])], plain[jnp.array([0, 2])])
    np.testing.assert_array_equal((x + updates)[jnp.array([1, 3])], [0.0, 0.0])


def test_a_schedule_that_falls_undoes_nothing():
    x = jnp.arange(1.0, 11.0)
    tx = gradual.gradual_pruning(
        optax.sgd(0.0), lambda count: jnp.where(count == 0, 0.6, 0.2)
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
        schedule = gradual.cubic_sparsity(final, begin=0, end=3)
        tx = gradual.gradual_pruning(optax.sgd(0.01), schedule)

        def step(carry, _):
            x, state = carry
            updates, state = tx.update(x, state, x)
            return (optax.apply_updates(x, updates), state), None

        (last, _), _ = jax.lax.scan(step, (x, tx.init(x)), length=5)
        return last

    for final in (0.5, 0.9):
        assert int((pruned(final) == 0).sum()) == round(20 * final)
    assert pruned._cache_size() == 1


def test_extra_arguments_reach_the_base():
    def update(updates, state, params=None, *, factor, **extra):
        return jax.tree.map(lambda g: factor * g, updates), state

    base = optax.GradientTransformationExtraArgs(lambda params: (), update)
    tx = gradual.gradual_pruning(base, lambda count: 0.0)
    x = jnp.ones(3)
    updates, _ = tx.update(x, tx.init(x), x, factor=-2.0)
    np.testing.assert_array_equal(updates, [-2.0, -2.0, -2.0])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_updates_keep_the_dtype(dtype):
    x = jnp.array([1.0, -2.0, 0.5, 4.0], dtype)
    tx = gradual.gradual_pruning(optax.adam(0.1), lambda count: 0.25)
    updates, _ = tx.update(x, tx.init(x), x)
    assert updates.dtype == dtype
    assert float(optax.apply_updates(x, updates)[2]) == 0


def test_bad_input_is_named():
    schedule = gradual.cubic_sparsity(0.5, begin=0, end=3)
    with pytest.raises(ValueError, match="every must be a finite number >= 1; got 0"):
        gradual.gradual_pruning(optax.sgd(0.1), schedule, every=0)
    with pytest.raises(ValueError, match="scope must be 'global' or 'leaf'; got 'all'"):
        gradual.gradual_pruning(optax.sgd(0.1), schedule, scope="all")
    with pytest.raises(ValueError, match=r"schedule must be a function .* got 0\.5"):
        gradual.gradual_pruning(optax.sgd(0.1), 0.5)  # pyright: ignore
    with pytest.raises(ValueError, match=r"initial must be .*<= 0\.5; got 0\.6"):
        gradual.cubic_sparsity(0.5, begin=0, end=3, initial=0.6)
    tx = gradual.gradual_pruning(optax.sgd(0.1), schedule)
    with pytest.raises(ValueError, match="complex"):
        tx.init(jnp.ones(2, complex))
    with pytest.raises(ValueError, match=re.escape(NO_PARAMS_MSG)):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
    with pytest.raises(ValueError, match="updates"):
        tx.update({"a": jnp.ones(2)}, tx.init(jnp.ones(2)), jnp.ones(2))


@given(
    final=st.floats(0, 1),
    initial=st.floats(0, 1),
    begin=st.integers(0, 50),
    length=st.integers(1, 50),
    count=st.integers(0, 120),
)
@settings(max_examples=50, deadline=None)
def test_the_cubic_schedule(final, initial, begin, length, count):
    initial = min(initial, final)
    schedule = gradual.cubic_sparsity(
        final, begin=begin, end=begin + length, initial=initial
    )
    wanted = cubic(count, final, begin, begin + length, initial)
    np.testing.assert_allclose(float(schedule(count)), wanted, atol=1e-5)
