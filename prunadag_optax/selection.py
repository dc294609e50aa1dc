"""The k-th largest magnitude of a whole pytree, exact, by counting.

For non-negative floats the order of the values is the order of their bit patterns
read as integers. So the k-th largest magnitude is the largest integer `t` for which at
least `k` keys are `>= t`, and it is found as a root is: a pass counts how many keys
reach each of seven pivots, the answer lies between two of them, and the next pivots
stand where the counts say that it should be. A pass reads every leaf once and leaves
seven scalars: nothing of parameter size is sorted, concatenated, gathered or stored, so
any sharding stays as it is. Because keys are compared as integers the result is right
for subnormal numbers too, which XLA's CPU backend compares as zeros when they are
floats.
"""

import functools
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from prunadag_optax import _backend

_SIGNED = {2: jnp.int16, 4: jnp.int32, 8: jnp.int64}
_UNSIGNED = {2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}
# Bits of mantissa of a float of so many bytes (float16 has two more).
_MANTISSA = {2: 8, 4: 23, 8: 52}
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


def key_of(x: jax.Array, dtype: Any) -> jax.Array:
    """The bit pattern of `|x|` in a float dtype that holds it, as a signed integer."""
    # Signed: vector units compare signed integers, and often no others.
    signed = _SIGNED[jnp.dtype(dtype).itemsize]
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


