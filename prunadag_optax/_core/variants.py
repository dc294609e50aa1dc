"""The variants of Table 1: the bounds a and b, and the scores of step 1."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from prunadag_optax._common.dtypes import working


class Statistics(NamedTuple):
    """The scalars that the bounds a and b may depend on, of one iteration.

    Attributes:
      decrease: d_k, the value of the decrease schedule.
      gradient_norm: ||g_k||_{R_k}, Euclidean, over the relevant components.
      parameter_norm: ||x_k||_{S_k}, over the components outside R_k whose parameter and
        gradient have the same sign.
      balance: the first norm over the second, and 0 where the second is 0.
    """

    decrease: chex.Numeric
    gradient_norm: jax.Array
    parameter_norm: jax.Array
    balance: jax.Array


Bound = Callable[[jax.Array, Statistics], jax.Array]
Score = Callable[[Any, Any], Any]


class Bounds(NamedTuple):
    """The bounds a (`lower`) and b (`upper`) of equations (6) and (7).

    Each is a function (|x_k| of one leaf, Statistics) -> bound of the same shape (or a
    scalar), in units of the parameter. The convergence theory asks of them only that
    they are never negative.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax import Bounds, prunadag
      >>> halving = Bounds(lower=lambda x, s: s.decrease * x / 2, upper=lambda x, s: x)
      >>> tx = prunadag(0.1, variant=halving)
    """

    lower: Bound
    upper: Bound


def _plain(magnitude, statistics):
    return magnitude * statistics.decrease


def _balanced(magnitude, statistics):
    factor = statistics.decrease * statistics.balance
    # Where x = 0 the bound is 0, even if the balance overflows.
    return jnp.where(magnitude > 0, magnitude * factor, 0)


def _unbounded(magnitude, statistics):
    del statistics
    return jnp.full_like(magnitude, jnp.inf)


def _magnitude(magnitude, statistics):
    del statistics
    return magnitude


def _nothing(magnitude, statistics):
    # No length is <= -inf, so no component is acceptable.
    del statistics
    return jnp.full_like(magnitude, -jnp.inf)


VARIANTS: dict[str, Bounds] = {
    "v1": Bounds(_balanced, _unbounded),
    "v2": Bounds(_plain, _unbounded),
    "v3": Bounds(_balanced, _magnitude),
    "v4": Bounds(_plain, _magnitude),
    "relevant_only": Bounds(_balanced, _nothing),
}

RELEVANCE: dict[str, Score] = {
    "gradient": lambda gradients, params: gradients,
    "magnitude": lambda gradients, params: params,
    "taylor": lambda gradients, params: jax.tree.map(
        lambda g, x: working(g) * working(x), gradients, params
    ),
}


def bounds_of(variant: str | Bounds) -> Bounds:
    """The bounds that a `variant` argument stands for: a name or a pair of functions.

    Args:
      variant: a key of Table 1, or `Bounds`, or any pair (lower, upper) of functions.

    Returns:
      The `Bounds`.

    Raises:
      ValueError: if it is neither.
    """
    if isinstance(variant, str):
        if variant in VARIANTS:
            return VARIANTS[variant]
    elif (
        isinstance(variant, tuple | list)
        and len(variant) == 2
        and all(callable(bound) for bound in variant)
    ):
        return Bounds(*variant)
    raise ValueError(
        f"variant must be one of {sorted(VARIANTS)} or a pair of functions "
        f"(lower, upper); got {variant!r}."
    )


def capped(variant: str | Bounds) -> Bounds:
    r"""A variant whose lower bound a never exceeds |x|.

    .. math:: a_{i,k} \leftarrow \min(a_{i,k}, |x_{i,k}|)

    A decreasable step then never carries a component past zero, which v1, v3 and
    relevant_only can do early in a run, where ||g||_R is far above ||x||_S.

    Args:
      variant: what `prunadag` takes as `variant`.

    Returns:
      Bounds to pass as `variant`.

    Raises:
      ValueError: if `variant` is neither a known name nor a pair of functions.

    Examples:
      >>> from prunadag_optax import capped, prunadag
      >>> tx = prunadag(0.1, variant=capped("v3"))
    """
    bounds = bounds_of(variant)
    return Bounds(lambda x, s: jnp.minimum(bounds.lower(x, s), x), bounds.upper)


def scores_of(relevance: str | Score) -> Score:
    """The function (gradients, params) -> scores that a `relevance` stands for.

    Args:
      relevance: "gradient", "magnitude", "taylor", or such a function.

    Returns:
      The function.

    Raises:
      ValueError: if it is neither.
    """
    if callable(relevance):
        return relevance
    if isinstance(relevance, str) and relevance in RELEVANCE:
        return RELEVANCE[relevance]
    raise ValueError(
        f"relevance must be one of {sorted(RELEVANCE)} or a function (gradients, "
        f"params) -> scores; got {relevance!r}."
    )
