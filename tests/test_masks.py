"""Masks on trees of every shape: by magnitude, N:M, on top of one already held.

What is prunable is told by name and by axes, on trees as the libraries make them.
Counts are exact and ties go by index, against NumPy's stable sort: for uneven trees and
both scopes, in every group of an N:M mask, when what is pruned already stays so, and on
a schedule of densities. What a pruning curve recalibrates stands here too.
"""

import dataclasses
import functools

import hypothesis
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

from prunadag_optax import evaluation, masks
from prunadag_optax.schedules import cubic_density
from tests.helpers import refused

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
    mask = masks.magnitude_mask(tree, sparsity, where=masks.everything)
    assert jax.tree.structure(mask) == jax.tree.structure(tree)
    assert jax.tree.map(jnp.shape, mask) == jax.tree.map(jnp.shape, tree)
    x = flat(tree)
    np.testing.assert_array_equal(
        flat(mask), pruned_by_sorting(x, round(sparsity * x.size))
    )
    pruned, same = masks.prune(tree, sparsity, where=masks.everything)
    assert_equal(same, mask)
    np.testing.assert_array_equal(flat(pruned), np.where(flat(mask), x, 0))
    assert masks.sparsity(mask) == masks.sparsity(pruned)


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_scope_leaf_counts_each_leaf(sparsity):
    tree = uneven()
    mask = masks.magnitude_mask(tree, sparsity, scope="leaf", where=masks.everything)
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
    sparsity = 0.0 if keep else 1.0
    pruned, mask = masks.prune(uneven(), sparsity, scope=scope, where=masks.everything)
    assert (flat(mask) == keep).all()
    np.testing.assert_array_equal(flat(pruned), flat(uneven()) * keep)
    assert masks.sparsity(mask) == (not keep)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("x", [2.0, np.float32(-2.0), jnp.float32(0.0)])
def test_a_scalar(x, sparsity):
    mask = masks.magnitude_mask(x, sparsity)
    assert mask.shape == ()
    assert mask == (sparsity < 0.5)


# What is prunable, where nobody says it.


def choice(tree):
    """Path -> whether the leaf is prunable; what surrounds the path is left out."""
    return {
        jax.tree_util.keystr(path): masks.prunable(path, leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def assert_prunable(tree, *names):
    """Those leaves are whose path ends with one of the names, and there are such."""
    found = choice(tree)
    expected = {path: path.endswith(names) for path in found}
    assert found == expected
    assert any(expected.values())
    assert not all(expected.values())


def network():
    import flax.linen as nn

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (3, 3))(x)
            x = nn.BatchNorm(use_running_average=False)(x)
            x = x.reshape(x.shape[0], -1, 4)
            x = x + nn.Embed(3, 4)(jnp.zeros(x.shape[:2], int))
            x = nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
            return nn.Dense(3)(nn.GroupNorm(2)(x))

    return Network().init(jax.random.key(0), jnp.ones((2, 4, 4, 3)))


def test_prunable_in_linen():
    pytest.importorskip("flax")
    variables = network()
    assert_prunable(variables, "['kernel']", "['embedding']")
    shapes = jax.eval_shape(lambda: variables)
    assert choice(shapes) == choice(variables)
    attention = variables["params"]["MultiHeadDotProductAttention_0"]["query"]
    assert [attention[name].ndim for name in ("kernel", "bias")] == [3, 2]


def test_prunable_in_linen_of_flat_names():
    traverse_util = pytest.importorskip("flax.traverse_util")
    flat_names = traverse_util.flatten_dict(network(), sep="/")
    assert_prunable(flat_names, "/kernel']", "/embedding']")


def test_prunable_in_stacked_layers():
    nn = pytest.importorskip("flax.linen")

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.LayerNorm()(nn.Dense(4)(x)), None

    axes = {"params": 0}
    stack = nn.scan(Block, axes, split_rngs={"params": True}, length=3)()
    params = stack.init(jax.random.key(0), jnp.ones((2, 4)), None)
    assert params["params"]["LayerNorm_0"]["scale"].shape == (3, 4)
    assert_prunable(params, "['kernel']")


@pytest.mark.parametrize(
    "partitioned", ["with_partitioning", "with_logical_partitioning"]
)
def test_prunable_in_boxes(partitioned):
    nn = pytest.importorskip("flax.linen")
    boxed = getattr(nn, partitioned)
    layer = nn.Dense(
        3,
        kernel_init=boxed(nn.initializers.ones, ("x", "y")),
        # A bias that looks like a kernel, as in stacked layers.
        bias_init=boxed(lambda key, shape, dtype: jnp.ones((3,)), ("y",)),
    )
    params = layer.init(jax.random.key(0), jnp.ones((1, 4)))["params"]
    assert_prunable(params, "['kernel'].value")
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), params)
    assert_prunable(stacked, "['kernel'].value")
    assert choice(nn.Partitioned(jnp.arange(4.0), ("x",))) == {".value": True}


