"""The Adagrad-like weights: w^O over gradients, w^D over parameters.

Each component adds to a weight only in the iterations that put it in that weight's
class: w^O where it was optimisable, w^D where it was decreasable (equations (15) and
(16) of the article). So a step computes both candidates and `retain` takes back the
one that does not apply.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from prunadag_optax._precision import working


def initial(params: optax.Params, value: float | jax.Array, dtype: Any = None) -> Any:
    """Weights before the first iteration, w_{-1} = zeta in every component.

    Args:
      params: pytree of real floating arrays.
      value: zeta > 0, in the units of a gradient (w^O) or of a parameter (w^D).
      dtype: dtype of the weights; None keeps each leaf's own.

    Returns:
      Pytree like `params`, each leaf filled with `value`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax import weights
      >>> weights.initial({"w": jnp.ones(2)}, 0.5)
      {'w': Array([0.5, 0.5], dtype=float32)}
    """
    return jax.tree.map(lambda x: jnp.full_like(x, value, dtype=dtype), params)


def accumulate(weight: Any, value: Any) -> Any:
    r"""The weight after one more value, sqrt(w^2 + v^2).

    .. math:: w_{i,k} = \sqrt{w_{i,k-1}^2 + v_{i,k}^2}

    With v = g this is w^O of equation (9), with v = x it is w^D of equation (12).

    Args:
      weight: pytree of weights w_{k-1}.
      value: pytree of gradients or of parameters, same structure and shapes.

    Returns:
      Pytree of weights w_k, in at least float32.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax import weights
      >>> weights.accumulate(jnp.array([3.0]), jnp.array([-4.0]))
      Array([5.], dtype=float32)

    References:
      Porcelli, Seraghiti, Toint (2026), equations (9) and (12).
    """

    def leaf(w, v):
        w, v = working(w), working(v)
        return jnp.sqrt(w * w + v * v)

    return jax.tree.map(leaf, weight, value)


def retain(member: Any, weight: Any, candidate: Any) -> Any:
    """The candidate where a component is in the class, the old weight elsewhere.

    Args:
      member: pytree of bool, True where the component is in the weight's class.
      weight: pytree of weights w_{k-1}; its dtypes are kept.
      candidate: pytree of weights w_k from `accumulate`.

    Returns:
      Pytree of weights to carry to the next iteration, in the dtypes of `weight`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax import weights
      >>> old, new = jnp.array([1.0, 1.0]), jnp.array([2.0, 2.0])
      >>> weights.retain(jnp.array([True, False]), old, new)
      Array([2., 1.], dtype=float32)

    References:
      Porcelli, Seraghiti, Toint (2026), equations (15) and (16).
    """
    return jax.tree.map(
        lambda m, w, c: jnp.where(m, c.astype(w.dtype), w), member, weight, candidate
    )
