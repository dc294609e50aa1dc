"""`pruning_aware` and the recipes, beside a plain NumPy transcription."""

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunadag_optax import eval_params, masks, pruning_aware, recipes, schedules
from prunadag_optax._ranking.lamp import lamp_scores
from tests import bases
from tests.bases import BASES, PLACES, drawn
from tests.helpers import enable_x64, refused

# The transcription: one leaf, one equation at a time, in float64.


def sets(leaves, share, scope):
    """For each leaf of two axes the set R, for the others everything."""
    kernels = [x for x in leaves if x.ndim > 1]
    whole = np.concatenate([x.ravel() for x in kernels])
    found = []
    for x in leaves:
        ranked = whole if scope == "global" else x.ravel()
        count = min(max(1, round(share * ranked.size)), ranked.size)
        last = np.sort(np.abs(ranked))[-count]
        found.append(np.abs(x) >= last if x.ndim > 1 else np.ones(x.shape, bool))
    return found


def transcription(x, gradient, steps, *, eta, share, d, decay, l1, b2, scope, at):
    """The points that the loop holds, and the whole x after the last step."""
    b1, eps = 0.8, 1e-6
    x = [np.array(leaf, np.float64) for leaf in x]
    m, v = [0 * leaf for leaf in x], [0 * leaf for leaf in x]
    seen, held = [], x
    inside = [np.ones(leaf.shape, bool) for leaf in x]
    for k in range(steps):
        if at == "params" or k:
            inside = sets(x, share(k), scope)
        g, moved = gradient(held, k), []
        for i, leaf in enumerate(x):
            m[i] = np.where(inside[i], b1 * m[i] + (1 - b1) * g[i], m[i])
            if b2 is None:
                direction = m[i] / (1 - b1)
            else:
                v[i] = np.where(inside[i], b2 * v[i] + (1 - b2) * g[i] ** 2, v[i])
                direction = (m[i] / (1 - b1 ** (k + 1))) / (
                    np.sqrt(v[i] / (1 - b2 ** (k + 1))) + eps
                )
            z = leaf - eta(k) * (direction + decay * leaf * (leaf.ndim > 1))
            if leaf.ndim > 1:
                z = np.sign(z) * np.maximum(np.abs(z) - eta(k) * l1, 0)
            moved.append(np.where(inside[i], z, (1 - d) * leaf))
        x = held = moved
        if at == "pruned":
            inside = sets(x, share(k + 1), scope)
            held = [np.where(r, leaf, 0) for r, leaf in zip(inside, x, strict=True)]
        seen.append(held)
    return seen, x


def matrices(tree):
    return jax.tree.map(lambda x: jnp.ndim(x) > 1, tree)


def adam(rate, b2, decay):
    """The base of the transcription: Adam's steps, or with b2 None those of SGD."""
    if b2 is None:
        return optax.chain(
            optax.trace(0.8),
            optax.add_decayed_weights(decay, matrices),
            optax.scale_by_learning_rate(rate),
        )
    return optax.adamw(rate, 0.8, b2, 1e-6, weight_decay=decay, mask=matrices)


@pytest.mark.parametrize("scope", ["global", "leaf"])
@pytest.mark.parametrize("at", ["params", "pruned"])
@pytest.mark.parametrize(
    # optax keeps the weight decay in float32, which holds an eighth.
    ("decay", "l1", "b2"),
    [(0.125, 0.0, 0.9), (0.125, 0.0, None), (0.0, 0.3, 0.9), (0.0, 1, None)],
)
def test_equals_the_transcription(scope, at, decay, l1, b2):
    steps, targets = 300, [np.sin(np.arange(300) + i) for i in range(3)]
    start = drawn(0)
    leaves, treedef = jax.tree.flatten(start)

    def gradient(x, k):
        # Curved, and of another scale in each step, so that nothing is near a tie.
        return [
            (1 + i) * (leaf**3 - t[k]) + 0.1 * np.cos(7 * leaf + k)
            for i, (leaf, t) in enumerate(zip(x, targets, strict=True))
        ]

    expected, dense = transcription(
        leaves, gradient, steps, eta=lambda k: 0.1 / math.sqrt(k + 1),
        share=lambda k: [1.0, 0.4, 0.2][k % 3], d=0.05, decay=decay, l1=l1, b2=b2,
        scope=scope, at=at,
    )  # fmt: skip
    with enable_x64():

        def rate(k):
            return 0.1 / jnp.sqrt(k + 1.0)

        tx = pruning_aware(
            adam(rate, b2, decay),
            lambda k: jnp.array([1.0, 0.4, 0.2])[k % 3],
            soft_threshold=lambda k: rate(k) * l1,
            shrink_rate=0.05,
            gradient_at=at,
            scope=scope,
        )
        params = jax.tree.map(jnp.asarray, start)
        state = tx.init(params)

        @jax.jit
        def step(gradients, state, params):
            updates, state = tx.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        for k in range(steps):
            held = [np.asarray(leaf) for leaf in jax.tree.leaves(params)]
            found = treedef.unflatten(gradient(held, k))
            params, state = step(found, state, params)
            for x, y in zip(jax.tree.leaves(params), expected[k], strict=True):
                np.testing.assert_allclose(x, y, rtol=0, atol=1e-10)
                np.testing.assert_array_equal(x == 0, y == 0)
        for x, y in zip(
            jax.tree.leaves(eval_params(state, params)), dense, strict=True
        ):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-10)
        assert step._cache_size() == 1


