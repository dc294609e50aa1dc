"""The two steps of Algorithm 2.1: Adagrad's, and a decrease within a trust region."""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from prunadag_optax._precision import working
from prunadag_optax.classification import adagrad_ratio


def optimisable_step(
    gradients: Any, weight: Any, learning_rate: chex.Numeric = 1.0
) -> Any:
    r"""The Adagrad step on the optimisable components, equation (10).

    .. math:: s_{i,k} = - \eta_k g_{i,k} / w^O_{i,k}

    Args:
      gradients: pytree of gradients g_k.
      weight: pytree of w^O_k by (9), same structure and shapes.
      learning_rate: eta_k >= 0; 1 is the article.

    Returns:
      Pytree of steps to add to the parameters, in at least float32.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax import steps
      >>> steps.optimisable_step(jnp.array([3.0]), jnp.array([6.0]))
      Array([-0.5], dtype=float32)

    References:
      Porcelli, Seraghiti, Toint (2026), equation (10).
    """
    return jax.tree.map(
        lambda g, w: -adagrad_ratio(g, w, learning_rate), gradients, weight
    )


def trust_radius(params: Any, weight: Any) -> Any:
    """How far a decreasable component may move, equation (11).

    .. math:: |s^L_{i,k}| = |x_{i,k}| / w^D_{i,k}

    Args:
      params: pytree of parameters x_k.
      weight: pytree of w^D_k by (12), same structure and shapes.

    Returns:
      Pytree of radii >= 0 in units of the parameter, in at least float32.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax import steps
      >>> steps.trust_radius(jnp.array([-1.0]), jnp.array([4.0]))
      Array([0.25], dtype=float32)

    References:
      Porcelli, Seraghiti, Toint (2026), equation (11).
    """
    return jax.tree.map(lambda x, w: jnp.abs(working(x)) / working(w), params, weight)


def decreasable_step(gradients: Any, params: Any, lower: Any, radius: Any) -> Any:
    r"""The decrease of the decreasable components, equation (17).

    .. math::
      s_{i,k} = - \mathrm{sign}(x_{i,k}) \min(a_{i,k}, |s^L_{i,k}|)
      \text{ where } \mathrm{sign}(x_{i,k}) = \mathrm{sign}(g_{i,k}), \text{ else } 0

    The magnitude shrinks only where that also lowers the objective to first order.

    Args:
      gradients: pytree of gradients g_k.
      params: pytree of parameters x_k, same structure and shapes.
      lower: pytree of lower bounds a_k >= 0, in units of the parameter.
      radius: pytree of trust radii |s^L_k| from `trust_radius`.

    Returns:
      Pytree of steps to add to the parameters, in at least float32.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax import steps
      >>> g, x = jnp.array([1.0, 1.0]), jnp.array([2.0, -2.0])
      >>> steps.decreasable_step(g, x, jnp.full(2, 0.5), jnp.full(2, 0.25))
      Array([-0.25,  0.  ], dtype=float32)

    References:
      Porcelli, Seraghiti, Toint (2026), equations (11) and (17).
    """

    def leaf(g, x, a, r):
        sign = jnp.sign(working(x))
        step = jnp.where(sign == jnp.sign(g), -sign * jnp.minimum(a, r), 0)
        # Only the sign of g enters above: this keeps a NaN or infinite g from hiding.
        return step + 0 * working(g)

    return jax.tree.map(leaf, gradients, params, lower, radius)


def limit(acceptable: Any, step: Any, upper: Any) -> Any:
    r"""Holds the step of acceptable components to the upper bound b, against rounding.

    .. math:: |s_{i,k}| \le b_{i,k}, \quad i \in A_k

    The classification (6) has made sure of that in exact arithmetic; but a compiler may
    round the quotient of the step otherwise than the one that was classified, and with
    b = |x| one unit in the last place too much would change a parameter's sign.

    Args:
      acceptable: pytree of bool, True on A_k.
      step: pytree of optimisable steps.
      upper: pytree of upper bounds b_k >= 0 on A_k.

    Returns:
      Pytree of steps.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax import steps
      >>> step, upper = jnp.array([-3.0, -3.0]), jnp.array([2.0, 2.0])
      >>> steps.limit(jnp.array([True, False]), step, upper)
      Array([-2., -3.], dtype=float32)

    References:
      Porcelli, Seraghiti, Toint (2026), equation (6).
    """
    return jax.tree.map(
        lambda a, s, b: jnp.where(a, jnp.clip(s, -b, b), s), acceptable, step, upper
    )
