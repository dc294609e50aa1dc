"""What holds for any input: the method's conditions, exact ranks, exact masks.

Shapes are few, so that what is compiled is compiled once; values are hypothesis's:
ties, signed zeros, subnormals, infinities and NaN included where they are allowed.
"""

import functools

import hypothesis
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

from prunadag_optax import (
    classify,
    kth_largest_magnitude,
    masks,
    prunadag,
    scale_by_prunadag,
)
from prunadag_optax._core.algorithm import Settings, classification_at
from tests.helpers import enable_x64

DTYPES = ["float16", "bfloat16", "float32", "float64"]
VARIANTS = ["v1", "v2", "v3", "v4", "relevant_only"]
RELEVANCES = ["gradient", "magnitude", "taylor"]
SIZE = 14


def examples(count):
    return hypothesis.settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )


def tree(flat):
    """A vector (or a stack of them) of SIZE components as a pytree."""
    lead = flat.shape[:-1]
    return {
        "a": flat[..., :7],
        "b": {"c": flat[..., 7:13].reshape(*lead, 2, 3), "d": flat[..., 13]},
    }


def flatten(leaves, lead=()):
    return np.concatenate(
        [np.reshape(leaf, (*lead, -1)) for leaf in jax.tree.leaves(leaves)], -1
    )


def numbers(shape):
    """Float32 arrays with zeros and repeated values in them."""
    # No subnormals: XLA's CPU backend computes with them as with zeros, NumPy does not.
    elements = st.one_of(
        st.sampled_from([0.0, 1.0, -1.0, 0.5, 3.0]),
        st.floats(-100, 100, width=32, allow_subnormal=False),
    )
    return hnp.arrays(np.float32, shape, elements=elements)


def of_dtype(dtype, shape, finite=False):
    """Arrays of any values of a dtype, those at the edges of a kind more often."""
    dtype = jnp.dtype(dtype)
    unsigned = np.dtype(f"uint{8 * dtype.itemsize}")
    edges = [0, jnp.finfo(dtype).smallest_normal, 1, np.inf, np.nan]
    edges = np.array(edges, dtype).view(unsigned)
    zero, normal, one, infinity, nan = (int(edge) for edge in edges)
    sign = 1 << (8 * dtype.itemsize - 1)
    kinds = [zero, 1, 2, normal - 1, normal, one, infinity, nan]
    bits = st.one_of(
        st.sampled_from([*kinds, *(kind | sign for kind in kinds)]),
        st.integers(0, 2 * sign - 1),
    )
    if finite:
        bits = bits.map(lambda b: infinity - 1 if b & ~sign >= infinity else b)
    # One NaN, for the others are not told apart.
    bits = bits.map(lambda b: nan if b & ~sign > infinity else b)
    return hnp.arrays(unsigned, shape, elements=bits).map(lambda b: b.view(dtype))


# The method.


@functools.cache
def runner(variant, relevance, scope, dtype):
    """Five steps on given gradients: what each one started from, chose and did."""

    @jax.jit
    def run(x, gradients, learning_rate, relevant):
        settings = {
            "learning_rate": learning_rate,
            "relevant": relevant,
            "variant": variant,
            "relevance": relevance,
            "scope": scope,
        }
        tx = prunadag(**settings)

        def one(carry, g):
            x, state = carry
            classes = classification_at(g, state[0], x, Settings(**settings))
            updates, new_state = tx.update(g, state, x)
            new = optax.apply_updates(x, updates)
            weight = new_state[0].decreasable_weight
            return (new, new_state), (x, new, updates, classes, weight)

        return jax.lax.scan(one, (x, tx.init(x)), gradients)[1]

    def call(x, gradients, learning_rate, relevant):
        x, gradients = (tree(v.astype(jnp.dtype(dtype))) for v in (x, gradients))
        return run(x, gradients, np.float32(learning_rate), np.float32(relevant))

    return call


RATES = st.sampled_from([1.0, 0.05, 20.0, 0.0])
FRACTIONS = st.sampled_from([0.01, 0.1, 0.3, 0.5, 0.95])


