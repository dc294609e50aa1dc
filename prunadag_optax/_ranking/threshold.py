"""The k-th largest magnitude of a whole pytree, exact, by counting.

The k-th largest key (`keys`) is the largest integer `t` for which at least `k` keys are
`>= t`, and it is found as a root is: a pass counts how many keys reach each of seven
pivots, the answer lies between two of them, and the next pivots stand where the counts
say that it should be. A pass reads every leaf once and leaves seven scalars: nothing of
parameter size is sorted, concatenated, gathered or stored, so any sharding stays as it
is.
"""

import functools
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from prunadag_optax._common.dtypes import UNSIGNED, widest
from prunadag_optax._ranking import counts, engine, keys

# Bits of mantissa of a float of so many bytes (float16 has two more).
_MANTISSA = {2: 8, 4: 23, 8: 52}


def reaches(score: jax.Array, key: jax.Array, dtype: Any) -> jax.Array:
    """Where |score| is at least the magnitude that a key stands for.

    Args:
      score: array of a real floating dtype.
      key: a key among those of `dtype`, shape ().
      dtype: the `widest` dtype of all scores that are ranked together.

    Returns:
      Bool array like `score`.
    """
    return keys.key_of(score, dtype) >= key


def at_least_kth(
    scores: Sequence[jax.Array],
    k: Sequence[int | jax.Array],
    hint: jax.Array | None = None,
    *,
    by_leaf: bool = False,
) -> tuple[list[jax.Array], jax.Array]:
    """Where |score| is at least the k-th largest: ties with it are all in.

    Args:
      scores: arrays of real floating dtypes, at least one element in all.
      k: a rank in 1..n for all arrays together, or one for each of them.
      hint: magnitudes near the k-th largest, of any shape that holds as many as `k`;
        with them the search is shorter. They have no influence on the result.
      by_leaf: whether each array is ranked on its own.

    Returns:
      A bool array for each score, and the k-th largest magnitudes, float32, shape ()
      or, by leaf, (arrays,).
    """
    found = kth_largest_keys(scores, k, hint, by_leaf=by_leaf)
    dtype = widest(scores)
    of_leaf = found if by_leaf else [found[0]] * len(scores)
    inside = [reaches(x, key, dtype) for x, key in zip(scores, of_leaf, strict=True)]
    magnitude = keys.key_to_magnitude(found, scores).astype(jnp.float32)
    return inside, magnitude if by_leaf else magnitude[0]


def kth_largest_keys(
    scores: Sequence[jax.Array],
    k: Sequence[int | jax.Array],
    hint: jax.Array | None = None,
    *,
    by_leaf: bool = False,
) -> jax.Array:
    """The key of the k-th largest magnitude, of all arrays together or of each.

    Args:
      scores: as in `at_least_kth`.
      k: as in `at_least_kth`.
      hint: as in `at_least_kth`.
      by_leaf: whether each array is ranked on its own.

    Returns:
      Keys among those of the `widest` dtype of the scores, shape (1,) or (arrays,).
    """
    dtype = widest(scores)
    if hint is not None:
        hint = keys.magnitude_to_key(jnp.reshape(hint, len(k)), scores)
    count = counts.count_dtype(_most(scores, by_leaf))
    ranks = jnp.stack([jnp.asarray(x, count) for x in k])
    return kth_largest([scores], ranks, hint, key=_key_in(dtype), by_leaf=by_leaf)


