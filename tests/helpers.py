"""What several test files use: precision, small trees, loops of steps, comparisons."""

import os
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

# Precision.


def enable_x64(on: bool = True):
    """Context in which jax computes in float64 (or in float32), in every jax."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(on)
    return jax.experimental.enable_x64(on)


# Trees.


def exact_leaves(dtype, seed):
    """A maker of leaves: shape -> multiples of 1/64 in [-1, 1].

    Every dtype holds these exactly, so that scores that tie for the T-th place tie in
    every program.
    """
    rng = np.random.default_rng(seed)

    def leaf(shape, dtype=dtype):
        return jnp.asarray(rng.integers(-64, 65, shape) / 64, dtype)

    return leaf


def shapes_and_dtypes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


# Loops. Each but `run` is (tx, params, gradients of each step) -> (params, last
# updates, state).


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


def run(tx, gradient, x, steps):
    """The iterates x_0, ..., x_steps under the gradients gradient(x_k)."""
    state = tx.init(x)

    @jax.jit
    def step(x, state):
        updates, state = tx.update(gradient(x), state, x)
        return optax.apply_updates(x, updates), state

    path = [x]
    for _ in range(steps):
        x, state = step(x, state)
        path.append(x)
    return path


# Comparisons.


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


def refused(*parts, error=ValueError):
    """An error whose message has these parts, in this order."""
    pattern = ".*".join(re.escape(str(part)) for part in parts)
    return pytest.raises(error, match=f"(?s){pattern}")


# Other processes.

ROOT = pathlib.Path(__file__).parents[1]


def environment(**variables):
    """That of a shell, and this tree's package where it is not installed.

    Without the devices, options and backend of this test run.
    """
    left_out = "XLA_FLAGS", "PYTEST_ADDOPTS", "MPLBACKEND"
    shell = {k: v for k, v in os.environ.items() if k not in left_out}
    paths = [str(ROOT), *filter(None, [shell.get("PYTHONPATH")])]
    return shell | {"PYTHONPATH": os.pathsep.join(paths)} | variables