# Each base, in float64. The runs of a base share one compiled step.


each_base = pytest.mark.parametrize(("name", "at"), [*itertools.product(BASES, PLACES)])


def assert_near(actual, expected):
    """The same tree, dtypes and integers, and floats up to roundings."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-10)


@functools.cache
def trained(name, at, steps=bases.STEPS, density=bases.DENSITY):
    x = bases.start()
    state = bases.made(name, at).init(x)
    return bases.run(name, at, x, state, bases.gradients()[:steps], density)


@functools.cache
def trained_alone(name):
    tx, path = BASES[name], [bases.start()]
    state, update = tx.init(path[0]), jax.jit(functools.partial(bases.step, tx))
    for gradient in bases.gradients():
        x, state = update(path[-1], state, gradient)
        path.append(x)
    return path[1:], state


@each_base
def test_with_everything_relevant_it_is_the_base(name, at):
    with enable_x64():
        path, state = trained(name, at, density=1.0)
        expected, alone = trained_alone(name)
        assert_near(path, expected)
        assert_near(state.base, alone)
        assert_near(eval_params(state, path[-1]), eval_params(alone, expected[-1]))
        if at == "pruned":
            jax.tree.map(np.testing.assert_array_equal, state.dense, path[-1])


@each_base
def test_every_base_keeps_to_the_classes(name, at):
    """Outside R weights shrink, whatever the base would do."""
    with enable_x64():
        # The second step has classes under both.
        (seen, before), (moved, after) = (
            jax.device_get(trained(name, at, n, density=0.25)) for n in (1, 2)
        )
    seen, moved = seen[-1], moved[-1]
    if at == "pruned":
        seen, moved = before.dense, after.dense
    kernels = [x for x in jax.tree.leaves(seen) if x.ndim > 1]
    last = np.sort(np.abs(np.concatenate([x.ravel() for x in kernels])))[-9]
    for x, z in zip(jax.tree.leaves(seen), jax.tree.leaves(moved), strict=True):
        outside = (np.abs(x) < last) & (x.ndim > 1)
        assert outside.any() or x.ndim == 1
        np.testing.assert_allclose(z[outside], 0.5 * x[outside], 1e-14)


@each_base
def test_a_scan_takes_the_same_steps(name, at):
    with enable_x64():
        path, state = trained(name, at)
        tx, x = bases.made(name, at), bases.start()

        def step(carry, gradient):
            x, state = bases.step(tx, *carry, gradient)
            return (x, state), x

        path, gradients = (
            jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
            for trees in (path, bases.gradients())
        )
        (_, after), scanned = jax.lax.scan(step, (x, tx.init(x)), gradients)
        assert_near((scanned, after), (path, state))


@each_base
def test_calls_that_are_not_compiled_take_the_same_steps(name, at):
    with enable_x64():
        path, _ = trained(name, at)
        tx, x = bases.made(name, at), bases.start()
        state = tx.init(x)
        for gradient, expected in zip(bases.gradients()[:2], path, strict=False):
            x, state = bases.step(tx, x, state, gradient)
            assert_near(x, expected)
        # All densities, steps and states of this file are one program, or none where
        # conftest.py has let it go.
        assert bases.compiled(name, at)._cache_size() <= 1


@pytest.fixture(scope="module")
def restored(tmp_path_factory):
    """All bases' runs in their middle, through one checkpoint into new states."""
    pytest.importorskip("flax", minversion="0.12.7")
    from tests.resumable import assert_same, through_checkpointer

    def key(name, at):
        return f"{name}, {at}"

    saved, template = {}, {}
    with enable_x64():
        fresh = jax.tree.map(jnp.zeros_like, bases.start())
        for name, at in itertools.product(BASES, PLACES):
            path, state = trained(name, at, bases.MIDDLE)
            saved[key(name, at)] = path[-1], state
            template[key(name, at)] = fresh, bases.made(name, at).init(fresh)
        runs = through_checkpointer(tmp_path_factory.mktemp("runs"), saved, template)
        assert_same(runs, saved)
    return lambda name, at: runs[key(name, at)]


