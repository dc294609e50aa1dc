"""Models whose groups of units are known by reasoning (`tables.py`), and larger ones.

`MODELS` holds small ones, each with one size an axis unless equality is the point;
`LARGE` holds those whose tracing or running is timed. Both map a name to a function
without arguments that makes the model.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from prunadag_optax import structure


@dataclasses.dataclass(frozen=True)
class Model:
    """A function `apply(variables, *inputs)`, its variables and its inputs.

    `state` names the outputs that are new values of variables, such as the averages of
    BatchNorm in training: output -> {path of the variable: leaf of the output}.
    """

    apply: Callable[..., Any]
    variables: Any
    inputs: tuple
    state: Callable[[Any], dict[str, Any]] | None = None


MODELS: dict[str, Callable[[], Model]] = {}
LARGE: dict[str, Callable[[], Model]] = {}


def small(make):
    MODELS[make.__name__] = make
    return make


def large(make):
    LARGE[make.__name__] = make
    return make


@functools.cache
def made(name) -> tuple[Model, structure.Structure]:
    """A model and its structure."""
    model = (MODELS | LARGE)[name]()
    found = structure.trace(
        model.apply, model.variables, *model.inputs, state=model.state
    )
    return model, found


# Values.


def named(tree) -> dict[str, Any]:
    """The leaves by their paths, as "params/Dense_0/kernel"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in leaves
    }


def filled(shapes, seed=0):
    """Random values for a tree of shapes: none is 0 or 1, so that every leaf matters.

    Leaves of one axis (scales, biases, averages, variances) are positive.
    """
    rng = np.random.default_rng(seed)

    def leaf(x):
        if len(x.shape) < 2:
            return jnp.asarray(rng.uniform(0.2, 0.8, x.shape), x.dtype)
        fan_in = x.size / x.shape[-1]
        return jnp.asarray(rng.normal(size=x.shape) / fan_in**0.5, x.dtype)

    return jax.tree.map(leaf, shapes)


def only_shapes(shapes):
    """In place of `filled`, for models whose weights need not exist."""
    return shapes


def floats(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def tokens(vocabulary, *shape, seed=1):
    draws = np.random.default_rng(seed).integers(0, vocabulary, shape)
    return jnp.asarray(draws, jnp.int32)


# Makers.


def from_linen(module, *inputs, values=filled, rngs=None) -> Model:
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    return Model(
        lambda variables, *inputs: module.apply(variables, *inputs, rngs=rngs),
        values(shapes),
        inputs,
    )


def training_linen(module, *inputs) -> Model:
    """As a training step sees it: the new averages are an output."""

    def apply(variables, *inputs):
        return module.apply(variables, *inputs, mutable=["batch_stats"])

    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    return Model(apply, filled(shapes), inputs, lambda output: named(output[1]))


VARIABLES = nnx.Any(nnx.Param, nnx.BatchStat)


def from_nnx(make, *inputs, values=filled) -> Model:
    graphdef, variables, rest = nnx.split(nnx.eval_shape(make), VARIABLES, ...)
    return Model(
        lambda variables, *inputs: nnx.merge(graphdef, variables, rest)(*inputs),
        values(variables),
        inputs,
    )


def training_nnx(make, *inputs) -> Model:
    graphdef, variables, rest = nnx.split(nnx.eval_shape(make), VARIABLES, ...)

    def apply(variables, *inputs):
        module = nnx.merge(graphdef, variables, rest)
        return module(*inputs), nnx.state(module, nnx.BatchStat)

    return Model(apply, filled(variables), inputs, lambda output: named(output[1]))


def from_function(apply, sizes: Mapping, *inputs, values=filled) -> Model:
    """`sizes` is the tree of the weights, a tuple of sizes for each."""
    shapes = jax.tree.map(
        lambda size: jax.ShapeDtypeStruct(size, jnp.float32),
        sizes,
        is_leaf=lambda node: isinstance(node, tuple),
    )
    return Model(apply, values(shapes), inputs)


# What the models in plain JAX share. The tests refuse implicit rank promotion.


def along_last(x, like):
    """A vector as an array of `like`'s rank that broadcasts over its leading axes."""
    return x.reshape((1,) * (like.ndim - 1) + x.shape)


def affine(x, kernel, bias):
    y = x @ kernel
    return y + along_last(bias, y)


def rms_norm(x, scale):
    mean = jnp.mean(x * x, axis=-1, keepdims=True)
    return x * lax.rsqrt(mean + 1e-6) * along_last(scale, x)


def layer_norm(x):
    mean = x.mean(-1, keepdims=True)
    return (x - mean) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-6)


def causal(length):
    return jnp.tril(jnp.ones((1, 1, length, length), bool))


def attend(query, key, value, bias=None, mask=None):
    """Attention of arrays (batch, token, head, dimension of a head)."""
    logits = jnp.einsum("bqhk,bshk->bhqs", query, key) / query.shape[-1] ** 0.5
    if bias is not None:
        logits = logits + bias
    if mask is not None:
        logits = jnp.where(mask, logits, -1e9)
    return jnp.einsum("bhqs,bshk->bqhk", jax.nn.softmax(logits), value)


def conv(x, kernel, groups=1):
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=layout, feature_group_count=groups
    )


