"""Biases and scales with two or three axes are no matrices: nothing prunes them."""

import jax
import jax.numpy as jnp
import optax
import pytest

from prunadag_optax import masks, pruning_aware

nn = pytest.importorskip("flax.linen")


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(8)(nn.LayerNorm()(x)), None


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        scanned = nn.scan(
            Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        x, _ = scanned()(x, None)
        return nn.MultiHeadDotProductAttention(num_heads=2)(x, x)


def names_of(tree):
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {path[-1].key for path, _ in paths}


def test_biases_leave_zero_and_are_not_pruned():
    x = jax.random.normal(jax.random.key(0), (8, 5, 8))
    net = Net()
    params = net.init(jax.random.key(1), x)
    assert any(
        path[-1].key == "bias" and leaf.ndim > 1
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    )
    mask = masks.magnitude_mask(params, 0.9)
    assert names_of(mask) == {"kernel"}
    # So they are by the helper that goes by names.
    assert names_of(masks.magnitude_mask(params, 0.9, where=masks.named("bias"))) == {
        "bias"
    }

    @jax.jit
    def step(params, state):
        def loss(params):
            return ((net.apply(params, x) - jnp.arange(8.0)[None, None]) ** 2).mean()

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    tx = pruning_aware(optax.adam(3e-3), 0.1)
    state = tx.init(params)
    for _ in range(20):
        params, state = step(params, state)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        # A bias of the keys has no influence on what an attention puts out.
        if path[-1].key == "bias" and "'key'" not in name:
            assert (leaf != 0).all(), name