@each_base
def test_a_run_from_a_checkpoint_goes_on_bit_for_bit(restored, name, at):
    from tests.resumable import assert_same

    with enable_x64():
        path, state = trained(name, at)
        rest = bases.gradients()[bases.MIDDLE :]
        moved, after = bases.run(name, at, *restored(name, at), rest)
        assert_same((moved[-1], after), (path[-1], state))


@pytest.mark.parametrize("at", PLACES)
def test_the_density_one_is_the_base(at):
    # A number, where the runs above have an operand.
    with enable_x64():
        tx, x = bases.made("adam", at, 1.0), bases.start()
        state, (expected, _) = tx.init(x), trained_alone("adam")
        for gradient, y in zip(bases.gradients(), expected, strict=True):
            x, state = bases.step(tx, x, state, gradient)
            assert_near(x, y)


# Masks in the base, and trees with holes.


def evaluated(tx, x, gradients, step=None):
    """What is evaluated after each step, and the last state."""
    step = step or jax.jit(functools.partial(bases.step, tx))
    state, path = tx.init(x), []
    for gradient in gradients:
        x, state = step(x, state, gradient)
        path.append(eval_params(state, x))
    return path, state


@pytest.mark.parametrize(("at", "computed"), [("params", True), ("pruned", False)])
def test_keep_pruned_in_the_base_holds_the_zeros(at, computed):
    params, mask = masks.prune(drawn(0, dtype=np.float32), 0.5)
    assert mask["a"]["bias"] is None
    given = (lambda params: mask) if computed else mask
    keeps = optax.chain(optax.adam(0.01), masks.keep_pruned(given))
    gradients = [drawn(seed, dtype=np.float32) for seed in range(1, 5)]

    def runs(base):
        @jax.jit
        def step(density, *args):
            return bases.step(pruning_aware(base, density, gradient_at=at), *args)

        tx = pruning_aware(base, 1.0, gradient_at=at)
        return lambda density: evaluated(
            tx, params, gradients, functools.partial(step, jnp.asarray(density))
        )

    kept, plain = runs(keeps), runs(optax.adam(0.01))
    # With the density 1 all zeros are relevant, and gradients would move them.
    for density in (0.3, 1.0):
        (path, state), (free, _) = kept(density), plain(density)
        jax.tree.map(np.testing.assert_array_equal, state.base[-1].mask, mask)
        for x, y in zip(path, free, strict=True):
            np.testing.assert_array_equal(x["a"]["bias"], y["a"]["bias"])
            for layer in ("a", "b"):
                keep = mask[layer]["kernel"]
                np.testing.assert_array_equal(x[layer]["kernel"] != 0, keep)
                np.testing.assert_array_equal(
                    x[layer]["kernel"], jnp.where(keep, y[layer]["kernel"], 0)
                )
    assert (y["b"]["kernel"] != 0).all()


@pytest.mark.parametrize("at", PLACES)
def test_a_base_that_is_masked(at):
    """Adam for the layer a; the gradient as it is, or another base, for b."""
    params = drawn(0, dtype=np.float32)
    gradients = [drawn(seed, dtype=np.float32) for seed in range(1, 5)]
    labels = {"a": {"bias": "adam", "kernel": "adam"}, "b": "raw"}
    raw = optax.identity()
    adam, one, parts = (
        evaluated(pruning_aware(base, 0.5, gradient_at=at, scope="leaf"), params, g)
        for g in [gradients]
        for base in (
            optax.adam(0.01),
            optax.masked(optax.adam(0.01), {"a": True, "b": False}),
            optax.partition({"adam": optax.adam(0.01), "raw": raw}, labels),
        )
    )
    moments = one[1].base.inner_state[0].mu
    assert isinstance(moments["b"], optax.MaskedNode)
    jax.tree.map(np.testing.assert_array_equal, moments["a"], adam[1].base[0].mu["a"])
    for x, y, z in zip(adam[0], one[0], parts[0], strict=True):
        jax.tree.map(np.testing.assert_array_equal, x["a"], y["a"])
        jax.tree.map(np.testing.assert_array_equal, y, z)
    held = sets([params["b"]["kernel"]], 0.5, "leaf")[0]
    if at == "pruned":  # R_0 is everything
        held = np.ones_like(held)
    x, g = params["b"]["kernel"], gradients[0]["b"]["kernel"]
    np.testing.assert_allclose(
        one[0][0]["b"]["kernel"], np.where(held, x + g, 0.5 * x), rtol=1e-6
    )


