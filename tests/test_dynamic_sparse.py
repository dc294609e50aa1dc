"""Dynamic sparse training: drop and grow against plain NumPy, and what always holds."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunadag_optax import eval_params, masks
from prunadag_optax.methods.dynamic_sparse import (
    DynamicSparseState,
    rigl,
    sparse_evolution,
    static_sparse,
)
from tests.helpers import enable_x64, refused

SHAPES = {"bias": (3,), "first": (4, 6), "second": (6, 5)}
PRUNED = ("first", "second")
EVERY, BEGIN, END = 3, 5, 80
MAKERS = {"rigl": rigl, "set": sparse_evolution}
makers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def tree(rng):
    return {name: rng.normal(size=shape) for name, shape in SHAPES.items()}


def stacked(trees):
    return {name: np.stack([tree[name] for tree in trees]) for name in SHAPES}


def path_of(tx, params, gradients) -> Any:
    """The parameters and the states before the first step and after each step.

    A leading axis is that of the steps.
    """

    def step(carry, gradient):
        x, state = carry
        updates, state = tx.update(gradient, state, x)
        carry = optax.apply_updates(x, updates), state
        return carry, carry

    start = params, tx.init(params)
    _, path = jax.lax.scan(step, start, gradients)
    return jax.tree.map(lambda x, y: jnp.concatenate([x[None], y]), start, path)


# Plain NumPy.


def lowest(values, among, number):
    """Indices of so many of the lowest values among some, the lowest index first."""
    return sorted(np.flatnonzero(among), key=lambda i: (values.flat[i], i))[:number]


def highest(values, among, number):
    """Indices of so many of the highest values among some, the highest index first."""
    order = sorted(np.flatnonzero(among), key=lambda i: (values.flat[i], i))
    return order[len(order) - number :]


def exchanged(x, keep, share, grow):
    """The mask after a drop and a growth, for one leaf.

    grow: function (which are not kept, number) -> indices.
    """
    keep = keep.copy()
    number = math.floor(share * keep.sum())
    keep.flat[lowest(abs(x), keep, number)] = False
    keep.flat[grow(~keep, number)] = True
    return keep


class Adam:
    def __init__(self, shape):
        self.mu, self.nu, self.count = np.zeros(shape), np.zeros(shape), 0

    def step(self, g):
        self.count += 1
        self.mu = 0.9 * self.mu + 0.1 * g
        self.nu = 0.99 * self.nu + 0.01 * g**2
        mu, nu = self.mu / (1 - 0.9**self.count), self.nu / (1 - 0.99**self.count)
        return -0.05 * mu / (np.sqrt(nu) + 1e-8)

    def forget(self, weights):
        self.mu[weights] = self.nu[weights] = 0


class Momentum:
    def __init__(self, shape):
        self.trace = np.zeros(shape)

    def step(self, g):
        self.trace = 0.9 * self.trace + g
        return -0.05 * self.trace

    def forget(self, weights):
        self.trace[weights] = 0


BASES = {
    "adam": (optax.adam(0.05, b2=0.99), Adam),
    "momentum": (optax.sgd(0.05, 0.9), Momentum),
}


def reference(params, gradients, kept, base, share, grow):
    """Yields parameters and masks after each step.

    grow: function (count, name, gradient, which are not kept, number) -> indices.
    """
    x = {name: leaf.copy() for name, leaf in params.items()}
    kept = {name: kept[name].copy() for name in PRUNED}
    states = {name: base(leaf.shape) for name, leaf in x.items()}
    for count, gradient in enumerate(gradients):
        if count % EVERY == 0 and BEGIN <= count < END:
            for name in PRUNED:
                new = exchanged(
                    x[name],
                    kept[name],
                    share(count),
                    functools.partial(grow, count, name, gradient[name]),
                )
                states[name].forget(~(new & kept[name]))
                x[name][~(new & kept[name])] = 0
                kept[name] = new
        else:
            for name in x:
                keep = kept.get(name, np.ones(x[name].shape, bool))
                moved = x[name] + states[name].step(np.where(keep, gradient[name], 0))
                x[name] = np.where(keep, moved, 0)
        yield (
            {name: leaf.copy() for name, leaf in x.items()},
            {name: leaf.copy() for name, leaf in kept.items()},
        )


def cosine(count):
    return 0.6 / 2 * (1 + math.cos(math.pi * count / END))


SHARES = {"cosine": (0.6, cosine), "schedule": (lambda count: 0.25, lambda count: 0.25)}


@pytest.mark.parametrize(
    ("make", "base", "share"),
    [
        (rigl, "adam", "cosine"),
        (rigl, "momentum", "schedule"),
        (sparse_evolution, "adam", "schedule"),
        pytest.param(sparse_evolution, "momentum", "cosine", marks=pytest.mark.slow),
    ],
)
def test_is_what_numpy_makes_of_it(make, base, share):
    rng = np.random.default_rng(0)
    params, gradients = tree(rng), [tree(rng) for _ in range(100)]
    for g in gradients:  # some that tie
        g["second"] = np.round(2 * g["second"]) / 2
    tx, plain = BASES[base]
    drop, share = SHARES[share]
    with enable_x64():
        tx = make(tx, 0.4, every=EVERY, begin=BEGIN, end=END, drop=drop)
        xs, states = jax.jit(functools.partial(path_of, tx))(params, stacked(gradients))

    def grow(count, name, gradient, others, number):
        if make is rigl:
            return highest(abs(gradient), others, number)
        # At random: those that grew, if they may and are as many.
        new = np.flatnonzero(np.asarray(states.mask[name][count + 1]) & others)
        assert len(new) == number
        return new

    start = {name: np.asarray(states.mask[name][0]) for name in PRUNED}
    steps = reference(params, gradients, start, plain, share, grow)
    changes = 0
    for count, (x, kept) in enumerate(steps, 1):
        for name in SHAPES:
            np.testing.assert_allclose(xs[name][count], x[name], rtol=1e-10, atol=1e-12)
        for name in PRUNED:
            changes += np.any(states.mask[name][count] != states.mask[name][count - 1])
            np.testing.assert_array_equal(states.mask[name][count], kept[name])
    assert changes > 30
    assert states.mask["bias"] is None


def after_exchange(x, g, mask, drop, make=rigl):
    """The mask, the parameters and the state after an exchange at step 1."""
    tx = make(optax.adam(0.1), 0.5, every=1, end=10, drop=lambda count: drop)
    x, g, mask = jnp.array(x), jnp.array(g), jnp.array(mask, bool)
    state: Any = tx.init(x)
    state = state._replace(count=1, mask=mask)
    ones = jax.tree.map(jnp.ones_like, state.base)
    updates, state = tx.update(g, state._replace(base=ones), x)
    return state.mask.astype(int).tolist(), (x + updates).tolist(), state


def test_the_lowest_index_is_dropped_and_the_highest_grown():
    mask, x, _ = after_exchange(
        [0.0, 2.0, -2.0, 2.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0, -1.0, 1.0],
        [0, 1, 1, 1, 0, 0], drop=0.7,
    )  # fmt: skip
    assert mask == [0, 0, 0, 1, 1, 1]
    assert x == [0.0, 0.0, 0.0, 2.0, 0.0, 0.0]


def test_what_is_dropped_may_grow_back_with_its_value_and_its_moments():
    mask, x, state = after_exchange(
        [1.0, -0.5, 3.0, 0.0, 0.0], [0.0, 9.0, 0.0, 5.0, 4.0], [1, 1, 1, 0, 0], drop=0.7
    )
    assert mask == [0, 1, 1, 1, 0]
    assert x == [0.0, -0.5, 3.0, 0.0, 0.0]
    adam = state.base[0]
    assert adam.mu.tolist() == adam.nu.tolist() == [0.0, 1.0, 1.0, 0.0, 0.0]
    assert int(adam.count) == 1  # as it was: no step of the base


@makers
@pytest.mark.parametrize("drop", [0.0, 0.33])
def test_where_there_is_nothing_to_drop_nothing_changes(make, drop):
    start = [1.0, -0.5, 3.0, 0.0, 0.0]
    mask, x, _ = after_exchange(start, [5.0] * 5, [1, 1, 1, 0, 0], drop, make)
    assert mask == [1, 1, 1, 0, 0]
    assert x == start


def test_the_state_of_a_new_weight_is_the_initial_one():
    x = jnp.arange(8.0) - 3.5
    base = optax.adagrad(0.1, initial_accumulator_value=0.25)
    tx = rigl(base, 0.5, every=3, end=7, drop=lambda count: 0.5)
    state: Any = tx.init(x)
    steep = jnp.where(state.mask, 1.0, 2.0)  # so that none grows back
    _, states = path_of(tx, x, jnp.broadcast_to(steep, (4, 8)))
    sums, mask = states.base[0].sum_of_squares, states.mask
    both = mask[3] & mask[4]
    assert both.sum() == 2
    np.testing.assert_array_equal(sums[3], np.where(mask[3], 3.25, 0.25))
    np.testing.assert_array_equal(sums[4], np.where(both, 3.25, 0.25))


# What always holds.


@functools.partial(jax.jit, static_argnames="name")
def random_run(name, density, drop, seed, params, gradients):
    tx = MAKERS[name](
        optax.adamw(0.1, weight_decay=0.125),
        density,
        every=EVERY,
        begin=BEGIN,
        end=END,
        drop=drop,
        key=jax.random.key(seed),
    )
    return path_of(tx, params, gradients)


@given(
    name=st.sampled_from([*MAKERS]),
    density=st.floats(0.05, 1.0),
    drop=st.floats(0.0, 1.0),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=8, deadline=None)
def test_active_weights_alone_move_and_are_as_many(name, density, drop, seed):
    rng, steps = np.random.default_rng(seed), 14
    density, drop = np.float32(density), np.float32(drop)
    params, gradients = tree(rng), [tree(rng) for _ in range(steps)]
    params = jax.tree.map(np.float32, params)
    gradients = jax.tree.map(np.float32, stacked(gradients))
    xs, states = random_run(name, density, drop, seed, params, gradients)
    kept = {name: np.asarray(states.mask[name]) for name in PRUNED}
    number = {name: kept[name].sum((1, 2)) for name in PRUNED}
    total = sum(number[name][0] for name in PRUNED)
    assert total == round(density * np.float32(54))
    moments = states.base[0]
    for leaf in PRUNED:
        assert np.all(number[leaf] == number[leaf][0])
        outside = ~kept[leaf]
        x = np.asarray(xs[leaf])
        assert np.all(x[1:][outside[1:]] == 0)
        assert not np.any(np.signbit(x[1:][outside[1:]]))
        for moment in (moments.mu, moments.nu):
            assert np.all(np.asarray(moment[leaf])[outside] == 0)
    exchanges = [k for k in range(steps) if k % EVERY == 0 and k >= BEGIN]
    for count in range(steps):
        same = [np.array_equal(kept[n][count], kept[n][count + 1]) for n in PRUNED]
        if count in exchanges:
            assert np.all(xs["bias"][count] == xs["bias"][count + 1])
            assert moments.count[count] == moments.count[count + 1]
        else:
            assert all(same)
    assert np.all(states.count == np.arange(steps + 1))
    # Other gradients where weights are not active change nothing, but what RigL grows.
    others = {leaf: gradients[leaf].copy() for leaf in SHAPES}
    for leaf in PRUNED:
        for count in range(steps):
            if name == "set" or count not in exchanges:
                others[leaf][count][~kept[leaf][count]] = np.nan
    again = random_run(name, density, drop, seed, params, others)
    jax.tree.map(np.testing.assert_array_equal, again, (xs, states))


@pytest.mark.parametrize(("make", "packed"), [(rigl, False), (sparse_evolution, True)])
def test_a_run_goes_on_from_numpy_arrays_bit_for_bit(make, packed):
    rng, middle = np.random.default_rng(3), 7
    params = jax.tree.map(np.float32, tree(rng))
    gradients = [jax.tree.map(np.float32, tree(rng)) for _ in range(14)]

    def runs(packed, carry=None, begin=0):
        # A new optimizer, as in a new process.
        tx = make(optax.adam(0.1), 0.3, every=3, end=13, packed=packed)

        @jax.jit
        def step(carry, gradient):
            x, state = carry
            updates, state = tx.update(gradient, state, x)
            return optax.apply_updates(x, updates), state

        path = [carry or (params, tx.init(params))]
        for gradient in gradients[begin:]:
            path.append(step(path[-1], gradient))
        return path

    path = runs(packed)
    saved = jax.tree.map(np.array, path[middle])
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(saved))
    again = runs(packed, saved, middle)[-1]
    jax.tree.map(np.testing.assert_array_equal, again, path[-1])
    if packed:
        x, state = path[-1]
        assert sum(leaf.nbytes for leaf in jax.tree.leaves(state.mask)) == 3 + 4
        state = state._replace(mask=masks.unpack(state.mask))
        jax.tree.map(np.testing.assert_array_equal, runs(False)[-1], (x, state))


def test_any_weight_may_be_active_and_may_grow():
    x, runs = jnp.ones((3, 5)), 2000

    @jax.jit
    @jax.vmap
    def masks_of(key):
        tx: Any = sparse_evolution(
            optax.sgd(0.0), 5, every=1, end=3, drop=lambda count: 0.4, key=key
        )
        state: Any = tx.init(x)
        state = state._replace(count=1)
        _, after = tx.update(x, state, x)
        return state.mask, after.mask

    before, after = map(np.asarray, masks_of(jax.random.split(jax.random.key(0), runs)))
    assert set(before.sum((1, 2))) == set(after.sum((1, 2))) == {5}
    # Five standard deviations.
    np.testing.assert_allclose(before.mean(0), 1 / 3, atol=5 * (2 / 9 / runs) ** 0.5)
    # The last three of the five stay, and any two of the other twelve grow.
    stay = before & (np.cumsum(before.reshape(runs, 15), 1).reshape(before.shape) > 2)
    assert np.all(after[stay])
    grown = (after & ~stay).sum(0) / (~stay).sum(0)
    np.testing.assert_allclose(grown, 1 / 6, atol=6 * (5 / 36 / runs) ** 0.5)


def test_the_first_step_makes_dense_parameters_sparse():
    x = {"bias": jnp.ones(2), "kernel": jnp.arange(1.0, 13.0).reshape(3, 4)}
    tx: Any = static_sparse(
        optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.5, 0.9)), 0.5
    )
    state = tx.init(x)
    start = eval_params(state, x)
    dense, states = {}, {}
    for name, params in (("dense", x), ("sparse", masks.apply_mask(start, state.mask))):
        updates, states[name] = tx.update(x, state, params)
        dense[name] = optax.apply_updates(params, updates)
    jax.tree.map(np.testing.assert_array_equal, dense["dense"], dense["sparse"])
    jax.tree.map(np.testing.assert_array_equal, states["dense"], states["sparse"])
    assert int((dense["dense"]["kernel"] == 0).sum()) == 6


def test_the_first_step_and_those_from_end_on_are_of_the_base():
    x = jnp.ones((6, 6))
    tx = sparse_evolution(optax.sgd(0.0), 0.5, every=1, end=4, drop=lambda count: 0.5)
    _, states = path_of(tx, x, jnp.ones((6, 6, 6)))
    kept = np.asarray(states.mask)
    changes = [k for k in range(6) if np.any(kept[k] != kept[k + 1])]
    assert changes == [1, 2, 3]


BUDGETS = {
    "uniform": {"first": 12, "second": 15},
    # (4 + 6) and (6 + 5) of 21 parts.
    "erk": {"first": 13, "second": 14},
    "er": {"first": 13, "second": 14},
    "mapping": {"first": 6, "second": 21},
}


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("density", [0.5, 27])
def test_the_budget_is_met_exactly(budget, density):
    named = {"first": 0.25} if budget == "mapping" else budget
    tx = static_sparse(optax.sgd(0.1), density, layer_budget=named)
    state: Any = tx.init(tree(np.random.default_rng(0)))
    kept = {name: int(state.mask[name].sum()) for name in PRUNED}
    assert kept == BUDGETS[budget]


def test_dtypes_stay_and_counts_are_exact():
    dtypes = {"bias": "float32", "first": "float16", "second": "bfloat16"}
    x = tree(np.random.default_rng(0))
    x = {name: jnp.asarray(x[name], dtypes[name]) for name in SHAPES}
    gradients = jax.tree.map(lambda leaf: jnp.stack(5 * [leaf]), x)
    tx = rigl(optax.adam(0.1), 0.25, every=2, end=5)
    xs, states = jax.jit(functools.partial(path_of, tx))(x, gradients)
    assert {name: xs[name].dtype.name for name in SHAPES} == dtypes
    kept = np.array([np.sum(states.mask[name], (1, 2)) for name in PRUNED])
    assert np.all(kept.sum(0) == round(54 / 4))


def test_keys_of_either_kind_and_seeds():
    x = jnp.ones((5, 5))

    def mask(key):
        state: Any = static_sparse(optax.sgd(0.1), 0.4, key=key).init(x)
        return np.asarray(state.mask)

    for key in (jax.random.key(7), jax.random.PRNGKey(7), np.int64(7)):
        np.testing.assert_array_equal(mask(key), mask(7))
    assert np.any(mask(8) != mask(7))
    # The state holds arrays, whatever generator the key is for.
    tx = sparse_evolution(optax.sgd(0.1), 0.4, key=jax.random.key(0, impl="rbg"),
                          every=1, end=3)  # fmt: skip
    state: Any = tx.init(x)
    assert state.key.dtype == jnp.uint32
    update = jax.jit(tx.update)
    for _ in range(3):
        _, state = update(x, state, x)
    assert int(state.mask.sum()) == 10


def test_extra_arguments_reach_the_base():
    def update(updates, state, params=None, *, factor=1.0, **extra):
        return jax.tree.map(lambda g: factor * g, updates), state

    base = optax.GradientTransformationExtraArgs(lambda params: (), update)
    tx = rigl(base, 1.0, every=2, end=3)
    x, state = jnp.ones(3), tx.init(jnp.ones(3))
    updates, state = tx.update(x, state, x, factor=-2.0)
    np.testing.assert_array_equal(updates, [-2.0, -2.0, -2.0])
    assert isinstance(state, DynamicSparseState)


def test_a_base_may_widen_its_state():
    def update(updates, state, params=None):
        del params
        return updates, state + jnp.float32(1)

    base = optax.GradientTransformation(
        lambda params: optax.tree.zeros_like(params), update
    )
    x = jnp.ones(4, jnp.bfloat16)
    tx = rigl(base, 0.5, every=2, end=3)
    state: Any = tx.init(x)
    step = jax.jit(tx.update)
    for _ in range(3):
        _, state = step(x, state, x)
    np.testing.assert_array_equal(state.base, np.where(state.mask, 2.0, 0.0))
    assert state.base.dtype == jnp.float32


def test_bad_input_is_named():
    base, x = optax.sgd(0.1), jnp.ones((4, 3))
    for density in (0.0, 1.5, 95.0, -1, 0, True, "half", lambda count: 0.5):
        with refused("density must be a fraction in (0, 1]"):
            static_sparse(base, density)  # pyright: ignore
    with refused("density", "got the count 13, more than the 12"):
        static_sparse(base, 13).init(x)
    with refused("layer_budget must say how many", "'erk'", "got 'global'"):
        static_sparse(base, 0.5, layer_budget="global")
    with refused("layer_budget must be one of", "got 'all'"):
        static_sparse(base, 0.5, layer_budget="all")
    with refused("layer_budget must match leaves", "'*/kernel'"):
        static_sparse(base, 0.5, layer_budget={"*/kernel": 0.5}).init({"a": x})
    keys = jax.random.split(jax.random.key(0))
    for key in (-1, 0.5, 2**32, True, "0", None, jnp.ones(()), jnp.ones(2), keys):
        with refused("key must be"):
            static_sparse(base, 0.5, key=key)  # pyright: ignore
    with refused("base must be an optax transformation"):
        static_sparse(0.1, 0.5)  # pyright: ignore
    with refused("every must be an integer >= 1; got 0"):
        rigl(base, 0.5, every=0, end=10)
    with refused("begin must be an integer >= 0; got -1"):
        rigl(base, 0.5, begin=-1, end=1000)
    with refused("end must be an integer >= 1; got 0.75"):
        rigl(base, 0.5, end=0.75)  # pyright: ignore
    with refused("end must be > 100, the first step", "got 100", "static_sparse"):
        rigl(base, 0.5, end=100)
    with refused("end must be > 8, the first step", "begin=5", "got 7"):
        rigl(base, 0.5, every=4, begin=5, end=7)
    for drop in (-0.1, 1.5, lambda count: 1.5):
        with refused("drop must be a finite number >= 0 and <= 1; got"):
            sparse_evolution(base, 0.5, end=200, drop=drop)
    with refused("drop must be a function (count)"):
        sparse_evolution(base, 0.5, end=200, drop=lambda: 0.5)  # pyright: ignore
    with refused("where must be a function", "'kernel'"):
        static_sparse(base, 0.5, where="kernel").init(x)  # pyright: ignore
    with refused("where must choose at least one leaf"):
        static_sparse(base, 0.5, where=lambda path, leaf: False).init(x)
    tx = rigl(base, 0.5, end=200)
    with refused("params must be given"):
        tx.update(x, tx.init(x))
    with refused("mask must have the shape (4, 3)"):
        tx.update(x, tx.init(jnp.ones((3, 4))), x)
    with refused("state must be that of this optimizer, a DynamicSparseState"):
        tx.update(x, base.init(x), x)
