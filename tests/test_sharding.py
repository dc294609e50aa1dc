"""Parameters and optimizer state divided over a mesh: same results, nothing gathered.

Two layouts, each on meshes with axis types Auto and Explicit: FSDP, where every leaf is
divided on its largest axis, and tensor parallelism of a transformer block, where the
kernels of a pair are divided by columns and then by rows. What moves between devices is
read off the compiled programs: beyond what the model itself needs, an optimizer step
may move scalars only.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from prunadag_optax import masks, prunadag, scale_by_prunadag
from tests.precision import enable_x64

MEBIBYTE = 2**20
SMALL = 4096  # bytes: room for a histogram of a thousand counts

pytestmark = pytest.mark.skipif(
    jax.device_count() < 8 or not hasattr(jax, "set_mesh"),
    reason="needs eight devices, see conftest.py, and jax.set_mesh",
)
scopes = pytest.mark.parametrize("scope", ["global", "leaf"])


# Layouts.


def placed(x, spec):
    """An array of a model in that layout, on either kind of mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    if AxisType.Explicit in mesh.axis_types:
        return jax.sharding.reshard(x, spec)
    return jax.lax.with_sharding_constraint(x, spec)


def einsum(formula, x, w, spec):
    """A product whose sum may go over the devices."""
    mesh = jax.sharding.get_abstract_mesh()
    if AxisType.Explicit in mesh.axis_types:
        return jnp.einsum(formula, x, w, out_sharding=spec)
    return placed(jnp.einsum(formula, x, w), spec)


def fsdp_shapes(width):
    return {
        "in": {"kernel": (width, 2 * width), "bias": (2 * width,)},
        "out": {"kernel": (2 * width, width), "bias": (width,)},
    }


def fsdp_spec(shape):
    """The largest axis that eight divides, over "fsdp"."""
    axes = [axis for axis, size in enumerate(shape) if size % 8 == 0]
    if not axes:
        return P()
    chosen = max(axes, key=lambda axis: shape[axis])
    return P(*("fsdp" if axis == chosen else None for axis in range(len(shape))))


def fsdp_loss(params, x):
    def dense(layer, x):
        # Whole kernels where they are used: what the model itself has to gather.
        kernel, bias = placed(layer["kernel"], P()), placed(layer["bias"], P())
        return x @ kernel + bias[None]

    x = placed(x, P("fsdp"))
    h = jnp.tanh(dense(params["in"], x))
    return (dense(params["out"], h) ** 2).mean()


def tensor_shapes(width):
    heads, size = 8, width // 8
    return {
        "in": {"kernel": (width, 3, heads, size)},
        "mixed": {"kernel": (heads, size, width), "bias": (width,)},
        "up": {"kernel": (width, 4 * width), "bias": (4 * width,)},
        "down": {"kernel": (4 * width, width), "bias": (width,)},
    }


TENSOR_SPECS = {
    "in": {"kernel": P(None, None, "model", None)},
    "mixed": {"kernel": P("model", None, None), "bias": P()},
    "up": {"kernel": P(None, "model"), "bias": P()},
    "down": {"kernel": P("model", None), "bias": P()},
}


def tensor_loss(params, x):
    """One transformer block, its heads and hidden units divided over "model"."""
    x = placed(x, P("data"))
    heads = P(None, "data", None, "model", None)
    q, k, v = einsum("btd,dnhs->nbths", x, params["in"]["kernel"], heads)
    scores = einsum("bths,buhs->bhtu", q, k, P("data", "model", None, None))
    attention = jax.nn.softmax(scores / math.sqrt(q.shape[-1]))
    mixed = einsum("bhtu,buhs->bths", attention, v, P("data", None, "model", None))
    layer, up, down = params["mixed"], params["up"], params["down"]
    x = x + einsum("bths,hsd->btd", mixed, layer["kernel"], P("data"))
    x = x + layer["bias"][None, None]
    h = einsum("btd,df->btf", x, up["kernel"], P("data", None, "model"))
    h = jnp.tanh(h + up["bias"][None, None])
    x = x + einsum("btf,fd->btd", h, down["kernel"], P("data"))
    return ((x + down["bias"][None, None]) ** 2).mean()


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """A model and how it is divided.

    Attributes:
      axes: names and sizes of the mesh's axes.
      shapes: from a width to the tree of the parameters' shapes.
      specs: from that tree to the tree of their PartitionSpecs.
      batch: from a width to the shape of a batch, the first axis of which is divided
        over the first axis of the mesh.
      loss: (params, batch) -> scalar.
    """

    axes: dict[str, int]
    shapes: Callable[[int], Any]
    specs: Callable[[Any], Any]
    batch: Callable[[int], tuple[int, ...]]
    loss: Callable[[Any, jax.Array], jax.Array]

    def mesh(self, kind):
        sizes, names = tuple(self.axes.values()), tuple(self.axes)
        return jax.make_mesh(sizes, names, axis_types=len(names) * (kind,))

    def shardings(self, mesh, width):
        """Of the parameters and of the batch."""
        specs = self.specs(self.shapes(width))
        first = P(next(iter(self.axes)))
        named = functools.partial(NamedSharding, mesh)
        return jax.tree.map(named, specs, is_leaf=is_spec), named(first)


