"""What a claim is checked by, and the verdict on it.

A claim is a number of checks, every one a comparison of measured figures. It holds
where the share of the checks that come out true is at least what the claim asks for, it
holds in part from half of that on, and below that it does not hold.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from benchmarks.article.results import Family


class Check(NamedTuple):
    """One comparison: of what, whether it came out true, and the figures."""

    name: str
    passed: bool
    figures: str = ""


class Claim(NamedTuple):
    """A claim and what the results say of it.

    Attributes:
      source: the section of the results that it is about: a family's name.
      text: the claim.
      rule: what is checked.
      verdict: "holds", "holds in part", "does not hold" or "not measured".
      evidence: the figures, as text.
      exceptions: the checks that did not come out true.
      counted: whether the evidence only counts the checks, as they are many.
    """

    source: str
    text: str
    rule: str
    verdict: str
    evidence: str
    exceptions: tuple[Check, ...]
    counted: bool = False


def verdict(checks: Iterable[Check], needed: float = 1.0) -> str:
    """What the checks of a claim amount to.

    Args:
      checks: the checks.
      needed: the share of them that the claim asks for, in (0, 1].

    Returns:
      The verdict.

    Examples:
      >>> checks = [Check("one", True), Check("two", False)]
      >>> verdict(checks, needed=0.5), verdict(checks), verdict([])
      ('holds', 'holds in part', 'not measured')
    """
    passed = [check.passed for check in checks]
    if not passed:
        return "not measured"
    # Shares such as 5/6 are no floats: a little less is enough.
    share = np.mean(passed) + 1e-9
    if share >= needed:
        return "holds"
    return "holds in part" if share >= needed / 2 else "does not hold"


def percent(sparsity: float) -> str:
    """A share as a percentage."""
    return f"{100 * sparsity:.0f}%"


def claim(
    family: Family,
    text: str,
    rule: str,
    checks: list[Check],
    needed: float = 1.0,
    counted: bool = False,
) -> Claim:
    """A claim whose evidence is the count of its checks and the figures of each."""
    failed = tuple(check for check in checks if not check.passed)
    if not checks:
        return Claim(family.about["family"], text, rule, verdict(checks), "", ())
    evidence = f"{len(checks) - len(failed)} of {len(checks)} checks"
    if counted:
        evidence += "; exceptions below" if failed else ""
    else:
        evidence = ". ".join([evidence, *(f"{c.name}: {c.figures}" for c in checks)])
    name = family.about["family"]
    return Claim(name, text, rule, verdict(checks, needed), evidence, failed, counted)
