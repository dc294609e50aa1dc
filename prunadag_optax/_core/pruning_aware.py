r"""For minibatches: moving averages, decoupled shrinking, relevance by magnitude.

Three things of Algorithm 2.1 do not carry over to stochastic gradients. The largest
entries of a minibatch's gradient are mostly noise, so the relevant components are those
of largest magnitude. Sums of squares make the steps of a long training vanish, so the
weights w^O are Adam's moving averages, or 1 as in momentum SGD, and a component adds to
the averages only while it is relevant (equation (15)). And whether x and a noisy g
agree in sign is a coin toss, so decreasable components shrink either way, as decoupled
weight decay does.

The gradient can be that at the relevant components alone: see `evaluate`.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from prunadag_optax._common import checks
from prunadag_optax._common.dtypes import cast_like, value_at, working
from prunadag_optax._common.leaves import Where, ranked_together
from prunadag_optax._common.transformation import checked, find_states
from prunadag_optax._ranking.counts import target_count
from prunadag_optax._ranking.threshold import kth_largest_magnitude


class ScaleByPrunadagWState(NamedTuple):
    """State of `prunadag_w`: Adam's moments, and with "relevant" the parameters."""

    # The iterations done, shape=(), dtype=int32. optax's states have the same name.
    count: jax.typing.ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride]
    mu: optax.Updates  # m, shapes of params
    nu: optax.Updates | None  # v, shapes of params; None without b2
    # With "relevant": all components, of which `params` has the relevant ones, and the
    # smallest magnitude among these, of all prunable leaves, shape=(1,), or with scope
    # "leaf" of each of them, shape=(leaves,). None with "params".
    dense: optax.Params | None
    threshold: jax.Array | None