# Perceptrons and convolutions in linen.


@small
def mlp():
    layers = [nn.Dense(16), nn.relu, nn.Dense(12), nn.gelu, nn.Dense(5)]
    return from_linen(nn.Sequential(layers), floats(4, 7))


class LeNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        for features in (6, 10):
            x = nn.relu(nn.Conv(features, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.tanh(nn.Dense(14)(x.reshape(x.shape[0], -1)))
        return nn.Dense(5)(x)


@small
def lenet():
    return from_linen(LeNet(), floats(4, 12, 8, 3))


class VGG(nn.Module):
    """Stages of (width, convolutions), each halving the image; then dense layers."""

    stages: tuple[tuple[int, int], ...] = ((8, 2), (12, 2), (16, 2))
    dense: tuple[int, ...] = (20,)
    classes: int = 5
    train: bool = False

    @nn.compact
    def __call__(self, x):
        for width, convolutions in self.stages:
            for _ in range(convolutions):
                x = nn.Conv(width, (3, 3), use_bias=False)(x)
                x = nn.relu(nn.BatchNorm(use_running_average=not self.train)(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        for width in self.dense:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.classes)(x)


@small
def vgg():
    return from_linen(VGG(), floats(4, 16, 16, 3))


@small
def vgg_train():
    return training_linen(VGG(train=True), floats(4, 16, 16, 3))


class ResNet(nn.Module):
    """Blocks of (width, stride); the input is projected where the shape changes."""

    blocks: tuple[tuple[int, int], ...] = ((8, 1), (12, 2), (12, 1))
    classes: int = 5
    train: bool = False

    @nn.compact
    def __call__(self, x):
        def conv_norm(x, width, size, stride, name):
            conv = nn.Conv(
                width, (size, size), (stride, stride), use_bias=False, name=name
            )
            norm = nn.BatchNorm(use_running_average=not self.train, name=f"{name}_norm")
            return norm(conv(x))

        x = nn.relu(conv_norm(x, self.blocks[0][0], 3, 1, "stem"))
        for n, (width, stride) in enumerate(self.blocks):
            y = nn.relu(conv_norm(x, width, 3, stride, f"block{n}_first"))
            y = conv_norm(y, width, 3, 1, f"block{n}_second")
            if x.shape != y.shape:
                x = conv_norm(x, width, 1, stride, f"block{n}_skip")
            x = nn.relu(x + y)
        return nn.Dense(self.classes, name="head")(x.mean((1, 2)))


@small
def resnet():
    return from_linen(ResNet(), floats(4, 10, 10, 3))


@small
def resnet_train():
    return training_linen(ResNet(train=True), floats(4, 10, 10, 3))


class DenseNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3))(x)
        for growth in (6, 5, 4):
            y = nn.relu(nn.BatchNorm(use_running_average=True)(x))
            x = jnp.concatenate([x, nn.Conv(growth, (3, 3))(y)], axis=-1)
        x = nn.avg_pool(nn.Conv(10, (1, 1))(x), (2, 2), (2, 2))
        return nn.Dense(7)(x.mean((1, 2)))


@small
def densenet():
    return from_linen(DenseNet(), floats(3, 10, 10, 2))


class MobileNet(nn.Module):
    """Squeeze and excite, a depth multiplier of 2, a convolution in four groups."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu6(nn.Conv(8, (3, 3), (2, 2), name="stem")(x))
        y = nn.relu6(nn.Conv(24, (1, 1), name="expand")(x))
        y = nn.relu6(nn.Conv(24, (3, 3), feature_group_count=24, name="depthwise")(y))
        gate = nn.relu(nn.Dense(6, name="squeeze")(y.mean((1, 2))))
        gate = nn.sigmoid(nn.Dense(24, name="excite")(gate))
        x = x + nn.Conv(8, (1, 1), name="project")(y * gate[:, None, None, :])
        x = nn.relu(nn.Conv(16, (3, 3), feature_group_count=8, name="multiply")(x))
        x = nn.relu(nn.Conv(20, (1, 1), name="pointwise")(x))
        x = nn.relu(nn.Conv(12, (3, 3), feature_group_count=4, name="grouped")(x))
        return nn.Dense(7, name="head")(x.mean((1, 2)))


@small
def mobilenet():
    return from_linen(MobileNet(), floats(3, 10, 10, 3))


class DepthwiseIntoGrouped(nn.Module):
    """A depth multiplier of 2 over 8 channels, its 16 outputs taken in groups of 4."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), name="stem")(x))
        x = nn.relu(nn.Conv(16, (3, 3), feature_group_count=8, name="multiply")(x))
        x = nn.relu(nn.Conv(12, (3, 3), feature_group_count=4, name="grouped")(x))
        return nn.Dense(5, name="head")(x.mean((1, 2)))


@small
def depthwise_into_grouped():
    return from_linen(DepthwiseIntoGrouped(), floats(7, 10, 10, 5))


class UNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        high = nn.relu(nn.Conv(6, (3, 3), name="high")(x))
        x = nn.max_pool(high, (2, 2), (2, 2))
        middle = nn.relu(nn.Conv(10, (3, 3), name="middle")(x))
        x = nn.avg_pool(middle, (2, 2), (2, 2))
        x = nn.relu(nn.Conv(14, (3, 3), name="low")(x))
        x = jax.image.resize(x, (*middle.shape[:3], x.shape[3]), "bilinear")
        x = jnp.concatenate([x, middle], axis=-1)
        x = nn.relu(nn.Conv(9, (3, 3), name="merge")(x))
        x = nn.relu(nn.ConvTranspose(7, (2, 2), (2, 2), name="up")(x))
        x = jnp.concatenate([x, high], axis=-1)
        return nn.Conv(2, (1, 1), name="head")(x)


@small
def unet():
    return from_linen(UNet(), floats(4, 8, 12, 3))


class NormCNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.GroupNorm(num_groups=4)(nn.Conv(12, (3, 3))(x)))
        x = nn.relu(nn.InstanceNorm()(nn.Conv(10, (3, 3))(x)))
        return nn.Dense(5)(x.max((1, 2)))


