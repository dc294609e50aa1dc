"""Models, their layouts on meshes of eight devices, and what their programs move."""

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
    trees = [state.optimisable_weight, state.decreasable_weight, state.mu]
    return [tree for tree in trees if tree is not None]


# Runs and shapes.


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

    def hidden(leaf):
        return isinstance(leaf, optax.MaskedNode)

    return optax.tree.map_params(
        tx,
        lambda leaf, sharding: leaf if hidden(leaf) else sharding,
        jax.eval_shape(tx.init, params),
        shardings,
        transform_non_params=lambda _: NamedSharding(mesh, P()),
        is_leaf=hidden,
    )


def training_step(tx, loss):
    def step(params, state, x):
        value, gradients = jax.value_and_grad(loss)(params, x)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


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


# What the compiled programs move.

WIDTH = 1024  # kernels of 1024 x 2048 and 1024 x 4096: 8 and 16 MiB
MEBIBYTE = 2**20
SMALL = 4096  # bytes: room for a histogram of a thousand counts
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
