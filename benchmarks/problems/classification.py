r"""Binary classification by logistic regression without an intercept.

.. math:: f(x) = \frac1N \sum_{i=1}^N \log(1 + e^{-y_i a_i^T x}), \qquad y_i = \pm 1,

over the N training examples, 70 of 100, drawn anew in each run; the other 30 are for
the accuracy. "MNIST 30:70" is MNIST with the two parts exchanged.
MNIST (even against odd digits) and A9A are sampled, 1,000 examples anew in each run;
REGED0 and Musk, version 1, are used whole, and so is `gisette_like`.

What the article leaves open: features are scaled to [0, 1] by their smallest and
largest value among all examples of the run, those for the test included, so that test
features lie in [0, 1] too; no label takes part in it. A constant feature becomes 0. The
article writes the loss with labels in {0, 1}, but it is the logistic loss for labels
in {-1, +1} only. An example with a_i^T x = 0 counts as -1.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import datasets
from benchmarks.problems.base import Problem, stream

NAMES = ("MNIST", "MNIST 30:70", "A9A", "REGED0", "Musk1", "gisette_like")
SAMPLED = ("MNIST", "MNIST 30:70", "A9A")
SAMPLES = 1000
TRAINING_SHARE = 0.7


class Examples(NamedTuple):
    """Rows of features and their labels."""

    features: np.ndarray | jax.Array  # scaled to [0, 1], shape [examples, n]
    labels: np.ndarray | jax.Array  # -1 or +1, shape [examples]


class Split(NamedTuple):
    """The examples of one run."""

    training: Examples
    test: Examples


def scale(features: np.ndarray) -> np.ndarray:
    """Scales each column to [0, 1]; a constant one becomes 0.

    Args:
      features: shape [examples, n].

    Returns:
      float64 of the same shape.

    Examples:
      >>> scale(np.array([[1, 5], [3, 5], [2, 5]])).tolist()
      [[0.0, 0.0], [1.0, 0.0], [0.5, 0.0]]
    """
    features = np.asarray(features, float)
    low = features.min(0)
    width = features.max(0) - low
    return (features - low) / np.where(width > 0, width, 1.0)


def gisette_like(
    images: np.ndarray,
    digits: np.ndarray,
    samples: int = SAMPLES,
    features: int = 5000,
    seed: int = 0,
) -> Examples:
    """A task in the manner of GISETTE, which it is not: 4 against 9 among many probes.

    Half of the features are the pixels that are not constant over the samples, followed
    by products of random pairs of those; the other half, the probes, are random columns
    of the first half with their rows permuted, each on its own, and tell nothing of the
    digit. The columns are then shuffled.

    Args:
      images: shape [examples, pixels].
      digits: shape [examples].
      samples: images to draw.
      features: columns in all, an even number of them.
      seed: of all that is random.

    Returns:
      The features, not scaled, shape [samples, features], and +1 for a 4, -1 for a 9.

    References:
      I. Guyon, S. Gunn, A. Ben-Hur, G. Dror, Result analysis of the NIPS 2003 feature
      selection challenge, NIPS 17 (2004) 545-552.
    """
    rng = stream(seed)
    candidates = np.flatnonzero((digits == 4) | (digits == 9))
    chosen = rng.choice(candidates, samples, replace=False)
    pixels = images[chosen].astype(float)
    active = pixels[:, np.ptp(pixels, axis=0) > 0][:, : features // 2]
    pairs = rng.integers(active.shape[1], size=(2, features // 2 - active.shape[1]))
    real = np.concatenate([active, active[:, pairs[0]] * active[:, pairs[1]]], axis=1)
    copied = real[:, rng.integers(real.shape[1], size=features - real.shape[1])]
    both = np.concatenate([real, rng.permuted(copied, axis=0)], axis=1)
    labels = np.where(digits[chosen] == 4, 1.0, -1.0)
    return Examples(both[:, rng.permutation(features)], labels)


def _data(name: str, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Features, not scaled, and labels -1 or +1."""
    if name in ("MNIST", "MNIST 30:70"):
        images, digits = datasets.mnist()
        return images, np.where(digits % 2 == 0, 1.0, -1.0)
    if name == "A9A":
        return datasets.a9a()
    if name == "REGED0":
        return datasets.reged0()
    if name == "Musk1":
        return datasets.musk1()
    features, labels = gisette_like(*datasets.mnist(), samples)
    return np.asarray(features), np.asarray(labels)


def _losses(examples: Examples, x: jax.Array) -> jax.Array:
    # log(1 + exp(-z)) = -log sigmoid(z), without overflow.
    return -jax.nn.log_sigmoid(examples.labels * (examples.features @ x))


def _correct(examples: Examples, x: jax.Array) -> jax.Array:
    return jnp.where(examples.features @ x > 0, 1, -1) == examples.labels


def _sampled(
    features: np.ndarray, labels: np.ndarray, samples: int, share: float
) -> dict[str, Any]:
    """Examples of each run its own."""

    def instance(seed: int) -> Split:
        # As drawn, the examples are in random order: the split is that of the order.
        chosen = stream(seed).choice(len(labels), samples, replace=False)
        scaled, cut = scale(features[chosen]), round(share * samples)
        return Split(
            Examples(scaled[:cut], labels[chosen[:cut]]),
            Examples(scaled[cut:], labels[chosen[cut:]]),
        )

    return {
        "shared": (),
        "instance": instance,
        "loss": lambda shared, split, x: jnp.mean(_losses(split.training, x)),
        "accuracy": lambda shared, split, x: jnp.mean(_correct(split.test, x)),
    }


def _whole(features: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """The same examples for all runs; a run's instance is 1 for training, 0 for test.

    So the features stay one array, however many runs are batched, and a batch of
    gradients is two products of matrices, instead of many of a matrix and a vector.
    """

    def instance(seed: int) -> np.ndarray:
        training = np.zeros(len(labels))
        order = stream(seed).permutation(len(labels))
        training[order[: round(TRAINING_SHARE * len(labels))]] = 1.0
        return training

    def loss(shared: Examples, training: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(training * _losses(shared, x)) / jnp.sum(training)

    def accuracy(shared: Examples, training: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum((1 - training) * _correct(shared, x)) / jnp.sum(1 - training)

    return {
        "shared": Examples(scale(features), labels),
        "instance": instance,
        "loss": loss,
        "accuracy": accuracy,
    }


def problem(name: str, samples: int = SAMPLES) -> Problem:
    """One data set to classify.

    Args:
      name: "MNIST", "MNIST 30:70", "A9A", "REGED0", "Musk1" or "gisette_like".
      samples: examples that each run draws of MNIST and A9A, and that `gisette_like`
        has.

    Returns:
      The problem, with `accuracy`.

    Raises:
      MissingData: when the data set is not to be had.
      ValueError: for another name.
    """
    if name not in NAMES:
        raise ValueError(f"name must be one of {list(NAMES)}, got {name!r}")
    features, labels = _data(name, samples)
    share = 1 - TRAINING_SHARE if name == "MNIST 30:70" else TRAINING_SHARE
    parts = (
        _sampled(features, labels, samples, share)
        if name in SAMPLED
        else _whole(features, labels)
    )
    return Problem(
        name=name,
        family="classification",
        size=features.shape[1],
        max_iterations=2_000,
        radius_1=10.0,
        radius_2=100.0,
        rescale=0.5,
        **parts,
    )