def kth_largest_magnitudes(
    scores: Sequence[jax.Array],
    ranks: Sequence[jax.Array] | jax.Array,
    alone: jax.Array,
    hint: jax.Array,
    most: jax.Array | None = None,
) -> jax.Array:
    """The k-th largest magnitude of those arrays that are ranked together, or of each.

    0 where that is everything.

    Args:
      scores: arrays of real floating dtypes.
      ranks: k for each array; one and the same for those that are ranked together.
      alone: bool, shape (arrays,), may be traced: which are ranked on their own.
      hint: magnitudes near the outcome, shape (arrays,); without influence on it.
      most: for each array that is ranked with others a magnitude above which its
        outcome is not, at which k are found nevertheless; None: there is none.

    Returns:
      Array like `hint`.
    """
    dtype = widest(scores)
    guess = keys.magnitude_to_key(hint, scores)
    # What is ranked together must be searched for in the same places.
    guess = jnp.where(alone, guess, jnp.max(jnp.where(alone, -1, guess)))
    count = counts.count_dtype(_most(scores, False))
    k = jnp.stack([jnp.maximum(jnp.asarray(x, count), 1) for x in ranks])
    every = {"key": _key_in(dtype), "by_leaf": True, "together": ~alone}
    if most is None:
        found = kth_largest([scores], k, guess, **every, unless_all=True)
    else:
        key = keys.magnitude_to_key(most, scores)
        limit = jnp.where(alone, np.iinfo(key.dtype).max, key)
        found = search(
            [scores], k, guess, **every, unless_all=True,
            to_leaf=lambda pivots: jnp.minimum(pivots, limit[None]),
        )  # fmt: skip
        found = jnp.minimum(found, limit)
    return keys.key_to_magnitude(found, scores).astype(hint.dtype)


def _most(leaves: Sequence[Any], by_leaf: bool) -> int:
    sizes = [x.size for x in leaves]
    return max(sizes) if by_leaf else sum(sizes)


@functools.cache
def _key_in(dtype: Any) -> Callable[[jax.Array], jax.Array]:
    """`keys.key_of` in a dtype; one function for each, so that jit knows it again."""
    return functools.partial(keys.key_of, dtype=dtype)