@pytest.mark.parametrize("at", PLACES)
def test_under_a_mask_it_sees_its_part_alone(at):
    params = drawn(0, dtype=np.float32)
    gradients = [drawn(seed, dtype=np.float32) for seed in range(1, 5)]
    tx = pruning_aware(optax.adam(0.01), 0.5, gradient_at=at)
    alone, _ = evaluated(tx, {"a": params["a"]}, [{"a": g["a"]} for g in gradients])
    frozen = optax.set_to_zero()
    for whole in (
        optax.chain(
            optax.masked(tx, {"a": True, "b": False}),
            optax.masked(frozen, {"a": False, "b": True}),
        ),
        optax.partition(
            {"pruned": tx, "frozen": frozen}, {"a": "pruned", "b": "frozen"}
        ),
    ):
        path, _ = evaluated(whole, params, gradients)
        for x, y in zip(path, alone, strict=True):
            jax.tree.map(np.testing.assert_array_equal, x["a"], y["a"])
            jax.tree.map(np.testing.assert_array_equal, x["b"], params["b"])


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Linear:
    """As equinox has it; what is no array is None after its `partition`."""

    kernel: Any
    bias: Any
    activation: Any = None


@pytest.mark.parametrize(
    ("at", "base", "score"),
    [
        ("params", optax.adam, "lamp"),
        ("pruned", optax.contrib.muon, lambda tree: jax.tree.map(jnp.sin, tree)),
    ],
    ids=PLACES,
)
def test_modules_with_holes_are_as_trees_without(at, base, score):
    def holes(tree):
        a, b = tree["a"], tree["b"]
        return (Linear(a["kernel"], a["bias"]), None, Linear(b["kernel"], None))

    params = drawn(0, dtype=np.float32)
    gradients = [drawn(seed, dtype=np.float32) for seed in range(1, 5)]
    tx = pruning_aware(base(0.01), 0.5, gradient_at=at, score=score)
    expected, _ = evaluated(tx, params, gradients)
    found, state = evaluated(tx, holes(params), [holes(g) for g in gradients])
    for x, y in zip(found, expected, strict=True):
        assert isinstance(x[0], Linear)
        jax.tree.map(np.testing.assert_array_equal, x, holes(y))
    assert state.alone.tolist() == [False, False]


@pytest.mark.parametrize("at", PLACES)
def test_a_gradient_that_is_missing_is_named(at):
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2), "frozen": None}
    tx = pruning_aware(ADAM, 0.5, gradient_at=at)
    state = tx.init(params)
    with refused("updates and params must have the same tree", "['bias'] in params"):
        tx.update({**params, "bias": None}, state, params)
    with refused("updates and params must have the same", "['frozen'] in updates"):
        tx.update({**params, "frozen": jnp.ones(2)}, state, params)


def test_moments_outside_the_relevant_set_stay_and_the_count_goes_on():
    params = jnp.array([[3.0, 0.1, 2.0, 0.2]])
    tx = pruning_aware(optax.adam(0.1), 0.5, shrink_rate=0.0)
    state = tx.init(params)
    moments = state.base[0]
    for step in range(3):
        _, state = tx.update(jnp.ones((1, 4)), state, params)
        moments = state.base[0]
        assert moments.mu[0, 1] == moments.mu[0, 3] == moments.nu[0, 1] == 0
        assert moments.mu[0, 0] > 0
        assert int(moments.count) == step + 1


def test_the_base_is_told_what_is_relevant():
    seen = []

    def update(updates, state, params, *, relevant):
        seen.append(relevant)
        return updates, state

    base = optax.GradientTransformationExtraArgs(lambda x: (), update)
    params = {"bias": jnp.ones(2), "kernel": jnp.array([[1.0, 3.0], [0.5, 2.0]])}
    tx = pruning_aware(base, 0.5)
    tx.update(params, tx.init(params), params)
    assert seen[0]["kernel"].tolist() == [[False, True], [False, True]]
    assert seen[0]["bias"].tolist() == [True, True]


