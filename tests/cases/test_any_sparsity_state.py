"""After any_sparsity, everything is about the dense parameters, not the loop's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("flax", minversion="0.12.7")

import flax.linen as nn
from flax import nnx

from prunadag_optax import eval_params, linen, masks, recipes
from prunadag_optax import nnx as pruning_nnx

X = jax.random.normal(jax.random.key(0), (256, 16))
Y = jnp.argmax(X @ jax.random.normal(jax.random.key(1), (16, 4)), -1)
cross_entropy = optax.softmax_cross_entropy_with_integer_labels
model = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(4)])


def loss(params, _=None):
    return cross_entropy(model.apply({"params": params}, X), Y).mean()


def accuracy(params):
    return (model.apply({"params": params}, X).argmax(-1) == Y).mean().item()


def share_of_zeros(params):
    """That of the kernels."""
    return masks.sparsity([layer["kernel"] for layer in params.values()]).item()


@pytest.fixture(scope="module")
def trained():
    params = model.init(jax.random.key(2), X)["params"]
    # The last densities are 0.01, 0.5, ...: the loop holds 1% of the weights here.
    tx = recipes.any_sparsity(200, learning_rate=1e-2, densities=(1.0, 0.5, 0.01))
    state = linen.PruningTrainState.create(apply_fn=model.apply, params=params, tx=tx)
    step = jax.jit(lambda s: s.apply_gradients(grads=jax.grad(loss)(s.params)))
    for _ in range(200):
        state = step(state)
    assert share_of_zeros(state.params) > 0.95
    return state


def test_prune_curve_and_finalised_take_the_dense_parameters(trained):
    dense = eval_params(trained.opt_state, trained.params)
    assert share_of_zeros(dense) < 0.5
    best, mask = masks.prune(dense, 0.5)
    assert accuracy(best) > accuracy(trained.params) + 0.2
    pruned = trained.prune(0.5)
    for params in (pruned.params, pruned.eval_params, pruned.finalised()):
        jax.tree.map(np.testing.assert_array_equal, params, best)
    jax.tree.map(np.testing.assert_array_equal, pruned.masks, mask)
    assert pruned.sparsity() == 0.5 == share_of_zeros(pruned.params)
    curve = trained.curve(accuracy, [0.0, 0.5], progress=False)
    assert curve.values["metric"] == (accuracy(dense), accuracy(best))
    jax.tree.map(np.testing.assert_array_equal, trained.finalised(), dense)


def test_the_mask_is_held_by_the_dense_parameters(trained):
    pruned = trained.prune(0.5)
    tuned, losses = linen.fine_tune(pruned, loss, range(7), progress=False)
    assert losses[0] == loss(pruned.eval_params)
    assert tuned.sparsity() == 0.5 == share_of_zeros(tuned.eval_params)
    jax.tree.map(
        lambda keep, x: (
            None if keep is None else np.testing.assert_array_equal(keep, x != 0)
        ),
        tuned.masks,
        tuned.eval_params,
        is_leaf=lambda leaf: leaf is None,
    )


def test_donated_after_pruning(trained):
    copied = jax.tree.map(jnp.copy, trained).prune(0.5)
    step = jax.jit(
        lambda s: s.apply_gradients(grads=jax.grad(loss)(s.params)), donate_argnums=0
    )
    assert step(copied).sparsity() == 0.5


def test_nnx():
    module = nnx.Linear(16, 4, rngs=nnx.Rngs(0))
    tx = recipes.any_sparsity(50, densities=(0.1,))
    optimizer = nnx.Optimizer(module, tx, wrt=nnx.Param)

    @nnx.jit
    def step(module, optimizer, pruning):
        grads = nnx.grad(lambda module: cross_entropy(module(X), Y).mean())(module)
        pruning.update(optimizer, module, grads)

    pruning = pruning_nnx.prune(module, 0.0, optimizer=optimizer)
    for _ in range(50):
        step(module, optimizer, pruning)
    dense = pruning_nnx.eval_params(optimizer, module)
    assert (module.kernel[...] == 0).sum() > (dense["kernel"] == 0).sum()
    best, mask = masks.prune(dense, 0.5)
    pruning.prune(module, 0.5, optimizer=optimizer)
    jax.tree.map(np.testing.assert_array_equal, pruning.tree(), mask)
    np.testing.assert_array_equal(module.kernel[...], best["kernel"])
    for _ in range(3):
        step(module, optimizer, pruning)
    evaluated = pruning_nnx.eval_params(optimizer, module)["kernel"]
    np.testing.assert_array_equal(evaluated != 0, mask["kernel"])
    shipped = pruning.finalised(module, optimizer)
    np.testing.assert_array_equal(shipped["kernel"], evaluated)


def test_nnx_without_the_optimizer_ranks_the_loops_and_masks_both():
    module = nnx.Linear(16, 4, rngs=nnx.Rngs(0))
    tx = recipes.any_sparsity(50, densities=(0.1,))
    optimizer = nnx.Optimizer(module, tx, wrt=nnx.Param)
    grads = nnx.grad(lambda module: cross_entropy(module(X), Y).mean())(module)
    pruning = pruning_nnx.prune(module, 0.5)
    pruning.update(optimizer, module, grads)
    evaluated = pruning_nnx.eval_params(optimizer, module)["kernel"]
    np.testing.assert_array_equal(evaluated != 0, pruning.tree()["kernel"])