def search(
    columns: Sequence[Sequence[jax.Array]],
    k: jax.Array,
    guess: jax.Array | None = None,
    *,
    key: Callable[..., jax.Array],
    by_leaf: bool = False,
    together: jax.Array | None = None,
    to_leaf: Callable[[jax.Array], jax.Array] | None = None,
    unless_all: bool = False,
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
      columns: the leaves of each operand of `key`; those of one index have one shape.
      k: integers in 1..n, n the number of elements in question; shape (1,), or
        (leaves,) with `by_leaf`.
      guess: keys near the answers, same shape, which then take fewer passes. Any other
        keys slow the search and never change its result.
      key: function from the operands of a leaf to its keys, of one signed dtype for all
        leaves, all >= -1. It is called within the loop, where it fuses with the
        counting: the keys themselves are never stored.
      by_leaf: whether each leaf is ranked on its own.
      together: bool, shape (leaves,): which leaves are ranked together all the same,
        with one k. Without `by_leaf`: which leaves count. None: as `by_leaf` says.
      to_leaf: function from keys, shape (pivots, 1), to the keys that stand for them in
        each leaf, shape (pivots, leaves), rising with them; None: the same in all.
      unless_all: whether to answer -1, which is below every key, without a search where
        k is the number of all elements.

    Returns:
      Array like `k`, of the keys' dtype.
    """
    # The outcome is piecewise constant in the tree: no gradient flows through it.
    columns = jax.tree.map(lax.stop_gradient, list(columns))
    signed = jax.eval_shape(key, *(column[0] for column in columns)).dtype
    unsigned = UNSIGNED[signed.itemsize]
    count = k.dtype

    def above(low, high, aims):
        """The keys `low + aims`, but above low and at most high."""
        low, high = low.astype(unsigned)[None], high.astype(unsigned)[None]
        # Limited as floats and as integers, as a float may round past the span.
        most = (high - low).astype(aims.dtype)
        aims = jnp.minimum(jnp.clip(aims, 1, most).astype(unsigned), high - low)
        return (low + aims).astype(signed)

    def of_group(of_leaf):
        """The sums over the leaves that are ranked together, shape (..., leaves)."""
        if together is not None:
            total = jnp.sum(jnp.where(together, of_leaf, 0), -1, count, keepdims=True)
            return jnp.where(together, total, of_leaf) if by_leaf else total
        return of_leaf if by_leaf else jnp.sum(of_leaf, -1, count, keepdims=True)

    def reached_by(columns, pivots):
        """How many keys reach each of the pivots, shape like theirs."""
        levels = [*(to_leaf(pivots) if to_leaf else pivots)]
        if not (by_leaf or to_leaf):
            levels = [level[0] for level in levels]  # one scalar for all leaves

        def compared(*leaf):
            found = key(*leaf[: len(columns)])
            return [(found >= level).astype(count) for level in leaf[len(columns) :]]

        return of_group(jnp.stack(engine.sums_by_leaf(compared, columns, levels)))

    def unfinished(carry):
        low, high, *_ = carry
        return jnp.any(low < high)

    def narrow(carry):
        low, high, at_low, above_high, pivots = carry
        # The barrier makes the keys depend on the loop: XLA would otherwise compute
        # them once before it, and store them.
        reached = reached_by(*lax.optimization_barrier((columns, pivots)))
        enough = reached >= k[None]
        low = jnp.max(jnp.where(enough, pivots, low[None]), axis=0)
        high = jnp.min(jnp.where(enough, high[None], pivots - 1), axis=0)
        at_low = jnp.min(jnp.where(enough, reached, at_low[None]), axis=0)
        above_high = jnp.max(jnp.where(enough, above_high[None], reached), axis=0)
        span = (high.astype(unsigned) - low.astype(unsigned)).astype(jnp.float32)
        aims = _aims(span, at_low, above_high, k)
        return low, high, at_low, above_high, above(low, high, aims)

    low, high = (jnp.full(k.shape, x, signed) for x in (-1, np.iinfo(signed).max))
    at_low = of_group(jnp.array([x.size for x in columns[0]], count))
    # Of no elements: -1, below every magnitude.
    high = jnp.where(at_low > (k if unless_all else 0), high, low)
    above_high = jnp.zeros(k.shape, count)
    if guess is None:
        steps = np.linspace(0, 2.0 ** (8 * signed.itemsize - 1), 9)[1:-1]
        aims = jnp.zeros(k.shape)
    else:
        # 1/20, 1/4 and 4 octaves around the guess: one that is far off, as where the
        # rank changes from call to call, must not cost more than none.
        octaves = np.array([-1 / 4, -4, -20, np.inf, 20, 4, 1 / 4])
        steps = 2.0 ** _MANTISSA[signed.itemsize] / octaves
        aims = guess.astype(jnp.float32) + 1
    aims = aims[None] + jnp.asarray(steps, jnp.float32)[:, None]
    start = low, high, at_low, above_high, above(low, high, aims)
    return lax.while_loop(unfinished, narrow, _varying_like(columns, start))[0]


def _varying_like(tree: Any, carry: Any) -> Any:
    """A loop's start, typed as varying over the mesh axes that the tree varies over.

    In a `jax.shard_map` that checks this, a loop may not make it so.
    """
    axes = frozenset().union(*(_axes(x) for x in jax.tree.leaves(tree)))

    def leaf(x):
        missing = tuple(axes - _axes(x))
        if not missing:
            return x
        if hasattr(lax, "pcast"):
            return lax.pcast(x, missing, to="varying")
        return lax.pvary(x, missing)  # jax before 0.8  # pyright: ignore

    return jax.tree.map(leaf, carry)


def _axes(x: Any) -> frozenset[str]:
    kind = jax.typeof(x)
    if hasattr(kind, "manual_axis_type"):
        return frozenset(kind.manual_axis_type.varying)
    return frozenset(getattr(kind, "vma", ()))  # jax before 0.10


# Compiled as one where it is called outside jit: a loop would be compiled every time.
kth_largest = jax.jit(search, static_argnames=("key", "by_leaf", "unless_all"))


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
    shapes = jax.eval_shape(keys.magnitude_keys, tree)
    size = sum(x.size for x in shapes)
    if not size:
        raise ValueError("tree has no elements, so no magnitude has a rank in it.")
    if isinstance(k, numbers.Integral) and not isinstance(k, bool | np.bool_):
        if not 1 <= k <= size:
            raise ValueError(f"k must be in 1..{size}, the size of tree; got {k}.")
    elif np.ndim(k) or not jnp.issubdtype(getattr(k, "dtype", bool), jnp.integer):
        raise ValueError(f"k must be an integer or an integer array; got {k!r}.")
    k = jnp.clip(jnp.asarray(k, counts.count_dtype(size)), 1, size)
    leaves = [jnp.asarray(x) for x in jax.tree.leaves(tree)]
    return keys.key_to_magnitude(kth_largest_keys(leaves, [k])[0], leaves)