@pytest.mark.parametrize("init", [lambda f: f, jax.jit])
def test_a_leaf_that_is_zero_at_the_start_is_ranked_on_its_own(init):
    x = jax.random.normal(jax.random.key(0), (64, 8))
    wanted = x @ jax.random.normal(jax.random.key(1), (8, 8))
    a = jax.random.normal(jax.random.key(2), (8, 4))

    def loss(params):
        return jnp.mean((x @ params["lora_a"] @ params["lora_b"] - wanted) ** 2)

    def after(density):
        params = {"lora_a": a, "lora_b": jnp.zeros((4, 8))}
        tx = pruning_aware(optax.adam(0.03), density, shrink_rate=0.1)
        state = init(tx.init)(params)
        assert state.alone.tolist() == [False, True]

        def step(_, carry):
            return bases.step(tx, *carry, jax.grad(loss)(carry[0]))

        train = jax.jit(lambda *start: jax.lax.fori_loop(0, 300, step, start))
        params, _ = train(params, state)
        return loss(params), params["lora_b"]

    start = float(jnp.mean(wanted**2))
    half, b = after(0.5)
    assert float(half) < 0.9 * start
    assert 12 <= int(jnp.sum(jnp.abs(b) > 0.01)) <= 20


def test_lamp_ranks_what_the_exact_scores_rank():
    rng = np.random.default_rng(0)
    params = {
        f"{i}_kernel": jnp.asarray(
            rng.standard_t(3 + 4 * i, (40, 50 + 30 * i)) * 10.0**-i, jnp.float32
        )
        for i in range(3)
    }
    flat = jnp.concatenate([lamp_scores(x).ravel() for x in params.values()])

    @jax.jit
    def step(density):
        tx = pruning_aware(optax.sgd(0.0), density, score="lamp", shrink_rate=1.0)
        return tx.update(params, tx.init(params), params)[0]

    for density in (0.5, 0.1, 0.02, 1.0):
        updates = step(jnp.asarray(density))
        kept = jnp.concatenate(
            [(x + u != 0).ravel() for x, u in zip(
                params.values(), updates.values(), strict=True)]
        )  # fmt: skip
        count = round(density * flat.size)
        exact = flat >= jnp.sort(flat)[flat.size - count]
        assert abs(int(kept.sum()) - count) <= 2
        assert int((kept != exact).sum()) <= 4


def test_lamp_scores_are_those_of_the_definition():
    x = np.array([[3.0, -1.0, 0.0], [2.0, 1.0, 2.0]])
    expected = [9 / 9, 1 / 19, 0, 4 / 17, 1 / 19, 4 / 17]
    np.testing.assert_allclose(lamp_scores(x).ravel(), expected, rtol=1e-6)


def test_a_function_of_the_parameters_may_be_the_score():
    # Relative to the root of the mean square of the leaf.
    def relative(params):
        return jax.tree.map(lambda x: x / jnp.sqrt(jnp.mean(x**2)), params)

    params = {"v": jnp.array([[1.0, 2.0]]), "w": jnp.array([[100.0, 300.0]])}
    tx = pruning_aware(optax.sgd(0.0), 0.5, score=relative, shrink_rate=1.0)
    updates, _ = tx.update(params, tx.init(params), params)
    after = optax.apply_updates(params, updates)
    assert after["v"].tolist() == [[0.0, 2.0]]
    assert after["w"].tolist() == [[0.0, 300.0]]


def test_layers_stacked_in_a_leaf_are_ranked_each():
    rng = np.random.default_rng(0)
    scales = np.array([1.0, 0.1, 0.001], np.float32)[:, None, None]
    params = {"kernel": jnp.asarray(rng.normal(size=(3, 4, 5)) * scales, jnp.float32)}
    tx = pruning_aware(optax.sgd(0.0), 0.3, shrink_rate=1.0, scope=lambda path, leaf: 1)
    updates, _ = tx.update(params, tx.init(params), params)
    kept = params["kernel"] + updates["kernel"] != 0
    assert kept.sum((1, 2)).tolist() == [6, 6, 6]


@given(
    seed=st.integers(0, 2**16),
    share=st.floats(0.01, 1),
    rate=st.floats(0, 1),
    shrink=st.floats(0, 1),
)
@settings(deadline=None, max_examples=40)
def test_a_step_respects_the_classes(seed, share, rate, shrink):
    params, g = drawn(seed, dtype=np.float32), drawn(seed + 1, dtype=np.float32)
    tx = pruning_aware(optax.adam(rate), share, shrink_rate=shrink)
    updates, state = tx.update(g, tx.init(params), params)
    inside = sets([np.asarray(x) for x in jax.tree.leaves(params)], share, "global")
    leaves = (jax.tree.leaves(tree) for tree in (params, updates, state.base[0].mu))
    for x, s, m, r in zip(*leaves, inside, strict=True):
        s, outside = np.asarray(s), ~r
        # Towards zero, not past it (13), and no memory outside the class (15).
        assert (x[outside] * s[outside] <= 0).all()
        assert (np.abs(s[outside]) <= np.abs(x[outside])).all()
        np.testing.assert_allclose(
            s[outside], -np.float32(shrink) * x[outside], 1e-6, 1e-30
        )
        assert (np.asarray(m)[outside] == 0).all()
        # Adam's first step is the rate, up to eps.
        assert (np.abs(s[r]) <= np.float32(rate) * 1.001).all()


