r"""Sparse coding of handwritten digits in a learned dictionary.

.. math:: f(x) = \|y - D x\|^2

for one digit y, a column of Y, in a dictionary D with n columns of length 1 that K-SVD
has learned from Y. Y has 4,000 random training images of MNIST as columns, with pixels
scaled to [0, 1]. As in the article there is no factor 1/2.

What the article leaves open: the number of nonzeros and of sweeps with which K-SVD
learns, and which columns of Y the runs take. Here run number s takes column s.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import datasets
from benchmarks.problems import ksvd
from benchmarks.problems.base import Problem, stream

COLUMNS, ATOMS, SPARSITY, SWEEPS = 4000, 1000, 10, 10
# A small one, of seconds instead of minutes.
QUICK = {"columns": 800, "atoms": 200, "sparsity": 5, "sweeps": 3}


def digits(columns: int = COLUMNS) -> np.ndarray:
    """Y: random training images of MNIST, always the same ones.

    Args:
      columns: how many.

    Returns:
      float64 in [0, 1], one image a column, shape [784, columns].

    Raises:
      MissingData: when MNIST is not to be had.
    """
    images = datasets.mnist().features[:60_000]
    chosen = stream(0).choice(len(images), columns, replace=False)
    return images[chosen].T / 255.0


def loss(shared: jax.Array, instance: jax.Array, x: jax.Array) -> jax.Array:
    """||y - D x||^2.

    Args:
      shared: D, shape [784, n].
      instance: y, shape [784].
      x: the code, shape [n].

    Returns:
      A scalar.
    """
    return jnp.sum((instance - shared @ x) ** 2)


def digit(dictionary: Any, x: Any) -> np.ndarray:
    """The image D x that a code stands for.

    Args:
      dictionary: D, the problem's `shared`, shape [784, n].
      x: shape [n].

    Returns:
      float64 of shape [28, 28]; 0 is background and 1 ink.

    Examples:
      >>> digit(np.ones((784, 2)), np.array([0.25, 0.5])).shape
      (28, 28)
    """
    return (np.asarray(dictionary) @ np.asarray(x)).reshape(28, 28)


def problem(
    columns: int = COLUMNS,
    atoms: int = ATOMS,
    sparsity: int = SPARSITY,
    sweeps: int = SWEEPS,
) -> Problem:
    """Sparse coding of one digit a run.

    Args:
      columns: digits that the dictionary is learned from.
      atoms: n, columns of the dictionary.
      sparsity: nonzeros of a code while it is learned.
      sweeps: of K-SVD. The first time takes minutes at the full size; the dictionary is
        kept (`datasets.cache_folder`).

    Returns:
      The problem: `shared` is D, and `instance` gives y, shape [784].

    Raises:
      MissingData: when MNIST is not to be had.
    """
    signals = digits(columns)
    return Problem(
        name="MNIST",
        family="sparse_coding",
        size=atoms,
        shared=ksvd.kept("mnist", signals, atoms, sparsity, sweeps),
        instance=lambda seed: np.ascontiguousarray(signals[:, seed % columns]),
        loss=loss,
        radius_1=10.0,
        radius_2=20.0,
        rescale=0.001,
    )
