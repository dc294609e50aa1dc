"""The tasks: a network, its data on the device, and how long to train.

All that a run depends on, besides its contender, its learning rate and its seed, is in
`Task`.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from benchmarks import datasets
from benchmarks.bench import models
from prunadag_optax import evaluation

# Training examples that statistics are computed anew on after pruning.
CALIBRATION = 2000


class Examples(NamedTuple):
    """Inputs, and what to say of each.

    Attributes:
      inputs: standardised, float32 [examples, ...], or characters, int32 [examples,
        context]; of a text to train on, int32 [length].
      targets: classes, int32 [examples], or the next characters, shaped as `inputs`.
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
      widths: of the layers.
      train: examples to train on; 0 for a text, of which it is all but the last tenth.
      validation: examples to choose learning rates by; windows of a text.
      test: examples to report; windows of a text.
      batch: size of a minibatch.
      epochs: of a full training, a multiple of four: half and quarter lengths exist.
      model: key of `models.MODELS`.
      steps: minibatches of an epoch; 0: as many as the training examples fill.
      context: characters in a window; 0: no text.
      flips: whether to mirror half of the images at random.
      classes: how many logits.
    """

    title: str
    source: str
    widths: tuple[int, ...]
    train: int
    validation: int
    test: int
    batch: int
    epochs: int
    model: str = "mlp"
    steps: int = 0
    context: int = 0
    flips: bool = False
    classes: int = 10

    @property
    def steps_per_epoch(self) -> int:
        """Minibatches of an epoch; what does not fill one is left out."""
        return self.steps or self.train // self.batch

    @property
    def looped(self) -> bool:
        """Whether minibatches follow one another in Python, not in a compiled loop."""
        return self.model in models.CONVOLUTIONS


class Network(NamedTuple):
    """A network as functions.

    Attributes:
      init: function key -> (params, statistics). The statistics are those of
        normalisation layers, an empty dictionary without.
      loss: function (params, statistics, examples) -> (mean loss in nats, statistics),
        as in training.
      logits: function (params, statistics, inputs) -> logits, as in use.
      recalibrated: function (params, statistics, train) -> the statistics of training
        images under these parameters; what it is given without such layers.
    """

    init: Callable[[jax.Array], tuple[Any, Any]]
    loss: Callable[[Any, Any, Examples], tuple[jax.Array, Any]]
    logits: Callable[[Any, Any, jax.Array], jax.Array]
    recalibrated: Callable[[Any, Any, Examples], Any]


# All of MNIST: 55,000 images to train on, 5,000 to choose by, 10,000 to report.
LENET_MNIST = Task(
    "LeNet-300-100 on MNIST", "mnist", (300, 100), 55_000, 5000, 10_000, 100, 8
)
# In seconds, on data that scikit-learn carries: to see that everything runs.
DIGITS = Task(
    "a perceptron of 32 neurons on digits", "digits", (32,), 1200, 200, 397, 50, 4
)


def _images(title: str, source: str, model: str, widths: Any, epochs: int) -> Task:
    return Task(title, source, widths, 20_000, 5000, 10_000, 128, epochs, model)


def _text(title: str, model: str, widths: tuple[int, ...]) -> Task:
    return Task(
        title, "shakespeare", widths, 0, 400, 800, 8, 12, model,
        steps=400, context=64, classes=65,
    )  # fmt: skip


# Networks of all kinds, each trained in a minute. The settings of the recipes are
# chosen on the first half and confirmed on the second.
CHOSEN_ON: tuple[Task, ...] = (
    _images("LeNet-300-100 on Fashion-MNIST", "fashion", "mlp", (300, 100), 12),
    _images("a CNN with BatchNorm on MNIST", "mnist", "cnn", (16, 32, 64), 12),
    _text("a transformer on Tiny Shakespeare", "transformer", (64, 64)),
    _images(
        "a CNN without normalisation on Fashion-MNIST",
        "fashion", "plain_cnn", (16, 32, 64), 12,
    ),
    Task(
        "a perceptron on Adult (a9a)", "a9a", (128, 64), 28_000, 4561, 16_281, 128, 8,
        classes=2,
    ),
)  # fmt: skip
CONFIRMED_ON: tuple[Task, ...] = (
    _images("LeNet-300-100 on MNIST, 20,000 images", "mnist", "mlp", (300, 100), 12),
    _images(
        "a CNN with BatchNorm on Fashion-MNIST", "fashion", "cnn", (16, 32, 64), 12
    ),
    Task(
        "a ResNet on colour images", "cifar", (16, 32, 64), 3000, 400, 600, 32, 20,
        "resnet", flips=True,
    ),
    _text("a GRU on Tiny Shakespeare", "gru", (96,)),
    _images(
        "a CNN with GroupNorm on Fashion-MNIST",
        "fashion", "group_cnn", (16, 32, 64), 12,
    ),
    _images("a vision transformer on Fashion-MNIST", "fashion", "vit", (48, 48), 8),
    _images(
        "a ResNet of 14 layers on Fashion-MNIST", "fashion", "deep_resnet", (8, 16, 32),
        8,
    ),
)  # fmt: skip


def in_small(task: Task) -> Task:
    """A task of the kind that takes seconds, on data that packages carry."""
    if task.context:
        return task._replace(
            source="topics", widths=(16,), validation=50, test=50, batch=32, epochs=4,
            steps=20, context=16, classes=100,
        )  # fmt: skip
    # The perceptron has one layer of 32 neurons, the others layers of 8 and 16.
    widths = (32,) if task.model == "mlp" else (8, 16)
    return DIGITS._replace(
        title=f"{task.title}, in small", model=task.model, widths=widths
    )


def _mnist() -> Any:
    images, digits = datasets.mnist()
    return images.reshape(-1, 28, 28, 1), digits, 60_000


def _fashion() -> Any:
    images, classes = datasets.fashion_mnist()
    return images.reshape(-1, 28, 28, 1), classes, 60_000


def _cifar() -> Any:
    images, classes = datasets.cifar10()
    # As many of each class in each part, whatever the order of the file: the n-th of
    # each class in turn. Of the full set these are the first 400 of each class.
    rank = np.zeros(len(classes), int)
    for each in range(10):
        rank[classes == each] = np.arange((classes == each).sum())
    order = np.lexsort((classes, rank))[:4000]
    return images[order], classes[order], 3400


def _a9a() -> Any:
    features, signs = datasets.a9a()
    return features, (np.asarray(signs) > 0).astype(int), 32_561


def _digits() -> Any:
    images, digits = load_digits(return_X_y=True)
    return np.asarray(images).reshape(-1, 8, 8, 1), np.asarray(digits), 1400


def _topics() -> str:
    topics = importlib.import_module("pydoc_data.topics").topics
    return "\n".join(topics[name] for name in sorted(topics))[:100_000]


# A text; or inputs, their classes, and how many of the first are for training. The
# validation examples are the last of those.
SOURCES: dict[str, Callable[[], Any]] = {
    "mnist": _mnist,
    "fashion": _fashion,
    "cifar": _cifar,
    "a9a": _a9a,
    "digits": _digits,
    "shakespeare": datasets.tinyshakespeare,
    "topics": _topics,
}


@functools.lru_cache(maxsize=1)
def load(task: Task) -> Data:
    """The data of a task; images are standardised by the training images, by channel.

    Args:
      task: the task.

    Returns:
      The data on the device.

    Raises:
      datasets.MissingData: if it is not there and cannot be downloaded.
      ValueError: if training and validation examples would overlap.
    """
    found = SOURCES[task.source]()
    if isinstance(found, str):
        return _windows(found, task)
    inputs, targets, training = found
    if task.train + task.validation > training:
        raise ValueError(
            f"train + validation must be at most {training} in {task.source!r}; got "
            f"{task.train} + {task.validation}."
        )
    train = inputs[: task.train].astype(np.float32)
    axes = tuple(range(train.ndim - 1)) if train.ndim > 2 else None
    mean, deviation = train.mean(axes), train.std(axes)

    def part(begin: int, count: int) -> Examples:
        chosen = slice(begin, begin + count)
        scaled = (inputs[chosen].astype(np.float32) - mean) / deviation
        return Examples(
            jnp.asarray(scaled, jnp.float32), jnp.asarray(targets[chosen], jnp.int32)
        )

    return Data(
        part(0, task.train),
        part(training - task.validation, task.validation),
        part(training, task.test),
    )


def _windows(text: str, task: Task) -> Data:
    """All but the last tenth to train on; windows of the rest, half and half."""
    characters = {character: i for i, character in enumerate(sorted(set(text)))}
    if len(characters) > task.classes:
        raise ValueError(
            f"classes must be at least {len(characters)}, the characters of "
            f"{task.source!r}; got {task.classes}."
        )
    coded = np.array([characters[character] for character in text], np.int32)
    rest = len(coded) * 9 // 10
    middle = rest + (len(coded) - rest) // 2

    def windows(begin: int, count: int) -> Examples:
        size = count * task.context
        parts = (coded[begin + i : begin + i + size] for i in (0, 1))
        return Examples(*(jnp.asarray(p.reshape(count, -1)) for p in parts))

    return Data(
        Examples(jnp.asarray(coded[: rest - 1]), jnp.asarray(coded[1:rest])),
        windows(rest, task.validation),
        windows(middle, task.test),
    )


def order(task: Task, train: Examples, key: jax.Array) -> jax.Array:
    """Which examples, or where in the text, the minibatches of an epoch are.

    Args:
      task: the task.
      train: the training examples.
      key: random key of the run and the epoch.

    Returns:
      int32 [steps, batch].
    """
    shape = (task.steps_per_epoch, task.batch)
    if task.context:
        last = len(train.inputs) - task.context
        return jax.random.randint(key, shape, 0, last + 1)
    wanted = shape[0] * shape[1]
    return jax.random.permutation(key, len(train.targets))[:wanted].reshape(shape)


def minibatch(
    task: Task, train: Examples, chosen: jax.Array, key: jax.Array
) -> Examples:
    """The examples of a minibatch.

    Args:
      task: the task.
      train: the training examples.
      chosen: a row of `order`.
      key: random key of the step, for what is random in the images.

    Returns:
      The examples.
    """
    if task.context:
        chosen = chosen[:, None] + jnp.arange(task.context)[None]
    inputs, targets = train.inputs[chosen], train.targets[chosen]
    if task.flips:
        mirrored = jax.random.bernoulli(key, 0.5, (len(inputs), 1, 1, 1))
        inputs = jnp.where(mirrored, inputs[:, :, ::-1], inputs)
    return Examples(inputs, targets)


def network(task: Task) -> Network:
    """The network of a task."""
    module = models.MODELS[task.model](task.widths, task.classes)
    normalised = task.model in models.NORMALISED_BY_BATCH

    def init(key: jax.Array) -> tuple[Any, Any]:
        train = load(task).train
        example = (
            train.inputs[None, : task.context] if task.context else train.inputs[:1]
        )
        found = module.init(key, example)
        return found["params"], found.get("batch_stats", {})

    def logits(params: Any, stats: Any, inputs: jax.Array) -> jax.Array:
        return jnp.asarray(
            module.apply({"params": params, "batch_stats": stats}, inputs)
        )

    def forward(variables: Any, inputs: jax.Array) -> Any:
        return module.apply(variables, inputs, train=True, mutable=["batch_stats"])

    def loss(params: Any, stats: Any, examples: Examples) -> tuple[jax.Array, Any]:
        found, new = forward({"params": params, "batch_stats": stats}, examples.inputs)
        losses = optax.softmax_cross_entropy_with_integer_labels(
            found, examples.targets
        )
        return losses.mean(), new.get("batch_stats", {})

    def recalibrated(params: Any, stats: Any, train: Examples) -> Any:
        if not normalised:
            return stats
        images = train.inputs[: CALIBRATION // task.batch * task.batch]
        parts = images.reshape(-1, task.batch, *images.shape[1:])
        variables = {"params": params, "batch_stats": stats}
        return evaluation.recalibrate_batch_norm(
            forward, variables, list(parts), progress=False
        )["batch_stats"]

    return Network(init, loss, logits, recalibrated)
