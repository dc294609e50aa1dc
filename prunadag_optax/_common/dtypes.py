"""The dtypes that are taken, and the precision in which the package computes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

FLOAT_DTYPES = ("float16", "bfloat16", "float32", "float64")
# The integers that hold the bits of a float, by its size in bytes.
SIGNED = {2: jnp.int16, 4: jnp.int32, 8: jnp.int64}
UNSIGNED = {2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}


def working(x: jax.Array) -> jax.Array:
    """`x` in the precision to compute in: its own, but at least float32.

    Squares of half-precision numbers overflow (float16) or lose what they add
    (bfloat16) long before the numbers themselves do. Under jit the conversion is
    fused into the loop that reads `x` and costs no memory traffic.

    Args:
      x: array of a real floating dtype, any shape.

    Returns:
      `x` as float32 if its dtype is narrower, else `x`.
    """
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def cast_like(tree: Any, like: Any) -> Any:
    """A tree in the dtypes of another, such as updates in those of the parameters.

    Args:
      tree: pytree of arrays.
      like: pytree of the same structure, of arrays or numbers.

    Returns:
      Pytree like `tree`.
    """
    return jax.tree.map(lambda x, y: x.astype(jnp.result_type(y)), tree, like)


def value_at(schedule: Any, count: jax.typing.ArrayLike) -> Any:
    """The value of a schedule in a step, or of a constant in any.

    Args:
      schedule: a function count -> value, or the value.
      count: of the steps done before.

    Returns:
      The value.
    """
    return schedule(count) if callable(schedule) else schedule


def widest(tree: Any) -> Any:
    """The dtype that holds every value of the leaves of a tree.

    Args:
      tree: pytree of real floating arrays, at least one.

    Returns:
      The dtype.

    Raises:
      ValueError: if a leaf is not float16, bfloat16, float32 or float64.
    """
    dtypes = [jnp.asarray(leaf).dtype for leaf in jax.tree.leaves(tree)]
    for dtype in dtypes:
        if dtype.name not in FLOAT_DTYPES:
            raise ValueError(
                f"tree has a leaf of dtype {dtype.name}; magnitudes are compared "
                f"for {', '.join(FLOAT_DTYPES)} only."
            )
    return functools.reduce(jnp.promote_types, dtypes)


def widen(x: jax.Array, dtype: Any) -> jax.Array:
    """Converts a float array to a wider float dtype, subnormal numbers included.

    Args:
      x: array of a real floating dtype, any shape.
      dtype: a float dtype that holds every value of `x.dtype`.

    Returns:
      `x` as `dtype`, every element unchanged in value.
    """
    if x.dtype == dtype:
        return x
    if x.dtype == jnp.bfloat16 and dtype == jnp.float32:
        bits = lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32) << 16
        return lax.bitcast_convert_type(bits, jnp.float32)
    # XLA may flush a subnormal to zero when it converts it. A subnormal is its
    # mantissa times the smallest subnormal, a product of normal numbers in `dtype`.
    info = jnp.finfo(x.dtype)
    unsigned = UNSIGNED[x.dtype.itemsize]
    bits = lax.bitcast_convert_type(x, unsigned)
    mantissa = bits & unsigned((1 << info.nmant) - 1)
    exponent = (bits >> info.nmant) & unsigned((1 << info.nexp) - 1)
    sign = jnp.where(bits >> (info.bits - 1), -1, 1).astype(dtype)
    ulp = np.ldexp(1.0, info.minexp - info.nmant)
    subnormal = sign * mantissa.astype(dtype) * jnp.asarray(ulp, dtype)
    return jnp.where(exponent == 0, subnormal, x.astype(dtype))