def is_shape(leaf):
    return isinstance(leaf, tuple)


def is_spec(leaf):
    return isinstance(leaf, P)


LAYOUTS = {
    "fsdp": Layout(
        {"fsdp": 8},
        fsdp_shapes,
        lambda shapes: jax.tree.map(fsdp_spec, shapes, is_leaf=is_shape),
        lambda width: (16, width),
        fsdp_loss,
    ),
    "tensor": Layout(
        {"data": 2, "model": 4},
        tensor_shapes,
        lambda shapes: TENSOR_SPECS,
        lambda width: (4, 4, width),
        tensor_loss,
    ),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
kinds = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)


def drawn(shapes, seed, draw):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: draw(rng, s), shapes, is_leaf=is_shape)


def normal(rng, shape):
    return rng.normal(size=shape).astype(np.float32) / 16


def gridded(rng, shape):
    """Multiples of 1/8: in float32 every sum of 2^18 squares of these is exact."""
    return (rng.integers(-8, 9, shape) / 8).astype(np.float32)


def assert_placed(tree, shardings):
    def check(x, sharding):
        assert x.sharding.is_equivalent_to(sharding, x.ndim), (x.sharding, sharding)

    jax.tree.map(check, tree, shardings)


def trees_like_params(state):
    """What a prunAdag state holds for every parameter."""
    trees = [state.optimisable_weight, state.decreasable_weight, state.gradient_average]
    return [tree for tree in trees if tree is not None]


# Results.


def updates_of(tx, params, state, gradients):
    """The updates of fixed gradients, one step each, the last parameters and state."""

    @jax.jit
    def step(params, state, gradient):
        updates, state = tx.update(gradient, state, params)
        return updates, optax.apply_updates(params, updates), state

    each = []
    for gradient in gradients:
        updates, params, state = step(params, state, gradient)
        each.append(updates)
    return each, params, state


def state_shardings(tx, params, mesh, shardings):
    """Those of the parameters, and the counter on every device."""
    return optax.tree.map_params(
        tx,
        lambda _, sharding: sharding,
        jax.eval_shape(tx.init, params),
        shardings,
        transform_non_params=lambda _: NamedSharding(mesh, P()),
    )


@functools.cache
def on_one_device(layout, draw, steps, variant, scope):
    """The transformation, what it starts from, and what one device makes of it."""
    tx = scale_by_prunadag(0.1, variant=variant, scope=scope, momentum=0.5)
    params, *gradients = (
        drawn(layout.shapes(64), seed, draw) for seed in range(1 + steps)
    )
    start = params, tx.init(params), gradients
    return tx, start, jax.device_get(updates_of(tx, *start))


