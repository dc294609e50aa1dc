"""`prunadag_w` and its recipes, beside a plain NumPy transcription."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunadag_optax import eval_params, masks, prunadag_w, recipes, schedules
from tests.helpers import enable_x64

SHAPES = {"a": {"bias": (4,), "kernel": (6, 4)}, "b": {"kernel": (4, 3)}}


def drawn(seed, shapes=SHAPES, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: rng.normal(size=shape).astype(dtype),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


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


def transcription(x, gradient, steps, *, eta, share, d, decay, l1, b2, scope, evaluate):
    """The points that the loop holds, and the whole x after the last step."""
    b1, eps = 0.8, 1e-6
    x = [np.array(leaf, np.float64) for leaf in x]
    m, v = [0 * leaf for leaf in x], [0 * leaf for leaf in x]
    seen, held = [], x
    inside = [np.ones(leaf.shape, bool) for leaf in x]
    for k in range(steps):
        if evaluate == "params" or k:
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
        if evaluate == "relevant":
            inside = sets(x, share(k + 1), scope)
            held = [np.where(r, leaf, 0) for r, leaf in zip(inside, x, strict=True)]
        seen.append(held)
    return seen, x


@pytest.mark.parametrize("scope", ["global", "leaf"])
@pytest.mark.parametrize("evaluate", ["params", "relevant"])
@pytest.mark.parametrize(
    ("decay", "l1", "b2"),
    [(0.1, 0.0, 0.9), (0.1, 0.0, None), (0, 0.3, 0.9), (0, 1, None)],
)
def test_equals_the_transcription(scope, evaluate, decay, l1, b2):
    steps, targets = 20, [np.sin(np.arange(20) + i) for i in range(3)]
    start = drawn(0)
    leaves, treedef = jax.tree.flatten(start)

    def gradient(x, k):
        # Curved, and of another scale in each step, so that nothing is near a tie.
        return [
            (1 + i) * (leaf**3 - t[k]) + 0.1 * np.cos(7 * leaf + k)
            for i, (leaf, t) in enumerate(zip(x, targets, strict=True))
        ]

    def eta(k):
        return 0.1 / math.sqrt(k + 1)

    def share(k):
        return [1.0, 0.4, 0.2][k % 3]

    expected, whole = transcription(
        leaves, gradient, steps, eta=eta, share=share, d=0.05, decay=decay, l1=l1,
        b2=b2, scope=scope, evaluate=evaluate,
    )  # fmt: skip
    with enable_x64():
        tx = prunadag_w(
            lambda k: 0.1 / jnp.sqrt(k + 1.0),
            lambda k: jnp.array([1.0, 0.4, 0.2])[k % 3],
            b1=0.8, b2=b2, eps=1e-6, weight_decay=decay, l1=l1, evaluate=evaluate,
            scope=scope, decrease_schedule=0.05,
        )  # fmt: skip
        params = jax.tree.map(jnp.asarray, start)
        state, update = tx.init(params), jax.jit(tx.update)
        for k in range(steps):
            found = treedef.unflatten(gradient(jax.tree.leaves(params), k))
            updates, state = update(found, state, params)
            params = optax.apply_updates(params, updates)
            for x, y in zip(jax.tree.leaves(params), expected[k], strict=True):
                np.testing.assert_allclose(x, y, rtol=0, atol=1e-10)
                np.testing.assert_array_equal(x == 0, y == 0)
        for x, y in zip(
            jax.tree.leaves(eval_params(state, params)), whole, strict=True
        ):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-10)
        assert update._cache_size() == 1


def _adamw(mask):
    return optax.adamw(0.01, weight_decay=0.1, mask=mask)


def _momentum_sgd(mask):
    decay = optax.add_decayed_weights(0.1, mask)
    return optax.chain(optax.trace(0.9), decay, optax.scale(-0.01))


@pytest.mark.parametrize("evaluate", ["params", "relevant"])
@pytest.mark.parametrize(("b2", "base"), [(0.999, _adamw), (None, _momentum_sgd)])
def test_everything_relevant_is_adamw_or_momentum_sgd(evaluate, b2, base):
    with enable_x64():
        params = jax.tree.map(jnp.asarray, drawn(1))
        mine = prunadag_w(0.01, 1.0, b2=b2, weight_decay=0.1, evaluate=evaluate)
        theirs = base(jax.tree.map(lambda x: x.ndim > 1, params))
        x = y = params
        a, b = mine.init(x), theirs.init(y)
        for seed in range(10):
            g = drawn(seed)
            updates, a = mine.update(g, a, x)
            x = optax.apply_updates(x, updates)
            updates, b = theirs.update(g, b, y)
            y = optax.apply_updates(y, updates)
        jax.tree.map(
            lambda p, q: np.testing.assert_allclose(p, q, rtol=1e-12, atol=1e-14), x, y
        )


@given(
    seed=st.integers(0, 2**16),
    share=st.floats(0.01, 1),
    rate=st.floats(0, 1),
    shrink=st.floats(0, 1),
)
@settings(deadline=None, max_examples=40)
def test_a_step_respects_the_classes(seed, share, rate, shrink):
    params, g = drawn(seed, dtype=np.float32), drawn(seed + 1, dtype=np.float32)
    tx = prunadag_w(rate, share, decrease_schedule=shrink)
    updates, state = tx.update(g, tx.init(params), params)
    inside = sets([np.asarray(x) for x in jax.tree.leaves(params)], share, "global")
    leaves = (jax.tree.leaves(tree) for tree in (params, updates, state.mu))
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


@pytest.mark.parametrize("b2", [0.999, None])
def test_the_l1_norm_makes_exact_zeros_of_relevant_matrices_alone(b2):
    params = {"bias": jnp.array([0.01]), "kernel": jnp.array([[0.01, -0.04, 3.0]])}
    tx = prunadag_w(0.1, 1.0, b2=b2, l1=0.5, decrease_schedule=0.0)
    updates, _ = tx.update(optax.tree.zeros_like(params), tx.init(params), params)
    after = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(after["bias"], params["bias"])
    np.testing.assert_array_equal(np.asarray(after["kernel"])[0, :2], 0.0)
    np.testing.assert_allclose(after["kernel"][0, 2], 2.95)
    tx = prunadag_w(0.1, 1, b2=b2, l1=0.5, decrease_schedule=0.0)
    updates, _ = tx.update(optax.tree.zeros_like(params), tx.init(params), params)
    np.testing.assert_allclose(updates["kernel"], [[0.0, 0.0, -0.05]], rtol=1e-5)


def test_zeros_of_the_l1_norm_come_back_where_the_loss_asks_for_them():
    params = jnp.array([0.0, 0.0, 0.0, 5.0])
    tx = prunadag_w(0.1, 2, b2=None, l1=0.5, evaluate="relevant")
    g = jnp.array([-3.0, 0.3, -0.3, 0.0])
    updates, state = tx.update(g, tx.init(params), params)
    whole = eval_params(state, params + updates)
    np.testing.assert_allclose(whole, [0.25, 0.0, 0.0, 4.95], rtol=1e-6)


def test_a_component_that_is_not_a_number_is_not_hidden_by_the_l1_norm():
    params, g = jnp.array([1.0, 2.0]), jnp.array([jnp.nan, 0.0])
    tx = prunadag_w(0.1, 1.0, b2=None, l1=0.5)
    updates, _ = tx.update(g, tx.init(params), params)
    assert np.isnan(np.asarray(updates)).tolist() == [True, False]


def test_the_loop_holds_the_relevant_components_exactly():
    params = jax.tree.map(jnp.asarray, drawn(3, dtype=np.float32))
    relevant = schedules.cyclic_density((0.5, 0.25, 1.0))
    tx = prunadag_w(0.1, relevant, evaluate="relevant")
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
    both = trained(recipes.any_sparsity(1000, 0.03, levels=(1.0, 0.25)))
    aimed = trained(recipes.targeted(1000, 0.75, 0.03))
    assert error(aimed, 0.75) < 0.75 * error(adam, 0.75)
    assert error(both, 0.75) < 0.75 * error(adam, 0.75)
    assert error(both, 0.0) < error(aimed, 0.0) / 10


# Recipes.


@pytest.mark.parametrize(("b2", "l1"), [(0.999, 0.1), (None, 0.001)])
@pytest.mark.parametrize(
    "make", [recipes.any_sparsity, functools.partial(recipes.targeted, sparsity=0.5)]
)
def test_the_strength_of_the_l1_norm_is_that_of_the_steps(make, b2, l1):
    def end(**settings):
        tx = make(total_steps=10, learning_rate=0.1, b2=b2, **settings)
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
        (lambda n, rate: recipes.targeted(n, 0.5, rate), 0.0, 0.1),
        (lambda n, rate: recipes.targeted(n, 0.5, rate, l1=0.2), 0.0, 0.2),
    ],
)
def test_rates_of_a_recipe_are_held_and_then_fall_to_zero(make, decay, l1):
    # All weights have the same gradient, so Adam's direction is 1 in every step.
    params = jnp.full((4,), 100.0)
    tx = make(20, 0.5)
    state, update = tx.init(params), jax.jit(tx.update)
    moved = []
    for _ in range(20):
        before = eval_params(state, params)
        updates, state = update(jnp.ones(4), state, params)
        params = optax.apply_updates(params, updates)
        # The largest is always relevant; less what weight decay takes.
        moved.append(before - eval_params(state, params))
    parts = [1.0] * 12 + [(8 - k) / 8 for k in range(8)]
    x = 100.0
    for part, step in zip(parts, moved, strict=True):
        expected = 0.5 * part * (1 + decay * x + l1 * part)
        np.testing.assert_allclose(np.min(step), expected, rtol=2e-4)
        x -= expected


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: recipes.targeted(10, 1.0), "sparsity must be .* < 1; got 1.0"),
        (lambda: recipes.targeted(0, 0.5), "total_steps must be .* >= 1; got 0"),
        (lambda: recipes.targeted(10, 0.5, end=0.05), "end must be .*got 0.05"),
        (lambda: recipes.any_sparsity(10, -1.0), "learning_rate must be .*got -1.0"),
        (lambda: recipes.any_sparsity(10, l1=-1.0), "l1 must be .*got -1.0"),
        (lambda: prunadag_w(l1=-0.5), "l1 must be .*got -0.5"),
        (lambda: prunadag_w(relevant=0.0), "relevant must be .*got 0.0"),
        (lambda: prunadag_w(evaluate="pruned"), "evaluate must be .*'pruned'"),
        (lambda: prunadag_w(scope="layer"), "scope must be .*'layer'"),
        (lambda: prunadag_w(decrease_schedule=1.5), "decrease_schedule must .*1.5"),
        (lambda: prunadag_w(b1=1.0), "b1 must be .*got 1.0"),
        (lambda: prunadag_w(eps=0.0), "eps must be .*got 0.0"),
    ],
)
def test_bad_arguments_are_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_update_wants_a_state_of_its_own_tree():
    tx = prunadag_w()
    x = jnp.ones(3)
    with pytest.raises(ValueError, match="updates"):
        tx.update({"w": x}, tx.init(x), x)
    with pytest.raises(ValueError, match=r"state\.mu and params must have the same"):
        tx.update(x, tx.init(jnp.ones(2)), x)


def test_eval_params_looks_into_chains_and_leaves_others_alone():
    x = jnp.array([1.0, -2.0, 0.5])
    tx = optax.chain(optax.clip(1.0), prunadag_w(0.1, 1, evaluate="relevant"))
    updates, state = tx.update(x, tx.init(x), x)
    held = optax.apply_updates(x, updates)
    assert np.count_nonzero(held) == 1
    assert np.count_nonzero(eval_params(state, held)) == 3
    assert eval_params(optax.adam(0.1).init(x), held) is held
    two = optax.chain(*2 * [prunadag_w(0.1, 1, evaluate="relevant")])
    with pytest.raises(ValueError, match="it holds 2"):
        eval_params(two.init(x), x)


def dtypes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("evaluate", ["params", "relevant"])
def test_dtypes_stay(dtype, evaluate):
    params = {"w": jnp.ones((3, 2), dtype) / 3, "none": None, "empty": jnp.ones((0, 2))}
    tx = prunadag_w(0.1, 0.5, evaluate=evaluate, accumulator_dtype="float32")
    state = tx.init(params)
    updates, after = jax.jit(tx.update)(params, state, params)
    for before, now in ((params, updates), (state, after)):
        assert dtypes(before) == dtypes(now)
    assert state.mu["w"].dtype == jnp.float32


def test_vmap_trains_each_member_as_alone():
    tx = recipes.any_sparsity(8, 0.1, levels=(1.0, 0.25))
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


# Families.


def test_family_has_the_sparsities_and_goes_on_from_where_it_was():
    def gradient(params, count, batch):
        return jax.tree.map(lambda x: x**3 - batch, params), count + 1

    start = jax.tree.map(jnp.asarray, drawn(5, dtype=np.float32))
    members = list(
        recipes.family(
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


def test_family_says_what_is_wrong():
    with pytest.raises(ValueError, match="parts must have one entry for each of the 4"):
        recipes.family(lambda x, b: x, jnp.ones(3), [], total_steps=9, parts=(1.0,))
    with pytest.raises(ValueError, match=r"sparsities must be .*got 1.0"):
        recipes.family(
            lambda x, b: x, jnp.ones(3), [], total_steps=9, sparsities=(1.0,)
        )
    few = recipes.family(lambda x, b: x, jnp.ones(4), [0.0], total_steps=9)
    with pytest.raises(ValueError, match="at least total_steps = 9; got 1"):
        list(few)
