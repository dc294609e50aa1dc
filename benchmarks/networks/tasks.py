"""The tasks: a network, a data set on the device, and how long to train.

All that a run depends on, besides its contender and its seed, is in `Settings`.
"""

import functools
import importlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

from benchmarks import datasets


class Examples(NamedTuple):
    """Inputs, and what to say of each.

    Attributes:
      inputs: images, standardised, float32 [examples, height, width, channels], or
        characters, int32 [examples, context]; of a text to train on, int32 [length].
      targets: classes, int32 [examples], or the next characters, shaped as `inputs`.
    """

    inputs: jax.Array
    targets: jax.Array


class Data(NamedTuple):
    """A data set on the device."""

    train: Examples
    validation: Examples
    test: Examples


class Settings(NamedTuple):
    """Numbers of a task.

    Attributes:
      model: key of `models.MODELS`.
      widths: of its layers.
      data: key of `SOURCES`.
      train: examples to train on; 0 for a text, of which it is all but the last tenth.
      validation: examples to choose hyperparameters by; windows of a text.
      test: the same to report.
      epochs: of a training.
      batch: size of a minibatch.
      steps: minibatches of an epoch; 0: as many as the training examples fill.
      flips: whether to mirror half of the images at random.
      context: characters in a window; 0 for images.
      trial_epochs: epochs of a trial of a hyperparameter.
      folds: parts of the images that take turns, by the seed, as test examples.
    """

    model: str
    widths: tuple[int, ...]
    data: str
    train: int
    validation: int
    test: int
    epochs: int
    batch: int
    steps: int = 0
    flips: bool = False
    context: int = 0
    trial_epochs: int = 0
    folds: int = 1

    @property
    def steps_per_epoch(self) -> int:
        """Minibatches of an epoch; what does not fill one is left out."""
        return self.steps or self.train // self.batch

    @property
    def looped(self) -> bool:
        """Whether minibatches follow one another in Python, not in a compiled loop.

        XLA's convolutions on the CPU take ten times as long inside `lax.scan`.
        """
        return self.model in ("cnn", "resnet")

    @property
    def normalised(self) -> bool:
        """Whether the network has batch normalisation, and so can be recalibrated."""
        return self.model in ("cnn", "resnet")


def _on_mnist(
    model: str, widths: tuple[int, ...], data: str, epochs: int, trial_epochs: int
) -> Settings:
    return Settings(
        model, widths, data, 20_000, 5000, 10_000, epochs, 128,
        trial_epochs=trial_epochs,
    )  # fmt: skip


TASKS: dict[str, Settings] = {
    "mlp_mnist": _on_mnist("mlp", (300, 100), "mnist", 12, 12),
    "mlp_fashion": _on_mnist("mlp", (300, 100), "fashion", 12, 12),
    "cnn_mnist": _on_mnist("cnn", (16, 32, 64), "mnist", 12, 6),
    "cnn_fashion": _on_mnist("cnn", (16, 32, 64), "fashion", 12, 6),
    "resnet_cifar": Settings(
        "resnet", (16, 32, 64), "cifar", 3000, 400, 600, 20, 32,
        flips=True, trial_epochs=10, folds=6,
    ),
    "transformer_shakespeare": Settings(
        "transformer", (64, 64), "shakespeare", 0, 400, 800, 12, 8,
        steps=400, context=64, trial_epochs=6,
    ),
}  # fmt: skip


def _on_digits(model: str, widths: tuple[int, ...]) -> Settings:
    return Settings(model, widths, "digits", 1200, 200, 397, 3, 50, trial_epochs=3)


# The same tasks in small, on data that packages carry.
QUICK: dict[str, Settings] = {
    "mlp_mnist": _on_digits("mlp", (32,)),
    "mlp_fashion": _on_digits("mlp", (32,)),
    "cnn_mnist": _on_digits("cnn", (8, 16)),
    "cnn_fashion": _on_digits("cnn", (8, 16)),
    "resnet_cifar": _on_digits("resnet", (8, 16))._replace(flips=True, folds=4),
    "transformer_shakespeare": Settings(
        "transformer", (16,), "topics", 0, 50, 50, 3, 32,
        steps=20, context=16, trial_epochs=3,
    ),
}  # fmt: skip


def _mnist() -> Any:
    images, labels = datasets.mnist()
    return images.reshape(-1, 28, 28, 1), labels, 60_000


def _fashion() -> Any:
    images, labels = datasets.fashion_mnist()
    return images.reshape(-1, 28, 28, 1), labels, 60_000


