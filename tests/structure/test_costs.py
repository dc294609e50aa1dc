"""The cost of a structure is what XLA counts before it optimises."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from prunadag_optax import structure
from tests.structure.models import MODELS, floats, made

LOOPS = {"scanned_transformer", "recurrent", "cond_while"}
PLAIN = [name for name in MODELS if name not in LOOPS]
TOLERANCE = 0.05


def by_xla(apply, *arguments):
    return jax.jit(apply).lower(*arguments).cost_analysis().get("flops", 0)


def halves(found, seed=0):
    """Half of the units of each group."""
    rng = np.random.default_rng(seed)
    return {
        group.name: rng.permutation(np.arange(group.size) < max(1, group.size // 2))
        for group in found.groups
    }


def number_of_values(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def traced_flops(function, *inputs):
    return structure.cost(
        structure.trace(lambda _, *inputs: function(*inputs), {}, *inputs)
    ).flops


@pytest.mark.parametrize("name", [*PLAIN, "vgg_16", "resnet_50"])
def test_operations_are_those_that_xla_counts(name):
    model, found = made(name)
    expected = by_xla(model.apply, model.variables, *model.inputs)
    assert structure.cost(found).flops == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize("name", [*PLAIN, "vgg_16", "resnet_50"])
def test_operations_of_the_small_model_are_those_that_xla_counts(name):
    model, found = made(name)
    keep = halves(found)
    shapes = jax.eval_shape(lambda tree: tree, model.variables)
    small = structure.shrink(found, keep, shapes)
    expected = by_xla(structure.small_apply(found, keep), small, *model.inputs)
    assert structure.cost(found, keep).flops == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize("name", [*MODELS, "vgg_16", "resnet_50"])
def test_params_are_the_sizes_of_the_trees(name):
    model, found = made(name)
    shapes = jax.eval_shape(lambda tree: tree, model.variables)
    keep = halves(found)
    assert structure.cost(found).params == number_of_values(shapes)
    small = structure.shrink(found, keep, shapes)
    assert structure.cost(found, keep).params == number_of_values(small)


@pytest.mark.parametrize("name", ["lenet", "mobilenet", "encoder", "gpt_gqa_rope"])
def test_a_unit_costs_what_one_unit_less_saves(name):
    _, found = made(name)
    whole = structure.cost(found)
    assert set(whole.units) == {group.name for group in found.groups}
    for group in found.groups:
        # The units of a group do not differ.
        first = structure.cost(found, {group.name: np.arange(group.size) > 0})
        params, flops = whole.units[group.name]
        assert params == whole.params - first.params > 0
        assert flops == whole.flops - first.flops > 0


def test_units_of_what_is_left():
    _, found = made("mlp")
    keep = halves(found)
    name, other = (group.name for group in found.groups)
    less = dict(keep)
    less[name] = keep[name] & (np.cumsum(keep[name]) > 1)
    now, then = (structure.cost(found, choice) for choice in (keep, less))
    assert now.units[name] == (now.params - then.params, now.flops - then.flops)
    assert now.units[name] < structure.cost(found).units[name]
    # What cannot lose a unit has no price.
    last = {name: np.arange(found[name].size) == 3}
    assert set(structure.cost(found, last).units) == {other}


def scanned(params, x, length, unroll):
    def step(x, kernel):
        return jnp.tanh(x @ kernel) * 2.0, x.sum()

    if unroll:
        sums = []
        for kernel in params["layers"]:
            x, total = step(x, kernel)
            sums.append(total)
        return x @ params["head"], jnp.stack(sums)
    x, sums = lax.scan(step, x, params["layers"], length)
    return x @ params["head"], sums


@pytest.mark.parametrize("length", [1, 3, 8])
def test_a_scan_costs_its_length_times_its_body(length):
    params = {
        "layers": jax.ShapeDtypeStruct((length, 12, 12), jnp.float32),
        "head": jax.ShapeDtypeStruct((12, 5), jnp.float32),
    }
    costs = [
        structure.cost(
            structure.trace(
                functools.partial(scanned, length=length, unroll=unroll),
                params,
                floats(4, 12),
            )
        )
        for unroll in (False, True)
    ]
    assert costs[0].flops == costs[1].flops
    assert costs[0].params == costs[1].params == 144 * length + 60
    # The head, and in each step the products, twice, and the sum.
    body = 2 * 4 * 12 * 12 + 4 * 12 + 4 * 12 - 1
    assert costs[0].flops == 2 * 4 * 12 * 5 + length * body


def unrolled(model):
    """The cost by XLA of a model whose scans are written out."""
    scan = lax.scan

    def flat(f, init, xs=None, length=None, reverse=False, **_):
        count = length if xs is None else len(jax.tree.leaves(xs)[0])
        steps = range(count)[::-1] if reverse else range(count)
        outputs = []
        for step in steps:
            init, y = f(init, jax.tree.map(lambda leaf, n=step: leaf[n], xs))
            outputs.append(y)
        outputs = outputs[::-1] if reverse else outputs
        return init, jax.tree.map(lambda *ys: jnp.stack(ys), *outputs)

    lax.scan = flat
    jax.clear_caches()
    try:
        return by_xla(model.apply, model.variables, *model.inputs)
    finally:
        lax.scan = scan
        jax.clear_caches()


@pytest.mark.parametrize("name", ["scanned_transformer", "recurrent"])
def test_a_model_with_a_scan_costs_what_it_does_unrolled(name):
    model, found = made(name)
    once = by_xla(model.apply, model.variables, *model.inputs)
    expected = unrolled(model)
    assert expected > 1.5 * once
    assert structure.cost(found).flops == pytest.approx(expected, rel=TOLERANCE)


def test_a_branch_costs_the_dearest_and_a_while_loop_one_step():
    def branches(index, x):
        return lax.switch(index, [lambda x: x * 2.0, lambda x: x @ x], x)[:1]

    def loop(x):
        return lax.while_loop(lambda x: x.sum() < 9.0, lambda x: x @ x, x)

    x = floats(6, 6)
    # The index is clamped, then the product.
    assert traced_flops(branches, jnp.int32(1), x) == 1 + 2 * 6**3
    # The sum, the comparison and the product.
    assert traced_flops(loop, x) == 35 + 1 + 2 * 6**3


X, K = floats(7, 11), floats(2, 9, 9, 4)
INTEGERS = jnp.arange(77).reshape(7, 11) % 5
RANDOM = jax.random.key(0)


def convolved(**options):
    layout = ("NHWC", "HWIO", "NHWC")
    options = {"window_strides": (1, 1), "padding": "SAME"} | options
    count = 4 // options.get("feature_group_count", 1)
    return lambda x: lax.conv_general_dilated(
        x, floats(3, 3, count, 8), dimension_numbers=layout, **options
    )


PRIMITIVES = {
    "logistic": (jax.nn.sigmoid, X),
    "erfc": (lax.erfc, X),
    "acosh": (lax.acosh, X),
    "asinh": (lax.asinh, X),
    "exp2": (lax.exp2, X),
    "tanh": (lambda x: jnp.tanh(x) + x, X),
    "complex": (lambda x: lax.conj(x) * x, X + 1j * X),
    **{f"power {n}": (lambda x, n=n: lax.integer_pow(x, n), X) for n in (-3, 2, 7, 15)},
    "convert": (lambda x: x.astype(jnp.bfloat16) * 2, X),
    "select": (lambda x: jnp.where(x > 0, x, -x), X),
    "clamp": (lambda x: lax.clamp(0.0, x, 1.0), X),
    "reduce_precision": (lambda x: lax.reduce_precision(x, 8, 7), X),
    "softmax": (jax.nn.softmax, X),
    "argmax": (lambda x: jnp.argmax(x, 1), X),
    "cumsum": (lambda x: jnp.cumsum(x, 1), X),
    "cumlogsumexp": (lambda x: lax.cumlogsumexp(x, 1), X),
    "sort": (jnp.sort, X),
    "fft": (lambda x: jnp.fft.fft(x).real, X),
    "gather": (lambda x, i: jnp.take_along_axis(x, i, 1), X, INTEGERS),
    "scatter": (lambda x, i: x.at[i[:, 0]].add(x), X, INTEGERS),
    "random": (lambda key: jax.random.uniform(key, (40, 50)), RANDOM),
    "ragged": (lax.ragged_dot, X, floats(3, 11, 4), jnp.array([2, 2, 3])),
    "max pool": (
        lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (2, 3), (1, 2), "VALID"),
        X,
    ),
    "dead code": (lambda x: (x @ x.T, x + 1.0)[1], X),
    "conv, padded": (convolved(), K),
    "conv, valid and strided": (
        convolved(window_strides=(2, 2), padding="VALID"),
        K,
    ),
    "conv, transposed": (
        convolved(lhs_dilation=(2, 2), padding=[(2, 2), (1, 3)]),
        K,
    ),
    "conv, dilated": (convolved(rhs_dilation=(2, 3)), K),
    "conv, grouped": (convolved(feature_group_count=2), K),
    "conv, depthwise": (convolved(feature_group_count=4), K),
}


@pytest.mark.parametrize("name", PRIMITIVES)
def test_primitives_count_as_in_xla(name):
    function, *inputs = PRIMITIVES[name]
    expected = by_xla(function, *inputs)
    assert expected > 0
    assert traced_flops(function, *inputs) == pytest.approx(expected, rel=0.01)


def test_a_declared_structure_has_no_operations():
    params = {"in": jnp.ones((3, 8)), "out": jnp.ones((8, 2))}
    found = structure.declare({"hidden": {"in": 1, "out": 0}}, params)
    cost = structure.cost(found, {"hidden": np.arange(8) < 6})
    assert (cost.params, cost.flops, cost.units) == (30, None, {"hidden": (5.0, None)})


def test_it_prints_as_a_table():
    _, found = made("mlp")
    cost = structure.cost(found)
    first, *lines = str(cost).splitlines()
    assert first.split() == ["group", "params", "flops"]
    assert [line.split()[0] for line in lines if "all" not in line][-2:] == list(
        cost.units
    )


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"nothing": [True]}, "no group 'nothing'"),
        ({"layers_0": [False] * 16}, "removes all 16"),
        ({"layers_0": [1] * 16}, "bool array"),
    ],
)
def test_a_wrong_choice_is_refused(keep, message):
    _, found = made("mlp")
    with pytest.raises(ValueError, match=message):
        structure.cost(found, keep)
