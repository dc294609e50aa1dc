"""Every transformation of JAX and optax, on every kind of tree, in every dtype.

The sweep holds each way of running prunAdag to the plain eager loop: the same
parameters, updates and state, dtypes that stay, and one compilation. What one test can
say about the transformation as a citizen of optax and of sharded programs follows it.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from prunadag_optax import ScaleByPrunadagState, masks, prunadag, scale_by_prunadag
from prunadag_optax._common.checks import NO_PARAMS_MSG
from tests.precision import enable_x64

FrozenDict = pytest.importorskip("flax.core").FrozenDict

set_mesh = jax.set_mesh if hasattr(jax, "set_mesh") else jax.sharding.use_mesh
needs_devices = pytest.mark.skipif(
    jax.device_count() < 8, reason="needs eight devices, see conftest.py"
)

# Numbers that every dtype holds exactly, so that inject_hyperparams, which casts them
# to the dtype of the parameters, changes nothing.
SETTINGS = {
    "learning_rate": 0.125,
    "relevant": 0.25,
    "initial_weight": 0.0625,
    "momentum": 0.5,
}
STEPS = 3


class Method(NamedTuple):
    """A transformation of the sweep, as `inject_hyperparams` takes it.

    Attributes:
      make: the factory.
      settings: its arguments.
      state: the type of the part of the state that is compared.
      units: how many units in the last place another order of sums may make.
    """

    make: Callable[..., Any]
    settings: dict[str, Any]
    state: type
    units: int = 2


PRUNADAG = Method(prunadag, SETTINGS, ScaleByPrunadagState)


# Ways to run: (tx, params, gradients of each step) -> (params, last updates, state).


def eager(tx, params, gradients):
    state = tx.init(params)
    for gradient in gradients:
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params, updates, state


def jitted(tx, params, gradients, **options):
    traces = []

    def step(state, params, gradient):
        traces.append(None)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), updates, state

    step = jax.jit(step, **options)
    state = tx.init(params)
    for gradient in gradients:
        params, updates, state = step(state, params, gradient)
    assert len(traces) == step._cache_size() == 1, "recompiled on a later call"
    return params, updates, state


def donated(tx, params, gradients):
    mine = jax.tree.map(jnp.copy, params)
    result = jitted(tx, mine, gradients, donate_argnums=(0, 1))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(mine) if leaf.size)
    return result


def scanned(tx, params, gradients):
    def step(carry, gradient):
        params, state, _ = carry
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state, updates), None

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *gradients)
    start = params, tx.init(params), jax.tree.map(jnp.zeros_like, params)
    (params, state, updates), _ = jax.lax.scan(step, start, stacked, len(gradients))
    return params, updates, state


def vmapped(tx, params, gradients, run=jitted):
    """The second member of an ensemble whose first has other parameters."""

    def ensemble(tree):
        return jax.tree.map(lambda x: jnp.stack([x / 2, x]), tree)

    batched = optax.GradientTransformation(
        jax.vmap(tx.init, axis_size=2), jax.vmap(tx.update, axis_size=2)
    )
    result = run(batched, ensemble(params), [ensemble(g) for g in gradients])
    return jax.tree.map(lambda leaf: leaf[1], result)


@dataclasses.dataclass(frozen=True)
class Transform:
    """A way to run or wrap a method and what it is then to equal.

    Attributes:
      run: one of the functions above.
      wrap: from a factory like `prunadag` and its arguments to the transformation to
        run.
      part: the part of a tree (of parameters or gradients) that the method gets to see.
      seen: the gradient that it gets to see.
      repeats: how often each gradient is given.
    """

    run: Callable[..., Any] = jitted
    wrap: Callable[..., Any] = lambda make, settings: make(**settings)
    part: Callable[[Any], Any] = lambda tree: tree
    seen: Callable[[Any], Any] = lambda gradient: gradient
    repeats: int = 1


def chosen(tree):
    """A tree of bool like `tree`: False for its first leaf, if it has more than one."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef.unflatten([i > 0 or len(leaves) == 1 for i in range(len(leaves))])


def part(tree):
    return jax.tree.map(lambda x, keep: x if keep else None, tree, chosen(tree))


def clipped(gradient):
    return jax.tree.map(lambda g: jnp.clip(g, -0.5, 0.5), gradient)


