"""The studies: each a hypothesis, and the settings that are compared for it.

The first case of a study is what the others are held to. A case is a function from a
`Plan` to an optimizer of LeNet-300-100.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks import measured_recipes as measured
from prunadag_optax import masks, prunadag, pruning_aware, recipes, schedules
from prunadag_optax.methods.gradual_pruning import gradual_magnitude_pruning

TARGET = 0.98
# Of `targeted` here, where a case does not say otherwise.
SHRINK = 0.05
AT_TARGET = (TARGET,)
EVERYWHERE = (0.0, 0.9, 0.95, 0.98, 0.99)


class Plan(NamedTuple):
    """How long a training is."""

    total_steps: int
    epoch: int  # steps


class Study(NamedTuple):
    """A hypothesis and the way to see whether it holds.

    Attributes:
      title: its heading.
      hypothesis: what was expected, and why.
      sparsities: the accuracies after pruning to these, in their mean, decide.
      cases: by name, function from a `Plan` to an optimizer.
    """

    title: str
    hypothesis: str
    sparsities: tuple[float, ...]
    cases: dict[str, Callable[[Plan], optax.GradientTransformation]]


def kernels(params: Any) -> Any:
    """What prunAdag gets, and what Adam does."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: "pruned" if masks.prunable(path, x) else "free", params
    )


def final_share(plan: Plan, target: float = TARGET) -> optax.Schedule:
    """The cubic schedule of T/n down to 1 - target."""
    return schedules.cubic_density(
        1 - target, begin=0.1 * plan.total_steps, end=0.7 * plan.total_steps
    )


def article(
    rate: float = 0.05, *, cosine: bool = False, constant: bool = False, **settings: Any
) -> Callable[[Plan], optax.GradientTransformation]:
    """The article's method on the kernels, biases by Adam."""

    def make(plan: Plan) -> optax.GradientTransformation:
        eta: Any = (
            optax.cosine_decay_schedule(rate, plan.total_steps) if cosine else rate
        )
        relevant = 1 - TARGET if constant else final_share(plan)
        given: dict[str, Any] = {"variant": "v4", "relevance": "magnitude"} | settings
        return optax.partition(
            {"pruned": prunadag(eta, relevant, **given), "free": optax.adam(1e-3)},
            kernels,
        )

    return make


def once_an_epoch(plan: Plan) -> optax.GradientTransformation:
    """Decreasable weights shrink in the first step of an epoch only, to a tenth."""

    def decrease(count: Any) -> jax.Array:
        return jnp.where(jnp.mod(count, plan.epoch) == 0, 0.9, 0.0)

    return article(decrease_schedule=decrease)(plan)


def targeted(
    rate: Any = 3e-3,
    *,
    constant_rate: bool = False,
    warm_up: float = 0,
    **more: Any,
) -> Callable[[Plan], optax.GradientTransformation]:
    """The recipe for one sparsity."""

    def make(plan: Plan) -> optax.GradientTransformation:
        eta: Any = rate
        if constant_rate:
            eta = optax.constant_schedule(rate)
        if warm_up:
            eta = optax.warmup_cosine_decay_schedule(
                0.0, rate, int(warm_up * plan.total_steps), plan.total_steps
            )
        settings = {"sparsity": TARGET, "shrink_rate": SHRINK, "l1": 0.0} | more
        return measured.falling_to_zero(
            recipes.targeted, plan.total_steps, learning_rate=eta, **settings
        )

    return make


def trapezoid(plan: Plan) -> optax.Schedule:
    """A learning rate that is constant for 60% of training and then falls to zero."""
    return measured.falling(3e-3, plan.total_steps)


def cosine(plan: Plan) -> optax.Schedule:
    """A learning rate that falls to zero along a half cosine."""
    return optax.cosine_decay_schedule(3e-3, plan.total_steps)


def decayed(params: Any) -> Any:
    """What has weight decay."""
    return jax.tree_util.tree_map_with_path(masks.prunable, params)


# The studies are older than the l1 norm, and than its turns as the default.
EARLIER: dict[str, Any] = {"densities": measured.DENSE_1_OF_4, "l1": 0.0}


def as_offered(**settings: Any) -> Callable[[Plan], optax.GradientTransformation]:
    """The recipe for any sparsity, as it is but for the settings."""
    return lambda plan: measured.falling_to_zero(
        recipes.any_sparsity, plan.total_steps, **settings
    )


def aimed(**settings: Any) -> Callable[[Plan], optax.GradientTransformation]:
    """The recipe for one sparsity, as it is but for the settings."""
    return lambda plan: measured.falling_to_zero(
        recipes.targeted, plan.total_steps, sparsity=TARGET, **settings
    )


