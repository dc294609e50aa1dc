"""A framework's own code at smaller sizes, held to the traced program."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from prunadag_optax.structure.checking import relative
from prunadag_optax.structure.groups import Structure
from prunadag_optax.structure.rules import MIXED_FLAG
from prunadag_optax.structure.small import small_apply
from prunadag_optax.structure.trees import Keep


def check_rebuilt(
    structure: Structure,
    keep: Keep,
    function: Callable[..., Any],
    small: Any,
    *inputs: Any,
    tolerance: float,
    allow_inexact: bool,
) -> float:
    """Compares a rebuilt model with `small_apply`.

    Args:
      structure: of `trace`.
      keep: group's name -> bool[size].
      function: inputs -> output, the rebuilt model with its smaller variables.
      small: the smaller variables.
      *inputs: example inputs.
      tolerance: largest deviation, relative to the largest output.
      allow_inexact: whether a larger one is accepted.

    Returns:
      The deviation.

    Raises:
      ValueError: if the model does not run, or deviates by more than the tolerance.
    """
    if not inputs:
        raise ValueError(
            "inputs are needed to compare the smaller model with the masked one: give "
            "example inputs last."
        )
    expected = jax.jit(small_apply(structure, keep))(small, *inputs)
    try:
        output = function(*inputs)
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(
            "The model does not run with fewer units: a size stands in its code, as in "
            "a reshape. Use structure.small_apply instead. It failed with: "
            f"{str(error)[:400]}"
        ) from error
    deviation = relative(output, expected)
    if not (deviation <= tolerance or allow_inexact):
        mixed = [
            group.name
            for group in structure.groups
            if group.name in keep and MIXED_FLAG in group.flags
            if not np.all(keep[group.name])
        ]
        advice = f"keep {', '.join(mixed[:4])} whole, " if mixed else ""
        raise ValueError(
            f"The rebuilt model deviates by {deviation:.1e} of the largest output from "
            f"the masked one, more than tolerance={tolerance:.0e}: a size enters its "
            f"arithmetic, as in a LayerNorm or in attention. {advice[:1].upper()}"
            f"{advice[1:]}use structure.small_apply, or write allow_inexact=True and "
            "fine-tune."
        )
    return deviation
