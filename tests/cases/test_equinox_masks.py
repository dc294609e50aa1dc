"""Masks that are modules: trees of arrays that can be called, as Equinox's are."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from prunadag_optax import evaluation, masks


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Linear:
    weight: jax.Array
    bias: jax.Array | None

    def __call__(self, x):
        raise AssertionError("a mask is not called")


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class MLP:
    layers: tuple[Linear, ...]
    activation: None = None  # as in a tree that equinox.filter has left

    def __call__(self, x):
        raise AssertionError("a mask is not called")


def model():
    keys = jax.random.split(jax.random.key(0), 2)
    shapes = (8, 4), (3, 8)
    return MLP(
        tuple(
            Linear(jax.random.normal(key, shape), jnp.ones(shape[0]))
            for key, shape in zip(keys, shapes, strict=True)
        )
    )


def test_prune_and_keep_pruned():
    params, mask = masks.prune(model(), 0.5)
    assert isinstance(mask, MLP)
    assert mask.layers[0].bias is None
    assert masks.sparsity(mask) == 0.5
    assert sum(int((layer.weight == 0).sum()) for layer in params.layers) == 28
    curve = evaluation.pruning_curve(
        lambda p: sum(int((layer.weight == 0).sum()) for layer in p.layers),
        model(),
        [0.5],
    )
    assert curve.values["metric"] == (28,)
    grads = jax.tree.map(jnp.ones_like, params)
    results = []
    for given in (mask, lambda params: mask):
        tx = optax.chain(optax.adam(0.1), masks.keep_pruned(given))
        state = tx.init(params)
        updates, state = jax.jit(tx.update)(grads, state, params)
        results.append(optax.apply_updates(params, updates))
        for layer, keep in zip(results[-1].layers, mask.layers, strict=True):
            np.testing.assert_array_equal(layer.weight != 0, keep.weight)
            assert (layer.bias != 1).all()
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_scores_that_are_a_module():
    params = model()
    score = jax.tree.map(lambda x: 1 / x, params)
    _, mask = masks.prune(params, 0.5, score=score)
    _, same = masks.prune(params, 0.5, score=lambda p: jax.tree.map(lambda x: 1 / x, p))
    jax.tree.map(np.testing.assert_array_equal, mask, same)
    assert not mask.layers[0].weight.all()
