"""The tables cover every axis of the models once, and the models are what they say."""

import collections

import jax
import numpy as np
import pytest

from tests.structure.models import LARGE, MODELS, named
from tests.structure.tables import FLAGS, FROZEN, PARTLY_FROZEN, TABLES


def packs(parts, size):
    """Whether the parts can be laid in rows of exactly `size`."""
    if not parts:
        return True
    first, *rest = parts

    def fill(left, rest):
        if left == 0:
            return packs(rest, size)
        return any(
            fill(left - part, rest[:n] + rest[n + 1 :])
            for n, part in enumerate(rest)
            if part <= left
        )

    return first <= size and fill(size - first, rest)


def test_parts_fill_rows():
    assert packs([12, 12], 12)  # a product, as heads and their dimensions
    assert packs([36, 24, 12], 36)
    assert packs([12, 7, 5], 12)
    assert not packs([7, 4], 12)
    assert not packs([12, 5], 12)
    assert not packs([13], 12)


def test_every_model_has_a_table():
    assert set(TABLES) == set(FLAGS) == set(FROZEN) == set(PARTLY_FROZEN) == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_every_axis_is_in_groups_or_frozen(name):
    leaves = named(MODELS[name]().variables)
    axes = {
        (path, axis): size
        for path, leaf in leaves.items()
        for axis, size in enumerate(leaf.shape)
        if size > 1
    }
    covers = collections.defaultdict(list)
    for size, members in TABLES[name]:
        assert size > 1
        for member, positions in members.items():
            covers[member].append(size * positions)
    frozen, partly = FROZEN[name], PARTLY_FROZEN[name]
    assert not frozen & set(covers)
    assert set(partly) <= set(covers)
    assert frozen | set(covers) == set(axes)
    for member, parts in covers.items():
        assert packs(parts, axes[member] - partly.get(member, 0)), (member, parts)
    assert len(FLAGS[name]) == len(TABLES[name])


@pytest.mark.parametrize("name", MODELS)
def test_models_run_and_no_weight_is_special(name):
    model = MODELS[name]()
    for path, leaf in named(model.variables).items():
        values = np.asarray(leaf)
        assert not np.isin(values, (0, 1)).any(), path
        assert len(np.unique(values)) > 1 or values.size == 1, path
        if path.removesuffix("/value").endswith("/var"):
            assert (values > 0).all(), path
    output = jax.eval_shape(model.apply, model.variables, *model.inputs)
    if model.state is None:
        assert all(hasattr(leaf, "shape") for leaf in jax.tree.leaves(output))
        return
    state, variables = model.state(output), named(model.variables)
    assert state
    for path, leaf in state.items():
        assert leaf.shape == variables[path].shape, path


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("vgg_16", 138e6),
        ("resnet_50", 25.6e6),
        ("linen_transformer_12", 1e7),
        ("nnx_transformer_12", 1e7),
        ("llama_1b", 1.24e9),
    ],
)
def test_large_models_have_the_size_that_they_say(name, count):
    shapes = jax.tree.leaves(LARGE[name]().variables)
    assert sum(x.size for x in shapes) == pytest.approx(count, rel=0.05)
