"""Budgets by layer: counts against a plain solve, and each function that has them."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from prunadag_optax import evaluation, masks, pruning_aware, recipes, schedules
from prunadag_optax import nnx as pruning_nnx
from prunadag_optax._common.budgets import kept_of_parts
from prunadag_optax.linen import PruningTrainState
from prunadag_optax.methods.gradual_pruning import gradual_magnitude_pruning

LENET = [(784, 300), (300, 100), (100, 10)]
CONVOLUTIONS = [(3, 3, 1, 16), (3, 3, 16, 32), (5, 5, 32, 4), (128, 10), (7, 3)]
NAMES = ["a/kernel", "b/kernel", "c/kernel", "d/kernel", "e/kernel"]


def densities_one_by_one(shapes, total, kernel=True):
    """Erdos-Renyi densities as published: what exceeds 1 is dense, the rest anew."""
    ratio = [
        sum(s if kernel else s[-2:]) / math.prod(s if kernel else s[-2:])
        for s in shapes
    ]
    sizes, dense = [math.prod(s) for s in shapes], set()
    while True:
        others = [i for i in range(len(shapes)) if i not in dense]
        left = total - sum(sizes[i] for i in dense)
        eps = left / sum(sizes[i] * ratio[i] for i in others) if others else 0
        full = {i for i in others if eps * ratio[i] > 1}
        if not full:
            return [1.0 if i in dense else eps * r for i, r in enumerate(ratio)]
        # The largest first, as the reference code has it.
        dense.add(max(full, key=lambda i: ratio[i]))


@pytest.mark.parametrize("kind", ["erk", "er"])
@pytest.mark.parametrize("shapes", [LENET, CONVOLUTIONS])
@pytest.mark.parametrize("density", [0.003, 0.02, 0.1, 0.4, 0.8, 1.0])
def test_erdos_renyi_densities_are_those_of_a_plain_solve(kind, shapes, density):
    sizes = [math.prod(s) for s in shapes]
    total = round(density * sum(sizes))
    expected = densities_one_by_one(shapes, total, kind == "erk")
    budget = masks.LayerBudget(kind)
    found = kept_of_parts(budget, NAMES[: len(shapes)], shapes, total)
    assert sum(found) == total
    for count, share, size in zip(found, expected, sizes, strict=True):
        assert abs(count - share * size) < 1


@settings(deadline=None, max_examples=80)
@given(
    sizes=st.lists(st.integers(0, 60), min_size=1, max_size=7),
    part=st.floats(0, 1),
    least=st.integers(0, 5),
    kind=st.sampled_from(["uniform", "erk", "er", "mapping"]),
    data=st.data(),
)
def test_totals_are_exact_and_counts_within_bounds(sizes, part, least, kind, data):
    shapes = [(size,) for size in sizes]
    names = [f"layer_{i}" for i in range(len(sizes))]
    of = {"layer_0": data.draw(st.floats(0.01, 1))} if kind == "mapping" else kind
    budget = masks.LayerBudget(of, least)
    alive = [data.draw(st.integers(0, size)) for size in sizes]
    total = jnp.asarray(round(part * sum(sizes)), jnp.int32)
    counts = [int(k) for k in kept_of_parts(budget, names, shapes, total, alive)]
    floor = [min(least, n) for n in alive]
    assert all(a <= k <= n for a, k, n in zip(floor, counts, alive, strict=True))
    assert sum(counts) == np.clip(int(total), sum(floor), sum(alive))


@settings(deadline=None, max_examples=60)
@given(
    shapes=st.lists(
        st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=5
    ),
    part=st.floats(0.01, 1),
    kind=st.sampled_from(["uniform", "erk"]),
)
def test_a_traced_total_gives_the_counts_of_a_number(shapes, part, kind):
    total = max(1, round(part * sum(math.prod(s) for s in shapes)))
    budget, names = masks.LayerBudget(kind), NAMES[: len(shapes)]
    numbers = kept_of_parts(budget, names, shapes, total)
    traced = [int(k) for k in kept_of_parts(budget, names, shapes, jnp.int32(total))]
    assert sum(traced) == sum(numbers) == total
    # A remainder may round the other way in float32.
    assert all(abs(a - b) <= 1 for a, b in zip(traced, numbers, strict=True))


def test_a_hundred_million_weights_have_the_exact_total_in_float32():
    shapes = [(100_000, 1000), (30_000, 1000), (10, 10)]
    counts = jax.jit(
        lambda total: kept_of_parts(masks.LayerBudget("erk"), NAMES[:3], shapes, total)
    )(jnp.int32(12_345_679))
    assert sum(map(int, counts)) == 12_345_679


def params():
    a, b = jax.random.split(jax.random.key(0))
    return {
        "a": {"kernel": jax.random.normal(a, (40, 20)), "bias": jnp.zeros(20)},
        "b": {"kernel": 0.1 * jax.random.normal(b, (20, 5)), "bias": jnp.zeros(5)},
    }


def numbers_kept(tree):
    return [int(np.sum(np.asarray(tree[name]["kernel"]) != 0)) for name in ("a", "b")]


# What each budget keeps of 90 weights, worked out by hand: sizes 800 and 100, ratios
# 60 / 800 and 25 / 100, so that erk gives 90 * 60 / 85 and 90 * 25 / 85.
CASES = {
    "uniform": ("uniform", [80, 10]),
    "erk": ("erk", [64, 26]),
    "er": ("er", [64, 26]),
    "mapping": ({"a/*": 0.05}, [40, 50]),
    "mapping of both": ({"*/kernel": 0.1}, [80, 10]),
    "least": (masks.LayerBudget("global", 17), [73, 17]),
    "erk, least": (masks.LayerBudget("erk", 30), [60, 30]),
}


@pytest.mark.parametrize("name", CASES)
def test_every_function_keeps_what_the_budget_says(name):
    budget, expected = CASES[name]
    x = params()

    def of(function):
        return numbers_kept(function(x))

    pruned, mask = masks.prune(x, 0.9, layer_budget=budget)
    assert numbers_kept(pruned) == numbers_kept(mask) == expected
    traced = jax.jit(lambda s: masks.prune(x, s, layer_budget=budget)[0])
    assert numbers_kept(traced(jnp.float32(0.9))) == expected
    assert of(
        lambda x: masks.mask_on_schedule(x, None, 0, 0.1, layer_budget=budget)
    ) == (expected)
    # Within each leaf the largest magnitudes are kept.
    for leaf, count in zip("ab", expected, strict=True):
        order = np.sort(np.abs(x[leaf]["kernel"]), axis=None)[::-1]
        kept = np.abs(np.asarray(pruned[leaf]["kernel"]))
        assert kept[kept > 0].min() == order[count - 1]

    tx = gradual_magnitude_pruning(
        optax.sgd(0.0), lambda count: jnp.where(count > 0, 0.1, 1), layer_budget=budget
    )
    state, step = tx.init(x), jax.jit(tx.update)
    zero = jax.tree.map(jnp.zeros_like, x)
    _, state = step(zero, state, x)
    assert numbers_kept(state.mask) == [800, 100]
    updates, state = step(zero, state, x)
    assert numbers_kept(optax.apply_updates(x, updates)) == expected

    for at in ("params", "pruned"):
        tx = pruning_aware(
            optax.sgd(0.0), 0.1, shrink_rate=1.0, gradient_at=at, layer_budget=budget
        )
        updates, state = jax.jit(tx.update)(zero, tx.init(x), x)
        assert numbers_kept(optax.apply_updates(x, updates)) == expected

    train = PruningTrainState.create(apply_fn=None, params=x, tx=optax.sgd(0.1))
    assert numbers_kept(train.prune(0.9, layer_budget=budget).params) == expected
    curve = evaluation.pruning_curve(
        lambda x: dict(zip("ab", numbers_kept(x), strict=True)),
        x,
        [0.9],
        layer_budget=budget,
    )
    assert [int(curve.values[name][0]) for name in "ab"] == expected


def test_a_model_of_nnx():
    model = nnx.Linear(40, 20, rngs=nnx.Rngs(0))
    pruning = pruning_nnx.prune(model, 0.5, layer_budget="erk")
    pruning.prune(model, 0.9, layer_budget=masks.LayerBudget("global", least=100))
    assert int((model.kernel[...] != 0).sum()) == 100


def test_masks_on_top_of_masks_are_nested_with_exact_totals():
    # Seats of largest remainder may move the other way: what is pruned stays so.
    x = {f"{i}/kernel": jnp.arange(1.0, 1 + n) for i, n in enumerate((7, 9, 5, 11))}
    held = None
    for kept in range(32, 0, -1):
        mask = masks.magnitude_mask(
            x, 1 - kept / 32, where=masks.everything, previous=held, layer_budget="erk"
        )
        assert sum(int(m.sum()) for m in mask.values()) == kept
        if held is not None:
            assert all(bool(jnp.all(held[i] | ~mask[i])) for i in x)
        held = mask


def test_layers_stacked_in_a_leaf_have_budgets_of_their_own():
    x = {
        "stack": {"kernel": jax.random.normal(jax.random.key(0), (3, 10, 10))},
        "head": {"kernel": jax.random.normal(jax.random.key(1), (10, 2))},
    }

    def scope(path, leaf):
        return leaf.ndim - 2

    budget = masks.LayerBudget("erk", least=5)
    mask = masks.magnitude_mask(x, 0.9, scope=scope, layer_budget=budget)
    of_layers = [int(n) for n in mask["stack"]["kernel"].sum((1, 2))]
    of_head = int(mask["head"]["kernel"].sum())
    # Ratios 20 / 100 three times and 12 / 20 of 32 weights: 32 * 20 / 72 = 8.9 each.
    assert (of_layers, of_head) == ([9, 9, 9], 5)


def test_a_schedule_passes_through_what_a_mapping_cannot_keep():
    # Dense at first, then the leaf that is named has its density, in the end exactly.
    x = params()
    tx = gradual_magnitude_pruning(
        optax.sgd(0.0),
        schedules.cubic_density(0.1, begin=0, end=6),
        layer_budget={"b/*": 0.5},
    )
    state, step, seen = tx.init(x), jax.jit(tx.update), []
    for _ in range(8):
        _, state = step(jax.tree.map(jnp.zeros_like, x), state, x)
        seen.append(numbers_kept(state.mask))
    assert seen[0] == [800, 100]
    assert seen[-1] == [40, 50]
    assert all(sum(a) >= sum(b) for a, b in itertools.pairwise(seen))
    assert sum(seen[-1]) == 90


def test_recipes_take_a_budget():
    x = params()
    for tx in (
        recipes.targeted(2, sparsity=0.9, begin=0.0, end=0.1, layer_budget="erk"),
        recipes.any_sparsity(2, densities=(0.1,), begin=0, end=0.1, layer_budget="erk"),
    ):
        state = tx.init(x)
        for _ in range(3):
            _, state = jax.jit(tx.update)(jax.tree.map(jnp.ones_like, x), state, x)
        assert len(optax.tree.get(state, "alone")) == 2


REFUSED = {
    "an unknown name": ("ERK", r"layer_budget must be one of 'global', .*got 'ERK'"),
    "a pattern of no leaf": ({"z/*": 0.1}, r"'z/\*' matches none of 'a/kernel'"),
    "a density above 1": ({"a/*": 1.5}, r"layer_budget\['a/\*'\] must be .* got 1.5"),
    "a key that is no pattern": ({0: 0.5}, r"got the key 0"),
    "an empty mapping": ({}, "at least one leaf"),
    "a total out of reach": ({"a/*": 0.9}, r"can keep the share 0.8 to 0.911.*0.1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    budget, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        masks.prune(params(), 0.9, layer_budget=budget)


def test_a_least_number_is_a_whole_number():
    with pytest.raises(ValueError, match=r"least must be an integer >= 0; got 0\.5"):
        masks.LayerBudget("erk", least=0.5)  # pyright: ignore