TRANSFORMS = {
    "jit": Transform(),
    "vmap": Transform(run=vmapped),
    "scan": Transform(run=scanned),
    "donation": Transform(run=donated),
    "chain": Transform(
        wrap=lambda make, settings: optax.chain(optax.clip(0.5), make(**settings)),
        seen=clipped,
    ),
    "masked": Transform(
        wrap=lambda make, settings: optax.masked(make(**settings), chosen), part=part
    ),
    "partition": Transform(
        wrap=lambda make, settings: optax.partition(
            {True: make(**settings), False: optax.sgd(0.125)}, chosen
        ),
        part=part,
    ),
    "MultiSteps": Transform(
        wrap=lambda make, settings: optax.MultiSteps(
            make(**settings), 2
        ).gradient_transformation(),
        repeats=2,
    ),
    "inject_hyperparams": Transform(
        wrap=lambda make, settings: optax.inject_hyperparams(make)(**settings)
    ),
    "apply_if_finite": Transform(
        wrap=lambda make, settings: optax.apply_if_finite(make(**settings), 1)
    ),
}

# From a maker of leaves (shape, dtype=that of the test) to a tree. Few shapes, so that
# the eager loops compile few operations.
TREES = {
    "array": lambda leaf: leaf((4, 3)),
    "dict": lambda leaf: {"bias": leaf((3,)), "kernel": leaf((4, 3))},
    "zero-size leaf": lambda leaf: {"a": leaf((3,)), "b": leaf((0, 3))},
    "mixed dtypes": lambda leaf: [
        leaf((4, 3)),
        leaf((3,), "bfloat16"),
        leaf((3,), "float32"),
    ],
    "scalars": lambda leaf: [leaf(()), leaf(()), leaf(())],
    "list": lambda leaf: [leaf((4, 3)), leaf((3,))],
    "FrozenDict": lambda leaf: FrozenDict({"a": {"w": leaf((3,))}, "b": leaf((4, 3))}),
    "None leaves": lambda leaf: {"a": leaf((3,)), "b": None, "c": [leaf((4, 3)), None]},
    "empty": lambda leaf: {},
}


def make_tree(name, dtype, seed):
    # Multiples of 1/64 in [-1, 1] are exact in every dtype, so that gradients that tie
    # for the T-th place tie in every program.
    rng = np.random.default_rng(seed)

    def leaf(shape, dtype=dtype):
        return jnp.asarray(rng.integers(-64, 65, shape) / 64, dtype)

    return TREES[name](leaf)


def own_state(state, kind=ScaleByPrunadagState):
    def is_own(node):
        return isinstance(node, kind)

    (own,) = filter(is_own, jax.tree.leaves(state, is_leaf=is_own))
    return own


def shapes_and_dtypes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def assert_close(actual, expected, units=2):
    """Leaves equal up to so many units in the last place of numbers near 1.

    A compiled program may contract w * w + g * g into one rounding and sum norms in
    another order, in at least float32; a float64 leaf next to float32 leaves shares
    their norms.
    """
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    assert shapes_and_dtypes(actual) == shapes_and_dtypes(expected)
    floats = [x.dtype for x in expected if jnp.issubdtype(x.dtype, jnp.floating)]
    widened = [jnp.promote_types(dtype, jnp.float32) for dtype in floats]
    shared = max((float(jnp.finfo(dtype).eps) for dtype in widened), default=0.0)
    for x, y in zip(actual, expected, strict=True):
        exact = not jnp.issubdtype(x.dtype, jnp.floating)
        tolerance = 0 if exact else units * max(float(jnp.finfo(x.dtype).eps), shared)
        x, y = np.asarray(x, "float64"), np.asarray(y, "float64")
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def rare(tree, dtype):
    """Half and double precision on more than an array: "mixed dtypes" has bfloat16."""
    return dtype != "float32" and tree != next(iter(TREES))


CELLS = [
    pytest.param(name, tree, dtype, marks=pytest.mark.slow if rare(tree, dtype) else ())
    for name, tree, dtype in itertools.product(
        TRANSFORMS, TREES, ["float16", "bfloat16", "float32", "float64"]
    )
]


@pytest.mark.parametrize(("name", "tree", "dtype"), CELLS)
def test_sweep(name, tree, dtype):
    if (name, tree, dtype) == ("inject_hyperparams", "mixed dtypes", "float16"):
        pytest.skip("optax knows no highest dtype of float16 and bfloat16")
    sweep(PRUNADAG, TRANSFORMS[name], tree, dtype)