@pytest.mark.parametrize(
    ("variant", "relevance", "scope"),
    [(v, "gradient", s) for v in VARIANTS for s in ("global", "leaf")]
    + [("v3", "magnitude", "leaf"), ("v4", "taylor", "global")],
)
def test_conditions_of_the_proof_hold_on_every_step(variant, relevance, scope):
    run = runner(variant, relevance, scope, "float32")

    @examples(25)
    @hypothesis.given(numbers(SIZE), numbers((5, SIZE)), RATES, FRACTIONS)
    def check(x, gradients, rate, fraction):
        x, _, updates, classes, weight = run(x, gradients, rate, fraction)
        flat = functools.partial(flatten, lead=(5,))
        R, A = flat(classes.relevant), flat(classes.acceptable)
        O, D = flat(classes.optimisable), flat(classes.decreasable)  # noqa: E741
        assert (O ^ D).all()
        assert not (R & ~O).any()
        assert not (R & A).any()
        assert ((R | A) == O).all()
        # A lies within S, where parameter and gradient have the same sign.
        x, s, weight = flat(x), flat(updates), flat(weight)
        g = flat(tree(gradients))
        same_sign = np.sign(x) == np.sign(g)
        assert not (A & ~same_sign).any()
        # (13) and (14), the first up to the two roundings of the radius itself.
        radius = np.abs(np.float64(x)) / weight
        assert (np.abs(s) <= radius * (1 + 1e-6))[D].all()
        assert (g * s <= 0)[D].all()
        assert (np.sum(g * s, axis=1, where=D) <= 0).all()
        assert (s == 0)[D & ~same_sign].all()
        if scope == "global":
            T = max(1, round(np.float32(fraction) * SIZE))
            assert (R.sum(axis=1) >= T).all()

    check()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("variant", ["v3", "v4"])
def test_no_component_is_carried_past_zero(variant, dtype):
    # b = |x| holds the acceptable ones back, in v4 a = |x| / (k+1) the decreasable.
    run = runner(variant, "gradient", "global", dtype)

    @examples(40)
    @hypothesis.given(of_dtype(dtype, SIZE, finite=True), numbers((5, SIZE)), RATES)
    def check(x, gradients, rate):
        x, new, _, classes, _ = run(x, gradients, rate, 0.2)
        before, after = (np.sign(flatten(v, (5,)).astype(np.float64)) for v in (x, new))
        held = flatten(classes.acceptable, (5,))
        if variant == "v4":
            held |= flatten(classes.decreasable, (5,))
        assert (before * after >= 0)[held].all()

    check()


@examples(15)
@hypothesis.given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([1e-3, 1.0, 1e3]),
    st.sampled_from([1.0, 0.05]),
    st.sampled_from([0.01, 0.5]),
)
def test_all_relevant_is_adagrad(seed, scale, rate, zeta):
    rng = np.random.default_rng(seed)
    x = tree(rng.normal(size=SIZE).astype(np.float32))
    gradients = tree((scale * rng.normal(size=(50, SIZE))).astype(np.float32))
    mine, theirs = adagrad_pair(x, gradients, rate, zeta)
    jax.tree.map(
        # Fifty roundings of the sum of squares, halved by the root.
        lambda a, b: np.testing.assert_allclose(a, b, rtol=50 * 1.2e-7),
        mine,
        theirs,
    )


@jax.jit
def adagrad_pair(x, gradients, rate, zeta):
    def run(tx):
        def one(carry, g):
            x, state = carry
            updates, state = tx.update(g, state, x)
            return (optax.apply_updates(x, updates), state), updates

        return jax.lax.scan(one, (x, tx.init(x)), gradients)[1]

    mine = prunadag(rate, relevant=1.0, initial_weight=zeta)
    return run(mine), run(optax.adagrad(rate, zeta**2, eps=0.0))


@functools.partial(jax.jit, static_argnums=0)
def relevant_of(relevance, g, x, T):
    return classify(g, x, jnp.ones_like(x), relevant=T, relevance=relevance).relevant


@examples(50)
@hypothesis.given(st.permutations(range(1, SIZE + 1)), st.integers(1, SIZE), st.data())
def test_without_ties_exactly_the_target_is_relevant(order, T, data):
    signs = data.draw(hnp.arrays(np.int8, SIZE, elements=st.sampled_from([-1, 1])))
    g = np.float32(order) * signs
    relevant = np.asarray(relevant_of("gradient", g, np.ones_like(g), np.int32(T)))
    assert relevant.sum() == T
    assert (relevant == (np.abs(g) > SIZE - T)).all()


