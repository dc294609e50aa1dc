"""Scores of units, and the choice of units under a budget."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunadag_optax import structure
from prunadag_optax.structure.groups import paths_of
from tests.helpers import refused
from tests.structure.models import made


def random_like(tree, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), tree)


def random_scores(found, seed=0):
    rng = np.random.default_rng(seed)
    return {group.name: rng.normal(size=group.size) for group in found.groups}


def plain(tree):
    """Leaves by the paths of a structure."""
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]
    return dict(zip(paths_of(tree), leaves, strict=True))


def of_unit(group, unit, leaves):
    """All values of a unit, over the members that are among the leaves."""
    values = []
    for member in group.members:
        if member.path in leaves:
            leaf = np.moveaxis(leaves[member.path], member.axis, 0)
            values += [leaf[position] for position in member.positions[unit]]
    return np.concatenate([value.ravel() for value in values])


# Scores. vgg flattens 2 x 2 pixels, lenet 3 x 2; the decoder shares heads.
SCORED = ["lenet", "vgg", "gpt_gqa_rope", "nnx_cnn", "mixed_bf16"]


@pytest.mark.parametrize("name", SCORED)
def test_rms_is_that_of_a_loop_over_members(name):
    model, found = made(name)
    leaves, scores = plain(model.variables), structure.scores(found, model.variables)
    assert set(scores) == {group.name for group in found.groups}
    for group in found.groups:
        units = [of_unit(group, unit, leaves) for unit in range(group.size)]
        expected = [np.sqrt(np.mean(values**2)) for values in units]
        np.testing.assert_allclose(scores[group.name], expected, rtol=1e-6)
    widths = {member.width for group in found.groups for member in group.members}
    assert (len(widths) > 1) == (
        name in {"lenet", "vgg", "mobilenet", "gpt_gqa_rope", "nnx_cnn"}
    )


@pytest.mark.parametrize("name", SCORED)
def test_taylor_is_that_of_a_loop_over_members(name):
    model, found = made(name)
    gradients = random_like(model.variables)
    scores = structure.scores(found, model.variables, "taylor", gradients=gradients)
    leaves, slopes = plain(model.variables), plain(gradients)
    for group in found.groups:
        for unit in range(group.size):
            terms = of_unit(group, unit, leaves) * of_unit(group, unit, slopes)
            np.testing.assert_allclose(
                scores[group.name][unit],
                abs(terms.sum()),
                atol=1e-6 * abs(terms).sum(),
            )


def test_taylor_is_what_removing_a_unit_costs():
    model, found = made("mlp")
    scale = 1e-3

    def loss(variables):
        return (model.apply(variables, *model.inputs) ** 2).sum()

    gradients = jax.grad(loss)(model.variables)
    scores = structure.scores(found, model.variables, "taylor", gradients=gradients)
    group = found.groups[0]
    keep = {group.name: np.arange(group.size) != 3}
    without = structure.masked(found, keep, model.variables)
    # A small part of the way to zero.
    moved = jax.tree.map(lambda x, y: x + scale * (y - x), model.variables, without)
    change = float(loss(moved) - loss(model.variables)) / scale
    assert abs(change) == pytest.approx(scores[group.name][3], rel=0.02)


def test_scores_of_bfloat16_are_summed_in_float32():
    params = {"in": jnp.full((4096, 2), 1.0, jnp.bfloat16), "out": jnp.ones((2, 1))}
    params["in"] = params["in"].at[0, 1].set(3.0)
    found = structure.declare({"hidden": {"in": 1, "out": 0}}, params)
    scores = structure.scores(found, params)["hidden"]
    np.testing.assert_allclose(scores, [1.0, np.sqrt(4105 / 4097)], rtol=1e-6)
    gradients = jax.tree.map(jnp.ones_like, params)
    scores = structure.scores(found, params, "taylor", gradients=gradients)["hidden"]
    np.testing.assert_allclose(scores, [4097.0, 4099.0], rtol=1e-6)


def test_a_part_of_the_variables_leaves_the_rest_out():
    model, found = made("vgg")
    part, whole = model.variables["params"], model.variables
    scores = structure.scores(found, part)
    leaves = {f"params/{path}": leaf for path, leaf in plain(part).items()}
    assert any(path.endswith("/bias") for path in leaves)
    for group in found.groups:
        assert any(member.path in leaves for member in group.members)
        units = [of_unit(group, unit, leaves) for unit in range(group.size)]
        expected = [np.sqrt(np.mean(values**2)) for values in units]
        np.testing.assert_allclose(scores[group.name], expected, rtol=1e-6)
    # The statistics count if they are given.
    others = structure.scores(found, whole)
    assert not np.allclose(scores["Conv_0"], others["Conv_0"])
    assert np.array_equal(scores["Dense_0"], others["Dense_0"])


def test_groups_without_a_member_among_the_leaves_have_no_score():
    model, found = made("mlp")
    part = {"params": {"layers_4": model.variables["params"]["layers_4"]}}
    assert set(structure.scores(found, part)) == {"layers_2"}


def test_random_is_reproducible_and_uniform():
    model, found = made("vgg")
    first, again, other = (
        structure.scores(found, model.variables, "random", key=jax.random.key(seed))
        for seed in (0, 0, 1)
    )
    assert {name: len(x) for name, x in first.items()} == {
        group.name: group.size for group in found.groups
    }
    for name, values in first.items():
        assert np.array_equal(values, again[name])
        assert not np.array_equal(values, other[name])
        assert len(np.unique(values)) == len(values)
    drawn = np.concatenate([*first.values()])
    assert 0 <= drawn.min() < 0.2
    assert 0.8 < drawn.max() < 1


def test_a_function_of_the_parameters():
    model, found = made("vgg")
    scores = structure.scores(
        found, model.variables, lambda tree: jax.tree.map(jnp.abs, tree)
    )
    leaves = plain(model.variables)
    for group in found.groups:
        units = [of_unit(group, unit, leaves) for unit in range(group.size)]
        expected = [np.mean(abs(values)) for values in units]
        np.testing.assert_allclose(scores[group.name], expected, rtol=1e-6)


def test_what_a_score_lacks_is_named():
    model, found = made("mlp")
    with refused("score", "'rms'", "'magnitude'"):
        structure.scores(found, model.variables, "magnitude")
    with refused("taylor", "gradients="):
        structure.scores(found, model.variables, "taylor")
    with refused("random", "key="):
        structure.scores(found, model.variables, "random")
    with refused("gradients", "params"):
        structure.scores(
            found,
            model.variables,
            "taylor",
            gradients=jax.tree.map(lambda x: x[..., :1], model.variables),
        )
    with refused("score(params)", "params"):
        structure.scores(
            found, model.variables, lambda tree: jax.tree.map(jnp.sum, tree)
        )


# Selections.


def units(keep):
    return {name: int(mask.sum()) for name, mask in keep.items()}


def is_within(keep, other):
    return all((mask <= other[name]).all() for name, mask in keep.items())


@pytest.mark.parametrize("density", [0.1, 0.25, 0.5, 0.77, 1.0])
def test_density_is_the_share_of_all_units(density):
    _, found = made("vgg")
    scores = random_scores(found)
    keep = structure.select(found, scores, density=density)
    total = sum(group.size for group in found.groups)
    left = sum(units(keep).values())
    assert left == max(round(density * total), len(scores))
    assert set(keep) == set(scores)
    # The units with the lowest scores have left, but for the last of a group.
    gone = np.concatenate([scores[name][~mask] for name, mask in keep.items()])
    kept = [scores[n][m] for n, m in keep.items() if m.sum() > 1]
    if gone.size and kept:
        assert gone.max() < np.concatenate(kept).min()


def test_what_density_and_least_exclude_is_an_error():
    _, found = made("vgg")
    scores = random_scores(found)
    total = sum(group.size for group in found.groups)
    least = len(found.groups)
    assert sum(units(structure.select(found, scores, density=least / total)).values())
    with refused("density=0.05", f"of {total} units", "least=4", "must stay"):
        structure.select(found, scores, density=0.05, least=4)


def test_count_keeps_the_best():
    _, found = made("vgg")
    scores = random_scores(found)
    keep = structure.select(found, scores, count={"Conv_1": 3, "Dense_0": 20})
    assert units(keep) == {"Conv_1": 3, "Dense_0": 20}
    best = np.argsort(scores["Conv_1"])[-3:]
    assert set(np.flatnonzero(keep["Conv_1"])) == set(best)


BUDGETS = [0.9, 0.4, 0.05]


@pytest.mark.parametrize("name", ["vgg", "encoder", "gpt_gqa_rope"])
@pytest.mark.parametrize("kind", ["params", "flops"])
@pytest.mark.parametrize("share", BUDGETS)
def test_a_budget_is_met_and_used_up(name, kind, share):
    model, found = made(name)
    scores = random_scores(found)
    floor = {group.name: np.arange(group.size) == 0 for group in found.groups}
    whole, least = (getattr(structure.cost(found, keep), kind) for keep in ({}, floor))
    allowed = share * whole
    if least > allowed:
        with refused(f"budget={{'{kind}': {share}}}", "cannot be met", "least=1"):
            structure.select(found, scores, budget={kind: share})
        return
    keep = structure.select(found, scores, budget={kind: share})
    assert getattr(structure.cost(found, keep), kind) <= allowed
    # The unit that left last, put back, is too much.
    total = sum(group.size for group in found.groups)
    left = sum(units(keep).values())
    before = structure.select(found, scores, density=(left + 1) / total)
    assert sum(units(before).values()) == left + 1
    assert is_within(keep, before)
    assert getattr(structure.cost(found, before), kind) > allowed
    # The sizes are those of the tree.
    shapes = jax.eval_shape(lambda tree: tree, model.variables)
    small = structure.shrink(found, keep, shapes)
    values = sum(leaf.size for leaf in jax.tree.leaves(small))
    assert values == structure.cost(found, keep).params


ties = st.integers(0, 3).map(float)


@st.composite
def choices(draw):
    """Scores, possibly tied, and options."""
    name = draw(st.sampled_from(["vgg", "mlp", "encoder"]))
    _, found = made(name)
    value = draw(st.sampled_from([ties, st.floats(-1e3, 1e3)]))
    scores = {
        group.name: np.array(
            draw(st.lists(value, min_size=group.size, max_size=group.size))
        )
        for group in found.groups
        if draw(st.booleans()) or group is found.groups[0]
    }
    options = {
        "per_group": draw(st.booleans()),
        "round_to": draw(st.sampled_from([1, 2, 3, 4, 8])),
        "least": draw(st.integers(1, 5)),
    }
    return found, scores, options


@given(
    choices(),
    st.sampled_from(["density", "params", "flops"]),
    st.lists(st.floats(0.01, 1.0), min_size=2, max_size=4),
)
@settings(max_examples=20, deadline=None)
def test_smaller_budgets_keep_subsets_whatever_the_options(choice, kind, shares):
    found, scores, options = choice
    kept = []
    for share in sorted(shares, reverse=True):
        asked = {"density": share} if kind == "density" else {"budget": {kind: share}}
        try:
            kept.append(structure.select(found, scores, **asked, **options))
        except ValueError:
            # Then a smaller budget cannot be met either.
            kept.append(None)
    met = [keep for keep in kept if keep is not None]
    assert kept == met + [None] * (len(kept) - len(met))
    assert all(is_within(b, a) for a, b in itertools.pairwise(met))
    for keep in met:
        assert set(keep) == set(scores)
        for name, mask in keep.items():
            size, left = len(mask), int(mask.sum())
            assert left == size or left % options["round_to"] == 0
            assert left >= min(options["least"], size)
            # Nothing that left was better than what stayed.
            if left < size:
                assert scores[name][~mask].max() <= scores[name][mask].min()


@pytest.mark.parametrize("density", [0.25, 0.5])
def test_per_group_keeps_the_same_share_of_each(density):
    _, found = made("vgg")
    scores = random_scores(found)
    scores["Conv_0"] += 100
    keep = structure.select(found, scores, density=density, per_group=True)
    for group in found.groups:
        assert abs(keep[group.name].sum() - density * group.size) <= 1
    assert structure.select(found, scores, density=density)["Conv_0"].all()


def test_ties_leave_in_the_order_of_groups_and_units():
    _, found = made("mlp")
    scores = {group.name: np.zeros(group.size) for group in found.groups}
    sizes = [group.size for group in found.groups]
    assert sizes == [16, 12]
    keep = structure.select(found, scores, density=20 / 28)
    assert keep["layers_0"].tolist() == [False] * 8 + [True] * 8
    assert keep["layers_2"].all()


def test_groups_without_scores_stay_whole():
    model, found = made("vgg")
    scores = random_scores(found)
    some = {name: scores[name] for name in ("Conv_1", "Dense_0")}
    keep = structure.select(found, some, budget={"params": 0.8})
    assert set(keep) == set(some)
    small = structure.shrink(found, keep, model.variables)
    assert small["params"]["Conv_0"]["kernel"].shape == (3, 3, 3, 8)
    left = sum(leaf.size for leaf in jax.tree.leaves(small))
    assert left <= 0.8 * structure.cost(found).params
    with refused("cannot be met", "remain"):
        structure.select(found, some, budget={"params": 0.1})


def test_declared_structures_have_a_budget_of_parameters():
    params = {"in": jnp.ones((3, 8)), "out": jnp.ones((8, 2))}
    found = structure.declare({"hidden": {"in": 1, "out": 0}}, params)
    scores = {"hidden": np.arange(8.0)}
    keep = structure.select(found, scores, budget={"params": 0.5})
    assert keep["hidden"].tolist() == [False] * 4 + [True] * 4
    # As a number.
    keep = structure.select(found, scores, budget={"params": 16})
    assert keep["hidden"].sum() == 3
    with refused("select", "declared", "structure.trace"):
        structure.select(found, scores, budget={"flops": 0.5})


SCORES = {"layers_0": np.arange(16.0), "layers_2": np.arange(12.0)}


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({}, ["exactly one", "got none"]),
        (
            {"density": 0.5, "budget": {"flops": 0.5}},
            ["exactly one", "density and budget"],
        ),
        ({"density": 0.0}, ["density", "0.0"]),
        ({"density": 1.5}, ["density", "1.5"]),
        ({"budget": {"memory": 0.5}}, ["budget", "params", "flops", "memory"]),
        ({"budget": 0.5}, ["budget", "params", "flops", "0.5"]),
        ({"budget": {"params": 0.001}}, ["cannot be met", "least=1"]),
        ({"count": {"layers_1": 4}}, ["layers_1", "layers_0", "layers_2"]),
        ({"count": {"layers_0": 17}}, ["layers_0", "at most", "16", "17"]),
        ({"count": {"layers_0": 0}}, ["layers_0", "0"]),
        ({"count": {"layers_0": 6}, "round_to": 4}, ["layers_0", "round_to=4", "6"]),
        ({"density": 0.5, "round_to": 0}, ["round_to", "0"]),
        ({"density": 0.5, "least": 0}, ["least", "0"]),
    ],
)
def test_wrong_options_are_refused(options, parts):
    _, found = made("mlp")
    with refused(*parts):
        structure.select(found, SCORES, **options)


def test_wrong_scores_are_refused():
    _, found = made("mlp")
    with refused("layers_9", "layers_0"):
        structure.select(found, {"layers_9": np.ones(3)}, density=0.5)
    with refused("layers_0", "16 numbers", "[3]"):
        structure.select(found, {"layers_0": np.ones(3)}, density=0.5)
    with refused("layers_0", "NaN"):
        structure.select(found, {"layers_0": np.full(16, np.nan)}, density=0.5)
    with refused("mapping", "list", error=TypeError):
        structure.select(found, [np.ones(16)], density=0.5)
