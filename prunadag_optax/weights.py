"""The Adagrad-like weights: w^O over gradients, w^D over parameters.

Each component adds to a weight only in the iterations that put it in that weight's
class: to w^O where it was optimisable, to w^D where it was decreasable (equations (15)
and (16) of the article).
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from prunadag_optax._precision import working


def initial(params: optax.Params, value: chex.Numeric, dtype: Any = None) -> Any:
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


def accumulate_on(member: Any, weight: Any, value: Any) -> Any:
    r"""The weight to carry on: one more value on the class, unchanged elsewhere.

    .. math:: w_{i,k} = \sqrt{w_{i,k-1}^2 + v_{i,k}^2} \text{ in the class, else }
       w_{i,k-1}

    Args:
      member: pytree of bool, True where the component is in the weight's class.
      weight: pytree of weights w_{k-1}, same structure and shapes.
      value: pytree of gradients (w^O) or of parameters (w^D).

    Returns:
      Pytree of weights w_k, in at least float32.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax import weights
      >>> w, g = jnp.array([3.0, 3.0]), jnp.array([4.0, 4.0])
      >>> weights.accumulate_on(jnp.array([True, False]), w, g)
      Array([5., 3.], dtype=float32)

    References:
      Porcelli, Seraghiti, Toint (2026), equations (15) and (16).
    """
    return jax.tree.map(
        lambda m, w, c: jnp.where(m, c, working(w)),
        member,
        weight,
        accumulate(weight, value),
    )
