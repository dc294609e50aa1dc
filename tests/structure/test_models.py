"""The groups of every model are those of the tables; they permute and leave."""

import jax
import numpy as np
import pytest

from prunadag_optax import structure
from tests.structure.models import MODELS, made
from tests.structure.tables import FLAGS, FROZEN, PARTLY_FROZEN, TABLES

TOLERANCE = 1e-5
# Where masking units and removing them differ: a softmax, or a variance about a mean,
# runs over them.
INEXACT = {
    ("gpt_fused_qkv", "layers/0/down"),
    ("vit", "class"),
    ("swin", "embed"),
    ("moe_soft", "router"),
    ("maxout", "kernel:1#2"),
    ("equinox_conv", "layers/3:0#2"),
}


def plain(path):
    """A path of the tables without the box that nnx puts around an array."""
    return path.removesuffix("/value")


def as_rows(groups):
    return sorted(
        (
            size,
            sorted(flags),
            sorted((plain(path), axis, n) for (path, axis), n in members.items()),
        )
        for size, members, flags in groups
    )


@pytest.mark.parametrize("name", MODELS)
def test_groups_are_those_that_a_person_writes_down(name):
    _, found = made(name)
    expected = [
        (size, members, flags)
        for (size, members), flags in zip(TABLES[name], FLAGS[name], strict=True)
    ]
    rows = [
        (
            group.size,
            {(member.path, member.axis): member.width for member in group.members},
            group.flags,
        )
        for group in found.groups
    ]
    assert as_rows(rows) == as_rows(expected)
    whole = {
        (entry.path, entry.axis) for entry in found.frozen if entry.count == entry.size
    }
    assert whole == {(plain(path), axis) for path, axis in FROZEN[name]}
    partly = {
        (entry.path, entry.axis): entry.count
        for entry in found.frozen
        if entry.count < entry.size
    }
    assert partly == {
        (plain(path), axis): count
        for (path, axis), count in PARTLY_FROZEN[name].items()
    }


@pytest.mark.parametrize("name", MODELS)
def test_every_axis_is_explained(name):
    _, found = made(name)
    for path, leaf in found.shapes.items():
        for axis in range(len(leaf.shape)):
            said = found.explain(path, axis)
            assert said.startswith(f"{path}, axis {axis}")
            assert "not in this structure" not in said


@pytest.mark.parametrize("name", MODELS)
def test_permuting_units_leaves_the_output(name):
    model, found = made(name)
    with jax.default_matmul_precision("highest"):
        deviations = structure.check(
            found, model.variables, *model.inputs, tolerance=TOLERANCE
        )
    positional = {group.name for group in found.groups if "positional" in group.flags}
    assert set(deviations) == {group.name for group in found.groups} - positional


@pytest.mark.parametrize("name", MODELS)
def test_the_small_model_is_the_masked_one(name):
    model, found = made(name)
    rng = np.random.default_rng(0)
    keep = {}
    for group in found.groups:
        mask = np.arange(group.size) < max(1, group.size // 2)
        keep[group.name] = rng.permutation(mask)
    exact = {key: mask for key, mask in keep.items() if (name, key) not in INEXACT}
    structure.check(
        found, model.variables, *model.inputs, keep=exact, tolerance=TOLERANCE
    )


@pytest.mark.parametrize("name", sorted({name for name, _ in INEXACT}))
def test_where_masking_and_removing_differ_the_check_says_so(name):
    model, found = made(name)
    for _, group in sorted(entry for entry in INEXACT if entry[0] == name):
        assert "mixed" in found[group].flags
        keep = {group: np.arange(found[group].size) > 0}
        with pytest.raises(ValueError, match="reduction runs over the units"):
            structure.check(found, model.variables, *model.inputs, keep=keep)
