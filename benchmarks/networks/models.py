"""The networks: flax.linen modules that are called alike.

Each is called as `module.apply(variables, inputs, train=..., momentum=...)`. `train`
normalises by the statistics of the batch and averages them into the collection
"batch_stats" with the weight `momentum` of the old averages; networks without batch
normalisation ignore both and have no such collection. Attention is made of plain dense
layers.
"""

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


class ResNet(nn.Module):
    """A stem of stride 2, then one residual block for each width, the first unstrided.

    Attributes:
      widths: channels of the blocks.
      classes: how many logits.
    """

    widths: tuple[int, ...]
    classes: int

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False, momentum: float = 0.9
    ) -> jax.Array:
        """Logits [batch, classes] of images [batch, height, width, channels]."""

        def normalised(x):
            return nn.BatchNorm(not train, momentum=momentum)(x)

        x = nn.relu(normalised(_convolution(self.widths[0], 2)(x)))
        for number, width in enumerate(self.widths):
            stride = 2 if number else 1
            y = nn.relu(normalised(_convolution(width, stride)(x)))
            y = normalised(_convolution(width, 1)(y))
            if stride > 1:
                x = normalised(_convolution(width, stride, size=1)(x))
            x = nn.relu(x + y)
        return nn.Dense(self.classes, kernel_init=HE_NORMAL)(x.mean((1, 2)))


class Transformer(nn.Module):
    """A causal character transformer, normalised before each of its parts.

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
        width, context = self.widths[0], x.shape[1]
        small = nn.initializers.normal(0.02)
        positions = self.param("positions", small, (context, width))
        x = nn.Embed(self.classes, width, embedding_init=small)(x) + positions[None]
        for _ in self.widths:
            x = x + self._attention(nn.LayerNorm()(x))
            y = nn.gelu(nn.Dense(2 * width)(nn.LayerNorm()(x)))
            x = x + nn.Dense(width)(y)
        return nn.Dense(self.classes)(nn.LayerNorm()(x))

    def _attention(self, x: jax.Array) -> jax.Array:
        batch, context, width = x.shape
        joined = nn.Dense(3 * width)(x).reshape(batch, context, 3, self.heads, -1)
        q, k, v = (joined[:, :, i] for i in range(3))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        past = jnp.tril(jnp.ones((context, context), bool))
        scores = jnp.where(past[None, None], scores, -1e9)
        found = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
        return nn.Dense(width)(found.reshape(batch, context, width))


MODELS: dict[str, Any] = {
    "mlp": MLP,
    "cnn": CNN,
    "resnet": ResNet,
    "transformer": Transformer,
}


def _convolution(width: int, stride: int, size: int = 3) -> nn.Conv:
    return nn.Conv(
        width, (size, size), strides=stride, use_bias=False, kernel_init=HE_NORMAL
    )
