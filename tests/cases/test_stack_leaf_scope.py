"""Layers stacked in one leaf: counts are exact in each of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prunadag_optax import evaluation, masks, schedules
from prunadag_optax.methods.gradual_pruning import gradual_magnitude_pruning
from tests.helpers import refused

SCALES = jnp.array([1.0, 0.3, 0.1, 0.01])
PARAMS = {
    "head": {"kernel": jax.random.normal(jax.random.key(1), (16, 3))},
    "layers": {
        "bias": jnp.ones((4, 16)),
        "kernel": jax.random.normal(jax.random.key(0), (4, 16, 16))
        * SCALES[:, None, None],
    },
}


def stacked(path, leaf):
    del leaf
    return int(path[0].key == "layers")


def kept_by_layer(tree):
    kernel = tree["layers"]["kernel"]
    return (np.asarray(kernel) != 0).sum((1, 2)).tolist()


def test_every_layer_has_its_count():
    mask = masks.magnitude_mask(PARAMS, 0.8, scope=stacked)
    assert kept_by_layer(mask) == [51] * 4  # 256 - round(0.8 * 256)
    assert int(mask["head"]["kernel"].sum()) == 48 - round(0.8 * 48)
    for layer, keep in zip(
        PARAMS["layers"]["kernel"], mask["layers"]["kernel"], strict=True
    ):
        np.testing.assert_array_equal(keep, masks.magnitude_mask(layer, 0.8))
    # Ranked as one, the last layers have hardly a weight.
    as_one = kept_by_layer(masks.magnitude_mask(PARAMS, 0.8, scope="leaf"))
    assert as_one[0] > 150
    assert as_one[-1] == 0


@pytest.mark.parametrize("compiled", [False, True])
def test_on_top_of_a_mask(compiled):
    def further(params, sparsity, held):
        return masks.prune_further(params, sparsity, held, scope=stacked)

    pruned, held = masks.prune(PARAMS, 0.5, scope=stacked)
    further = jax.jit(further) if compiled else further
    pruned, mask = further(pruned, jnp.float32(0.8), held)
    assert kept_by_layer(mask) == kept_by_layer(pruned) == [51] * 4
    assert not (mask["layers"]["kernel"] & ~held["layers"]["kernel"]).any()
    with refused("sparsity must be at least 0.80", "what is pruned already; got 0.6"):
        masks.prune_further(pruned, 0.6, mask, scope=stacked)


def test_ties_and_two_axes_that_stack():
    x = jnp.asarray(np.random.default_rng(0).integers(-2, 3, (2, 3, 4, 5)), jnp.float32)
    mask = masks.magnitude_mask({"w": x}, 0.35, scope=lambda path, leaf: 2)["w"]
    for layer, keep in zip(x.reshape(6, 4, 5), mask.reshape(6, 4, 5), strict=True):
        order = np.argsort(np.abs(layer), axis=None, kind="stable")
        expected = np.ones(20, bool)
        expected[order[:7]] = False
        np.testing.assert_array_equal(keep.ravel(), expected)


def test_everything_that_takes_a_scope():
    curve = evaluation.pruning_curve(
        lambda params: kept_by_layer(params)[-1], PARAMS, [0.0, 0.8], scope=stacked
    )
    assert curve.values["metric"] == (256, 51)
    square = lambda params: sum(jnp.sum(x**2) for x in jax.tree.leaves(params))  # noqa: E731
    rho, _ = evaluation.pruning_error(square, PARAMS, [0.8], scope=stacked)
    pruned, _ = masks.prune(PARAMS, 0.8, scope=stacked)
    np.testing.assert_allclose(rho[0], 2 * jnp.sqrt(square(pruned)), rtol=1e-5)
    density = schedules.cubic_density(0.2, begin=0, end=4)
    mask = masks.mask_on_schedule(PARAMS, None, 4, density, scope=stacked)
    assert kept_by_layer(mask) == [51] * 4
    tx = gradual_magnitude_pruning(optax.sgd(0.1), density, scope=stacked)
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(5):
        grads = jax.tree.map(jnp.zeros_like, params)
        updates, state = jax.jit(tx.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert kept_by_layer(params) == [51] * 4


def test_flax_helpers():
    pytest.importorskip("flax")
    from flax import nnx

    from prunadag_optax import nnx as pruning_nnx
    from prunadag_optax.linen import PruningTrainState

    state = PruningTrainState.create(apply_fn=None, params=PARAMS, tx=optax.sgd(0.1))
    assert kept_by_layer(state.prune(0.8, scope=stacked).params) == [51] * 4

    make = nnx.vmap(lambda rngs: nnx.Linear(16, 16, rngs=rngs))
    model = nnx.split_rngs(splits=4)(make)(nnx.Rngs(0))
    model.kernel[...] = PARAMS["layers"]["kernel"]
    pruning_nnx.prune(model, 0.8, scope=lambda path, leaf: 1)
    assert (model.kernel[...] != 0).sum((1, 2)).tolist() == [51] * 4


@pytest.mark.parametrize("axes", [3, -1, 1.0, None, True, "leaf"])
def test_a_scope_that_is_no_number_of_axes(axes):
    with refused(
        "scope must return how many leading axes stack layers, 0 to 1 for",
        f"params['w'] of shape (4, 2); got {axes!r}.",
    ):
        masks.prune({"w": jnp.ones((4, 2))}, 0.5, scope=lambda path, leaf: axes)


@pytest.mark.parametrize("scope", ["layer", 1, None, {"w": 1}])
def test_a_scope_that_is_none(scope):
    with refused("scope must be 'global', 'leaf' or a function (path, leaf) -> how"):
        masks.prune({"w": jnp.ones((4, 2))}, 0.5, scope=scope)
