"""The readings that are tried."""

import dataclasses

from benchmarks.archive.readings.algorithm import Reading

# What each reading changes, in the order of the table.
READINGS: dict[str, Reading] = {
    "literal": Reading(),
    "signs: x g >= 0, so a component at zero agrees": Reading(agree="not opposite"),
    "signs: x and -g agree": Reading(agree="opposite"),
    "D: decreases whatever the sign of g": Reading(agree_decrease=False),
    "start: no zeros, length 1": Reading(start="dense"),
    "start: T nonzeros, about 1e-8 elsewhere": Reading(start="tiny"),
    "start: T nonzeros, not normalised": Reading(start="long"),
    "first iteration: Adagrad's": Reading(first_adagrad=True),
    "a: ||g|| over all components": Reading(g_over="all"),
    "a: ||g|| over S": Reading(g_over="S"),
    "a: ||x|| over R too, where signs agree": Reading(x_over="agree"),
    "a: ||x|| over D": Reading(x_over="D"),
    "a: ||x|| over the complement of R": Reading(x_over="not R"),
    "a: ||x|| over all components": Reading(x_over="all"),
    "a: 1/(k+2), k from 0": Reading(offset=2.0),
    "a: 1/k, k from 0 (1/1 twice)": Reading(offset=0.0),
    "a: 1/(1 + a component's own decreases)": Reading(own_count=True),
    "a: without |x|": Reading(times_x=False),
    "a: at most |x|": Reading(capped=True),
    "A: no lower bound": Reading(lower=False),
    "A: empty": Reading(acceptable=False),
    "A: tested with w^O before (9)": Reading(ratio_before=True),
    "w^O: accumulates on D too": Reading(gradient_weight="all"),
    "w^O: accumulates on R only": Reading(gradient_weight="R"),
    "w^D: accumulates on O too": Reading(parameter_weight="all"),
    "w^D: starts again when a component leaves O": Reading(parameter_weight="D, reset"),
    "radius: with w^D before (12)": Reading(radius_before=True),
    "radius: none": Reading(radius=False),
    "weights: start at sqrt(zeta)": Reading(root=True),
    "T: half": Reading(target=0.5),
    "T: double": Reading(target=2.0),
    "start: no zeros; weights from sqrt(zeta)": Reading(start="dense", root=True),
    "start: about 1e-8 elsewhere; weights from sqrt(zeta)": Reading(
        start="tiny", root=True
    ),
    "start: no zeros; weights from sqrt(zeta); w^O on D too; a at most |x|": Reading(
        start="dense", root=True, gradient_weight="all", capped=True
    ),
    "x g >= 0; w^O accumulates on D too": Reading(
        agree="not opposite", gradient_weight="all"
    ),
    "x g >= 0; a at most |x|": Reading(agree="not opposite", capped=True),
    "x g >= 0; ||x|| over the complement of R": Reading(
        agree="not opposite", x_over="not R"
    ),
    "x g >= 0; 1/(k+2)": Reading(agree="not opposite", offset=2.0),
    "x g >= 0; w^D accumulates on O too": Reading(
        agree="not opposite", parameter_weight="all"
    ),
    "x g >= 0; weights from sqrt(zeta)": Reading(agree="not opposite", root=True),
    "w^O accumulates on D too; a at most |x|": Reading(
        gradient_weight="all", capped=True
    ),
    "w^O accumulates on D too; w^D on O too": Reading(
        gradient_weight="all", parameter_weight="all"
    ),
    "w^O accumulates on D too; no lower bound": Reading(
        gradient_weight="all", lower=False
    ),
}


# The reading that gives all rows, also those of the methods that know no classes.
FOUND = "start: no zeros; weights from sqrt(zeta)"
# Confirmed too; the second is not the article's rows, but more robust ones.
ALSO = (FOUND, f"{FOUND}; w^O on D too; a at most |x|")


def changes(reading: Reading) -> int:
    """In how many points a reading differs from the literal one."""
    literal = dataclasses.asdict(Reading())
    return sum(literal[point] != v for point, v in dataclasses.asdict(reading).items())
