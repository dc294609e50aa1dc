"""Which units stay: scores of units, and a choice under a budget."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prunadag_optax._common import checks
from prunadag_optax.structure.costs import Costs, costs_of
from prunadag_optax.structure.groups import (
    Structure,
    checked_structure,
    unknown_group,
)
from prunadag_optax.structure.trees import matched, not_traced

Score = str | Callable[[Any], Any]


def scores(
    structure: Structure,
    params: Any,
    score: Score = "rms",
    *,
    gradients: Any = None,
    key: jax.Array | None = None,
) -> dict[str, np.ndarray]:
    r"""How much each unit matters.

    "rms" is the root of the mean square of all weights of a unit, over all members:
    :math:`\sqrt{\sum_m \|x_{m,u}\|^2 / \sum_m |x_{m,u}|}`, so that wide and narrow
    groups compare. "taylor" is the loss that removing the unit costs to first order,
    :math:`|\sum_m \langle x_{m,u}, g_{m,u}\rangle|`. "random" is uniform in [0, 1).

    Args:
      structure: of `trace` or `declare`.
      params: pytree of the weights that count, matched by path: `variables["params"]`
        leaves running statistics out.
      score: "rms", "taylor", "random", or a function of `params` to a tree of scores of
        its weights, of which a unit gets the mean.
      gradients: pytree like `params`, for "taylor".
      key: a PRNG key, for "random".

    Returns:
      Group's name -> float[size], for groups with a member among `params`.

    Raises:
      ValueError: if `score` is unknown, or what it needs is missing.

    >>> import jax.numpy as jnp
    >>> from prunadag_optax import structure
    >>> params = {"in": jnp.array([[3.0, 0.0]]), "out": jnp.array([[4.0], [1.0]])}
    >>> s = structure.declare({"hidden": {"in": 1, "out": 0}}, params)
    >>> structure.scores(s, params)["hidden"].round(2).tolist()
    [3.54, 0.71]
    """
    checked_structure(structure)
    sizes = {group.name: group.size for group in structure.groups}
    if score == "random":
        if key is None:
            raise ValueError(
                'score="random" needs key=, a PRNG key such as jax.random.key(0).'
            )
        keys = jax.random.split(key, max(len(sizes), 1))
        return {
            name: np.asarray(jax.random.uniform(one, (size,)))
            for one, (name, size) in zip(keys, sizes.items(), strict=True)
        }
    if score == "taylor":
        if gradients is None:
            raise ValueError('score="taylor" needs gradients=, a tree like params.')
        checks.same_shapes("gradients", gradients, "params", params)
        tree = jax.tree.map(lambda x, g: x.astype(_wide(x)) * g, params, gradients)
        return {name: abs(total) for name, (total, _) in _sums(structure, tree).items()}
    if callable(score):
        tree = score(params)
        checks.same_shapes("score(params)", tree, "params", params)
        return {name: total / n for name, (total, n) in _sums(structure, tree).items()}
    checks.choice("score", score, ("rms", "taylor", "random"))
    tree = jax.tree.map(lambda x: jnp.square(x.astype(_wide(x))), params)
    return {
        name: np.sqrt(total / n) for name, (total, n) in _sums(structure, tree).items()
    }


def _wide(leaf: Any) -> Any:
    return jnp.promote_types(jnp.result_type(leaf), jnp.float32)


def _sums(structure: Structure, tree: Any) -> dict[str, tuple[np.ndarray, int]]:
    """Of each unit the sum over a tree, and the number of weights it is over."""
    matches = matched(structure, tree)
    leaves = dict(zip(matches, jax.tree.leaves(tree), strict=True))
    sums = {}
    for group in structure.groups:
        total, count = np.zeros(group.size), 0
        for member in group.members:
            leaf = leaves.get(member.path)
            if leaf is None:
                continue
            others = tuple(axis for axis in range(np.ndim(leaf)) if axis != member.axis)
            along = np.asarray(jnp.sum(leaf, axis=others), np.float64)
            total += along[member.positions].sum(axis=1)
            count += member.width * (
                math.prod(np.shape(leaf)) // np.shape(leaf)[member.axis]
            )
        if count:
            sums[group.name] = (total, count)
    return sums


def select(
    structure: Structure,
    scores: Mapping[str, Any],
    *,
    density: float | None = None,
    count: Mapping[str, int] | None = None,
    budget: Mapping[str, float] | None = None,
    per_group: bool = False,
    round_to: int = 1,
    least: int = 1,
) -> dict[str, np.ndarray]:
    """The units that stay, by score.

    Units leave in one order, lowest score first, until the budget is met; so the choice
    at a smaller budget is a subset of that at a larger one. Groups without a score stay
    whole.

    Args:
      structure: of `trace` or `declare`.
      scores: group's name -> float[size], as `scores` returns.
      density: share of the scored units that stay, in (0, 1].
      count: group's name -> number of units that stay.
      budget: {"params": x} or, for a traced structure, {"flops": x}: the share of the
        full model's that may be left, in (0, 1]; above 1, their number.
      per_group: whether all groups lose the same share, instead of being ranked
        together.
      round_to: a group's number of units stays a multiple of this; a group whose size
        is smaller stays whole.
      least: each group keeps at least so many units.

    Returns:
      Group's name -> bool[size], True for units that stay.

    Raises:
      ValueError: unless exactly one of `density`, `count` and `budget` is given, or if
        the budget cannot be met.

    >>> import numpy as np, jax.numpy as jnp
    >>> from prunadag_optax import structure
    >>> params = {"in": jnp.ones((1, 4)), "out": jnp.ones((4, 1))}
    >>> s = structure.declare({"hidden": {"in": 1, "out": 0}}, params)
    >>> structure.select(s, {"hidden": np.array([3.0, 1.0, 2.0, 0.0])}, density=0.5)
    {'hidden': array([ True, False,  True, False])}
    """
    given = {"density": density, "count": count, "budget": budget}
    asked = [name for name, value in given.items() if value is not None]
    if len(asked) != 1:
        raise ValueError(
            "select needs exactly one of density=0.5, count={name: units} and "
            f'budget={{"flops": 0.5}}; got {" and ".join(asked) or "none"}.'
        )
    checks.integer("round_to", round_to, least=1)
    checks.integer("least", least, least=1)
    ranked = _checked_scores(structure, scores)
    if count is not None:
        if not isinstance(count, Mapping):
            raise TypeError(
                "count must map a group's name to the number of its units that stay; "
                f"got {count!r}."
            )
        return _by_count(structure, ranked, count, least, round_to)
    order = _order(ranked, per_group, round_to, least)
    if density is not None:
        checks.scalar("density", density, above=0.0, most=1.0)
        total = sum(len(values) for values in ranked.values())
        wanted = max(round(density * total), 1)
        gone = np.cumsum([0, *(len(units) for _, units in order)])
        steps = int(np.searchsorted(gone, total - wanted))
        if steps >= len(gone):
            raise ValueError(
                f"density={density} would keep {wanted} of {total} units; with "
                f"least={least} and round_to={round_to} at least {total - gone[-1]} "
                "must stay."
            )
        return _after(ranked, order, steps)
    assert budget is not None
    return _within(
        structure, ranked, order, budget, f"least={least} and round_to={round_to}"
    )


def _checked_scores(
    structure: Structure, scores: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    checked_structure(structure)
    sizes = {group.name: group.size for group in structure.groups}
    if not isinstance(scores, Mapping) or not scores:
        raise TypeError(
            "scores must be a mapping from a group's name to an array, such as "
            f"`structure.scores` returns, and not empty; got a {type(scores).__name__}."
        )
    ranked = {}
    for name, values in scores.items():
        if name not in sizes:
            raise ValueError(f"scores: {unknown_group(structure, name)}")
        values = np.asarray(values, np.float64)
        if values.shape != (sizes[name],) or np.isnan(values).any():
            raise ValueError(
                f"scores[{name!r}] must be {sizes[name]} numbers, one for each unit, "
                f"without NaN; got shape {list(values.shape)}."
            )
        ranked[name] = values
    return ranked


def _by_count(
    structure: Structure,
    ranked: Mapping[str, np.ndarray],
    count: Mapping[str, int],
    least: int,
    round_to: int,
) -> dict[str, np.ndarray]:
    keep = {}
    for name, units in count.items():
        if name not in ranked:
            raise ValueError(f"count: there is no score of {name!r}. {_names(ranked)}")
        checks.integer(f"count[{name!r}]", units, least=least)
        size = structure[name].size
        if units > size:
            raise ValueError(
                f"count[{name!r}] must be at most the group's {size}; got {units}."
            )
        if units % round_to and units != size:
            raise ValueError(
                f"count[{name!r}] must be a multiple of round_to={round_to}, or the "
                f"group's {size}; got {units}."
            )
        keep[name] = np.ones(size, bool)
        keep[name][np.argsort(ranked[name], kind="stable")[: size - units]] = False
    return keep


def _names(ranked: Mapping[str, Any]) -> str:
    return "There are scores of " + ", ".join(map(repr, list(ranked)[:6])) + "."


def _order(
    ranked: Mapping[str, np.ndarray], per_group: bool, round_to: int, least: int
) -> list[tuple[str, np.ndarray]]:
    """The steps in which units leave: a group's name and the units that go at once.

    A step's rank is its mean score, or the group's share that is gone after it; never
    below that of the group's step before, so that steps of a group keep their order.
    """
    steps = []
    for name, values in ranked.items():
        size, ascending = len(values), np.argsort(values, kind="stable")
        floor = -(-least // round_to) * round_to
        start, rank = 0, -math.inf
        while (stop := start + ((size - start) % round_to or round_to)) <= size - floor:
            units = ascending[start:stop]
            own = stop / size if per_group else float(values[units].mean())
            rank = max(rank, own)
            steps.append((rank, len(steps), name, units))
            start = stop
    return [
        (name, units) for _, _, name, units in sorted(steps, key=lambda step: step[:2])
    ]


def _after(
    ranked: Mapping[str, np.ndarray], order: list[tuple[str, np.ndarray]], steps: int
) -> dict[str, np.ndarray]:
    keep = {name: np.ones(len(values), bool) for name, values in ranked.items()}
    for name, units in order[:steps]:
        keep[name][units] = False
    return keep


def _within(
    structure: Structure,
    ranked: Mapping[str, np.ndarray],
    order: list[tuple[str, np.ndarray]],
    budget: Mapping[str, float],
    limits: str,
) -> dict[str, np.ndarray]:
    if (
        not isinstance(budget, Mapping)
        or len(budget) != 1
        or next(iter(budget)) not in _KINDS
    ):
        raise ValueError(
            f'budget must be {{"params": x}} or {{"flops": x}}; got {budget!r}.'
        )
    ((kind, amount),) = budget.items()
    checks.scalar(f"budget[{kind!r}]", amount, above=0.0)
    if kind == "flops":
        not_traced(structure, "select(budget={'flops': x})")
    costs: Costs = costs_of(structure)
    full = getattr(costs({}), kind)
    allowed = amount * full if amount <= 1 else amount

    def left(steps):
        return getattr(costs(_after(ranked, order, steps)), kind)

    if left(len(order)) > allowed:
        raise ValueError(
            f"budget={{{kind!r}: {amount}}} cannot be met: of the full model's "
            f"{full:,.0f}, {allowed:,.0f} may be left, and with {limits} "
            f"{left(len(order)):,.0f} remain ({left(len(order)) / full:.3f} of it)."
        )
    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if left(middle) <= allowed else (middle + 1, high)
    return _after(ranked, order, low)


_KINDS = ("params", "flops")
