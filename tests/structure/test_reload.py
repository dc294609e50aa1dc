"""The state of an optimizer at smaller sizes, and a process that loads a small model.

    python -m tests.structure.test_reload CHECKPOINT KEEP RESULT --api linen

knows the full model as shapes alone: it traces them, reads which units were kept,
restores the small checkpoint with the optimizer's state, goes on training and writes
what it ends with to RESULT (npz).
"""

import argparse
import functools
import itertools
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import prunadag_optax
from prunadag_optax import structure
from tests.compiling import as_here
from tests.helpers import ROOT, environment, refused
from tests.resumable import assert_same
from tests.structure.models import floats, named

# The state of an optimizer.

SIZES = {
    "embed": {"kernel": (7, 16), "bias": (16,)},
    "hidden": {"kernel": (16, 12), "bias": (12,)},
    "head": {"kernel": (12, 5), "bias": (5,)},
}
X = floats(8, 7)
KEEP = {"embed": np.arange(16) % 3 > 0, "hidden": np.arange(12) < 5}
# Which groups run along the axes of each leaf.
ALONG = {
    "embed/kernel": (None, "embed"),
    "embed/bias": ("embed",),
    "hidden/kernel": ("embed", "hidden"),
    "hidden/bias": ("hidden",),
    "head/kernel": ("hidden", None),
    "head/bias": (None,),
}


def perceptron(params, x):
    for name in ("embed", "hidden"):
        x = jnp.tanh(x @ params[name]["kernel"] + params[name]["bias"][None])
    return x @ params["head"]["kernel"] + params["head"]["bias"][None]


@functools.cache
def start():
    params = jax.tree.map(
        lambda size: floats(*size, seed=sum(size)) / 4,
        SIZES,
        is_leaf=lambda node: isinstance(node, tuple),
    )
    return params, structure.trace(perceptron, params, X)


def is_kernel(params):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def is_vector(params):
    return jax.tree.map(lambda leaf: leaf.ndim == 1, params)


def labels(params):
    return jax.tree.map(lambda leaf: "kernel" if leaf.ndim > 1 else "rest", params)


OPTIMIZERS = {
    "adam": optax.adam(0.01),
    "momentum": optax.sgd(0.01, momentum=0.9),
    "clipped adamw": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.01)),
    "masked": optax.chain(
        optax.masked(optax.adam(0.01), is_kernel),
        # A whole branch is one hole in the state.
        optax.masked(
            optax.scale_by_adam(), {"embed": False, "hidden": True, "head": False}
        ),
        optax.masked(optax.scale(0.01), is_vector),
    ),
    "partition": optax.partition(
        {"kernel": optax.adam(0.01), "rest": optax.sgd(0.01, momentum=0.9)}, labels
    ),
    "several steps": optax.MultiSteps(optax.adam(0.01), 2).gradient_transformation(),
    "prunadag": prunadag_optax.prunadag(0.05, momentum=0.9),
    "pruning-aware, params": prunadag_optax.pruning_aware(
        optax.adam(0.01), 0.5, gradient_at="params"
    ),
    "pruning-aware, pruned": prunadag_optax.pruning_aware(
        optax.adam(0.01), 0.5, gradient_at="pruned"
    ),
    "schedule-free": optax.contrib.schedule_free_adamw(0.01),
    "lookahead": optax.lookahead(optax.adam(0.01), 2, 0.5),
}
FACTORED = optax.adafactor(0.01, min_dim_size_to_factor=4)


