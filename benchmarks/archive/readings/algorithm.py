"""Algorithm 2.1 written out on its own, with a switch for each point of its reading."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from prunadag_optax import kth_largest_magnitude

TOLERANCE = 1e-9


@dataclasses.dataclass(frozen=True)
class Reading:
    """One reading of Algorithm 2.1; every default is the literal one.

    Attributes:
      agree: when x and g count as of one sign: "same", "not opposite" (x g >= 0, so
        also where x = 0) or "opposite".
      agree_decrease: whether the step (17) of D_k needs agreement.
      g_over: the components in the norm of g in a: "R", "all" or "S".
      x_over: those in the norm of x in a: "S", "agree", "D", "not R" or "all".
      offset: what is added to k in the divisor of a.
      own_count: the divisor of a counts a component's own decreases instead.
      times_x: whether a has the factor |x|.
      capped: whether a is held to |x|.
      lower: whether being acceptable needs a <= |g / w^O|.
      acceptable: whether any component is.
      ratio_before: the test for being acceptable divides by the weight before (9).
      gradient_weight: where w^O accumulates: "O", "all" or "R".
      parameter_weight: where w^D accumulates: "D", "all", or "D, reset".
      radius_before: the trust radius (11) divides by the weight before (12).
      radius: whether there is a trust radius.
      root: whether the weights start at the root of zeta.
      first_adagrad: whether all components are optimisable in the first iteration.
      start: "sparse" (T nonzeros, length 1), "long" (length sqrt(T)), "tiny" (normal
        entries times 1e-8 in place of the zeros) or "dense" (no zeros, length 1).
      target: T of the problem times this, rounded.
    """

    agree: str = "same"
    agree_decrease: bool = True
    g_over: str = "R"
    x_over: str = "S"
    offset: float = 1.0
    own_count: bool = False
    times_x: bool = True
    capped: bool = False
    lower: bool = True
    acceptable: bool = True
    ratio_before: bool = False
    gradient_weight: str = "O"
    parameter_weight: str = "D"
    radius_before: bool = False
    radius: bool = True
    root: bool = False
    first_adagrad: bool = False
    start: str = "sparse"
    target: float = 1.0


class Carry(NamedTuple):
    """Where a run stands."""

    k: Any
    x: jax.Array  # [n]
    gradient: jax.Array  # at x, [n]
    optimisable_weight: jax.Array  # w^O, [n]
    decreasable_weight: jax.Array  # w^D, [n]
    decreases: jax.Array  # how often a component was decreasable, [n]


def _norm(x: jax.Array, members: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.where(members, x * x, 0)))


def _agree(x: jax.Array, g: jax.Array, how: str) -> jax.Array:
    if how == "not opposite":
        return x * g >= 0
    return jnp.sign(x) == jnp.sign(-g if how == "opposite" else g)


def lower_bound(
    c: Carry, members: dict[str, jax.Array], variant: str, reading: Reading
) -> jax.Array:
    """The bound a_k of Table 1, from the sets of components by their names."""
    g, x = c.gradient, c.x
    divisor = c.decreases + 1.0 if reading.own_count else c.k + reading.offset
    a = (jnp.abs(x) if reading.times_x else jnp.ones_like(x)) / jnp.maximum(divisor, 1)
    if variant in ("v1", "v3"):
        length = _norm(x, members[reading.x_over])
        balance = _norm(g, members[reading.g_over]) / jnp.where(length > 0, length, 1)
        a = a * jnp.where(length > 0, balance, 0)
    return jnp.minimum(a, jnp.abs(x)) if reading.capped else a


def advance(
    c: Carry, variant: str, reading: Reading, target: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """One iteration: x_{k+1}, w^O_k, w^D_k and the decreases, from x_k."""
    g, x, size = c.gradient, c.x, jnp.abs(c.x)
    everything = jnp.ones(x.shape, bool)
    # Steps 1 and 2.
    relevant = jnp.abs(g) >= kth_largest_magnitude(g, target)
    weight = jnp.sqrt(c.optimisable_weight**2 + g * g)
    # Step 3.
    agree = _agree(x, g, reading.agree)
    s = agree & ~relevant
    members = {
        "R": relevant,
        "S": s,
        "agree": agree,
        "not R": ~relevant,
        "all": everything,
        "D": s,  # D_k depends on a: S stands in for it in the test, as S_k holds A_k
    }
    a = lower_bound(c, members, variant, reading)
    length = jnp.abs(g) / (c.optimisable_weight if reading.ratio_before else weight)
    acceptable = s & (length <= (size if variant in ("v3", "v4") else jnp.inf))
    if reading.lower:
        acceptable &= a <= length
    if not reading.acceptable:
        acceptable &= False
    if reading.first_adagrad:
        acceptable |= c.k == 0
    optimisable = relevant | acceptable
    if reading.x_over == "D":
        a = lower_bound(c, members | {"D": ~optimisable}, variant, reading)
    # Step 5.
    increased = jnp.sqrt(c.decreasable_weight**2 + x * x)
    step = a
    if reading.radius:
        divisor = c.decreasable_weight if reading.radius_before else increased
        step = jnp.minimum(step, size / divisor)
    shrinks = agree if reading.agree_decrease else everything
    step = jnp.where(shrinks, -jnp.sign(x) * step, 0)
    # Steps 4 and 6.
    x = x + jnp.where(optimisable, -g / weight, step)
    keeps = {"O": optimisable, "R": relevant, "all": everything}
    left = {
        "D": c.decreasable_weight,
        "all": increased,
        "D, reset": jnp.full_like(x, _initial(reading)),
    }
    return (
        x,
        jnp.where(keeps[reading.gradient_weight], weight, c.optimisable_weight),
        jnp.where(optimisable, left[reading.parameter_weight], increased),
        c.decreases + ~optimisable,
    )


def _initial(reading: Reading) -> float:
    return 0.01**0.5 if reading.root else 0.01


def solve(
    gradient: Callable[[jax.Array], jax.Array],
    start: jax.Array,
    variant: str,
    reading: Reading,
    target: int,
    iterations: int,
) -> tuple[jax.Array, jax.Array]:
    """Runs until ||g|| <= 1e-9, or as many iterations: k and x."""

    def unfinished(c: Carry) -> jax.Array:
        return (c.k < iterations) & (jnp.linalg.norm(c.gradient) > TOLERANCE)

    def step(c: Carry) -> Carry:
        x, *rest = advance(c, variant, reading, target)
        return Carry(c.k + 1, x, gradient(x), *rest)

    weight = jnp.full_like(start, _initial(reading))
    first = Carry(0, start, gradient(start), weight, weight, jnp.zeros_like(start))
    last = jax.lax.while_loop(unfinished, step, first)
    return last.k, last.x
