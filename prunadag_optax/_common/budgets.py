r"""Budgets by layer: how many weights each leaf keeps, with exact totals.

The counts are those of :math:`\kappa_l = \min(\max(\epsilon w_l, \ell_l), n_l)` with
the one epsilon at which they sum to the total; w_l are the weights of the leaves: their
sizes for a uniform density, sizes times Erdos-Renyi ratios for ERK. They are rounded by
largest remainder.
"""

import dataclasses
import fnmatch
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from prunadag_optax._common import checks

KINDS = ("global", "uniform", "erk", "er")


@dataclasses.dataclass(frozen=True)
class LayerBudget:
    """How what is kept is shared out among the leaves.

    Attributes:
      of: "global": by the ranking of all leaves together. "uniform": the same density
        in every leaf. "erk": densities proportional to the sum of a leaf's dimensions
        over their product, "er": to that of the last two dimensions. Or a mapping from
        patterns of paths, such as "*/embedding", to densities in (0, 1]; the leaves
        that match none share what is left, at one density.
      least: a number that every leaf keeps at least, as far as it has so many.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax import masks
      >>> params = {"wide": jnp.arange(12.0).reshape(2, 6), "last": jnp.ones((2, 1))}
      >>> budget = masks.LayerBudget("global", least=1)
      >>> mask = masks.magnitude_mask(params, 6 / 7, layer_budget=budget)
      >>> int(mask["wide"].sum()), int(mask["last"].sum())
      (1, 1)

    References:
      U. Evci and others, Rigging the lottery, ICML 2020, section 3 (Erdos-Renyi-kernel
      densities). D. C. Mocanu and others, Nature Communications 9, 2018 (Erdos-Renyi).
    """

    of: str | Mapping[str, float] = "global"
    least: int = 0

    def __post_init__(self):
        checks.integer("least", self.least, least=0)
        if isinstance(self.of, Mapping):
            for pattern, density in self.of.items():
                if not isinstance(pattern, str):
                    raise ValueError(
                        "layer_budget must map patterns of paths to densities, such as "
                        f"{{'*/embedding': 0.5}}; got the key {pattern!r:.80}."
                    )
                checks.scalar(f"layer_budget[{pattern!r}]", density, above=0, most=1)
            if not self.of:
                raise ValueError("layer_budget must name at least one leaf; got {}.")
        elif self.of not in KINDS:
            raise ValueError(
                f"layer_budget must be one of {', '.join(map(repr, KINDS))}, a mapping "
                "from patterns of paths to densities, or a masks.LayerBudget of either;"
                f" got {self.of!r:.80}."
            )

    @property
    def ranks_together(self) -> bool:
        """Whether all leaves are in one ranking."""
        return self.of == "global"


# What users write.
Budget = str | Mapping[str, float] | LayerBudget
GLOBAL = LayerBudget()


def layer_budget(value: Any) -> LayerBudget:
    """The argument `layer_budget` of the public functions, checked.

    Args:
      value: a name, a mapping or a `LayerBudget`.

    Returns:
      The `LayerBudget`.

    Raises:
      ValueError: if it is neither.
    """
    return value if isinstance(value, LayerBudget) else LayerBudget(value)


def name_of(path: tuple[Any, ...]) -> str:
    """A key path as patterns see it: names and indices with slashes between them."""
    keys = [getattr(k, "key", getattr(k, "name", getattr(k, "idx", k))) for k in path]
    boxed = keys and keys[-1] in ("value", "raw_value")
    return "/".join(str(key) for key in (keys[:-1] if boxed else keys))


def kept_of_parts(
    budget: LayerBudget,
    names: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
    total: Any,
    alive: Sequence[Any] | None = None,
) -> list[Any]:
    """How many weights of each part are kept.

    Args:
      budget: the budget, not "global".
      names: of the parts, as `name_of` has them.
      shapes: of the parts.
      total: how many are kept in all; may be traced.
      alive: how many each part can keep at most; may be traced. None: its size.

    Returns:
      A count for each part: Python ints for a Python `total`, else int32 arrays or
      those of the total. They sum to `total`, as far as `least` and `alive` allow it.

    Raises:
      ValueError: if a pattern matches no name, or if the total of Python numbers is not
        to be had.
    """
    sizes = [math.prod(shape) for shape in shapes]
    known = isinstance(total, int | np.integer)
    if known and alive is not None:
        known = all(isinstance(count, int | np.integer) for count in alive)
    xp: Any = np if known else jnp
    dtype = np.int64 if known else jnp.asarray(total).dtype
    high = xp.stack([xp.asarray(n, dtype) for n in (sizes if alive is None else alive)])
    low = xp.minimum(xp.asarray([min(budget.least, n) for n in sizes], dtype), high)
    real = np.float64 if known else jnp.result_type(float)
    bottom, top = (bound.astype(real) for bound in (low, high))
    if isinstance(budget.of, Mapping):
        densities = _listed(budget.of, names)
        if known:
            _check_total(budget.of, densities, sizes, int(total))
        shares = _of_mapping(densities, sizes, bottom, top, total, xp)
    else:
        ratios = [_ratio(budget.of, shape) for shape in shapes]
        weights = np.array(sizes) * np.array(ratios)
        shares = _shares(weights, bottom, top, xp.asarray(total).astype(real), xp)
    counts = _rounded(shares, low, high, xp.asarray(total, dtype), xp)
    return [int(count) for count in counts] if known else [*counts]


