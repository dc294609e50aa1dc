"""How many of n components: from a share, from a count, traced or not."""

import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prunadag_optax._common.dtypes import working


def count_dtype(size: int) -> Any:
    """The integer dtype that counts up to `size` elements.

    Args:
      size: number of elements in all leaves together.

    Returns:
      int32, or int64 beyond 2^31 - 1 elements.

    Raises:
      ValueError: if `size` needs int64 and `jax_enable_x64` is off.
    """
    if size <= np.iinfo(np.int32).max:
        return jnp.int32
    if not jax.config.read("jax_enable_x64"):
        raise ValueError(
            f"the tree has {size} elements, more than int32 can count; enable "
            "jax_enable_x64, or use scope='leaf', which counts each leaf on its own."
        )
    return jnp.int64


def one_in(compression: Any, size: int) -> int | jax.Array:
    """How many of `size` components stay, one for each `compression` of them.

    Args:
      compression: C >= 1.
      size: n >= 1, the number of components.

    Returns:
      max(1, floor(n / C)). A Python int for a Python number; otherwise a scalar array.
    """
    if isinstance(compression, numbers.Real):
        return max(1, int(size / float(compression)))
    count = jnp.floor(size / working(compression))
    return jnp.clip(count.astype(count_dtype(size)), 1, size)


def target_count(relevant: Any, size: int) -> int | jax.Array:
    """T, the target number of relevant components among `size`.

    Args:
      relevant: a fraction of `size` in (0, 1] when it is a float or a float array, T
        itself when it is an integer or an integer array.
      size: n >= 1, the number of components.

    Returns:
      max(1, round(relevant * n)) or min(relevant, n). A Python int for a Python number;
      otherwise a scalar array, clipped to 1..n.
    """
    if isinstance(relevant, numbers.Integral):
        return min(int(relevant), size)
    if isinstance(relevant, numbers.Real):
        return min(max(1, round(float(relevant) * size)), size)
    count = jnp.asarray(relevant)
    if jnp.issubdtype(count.dtype, jnp.floating):
        # float32 at least: a bfloat16 product would round T to 8 significant bits.
        count = jnp.round(jnp.minimum(working(count), 1) * size)
    return jnp.clip(count.astype(count_dtype(size)), 1, size)
