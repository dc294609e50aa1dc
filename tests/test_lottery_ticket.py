"""Lottery tickets: the loop against a transcription, its controls, its citizenship."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunadag_optax import masks
from prunadag_optax.methods import lottery_ticket as lt
from tests.helpers import enable_x64, refused

SHAPES = {"a": {"kernel": (5, 4), "bias": (4,)}, "b": {"kernel": (4, 3), "bias": (3,)}}
few = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31 - 1)


def tree(seed):
    """Parameters with many equal magnitudes, and some zeros."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.integers(-6, 7, shape) / 4.0, jnp.float32),
        SHAPES,
        is_leaf=lambda shape: isinstance(shape, tuple),
    )


def kernels(tree_):
    return [np.asarray(tree_[name]["kernel"]) for name in ("a", "b")]


def train(start, mask):
    """Some arithmetic that changes the order of the magnitudes, exact in float32."""
    moved = jax.tree.map(lambda x: 2 * x - jnp.floor(3 * x), start)
    return masks.apply_mask(moved, mask)


def reference_prune(values, keep, share):
    """A mask without the share of its smallest magnitudes, the first of equals first.

    Args:
      values: flat array.
      keep: flat mask.
      share: p.
    """
    keep = keep.copy()
    (left,) = np.nonzero(keep)
    order = left[np.argsort(np.abs(values[left]), kind="stable")]
    keep[order[: round(share * left.size)]] = False
    return keep


def reference_run(params, rounds, fraction, scope):
    """Flat masks of every round, a list a leaf, in NumPy."""
    theta = [leaf.ravel() for leaf in kernels(params)]
    keep = [np.ones(leaf.size, bool) for leaf in theta]
    shares = fraction if isinstance(fraction, list) else [fraction] * len(theta)
    found = [keep]
    for _ in range(rounds):
        start = [np.where(m, x, 0) for m, x in zip(keep, theta, strict=True)]
        end = [
            np.where(m, 2 * x - np.floor(3 * x), 0)
            for m, x in zip(keep, start, strict=True)
        ]
        if scope == "global":
            joined = reference_prune(
                np.concatenate(end), np.concatenate(keep), shares[0]
            )
            keep = np.split(joined, np.cumsum([m.size for m in keep])[:-1])
        else:
            keep = [
                reference_prune(*one) for one in zip(end, keep, shares, strict=True)
            ]
        found.append(keep)
    return found


def by_layer(path, leaf):
    return 0.2 if path[0].key == "a" else 0.1


@few
@given(
    seeds, st.integers(0, 5), st.floats(0, 0.99), st.sampled_from(["global", "leaf"])
)
def test_masks_are_those_of_the_transcription(seed, rounds, fraction, scope):
    params = tree(seed)
    tickets = list(
        lt.iterative_magnitude_pruning(
            train, params, rounds=rounds, fraction=fraction, scope=scope
        )
    )
    expected = reference_run(params, rounds, fraction, scope)
    assert len(tickets) == rounds + 1
    for ticket, keep in zip(tickets, expected, strict=True):
        assert ticket.mask["a"]["bias"] is ticket.mask["b"]["bias"] is None
        for got, wanted in zip(kernels(ticket.mask), keep, strict=True):
            np.testing.assert_array_equal(got.ravel(), wanted)
        # Rewound: the first parameters where kept, zero elsewhere, biases and all.
        for got, first, kept in zip(
            kernels(ticket.start), kernels(params), kernels(ticket.mask), strict=True
        ):
            np.testing.assert_array_equal(got, np.where(kept, first, 0))
        for name in ("a", "b"):
            np.testing.assert_array_equal(
                ticket.start[name]["bias"], params[name]["bias"]
            )
        for got, wanted in zip(
            jax.tree.leaves(ticket.trained),
            jax.tree.leaves(train(ticket.start, ticket.mask)),
            strict=True,
        ):
            np.testing.assert_array_equal(got, wanted)


def test_layers_have_their_own_fractions():
    params = tree(0)
    tickets = lt.iterative_magnitude_pruning(
        train, params, rounds=4, fraction=by_layer, scope="leaf"
    )
    expected = reference_run(params, 4, [0.2, 0.1], "leaf")
    for ticket, keep in zip(tickets, expected, strict=True):
        for got, wanted in zip(kernels(ticket.mask), keep, strict=True):
            np.testing.assert_array_equal(got.ravel(), wanted)


