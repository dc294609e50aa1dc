"""The methods with divided parameters: the results of one device, and what moves."""

import functools
import itertools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from tests.helpers import enable_x64
from tests.sharding.layouts import (
    LAYOUTS,
    SMALL,
    WIDTH,
    abstract,
    assert_placed,
    compiled,
    drawn,
    normal,
    state_of,
    updates_of,
)
from tests.sweep import METHODS, QUICK

pytestmark = pytest.mark.skipif(
    not hasattr(jax, "set_mesh"), reason="needs jax.set_mesh"
)
# What a step moves between devices: nothing where every weight is updated by itself;
# scalars where all are ranked, counted or measured together; and for groups that extend
# over several devices a number for each of them, in every step of Newton's method.
NOTHING = {
    "prox_adam, l1",
    "rmda, l1",
    "ramda, l1",
    "lottery ticket",
    "powerpropagation",
}
GROUPED = {"prox_adam", "proxgen", "prox_sgd", "rmda", "ramda", "adabreg"}


def on_meshes(kind, methods):
    """All cases, and slow all but FSDP on a mesh of that kind for these methods.

    In that layout groups extend over devices.
    """
    cases = itertools.product(METHODS, LAYOUTS, (AxisType.Auto, AxisType.Explicit))
    return pytest.mark.parametrize(
        ("method", "layout", "kind"),
        [
            pytest.param(*case, marks=() if quick else pytest.mark.slow)
            for case in cases
            for quick in [case[0] in methods and case[1:] == ("fsdp", kind)]
        ],
        ids=str,
    )


@functools.cache
def on_one_device(method, layout):
    tx = METHODS[method].make(**METHODS[method].settings)
    params, *gradients = (
        jax.tree.map(
            np.float64,
            drawn(layout.shapes(64), seed, normal),
        )
        for seed in range(4)
    )
    # Gradients with which some weights and some groups, but not all, become zero.
    gradients = [jax.tree.map(lambda g: 16 * g, tree) for tree in gradients]
    start = params, gradients
    result = updates_of(tx, params, tx.init(params), gradients)
    return tx, start, jax.device_get(result)


@on_meshes(AxisType.Explicit, ["ramda", "gsm"])
def test_methods_give_what_one_device_gives(method, layout, kind):
    # In float64, where no rounding brings a weight across a threshold.
    layout = LAYOUTS[layout]
    mesh = layout.mesh(kind)
    shardings, _ = layout.shardings(mesh, 64)
    with enable_x64():
        tx, (params, gradients), expected = on_one_device(method, layout)
        with jax.set_mesh(mesh):
            params = jax.device_put(params, shardings)
            gradients = [jax.device_put(g, shardings) for g in gradients]
            result = updates_of(tx, params, tx.init(params), gradients)
    updates, moved, _ = result
    assert_placed((updates, moved), (len(updates) * [shardings], shardings))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12),
        jax.device_get(result),
        expected,
    )


@on_meshes(AxisType.Auto, QUICK)
def test_what_methods_move(method, layout, kind):
    layout = LAYOUTS[layout]
    mesh = layout.mesh(kind)
    tx = METHODS[method].make(**METHODS[method].settings)
    with jax.set_mesh(mesh):
        params, _ = abstract(layout, mesh, WIDTH)
        state = state_of(tx, params, mesh)
        found = compiled(tx.update, params, state, params)
    if method in NOTHING:
        assert not found
    elif method in GROUPED:
        # A float for each row of a kernel.
        assert max(size for _, size in found) == 4 * WIDTH
    else:
        assert max(size for _, size in found) < SMALL
