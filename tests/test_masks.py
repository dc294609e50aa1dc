"""Masks on trees of every shape: by magnitude, N:M, on top of one already held.

Counts are exact and ties go by index, against NumPy's stable sort: for uneven trees and
both scopes, in every group of an N:M mask, and when what is pruned already stays so.
The schedules of sparsity and what a pruning curve recalibrates stand here too.
"""

import functools

import hypothesis
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from prunadag_optax import evaluation, masks
from prunadag_optax.methods.gradual_pruning import cubic_sparsity, one_shot_sparsity

SPARSITIES = [0.0, 0.1, 0.25, 0.5, 0.55, 0.9, 0.999, 1.0]


def uneven():
    """A scalar, zero-size leaves, a None, lists and tuples; 1 + 12 + 5 + 24 numbers."""
    rng = np.random.default_rng(0)

    def leaf(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {
        "a": leaf(),
        "b": [leaf(3, 4), leaf(0), None],
        "c": {"d": (leaf(5), {"e": leaf(2, 3, 4)}), "f": leaf(0, 7)},
    }


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def pruned_by_sorting(x, count):
    """A stable sort takes the lowest index first among equal magnitudes."""
    keep = np.ones(x.size, bool)
    keep[np.argsort(np.abs(x), axis=None, kind="stable")[:count]] = False
    return keep.reshape(x.shape)


def assert_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


# Uneven trees.


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_uneven_tree(sparsity):
    tree = uneven()
    mask = masks.magnitude_mask(tree, sparsity)
    assert jax.tree.structure(mask) == jax.tree.structure(tree)
    assert jax.tree.map(jnp.shape, mask) == jax.tree.map(jnp.shape, tree)
    x = flat(tree)
    np.testing.assert_array_equal(
        flat(mask), pruned_by_sorting(x, round(sparsity * x.size))
    )
    pruned, same = masks.prune(tree, sparsity)
    assert_equal(same, mask)
    np.testing.assert_array_equal(flat(pruned), np.where(flat(mask), x, 0))
    assert masks.sparsity(mask) == masks.sparsity(pruned)


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_scope_leaf_counts_each_leaf(sparsity):
    tree = uneven()
    mask = masks.magnitude_mask(tree, sparsity, scope="leaf")
    assert_equal(
        mask,
        jax.tree.map(
            lambda x: pruned_by_sorting(np.asarray(x), round(sparsity * x.size)), tree
        ),
    )


@pytest.mark.parametrize("scope", ["global", "leaf"])
@pytest.mark.parametrize("tree", [{}, None, [], {"a": None}, jnp.zeros((0, 3))])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 1.0])
def test_nothing_to_prune(tree, scope, sparsity):
    pruned, mask = masks.prune(tree, sparsity, scope=scope)
    assert_equal(pruned, tree)
    assert jax.tree.structure(mask) == jax.tree.structure(tree)
    assert masks.sparsity(mask) == 0


@pytest.mark.parametrize("scope", ["global", "leaf"])
@pytest.mark.parametrize("keep", [False, True])
def test_all_or_nothing(keep, scope):
    pruned, mask = masks.prune(uneven(), 0.0 if keep else 1.0, scope=scope)
    assert (flat(mask) == keep).all()
    np.testing.assert_array_equal(flat(pruned), flat(uneven()) * keep)
    assert masks.sparsity(mask) == (not keep)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("x", [2.0, np.float32(-2.0), jnp.float32(0.0)])
def test_a_scalar(x, sparsity):
    mask = masks.magnitude_mask(x, sparsity)
    assert mask.shape == ()
    assert mask == (sparsity < 0.5)


# A predicate, shared by all that take one.


def matrices(path, leaf):
    del path
    return leaf.ndim > 1


@pytest.mark.parametrize("scope", ["global", "leaf"])
def test_where_is_shared(scope):
    tree = uneven()
    mask = masks.magnitude_mask(tree, 0.5, scope=scope, where=matrices)
    assert mask["a"] is mask["c"]["d"][0] is mask["b"][1] is None
    assert [leaf.shape for leaf in jax.tree.leaves(mask)] == [(3, 4), (2, 3, 4), (0, 7)]
    assert (~flat(mask)).sum() == 18
    assert masks.sparsity(mask) == 0.5
    pruned, same = masks.prune(tree, 0.5, scope=scope, where=matrices)
    assert_equal(same, mask)
    assert pruned["a"] == tree["a"]
    np.testing.assert_array_equal(pruned["c"]["d"][0], tree["c"]["d"][0])
    curve = evaluation.pruning_curve(
        lambda p: (flat(p) == 0).sum(), tree, [0.5], scope=scope, where=matrices
    )
    assert curve.values["metric"] == (18,)