def test_prunable_in_nnx():
    nnx = pytest.importorskip("flax.nnx")

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(2, 2, rngs=rngs)])
            self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(2, 4, rngs=rngs)
            self.adapter = nnx.LoRALinear(3, 4, lora_rank=2, rngs=rngs)
            # Three layers in one leaf each.
            many = nnx.vmap(lambda rngs: nnx.Linear(2, 3, rngs=rngs))
            self.stack = nnx.split_rngs(splits=3)(many)(rngs)

    model = Model(nnx.Rngs(0))
    assert model.stack.bias.shape == (3, 3)
    params = nnx.state(model, (nnx.Param, nnx.BatchStat))
    names = "kernel", "lora_a", "lora_b"
    assert_prunable(params, *(f"['{name}'].value" for name in names))
    assert_prunable(nnx.as_pure(params), *(f"['{name}']" for name in names))
    assert_prunable(nnx.to_pure_dict(params), *(f"['{name}']" for name in names))
    assert choice(nnx.Param(jnp.ones(3))) == {".value": True}


def test_prunable_in_haiku():
    # BatchNorm's scale and offset have four axes there.
    scales = {"scale": jnp.ones((1, 1, 1, 3)), "offset": jnp.ones((1, 1, 1, 3))}
    params = {
        "mlp/~/linear_0": {"w": jnp.ones((2, 3)), "b": jnp.ones(3)},
        "conv/~/conv2_d": {"w": jnp.ones((3, 3, 2, 3)), "b": jnp.ones((3, 1, 1))},
        "conv/~/batch_norm": scales,
        "mlp/~/layer_norm": {"w": jnp.ones((2, 3))},
        "embed": {"embeddings": jnp.ones((5, 3))},
    }
    found = choice(params)
    assert [path for path, member in found.items() if member] == [
        "['conv/~/conv2_d']['w']",
        "['embed']['embeddings']",
        "['mlp/~/linear_0']['w']",
    ]


def module(*names):
    """A dataclass of these leaves whose key paths have attributes, as in Equinox."""
    cls = dataclasses.make_dataclass("Module", names)
    return jax.tree_util.register_dataclass(cls, names, [])


def test_prunable_in_modules_of_attributes():
    layer, block = module("weight", "bias"), module("layers", "norm1", "ln_2", "cell")
    cell = module("weight_ih", "weight_hh", "bias", "bias_n")
    kernel, vector = jnp.ones((3, 3)), jnp.ones((3, 1, 1))
    model = block(
        layers=[layer(kernel, vector), layer(kernel, None)],
        norm1=layer(jnp.ones((3, 3)), kernel),
        ln_2=layer(kernel, vector),
        cell=cell(kernel, kernel, jnp.ones(9), kernel),
    )
    assert choice(model) == {
        ".layers[0].weight": True,
        ".layers[0].bias": False,
        ".layers[1].weight": True,
        ".norm1.weight": False,
        ".norm1.bias": False,
        ".ln_2.weight": False,
        ".ln_2.bias": False,
        ".cell.weight_ih": True,
        ".cell.weight_hh": True,
        ".cell.bias": False,
        ".cell.bias_n": False,
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *((name, True) for name in ("W1", "w", "bq", "lora_b", "w_mean", "B", "basis")),
        *((name, False) for name in ("b", "b1", "b_out", "b_2", "beta", "moving_mean")),
        *((name, False) for name in ("logit_scale", "Bias", "bias_ih", "variance")),
    ],
)
def test_prunable_by_name(name, expected):
    tree = {name: jnp.ones((2, 3))}
    assert choice(tree) == {f"['{name}']": expected}
    # The names of a list are those of what is in it.
    assert choice({name: [jnp.ones((2, 3)), jnp.ones(3)]}) == {
        f"['{name}'][0]": expected,
        f"['{name}'][1]": False,
    }
    assert masks.prunable((name,), jnp.ones((2, 3))) == expected


