"""Constants of removed units go into the next bias: exact, or measured."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prunadag_optax import structure
from tests.structure.models import filled


class Net(nn.Module):
    """Convolutions, with or without padding and BatchNorm, and dense layers."""

    padding: str
    norm: bool

    @nn.compact
    def __call__(self, x):
        for width in (6, 7):
            x = nn.Conv(width, (3, 3), padding=self.padding, use_bias=not self.norm)(x)
            if self.norm:
                x = nn.BatchNorm(use_running_average=True)(x)
            x = nn.sigmoid(x)
        x = nn.sigmoid(nn.Dense(9)(x.reshape(x.shape[0], -1)))
        return nn.Dense(3)(x)


def made(padding, norm):
    x = jax.random.normal(jax.random.key(1), (2, 7, 7, 2))
    module = Net(padding, norm)
    variables = filled(jax.eval_shape(module.init, jax.random.key(0), x))
    found = structure.trace(module.apply, variables, x)
    keep = {group.name: np.arange(group.size) % 2 == 0 for group in found.groups}
    return module, variables, x, found, keep


@pytest.mark.parametrize("norm", [False, True])
def test_exact_without_padding(norm):
    module, variables, x, found, keep = made("VALID", norm)
    folded, deviation = structure.fold(found, keep, variables, x)
    assert deviation < 1e-6
    # The full network with silent incoming weights, by hand.
    silent = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            leaf
            * np.asarray(keep[path[1].key], leaf.dtype).reshape(
                [1] * (leaf.ndim - 1) + [-1]
            )
            if path[-1].key == "kernel" and path[1].key in keep
            else leaf
        ),
        variables,
    )
    expected = module.apply(silent, x)
    small = structure.small_apply(found, keep)(structure.shrink(found, keep, folded), x)
    np.testing.assert_allclose(small, expected, rtol=2e-5)
    plain = structure.small_apply(found, keep)(
        structure.shrink(found, keep, variables), x
    )
    assert np.abs(plain - expected).max() > 1e-2


def test_padding_is_measured():
    _, variables, x, found, keep = made("SAME", False)
    only_convolutions = {name: mask for name, mask in keep.items() if "Conv" in name}
    _, deviation = structure.fold(found, only_convolutions, variables, x)
    assert 1e-4 < deviation < 0.5


def test_nothing_to_fold_into_leaves_the_variables():
    def apply(p, x):
        return jnp.tanh(x @ p["w"] + p["b"][None]) @ p["v"]

    params = filled({"w": jnp.ones((3, 4)), "b": jnp.ones(4), "v": jnp.ones((4, 2))})
    x = jnp.ones((2, 3))
    found = structure.trace(apply, params, x)
    keep = {"w": np.array([True, True, False, True])}
    folded, deviation = structure.fold(found, keep, params, x)
    for name, leaf in params.items():
        np.testing.assert_array_equal(folded[name], leaf)
    assert deviation > 1e-3
