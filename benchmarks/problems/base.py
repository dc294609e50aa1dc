"""What a run of an optimisation method needs to know of a problem.

A problem is pure functions and arrays: the same value of `seed` gives the same arrays
on every machine, and arrays of different seeds have the same shapes, so that runs can
be stacked and batched by `jax.vmap`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

# Each purpose has a stream of random numbers of its own, so that a start does not
# change when the data does.
_START, _DATA = 0, 1


def stream(seed: int) -> np.random.Generator:
    """The random numbers of the data of run `seed`."""
    return np.random.default_rng((seed, _DATA))


@dataclasses.dataclass(frozen=True)
class Problem:
    """One optimisation problem of the article, with everything that a run of it needs.

    Attributes:
      name: "A1", "SPARCO 3", "MNIST", ...
      family: "least_squares", "sparco", "sparse_coding" or "classification".
      size: n, the number of parameters.
      shared: pytree of float64 arrays that all runs have in common, or ().
      instance: from a seed, the pytree of float64 arrays that belongs to that run, or
        (); the same shapes for all seeds.
      loss: from (shared, instance, x), with x of shape [n], the objective, a scalar.
      accuracy: from (shared, instance, x) the share of the test examples that x
        classifies rightly, in [0, 1]; None where there are none.
      max_iterations: where a run stops at the latest.
      radius_1: tau of the Frank-Wolfe method FW1.
      radius_2: tau of FW2.
      rescale: beta of FW2.
      relevant: T, the number of relevant parameters; 0 stands for n/10, rounded down,
        and at least 1.
    """

    name: str
    family: str
    size: int
    shared: Any
    instance: Callable[[int], Any]
    loss: Callable[[Any, Any, jax.Array], jax.Array]
    accuracy: Callable[[Any, Any, jax.Array], jax.Array] | None = None
    max_iterations: int = 10_000
    radius_1: float = 50.0
    radius_2: float = 100.0
    rescale: float = 0.001
    relevant: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.relevant <= self.size:
            raise ValueError(
                f"relevant must be between 0 and size = {self.size}, got "
                f"{self.relevant}"
            )
        if not self.relevant:
            object.__setattr__(self, "relevant", max(1, self.size // 10))

    def start(self, seed: int) -> np.ndarray:
        """The start of run `seed`: T standard normal entries, scaled to length 1.

        Args:
          seed: number of the run.

        Returns:
          float64 of shape [n], with `relevant` nonzeros at random places.
        """
        rng = np.random.default_rng((seed, _START))
        x = np.zeros(self.size)
        places = rng.choice(self.size, self.relevant, replace=False)
        x[places] = rng.normal(size=self.relevant)
        return x / np.linalg.norm(x)
