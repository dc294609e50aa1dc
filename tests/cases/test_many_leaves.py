"""The first `masks.prune` of hundreds of leaves is compiled as fast as Adam's step.

What the time goes with is asserted, not the time: the number of programs, and that of
the operations in them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prunadag_optax import masks
from prunadag_optax._ranking import exact


def tree(layers):
    """Two leaves a layer; the kernels have seven shapes."""
    return {
        f"l{i}": {"k": jnp.ones((3 + i % 7, 4)), "b": jnp.zeros(4)}
        for i in range(layers)
    }


def text(function, *arguments):
    return jax.jit(function).lower(*arguments).as_text()


@pytest.mark.parametrize("scope", ["global", "leaf"])
def test_operations_against_those_of_adam(scope):
    params = tree(150)
    tx = optax.adam(1e-3)

    def step(params, state):
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    def prune(params):
        return masks.prune(params, 0.5, scope=scope)

    adam = text(step, params, tx.init(params)).count("\n")
    assert text(prune, params).count("\n") < 1.2 * adam
    # The searches are as many for 20 layers as for 150: one, or one for each size.
    loops = [text(prune, tree(n)).count("stablehlo.while") for n in (20, 150)]
    assert loops[0] == loops[1] < 20


@pytest.mark.parametrize("scope", ["global", "leaf"])
def test_programs(scope):
    params = tree(20)
    before = exact.keep_largest._cache_size(), exact._keep_of_each._cache_size()
    for sparsity in (0.5, 0.6, jnp.float32(0.7)):
        masks.prune(params, sparsity, scope=scope)
    after = exact.keep_largest._cache_size(), exact._keep_of_each._cache_size()
    assert sum(after) - sum(before) == 1


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("scope", ["global", "leaf"])
@pytest.mark.parametrize("ties", [False, True])
def test_the_masks_are_those_of_a_sort(held, scope, ties):
    rng = np.random.default_rng(0)

    def leaf(*shape):
        x = rng.integers(-2, 3, shape) if ties else rng.normal(size=shape)
        return np.asarray(x, np.float32)

    params = {f"l{i:02}": leaf(3 + i % 7, 4) for i in range(20)}
    params["l10"] = jnp.asarray(params["l10"], jnp.bfloat16)
    before = {name: rng.integers(0, 4, x.shape) > 0 for name, x in params.items()}
    mask = masks.magnitude_mask(
        params, 0.55, scope=scope, previous=before if held else None
    )
    groups = [list(params)] if scope == "global" else [[name] for name in params]
    for group in groups:
        keys = np.concatenate(
            [
                np.where(
                    before[name] | (not held),
                    np.abs(np.asarray(params[name], "f4")),
                    -1,
                ).ravel()
                for name in group
            ]
        )
        expected = np.ones(keys.size, bool)
        expected[np.argsort(keys, kind="stable")[: round(0.55 * keys.size)]] = False
        found = np.concatenate([np.ravel(mask[name]) for name in group])
        np.testing.assert_array_equal(found, expected & (keys >= 0))