@kinds
@layouts
@pytest.mark.parametrize(
    ("variant", "scope", "draw", "steps"),
    [
        # Counts are integers, and all else is a function of one component.
        ("v4", "global", normal, 3),
        # The norms are sums, whose order over the devices is all that can differ; here
        # no sum rounds.
        ("v3", "global", gridded, 1),
        pytest.param("v3", "leaf", gridded, 1, marks=pytest.mark.slow),
    ],
)
def test_sharded_update_is_bit_identical(layout, kind, variant, scope, draw, steps):
    tx, start, expected = on_one_device(layout, draw, steps, variant, scope)
    if draw is gridded:
        assert sum(x.size for x in jax.tree.leaves(start[0])) <= 2**18
    mesh = layout.mesh(kind)
    shardings, _ = layout.shardings(mesh, 64)
    with jax.set_mesh(mesh):
        params = jax.device_put(start[0], shardings)
        wanted = state_shardings(tx, params, mesh, shardings)
        state = jax.device_put(start[1], wanted)
        gradients = [jax.device_put(tree, shardings) for tree in start[2]]
        result = updates_of(tx, params, state, gradients)
    jax.tree.map(
        functools.partial(np.testing.assert_array_equal, strict=True), result, expected
    )


def training_step(tx, loss):
    def step(params, state, x):
        value, gradients = jax.value_and_grad(loss)(params, x)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def trained(tx, loss, params, state, batches, shardings=None):
    # Without shardings of the outputs the compiler may divide a replicated bias.
    options = {} if shardings is None else {"out_shardings": (*shardings, None)}
    step, losses = jax.jit(training_step(tx, loss), **options), []
    for batch in batches:
        params, state, value = step(params, state, batch)
        losses.append(value)
    assert step._cache_size() == 1
    return losses, params, state


@functools.cache
def trained_on_one_device(layout):
    tx = scale_by_prunadag(0.01, variant="v3", momentum=0.9)
    tx = optax.chain(optax.clip_by_global_norm(1.0), tx, optax.scale(-1.0))
    params = jax.tree.map(np.float64, drawn(layout.shapes(64), 0, normal))
    batches = np.random.default_rng(1).normal(size=(4, *layout.batch(64)))
    start = jax.device_put((params, tx.init(params), list(batches)))
    return tx, start, jax.device_get(trained(tx, layout.loss, *start))


@kinds
@layouts
def test_training_equals_one_device(layout, kind):
    # Gradients and norms are summed in another order, which may change the class of a
    # component near a threshold. In float64 it would have to stand within 1e-16 of it,
    # so every component has to agree; in float32 a few of a million would not.
    mesh = layout.mesh(kind)
    shardings, over_batch = layout.shardings(mesh, 64)
    with enable_x64():
        tx, (params, state, batches), expected = trained_on_one_device(layout)
        with jax.set_mesh(mesh):
            wanted = state_shardings(tx, params, mesh, shardings)
            result = trained(
                tx,
                layout.loss,
                jax.device_put(params, shardings),
                jax.device_put(state, wanted),
                [jax.device_put(batch, over_batch) for batch in batches],
                (shardings, wanted),
            )
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12),
        result,
        expected,
    )
    losses, moved, state = result
    assert losses[-1] < losses[0]
    assert_placed((moved, state), (shardings, wanted))


# Sharding of the state.


@kinds
@layouts
def test_state_and_updates_are_sharded_as_the_parameters(layout, kind):
    tx = scale_by_prunadag(momentum=0.9, accumulator_dtype="float32")
    mesh = layout.mesh(kind)
    shardings, _ = layout.shardings(mesh, 64)
    whole = NamedSharding(mesh, P())
    with jax.set_mesh(mesh):
        params = jax.device_put(drawn(layout.shapes(64), 0, normal), shardings)
        states = [tx.init(params)]
        # A compiled `init` does not look at the parameters' values, so on an Auto mesh
        # it does not see where they are; it has to be told.
        wanted = state_shardings(tx, params, mesh, shardings)
        states.append(jax.jit(tx.init, out_shardings=wanted)(params))
        if kind is AxisType.Explicit:
            states.append(jax.jit(tx.init)(params))
        update = jax.jit(tx.update)
        for state in states:
            updates, after = update(params, state, params)
            for tree in (*trees_like_params(state), *trees_like_params(after), updates):
                assert_placed(tree, shardings)
            assert_placed((state.count, after.count), (whole, whole))
            assert len(trees_like_params(after)) == 3


# What the compiled programs move.

COLLECTIVES = re.compile(
    r" = (?P<shapes>\(.*?\)|\S+) (?P<op>all-gather|all-reduce|all-to-all|"
    r"reduce-scatter|collective-permute|collective-broadcast|ragged-all-to-all)"
    r"(?:-start)?\("
)
SHAPE = re.compile(
    r"\b(?P<kind>pred|bf|[a-z])(?P<bits>\d*)[a-z0-9]*\[(?P<sizes>[\d,]*)\]"
)


