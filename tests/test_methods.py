"""`pruning_aware` and the methods: in every way to run them, and with bad input.

One table of methods (`tests/sweep.py`) goes through the tests that prunAdag goes
through. What a method computes is tested in the file of its module; here it only has to
be the same in every way to run it, on every kind of tree and in every dtype. Most of a
cell's time is the compilation of one program, so the quick part puts several wrappers
around a method at once; the product of all is slow.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prunadag_optax._common.checks import NO_PARAMS_MSG
from tests.sweep import (
    DTYPES,
    METHODS,
    QUICK,
    TOGETHER,
    TRANSFORMS,
    TREES,
    example,
    make_tree,
    sweep,
)


def diagonal():
    """Each method in each of these, with trees and dtypes taking turns."""
    trees = [tree for tree in TREES if tree != "empty"]
    for i, method in enumerate(QUICK):
        for j, name in enumerate(TOGETHER):
            tree, dtype = trees[(i + 4 * j) % len(trees)], DTYPES[(i + i // 4 + j) % 4]
            # What optax cannot do; see `test_sweep_of_methods`.
            if "inject" in name and tree == "mixed dtypes":
                tree = "dict"
            yield method, name, tree, dtype


@pytest.mark.parametrize(("method", "name", "tree", "dtype"), list(diagonal()))
def test_diagonal_of_methods(method, name, tree, dtype):
    sweep(METHODS[method], TOGETHER[name], tree, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TRANSFORMS | TOGETHER)
@pytest.mark.parametrize("method", METHODS)
def test_sweep_of_methods(method, name, dtype):
    for tree in TREES:
        if "inject" in name and tree == "mixed dtypes":
            # optax knows no highest dtype of float16 and bfloat16, and its momenta
            # widen to the dtype of the injected numbers.
            continue
        sweep(METHODS[method], (TRANSFORMS | TOGETHER)[name], tree, dtype)


# Citizens of optax.

each_method = pytest.mark.parametrize("method", METHODS)


@each_method
def test_the_state_shares_no_buffer(method):
    # Donated with the parameters, it may hold nothing twice, and nothing of theirs.
    make, settings, *_ = METHODS[method]
    params = make_tree("dict", "float32", 0)
    state = optax.inject_hyperparams(make)(**settings).init(params)
    buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((params, state))]
    assert len(set(buffers)) == len(buffers)


@pytest.mark.parametrize("method", QUICK)
def test_nan_gradients_flow_and_extra_arguments_do_nothing(method):
    tx, params, gradients = example(method)
    state = tx.init(params)
    jax.tree.map(
        np.testing.assert_array_equal,
        tx.update(gradients, state, params, value=1.0, grad=params, anything="else"),
        tx.update(gradients, state, params),
    )
    # Of the ticket, and of a sparse training, a weight that is kept.
    bad = {**gradients, "kernel": gradients["kernel"].at[2, 2].set(jnp.nan)}
    updates, after = tx.update(bad, state, params)
    assert jnp.isnan(updates["kernel"][2, 2])
    # A step later the parameter is NaN, if nothing else.
    params = optax.apply_updates(params, updates)
    updates, _ = tx.update(gradients, after, params)
    assert jnp.isnan(optax.apply_updates(params, updates)["kernel"][2, 2])


@each_method
def test_what_is_refused(method):
    tx, params, gradients = example(method)
    with pytest.raises(ValueError, match=re.escape(NO_PARAMS_MSG)):
        tx.update(gradients, tx.init(params))
    if method == "lottery ticket":
        return  # takes what its base takes
    bad = {**params, "kernel": params["kernel"] + 1j}
    with pytest.raises(ValueError, match=r"params\['kernel'\] has dtype complex64"):
        tx.init(bad)
    with pytest.raises(ValueError, match=r"params\['kernel'\] has dtype complex64"):
        tx.update(gradients, tx.init(params), bad)
    with pytest.raises(ValueError, match=r"updates\['kernel'\] has dtype complex64"):
        tx.update(bad, tx.init(params), params)
