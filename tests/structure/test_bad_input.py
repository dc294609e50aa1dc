"""Wrong calls: an error that names the argument and says what to write."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prunadag_optax import structure
from tests.helpers import refused
from tests.structure.models import floats, named

X = floats(4, 6)
P = {"in": floats(6, 8, seed=2), "out": floats(8, 3, seed=3)}
KEEP = {"in": np.arange(8) % 2 == 0}
MEMBERS = {"in": 1, "out": 0}


def apply(p, x):
    return jax.nn.relu(x @ p["in"]) @ p["out"]


@functools.cache
def traced():
    return structure.trace(apply, P, X)


@functools.cache
def declared():
    return structure.declare({"in": MEMBERS}, P)


# trace


@pytest.mark.parametrize("given", [None, "apply", P, 3])
def test_what_is_traced_must_be_a_function(given):
    with refused("apply must be a function", type(given).__name__, error=TypeError):
        structure.trace(given, P, X)


@pytest.mark.parametrize(
    ("freeze", "parts"),
    [
        (["inn"], ["freeze", "'inn'", "'in'"]),
        ([("inn", 1)], ["freeze", "'inn'", "'in'"]),
        ([("in", 2)], ["freeze", "'in'", "2 axes", "2"]),
        ([("in", -3)], ["freeze", "'in'", "2 axes", "-3"]),
        ("in", ["freeze", "list", "'in'"]),
    ],
)
def test_freeze_must_name_axes(freeze, parts):
    with refused(*parts):
        structure.trace(apply, P, X, freeze=freeze)


def test_state_must_name_variables():
    with refused("state", "'inn'", "'in'"):
        structure.trace(apply, P, X, state=lambda output: {"inn": output})


# declare


@pytest.mark.parametrize(
    ("groups", "parts"),
    [
        ({"h": {"inn": 1}}, ["'inn'", "'in'"]),
        ({"h": {"in": 2}}, ["groups['h']['in']", "2 axes", "2"]),
        ({"h": {"in": 1.0}}, ["groups['h']['in']", "1.0"]),
        ({"h": {"in": True}}, ["groups['h']['in']", "True"]),
        ({"h": {"in": 0, "out": 0}}, ["groups['h']", "in:0", "6", "out:0", "8"]),
        ({"h": {"in": 1}, "g": {"in": -1}}, ["'in'", "'h'", "'g'"]),
        ({"h": {}}, ["groups['h']", "member"]),
        ({"h": ["in"]}, ["groups['h']", "axis"]),
        ([MEMBERS], ["groups", "list"]),
    ],
)
def test_declared_groups_must_fit(groups, parts):
    with refused(*parts, error=(TypeError, ValueError)):
        structure.declare(groups, P)


def test_declared_readers_must_be_members():
    with refused("reads", "'inn'"):
        structure.declare({"h": MEMBERS}, P, reads=["inn"])


# keep


WRONG_KEEPS = [
    (None, ["keep", "mapping", "NoneType"]),
    (KEEP["in"], ["keep", "mapping", "ndarray"]),
    ({"inn": KEEP["in"]}, ["keep", "'inn'", "'in'"]),
    ({"in": np.ones(8)}, ["keep['in']", "bool array of shape (8,)", "float64"]),
    ({"in": [1, 0] * 4}, ["keep['in']", "bool array of shape (8,)", "int"]),
    ({"in": np.ones(7, bool)}, ["keep['in']", "(8,)", "[7]"]),
    ({"in": np.ones((8, 1), bool)}, ["keep['in']", "(8,)", "[8, 1]"]),
    ({"in": np.zeros(8, bool)}, ["keep['in']", "all 8 units", "at least one"]),
]
CALLS = {
    "masked": lambda s, keep: structure.masked(s, keep, P),
    "shrink": lambda s, keep: structure.shrink(s, keep, P),
    "small_apply": lambda s, keep: structure.small_apply(s, keep),
    "check": lambda s, keep: structure.check(s, P, X, keep=keep),
    "cost": structure.cost,
    "save_keep": lambda s, keep: structure.save_keep("/dev/null", s, keep),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("keep", "parts"), WRONG_KEEPS)
def test_a_choice_of_units_must_fit(call, keep, parts):
    if keep is None and call in ("cost", "check"):
        CALLS[call](traced(), keep)  # The whole model.
        return
    with refused(*parts, error=(TypeError, ValueError)):
        CALLS[call](traced(), keep)


@pytest.mark.parametrize("call", ["masked", "shrink", "small_apply", "cost"])
def test_a_traced_choice(call):
    with refused("keep['in'] is traced", "outside jit", error=TypeError):
        jax.jit(lambda mask: CALLS[call](traced(), {"in": mask}))(KEEP["in"])


@pytest.mark.parametrize("call", CALLS)
def test_swapped_arguments(call):
    with refused("structure", "dict", "structure.trace", error=TypeError):
        CALLS[call](KEEP, traced())


@pytest.mark.parametrize(
    "call",
    [
        lambda: structure.check(P, traced(), X),
        lambda: structure.scores(P, traced()),
        lambda: structure.select({"in": np.ones(8)}, traced(), density=0.5),
        lambda: structure.load_keep("/dev/null", P),
    ],
    ids=["check", "scores", "select", "load_keep"],
)
def test_swapped_arguments_without_a_choice(call):
    with refused("structure", "dict", "structure.trace", error=TypeError):
        call()


@pytest.mark.parametrize("call", ["small_apply", "check"])
def test_a_declared_structure_where_a_program_is_needed(call):
    with refused(f"structure.{call} needs", "declared", "structure.trace("):
        CALLS[call](declared(), KEEP)


# Trees


WRONG_TREES = [
    ({"in": P["in"].T, "out": P["out"]}, ["'in'", "[6, 8]", "[8, 6]"]),
    ({"in": P["in"], "exit": P["out"]}, ["'exit'", "[8, 3]"]),
    ({"in": P["in"][:, :4], "out": P["out"][:4]}, ["'in'", "[6, 8]", "[6, 4]"]),
    (P["in"], ["[6, 8]"]),
]


@pytest.mark.parametrize("call", ["masked", "shrink", "scores", "check"])
@pytest.mark.parametrize(("tree", "parts"), WRONG_TREES)
def test_parameters_that_are_not_the_ones_traced(call, tree, parts):
    function = {
        "masked": lambda: structure.masked(traced(), KEEP, tree),
        "shrink": lambda: structure.shrink(traced(), KEEP, tree),
        "scores": lambda: structure.scores(traced(), tree),
        "check": lambda: structure.check(traced(), tree, X),
    }[call]
    if call == "check" and "exit" in named(tree):
        parts = ["variables", "'out'", "[8, 3]", "no such leaf"]
    with refused(*parts):
        function()


def test_check_needs_all_variables():
    with refused("variables", "'out'", "no such leaf"):
        structure.check(traced(), {"in": P["in"]}, X)


@pytest.mark.parametrize("tolerance", [0, -1.0, float("nan"), "0.1", True])
def test_the_tolerance_is_positive(tolerance):
    with refused("tolerance must be a finite number > 0", repr(tolerance)):
        structure.check(traced(), P, X, tolerance=tolerance)


@pytest.mark.parametrize(
    ("variables", "parts"),
    [
        (P, ["'in'", "[6, 4]", "[6, 8]", "structure.shrink(s, keep, variables)"]),
        ({"in": P["in"]}, ["2 leaves", "1", "structure.shrink"]),
    ],
)
def test_the_small_function_takes_small_variables(variables, parts):
    with refused(*parts):
        structure.small_apply(traced(), KEEP)(variables, X)


def test_shrinking_a_state_needs_the_parameters():
    tx = optax.adam(0.1)
    state = tx.init(P)
    with refused("params must be given with optimizer", "params=params"):
        structure.shrink(traced(), KEEP, state, optimizer=tx)


def test_shrinking_a_state_that_follows_no_parameter():
    tx = optax.adafactor(0.1, min_dim_size_to_factor=2)
    with refused("reinitialise=True"):
        structure.shrink(traced(), KEEP, tx.init(P), optimizer=tx, params=P)


# scores, select


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"score": "l1"}, ["score must be", "'rms'", "'l1'"]),
        ({"score": "taylor"}, ["gradients="]),
        ({"score": "random"}, ["key=", "jax.random.key(0)"]),
        ({"score": "taylor", "gradients": {**P, "in": X}}, ["gradients", "params"]),
        ({"score": "taylor", "gradients": {"in": X}}, ["gradients", "params"]),
        ({"score": lambda p: {"in": X, "out": X}}, ["score(params)", "params"]),
    ],
)
def test_scores(given, parts):
    with refused(*parts):
        structure.scores(traced(), P, **given)


SCORES = {"in": np.arange(8.0)}


@pytest.mark.parametrize(
    ("scores", "given", "parts"),
    [
        (SCORES, {}, ["density=0.5", "budget=", "none"]),
        (SCORES, {"density": 0.5, "count": {"in": 2}}, ["density and count"]),
        (SCORES, {"density": 0}, ["density", "> 0", "0"]),
        (SCORES, {"density": 50}, ["density", "<= 1", "50"]),
        (SCORES, {"density": 0.25, "least": 3}, ["density=0.25", "least=3", "3"]),
        (SCORES, {"density": 0.5, "round_to": 0}, ["round_to", "0"]),
        (SCORES, {"density": 0.5, "least": 1.5}, ["least", "1.5"]),
        (SCORES, {"count": {"inn": 2}}, ["count", "'inn'", "'in'"]),
        (SCORES, {"count": {"in": 9}}, ["count['in']", "8", "9"]),
        (SCORES, {"count": {"in": 0}}, ["count['in']", "1", "0"]),
        (SCORES, {"count": {"in": 2.0}}, ["count['in']", "2.0"]),
        (SCORES, {"count": 2}, ["count", "2"]),
        (SCORES, {"budget": 0.5}, ["budget", "0.5"]),
        (SCORES, {"budget": {"flop": 0.5}}, ["budget", "'flop'"]),
        (SCORES, {"budget": {"flops": 0.5, "params": 1}}, ["budget", "params"]),
        (SCORES, {"budget": {"params": 0}}, ["budget['params']", "0"]),
        (SCORES, {"budget": {"params": 1e-3}}, ["cannot be met", "72", "9", "0.125"]),
        (SCORES["in"], {"density": 0.5}, ["scores", "mapping", "ndarray"]),
        ({"inn": SCORES["in"]}, {"density": 0.5}, ["scores", "'inn'", "'in'"]),
        ({"in": np.ones(7)}, {"density": 0.5}, ["scores['in']", "8 numbers", "[7]"]),
        ({"in": np.full(8, np.nan)}, {"density": 0.5}, ["scores['in']", "NaN"]),
        ({}, {"density": 0.5}, ["scores"]),
    ],
)
def test_select(scores, given, parts):
    with refused(*parts, error=(TypeError, ValueError)):
        structure.select(traced(), scores, **given)


def test_a_budget_of_flops_needs_a_program():
    with refused("flops", "declared", "structure.trace("):
        structure.select(declared(), SCORES, budget={"flops": 0.5})


# Names


def test_groups_by_name():
    assert traced()["in"].size == 8
    with refused("There is no group", "inn", "in", error=KeyError):
        traced()["inn"]


@pytest.mark.parametrize(
    ("path", "axis", "parts"),
    [
        ("inn", 0, ["'inn'", "'in'"]),
        ("in", 2, ["axis", "2", "'in'", "2"]),
        ("in", -3, ["axis", "-3"]),
        ("in", "1", ["axis", "'1'"]),
        ("in", 1.0, ["axis", "1.0"]),
        (3, 0, ["3", "'in'"]),
    ],
)
def test_explain(path, axis, parts):
    with refused(*parts, error=(TypeError, ValueError)):
        traced().explain(path, axis)


# Files


def test_what_was_saved_is_loaded(tmp_path):
    file = tmp_path / "keep.json"
    structure.save_keep(file, traced(), KEEP)
    np.testing.assert_array_equal(structure.load_keep(file, traced())["in"], KEEP["in"])
    other = structure.declare({"units": MEMBERS}, P)
    with refused("'in'", "'units'"):
        structure.load_keep(file, other)


BITS = {"size": 8, "bits": "qg=="}


@pytest.mark.parametrize(
    "written",
    [
        "",
        "{",
        "[]",
        "3",
        json.dumps({"kept": {}}),
        json.dumps({"keep": ["in"]}),
        json.dumps({"keep": {"in": 3}}),
        json.dumps({"keep": {"in": {"size": 8}}}),
        json.dumps({"keep": {"in": {**BITS, "bits": "q"}}}),
        json.dumps({"keep": {"in": {**BITS, "bits": "q*=="}}}),
        json.dumps({"keep": {"in": {**BITS, "bits": ""}}}),
        json.dumps({"keep": {"in": {**BITS, "size": "x"}}}),
        json.dumps({"keep": {"in": {**BITS, "size": -1}}}),
        json.dumps({"keep": {"in": {**BITS, "size": 800}}}),
        "\x00\x01",
    ],
)
def test_a_damaged_file(tmp_path, written):
    file = tmp_path / "keep.json"
    file.write_text(json.dumps({"keep": {"in": BITS}}))
    assert structure.load_keep(file, traced())["in"].tolist() == KEEP["in"].tolist()
    file.write_text(written)
    # Where it can be read, the choice in it does not fit.
    with pytest.raises(
        ValueError,
        match=r"keep\.json is not a file of structure\.save_keep|keep\['in'\]",
    ):
        structure.load_keep(file, traced())


def test_bytes_that_are_no_text(tmp_path):
    file = tmp_path / "keep.json"
    file.write_bytes(b"\xff\xfe\x00")
    with refused("keep.json is not a file of structure.save_keep"):
        structure.load_keep(file, traced())


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        structure.load_keep(tmp_path / "keep.json", traced())


def test_messages_fit_on_a_screen():
    many = {
        f"layer{n}": {"in": jnp.ones((2, 3)), "out": jnp.ones((3, 2))}
        for n in range(99)
    }
    groups = {name: {f"{name}/in": 1, f"{name}/out": 0} for name in many}
    found = structure.declare(groups, many)
    for call in (
        lambda: structure.shrink(found, {"no": [True] * 3}, many),
        lambda: structure.masked(found, {}, {"other": jnp.ones((2, 3))}),
        lambda: structure.declare({"g": {"no": 0}}, many),
    ):
        with pytest.raises(ValueError, match=r"no|other") as error:
            call()
        assert len(str(error.value)) < 600