@pytest.mark.parametrize("relevance", RELEVANCES)
@examples(25)
@hypothesis.given(
    hnp.arrays(np.int8, (2, SIZE), elements=st.integers(-3, 3)), st.integers(1, SIZE)
)
def test_ties_at_the_threshold_are_all_relevant(relevance, arrays, T):
    g, x = np.float32(arrays)
    relevant = np.asarray(relevant_of(relevance, g, x, np.int32(T)))
    score = np.abs({"gradient": g, "magnitude": x, "taylor": g * x}[relevance])
    threshold = np.sort(score)[SIZE - T]
    assert (relevant == (score >= threshold)).all()
    assert relevant.sum() >= T
    if threshold == 0:
        assert relevant.all()


@pytest.mark.parametrize("relevance", ["magnitude", "taylor"])
def test_zero_parameters_learn_at_first(relevance):
    x, g = jnp.zeros(5), jnp.array([1.0, -2.0, 0.5, 3.0, -0.1])
    tx = prunadag(0.1, relevant=0.2, relevance=relevance)
    updates, _ = tx.update(g, tx.init(x), x)
    np.testing.assert_allclose(updates, -0.1 * np.sign(g), rtol=0.01)


@pytest.mark.parametrize("relevance", RELEVANCES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_gradients_flow_through(bad, relevance):
    # Else optax.apply_if_finite, which looks at the updates, would let them pass.
    x = jnp.array([3.0, -2.0, 1.0, 0.5])
    g = jnp.array([1.0, -1.0, 1.0, bad])
    tx = prunadag(0.1, relevant=1, variant="v4", relevance=relevance)
    updates, _ = jax.jit(tx.update)(g, tx.init(x), x)
    assert not np.isfinite(updates[3])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("momentum", [None, 0.9])
def test_updates_keep_the_dtype_and_scale_by_is_their_negative(dtype, momentum):
    rng = np.random.default_rng(0)
    x, g = (tree(rng.normal(size=SIZE).astype(jnp.dtype(dtype))) for _ in range(2))
    plain = prunadag(0.1, 0.3, momentum=momentum)
    scaled = scale_by_prunadag(0.1, 0.3, momentum=momentum)
    update = jax.jit(
        lambda *args: (plain.update(*args), scaled.update(args[0], args[1][0], args[2]))
    )
    with enable_x64():
        state = plain.init(x)
        for gradients in (g, jax.tree.map(np.float32, g)):
            (updates, state), (opposite, own) = update(gradients, state, x)
            jax.tree.map(
                lambda u, v: np.testing.assert_array_equal(u, -np.asarray(v)),
                updates,
                opposite,
            )
            jax.tree.map(np.testing.assert_array_equal, state[0], own)
            # Accumulators and the threshold's hint: all but the counter.
            for leaf in jax.tree.leaves((updates, opposite, own[1:])):
                assert leaf.dtype == jnp.dtype(dtype)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_computes_in_float32(dtype):
    # The squares of these gradients overflow in float16, and bfloat16 would lose them.
    rng = np.random.default_rng(0)
    x = rng.normal(size=SIZE).astype(jnp.dtype(dtype))
    gradients = (1000 * rng.normal(size=(20, SIZE))).astype(jnp.dtype(dtype))
    tx = prunadag(0.1, 0.3, accumulator_dtype="float32")

    @jax.jit
    def run(x, gradients):
        def one(state, g):
            updates, state = tx.update(g, state, x)
            return state, updates

        return jax.lax.scan(one, tx.init(x), gradients)

    (half, _), updates = run(x, gradients)
    (full, _), expected = run(x.astype(np.float32), gradients.astype(np.float32))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), half, full)
    assert updates.dtype == x.dtype
    np.testing.assert_allclose(
        as_float64(updates), as_float64(expected), rtol=float(jnp.finfo(dtype).eps)
    )


# Ranks.


def assert_ranks(leaves):
    """Every rank of a tree, k static, traced, mapped and looped over."""
    # NumPy sorts NaN last, so above infinity.
    expected = np.sort(np.abs(np.concatenate([as_float64(x) for x in leaves])))[::-1]
    ranks = np.arange(1, expected.size + 1, dtype=np.int32)
    for found in all_ranks(leaves, ranks):
        assert found.dtype == jnp.result_type(*leaves)
        np.testing.assert_array_equal(as_float64(found), expected)
    for k in (1, 3, expected.size):
        found = kth_largest_magnitude(leaves, k)
        np.testing.assert_array_equal(as_float64(found), expected[[k - 1]])


def as_float64(x):
    # By NumPy, which keeps subnormals.
    return np.asarray(x).astype(np.float64).ravel()


