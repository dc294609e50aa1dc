"""Leaves without elements leave no NaN in a state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prunadag_optax import masks, prunadag

PARAMS = {"w": jnp.array([[3.0, -1.0]]), "empty": jnp.zeros((0, 4))}


@pytest.mark.parametrize("scope", ["leaf", "global"])
def test_prunadag_with_an_empty_leaf(scope):
    tx, alone = prunadag(0.1, scope=scope), prunadag(0.1, scope=scope)
    with jax.debug_nans(True):
        state, expected = tx.init(PARAMS), alone.init(PARAMS["w"])
        for _ in range(3):
            updates, state = tx.update(PARAMS, state, PARAMS)
            same, expected = alone.update(PARAMS["w"], expected, PARAMS["w"])
    for leaf in jax.tree.leaves(state):
        assert not np.isnan(leaf).any()
    np.testing.assert_array_equal(updates["w"], same)
    assert updates["empty"].shape == (0, 4)


@pytest.mark.parametrize("scope", ["leaf", "global", lambda path, leaf: 1])
def test_masks_with_an_empty_leaf(scope):
    with jax.debug_nans(True):
        pruned, mask = jax.jit(lambda p: masks.prune(p, 0.5, scope=scope))(PARAMS)
    assert mask["w"].tolist() == [[True, False]]
    assert mask["empty"].shape == pruned["empty"].shape == (0, 4)
    assert masks.sparsity(mask) == 0.5
    # All that is chosen is empty.
    _, mask = masks.prune({"empty": PARAMS["empty"]}, 0.5, scope=scope)
    assert masks.sparsity(mask) == 0
