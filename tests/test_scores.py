"""Scores against plain NumPy, and with everything that prunes by them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from prunadag_optax import masks, schedules, scores
from prunadag_optax.methods import lottery_ticket
from prunadag_optax.methods.gradual_pruning import gradual_magnitude_pruning
from tests.helpers import enable_x64


def params():
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "a": {"kernel": jax.random.normal(keys[0], (12, 7)), "bias": jnp.ones(7)},
        "b": {"kernel": jax.random.normal(keys[1], (7, 4))},
    }


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# Random.


def test_random_scores_are_uniform_and_follow_the_key():
    x = {"w": jnp.ones((200, 100)), "v": jnp.ones((50, 40), jnp.bfloat16)}
    a, b, c = (scores.random(x, jax.random.key(seed)) for seed in (0, 0, 1))
    equal(a, b)
    assert not np.array_equal(a["w"], c["w"])
    assert not np.array_equal(a["w"].ravel()[:2000], a["v"].ravel())
    assert a["v"].dtype == jnp.float32
    shares, _ = np.histogram(a["w"], bins=10, range=(0, 1))
    # Five standard deviations of a count of 20,000 draws.
    assert np.abs(shares - 2000).max() < 5 * np.sqrt(20_000 * 0.1 * 0.9)


# LAMP.


@settings(deadline=None, max_examples=40)
@given(hnp.arrays(np.float64, (3, 5), elements=st.integers(-6, 6).map(float)))
def test_lamp_is_its_definition(x):
    with enable_x64():
        found = scores.lamp({"kernel": jnp.asarray(x)})["kernel"]
    size = np.abs(x)
    sums = [[np.sum(size[size >= v] ** 2) for v in row] for row in size]
    expected = np.divide(size**2, sums, where=size > 0, out=np.zeros_like(size))
    np.testing.assert_allclose(found, expected, rtol=1e-14)


def test_lamp_as_a_tree_prunes_as_its_name():
    x = params()
    named = masks.magnitude_mask(x, 0.8, score="lamp")
    equal(masks.magnitude_mask(x, 0.8, score=scores.lamp(x)), named)
    equal(masks.magnitude_mask(x, 0.8, score=scores.lamp), named)
    assert not scores.lamp(x)["a"]["bias"].any()


# Saliency.


def loss(x, batch):
    hidden = jnp.tanh(batch @ x["a"]["kernel"] + x["a"]["bias"][None])
    return jnp.mean((hidden @ x["b"]["kernel"]) ** 2)


def test_saliency_is_the_weight_times_the_mean_gradient():
    rng = np.random.default_rng(0)
    with enable_x64():
        x = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params())
        batches = [rng.normal(size=(5, 12)) for _ in range(3)]
        found = scores.saliency(jax.grad(loss), x, iter(batches))
        gradients = [jax.grad(loss)(x, jnp.asarray(batch)) for batch in batches]
        expected = jax.tree.map(
            lambda x, *g: np.abs(np.asarray(x) * np.mean(g, axis=0)), x, *gradients
        )
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), found, expected
        )
        # How the data are split does not matter.
        whole = scores.saliency(jax.grad(loss), x, [np.concatenate(batches)])
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), found, whole
        )


def test_gradual_pruning_by_saliency_goes_by_the_gradients_since_the_last_change():
    x = {"w": jnp.arange(1.0, 9.0)}
    tx = gradual_magnitude_pruning(
        optax.sgd(0.0), schedules.one_shot_density(0.25, step=4), every=4,
        score="saliency", where=masks.everything,
    )  # fmt: skip
    rng = np.random.default_rng(1)
    gradients = rng.normal(size=(5, 8)).astype(np.float32)
    state, step = tx.init(x), jax.jit(tx.update)
    for g in gradients:
        _, state = step({"w": jnp.asarray(g)}, state, x)
    # The first step changes nothing, and begins the sums anew.
    size = np.abs(np.arange(1.0, 9.0) * gradients[1:].sum(0))
    np.testing.assert_array_equal(state.mask["w"], size >= np.sort(size)[-2])


# Wanda.


def wanda_by_hand(kernel, inputs):
    """The published rule: in each column the share of smallest |w| ||x|| goes."""
    size = np.abs(kernel) * np.linalg.norm(inputs, axis=0)[:, None]
    return np.argsort(np.argsort(size, axis=0, kind="stable"), axis=0)


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
        first = nn.Dense(12, name="first")
        return nn.Dense(4, name="last")(nn.relu(first(nn.relu(first(x)))))


class TwiceNnx(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(12, 12, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(12, 4, rngs=rngs)])

    def __call__(self, x):
        return self.blocks[0](nnx.relu(self.first(nnx.relu(self.first(x)))))


def test_wanda_in_linen_and_nnx_is_the_published_rule():
    batches = np.random.default_rng(0).normal(size=(3, 5, 12)).astype(np.float32)
    model = Twice()
    variables = model.init(jax.random.key(1), batches[0])
    x = variables["params"]
    first, last = (np.asarray(x[name]["kernel"]) for name in ("first", "last"))
    shift = np.asarray(x["first"]["bias"])
    once = np.concatenate(batches)
    again = np.maximum(once @ first + shift, 0)
    hidden = np.maximum(again @ first + shift, 0)
    inputs = scores.layer_inputs(model.apply, variables, batches)
    # A layer that is called twice has been given both.
    both = np.concatenate([once, again])
    np.testing.assert_allclose(inputs["first"], np.linalg.norm(both, axis=0), rtol=1e-5)
    np.testing.assert_allclose(
        inputs["last"], np.linalg.norm(hidden, axis=0), rtol=1e-5
    )
    found = scores.wanda(x, inputs)
    for name, kernel, fed in (("first", first, both), ("last", last, hidden)):
        rank = wanda_by_hand(kernel, fed)
        np.testing.assert_allclose(found[name]["kernel"], (rank + 1) / 12, rtol=1e-6)
    mask = masks.magnitude_mask(x, 0.5, score=found)
    for name, kernel, fed in (("first", first, both), ("last", last, hidden)):
        np.testing.assert_array_equal(
            mask[name]["kernel"], wanda_by_hand(kernel, fed) >= 6
        )
    equal(scores.wanda(variables, inputs)["params"], found)

    twin = TwiceNnx(nnx.Rngs(0))
    for layer, name in ((twin.first, "first"), (twin.blocks[0], "last")):
        layer.kernel[...] = x[name]["kernel"]
        layer.bias[...] = x[name]["bias"]
    state = nnx.as_pure(nnx.state(twin, nnx.Param))
    of_twin = scores.layer_inputs(twin, batches)
    assert set(of_twin) == {"first", "blocks/0"}
    theirs = scores.wanda(state, of_twin)
    np.testing.assert_array_equal(theirs["first"]["kernel"], found["first"]["kernel"])
    np.testing.assert_array_equal(
        theirs["blocks"][0]["kernel"], found["last"]["kernel"]
    )
    # The model is as it was.
    assert type(twin.first) is nnx.Linear
    assert not jax.tree.leaves(nnx.state(twin, lambda path, _: "squares" in path[-1]))


def test_wanda_of_attention_contracts_several_axes():
    class Attention(nn.Module):
        @nn.compact
        def __call__(self, x):
            heads = nn.DenseGeneral((2, 3), name="query")(x)
            return nn.DenseGeneral(5, axis=(-2, -1), name="out")(heads)

    batch = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    model = Attention()
    variables = model.init(jax.random.key(0), batch)
    inputs = scores.layer_inputs(model.apply, variables, [batch])
    assert inputs["out"].shape == (2, 3)
    found = scores.wanda(variables["params"], inputs)
    kernel = np.asarray(variables["params"]["query"]["kernel"])
    rank = wanda_by_hand(kernel.reshape(6, 6), batch)
    np.testing.assert_allclose(
        found["query"]["kernel"].reshape(6, 6), (rank + 1) / 6, rtol=1e-6
    )
    heads = np.einsum("bi,ihd->bhd", batch, kernel)
    heads += np.asarray(variables["params"]["query"]["bias"])
    np.testing.assert_allclose(inputs["out"], np.linalg.norm(heads, axis=0), rtol=1e-5)


# With what prunes.


@pytest.mark.parametrize("score", ["magnitude", "lamp", "random", "saliency"])
def test_tickets_go_by_the_score_of_what_was_trained(score):
    x = params()
    batch = np.random.default_rng(2).normal(size=(6, 12)).astype(np.float32)
    by = {
        "random": lambda x: scores.random(x, jax.random.key(5)),
        "saliency": lambda x: scores.saliency(jax.grad(loss), x, [batch]),
    }.get(score, score)

    def train(start, mask):
        return masks.apply_mask(jax.tree.map(lambda x: 2 * x, start), mask)

    tickets = [
        *lottery_ticket.iterative_magnitude_pruning(
            train, x, rounds=2, fraction=0.5, score=by
        )
    ]
    assert [int(sum(map(jnp.sum, jax.tree.leaves(t.mask)))) for t in tickets] == [
        112, 56, 28,
    ]  # fmt: skip
    first, second, _ = tickets
    expected = masks.magnitude_mask(first.trained, 0.5, score=by, previous=first.mask)
    equal(second.mask, expected)


def test_gradual_pruning_takes_a_tree_a_name_or_a_function():
    x = params()
    fixed = scores.random(x, jax.random.key(3))
    density = schedules.cubic_density(0.25, begin=0, end=2)
    for score in (fixed, lambda x: scores.random(x, jax.random.key(3))):
        tx = gradual_magnitude_pruning(optax.sgd(0.1), density, score=score)
        state, step = tx.init(x), jax.jit(tx.update)
        for _ in range(4):
            _, state = step(jax.tree.map(jnp.ones_like, x), state, x)
        equal(state.mask, masks.magnitude_mask(x, 0.75, score=fixed))


# Mistakes.


def test_what_is_refused():
    x = params()
    model = nn.Dense(3)
    variables = model.init(jax.random.key(0), jnp.ones((1, 12)))
    batch = jnp.ones((2, 12))
    with pytest.raises(ValueError, match="key must be"):
        scores.random(x, 3)
    with pytest.raises(ValueError, match="batches must hold at least one batch"):
        scores.saliency(jax.grad(loss), x, [])
    with pytest.raises(ValueError, match=r"grad\(params, batch\)"):
        scores.saliency(loss, x, [batch])
    with pytest.raises(
        ValueError, match=r"inputs must have the layer of params\['a'\]"
    ):
        scores.wanda(x, {"b": jnp.ones(7)})
    with pytest.raises(ValueError, match=r"inputs\['a'\] must have the shape"):
        scores.wanda(x, {"a": jnp.ones(7), "b": jnp.ones(7)})
    with pytest.raises(ValueError, match="inputs must be a mapping"):
        scores.wanda(x, jnp.ones(7))  # pyright: ignore
    with pytest.raises(ValueError, match=r"arguments must be .*\(Dense, dict, list\)"):
        scores.layer_inputs(model, variables, [batch])
    with pytest.raises(ValueError, match="batches must hold at least one batch"):
        scores.layer_inputs(model.apply, variables, iter(()))
    with pytest.raises(ValueError, match="forward must call a dense layer"):
        scores.layer_inputs(lambda variables, x: x, variables, [batch])


def test_layers_in_a_scan_are_refused():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(4)(x), None

    stacked = nn.scan(
        Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2
    )()
    batch = jnp.ones((2, 4))
    variables = stacked.init(jax.random.key(0), batch, None)
    with pytest.raises(ValueError, match=r"outside of nn\.scan"):
        scores.layer_inputs(
            lambda variables, x: stacked.apply(variables, x, None), variables, [batch]
        )
