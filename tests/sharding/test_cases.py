"""Cases with several devices: metadata of masks, shard_map with its own parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

pytest.importorskip("flax", minversion="0.12.7")

import flax.linen as nn
from flax import jax_utils, nnx

from prunadag_optax import eval_params, linen, masks, prunadag, pruning_aware
from prunadag_optax import nnx as pruning_nnx
from tests.helpers import refused

# Metadata.


class Dense(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "m"))
        return nn.Dense(16, kernel_init=init)(x)


@pytest.mark.parametrize("where", [None, masks.named("kernel")])
def test_masks_of_boxed_parameters_are_sharded_as_they_are(where):
    tx = pruning_aware(optax.adam(0.1), 0.5, gradient_at="pruned")

    def make():
        params = Dense().init(jax.random.key(0), jnp.ones((1, 4)))["params"]
        state = linen.PruningTrainState.create(apply_fn=None, params=params, tx=tx)
        return state.prune(0.5, where=where)

    mesh = jax.make_mesh((8,), ("m",), axis_types=(AxisType.Auto,))
    abstract = jax.eval_shape(make)
    spec = nn.get_partition_spec(abstract)
    for tree in (spec.params, spec.masks, spec.opt_state.dense):
        assert tree["Dense_0"]["kernel"] == P(None, "m")
    with jax.set_mesh(mesh):
        state = jax.jit(make, out_shardings=nn.get_sharding(abstract, mesh))()
        for _ in range(2):
            state = jax.jit(lambda s: s.apply_gradients(grads=s.params))(state)
        assert state.masks["Dense_0"]["kernel"].value.sharding.spec == P(None, "m")
        assert state.sparsity() == 0.5
        evaluated = state.eval_params["Dense_0"]["kernel"].value
        keep = state.masks["Dense_0"]["kernel"].value
        np.testing.assert_array_equal(evaluated != 0, keep)


class Linear(nnx.Module):
    def __init__(self, rngs):
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "m"))
        self.dense = nnx.Linear(4, 16, kernel_init=init, rngs=rngs)

    def __call__(self, x):
        return self.dense(x)


def test_nnx_masks_carry_the_metadata_of_the_parameters():
    mesh = jax.make_mesh((8,), ("m",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):

        @nnx.jit
        def make():
            model = Linear(nnx.Rngs(0))
            return model, nnx.Optimizer(model, prunadag(0.1), wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer, pruning):
            grads = nnx.grad(lambda model: (model(jnp.ones((2, 4))) ** 2).mean())(model)
            pruning.update(optimizer, model, grads)

        model, optimizer = make()
        pruning = pruning_nnx.prune(model, 0.5, optimizer=optimizer)
        specs = nnx.get_partition_spec(nnx.state(pruning))
        assert specs["masks"]["dense"]["kernel"] == P(None, "m")
        for _ in range(3):
            step(model, optimizer, pruning)
        pruning.prune(model, 0.75, optimizer=optimizer)
        step(model, optimizer, pruning)
        kernel, mask = model.dense.kernel, pruning.masks["dense"]["kernel"]
        assert kernel[...].sharding.spec == mask[...].sharding.spec == P(None, "m")
        np.testing.assert_array_equal(kernel[...] != 0, mask[...])
        assert (kernel[...] == 0).sum() == 48


# Each device has its own parameters.

OWN = {
    "adam": optax.adam(0.1),
    "prunadag": prunadag(0.1),
    "prunadag v2": prunadag(0.1, variant="v2"),
    "pruning_aware": pruning_aware(optax.adam(0.1), 0.5),
    "lamp": pruning_aware(optax.adam(0.1), 0.5, score="lamp"),
    "leaf": pruning_aware(optax.adam(0.1), 0.5, scope="leaf"),
    "at pruned": pruning_aware(optax.adam(0.1), 0.5, gradient_at="pruned"),
}


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("name", OWN)
def test_shard_map_with_parameters_of_each_device(name, check):
    tx = OWN[name]
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    rng = np.random.default_rng(0)
    params = {
        "w": jnp.asarray(rng.normal(size=(8, 12, 2)), jnp.float32),
        "v": jnp.asarray(rng.normal(size=(8, 3, 2)), jnp.float32),
    }

    def local(params):
        params = jax.tree.map(lambda x: x[0], params)
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(params, state, params)
            params = optax.apply_updates(params, updates)
        pruned = masks.prune(eval_params(state, params), 0.5)[0]
        return jax.tree.map(lambda x: x[None], (params, pruned))

    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=P("d"), out_specs=P("d"), check_vma=check
    )
    moved, pruned = jax.jit(sharded)(params)
    for i in (0, 5):
        row = local({name: x[i : i + 1] for name, x in params.items()})
        for one, all_of_them in zip(row, (moved, pruned), strict=True):
            for leaf, x in one.items():
                np.testing.assert_allclose(all_of_them[leaf][i : i + 1], x, 1e-5, 1e-6)
    zeros = sum((x == 0).sum((1, 2)) for x in pruned.values())
    # v2 has set some more to zero before.
    np.testing.assert_array_equal(np.minimum(zeros, 15), 15)
    assert (zeros == 15).all() or name == "prunadag v2"


def test_a_state_of_replicas():
    state = linen.PruningTrainState.create(
        apply_fn=None, params={"w": jnp.ones((4, 3))}, tx=optax.adam(0.1)
    )
    replicas = jax_utils.replicate(state)
    for prune in (
        lambda s: s.prune(0.5),
        lambda s: s.prune_on_schedule(0.5),
        lambda s: s.curve(lambda params: 0.0, [0.5], progress=False),
    ):
        with refused("state must be that of one training", "(8,)", "jax.vmap"):
            prune(replicas)
    pruned = jax.vmap(lambda s: s.prune(0.5))(replicas)
    one = state.prune(0.5)
    for i in range(8):
        np.testing.assert_array_equal(pruned.masks["w"][i], one.masks["w"])
        np.testing.assert_array_equal(pruned.params["w"][i], one.params["w"])