def test_the_soft_threshold_makes_exact_zeros_of_relevant_matrices_alone():
    params = {"bias": jnp.array([0.01]), "kernel": jnp.array([[0.01, -0.04, 3.0]])}
    for density, expected in ((1.0, [-0.01, 0.04, -0.05]), (1, [0.0, 0.0, -0.05])):
        tx = pruning_aware(
            optax.adam(0.1), density, soft_threshold=0.05, shrink_rate=0.0
        )
        updates, _ = tx.update(optax.tree.zeros_like(params), tx.init(params), params)
        np.testing.assert_allclose(updates["kernel"][0], expected, rtol=1e-5)
        assert updates["bias"] == 0


def test_zeros_of_the_soft_threshold_come_back_where_the_loss_asks_for_them():
    params = jnp.array([0.0, 0.0, 0.0, 5.0])
    tx = pruning_aware(optax.sgd(0.1), 2, soft_threshold=0.05, gradient_at="pruned")
    g = jnp.array([-3.0, 0.3, -0.3, 0.0])
    updates, state = tx.update(g, tx.init(params), params)
    dense = eval_params(state, params + updates)
    np.testing.assert_allclose(dense, [0.25, 0.0, 0.0, 4.95], rtol=1e-6)


def test_a_component_that_is_not_a_number_is_not_hidden_by_the_soft_threshold():
    params, g = jnp.array([1.0, 2.0]), jnp.array([jnp.nan, 0.0])
    tx = pruning_aware(optax.sgd(0.1), 1.0, soft_threshold=0.05)
    updates, _ = tx.update(g, tx.init(params), params)
    assert np.isnan(np.asarray(updates)).tolist() == [True, False]


def test_the_loop_holds_the_relevant_components_exactly():
    params = jax.tree.map(jnp.asarray, drawn(3, dtype=np.float32))
    relevant = schedules.cyclic_density((0.5, 0.25, 1.0))
    tx = pruning_aware(optax.adam(0.1), relevant, gradient_at="pruned")
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(1, 10):
        updates, state = update(drawn(step, dtype=np.float32), state, params)
        params = optax.apply_updates(params, updates)
        whole = eval_params(state, params)
        kernels = [
            np.concatenate([x.ravel() for x in jax.tree.leaves(tree) if x.ndim > 1])
            for tree in (params, whole)
        ]
        count = round(float(relevant(step)) * kernels[0].size)
        assert np.count_nonzero(kernels[0]) == count
        kept = np.argsort(-np.abs(kernels[1]))[:count]
        np.testing.assert_allclose(kernels[0][kept], kernels[1][kept], rtol=1e-6)
        np.testing.assert_allclose(params["a"]["bias"], whole["a"]["bias"], rtol=1e-6)


def test_one_network_serves_two_sparsities():
    """The claim in small, on least squares with minibatches."""
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.normal(size=(200, 30)), jnp.float32)
    weight = np.where(np.arange(30) % 3 == 0, rng.normal(size=30), 0.3)
    targets = inputs @ jnp.asarray(weight, jnp.float32)
    start = np.float32(rng.normal(size=60) / 8)
    # Correlated copies, so that a pruned network wants other weights than a whole one.
    inputs = jnp.concatenate([inputs, inputs + 0.5 * inputs[:, ::-1]], axis=1)

    def loss(x, k):
        rows = jax.random.randint(jax.random.key(k), (32,), 0, 200)
        return jnp.mean((inputs[rows] @ x - targets[rows]) ** 2)

    def trained(tx, steps=1000):
        def step(carry, k):
            x, state = carry
            updates, state = tx.update(jax.grad(loss)(x, k), state, x)
            return (optax.apply_updates(x, updates), state), None

        x = jnp.asarray(start)
        x, state = jax.jit(
            lambda x: jax.lax.scan(step, (x, tx.init(x)), jnp.arange(steps))[0]
        )(x)
        return eval_params(state, x)

    def error(x, sparsity):
        pruned, _ = masks.prune(x, sparsity)
        return float(jnp.mean((inputs @ pruned - targets) ** 2))

    adam = trained(optax.adam(optax.cosine_decay_schedule(0.03, 1000)))
    both = trained(
        recipes.any_sparsity(1000, learning_rate=0.03, densities=(1.0, 0.25))
    )
    aimed = trained(recipes.targeted(1000, sparsity=0.75, learning_rate=0.03))
    assert error(aimed, 0.75) < 0.75 * error(adam, 0.75)
    assert error(both, 0.75) < 0.75 * error(adam, 0.75)
    assert error(both, 0.0) < error(aimed, 0.0) / 10


