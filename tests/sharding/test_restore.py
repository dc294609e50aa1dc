"""Checkpoints from one layout of devices to another: eight to one, one to eight."""

import jax
import jax.numpy as jnp
import pytest

pytest.importorskip("flax", minversion="0.12.7")

import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from prunadag_optax import masks
from tests import resumable
from tests.resumable import assert_same, through_checkpointer


@pytest.fixture(scope="module", params=resumable.START)
def trained(request, tmp_path_factory):
    """The API, the state at the end of training, and a template for it."""
    api = request.param
    state = resumable.train(tmp_path_factory.mktemp(api), api)
    template, _ = resumable.START[api](seed=1)
    return api, state, template


def shardings(tree, devices):
    """Kernels divided over so many devices by rows, the rest on each of them."""
    mesh = jax.make_mesh(
        (devices,), ("x",), (AxisType.Auto,), devices=jax.devices()[:devices]
    )

    def of(leaf):
        return NamedSharding(mesh, P("x") if jnp.ndim(leaf) == 2 else P())

    return jax.tree.map(of, tree)


@pytest.mark.parametrize("abstract", [False, True])
@pytest.mark.parametrize(("before", "after"), [(8, 1), (1, 8)])
def test_restore_on_another_layout(tmp_path, trained, before, after, abstract):
    _, state, template = trained
    state = jax.device_put(state, shardings(state, before))
    wanted = shardings(template, after)
    template = jax.device_put(template, wanted)
    if abstract:
        template = jax.tree.map(ocp.utils.to_shape_dtype_struct, template)
    restored = through_checkpointer(tmp_path, state, template)
    assert_same(restored, state)
    assert float(masks.sparsity(resumable.masks_of(restored))) == pytest.approx(0.8)

    def check(leaf, sharding):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
        assert len(leaf.sharding.device_set) == after

    jax.tree.map(check, restored, wanted)