def test_where_gets_paths_and_leaves():
    seen = {}

    def where(path, leaf):
        seen[jax.tree_util.keystr(path)] = leaf.shape
        return "e" in jax.tree_util.keystr(path)

    mask = masks.magnitude_mask(uneven(), 0.25, where=where)
    assert seen == {
        "['a']": (),
        "['b'][0]": (3, 4),
        "['b'][1]": (0,),
        "['c']['d'][0]": (5,),
        "['c']['d'][1]['e']": (2, 3, 4),
        "['c']['f']": (0, 7),
    }
    (only,) = jax.tree.leaves(mask)
    assert (~only).sum() == 6


def test_where_leaves_out_what_cannot_be_pruned():
    tree = {"count": jnp.arange(3), "w": jnp.arange(4.0)}
    with pytest.raises(ValueError, match=r"params\['count'\] has dtype int32"):
        masks.magnitude_mask(tree, 0.5)
    mask = masks.magnitude_mask(tree, 0.5, where=lambda path, leaf: leaf.size == 4)
    assert mask["count"] is None
    assert mask["w"].tolist() == [False, False, True, True]


# N:M.


def n_m_by_sorting(x, n, m, axis=-2):
    moved = np.moveaxis(np.asarray(x), axis, -1)
    groups = moved.reshape(-1, m)
    keep = np.stack([pruned_by_sorting(group, m - n) for group in groups])
    return np.moveaxis(keep.reshape(moved.shape), -1, axis)


# [in, out] and [h, w, I, O] kernels.
KERNEL_SHAPES = [(8, 6), (4, 1), (3, 3, 8, 5), (1, 2, 4, 3), (0, 3), (8, 0)]


@pytest.mark.parametrize("shape", KERNEL_SHAPES, ids=str)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (0, 4), (4, 4), (1, 2), (1, 1)])
@pytest.mark.parametrize("ties", [False, True])
def test_n_m_mask_is_exact_in_every_group(shape, n, m, ties):
    rng = np.random.default_rng(0)
    x = rng.integers(-2, 3, shape) if ties else rng.normal(size=shape)
    x = x.astype(np.float32)
    mask = np.asarray(masks.n_m_mask(x, n, m))
    assert mask.shape == x.shape
    groups = mask.reshape(*shape[:-2], shape[-2] // m, m, shape[-1])
    assert (groups.sum(axis=-2) == n).all()
    if x.size:
        np.testing.assert_array_equal(mask, n_m_by_sorting(x, n, m))


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
def test_n_m_mask_along_an_axis(axis):
    x = np.random.default_rng(0).normal(size=(4, 8, 12)).astype(np.float32)
    mask = masks.n_m_mask(x, 2, 4, axis=axis)
    np.testing.assert_array_equal(mask, n_m_by_sorting(x, 2, 4, axis))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_n_m_mask_of_subnormals_and_infinities(dtype):
    tiny = float(jnp.finfo(dtype).smallest_subnormal)
    x = jnp.array([[0.0, tiny, -jnp.inf, -0.0, jnp.nan, 1.0, 2 * tiny, -tiny]], dtype).T
    mask = masks.n_m_mask(x, 2, 4)
    expected = [False, True, True, False, True, True, False, False]
    assert np.ravel(mask).tolist() == expected


def test_n_m_mask_leaves_vectors_out_unless_asked():
    tree = {"bias": jnp.arange(4.0), "conv": jnp.ones((3, 3, 4, 2)), "scale": 1.0}
    mask = masks.n_m_mask(tree, 2, 4)
    assert mask["bias"] is mask["scale"] is None
    assert masks.sparsity(mask) == 0.5
    # Ties: the lowest index is pruned first.
    assert mask["conv"][1, 2, :, 0].tolist() == [False, False, True, True]
    mask = masks.n_m_mask(tree, 1, 4, axis=-1, where=lambda path, x: x is tree["bias"])
    assert mask["conv"] is mask["scale"] is None
    assert mask["bias"].tolist() == [False, False, False, True]


def test_n_m_mask_under_jit():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)
    traced = jax.jit(lambda x: masks.n_m_mask(x, 2, 4))
    np.testing.assert_array_equal(traced(x), masks.n_m_mask(x, 2, 4))


@pytest.mark.parametrize(
    ("n", "m"), [(5, 4), (-1, 4), (0, 0), (2.0, 4), (2, 4.0), ("2", 4), (1, -2)]
)
def test_bad_n_and_m(n, m):
    with pytest.raises(ValueError, match="n and m must be integers, 0 <= n <= m; got"):
        masks.n_m_mask(jnp.ones((8, 8)), n, m)