@small
def norm_cnn():
    return from_linen(NormCNN(), floats(2, 8, 8, 3))


class PixelShuffle(nn.Module):
    """Twice the resolution: channels (2, 2, 5) become rows, columns and channels."""

    @nn.compact
    def __call__(self, x):
        batch, height, width, _ = x.shape
        x = nn.relu(nn.Conv(20, (3, 3))(x))
        x = x.reshape(batch, height, width, 2, 2, 5).transpose(0, 1, 3, 2, 4, 5)
        x = x.reshape(batch, 2 * height, 2 * width, 5)
        return nn.Conv(3, (3, 3))(x)


@small
def pixel_shuffle():
    return from_linen(PixelShuffle(), floats(4, 6, 8, 2))


class InputSkip(nn.Module):
    """The input joins the hidden units: a part of an axis is frozen."""

    @nn.compact
    def __call__(self, x):
        y = nn.relu(nn.Dense(16)(x))
        y = nn.relu(nn.Dense(12)(jnp.concatenate([x, y], axis=-1)))
        return nn.Dense(5)(y)


@small
def input_skip():
    return from_linen(InputSkip(), floats(4, 7))


# Transformers and recurrent networks in linen.


class Encoder(nn.Module):
    depth: int = 2
    width: int = 12
    heads: int = 4
    head_size: int = 5
    hidden: int = 24
    classes: int = 9
    dropout: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.width, name="embed")(x)
        shape = (1, x.shape[1], self.width)
        x = x + self.param("positions", nn.initializers.normal(), shape)
        for n in range(self.depth):
            y = nn.LayerNorm(name=f"norm{n}_attention")(x)
            x = x + nn.MultiHeadDotProductAttention(
                self.heads,
                qkv_features=self.heads * self.head_size,
                out_features=self.width,
                name=f"attention{n}",
            )(y, y)
            y = nn.LayerNorm(name=f"norm{n}_mlp")(x)
            y = nn.gelu(nn.Dense(self.hidden, name=f"up{n}")(y))
            y = nn.Dropout(0.1, deterministic=not self.dropout)(y)
            x = x + nn.Dense(self.width, name=f"down{n}")(y)
        x = nn.LayerNorm(name="norm")(x).mean(1)
        return nn.Dense(self.classes, name="head")(x)


@small
def encoder():
    return from_linen(Encoder(), floats(3, 6, 7))


@small
def encoder_dropout():
    rngs = {"dropout": jax.random.key(3)}
    shapes = from_linen(Encoder(), floats(3, 6, 7))
    train = Encoder(dropout=True)
    apply = lambda variables, x: train.apply(variables, x, rngs=rngs)  # noqa: E731
    return dataclasses.replace(shapes, apply=apply)


class ScannedLayer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.LayerNorm(name="norm_attention")(x)
        x = x + nn.MultiHeadDotProductAttention(4, qkv_features=20, name="attention")(y)
        y = nn.LayerNorm(name="norm_mlp")(x)
        y = nn.gelu(nn.Dense(24, name="up")(y))
        return x + nn.Dense(12, name="down")(y), None


class Scanned(nn.Module):
    """Three layers stacked by nn.scan, each rematerialised."""

    @nn.compact
    def __call__(self, x):
        x = nn.Embed(50, 12, name="embed")(x)
        stack = nn.scan(
            nn.remat(ScannedLayer),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        x, _ = stack(name="layers")(x, None)
        return nn.Dense(7, name="head")(x)


@small
def scanned_transformer():
    return from_linen(Scanned(), tokens(50, 2, 6))


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.RNN(nn.OptimizedLSTMCell(11, name="fast_lstm"))(x)
        x = nn.RNN(nn.GRUCell(9, name="gru"))(x)
        x = nn.RNN(nn.LSTMCell(8, name="lstm"))(x)
        return nn.Dense(5, name="head")(x[:, -1])


@small
def recurrent():
    return from_linen(Recurrent(), floats(3, 6, 7))


class MixedPrecision(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm(dtype=jnp.float32)(nn.Dense(16, dtype=jnp.bfloat16)(x))
        x = nn.Dense(12, dtype=jnp.bfloat16)(nn.gelu(x))
        return nn.Dense(5, dtype=jnp.float32)(nn.relu(x))


@small
def mixed_bf16():
    return from_linen(MixedPrecision(), floats(4, 7))


# nnx.


class Block(nnx.Module):
    """The two halves of `up` are the gate and what it gates."""

    def __init__(self, width, heads, head_size, hidden, rngs):
        self.norm_attention = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            num_heads=heads,
            in_features=width,
            qkv_features=heads * head_size,
            decode=False,
            rngs=rngs,
        )
        self.norm_mlp = nnx.RMSNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 2 * hidden, rngs=rngs)
        self.down = nnx.Linear(hidden, width, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm_attention(x))
        gate, y = jnp.split(self.up(self.norm_mlp(x)), 2, axis=-1)
        return x + self.down(nnx.silu(gate) * y)