def any_trapezoid(**settings: Any) -> Callable[[Plan], optax.GradientTransformation]:
    """The same, as it was; its learning rate is `trapezoid`."""
    return as_offered(**EARLIER | settings)


def any_sparsity(
    rate: float = 3e-3, **settings: Any
) -> Callable[[Plan], optax.GradientTransformation]:
    """The recipe for any sparsity; the learning rate falls along a half cosine."""

    def make(plan):
        eta = optax.cosine_decay_schedule(rate, plan.total_steps)
        return as_offered(**EARLIER | {"learning_rate": eta} | settings)(plan)

    return make


def turns_at_all(plan: Plan) -> optax.GradientTransformation:
    """The turns of `any_sparsity`, with gradients at all weights."""
    cycle = measured.DENSE_1_OF_4
    least = schedules.cubic_density(
        min(cycle), begin=0.1 * plan.total_steps, end=0.6 * plan.total_steps
    )
    return pruning_aware(
        optax.adamw(cosine(plan), weight_decay=0.1, mask=decayed),
        schedules.cyclic_density(cycle, least=least),
        shrink_rate=0.01,
    )


def log_uniform(gradient_at: str) -> Callable[[Plan], optax.GradientTransformation]:
    """T/n drawn log-uniformly between the final share and 1 in each step."""

    def make(plan: Plan) -> optax.GradientTransformation:
        least = final_share(plan, 0.99)

        def density(count):
            drawn = jax.random.uniform(jax.random.fold_in(jax.random.key(0), count))
            return jnp.exp(drawn * jnp.log(least(count)))

        return pruning_aware(
            optax.adam(cosine(plan)),
            density,
            shrink_rate=0.0 if gradient_at == "pruned" else 0.01,
            gradient_at=gradient_at,
        )

    return make


def sawtooth(teeth: int) -> Callable[[Plan], optax.GradientTransformation]:
    """T/n that comes down several times, from 1 to 1% each time."""

    def make(plan: Plan) -> optax.GradientTransformation:
        length = plan.total_steps // teeth
        tooth = schedules.cubic_density(0.01, begin=0, end=0.7 * length)
        return pruning_aware(
            optax.adam(cosine(plan)),
            lambda count: tooth(jnp.mod(count, length)),
            shrink_rate=SHRINK,
        )

    return make


def magnitude_pruning(
    rate: Callable[[Plan], optax.Schedule], weight_decay: float = 0.0, l1: float = 0.0
) -> Callable[[Plan], optax.GradientTransformation]:
    """Gradual magnitude pruning of Adam, masks made anew in each step."""
    adamw = functools.partial(optax.adamw, weight_decay=weight_decay, mask=decayed)

    def make(plan: Plan) -> optax.GradientTransformation:
        steps = plan.total_steps
        base = adamw(rate(plan))
        if l1:
            base = measured.proximal(adamw, rate(plan), measured.falling(l1, steps))
        density = schedules.cubic_density(
            1 - TARGET, begin=steps // 10, end=7 * steps // 10
        )
        return gradual_magnitude_pruning(base, density)

    return make


def targeted_trapezoid(plan: Plan) -> optax.GradientTransformation:
    """The recipe for one sparsity with the other learning rate."""
    return targeted(trapezoid(plan))(plan)


ONE = (1.0, 0.01, 0.05, 0.02, 0.1, 0.01, 0.02, 0.01)
THREE = (1.0, 0.01, 0.05, 1.0, 0.02, 0.1, 0.01, 1.0, 0.02, 0.01)
EVEN = (1.0, 0.01, 0.1, 0.02, 0.05)
FIVE_OF_SIX = tuple(
    share
    for least in (0.5, 0.01, 0.1, 0.02, 0.5, 0.01, 0.2, 0.05)
    for share in (*(1.0,) * 5, least)
)
HALF = (1.0, 0.1, 1.0, 0.02, 1.0, 0.05, 1.0, 0.01)