def prunadag_w(
    learning_rate: optax.ScalarOrSchedule = 3e-3,
    relevant: optax.ScalarOrSchedule = 0.1,
    *,
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric | None = 0.999,
    eps: chex.Numeric = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    decrease_schedule: optax.ScalarOrSchedule = 0.5,
    l1: optax.ScalarOrSchedule = 0.0,
    evaluate: str = "params",
    where: Where | None = None,
    scope: str = "global",
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The prunAdag for minibatches: Adam's moments or SGD's, decoupled shrinking.

    R_k are the T components of largest magnitude, D_k all other prunable ones.

    .. math::
      m_{i,k} &= \beta_1 m_{i,k-1} + (1 - \beta_1) g_{i,k}, \quad
      v_{i,k} = \beta_2 v_{i,k-1} + (1 - \beta_2) g_{i,k}^2 & i \in R_k \\
      s_{i,k} &= - \eta_k \left( \frac{m_{i,k} / (1 - \beta_1^{k+1})}
      {\sqrt{v_{i,k} / (1 - \beta_2^{k+1})} + \epsilon} + \lambda_k x_{i,k} \right)
      & i \in R_k \\
      s_{i,k} &= - d_k x_{i,k}, \quad m_{i,k} = m_{i,k-1}, \quad v_{i,k} = v_{i,k-1}
      & i \in D_k

    With T = n it is `optax.adamw`. With `b2=None` there is no v, and the relevant
    components take the steps of `optax.sgd` with momentum,

    .. math::
      s_{i,k} = - \eta_k \left( \frac{m_{i,k}}{1 - \beta_1} + \lambda_k x_{i,k} \right),

    whose magnitudes tell better what can be pruned: where Adam moves every weight as
    far, here those with small gradients stay small. With `l1` the relevant components
    take a proximal step on mu times the l1 norm,

    .. math::
      x_{i,k+1} = \mathrm{sign}(z_i) \max(|z_i| - \eta_k \mu_k, 0), \quad
      z_i = x_{i,k} + s_{i,k}, \quad i \in R_k,

    so that a weight that the loss does not ask for falls in the ranking. Where fewer
    than T are left, the zeros, which tie, are all relevant and can come back.
    `recipes.targeted` and `recipes.any_sparsity` give it the schedules that suit a
    training of known length.

    With `evaluate="relevant"` the gradient is taken where only the relevant components
    are there: the parameters that the training loop holds are
    :math:`y_k = P_{R_k} x_k`, which has zeros in D_k, and x_k is in the state. When T
    varies from step to step, each step so lowers the loss of another pruned network,
    and x serves at all these sparsities. To use or to save the parameters, take
    `eval_params(state, params)`. R_0 is everything, since the loop begins with x_0.

    Args:
      learning_rate: eta_k >= 0, number or schedule count -> value; in the scale of
        Adam's.
      relevant: T: a fraction in (0, 1] of the prunable components as a float, a count
        as an integer, or a schedule of either. With scope "leaf" it holds for each.
      b1: beta_1 in [0, 1).
      b2: beta_2 in [0, 1), or None for momentum SGD; learning rates are then in the
        scale of `optax.sgd`'s.
      eps: epsilon > 0.
      weight_decay: lambda_k >= 0, number or schedule, on relevant components and on
        leaves that are not prunable and have two axes or more.
      decrease_schedule: d_k in [0, 1], number or schedule: the share by which a
        decreasable component shrinks in a step. 1 sets it to zero. What shrinks slowly
        still takes part while others are chosen, at the cost of the last percent in
        small networks and short trainings.
      l1: mu_k >= 0, number or schedule: strength of the l1 norm, on relevant components
        of prunable leaves.
      evaluate: "params": the gradient is that at x; "relevant": at P_R x, see above.
      where: predicate (path, leaf) -> bool, True for the prunable leaves; all others
        are relevant throughout. None: `masks.prunable`.
      scope: "global" ranks all prunable leaves together, "leaf" each on its own.
      accumulator_dtype: dtype of the moments, as a `jnp.dtype` or a name; None keeps
        the parameters'. Use "float32" for half-precision parameters.

    Returns:
      An `optax.GradientTransformationExtraArgs` with `ScaleByPrunadagWState`. Its
      `update` needs `params`, ignores extra arguments, and returns updates in the
      parameters' dtypes.

    Raises:
      ValueError: naming an argument out of range, or trees that do not match.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from prunadag_optax import prunadag_w
      >>> loss = lambda x: jnp.sum((x - jnp.array([2.0, 0.1, -3.0, 0.2])) ** 2)
      >>> tx = prunadag_w(0.1, relevant=2)
      >>> x = jnp.array([1.0, 0.5, -1.0, 0.5])
      >>> state, update = tx.init(x), jax.jit(tx.update)
      >>> for _ in range(300):
      ...     updates, state = update(jax.grad(loss)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> [round(v, 3) for v in x.tolist()]
      [2.0, 0.0, -3.0, 0.0]

    References:
      Porcelli, Seraghiti, Toint (2026), Algorithm 2.1 and equation (15). D. P. Kingma,
      J. Ba, Adam, ICLR 2015. I. Loshchilov, F. Hutter, Decoupled weight decay
      regularization, ICLR 2019. N. Parikh, S. Boyd, Proximal algorithms, 2014,
      section 6.5.2.
    """
    checks.relevant(relevant)
    checks.choice("scope", scope, ("global", "leaf"))
    checks.choice("evaluate", evaluate, ("params", "relevant"))
    checks.dtype("accumulator_dtype", accumulator_dtype)
    checks.scalar("b1", b1, least=0, below=1)
    if b2 is not None:
        checks.scalar("b2", b2, least=0, below=1)
    checks.scalar("eps", eps, above=0)
    for name, value, most in (
        ("learning_rate", learning_rate, None),
        ("weight_decay", weight_decay, None),
        ("l1", l1, None),
        ("decrease_schedule", decrease_schedule, 1),
    ):
        checks.scalar_or_schedule(name, value, least=0, most=most)

    def init(params: optax.Params) -> ScaleByPrunadagWState:
        def zeros():
            # Like the parameters, so that they are sharded as these are.
            return jax.tree.map(
                lambda x: jnp.zeros_like(x, dtype=accumulator_dtype), params
            )

        dense = threshold = None
        if evaluate == "relevant":
            dense = jax.tree.map(jnp.copy, params)
            groups = ranked_together(params, where, scope)
            threshold = jnp.zeros(len(groups), _magnitude_dtype(params, groups))
        nu = None if b2 is None else zeros()
        return ScaleByPrunadagWState(
            jnp.zeros([], jnp.int32), zeros(), nu, dense, threshold
        )

    def update(updates, state, params, **extra_args):
        del extra_args
        count = state.count
        dense = params if evaluate == "params" else state.dense
        groups = ranked_together(dense, where, scope)
        threshold = state.threshold
        if threshold is None:
            threshold = _threshold(dense, groups, value_at(relevant, count))
        inside = _relevant(dense, groups, threshold)

        def average(old, value, decay):
            """The moving average, moved on where the component is relevant."""

            def leaf(old, value, inside):
                old = working(old)
                return _where(inside, decay * old + (1 - decay) * value, old)

            return jax.tree.map(leaf, old, value, inside)

        g = jax.tree.map(working, updates)
        mu, nu = average(state.mu, g, b1), None
        if b2 is None:
            direction = jax.tree.map(lambda m: m / (1 - b1), mu)
        else:
            nu = average(state.nu, jax.tree.map(lambda g: g * g, g), b2)
            first, second = 1 - b1 ** (count + 1), 1 - b2 ** (count + 1)
            direction = jax.tree.map(
                lambda m, v: (m / first) / (jnp.sqrt(v / second) + eps), mu, nu
            )
        eta, decay = value_at(learning_rate, count), value_at(weight_decay, count)
        pull = eta * value_at(l1, count)
        shrink = jnp.clip(value_at(decrease_schedule, count), 0, 1)

        def step(x, direction, inside):
            taken, x = -eta * direction, working(x)
            if inside is True:
                return taken - (eta * decay * x if x.ndim > 1 else 0)
            taken = _soft(x, taken - eta * decay * x, pull)
            return jnp.where(inside, taken, -shrink * x)

        steps = jax.tree.map(step, dense, direction, inside)
        after = optax.safe_increment(count)
        mu = cast_like(mu, state.mu)
        nu = None if nu is None else cast_like(nu, state.nu)
        if evaluate == "params":
            return steps, ScaleByPrunadagWState(after, mu, nu, None, None)
        dense = cast_like(
            jax.tree.map(lambda x, s: working(x) + s, dense, steps), dense
        )
        threshold = _threshold(dense, groups, value_at(relevant, after))
        # y + (-y) is zero exactly, y + (0 - y) in another dtype need not be.
        steps = jax.tree.map(
            lambda x, y, inside: _where(inside, x - y, -y),
            dense,
            params,
            _relevant(dense, groups, threshold),
        )
        return steps, ScaleByPrunadagWState(after, mu, nu, dense, threshold)

    return checked(init, update, like_params="mu")


def eval_params(state: Any, params: optax.Params) -> optax.Params:
    r"""The parameters to evaluate, prune and save: x_k, all components.

    With `prunadag_w(..., evaluate="relevant")` the training loop holds
    :math:`P_{R_k} x_k`; anywhere else this gives back what the loop holds.

    Args:
      state: the optimizer's state; `prunadag_w`'s may be anywhere inside, such as in a
        chain, but not under a mask that hides leaves from it.
      params: the parameters that the training loop holds.

    Returns:
      Pytree like `params`.

    Raises:
      ValueError: if there are several such states, or one of another tree.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax import eval_params, prunadag_w
      >>> tx = prunadag_w(0.0, relevant=1, decrease_schedule=0.0, evaluate="relevant")
      >>> x = jnp.array([1.0, -2.0])
      >>> updates, state = tx.update(jnp.ones(2), tx.init(x), x)
      >>> (x + updates).tolist(), eval_params(state, x + updates).tolist()
      ([0.0, -2.0], [1.0, -2.0])
    """
    states = find_states(state, ScaleByPrunadagWState)
    found = [own.dense for own in states if own.dense is not None]
    if not found:
        return params
    if len(found) > 1:
        raise ValueError(
            "state must hold one state of prunadag_w with evaluate='relevant'; it "
            f"holds {len(found)}."
        )
    checks.same_trees("state.dense", found[0], "params", params)
    return found[0]


def _magnitude_dtype(params: optax.Params, groups: list[list[int]]) -> Any:
    """What holds a magnitude of any of the prunable leaves exactly."""
    leaves = jax.tree.leaves(params)
    return jnp.result_type(jnp.float32, *(leaves[i] for group in groups for i in group))


def _threshold(
    params: optax.Params, groups: list[list[int]], relevant: Any
) -> jax.Array:
    """The smallest relevant magnitude of each group of leaves, shape (groups,)."""
    leaves, dtype = jax.tree.leaves(params), _magnitude_dtype(params, groups)
    found = []
    for group in groups:
        members = [leaves[i] for i in group]
        size = sum(x.size for x in members)
        count = target_count(relevant, size) if size else 0
        last = kth_largest_magnitude(members, count) if size else 0
        found.append(jnp.asarray(last, dtype))
    return jnp.stack(found) if found else jnp.zeros(0, dtype)


def _relevant(
    params: optax.Params, groups: list[list[int]], threshold: jax.Array
) -> Any:
    """Pytree of masks, True on R; where a leaf is not prunable True in their place."""
    leaves, treedef = jax.tree.flatten(params)
    inside: list[Any] = [True] * len(leaves)
    for group, last in zip(groups, threshold, strict=True):
        for i in group:
            # A NaN is the largest, as it is for the selection, and so does not hide.
            inside[i] = ~(jnp.abs(leaves[i]).astype(last.dtype) < last)
    return treedef.unflatten(inside)


def _where(inside: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """`jnp.where`, without a selection where all of a leaf is relevant."""
    return x if inside is True else jnp.where(inside, x, y)


def _soft(x: jax.Array, step: jax.Array, pull: Any) -> jax.Array:
    """The step to where x + step is, soft-thresholded; -x exactly where that is 0."""
    z = x + step
    # A NaN is not within the pull, and so stays.
    return jnp.where(jnp.abs(z) <= pull, -x, step - pull * jnp.sign(z))
