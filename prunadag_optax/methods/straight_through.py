"""Straight-through pruning: the pruned network's gradient, on the dense weights.

As quantisation does with a rounding: the network is pruned in the forward pass, and
the backward pass takes the pruning for the identity. A weight that is pruned so keeps
the steps that bring it back.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from prunadag_optax import masks
from prunadag_optax._common import budgets, checks, patterns
from prunadag_optax._common.dtypes import working
from prunadag_optax._common.transformation import checked
from prunadag_optax._core.eval_params import keeps_dense
from prunadag_optax._core.pruning_aware import Relevance, Score


@keeps_dense
class StraightThroughState(NamedTuple):
    """State of `straight_through`."""

    # The iterations done, shape=(), dtype=int32. optax's states have the same name.
    count: jax.typing.ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride]
    base: optax.OptState
    alone: jax.Array  # whether a part is ranked on its own, bool, shape=(parts,)
    # The least score in R_k of each part, shape=(parts,): R_k is what reaches it.
    threshold: jax.Array
    dense: optax.Params  # x_k; the training loop holds P_{R_k} x_k


def straight_through(
    base: optax.GradientTransformation,
    density: optax.ScalarOrSchedule | str,
    *,
    score: Score = "magnitude",
    where: masks.Where | None = None,
    scope: masks.Scope = "global",
    layer_budget: masks.Budget = "global",
) -> optax.GradientTransformationExtraArgs:
    r"""Any optimizer, on the dense weights, with the gradient of the pruned network.

    R_k are the T prunable weights of x_k of largest score.

    .. math::
       x_{k+1} = x_k + u_k, \quad u_k = \text{base}(\nabla f(P_{R_k} x_k), x_k)

    The training loop holds :math:`P_{R_k} x_k`, where it so takes the gradient; x_k is
    in the state. To use, prune or save the dense weights take `eval_params(state,
    params)`. All components take the base's steps, those that are pruned too, so that
    a weight returns as soon as it is among the T largest. `pruning_aware(...,
    gradient_at="pruned")` has the same forward pass, and moves only what is in R_k.

    R_0 is everything, since the loop begins with x_0. A leaf that is all zero at the
    start is ranked on its own, at the same density, for the whole training. Weights
    that tie for the last place are all in R_k.

    Args:
      base: any optax transformation with its learning rate. It sees gradients and x_k
        in at least float32.
      density: T: a share in (0, 1] of the prunable weights as a float, a count as an
        integer, or a schedule of either, such as `schedules.cubic_density`. "2:4": of
        every 4 weights that a layer contracts the 2 of largest score.
      score: what is ranked: "magnitude"; "lamp"; or a function of the parameters to a
        tree of scores, taken in magnitude, such as random numbers, with which all
        others are to be compared.
      where: predicate (path, leaf) -> bool, False for leaves never to prune; None:
        `masks.prunable`.
      scope: what is ranked together: "global", "leaf", or a function (path, leaf) ->
        how many leading axes stack layers.
      layer_budget: how many each leaf keeps, as in `masks.magnitude_mask`.

    Returns:
      An `optax.GradientTransformationExtraArgs` with `StraightThroughState`. Its
      `update` needs `params`, hands extra arguments to the base, and returns updates in
      the parameters' dtypes.

    Raises:
      ValueError: for an argument out of range, by name; from `init` if nothing is
        prunable; from `update` for trees that do not match, and without `params`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from prunadag_optax import eval_params
      >>> from prunadag_optax.methods.straight_through import straight_through
      >>> tx = straight_through(optax.sgd(0.5), 0.5)
      >>> x = jnp.array([1.0, 0.5])
      >>> updates, state = tx.update(jnp.array([1.0, -1.0]), tx.init(x), x)
      >>> (x + updates).tolist(), eval_params(state, x + updates).tolist()
      ([0.0, 1.0], [0.5, 1.0])

    References:
      Y. Bengio, N. Leonard, A. Courville, Estimating or propagating gradients through
      stochastic neurons for conditional computation, arXiv:1308.3432. J. H. Lee and
      others, JaxPruner, arXiv:2304.14082, of which this is the magnitude STE.
    """
    checks.transformation("base", base)
    checks.relevant(patterns.patterns_of("density", density)[0], name="density")
    checks.score(score)
    checks.scope(scope)
    extended = optax.with_extra_args_support(base)
    rule = Relevance(
        density=density,
        score=score,
        where=where,
        scope=scope,
        layer_budget=budgets.layer_budget(layer_budget),
    )

    def init(params: optax.Params) -> StraightThroughState:
        wide = jax.tree.map(working, params)
        alone = rule.alone(params)
        dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(wide))
        return StraightThroughState(
            jnp.zeros([], jnp.int32),
            extended.init(wide),
            alone,
            jnp.zeros(alone.shape, dtype),
            # A copy: donating the state must not delete the caller's parameters.
            jax.tree.map(jnp.array, params),
        )

    def update(updates, state, params, **extra_args):
        wide = jax.tree.map(working, state.dense)
        g = jax.tree.map(working, updates)
        steps, inner = extended.update(g, state.base, wide, **extra_args)
        dense = jax.tree.map(
            lambda x, step, like: (x + step).astype(like.dtype),
            wide,
            steps,
            state.dense,
        )
        count = optax.safe_increment(state.count)
        last = rule.thresholds(dense, count, state.alone, state.threshold)
        # y + (-y) is zero exactly, y + (0 - y) in another dtype need not be.
        moved = jax.tree.map(
            lambda inside, x, y: jnp.where(inside, x - y, -y),
            rule.relevant(dense, last),
            dense,
            params,
        )
        return moved, StraightThroughState(count, inner, state.alone, last, dense)

    return checked(init, update, like_params="dense")