def _cifar() -> Any:
    images, labels = datasets.cifar10()
    # As many of each class in each part, whatever the order of the file: the n-th of
    # each class in turn. Of the full set these are the first 400 of each class.
    rank = np.zeros(len(labels), int)
    for label in range(10):
        rank[labels == label] = np.arange((labels == label).sum())
    order = np.lexsort((labels, rank))[:4000]
    return images[order], labels[order], 3400


def _digits() -> Any:
    images, labels = load_digits(return_X_y=True)
    return 16 * images.reshape(-1, 8, 8, 1), labels, 1400


def _topics() -> str:
    topics = importlib.import_module("pydoc_data.topics").topics
    return "\n".join(topics[name] for name in sorted(topics))[:100_000]


# Of images: the images, their classes, and how many of the first are for training. The
# validation examples are the last of those.
SOURCES: dict[str, Any] = {
    "mnist": _mnist,
    "fashion": _fashion,
    "cifar": _cifar,
    "digits": _digits,
    "shakespeare": datasets.tinyshakespeare,
    "topics": _topics,
}


def load(settings: Settings, seed: int = 0) -> Data:
    """The data set of a task.

    Args:
      settings: of the task.
      seed: of the run; it says which images are the test examples where there are
        several folds, and nothing otherwise.

    Returns:
      The data.

    Raises:
      datasets.MissingData: if it is not there and cannot be downloaded.
    """
    return _load(settings, seed % settings.folds)


@functools.lru_cache(maxsize=1)
def _load(settings: Settings, fold: int) -> Data:
    found = SOURCES[settings.data]()
    if isinstance(found, str):
        return _text(found, settings)
    images, labels, training = found
    images, labels = (np.roll(x, -fold * settings.test, 0) for x in (images, labels))
    # The mean and the standard deviation of the training images.
    train = images[: settings.train].astype(np.float32)
    axes = tuple(range(train.ndim - 1))
    mean, deviation = train.mean(axes), train.std(axes)

    def part(begin: int, count: int) -> Examples:
        chosen = slice(begin, begin + count)
        scaled = (images[chosen] - mean) / deviation
        return Examples(
            jnp.asarray(scaled, jnp.float32), jnp.asarray(labels[chosen], jnp.int32)
        )

    return Data(
        part(0, settings.train),
        part(training - settings.validation, settings.validation),
        part(training, settings.test),
    )


def _text(text: str, settings: Settings) -> Data:
    """All but the last tenth to train on; windows of the rest, half and half."""
    characters = {character: i for i, character in enumerate(sorted(set(text)))}
    coded = np.array([characters[character] for character in text], np.int32)
    rest = len(coded) * 9 // 10
    middle = rest + (len(coded) - rest) // 2

    def windows(begin: int, count: int) -> Examples:
        size = count * settings.context
        parts = (coded[begin + i : begin + i + size] for i in (0, 1))
        return Examples(*(jnp.asarray(p.reshape(count, -1)) for p in parts))

    return Data(
        Examples(jnp.asarray(coded[: rest - 1]), jnp.asarray(coded[1:rest])),
        windows(rest, settings.validation),
        windows(middle, settings.test),
    )


def classes(settings: Settings, data: Data) -> int:
    """How many logits the network has to give."""
    return 1 + int(jnp.max(data.train.targets)) if settings.context else 10


def order(settings: Settings, train: Examples, key: jax.Array) -> jax.Array:
    """Which examples, or where in the text, the minibatches of an epoch are.

    Args:
      settings: of the task.
      train: the training examples.
      key: random key of the run and the epoch.

    Returns:
      int32 [steps, batch].
    """
    shape = (settings.steps_per_epoch, settings.batch)
    if settings.context:
        last = len(train.inputs) - settings.context
        return jax.random.randint(key, shape, 0, last + 1)
    wanted = shape[0] * shape[1]
    return jax.random.permutation(key, len(train.inputs))[:wanted].reshape(shape)


def minibatch(
    settings: Settings, train: Examples, chosen: jax.Array, key: jax.Array
) -> Examples:
    """The examples of a minibatch.

    Args:
      settings: of the task.
      train: the training examples.
      chosen: a row of `order`.
      key: random key of the step, for what is random in the images.

    Returns:
      The examples.
    """
    if settings.context:
        chosen = chosen[:, None] + jnp.arange(settings.context)[None]
    inputs, targets = train.inputs[chosen], train.targets[chosen]
    if settings.flips:
        mirrored = jax.random.bernoulli(key, 0.5, (len(inputs), 1, 1, 1))
        inputs = jnp.where(mirrored, inputs[:, :, ::-1], inputs)
    return Examples(inputs, targets)
