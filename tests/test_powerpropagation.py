"""Powerpropagation: the optimizer against one that keeps w, in plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunadag_optax import eval_params, masks, pruning_aware
from prunadag_optax.methods.powerpropagation import (
    from_weights,
    powerpropagation,
    reparameterised,
    to_weights,
)
from prunadag_optax.methods.straight_through import straight_through
from tests.helpers import enable_x64, exact_leaves, jitted, refused, scanned, vmapped

STEPS = 100
TARGET = np.array([[3.0, 0.1], [-2.0, 0.3]])


def reference(x, *, alpha, rate, momentum, weight_decay):
    """Heavy-ball SGD on |x - target|^2 / 2 that keeps w, in float64."""
    w, velocity = np.sign(x) * abs(x) ** (1 / alpha), np.zeros_like(x)
    for _ in range(STEPS):
        x = w * abs(w) ** (alpha - 1)
        g = alpha * abs(w) ** (alpha - 1) * (x - TARGET) + weight_decay * w
        velocity = momentum * velocity + g
        w = w - rate * velocity
    return w * abs(w) ** (alpha - 1), velocity


@given(
    seed=st.integers(0, 2**20),
    alpha=st.sampled_from([1.0, 1.5, 2.0, 3.0, 4.0]),
    weight_decay=st.sampled_from([0.0, 0.01]),
)
@settings(max_examples=6, deadline=None)
def test_is_what_numpy_makes_of_it(seed, alpha, weight_decay):
    # Signs of the target: near w = 0 the steps depend on w discontinuously.
    start = np.random.default_rng(seed).uniform(0.5, 1, TARGET.shape) * np.sign(TARGET)
    with enable_x64():
        base = optax.chain(
            optax.add_decayed_weights(weight_decay), optax.sgd(0.005, momentum=0.5)
        )
        tx = powerpropagation(base, alpha)

        @jax.jit
        def trained(x):
            def step(carry, _):
                x, state = carry
                updates, state = tx.update(x - TARGET, state, x)
                return (optax.apply_updates(x, updates), state), None

            return jax.lax.scan(step, (x, tx.init(x)), length=STEPS)[0]

        x, state = trained(jnp.asarray(start))
        wanted, velocity = reference(
            start, alpha=alpha, rate=0.005, momentum=0.5, weight_decay=weight_decay
        )
        np.testing.assert_allclose(x, wanted, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(
            state.base[1][0].trace, velocity, rtol=1e-10, atol=1e-10
        )


@pytest.mark.parametrize("alpha", [1.0, 1.5, 2.0, 4.0])
def test_the_gradient_is_the_chain_rule_s(alpha):
    w = jnp.array([-1.5, -0.25, 0.0, 0.5, 2.0])
    slopes = jax.grad(reparameterised(jnp.sum, alpha))(w)
    np.testing.assert_allclose(slopes, alpha * abs(w) ** (alpha - 1), rtol=1e-6)
    step = 1e-3
    differences = (to_weights(w + step, alpha) - to_weights(w - step, alpha)) / 2e-3
    np.testing.assert_allclose(slopes[w != 0], differences[w != 0], rtol=2e-3)
    # The derivative by alpha, where w = 0 too.
    log = jax.grad(lambda alpha: jnp.sum(to_weights(w, alpha)))(alpha)
    wanted = sum(v * abs(v) ** (alpha - 1) * np.log(abs(v)) for v in w.tolist() if v)
    np.testing.assert_allclose(log, wanted, rtol=1e-5)


@pytest.mark.parametrize("base", [optax.sgd(0.01, momentum=0.5), optax.adam(0.01)])
def test_both_forms_take_the_same_steps(base):
    """The optimizer on x, and any optimizer on the reparameterised loss."""
    x = {"kernel": exact_leaves("float32", 0)((4, 3)) + 2, "bias": jnp.ones((1, 3))}

    def loss(params, batch):
        return jnp.sum(jnp.tanh(batch @ params["kernel"] + params["bias"]) ** 2)

    batches = jnp.stack([exact_leaves("float32", s)((5, 4)) for s in range(1, 21)])
    tx = powerpropagation(base, 3.0)

    @jax.jit
    def both(x):
        def step(carry, batch):
            x, state, w, own = carry
            updates, state = tx.update(jax.grad(loss)(x, batch), state, x)
            x = optax.apply_updates(x, updates)
            g = jax.grad(reparameterised(loss, 3.0))(w, batch)
            updates, own = base.update(g, own, w)
            return (x, state, optax.apply_updates(w, updates), own), None

        w = from_weights(x, 3.0)
        start = x, tx.init(x), w, base.init(w)
        return jax.lax.scan(step, start, batches)[0]

    x, state, w, own = both(x)
    for a, b in (
        *zip(jax.tree.leaves(x), jax.tree.leaves(to_weights(w, 3.0)), strict=True),
        *zip(jax.tree.leaves(state.base), jax.tree.leaves(own), strict=True),
    ):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5)


@given(
    alpha=st.floats(1, 5),
    values=st.lists(
        st.floats(-100, 100, width=32, allow_subnormal=False), min_size=1, max_size=8
    ),
)
@settings(max_examples=25, deadline=None)
def test_to_and_from_are_inverse(alpha, values):
    values = [v for v in values if abs(v) > 1e-6] or [0.0]
    x = jnp.asarray(np.pad(np.float32(values), (0, 8 - len(values))))
    w = from_weights(x, alpha)
    np.testing.assert_allclose(to_weights(w, alpha), x, rtol=1e-5)
    np.testing.assert_array_equal(jnp.sign(w), jnp.sign(x))


def test_only_what_is_chosen_is_a_power():
    x = {"kernel": jnp.full((2, 2), 4.0), "bias": jnp.full(2, 4.0)}
    w = from_weights(x)
    assert (float(w["kernel"][0, 0]), float(w["bias"][0])) == (2.0, 4.0)
    w = from_weights(x, where=masks.everything)
    assert float(w["bias"][0]) == 2.0
    tx = powerpropagation(optax.sgd(0.125))
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, x), tx.init(x), x)
    # w: 2 - 4 / 8 = 1.5, squared; the bias takes the base's step.
    assert float(x["kernel"][0, 0] + updates["kernel"][0, 0]) == 2.25
    assert float(updates["bias"][0]) == -0.125


def test_without_a_step_nothing_moves():
    x = exact_leaves("float32", 0)((16, 16)) / 3
    tx = powerpropagation(optax.sgd(0.0), 3.0)
    moved, *_ = jitted(tx, x, [jnp.ones_like(x)] * 3)
    np.testing.assert_array_equal(moved, x)


def test_what_is_pruned_stays_so():
    x = jnp.array([4.0, 1.0, -0.25, 0.0625])
    tx = powerpropagation(optax.sgd(0.125))
    pruned, _ = masks.prune(x, 0.5)
    moved, *_ = jitted(tx, pruned, [jnp.ones(4)] * 3)
    assert bool((moved[2:] == 0).all())
    assert bool((moved[:2] != pruned[:2]).all())


@pytest.mark.parametrize("outer", [pruning_aware, straight_through])
def test_is_a_base_of_what_prunes(outer):
    x = jnp.array([4.0, -3.0, 0.5, 0.25])
    tx = outer(powerpropagation(optax.sgd(0.0625)), 0.5)
    gradients = [jnp.array([1.0, 1.0, 0.0, 0.0])] * 3
    moved, _, state = jitted(tx, x, gradients)
    alone, *_ = jitted(powerpropagation(optax.sgd(0.0625)), x, gradients)
    np.testing.assert_allclose(moved[:2], alone[:2], rtol=1e-6)
    assert bool((eval_params(state, moved)[:2] == moved[:2]).all())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("run", [scanned, vmapped])
def test_dtypes_stay_in_every_loop(run, dtype):
    leaf = exact_leaves(dtype, 0)
    params = {"kernel": leaf((4, 3)) + 2, "bias": leaf((3,))}
    gradients = [
        jax.tree.map(lambda x, s=s: exact_leaves(dtype, s)(x.shape), params)
        for s in range(1, 4)
    ]
    tx = powerpropagation(optax.adam(0.125), 2.0)
    x, _, state = run(tx, params, gradients)
    y, *_ = jitted(tx, params, gradients)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(x)} == {dtype}
    assert state.base[0].mu["kernel"].dtype == jnp.float32
    for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
        np.testing.assert_allclose(
            np.asarray(a, "float32"),
            np.asarray(b, "float32"),
            rtol=4 * float(jnp.finfo(dtype).eps),
        )


def test_bad_input_is_named():
    base, x = optax.sgd(0.1), jnp.ones(3)
    for call in (
        lambda: powerpropagation(base, 0.5),
        lambda: to_weights(x, 0.5),
        lambda: from_weights(x, 0.5),
        lambda: reparameterised(jnp.sum, 0.5),
    ):
        with refused("alpha must be", "got 0.5"):
            call()
    with refused("loss must be a function", "got 1.0"):
        reparameterised(1.0)  # pyright: ignore
    with refused("base must be an optax transformation"):
        powerpropagation(0.1)  # pyright: ignore
    with refused("base must not keep a copy", "GradientAtPrunedState"):
        powerpropagation(pruning_aware(base, 0.5, gradient_at="pruned")).init(x)
    with refused("base must not keep a copy", "ScheduleFreeState"):
        powerpropagation(optax.contrib.schedule_free_sgd(0.1)).init(x)
    with refused("must choose at least one leaf"):
        powerpropagation(base).init({"bias": x})
    with refused("params"):
        tx = powerpropagation(base)
        tx.update(x, tx.init(x))
