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
    nu: jax.Array  # v_k, shape=(), of the leaves that share it
    # v_k of the other leaves, like the parameters; `optax.MaskedNode` for those above.
    others: Any


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

    def shared(tree: Any) -> Any:
        return jax.tree.unflatten(jax.tree.structure(tree), chosen(tree, where))

    def init(params: optax.Params) -> ScaleByNormalisedMomentumState:
        mu = jax.tree.map(lambda x: jnp.zeros_like(working(x)), params)
        dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(mu))
        others = jax.tree.map(
            lambda one, x: optax.MaskedNode() if one else jnp.zeros_like(x),
            shared(params),
            mu,
        )
        zero = jnp.zeros([], jnp.int32)
        return ScaleByNormalisedMomentumState(zero, mu, zero.astype(dtype), others)

    def update(updates, state, params, *, relevant=None, **extra_args):
        del extra_args
        share = shared(params)
        g = jax.tree.map(working, updates)
        k = optax.safe_increment(state.count)
        square = _mean_square(share, g, relevant)
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, g)
        nu = (b2 * state.nu + (1 - b2) * square).astype(state.nu.dtype)
        others = jax.tree.map(
            lambda one, v, g: v if one else b2 * v + (1 - b2) * jnp.square(g),
            share,
            state.others,
            g,
        )

        def step(one, m, v):
            v = nu.astype(m.dtype) if one else v
            return (m / (1 - b1**k)) / (jnp.sqrt(v / (1 - b2**k)) + eps)

        steps = jax.tree.map(step, share, mu, others)
        return steps, ScaleByNormalisedMomentumState(k, mu, nu, others)

    return checked(init, update, like_params="mu")


def _mean_square(share: Any, gradients: Any, relevant: Any) -> jax.Array:
    """The mean of g^2 over R_k in the leaves that share it."""
    if relevant is None:
        relevant = jax.tree.map(lambda g: jnp.ones_like(g, bool), gradients)

    def total(function: Any) -> Any:
        def of_leaf(one, g, inside):
            return jnp.sum(function(g, inside)).astype(g.dtype) if one else 0

        return optax.tree.sum(jax.tree.map(of_leaf, share, gradients, relevant))

    squares = total(lambda g, inside: jnp.square(jnp.where(inside, g, 0)))
    return squares / jnp.maximum(total(lambda g, inside: inside), 1)