def trained(tx, params, steps=3, state=None, apply=perceptron):
    """Parameters and state after some steps of regression on zero."""
    gradient = jax.grad(lambda params: (apply(params, X) ** 2).mean())
    looks = isinstance(params, optax.LookaheadParams)
    state = tx.init(params) if state is None else state

    @jax.jit
    def step(params, state):
        slopes = gradient(params.fast if looks else params)
        updates, state = tx.update(slopes, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def cut(path, leaf):
    """A leaf without the units, by hand."""
    for axis, group in enumerate(ALONG[path]):
        if group is not None:
            leaf = leaf[(slice(None),) * axis + (np.flatnonzero(KEEP[group]),)]
    return leaf


def cut_all(state):
    """The leaves of a state by path, cut where they have the shape of a parameter."""
    leaves = {}
    for path, leaf in named(state).items():
        leaf = np.asarray(leaf)
        for name in ALONG:
            module, kind = name.split("/")
            if path.endswith(name) and leaf.shape == SIZES[module][kind]:
                leaf = cut(name, leaf)
        leaves[path] = leaf
    return leaves


def start_of(name):
    params, found = start()
    if name == "lookahead":
        return found, optax.LookaheadParams(params, params), params
    return found, params, params


def shapes(tree):
    return jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), tree)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_is_sliced_as_the_parameters_are(name):
    tx = OPTIMIZERS[name]
    found, params, _ = start_of(name)
    params, state = trained(tx, params)
    small = structure.shrink(found, KEEP, state, optimizer=tx, params=params)
    if name == "lookahead":
        parts = (structure.shrink(found, KEEP, part) for part in params)
        small_params = optax.LookaheadParams(*parts)
    else:
        small_params = structure.shrink(found, KEEP, params)
    assert shapes(small) == shapes(jax.eval_shape(tx.init, small_params))
    expected = cut_all(state)
    assert_same(named(small), expected)
    smaller = [
        path for path, leaf in named(state).items() if leaf.size > expected[path].size
    ]
    # Some parameter's state: all but the last bias are smaller.
    assert len(smaller) >= 3
    # Training goes on.
    apply = structure.small_apply(found, KEEP)
    after, _ = trained(tx, small_params, 4, small, apply)
    assert shapes(after) == shapes(small_params)
    fast = (
        (small_params.fast, after.fast)
        if name == "lookahead"
        else (small_params, after)
    )
    before, now = (float((apply(p, X) ** 2).mean()) for p in fast)
    assert now < before


@pytest.mark.parametrize("name", ["partition", "several steps"])
def test_of_elementwise_optimizers_the_small_run_is_the_cut_one(name):
    """Removed weights and their gradients do not reach what is left."""
    tx = OPTIMIZERS[name]
    params, found = start()
    # Units that are masked get no gradient and give none.
    params = structure.masked(found, KEEP, params)
    full = trained(tx, params)
    small = structure.shrink(found, KEEP, params)
    apply = structure.small_apply(found, KEEP)
    small_params, small_state = trained(tx, small, apply=apply)
    cut_state = structure.shrink(found, KEEP, full[1], optimizer=tx, params=params)
    cut_params = structure.shrink(found, KEEP, full[0])
    for one, other in ((small_params, cut_params), (small_state, cut_state)):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
            one,
            other,
        )


def test_factored_moments_start_anew_if_asked():
    params, found = start()
    params, state = trained(FACTORED, params)
    shrink = functools.partial(
        structure.shrink, found, KEEP, state, optimizer=FACTORED, params=params
    )
    with refused("optimizer's state", "v_row", "reinitialise=True"):
        shrink()
    small = shrink(reinitialise=True)
    small_params = structure.shrink(found, KEEP, params)
    fresh = FACTORED.init(small_params)
    assert shapes(small) == shapes(fresh)
    # The factored state is new as a whole, its count too: a late decay does not fit new
    # averages.
    assert any("v_row" in path for path in named(small))
    for path, leaf in named(small).items():
        assert_same(leaf, named(fresh)[path])
    after, _ = trained(
        FACTORED, small_params, 2, small, structure.small_apply(found, KEEP)
    )
    assert shapes(after) == shapes(small_params)


def test_a_state_of_shapes_becomes_smaller_shapes():
    params, found = start()
    tx = OPTIMIZERS["clipped adamw"]
    structs = jax.eval_shape(lambda: params)
    state = jax.eval_shape(tx.init, structs)
    small = structure.shrink(found, KEEP, state, optimizer=tx, params=structs)
    assert small == jax.eval_shape(tx.init, structure.shrink(found, KEEP, structs))


def test_a_path_that_ends_as_another_is_its_own():
    params = {"kernel": jnp.ones((3, 8)), "next": {"kernel": jnp.ones((8, 2))}}
    axes = {"kernel": 1, "next/kernel": 0}
    found = structure.declare({"hidden": axes}, params)
    keep, tx = {"hidden": np.arange(8) < 5}, optax.adam(0.01)
    small = structure.shrink(found, keep, tx.init(params), optimizer=tx, params=params)
    expected = jax.eval_shape(tx.init, structure.shrink(found, keep, params))
    assert shapes(small) == shapes(expected)