@pytest.mark.parametrize(
    ("shape", "axis"), [((6, 4), -2), ((4, 6), -1), ((4, 4), 2), ((4, 4), -3)]
)
def test_m_must_divide_the_axis(shape, axis):
    with pytest.raises(ValueError, match=r"m must divide axis .*\['w'\].*got m=4") as e:
        masks.n_m_mask({"w": jnp.ones(shape)}, 2, 4, axis=axis)
    assert str(shape) in str(e.value)


def test_n_m_mask_needs_floats():
    with pytest.raises(ValueError, match=r"params\['w'\] has dtype int32"):
        masks.n_m_mask({"w": jnp.ones((4, 4), int)}, 2, 4)


# On top of a mask already held.

SIZE = 14
# Zeros of both signs, subnormals, ties.
VALUES = [0.0, -0.0, 1e-45, -1e-45, 1e-40, 1.0, -1.0, 0.5, 3.0, -7.0]


def tree(x):
    return {"a": x[:7], "b": {"c": x[7:13].reshape(2, 3), "d": x[13]}}


def further_by_sorting(x, held, count):
    """What is held pruned goes first, then by magnitude, then by index."""
    keep = np.ones(x.size, bool)
    # NumPy's magnitudes, by their bits, tell subnormal numbers from zero.
    keys = np.where(held, np.abs(x).view(np.int32).astype(np.int64), -1)
    keep[np.argsort(keys, kind="stable")[: max(count, (~held).sum())]] = False
    return keep


@functools.cache
def traced(scope):
    def call(params, sparsity, previous):
        return masks.magnitude_mask(params, sparsity, scope=scope, previous=previous)

    return jax.jit(call)


arrays_and_masks = hypothesis.given(
    hnp.arrays(np.float32, SIZE, elements=st.sampled_from(VALUES)),
    hnp.arrays(bool, SIZE),
    st.sampled_from(SPARSITIES),
)
examples = hypothesis.settings(
    max_examples=100, deadline=None, derandomize=True, database=None
)


@examples
@arrays_and_masks
def test_previous_is_kept_and_counts_are_exact(x, held, sparsity):
    mask = masks.magnitude_mask(tree(x), sparsity, previous=tree(held))
    np.testing.assert_array_equal(
        flat(mask), further_by_sorting(x, held, round(sparsity * SIZE))
    )
    assert not (flat(mask) & ~held).any()
    assert (~flat(mask)).sum() == max(round(sparsity * SIZE), (~held).sum())
    same = traced("global")(tree(x), jnp.float32(sparsity), tree(held))
    assert_equal(same, mask)


@examples
@arrays_and_masks
def test_previous_by_leaf(x, held, sparsity):
    mask = traced("leaf")(tree(x), jnp.float32(sparsity), tree(held))
    for keep, leaf, before in zip(
        *map(jax.tree.leaves, (mask, tree(x), tree(held))), strict=True
    ):
        expected = further_by_sorting(
            np.ravel(leaf), np.ravel(before), round(sparsity * leaf.size)
        )
        np.testing.assert_array_equal(np.ravel(keep), expected)


@pytest.mark.parametrize("scope", ["global", "leaf"])
def test_previous_static_and_traced_sparsity_agree(scope):
    x = np.random.default_rng(0).choice(VALUES, SIZE).astype(np.float32)
    held = np.random.default_rng(1).integers(0, 2, SIZE).astype(bool)
    for sparsity in SPARSITIES:
        assert_equal(
            masks.magnitude_mask(tree(x), sparsity, scope=scope, previous=tree(held)),
            traced(scope)(tree(x), jnp.float32(sparsity), tree(held)),
        )


def test_previous_steps_up_as_one_shot():
    # As long as the parameters are those of before.
    params, mask = uneven(), None
    for sparsity in SPARSITIES:
        params, mask = masks.prune(params, sparsity, previous=mask)
        assert_equal(mask, masks.magnitude_mask(uneven(), sparsity))


def test_previous_of_leaves_that_are_not_chosen():
    params = {"a": jnp.arange(4.0), "b": jnp.arange(4.0), "c": jnp.arange(4.0)}
    gone = jnp.array([True, False, True, False])
    previous = {"a": gone, "b": None, "c": None}
    # A leaf that is not chosen keeps its mask, or none; one chosen anew gets one.
    mask = masks.magnitude_mask(
        params, 0.5, where=lambda path, leaf: path[0].key == "b", previous=previous
    )
    np.testing.assert_array_equal(mask["a"], gone)
    assert mask["b"].tolist() == [False, False, True, True]
    assert mask["c"] is None


@pytest.mark.parametrize(
    "previous", [{"a": jnp.ones(3, bool)}, {"a": jnp.ones(4)}, {"b": None}, []]
)
def test_previous_that_does_not_fit(previous):
    with pytest.raises(ValueError, match=r"^mask"):
        masks.magnitude_mask({"a": jnp.ones(4)}, 0.5, previous=previous)


