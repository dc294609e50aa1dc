"""The recipes as they were when the committed results were made.

Learning rates and strengths of the l1 norm fell to zero then; a recipe's own fall to
1%. The cycles of densities are constants here, since their results are.
"""

from collections.abc import Callable
from typing import Any

import chex
import optax

from prunadag_optax import pruning_aware, schedules

# Strength of the l1 norm, by the base.
L1 = {"adam": 0.1, "momentum": 1e-3}

# Turns of `recipes.any_sparsity`, by how many of them train the dense network.
DENSE_1_OF_10 = (1.0, 0.1, 0.05, 0.02, 0.1, 0.05, 0.02, 0.01, 0.1, 0.05)
DENSE_1_OF_4 = (1.0, 0.01, 0.05, 0.02, 1.0, 0.1, 0.02, 0.01)
DENSE_2_OF_3 = tuple(
    density
    for sparse in (0.2, 0.01, 0.1, 0.02, 0.5, 0.01, 0.15, 0.05)
    for density in (1.0, 1.0, sparse)
)
DENSE_7_OF_8 = tuple(
    density
    for sparse in (0.5, 0.1, 0.02, 0.5, 0.2, 0.01, 0.5, 0.05)
    for density in (*(1.0,) * 7, sparse)
)


def falling(value: chex.Numeric, total_steps: int) -> optax.Schedule:
    """A value that is constant for 60% of the training, then falls to zero."""
    return schedules.stable_decay(value, total_steps, final=0.0)


def falling_to_zero(
    recipe: Callable[..., optax.GradientTransformationExtraArgs],
    total_steps: int,
    *,
    learning_rate: optax.ScalarOrSchedule = 3e-3,
    l1: optax.ScalarOrSchedule | None = None,
    base: Any = "adam",
    **settings: Any,
) -> optax.GradientTransformationExtraArgs:
    """A recipe whose learning rate and l1 norm fall to zero.

    Args:
      recipe: `recipes.targeted` or `recipes.any_sparsity`.
      total_steps: length of the training, in steps.
      learning_rate: of the first 60% of the training, or a schedule.
      l1: likewise; None is `L1[base]`.
      base: of the recipe.
      **settings: its other arguments.

    Returns:
      The transformation.
    """

    def schedule(value):
        return value if callable(value) else falling(value, total_steps)

    return recipe(
        total_steps,
        base=base,
        learning_rate=schedule(learning_rate),
        l1=schedule(L1[base] if l1 is None else l1),
        **settings,
    )


def proximal(
    base: Callable[[optax.Schedule], optax.GradientTransformation],
    rate: optax.Schedule,
    l1: optax.Schedule,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer with a proximal step on the l1 norm; every weight is relevant."""
    return pruning_aware(
        base(rate), 1.0, soft_threshold=lambda count: rate(count) * l1(count)
    )