def collectives(compiled):
    """How often a compiled program has each (operation, bytes of an output).

    Each output of an operation that has several counts for itself, so that nothing
    depends on which operations XLA combines. Loops count once.
    """
    found = collections.Counter()
    for line in compiled.splitlines():
        match = COLLECTIVES.search(line)
        if match is None:
            assert not re.search(
                r" = .* (all|reduce-scatter|collective)-\S*start\(", line
            )
            continue
        for shape in SHAPE.finditer(match["shapes"]):
            sizes = [int(size) for size in shape["sizes"].split(",") if size]
            bits = 8 if shape["kind"] == "pred" else int(shape["bits"])
            found[match["op"], math.prod(sizes) * bits // 8] += 1
    return found


def compiled(function, *args):
    # No program runs, so none needs fast machine code; what moves is settled before.
    options = {"xla_backend_optimization_level": 0}
    lowered = jax.jit(function).lower(*args)
    return collectives(lowered.compile(compiler_options=options).as_text())


def assert_nothing_moves(found, limit):
    too_large = {key: count for key, count in found.items() if key[1] > limit}
    assert not too_large, f"collectives of more than {limit} bytes: {too_large}"


def test_collectives_are_found():
    program = """
  %all-reduce.1 = f32[1024,512]{1,0} all-reduce(%x), channel_id=1, to_apply=%add
  %all-gather-start.2 = (f32[4]{0}, f32[8,4]{1,0:T(8,128)}) all-gather-start(%y), x=1
  ROOT %all-to-all = (bf16[3,2]{1,0}, pred[]) all-to-all(%a, %b), channel_id=3
  %reduce-scatter = s64[7]{0} reduce-scatter(%z), dimensions={0}
  %all-reduce.2 = (f32[], s32[2]{0}) all-reduce(%u, %v), to_apply=%add
  %collective-permute-done = f8e4m3fn[5]{0} collective-permute-done(%w)
  %collective-permute.3 = f8e4m3fn[5]{0} collective-permute(%w), channel_id=9
  %fusion = f32[9]{0} fusion(%all-reduce.1), kind=kLoop, calls=%all-gather.9
"""
    assert collectives(program) == {
        ("all-reduce", 4 * 1024 * 512): 1,
        ("all-gather", 16): 1,
        ("all-gather", 128): 1,
        ("all-to-all", 12): 1,
        ("all-to-all", 1): 1,
        ("reduce-scatter", 56): 1,
        ("all-reduce", 4): 1,
        ("all-reduce", 8): 1,
        ("collective-permute", 5): 1,
    }


def abstract(layout, mesh, width, dtype=jnp.float32):
    """Shapes of parameters and of a batch with their shardings, without arrays."""
    shardings, over_batch = layout.shardings(mesh, width)

    def of(shape, sharding):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    params = jax.tree.map(of, layout.shapes(width), shardings, is_leaf=is_shape)
    return params, of(layout.batch(width), over_batch)


def state_of(tx, params, mesh):
    """The state's shapes, sharded as the parameters."""
    shardings = jax.tree.map(lambda x: x.sharding, params)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(tx.init, params),
        state_shardings(tx, params, mesh, shardings),
    )


WIDTH = 1024  # kernels of 1024 x 2048 and 1024 x 4096: 8 and 16 MiB


@functools.cache
def moved_by_model(layout, kind):
    """The collectives of a step of Adagrad: those of the model, and no others."""
    mesh, tx = layout.mesh(kind), optax.adagrad(0.1)
    with jax.set_mesh(mesh):
        params, batch = abstract(layout, mesh, WIDTH)
        state = state_of(tx, params, mesh)
        assert not compiled(tx.update, params, state, params)
        return compiled(training_step(tx, layout.loss), params, state, batch)


