r"""Random under-determined least squares, cases A1 to A6.

.. math:: f(x) = \tfrac12 \|A x - b\|^2, \qquad b = A x^*,

with A of shape [m, n] = [100, 1000] and x* standard normal, both drawn anew in each
run. The least value is 0, taken on an affine space of dimension n - m.

== =================================================================================
A1 standard normal entries
A2 the first m rows of a random orthogonal matrix of order n
A3 "orthogonal columns": n / m random orthogonal matrices of order m, side by side
A4 orthonormal rows, by orthogonalisation of m standard normal ones
A5 entries -1 and +1, each with probability 1/2
A6 m random rows of the orthonormal discrete cosine transform (DCT-II) of order n
== =================================================================================

What the article leaves open: A2 and A4 both have orthonormal rows that span a random
subspace of dimension m, so they differ in how they are made and in the draws only. In
A3 at most m of the n > m columns can be orthogonal; here those of each block of m are
orthonormal, so A A^T = (n / m) I and all columns have length 1. In A5, entries of 0 and
1 would give another problem than A1, to which the published figures are equal.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.fft

from benchmarks.problems.base import Problem, stream

ROWS, COLUMNS = 100, 1000


class Equations(NamedTuple):
    """The equations A x = b."""

    matrix: np.ndarray | jax.Array  # A, shape [m, n]
    target: np.ndarray | jax.Array  # b, shape [m]


def _gaussian(rng: np.random.Generator, m: int, n: int) -> np.ndarray:
    return rng.normal(size=(m, n))


def _rows_of_orthogonal(rng: np.random.Generator, m: int, n: int) -> np.ndarray:
    return np.linalg.qr(rng.normal(size=(n, n)))[0][:m]


def _orthogonal_blocks(rng: np.random.Generator, m: int, n: int) -> np.ndarray:
    count = -(-n // m)
    blocks = np.linalg.qr(rng.normal(size=(count, m, m)))[0]
    return np.concatenate(blocks, axis=1)[:, :n]


def _orthonormal_rows(rng: np.random.Generator, m: int, n: int) -> np.ndarray:
    return np.linalg.qr(rng.normal(size=(n, m)))[0].T


def _signs(rng: np.random.Generator, m: int, n: int) -> np.ndarray:
    return rng.choice((-1.0, 1.0), size=(m, n))


def _rows_of_dct(rng: np.random.Generator, m: int, n: int) -> np.ndarray:
    rows = np.sort(rng.choice(n, m, replace=False))
    # Row k of D is D^T e_k.
    return np.asarray(scipy.fft.idct(np.eye(n)[rows], norm="ortho", axis=1))


MATRICES: dict[str, Callable[[np.random.Generator, int, int], np.ndarray]] = {
    "A1": _gaussian,
    "A2": _rows_of_orthogonal,
    "A3": _orthogonal_blocks,
    "A4": _orthonormal_rows,
    "A5": _signs,
    "A6": _rows_of_dct,
}


def loss(shared: tuple[()], instance: Equations, x: jax.Array) -> jax.Array:
    """1/2 ||A x - b||^2.

    Args:
      shared: nothing.
      instance: A and b.
      x: shape [n].

    Returns:
      A scalar.
    """
    del shared
    return 0.5 * jnp.sum((instance.matrix @ x - instance.target) ** 2)


def problem(name: str, rows: int = ROWS, columns: int = COLUMNS) -> Problem:
    """One of the cases.

    Args:
      name: "A1" to "A6".
      rows: m.
      columns: n >= m.

    Returns:
      The problem: `instance` gives the `Equations` of a run.

    Raises:
      ValueError: for another name.

    Examples:
      >>> case = problem("A4", rows=2, columns=20)
      >>> matrix, target = case.instance(0)
      >>> bool(np.allclose(matrix @ matrix.T, np.eye(2)))
      True
      >>> case.size, case.relevant
      (20, 2)
    """
    if name not in MATRICES:
        raise ValueError(f"name must be one of {list(MATRICES)}, got {name!r}")

    def instance(seed: int) -> Equations:
        rng = stream(seed)
        matrix = MATRICES[name](rng, rows, columns)
        return Equations(matrix, matrix @ rng.normal(size=columns))

    return Problem(
        name=name,
        family="least_squares",
        size=columns,
        shared=(),
        instance=instance,
        loss=loss,
        radius_1=50.0,
        radius_2=100.0,
        rescale=0.001,
    )
