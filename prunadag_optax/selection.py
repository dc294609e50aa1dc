"""The k-th largest magnitude of a whole pytree, exact, by counting.

For non-negative floats the order of the values is the order of their bit patterns
read as unsigned integers. So the k-th largest magnitude is the largest integer `t`
for which at least `k` keys are `>= t`, and its digits come out one by one, highest
first, each from one pass that counts how many keys reach each candidate. A pass
reads every leaf once and leaves three scalars: nothing of parameter size is sorted,
concatenated or gathered, so any sharding stays as it is. Because keys are compared
as integers the result is right for subnormal numbers too, which XLA's CPU backend
compares as zeros when they are floats.
"""

import functools
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_UNSIGNED = {2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}
FLOAT_DTYPES = ("float16", "bfloat16", "float32", "float64")


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
    unsigned = _UNSIGNED[x.dtype.itemsize]
    bits = lax.bitcast_convert_type(x, unsigned)
    mantissa = bits & unsigned((1 << info.nmant) - 1)
    exponent = (bits >> info.nmant) & unsigned((1 << info.nexp) - 1)
    sign = jnp.where(bits >> (info.bits - 1), -1, 1).astype(dtype)
    ulp = np.ldexp(1.0, info.minexp - info.nmant)
    subnormal = sign * mantissa.astype(dtype) * jnp.asarray(ulp, dtype)
    return jnp.where(exponent == 0, subnormal, x.astype(dtype))


def magnitude_keys(tree: Any) -> list[jax.Array]:
    """Unsigned integers in the order of the magnitudes, one array a leaf.

    The key of `x` is the bit pattern of `|x|` in the widest dtype of the tree, so
    keys of different leaves compare as their magnitudes do. Infinity comes above
    every finite number and NaN above infinity.

    Args:
      tree: pytree of real floating arrays, any shapes and dtypes.

    Returns:
      The keys, in the order of `jax.tree.leaves(tree)`, each with its leaf's shape.

    Raises:
      ValueError: if a leaf is not float16, bfloat16, float32 or float64.
    """
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    if not leaves:
        return []
    for leaf in leaves:
        if leaf.dtype.name not in FLOAT_DTYPES:
            raise ValueError(
                f"tree has a leaf of dtype {leaf.dtype.name}; magnitudes are compared "
                f"for {', '.join(FLOAT_DTYPES)} only."
            )
    dtype = functools.reduce(jnp.promote_types, [leaf.dtype for leaf in leaves])
    unsigned = _UNSIGNED[dtype.itemsize]
    without_sign = unsigned((1 << (8 * dtype.itemsize - 1)) - 1)
    return [
        lax.bitcast_convert_type(widen(leaf, dtype), unsigned) & without_sign
        for leaf in leaves
    ]


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


def _reduce_counts(key: jax.Array, pivots: list[jax.Array], dtype: Any) -> list:
    # One variadic reduction reads the leaf once for all pivots; separate sums would
    # read it once each, and XLA's CPU backend does not vectorise them.
    reached = tuple((key >= pivot).astype(dtype) for pivot in pivots)
    zeros = tuple(jnp.zeros((), dtype) for _ in pivots)
    return list(
        lax.reduce(
            reached,
            zeros,
            lambda a, b: tuple(i + j for i, j in zip(a, b, strict=True)),
            tuple(range(key.ndim)),
        )
    )


@functools.partial(jax.jit, static_argnames="keys_of")
def kth_largest_key(
    tree: Any,
    k: int | jax.Array,
    *,
    keys_of: Callable[[Any], list[jax.Array]] = magnitude_keys,
) -> jax.Array:
    r"""The k-th largest key of a tree's elements, unchecked.

    .. math:: \max \{ t : |\{ i : key_i \ge t \}| \ge k \}

    Args:
      tree: pytree of arrays, any shapes, with at least one element.
      k: integer in 1..n, n the number of elements.
      keys_of: function from the tree to its keys, arrays of one unsigned dtype. It is
        called within the loop, where it fuses with the counting: the keys themselves
        are never stored.

    Returns:
      A scalar of the keys' dtype.
    """
    shapes = jax.eval_shape(keys_of, tree)
    unsigned = shapes[0].dtype
    dtype = count_dtype(sum(key.size for key in shapes))
    k = jnp.asarray(k, dtype)
    passes = 8 * unsigned.itemsize // 2

    def digit(i, low):
        shift = (2 * (passes - 1 - i)).astype(unsigned)
        pivots = [low | (unsigned.type(d) << shift) for d in (1, 2, 3)]
        counts = [jnp.zeros((), dtype)] * 3
        # Without the barrier XLA hoists the keys out of the loop and stores them.
        leaves, pivots = lax.optimization_barrier((tree, pivots))
        for key in keys_of(leaves):
            partial = _reduce_counts(key, pivots, dtype)
            counts = [c + p for c, p in zip(counts, partial, strict=True)]
        # The counts fall from pivot to pivot, so the digit is how many still reach k.
        reached = sum((count >= k).astype(unsigned) for count in counts)
        return low | (reached << shift)

    return lax.fori_loop(0, passes, digit, jnp.zeros((), unsigned))


def kth_largest_magnitude(tree: Any, k: int | jax.Array) -> jax.Array:
    r"""The k-th largest absolute value over all leaves of a pytree, exact.

    .. math:: t = |x|_{(k)}, \quad |x|_{(1)} \ge |x|_{(2)} \ge \dots \ge |x|_{(n)}

    Ties count as often as they occur: the third largest magnitude of (2, 2, 1) is 1.
    Infinity comes above every finite number and NaN above infinity.

    Args:
      tree: pytree of real floating arrays, any shapes; dtypes may be mixed.
      k: rank in 1..n, n the number of elements of the tree. A Python integer is
        checked; an integer array (traced or not) is clipped to that range.

    Returns:
      A scalar of the widest dtype in the tree. It equals one of the magnitudes.

    Raises:
      ValueError: if the tree has no elements, holds a leaf that is not a real float,
        or if `k` is not an integer in 1..n.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax import kth_largest_magnitude
      >>> tree = {"kernel": jnp.array([[3.0, -5.0]]), "bias": jnp.array([4.0])}
      >>> float(kth_largest_magnitude(tree, 2))
      4.0
    """
    keys = jax.eval_shape(magnitude_keys, tree)
    size = sum(key.size for key in keys)
    if not size:
        raise ValueError("tree has no elements, so no magnitude has a rank in it.")
    if isinstance(k, numbers.Integral) and not isinstance(k, bool | np.bool_):
        if not 1 <= k <= size:
            raise ValueError(f"k must be in 1..{size}, the size of tree; got {k}.")
    elif np.ndim(k) or not jnp.issubdtype(getattr(k, "dtype", bool), jnp.integer):
        raise ValueError(f"k must be an integer or an integer array; got {k!r}.")
    k = jnp.clip(jnp.asarray(k, count_dtype(size)), 1, size)
    dtype = functools.reduce(
        jnp.promote_types, [jnp.asarray(leaf).dtype for leaf in jax.tree.leaves(tree)]
    )
    return lax.bitcast_convert_type(kth_largest_key(tree, k), dtype)
