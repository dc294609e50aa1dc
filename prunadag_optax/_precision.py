"""The precision in which the pure pieces compute."""

import jax
import jax.numpy as jnp


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
