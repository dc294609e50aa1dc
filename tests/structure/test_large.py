"""Groups of models of real sizes, from shapes alone."""

import collections
import functools
import re

import jax
import numpy as np
import pytest

from prunadag_optax import structure
from tests.structure.models import LARGE, made


@functools.cache
def halved(name):
    """A model, its structure, a choice of half of all units and the smaller shapes."""
    model, found = made(name)
    keep = {group.name: np.arange(group.size) % 2 == 0 for group in found.groups}
    shapes = jax.eval_shape(lambda tree: tree, model.variables)
    small = structure.shrink(found, keep, shapes)
    return model, found, keep, small


def kinds(found):
    """(units, members, positions a unit in each kind of member) -> number of groups."""
    return collections.Counter(
        (
            group.size,
            len(group.members),
            tuple(sorted({member.width for member in group.members})),
        )
        for group in found.groups
    )


def flagged(found):
    return {group.name: group.flags for group in found.groups if group.flags}


# A convolution's output axis, four vectors of BatchNorm, one reader: 6 members. Readers
# of a residual stream are the 1 x 1 convolutions and projections after it.
GROUPS = {
    "vgg_64_128_256": {
        (64, 6, (1,)): 2,
        (128, 6, (1,)): 2,
        (256, 6, (1,)): 1,
        (256, 6, (1, 16)): 1,  # 4 x 4 pixels are flattened
        (512, 3, (1,)): 1,
    },
    "vgg_16": {
        (64, 6, (1,)): 2,
        (128, 6, (1,)): 2,
        (256, 6, (1,)): 3,
        (512, 6, (1,)): 5,
        (512, 6, (1, 49)): 1,  # 7 x 7 pixels are flattened
        (4096, 3, (1,)): 2,
    },
    "resnet_50": {
        (64, 7, (1,)): 1,  # the stem, read by a block and a projection
        # The stream of each stage: 5 for each block and its projection, then readers.
        (256, 5 * 4 + 2 + 2, (1,)): 1,
        (512, 5 * 5 + 3 + 2, (1,)): 1,
        (1024, 5 * 7 + 5 + 2, (1,)): 1,
        (2048, 5 * 4 + 2 + 1, (1,)): 1,
        # Two inner widths a block.
        (64, 6, (1,)): 2 * 3,
        (128, 6, (1,)): 2 * 4,
        (256, 6, (1,)): 2 * 6,
        (512, 6, (1,)): 2 * 3,
    },
    "linen_transformer_12": {
        # The stream: embedding 2, positions, 12 a layer, the last norm 2, the head.
        (256, 2 + 1 + 12 * 12 + 2 + 1, (1,)): 1,
        (8, 7, (1,)): 12,  # heads: kernel and bias of query, key, value; out
        (32, 4, (1,)): 12,  # dimensions of query and key
        (32, 3, (1,)): 12,  # dimensions of value and out
        (1024, 3, (1,)): 12,
    },
    "nnx_transformer_12": {
        # The second norm has no bias, the embedding is a table.
        (256, 1 + 12 * 11 + 1, (1,)): 1,
        (8, 7, (1,)): 12,
        (32, 4, (1,)): 12,
        (32, 3, (1,)): 12,
        (680, 3, (1, 2)): 12,  # gate and gated are halves of one kernel
    },
    "llama_1b": {
        (2048, 2 + 16 * 9, (1,)): 1,  # the stream: embedding, last norm, 9 a layer
        (8, 4, (1, 4)): 16,  # heads of key and value, with the queries of each
        (4, 2, (8,)): 16,  # queries of a head of keys, the same in all
        (32, 2, (2,)): 16,  # pairs of rotated dimensions
        (64, 2, (1,)): 16,  # dimensions of value and out
        (8192, 3, (1,)): 16,
    },
}


@pytest.mark.parametrize("name", LARGE)
def test_groups_are_those_that_a_person_counts(name):
    _, found = made(name)
    assert kinds(found) == GROUPS[name]
    assert found.unknown == {}


@pytest.mark.parametrize("name", LARGE)
def test_the_small_model_gives_the_output_of_the_large_one(name):
    model, found, keep, small = halved(name)
    assert all(
        isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(small)
    )
    output = jax.eval_shape(structure.small_apply(found, keep), small, *model.inputs)
    assert output == jax.eval_shape(model.apply, model.variables, *model.inputs)


@pytest.mark.parametrize("name", ["vgg_64_128_256", "vgg_16", "resnet_50"])
def test_convolutions_have_no_flags(name):
    assert flagged(made(name)[1]) == {}


@pytest.mark.parametrize("name", ["linen_transformer_12", "nnx_transformer_12"])
def test_of_a_transformer_only_the_stream_is_normalised(name):
    _, found = made(name)
    (stream,) = (group.name for group in found.groups if group.size == 256)
    assert flagged(found) == {stream: ("mixed",)}


def test_a_decoder_rotates_pairs_and_normalises_its_stream():
    _, found = made("llama_1b")
    flags = {
        group.name: group.flags for group in found.groups if group.size in (32, 2048)
    }
    assert flagged(found) == flags
    assert collections.Counter(flags.values()) == {("mixed",): 1, ("positional",): 16}


def test_names_follow_the_modules():
    names = {group.name for group in made("llama_1b")[1].groups}
    layers = collections.Counter(re.sub(r"layers/\d+", "layer", name) for name in names)
    assert layers == {
        "layer/down": 1,
        "layer/gate": 16,
        "layer/key:1": 16,
        "layer/key:2": 16,
        "layer/query": 16,
        "layer/value": 16,
    }


@pytest.mark.parametrize("kind", ["params", "flops"])
def test_half_of_a_large_model(kind):
    _, found = made("llama_1b")
    rng = np.random.default_rng(0)
    scores = {group.name: rng.uniform(size=group.size) for group in found.groups}
    keep = structure.select(found, scores, budget={kind: 0.5})
    left = getattr(structure.cost(found, keep), kind)
    # A unit is at most one head.
    assert 0.49 < left / getattr(structure.cost(found), kind) <= 0.5
