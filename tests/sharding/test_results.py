"""Parameters and optimizer state divided over a mesh: the results of one device.

Two layouts, each on meshes with axis types Auto and Explicit: FSDP, where every leaf is
divided on its largest axis, and tensor parallelism of a transformer block, where the
kernels of a pair are divided by columns and then by rows.
"""

import functools

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from prunadag_optax import scale_by_prunadag
from tests.helpers import assert_close, enable_x64
from tests.sharding.layouts import (
    assert_placed,
    drawn,
    gridded,
    kinds,
    layouts,
    normal,
    state_shardings,
    training_step,
    trees_like_params,
    updates_of,
)

pytestmark = pytest.mark.skipif(
    not hasattr(jax, "set_mesh"), reason="needs jax.set_mesh"
)


@functools.cache
def on_one_device(layout, draw, steps, variant, scope):
    """The transformation, what it starts from, and what one device makes of it."""
    tx = scale_by_prunadag(0.1, variant=variant, scope=scope, momentum=0.5)
    params, *gradients = (
        drawn(layout.shapes(64), seed, draw) for seed in range(1 + steps)
    )
    start = params, tx.init(params), gradients
    return tx, start, jax.device_get(updates_of(tx, *start))


@kinds
@layouts
@pytest.mark.parametrize(
    ("variant", "scope", "draw", "steps"),
    [
        # Counts are integers, and all else is a function of one component; a compiler
        # may still write a division by a root as a product in one of the programs.
        ("v4", "global", normal, 3),
        # The norms are sums, whose order over the devices is all that can differ; here
        # no sum rounds.
        ("v3", "global", gridded, 1),
        pytest.param("v3", "leaf", gridded, 1, marks=pytest.mark.slow),
    ],
)
def test_sharded_update_equals_one_device(layout, kind, variant, scope, draw, steps):
    tx, start, expected = on_one_device(layout, draw, steps, variant, scope)
    if draw is gridded:
        assert sum(x.size for x in jax.tree.leaves(start[0])) <= 2**18
    mesh = layout.mesh(kind)
    shardings, _ = layout.shardings(mesh, 64)
    with jax.set_mesh(mesh):
        params = jax.device_put(start[0], shardings)
        wanted = state_shardings(tx, params, mesh, shardings)
        state = jax.device_put(start[1], wanted)
        gradients = [jax.device_put(tree, shardings) for tree in start[2]]
        result = updates_of(tx, params, state, gradients)
    assert_close(jax.device_get(result), expected)


def trained(tx, loss, params, state, batches, shardings=None):
    # Without shardings of the outputs the compiler may divide a replicated bias.
    options = {} if shardings is None else {"out_shardings": (*shardings, None)}
    step, losses = jax.jit(training_step(tx, loss), **options), []
    for batch in batches:
        params, state, value = step(params, state, batch)
        losses.append(value)
    assert step._cache_size() == 1
    return losses, params, state


@functools.cache
def trained_on_one_device(layout):
    tx = scale_by_prunadag(0.01, variant="v3", momentum=0.9)
    tx = optax.chain(optax.clip_by_global_norm(1.0), tx, optax.scale(-1.0))
    params = jax.tree.map(np.float64, drawn(layout.shapes(64), 0, normal))
    batches = np.random.default_rng(1).normal(size=(4, *layout.batch(64)))
    start = jax.device_put((params, tx.init(params), list(batches)))
    return tx, start, jax.device_get(trained(tx, layout.loss, *start))


@kinds
@layouts
def test_training_equals_one_device(layout, kind):
    # Gradients and norms are summed in another order, which may change the class of a
    # component near a threshold. In float64 it would have to stand within 1e-16 of it,
    # so every component has to agree; in float32 a few of a million would not.
    mesh = layout.mesh(kind)
    shardings, over_batch = layout.shardings(mesh, 64)
    with enable_x64():
        tx, (params, state, batches), expected = trained_on_one_device(layout)
        with jax.set_mesh(mesh):
            wanted = state_shardings(tx, params, mesh, shardings)
            result = trained(
                tx,
                layout.loss,
                jax.device_put(params, shardings),
                jax.device_put(state, wanted),
                [jax.device_put(batch, over_batch) for batch in batches],
                (shardings, wanted),
            )
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12),
        result,
        expected,
    )
    losses, moved, state = result
    assert losses[-1] < losses[0]
    assert_placed((moved, state), (shardings, wanted))


# Sharding of the state.


@kinds
@layouts
def test_state_and_updates_are_sharded_as_the_parameters(layout, kind):
    tx = scale_by_prunadag(momentum=0.9, accumulator_dtype="float32")
    mesh = layout.mesh(kind)
    shardings, _ = layout.shardings(mesh, 64)
    whole = NamedSharding(mesh, P())
    with jax.set_mesh(mesh):
        params = jax.device_put(drawn(layout.shapes(64), 0, normal), shardings)
        states = [tx.init(params)]
        # A compiled `init` does not look at the parameters' values, so on an Auto mesh
        # it does not see where they are; it has to be told.
        wanted = state_shardings(tx, params, mesh, shardings)
        states.append(jax.jit(tx.init, out_shardings=wanted)(params))
        if kind is AxisType.Explicit:
            states.append(jax.jit(tx.init)(params))
        update = jax.jit(tx.update)
        for state in states:
            updates, after = update(params, state, params)
            for tree in (*trees_like_params(state), *trees_like_params(after), updates):
                assert_placed(tree, shardings)
            assert_placed((state.count, after.count), (whole, whole))
            assert len(trees_like_params(after)) == 3