def sweep(method, transform, tree, dtype):
    """Holds one way to run a method on one tree in one dtype to the eager loop."""
    with enable_x64(dtype == "float64"):
        params, *gradients = (make_tree(tree, dtype, seed) for seed in range(1 + STEPS))
        fed = [g for g in gradients for _ in range(transform.repeats)]
        tx = transform.wrap(method.make, method.settings)
        moved, updates, state = transform.run(tx, params, fed)
        expected = eager(
            method.make(**method.settings),
            transform.part(params),
            [transform.part(transform.seen(g)) for g in gradients],
        )
        for changed in (moved, updates):
            assert shapes_and_dtypes(changed) == shapes_and_dtypes(params)
            assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(changed))
        assert shapes_and_dtypes(state) == shapes_and_dtypes(
            jax.eval_shape(tx.init, params)
        )
        assert_close(transform.part(moved), expected[0], method.units)
        assert_close(transform.part(updates), expected[1], method.units)
        own, own_expected = (own_state(s, method.state) for s in (state, expected[2]))
        assert_close(own, own_expected, method.units)


# A citizen of optax.


def test_unknown_extra_arguments_are_ignored():
    tx = prunadag()
    params = jnp.array([1.0, -2.0, 3.0])
    state = tx.init(params)
    jax.tree.map(
        np.testing.assert_array_equal,
        tx.update(params, state, params, value=1.0, grad=params, anything="else"),
        tx.update(params, state, params),
    )


def test_update_needs_params():
    tx = prunadag()
    params = jnp.ones(3)
    with pytest.raises(ValueError, match=re.escape(NO_PARAMS_MSG)):
        tx.update(params, tx.init(params))


@pytest.mark.parametrize("momentum", [None, 0.9])
@pytest.mark.parametrize("scope", ["global", "leaf"])
def test_state_is_scalars_and_the_accumulators(momentum, scope):
    params = make_tree("dict", "float32", 0)
    tx = scale_by_prunadag(momentum=momentum, scope=scope)
    state = tx.init(params)
    average = None if momentum is None else jax.tree.map(jnp.zeros_like, params)
    weight = jax.tree.map(lambda x: jnp.full_like(x, 0.01), params)
    threshold = jnp.zeros(() if scope == "global" else len(jax.tree.leaves(params)))
    expected = ScaleByPrunadagState(
        jnp.zeros((), jnp.int32), weight, weight, average, threshold
    )
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    # No step adds to it.
    _, after = tx.update(params, state, params)
    assert shapes_and_dtypes(after) == shapes_and_dtypes(state)


def test_map_params_reaches_the_accumulators_and_not_the_scalars():
    tx = scale_by_prunadag(momentum=0.9)
    names = {"bias": "b", "kernel": "k"}
    state = optax.tree.map_params(
        tx,
        lambda _, name: name,
        tx.init(make_tree("dict", "float32", 0)),
        names,
        transform_non_params=lambda _: "scalar",
    )
    assert state == ScaleByPrunadagState("scalar", names, names, names, "scalar")


