"""AC/DC: its phases against a plain loop, the optimizer against plain NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunadag_optax import masks
from prunadag_optax.methods.ac_dc import ac_dc, phases
from tests.helpers import enable_x64, exact_leaves, jitted, refused, scanned, vmapped

LENGTHS = {"warm_up": 7, "phase": 6, "last": 15, "total_steps": 90}
SHORT = {"warm_up": 1, "phase": 2, "last": 3, "total_steps": 8}
SHAPES = {"bias": (3,), "first": (4, 3), "second": (3, 5)}


def plan(*, warm_up, phase, last, total_steps):
    """Whether each of 120 steps is compressed, phase by phase."""
    steps = [False] * warm_up
    while total_steps - last - len(steps) >= 2 * phase:
        steps += [True] * phase + [False] * phase
    steps += [False] * (total_steps - last - len(steps))
    return steps + [True] * (120 - len(steps))


@given(
    warm_up=st.integers(0, 12),
    phase=st.integers(1, 9),
    last=st.integers(1, 9),
    middle=st.integers(0, 60),
)
@settings(max_examples=40, deadline=None)
def test_phases_are_those_of_a_plain_loop(warm_up, phase, last, middle):
    lengths = {"warm_up": warm_up, "phase": phase, "last": last}
    lengths["total_steps"] = warm_up + middle + last
    wanted = plan(**lengths)
    compressed, starts = phases(**lengths)(np.arange(120))
    np.testing.assert_array_equal(compressed, wanted)
    changes = [True, *(a != b for a, b in itertools.pairwise(wanted))]
    np.testing.assert_array_equal(starts, changes)
    # What precedes the last phase is decompressed, by a whole phase or by all there is.
    end = warm_up + middle
    assert not any(wanted[max(warm_up, end - phase) : end])


def test_the_phases_of_the_paper():
    at = phases(warm_up=10, phase=5, last=15, total_steps=100)
    compressed, starts = at(np.arange(120))
    np.testing.assert_array_equal(np.flatnonzero(starts), [0, *range(10, 80, 5), 85])
    assert bool(compressed[10:15].all())
    assert not compressed[75:85].any()
    assert bool(compressed[85:].all())


def tree(rng):
    return {name: rng.normal(size=shape) for name, shape in SHAPES.items()}


def reference(params, gradients, *, rate, momentum, kept, lengths):
    """Heavy-ball SGD in float64 with its phases, matrices pruned."""
    x = {name: leaf.copy() for name, leaf in params.items()}
    velocity = {name: np.zeros_like(leaf) for name, leaf in x.items()}
    mask = {name: np.ones_like(leaf, bool) for name, leaf in x.items()}
    names = [name for name in sorted(x) if x[name].ndim > 1]
    compressed = plan(**lengths)
    for k, gradient in enumerate(gradients):
        before = k > 0 and compressed[k - 1]
        if compressed[k] and not before:
            flat = np.concatenate([abs(x[name]).ravel() for name in names])
            least = np.sort(flat)[-kept]
            mask |= {name: abs(x[name]) >= least for name in names}
        if before and not compressed[k]:
            for name in x:
                velocity[name][~mask[name]] = 0
                mask[name] = np.ones_like(mask[name])
        for name in x:
            g = np.where(mask[name], gradient[name], 0)
            velocity[name] = momentum * velocity[name] + g
            x[name] = np.where(mask[name], x[name] - rate * velocity[name], 0)
    return x, velocity, mask


@pytest.mark.parametrize("kept", [3, 14, 27])
def test_is_what_numpy_makes_of_it(kept):
    rng = np.random.default_rng(kept)
    params, gradients = tree(rng), [tree(rng) for _ in range(100)]
    with enable_x64():
        base = optax.sgd(0.1, momentum=0.9)
        tx = ac_dc(base, kept / 27, **LENGTHS)
        x, _, state = jax.jit(lambda x, g: scanned(tx, x, g))(
            *jax.tree.map(jnp.asarray, (params, gradients))
        )
        wanted, velocity, mask = reference(
            params, gradients, rate=0.1, momentum=0.9, kept=kept, lengths=LENGTHS
        )
        trace = state.base[0].trace
        for name in SHAPES:
            np.testing.assert_allclose(x[name], wanted[name], rtol=1e-10, atol=1e-12)
            np.testing.assert_allclose(
                trace[name], velocity[name], rtol=1e-10, atol=1e-12
            )
            if name != "bias":
                np.testing.assert_array_equal(state.mask[name], mask[name])
    assert state.mask["bias"] is None
    assert int(state.count) == 100


def test_phase_by_phase():
    """Counts, exact zeros, moments of what returns, and masks that stay."""
    rng = np.random.default_rng(0)
    x = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree(rng))
    tx = ac_dc(optax.adam(0.1), 0.25, **SHORT)
    state, update = tx.init(x), jax.jit(tx.update)
    wanted = plan(**SHORT)
    assert wanted[:8] == [False, True, True, False, False, True, True, True]
    gradient = jax.tree.map(jnp.ones_like, x)
    masked = []
    for k in range(12):
        before = state
        updates, state = update(gradient, state, x)
        x = optax.apply_updates(x, updates)
        keep = np.concatenate([np.ravel(state.mask[n]) for n in ("first", "second")])
        flat = np.concatenate([np.ravel(x[n]) for n in ("first", "second")])
        mu = np.concatenate(
            [np.ravel(state.base[0].mu[n]) for n in ("first", "second")]
        )
        assert keep.sum() == (7 if wanted[k] else 27)
        assert np.all(flat[~keep] == 0)
        assert not np.any(np.signbit(flat[~keep]))
        if wanted[k] and wanted[k - 1]:  # held
            np.testing.assert_array_equal(keep, masked[-1])
        if not wanted[k] and k and wanted[k - 1]:
            # One step from nothing: what returns has the moments of its first gradient.
            returned = ~masked[-1]
            np.testing.assert_allclose(mu[returned], 0.1, rtol=1e-6)
            assert np.all(mu[~returned] > 0.15)
            assert int(before.base[0].count) == int(state.base[0].count) - 1
        masked.append(keep)
    assert bool((state.mask["first"] == before.mask["first"]).all())


def test_packed_is_unpacked():
    leaf = exact_leaves("float32", 0)
    params = {"kernel": leaf((7, 3)), "bias": leaf((3,))}
    gradients = [
        jax.tree.map(lambda x, s=seed: exact_leaves("float32", s)(x.shape), params)
        for seed in range(1, 10)
    ]
    results = [
        jitted(ac_dc(optax.sgd(0.125, 0.5), 0.5, packed=p, **SHORT), params, gradients)
        for p in (False, True)
    ]
    (x, _, state), (y, _, packed) = results
    jax.tree.map(np.testing.assert_array_equal, x, y)
    assert packed.mask["kernel"].bits.nbytes == 3
    jax.tree.map(np.testing.assert_array_equal, state.mask, masks.unpack(packed.mask))
    assert int(state.mask["kernel"].sum()) == 10


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("run", [scanned, vmapped])
def test_half_precision_in_every_loop(run, dtype):
    params = {"kernel": exact_leaves(dtype, 0)((8, 4))}
    gradients = [{"kernel": exact_leaves(dtype, s)((8, 4)) / 8} for s in range(1, 10)]
    tx = ac_dc(optax.sgd(0.125, momentum=0.5), 0.25, **SHORT)
    x, _, state = run(tx, params, gradients)
    y, *_ = jitted(tx, params, gradients)
    assert x["kernel"].dtype == dtype
    np.testing.assert_array_equal(x["kernel"], y["kernel"])
    assert int(state.mask["kernel"].sum()) == 8
    assert int((x["kernel"] != 0).sum()) <= 8


def test_the_density_may_be_traced():
    x = jnp.arange(1.0, 1001.0)
    lengths = {"warm_up": 0, "phase": 1, "last": 1, "total_steps": 1}

    @jax.jit
    def kept(density):
        tx = ac_dc(optax.sgd(0.0), density, **lengths)
        return tx.update(x, tx.init(x), x)[1].mask.sum()

    for density in (0.1, 0.9, 0.0001):
        assert int(kept(density)) == max(1, round(1000 * density))
    assert kept._cache_size() == 1


def test_budgets_share_out_what_is_kept():
    params = {"p": jnp.arange(1.0, 9.0).reshape(2, 4)}
    params["q"] = params["p"] / 100
    lengths = {"warm_up": 0, "phase": 1, "last": 1, "total_steps": 1}
    kept = {}
    for name, settings_ in {
        "global": {},
        "leaf": {"scope": "leaf"},
        "mapping": {"layer_budget": {"p": 0.25}},
        "where": {"where": masks.named("q")},
    }.items():
        tx = ac_dc(optax.sgd(0.0), 0.5, **lengths, **settings_)
        updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
        x = optax.apply_updates(params, updates)
        kept[name] = [int((x[leaf] != 0).sum()) for leaf in "pq"]
    assert kept == {
        "global": [8, 0],
        "leaf": [4, 4],
        "mapping": [2, 6],
        "where": [8, 4],
    }


def test_extra_arguments_reach_the_base():
    def update(updates, state, params=None, *, factor, **extra):
        return jax.tree.map(lambda g: factor * g, updates), state

    base = optax.GradientTransformationExtraArgs(lambda params: (), update)
    tx, x = ac_dc(base, 0.5, **SHORT), jnp.ones(3)
    updates, _ = tx.update(x, tx.init(x), x, factor=-2.0)
    np.testing.assert_array_equal(updates, [-2.0, -2.0, -2.0])


def test_bad_input_is_named():
    base, x = optax.sgd(0.1), jnp.ones(3)
    for name, value in {
        "warm_up": -1,
        "phase": 0,
        "last": 0,
        "total_steps": 1.5,
    }.items():
        with refused(f"{name} must be an integer", f"got {value}"):
            ac_dc(base, 0.5, **SHORT | {name: value})
    with refused("total_steps must be at least warm_up + last = 4; got 3"):
        ac_dc(base, 0.5, **SHORT | {"total_steps": 3})
    with refused("density must be", "got 0"):
        ac_dc(base, 0, **SHORT)
    with refused("scope must be", "got 'all'"):
        ac_dc(base, 0.5, scope="all", **SHORT)
    with refused("layer_budget must be", "got 'even'"):
        ac_dc(base, 0.5, layer_budget="even", **SHORT)
    with refused("base must be an optax transformation"):
        ac_dc(0.1, 0.5, **SHORT)  # pyright: ignore
    tx = ac_dc(base, 0.5, **SHORT)
    with refused("params"):
        tx.update(x, tx.init(x))
