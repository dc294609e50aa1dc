"""Integers in the order of the magnitudes.

For non-negative floats the order of the values is the order of their bit patterns read
as integers. Compared as integers, subnormal numbers are told apart too, which XLA's CPU
backend compares as zeros when they are floats.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from prunadag_optax._common.dtypes import SIGNED, widen, widest


def key_of(x: jax.Array, dtype: Any) -> jax.Array:
    """The bit pattern of `|x|` in a float dtype that holds it, as a signed integer."""
    # Signed: vector units compare signed integers, and often no others.
    signed = SIGNED[jnp.dtype(dtype).itemsize]
    without_sign = signed(np.iinfo(signed).max)
    return lax.bitcast_convert_type(widen(x, dtype), signed) & without_sign


def magnitude_keys(tree: Any) -> list[jax.Array]:
    """Integers in the order of the magnitudes, one array a leaf.

    The key of `x` is the bit pattern of `|x|` in the widest dtype of the tree, so
    keys of different leaves compare as their magnitudes do. Infinity comes above
    every finite number and NaN above infinity.

    Args:
      tree: pytree of real floating arrays, any shapes and dtypes.

    Returns:
      The keys, integers >= 0 in the order of `jax.tree.leaves(tree)`, each with its
      leaf's shape.

    Raises:
      ValueError: if a leaf is not float16, bfloat16, float32 or float64.
    """
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    if not leaves:
        return []
    dtype = widest(leaves)
    return [key_of(leaf, dtype) for leaf in leaves]


def magnitude_to_key(magnitude: jax.Array, tree: Any) -> jax.Array:
    """The key that a magnitude would have among those of a tree."""
    dtype = widest(tree)
    return key_of(jnp.asarray(magnitude).astype(dtype), dtype)


def key_to_magnitude(key: jax.Array, tree: Any) -> jax.Array:
    """The magnitude of a key among those of a tree, in the tree's widest dtype."""
    return lax.bitcast_convert_type(jnp.maximum(key, 0), widest(tree))
