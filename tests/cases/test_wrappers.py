"""`optax.tree.map_params` over `keep_pruned`, and lookahead's two sets of weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prunadag_optax import masks
from tests.helpers import refused

PARAMS = {"w": jnp.arange(1.0, 7.0).reshape(3, 2), "v": jnp.ones((2, 2))}


def by_key(params):
    return {"w": params["w"] > 3, "v": params["v"] > 0}


@pytest.mark.parametrize("mask", [masks.magnitude_mask(PARAMS, 0.5), by_key])
def test_a_mask_is_like_a_parameter(mask):
    tx = optax.chain(optax.sgd(0.1, 0.9), masks.keep_pruned(mask))
    state = jax.eval_shape(tx.init, PARAMS)
    names = {"w": "name of w", "v": "name of v"}
    mapped = optax.tree.map_params(
        tx, lambda _, name: name, state, names, transform_non_params=lambda x: "other"
    )
    assert optax.tree.get(mapped, "trace") == names
    assert optax.tree.get(mapped, "mask") == names


def test_a_mask_without_some_leaves_is_a_state_of_its_own():
    params = {**PARAMS, "bias": jnp.ones(2)}
    mask = masks.magnitude_mask(params, 0.5)
    tx = optax.chain(optax.sgd(0.1, 0.9), masks.keep_pruned(mask))
    mapped = optax.tree.map_params(
        tx,
        lambda _, name: name,
        tx.init(params),
        {name: f"name of {name}" for name in params},
        transform_non_params=lambda x: x,
    )
    assert optax.tree.get(mapped, "trace")["bias"] == "name of bias"
    kept = optax.tree.get(mapped, "mask")
    jax.tree.map(np.testing.assert_array_equal, kept, mask)


def test_lookahead():
    params = {"w": jnp.arange(1.0, 7.0).reshape(3, 2)}
    both = optax.LookaheadParams.init_synced(params)
    with refused("LookaheadParams, which hold every weight twice: take params.slow"):
        masks.prune(both, 0.5)
    # What the message says to write, with the mask held for the fast weights.
    pruned, mask = masks.prune(both.slow, 0.5)
    both = optax.LookaheadParams.init_synced(pruned)
    fast = optax.chain(optax.adam(0.1), masks.keep_pruned(mask))
    tx = optax.lookahead(fast, sync_period=3, slow_step_size=0.5)
    state = tx.init(both)
    for _ in range(7):
        updates, state = jax.jit(tx.update)(
            jax.tree.map(jnp.ones_like, params), state, both
        )
        both = optax.apply_updates(both, updates)
    for side in (both.fast, both.slow):
        np.testing.assert_array_equal(side["w"] != 0, mask["w"])
    assert (both.slow["w"] != pruned["w"])[mask["w"]].all()
