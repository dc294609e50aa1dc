"""Dynamic sparse training with divided parameters: the masks of one device."""

import functools
import itertools
from typing import Any

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from prunadag_optax.methods.dynamic_sparse import rigl, sparse_evolution
from tests.helpers import enable_x64
from tests.sharding.layouts import (
    LAYOUTS,
    SMALL,
    WIDTH,
    abstract,
    assert_nothing_moves,
    compiled,
    drawn,
    normal,
    updates_of,
)

pytestmark = pytest.mark.skipif(
    not hasattr(jax, "set_mesh"), reason="needs jax.set_mesh"
)
MAKERS = {"rigl": rigl, "set": sparse_evolution}


def cases(quick):
    """All layouts on meshes of both kinds, and slow what is not named.

    What `sparse_evolution` does is what `rigl` does, and random numbers.
    """
    kinds = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
    ways = itertools.product(MAKERS, LAYOUTS, kinds)
    return pytest.mark.parametrize(
        ("make", "layout", "kind"),
        [
            pytest.param(
                MAKERS[way[0]],
                LAYOUTS[way[1]],
                kinds[way[2]],
                marks=() if way in quick else pytest.mark.slow,
                id="-".join(way),
            )
            for way in ways
        ],
    )


def optimizer(make):
    return make(optax.adam(0.01), 0.25, every=1, begin=2, end=4)


@functools.cache
def on_one_device(make, layout):
    tx = optimizer(make)
    params, *gradients = (
        jax.tree.map(np.float64, drawn(layout.shapes(64), seed, normal))
        for seed in range(5)
    )
    result = updates_of(tx, params, tx.init(params), gradients)
    return params, gradients, jax.device_get(result)


@cases({("set", "fsdp", "auto")})
def test_results_are_those_of_one_device(layout, kind, make):
    mesh, tx = layout.mesh(kind), optimizer(make)
    shardings, _ = layout.shardings(mesh, 64)
    with enable_x64():
        params, gradients, expected = on_one_device(make, layout)
        with jax.set_mesh(mesh):
            params = jax.device_put(params, shardings)
            gradients = [jax.device_put(g, shardings) for g in gradients]
            state: Any = tx.init(params)
            for leaf in ("in", "out") if "out" in params else ("up", "down"):
                assert_like(state.mask[leaf]["kernel"], params[leaf]["kernel"])
            result = updates_of(tx, params, state, gradients)
    jax.tree.map(assert_like, result[1], params)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12),
        jax.device_get(result),
        expected,
    )


def assert_like(x, param):
    assert x.sharding.is_equivalent_to(param.sharding, x.ndim), x.sharding


@cases({("set", "fsdp", "auto"), ("set", "tensor", "explicit")})
def test_steps_move_scalars_only(layout, kind, make):
    mesh, tx = layout.mesh(kind), optimizer(make)
    with jax.set_mesh(mesh):
        params, _ = abstract(layout, mesh, WIDTH)
        state = state_like(tx, params)
        assert_nothing_moves(compiled(tx.update, params, state, params), SMALL)


def state_like(tx, params):
    """The state's shapes, what is like a parameter sharded as that is."""
    shardings = {leaf.shape: leaf.sharding for leaf in jax.tree.leaves(params)}

    def leaf(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings.get(x.shape))

    return jax.tree.map(leaf, jax.eval_shape(tx.init, params))
