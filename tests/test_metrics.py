"""What the states of the optimizers say about a training, as scalars."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from hypothesis import given, settings
from hypothesis import strategies as st

from prunadag_optax import (
    classify,
    evaluation,
    masks,
    prunadag,
    pruning_aware,
    schedules,
)
from prunadag_optax import nnx as pruning_nnx
from prunadag_optax.linen import PruningTrainState
from prunadag_optax.methods import (
    bregman,
    dynamic_sparse,
    gradual_pruning,
    sparse_momentum,
)
from prunadag_optax.methods.penalties import regularisers
from tests.helpers import refused

metrics = evaluation.metrics
STEPS = 4


def tree(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "a": {"kernel": jnp.asarray(rng.normal(size=(4, 6)), jnp.float32)},
        "b": {
            "bias": jnp.asarray(rng.normal(size=3), jnp.float32),
            "kernel": jnp.asarray(rng.normal(size=(6, 3)), jnp.float32),
        },
    }


PARAMS = tree()
GRADIENTS = [tree(seed) for seed in range(1, STEPS + 1)]
KERNELS = [PARAMS["a"]["kernel"], PARAMS["b"]["kernel"]]


def trained(tx, params=PARAMS, steps=STEPS):
    """The metrics after each step, from within a scan, and what it ends with."""

    @jax.jit
    def train(params, gradients):
        def step(carry, gradient):
            params, state = carry
            updates, state = tx.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), metrics(state, params)

        return jax.lax.scan(step, (params, tx.init(params)), gradients)

    gradients = jax.tree.map(lambda *leaves: jnp.stack(leaves), *GRADIENTS[:steps])
    (params, state), found = train(params, gradients)
    # The same names at every step, from the first state on, compiled or not.
    first = jax.eval_shape(lambda: metrics(tx.init(PARAMS), PARAMS))
    last = metrics(state, params)
    assert set(first) == set(last) == set(found)
    for name, values in found.items():
        assert values.shape == (steps,)
        assert first[name].shape == last[name].shape == ()
        assert first[name].dtype == last[name].dtype == values.dtype
        np.testing.assert_allclose(values[-1], last[name], rtol=1e-6)
    return found, state, params


def kth_largest(leaves, k):
    return np.sort(np.concatenate([np.abs(x).ravel() for x in leaves]))[-k]


def zeros_of(params):
    kernels = [np.asarray(params[name]["kernel"]) for name in "ab"]
    return sum((x == 0).sum() for x in kernels) / sum(x.size for x in kernels)


def test_prunadag():
    found, _, params = trained(prunadag(0.1, relevant=5))
    assert set(found) == {"step", "threshold", "zeros"}
    np.testing.assert_array_equal(found["step"], range(1, STEPS + 1))
    right = [kth_largest(jax.tree.leaves(g), 5) for g in GRADIENTS]
    np.testing.assert_allclose(found["threshold"], right, rtol=1e-6)
    assert found["zeros"][-1] == zeros_of(params) == 0

    found, *_ = trained(prunadag(0.1, relevant=0.5, scope="leaf"))
    by_leaf = [
        [kth_largest([x], round(x.size / 2)) for x in jax.tree.leaves(g)]
        for g in GRADIENTS
    ]
    np.testing.assert_allclose(found["threshold"], np.min(by_leaf, 1), rtol=1e-6)
    np.testing.assert_allclose(found["threshold_max"], np.max(by_leaf, 1), rtol=1e-6)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 99), relevant=st.integers(1, 45))
def test_shares_are_those_of_the_next_classification(seed, relevant):
    tx = prunadag(0.1, relevant=relevant)
    params, gradients = tree(seed), tree(seed + 1)
    state = tx.init(params)
    found = SHARES(state, params, gradients, jnp.int32(relevant))
    classes = CLASSES(gradients, params, jnp.int32(relevant))
    for name in ("relevant", "acceptable", "decreasable"):
        leaves = jax.tree.leaves(getattr(classes, name))
        right = sum(int(x.sum()) for x in leaves) / 45
        np.testing.assert_allclose(found[f"share_{name}"], right, atol=1e-6)
    np.testing.assert_allclose(found["share_relevant"], relevant / 45, atol=1e-6)


@jax.jit
def CLASSES(gradients, params, relevant):  # noqa: N802
    weight = jax.tree.map(lambda g: jnp.sqrt(0.01**2 + g**2), gradients)
    return classify(
        gradients, params, weight, relevant=relevant, decrease=1.0, learning_rate=0.1
    )


@jax.jit
def SHARES(state, params, gradients, relevant):  # noqa: N802
    return metrics(
        state, params, gradients=gradients, learning_rate=0.1, relevant=relevant
    )


def test_pruning_aware():
    found, *_ = trained(pruning_aware(optax.sgd(0.1), 0.25))
    assert set(found) == {"step", "threshold", "threshold_max", "zeros"}
    # Those by which a step has chosen; the first one from these parameters.
    right = kth_largest(KERNELS, round(42 * 0.25))
    np.testing.assert_allclose(found["threshold"][0], right, rtol=1e-6)
    np.testing.assert_allclose(found["threshold_max"][0], right, rtol=1e-6)

    found, *_ = trained(pruning_aware(optax.sgd(0.1), 0.25, scope="leaf"))
    ends = [kth_largest([x], round(x.size / 4)) for x in KERNELS]
    np.testing.assert_allclose(found["threshold"][0], min(ends), rtol=1e-6)
    np.testing.assert_allclose(found["threshold_max"][0], max(ends), rtol=1e-6)


def test_gradient_at_pruned():
    tx = pruning_aware(optax.sgd(0.1), 0.5, gradient_at="pruned")
    found, state, params = trained(tx)
    np.testing.assert_array_equal(found["zeros"], 0.5)
    dense = [state.dense[name]["kernel"] for name in "ab"]
    np.testing.assert_allclose(found["threshold"][-1], kth_largest(dense, 21))
    assert zeros_of(params) == 0.5
    assert "zeros" not in metrics(state)


def test_no_threshold_while_a_pattern_is_in_use():
    turns = schedules.cyclic_density([0.5, "1:2"])
    found, *_ = trained(pruning_aware(optax.sgd(0.1), turns))
    missing = np.isnan(found["threshold"])
    assert missing.any()
    assert not missing.all()
    np.testing.assert_array_equal(missing, np.isnan(found["threshold_max"]))
    assert not (found["threshold"] < 0).any()


@pytest.mark.parametrize("packed", [False, True])
def test_masks_held(packed):
    mask = masks.magnitude_mask(PARAMS, 0.5)
    held = optax.chain(optax.adam(0.1), masks.keep_pruned(mask, packed=packed))
    found, *_ = trained(held)
    assert set(found) == {"step", "sparsity", "density", "zeros"}
    np.testing.assert_array_equal(found["step"], range(1, STEPS + 1))
    for name in ("sparsity", "density", "zeros"):
        np.testing.assert_array_equal(found[name], 0.5)

    density = schedules.cubic_density(0.25, begin=0, end=3)
    gradual = gradual_pruning.gradual_magnitude_pruning(
        optax.sgd(0.1), density, packed=packed
    )
    found, _, params = trained(gradual)
    np.testing.assert_array_equal(found["sparsity"], found["zeros"])
    np.testing.assert_array_equal(found["sparsity"] + found["density"], 1)
    assert (np.diff(found["sparsity"]) >= 0).all()
    np.testing.assert_allclose(found["sparsity"][-1], zeros_of(params))
    np.testing.assert_allclose(found["sparsity"][-1], 0.75, atol=1 / 42)

    static = dynamic_sparse.static_sparse(optax.sgd(0.1), 0.5, packed=packed)
    found, state, _ = trained(static)
    assert found["sparsity"][-1] == masks.sparsity(state.mask) > 0


def test_other_methods():
    tx = optax.chain(sparse_momentum.active_gradients(9), optax.sgd(0.1))
    found, *_ = trained(tx, steps=1)
    products = jax.tree.map(lambda g, x: g * x, GRADIENTS[0], PARAMS)
    right = kth_largest([products[name]["kernel"] for name in "ab"], 42 // 9)
    assert set(found) == {"threshold", "zeros"}
    np.testing.assert_allclose(found["threshold"], right, rtol=1e-6)

    controller = bregman.Controller(target=0.9, every=1)
    tx = bregman.linearised_bregman(
        optax.sgd(0.1), regularisers.l1(0.1), adaptive=controller
    )
    found, state, _ = trained(tx)
    assert set(found) == {"step", "strength", "sparsity", "density", "zeros"}
    assert found["strength"][-1] == state.strength
    assert found["sparsity"][-1] == state.controller.sparsity


# Where the state may be.


def test_hyperparameters():
    tx = optax.inject_hyperparams(prunadag)(
        learning_rate=optax.linear_schedule(1.0, 0.0, STEPS), relevant=0.2
    )
    found, *_ = trained(tx)
    np.testing.assert_allclose(found["learning_rate"], [1.0, 0.75, 0.5, 0.25])
    np.testing.assert_allclose(found["relevant"], 0.2)
    np.testing.assert_array_equal(found["step"], range(1, STEPS + 1))
    inner = optax.inject_hyperparams(optax.adam)(learning_rate=0.3)
    found, *_ = trained(pruning_aware(inner, 0.5))
    np.testing.assert_allclose(found["learning_rate"], 0.3)
    np.testing.assert_allclose(found["b1"], 0.9)
    assert "threshold" in found


def test_partitions_have_their_labels():
    labels = {"a": "first", "b": "second"}
    tx = optax.partition(
        {"first": prunadag(0.1, relevant=3), "second": prunadag(0.1, relevant=5)},
        labels,
    )
    found, *_ = trained(tx)
    right = [kth_largest([g["a"]["kernel"]], 3) for g in GRADIENTS]
    np.testing.assert_allclose(found["first/threshold"], right, rtol=1e-6)
    right = [kth_largest(jax.tree.leaves(g["b"]), 5) for g in GRADIENTS]
    np.testing.assert_allclose(found["second/threshold"], right, rtol=1e-6)
    np.testing.assert_array_equal(found["step"], range(1, STEPS + 1))


def test_states_in_other_states():
    tx = optax.masked(prunadag(0.1, relevant=3), {"a": True, "b": False})
    found, *_ = trained(optax.chain(optax.clip_by_global_norm(1e3), tx))
    right = [kth_largest([g["a"]["kernel"]], 3) for g in GRADIENTS]
    np.testing.assert_allclose(found["threshold"], right, rtol=1e-6)

    found, *_ = trained(optax.MultiSteps(prunadag(0.1, relevant=3), 2))
    np.testing.assert_array_equal(found["step"], [0, 1, 1, 2])


def test_a_second_value_of_a_name_is_numbered():
    held = [masks.keep_pruned(masks.magnitude_mask(PARAMS, s)) for s in (0.5, 1.0)]
    found, *_ = trained(optax.chain(optax.sgd(0.1), *held))
    np.testing.assert_array_equal(found["sparsity"], 0.5)
    np.testing.assert_array_equal(found["sparsity/1"], 1.0)
    np.testing.assert_array_equal(found["density/1"], 0.0)


def test_optimizers_that_hold_nothing():
    assert metrics(optax.sgd(0.1).init(PARAMS)) == {}
    assert metrics(()) == {}
    assert set(metrics(optax.adam(0.1).init(PARAMS))) == {"step"}


def test_members_of_an_ensemble():
    tx = prunadag(0.1, relevant=5)
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), PARAMS, tree(9))

    @jax.jit
    @jax.vmap
    def step(member):
        _, state = tx.update(member, tx.init(member), member)
        return state, metrics(state)

    state, found = step(both)
    right = [kth_largest(jax.tree.leaves(x), 5) for x in (PARAMS, tree(9))]
    np.testing.assert_allclose(found["threshold"], right, rtol=1e-6)
    with refused("opt_state", "(2,)", "vmap"):
        metrics(state)


# Training states.


def test_linen_training_states():
    state = PruningTrainState.create(
        apply_fn=None, params=PARAMS, tx=optax.inject_hyperparams(optax.sgd)(0.3)
    )
    assert metrics(state)["sparsity"] == 0
    step = jax.jit(lambda state, grads: state.apply_gradients(grads=grads))
    state = step(state.prune(0.5, packed=True), GRADIENTS[0])
    for found in (metrics(state, state.params), jax.jit(metrics)(state, state.params)):
        assert {name: round(float(value), 3) for name, value in found.items()} == {
            "step": 1,
            "sparsity": 0.5,
            "density": 0.5,
            "learning_rate": 0.3,
            "zeros": 0.5,
        }
    plain = TrainState.create(apply_fn=None, params=PARAMS, tx=optax.sgd(0.1))
    assert {name: int(value) for name, value in metrics(plain).items()} == {"step": 0}


def test_nnx_optimizer():
    model = nnx.Linear(4, 6, rngs=nnx.Rngs(0))
    tx = prunadag(0.1, relevant=5)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    pruning = pruning_nnx.prune(model, 0.5, optimizer=optimizer)
    grads = nnx.grad(lambda model: (model(jnp.ones((3, 4))) ** 2).mean())(model)
    pruning.update(optimizer, model, grads)
    pruned = masks.apply_mask(nnx.as_pure(grads)["kernel"], pruning.tree()["kernel"])
    right = kth_largest([pruned, nnx.as_pure(grads)["bias"]], 5)
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    found = metrics(optimizer, params)
    compiled = nnx.eval_shape(lambda optimizer: metrics(optimizer, params), optimizer)
    assert set(found) == set(compiled) == {"step", "threshold", "zeros"}
    assert found["step"] == 1
    assert found["zeros"] == 0.5
    np.testing.assert_allclose(found["threshold"], right, rtol=1e-6)


# Mistakes.

TX = prunadag(0.1)


@pytest.mark.parametrize(
    ("parts", "call"),
    [
        (("opt_state", "optimizer itself", "tx.init"), lambda: metrics(TX)),
        (("opt_state", "a dict", "tx.init"), lambda: metrics(PARAMS)),
        (("opt_state", "the parameters"), lambda: metrics(PARAMS, PARAMS)),
        (("opt_state", "None"), lambda: metrics(None)),
        (("opt_state", "0.5"), lambda: metrics(0.5)),
        (("opt_state", "a ArrayImpl"), lambda: metrics(jnp.ones(3))),
        (("opt_state", "Dense"), lambda: metrics(nn.Dense(2))),
        (("opt_state", "Linear"), lambda: metrics(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))),
        (("params", "state"), lambda: metrics(PARAMS, TX.init(PARAMS))),
        (
            ("gradients", "without params"),
            lambda: metrics(TX.init(PARAMS), gradients=PARAMS),
        ),
        (
            ("relevant", "without gradients"),
            lambda: metrics(TX.init(PARAMS), relevant=0.5),
        ),
        (
            ("ScaleByPrunadagState", "got 0"),
            lambda: metrics(
                optax.adam(1.0).init(PARAMS), PARAMS, gradients=GRADIENTS[0]
            ),
        ),
    ],
)
def test_mistakes_are_named(parts, call):
    with refused(*parts):
        call()


def test_a_setting_that_prunadag_has_not():
    with refused("rate", "argument of prunadag", error=TypeError):
        metrics(TX.init(PARAMS), PARAMS, gradients=GRADIENTS[0], rate=0.1)
