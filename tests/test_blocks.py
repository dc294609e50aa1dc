"""Block and channel masks, against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from prunadag_optax import masks
from prunadag_optax.methods.gradual_pruning import gradual_magnitude_pruning
from prunadag_optax.schedules import cubic_density


def blocks_of(x, height, width):
    """The blocks of a matrix, row by row, smaller at its ends."""
    for i in range(0, x.shape[0], height):
        for j in range(0, x.shape[1], width):
            yield np.s_[i : i + height, j : j + width]


def transcription(x, sparsity, height, width, pooling):
    pool = np.mean if pooling == "average" else np.max
    found = [*blocks_of(x, height, width)]
    order = np.argsort([pool(np.abs(x[b])) for b in found], kind="stable")
    mask = np.ones(x.shape, bool)
    for i in order[: round(sparsity * len(found))]:
        mask[found[i]] = False
    return mask


@settings(deadline=None, max_examples=60)
@given(
    # Multiples of 1/4: means are exact, and ties are many.
    x=hnp.arrays(
        np.float32, st.sampled_from([(4, 6), (5, 7), (1, 9)]),
        elements=st.integers(-8, 8).map(lambda n: n / 4),
    ),
    sparsity=st.floats(0, 1),
    size=st.sampled_from([(1, 1), (2, 2), (4, 1), (1, 4), (8, 8)]),
    pooling=st.sampled_from(["average", "max"]),
)  # fmt: skip
def test_a_matrix_loses_the_blocks_of_a_sort(x, sparsity, size, pooling):
    found = masks.block_mask(jnp.asarray(x), sparsity, size, pooling=pooling)
    expected = transcription(x.astype(np.float64), sparsity, *size, pooling)
    np.testing.assert_array_equal(found, expected)


def tree():
    a, b = jax.random.split(jax.random.key(3))
    return {
        "conv": {"kernel": jax.random.normal(a, (3, 3, 4, 8)), "bias": jnp.ones(8)},
        "dense": {"kernel": jax.random.normal(b, (12, 6))},
    }


def test_blocks_lie_in_the_last_axes_and_are_counted_over_the_tree():
    mask = masks.block_mask(tree(), 0.5, (2, 4))
    conv = np.asarray(mask["conv"]["kernel"]).reshape(3, 3, 2, 2, 2, 4)
    assert mask["conv"]["bias"] is None
    per_block = conv.sum((3, 5))
    assert set(np.unique(per_block)) <= {0, 8}
    dense = np.asarray(mask["dense"]["kernel"])
    whole = [dense[b].all() or not dense[b].any() for b in blocks_of(dense, 2, 4)]
    assert all(whole)
    kept = (per_block > 0).sum() + sum(dense[b].all() for b in blocks_of(dense, 2, 4))
    assert kept == (36 + 12) / 2


def test_a_block_by_leaf_under_jit_and_on_top_of_a_mask():
    def block(path, leaf):
        return (1, 1, leaf.shape[2], 1) if leaf.ndim == 4 else (3, 2)

    x = tree()
    half = jax.jit(lambda s: masks.block_mask(x, s, block))(0.5)
    more = masks.block_mask(x, 0.75, block, previous=half)
    for before, after in zip(jax.tree.leaves(half), jax.tree.leaves(more), strict=True):
        assert not bool(jnp.any(after & ~before))
    blocks = 3 * 3 * 8 + 4 * 3
    conv = np.asarray(more["conv"]["kernel"]).all(2).sum()
    dense = np.asarray(more["dense"]["kernel"]).reshape(4, 3, 3, 2).all((1, 3)).sum()
    assert conv + dense == blocks - round(0.75 * blocks)


def test_budgets_count_blocks():
    mask = masks.block_mask(tree(), 0.75, (2, 2), layer_budget="uniform")
    assert int(mask["conv"]["kernel"].sum()) == 4 * 18
    # 18 of 72 blocks, and 4 or 5 of 18, so that the total of 90 / 4 is exact.
    assert int(mask["dense"]["kernel"].sum()) == 4 * 4


@pytest.mark.parametrize("pooling", ["average", "max"])
def test_channels_are_those_with_the_smallest_magnitudes(pooling):
    x = tree()
    mask = masks.channel_mask(x, 0.5, pooling=pooling)
    pool = jnp.mean if pooling == "average" else jnp.max
    size = jnp.concatenate([
        pool(jnp.abs(x["conv"]["kernel"]), (0, 1, 2)),
        pool(jnp.abs(x["dense"]["kernel"]), 0),
    ])  # fmt: skip
    kept = jnp.concatenate([
        mask["conv"]["kernel"].all((0, 1, 2)), mask["dense"]["kernel"].all(0),
    ])  # fmt: skip
    np.testing.assert_array_equal(kept, np.argsort(np.argsort(size)) >= 7)
    assert int(mask["conv"]["kernel"].sum()) == 36 * int(kept[:8].sum())
    rows = masks.channel_mask(x, 0.5, axis=0)["dense"]["kernel"]
    assert set(np.asarray(rows.sum(1))) <= {0, 6}


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"block must be the sizes .*got \(2, 0\)"):
        masks.block_mask(tree(), 0.5, (2, 0))
    with pytest.raises(ValueError, match=r"block must be .*shape"):
        masks.block_mask(tree(), 0.5, lambda path, leaf: (2, 2))
    with pytest.raises(ValueError, match="pooling must be 'average' or 'max'"):
        masks.block_mask(tree(), 0.5, (2, 2), pooling="mean")
    with pytest.raises(ValueError, match=r"axis must be one of .* got 4"):
        masks.channel_mask(tree(), 0.5, axis=4)
    with pytest.raises(ValueError, match=r"sparsity must be .* got 50"):
        masks.block_mask(tree(), 50, (2, 2))


@pytest.mark.parametrize("block", [(2, 2), masks.channels()])
def test_gradual_pruning_takes_whole_blocks(block):
    x = tree()
    density = cubic_density(0.25, begin=0, end=4)
    tx = gradual_magnitude_pruning(optax.adam(0.1), density, block=block, packed=True)
    state, step = tx.init(x), jax.jit(tx.update)
    for _ in range(6):
        updates, state = step(jax.tree.map(jnp.cos, x), state, x)
        x = optax.apply_updates(x, updates)
    kept = masks.unpack(state.mask)
    again = masks.block_mask(x, 0.75, block)
    jax.tree.map(np.testing.assert_array_equal, kept, again)
