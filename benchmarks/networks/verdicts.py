"""What is claimed of the recipes, held to what was measured."""

from typing import NamedTuple

import numpy as np

from benchmarks.networks.results import (
    FINE_TUNED,
    ONE_SHOT,
    RECALIBRATED,
    Row,
    best,
    by_contender,
    measured_sparsities,
)
from benchmarks.systems.records import Claim

DENSE_RIVALS = ("adam", "adamw", "adagrad", "sgd")
GRADUAL = ("gmp_adam", "gmp_sgd")
# Without the l1 norm, of Adam and of SGD: the better at a sparsity counts.
TARGETED = ("targeted", "targeted_sgd")
# What the norm adds.
GRADUAL_L1 = ("gmp_adam_l1", "gmp_sgd_l1")
TARGETED_L1 = ("targeted_l1", "targeted_sgd_l1")
# One run for all sparsities; each is held to all of a claim.
ANY = (
    "any_sparsity",
    "any_sparsity_sgd",
    "any_sparsity_sgd_strong",
    "seldom_whole",
    "seldom_whole_sgd",
    "quarter_whole",
    "quarter_whole_sgd",
)
# The same for as many steps as gradual pruning takes for all its targets together.
LONG = ("any_sparsity_sgd_4x", "seldom_whole_sgd_4x", "quarter_whole_sgd_4x")
ONE_RUN = (
    "mostly_whole",
    "mostly_whole_sgd",
    "often_whole",
    "often_whole_sgd",
    *ANY,
)
# The criteria of verdicts.
ABOVE = "one run above the everyday optimizers"
TARGET = "a run for each sparsity near gradual pruning"
NEAR = "one run near gradual pruning"
LONG_NEAR = "one run near gradual pruning, as long as its four runs together"
WITH_L1, WITHOUT_L1 = "with or without the l1 norm", "without the l1 norm"


class Verdict(NamedTuple):
    """A claim that holds or not.

    Attributes:
      criterion: what it is part of.
      contender: whom it is about.
      claim: what is claimed, and what was measured.
    """

    criterion: str
    contender: str
    claim: Claim


def verdicts(rows: list[Row], normalised: bool) -> list[Verdict]:
    """The claims on a task; those whose runs are not there are left out.

    Args:
      rows: of the task.
      normalised: whether the network has batch normalisation.
    """
    kinds = (ONE_SHOT, RECALIBRATED) if normalised else (ONE_SHOT,)
    return [
        *(v for kind in kinds for name in ONE_RUN for v in above(rows, name, kind)),
        *targeted(rows),
        *(
            v
            for kind, margin in ((ONE_SHOT, 1.0), (FINE_TUNED, 0.5))
            for name in (*ANY, *LONG)
            for v in near(rows, name, kind, margin)
        ),
        *targeted(rows, WITH_L1),
        *targeted(rows, WITHOUT_L1),
        *(v for name in ANY for v in near(rows, name, ONE_SHOT, 1.0, with_l1=True)),
    ]


def above(rows: list[Row], name: str, kind: str) -> list[Verdict]:
    """One curve against the best dense rival at each sparsity."""
    own = best(by_contender(rows, name), kind)
    rivals = by_contender(rows, *DENSE_RIVALS)
    rival = best(rivals, kind)
    if not own or not rival:
        return []
    # Only those that have runs are named.
    names = ", ".join(dict.fromkeys(row.contender for row in rivals))
    pairs = {s: (own[s][0], *rival[s]) for s in measured_sparsities(0.8)}
    claims = [
        Claim(
            f"{name}, {kind}: at or above the best of {names} at every sparsity from "
            "80 to 99%",
            all(a >= b for a, b, _ in pairs.values()),
            ", ".join(_against(s, a, b, other) for s, (a, b, other) in pairs.items()),
        )
    ]
    whole = rival[0.0][0]
    lost = [s for s, (value, _) in rival.items() if value <= whole - 5]
    if lost:
        s = min(lost)
        (a, _), (b, other) = own[s], rival[s]
        claims.append(
            Claim(
                f"{name}, {kind}: at least 5 points above the best rival where that "
                "has lost 5 points",
                a >= b + 5,
                f"{_against(s, a, b, other)}: {a - b:+.2f} points",
            )
        )
    a, (b, other) = own[0.0][0], rival[0.0]
    claims.append(
        Claim(
            f"{name}, {kind}: the whole network within 0.5 point of the best rival's",
            a >= b - 0.5,
            f"{_against(0.0, a, b, other)}: {a - b:+.2f} points",
        )
    )
    return [Verdict(f"{ABOVE}, {kind}", name, claim) for claim in claims]


