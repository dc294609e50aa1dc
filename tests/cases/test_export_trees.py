"""Trees of other libraries in files: Haiku, lists of layers, boxes, PyTorch's names."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prunadag_optax import export

PAIRS = {
    "dense": (export.save_dense, export.load_dense),
    "sparse": (export.save_sparse, export.load_sparse),
}
W, V, B = np.eye(20, dtype=np.float32), np.ones((20, 1)), np.ones(20)
TREES = {
    "haiku": {"mlp/~/linear_0": {"w": W, "b": B}},
    "list of (W, b)": [(W, B), (V, np.ones(1))],
    "dict of lists": {"layers": [W, V]},
    "torch names": {"layer.0.weight": W, "layer.0.bias": B},
}


def assert_equal(loaded, tree):
    assert jax.tree.structure(loaded) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, loaded, tree)
    for got, wanted in zip(jax.tree.leaves(loaded), jax.tree.leaves(tree), strict=True):
        assert got.dtype == wanted.dtype


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_the_tree_comes_back(tmp_path, name, tree):
    save, load = PAIRS[name]
    save(tree, tmp_path / "f")
    assert_equal(load(tmp_path / "f"), tree)


@pytest.mark.parametrize("name", PAIRS)
def test_boxed_linen_parameters_come_back_without_boxes(tmp_path, name):
    save, load = PAIRS[name]
    init = nn.with_partitioning(nn.initializers.ones, (None, "m"))
    inputs = jnp.ones((1, 2))
    boxed = nn.Dense(2, kernel_init=init).init(jax.random.key(0), inputs)
    plain = nn.Dense(2, kernel_init=nn.initializers.ones).init(
        jax.random.key(0), inputs
    )
    save(boxed, tmp_path / "f")
    assert_equal(load(tmp_path / "f"), jax.tree.map(np.asarray, plain))


def test_both_formats_load_writable_arrays(tmp_path):
    for save, load in PAIRS.values():
        for w in (np.ones((2, 2)), np.eye(64)):
            save({"w": w}, tmp_path / "f")
            loaded = load(tmp_path / "f")["w"]
            loaded += 1
            np.testing.assert_array_equal(loaded, w + 1)