def test_prunable_without_names():
    layers = [jnp.ones((2, 3)), jnp.ones(3), (jnp.ones((3, 1)), jnp.ones(1)), 1.0]
    assert list(choice(layers).values()) == [True, False, True, False, False]
    assert choice(jnp.ones(3)) == choice(jnp.ones((2, 3))) == {"": True}
    for other in (jnp.arange(4).reshape(2, 2), jnp.ones((2, 2), bool), 1j * layers[0]):
        assert choice({"w": other}) == {"['w']": False}


def test_where_none_is_prunable_everywhere():
    params = {"bias": jnp.arange(4.0), "w": jnp.arange(8.0).reshape(4, 2)}
    for where in (None, masks.prunable):
        assert masks.magnitude_mask(params, 0.5, where=where)["bias"] is None
        assert masks.n_m_mask(params, 2, 4, where=where)["bias"] is None
        pruned, mask = masks.prune(params, 1.0, where=where)
        assert mask["bias"] is None
        np.testing.assert_array_equal(pruned["bias"], params["bias"])
        assert not pruned["w"].any()
    everything = masks.magnitude_mask(params, 0.5, where=masks.everything)
    assert everything["bias"].tolist() == [False, False, False, True]


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
        masks.magnitude_mask(tree, 0.5, where=masks.everything)
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
    tree = {"w": jnp.ones((4, 4), int)}
    with pytest.raises(ValueError, match=r"params\['w'\] has dtype int32"):
        masks.n_m_mask(tree, 2, 4, where=masks.everything)
    # Which `prunable` leaves out.
    tree["v"] = jnp.ones((4, 4))
    assert masks.n_m_mask(tree, 2, 4)["w"] is None


# On top of a mask already held.

SIZE = 14
# Zeros of both signs, subnormals, ties.
VALUES = [0.0, -0.0, 1e-45, -1e-45, 1e-40, 1.0, -1.0, 0.5, 3.0, -7.0]


# All of the tree, its scalar too.
magnitude_mask = functools.partial(masks.magnitude_mask, where=masks.everything)


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
        return magnitude_mask(params, sparsity, scope=scope, previous=previous)

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
    mask = magnitude_mask(tree(x), sparsity, previous=tree(held))
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
            magnitude_mask(tree(x), sparsity, scope=scope, previous=tree(held)),
            traced(scope)(tree(x), jnp.float32(sparsity), tree(held)),
        )


def test_previous_steps_up_as_one_shot():
    # As long as the parameters are those of before.
    params, mask = uneven(), None
    for sparsity in SPARSITIES:
        params, mask = masks.prune(
            params, sparsity, previous=mask, where=masks.everything
        )
        assert_equal(mask, magnitude_mask(uneven(), sparsity))


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


# On a schedule of densities.


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("size", [1, 7, 1000, 12_345])
@pytest.mark.parametrize("density", [0.05, 0.1, 0.3, 0.9, 1.0])
def test_the_number_kept_is_exact(density, size, compiled):
    # 1 - 0.1 is not exact in float32: a sparsity of it may prune one weight too many.
    def at(x, count):
        return masks.mask_on_schedule(x, None, count, lambda count: density)

    x = jnp.asarray(np.random.default_rng(0).normal(size=size), jnp.float32)
    mask = (jax.jit(at) if compiled else at)(x, 3)
    kept = max(1, round(density * size))
    np.testing.assert_array_equal(mask, pruned_by_sorting(x, size - kept))


