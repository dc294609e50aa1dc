"""The parameters that are evaluated: found in every wrapper and every kind of tree.

The tests hold `eval_params` to what was put into the state: dense parameters for
`gradient_at="pruned"`, the average of a hand-written run for schedule-free.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("flax", minversion="0.12.7")

import flax.linen as nn
from flax import nnx
from flax.core import FrozenDict
from flax.training.train_state import TrainState

from prunadag_optax import eval_params, pruning_aware
from prunadag_optax import nnx as pruning_nnx
from tests.helpers import refused

PARAMS = {
    "a": {"kernel": jnp.array([[1.0, -2.0, 3.0], [-4.0, 5.0, -6.0]])},
    "b": {"kernel": jnp.array([[0.5, -0.25]]), "bias": jnp.array([7.0, 8.0])},
}
ONE = {"a": {"kernel": True}, "b": {"kernel": False, "bias": False}}


def aware(density=0.25, base=None):
    """Holds the largest weights only; none of x moves."""
    base = optax.sgd(0.0) if base is None else base
    return pruning_aware(base, density, shrink_rate=0.0, gradient_at="pruned")


def labelled():
    labels = jax.tree.map(lambda one: "one" if one else "other", ONE)
    return optax.partition({"one": aware(), "other": optax.sgd(0.0)}, labels)


# Each leaves x as it is, and the loop with the largest weights.
WRAPPERS = {
    "alone": aware,
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), aware()),
    "named_chain": lambda: optax.named_chain(("pruned", aware())),
    "masked": lambda: optax.masked(aware(), ONE),
    "masked by branch": lambda: optax.masked(aware(), {"a": True, "b": False}),
    "partition": labelled,
    "MultiSteps": lambda: optax.MultiSteps(aware(), 1),
    "apply_if_finite": lambda: optax.apply_if_finite(aware(), 3),
    "inject_hyperparams": lambda: optax.inject_hyperparams(aware)(density=0.25),
    "conditionally_mask": lambda: optax.conditionally_mask(aware(), lambda step: True),
    "with_extra_args_support": lambda: optax.with_extra_args_support(aware()),
    "nested": lambda: optax.chain(
        optax.MultiSteps(
            optax.masked(optax.chain(aware()), ONE), 1
        ).gradient_transformation()
    ),
}
TREES = {
    "dict": lambda: PARAMS,
    "FrozenDict": lambda: FrozenDict(PARAMS),
    "list": lambda: jax.tree.leaves(PARAMS),
    "boxed": lambda: jax.tree.map(
        lambda x: nn.Partitioned(x, (None,) * x.ndim), PARAMS
    ),
    "nnx.State of Variables": lambda: nnx.State(jax.tree.map(nnx.Param, PARAMS)),
    "pure nnx.State": lambda: nnx.as_pure(nnx.State(jax.tree.map(nnx.Param, PARAMS))),
}


def one_step(tx, params):
    updates, state = tx.update(
        jax.tree.map(jnp.zeros_like, params), tx.init(params), params
    )
    return optax.apply_updates(params, updates), state


def zeros(tree):
    return [int((x == 0).sum()) for x in jax.tree.leaves(tree)]


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("name", WRAPPERS)
def test_in_every_wrapper(name):
    loop, state = one_step(WRAPPERS[name](), PARAMS)
    # Of 8 weights 2 are held, of the 6 of one leaf 2.
    alone = name in ("masked", "masked by branch", "partition", "nested")
    assert zeros(loop) == ([4, 0, 0] if alone else [4, 0, 2])
    assert_same(eval_params(state, loop), PARAMS)


@pytest.mark.parametrize("name", TREES)
def test_on_every_kind_of_tree(name):
    params = TREES[name]()
    tx = pruning_aware(
        optax.sgd(0.0),
        0.25,
        shrink_rate=0.0,
        gradient_at="pruned",
        where=lambda path, leaf: leaf.ndim > 1,
    )
    loop, state = one_step(tx, params)
    assert sum(zeros(loop)) == 6
    assert_same(eval_params(state, loop), params)
    assert_same(jax.jit(eval_params)(state, loop), params)


def average_by_hand(params, gradients, rate, b1=0.9):
    """Schedule-free SGD, x and z by its own formulas."""
    x = z = y = np.asarray(params, np.float64)
    for k, gradient in enumerate(gradients):
        z = z - rate * gradient(y)
        x = x + (z - x) / (k + 1)
        y = (1 - b1) * z + b1 * x
    return x, y


@pytest.mark.parametrize("name", ["alone", "chain", "masked", "MultiSteps", "base"])
def test_schedule_free(name):
    free = optax.contrib.schedule_free(optax.sgd(0.1), 0.1)
    wrapped = {
        "alone": free,
        "chain": optax.chain(free),
        "masked": optax.masked(free, {"w": True, "v": False}),
        "MultiSteps": optax.MultiSteps(free, 1),
        # With all relevant pruning_aware is its base, and x its y.
        "base": pruning_aware(free, 1.0, gradient_at="pruned", where=lambda *_: True),
    }
    tx, start = wrapped[name], np.array([1.0, -2.0, 3.0])
    params = {"w": jnp.asarray(start, jnp.float32), "v": jnp.ones(2)}
    state = tx.init(params)
    for _ in range(5):
        gradient = {"w": 2 * params["w"], "v": jnp.zeros(2)}
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    x, y = average_by_hand(start, [lambda y: 2 * y] * 5, 0.1)
    np.testing.assert_allclose(params["w"], y, rtol=1e-5)
    evaluated = eval_params(state, params)
    np.testing.assert_allclose(evaluated["w"], x, rtol=1e-5)
    np.testing.assert_allclose(evaluated["v"], 1.0, rtol=1e-6)


def test_schedule_free_in_the_dtype_of_the_parameters():
    tx = optax.contrib.schedule_free(optax.sgd(0.1), 0.1, state_dtype=jnp.float32)
    params = jnp.ones(3, jnp.bfloat16)
    assert eval_params(tx.init(params), params).dtype == jnp.bfloat16


def test_replicas_of_schedule_free():
    tx = optax.contrib.schedule_free(optax.sgd(0.1), 0.1)
    params = jnp.arange(6.0).reshape(2, 3)
    state = jax.vmap(tx.init)(params)
    np.testing.assert_allclose(eval_params(state, params), params, rtol=1e-6)


@pytest.mark.parametrize("tx", [optax.adam(0.1), optax.sgd(0.1, 0.9)])
def test_other_optimizers_hold_what_is_evaluated(tx):
    assert_same(eval_params(tx.init(PARAMS), PARAMS), PARAMS)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(3, 4, rngs=rngs)
        self.out = nnx.LoRALinear(4, 2, lora_rank=1, rngs=rngs)

    def __call__(self, x):
        return self.out(self.hidden(x))


@pytest.mark.parametrize(
    "wrap", [lambda tx: tx, optax.chain, lambda tx: optax.MultiSteps(tx, 1)]
)
@pytest.mark.parametrize(
    "wrt", [nnx.Param, nnx.All(nnx.Param, nnx.PathContains("kernel"))]
)
def test_an_nnx_optimizer(wrap, wrt):
    model = Model(nnx.Rngs(0))
    start = nnx.as_pure(nnx.state(model, wrt))
    optimizer = nnx.Optimizer(model, wrap(aware(0.5)), wrt=wrt)
    grads = nnx.grad(lambda model: (model(jnp.ones((2, 3))) ** 2).sum())(model)
    optimizer.update(model, grads)
    loop = nnx.state(model, wrt)
    assert sum(zeros(loop)) > 5
    assert_same(nnx.as_pure(eval_params(optimizer, loop)), start)
    assert_same(eval_params(optimizer, nnx.as_pure(loop)), start)
    assert_same(eval_params(optimizer.opt_state, nnx.as_pure(loop)), start)
    assert_same(pruning_nnx.eval_params(optimizer, model), start)
    copy = nnx.clone(model)
    nnx.update(copy, pruning_nnx.eval_params(optimizer, model))
    assert_same(nnx.as_pure(nnx.state(copy, wrt)), start)


def test_schedule_free_in_an_nnx_optimizer():
    model = Model(nnx.Rngs(0))
    tx = optax.contrib.schedule_free(optax.sgd(0.1), 0.1)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    start = nnx.as_pure(nnx.state(model, nnx.Param))
    grads = nnx.grad(lambda model: (model(jnp.ones((2, 3))) ** 2).sum())(model)
    for _ in range(2):
        optimizer.update(model, grads)
    # Two steps of one gradient: z goes 2 steps, the average 1.5.
    expected = jax.tree.map(lambda x, g: x - 0.15 * g, start, nnx.as_pure(grads))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
        pruning_nnx.eval_params(optimizer, model),
        expected,
    )


def mistakes():
    tx = aware()
    state, adam = tx.init(PARAMS), optax.adam(0.1)
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, adam, wrt=nnx.Param)
    train = TrainState.create(apply_fn=None, params=PARAMS, tx=adam)
    both = optax.LookaheadParams.init_synced(PARAMS)
    other = {"a": jnp.ones(3)}
    return {
        "swapped": (
            (PARAMS, state),
            "params",
            "GradientAtPrunedState",
            "eval_params(opt",
        ),
        "swapped, adam": ((PARAMS, adam.init(PARAMS)), "params", "the state first"),
        "swapped, by name": (
            (PARAMS, optax.named_chain(("a", adam)).init(PARAMS)),
            "params",
            "the state first",
        ),
        "two states": ((state, state), "params", "the state first"),
        "the optimizer": ((tx, PARAMS), "opt_state", "optimizer itself", "tx.init"),
        "a model": ((state, model), "params", "nnx module Model"),
        "a linen module": ((state, nn.Dense(2)), "params", "linen module Dense"),
        "an nnx.Optimizer": ((state, optimizer), "params", "nnx optimizer"),
        "a TrainState": ((state, train), "params", "TrainState", "state.params"),
        "lookahead": ((state, both), "params", "LookaheadParams", "params.slow"),
        "another tree": ((state, other), "that of params: params['a']", "no such leaf"),
        "text": ((state, {"a": "kernel"}), "params['a']", "'kernel'"),
    }


@pytest.mark.parametrize("name", mistakes())
def test_mistakes(name):
    args, *parts = mistakes()[name]
    with refused(*parts) as caught:
        eval_params(*args)
    assert len(str(caught.value)) < 500


def test_mistakes_nnx():
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    with refused("optimizer must be an nnx.Optimizer", "Model"):
        pruning_nnx.eval_params(model, optimizer)
    with refused("model must be an nnx model", "State"):
        pruning_nnx.eval_params(optimizer, nnx.state(model))
