r"""SPARCO problems 3, 5, 7, 9 and 11 as least squares, without forming their matrices.

.. math:: f(x) = \tfrac12 \|A x - b\|^2, \qquad b = A x_0,

with D the orthonormal discrete cosine transform (DCT-II), A of shape [m, n] and x_0 as
follows.

== =========== ============================= ============ =========================
3  cosspike    [D^T, I]                      1024 x 2048  2 cosines, 120 spikes
5  gcosspike   G [D^T, I], G Gaussian with   300 x 2048   3 cosines, 60 spikes
               columns of length 1
7  sgnspike    orthonormal rows              600 x 2560   20 signs
9  blkheavi    cumulative sum                128 x 128    the jumps of Blocks
11 gausspike   Gaussian                      256 x 1024   32 spikes
== =========== ============================= ============ =========================

There is no noise: the least value is 0. The collection builds each problem from a fixed
seed, so A and b are the same in all runs, which differ in their starts only.

References:
  E. van den Berg, M. P. Friedlander, G. Hennenfent, F. J. Herrmann, R. Saab, O. Yilmaz,
  Algorithm 890: Sparco: a testing framework for sparse reconstruction, ACM Trans. Math.
  Softw. 35 (2009) 29:1-29:16.
  D. L. Donoho, I. M. Johnstone, Ideal spatial adaptation by wavelet shrinkage,
  Biometrika 81 (1994) 425-455, table 1 (Blocks).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy.fft
import numpy as np
import scipy.fft

from benchmarks.problems.base import Problem, stream

# Blocks: where it jumps on (0, 1], and by how much.
PLACES = (0.10, 0.13, 0.15, 0.23, 0.25, 0.40, 0.44, 0.65, 0.76, 0.78, 0.81)
JUMPS = (4.0, -5.0, 3.0, -4.0, 5.0, -4.2, 2.1, 4.3, -3.1, 2.1, -4.2)


class Recovery(NamedTuple):
    """What the runs of one problem have in common."""

    matrix: np.ndarray | jax.Array | None  # the random factor of A, or None
    target: np.ndarray | jax.Array  # b, shape [m]
    solution: np.ndarray | jax.Array  # x_0, shape [n]


def _plain(matrix: jax.Array, x: jax.Array) -> jax.Array:
    return matrix @ x


def _cosines_and_spikes(matrix: jax.Array | None, x: jax.Array) -> jax.Array:
    """[D^T, I] x, or G [D^T, I] x."""
    cosines, spikes = jnp.split(x, 2)
    signal = jax.scipy.fft.idct(cosines, norm="ortho") + spikes
    return signal if matrix is None else matrix @ signal


def _cumulative(matrix: None, x: jax.Array) -> jax.Array:
    del matrix
    return jnp.cumsum(x)


OPERATORS: dict[str, Callable[..., jax.Array]] = {
    "SPARCO 3": _cosines_and_spikes,
    "SPARCO 5": _cosines_and_spikes,
    "SPARCO 7": _plain,
    "SPARCO 9": _cumulative,
    "SPARCO 11": _plain,
}


def _steps(size: int) -> np.ndarray:
    """Each jump as a signal of its own: 0 before it, 1 after it, 1/2 right on it."""
    times = np.arange(1, size + 1)[:, None] / size
    return (1 + np.sign(times - np.array(PLACES))) / 2


def blocks(size: int) -> np.ndarray:
    """The piecewise constant signal Blocks at 1/size, 2/size, ..., 1.

    Args:
      size: number of samples.

    Returns:
      float64 of shape [size]. A sample right on a jump takes the middle of it.

    Examples:
      >>> np.abs(blocks(4)).round(9).tolist()
      [0.5, 0.9, 5.2, 0.0]
    """
    return _steps(size) @ np.array(JUMPS)


def _spikes(rng: np.random.Generator, n: int, count: int) -> np.ndarray:
    x = np.zeros(n)
    x[rng.permutation(n)[:count]] = rng.normal(size=count)
    return x


def _cosspike(rng: np.random.Generator, cosines: dict[int, float], spikes: int):
    """[D^T, I] x_0 and x_0, n = 2048, with cosines in units of sqrt(1024 / 2)."""
    x = np.concatenate([np.zeros(1024), _spikes(rng, 1024, spikes)])
    x[list(cosines)] = np.sqrt(1024 / 2) * np.array(list(cosines.values()))
    return np.asarray(scipy.fft.idct(x[:1024], norm="ortho")) + x[1024:], x


def _recovery(name: str, rng: np.random.Generator) -> Recovery:
    if name == "SPARCO 3":
        return Recovery(None, *_cosspike(rng, {4: 4.0, 12: 2.0}, 120))
    if name == "SPARCO 5":
        signal, x = _cosspike(rng, {3: 2.0, 9: 3.0, 20: -1.0}, 60)
        gaussian = rng.normal(size=(300, 1024))
        gaussian /= np.linalg.norm(gaussian, axis=0)
        return Recovery(gaussian, gaussian @ signal, x)
    if name == "SPARCO 7":
        x = np.sign(_spikes(rng, 2560, 20))
        rows = np.linalg.qr(rng.normal(size=(2560, 600)))[0].T
        return Recovery(rows, rows @ x, x)
    if name == "SPARCO 9":
        # From the steps one by one: the difference of their sum is not exactly zero
        # where nothing jumps.
        x = np.diff(_steps(128), axis=0, prepend=0.0) @ np.array(JUMPS)
        return Recovery(None, blocks(128), x)
    x = _spikes(rng, 1024, 32)
    gaussian = rng.normal(size=(256, 1024))
    return Recovery(gaussian, gaussian @ x, x)


def problem(name: str, seed: int = 0) -> Problem:
    """One problem of the collection.

    Args:
      name: "SPARCO 3", "SPARCO 5", "SPARCO 7", "SPARCO 9" or "SPARCO 11".
      seed: of the random parts of A and x_0, the same for all runs.

    Returns:
      The problem: `shared` is its `Recovery`, and `instance` gives () for every run.

    Raises:
      ValueError: for another name.

    Examples:
      >>> blkheavi = problem("SPARCO 9")
      >>> blkheavi.size, blkheavi.relevant
      (128, 12)
      >>> bool(blkheavi.loss(blkheavi.shared, (), blkheavi.shared.solution) < 1e-9)
      True
    """
    if name not in OPERATORS:
        raise ValueError(f"name must be one of {list(OPERATORS)}, got {name!r}")
    operator = OPERATORS[name]
    recovery = _recovery(name, stream(seed))

    def loss(shared: Recovery, instance: tuple[()], x: jax.Array) -> jax.Array:
        del instance
        return 0.5 * jnp.sum((operator(shared.matrix, x) - shared.target) ** 2)

    return Problem(
        name=name,
        family="sparco",
        size=recovery.solution.size,
        shared=recovery,
        instance=lambda run: (),
        loss=loss,
        radius_1=100.0,
        radius_2=100.0,
        rescale=0.001,
    )