@pytest.mark.parametrize("scope", ["global", "leaf"])
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("compiled", [False, True])
def test_mask_on_schedule_step_by_step(scope, every, compiled):
    def at(params, held, count):
        return masks.mask_on_schedule(
            params, held, count, density, every=every, scope=scope
        )

    density = cubic_density(0.2, begin=1, end=8)
    at = jax.jit(at) if compiled else at
    rng = np.random.default_rng(0)
    params = {
        "bias": jnp.ones(3),
        "first": jnp.asarray(rng.normal(size=(4, 5)), jnp.float32),
        "last": jnp.asarray(rng.normal(size=(5, 3)), jnp.float32),
    }
    held = masks.magnitude_mask(params, 0.0)
    for count in range(12):
        before, held = held, at(params, held, count)
        assert held["bias"] is None
        if count % every and count != 8:  # at which the schedule ends
            assert_equal(held, before)
            continue
        share = float(density(count))
        sizes = [20, 15] if scope == "leaf" else [35]
        parts = [flat(held[name]) for name in ("first", "last")]
        parts = parts if scope == "leaf" else [np.concatenate(parts)]
        assert [part.sum() for part in parts] == [round(share * n) for n in sizes]
        assert not (flat(held) & ~flat(before)).any()


def test_mask_on_schedule_undoes_nothing():
    mask = masks.mask_on_schedule(jnp.arange(10.0), None, 0, 0.3)
    assert mask.sum() == 3
    assert_equal(masks.mask_on_schedule(jnp.arange(10.0), mask, 1, 0.9), mask)


def test_mask_on_schedule_counts_down_from_unsigned_steps():
    # As nnx.Optimizer's, where a schedule's `count - begin` would wrap.
    density = lambda count: jnp.where(count - 5 < 0, 1.0, 0.5)  # noqa: E731
    mask = masks.mask_on_schedule(jnp.arange(4.0), None, jnp.uint32(2), density)
    assert mask.all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"density": 0.0}, "density must be a finite number > 0 and <= 1; got 0.0"),
        ({"density": 95}, "density must be a finite number > 0 and <= 1; got 95"),
        ({"every": 0}, "every must be an integer >= 1; got 0"),
        ({"scope": "row"}, "scope must be 'global', 'leaf' or a function"),
    ],
)
def test_mask_on_schedule_arguments(arguments, message):
    with refused(message):
        masks.mask_on_schedule(jnp.ones(3), None, 0, **{"density": 0.5, **arguments})


def test_mask_on_schedule_needs_a_mask_of_every_leaf_chosen():
    params = {"bias": jnp.ones(3), "w": jnp.ones((2, 2))}
    held = masks.magnitude_mask(params, 0.0)
    with refused("where must choose", "params['bias'], which has none"):
        masks.mask_on_schedule(params, held, 0, 0.5, where=masks.everything)


# Further.


def test_prune_further_goes_by_the_masks_held():
    params = {"a": jnp.arange(4.0), "w": jnp.arange(4.0).reshape(2, 2)}
    pruned, mask = masks.prune(params, 0.25, where=lambda path, x: x.ndim == 1)
    pruned, mask = masks.prune_further(pruned, 0.75, mask)
    assert mask["w"] is None
    assert mask["a"].tolist() == [False, False, False, True]
    assert pruned["a"].tolist() == [0.0, 0.0, 0.0, 3.0]
    with refused("sparsity must be at least 0.75, what is pruned already; got 0.5"):
        masks.prune_further(pruned, 0.5, mask)
    # An array may be traced, so it is not compared, and undoes nothing.
    assert_equal(masks.prune_further(pruned, jnp.float32(0.5), mask)[1], mask)
    # Without a mask: as `prune`.
    assert_equal(masks.prune_further(params, 0.5, None), masks.prune(params, 0.5))


