"""`pruning_aware` over each base with divided parameters: the results of one device."""

import itertools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from tests.bases import BASES, PLACES, drawn, made
from tests.helpers import enable_x64
from tests.sharding.layouts import LAYOUTS, assert_placed, updates_of

pytestmark = pytest.mark.skipif(
    not hasattr(jax, "set_mesh"), reason="needs jax.set_mesh"
)
WIDTH = 8  # kernels of 8 x 16 and 16 x 8, divided by rows or by columns
STEPS = 3


@pytest.mark.parametrize(("name", "at"), [*itertools.product(BASES, PLACES)])
def test_a_base_gives_what_one_device_gives(name, at):
    # In float64, where no rounding brings a weight across the threshold.
    layout, tx = LAYOUTS["fsdp"], made(name, at)
    mesh = layout.mesh(AxisType.Auto)
    shardings, _ = layout.shardings(mesh, WIDTH)
    params, *gradients = (drawn(k, layout.shapes(WIDTH)) for k in range(1 + STEPS))
    with enable_x64():
        expected = jax.device_get(updates_of(tx, params, tx.init(params), gradients))
        with jax.set_mesh(mesh):
            params = jax.device_put(params, shardings)
            gradients = [jax.device_put(g, shardings) for g in gradients]
            state = tx.init(params)
            result = updates_of(tx, params, state, gradients)
    updates, moved, after = result
    assert_placed((updates, moved), (STEPS * [shardings], shardings))
    if at == "pruned":
        assert_placed((state.dense, after.dense), (shardings, shardings))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12),
        jax.device_get(result),
        expected,
    )
    kernels = [x for x in jax.tree.leaves(expected[1]) if x.ndim > 1]
    shares = [float(np.mean(x == 0)) for x in kernels]
    assert (np.mean(shares) == 0.5) == (at == "pruned")
