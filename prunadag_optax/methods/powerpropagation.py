r"""Powerpropagation: weights that are powers of what is trained.

With :math:`x = w |w|^{\alpha - 1}` a gradient step on w moves a weight in proportion to
a power of its own size: the large grow, the small stay small, and pruning by magnitude
takes away less.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from prunadag_optax import masks
from prunadag_optax._common import checks
from prunadag_optax._common.dtypes import working
from prunadag_optax._common.leaves import parts_of
from prunadag_optax._common.transformation import checked, find_states
from prunadag_optax._core import eval_params as evaluated


class PowerpropagationState(NamedTuple):
    """State of `powerpropagation`."""

    base: optax.OptState  # of the optimizer that steps on w


@jax.custom_jvp
def _powered(w: jax.Array, alpha: jax.Array) -> jax.Array:
    """sign(w) |w|^alpha."""
    return jnp.sign(w) * jnp.abs(w) ** alpha


@_powered.defjvp
def _powered_jvp(primals, tangents):
    (w, alpha), (dw, dalpha) = primals, tangents
    x = _powered(w, alpha)
    # By parts it would be 0 times infinity at w = 0 for alpha below 2, or 0 for 1.
    of_alpha = jnp.where(w == 0, 0, x * jnp.log(jnp.where(w == 0, 1, jnp.abs(w))))
    return x, _slope(w, alpha) * dw + of_alpha * dalpha


def _slope(w: jax.Array, alpha: Any) -> jax.Array:
    """The derivative alpha |w|^(alpha - 1) of a weight by what is trained."""
    return alpha * jnp.abs(w) ** (alpha - 1)


def _weight(w: jax.Array, alpha: Any) -> jax.Array:
    return _powered(w, jnp.asarray(alpha, w.dtype))


def _trained(x: jax.Array, alpha: Any) -> jax.Array:
    return jnp.sign(x) * jnp.abs(x) ** (1 / jnp.asarray(alpha, x.dtype))


def to_weights(
    w: optax.Params, alpha: chex.Numeric = 2.0, *, where: masks.Where | None = None
) -> Any:
    r"""The model's weights, of what powerpropagation trains.

    .. math:: x = w |w|^{\alpha - 1}

    Args:
      w: pytree of real floating arrays.
      alpha: at least 1. With 1 it is the identity.
      where: predicate (path, leaf) -> bool, True for the leaves that are powers; all
        others are the weights themselves. None: `masks.prunable`.

    Returns:
      Pytree like `w`, in its dtypes; the powers are taken in at least float32.

    Raises:
      ValueError: if `alpha` is out of range, or nothing is chosen.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax.methods import powerpropagation
      >>> powerpropagation.to_weights(jnp.array([-3.0, 0.5]), 2.0).tolist()
      [-9.0, 0.25]

    References:
      J. Schwarz and others, Powerpropagation: a sparsity inducing weight
      reparameterisation, NeurIPS 2021, section 2.
    """
    return _of_chosen(_weight, w, alpha, where)


def from_weights(
    x: optax.Params, alpha: chex.Numeric = 2.0, *, where: masks.Where | None = None
) -> Any:
    r"""What powerpropagation trains, of the model's weights, such as the first ones.

    .. math:: w = \mathrm{sign}(x) |x|^{1 / \alpha}

    Args:
      x: pytree of real floating arrays.
      alpha: at least 1.
      where: as in `to_weights`, of which this is the inverse.

    Returns:
      Pytree like `x`, in its dtypes; the roots are taken in at least float32.

    Raises:
      ValueError: if `alpha` is out of range, or nothing is chosen.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax.methods import powerpropagation
      >>> powerpropagation.from_weights(jnp.array([-9.0, 0.25]), 2.0).tolist()
      [-3.0, 0.5]

    References:
      J. Schwarz and others, Powerpropagation: a sparsity inducing weight
      reparameterisation, NeurIPS 2021, section 2.
    """
    return _of_chosen(_trained, x, alpha, where)


def _of_chosen(function: Any, tree: Any, alpha: Any, where: Any) -> Any:
    """function(leaf, alpha) of the leaves that are chosen, in their dtypes."""
    checks.scalar("alpha", alpha, least=1)

    def leaf(x):
        x = jnp.asarray(x)
        return function(working(x), alpha).astype(x.dtype)

    return parts_of(tree, where).map(leaf, tree, otherwise=tree)


def reparameterised(
    loss: Callable[..., Any],
    alpha: chex.Numeric = 2.0,
    *,
    where: masks.Where | None = None,
) -> Callable[..., Any]:
    r"""A loss of the model's weights, as one of what powerpropagation trains.

    .. math:: w \mapsto f(w |w|^{\alpha - 1}), \quad
       \nabla_w = \alpha |w|^{\alpha - 1} \odot \nabla f

    This is the other form of `powerpropagation`: any optimizer then trains w, the
    training loop holds w, and what is evaluated and pruned is `to_weights(w, alpha)`.

    Args:
      loss: function (x, ...) of the weights; more arguments and what it returns are
        passed on.
      alpha: at least 1.
      where: as in `to_weights`.

    Returns:
      The function (w, ...).

    Raises:
      ValueError: if `alpha` is out of range or `loss` is no function.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from prunadag_optax.methods import powerpropagation
      >>> loss = powerpropagation.reparameterised(jnp.sum, 2.0)
      >>> jax.grad(loss)(jnp.array([-3.0, 0.5])).tolist()
      [6.0, 1.0]

    References:
      J. Schwarz and others, Powerpropagation: a sparsity inducing weight
      reparameterisation, NeurIPS 2021, section 2.
    """
    checks.scalar("alpha", alpha, least=1)
    if not callable(loss):
        raise ValueError(
            f"loss must be a function (params, ...) -> loss; got {checks.shown(loss)}."
        )

    def loss_of_w(w: optax.Params, *args: Any, **kwargs: Any) -> Any:
        return loss(to_weights(w, alpha, where=where), *args, **kwargs)

    return loss_of_w


def powerpropagation(
    base: optax.GradientTransformation,
    alpha: chex.Numeric = 2.0,
    *,
    where: masks.Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Any optimizer, on w with x = w |w|^(alpha - 1) in place of the weights x.

    .. math::
       w_k &= \mathrm{sign}(x_k) |x_k|^{1 / \alpha}, \quad
       g^w_k = \alpha |w_k|^{\alpha - 1} g_k \\
       w_{k+1} &= w_k + \text{base}(g^w_k, w_k), \quad
       x_{k+1} = w_{k+1} |w_{k+1}|^{\alpha - 1}

    The training loop holds the model's weights x, which are evaluated and pruned by
    magnitude as they are. The base's state, its weight decay and its norms are those of
    w.

    w is not in the state but computed from x. Both ways round to a unit or so in the
    last place of x, as every step does. A w in the state would cost another copy of the
    parameters, and would undo what else changes x: one-shot pruning, a mask held by
    `masks.keep_pruned`, weights set back. In half precision a step that rounds away in
    x is lost, and a float16 weight below 6e-8 is 0: keep the parameters in float32 and
    cast them in the model.

    A weight of zero has the gradient zero: a pruned one stays pruned but for a momentum
    left from before, and a leaf that begins all zero stays zero. Leave such leaves
    out by `where`.

    Args:
      base: any optax transformation with its learning rate. It sees w and its gradient
        in at least float32.
      alpha: at least 1; from 2 to 4 is usual, with 1 it is the base.
      where: predicate (path, leaf) -> bool, True for the leaves that are powers; all
        others take the base's steps. None: `masks.prunable`.

    Returns:
      An `optax.GradientTransformationExtraArgs` with `PowerpropagationState`. Its
      `update` needs `params`, hands extra arguments to the base, and returns updates in
      the parameters' dtypes. It may be the base of `pruning_aware` and the like. What
      keeps a copy of the parameters itself, such as `optax.contrib.schedule_free`,
      cannot be the base: the copy would be one of w.

    Raises:
      ValueError: for an argument out of range, by name; from `init` if nothing is
        chosen, or if the base keeps a copy of the parameters; from `update` for trees
        that do not match, and without `params`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from prunadag_optax.methods.powerpropagation import powerpropagation
      >>> loss = lambda x: jnp.sum((x - jnp.array([4.0, -1.0])) ** 2) / 2
      >>> tx = powerpropagation(optax.sgd(0.02), 2.0)
      >>> x = jnp.array([1.0, -0.1])
      >>> state, update = tx.init(x), jax.jit(tx.update)
      >>> for _ in range(400):
      ...     updates, state = update(jax.grad(loss)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> [round(value, 3) for value in x.tolist()]
      [4.0, -1.0]

    References:
      J. Schwarz and others, Powerpropagation: a sparsity inducing weight
      reparameterisation, NeurIPS 2021, section 2.
    """
    checks.transformation("base", base)
    checks.scalar("alpha", alpha, least=1)
    extended = optax.with_extra_args_support(base)

    def of(params):
        parts = parts_of(params, where)
        wide = jax.tree.map(working, params)
        w = parts.map(lambda x: _trained(x, alpha), wide, otherwise=wide)
        return parts, w

    def init(params: optax.Params) -> PowerpropagationState:
        state = extended.init(of(params)[1])
        for kind in evaluated._COPIES:
            if find_states(state, kind):
                raise ValueError(
                    "base must not keep a copy of the parameters, which would be one "
                    f"of w; got a base with {kind.__name__}. Write the other way "
                    "round, such as pruning_aware(powerpropagation(base, alpha), "
                    "density, gradient_at='pruned')."
                )
        return PowerpropagationState(state)

    def update(updates, state, params, **extra_args):
        parts, w = of(params)
        g = jax.tree.map(working, updates)
        g = parts.map(
            lambda g, w: _slope(w, jnp.asarray(alpha, w.dtype)) * g, g, w, otherwise=g
        )
        steps, inner = extended.update(g, state.base, w, **extra_args)

        def move(w, step, x):
            # Without a step there is no rounding either.
            return jnp.where(step == 0, 0, _weight(w + step, alpha) - working(x))

        moved = parts.map(move, w, steps, params, otherwise=steps)
        return moved, PowerpropagationState(inner)

    return checked(init, update)