# Recalibration.


def test_curve_recalibrates():
    params, calls = {"w": jnp.arange(1.0, 11.0).reshape(2, 5)}, []

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
    np.testing.assert_array_equal(params["w"], np.arange(1.0, 11.0).reshape(2, 5))


# A schedule that ends between two changes.


def steps_of_change(density, every, compiled, last=140):
    """The step -> number kept, for the steps at which the mask changes."""

    def at(held, count):
        return masks.mask_on_schedule(
            jnp.arange(1000.0), held, count, density, every=every
        )

    at = jax.jit(at) if compiled else at
    held, changes = jnp.ones(1000, bool), {}
    for count in range(last):
        before, held = held, at(held, jnp.uint32(count))
        if (before != held).any():
            changes[count] = int(held.sum())
    return changes


@pytest.mark.parametrize("compiled", [False, True])
def test_a_schedule_reaches_its_end_between_two_changes(compiled):
    density = optax.linear_schedule(1.0, 0.1, 101)
    changes = steps_of_change(density, 20, compiled)
    assert list(changes) == [20, 40, 60, 80, 100, 101]
    assert changes[101] == 100
    assert changes[100] == round(1000 * float(density(100))) == 109
    # Where it ends at a change, or before the first.
    density = optax.linear_schedule(1.0, 0.1, 100)
    assert [*steps_of_change(density, 20, compiled)] == [20, 40, 60, 80, 100]
    density = lambda k: jnp.where(k < 3, 1.0, 0.2)  # noqa: E731
    assert steps_of_change(density, 20, compiled, 9) == {3: 200}


def test_stairs_fall_when_the_schedule_says():
    stairs = lambda k: jnp.where(k < 25, 1.0, jnp.where(k < 65, 0.5, 0.1))  # noqa: E731
    assert steps_of_change(stairs, 20, True) == {25: 500, 65: 100}
    # Steps that are shorter than `every` are seen at its multiples, and the last one.
    steep = lambda k: jnp.maximum(1.0 - (k // 5) * 0.1, 0.2)  # noqa: E731
    assert list(steps_of_change(steep, 20, True)) == [20, 40]


# Scores.


def test_score_decides_what_is_pruned():
    params = {"a": jnp.arange(1.0, 5.0).reshape(2, 2), "w": jnp.ones((2, 2))}
    reciprocal = jax.tree.map(lambda x: 1 / x, params)
    for score in (reciprocal, lambda params: jax.tree.map(lambda x: 1 / x, params)):
        pruned, mask = masks.prune(params, 3 / 8, score=score)
        assert mask["a"].tolist() == [[True, False], [False, False]]
        assert mask["w"].all()
        assert pruned["a"].tolist() == [[1.0, 0.0], [0.0, 0.0]]
    with refused("score and params must have the same tree structure; got ['w'] in"):
        masks.prune(params, 0.5, score={"a": params["a"]})
    with refused("score must be 'magnitude', 'lamp' or a function", "got 'size'"):
        masks.prune(params, 0.5, score="size")


def test_lamp_empties_no_layer():
    rng = np.random.default_rng(0)
    params = {
        "large": jnp.asarray(rng.normal(size=(8, 9)), jnp.float32),
        "small": jnp.asarray(rng.normal(size=(4, 5)) / 100, jnp.float32),
    }
    _, mask = masks.prune(params, 0.9, score="lamp")

    def scores(x):
        squares = np.square(np.asarray(x, np.float64)).ravel()
        left = [squares[squares >= square].sum() for square in squares]
        return (squares / left).reshape(x.shape)

    together = np.concatenate([scores(x).ravel() for x in params.values()])
    expected = pruned_by_sorting(together, round(0.9 * together.size))
    np.testing.assert_array_equal(flat(mask), expected)
    assert mask["small"].any()
    assert not masks.prune(params, 0.9)[1]["small"].any()
    # On its own, a layer has one order.
    for scope in ("leaf", lambda path, leaf: 1):
        assert_equal(
            masks.magnitude_mask(params, 0.9, score="lamp", scope=scope),
            masks.magnitude_mask(params, 0.9, scope=scope),
        )
    curve = evaluation.pruning_curve(
        lambda p: jnp.sum(p["small"] != 0), params, [0.9], score="lamp"
    )
    assert curve.values["metric"] == (mask["small"].sum(),)


# What is no tree of parameters.


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            optax.adam(0.1),
            ["params must be a pytree of parameters; got an optax trans"],
        ),
        (optax.adam(0.1).init(jnp.ones(3)), ["got an optimizer's state"]),
        (optax.sgd(0.1, 0.9).init(jnp.ones(3))[0], ["state (TraceState)"]),
        (
            optax.LookaheadParams.init_synced({"w": jnp.ones((2, 2))}),
            ["LookaheadParams", "params.slow", "init_synced(pruned)"],
        ),
        ({"w": jnp.ones((2, 2)), "act": "relu"}, ["params['act'] must be an array"]),
        (
            {"w": jnp.ones((2, 2)), "f": jnp.tanh},
            ["params['f'] must be an array; got a"],
        ),
    ],
)
def test_what_is_no_tree_of_parameters(params, message):
    for function in (
        lambda: masks.prune(params, 0.5),
        lambda: masks.n_m_mask(params, 2, 4),
        lambda: masks.mask_on_schedule(params, None, 0, 0.5),
        lambda: evaluation.pruning_curve(lambda p: 0, params, [0.5]),
    ):
        with refused(*message) as error:
            function()
        assert len(str(error.value)) < 400


