r"""Any optimizer made pruning-aware: prunAdag for minibatches.

Three things of Algorithm 2.1 do not carry over to stochastic gradients. The largest
entries of a minibatch's gradient are mostly noise, so the relevant components are those
of largest magnitude, or of another score of the parameters. Sums of squares make the
steps of a long training vanish, so the relevant components take the steps of a base
optimizer, whose moments a component joins only while it is relevant (equation (15)).
And whether x and a noisy g agree in sign is a coin toss, so the other components shrink
either way, as decoupled weight decay does.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from prunadag_optax._common import budgets, checks, patterns
from prunadag_optax._common.dtypes import value_at, working
from prunadag_optax._common.leaves import Parts, Scope, Where, parts_of
from prunadag_optax._common.opt_states import where_like_params
from prunadag_optax._common.transformation import checked
from prunadag_optax._ranking import engine
from prunadag_optax._ranking.counts import target_count
from prunadag_optax._ranking.exact import mask_of_groups
from prunadag_optax._ranking.lamp import lamp_thresholds
from prunadag_optax._ranking.threshold import kth_largest_magnitudes

Score = str | Callable[[optax.Params], Any]


class PruningAwareState(NamedTuple):
    """State of `pruning_aware` with `gradient_at="params"`."""

    # The iterations done, shape=(), dtype=int32. optax's states have the same name.
    count: jax.typing.ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride]
    base: optax.OptState
    alone: jax.Array  # whether a part is ranked on its own, bool, shape=(parts,)
    # The last thresholds, where the next search starts; no influence on the result.
    threshold_hint: jax.Array


class GradientAtPrunedState(NamedTuple):
    """State of `pruning_aware` with `gradient_at="pruned"`."""

    count: jax.typing.ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride]
    base: optax.OptState
    alone: jax.Array
    # The least relevant score of each part, shape=(parts,): R_k is what reaches it.
    threshold: jax.Array
    dense: optax.Params  # x_k; the training loop holds P_{R_k} x_k


@dataclasses.dataclass(frozen=True)
class Relevance:
    """How R_k is chosen; the arguments are those of `pruning_aware`."""

    density: Any
    score: Score
    where: Where | None
    scope: Scope
    layer_budget: budgets.Budget = budgets.GLOBAL

    def parts(self, params: optax.Params) -> Parts:
        """What is ranked: the prunable leaves, or the layers stacked in them."""
        return parts_of(params, self.where, self.scope, self.layer_budget)

    def alone(self, params: optax.Params) -> jax.Array:
        """Whether a part is ranked on its own: it is all zero, or the scope says so."""
        parts = self.parts(params)
        if isinstance(self.density, int) and len(parts):
            checks.relevant(self.density, sum(parts.sizes), "density")
        # optax.tree.map_params calls init with a placeholder, which has no leaves.
        if not (parts.together and len(parts)):
            return jnp.ones(len(parts), bool)
        return jnp.stack([~jnp.any(x != 0) for x in parts.split(params)])

    def scores(self, params: optax.Params) -> optax.Params:
        """The tree whose magnitudes are ranked."""
        if not callable(self.score):
            return params
        score = self.score(params)
        checks.same_trees("score(params)", score, "params", params)
        return score

    def thresholds(
        self, params: optax.Params, k: Any, alone: jax.Array, hint: jax.Array
    ) -> jax.Array:
        """The least relevant score of each part, shape (parts,).

        -1 - j instead where the j-th N:M pattern is in use.
        """
        parts = self.parts(params)
        if not len(parts):
            return hint
        density, _, pattern_at = patterns.patterns_of("density", self.density)
        density = value_at(density, k)
        ranks = self._ranks(parts, density, alone)
        leaves = parts.split(self.scores(params))
        if pattern_at is None:
            return self._search(parts, leaves, ranks, alone, hint)
        j = jnp.asarray(pattern_at(k), jnp.int32)
        return lax.cond(
            j >= 0,
            # Like the hint, so that both are sharded and typed as it is.
            lambda: jnp.where(hint == hint, -1 - j, hint).astype(hint.dtype),
            lambda: self._search(parts, leaves, ranks, alone, jnp.maximum(hint, 0)),
        )

    def _ranks(self, parts: Parts, density: Any, alone: jax.Array) -> Any:
        """For each part how many of it, or of all that is ranked with it, are in R."""
        if not parts.together:
            return parts.kept(lambda size: target_count(density, size))
        sizes = parts.sizes
        n, share = sum(sizes), density
        if jnp.issubdtype(jnp.result_type(density), jnp.integer):
            share = density / n
        of_part = jnp.stack([jnp.asarray(target_count(share, size)) for size in sizes])
        # T in all: what is ranked on its own takes its share first.
        rest = target_count(density, n) - jnp.sum(jnp.where(alone, of_part, 0))
        return [*jnp.where(alone, of_part, jnp.maximum(rest, 1))]

    def _search(self, parts, leaves, ranks, alone, hint) -> jax.Array:
        most = None
        if parts.together and parts.budget.least:
            # No threshold is above that of the least number a leaf keeps.
            least = [min(parts.budget.least, size) for size in parts.sizes]
            most = kth_largest_magnitudes(leaves, least, jnp.ones_like(alone), hint)
        search = lamp_thresholds if self.score == "lamp" else kth_largest_magnitudes
        return search(leaves, ranks, alone, hint, most)

    def relevant(self, params: optax.Params, thresholds: jax.Array) -> Any:
        """Pytree of bool arrays, True on R_k and where a leaf is not prunable."""
        parts = self.parts(params)
        scores = self.scores(params)
        _, of_m, _ = patterns.patterns_of("density", self.density)

        def inside(x, last):
            # A NaN is the largest, as it is for the search, and so does not hide.
            return ~(jnp.abs(x).astype(last.dtype) < last)

        def reached():
            return parts.compare(inside, scores, thresholds)

        if not of_m or not len(parts):
            return reached()
        members = [i for i, *_ in parts.leaves]
        branches = [
            lambda n=n, m=m: mask_of_groups(scores, members, n, m, otherwise=True)
            for n, m in of_m
        ]
        j = jnp.maximum(-thresholds[0], 0).astype(jnp.int32)
        return lax.switch(j, [reached, *branches])


def pruning_aware(
    base: optax.GradientTransformation,
    density: optax.ScalarOrSchedule | str,
    *,
    score: Score = "magnitude",
    shrink_rate: optax.ScalarOrSchedule = 0.5,
    soft_threshold: optax.ScalarOrSchedule = 0.0,
    gradient_at: str = "params",
    where: Where | None = None,
    scope: Scope = "global",
    layer_budget: budgets.Budget = "global",
) -> optax.GradientTransformationExtraArgs:
    r"""Any optax transformation, made pruning-aware: prunAdag for minibatches.

    R_k are the T prunable weights of largest score, D_k all other prunable ones.

    .. math::
      z_{i,k} &= x_{i,k} + u_{i,k}, \quad u_k = \text{base}(P_{R_k} g_k) \\
      x_{i,k+1} &= \mathrm{sign}(z_{i,k}) \max(|z_{i,k}| - \tau_k, 0) & i \in R_k \\
      x_{i,k+1} &= (1 - d_k) x_{i,k} & i \in D_k

    Outside R_k what the base's state holds for a weight stays as it was; its counters
    go on. With the density 1 and no soft threshold it is the base.

    The soft threshold is a proximal step on tau_k times the l1 norm: a weight that the
    loss does not ask for falls in the ranking. With a learning rate eta and a strength
    mu it is eta times mu. Where fewer than T weights are left, the zeros, which tie,
    are all relevant and can come back. What shrinks slowly still takes part while
    others are chosen.

    With `gradient_at="pruned"` the gradient is taken where only the relevant weights
    are there: the training loop holds :math:`P_{R_k} x_k`, which has zeros in D_k, and
    x_k is in the state. When the density varies from step to step, each step so lowers
    the loss of another pruned network, and x serves at all these sparsities. To use,
    prune or save the parameters take `eval_params(state, params)`. R_0 is everything,
    since the loop begins with x_0.

    A leaf that is all zero at the start, such as the B of LoRA or the last projection
    of a residual branch, would never be among the largest. It is ranked on its own, at
    the same density, for the whole training. Its first step moves all of it, since
    zeros tie.

    The base sees gradients and parameters in at least float32, the gradient with zeros
    outside R_k, all of x_k, and, if it takes extra arguments, `relevant`, the tree of
    masks. Only state that has the tree and the shapes of the parameters is held outside
    R_k: what a base keeps by rows and columns (Adafactor), as a matrix (Muon's
    orthogonalised step) or as a norm of the tree (LAMB's ratios) is left to itself.

    Args:
      base: any optax transformation with its learning rate, such as `optax.adam(1e-3)`.
      density: T: a share in (0, 1] of the prunable weights as a float, a count as an
        integer, or a schedule of either. "2:4": of every 4 weights that a layer
        contracts the 2 of largest score; `schedules.cyclic_density` takes such turns.
      score: what is ranked: "magnitude"; "lamp", the magnitude over that of what is
        left of its layer, so that no layer loses all its weights; or a function of the
        parameters to a tree of scores, taken in magnitude.
      shrink_rate: d_k in [0, 1], number or schedule: the share by which a weight
        outside R_k shrinks in a step. 1 sets it to zero.
      soft_threshold: tau_k >= 0, number or schedule, in the units of a parameter.
      gradient_at: "params": the gradient is that at x; "pruned": at P_R x.
      where: predicate (path, leaf) -> bool, True for the prunable leaves; all others
        take the base's steps. None: `masks.prunable`.
      scope: "global" ranks all prunable leaves together, "leaf" each on its own; a
        function (path, leaf) -> how many leading axes stack layers ranks each layer.
      layer_budget: how R_k is shared out among the leaves: "global", by their ranking;
        "uniform", "erk", "er", a mapping or a `masks.LayerBudget`.

    Returns:
      An `optax.GradientTransformationExtraArgs`. Its `update` needs `params`, hands
      extra arguments to the base, and returns updates in the parameters' dtypes.

    Raises:
      ValueError: for an argument out of range, by name; from `init` if nothing is
        prunable; from `update` for trees that do not match, and without `params`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from prunadag_optax import pruning_aware
      >>> loss = lambda x: jnp.sum((x - jnp.array([2.0, 0.1, -3.0, 0.2])) ** 2)
      >>> tx = pruning_aware(optax.adam(0.1), 0.5)
      >>> x = jnp.array([1.0, 0.5, -1.0, 0.5])
      >>> state, update = tx.init(x), jax.jit(tx.update)
      >>> for _ in range(300):
      ...     updates, state = update(jax.grad(loss)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> [round(v, 3) for v in x.tolist()]
      [2.0, 0.0, -3.0, 0.0]

    References:
      Porcelli, Seraghiti, Toint (2026), Algorithm 2.1 and equation (15). J. Lee and
      others, Layer-adaptive sparsity for the magnitude-based pruning, ICLR 2021.
      N. Parikh, S. Boyd, Proximal algorithms, 2014, section 6.5.2.
    """
    checks.transformation("base", base)
    checks.relevant(patterns.patterns_of("density", density)[0], name="density")
    checks.score(score)
    checks.scope(scope)
    checks.choice("gradient_at", gradient_at, ("params", "pruned"))
    checks.scalar_or_schedule("shrink_rate", shrink_rate, least=0, most=1)
    checks.scalar_or_schedule("soft_threshold", soft_threshold, least=0)
    layer_budget = budgets.layer_budget(layer_budget)
    rule = Relevance(density, score, where, scope, layer_budget)
    step = _Step(rule, optax.with_extra_args_support(base), shrink_rate, soft_threshold)
    return _at_pruned(rule, step) if gradient_at == "pruned" else _at_params(rule, step)


class _Step(NamedTuple):
    """One step from x with the relevant weights `inside`."""

    rule: Relevance
    base: optax.GradientTransformationExtraArgs
    shrink_rate: optax.ScalarOrSchedule
    soft_threshold: optax.ScalarOrSchedule

    def __call__(self, gradients, state, x, last, extra_args, moved, *, in_place):
        """What `moved` makes of x and its step, and the base's new state.

        `in_place`: whether the caller writes the new x where x is.
        """

        def taken(gradients, base, x, inside):
            g = jax.tree.map(
                lambda g, r: jnp.where(r, working(g), 0), gradients, inside
            )
            x = jax.tree.map(working, x)
            return self.base.update(g, base, x, relevant=inside, **extra_args)

        def step(gradients, base, x, last):
            inside = self.rule.relevant(x, last)
            u, _ = taken(gradients, base, x, inside)
            pull = value_at(self.soft_threshold, state.count)
            shrink = jnp.clip(value_at(self.shrink_rate, state.count), 0, 1)

            def move(inside, x, u):
                return jnp.where(inside, _soft(working(x), u, pull), -shrink * x)

            s = self.rule.parts(x).map(move, inside, x, u, otherwise=u)
            return jax.tree.map(moved, x, s), last, inside if in_place else None

        # The step is stored before the base's state moves on, which then is computed
        # again: both read the old state, and so the new one can take its place (0.6 to
        # 0.8 of the time at 10^7 parameters, 2 CPU cores). `last` through the first
        # puts it before the second. The second must not read an x that the caller has
        # written over, or XLA copies it: the masks are stored, too (0.7 to 0.85 of the
        # time of ten matrices). Elsewhere it costs less to compute them again.
        result, last, inside = engine.stored(step, gradients, state.base, x, last)
        if inside is None:
            inside = self.rule.relevant(x, last)
        _, after = taken(gradients, state.base, x, inside)
        return result, where_like_params(self.base, inside, after, state.base)


def _start(rule: Relevance, step: _Step, params: optax.Params) -> PruningAwareState:
    wide = jax.tree.map(working, params)
    alone = rule.alone(params)
    dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(wide))
    return PruningAwareState(
        jnp.zeros([], jnp.int32),
        step.base.init(wide),
        alone,
        jnp.zeros(alone.shape, dtype),
    )


def _at_params(rule: Relevance, step: _Step) -> optax.GradientTransformationExtraArgs:
    """The gradient is that at x, which the training loop holds."""

    def init(params: optax.Params) -> PruningAwareState:
        return _start(rule, step, params)

    def update(updates, state, params, **extra_args):
        last = rule.thresholds(params, state.count, state.alone, state.threshold_hint)
        steps, base = step(
            updates, state, params, last, extra_args, _its_step, in_place=True
        )
        count = optax.safe_increment(state.count)
        return steps, PruningAwareState(count, base, state.alone, last)

    return checked(init, update)


def _at_pruned(rule: Relevance, step: _Step) -> optax.GradientTransformationExtraArgs:
    """The gradient is that at P_R x, which the loop holds; x is in the state."""

    def init(params: optax.Params) -> GradientAtPrunedState:
        # A copy: donating the state must not delete the caller's parameters.
        dense = jax.tree.map(jnp.array, params)
        return GradientAtPrunedState(*_start(rule, step, params), dense)

    def update(updates, state, params, **extra_args):
        dense, base = step(
            updates,
            state,
            state.dense,
            state.threshold,
            extra_args,
            _after_step,
            in_place=False,
        )
        count = optax.safe_increment(state.count)
        last = rule.thresholds(dense, count, state.alone, state.threshold)
        # y + (-y) is zero exactly, y + (0 - y) in another dtype need not be.
        moved = jax.tree.map(
            lambda r, x, y: jnp.where(r, x - y, -y),
            rule.relevant(dense, last),
            dense,
            params,
        )
        return moved, GradientAtPrunedState(count, base, state.alone, last, dense)

    return checked(init, update, like_params="dense")


def _its_step(x: jax.Array, step: jax.Array) -> jax.Array:
    del x
    return step


def _after_step(x: jax.Array, step: jax.Array) -> jax.Array:
    return (working(x) + step).astype(x.dtype)


def _soft(x: jax.Array, step: jax.Array, pull: Any) -> jax.Array:
    """The step to where x + step is, soft-thresholded; -x exactly where that is 0."""
    z = x + step
    # A NaN is not within the pull, and so stays.
    return jnp.where(jnp.abs(z) <= pull, -x, step - pull * jnp.sign(z))
