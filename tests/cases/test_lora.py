"""Adapters: trained alone on a pruned base, and zero at the start."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("flax", minversion="0.12.7")

from flax import nnx

from prunadag_optax import masks, pruning_aware
from prunadag_optax import nnx as pruning_nnx

X, Y = jnp.ones((4, 16)), jnp.arange(8.0)


def loss(model):
    return ((model(X) - Y[None]) ** 2).mean()


def no_adapters(path, leaf):
    return leaf.ndim > 1 and not any("lora" in str(key) for key in path)


def test_gradients_of_the_adapters_only():
    model = nnx.LoRALinear(16, 8, lora_rank=2, rngs=nnx.Rngs(0))
    pruning = pruning_nnx.prune(model, 0.5, where=no_adapters)
    optimizer = nnx.Optimizer(model, optax.adam(0.05), wrt=nnx.LoRAParam)
    base = model.kernel[...]

    @nnx.jit
    def step(model, optimizer, pruning):
        value, grads = nnx.value_and_grad(
            loss, argnums=nnx.DiffState(0, nnx.LoRAParam)
        )(model)
        pruning.update(optimizer, model, grads)
        return value

    losses = [step(model, optimizer, pruning) for _ in range(100)]
    assert losses[-1] < losses[0] / 100
    np.testing.assert_array_equal(model.kernel[...], base)
    assert (base == 0).sum() == 64
    assert (model.lora.lora_b[...] != 0).all()


@pytest.mark.parametrize("gradient_at", ["params", "pruned"])
def test_fresh_adapters_train_at_a_constant_density(gradient_at):
    model = nnx.LoRALinear(16, 8, lora_rank=2, rngs=nnx.Rngs(0))
    tx = pruning_aware(optax.adam(0.05), 0.5, gradient_at=gradient_at)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(loss)(model))

    for _ in range(60):
        step(model, optimizer)
    evaluated = pruning_nnx.eval_params(optimizer, model)
    assert (evaluated["lora"]["lora_b"] != 0).sum() >= 8


def test_pruned_without_the_adapters_they_all_train():
    model = nnx.LoRALinear(16, 8, lora_rank=2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(0.05), wrt=nnx.Param)
    pruning = pruning_nnx.prune(model, 0.5, where=no_adapters, optimizer=optimizer)
    for _ in range(3):
        pruning.update(optimizer, model, nnx.grad(loss)(model))
    assert pruning.tree()["lora"]["lora_b"] is None
    assert (model.lora.lora_b[...] != 0).all()
    assert (model.kernel[...] == 0).sum() == 64


@pytest.mark.parametrize("jit", [lambda f: f, nnx.jit], ids=["eager", "jit"])
def test_pruned_with_the_state_that_ranks_them_on_their_own(jit):
    model = nnx.LoRALinear(16, 8, lora_rank=2, rngs=nnx.Rngs(0))
    tx = pruning_aware(optax.adam(0.05), 0.5)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    base, a = model.kernel[...], model.lora.lora_a[...]

    @jit
    def prune(model, optimizer):
        pruning = pruning_nnx.prune(model, jnp.float32(0.5), optimizer=optimizer)
        return pruning.tree()

    mask = prune(model, optimizer)
    # 176 weights, of which 16 are on their own.
    assert (~mask["lora"]["lora_b"]).sum() == 8
    others = masks.magnitude_mask({"a": a, "base": base}, 0.5)
    np.testing.assert_array_equal(mask["kernel"], others["base"])
    np.testing.assert_array_equal(mask["lora"]["lora_a"], others["a"])
    further = masks.prune_further(
        nnx.as_pure(nnx.state(model, nnx.Param)), 0.75, mask, opt_state=optimizer
    )[1]
    assert (~further["lora"]["lora_b"]).sum() == 12
    assert sum(int((~m).sum()) for m in jax.tree.leaves(further)) == 132
    # Without the state, the zeros go first.
    alone = masks.magnitude_mask({"a": a, "zero": jnp.zeros((2, 8)), "base": base}, 0.5)
    assert not alone["zero"].any()