def _ratio(kind: str, shape: tuple[int, ...]) -> float:
    """The density of a part, up to a factor."""
    if kind == "uniform":
        return 1.0
    dims = shape if kind == "erk" else shape[-2:]
    return sum(dims) / max(math.prod(dims), 1)


def _listed(of: Mapping[str, float], names: Sequence[str]) -> list[float | None]:
    """The density that a mapping has for each part; None: no pattern matches."""
    for pattern in of:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            shown = ", ".join(map(repr, names[:3]))
            raise ValueError(
                f"layer_budget must match leaves that are pruned; {pattern!r} matches "
                f"none of {shown}{' ...' if len(names) > 3 else ''}. Write '*/kernel' "
                "for the kernels of all modules."
            )
    # The first pattern that matches.
    return [
        next(
            (d for pattern, d in of.items() if fnmatch.fnmatchcase(name, pattern)), None
        )
        for name in names
    ]


def _check_total(
    of: Mapping[str, float],
    densities: Sequence[float | None],
    sizes: Sequence[int],
    total: int,
) -> None:
    """Raises where the densities of a mapping and the total contradict each other."""
    n = sum(sizes)
    listed = sum(d * size for d, size in zip(densities, sizes, strict=True) if d)
    rest = sum(size for d, size in zip(densities, sizes, strict=True) if d is None)
    slack = len(sizes)
    if not (listed - slack <= total and (total <= listed + rest + slack or total == n)):
        most = "" if not rest else f" to {(listed + rest) / n:.6g}"
        raise ValueError(
            f"layer_budget must fit what is kept in all: {dict(of)!r:.200} and the "
            f"other leaves can keep the share {listed / n:.6g}{most} of the weights; "
            f"asked for is {total / n:.6g} (sparsity {1 - total / n:.6g})."
        )


def _of_mapping(
    densities: Sequence[float | None], sizes: Any, low: Any, high: Any, total: Any, xp
) -> Any:
    """The shares with given densities for some leaves, and one for all others.

    With more to keep than that, as at the beginning of a schedule, the others are dense
    and the given densities are scaled up; with less they are scaled down.
    """
    listed = np.array([d is not None for d in densities])
    given = np.array([(d or 0) * n for d, n in zip(densities, sizes, strict=True)])
    others = np.where(listed, 0, sizes)
    total = xp.asarray(total).astype(low.dtype)
    ceiling = xp.clip(xp.asarray(given, low.dtype), low, high)
    first = _shares(
        given,
        xp.where(listed, low, 0),
        xp.where(listed, ceiling, 0),
        total - xp.sum(xp.where(listed, 0, low)),
        xp,
    )
    rest = _shares(
        others,
        xp.where(listed, 0, low),
        xp.where(listed, 0, high),
        total - xp.sum(first),
        xp,
    )
    return rest + _shares(
        given, first, xp.where(listed, high, 0), total - xp.sum(rest), xp
    )


def _shares(weights: Any, low: Any, high: Any, total: Any, xp: Any) -> Any:
    """The values min(max(eps w, low), high) whose sum is the total, or nearest to it.

    Their sum is piecewise linear in eps, and so is known from its values where a value
    meets a bound.
    """
    w = xp.asarray(np.maximum(weights, np.finfo(np.float32).tiny), low.dtype)
    breaks = xp.sort(xp.concatenate([low / w, high / w]))
    sums = xp.sum(xp.clip(breaks[:, None] * w[None], low[None], high[None]), axis=1)
    after = xp.clip(xp.searchsorted(sums, total), 1, len(breaks) - 1)
    step = sums[after] - sums[after - 1]
    part = xp.where(
        step > 0, (total - sums[after - 1]) / xp.where(step > 0, step, 1), 1
    )
    eps = breaks[after - 1] + xp.clip(part, 0, 1) * (breaks[after] - breaks[after - 1])
    return xp.clip(eps * w, low, high)


def _rounded(shares: Any, low: Any, high: Any, total: Any, xp: Any) -> Any:
    """The shares as integers with the exact total: largest remainder, ties by index."""
    counts = xp.clip(xp.floor(shares).astype(low.dtype), low, high)
    order = xp.argsort(-(shares - counts), stable=True)
    rank = xp.argsort(order, stable=True)
    counts = xp.minimum(counts + (rank < total - xp.sum(counts)), high)
    # What float32 rounded away or added, for leaves of more than 2^24 weights.
    for sign, bound in ((1, high), (-1, low)):
        room = sign * (bound - counts)
        missing = sign * (total - xp.sum(counts))
        counts = counts + sign * xp.clip(missing - (xp.cumsum(room) - room), 0, room)
    return counts.astype(low.dtype)
