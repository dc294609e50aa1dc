"""What is left of a result when its smallest components are set to zero."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from prunadag_optax import masks

SPARSITIES = tuple(percent / 100 for percent in range(0, 100, 5))


class Robustness(NamedTuple):
    """What is left of x after pruning, arrays [sparsities]."""

    rho: jax.Array
    omega: jax.Array
    accuracy: jax.Array | None  # in [0, 1]


def evaluate(
    loss: Callable[[jax.Array], jax.Array],
    accuracy: Callable[[jax.Array], jax.Array] | None,
    x: jax.Array,
) -> Robustness:
    r"""What pruning does to x at each of SPARSITIES, as `evaluation.pruning_error`.

    .. math::
      \rho(\sigma) = \|\nabla f(x_\sigma)\|, \qquad
      \omega(\sigma) = \sqrt{|f(x_\sigma) - f(x)|}

    Args:
      loss: f, from x of shape [n] to a scalar.
      accuracy: from x to the share classified rightly; None where there is none.
      x: shape [n].

    Returns:
      The `Robustness`.
    """

    # One program for all sparsities, where the package's function, which takes them as
    # numbers, makes one for each: 20 of them take a minute to compile.
    def at(sparsity: jax.Array) -> Robustness:
        pruned, _ = masks.prune(x, sparsity, where=masks.everything)
        value, gradient = jax.value_and_grad(loss)(pruned)
        return Robustness(
            jnp.linalg.norm(gradient),
            jnp.sqrt(jnp.abs(value - loss(x))),
            None if accuracy is None else accuracy(pruned),
        )

    return jax.lax.map(at, jnp.array(SPARSITIES))
