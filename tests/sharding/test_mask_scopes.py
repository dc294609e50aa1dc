"""Masks of every scope: of sharded leaves, and in a shard_map with check_vma."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from prunadag_optax import masks

SCOPES = {"global": "global", "leaf": "leaf", "layer": lambda path, leaf: 1}


def trees():
    """Leaves with ties, eight layers stacked in each."""
    integers = np.random.default_rng(0).integers(-3, 4, (8, 4, 5))
    return {
        "v": jnp.arange(1.0, 33.0).reshape(8, 2, 2),
        "w": jnp.asarray(integers, jnp.float32),
    }


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=str)
def mesh(request):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(request.param,))
    with jax.set_mesh(mesh):
        yield mesh


@pytest.mark.parametrize("scope", SCOPES.values(), ids=SCOPES)
def test_masks_of_sharded_leaves(mesh, scope):
    def prune(params):
        pruned, mask = masks.prune(params, 0.5, scope=scope)
        return pruned, masks.magnitude_mask(params, 0.7, scope=scope, previous=mask)

    with jax.set_mesh(jax.make_mesh((), ())):
        expected = prune(trees())
    params = jax.device_put(trees(), NamedSharding(mesh, P("d")))
    assert_equal(jax.jit(prune)(params), expected)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("scope", SCOPES.values(), ids=SCOPES)
def test_masks_in_shard_map(mesh, scope, check_vma):
    """Each device has parameters of its own."""

    def prune(params):
        mask = masks.magnitude_mask(params, 0.5, scope=scope)
        sparsity = jnp.float32(0.7)
        further = masks.magnitude_mask(params, sparsity, scope=scope, previous=mask)
        return mask, further, masks.n_m_mask(params, 1, 2, axis=1)

    params = jax.device_put(trees(), NamedSharding(mesh, P("d")))
    together = jax.shard_map(
        prune, mesh=mesh, in_specs=P("d"), out_specs=P("d"), check_vma=check_vma
    )
    found = jax.tree.map(np.asarray, jax.jit(together)(params))
    for i in range(8):
        own = jax.tree.map(lambda x, i=i: np.asarray(x)[i : i + 1], trees())
        assert_equal(jax.tree.map(lambda x, i=i: x[i : i + 1], found), prune(own))
