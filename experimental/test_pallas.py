"""The Pallas kernels, interpreted on the CPU, against the plain path."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from experimental import pallas
from prunadag_optax import prunadag
from prunadag_optax._ranking.keys import key_of

# Slow as all that is interpreted, and not in the wheel.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not hasattr(triton, "load"), reason="this jax has an older Pallas"
    ),
]

# A power of two: a product with it is exact, wherever a compiler puts it.
RATE = 1 / 16
BLOCK = pallas._CHUNK * pallas._CHUNKS
VARIANTS = ("v1", "v2", "v3", "v4")
# A leaf of whole blocks and one that ends within a block.
SHAPES = ((2 * BLOCK,), (BLOCK // 2 + 77, 3))
KERNELS = {"v1": 3, "v4": 2}  # a leaf
# v3 does all that the others do.
variants = pytest.mark.parametrize(
    "variant",
    [pytest.param(v, marks=() if v == "v3" else pytest.mark.slow) for v in VARIANTS],
)


def optimizer(variant, accumulator=None, **options):
    return prunadag(RATE, variant=variant, accumulator_dtype=accumulator, **options)


@functools.partial(jax.jit, static_argnames=("variant", "accumulator"))
def plain_step(x, state, g, *, variant, accumulator=None):
    updates, state = optimizer(variant, accumulator).update(g, state, x)
    return optax.apply_updates(x, updates), state


@functools.partial(jax.jit, static_argnames=("variant", "pivots", "interpret"))
def own_step(x, state, g, count, *, variant, pivots=5, interpret=None):
    return pallas.step(
        x,
        state,
        g,
        learning_rate=RATE,
        decrease=1.0 / (count + 1.0),
        variant=variant,
        pivots=pivots,
        interpret=interpret,
    )


def normal(seed, shapes=SHAPES, dtype="float32"):
    generator = np.random.default_rng(seed)
    return [jnp.asarray(generator.normal(size=shape), dtype) for shape in shapes]


def on_grid(seed, low=-32):
    """Multiples of 1/16 to 2: squares, and sums of squares, are exact in float32."""
    generator = np.random.default_rng(seed)
    return [
        jnp.asarray(generator.integers(low, 32, shape, endpoint=True) / 16, "float32")
        for shape in SHAPES
    ]


def weights_of(state):
    return state[0].optimisable_weight, state[0].decreasable_weight


def both(x, state, g, variant, accumulator=None):
    """One step of each from one state: (x, w^O, w^D) twice, and the plain state."""
    count, threshold = state[0].count, state[0].threshold_hint
    own = own_step(x, (*weights_of(state), threshold), g, count, variant=variant)
    x, state = plain_step(x, state, g, variant=variant, accumulator=accumulator)
    return own[:3], (x, *weights_of(state)), state


def assert_close(own, plain, rtol, atol):
    for a, b in zip(jax.tree.leaves(own), jax.tree.leaves(plain), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol, atol)


@variants
def test_step_is_the_plain_one_bit_for_bit(variant):
    # On such numbers neither the order of a sum nor a fused multiply-add matters. There
    # are many ties at the threshold, and zeros in x and g.
    state = optimizer(variant).init(on_grid(0))
    for seed in range(3):
        inner = state[0]._replace(
            count=jnp.asarray(2**seed - 1, jnp.int32),
            optimisable_weight=on_grid(seed + 10, low=1),
            decreasable_weight=on_grid(seed + 20, low=1),
        )
        state = (inner, *state[1:])
        x, g = on_grid(seed + 30), on_grid(seed + 40)
        own, plain, state = both(x, state, g, variant)
        for a, b in zip(jax.tree.leaves(own), jax.tree.leaves(plain), strict=True):
            np.testing.assert_array_equal(a, b)


@variants
def test_runs_agree(variant):
    x = normal(0)
    state = optimizer(variant).init(x)
    own = (x, *weights_of(state), state[0].threshold_hint)
    for seed in range(1, 6):
        g = normal(seed)
        own = own_step(own[0], own[1:], g, state[0].count, variant=variant)
        x, state = plain_step(x, state, g, variant=variant)
    assert_close(own[:3], (x, *weights_of(state)), 1e-5, 1e-6)


def test_bfloat16_with_float32_weights():
    x = normal(0, dtype="bfloat16")
    state = optimizer("v3", "float32").init(x)
    for seed in range(1, 4):
        g = normal(seed, dtype="bfloat16")
        own, plain, state = both(x, state, g, "v3", "float32")
        # XLA may leave out the rounding of the update before it is added.
        assert_close(own[0], plain[0], 2**-7, 1e-3)
        assert_close(own[1:], plain[1:], 1e-6, 0)
        x = plain[0]


def test_mixed_dtypes_share_one_threshold():
    def mixed(seed):
        a, b, c = normal(seed, (*SHAPES, ()))
        return [a.astype("bfloat16"), b, c.astype("float16")]

    x = mixed(0)
    # The weights have the leaves' dtypes too.
    own, plain, _ = both(x, optimizer("v4").init(x), mixed(1), "v4")
    assert_close(own, plain, 2**-7, 1e-3)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@variants
def test_non_finite_gradients(variant, value):
    x, g = normal(0), normal(1)
    g[1] = g[1].at[5, 1].set(value)
    own, plain, _ = both(x, optimizer(variant).init(x), g, variant)
    assert_close(own, plain, 1e-6, 1e-6)


def test_zero_gradient_makes_every_component_relevant():
    x = normal(0)
    g = jax.tree.map(jnp.zeros_like, x)
    own, plain, _ = both(x, optimizer("v3").init(x), g, "v3")
    assert_close(own, plain, 0, 0)
    assert_close(own[0], x, 0, 0)


def test_empty_leaf():
    x, g = (normal(seed, ((), (0, 3))) for seed in (0, 1))
    own, plain, _ = both(x, optimizer("v1").init(x), g, "v1")
    assert_close(own, plain, 1e-6, 1e-6)


any_bits = st.integers(0, 2**32 - 1)


@settings(deadline=None, max_examples=20)
@given(
    st.lists(any_bits, min_size=1, max_size=40),
    st.sampled_from([BLOCK, BLOCK + 1]),
    st.lists(st.integers(-(2**31), 2**31 - 1), min_size=5, max_size=5),
)
def test_counts_are_those_of_numpy(bits, repeats, pivots):
    # Every bit pattern: subnormal numbers, both zeros, infinities and NaN too.
    bits = np.resize(np.array(bits, np.uint32), repeats)
    keys, pivots = (bits & 0x7FFFFFFF).astype(np.int32), np.array(pivots, np.int32)
    expected = (keys[:, None] >= pivots[None]).sum(0)
    counts = counting(jnp.asarray(bits.view(np.float32)), jnp.asarray(pivots))
    assert counts.dtype == jnp.int32
    np.testing.assert_array_equal(counts, expected)


def test_keys_are_counted_as_floats_are():
    pivots = jnp.asarray([0, 3, 7, 9, -1], jnp.int32)
    counts = counting(jnp.arange(9, dtype=jnp.int16).reshape(3, 3), pivots)
    assert counts.tolist() == [9, 6, 2, 0, 9]


counting = jax.jit(pallas.count_reaching)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("key_dtype", [None, "float32"])
def test_counts_of_every_half_precision_number(dtype, key_dtype):
    leaf = jnp.arange(2**16, dtype=jnp.uint16).view(dtype)
    keys = key_of(leaf, key_dtype or dtype).astype(jnp.int32)
    pivots = keys[jnp.arange(1, 2**15, 4096)]
    counts = pallas.count_reaching(leaf, pivots, key_dtype=key_dtype)
    expected = (np.asarray(keys)[:, None] >= np.asarray(pivots)[None]).sum(0)
    np.testing.assert_array_equal(counts, expected)


@pytest.mark.parametrize("pivots", [15, 31])
@pytest.mark.parametrize("guess", [None, 1.3])
def test_search_finds_the_rank_in_few_passes(pivots, guess):
    leaves, k = normal(3), 1434
    keys = np.concatenate([np.ravel(key_of(x, x.dtype)) for x in leaves])
    answer = np.sort(keys)[-k]
    near = None
    if guess is not None:
        near = answer.view(np.float32) * np.float32(guess)
        near = key_of(jnp.asarray(near), jnp.float32)
    search = jax.jit(functools.partial(pallas.kth_largest_key, pivots=pivots))
    key, passes = search(leaves, k, near)
    assert (keys >= key).sum() == k
    assert passes <= (4 if guess else 6)


def test_squares_are_the_norms():
    g, x = normal(1)[1], normal(2)[1]
    threshold = key_of(jnp.float32(1), jnp.float32)
    g_squared, x_squared = pallas.squares(g, x, threshold)
    g, x = np.asarray(g, np.float64), np.asarray(x, np.float64)
    relevant = np.abs(g) >= 1
    in_s = ~relevant & (np.sign(x) == np.sign(g))
    np.testing.assert_allclose(g_squared, (g[relevant] ** 2).sum(), 1e-6)
    np.testing.assert_allclose(x_squared, (x[in_s] ** 2).sum(), 1e-6)


def test_what_is_refused():
    x = jnp.ones(3)
    with pytest.raises(ValueError, match=r"1\.\.32"):
        pallas.count_reaching(x, jnp.zeros(33, jnp.int32))
    with pytest.raises(ValueError, match="upper"):
        pallas.update(x, x, x, x, x[0], learning_rate=1, decrease=1, upper="no")
    with pytest.raises(ValueError, match="variant"):
        pallas.step(x, (x, x, None), x, variant="relevant_only")
    with pytest.raises(ValueError, match="int32"):
        pallas.step(x, (x, x, None), x.astype("int32"))
    with pytest.raises(ValueError, match="no elements"):
        pallas.step(x[:0], (x[:0], x[:0], None), x[:0])
    with pytest.raises(ValueError, match="pivots"):
        pallas.step(x, (x, x, None), x, pivots=2)


def for_cuda(function, *shapes):
    """The StableHLO text of a function, lowered for CUDA."""
    traced = jax.jit(function).trace(*shapes)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.fixture
def needs_cuda_lowering():
    def copy(x_ref, y_ref):
        y_ref[...] = x_ref[...]

    shape = jax.ShapeDtypeStruct((128,), jnp.float32)
    params = triton.CompilerParams()
    try:
        for_cuda(pl.pallas_call(copy, shape, compiler_params=params), shape)
    except (ImportError, NotImplementedError, RuntimeError, ValueError) as error:
        pytest.skip(f"this jax lowers no kernel for CUDA here: {error}")


@pytest.mark.usefixtures("needs_cuda_lowering")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("variant", KERNELS)
def test_kernels_lower_for_cuda(variant, dtype):
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape in SHAPES]
    wide = [jax.ShapeDtypeStruct(shape, "float32") for shape in SHAPES]
    scalar = jax.ShapeDtypeStruct((), "float32")
    function = functools.partial(own_step, variant=variant, pivots=15, interpret=False)
    text = for_cuda(function, shapes, (wide, wide, scalar), shapes, scalar)
    # One call a kernel and leaf, those in the loop of passes included.
    assert text.count("xla.gpu.triton") == KERNELS[variant] * len(SHAPES)
    # x, w^O and w^D of each leaf in place.
    assert text.count("output_operand_alias<") == 3 * len(SHAPES)
