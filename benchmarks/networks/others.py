"""Every method of `prunadag_optax.methods` as a contender."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.measured_recipes import falling
from benchmarks.networks.plans import (
    AT_TARGET,
    RATE,
    STRENGTH,
    TARGETS,
    Contender,
    Plan,
    on_prunable,
)
from prunadag_optax import masks, schedules
from prunadag_optax.methods import (
    bregman,
    dual_averaging,
    frank_wolfe,
    hard_thresholding,
    proximal,
    sparse_momentum,
)
from prunadag_optax.methods.lottery_ticket import dense_mask
from prunadag_optax.methods.penalties import regularisers

STRENGTHS = (3e-4, 1e-4, 1e-3, 3e-3)
# The larger the strength, the better at 99% and the worse before: two rows.
BY_STRENGTH = ("every", "pruning")
# Of the weights that the Bregman iterations start from.
DENSITY, GAIN = 0.05, 0.7
# How far GSM lets a passive weight shrink, all in all: to e^-5 of what it was.
SHRINKING = 5.0
# The share of GSM's training that is momentum SGD on all weights: it starts from a
# trained network.
TRAINED_FIRST = 0.25


def _l1(strength: Any) -> regularisers.Regulariser:
    return regularisers.l1(strength)


# Adam, hard-thresholded.


def _hard_thresholding(rate: Any, plan: Plan) -> optax.GradientTransformation:
    return hard_thresholding.iterative_hard_thresholding(
        optax.adam(falling(rate, plan.steps)), 1 - plan.target
    )


# Global sparse momentum.


def _gsm(rate: Any, plan: Plan) -> optax.GradientTransformation:
    momentum = 0.98
    begin = int(TRAINED_FIRST * plan.steps)
    # A weight that stays passive shrinks by the factor exp(-decay * the sum of the
    # learning rates / (1 - momentum)); their sum from `begin` on, in rates and steps:
    left = (1 + schedules.STABLE) / 2 - TRAINED_FIRST
    decay = SHRINKING * (1 - momentum) / (rate * plan.steps * left)

    def compression(count):
        return jnp.where(count < begin, 1.0, 1 / (1 - plan.target))

    return optax.inject_hyperparams(sparse_momentum.gsm)(
        learning_rate=falling(rate, plan.steps),
        compression=compression,
        momentum=momentum,
        weight_decay=lambda count: jnp.where(count < begin, 0.0, decay),
    )


# Bregman iterations.


def _bregman(family: Any, strength: float) -> Callable[[Any, Plan], Any]:
    def make(rate, plan):
        controller = bregman.Controller(
            plan.target, every=max(1, plan.steps_per_epoch // 5), decay=0.95
        )
        return family(
            falling(rate, plan.steps),
            _l1(1.0),
            strength=strength,
            adaptive=controller,
        )

    return make


def _sparse_start(key: jax.Array, params: Any) -> Any:
    return bregman.sparse_init(key, params, DENSITY, gain=GAIN)


# Proximal methods and dual averaging.


def _prox_adam(strength: Any, plan: Plan) -> optax.GradientTransformation:
    return proximal.prox_adam(falling(3e-3, plan.steps), _l1(strength))


def _proxgen(strength: Any, plan: Plan) -> optax.GradientTransformation:
    return proximal.proxgen(
        falling(0.03, plan.steps),
        _l1(strength),
        direction=optax.scale_by_rss(),
        metric=lambda state: jax.tree.map(jnp.sqrt, state.sum_of_squares),
    )


def _prox_sgd(strength: Any, plan: Plan) -> optax.GradientTransformation:
    # The average of gradients is a tenth as long as optax's momentum.
    return proximal.prox_sgd(falling(0.5, plan.steps), _l1(strength), momentum=0.9)


def _dual_averaging(family: Any, rate: float) -> Callable[[Any, Plan], Any]:
    def make(strength, plan):
        # In stages, which end the momentum as their authors have it.
        milestones = [plan.steps // 2, plan.steps * 3 // 4]
        return family(rate, _l1(strength), momentum=0.1, milestones=milestones)

    return make


def _unaveraged(state: Any, params: Any, strength: Any) -> Any:
    del params
    return dual_averaging.unaveraged(state, _l1(strength))


# Frank-Wolfe.


def _frank_wolfe(radius: Any, plan: Plan) -> optax.GradientTransformation:
    tx = frank_wolfe.conditional_gradient(
        falling(0.05, plan.steps), radius=radius, support=0.05, scope="global"
    )
    return on_prunable(tx, plan)


# Lottery tickets.


class RewoundState(NamedTuple):
    """State of `rewound`."""

    # The iterations done, shape=(), dtype=int32. optax's states have the same name.
    count: jax.typing.ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride]
    initial: Any  # the parameters that training started from
    mask: Any  # bool, shapes of params; None for leaves that are not prunable
    base: Any  # of the optimizer


def rewound(
    base: optax.GradientTransformation, sparsity: Any, half: int
) -> optax.GradientTransformation:
    """A lottery ticket: trains, prunes, goes back to the start, trains what is left.

    Args:
      base: the optimizer; it starts anew with the ticket.
      sparsity: of the ticket.
      half: the step at which it is drawn.

    Returns:
      The transformation.
    """

    def init_fn(params):
        count = jnp.zeros([], jnp.int32)
        initial = jax.tree.map(jnp.array, params)
        return RewoundState(count, initial, dense_mask(params), base.init(params))

    def train(updates, state, params):
        kept = masks.apply_mask(updates, state.mask)
        steps, inner = base.update(kept, state.base, params)
        steps, _ = masks.keep_pruned(state.mask).update(
            steps, masks.KeepPrunedState(state.mask), params
        )
        return steps, state._replace(base=inner)

    def draw(updates, state, params):
        del updates
        mask = masks.magnitude_mask(params, sparsity)
        ticket = masks.apply_mask(state.initial, mask)
        back = jax.tree.map(lambda new, old: new - old, ticket, params)
        return back, state._replace(mask=mask, base=base.init(params))

    def update_fn(updates, state, params=None):
        steps, state = jax.lax.cond(
            state.count == half, draw, train, updates, state, params
        )
        return steps, state._replace(count=state.count + 1)

    return optax.GradientTransformation(init_fn, update_fn)


def _lottery(rate: Any, plan: Plan) -> optax.GradientTransformation:
    half = plan.steps // 2
    # Both trainings have the whole schedule.
    base = optax.adam(falling(rate, half))
    return rewound(base, jnp.asarray(plan.target, jnp.float32), half)


CONTENDERS: dict[str, Contender] = {
    "hard_thresholding": Contender(
        _hard_thresholding,
        (3e-3, 1e-3, 1e-2, 3e-2),
        RATE,
        "iterative hard thresholding of Adam, a run for each target",
        TARGETS,
        AT_TARGET,
    ),
    "gsm": Contender(
        _gsm,
        (1e-2, 3e-3, 3e-2, 1e-3),
        RATE,
        "global sparse momentum, after a quarter of the training with all gradients; "
        "momentum 0.98, weight decay so that passive weights shrink to e^-5; a run for "
        "each target",
        TARGETS,
        AT_TARGET,
    ),
    "linbreg": Contender(
        _bregman(bregman.linbreg, 1e-2),
        (0.1, 0.03, 0.3, 1.0),
        RATE,
        "LinBreg with the l1 norm and the controller, from one weight in twenty; a run "
        "for each target",
        TARGETS,
        AT_TARGET,
        start=_sparse_start,
    ),
    "adabreg": Contender(
        _bregman(bregman.adabreg, 0.1),
        (3e-3, 1e-3, 1e-2, 3e-2),
        RATE,
        "AdaBreg with the l1 norm and the controller, from one weight in twenty; a run "
        "for each target",
        TARGETS,
        AT_TARGET,
        start=_sparse_start,
    ),
    "prox_adam": Contender(
        _prox_adam,
        STRENGTHS,
        STRENGTH,
        "proximal Adam (ProxGen with Adam's metric), learning rate 3e-3",
        choices=BY_STRENGTH,
    ),
    "proxgen": Contender(
        _proxgen,
        STRENGTHS,
        STRENGTH,
        "ProxGen with Adagrad's metric, learning rate 0.03",
        choices=BY_STRENGTH,
    ),
    "prox_sgd": Contender(
        _prox_sgd,
        STRENGTHS,
        STRENGTH,
        "proximal SGD, learning rate 0.5 on an average of gradients (0.9)",
        choices=BY_STRENGTH,
    ),
    "rmda": Contender(
        _dual_averaging(dual_averaging.rmda, 0.1),
        STRENGTHS,
        STRENGTH,
        "RMDA, learning rate 0.1, a tenth after 1/2 and 3/4, point not averaged",
        read=_unaveraged,
        choices=BY_STRENGTH,
    ),
    "ramda": Contender(
        _dual_averaging(dual_averaging.ramda, 0.01),
        STRENGTHS,
        STRENGTH,
        "RAMDA, learning rate 0.01, a tenth after 1/2 and 3/4, point not averaged",
        read=_unaveraged,
        choices=BY_STRENGTH,
    ),
    "frank_wolfe": Contender(
        _frank_wolfe,
        (100.0, 30.0, 300.0, 1000.0),
        "radius of the ball",
        "stochastic Frank-Wolfe on the k-support ball (one vertex in twenty), learning "
        "rate 0.05, momentum 0.9; biases and scales by Adam",
    ),
    "lottery": Contender(
        _lottery,
        (3e-3, 1e-3, 1e-2, 3e-2),
        RATE,
        "a lottery ticket: Adam for half of the training, pruned and rewound to the "
        "start, Adam again; a run for each target",
        TARGETS,
        AT_TARGET,
    ),
}