def equations(jaxpr):
    """Every equation of a jaxpr and of those within it."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(equation.params):
            inner = getattr(value, "jaxpr", value)  # a closed jaxpr holds an open one
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def large_primitives(function, *args):
    """The names of the primitives that read or write 100 numbers or more."""
    return {
        equation.primitive.name
        for equation in equations(jax.make_jaxpr(function)(*args).jaxpr)
        if any(v.aval.size >= 100 for v in (*equation.invars, *equation.outvars))
    }


REORDERING = {"sort", "top_k", "approx_top_k", "concatenate", "gather", "scatter"}


@pytest.mark.parametrize("scope", ["global", "leaf"])
@pytest.mark.parametrize("relevance", ["gradient", "magnitude", "taylor"])
@pytest.mark.parametrize("variant", ["v1", "v4", "relevant_only"])
def test_update_moves_no_parameter(variant, relevance, scope):
    tx = prunadag(variant=variant, relevance=relevance, scope=scope, momentum=0.9)
    params = {"kernel": jnp.ones((20, 10)), "bias": jnp.ones(100)}
    primitives = large_primitives(tx.update, params, tx.init(params), params)
    assert "reduce_sum" in primitives  # the counts, inside a jit
    assert not primitives & REORDERING


def test_magnitude_mask_moves_no_parameter():
    params = {"kernel": jnp.ones((20, 10)), "bias": jnp.ones(100)}
    primitives = large_primitives(lambda p: masks.magnitude_mask(p, 0.5), params)
    assert "reduce_sum" in primitives
    assert not primitives & REORDERING


def test_large_primitives_finds_what_is_hidden():
    def hidden(x):
        return jax.lax.fori_loop(0, 2, lambda i, y: jax.jit(jnp.sort)(y), x)

    assert "sort" in large_primitives(jax.jit(hidden), jnp.ones(100))
    assert "sort" not in large_primitives(jax.jit(hidden), jnp.ones(99))


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_apply_if_finite_skips_the_step(bad):
    tx = optax.apply_if_finite(prunadag(0.1, relevant=1), max_consecutive_errors=2)
    params = jnp.array([1.0, -2.0, 3.0])
    _, state = tx.update(params, tx.init(params), params)
    updates, skipped = tx.update(params.at[1].set(bad), state, params)
    np.testing.assert_array_equal(updates, 0)
    jax.tree.map(np.testing.assert_array_equal, skipped.inner_state, state.inner_state)
    updates, _ = tx.update(params, skipped, params)
    expected, _ = prunadag(0.1, relevant=1).update(params, state.inner_state, params)
    np.testing.assert_array_equal(updates, expected)


@pytest.mark.parametrize(
    ("variant", "scope", "reached"),
    [
        # No norm in the bounds: the component itself.
        ("v2", "global", [True, False, False, False]),
        ("v4", "global", [True, False, False, False]),
        # ||g||_R: every component that decreases, so not the one whose x and g differ
        # in sign, and none in another leaf with norms of its own.
        ("v1", "global", [True, True, False, True]),
        ("v3", "global", [True, True, False, True]),
        ("relevant_only", "global", [True, True, False, True]),
        ("v3", "leaf", [True, True, False, False]),
    ],
)
def test_a_nan_gradient_flows(variant, scope, reached):
    tx = prunadag(relevant=1, variant=variant, scope=scope)
    params = [jnp.array([1.0, 1.0, -1.0]), jnp.array([1.0])]
    gradients = [jnp.array([jnp.nan, 0.001, 0.001]), jnp.array([0.001])]
    updates, _ = tx.update(gradients, tx.init(params), params)
    assert jnp.isnan(jnp.concatenate(updates)).tolist() == reached


# Sharded programs.

SPECS = {"bias": P("y"), "kernel": P("x", "y"), "wide": P(None, ("x", "y"))}


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=str)
def mesh(request):
    # The context puts the count on the mesh too; without it the second call of any
    # optimizer of optax recompiles for a count that moved there.
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=2 * (request.param,))
    with set_mesh(mesh):
        yield mesh


def sharded(mesh, tree):
    shardings = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    return jax.device_put(tree, shardings)


def large_tree(seed):
    rng = np.random.default_rng(seed)
    shapes = {"bias": (6,), "kernel": (8, 4), "wide": (3, 16)}
    # Few values, so that there are ties within and across devices.
    return {
        name: jnp.asarray(rng.integers(-8, 9, shape) / 8, jnp.float32)
        for name, shape in shapes.items()
    }


def assert_sharded_like(tree, like):
    def check(x, y):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)

    jax.tree.map(check, tree, like)


@needs_devices
@pytest.mark.parametrize(
    "run", [pytest.param(eager, marks=pytest.mark.slow), jitted, donated]
)
@pytest.mark.parametrize("scope", ["global", "leaf"])
def test_sharded_equals_unsharded(mesh, scope, run):
    tx = prunadag(**SETTINGS, scope=scope)
    whole = [large_tree(seed) for seed in range(1 + STEPS)]
    params, *gradients = (sharded(mesh, tree) for tree in whole)
    moved, updates, state = run(tx, params, gradients)
    own = own_state(state)
    accumulators = own.optimisable_weight, own.decreasable_weight, own.gradient_average
    for tree in (moved, updates, *accumulators):
        assert_sharded_like(tree, params)
    assert_close((moved, updates, state), eager(tx, whole[0], whole[1:]))


@needs_devices
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("scope", ["global", "leaf"])
def test_magnitude_mask_of_sharded_leaves(mesh, scope, sparsity):
    params = sharded(mesh, large_tree(0))
    mask = masks.magnitude_mask(params, sparsity, scope=scope)
    assert_sharded_like(mask, params)
    expected = masks.magnitude_mask(large_tree(0), sparsity, scope=scope)
    jax.tree.map(np.testing.assert_array_equal, mask, expected)
