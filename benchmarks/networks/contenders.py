"""The contenders: how each makes its optimizer, and what it may try.

Everyone gets the same number of epochs, the same number of hyperparameters to try, and,
where it has a learning rate, one that is constant for 60% of the steps and then falls
to 0. All of them train every parameter; what they prune, or prepare for pruning, are
the leaves that `masks.prunable` chooses, ranked together.
"""

from collections.abc import Callable
from typing import Any

import optax

from benchmarks import measured_recipes as measured
from benchmarks.measured_recipes import falling
from benchmarks.networks import others
from benchmarks.networks.plans import (
    AT_TARGET,
    DENSE,
    RATE,
    TARGETS,
    WHOLE,
    Contender,
    Plan,
    cubic,
    on_prunable,
)
from prunadag_optax import eval_params, prunadag, recipes
from prunadag_optax.methods.gradual_pruning import gradual_magnitude_pruning

# Dense rivals.


def _adam(rate: Any, plan: Plan) -> optax.GradientTransformation:
    return optax.adam(falling(rate, plan.steps))


def _adamw(rate: Any, plan: Plan) -> optax.GradientTransformation:
    return optax.adamw(falling(rate, plan.steps), weight_decay=0.01)


def _adagrad(rate: Any, plan: Plan) -> optax.GradientTransformation:
    return optax.adagrad(falling(rate, plan.steps))