# The names of the cases are keys of results/recipe.json, and are kept as they are:
# OFTEN_WHOLE, say, is `DENSE_2_OF_3` of measured_recipes now.
STUDIES: dict[str, Study] = {
    "relevance": Study(
        "What is relevant",
        "In a minibatch the largest gradients are mostly noise, so magnitude should "
        "tell better which weights to keep; and the set has to shrink gradually, as "
        "no network of 2% of the weights is known at the beginning.",
        AT_TARGET,
        {
            "magnitude, cubic": article(),
            "gradient, cubic": article(relevance="gradient"),
            "taylor, cubic": article(relevance="taylor"),
            "magnitude, T constant": article(constant=True),
            "gradient, T constant (the article)": article(
                relevance="gradient", constant=True
            ),
        },
    ),
    "variant": Study(
        "The variants of the article",
        "With minibatches ||g||_R is noise, so the bounds without it (v2, v4) should "
        "be the steadier ones.",
        AT_TARGET,
        {
            "v4": article(),
            "v1": article(variant="v1"),
            "v2": article(variant="v2"),
            "v3": article(variant="v3"),
            "relevant only": article(variant="relevant_only"),
        },
    ),
    "decrease": Study(
        "How fast decreasable weights shrink",
        "1/(k+1) shrinks a weight that becomes decreasable in step k by k/(k+m) in m "
        "steps, hardly at all late in training; a rate that falls more slowly or not "
        "at all should make them vanish.",
        AT_TARGET,
        {
            "1/(k+1) (the article)": article(),
            "1/sqrt(k+1)": article(decrease_schedule=lambda k: 1 / jnp.sqrt(k + 1.0)),
            "0.01": article(decrease_schedule=0.01),
            "0.05": article(decrease_schedule=0.05),
            "0.9 once an epoch": once_an_epoch,
        },
    ),
    "details": Study(
        "Details of the article's method",
        "Momentum averages the noise of signs and steps; a learning rate that falls "
        "to zero does so too; w^O that keeps growing on decreasable weights, the "
        "weight it starts from and the scope should matter less.",
        AT_TARGET,
        {
            "v4, d = 0.05": article(decrease_schedule=0.05),
            "momentum 0.9": article(decrease_schedule=0.05, momentum=0.9),
            "cosine": article(decrease_schedule=0.05, cosine=True),
            "momentum 0.9, cosine": article(
                decrease_schedule=0.05, momentum=0.9, cosine=True
            ),
            "w^O on all": article(decrease_schedule=0.05, accumulation="all"),
            "initial weight 0.1": article(decrease_schedule=0.05, initial_weight=0.1),
            "initial weight 1": article(decrease_schedule=0.05, initial_weight=1.0),
            "leaf scope": article(decrease_schedule=0.05, scope="leaf"),
        },
    ),
    "moments": Study(
        "Sums of squares or Adam's averages",
        "Sums make every later step smaller, also those of weights that have to take "
        "over from the ones that leave; averages do not.",
        AT_TARGET,
        {
            "averages (prunadag_w)": targeted(),
            "sums, learning rate 0.05": article(
                decrease_schedule=0.05, momentum=0.9, cosine=True
            ),
            "sums, learning rate 0.1": article(
                0.1, decrease_schedule=0.05, momentum=0.9, cosine=True
            ),
            "sums, learning rate 0.02": article(
                0.02, decrease_schedule=0.05, momentum=0.9, cosine=True
            ),
        },
    ),
    "rate": Study(
        "The learning rate of prunadag_w",
        "As for Adam, but larger, since fewer weights have to move further; falling to "
        "zero.",
        AT_TARGET,
        {
            "3e-3, cosine": targeted(),
            "1e-3, cosine": targeted(1e-3),
            "1e-2, cosine": targeted(1e-2),
            "3e-3, constant": targeted(constant_rate=True),
            "3e-3, warm-up of 5%": targeted(warm_up=0.05),
            "3e-3, constant for 60%, then linear to 0": targeted_trapezoid,
        },
    ),
    "shrink": Study(
        "Decoupled shrinking",
        "Shrinking whatever the sign of g makes the end of a weight sure. How fast "
        "should not matter much while it is faster than the schedule of T.",
        AT_TARGET,
        {
            "d = 0.05": targeted(),
            "d = 0.005": targeted(shrink_rate=0.005),
            "d = 0.2": targeted(shrink_rate=0.2),
            "d = 0.5, as in the recipe": targeted(shrink_rate=0.5),
            "d = 1, set to zero at once": targeted(shrink_rate=1.0),
            "begin 0.05, end 0.5": targeted(begin=0.05, end=0.5),
            "begin 0.2, end 0.9": targeted(begin=0.2, end=0.9),
            "b1 = 0": targeted(base=functools.partial(optax.adam, b1=0.0)),
            "b2 = 0.99": targeted(base=functools.partial(optax.adam, b2=0.99)),
            "weight decay 0.01": targeted(weight_decay=0.01),
            "weight decay 0.1": targeted(weight_decay=0.1),
            "leaf scope": targeted(scope="leaf"),
        },
    ),
    "pruning": Study(
        "Against gradual magnitude pruning",
        "The same learning rates, the same schedule, the same weights left: shrinking "
        "instead of a mask should cost nothing.",
        AT_TARGET,
        {
            "targeted": targeted(),
            "gradual magnitude pruning of Adam": magnitude_pruning(cosine),
            "targeted, weight decay 0.1": targeted(weight_decay=0.1),
            "gradual pruning, weight decay 0.1": magnitude_pruning(cosine, 0.1),
            "targeted, constant rate, then linear": targeted_trapezoid,
            "gradual pruning, constant rate, then linear": magnitude_pruning(trapezoid),
        },
    ),
    "any": Study(
        "One network for all sparsities",
        "A network trained for one sparsity is no better where more weights are left, "
        "and falls apart where fewer are. If T takes turns and each step sees only "
        "the relevant weights, it should be good at all; if the steps see all weights, "
        "the smaller networks within are not trained.",
        EVERYWHERE,
        {
            "any_sparsity": any_sparsity(),
            "the same, gradients at all weights": turns_at_all,
            "T drawn log-uniformly, gradients at relevant": log_uniform("pruned"),
            "T drawn log-uniformly, gradients at all": log_uniform("params"),
            "sawtooth of 3": sawtooth(3),
            "sawtooth of 12": sawtooth(12),
            "targeted at 90%": targeted(sparsity=0.9),
            "targeted at 98%": targeted(),
            "targeted at 99%": targeted(sparsity=0.99),
            "Adam": lambda plan: optax.adam(
                optax.cosine_decay_schedule(2e-3, plan.total_steps)
            ),
        },
    ),
    "levels": Study(
        "Turns, rates and ends of any_sparsity",
        "The smaller a network is the more turns it needs; more turns for the whole "
        "network buy accuracy there and cost it elsewhere.",
        EVERYWHERE,
        {
            "2 of 8 turns whole, LEVELS": any_sparsity(),
            "1 of 8 turns whole": any_sparsity(densities=ONE),
            "3 of 10 turns whole": any_sparsity(densities=THREE),
            "equal turns": any_sparsity(densities=EVEN),
            "no turn whole": any_sparsity(densities=ONE[1:]),
            "without 99%": any_sparsity(densities=(1.0, 0.02, 0.05, 1.0, 0.02, 0.1)),
            "learning rate 1e-3": any_sparsity(1e-3),
            "learning rate 5e-3": any_sparsity(5e-3),
            "shrinking by 0.001": any_sparsity(shrink_rate=0.001),
            "shrinking by 0.01": any_sparsity(shrink_rate=0.01),
            "weight decay 0": any_sparsity(weight_decay=0.0),
            "learning rate constant for 60%, then linear to 0": any_trapezoid(),
            "the same, every other turn whole": any_trapezoid(densities=HALF),
            "the same, five of six turns whole": any_trapezoid(densities=FIVE_OF_SIX),
            "the same, SELDOM_WHOLE": any_trapezoid(densities=measured.DENSE_1_OF_10),
            "the same, OFTEN_WHOLE": any_trapezoid(densities=measured.DENSE_2_OF_3),
            "the same, MOSTLY_WHOLE": any_trapezoid(densities=measured.DENSE_7_OF_8),
            "end 0.5": any_sparsity(end=0.5),
            "end 0.7": any_sparsity(end=0.7),
            "end 0.85": any_sparsity(end=0.85),
            "end 0.7, weight decay 0": any_sparsity(end=0.7, weight_decay=0.0),
            "leaf scope": any_sparsity(scope="leaf"),
        },
    ),
    "l1": Study(
        "The l1 norm in any_sparsity",
        "The larger networks lean on many small weights, which the smaller have to do "
        "without. A pull towards zero on what is relevant makes a weight earn its "
        "place: the networks come nearer to one another, and one step serves several. "
        "Without turns the pull alone does not train the smallest.",
        EVERYWHERE,
        {
            "any_sparsity": as_offered(),
            "without the l1 norm": as_offered(l1=0.0),
            "l1 0.03": as_offered(l1=0.03),
            "l1 0.3": as_offered(l1=0.3),
            "l1 constant to the end": as_offered(l1=lambda count: 0.1),
            "no turns, everything relevant": as_offered(densities=(1.0,)),
            "LEVELS": as_offered(densities=measured.DENSE_1_OF_4),
            "OFTEN_WHOLE": as_offered(densities=measured.DENSE_2_OF_3),
            "MOSTLY_WHOLE": as_offered(densities=measured.DENSE_7_OF_8),
            "weight decay 0": as_offered(weight_decay=0.0),
        },
    ),
    "targeted_l1": Study(
        "The l1 norm in targeted",
        "The same pull makes room in a network for one sparsity: a weight that does "
        "not earn its place leaves it before the schedule makes it leave, and others "
        "can take its place. Gradual pruning should gain by it alike.",
        AT_TARGET,
        {
            "targeted": aimed(),
            "without the l1 norm": aimed(l1=0.0),
            "l1 0.03": aimed(l1=0.03),
            "l1 0.3": aimed(l1=0.3),
            "gradual magnitude pruning": magnitude_pruning(trapezoid),
            "gradual magnitude pruning, l1 0.1": magnitude_pruning(
                trapezoid, l1=measured.L1["adam"]
            ),
        },
    ),
}