def targeted(rows: list[Row], norm: str = "") -> list[Verdict]:
    """A run for each sparsity against gradual pruning for the same.

    Args:
      rows: of the task.
      norm: empty: `targeted` as it is offered against gradual pruning without the l1
        norm; WITH_L1: both with or without it, no verdict where one was not run with
        it; WITHOUT_L1: both without.
    """
    with_norm = [by_contender(rows, *names) for names in (TARGETED_L1, GRADUAL_L1)]
    if norm == WITH_L1 and not all(with_norm):
        return []
    names = {"": TARGETED_L1, WITH_L1: TARGETED + TARGETED_L1, WITHOUT_L1: TARGETED}
    rivals = GRADUAL + GRADUAL_L1 * (norm == WITH_L1)
    own = best(by_contender(rows, *names[norm]), ONE_SHOT)
    line = best(by_contender(rows, *rivals), ONE_SHOT)
    shared = [s for s in own if s in line]
    if not shared:
        return []
    claim = Claim(
        f"the best of {', '.join(names[norm])}, one-shot: within 0.3 point of the "
        f"best of {', '.join(rivals)} at {_percent(shared)}",
        all(own[s][0] >= line[s][0] - 0.3 for s in shared),
        ", ".join(
            f"{_against(s, own[s][0], *line[s])} by {own[s][1]}"
            f"{_difference(rows, own[s][1], line[s][1], s)}"
            for s in shared
        ),
    )
    return [Verdict(_criterion(TARGET, ONE_SHOT, norm), "targeted", claim)]


def near(
    rows: list[Row], name: str, kind: str, margin: float, with_l1: bool = False
) -> list[Verdict]:
    """One run against a run of gradual pruning for each sparsity.

    Gradual pruning counts as it was trained, or recalibrated where that is better.

    Args:
      rows: of the task.
      name: of the contender with one run.
      kind: of its values.
      margin: percentage points that it may be behind.
      with_l1: whether gradual pruning may have the l1 norm; no verdict where that was
        not run.
    """
    gradual = by_contender(rows, *GRADUAL, *GRADUAL_L1 * with_l1)
    if with_l1 and not by_contender(rows, *GRADUAL_L1):
        return []
    lines = [best(gradual, each) for each in (ONE_SHOT, RECALIBRATED)]
    line = {s: max(each[s] for each in lines if s in each) for s in lines[0]}
    own = best(by_contender(rows, name), kind)
    shared = [s for s in (0.9, 0.95, 0.98) if s in own and s in line]
    if not shared:
        return []
    claim = Claim(
        f"{name}, {kind}: one run within {margin:g} point of the best gradual "
        f"pruning{f', {WITH_L1},' * with_l1} at {_percent(shared)}",
        all(own[s][0] >= line[s][0] - margin for s in shared),
        ", ".join(_against(s, own[s][0], *line[s]) for s in shared),
    )
    criterion = LONG_NEAR if name in LONG else NEAR
    return [Verdict(_criterion(criterion, kind, WITH_L1 * with_l1), name, claim)]


def _criterion(name: str, kind: str, norm: str) -> str:
    return f"{' '.join(filter(None, (name, norm)))}, {kind}"


def _difference(rows: list[Row], own: str, other: str, sparsity: float) -> str:
    """The mean difference seed by seed ± its standard error, of several seeds."""
    known = {
        row.name: row.values(ONE_SHOT)[sparsity]
        for row in rows
        if sparsity in row.values(ONE_SHOT)
    }
    first, second = known[own], known[other]
    if len(first) != len(second) or len(first) < 2:
        return ""
    gain = np.subtract(first, second)
    error = gain.std(ddof=1) / np.sqrt(len(gain))
    return f" ({gain.mean():+.2f} ± {error:.2f})"


def _percent(sparsities: list[float]) -> str:
    return ", ".join(f"{100 * s:g}" for s in sparsities) + "%"


def _against(sparsity: float, own: float, other: float, name: str) -> str:
    return f"{100 * sparsity:g}%: {own:.2f} against {other:.2f} ({name})"
