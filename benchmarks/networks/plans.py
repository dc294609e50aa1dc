"""What a contender is, and the pieces that several of them share."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from benchmarks.measured_recipes import falling
from prunadag_optax import masks
from prunadag_optax.schedules import cubic_density

TARGETS = (0.9, 0.95, 0.98, 0.99)
# The targets at which a contender with targets tries its hyperparameters.
TUNED_AT = (0.95, 0.99)
RATE, STRENGTH = "learning rate", "strength of the l1 norm"
# How trials are judged, see `tuning.SCORES`.
DENSE, WHOLE, AT_TARGET = ("dense", "pruning"), ("dense",), ("loss", "accuracy")


class Plan(NamedTuple):
    """What a contender knows of the training ahead.

    Attributes:
      steps: in all.
      steps_per_epoch: minibatches of an epoch.
      target: the sparsity to train for, number or scalar array; without meaning for
        contenders that have none.
    """

    steps: int
    steps_per_epoch: int
    target: Any


class Contender(NamedTuple):
    """A method.

    Attributes:
      make: (hyperparameter, plan) -> optimizer of all parameters. The hyperparameter
        is a scalar array.
      grid: hyperparameters to try, the first before the others.
      tries: what the hyperparameter is.
      about: what the method is, in a line.
      targets: sparsities to train for, a run for each; empty: one run for all.
      choices: by what trials are judged, see `tuning.SCORES`; each has its own runs
        where they choose differently.
      start: (key, initial params) -> params to start from.
      read: (state, params, hyperparameter) -> params to evaluate.
      shares: of the weights that are there in one step after another, in turn; each
        share has averages of batch normalisation of its own. Empty where all steps
        train the same network.
      length: epochs of a run to report, in those of the task.
      rounds: how often each fold of a task that has folds is tested.
      traced_target: whether `make` takes a traced target.
      version: to be raised when the method changes, so that its runs are made anew.
    """

    make: Callable[[Any, Plan], optax.GradientTransformation]
    grid: tuple[float, ...]
    tries: str
    about: str
    targets: tuple[float, ...] = ()
    choices: tuple[str, ...] = ("every",)
    start: Callable[[jax.Array, Any], Any] = lambda key, params: params
    read: Callable[[Any, Any, Any], Any] = lambda state, params, hyperparameter: params
    shares: tuple[float, ...] = ()
    length: int = 1
    rounds: int = 1
    traced_target: bool = True
    version: int = 1


def cubic(plan: Plan) -> optax.Schedule:
    """A density that falls to the target's between 10% and 70% of the training."""
    return cubic_density(
        1 - plan.target, begin=plan.steps // 10, end=plan.steps * 7 // 10
    )


def on_prunable(
    tx: optax.GradientTransformation, plan: Plan, rate: float = 1e-3
) -> optax.GradientTransformation:
    """The transformation on what can be pruned, Adam on biases and scales."""
    return optax.partition(
        {"pruned": tx, "other": optax.adam(falling(rate, plan.steps))},
        lambda params: jax.tree_util.tree_map_with_path(
            lambda path, x: "pruned" if masks.prunable(path, x) else "other", params
        ),
    )