def test_flax_objects_are_no_trees_of_parameters():
    nnx = pytest.importorskip("flax.nnx")
    nn = pytest.importorskip("flax.linen")
    train_state = pytest.importorskip("flax.training.train_state")
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    state = train_state.TrainState.create(
        apply_fn=None, params={"w": jnp.ones((2, 2))}, tx=optax.sgd(0.1)
    )
    for params, parts in (
        (model, ["the nnx module Linear", "prunadag_optax.nnx.prune(model, sparsity)"]),
        (optimizer, ["the nnx optimizer Optimizer", "nnx.state(model, nnx.Param)"]),
        (nn.Dense(3), ["the linen module Dense", "model.init(key, inputs)['params']"]),
        (state, ["TrainState", "state.params"]),
    ):
        with refused("params must be a pytree of parameters; got", *parts) as error:
            masks.prune(params, 0.5)
        assert len(str(error.value)) < 400
    # Their trees are.
    assert masks.sparsity(masks.prune(nnx.state(model, nnx.Param), 0.5)[1]) == 0.5


# NumPy's leaves.


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_numpy_leaves(dtype):
    rng = np.random.default_rng(0)
    params = {"b": np.zeros(3, dtype), "w": rng.normal(size=(5, 4)).astype(dtype)}
    kept = pruned_by_sorting(params["w"], 10)
    pruned, mask = masks.prune(params, 0.5)
    np.testing.assert_array_equal(mask["w"], kept)
    assert mask["w"].dtype == bool
    assert mask["b"] is None
    canonical = jnp.asarray(params["w"]).dtype  # float32 for float64
    assert pruned["w"].dtype == canonical
    np.testing.assert_array_equal(pruned["w"], jnp.where(kept, params["w"], 0))
    assert masks.sparsity(mask) == masks.sparsity(pruned["w"]) == 0.5
    # Masks and held masks of NumPy, too.
    held = {"b": None, "w": np.asarray(mask["w"])}
    assert_equal(masks.apply_mask(params, held)["w"], pruned["w"])
    further, more = masks.prune_further(params, 0.75, held)
    np.testing.assert_array_equal(more["w"], pruned_by_sorting(params["w"], 15))
    assert masks.finalise(further, more)["w"].dtype == canonical
    assert masks.magnitude_mask(params, 0.0)["w"].all()
    assert (masks.n_m_mask({"w": params["w"][:4]}, 2, 4)["w"].sum(0) == 2).all()