def _momentum(rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.sgd(rate, momentum=0.9)


def _sgd(rate: Any, plan: Plan) -> optax.GradientTransformation:
    return _momentum(falling(rate, plan.steps))


def _proximal(base: Callable[..., Any], l1: float) -> Callable[[Any, Plan], Any]:
    """Adam or momentum SGD with proximal steps on the l1 norm."""

    def make(rate, plan):
        pull = falling(l1, plan.steps)
        return measured.proximal(base, falling(rate, plan.steps), pull)

    return make


# Gradual magnitude pruning.


def _gradual(base: Callable[[Any, Plan], Any]) -> Callable[[Any, Plan], Any]:
    def make(rate, plan):
        # A mask is made ten times an epoch, or oftener in short ones.
        every = max(1, plan.steps_per_epoch // 10)
        return gradual_magnitude_pruning(base(rate, plan), cubic(plan), every=every)

    return make


# prunAdag as in the article, and as it has been used with minibatches.


def _article(variant: str) -> Callable[[Any, Plan], Any]:
    def make(rate, plan):
        return on_prunable(
            prunadag(falling(rate, plan.steps), 0.1, variant=variant), plan
        )

    return make


def _magnitude(rate: Any, plan: Plan) -> optax.GradientTransformation:
    tx = prunadag(
        falling(rate, plan.steps),
        relevant=cubic(plan),
        variant="v4",
        relevance="magnitude",
        decrease_schedule=lambda count: (count + 1.0) ** -0.5,
    )
    return on_prunable(tx, plan)


# The recipes.


def _targeted(**settings: Any) -> Callable[[Any, Plan], Any]:
    return lambda rate, plan: measured.falling_to_zero(
        recipes.targeted,
        plan.steps,
        sparsity=plan.target,
        learning_rate=rate,
        **settings,
    )


def _any_sparsity(**settings: Any) -> Callable[[Any, Plan], Any]:
    return lambda rate, plan: measured.falling_to_zero(
        recipes.any_sparsity, plan.steps, learning_rate=rate, **settings
    )


def _recipe_params(state: Any, params: Any, rate: Any) -> Any:
    del rate
    return eval_params(state, params)


# Rounds of those that are held to 0.3 points of one another.
CLOSE = 2
ADAM_RATES = (3e-3, 1e-3, 1e-2, 3e-2)
SGD_RATES = (0.05, 0.02, 0.15, 0.5)

CONTENDERS: dict[str, Contender] = {
    "adam": Contender(_adam, ADAM_RATES, RATE, "Adam (optax)", choices=DENSE),
    "adamw": Contender(
        _adamw,
        ADAM_RATES,
        RATE,
        "AdamW (optax), weight decay 0.01",
        choices=DENSE,
    ),
    "adagrad": Contender(
        _adagrad, (0.03, 0.01, 0.1, 0.3), RATE, "Adagrad (optax)", choices=DENSE
    ),
    "sgd": Contender(_sgd, SGD_RATES, RATE, "SGD (optax), momentum 0.9", choices=DENSE),
    "gmp_adam": Contender(
        _gradual(_adam),
        ADAM_RATES,
        RATE,
        "gradual magnitude pruning of Adam, a run for each target",
        TARGETS,
        AT_TARGET,
        rounds=CLOSE,
    ),
    "gmp_sgd": Contender(
        _gradual(_sgd),
        SGD_RATES,
        RATE,
        "gradual magnitude pruning of SGD with momentum 0.9, a run for each target",
        TARGETS,
        AT_TARGET,
        rounds=CLOSE,
    ),
}
# One run for all sparsities, by whose turn it is: the shares, how often that is the
# whole network, what trials are judged by, further settings, the version (any_sparsity
# was what is quarter_whole now, mostly_whole five of six).
WITHOUT = {"l1": 0.0}
TURNS: dict[str, tuple[Any, ...]] = {
    "any_sparsity": (measured.DENSE_1_OF_10, "one step in ten", ("every",), {}, 2),
    "seldom_whole": (measured.DENSE_1_OF_10, "one step in ten", ("every",), WITHOUT, 1),
    "quarter_whole": (
        measured.DENSE_1_OF_4,
        "one step in four",
        ("every",),
        WITHOUT,
        1,
    ),
    "often_whole": (measured.DENSE_2_OF_3, "two steps in three", WHOLE, WITHOUT, 1),
    "mostly_whole": (measured.DENSE_7_OF_8, "seven steps in eight", WHOLE, WITHOUT, 2),
}
for _suffix, _grid, _settings, _told in (
    ("", ADAM_RATES, {}, "Adam"),
    ("_sgd", SGD_RATES, {"base": "momentum"}, "momentum SGD"),
):
    for _l1, _more in (("", WITHOUT), ("_l1", {})):
        CONTENDERS[f"targeted{_suffix}{_l1}"] = Contender(
            _targeted(**_settings, **_more),
            _grid,
            RATE,
            f"the recipe `recipes.targeted` with the steps of {_told}, "
            f"{'without the l1 norm, ' * bool(_more)}a run for each target, no mask",
            TARGETS,
            AT_TARGET,
            read=_recipe_params,
            rounds=CLOSE,
        )
    for _name, (_densities, _part, _choices, _more, _version) in TURNS.items():
        CONTENDERS[f"{_name}{_suffix}"] = Contender(
            _any_sparsity(densities=_densities, **_settings, **_more),
            _grid,
            RATE,
            f"the recipe `recipes.any_sparsity` with the steps of {_told}, one run "
            f"for all sparsities, {'without' if _more else 'with'} the l1 norm; "
            f"the whole network has {_part}",
            choices=_choices,
            read=_recipe_params,
            shares=_densities,
            version=_version,
        )
CONTENDERS["any_sparsity_sgd_strong"] = CONTENDERS["any_sparsity_sgd"]._replace(
    make=_any_sparsity(base="momentum", l1=3 * measured.L1["momentum"]),
    about="any_sparsity_sgd with three times the l1 norm",
    version=1,
)
# What the l1 norm does for gradual pruning, as strong as in the recipes.
for _name, _make in (
    ("gmp_adam", _proximal(optax.adam, measured.L1["adam"])),
    ("gmp_sgd", _proximal(_momentum, measured.L1["momentum"])),
):
    CONTENDERS[f"{_name}_l1"] = CONTENDERS[_name]._replace(
        make=_gradual(_make),
        about=f"{CONTENDERS[_name].about}, with the l1 norm of the recipes",
    )
# One run that takes as many steps as the trainings of gradual pruning that it stands
# in for; its hyperparameter is tried in trials as short as everyone's.
for _name in ("any_sparsity_sgd", "seldom_whole_sgd", "quarter_whole_sgd"):
    CONTENDERS[f"{_name}_4x"] = CONTENDERS[_name]._replace(
        about=f"{_name}, one run of four times the epochs: as many as gradual pruning "
        "has for its four targets",
        length=len(TARGETS),
    )
CORE = tuple(CONTENDERS)
ARTICLE_RATES = (0.05, 0.02, 0.1, 0.2)
for _variant in ("v1", "v2", "v3", "v4", "relevant_only"):
    CONTENDERS[f"prunadag_{_variant}"] = Contender(
        _article(_variant),
        ARTICLE_RATES,
        RATE,
        f"prunAdag of the article, variant {_variant}, a tenth relevant by gradient; "
        "biases and scales by Adam",
    )
CONTENDERS["prunadag_magnitude"] = Contender(
    _magnitude,
    ARTICLE_RATES,
    RATE,
    "prunAdag v4, relevant by magnitude, their share falling as in gradual magnitude "
    "pruning, a run for each target; biases and scales by Adam",
    TARGETS,
    AT_TARGET,
)
CONTENDERS.update(others.CONTENDERS)
