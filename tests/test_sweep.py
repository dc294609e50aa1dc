"""prunAdag in every way to run it, on every kind of tree, in every dtype.

The sweep (`tests/sweep.py`) holds each way of running prunAdag to the plain eager loop.
What one test can say about the transformation as a citizen of optax follows it.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prunadag_optax import ScaleByPrunadagState, masks, prunadag, scale_by_prunadag
from prunadag_optax._common.checks import NO_PARAMS_MSG
from tests.helpers import shapes_and_dtypes
from tests.sweep import DTYPES, PRUNADAG, TRANSFORMS, TREES, make_tree, sweep


def cells():
    """Every transform on every tree; the dtypes take turns, the rest is slow.

    Every transform and every tree thus meets every dtype.
    """
    for i, name in enumerate(TRANSFORMS):
        for j, tree in enumerate(TREES):
            for k, dtype in enumerate(DTYPES):
                if (name, tree, dtype) == (
                    "inject_hyperparams",
                    "mixed dtypes",
                    "float16",
                ):
                    continue  # optax knows no highest dtype of float16 and bfloat16
                quick = (i + j) % len(DTYPES) == k
                marks = () if quick else pytest.mark.slow
                yield pytest.param(name, tree, dtype, marks=marks)


@pytest.mark.parametrize(("name", "tree", "dtype"), list(cells()))
def test_sweep(name, tree, dtype):
    sweep(PRUNADAG, TRANSFORMS[name], tree, dtype)


def test_quick_cells_meet_every_pair():
    quick = [cell.values for cell in cells() if not cell.marks]
    for axes, (first, second) in {
        (0, 1): (TRANSFORMS, TREES),
        (0, 2): (TRANSFORMS, DTYPES),
        (1, 2): (TREES, DTYPES),
    }.items():
        met = {tuple(cell[axis] for axis in axes) for cell in quick}
        assert met == {(a, b) for a in first for b in second}


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
