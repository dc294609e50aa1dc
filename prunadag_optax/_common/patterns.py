"""Densities as users write them: numbers, schedules, and N:M patterns such as "2:4"."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from prunadag_optax._common import checks


class NOfM(NamedTuple):
    """Of every m consecutive weights the n largest are kept."""

    n: int
    m: int

    @property
    def density(self) -> float:
        """The share of the weights that is kept."""
        return self.n / self.m


def n_of_m(name: str, text: str) -> NOfM:
    """The pattern that a text such as "2:4" means.

    Args:
      name: the argument's name, for the message.
      text: what was given.

    Returns:
      The pattern.

    Raises:
      ValueError: if it means none.
    """
    found = re.fullmatch(r"(\d+):(\d+)", text)
    pattern = NOfM(*map(int, found.groups())) if found else NOfM(0, 0)
    if not 1 <= pattern.n <= pattern.m:
        raise ValueError(
            f"{name} must be a number, a schedule, or an N:M pattern such as '2:4', "
            f"with 1 <= N <= M; got {text!r:.80}."
        )
    return pattern


def share(name: str, value: Any) -> tuple[float, NOfM | None]:
    """A density in (0, 1] and its pattern, if it has one.

    Args:
      name: the argument's name, for the message.
      value: a number, or a text such as "2:4".

    Returns:
      The share of the weights that is kept, and the pattern or None.

    Raises:
      ValueError: if it is neither.
    """
    if isinstance(value, str):
        pattern = n_of_m(name, value)
        return pattern.density, pattern
    checks.scalar(name, value, above=0, most=1)
    return value, None


def patterns_of(
    name: str, density: Any
) -> tuple[Any, tuple[NOfM, ...], Callable[[Any], Any] | None]:
    """A density without its patterns, they themselves, and when each is in use.

    Args:
      name: the argument's name, for the message.
      density: a number, a text such as "2:4", or a schedule, which may have patterns:
        attributes `patterns` and `pattern_at`.

    Returns:
      A number or a schedule; the patterns; a function count -> the index of the pattern
      in use, -1 for none, or None where there are no patterns.
    """
    if isinstance(density, str):
        pattern = n_of_m(name, density)
        return pattern.density, (pattern,), lambda count: 0
    patterns = tuple(getattr(density, "patterns", ()))
    return density, patterns, density.pattern_at if patterns else None