# Recipes.


@pytest.mark.parametrize(("base", "l1"), [("adam", 0.1), ("momentum", 0.001)])
@pytest.mark.parametrize(
    "make", [recipes.any_sparsity, functools.partial(recipes.targeted, sparsity=0.5)]
)
def test_the_strength_of_the_l1_norm_is_that_of_the_base(make, base, l1):
    def end(**settings):
        tx = make(total_steps=10, learning_rate=0.1, base=base, **settings)
        x = jnp.linspace(-1.0, 2.0, 20)
        state, update = tx.init(x), jax.jit(tx.update)
        for _ in range(10):
            updates, state = update(jnp.sin(x), state, x)
            x = optax.apply_updates(x, updates)
        return np.asarray(eval_params(state, x))

    np.testing.assert_array_equal(end(), end(l1=l1))
    assert np.abs(end() - end(l1=0.0)).max() > 1e-4


@pytest.mark.parametrize(
    ("make", "decay", "l1"),
    [
        (recipes.any_sparsity, 0.1, 0.1),
        (functools.partial(recipes.targeted, sparsity=0.5), 0.0, 0.1),
        (functools.partial(recipes.targeted, sparsity=0.5, l1=0.2), 0.0, 0.2),
    ],
)
def test_rates_are_held_then_fall_and_go_on_at_one_percent(make, decay, l1):
    # All weights have the same gradient, so Adam's direction is 1 in every step.
    params = jnp.full((4,), 100.0)
    tx = make(20, learning_rate=0.5)
    state, update = tx.init(params), jax.jit(tx.update)
    moved = []
    for _ in range(25):
        before = eval_params(state, params)
        updates, state = update(jnp.ones(4), state, params)
        params = optax.apply_updates(params, updates)
        # The largest is always relevant; less what weight decay takes.
        moved.append(before - eval_params(state, params))
    parts = [1.0] * 12 + [0.01 + 0.99 * (8 - k) / 8 for k in range(8)] + [0.01] * 5
    x = 100.0
    for part, step in zip(parts, moved, strict=True):
        expected = 0.5 * part * (1 + decay * x + l1 * part)
        np.testing.assert_allclose(np.min(step), expected, rtol=5e-3)
        x -= expected


def test_a_base_of_ones_own():
    tx = recipes.targeted(10, sparsity=0.5, base=optax.sgd, learning_rate=0.1)
    x = jnp.array([1.0, -2.0, 3.0, 0.5])
    updates, _ = tx.update(jnp.ones(4), tx.init(x), x)
    np.testing.assert_allclose(updates, -0.1, rtol=1e-6)


def test_inject_hyperparams_takes_a_recipe():
    make = optax.inject_hyperparams(
        recipes.any_sparsity, static_args=("total_steps", "dense_share")
    )
    x = jnp.array([1.0, -2.0, 3.0, 0.5])
    tx, plain = make(10, learning_rate=0.1), recipes.any_sparsity(10, learning_rate=0.1)
    assert "learning_rate" in tx.init(x).hyperparams
    found, _ = tx.update(x, tx.init(x), x)
    expected, _ = plain.update(x, plain.init(x), x)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_cycles_have_their_share_of_dense_turns():
    for share in (0.0, 0.1, 0.25, 0.5, 2 / 3, 7 / 8):
        cycle = schedules.density_cycle(share)
        assert np.mean(np.array(cycle) == 1) == pytest.approx(share, abs=0.03)
        assert tuple(x for x in cycle if x < 1) == schedules.SPARSE_TURNS
    assert schedules.density_cycle()[0] == 1.0


