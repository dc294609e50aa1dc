"""nnx models shrink in place; linen modules run at smaller sizes; both train on."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from prunadag_optax import linen, plotting, pruning_aware, structure
from prunadag_optax import nnx as pruning_nnx


class LinenNet(nn.Module):
    """BatchNorm, a depthwise convolution, GroupNorm, dropout."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(16, (3, 3))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.relu(nn.Conv(16, (3, 3), feature_group_count=16)(x))
        x = nn.GroupNorm(4)(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(10)(nn.relu(nn.Conv(24, (3, 3))(x)).mean((1, 2)))


class Attention(nn.Module):
    """A transformer layer."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(12)(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=4, qkv_features=20)(x, x)
        return nn.Dense(3)(nn.relu(nn.Dense(20)(nn.LayerNorm()(x))))


class Net(nnx.Module):
    """The same kinds of layers in nnx."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.depthwise = nnx.Conv(16, 16, (3, 3), feature_group_count=16, rngs=rngs)
        self.wide = nnx.Conv(16, 32, (3, 3), rngs=rngs)
        self.groups = nnx.GroupNorm(32, num_groups=4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        x = self.depthwise(nnx.relu(self.norm(self.conv(x))))
        x = self.groups(nnx.relu(self.wide(x))).mean((1, 2))
        return self.head(self.dropout(x))


def half(group):
    return {group.name: np.arange(group.size) >= group.size // 2}


def images(channels):
    return jax.random.normal(jax.random.key(0), (2, 8, 8, channels))


@pytest.mark.parametrize(
    ("module", "x", "inexact"),
    [
        (LinenNet(), images(3), {"Conv_0:3#2"}),
        (
            Attention(),
            jax.random.normal(jax.random.key(0), (2, 6, 5)),
            {"Dense_0", "MultiHeadDotProductAttention_0/key:1"},
        ),
    ],
)
def test_linen_modules_run_at_smaller_sizes(module, x, inexact):
    variables = jax.jit(module.init)(jax.random.key(1), x)
    found = structure.trace(module.apply, variables, x)
    for group in found.groups:
        keep = half(group)
        if group.name in inexact:
            with pytest.raises(ValueError, match="allow_inexact=True"):
                linen.rebuild(module, found, keep, variables, x)
            accepted = linen.rebuild(
                module, found, keep, variables, x, allow_inexact=True
            )
            assert accepted.deviation > 1e-3
            continue
        small = linen.rebuild(module, found, keep, variables, x)
        output = small.apply(structure.shrink(found, keep, variables), x)
        expected = module.apply(structure.masked(found, keep, variables), x)
        np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-6)
        # The module itself is as it was.
        assert module.apply(variables, x).shape == expected.shape


def test_a_linen_state_shrinks_and_trains_on():
    module, x = LinenNet(), images(3)
    variables = jax.jit(module.init)(jax.random.key(1), x)
    found = structure.trace(module.apply, variables, x)
    state = linen.PruningTrainState.create(
        apply_fn=module.apply,
        params=variables["params"],
        tx=pruning_aware(optax.adam(1e-2), 0.5, gradient_at="pruned"),
    ).prune(0.3)

    def loss(params, apply_fn, stats):
        return jnp.mean(apply_fn({"params": params, "batch_stats": stats}, x) ** 2)

    @jax.jit
    def step(state, stats):
        grads = jax.grad(loss)(state.params, state.apply_fn, stats)
        return state.apply_gradients(grads=grads)

    state = step(state, variables["batch_stats"])
    keep = half(found["Conv_2"])
    rebuilt = linen.rebuild(module, found, keep, variables, x)
    small = state.shrink(found, keep, apply_fn=rebuilt.apply)
    fresh = jax.eval_shape(state.tx.init, small.params)
    assert jax.tree.map(jnp.shape, small.opt_state) == jax.tree.map(jnp.shape, fresh)
    assert small.params["Conv_2"]["kernel"].shape == (3, 3, 16, 12)
    np.testing.assert_array_equal(
        small.masks["Conv_2"]["kernel"],
        np.asarray(state.masks["Conv_2"]["kernel"])[..., keep["Conv_2"]],
    )
    stats = structure.shrink(found, keep, variables["batch_stats"])
    before = loss(small.params, small.apply_fn, stats)
    for _ in range(5):
        small = step(small, stats)
    assert loss(small.params, small.apply_fn, stats) < before
    zeros = ~np.asarray(small.masks["Conv_2"]["kernel"])
    assert (np.asarray(small.params["Conv_2"]["kernel"])[zeros] == 0).all()


@pytest.mark.parametrize(
    "tx",
    [optax.adam(1e-2), pruning_aware(optax.adam(1e-2), 0.5, gradient_at="pruned")],
    ids=["adam", "pruning_aware"],
)
def test_an_nnx_model_shrinks_in_place_and_trains_on(tx):
    model, x = Net(nnx.Rngs(0)), images(1)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    def loss(model):
        return jnp.mean(model(x) ** 2)

    @nnx.jit
    def step(model, optimizer):
        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    step(model, optimizer)
    found = pruning_nnx.trace(model, x)
    scores = structure.scores(found, nnx.as_pure(nnx.state(model, nnx.Param)))
    keep = structure.select(found, scores, density=0.5, per_group=True)
    keep = {
        name: mask for name, mask in keep.items() if "mixed" not in found[name].flags
    }
    variables = nnx.as_pure(nnx.state(model, nnx.Not(nnx.RngState)))
    expected = structure.small_apply(found, keep)(
        structure.shrink(found, keep, variables), x
    )
    assert pruning_nnx.shrink(model, found, keep, x, optimizer=optimizer) < 1e-5
    evaluated = nnx.clone(model)
    evaluated.eval()
    np.testing.assert_allclose(evaluated(x), expected, rtol=1e-4, atol=1e-6)
    assert model.conv.out_features == model.norm.num_features == 8
    assert model.depthwise.feature_group_count == model.depthwise.in_features == 8
    assert model.wide.in_features == 8
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    fresh = jax.eval_shape(tx.init, params)
    state = nnx.as_pure(optimizer.opt_state)
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(state)]
    assert shapes == [leaf.shape for leaf in jax.tree.leaves(fresh)]
    losses = [step(model, optimizer) for _ in range(5)]
    assert losses[-1] < losses[0]


class Fixed(nnx.Module):
    """A size stands in its code."""

    def __init__(self, rngs):
        self.first = nnx.Linear(4, 8, rngs=rngs)
        self.second = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
        return self.second(self.first(x).reshape(-1, 8))


def test_a_refused_model_is_left_as_it_was():
    model, x = Fixed(nnx.Rngs(0)), jnp.ones((3, 4))
    found = pruning_nnx.trace(model, x)
    before = jax.tree.map(np.asarray, nnx.as_pure(nnx.state(model)))
    with pytest.raises(ValueError, match=r"size stands in its code.*small_apply"):
        pruning_nnx.shrink(model, found, half(found.groups[0]), x)
    assert model.first.out_features == 8
    after = nnx.as_pure(nnx.state(model))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    with pytest.raises(ValueError, match="example inputs"):
        pruning_nnx.shrink(model, found, half(found.groups[0]))


def test_the_summary_says_what_is_left():
    model, x = Net(nnx.Rngs(0)), images(1)
    found = pruning_nnx.trace(model, x)
    keep = {"conv": np.arange(16) < 5}
    units = structure.summary(found, keep)
    row = units.columns["group"].index("conv")
    assert (units.columns["units"][row], units.columns["kept"][row]) == (16, 5)
    small = structure.cost(found, keep)
    assert units.columns["params"][-1] == small.params
    assert units.columns["flops"][-1] == round(small.flops)
    bars = plotting.plot_units(units).patches
    names = units.columns["group"][:-1]
    assert [bar.get_width() for bar in bars[len(names) :]] == units.columns["kept"][:-1]
