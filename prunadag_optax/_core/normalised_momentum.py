"""Momentum in units of the gradient of the whole tree, a base of `pruning_aware`."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from prunadag_optax._common import checks
from prunadag_optax._common.dtypes import working
from prunadag_optax._common.leaves import Where, chosen
from prunadag_optax._common.transformation import checked


class ScaleByNormalisedMomentumState(NamedTuple):
    """State of `scale_by_normalised_momentum`."""

    # The iterations done, shape=(), dtype=int32. optax's states have the same name.
    count: jax.typing.ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride]
    mu: Any  # m_k, averages of the gradients, like the parameters
    # v_k: one number in each leaf that shares it, one a weight in each other leaf.
    nu: Any


def scale_by_normalised_momentum(
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    eps: chex.Numeric = 1e-8,
    *,
    where: Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Momentum, divided by one number for all prunable weights.

    .. math::
      m_k &= \beta_1 m_{k-1} + (1 - \beta_1) g_k \\
      v_k &= \beta_2 v_{k-1} + (1 - \beta_2) \frac{1}{|R_k|} \sum_{i \in R_k} g_{i,k}^2
      \\
      u_k &= \frac{m_k / (1 - \beta_1^k)}{\sqrt{v_k / (1 - \beta_2^k)} + \epsilon}

    A loss in other units gives the same steps, as with Adam. Unlike Adam's, the steps
    keep the proportions that the gradients of the layers have to one another, and the
    state has one moment of the prunable weights and not two. All other leaves (biases,
    scales) take Adam's steps.

    Args:
      b1: beta_1 in [0, 1), of the average of the gradients.
      b2: beta_2 in [0, 1), of the average of their mean square.
      eps: epsilon >= 0, in the units of the gradient.
      where: predicate (path, leaf) -> bool, True for the leaves that share one scale;
        None: `masks.prunable`.

    Returns:
      An `optax.GradientTransformationExtraArgs`. Its `update` needs `params` and takes
      `relevant`, a tree of bool masks like the parameters: R_k are the weights of the
      chosen leaves where it is True. Without it they are all weights of those leaves.
      `pruning_aware` hands it on.

    Raises:
      ValueError: for an argument out of range, by name; from `init` if nothing is
        chosen; from `update` for trees that do not match, and without `params`.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from prunadag_optax import scale_by_normalised_momentum
      >>> params = {"kernel": jnp.ones((1, 2)), "bias": jnp.ones(2)}
      >>> gradient = {"kernel": jnp.array([[1.0, 7.0]]), "bias": jnp.array([1.0, 7.0])}
      >>> tx = scale_by_normalised_momentum()
      >>> steps, _ = tx.update(gradient, tx.init(params), params)
      >>> [[round(v, 3) for v in steps[name].ravel().tolist()] for name in steps]
      [[1.0, 1.0], [0.2, 1.4]]

    References:
      D. P. Kingma, J. Ba, Adam: a method for stochastic optimization, ICLR 2015, with
      one second moment for all weights of a group.
    """
    checks.scalar("b1", b1, least=0, below=1)
    checks.scalar("b2", b2, least=0, below=1)
    checks.scalar("eps", eps, least=0)

    if where is not None:
        checks.where(where)

    def shared(tree: Any) -> list[bool]:
        return chosen(tree, where)

    def init(params: optax.Params) -> ScaleByNormalisedMomentumState:
        mu = jax.tree.map(lambda x: jnp.zeros_like(working(x)), params)
        leaves, treedef = jax.tree.flatten(mu)
        nu = treedef.unflatten(
            jnp.zeros([], x.dtype) if one else jnp.zeros_like(x)
            for one, x in zip(shared(params), leaves, strict=True)
        )
        return ScaleByNormalisedMomentumState(jnp.zeros([], jnp.int32), mu, nu)

    def update(updates, state, params, *, relevant=None, **extra_args):
        del extra_args
        g = jax.tree.map(working, updates)
        k = optax.safe_increment(state.count)
        squares = _squares(g, relevant, shared(params))
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, g)
        nu = jax.tree.map(lambda v, s: b2 * v + (1 - b2) * s, state.nu, squares)

        def step(m, v):
            return (m / (1 - b1**k)) / (jnp.sqrt(v / (1 - b2**k)) + eps)

        return jax.tree.map(step, mu, nu), ScaleByNormalisedMomentumState(k, mu, nu)

    return checked(init, update, like_params="mu")


def _squares(gradients: Any, relevant: Any, shared: list[bool]) -> Any:
    """Their mean over R_k in the leaves that share it, g^2 in the others."""
    leaves, treedef = jax.tree.flatten(gradients)
    masks = (
        [True] * len(leaves) if relevant is None else treedef.flatten_up_to(relevant)
    )
    inside = [
        (jnp.where(mask, g, 0), jnp.sum(jnp.broadcast_to(mask, g.shape)))
        for g, mask, one in zip(leaves, masks, shared, strict=True)
        if one
    ]
    total: Any = sum(jnp.sum(jnp.square(g)) for g, _ in inside)
    count: Any = sum(number.astype(total.dtype) for _, number in inside)
    mean = total / jnp.maximum(count, 1)
    return treedef.unflatten(
        mean.astype(g.dtype) if one else jnp.square(g)
        for one, g in zip(shared, leaves, strict=True)
    )
