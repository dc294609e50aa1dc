"""Small trees divided over a mesh of two axes: the results of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from prunadag_optax import masks, prunadag
from tests.helpers import assert_close, donated, eager, jitted
from tests.sharding.layouts import trees_like_params
from tests.sweep import SETTINGS, STEPS, own_state

set_mesh = jax.set_mesh if hasattr(jax, "set_mesh") else jax.sharding.use_mesh

SPECS = {"bias": P("y"), "kernel": P("x", "y"), "wide": P(None, ("x", "y"))}


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=str)
def mesh(request):
    # The context puts the count on the mesh too; without it the second call of any
    # optimizer of optax recompiles for a count that moved there.
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=2 * (request.param,))
    with set_mesh(mesh):
        yield mesh


def sharded(mesh, tree):
    shardings = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    return jax.device_put(tree, shardings)


def large_tree(seed):
    rng = np.random.default_rng(seed)
    shapes = {"bias": (6,), "kernel": (8, 4), "wide": (3, 16)}
    # Few values, so that there are ties within and across devices.
    return {
        name: jnp.asarray(rng.integers(-8, 9, shape) / 8, jnp.float32)
        for name, shape in shapes.items()
    }


def assert_sharded_like(tree, like):
    def check(x, y):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)

    jax.tree.map(check, tree, like)


@pytest.mark.parametrize(
    "run", [pytest.param(eager, marks=pytest.mark.slow), jitted, donated]
)
@pytest.mark.parametrize("scope", ["global", "leaf"])
def test_sharded_equals_unsharded(mesh, scope, run):
    tx = prunadag(**SETTINGS, scope=scope)
    whole = [large_tree(seed) for seed in range(1 + STEPS)]
    params, *gradients = (sharded(mesh, tree) for tree in whole)
    moved, updates, state = run(tx, params, gradients)
    for tree in (moved, updates, *trees_like_params(own_state(state))):
        assert_sharded_like(tree, params)
    assert_close((moved, updates, state), eager(tx, whole[0], whole[1:]))


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("scope", ["global", "leaf"])
def test_magnitude_mask_of_sharded_leaves(mesh, scope, sparsity):
    params = sharded(mesh, large_tree(0))
    mask = masks.magnitude_mask(params, sparsity, scope=scope, where=masks.everything)
    assert_sharded_like(mask, params)
    expected = masks.magnitude_mask(
        large_tree(0), sparsity, scope=scope, where=masks.everything
    )
    jax.tree.map(np.testing.assert_array_equal, mask, expected)