@jax.jit
def all_ranks(leaves, ranks):
    one = functools.partial(kth_largest_magnitude, leaves)
    return jax.vmap(one)(ranks), jax.lax.map(one, ranks)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kth_largest_magnitude_is_the_sorted_one(dtype):
    @examples(60)
    @hypothesis.given(of_dtype(dtype, 9), of_dtype(dtype, (2, 2)))
    def check(x, y):
        with enable_x64():
            assert_ranks([x, y])

    check()


@pytest.mark.parametrize(
    "dtypes",
    [
        ("float16", "bfloat16"),
        ("float16", "float32"),
        ("bfloat16", "float32"),
        ("float16", "float64"),
        ("bfloat16", "float64"),
        ("float32", "float64"),
    ],
)
def test_kth_largest_magnitude_of_mixed_dtypes(dtypes):
    @examples(25)
    @hypothesis.given(*(of_dtype(dtype, 5) for dtype in dtypes))
    def check(x, y):
        with enable_x64():
            assert_ranks([x, y])

    check()


@examples(20)
@hypothesis.given(of_dtype("float32", (3, 8)), st.integers(1, 8))
def test_kth_largest_magnitude_under_vmap_of_trees(x, k):
    found = ranks_of_rows(x, np.int32(k))
    rows = as_float64(x).reshape(x.shape)
    expected = np.sort(np.abs(rows), axis=1)[:, 8 - k]
    np.testing.assert_array_equal(as_float64(found), expected)


@jax.jit
def ranks_of_rows(x, k):
    return jax.vmap(lambda row: kth_largest_magnitude({"row": row}, k))(x)


def test_nan_ranks_above_infinity():
    x = jnp.array([jnp.inf, jnp.nan, 1.0, -jnp.nan, -jnp.inf])
    found = [float(kth_largest_magnitude(x, k)) for k in range(1, 6)]
    assert np.isnan(found[:2]).all()
    assert found[2:] == [np.inf, np.inf, 1.0]


# Masks.

# Of vectors and scalars, too.
magnitude_mask = functools.partial(masks.magnitude_mask, where=masks.everything)
SPARSITIES = [0.0, 0.1, 0.25, 0.5, 0.55, 0.9, 0.999, 1.0]


def pruned_by_sorting(x, count):
    """A stable sort takes the lowest index first among equal magnitudes."""
    keep = np.ones(x.size, bool)
    keep[np.argsort(np.abs(as_float64(x)), kind="stable")[:count]] = False
    return keep


@pytest.mark.parametrize("dtype", DTYPES)
def test_masks_are_exact_and_nested(dtype):
    @examples(40)
    @hypothesis.given(of_dtype(dtype, SIZE), st.floats(0, 1))
    def check(x, any_sparsity):
        params, kept = tree(x), np.ones(SIZE, bool)
        for sparsity in sorted([*SPARSITIES, any_sparsity]):
            with enable_x64():
                mask = flatten(magnitude_mask(params, sparsity))
            np.testing.assert_array_equal(
                mask, pruned_by_sorting(x, round(sparsity * SIZE))
            )
            assert not (mask & ~kept).any()
            kept = mask

    check()


@examples(30)
@hypothesis.given(
    hnp.arrays(np.float32, SIZE, elements=st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0])),
    st.sampled_from(SPARSITIES),
    st.booleans(),
)
def test_masks_by_leaf_and_where(x, sparsity, scalars_too):
    def where(path, leaf):
        del path
        return scalars_too or leaf.ndim > 0

    params = tree(x)
    mask = masks.magnitude_mask(params, sparsity, scope="leaf", where=where)
    for keep, leaf in [(mask["a"], params["a"]), (mask["b"]["c"], params["b"]["c"])]:
        assert keep.shape == leaf.shape
        expected = pruned_by_sorting(leaf, round(sparsity * leaf.size))
        np.testing.assert_array_equal(np.ravel(keep), expected)
    if scalars_too:
        assert mask["b"]["d"] == (sparsity <= 0.5)
    else:
        assert mask["b"]["d"] is None
        # The leaf left out counts for nothing in global scope either.
        mask = masks.magnitude_mask(params, sparsity, where=where)
        np.testing.assert_array_equal(
            np.r_[np.ravel(mask["a"]), np.ravel(mask["b"]["c"])],
            pruned_by_sorting(x[:13], round(sparsity * 13)),
        )