@few
@given(seeds, seeds, st.floats(0, 0.99), st.sampled_from(["global", "leaf"]))
def test_pruned_weights_stay_pruned_and_do_not_count(seed, other, fraction, scope):
    # What stands at a pruned weight does not matter: here large numbers and NaN.
    params, mask = (
        tree(seed),
        lt.random_mask(
            jax.random.key(other),
            masks.magnitude_mask(tree(other), 0.4),
        ),
    )
    dirty = jax.tree.map(
        lambda x, keep: x if keep is None else jnp.where(keep, x, jnp.nan),
        params,
        mask,
        is_leaf=lambda leaf: leaf is None,
    )
    after = lt.prune_remaining(dirty, mask, fraction, scope=scope)
    again = lt.prune_remaining(params, mask, fraction, scope=scope)
    counts = []
    for old, new, same in zip(*map(kernels, (mask, after, again)), strict=True):
        np.testing.assert_array_equal(new, same)
        assert not np.any(new & ~old)
        counts.append((old.sum(), new.sum()))
    if scope == "global":
        counts = [np.sum(counts, axis=0)]
    assert all(new == old - round(fraction * int(old)) for old, new in counts)


def test_remaining_shares_of_the_paper():
    # 266,200 weights of LeNet-300-100; 20% of the hidden layers, 10% of the output.
    sizes = {"a": (784, 300), "b": (300, 100), "output": (100, 10)}
    params = jax.tree.map(
        lambda s: jnp.ones(s), sizes, is_leaf=lambda s: isinstance(s, tuple)
    )
    mask, remaining = lt.dense_mask(params), []
    for _ in range(15):
        mask = lt.prune_remaining(
            params,
            mask,
            lambda path, leaf: 0.1 if path[0].key == "output" else 0.2,
            scope="leaf",
        )
        remaining.append(100 * (1 - float(masks.sparsity(mask))))
    # The shares that the paper's figures are labelled with.
    np.testing.assert_allclose(
        [remaining[i - 1] for i in (3, 7, 15)], [51.3, 21.1, 3.6], atol=0.05
    )


def test_rewinds_to_step_k():
    params = tree(1)

    def rewind(theta):
        return jax.tree.map(lambda x: x + 0.25, theta)

    early = rewind(params)
    tickets = lt.iterative_magnitude_pruning(train, params, rounds=2, rewind=rewind)
    same = lt.iterative_magnitude_pruning(train, early, rounds=2)
    for got, wanted in zip(tickets, same, strict=True):
        jax.tree.map(np.testing.assert_array_equal, got, wanted)


def test_goes_on_from_a_mask():
    params = tree(2)
    whole = list(lt.iterative_magnitude_pruning(train, params, rounds=4))
    rest = lt.iterative_magnitude_pruning(train, params, rounds=2, mask=whole[2].mask)
    for got, wanted in zip(rest, whole[2:], strict=True):
        jax.tree.map(np.testing.assert_array_equal, got, wanted)


def test_a_round_is_trained_when_asked_for():
    calls = []

    def counted(start, mask):
        calls.append(int(jax.tree.reduce(lambda n, m: n + m.sum(), mask, 0)))
        return train(start, mask), len(calls)

    tickets = lt.iterative_magnitude_pruning(
        counted, tree(3), rounds=9, fraction=0.25, has_aux=True
    )
    assert not calls
    assert [next(tickets).aux for _ in range(3)] == [1, 2, 3]
    assert calls == [32, 24, 18]


def quadratic(x, target):
    return sum(
        jnp.sum((a - b) ** 2)
        for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(target), strict=True)
    )