def test_an_optimizer_needs_its_parameters():
    params, found = start()
    tx = OPTIMIZERS["adam"]
    with refused("params must be given with optimizer"):
        structure.shrink(found, KEEP, tx.init(params), optimizer=tx)
    with refused("none of the structure's", "optimizer= and params="):
        structure.shrink(found, KEEP, {"mu": {"other": jnp.ones(16)}})


# Another process.

TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.01))
LINEN = nn.Sequential([nn.Dense(96), nn.tanh, nn.Dense(80), nn.tanh, nn.Dense(5)])
LARGEST = 96 * 80
BEFORE, AFTER = 3, 4


def net():
    rngs = nnx.Rngs(0)
    first, second, last = (
        nnx.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise([7, 96, 80, 5])
    )
    return nnx.Sequential(first, nnx.tanh, second, nnx.tanh, last)


def linen_parts(is_shapes):
    init = jax.eval_shape if is_shapes else lambda f, *args: f(*args)
    return LINEN.apply, init(LINEN.init, jax.random.key(0), X)


def nnx_parts(is_shapes):
    model = nnx.eval_shape(net) if is_shapes else net()
    graphdef, variables = nnx.split(model, nnx.Param)
    return lambda variables, x: nnx.merge(graphdef, variables)(x), variables


PARTS = {"linen": linen_parts, "nnx": nnx_parts}


def goes_on(apply, variables, state, steps):
    @jax.jit
    def step(variables, state):
        slopes = jax.grad(lambda v: (apply(v, X) ** 2).mean())(variables)
        updates, state = TX.update(slopes, state, variables)
        return optax.apply_updates(variables, updates), state

    for _ in range(steps):
        variables, state = step(variables, state)
    return variables, state


def by_keys(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


@pytest.mark.parametrize("api", PARTS)
def test_another_process_loads_the_small_model_and_trains_on(tmp_path, api):
    checkpoint, chosen, result = (
        tmp_path / n for n in ("small", "keep.json", "end.npz")
    )
    apply, variables = PARTS[api](is_shapes=False)
    found = structure.trace(apply, variables, X)
    assert sorted(group.size for group in found.groups) == [80, 96]
    variables, state = goes_on(apply, variables, TX.init(variables), BEFORE)
    scores = structure.scores(found, variables)
    keep = structure.select(found, scores, budget={"params": 0.3})
    small = structure.shrink(found, keep, variables)
    state = structure.shrink(found, keep, state, optimizer=TX, params=variables)
    structure.save_keep(chosen, found, keep)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(checkpoint, (small, state))
    expected = goes_on(structure.small_apply(found, keep), small, state, AFTER)
    module = "tests.structure.test_reload"
    done = subprocess.run(
        [sys.executable, "-m", module, checkpoint, chosen, result, "--api", api],
        cwd=ROOT,
        env=environment(**as_here()),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    # The full weights were never there.
    largest = max(leaf.size for leaf in jax.tree.leaves(small))
    assert int(done.stdout.split()[-1]) == largest < LARGEST / 2
    with np.load(result) as actual:
        assert_same(dict(actual), by_keys(expected))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("checkpoint", "keep", "result"):
        parser.add_argument(name)
    parser.add_argument("--api", choices=PARTS, default="linen")
    args = parser.parse_args()
    sizes = [0]
    apply, variables = PARTS[args.api](is_shapes=True)
    found = structure.trace(apply, variables, X)
    keep = structure.load_keep(args.keep, found)
    small = structure.shrink(found, keep, variables)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(small))
    template = small, jax.eval_shape(TX.init, small)
    with ocp.StandardCheckpointer() as checkpointer:
        small, state = checkpointer.restore(args.checkpoint, template)
    sizes += [array.size for array in jax.live_arrays()]
    end = goes_on(structure.small_apply(found, keep), small, state, AFTER)
    sizes += [array.size for array in jax.live_arrays()]
    np.savez(args.result, **by_keys(end))
    print(max(sizes))


if __name__ == "__main__":
    main()