@pytest.mark.parametrize("scope", ["global", "leaf"])
def test_traced_sparsity_gives_the_same_mask(scope):
    traced = jax.jit(functools.partial(magnitude_mask, scope=scope))

    @examples(30)
    @hypothesis.given(numbers(SIZE), st.sampled_from(SPARSITIES))
    def check(x, sparsity):
        jax.tree.map(
            np.testing.assert_array_equal,
            traced(tree(x), jnp.float32(sparsity)),
            magnitude_mask(tree(x), sparsity, scope=scope),
        )

    check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_apply_mask_leaves_positive_zeros(dtype):
    @examples(30)
    @hypothesis.given(of_dtype(dtype, SIZE), hnp.arrays(bool, SIZE))
    def check(x, keep):
        with enable_x64():
            once = masks.apply_mask(tree(x), tree(keep))
            again = masks.apply_mask(once, tree(keep))
            shipped = masks.finalise(tree(x), tree(keep))
            shipped_again = masks.finalise(shipped, tree(keep))
        for pruned in (once, again, shipped, shipped_again):
            assert all(leaf.dtype == x.dtype for leaf in jax.tree.leaves(pruned))
            # All zero bits is +0.0; what is kept, NaN too, keeps every bit.
            unsigned = f"uint{8 * x.dtype.itemsize}"
            bits = flatten(pruned).view(unsigned)
            np.testing.assert_array_equal(bits, np.where(keep, x.view(unsigned), 0))

    check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_sparsity_counts_the_zeros(dtype):
    @examples(30)
    @hypothesis.given(of_dtype(dtype, SIZE), hnp.arrays(bool, SIZE))
    def check(x, keep):
        # By the bits, which tell a subnormal number from zero wherever they are read.
        magnitude = np.abs(x).view(f"uint{8 * x.dtype.itemsize}")
        close = functools.partial(np.testing.assert_allclose, rtol=2e-7, atol=1e-7)
        with enable_x64():
            close(masks.sparsity(tree(x)), np.mean(magnitude == 0))
        close(masks.sparsity(tree(keep)), np.mean(~keep))
        partly = {**tree(keep), "b": None}
        close(masks.sparsity(partly), np.mean(~keep[:7]))

    check()


def test_a_subnormal_number_is_not_zero():
    x = np.array([0.0, -0.0, 1e-40, -1e-45], np.float32)
    assert masks.sparsity(x) == 0.5
    assert magnitude_mask(x, 0.75).tolist() == [False, False, True, False]


OPTIMIZERS = {
    "sgd": optax.sgd(0.1, momentum=0.9),
    "adamw": optax.adamw(0.1, weight_decay=0.1),
    "lion": optax.lion(0.1, weight_decay=0.1),
    "prunadag": prunadag(0.1, momentum=0.9),
}


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pruned_weights_stay_zero(name, accumulate):
    rng = np.random.default_rng(0)
    x = tree(rng.normal(size=SIZE).astype(np.float32))
    gradients = tree(rng.normal(size=(100, SIZE)).astype(np.float32))
    x, mask = masks.prune(x, 0.5, where=masks.everything)
    tx = optax.chain(OPTIMIZERS[name], masks.keep_pruned(mask))
    if accumulate:
        tx = optax.MultiSteps(tx, every_k_schedule=4)

    def one(carry, g):
        x, state = carry
        updates, state = tx.update(g, state, x)
        x = optax.apply_updates(x, updates)
        return (x, state), x

    path = jax.jit(lambda x, g: jax.lax.scan(one, (x, tx.init(x)), g)[1])(x, gradients)
    path, keep = flatten(path, (100,)), flatten(mask)
    assert keep.sum() == SIZE // 2
    np.testing.assert_array_equal(path[:, ~keep].view(np.uint32), 0)
    # The others move.
    assert (path[0, keep] != path[-1, keep]).mean() > 0.5


@examples(30)
@hypothesis.given(numbers(SIZE), numbers(SIZE), hnp.arrays(bool, SIZE))
def test_keep_pruned_zeroes_what_is_not_zero_yet(x, updates, keep):
    tx = masks.keep_pruned(tree(keep))
    held, _ = tx.update(tree(updates), tx.init(tree(x)), tree(x))
    new = flatten(optax.apply_updates(tree(x), held))
    np.testing.assert_array_equal(new[~keep].view(np.uint32), 0)
    np.testing.assert_array_equal(flatten(held)[keep], updates[keep])
