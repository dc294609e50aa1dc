"""What is claimed of the recipes, held to what was measured."""

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
# One run for all sparsities.
ONE_RUN = ("mostly_whole", "any_sparsity")


def verdicts(rows: list[Row], normalised: bool) -> dict[str, Claim]:
    """The claims on a task; those whose runs are not there are left out.

    Args:
      rows: of the task.
      normalised: whether the network has batch normalisation.

    Returns:
      By a short name.
    """
    kinds = (ONE_SHOT, RECALIBRATED) if normalised else (ONE_SHOT,)
    found = {}
    for name in ONE_RUN:
        for kind in kinds:
            found |= above_rivals(rows, name, kind)
    return found | targeted(rows) | any_against_gradual(rows, normalised)


def above_rivals(rows: list[Row], name: str, kind: str) -> dict[str, Claim]:
    """One curve against the best dense rival at each sparsity."""
    own = best(by_contender(rows, name), kind)
    rivals = by_contender(rows, *DENSE_RIVALS)
    rival = best(rivals, kind)
    if not own or not rival:
        return {}
    # Only those that have runs are named.
    names = ", ".join(dict.fromkeys(row.contender for row in rivals))
    pairs = {s: (own[s][0], *rival[s]) for s in measured_sparsities(0.8)}
    prefix = f"{name}, {kind}: "
    claims = {
        "above from 80 to 99%": Claim(
            f"{prefix}at or above the best of {names} at every sparsity from 80 to 99%",
            all(a >= b for a, b, _ in pairs.values()),
            ", ".join(_against(s, a, b, name) for s, (a, b, name) in pairs.items()),
        )
    }
    whole = rival[0.0][0]
    lost = [s for s, (value, _) in rival.items() if value <= whole - 5]
    if lost:
        s = min(lost)
        (a, _), (b, other) = own[s], rival[s]
        claims["5 points above"] = Claim(
            f"{prefix}at least 5 points above the best rival where that has lost 5 "
            "points",
            a >= b + 5,
            f"{_against(s, a, b, other)}: {a - b:+.2f} points",
        )
    a, (b, other) = own[0.0][0], rival[0.0]
    claims["whole network"] = Claim(
        f"{prefix}the whole network within 0.5 point of the best rival's",
        a >= b - 0.5,
        f"{_against(0.0, a, b, other)}: {a - b:+.2f} points",
    )
    return {prefix + short: claim for short, claim in claims.items()}


def targeted(rows: list[Row]) -> dict[str, Claim]:
    """`targeted` against gradual pruning trained for the same sparsity."""
    own = best(by_contender(rows, "targeted"), ONE_SHOT)
    line = best(by_contender(rows, *GRADUAL), ONE_SHOT)
    shared = [s for s in own if s in line]
    if not shared:
        return {}
    return {
        "targeted, one-shot: near gradual pruning": Claim(
            "targeted, one-shot: within 0.3 point of the better gradual pruning at "
            f"{_percent(shared)}",
            all(own[s][0] >= line[s][0] - 0.3 for s in shared),
            ", ".join(_against(s, own[s][0], *line[s]) for s in shared),
        )
    }


def any_against_gradual(rows: list[Row], normalised: bool) -> dict[str, Claim]:
    """One run of `any_sparsity` against a run of gradual pruning for each sparsity.

    Gradual pruning counts as it was trained, or recalibrated where that is better.
    """
    gradual = by_contender(rows, *GRADUAL)
    lines = [best(gradual, kind) for kind in (ONE_SHOT, RECALIBRATED)]
    line = {s: max(each[s] for each in lines if s in each) for s in lines[0]}
    claims = {}
    for kind, margin in (
        (RECALIBRATED if normalised else ONE_SHOT, 1.0),
        (FINE_TUNED, 0.5),
    ):
        own = best(by_contender(rows, "any_sparsity"), kind)
        shared = [s for s in (0.9, 0.95, 0.98) if s in own and s in line]
        if shared:
            prefix = f"any_sparsity, {kind}: "
            claims[f"{prefix}near gradual pruning"] = Claim(
                f"{prefix}one run within {margin:g} point of the better gradual "
                f"pruning at {_percent(shared)}",
                all(own[s][0] >= line[s][0] - margin for s in shared),
                ", ".join(_against(s, own[s][0], *line[s]) for s in shared),
            )
    return claims


def _percent(sparsities: list[float]) -> str:
    return ", ".join(f"{100 * s:g}" for s in sparsities) + "%"


def _against(sparsity: float, own: float, other: float, name: str) -> str:
    return f"{100 * sparsity:g}%: {own:.2f} against {other:.2f} ({name})"
