"""The networks: flax.linen modules that are called alike.

Each is called as `module.apply(variables, inputs, train=..., momentum=...)`. `train`
normalises by the statistics of the batch and averages them into the collection
"batch_stats" with the weight `momentum` of the old averages; networks without batch
normalisation ignore both and have no such collection. Attention is made of plain dense
layers.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

HE_NORMAL = nn.initializers.he_normal()


class MLP(nn.Module):
    """Dense layers with ReLU between them.

    Attributes:
      widths: of the hidden layers.
      classes: how many logits.
    """

    widths: tuple[int, ...]
    classes: int

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False, momentum: float = 0.9
    ) -> jax.Array:
        """Logits [batch, classes] of images [batch, height, width, channels]."""
        del train, momentum
        x = x.reshape(len(x), -1)
        for width in self.widths:
            x = nn.relu(nn.Dense(width, kernel_init=HE_NORMAL)(x))
        return nn.Dense(self.classes, kernel_init=HE_NORMAL)(x)


class CNN(nn.Module):
    """Convolutions of stride 2, each normalised, a mean over positions, a dense layer.

    Attributes:
      widths: channels of the convolutions.
      classes: how many logits.
    """

    widths: tuple[int, ...]
    classes: int

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False, momentum: float = 0.9
    ) -> jax.Array:
        """Logits [batch, classes] of images [batch, height, width, channels]."""
        for width in self.widths:
            x = _convolution(width, 2)(x)
            x = nn.relu(nn.BatchNorm(not train, momentum=momentum)(x))
        return nn.Dense(self.classes, kernel_init=HE_NORMAL)(x.mean((1, 2)))


class PlainCNN(nn.Module):
    """Convolutions of stride 2 with biases, a mean over positions, a dense layer.

    Attributes:
      widths: channels of the convolutions.
      classes: how many logits.
      groups: of group normalisation after each convolution; 0: there is none.
    """

    widths: tuple[int, ...]
    classes: int
    groups: int = 0

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False, momentum: float = 0.9
    ) -> jax.Array:
        """Logits [batch, classes] of images [batch, height, width, channels]."""
        del train, momentum
        for width in self.widths:
            x = nn.Conv(width, (3, 3), strides=2, kernel_init=HE_NORMAL)(x)
            x = nn.relu(nn.GroupNorm(self.groups)(x) if self.groups else x)
        return nn.Dense(self.classes, kernel_init=HE_NORMAL)(x.mean((1, 2)))


class ResNet(nn.Module):
    """A stem of stride 2, then residual blocks, the first of each width strided.

    Attributes:
      widths: channels of the blocks.
      classes: how many logits.
      depth: blocks of each width.
    """

    widths: tuple[int, ...]
    classes: int
    depth: int = 1

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False, momentum: float = 0.9
    ) -> jax.Array:
        """Logits [batch, classes] of images [batch, height, width, channels]."""

        def normalised(x):
            return nn.BatchNorm(not train, momentum=momentum)(x)

        x = nn.relu(normalised(_convolution(self.widths[0], 2)(x)))
        blocks = [
            (width, 2 if number and not i else 1)
            for number, width in enumerate(self.widths)
            for i in range(self.depth)
        ]
        for width, stride in blocks:
            y = nn.relu(normalised(_convolution(width, stride)(x)))
            y = normalised(_convolution(width, 1)(y))
            if stride > 1:
                x = normalised(_convolution(width, stride, size=1)(x))
            x = nn.relu(x + y)
        return nn.Dense(self.classes, kernel_init=HE_NORMAL)(x.mean((1, 2)))


class GRU(nn.Module):
    """A character network of gated recurrent layers.

    Attributes:
      widths: of the layers; the first is that of the embedding, too.
      classes: how many characters there are.
    """

    widths: tuple[int, ...]
    classes: int

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False, momentum: float = 0.9
    ) -> jax.Array:
        """Logits [batch, context, classes] of characters [batch, context]."""
        del train, momentum
        x = nn.Embed(self.classes, self.widths[0])(x)
        for width in self.widths:
            x = jnp.asarray(nn.RNN(nn.GRUCell(width))(x))
        return nn.Dense(self.classes)(x)


class Transformer(nn.Module):
    """A character transformer, normalised before each of its parts.

    Attributes:
      widths: of the residual stream, the same number once for each layer.
      classes: how many characters there are.
      heads: of the attention.
    """

    widths: tuple[int, ...]
    classes: int
    heads: int = 4

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False, momentum: float = 0.9
    ) -> jax.Array:
        """Logits [batch, context, classes] of characters [batch, context]."""
        del train, momentum
        width = self.widths[0]
        small = nn.initializers.normal(0.02)
        x = nn.Embed(self.classes, width, embedding_init=small)(x)
        x = _blocks(x, len(self.widths), self.heads, causal=True)
        return nn.Dense(self.classes)(x)


class ViT(nn.Module):
    """A transformer over the patches of an image, and a mean over positions.

    Attributes:
      widths: of the residual stream, the same number once for each layer.
      classes: how many logits.
      heads: of the attention.
      patch: side of a patch, pixels.
    """

    widths: tuple[int, ...]
    classes: int
    heads: int = 4
    patch: int = 4

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False, momentum: float = 0.9
    ) -> jax.Array:
        """Logits [batch, classes] of images [batch, height, width, channels]."""
        del train, momentum
        width, side = self.widths[0], (self.patch, self.patch)
        x = nn.Conv(width, side, strides=side)(x).reshape(len(x), -1, width)
        x = _blocks(x, len(self.widths), self.heads, causal=False)
        return nn.Dense(self.classes)(x.mean(1))


def _blocks(x: jax.Array, layers: int, heads: int, *, causal: bool) -> jax.Array:
    """Positions, layers of attention and perceptron, and a last normalisation."""
    width = x.shape[-1]
    x = x + Positions()(x.shape[1:])[None]
    for _ in range(layers):
        x = x + _attention(nn.LayerNorm()(x), heads, causal)
        y = nn.gelu(nn.Dense(2 * width)(nn.LayerNorm()(x)))
        x = x + nn.Dense(width)(y)
    return nn.LayerNorm()(x)


class Positions(nn.Module):
    """A vector for each position."""

    @nn.compact
    def __call__(self, shape: tuple[int, ...]) -> jax.Array:
        """The vectors [context, width]."""
        return self.param("embedding", nn.initializers.normal(0.02), shape)


def _attention(x: jax.Array, heads: int, causal: bool) -> jax.Array:
    batch, context, width = x.shape
    joined = nn.Dense(3 * width)(x).reshape(batch, context, 3, heads, -1)
    q, k, v = (joined[:, :, i] for i in range(3))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    if causal:
        past = jnp.tril(jnp.ones((context, context), bool))
        scores = jnp.where(past[None, None], scores, -1e9)
    found = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
    return nn.Dense(width)(found.reshape(batch, context, width))


MODELS: dict[str, Any] = {
    "mlp": MLP,
    "cnn": CNN,
    "plain_cnn": PlainCNN,
    "group_cnn": functools.partial(PlainCNN, groups=4),
    "resnet": ResNet,
    "deep_resnet": functools.partial(ResNet, depth=2),
    "gru": GRU,
    "transformer": Transformer,
    "vit": ViT,
}
# XLA's convolutions on the CPU take ten times as long inside `lax.scan`.
CONVOLUTIONS = {"cnn", "plain_cnn", "group_cnn", "resnet", "deep_resnet", "vit"}
NORMALISED_BY_BATCH = {"cnn", "resnet", "deep_resnet"}
OF_TEXT = {"gru", "transformer"}


def _convolution(width: int, stride: int, size: int = 3) -> nn.Conv:
    return nn.Conv(
        width, (size, size), strides=stride, use_bias=False, kernel_init=HE_NORMAL
    )
