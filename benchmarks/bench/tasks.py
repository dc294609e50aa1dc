"""The tasks: a network, its data on the device, and how long to train.

All that a run depends on, besides its contender, its learning rate and its seed, is in
`Task`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from benchmarks import datasets


class Examples(NamedTuple):
    """Inputs and targets.

    Attributes:
      inputs: standardised, float32 [examples, features].
      targets: classes, int32 [examples].
    """

    inputs: jax.Array
    targets: jax.Array


class Data(NamedTuple):
    """A data set on the device, in the three parts of a task."""

    train: Examples
    validation: Examples
    test: Examples


class Task(NamedTuple):
    """The numbers of a task.

    Attributes:
      title: what figures and pages call it.
      source: key of `SOURCES`.
      widths: of the hidden layers.
      train: examples to train on.
      validation: examples to choose learning rates by.
      test: examples to report.
      batch: size of a minibatch.
      epochs: of a full training, a multiple of four: half and quarter lengths exist.
    """

    title: str
    source: str
    widths: tuple[int, ...]
    train: int
    validation: int
    test: int
    batch: int
    epochs: int

    @property
    def steps_per_epoch(self) -> int:
        """Minibatches of an epoch; what does not fill one is left out."""
        return self.train // self.batch


class Network(NamedTuple):
    """A network as functions.

    Attributes:
      init: function key -> (params, statistics). The statistics are those of
        normalisation layers, an empty dictionary without.
      loss: function (params, statistics, examples) -> (mean loss in nats, statistics),
        as in training.
      logits: function (params, statistics, inputs) -> logits, as in use.
    """

    init: Callable[[jax.Array], tuple[Any, Any]]
    loss: Callable[[Any, Any, Examples], tuple[jax.Array, Any]]
    logits: Callable[[Any, Any, jax.Array], jax.Array]


# All of MNIST: 55,000 images to train on, 5,000 to choose by, 10,000 to report.
LENET_MNIST = Task(
    "LeNet-300-100 on MNIST", "mnist", (300, 100), 55_000, 5000, 10_000, 100, 8
)
# In seconds, on data that scikit-learn carries: to see that everything runs.
DIGITS = Task(
    "a perceptron of 32 neurons on digits", "digits", (32,), 1200, 200, 397, 50, 4
)


def _mnist() -> tuple[np.ndarray, np.ndarray, int]:
    images, digits = datasets.mnist()
    return images, digits, 60_000


def _digits() -> tuple[np.ndarray, np.ndarray, int]:
    images, digits = load_digits(return_X_y=True)
    return np.asarray(images), np.asarray(digits), 1400


# The inputs, their classes, and how many of the first are for training. The validation
# examples are the last of those.
SOURCES: dict[str, Callable[[], tuple[np.ndarray, np.ndarray, int]]] = {
    "mnist": _mnist,
    "digits": _digits,
}


@functools.lru_cache(maxsize=1)
def load(task: Task) -> Data:
    """The data of a task, standardised by the training images' mean and deviation.

    Args:
      task: the task.

    Returns:
      The data on the device.

    Raises:
      datasets.MissingData: if it is not there and cannot be downloaded.
      ValueError: if training and validation examples would overlap.
    """
    inputs, targets, training = SOURCES[task.source]()
    if task.train + task.validation > training:
        raise ValueError(
            f"train + validation must be at most {training} in {task.source!r}; got "
            f"{task.train} + {task.validation}."
        )
    scale = inputs[: task.train].astype(np.float32)
    mean, deviation = scale.mean(), scale.std()

    def part(begin: int, count: int) -> Examples:
        chosen = slice(begin, begin + count)
        scaled = (inputs[chosen].astype(np.float32) - mean) / deviation
        return Examples(jnp.asarray(scaled), jnp.asarray(targets[chosen], jnp.int32))

    return Data(
        part(0, task.train),
        part(training - task.validation, task.validation),
        part(training, task.test),
    )


_HE = nn.initializers.he_normal()


class _Perceptron(nn.Module):
    """Dense layers with ReLU between them, He's normal initial weights."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in self.widths:
            x = nn.relu(nn.Dense(width, kernel_init=_HE)(x))
        return nn.Dense(10, kernel_init=_HE)(x)


def network(task: Task) -> Network:
    """The network of a task."""
    module = _Perceptron(task.widths)
    features = {"mnist": 784, "digits": 64}[task.source]

    def init(key: jax.Array) -> tuple[Any, Any]:
        return module.init(key, jnp.zeros((1, features)))["params"], {}

    def logits(params: Any, stats: Any, inputs: jax.Array) -> jax.Array:
        del stats
        return jnp.asarray(module.apply({"params": params}, inputs))

    def loss(params: Any, stats: Any, examples: Examples) -> tuple[jax.Array, Any]:
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits(params, stats, examples.inputs), examples.targets
        )
        return losses.mean(), stats

    return Network(init, loss, logits)