@pytest.mark.parametrize(
    "base",
    [
        optax.adamw(0.1, weight_decay=0.1),
        optax.sgd(0.1, momentum=0.9),
        optax.chain(optax.clip_by_global_norm(0.1), optax.add_noise(0.1, 0.5, 0)),
    ],
)
def test_the_optimizer_keeps_to_the_ticket(base):
    params, target = tree(4), tree(5)
    mask = masks.magnitude_mask(params, 0.6)

    @jax.jit
    def run(params):
        tx = lt.sparse_optimizer(base, mask)

        def step(carry, _):
            x, state = carry
            updates, state = tx.update(jax.grad(quadratic)(x, target), state, x)
            return (optax.apply_updates(x, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=5)[0][0]

    trained = run(params)
    for got, first, keep in zip(*map(kernels, (trained, params, mask)), strict=True):
        np.testing.assert_array_equal(got[~keep], 0)
        assert np.all(got[keep] != first[keep])


def test_the_optimizer_is_its_transcription():
    # Adam on the masked gradient of a quadratic in plain NumPy.
    rng = np.random.default_rng(6)
    start, target, scale = rng.normal(size=(3, 4, 3))
    keep = rng.random((4, 3)) < 0.5
    with enable_x64():
        params = {"bias": jnp.ones(3), "kernel": jnp.asarray(start)}
        mask = {"bias": None, "kernel": jnp.asarray(keep)}
        tx = lt.sparse_optimizer(optax.adam(0.1, 0.8, 0.9, 1e-3), mask)
        state = tx.init(params)
        x, m, v = start, 0.0, 0.0
        for t in range(1, 21):
            g = scale**2 * (params["kernel"] - target)
            updates, state = tx.update(
                {"bias": jnp.zeros(3), "kernel": g}, state, params
            )
            params = optax.apply_updates(params, updates)
            g = np.where(keep, scale**2 * (x - target), 0)
            m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
            step = (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.9**t)) + 1e-3)
            x = np.where(keep, x - 0.1 * step, 0)
            np.testing.assert_allclose(params["kernel"], x, rtol=1e-10, atol=1e-10)
    np.testing.assert_array_equal(params["kernel"][~keep], 0)


def test_norms_are_those_of_the_ticket_alone():
    # With the pruned gradients in it the clipped norm would be another.
    params = jnp.array([[1.0, 2.0, 0.0]])
    mask, g = jnp.array([[True, True, False]]), jnp.array([[3.0, 4.0, 100.0]])
    tx = lt.sparse_optimizer(optax.clip_by_global_norm(1.0), mask)
    updates: Any = tx.update(g, tx.init(params), params)[0]
    np.testing.assert_allclose(updates, [[0.6, 0.8, 0.0]], rtol=1e-6)


@few
@given(seeds, st.floats(0, 1))
def test_random_masks_keep_as_many_of_each_leaf(seed, sparsity):
    mask = masks.magnitude_mask(tree(seed), sparsity)
    other = lt.random_mask(jax.random.key(seed), mask)
    assert jax.tree.structure(other) == jax.tree.structure(mask)
    for got, given_ in zip(kernels(other), kernels(mask), strict=True):
        assert got.shape == given_.shape
        assert got.sum() == given_.sum()


def test_random_masks_are_uniform():
    mask = jnp.arange(12).reshape(3, 4) < 4
    keys = jax.random.split(jax.random.key(0), 3000)
    share = jax.vmap(lambda key: lt.random_mask(key, mask))(keys).mean(0)
    # Five standard errors of a mean of 3000 draws of probability 1/3.
    np.testing.assert_allclose(share, 1 / 3, atol=5 * np.sqrt(2 / 9 / 3000))


def test_leaves_are_permuted_each_on_its_own():
    mask = {name: jnp.arange(64).reshape(8, 8) < 32 for name in "ab"}
    other = lt.random_mask(jax.random.key(0), mask)
    assert not np.array_equal(other["a"], other["b"])


def test_reinitialised_weights_are_drawn_anew_under_the_same_mask():
    def init(key):
        return jax.tree.map(
            lambda shape: jax.random.normal(key, shape),
            SHAPES,
            is_leaf=lambda shape: isinstance(shape, tuple),
        )

    mask = masks.magnitude_mask(tree(6), 0.5)
    start = lt.reinitialised(jax.random.key(1), init, mask)
    other = init(jax.random.key(1))
    for got, drawn, keep in zip(*map(kernels, (start, other, mask)), strict=True):
        np.testing.assert_array_equal(got, np.where(keep, drawn, 0))
    np.testing.assert_array_equal(start["a"]["bias"], other["a"]["bias"])


