"""Straight-through pruning: the optimizer against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunadag_optax import eval_params, masks, pruning_aware, schedules
from prunadag_optax.methods.straight_through import straight_through
from tests.helpers import (
    donated,
    eager,
    enable_x64,
    exact_leaves,
    jitted,
    refused,
    scanned,
    vmapped,
)

STEPS = 100
TARGET = np.array([[3.0, 0.1, 0.2], [-2.0, 0.3, -1.0]])


def reference(x, counts, *, rate, momentum, weight_decay):
    """Heavy-ball SGD on |y - target|^2 / 2 at the pruned y, in float64."""
    x, velocity, held = x.copy(), np.zeros_like(x), x.copy()
    for count in counts:
        g = held - TARGET + weight_decay * x
        velocity = momentum * velocity + g
        x = x - rate * velocity
        least = np.sort(abs(x).ravel())[-count]
        held = np.where(abs(x) >= least, x, 0)
    return x, held


@given(
    seed=st.integers(0, 2**20),
    final=st.sampled_from([1, 2, 4, 6]),
    falls=st.booleans(),
)
@settings(max_examples=6, deadline=None)
def test_is_what_numpy_makes_of_it(seed, final, falls):
    start = np.random.default_rng(seed).normal(size=TARGET.shape)
    counts = [max(final, 6 - k // 10) if falls else final for k in range(1, 101)]
    with enable_x64():

        def density(count):
            return jnp.maximum(final, 6 - count // 10) if falls else final

        base = optax.chain(
            optax.add_decayed_weights(0.1), optax.sgd(0.05, momentum=0.5)
        )
        tx = straight_through(base, density if falls else final)
        x = jnp.asarray(start)

        @jax.jit
        def trained(x):
            def step(carry, _):
                x, state = carry
                updates, state = tx.update(x - TARGET, state, x)
                return (optax.apply_updates(x, updates), state), None

            return jax.lax.scan(step, (x, tx.init(x)), length=STEPS)[0]

        held, state = trained(x)
        dense, pruned = reference(
            start, counts, rate=0.05, momentum=0.5, weight_decay=0.1
        )
        np.testing.assert_allclose(state.dense, dense, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(held, pruned, rtol=1e-10, atol=1e-12)
        np.testing.assert_array_equal(held == 0, pruned == 0)
        np.testing.assert_array_equal(eval_params(state, held), state.dense)
    assert int(state.count) == STEPS


def test_with_the_density_1_it_is_the_base():
    x = exact_leaves("float32", 0)((4, 3))
    gradients = [exact_leaves("float32", seed)((4, 3)) for seed in range(1, 4)]
    base = optax.adam(0.1)
    for theirs, ours in zip(
        eager(base, x, gradients),
        eager(straight_through(base, 1.0), x, gradients),
        strict=True,
    ):
        ours = getattr(ours, "base", ours)
        for a, b in zip(jax.tree.leaves(theirs), jax.tree.leaves(ours), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_pruned_weights_move_where_those_of_pruning_aware_do_not():
    x = jnp.array([2.0, 1.0])
    gradients = [jnp.array([0.0, -1.0])] * 3  # the second weight is to grow
    kept = {}
    for name, tx in {
        "both": straight_through(optax.sgd(0.5), 0.5),
        "relevant": pruning_aware(
            optax.sgd(0.5), 0.5, shrink_rate=0.0, gradient_at="pruned"
        ),
    }.items():
        held, _, state = jitted(tx, x, gradients)
        kept[name] = held.tolist(), eval_params(state, held).tolist()
    # R_0 is everything; then only the first is relevant.
    assert kept["both"] == ([0.0, 2.5], [2.0, 2.5])
    assert kept["relevant"] == ([2.0, 0.0], [2.0, 1.5])


@pytest.mark.parametrize(
    ("dtype", "density"), [("float16", "2:4"), ("bfloat16", 0.25), ("float32", 0.25)]
)
def test_the_loop_holds_the_pruned_weights(dtype, density):
    leaf = exact_leaves(dtype, 3)
    params = {"kernel": leaf((8, 4)) + jnp.arange(32.0).reshape(8, 4).astype(dtype)}
    params["bias"] = leaf((4,))
    gradients = [jax.tree.map(lambda x: x / 8, params)] * 3
    tx = straight_through(optax.sgd(0.125), density)
    results = [run(tx, params, gradients) for run in (donated, scanned, vmapped)]
    for held, _, state in results[:2]:
        assert held["kernel"].dtype == dtype
        count = {0.25: 8, "2:4": 16}[density]
        assert int((held["kernel"] != 0).sum()) == count
        assert bool((held["bias"] != 0).any())
        # What is kept is the largest of the dense weights.
        dense = eval_params(state, held)
        if density == 0.25:
            np.testing.assert_array_equal(
                masks.prune(dense, 0.75)[1]["kernel"], held["kernel"] != 0
            )
        zeros = np.asarray(held["kernel"])[np.asarray(held["kernel"]) == 0]
        assert not np.any(np.signbit(zeros.astype(np.float32)))
    np.testing.assert_array_equal(results[2][0]["kernel"], results[0][0]["kernel"])


def test_the_score_may_be_random():
    key = jax.random.key(0)
    x = jnp.arange(1.0, 17.0)

    def score(params):
        return jax.random.uniform(key, params.shape)

    tx = straight_through(optax.sgd(0.1), 0.25, score=score)
    held, _, state = jitted(tx, x, [jnp.ones(16)] * 3)
    chosen = np.sort(np.argsort(score(x))[-4:])
    np.testing.assert_array_equal(np.flatnonzero(held), chosen)
    np.testing.assert_allclose(eval_params(state, held), x - 0.3, rtol=1e-6)


def test_budgets_and_scopes_share_out_what_is_kept():
    params = {"p": jnp.arange(1.0, 9.0).reshape(2, 4)}
    params["q"] = params["p"] / 100
    gradients = [jax.tree.map(jnp.zeros_like, params)]
    kept = {}
    for name, settings_ in {
        "global": {},
        "uniform": {"layer_budget": "uniform"},
        "mapping": {"layer_budget": {"p": 0.25}},
    }.items():
        tx = straight_through(optax.sgd(0.1), 0.5, **settings_)
        held, *_ = jitted(tx, params, gradients)
        kept[name] = [int((held[leaf] != 0).sum()) for leaf in "pq"]
    assert kept == {"global": [8, 0], "uniform": [4, 4]} | {"mapping": [2, 6]}


def test_a_leaf_that_begins_all_zero_is_ranked_on_its_own():
    params = {"p": jnp.ones((2, 4)), "q": jnp.zeros((2, 4))}
    gradient = jax.tree.map(lambda x: jnp.arange(8.0).reshape(x.shape) / 100, params)
    held, *_ = jitted(straight_through(optax.sgd(0.1), 0.25), params, [gradient] * 2)
    assert [int((held[leaf] != 0).sum()) for leaf in "pq"] == [2, 2]


def test_extra_arguments_reach_the_base():
    def update(updates, state, params=None, *, factor, **extra):
        return jax.tree.map(lambda g: factor * g, updates), state

    base = optax.GradientTransformationExtraArgs(lambda params: (), update)
    tx = straight_through(base, 1.0)
    updates, _ = tx.update(jnp.ones(3), tx.init(jnp.ones(3)), jnp.ones(3), factor=-2.0)
    np.testing.assert_array_equal(updates, [-2.0, -2.0, -2.0])


def test_bad_input_is_named():
    base, x = optax.sgd(0.1), jnp.ones(3)
    with refused("density must be a fraction in (0, 1]", "got 1.5"):
        straight_through(base, 1.5)
    with refused("score must be", "got 'largest'"):
        straight_through(base, 0.5, score="largest")
    with refused("scope must be", "got 'all'"):
        straight_through(base, 0.5, scope="all")
    with refused("layer_budget must be", "got 'even'"):
        straight_through(base, 0.5, layer_budget="even")
    with refused("base must be an optax transformation"):
        straight_through(0.1, 0.5)  # pyright: ignore
    tx = straight_through(base, schedules.cubic_density(0.5, begin=0, end=2))
    with refused("state.dense", "params"):
        tx.update(jnp.ones(4), tx.init(x), jnp.ones(4))
    with refused("params"):
        tx.update(x, tx.init(x))