ADAM = optax.adam(0.1)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: recipes.targeted(10, sparsity=1.0), "sparsity must be .*got 1.0"),
        (lambda: recipes.targeted(0, sparsity=0.5), "total_steps must be .*got 0"),
        (lambda: recipes.targeted(9.5, sparsity=0.5), "total_steps must be .*got 9.5"),
        (lambda: recipes.targeted(10, sparsity=0.5, end=0.05), "end must be .*0.05"),
        (
            lambda: recipes.any_sparsity(10, learning_rate=-1.0),
            "learning_rate must be .*got -1.0",
        ),
        (lambda: recipes.any_sparsity(10, l1=-1.0), "l1 must be .*got -1.0"),
        (lambda: recipes.any_sparsity(10, dense_share=1.0), "dense_share .*got 1.0"),
        (lambda: recipes.any_sparsity(10, base="sgd"), "base must be .*'sgd'"),
        (lambda: recipes.any_sparsity(10, base=optax.lion), "learning_rate must be"),
        (lambda: pruning_aware(ADAM, 0.5, soft_threshold=-1), "soft_threshold .*-1"),
        (lambda: pruning_aware(ADAM, 0.0), "density must be .*got 0.0"),
        (lambda: pruning_aware(ADAM, 95.0), "density must be .*got 95.0"),
        (lambda: pruning_aware(ADAM, 0.5, gradient_at="x"), "gradient_at must .*'x'"),
        (lambda: pruning_aware(ADAM, 0.5, scope="layer"), "scope must be .*'layer'"),
        (lambda: pruning_aware(ADAM, 0.5, score="taylor"), "score must be .*'taylor'"),
        (lambda: pruning_aware(ADAM, 0.5, shrink_rate=1.5), "shrink_rate must .*1.5"),
        (lambda: pruning_aware(optax.adam, 0.5), "base must be an optax transform"),
    ],
)
def test_bad_arguments_are_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_update_wants_a_state_of_its_own_tree():
    tx = pruning_aware(ADAM, 0.5, gradient_at="pruned")
    x = jnp.ones(3)
    with pytest.raises(ValueError, match="updates"):
        tx.update({"w": x}, tx.init(x), x)
    with pytest.raises(ValueError, match=r"state\.dense and params must have the same"):
        tx.update(x, tx.init(jnp.ones(2)), x)


def test_nothing_prunable_is_an_error():
    tx = pruning_aware(ADAM, 0.5, where=lambda path, leaf: path[-1] == "kernel")
    with pytest.raises(ValueError, match=r"where must choose .*masks\.named"):
        tx.init({"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)})


def dtypes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("at", ["params", "pruned"])
def test_dtypes_stay(dtype, at):
    params = {"w": jnp.ones((3, 2), dtype) / 3, "none": None, "empty": jnp.ones((0, 2))}
    tx = pruning_aware(optax.adam(0.1), 0.5, gradient_at=at)
    state = tx.init(params)
    updates, after = jax.jit(tx.update)(params, state, params)
    for before, now in ((params, updates), (state, after)):
        assert dtypes(before) == dtypes(now)
    assert state.base[0].mu["w"].dtype == jnp.float32


def test_vmap_trains_each_member_as_alone():
    tx = recipes.any_sparsity(8, learning_rate=0.1, densities=(1.0, 0.25))
    starts = jnp.asarray(np.random.default_rng(0).normal(size=(3, 12)), jnp.float32)

    def train(x):
        state = tx.init(x)
        for _ in range(8):
            updates, state = tx.update(x**3 - 0.5, state, x)
            x = optax.apply_updates(x, updates)
        return x, eval_params(state, x)

    together = jax.jit(jax.vmap(train))(starts)
    alone = [jax.jit(train)(x) for x in starts]
    jax.tree.map(
        lambda x, *each: np.testing.assert_allclose(x, np.stack(each), rtol=1e-5),
        together,
        *alone,
    )


# Ladders.


def test_ladder_has_the_sparsities_and_goes_on_from_where_it_was():
    def gradient(params, count, batch):
        return jax.tree.map(lambda x: x**3 - batch, params), count + 1

    start = jax.tree.map(jnp.asarray, drawn(5, dtype=np.float32))
    members = list(
        recipes.ladder(
            gradient,
            start,
            itertools.cycle(np.float32([0.1, -0.2, 0.3])),
            total_steps=50,
            sparsities=(0.5, 0.75),
            parts=(0.6, 0.4),
            learning_rate=0.01,
            aux=jnp.zeros((), jnp.int32),
        )
    )
    assert [(m.step, int(m.aux)) for m in members] == [(30, 30), (50, 50)]
    for member in members:
        kernels = [x for x in jax.tree.leaves(member.params) if x.ndim > 1]
        assert float(masks.sparsity(kernels)) == pytest.approx(member.sparsity)
        assert member.mask["a"]["bias"] is None
    # What is pruned at first stays pruned: the members lie within one another.
    first, second = (m.mask for m in members)
    assert all(
        (x | ~y).all()
        for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    )


def test_ladder_says_what_is_wrong():
    with pytest.raises(ValueError, match="parts must have one entry for each of the 4"):
        recipes.ladder(lambda x, b: x, jnp.ones(3), [], total_steps=9, parts=(1.0,))
    with pytest.raises(ValueError, match=r"sparsities must be .*got 1.0"):
        recipes.ladder(
            lambda x, b: x, jnp.ones(3), [], total_steps=9, sparsities=(1.0,)
        )
    few = recipes.ladder(lambda x, b: x, jnp.ones(4), [0.0], total_steps=9)
    with pytest.raises(ValueError, match="at least total_steps = 9; got 1"):
        list(few)