@pytest.mark.parametrize(("sparsity", "zeros"), [(-0.5, 0), (1.5, 4), (0.5, 2)])
def test_a_traced_sparsity_is_clipped(sparsity, zeros):
    mask = jax.jit(masks.magnitude_mask)(jnp.arange(4.0), jnp.float32(sparsity))
    assert (~mask).sum() == zeros


@pytest.mark.parametrize("size", [3, 41, 1000, 235_146])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_sparsity_of_nothing_and_of_all_is_exact(size, compiled):
    # Compiled, a division by a constant is a product with its rounded reciprocal.
    sparsity = jax.jit(masks.sparsity) if compiled else masks.sparsity
    assert sparsity(jnp.ones(size)) == 0
    assert sparsity(jnp.zeros(size)) == 1
    # One weight of many counts, and one that is left.
    one = jnp.zeros(size).at[size // 2].set(1)
    np.testing.assert_allclose(sparsity(one), 1 - 1 / size, rtol=1e-7)
    np.testing.assert_allclose(sparsity(1 - one), 1 / size, rtol=2e-7)


# Schedules of sparsity.


@pytest.mark.parametrize(
    ("final", "begin", "end", "initial"),
    [(0.8, 10, 20, 0.0), (0.98, 0, 7, 0.5), (1.0, 3, 4, 0.0), (0.5, 2, 9, 0.5)],
)
def test_cubic_sparsity_is_the_formula(final, begin, end, initial):
    schedule = cubic_sparsity(final, begin=begin, end=end, initial=initial)
    counts = np.arange(end + 10)
    share = np.clip((counts - begin) / (end - begin), 0, 1)
    expected = final + (initial - final) * (1 - share) ** 3
    compiled = jax.jit(schedule)
    np.testing.assert_allclose([schedule(int(c)) for c in counts], expected, atol=1e-6)
    np.testing.assert_allclose([compiled(c) for c in counts], expected, atol=1e-6)
    assert (np.diff([float(compiled(c)) for c in counts]) >= 0).all()
    assert compiled(end) == np.float32(final)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"final": 1.1}, "final must be a finite number >= 0 and <= 1; got 1.1"),
        ({"final": -0.1}, "final must be a finite number >= 0 and <= 1; got -0.1"),
        ({"final": float("nan")}, "final must be a finite number"),
        ({"initial": -0.1}, "initial must be a finite number >= 0 and <= 0.8"),
        ({"initial": 0.9}, "initial must be a finite number >= 0 and <= 0.8"),
        ({"begin": -1}, "begin must be a finite number >= 0; got -1"),
        ({"end": 10}, "end must be a finite number > 10; got 10"),
        ({"end": 5}, "end must be a finite number > 10; got 5"),
        ({"end": None}, "end must be a finite number > 10; got None"),
    ],
)
def test_cubic_sparsity_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        cubic_sparsity(**{"final": 0.8, "begin": 10, "end": 20, **arguments})


@pytest.mark.parametrize("step", [0, 1, 7])
def test_one_shot_sparsity(step):
    schedule = one_shot_sparsity(0.75, step=step)
    values = [float(schedule(count)) for count in range(10)]
    assert values == [0.75 if count >= step else 0.0 for count in range(10)]
    np.testing.assert_array_equal(jax.jit(schedule)(jnp.arange(10)), values)


@pytest.mark.parametrize(
    ("sparsity", "step", "name"),
    [
        (1.5, 0, "sparsity"),
        (-0.5, 0, "sparsity"),
        (0.5, -1, "step"),
        (0.5, "1", "step"),
    ],
)
def test_one_shot_sparsity_arguments(sparsity, step, name):
    with pytest.raises(ValueError, match=f"{name} must be a finite number >= 0"):
        one_shot_sparsity(sparsity, step=step)


# Recalibration.


def test_curve_recalibrates():
    params, calls = {"w": jnp.arange(1.0, 11.0)}, []

    def recalibrate(pruned, sparsity):
        calls.append((sparsity, pruned))
        return {"statistics": pruned["w"].sum(), "sparsity": sparsity}

    def metric(recalibrated):
        assert set(recalibrated) == {"statistics", "sparsity"}
        return recalibrated

    sparsities = [0.5, 0.0, 0.9]
    curve = evaluation.pruning_curve(
        metric, params, sparsities, recalibrate=recalibrate, progress=False
    )
    assert [sparsity for sparsity, _ in calls] == sparsities
    for sparsity, pruned in calls:
        assert_equal(pruned, masks.prune(params, sparsity)[0])
    assert curve.values["statistics"] == (40.0, 55.0, 10.0)
    assert curve.values["sparsity"] == tuple(sparsities)
    assert curve.sparsities == tuple(sparsities)
    # The parameters stay as they were.
    np.testing.assert_array_equal(params["w"], np.arange(1.0, 11.0))