class Transformer(nnx.Module):
    def __init__(self, vocabulary, depth, width, heads, head_size, hidden, rngs):
        self.embed = nnx.Embed(vocabulary, width, rngs=rngs)
        self.blocks = nnx.List(
            [Block(width, heads, head_size, hidden, rngs) for _ in range(depth)]
        )
        self.head = nnx.Linear(width, 7, rngs=rngs)

    def __call__(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@small
def nnx_transformer():
    make = lambda: Transformer(50, 2, 12, 4, 5, 24, nnx.Rngs(0))  # noqa: E731
    return from_nnx(make, tokens(50, 3, 6))


class CNN(nnx.Module):
    def __init__(self, train, rngs):
        average = {"use_running_average": not train, "rngs": rngs}
        self.conv1 = nnx.Conv(3, 6, (3, 3), rngs=rngs)
        self.norm1 = nnx.BatchNorm(6, **average)
        self.conv2 = nnx.Conv(6, 10, (3, 3), rngs=rngs)
        self.norm2 = nnx.BatchNorm(10, **average)
        self.hidden = nnx.Linear(10 * 4 * 2, 14, rngs=rngs)
        self.head = nnx.Linear(14, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(nnx.relu(self.norm1(self.conv1(x))), (2, 2), (2, 2))
        x = nnx.relu(self.norm2(self.conv2(x)))
        x = nnx.relu(self.hidden(x.reshape(x.shape[0], -1)))
        return self.head(x)


@small
def nnx_cnn():
    return from_nnx(lambda: CNN(False, nnx.Rngs(0)), floats(7, 8, 4, 3))


@small
def nnx_cnn_train():
    return training_nnx(lambda: CNN(True, nnx.Rngs(0)), floats(7, 8, 4, 3))


# Transformers in plain JAX.


def rotated(x):
    """Rotary positions: dimension i of a head turns with dimension i + half."""
    length, half = x.shape[1], x.shape[3] // 2
    frequency = 10000.0 ** (-jnp.arange(half) / half)
    angle = jnp.arange(length)[:, None] * frequency[None]
    cos, sin = jnp.cos(angle)[None, :, None], jnp.sin(angle)[None, :, None]
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def decoder(
    vocabulary, width, kv_heads, repeats, head_size, hidden, layers, inputs, values
):
    """Tied embedding, rotary positions, grouped queries, a gated perceptron."""
    heads = kv_heads * repeats
    layer = {
        "norm_attention": (width,),
        "query": (width, heads, head_size),
        "key": (width, kv_heads, head_size),
        "value": (width, kv_heads, head_size),
        "out": (heads, head_size, width),
        "norm_mlp": (width,),
        "gate": (width, hidden),
        "up": (width, hidden),
        "down": (hidden, width),
    }
    sizes = {"embed": (vocabulary, width), "norm": (width,), "layers": [layer] * layers}

    def apply(p, x):
        h = p["embed"][x]
        for layer in p["layers"]:
            y = rms_norm(h, layer["norm_attention"])
            query = rotated(jnp.einsum("btd,dhk->bthk", y, layer["query"]))
            key = rotated(jnp.einsum("btd,dhk->bthk", y, layer["key"]))
            value = jnp.einsum("btd,dhk->bthk", y, layer["value"])
            key, value = (jnp.repeat(z, repeats, axis=2) for z in (key, value))
            y = attend(query, key, value, mask=causal(x.shape[1]))
            h = h + jnp.einsum("bthk,hkd->btd", y, layer["out"])
            y = rms_norm(h, layer["norm_mlp"])
            h = h + (jax.nn.silu(y @ layer["gate"]) * (y @ layer["up"])) @ layer["down"]
        return jnp.einsum("btd,vd->btv", rms_norm(h, p["norm"]), p["embed"])

    return from_function(apply, sizes, inputs, values=values)


@small
def gpt_gqa_rope():
    return decoder(50, 16, 2, 4, 6, 20, 2, tokens(50, 3, 5), filled)


@small
def gpt_fused_qkv():
    """One flat matrix for queries, keys and values; more positions than tokens."""
    heads, head_size = 3, 4
    inner = heads * head_size
    layer = {
        "qkv": (16, 3 * inner),
        "qkv_bias": (3 * inner,),
        "out": (inner, 16),
        "up": (16, 20),
        "up_bias": (20,),
        "down": (20, 16),
    }
    sizes = {"embed": (50, 16), "positions": (9, 16), "layers": [layer] * 2}

    def apply(p, x):
        batch, length = x.shape
        h = p["embed"][x] + p["positions"][None, :length]
        for layer in p["layers"]:
            qkv = affine(layer_norm(h), layer["qkv"], layer["qkv_bias"])
            query, key, value = (
                z.reshape(batch, length, heads, head_size)
                for z in jnp.split(qkv, 3, axis=-1)
            )
            y = attend(query, key, value, mask=causal(length))
            h = h + y.reshape(batch, length, inner) @ layer["out"]
            y = affine(layer_norm(h), layer["up"], layer["up_bias"])
            h = h + jax.nn.gelu(y) @ layer["down"]
        return layer_norm(h) @ p["embed"].T

    return from_function(apply, sizes, tokens(50, 2, 5))


@small
def gqa_dot_product_attention():
    sizes = {
        "query": (7, 6, 4),
        "key": (7, 2, 4),
        "value": (7, 2, 4),
        "out": (6, 4, 9),
    }

    def apply(p, x):
        query, key, value = (
            jnp.einsum("btd,dhk->bthk", x, p[name])
            for name in ("query", "key", "value")
        )
        y = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        return jnp.einsum("bthk,hkd->btd", y, p["out"])

    return from_function(apply, sizes, floats(3, 5, 7))


@small
def vit():
    """Patches, a class token, positions; queries, keys, values on an axis of three."""
    layer = {
        "norm_attention": (16,),
        "qkv": (16, 3, 2, 6),
        "qkv_bias": (3, 2, 6),
        "out": (2, 6, 16),
        "norm_mlp": (16,),
        "up": (16, 20),
        "up_bias": (20,),
        "down": (20, 16),
        "down_bias": (16,),
    }
    sizes = {
        "patch": (48, 16),
        "patch_bias": (16,),
        "class": (1, 1, 16),
        "positions": (1, 7, 16),
        "layers": [layer] * 2,
        "norm": (16,),
        "head": (16, 5),
        "head_bias": (5,),
    }

    def apply(p, x):
        batch = x.shape[0]
        x = x.reshape(batch, 2, 4, 3, 4, 3).transpose(0, 1, 3, 2, 4, 5)
        h = affine(x.reshape(batch, 6, 48), p["patch"], p["patch_bias"])
        first = jnp.broadcast_to(p["class"], (batch, 1, 16))
        h = jnp.concatenate([first, h], axis=1) + p["positions"]
        for layer in p["layers"]:
            y = layer_norm(h) * along_last(layer["norm_attention"], h)
            qkv = jnp.einsum("btd,dzhk->btzhk", y, layer["qkv"])
            qkv = qkv + layer["qkv_bias"][None, None]
            y = attend(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
            h = h + jnp.einsum("bthk,hkd->btd", y, layer["out"])
            y = layer_norm(h) * along_last(layer["norm_mlp"], h)
            y = jax.nn.gelu(affine(y, layer["up"], layer["up_bias"]))
            h = h + affine(y, layer["down"], layer["down_bias"])
        h = layer_norm(h[:, 0]) * along_last(p["norm"], h[:, 0])
        return affine(h, p["head"], p["head_bias"])

    return from_function(apply, sizes, floats(3, 8, 12, 3))


@small
def swin():
    """Attention in windows of 2 x 2; in the second layer they are shifted by one."""
    layer = {
        "norm_attention": (12,),
        "query": (12, 3, 4),
        "key": (12, 3, 4),
        "value": (12, 3, 5),
        "out": (3, 5, 12),
        "bias": (9, 3),
        "norm_mlp": (12,),
        "up": (12, 20),
        "down": (20, 12),
    }
    sizes = {"embed": (7, 12), "layers": [layer] * 2, "head": (12, 6)}
    row, column = np.divmod(np.arange(4), 2)
    offsets = 3 * (row[:, None] - row + 1) + column[:, None] - column + 1

    def windows(x):
        batch, height, width, features = x.shape
        x = x.reshape(batch, height // 2, 2, width // 2, 2, features)
        return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, 4, features)

    def image(x, shape):
        batch, height, width, features = shape
        x = x.reshape(batch, height // 2, width // 2, 2, 2, features)
        return x.transpose(0, 1, 3, 2, 4, 5).reshape(shape)

    def apply(p, x):
        h = x @ p["embed"]
        for shift, layer in enumerate(p["layers"]):
            y = layer_norm(h) * along_last(layer["norm_attention"], h)
            y = windows(jnp.roll(y, (-shift, -shift), axis=(1, 2)))
            query, key, value = (
                jnp.einsum("btd,dhk->bthk", y, layer[name])
                for name in ("query", "key", "value")
            )
            bias = layer["bias"][offsets].transpose(2, 0, 1)[None]
            y = attend(query, key, value, bias)
            y = image(jnp.einsum("bthk,hkd->btd", y, layer["out"]), h.shape)
            h = h + jnp.roll(y, (shift, shift), axis=(1, 2))
            y = layer_norm(h) * along_last(layer["norm_mlp"], h)
            h = h + jax.nn.gelu(y @ layer["up"]) @ layer["down"]
        return h.mean((1, 2)) @ p["head"]

    return from_function(apply, sizes, floats(2, 4, 8, 7))


@small
def t5_relative_bias():
    """One table of biases serves every layer, so that all layers share their heads."""
    layer = {
        "norm_attention": (16,),
        "query": (16, 12),
        "key": (16, 12),
        "value": (16, 12),
        "out": (12, 16),
        "norm_mlp": (16,),
        "up": (16, 20),
        "down": (20, 16),
    }
    sizes = {
        "embed": (50, 16),
        "bias": (8, 3),
        "layers": [layer] * 2,
        "norm": (16,),
        "head": (16, 7),
    }

    def apply(p, x):
        batch, length = x.shape
        h = p["embed"][x]
        distance = jnp.arange(length)[None] - jnp.arange(length)[:, None]
        near = jnp.minimum(jnp.abs(distance), 3)
        bias = p["bias"][near + 4 * (distance > 0)].transpose(2, 0, 1)[None]
        for layer in p["layers"]:
            y = rms_norm(h, layer["norm_attention"])
            query, key, value = (
                (y @ layer[name]).reshape(batch, length, 3, 4)
                for name in ("query", "key", "value")
            )
            y = attend(query, key, value, bias)
            h = h + y.reshape(batch, length, 12) @ layer["out"]
            y = rms_norm(h, layer["norm_mlp"])
            h = h + jax.nn.relu(y @ layer["up"]) @ layer["down"]
        return rms_norm(h, p["norm"]) @ p["head"]

    return from_function(apply, sizes, tokens(50, 2, 6))


# Experts.


def experts_sizes():
    return {
        "embed": (7, 12),
        "router": (12, 4),
        "up": (4, 12, 10),
        "down": (4, 10, 12),
        "head": (12, 6),
    }


def experts(p, h, weights):
    """All experts, each with its weight (batch, token, expert)."""
    y = jax.nn.relu(jnp.einsum("btd,edf->btef", h, p["up"])) * weights[..., None]
    return jnp.einsum("btef,efd->btd", y, p["down"])


@small
def moe_one_hot():
    def apply(p, x):
        h = x @ p["embed"]
        chances = jax.nn.softmax(h @ p["router"])
        choice = jax.nn.one_hot(jnp.argmax(chances, axis=-1), 4)
        gate = chances.max(-1, keepdims=True)
        return (h + gate * experts(p, h, choice)) @ p["head"]

    return from_function(apply, experts_sizes(), floats(3, 5, 7))


@small
def moe_soft():
    def apply(p, x):
        h = x @ p["embed"]
        chances = jax.nn.softmax(h @ p["router"])
        return (h + experts(p, h, chances)) @ p["head"]

    return from_function(apply, experts_sizes(), floats(3, 5, 7))


@small
def moe_ragged():
    """Two experts a token by top_k and ragged_dot: nothing there can be pruned."""
    sizes = {"first": (7, 9), "embed": (9, 12)} | experts_sizes()
    sizes["embed"] = (9, 12)

    def apply(p, x):
        h = jax.nn.relu(x @ p["first"]) @ p["embed"]
        weights, chosen = lax.top_k(h @ p["router"], 2)
        order = jnp.argsort(chosen.ravel())
        rows = order // 2
        counts = jnp.bincount(chosen.ravel(), length=4)
        y = jax.nn.relu(lax.ragged_dot(h[rows], p["up"], counts))
        y = lax.ragged_dot(y, p["down"], counts) * weights.ravel()[order][:, None]
        return h.at[rows].add(y) @ p["head"]

    return from_function(apply, sizes, floats(5, 7))


# Other programs in plain JAX.


@small
def ssm():
    """A selective state space: an associative scan over time."""
    sizes = {
        "embed": (7, 16),
        "norm": (16,),
        "in": (16, 2 * 10),
        "select": (10, 2 + 3 + 3),
        "step": (2, 10),
        "step_bias": (10,),
        "rate": (10, 3),
        "through": (10,),
        "out": (10, 16),
        "head": (16, 6),
    }

    def combine(left, right):
        return left[0] * right[0], right[0] * left[1] + right[1]

    def apply(p, x):
        h = x @ p["embed"]
        y, gate = jnp.split(rms_norm(h, p["norm"]) @ p["in"], 2, axis=-1)
        low, entry, leave = jnp.split(y @ p["select"], [2, 5], axis=-1)
        step = jax.nn.softplus(affine(low, p["step"], p["step_bias"]))[..., None]
        decay = jnp.exp(-step * jnp.exp(p["rate"])[None, None])
        drive = step * y[..., None] * entry[:, :, None]
        _, states = lax.associative_scan(combine, (decay, drive), axis=1)
        z = jnp.einsum("bten,btn->bte", states, leave)
        z = (z + y * along_last(p["through"], y)) * jax.nn.silu(gate)
        return (h + z @ p["out"]) @ p["head"]

    return from_function(apply, sizes, floats(4, 5, 7))


@small
def cond_while():
    sizes = {
        "in": (7, 12),
        "left": {"up": (12, 16), "down": (16, 12)},
        "right": {"up": (12, 9), "down": (9, 12)},
        "loop": (12, 12),
        "loop_bias": (12,),
        "head": (12, 5),
    }

    def branch(activation):
        return lambda p, x: activation(x @ p["up"]) @ p["down"]

    def apply(p, x):
        h = x @ p["in"]
        h = lax.cond(
            jnp.sum(x) > 0,
            lambda h: branch(jax.nn.relu)(p["left"], h),
            lambda h: branch(jnp.tanh)(p["right"], h),
            h,
        )

        def unsettled(carry):
            step, h = carry
            return (step < 5) & (jnp.sum(h * h) > 0.1)

        def update(carry):
            step, h = carry
            return step + 1, jnp.tanh(affine(h, p["loop"], p["loop_bias"]))

        _, h = lax.while_loop(unsettled, update, (0, h))
        return h @ p["head"]

    return from_function(apply, sizes, floats(4, 7))


@small
def tied_autoencoder():
    sizes = {
        "first": (7, 12),
        "first_bias": (12,),
        "second": (12, 5),
        "second_bias": (5,),
        "first_back": (12,),
        "second_back": (7,),
    }

    def apply(p, x):
        h = jnp.tanh(affine(x, p["first"], p["first_bias"]))
        code = jnp.tanh(affine(h, p["second"], p["second_bias"]))
        h = jnp.tanh(affine(code, p["second"].T, p["first_back"]))
        return affine(h, p["first"].T, p["second_back"])

    return from_function(apply, sizes, floats(4, 7))


@small
def weight_norm():
    def layer(inputs, outputs):
        return {"kernel": (inputs, outputs), "scale": (outputs,), "bias": (outputs,)}

    def apply(p, x):
        for n, layer in enumerate(p["layers"]):
            norm = jnp.sqrt(jnp.sum(layer["kernel"] ** 2, axis=0))
            kernel = layer["kernel"] * (layer["scale"] / norm)[None]
            x = affine(jnp.tanh(x) if n else x, kernel, layer["bias"])
        return x

    sizes = {"layers": [layer(7, 12), layer(12, 9), layer(9, 5)]}
    return from_function(apply, sizes, floats(4, 7))


@small
def maxout():
    sizes = {"kernel": (7, 12 * 3), "bias": (12 * 3,), "head": (12, 5)}

    def apply(p, x):
        pieces = affine(x, p["kernel"], p["bias"]).reshape(x.shape[0], 12, 3)
        return pieces.max(-1) @ p["head"]

    return from_function(apply, sizes, floats(4, 7))


@small
def equal_sizes_cnn():
    """Batch, height, width, kernel, channels and classes: all eight."""
    sizes = dict.fromkeys(("conv1", "conv2"), (8, 8, 8, 8))
    sizes |= {"bias1": (8,), "bias2": (8,), "hidden": (8, 8), "head": (8, 8)}

    def apply(p, x):
        for n in "12":
            x = conv(x, p[f"conv{n}"])
            x = jax.nn.relu(x + along_last(p[f"bias{n}"], x))
        return jax.nn.relu(x.mean((1, 2)) @ p["hidden"]) @ p["head"]

    return from_function(apply, sizes, floats(8, 8, 8, 8))


@small
def equal_sizes_attention():
    """Batch, tokens, width, heads, their dimensions, hidden units: all four."""
    sizes = dict.fromkeys(("query", "key", "value", "out"), (4, 4, 4))
    sizes |= dict.fromkeys(("embed", "up", "down", "head"), (4, 4))

    def apply(p, x):
        h = x @ p["embed"]
        query, key, value = (
            jnp.einsum("btd,dhk->bthk", h, p[name])
            for name in ("query", "key", "value")
        )
        h = h + jnp.einsum("bthk,hkd->btd", attend(query, key, value), p["out"])
        h = h + jax.nn.relu(h @ p["up"]) @ p["down"]
        return h @ p["head"]

    return from_function(apply, sizes, floats(4, 4, 4))


@small
def several_outputs():
    """A row of a table by an integer input; a class, a number, the last features."""
    sizes = {
        "tasks": (4, 16),
        "embed": (7, 16),
        "hidden": (16, 12),
        "last": (12, 9),
        "class": (12, 5),
        "number": (12,),
    }

    def apply(p, x, task):
        h = x[:, 0] @ p["embed"] + p["tasks"][task][None]
        h = jax.nn.relu(jax.nn.relu(h) @ p["hidden"])
        return {
            "class": h @ p["class"],
            "number": h @ p["number"],
            "last": h @ p["last"],
        }

    return from_function(apply, sizes, floats(3, 2, 7), jnp.int32(2))


@small
def strided_slices():
    """Even units gate odd ones; every other pixel of the image."""
    sizes = {
        "conv": (3, 3, 2, 6),
        "kernel": (6, 20),
        "bias": (20,),
        "head": (10, 5),
    }

    def apply(p, x):
        x = jax.nn.relu(conv(x, p["conv"]))[:, ::2, 1::2].mean((1, 2))
        y = affine(x, p["kernel"], p["bias"])
        even, odd = (lax.slice_in_dim(y, n, None, 2, axis=1) for n in (0, 1))
        return (even * jax.nn.sigmoid(odd)) @ p["head"]

    return from_function(apply, sizes, floats(4, 8, 8, 2))


@small
def vmapped_grouped_conv():
    """Four networks at once, the second convolution in two groups."""
    sizes = {
        "first": (4, 3, 3, 3, 12),
        "second": (4, 3, 3, 6, 10),
        "head": (4, 10, 7),
    }

    def one(p, x):
        x = jax.nn.relu(conv(x, p["first"]))
        x = jax.nn.relu(conv(x, p["second"], groups=2))
        return x.mean((1, 2)) @ p["head"]

    def apply(p, x):
        return jax.vmap(one, in_axes=(0, None))(p, x)

    return from_function(apply, sizes, floats(8, 9, 9, 3))


@small
def fft():
    """A Fourier transform over units: those cannot be pruned, the ones before can."""
    sizes = {"first": (7, 9), "second": (9, 12), "head": (12, 5)}

    def apply(p, x):
        h = jax.nn.relu(x @ p["first"]) @ p["second"]
        return jnp.fft.fft(h).real @ p["head"]

    return from_function(apply, sizes, floats(4, 7))


# Equinox.


def from_equinox(make, x) -> Model:
    eqx = pytest.importorskip("equinox")
    shapes, rest = eqx.partition(
        eqx.filter_eval_shape(make),
        lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct),
    )
    apply = lambda p, x: jax.vmap(eqx.combine(p, rest))(x)  # noqa: E731
    return Model(apply, filled(shapes), (x,))


@small
def equinox_mlp():
    eqx = pytest.importorskip("equinox")
    make = lambda: eqx.nn.MLP(7, 5, 16, 2, key=jax.random.key(0))  # noqa: E731
    return from_equinox(make, floats(4, 7))


@small
def equinox_conv():
    eqx = pytest.importorskip("equinox")

    def make():
        keys = jax.random.split(jax.random.key(0), 4)
        layers = [
            eqx.nn.Conv2d(3, 6, 3, padding=1, key=keys[0]),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.MaxPool2d(2, 2),
            eqx.nn.Conv2d(6, 10, 3, padding=1, key=keys[1]),
            eqx.nn.GroupNorm(5, 10),
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.Linear(10 * 4 * 3, 12, key=keys[2]),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.Linear(12, 7, key=keys[3]),
        ]
        return eqx.nn.Sequential(layers)

    return from_equinox(make, floats(4, 3, 8, 6))


# Larger ones.


def vgg_of(widths, *, image=32, batch=32, values=filled):
    """Two convolutions a width, a dense layer of twice the last."""
    stages = tuple((width, 2) for width in widths)
    module = VGG(stages=stages, dense=(2 * widths[-1],), classes=10)
    return from_linen(module, floats(batch, image, image, 3), values=values)


@large
def vgg_64_128_256():
    return vgg_of((64, 128, 256))


@large
def vgg_16():
    stages = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
    module = VGG(stages=stages, dense=(4096, 4096), classes=1000)
    return from_linen(module, floats(2, 224, 224, 3), values=only_shapes)


class BottleneckResNet(nn.Module):
    """Stages of blocks of three convolutions, 1 x 1, 3 x 3, 1 x 1: ResNet-50."""

    stages: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    classes: int = 1000

    @nn.compact
    def __call__(self, x):
        def conv_norm(x, width, size, stride=1):
            x = nn.Conv(width, (size, size), (stride, stride), use_bias=False)(x)
            return nn.BatchNorm(use_running_average=True)(x)

        x = nn.relu(conv_norm(x, self.width, 7, 2))
        x = nn.max_pool(x, (3, 3), (2, 2), padding="SAME")
        for stage, blocks in enumerate(self.stages):
            width = self.width * 2**stage
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                y = nn.relu(conv_norm(x, width, 1))
                y = nn.relu(conv_norm(y, width, 3, stride))
                y = conv_norm(y, 4 * width, 1)
                if x.shape != y.shape:
                    x = conv_norm(x, 4 * width, 1, stride)
                x = nn.relu(x + y)
        return nn.Dense(self.classes)(x.mean((1, 2)))


def resnet_of(stages=(3, 4, 6, 3), width=64, *, image=224, values=only_shapes):
    module = BottleneckResNet(stages=stages, width=width)
    return from_linen(module, floats(2, image, image, 3), values=values)


@large
def resnet_50():
    return resnet_of()


def encoder_of(depth, width, heads, hidden, *, values=only_shapes):
    module = Encoder(
        depth=depth, width=width, heads=heads, head_size=width // heads, hidden=hidden
    )
    return from_linen(module, floats(2, 64, 128), values=values)


@large
def linen_transformer_12():
    return encoder_of(12, 256, 8, 1024)


def transformer_of(depth, width, heads, hidden, *, values=only_shapes):
    def make():
        head_size = width // heads
        rngs = nnx.Rngs(0)
        return Transformer(1000, depth, width, heads, head_size, hidden, rngs)

    return from_nnx(make, tokens(1000, 2, 64), values=values)


@large
def nnx_transformer_12():
    return transformer_of(12, 256, 8, 680)


def llama_of(vocabulary, width, kv_heads, repeats, head_size, hidden, layers):
    """The shapes alone of a decoder."""
    sizes = (vocabulary, width, kv_heads, repeats, head_size, hidden, layers)
    return decoder(*sizes, tokens(vocabulary, 2, 128), only_shapes)


@large
def llama_1b():
    return llama_of(128256, 2048, 8, 4, 64, 8192, 16)
