"""A prunAdag step as three Pallas kernels, off unless asked for.

This module is not in the wheel: the plain path, which XLA compiles, is the
reference and the default. These kernels give its results in tests on a CPU and lower
for CUDA (through Triton), but nobody has measured them on a GPU yet.

Interpreted, they equal it bit for bit, but for the order of the sums in the norms and
the compiler's fused multiply-adds. Compiled, Triton's square root and quotient may be
off by a few units in the last place, so a component on the edge of a class may change
sides.

A step is limited by the bytes that it moves, so each kernel reads a leaf once:

* `count_reaching` counts the keys that reach each of up to 32 pivots. More pivots a
  pass make fewer passes over g, as long as the comparisons (two integer operations a
  pivot and element) take no longer than the read.
* `squares` sums what ||g||_R and ||x||_S are made of.
* `update` classifies, accumulates both weights and steps, in place.

A program instance takes one block of the flattened leaf. Partial sums go to an array
with a row for each block, which XLA adds up: no atomics, hence the same result every
time. The last block is masked, so leaves are never padded; but a leaf whose size is no
multiple of four is read by single numbers, not by several a load. Every leaf has its
own launches, so many small leaves may cost more here than in the plain path; sharded
leaves would be gathered, so this is for one device. float64 is left to the plain path.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from prunadag_optax._common import dtypes
from prunadag_optax._common.dtypes import working
from prunadag_optax._core import accumulators, classes, steps
from prunadag_optax._core.variants import VARIANTS
from prunadag_optax._ranking import counts, keys

MOST_PIVOTS = 32
_WARPS = 4
# Sixteen bytes of float32 for each of 128 threads. From 17 pivots on `count_reaching`
# takes half of that: its counts, one a pivot and element of a chunk, are registers.
_CHUNK = 512
# Chunks that one instance of a summing kernel goes through before it reduces.
_CHUNKS = 8
_DTYPES = ("float16", "bfloat16", "float32")


def _left(ref: Any, size: int) -> jax.Array | None:
    """How much of a flat array is left from block `ref` on; None for whole blocks."""
    block = ref.shape[0]
    if size % block == 0:
        return None
    # This fits into int32 wherever the size does; an index past the end might not.
    return size - pl.program_id(0) * block


def _mask(left: jax.Array | None, start: Any, length: int) -> jax.Array | None:
    """Which elements of a part of a block exist; None where all do."""
    if left is None:
        return None
    return lax.iota(jnp.int32, length) < left - start


def _load(ref: Any, left: jax.Array | None, start: Any, length: int) -> jax.Array:
    """Part of a block, 0 beyond the end of the array."""
    mask = _mask(left, start, length)
    other = None if mask is None else 0
    return triton.load(ref.at[pl.ds(start, length)], mask=mask, other=other)


def _call(
    kernel: Callable[..., None],
    operands: Sequence[jax.Array],
    scalars: Sequence[jax.Array],
    *,
    block: int,
    outputs: Sequence[Any],
    aliases: dict[int, int] | None = None,
    interpret: bool | None,
) -> Any:
    """Runs a kernel over the blocks of flat arrays of one size, at least 1.

    Args:
      kernel: function of the refs of the operands, the scalars and the outputs.
      operands: arrays of any one shape.
      scalars: vectors that every instance sees whole.
      block: elements an instance, a power of two.
      outputs: for each output its dtype, if it is like the operands, or the number and
        dtype of values that each block leaves.
      aliases: for operands the outputs that take their place.
      interpret: None interprets on the CPU backend, which has no compiler for this.

    Returns:
      A list of the outputs, flat or of shape (blocks, values).
    """
    for x in operands:
        if x.size > np.iinfo(np.int32).max:
            raise ValueError(f"a leaf has {x.size} elements, more than int32 counts.")
    size = operands[0].size
    blocks = pl.cdiv(size, block)
    part = pl.BlockSpec((block,), lambda i: (i,))
    shapes, specs = [], []
    for output in outputs:
        if isinstance(output, tuple):
            shapes.append(jax.ShapeDtypeStruct((blocks, output[0]), output[1]))
            specs.append(pl.BlockSpec((None, output[0]), lambda i: (i, 0)))
        else:
            shapes.append(jax.ShapeDtypeStruct((size,), output))
            specs.append(part)
    return pl.pallas_call(
        kernel,
        out_shape=shapes,
        grid=(blocks,),
        in_specs=[part] * len(operands)
        + [pl.BlockSpec((x.size,), lambda i: (0,)) for x in scalars],
        out_specs=specs,
        input_output_aliases=aliases or {},
        interpret=jax.default_backend() == "cpu" if interpret is None else interpret,
        compiler_params=triton.CompilerParams(num_warps=_WARPS),
    )(*(x.reshape(-1) for x in operands), *scalars)


def _key(x: jax.Array, dtype: Any) -> jax.Array:
    """The magnitude key of a leaf in a float dtype of at most four bytes, int32."""
    return keys.key_of(x, dtype).astype(jnp.int32)


def count_reaching(
    leaf: jax.Array,
    pivots: jax.Array,
    *,
    key_dtype: Any = None,
    interpret: bool | None = None,
) -> jax.Array:
    r"""How many elements have a magnitude key that reaches each pivot, in one read.

    .. math:: N_p = |\{ i : key_i \ge p \}|

    Args:
      leaf: floats whose keys are those of `keys.key_of`, or the keys themselves,
        integers >= 0 of at most 32 bits; any shape.
      pivots: int32, shape (P,), P in 1..32, in any order.
      key_dtype: the float dtype whose bit patterns the keys of a float leaf are; None
        is its own.
      interpret: whether to interpret the kernel; None does so on the CPU backend.

    Returns:
      int32 counts, shape (P,).

    Raises:
      ValueError: for too many pivots or elements.
    """
    count = pivots.size
    if not 1 <= count <= MOST_PIVOTS:
        raise ValueError(f"pivots must be 1..{MOST_PIVOTS} in number; got {count}.")
    if not leaf.size:
        return jnp.zeros(count, jnp.int32)
    chunk_size = _CHUNK if count <= MOST_PIVOTS // 2 else _CHUNK // 2
    size, floating = leaf.size, jnp.issubdtype(leaf.dtype, jnp.floating)

    def kernel(leaf_ref, pivots_ref, out_ref):
        # Scalars and a vector of counts for each, rather than a matrix: every thread
        # keeps the elements that it has loaded.
        left = _left(leaf_ref, size)
        aims = [pivots_ref[p] for p in range(count)]

        def add(chunk, totals):
            start = chunk * chunk_size
            x = _load(leaf_ref, left, start, chunk_size)
            key = _key(x, key_dtype or x.dtype) if floating else x.astype(jnp.int32)
            mask = _mask(left, start, chunk_size)
            key = key if mask is None else jnp.where(mask, key, -1)
            return tuple(
                total + (key >= aim).astype(jnp.int32)
                for total, aim in zip(totals, aims, strict=True)
            )

        zeros = (jnp.zeros(chunk_size, jnp.int32),) * count
        for p, total in enumerate(lax.fori_loop(0, _CHUNKS, add, zeros)):
            out_ref[p] = jnp.sum(total)

    # Every key reaches a negative pivot; the -1 of what does not exist must not.
    pivots = jnp.maximum(pivots.astype(jnp.int32), 0)
    (counts,) = _call(
        kernel,
        [leaf],
        [pivots],
        block=chunk_size * _CHUNKS,
        outputs=[(count, jnp.int32)],
        interpret=interpret,
    )
    return jnp.sum(counts, axis=0, dtype=jnp.int32)


def squares(
    gradient: jax.Array,
    param: jax.Array,
    threshold_key: jax.Array,
    *,
    key_dtype: Any = None,
    interpret: bool | None = None,
) -> jax.Array:
    r"""One leaf's share of the squared norms in the bound a of v1 and v3.

    .. math:: (||g||_R^2, ||x||_S^2)

    Args:
      gradient: g of one leaf, any shape, at most 32 bits wide, as is `param`.
      param: x, same shape.
      threshold_key: the least key of a relevant |g|, integer scalar.
      key_dtype: the float dtype of which that key is a bit pattern; None is g's.
      interpret: whether to interpret the kernel; None does so on the CPU backend.

    Returns:
      The two sums, float32, shape (2,).
    """
    if not gradient.size:
        return jnp.zeros(2, jnp.float32)
    size = gradient.size

    def kernel(g_ref, x_ref, threshold_ref, out_ref):
        left, threshold = _left(g_ref, size), threshold_ref[0]

        def add(chunk, totals):
            g = _load(g_ref, left, chunk * _CHUNK, _CHUNK)
            x = _load(x_ref, left, chunk * _CHUNK, _CHUNK)
            in_relevant = _key(g, key_dtype or g.dtype) >= threshold
            terms = classes.squares(working(g), working(x), in_relevant)
            return tuple(a + b for a, b in zip(totals, terms, strict=True))

        zeros = (jnp.zeros(_CHUNK, jnp.float32),) * 2
        for i, total in enumerate(lax.fori_loop(0, _CHUNKS, add, zeros)):
            out_ref[i] = jnp.sum(total)

    (sums,) = _call(
        kernel,
        [gradient, param],
        [jnp.asarray(threshold_key, jnp.int32).reshape(1)],
        block=_CHUNK * _CHUNKS,
        outputs=[(2, jnp.float32)],
        interpret=interpret,
    )
    return jnp.sum(sums, axis=0)


def update(
    gradient: jax.Array,
    param: jax.Array,
    optimisable_weight: jax.Array,
    decreasable_weight: jax.Array,
    threshold_key: jax.Array,
    *,
    learning_rate: chex.Numeric,
    decrease: chex.Numeric,
    ratio: chex.Numeric | None = None,
    upper: str = "magnitude",
    key_dtype: Any = None,
    interpret: bool | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    r"""Steps 2 to 6 of Algorithm 2.1 on one leaf, in one pass and in place.

    The bounds are a = \|x\| d (times `ratio`) and b = \|x\| or infinity. The formulas
    are the plain path's own functions, called on blocks.

    Args:
      gradient: g_k of one leaf, any shape, at most 32 bits wide, as are the others.
      param: x_k, same shape.
      optimisable_weight: w^O_{k-1}, same shape.
      decreasable_weight: w^D_{k-1}, same shape.
      threshold_key: the least key of a relevant \|g\|, integer scalar.
      learning_rate: eta_k >= 0.
      decrease: d_k >= 0.
      ratio: \|\|g\|\|_R / \|\|x\|\|_S, 0 where the divisor is 0 (v1, v3); None is v2
        and v4.
      upper: "magnitude" (v3, v4) or "infinite" (v1, v2).
      key_dtype: the float dtype of which the key is a bit pattern; None is g's.
      interpret: whether to interpret the kernel; None does so on the CPU backend.

    Returns:
      x_{k+1}, w^O_k and w^D_k, each of the shape and dtype of what it replaces.

    Raises:
      ValueError: for an unknown `upper`.
    """
    if upper not in ("magnitude", "infinite"):
        raise ValueError(f"upper must be 'magnitude' or 'infinite'; got {upper!r}.")
    if not param.size:
        return param, optimisable_weight, decreasable_weight
    size, shape, balanced = param.size, param.shape, ratio is not None
    block = 2 * _CHUNK
    factor = decrease if ratio is None else decrease * jnp.asarray(ratio)

    def lower_bound(magnitude, factor):
        product = magnitude * factor
        # As the bound of v1: the ratio may overflow.
        return jnp.where(magnitude > 0, product, 0) if balanced else product

    upper_bound = VARIANTS["v4" if upper == "magnitude" else "v2"].upper

    def kernel(g_ref, x_ref, o_ref, d_ref, threshold_ref, rate_ref, factor_ref, *out):
        left = _left(g_ref, size)
        g, x, w_o, w_d = (
            _load(ref, left, 0, block) for ref in (g_ref, x_ref, o_ref, d_ref)
        )
        in_relevant = _key(g, key_dtype or g.dtype) >= threshold_ref[0]
        stored, rate, factor = x, rate_ref[0], factor_ref[0]
        g, x, w_o, w_d = (working(array) for array in (g, x, w_o, w_d))
        magnitude = jnp.abs(x)
        a, b = lower_bound(magnitude, factor), upper_bound(magnitude, None)
        length = steps.optimisable_step(g, accumulators.accumulate(w_o, g), rate)
        in_o = in_relevant | classes.acceptable(g, x, in_relevant, a, b, length)
        in_d = ~in_o
        w_o = accumulators.accumulate_where(in_o, w_o, g)
        w_d = accumulators.accumulate_where(in_d, w_d, x)
        optimisable = steps.optimisable_step(g, w_o, rate)
        decreasable = steps.decreasable_step(g, x, a, steps.trust_radius(x, w_d))
        # To the parameter's precision before the sum, as an optax update is.
        step = working(jnp.where(in_d, decreasable, optimisable).astype(stored.dtype))
        for ref, value in zip(out, (x + step, w_o, w_d), strict=True):
            part, mask = ref.at[pl.ds(0, block)], _mask(left, 0, block)
            triton.store(part, value.astype(ref.dtype), mask=mask)

    operands = [gradient, param, optimisable_weight, decreasable_weight]
    new = _call(
        kernel,
        operands,
        [
            jnp.asarray(threshold_key, jnp.int32).reshape(1),
            jnp.asarray(learning_rate, jnp.float32).reshape(1),
            jnp.asarray(factor, jnp.float32).reshape(1),
        ],
        block=block,
        outputs=[x.dtype for x in operands[1:]],
        aliases={1: 0, 2: 1, 3: 2},
        interpret=interpret,
    )
    x, w_o, w_d = (array.reshape(shape) for array in new)
    return x, w_o, w_d


def kth_largest_key(
    leaves: Sequence[jax.Array],
    k: chex.Numeric,
    guess: jax.Array | None = None,
    *,
    pivots: int = 15,
    interpret: bool | None = None,
) -> tuple[jax.Array, jax.Array]:
    """A key that the k largest magnitudes of all leaves reach, and only their ties.

    The bracket is that of `threshold.kth_largest_keys`; the search stops as soon as
    the count is k, and there are more pivots. A third of them divide the bracket
    evenly, the others stand within three standard deviations of the place where k is
    expected.

    Args:
      leaves: floats of at most 32 bits, any shapes.
      k: the rank, in 1..n, n the number of elements.
      guess: key near the answer, integer scalar, or None.
      pivots: comparisons an element and pass, 3..32. In a simulation on seven
        distributions of 10^5 and 10^7 numbers 15 took 3.5 passes on average from a
        guess 5% off, 4.3 from one 30% off and 5.6 without any, at most 8; 31 took one
        less. Where many magnitudes tie at the answer it takes up to 11.
      interpret: whether to interpret the kernels; None does so on the CPU backend.

    Returns:
      The key, int32, and the number of passes it took.

    Raises:
      ValueError: for too few or too many pivots.
    """
    if not 3 <= pivots <= MOST_PIVOTS:
        raise ValueError(f"pivots must be in 3..{MOST_PIVOTS}; got {pivots}.")
    dtype = dtypes.widest(leaves)
    size = sum(x.size for x in leaves)
    count = counts.count_dtype(size)
    k = jnp.asarray(k, count)
    even = pivots // 3
    most = np.iinfo(np.int16 if dtype.itemsize == 2 else np.int32).max

    def above(low, high, aims):
        """The keys `low + aims`, but above low and at most high."""
        span = (high - low).astype(jnp.uint32)
        # Limited as floats and as integers, as a float may round past span.
        aims = jnp.clip(aims, 1, span.astype(jnp.float32)).astype(jnp.uint32)
        return low + jnp.minimum(aims, span).astype(jnp.int32)

    def unfinished(carry):
        low, high, at_low, *_ = carry
        return (low < high) & (at_low > k)

    def narrow(carry):
        low, high, at_low, above_high, aims, passes = carry
        counts = [
            count_reaching(x, aims, key_dtype=dtype, interpret=interpret)
            for x in leaves
        ]
        reached = functools.reduce(jnp.add, [n.astype(count) for n in counts])
        reaches = reached >= k
        low = jnp.max(jnp.where(reaches, aims, low))
        high = jnp.min(jnp.where(reaches, high, aims - 1))
        at_low = jnp.min(jnp.where(reaches, reached, at_low))
        above_high = jnp.max(jnp.where(reaches, above_high, reached))
        aims = above(low, high, places(high - low, at_low, above_high))
        return low, high, at_low, above_high, aims, passes + 1

    def places(span, at_low, above_high):
        # As `threshold._aims`: log N is a straight line over the bracket, and the keys
        # in it lie below a place as often as a binomial variable says.
        span = span.astype(jnp.float32)
        inside = jnp.maximum((at_low - above_high).astype(jnp.float32), 1)
        top = jnp.maximum(at_low.astype(jnp.float32), 1)
        past = (at_low - k).astype(jnp.float32) + 0.5
        fall = jnp.log1p(-jnp.minimum(inside, top - 0.5) / top)
        share = jnp.log1p(-past / top) / fall
        deviation = jnp.sqrt(jnp.maximum(inside * share * (1 - share), 0.25))
        spread = jnp.maximum(deviation * span / inside, 1)
        around = jnp.linspace(-3, 3, pivots - even, dtype=jnp.float32)
        evenly = jnp.arange(1, even + 1, dtype=jnp.float32) / (even + 1)
        return jnp.concatenate([share * span + spread * around, 1 + span * evenly])

    low, high = jnp.zeros((), jnp.int32), jnp.asarray(most, jnp.int32)
    if guess is None:
        aims = jnp.linspace(0, 2.0 ** np.ceil(np.log2(most)), pivots + 2)[1:-1]
    else:
        # From 1/256 of an octave to eight octaves away from the guess, both ways.
        ways = (pivots - 1) // 2, pivots // 2
        down, up = (2.0 ** np.linspace(-8, 3, n) for n in ways)
        octaves = np.concatenate([-down, [0], up]) * 2.0 ** jnp.finfo(dtype).nmant
        aims = guess.astype(jnp.float32) + jnp.asarray(octaves, jnp.float32)
    start = (
        low,
        high,
        jnp.asarray(size, count),
        jnp.zeros((), count),
        above(low, high, aims),
        jnp.zeros((), jnp.int32),
    )
    key, *_, passes = lax.while_loop(unfinished, narrow, start)
    return key, passes


def step(
    params: Any,
    state: tuple[Any, Any, jax.Array | None],
    gradients: Any,
    *,
    relevant: chex.Numeric = 0.1,
    learning_rate: chex.Numeric = 1.0,
    decrease: chex.Numeric = 1.0,
    variant: str = "v3",
    pivots: int = 15,
    interpret: bool | None = None,
) -> tuple[Any, Any, Any, jax.Array]:
    """One iteration with relevance "gradient" and scope "global"; call it under jit.

    Args:
      params: pytree of x_k, float16, bfloat16 or float32, any shapes.
      state: w^O and w^D of the iteration before, pytrees like `params`, and the
        threshold it returned, or None.
      gradients: pytree of g_k, like `params`.
      relevant: T as an integer, or as a fraction in (0, 1] of the components.
      learning_rate: eta_k >= 0.
      decrease: d_k >= 0; 1/(k+1) in the article.
      variant: "v1", "v2", "v3" or "v4".
      pivots: see `kth_largest_key`.
      interpret: whether to interpret the kernels; None does so on the CPU backend.

    Returns:
      x_{k+1}, w^O_k, w^D_k, and the threshold, a float32 scalar. The threshold speeds
      the next step up and has no influence on the rest.

    Raises:
      ValueError: for another variant, other dtypes, or without elements.
    """
    if variant not in ("v1", "v2", "v3", "v4"):
        raise ValueError(f"variant must be v1, v2, v3 or v4 here; got {variant!r}.")
    x, treedef = jax.tree.flatten(params)
    g, w_o, w_d = (treedef.flatten_up_to(t) for t in (gradients, *state[:2]))
    for leaf in (*x, *g, *w_o, *w_d):
        if leaf.dtype.name not in _DTYPES:
            raise ValueError(f"leaves must be {', '.join(_DTYPES)}; got {leaf.dtype}.")
    size = sum(leaf.size for leaf in x)
    if not size:
        raise ValueError("params has no elements.")
    dtype, guess = dtypes.widest(g), state[2]
    key, _ = kth_largest_key(
        g,
        counts.target_count(relevant, size),
        None if guess is None else keys.magnitude_to_key(guess, g),
        pivots=pivots,
        interpret=interpret,
    )
    ratio = None
    if variant in ("v1", "v3"):
        parts = [
            squares(*pair, key, key_dtype=dtype, interpret=interpret)
            for pair in zip(g, x, strict=True)
        ]
        norms = jnp.sqrt(functools.reduce(jnp.add, parts))
        # As the bound of v1.
        ratio = jnp.where(
            norms[1] > 0, norms[0] / jnp.where(norms[1] > 0, norms[1], 1), 0
        )
    new = [
        update(
            *row,
            key,
            learning_rate=learning_rate,
            decrease=decrease,
            ratio=ratio,
            upper="infinite" if variant in ("v1", "v2") else "magnitude",
            key_dtype=dtype,
            interpret=interpret,
        )
        for row in zip(g, x, w_o, w_d, strict=True)
    ]
    trees = (treedef.unflatten(list(leaves)) for leaves in zip(*new, strict=True))
    integer = jnp.int16 if dtype.itemsize == 2 else jnp.int32
    threshold = keys.key_to_magnitude(key.astype(integer), g).astype(jnp.float32)
    x, w_o, w_d = trees
    return x, w_o, w_d, threshold