@layouts
@scopes
@pytest.mark.parametrize(
    ("kind", "variant"),
    # v3 does all that the others do.
    [(AxisType.Auto, "v3"), (AxisType.Explicit, "v3"), (AxisType.Auto, "v4")]
    + [pytest.param(AxisType.Auto, v, marks=pytest.mark.slow) for v in ("v1", "v2")],
    ids=str,
)
def test_optimizer_moves_scalars_only(layout, kind, variant, scope):
    tx = prunadag(0.1, variant=variant, scope=scope)
    mesh = layout.mesh(kind)
    with jax.set_mesh(mesh):
        params, _ = abstract(layout, mesh, WIDTH)
        found = compiled(tx.update, params, state_of(tx, params, mesh), params)
    assert found, "counts over sharded leaves need some collective"
    assert_nothing_moves(found, SMALL)


@kinds
@layouts
def test_a_step_moves_what_the_model_needs_and_scalars(layout, kind):
    tx = prunadag(0.1)
    mesh = layout.mesh(kind)
    with jax.set_mesh(mesh):
        params, batch = abstract(layout, mesh, WIDTH)
        state = state_of(tx, params, mesh)
        found = compiled(training_step(tx, layout.loss), params, state, batch)
    model = moved_by_model(layout, kind)
    # The model's own: whole kernels with FSDP, sums of gradients with both.
    assert max(size for _, size in model) > MEBIBYTE
    assert_nothing_moves(found - model, SMALL)


@kinds
def test_replicated_parameters_move_nothing(kind):
    layout, tx = LAYOUTS["fsdp"], prunadag(0.1)
    mesh = layout.mesh(kind)
    whole = NamedSharding(mesh, P())
    with jax.set_mesh(mesh):
        params = jax.tree.map(
            lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=whole),
            layout.shapes(WIDTH),
            is_leaf=is_shape,
        )
        state = state_of(tx, params, mesh)
        assert not compiled(tx.update, params, state, params)


@kinds
@layouts
def test_masks_move_scalars_only(layout, kind):
    mesh = layout.mesh(kind)

    def kernels(path, leaf):
        del path
        return leaf.ndim > 1

    def prune(params):
        pruned, mask = masks.prune(params, 0.9, where=kernels)
        again = masks.magnitude_mask(params, 0.95, scope="leaf", previous=mask)
        return pruned, again, masks.sparsity(mask), masks.sparsity(pruned)

    with jax.set_mesh(mesh):
        params, _ = abstract(layout, mesh, WIDTH)
        assert_nothing_moves(compiled(prune, params), SMALL)
        tx = optax.chain(optax.sgd(0.1), masks.keep_pruned(params_mask))
        held = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bool_, sharding=x.sharding),
            params,
        )
        assert not compiled(masks.apply_mask, params, held)
        state = (jax.eval_shape(tx.init, params)[0], masks.KeepPrunedState(held))
        assert not compiled(tx.update, params, state, params)


def params_mask(params):
    return jax.tree.map(lambda x: jnp.ones_like(x, bool), params)


def concatenated(params):
    vector = jnp.concatenate([x.ravel() for x in jax.tree.leaves(params)])
    return jax.lax.top_k(jnp.abs(vector), vector.size // 10)[0][-1]


def sorted_by_leaf(params):
    leaves = [jnp.abs(x).ravel() for x in jax.tree.leaves(params)]
    return sum(jnp.sort(x)[-x.size // 10] for x in leaves)


@layouts
@pytest.mark.parametrize("naive", [concatenated, sorted_by_leaf])
def test_naive_forms_are_found_out(layout, naive):
    mesh = layout.mesh(AxisType.Auto)
    with jax.set_mesh(mesh):
        params, batch = abstract(layout, mesh, WIDTH)

        def update(updates, state, params=None):
            threshold = naive(params)
            return jax.tree.map(
                lambda u: jnp.where(u > threshold, u, 0), updates
            ), state

        tx = optax.chain(
            optax.sgd(0.1),
            optax.GradientTransformation(lambda _: optax.EmptyState(), update),
        )
        state = tx.init(params)
        alone = compiled(tx.update, params, state, params)
        step = compiled(training_step(tx, layout.loss), params, state, batch)
    with pytest.raises(AssertionError, match="more than 1048576 bytes"):
        assert_nothing_moves(alone, MEBIBYTE)
    with pytest.raises(AssertionError, match="more than 1048576 bytes"):
        assert_nothing_moves(step - moved_by_model(layout, AxisType.Auto), MEBIBYTE)
