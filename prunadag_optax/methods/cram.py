"""CrAM+: a gradient for networks that are to be compressed after training.

Each step adds to the gradient at the weights the one at a pruned copy of them, a step
uphill, so that pruning costs little wherever the training ends.
"""

from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from prunadag_optax import masks
from prunadag_optax._common import budgets, checks
from prunadag_optax._common.dtypes import working
from prunadag_optax._common.patterns import share
from prunadag_optax._core.pruning_aware import Score


def cram_plus(
    grad: Callable[..., Any],
    densities: Sequence[float | str],
    *,
    rho: chex.Numeric = 0.05,
    score: Score = "magnitude",
    where: masks.Where | None = None,
    scope: masks.Scope = "global",
    layer_budget: masks.Budget = "global",
    value_and_grad: bool = False,
    has_aux: bool = False,
) -> Callable[..., Any]:
    r"""CrAM+: the gradient, and that of a pruned copy of the network added to it.

    .. math::
       g &= \nabla f(x), \quad \delta \text{ drawn uniformly from the densities} \\
       y &= P_\delta (x + \rho g), \quad h = P_\delta \nabla f(y) \\
       &\text{in place of } g \text{ any optimizer takes } g + h

    P prunes x + rho g by magnitude to the share delta, and h with the same mask.
    Afterwards `masks.prune` takes the weights to any of the sparsities in one shot; a
    network with batch normalisation then needs its averages estimated anew.

    g and h are of the same minibatch: what is random in `grad`, such as dropout, is the
    same in both if its key is among the arguments. The value and what is auxiliary,
    such as the averages of a batch normalisation, are those of the first gradient, at
    x.

    Each step takes two gradients, whatever `rho` is: compare with other methods at
    equal numbers of gradients too, not only of steps. With `rho` 0 the second is at the
    pruned weights themselves. The weights are not normalised by the length of the
    gradient, so `rho` has the unit of a learning rate.

    Args:
      grad: what gives the gradient by its first argument, such as `jax.grad(loss)`: a
        function (params, ...).
      densities: the shares of the prunable weights to keep, in (0, 1], or N:M patterns
        such as "2:4", for which scope and budget mean nothing. One that comes up twice
        is drawn twice as often.
      rho: at least 0, the step uphill, of all leaves.
      score: what is ranked: "magnitude"; "lamp"; or a function of the parameters to a
        tree of scores.
      where: predicate (path, leaf) -> bool, False for leaves never to prune; None:
        `masks.prunable`.
      scope: "global", "leaf" or a function, as in `masks.magnitude_mask`.
      layer_budget: how many each leaf keeps, as in `masks.magnitude_mask`.
      value_and_grad: whether `grad` returns (value, gradient), as
        `jax.value_and_grad(loss)` does; with auxiliary output the value is a pair,
        which needs nothing more.
      has_aux: whether `grad` returns (gradient, auxiliary output), as
        `jax.grad(loss, has_aux=True)` does.

    Returns:
      A function (params, key, ...) that returns what `grad(params, ...)` does, with
      g + h for the gradient, in its dtypes. The key is one of `jax.random`, a new one
      for each step.

    Raises:
      ValueError: for an argument out of range, by name; from the function, if `key` is
        none, or if what `grad` returns is no gradient of its first argument.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from prunadag_optax.methods.cram import cram_plus
      >>> loss = lambda x, target: jnp.sum((x - target) ** 2) / 2
      >>> grad = cram_plus(jax.value_and_grad(loss), (0.5,), value_and_grad=True)
      >>> x, target = jnp.array([2.0, 1.0]), jnp.array([1.0, 1.0])
      >>> value, g = jax.jit(grad)(x, jax.random.key(0), target)
      >>> float(value), [round(v, 3) for v in g.tolist()]
      (0.5, [2.05, 0.0])

    References:
      A. Peste and others, CrAM: a compression-aware minimizer, ICLR 2023, section 3,
      where this is CrAM+ with the pruning of the largest magnitudes.
    """
    if not callable(grad):
        raise ValueError(
            "grad must be a function (params, ...) -> gradient, such as "
            f"jax.grad(loss); got {checks.shown(grad)}."
        )
    densities = checks.sequence("densities", densities, "(0.5, 0.3, 0.1)")
    if not densities:
        raise ValueError(
            "densities must hold at least one in (0, 1], such as (0.5, 0.3, 0.1); got "
            "none."
        )
    checks.scalar("rho", rho, least=0)
    checks.score(score)
    checks.scope(scope)
    if value_and_grad and has_aux:
        raise ValueError(
            "has_aux must be False with value_and_grad=True: what is auxiliary is part "
            "of the value, and needs no word. Write cram_plus(jax.value_and_grad(loss, "
            "has_aux=True), densities, value_and_grad=True)."
        )
    budget = budgets.layer_budget(layer_budget)
    shares, of_m = zip(*(share("densities", d) for d in densities), strict=True)
    patterns = tuple(dict.fromkeys(p for p in of_m if p is not None))
    # The branch of each density: 0 for a share, 1 + j for the j-th pattern.
    branch_of = [0 if p is None else 1 + patterns.index(p) for p in of_m]

    def split(result: Any, params: Any) -> tuple[Any, Callable[[Any], Any]]:
        """The gradient in what `grad` returns, and what puts another in its place."""
        if not (value_and_grad or has_aux):
            gradient, back = result, lambda g: g
        elif not (isinstance(result, tuple | list) and len(result) == 2):
            raise ValueError(
                "grad must return a pair with value_and_grad=True or has_aux=True; got "
                f"{checks.shown(result)}."
            )
        elif has_aux:
            gradient, back = result[0], lambda g: (g, result[1])
        else:
            gradient, back = result[1], lambda g: (result[0], g)
        try:
            checks.same_trees("grad(params, ...)", gradient, "params", params)
        except ValueError as error:
            raise ValueError(
                f"{error} grad must return the gradient by its first argument; with "
                "value_and_grad=True a value before it, with has_aux=True auxiliary "
                "output after it."
            ) from None
        return gradient, back

    def mask_of(params: Any, key: Any) -> Any:
        number = jax.random.randint(key, (), 0, len(shares))

        def ranked():
            density = jnp.asarray(np.array(shares, np.float32))[number]
            # The first change of a schedule: an exact count of what is kept.
            return masks.mask_on_schedule(
                params,
                None,
                0,
                density,
                scope=scope,
                where=where,
                score=score,
                layer_budget=budget,
            )

        def in_groups(pattern):
            scores = score(params) if callable(score) else params
            return masks.n_m_mask(scores, *pattern, where=where)

        branches = [ranked, *(lambda p=p: in_groups(p) for p in patterns)]
        branch = jnp.asarray(branch_of)[number]
        # Outside of jit a switch would be compiled in each step.
        if isinstance(branch, Tracer):
            used = sorted(set(branch_of))
            table = np.zeros(len(branches), np.int32)
            table[used] = np.arange(len(used))
            return jax.lax.switch(
                jnp.asarray(table)[branch], [branches[j] for j in used]
            )
        return branches[int(branch)]()

    def summed(params: optax.Params, key: Any, *args: Any, **kwargs: Any) -> Any:
        checks.parameters("params", params)
        checks.real_leaves("params", params)
        checks.key("key", key)
        gradient, back = split(grad(params, *args, **kwargs), params)
        uphill = jax.tree.map(
            lambda x, g: working(x) + rho * working(g), params, gradient
        )
        mask = mask_of(uphill, key)
        pruned = jax.tree.map(
            lambda x, like: x.astype(jnp.result_type(like)),
            masks.apply_mask(uphill, mask),
            params,
        )
        other, _ = split(grad(pruned, *args, **kwargs), params)
        return back(
            jax.tree.map(
                lambda g, h: (working(g) + working(h)).astype(g.dtype),
                gradient,
                masks.apply_mask(other, mask),
            )
        )

    return summed