@pytest.mark.parametrize("scope", ["global", "leaf"])
@pytest.mark.slow
def test_a_batch_of_tickets_is_each_ticket(scope):
    traced = []

    @jax.jit
    def compiled(start, mask):
        traced.append(None)
        return train(start, mask)

    def run(params):
        return list(
            lt.iterative_magnitude_pruning(compiled, params, rounds=3, scope=scope)
        )

    several = [tree(seed) for seed in range(3)]
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *several)
    for how in (jax.vmap(run), jax.jit(jax.vmap(run))):
        tickets = how(batch)
        for i, params in enumerate(several):
            one = jax.tree.map(lambda leaf, i=i: leaf[i], tickets)
            for got, wanted in zip(one, run(params), strict=True):
                jax.tree.map(np.testing.assert_array_equal, got, wanted)
    # Batched (dense masks are not batched yet), in the outer jit the same, and alone.
    assert len(traced) <= 5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtypes_stay(dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), tree(7))
    *_, last = lt.iterative_magnitude_pruning(train, params, rounds=2)
    for part in (last.start, last.trained):
        assert {leaf.dtype for leaf in jax.tree.leaves(part)} == {jnp.dtype(dtype)}


def test_odd_trees():
    for params in ({}, {"a": None, "w": jnp.ones((3, 1))}, jnp.ones((2, 2))):
        tickets = list(
            lt.iterative_magnitude_pruning(lambda x, mask: x, params, rounds=0)
        )
        assert len(tickets) == 1
        for got, wanted in zip(
            jax.tree.leaves(tickets[0].trained), jax.tree.leaves(params), strict=True
        ):
            np.testing.assert_array_equal(got, wanted)
    # A None in a mask may stand for a whole part of the tree.
    params = tree(8)
    mask = {"a": {"kernel": jnp.ones((5, 4), bool), "bias": None}, "b": None}
    after = lt.prune_remaining(params, mask, 0.5)
    assert int(after["a"]["kernel"].sum()) == 10
    assert jax.tree.leaves(after["b"]) == []


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"rounds": -1}, ["rounds must be a finite number >= 0; got -1."]),
        ({"rounds": 1.5}, ["rounds must be an integer >= 0; got 1.5."]),
        ({"fraction": 1.0}, ["fraction must be a finite number >= 0 and < 1", "1.0"]),
        ({"fraction": "few"}, ["fraction must be a finite number", "'few'"]),
        ({"fraction": by_layer}, ["fraction must be a number in [0, 1) with", "by_la"]),
        ({"scope": "tree"}, ["scope must be 'global' or 'leaf'; got 'tree'."]),
        ({"mask": {"a": None}}, ["mask must have the tree structure of params"]),
        ({"mask": jax.tree.map(jnp.ones_like, tree(0))}, ["mask", "must be bool"]),
        (
            {"params": jnp.ones((2, 2), complex), "where": masks.everything},
            ["params has dtype complex"],
        ),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments, parts):
    good = {"params": tree(0), "rounds": 1}
    lt.iterative_magnitude_pruning(train, **good)
    with refused(*parts):
        lt.iterative_magnitude_pruning(train, **(good | arguments))


def test_bad_functions_are_refused():
    params = tree(9)
    with refused("train(start, mask) and params must have the same tree structure"):
        list(lt.iterative_magnitude_pruning(lambda x, mask: (x, 1), params, rounds=0))
    with refused("rewind(params) and params must have the same tree structure"):
        list(
            lt.iterative_magnitude_pruning(
                train, params, rounds=0, rewind=lambda theta: theta["a"]
            )
        )
    with refused("train must keep pruned weights at zero", "['a']['kernel']"):
        list(
            lt.iterative_magnitude_pruning(
                lambda x, mask: jax.tree.map(lambda leaf: leaf + 1, x), params, rounds=1
            )
        )
    with refused("fraction(['a']['kernel']) must be a finite number", "1.5"):
        lt.prune_remaining(
            params, lt.dense_mask(params), lambda path, leaf: 1.5, scope="leaf"
        )
