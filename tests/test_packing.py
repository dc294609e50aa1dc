"""Masks of one bit a weight: what they hold, and everywhere that masks are state."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp

from prunadag_optax import masks, recipes, schedules
from prunadag_optax import nnx as pruning_nnx
from prunadag_optax.linen import PruningTrainState
from prunadag_optax.methods import dynamic_sparse
from prunadag_optax.methods.gradual_pruning import gradual_magnitude_pruning


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@settings(deadline=None, max_examples=50)
@given(
    hnp.arrays(bool, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9))
)
def test_unpacking_gives_the_mask_and_packing_takes_an_eighth(mask):
    packed = masks.pack({"kernel": jnp.asarray(mask), "bias": None})
    assert packed["bias"] is None
    np.testing.assert_array_equal(masks.unpack(packed)["kernel"], mask)
    assert packed["kernel"].bits.nbytes == -(-mask.size // 8)
    equal(masks.pack(packed), packed)
    np.testing.assert_array_equal(masks.unpack(jnp.asarray(mask)), mask)


def test_under_jit_vmap_and_scan():
    mask = jax.random.bernoulli(jax.random.key(0), 0.5, (6, 3, 5))
    packed = jax.jit(jax.vmap(masks.pack))(mask)
    assert packed.bits.shape == (6, 2)
    equal(jax.vmap(masks.unpack)(packed), mask)
    equal(masks.unpack(packed), mask)

    def body(held, _):
        return masks.pack(masks.unpack(held) & True), masks.sparsity(held)

    last, shares = jax.lax.scan(body, masks.pack(mask[0]), None, length=3)
    equal(masks.unpack(last), mask[0])
    assert float(shares[2]) == float(masks.sparsity(mask[0]))


def params():
    return {
        "kernel": jax.random.normal(jax.random.key(1), (12, 9)),
        "bias": jnp.ones(9),
    }


def bytes_of(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def test_optimizers_take_the_same_steps():
    x = params()
    mask = masks.magnitude_mask(x, 0.5)
    density = schedules.cubic_density(0.2, begin=0, end=6)

    def optimizers(packed):
        yield optax.chain(optax.adam(0.1), masks.keep_pruned(mask, packed=packed))
        yield gradual_magnitude_pruning(optax.adam(0.1), density, packed=packed)

    for plain, packed in zip(optimizers(False), optimizers(True), strict=True):
        runs = []
        for tx in (plain, packed):
            y, state, step = x, tx.init(x), jax.jit(tx.update)
            for _ in range(8):
                updates, state = step(jax.tree.map(jnp.cos, y), state, y)
                y = optax.apply_updates(y, updates)
            runs.append((y, state))
        (y, state), (z, small) = runs
        equal(y, z)
        held, bits = (optax.tree.get(s, "mask") for s in (state, small))
        equal(held, masks.unpack(bits))
        assert (bytes_of(held), bytes_of(bits)) == (108, 14)


def test_a_packed_mask_is_a_mask():
    x = params()
    mask = masks.magnitude_mask(x, 0.5)
    packed = masks.pack(mask)
    equal(masks.apply_mask(x, packed), masks.apply_mask(x, mask))
    equal(masks.finalise(x, packed), masks.finalise(x, mask))
    assert float(masks.sparsity(packed)) == 0.5
    further = masks.magnitude_mask(x, 0.75, previous=packed)
    equal(further, masks.magnitude_mask(x, 0.75, previous=mask))
    pruned, again = masks.prune_further(x, 0.75, packed)
    equal(masks.unpack(again), further)
    equal(pruned, masks.apply_mask(x, further))


def trained(state, steps):
    density = schedules.cubic_density(0.25, begin=0, end=4)

    @jax.jit
    def step(state):
        state = state.apply_gradients(grads=jax.tree.map(jnp.cos, state.params))
        return state.prune_on_schedule(density)

    for _ in range(steps):
        state = step(state)
    return state


def test_a_linen_state_with_a_checkpoint_in_the_middle(tmp_path):
    start = PruningTrainState.create(apply_fn=None, params=params(), tx=optax.adam(0.1))
    plain = trained(start.prune(0.0), 6)
    packed = trained(start.prune(0.0, packed=True), 3)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", packed)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", packed)
    restored = trained(restored, 3)
    equal(plain.params, restored.params)
    equal(plain.masks, masks.unpack(restored.masks))
    assert float(restored.sparsity()) == 0.75
    assert bytes_of(plain.masks) == 108
    assert bytes_of(restored.masks) == 14
    again, expected = restored.prune(0.9), plain.prune(0.9)
    equal(masks.unpack(again.masks), expected.masks)
    equal(again.finalised(), expected.finalised())


def test_a_model_of_nnx():
    runs, density = [], schedules.cubic_density(0.25, begin=0, end=4)
    for packed in (False, True):
        model = nnx.Linear(12, 9, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
        pruning = pruning_nnx.prune(model, 0.0, optimizer=optimizer, packed=packed)

        @nnx.jit
        def step(model, optimizer, pruning):
            grads = nnx.grad(lambda model: (model(jnp.ones((3, 12))) ** 2).mean())(
                model
            )
            pruning.update(optimizer, model, grads)
            pruning.prune_on_schedule(
                model, optimizer.step[...], density, optimizer=optimizer
            )

        for _ in range(5):
            step(model, optimizer, pruning)
        pruning.prune(model, 0.9, optimizer=optimizer)
        runs.append((nnx.as_pure(nnx.state(model)), pruning))
    (a, plain), (b, packed) = runs
    equal(a, b)
    equal(plain.tree(), packed.tree())
    assert (bytes_of(plain.masks), bytes_of(packed.masks)) == (108, 14)
    # The masks as they are given back can be held again.
    held = pruning_nnx.PruningMasks(masks.pack(plain.tree()))
    assert float(held.sparsity()) == float(plain.sparsity())


def test_what_is_refused():
    with pytest.raises(
        ValueError, match=r"mask\['bias'\] must be .* the dtype float32"
    ):
        masks.pack(params())


@pytest.mark.parametrize(("packed", "units"), [(False, "1.25"), (True, "1.03")])
def test_the_states_are_as_large_as_docs_methods_says(packed, units):
    # LeNet-300-100, and momentum SGD, which has a number for each weight.
    widths = (784, 300, 100, 10)
    params = {
        f"Dense_{i}": {"kernel": jnp.ones((m, n)), "bias": jnp.zeros(n)}
        for i, (m, n) in enumerate(itertools.pairwise(widths))
    }
    base, plan = optax.sgd(0.1, 0.9), {"every": 10, "end": 100, "packed": packed}
    for tx in (
        dynamic_sparse.static_sparse(base, 0.1, packed=packed),
        dynamic_sparse.sparse_evolution(base, 0.1, **plan),
        dynamic_sparse.rigl(base, 0.1, **plan),
        gradual_magnitude_pruning(base, lambda count: 0.1, packed=packed),
        recipes.ac_dc(100, sparsity=0.9, packed=packed),
    ):
        held, size = (
            sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
            for tree in (tx.init(params), params)
        )
        assert f"{held / size:.2f}" == units
