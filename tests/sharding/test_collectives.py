"""What the programs of divided parameters move between devices.

It is read off the compiled programs: beyond what the model itself needs, an optimizer
step may move scalars only.
"""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from prunadag_optax import masks, prunadag
from tests.sharding.layouts import (
    LAYOUTS,
    MEBIBYTE,
    SMALL,
    WIDTH,
    abstract,
    assert_nothing_moves,
    collectives,
    compiled,
    is_shape,
    kinds,
    layouts,
    scopes,
    state_of,
    training_step,
)

pytestmark = pytest.mark.skipif(
    not hasattr(jax, "set_mesh"), reason="needs jax.set_mesh"
)


def test_collectives_are_found():
    program = """
  %all-reduce.1 = f32[1024,512]{1,0} all-reduce(%x), channel_id=1, to_apply=%add
  %all-gather-start.2 = (f32[4]{0}, f32[8,4]{1,0:T(8,128)}) all-gather-start(%y), x=1
  ROOT %all-to-all = (bf16[3,2]{1,0}, pred[]) all-to-all(%a, %b), channel_id=3
  %reduce-scatter = s64[7]{0} reduce-scatter(%z), dimensions={0}
  %all-reduce.2 = (f32[], s32[2]{0}) all-reduce(%u, %v), to_apply=%add
  %collective-permute-done = f8e4m3fn[5]{0} collective-permute-done(%w)
  %collective-permute.3 = f8e4m3fn[5]{0} collective-permute(%w), channel_id=9
  %fusion = f32[9]{0} fusion(%all-reduce.1), kind=kLoop, calls=%all-gather.9
"""
    assert collectives(program) == {
        ("all-reduce", 4 * 1024 * 512): 1,
        ("all-gather", 16): 1,
        ("all-gather", 128): 1,
        ("all-to-all", 12): 1,
        ("all-to-all", 1): 1,
        ("reduce-scatter", 56): 1,
        ("all-reduce", 4): 1,
        ("all-reduce", 8): 1,
        ("collective-permute", 5): 1,
    }


@functools.cache
def moved_by_model(layout, kind):
    """The collectives of a step of Adagrad: those of the model, and no others."""
    mesh, tx = layout.mesh(kind), optax.adagrad(0.1)
    with jax.set_mesh(mesh):
        params, batch = abstract(layout, mesh, WIDTH)
        state = state_of(tx, params, mesh)
        assert not compiled(tx.update, params, state, params)
        return compiled(training_step(tx, layout.loss), params, state, batch)


@layouts
@scopes
@pytest.mark.parametrize(
    ("kind", "variant"),
    # v3 does all that the others do.
    [(AxisType.Auto, "v3"), (AxisType.Explicit, "v3"), (AxisType.Auto, "v4")]
    + [pytest.param(AxisType.Auto, v, marks=pytest.mark.slow) for v in ("v1", "v2")],
    ids=str,
)
def test_optimizer_moves_scalars_only(layout, kind, variant, scope):
    tx = prunadag(0.1, variant=variant, scope=scope)
    mesh = layout.mesh(kind)
    with jax.set_mesh(mesh):
        params, _ = abstract(layout, mesh, WIDTH)
        found = compiled(tx.update, params, state_of(tx, params, mesh), params)
    assert found, "counts over sharded leaves need some collective"
    assert_nothing_moves(found, SMALL)


@kinds
@layouts
def test_a_step_moves_what_the_model_needs_and_scalars(layout, kind):
    tx = prunadag(0.1)
    mesh = layout.mesh(kind)
    with jax.set_mesh(mesh):
        params, batch = abstract(layout, mesh, WIDTH)
        state = state_of(tx, params, mesh)
        found = compiled(training_step(tx, layout.loss), params, state, batch)
    model = moved_by_model(layout, kind)
    # The model's own: whole kernels with FSDP, sums of gradients with both.
    assert max(size for _, size in model) > MEBIBYTE
    assert_nothing_moves(found - model, SMALL)


@kinds
def test_replicated_parameters_move_nothing(kind):
    layout, tx = LAYOUTS["fsdp"], prunadag(0.1)
    mesh = layout.mesh(kind)
    whole = NamedSharding(mesh, P())
    with jax.set_mesh(mesh):
        params = jax.tree.map(
            lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=whole),
            layout.shapes(WIDTH),
            is_leaf=is_shape,
        )
        state = state_of(tx, params, mesh)
        assert not compiled(tx.update, params, state, params)


@kinds
@layouts
def test_masks_move_scalars_only(layout, kind):
    mesh = layout.mesh(kind)

    def kernels(path, leaf):
        del path
        return leaf.ndim > 1

    def prune(params):
        pruned, mask = masks.prune(params, 0.9, where=kernels)
        again = masks.magnitude_mask(params, 0.95, scope="leaf", previous=mask)
        return pruned, again, masks.sparsity(mask), masks.sparsity(pruned)

    with jax.set_mesh(mesh):
        params, _ = abstract(layout, mesh, WIDTH)
        assert_nothing_moves(compiled(prune, params), SMALL)
        tx = optax.chain(optax.sgd(0.1), masks.keep_pruned(params_mask))
        held = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bool_, sharding=x.sharding),
            params,
        )
        assert not compiled(masks.apply_mask, params, held)
        state = (jax.eval_shape(tx.init, params)[0], masks.KeepPrunedState(held))
        assert not compiled(tx.update, params, state, params)


def params_mask(params):
    return jax.tree.map(lambda x: jnp.ones_like(x, bool), params)


def concatenated(params):
    vector = jnp.concatenate([x.ravel() for x in jax.tree.leaves(params)])
    return jax.lax.top_k(jnp.abs(vector), vector.size // 10)[0][-1]


def sorted_by_leaf(params):
    leaves = [jnp.abs(x).ravel() for x in jax.tree.leaves(params)]
    return sum(jnp.sort(x)[-x.size // 10] for x in leaves)


@layouts
@pytest.mark.parametrize("naive", [concatenated, sorted_by_leaf])
def test_naive_forms_are_found_out(layout, naive):
    mesh = layout.mesh(AxisType.Auto)
    with jax.set_mesh(mesh):
        params, batch = abstract(layout, mesh, WIDTH)

        def update(updates, state, params=None):
            threshold = naive(params)
            return jax.tree.map(
                lambda u: jnp.where(u > threshold, u, 0), updates
            ), state

        tx = optax.chain(
            optax.sgd(0.1),
            optax.GradientTransformation(lambda _: optax.EmptyState(), update),
        )
        state = tx.init(params)
        alone = compiled(tx.update, params, state, params)
        step = compiled(training_step(tx, layout.loss), params, state, batch)
    with pytest.raises(AssertionError, match="more than 1048576 bytes"):
        assert_nothing_moves(alone, MEBIBYTE)
    with pytest.raises(AssertionError, match="more than 1048576 bytes"):
        assert_nothing_moves(step - moved_by_model(layout, AxisType.Auto), MEBIBYTE)