@functools.partial(jax.jit, static_argnames=("keys_of", "by_leaf", "stacked"))
def kth_largest_keys(
    tree: Any,
    k: jax.Array,
    guess: jax.Array | None = None,
    *,
    keys_of: Callable[[Any], list[jax.Array]] = magnitude_keys,
    by_leaf: bool = False,
    stacked: tuple[bool, ...] | None = None,
) -> jax.Array:
    r"""The k-th largest key of all leaves together, or of each leaf, unchecked.

    .. math:: \max \{ t : N(t) \ge k \}, \quad N(t) = |\{ i : key_i \ge t \}|

    Each pass keeps a bracket `low <= t <= high` with the counts at both ends. Of its
    seven pivots five stand around the place where log N, drawn as a straight line over
    the bracket, reaches log k: in the middle, 0.7 and five standard deviations away, as
    they would be for keys drawn at random. The other two are the thirds of the
    bracket, so that it shrinks at least threefold whatever the distribution. From a
    `guess` within a third of the answer six passes are usual.

    Args:
      tree: pytree of arrays, any shapes.
      k: integers in 1..n, n the number of elements in question; shape (1,), or
        (leaves,) with `by_leaf`.
      guess: keys near the answers, same shape, which then take fewer passes. Any other
        keys slow the search and never change its result.
      keys_of: function from the tree to its keys, arrays of one signed dtype, all
        >= -1. It is called within the loop, where it fuses with the counting: the keys
        themselves are never stored.
      by_leaf: whether each leaf is ranked on its own.
      stacked: which arrays of keys are several leaves along their first axis, which
        `by_leaf` ranks each on its own; None: none.

    Returns:
      Array like `k`, of the keys' dtype.
    """
    # The outcome is piecewise constant in the tree: no gradient flows through it.
    tree = jax.tree.map(lax.stop_gradient, tree)
    shapes = jax.eval_shape(keys_of, tree)
    signed = shapes[0].dtype
    unsigned = _UNSIGNED[signed.itemsize]
    stacked = stacked or (False,) * len(shapes)
    sizes, places = [], []
    for key, rows in zip(shapes, stacked, strict=True):
        leaves = key.shape[0] if rows else 1
        places.append(slice(len(sizes), len(sizes) + leaves))
        sizes += [key.size // leaves] * leaves
    sizes = np.array(sizes) if by_leaf else np.array([sum(sizes)])
    count = count_dtype(sizes.max())
    k = jnp.asarray(k, count)

    def above(low, high, aims):
        """The keys `low + aims`, but above low and at most high."""
        low, high = low.astype(unsigned)[None], high.astype(unsigned)[None]
        # Limited as floats and as integers, as a float may round past the span.
        most = (high - low).astype(aims.dtype)
        aims = jnp.minimum(jnp.clip(aims, 1, most).astype(unsigned), high - low)
        return (low + aims).astype(signed)

    def of_leaf(pivots, place, rows):
        if not by_leaf:
            return pivots[:, 0]
        return pivots[:, place, None] if rows else pivots[:, place.start]

    def unfinished(carry):
        low, high, *_ = carry
        return jnp.any(low < high)

    def narrow(carry):
        low, high, at_low, above_high, pivots = carry
        # The barrier makes the keys depend on the loop: XLA would otherwise compute
        # them once before it, and store them.
        leaves, pivots = lax.optimization_barrier((tree, pivots))
        counts = [
            [(key >= pivot).astype(count) for pivot in of_leaf(pivots, place, rows)]
            for key, place, rows in zip(keys_of(leaves), places, stacked, strict=True)
        ]
        reached = jnp.stack(_backend.sums_by_leaf(counts, stacked))
        if not by_leaf:
            reached = jnp.sum(reached, axis=1, dtype=count, keepdims=True)
        reaches = reached >= k[None]
        low = jnp.max(jnp.where(reaches, pivots, low[None]), axis=0)
        high = jnp.min(jnp.where(reaches, high[None], pivots - 1), axis=0)
        at_low = jnp.min(jnp.where(reaches, reached, at_low[None]), axis=0)
        above_high = jnp.max(jnp.where(reaches, above_high[None], reached), axis=0)
        span = (high.astype(unsigned) - low.astype(unsigned)).astype(jnp.float32)
        aims = _aims(span, at_low, above_high, k)
        return low, high, at_low, above_high, above(low, high, aims)

    low, high = (jnp.full(k.shape, x, signed) for x in (-1, np.iinfo(signed).max))
    at_low, above_high = jnp.asarray(sizes, count), jnp.zeros(k.shape, count)
    if guess is None:
        steps = np.linspace(0, 2.0 ** (8 * signed.itemsize - 1), 9)[1:-1]
        aims = jnp.zeros(k.shape)
    else:
        # A magnitude 2^(1/64), 2^(1/8) and 2 times the guess, and one over that.
        octaves = np.array([-64, -8, -1, np.inf, 1, 8, 64])
        steps = 2.0 ** _MANTISSA[signed.itemsize] / octaves
        aims = guess.astype(jnp.float32) + 1
    aims = aims[None] + jnp.asarray(steps, jnp.float32)[:, None]
    start = low, high, at_low, above_high, above(low, high, aims)
    return lax.while_loop(unfinished, narrow, start)[0]


def _aims(span, at_low, above_high, k):
    """Where in a bracket to look for the k-th largest key, in keys above its lower end.

    Args:
      span: keys from the lower to the upper end, float32.
      at_low: the count at the lower end, at least k.
      above_high: the count above the upper end, less than k.
      k: the rank.

    Returns:
      Seven places, along a new first axis: five around the place where log N, drawn
      as a straight line, passes k, and the thirds.
    """
    # Differences of counts before the conversion to float, which may round them away.
    until_k, inside = ((at_low - n).astype(jnp.float32) for n in (k, above_high))
    # No count is 0 here, save that of an empty leaf.
    inside, top = jnp.maximum(inside, 1), jnp.maximum(at_low.astype(jnp.float32), 1)
    # Half a count on: the next key would be as good, and log 0 does not occur.
    fall = jnp.log1p(-jnp.minimum(inside, top - 0.5) / top)
    share = jnp.log1p(-(until_k + 0.5) / top) / fall
    # Of m keys in the bracket a share f lies below: binomial, variance m f (1 - f).
    deviation = jnp.sqrt(jnp.maximum(inside * share * (1 - share), 0.25))
    centre, spread = share * span, jnp.maximum(deviation * span / inside, 1.0)
    around = [centre + d * spread for d in (-5.0, -0.7, 0.0, 0.7, 5.0)]
    return jnp.stack([*around, jnp.floor(span / 3) + 1, jnp.ceil(2 * span / 3)])


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
    return key_to_magnitude(kth_largest_keys(tree, k[None])[0], tree)
