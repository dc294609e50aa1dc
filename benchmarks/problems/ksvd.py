r"""Dictionary learning by K-SVD.

.. math:: \min_{D, X} \|Y - D X\|_F^2 \quad\text{with at most } s \text{ nonzeros in
   each column of } X \text{ and atoms (columns of } D\text{) of length 1}

A sweep codes the signals by orthogonal matching pursuit, then goes through the atoms:
each, together with its coefficients, is fitted to what the others leave of the signals
that use it, by one step of the power method for the singular vectors.

References:
  M. Aharon, M. Elad, A. Bruckstein, K-SVD: an algorithm for designing overcomplete
  dictionaries for sparse representation, IEEE Trans. Signal Process. 54 (2006)
  4311-4322.
  R. Rubinstein, M. Zibulevsky, M. Elad, Efficient implementation of the K-SVD algorithm
  using batch orthogonal matching pursuit, Technion CS-2008-08 (2008), figure 5.
"""

import os
import tempfile
import warnings

import numpy as np
from sklearn.linear_model import orthogonal_mp_gram
from tqdm.auto import tqdm

from benchmarks import datasets

# Part of the names of kept files: raise it when the result changes.
_VERSION = 1


def codes(dictionary: np.ndarray, signals: np.ndarray, sparsity: int) -> np.ndarray:
    """Sparse codes by batch orthogonal matching pursuit.

    Args:
      dictionary: D, atoms of length 1 as columns, shape [size, atoms].
      signals: Y, shape [size, signals].
      sparsity: s, nonzeros in each code.

    Returns:
      X, shape [atoms, signals].
    """
    with warnings.catch_warnings():
        # A signal that fewer atoms give exactly ends early, and is no reason to warn.
        warnings.filterwarnings("ignore", message=".*Orthogonal matching pursuit ended")
        coded = orthogonal_mp_gram(
            dictionary.T @ dictionary, dictionary.T @ signals, n_nonzero_coefs=sparsity
        )
    # It drops axes of length 1.
    return np.asarray(coded).reshape(dictionary.shape[1], signals.shape[1])


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Columns scaled to length 1."""
    return vectors / np.linalg.norm(vectors, axis=0)


def update_atoms(
    dictionary: np.ndarray, coded: np.ndarray, signals: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Fits each atom, and the coefficients that it has, to what the others leave.

    An atom that no signal uses becomes the signal that is coded worst.

    Args:
      dictionary: D, shape [size, atoms].
      coded: X, shape [atoms, signals].
      signals: Y, shape [size, signals].

    Returns:
      The new D, and the new X with its nonzeros in the same places or fewer; the error
      ||Y - D X|| is no larger than before.
    """
    dictionary, coded = dictionary.copy(), coded.copy()
    # Row by row, so that the signals of an atom are contiguous.
    residuals = np.ascontiguousarray((signals - dictionary @ coded).T)
    replaced = np.zeros(signals.shape[1], bool)
    for j in range(dictionary.shape[1]):
        users = np.flatnonzero(coded[j])
        if not users.size:
            errors = np.sum(residuals**2, axis=1)
            worst = np.argmax(np.where(replaced, -1.0, errors))
            replaced[worst] = True
            if signals[:, worst].any():
                dictionary[:, j] = _unit(signals[:, worst])
            continue
        without = residuals[users] + np.outer(coded[j, users], dictionary[:, j])
        direction = without.T @ coded[j, users]
        if direction.any():
            dictionary[:, j] = _unit(direction)
        coded[j, users] = without @ dictionary[:, j]
        residuals[users] = without - np.outer(coded[j, users], dictionary[:, j])
    return dictionary, coded


def learn(
    signals: np.ndarray,
    atoms: int,
    sparsity: int,
    sweeps: int,
    seed: int = 0,
) -> np.ndarray:
    """A dictionary for the signals.

    Args:
      signals: Y, shape [size, signals], at least `atoms` of them nonzero.
      atoms: columns of the dictionary.
      sparsity: nonzeros in each code.
      sweeps: alternations of coding and updating.
      seed: of the choice of signals that the dictionary starts from.

    Returns:
      D, columns of length 1, shape [size, atoms].

    Raises:
      ValueError: for fewer nonzero signals than atoms.

    Examples:
      >>> rng = np.random.default_rng(0)
      >>> signals = np.outer(rng.normal(size=5), rng.normal(size=9))
      >>> dictionary = learn(signals, atoms=2, sparsity=1, sweeps=1)
      >>> bool(np.allclose(dictionary @ codes(dictionary, signals, 1), signals))
      True
    """
    nonzero = np.flatnonzero(signals.any(0))
    if len(nonzero) < atoms:
        raise ValueError(
            f"atoms must be at most the number of nonzero signals, {len(nonzero)}, "
            f"got {atoms}"
        )
    start = np.random.default_rng(seed).choice(nonzero, atoms, replace=False)
    dictionary = _unit(signals[:, start])
    for _ in tqdm(range(sweeps), desc="K-SVD", leave=False, disable=None):
        coded = codes(dictionary, signals, sparsity)
        dictionary, _ = update_atoms(dictionary, coded, signals)
    return dictionary


def kept(
    name: str,
    signals: np.ndarray,
    atoms: int,
    sparsity: int,
    sweeps: int,
    seed: int = 0,
) -> np.ndarray:
    """`learn`, with its result kept in `datasets.cache_folder` for the next time.

    Args:
      name: of the signals, for the name of the file, which tells all other arguments
        too.
      signals: as for `learn`, and so are the rest.
      atoms: columns of the dictionary.
      sparsity: nonzeros in each code.
      sweeps: alternations of coding and updating.
      seed: of the start.

    Returns:
      D, shape [size, atoms].
    """
    settings = f"{name}-{signals.shape[1]}-{atoms}-{sparsity}-{sweeps}-{seed}"
    file = datasets.cache_folder() / f"ksvd-v{_VERSION}-{settings}.npy"
    if file.is_file():
        return np.load(file)
    dictionary = learn(signals, atoms, sparsity, sweeps, seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    # Written under another name first: a run that is stopped here, or a second one at
    # the same time, leaves no half of a file.
    with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as unfinished:
        np.save(unfinished, dictionary)
    os.replace(unfinished.name, file)
    return dictionary
