"""The contenders: one table, a row a method, a setting and a base optimizer.

Every contender trains as many steps as every other, but for those whose `length` says
otherwise, and gets as many trials of its learning rate to begin with.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from benchmarks.bench.tuning import Grid
from prunadag_optax import recipes, schedules
from prunadag_optax.methods import dynamic_sparse
from prunadag_optax.methods.ac_dc import ac_dc
from prunadag_optax.methods.cram import cram_plus
from prunadag_optax.methods.gradual_pruning import gradual_magnitude_pruning
from prunadag_optax.methods.powerpropagation import powerpropagation
from prunadag_optax.methods.straight_through import straight_through


class Plan(NamedTuple):
    """What a contender knows of the training ahead.

    Attributes:
      steps: in all.
      sparsity: to train for; without meaning for contenders of one training.
      sparsities: those that will be asked for.
    """

    steps: int
    sparsity: float
    sparsities: tuple[float, ...]

    @property
    def density(self) -> float:
        """The share of the weights that is kept."""
        return 1 - self.sparsity

    def part(self, share: float) -> int:
        """That share of the training in steps, at least one."""
        return max(1, round(share * self.steps))


def _plain(grad: Callable[..., Any], plan: Plan) -> Callable[..., Any]:
    """One gradient a step, which takes no random key."""
    del plan
    return lambda params, key, *arguments: grad(params, *arguments)


class Contender(NamedTuple):
    """A method with a setting and a base optimizer.

    Attributes:
      method: its name.
      setting: what tells it from other rows of the method; may be empty.
      base: name of the base optimizer.
      make: function (learning rate, plan, random key) -> optimizer. The learning rate
        is a scalar array.
      grid: of the learning rate.
      each: whether there is a training for each sparsity; else one serves all.
      passes: gradients of a step.
      length: steps of a training, as a share of the others'.
      gradient: function (grad, plan) -> function (params, key, ...); grad is a function
        (params, ...) -> ((loss, statistics), gradient).
      about: what the method is, in a line.
      score: what pruning ranks.
      version: to be raised when the method changes, so that its runs are made anew.
    """

    method: str
    setting: str
    base: str
    make: Callable[[Any, Plan, jax.Array], optax.GradientTransformation]
    grid: Grid
    each: bool
    about: str
    passes: int = 1
    length: float = 1.0
    gradient: Callable[[Callable[..., Any], Plan], Callable[..., Any]] = _plain
    score: str = "magnitude"
    version: int = 1

    @property
    def name(self) -> str:
        """Method, setting and base, which together belong to no other row."""
        return " | ".join((self.method, self.setting, self.base))

    @property
    def label(self) -> str:
        """Method and setting, for tables and figures."""
        return f"{self.method}, {self.setting}" if self.setting else self.method


MOMENTUM, ADAM, NORMALISED = "momentum SGD", "Adam", "normalised momentum"
_GRIDS = {MOMENTUM: Grid(0.05), ADAM: Grid(3e-3), NORMALISED: Grid(0.01)}
# The part of the training in which a density falls; what all that prune gradually use.
BEGIN, END = recipes.BEGIN, recipes.END
# What the methods publish: the exponent of powerpropagation, CrAM's ascent.
ALPHA, RHO = 3.0, 0.05


def _momentum(rate: Any, plan: Plan) -> optax.GradientTransformation:
    return optax.sgd(schedules.stable_decay(rate, plan.steps), 0.9)


def _dense(rate: Any, plan: Plan, key: jax.Array) -> optax.GradientTransformation:
    del key
    return _momentum(rate, plan)


def _cubic(plan: Plan) -> optax.Schedule:
    begin, end = BEGIN * plan.steps, END * plan.steps
    return schedules.cubic_density(plan.density, begin=begin, end=end)


def _gradual(rate: Any, plan: Plan, key: jax.Array) -> optax.GradientTransformation:
    del key
    base = _momentum(rate, plan)
    return gradual_magnitude_pruning(base, _cubic(plan), every=plan.part(1 / 300))


def _random(rate: Any, plan: Plan, key: jax.Array) -> optax.GradientTransformation:
    from prunadag_optax import scores

    return gradual_magnitude_pruning(
        _momentum(rate, plan),
        _cubic(plan),
        every=plan.part(1 / 300),
        # The same at every step, so that the masks lie within one another.
        score=lambda params: scores.random(params, key),
    )


def _dynamic(family: str, budget: str) -> Callable[..., Any]:
    """RigL, SET or static masks; the exchanges end at three quarters."""

    def make(rate: Any, plan: Plan, key: jax.Array) -> optax.GradientTransformation:
        settings: dict[str, Any] = {"layer_budget": budget, "key": key}
        if family != "static_sparse":
            every = min(100, plan.part(1 / 25))
            settings |= {"every": every, "end": plan.part(0.75)}
        wrapper = getattr(dynamic_sparse, family)
        return wrapper(_momentum(rate, plan), plan.density, **settings)

    return make


def _straight_through(
    rate: Any, plan: Plan, key: jax.Array
) -> optax.GradientTransformation:
    del key
    return straight_through(_momentum(rate, plan), _cubic(plan))


def _ac_dc(rate: Any, plan: Plan, key: jax.Array) -> optax.GradientTransformation:
    del key
    return ac_dc(
        _momentum(rate, plan),
        plan.density,
        warm_up=plan.part(0.1),
        phase=plan.part(0.05),
        last=plan.part(0.15),
        total_steps=plan.steps,
    )


def _powerpropagation(
    rate: Any, plan: Plan, key: jax.Array
) -> optax.GradientTransformation:
    del key
    return powerpropagation(_momentum(rate, plan), ALPHA)


def _cram_gradient(grad: Callable[..., Any], plan: Plan) -> Callable[..., Any]:
    densities = tuple(round(1 - sparsity, 6) for sparsity in plan.sparsities)
    return cram_plus(grad, densities, rho=RHO, value_and_grad=True)


def _targeted(base: str) -> Callable[..., Any]:
    def make(rate: Any, plan: Plan, key: jax.Array) -> optax.GradientTransformation:
        del key
        return recipes.targeted(
            plan.steps, sparsity=plan.sparsity, base=base, learning_rate=rate
        )

    return make


def _any_sparsity(base: str, score: str = "magnitude") -> Callable[..., Any]:
    def make(rate: Any, plan: Plan, key: jax.Array) -> optax.GradientTransformation:
        del key
        return recipes.any_sparsity(
            plan.steps, base=base, learning_rate=rate, score=score
        )

    return make


def _row(
    method: str,
    setting: str,
    make: Callable[..., Any],
    each: bool,
    about: str,
    base: str = MOMENTUM,
    **others: Any,
) -> Contender:
    return Contender(method, setting, base, make, _GRIDS[base], each, about, **others)


_CRAM = "the gradient, and that of a copy pruned to a sparsity drawn anew each step"
_RIGL = "random mask at first; drops the smallest weights, grows by the gradient"

# Methods that are compared on sparse training.
SPARSE_TRAINING: tuple[Contender, ...] = (
    _row("dense", "", _dense, False, "trained dense, pruned once by magnitude"),
    _row(
        "random", "gradual", _random, True,
        "gradual pruning of weights drawn at random, on the cubic schedule",
    ),
    _row(
        "static", "ERK", _dynamic("static_sparse", "erk"), True,
        "a random mask, held from the first step on",
    ),
    _row(
        "SET", "ERK", _dynamic("sparse_evolution", "erk"), True,
        "random mask at first; drops the smallest weights, grows any",
    ),
    _row("RigL", "uniform", _dynamic("rigl", "uniform"), True, _RIGL),
    _row("RigL", "ERK", _dynamic("rigl", "erk"), True, _RIGL),
    _row(
        "straight-through", "", _straight_through, True,
        "the pruned network's gradient on the dense weights, on the cubic schedule",
    ),
    _row(
        "gradual pruning", "", _gradual, True,
        "gradual magnitude pruning, on the cubic schedule",
    ),
    _row(
        "AC/DC", "", _ac_dc, True,
        "the pruned and the dense network in turns: warm-up 10%, phases 5%, last 15%",
    ),
    _row("targeted", "", _targeted("adam"), True, "`recipes.targeted`", ADAM),
    _row("targeted", "", _targeted("momentum"), True, "`recipes.targeted`"),
    _row(
        "any_sparsity", "", _any_sparsity("adam"), False, "`recipes.any_sparsity`", ADAM
    ),
    _row(
        "any_sparsity", "", _any_sparsity("momentum"), False, "`recipes.any_sparsity`"
    ),
    _row(
        "CrAM+", "equal steps", _dense, False, _CRAM,
        passes=2, gradient=_cram_gradient,
    ),
    _row(
        "CrAM+", "equal gradients", _dense, False, f"{_CRAM}; half the steps",
        passes=2, length=0.5, gradient=_cram_gradient,
    ),
    _row(
        "powerpropagation", f"alpha {ALPHA:g}", _powerpropagation, False,
        "trains w of the weights w |w|^(alpha - 1), pruned once by magnitude",
    ),
)  # fmt: skip


_BASES = {"adam": ADAM, "momentum": MOMENTUM, "normalised_momentum": NORMALISED}
# The recipe of one training with every base and score, and what a training for each
# sparsity reaches.
DEFAULTS: tuple[Contender, ...] = (
    *(
        _row(
            "any_sparsity", score, _any_sparsity(base, score), False,
            f"`recipes.any_sparsity` that ranks by {score}", label, score=score,
        )
        for score in ("magnitude", "lamp")
        for base, label in _BASES.items()
    ),
    _row(
        "gradual pruning", "", _gradual, True,
        "gradual magnitude pruning, on the cubic schedule",
    ),
    _row("dense", "", _dense, False, "trained dense, pruned once by magnitude"),
)  # fmt: skip


def chosen(
    contenders: tuple[Contender, ...], methods: list[str] | None
) -> list[Contender]:
    """The rows of some methods.

    Args:
      contenders: all rows.
      methods: names of methods, in any case, or None for all rows.

    Returns:
      The rows in the order of the table.

    Raises:
      ValueError: for a name that is no method's.
    """
    if methods is None:
        return list(contenders)
    wanted = {name.casefold() for name in methods}
    known = dict.fromkeys(row.method for row in contenders)
    if strange := wanted - {name.casefold() for name in known}:
        raise ValueError(
            f"--method must be among {', '.join(known)}; got "
            f"{', '.join(sorted(strange))}."
        )
    return [row for row in contenders if row.method.casefold() in wanted]
