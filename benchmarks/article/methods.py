"""The eight methods of the article, as optax transformations."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from benchmarks.problems import Problem
from prunadag_optax import prunadag
from prunadag_optax.methods import frank_wolfe


class Setting(NamedTuple):
    """What the article's text leaves open, or its figures contradict."""

    start: str  # what x_0 is before it is scaled to length 1, a key of `runs.STARTS`
    zeta: float  # the weights before the first iteration
    shift: float  # c of the step c / (k + c) of FW1


SETTINGS = {
    # Under which the published figures come out. zeta = 0.1 is what (16) says with
    # zeta = 0.01 under the root, where (9) has its square.
    "published": Setting("dense", 0.1, 2.0),
    # As the text says.
    "written": Setting("sparse", 0.01, 1.0),
}


class Settings(NamedTuple):
    """The numbers that the methods take; traced, so that none compiles anew."""

    relevant: Any  # T, integer
    zeta: Any  # the weights before the first iteration
    shift: Any  # c of the step c / (k + c) of FW1
    radius_1: Any  # tau of FW1
    radius_2: Any  # tau of FW2
    rescale: Any  # beta of FW2


def _adagrad(settings: Settings) -> optax.GradientTransformation:
    # w = sqrt(zeta^2 + sum g^2): Algorithm 2.1 with every component relevant.
    return optax.adagrad(1.0, initial_accumulator_value=settings.zeta**2, eps=0.0)


def _variant(name: str, settings: Settings) -> optax.GradientTransformation:
    return prunadag(1.0, settings.relevant, variant=name, initial_weight=settings.zeta)


VARIANTS = ("v1", "v2", "v3", "v4", "relevant_only")
METHODS: dict[str, Callable[[Settings], optax.GradientTransformation]] = {
    **{name: functools.partial(_variant, name) for name in VARIANTS},
    "Adagrad": _adagrad,
    "FW1": lambda s: frank_wolfe.fw1(s.radius_1, s.relevant, s.shift),
    "FW2": lambda s: frank_wolfe.fw2(s.radius_2, s.relevant, s.rescale),
}


def settings_of(
    problem: Problem, setting: Setting, relevant: int | None = None
) -> Settings:
    """The numbers of a problem in a setting, with its own T or another."""
    return Settings(
        jnp.asarray(problem.relevant if relevant is None else relevant),
        jnp.asarray(setting.zeta),
        jnp.asarray(setting.shift),
        *(
            jnp.asarray(x)
            for x in (problem.radius_1, problem.radius_2, problem.rescale)
        ),
    )
