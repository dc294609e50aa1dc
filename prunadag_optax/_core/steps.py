"""The two steps of Algorithm 2.1: Adagrad's, and a decrease within a trust region."""

import chex
import jax
import jax.numpy as jnp

from prunadag_optax._common.dtypes import working


def optimisable_step(
    g: jax.Array, w_O: jax.Array, learning_rate: chex.Numeric = 1.0
) -> jax.Array:
    r"""The Adagrad step on the optimisable components.

    .. math:: s_{i,k} = - \eta_k g_{i,k} / w^O_{i,k}

    Args:
      g: gradients g_k of one leaf.
      w_O: w^O_k by (9), same shape.
      learning_rate: eta_k >= 0; 1 is the article.

    Returns:
      Steps to add to the parameters, in at least float32.

    Examples:
      >>> import jax.numpy as jnp
      >>> optimisable_step(jnp.array([3.0]), jnp.array([6.0]))
      Array([-0.5], dtype=float32)

    References:
      Porcelli, Seraghiti, Toint (2026), equation (10).
    """
    return -jnp.asarray(learning_rate * (working(g) / working(w_O)))


def trust_radius(x: jax.Array, w_D: jax.Array) -> jax.Array:
    r"""How far a decreasable component may move.

    .. math:: |s^L_{i,k}| = |x_{i,k}| / w^D_{i,k}

    Args:
      x: parameters x_k of one leaf.
      w_D: w^D_k by (12), same shape.

    Returns:
      Radii >= 0 in units of the parameter, in at least float32.

    Examples:
      >>> import jax.numpy as jnp
      >>> trust_radius(jnp.array([-1.0]), jnp.array([4.0]))
      Array([0.25], dtype=float32)

    References:
      Porcelli, Seraghiti, Toint (2026), equation (11).
    """
    return jnp.abs(working(x)) / working(w_D)


def decreasable_step(
    g: jax.Array, x: jax.Array, a: jax.Array, radius: jax.Array
) -> jax.Array:
    r"""The decrease of the decreasable components.

    .. math::
      s_{i,k} = - \mathrm{sign}(x_{i,k}) \min(a_{i,k}, |s^L_{i,k}|)
      \text{ where } \mathrm{sign}(x_{i,k}) = \mathrm{sign}(g_{i,k}), \text{ else } 0

    The magnitude shrinks only where that also lowers the objective to first order.

    Args:
      g: gradients g_k of one leaf.
      x: parameters x_k, same shape.
      a: lower bounds a_k >= 0, in units of the parameter.
      radius: trust radii |s^L_k| from `trust_radius`.

    Returns:
      Steps to add to the parameters, in at least float32.

    Examples:
      >>> import jax.numpy as jnp
      >>> g, x = jnp.array([1.0, 1.0]), jnp.array([2.0, -2.0])
      >>> decreasable_step(g, x, jnp.full(2, 0.5), jnp.full(2, 0.25))
      Array([-0.25,  0.  ], dtype=float32)

    References:
      Porcelli, Seraghiti, Toint (2026), equations (11) and (17).
    """
    sign = jnp.sign(working(x))
    step = jnp.where(sign == jnp.sign(g), -sign * jnp.minimum(a, radius), 0)
    # Only the sign of g enters above: this keeps a NaN or infinite g from hiding.
    return step + 0 * working(g)
