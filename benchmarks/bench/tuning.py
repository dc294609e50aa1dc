r"""Grids that are extended until the best value lies inside.

.. math:: \eta_i = \eta_0 f^i, \quad i = -2, \dots, 2, \text{ and on, where the best is}

What is chosen has a neighbour on either side that was tried and is worse, or the choice
is open: then the cap on the number of trials came first, and whoever reports it says
so.
"""

from collections.abc import Callable
from typing import NamedTuple


class Grid(NamedTuple):
    """A geometric grid.

    Attributes:
      centre: eta_0 > 0.
      factor: f > 1, from one value to the next.
      first: how many values to begin with, odd.
      most: how many values there may be in all; with 1 the value is given, and nothing
        is tried.
    """

    centre: float
    factor: float = 2.0
    first: int = 5
    most: int = 11

    def value(self, place: int) -> float:
        """The value eta_i, to three digits."""
        return float(f"{self.centre * self.factor**place:.3g}")


class Choice(NamedTuple):
    """What a search found.

    Attributes:
      value: the chosen value.
      scores: value -> score of all that were tried, rising in the value.
      open: whether the chosen value is at an edge all the same.
    """

    value: float
    scores: dict[float, float]
    open: bool


def search(
    grid: Grid, score: Callable[[float], float | None]
) -> tuple[list[float], Choice | None]:
    """The next values to try, or the choice.

    The search is played anew from the first values on each call. It asks for nothing
    but scores, so that an interrupted one goes on where it was.

    Args:
      grid: the grid.
      score: function value -> score, the larger the better, NaN for a training that
        failed; None while it is not known.

    Returns:
      The values whose scores are missing, and None; or no values, and the choice.

    Examples:
      >>> grid = Grid(1.0)
      >>> search(grid, lambda value: None)
      ([0.25, 0.5, 1.0, 2.0, 4.0], None)
      >>> search(grid, lambda value: value if value <= 4 else None)
      ([8.0], None)
      >>> choice = search(grid, lambda value: -abs(value - 8))[1]
      >>> choice.value, choice.open, list(choice.scores)
      (8.0, False, [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0])
    """
    if grid.most == 1:
        value = grid.value(0)
        return [], Choice(value, {value: float("nan")}, False)
    half = grid.first // 2
    places = list(range(-half, half + 1))
    while True:
        found = {place: score(grid.value(place)) for place in places}
        missing = [grid.value(place) for place, known in found.items() if known is None]
        if missing:
            return missing, None
        known = {
            place: -float("inf") if value is None or value != value else value
            for place, value in found.items()
        }
        low, high = places[0], places[-1]
        # Of equal ones that which lies furthest inside.
        best = max(places, key=lambda i: (known[i], min(i - low, high - i)))
        inside = low < best < high
        if inside or len(places) >= grid.most:
            scores = {grid.value(place): known[place] for place in places}
            return [], Choice(grid.value(best), scores, not inside)
        places = [low - 1, *places] if best == low else [*places, high + 1]
