"""The Adagrad-like weights: w^O over gradients, w^D over parameters."""

import chex
import jax
import jax.numpy as jnp
import optax

from prunadag_optax._common.dtypes import working


def initial(params: optax.Params, value: chex.Numeric, dtype=None) -> optax.Params:
    """Accumulators before the first iteration, w_{-1} = zeta in every component.

    Args:
      params: pytree of real floating arrays.
      value: zeta > 0, in the units of a gradient (w^O) or of a parameter (w^D).
      dtype: dtype of the accumulators; None keeps each leaf's own.

    Returns:
      Pytree like `params`, each leaf filled with `value`.
    """
    return jax.tree.map(lambda x: jnp.full_like(x, value, dtype=dtype), params)


def accumulate(w: jax.Array, v: jax.Array) -> jax.Array:
    r"""The accumulator after one more value.

    .. math:: w_{i,k} = \sqrt{w_{i,k-1}^2 + v_{i,k}^2}

    With v = g this is w^O of equation (9), with v = x it is w^D of equation (12).

    Args:
      w: w_{k-1} of one leaf.
      v: gradients or parameters, same shape.

    Returns:
      w_k, in at least float32.

    Examples:
      >>> import jax.numpy as jnp
      >>> accumulate(jnp.array([3.0]), jnp.array([-4.0]))
      Array([5.], dtype=float32)

    References:
      Porcelli, Seraghiti, Toint (2026), equations (9) and (12).
    """
    w, v = working(w), working(v)
    return jnp.sqrt(w * w + v * v)


def accumulate_where(member: jax.Array, w: jax.Array, v: jax.Array) -> jax.Array:
    r"""The accumulator to carry on: one more value in its class, unchanged elsewhere.

    .. math:: w_{i,k} = \sqrt{w_{i,k-1}^2 + v_{i,k}^2} \text{ in the class, else }
       w_{i,k-1}

    Args:
      member: bool, True where the component is in the accumulator's class.
      w: w_{k-1} of one leaf, same shape.
      v: gradients (w^O) or parameters (w^D).

    Returns:
      w_k, in at least float32.

    Examples:
      >>> import jax.numpy as jnp
      >>> w, g = jnp.array([3.0, 3.0]), jnp.array([4.0, 4.0])
      >>> accumulate_where(jnp.array([True, False]), w, g)
      Array([5., 3.], dtype=float32)

    References:
      Porcelli, Seraghiti, Toint (2026), equations (15) and (16).
    """
    return jnp.where(member, accumulate(w, v), working(w))
