"""Every transformation of JAX and optax, on every kind of tree, in every dtype.

The sweep holds each way of running prunAdag to the plain eager loop: the same
parameters, updates and state, dtypes that stay, and one compilation. What one test can
say about the transformation as a citizen of optax, of sharded programs and of Flax
follows it.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from prunadag_optax import ScaleByPrunadagState, masks, prunadag, scale_by_prunadag

if hasattr(jax, "enable_x64"):
    enable_x64 = jax.enable_x64
else:
    from jax.experimental import enable_x64
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
    state = jax.jit(tx.init)(params)
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


def vmapped(tx, params, gradients):
    """The second member of an ensemble whose first has other parameters."""

    def ensemble(tree):
        return jax.tree.map(lambda x: jnp.stack([x / 2, x]), tree)

    batched = optax.GradientTransformation(
        jax.vmap(tx.init, axis_size=2), jax.vmap(tx.update, axis_size=2)
    )
    result = jitted(batched, ensemble(params), [ensemble(g) for g in gradients])
    return jax.tree.map(lambda leaf: leaf[1], result)


@dataclasses.dataclass(frozen=True)
class Transform:
    """A way to run or wrap prunAdag and what it is then to equal.

    Attributes:
      run: one of the functions above.
      wrap: from a factory like `prunadag` to the transformation to run.
      part: the part of a tree (of parameters or gradients) that prunAdag gets to see.
      seen: the gradient that it gets to see.
      repeats: how often each gradient is given.
    """

    run: Callable[..., Any] = jitted
    wrap: Callable[..., Any] = lambda make: make(**SETTINGS)
    part: Callable[[Any], Any] = lambda tree: tree
    seen: Callable[[Any], Any] = lambda gradient: gradient
    repeats: int = 1


def chosen(tree):
    """A tree of bool like `tree`: False for its first leaf, if it has more than one."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef.unflatten([len(leaves) == 1, *[True] * len(leaves)][: len(leaves)])


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
        wrap=lambda make: optax.chain(optax.clip(0.5), make(**SETTINGS)), seen=clipped
    ),
    "masked": Transform(
        wrap=lambda make: optax.masked(make(**SETTINGS), chosen), part=part
    ),
    "partition": Transform(
        wrap=lambda make: optax.partition(
            {True: make(**SETTINGS), False: optax.sgd(0.125)}, chosen
        ),
        part=part,
    ),
    "MultiSteps": Transform(
        wrap=lambda make: optax.MultiSteps(
            make(**SETTINGS), 2
        ).gradient_transformation(),
        repeats=2,
    ),
    "inject_hyperparams": Transform(
        wrap=lambda make: optax.inject_hyperparams(make)(**SETTINGS)
    ),
    "apply_if_finite": Transform(
        wrap=lambda make: optax.apply_if_finite(make(**SETTINGS), 1)
    ),
}

# From a maker of leaves (shape, dtype=that of the test) to a tree.
TREES = {
    "array": lambda leaf: leaf((4, 3)),
    "dict": lambda leaf: {"bias": leaf((3,)), "kernel": leaf((4, 3))},
    "list": lambda leaf: [leaf((2, 3)), leaf((5,))],
    "FrozenDict": lambda leaf: FrozenDict({"a": {"w": leaf((4,))}, "b": leaf((2, 2))}),
    "None leaves": lambda leaf: {"a": leaf((2,)), "b": None, "c": [leaf((4,)), None]},
    "empty": lambda leaf: {},
    "scalars": lambda leaf: [leaf(()), leaf(()), leaf(())],
    "zero-size leaf": lambda leaf: {"a": leaf((4,)), "b": leaf((0, 3))},
    "mixed dtypes": lambda leaf: [
        leaf((4, 3)),
        leaf((3,), "bfloat16"),
        leaf((5,), "float32"),
    ],
}


def make_tree(name, dtype, seed):
    # Multiples of 1/64 in [-1, 1] are exact in every dtype, so that gradients that tie
    # for the T-th place tie in every program.
    rng = np.random.default_rng(seed)

    def leaf(shape, dtype=dtype):
        return jnp.asarray(rng.integers(-64, 65, shape) / 64, dtype)

    return TREES[name](leaf)


def own_state(state):
    def is_own(node):
        return isinstance(node, ScaleByPrunadagState)

    (own,) = filter(is_own, jax.tree.leaves(state, is_leaf=is_own))
    return own


def shapes_and_dtypes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def assert_close(actual, expected):
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    for x, y in zip(actual, expected, strict=True):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        eps = 0 if x.dtype == jnp.int32 else 2 * float(jnp.finfo(x.dtype).eps)
        np.testing.assert_allclose(
            np.asarray(x, "float64"), np.asarray(y, "float64"), rtol=eps, atol=eps
        )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_sweep(name, tree, dtype):
    transform = TRANSFORMS[name]
    with enable_x64(dtype == "float64"):
        params, *gradients = (make_tree(tree, dtype, seed) for seed in range(1 + STEPS))
        fed = [g for g in gradients for _ in range(transform.repeats)]
        tx = transform.wrap(prunadag)
        moved, updates, state = transform.run(tx, params, fed)
        expected = eager(
            prunadag(**SETTINGS),
            transform.part(params),
            [transform.part(transform.seen(g)) for g in gradients],
        )
        for changed in (moved, updates):
            assert shapes_and_dtypes(changed) == shapes_and_dtypes(params)
            assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(changed))
        assert shapes_and_dtypes(state) == shapes_and_dtypes(
            jax.eval_shape(tx.init, params)
        )
        assert_close(transform.part(moved), expected[0])
        assert_close(transform.part(updates), expected[1])
        assert_close(own_state(state), own_state(expected[2]))
