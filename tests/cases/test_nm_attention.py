"""N:M groups lie along the axes that a layer contracts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prunadag_optax import masks
from tests.helpers import refused

nn = pytest.importorskip("flax.linen")


def assert_two_of_four_rows(mask, rows):
    """As the matrix (rows, columns) that is multiplied with, two of each four rows."""
    matrix = np.asarray(mask).reshape(rows // 4, 4, -1)
    np.testing.assert_array_equal(matrix.sum(1), 2)


@pytest.mark.parametrize("heads", [2, 4])
def test_attention_in_linen(heads):
    x = jnp.ones((1, 3, 16))
    attention = nn.MultiHeadDotProductAttention(num_heads=heads, qkv_features=32)
    params = attention.init(jax.random.key(0), x, x)
    mask = masks.n_m_mask(params, 2, 4)["params"]
    assert mask["query"]["kernel"].shape == (16, heads, 32 // heads)
    for name in ("query", "key", "value"):
        assert_two_of_four_rows(mask[name]["kernel"], 16)
        assert mask[name]["bias"] is None
    # What is put out contracts the heads and their features, as one axis.
    assert mask["out"]["kernel"].shape == (heads, 32 // heads, 16)
    assert_two_of_four_rows(mask["out"]["kernel"], 32)


def test_groups_over_two_axes_are_those_of_the_matrix():
    x = jax.random.normal(jax.random.key(0), (3, 4, 5))  # 12 rows, groups of 6
    mask = masks.n_m_mask({"w": x}, 2, 6, axis=(0, 1))["w"]
    as_matrix = masks.n_m_mask({"w": x.reshape(12, 5)}, 2, 6)["w"]
    np.testing.assert_array_equal(mask.reshape(12, 5), as_matrix)
    moved = masks.n_m_mask({"w": jnp.moveaxis(x, 2, 0)}, 2, 6, axis=(1, -1))["w"]
    np.testing.assert_array_equal(jnp.moveaxis(moved, 0, 2), mask)


def test_attention_in_nnx_and_stacked():
    nnx = pytest.importorskip("flax.nnx")

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.attention = nnx.MultiHeadAttention(2, 8, rngs=rngs, decode=False)
            self.out = nnx.Linear(8, 4, rngs=rngs)

    model = Model(nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    for params in (state, nnx.as_pure(state), nnx.to_pure_dict(state)):
        mask = masks.n_m_mask(params, 2, 4)
        for *names, rows in (
            ("attention", "query", 8),
            ("attention", "out", 8),
            ("out", 8),
        ):
            module = mask
            for name in names:
                module = module[name]
            (kernel,) = jax.tree.leaves(module["kernel"])
            assert_two_of_four_rows(kernel, rows)
    params = nnx.to_pure_dict(nnx.state(model.attention, nnx.Param))
    stack = jax.tree.map(lambda x: jnp.stack([x, 2 * x, -x]), params)
    for layers, layer in zip(
        *map(
            jax.tree.leaves, (masks.n_m_mask(stack, 2, 4), masks.n_m_mask(params, 2, 4))
        ),
        strict=True,
    ):
        np.testing.assert_array_equal(layers, jnp.stack([layer] * 3))


def test_convolutions():
    x = jnp.ones((1, 9, 8))
    params = nn.Conv(3, (5,)).init(jax.random.key(0), x)["params"]
    with refused("axis must be given where it would be a guess", "params['kernel']"):
        masks.n_m_mask(params, 2, 4)
    mask = masks.n_m_mask({"Conv_0": params}, 2, 4)["Conv_0"]["kernel"]
    assert mask.shape == (5, 8, 3)
    np.testing.assert_array_equal(mask.reshape(5, 2, 4, 3).sum(2), 2)
    image = jax.random.normal(jax.random.key(0), (3, 3, 8, 5))
    mask = masks.n_m_mask({"kernel": image}, 2, 4)["kernel"]
    np.testing.assert_array_equal(mask.reshape(3, 3, 2, 4, 5).sum(3), 2)


def test_weights_of_equinox_and_torch_have_their_outputs_first():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Linear:
        weight: jax.Array

    weight = jax.random.normal(jax.random.key(0), (6, 8))
    for params in (Linear(weight), {"fc.weight": weight}):
        (mask,) = jax.tree.leaves(masks.n_m_mask(params, 2, 4))
        np.testing.assert_array_equal(mask.reshape(6, 2, 4).sum(2), 2)


def test_no_guess():
    params = {"layers": {"kernel": jnp.ones((4, 8, 12))}, "w": jnp.ones((8, 2))}
    with refused(
        "axis must be given where it would be a guess which axes a layer contracts: "
        "params['layers']['kernel'] has the shape (4, 8, 12). Write axis=-2",
        "axis=lambda path, leaf: ...",
    ):
        masks.n_m_mask(params, 2, 4)
    # Nor is `out` alone an attention's.
    with refused("axis must be given", "params['out']['kernel']"):
        masks.n_m_mask({"out": params["layers"]}, 2, 4)
    by_leaf = masks.n_m_mask(
        params, 2, 4, axis=lambda path, leaf: (0, 1) if leaf.ndim == 3 else 0
    )
    assert_two_of_four_rows(by_leaf["layers"]["kernel"], 32)
    np.testing.assert_array_equal(
        by_leaf["w"], masks.n_m_mask(params, 2, 4, axis=-2)["w"]
    )
    with refused("m must divide axes (0, 1) of params['w']", "(8, 2); got m=5"):
        masks.n_m_mask({"w": params["w"]}, 2, 5, axis=(0, 1))
    for axis in ("in", 1.5, (), (0, 0), (0, -2), [None]):
        with refused("axis must be an integer, several different ones, or a function"):
            masks.n_m_mask({"w": params["w"]}, 2, 4, axis=axis)
