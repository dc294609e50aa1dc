"""nnx.ModelAndOptimizer, which holds the model that it trains, is an optimizer, too."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("flax", minversion="0.12.7")

from flax import nnx

from prunadag_optax import nnx as pruning_nnx
from tests.helpers import refused

if not hasattr(nnx, "ModelAndOptimizer"):
    pytest.skip("this flax has none", allow_module_level=True)


def loss(model):
    return (model(jnp.ones((2, 8))) ** 2).mean()


@pytest.mark.parametrize("jit", [lambda f: f, nnx.jit], ids=["eager", "jit"])
def test_the_same_steps_as_with_an_optimizer(jit):
    @jit
    def step(model, optimizer, pruning):
        pruning.update(optimizer, model, nnx.grad(loss)(model))

    kernels = []
    for kind in (nnx.Optimizer, nnx.ModelAndOptimizer):
        model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
        optimizer = kind(model, optax.adam(0.1), wrt=nnx.Param)
        pruning = pruning_nnx.prune(model, 0.5, optimizer=optimizer)
        for _ in range(3):
            step(model, optimizer, pruning)
        assert optimizer.step[...] == 3
        kernels.append(model.kernel[...])
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert (kernels[1] == 0).sum() == 16


def test_another_model_is_an_error():
    model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    optimizer = nnx.ModelAndOptimizer(model, optax.adam(0.1), wrt=nnx.Param)
    pruning = pruning_nnx.prune(model, 0.5)
    with refused("model must be the one", "optimizer.model"):
        pruning.update(optimizer, nnx.clone(model), nnx.grad(loss)(model))
