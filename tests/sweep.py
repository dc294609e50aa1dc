"""The sweep: each transformation held to the plain eager loop, in every way to run it.

The tables are of ways to run or wrap a transformation, of trees and of methods. What is
held: the same parameters, updates and state, dtypes that stay, and one compilation.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.core import FrozenDict

from prunadag_optax import (
    ScaleByPrunadagState,
    masks,
    prunadag,
    pruning_aware,
    scale_by_normalised_momentum,
)
from prunadag_optax._core.normalised_momentum import ScaleByNormalisedMomentumState
from prunadag_optax._core.pruning_aware import GradientAtPrunedState, PruningAwareState
from prunadag_optax.methods import (
    ac_dc,
    bregman,
    dual_averaging,
    dynamic_sparse,
    frank_wolfe,
    gradual_pruning,
    hard_thresholding,
    lottery_ticket,
    powerpropagation,
    proximal,
    sparse_momentum,
    straight_through,
)
from prunadag_optax.methods.penalties import regularisers
from prunadag_optax.schedules import cubic_density
from tests.helpers import (
    assert_close,
    donated,
    eager,
    enable_x64,
    exact_leaves,
    jitted,
    scanned,
    shapes_and_dtypes,
    vmapped,
)

# Numbers that every dtype holds exactly, so that inject_hyperparams, which casts them
# to the dtype of the parameters, changes nothing.
SETTINGS = {
    "learning_rate": 0.125,
    "relevant": 0.25,
    "initial_weight": 0.0625,
    "momentum": 0.5,
}
STEPS = 3


class Method(NamedTuple):
    """A transformation of the sweep, as `inject_hyperparams` takes it.

    Attributes:
      make: the factory.
      settings: its arguments.
      state: the type of the part of the state that is compared.
      units: how many units in the last place another order of sums may make.
    """

    make: Callable[..., Any]
    settings: dict[str, Any]
    state: type
    units: int = 2


PRUNADAG = Method(prunadag, SETTINGS, ScaleByPrunadagState)


@dataclasses.dataclass(frozen=True)
class Transform:
    """A way to run or wrap a method and what it is then to equal.

    Attributes:
      run: one of the loops of `tests.helpers`.
      wrap: from a factory like `prunadag` and its arguments to the transformation to
        run.
      part: the part of a tree (of parameters or gradients) that the method gets to see.
      seen: the gradient that it gets to see.
      repeats: how often each gradient is given.
    """

    run: Callable[..., Any] = jitted
    wrap: Callable[..., Any] = lambda make, settings: make(**settings)
    part: Callable[[Any], Any] = lambda tree: tree
    seen: Callable[[Any], Any] = lambda gradient: gradient
    repeats: int = 1


def chosen(tree):
    """A tree of bool like `tree`: False for its first leaf, if it has more than one."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef.unflatten([i > 0 or len(leaves) == 1 for i in range(len(leaves))])


def part(tree):
    return jax.tree.map(lambda x, keep: x if keep else None, tree, chosen(tree))


def clipped(gradient):
    return jax.tree.map(lambda g: jnp.clip(g, -0.5, 0.5), gradient)


TRANSFORMS = {
    "jit": Transform(),
    "vmap": Transform(run=vmapped),
    "scan": Transform(run=scanned),
    "donation": Transform(run=donated),
    "chain": Transform(
        wrap=lambda make, settings: optax.chain(optax.clip(0.5), make(**settings)),
        seen=clipped,
    ),
    "masked": Transform(
        wrap=lambda make, settings: optax.masked(make(**settings), chosen), part=part
    ),
    "partition": Transform(
        wrap=lambda make, settings: optax.partition(
            {True: make(**settings), False: optax.sgd(0.125)}, chosen
        ),
        part=part,
    ),
    "MultiSteps": Transform(
        wrap=lambda make, settings: optax.MultiSteps(
            make(**settings), 2
        ).gradient_transformation(),
        repeats=2,
    ),
    "inject_hyperparams": Transform(
        wrap=lambda make, settings: optax.inject_hyperparams(make)(**settings)
    ),
    "apply_if_finite": Transform(
        wrap=lambda make, settings: optax.apply_if_finite(make(**settings), 1)
    ),
}

# From a maker of leaves (shape, dtype=that of the test) to a tree. Few shapes, so that
# the eager loops compile few operations.
TREES = {
    "array": lambda leaf: leaf((4, 3)),
    "dict": lambda leaf: {"bias": leaf((3,)), "kernel": leaf((4, 3))},
    "zero-size leaf": lambda leaf: {"a": leaf((3,)), "b": leaf((0, 3))},
    "mixed dtypes": lambda leaf: [
        leaf((4, 3)),
        leaf((3,), "bfloat16"),
        leaf((3,), "float32"),
    ],
    "scalars": lambda leaf: [leaf(()), leaf(()), leaf(())],
    "list": lambda leaf: [leaf((4, 3)), leaf((3,))],
    "FrozenDict": lambda leaf: FrozenDict({"a": {"w": leaf((3,))}, "b": leaf((4, 3))}),
    "None leaves": lambda leaf: {"a": leaf((3,)), "b": None, "c": [leaf((4, 3)), None]},
    "empty": lambda leaf: {},
}


DTYPES = ["float16", "bfloat16", "float32", "float64"]


def make_tree(name, dtype, seed):
    return TREES[name](exact_leaves(dtype, seed))


def own_state(state, kind=ScaleByPrunadagState):
    def is_own(node):
        return isinstance(node, kind)

    (own,) = filter(is_own, jax.tree.leaves(state, is_leaf=is_own))
    return own


def sweep(method, transform, tree, dtype):
    """Holds one way to run a method on one tree in one dtype to the eager loop."""
    with enable_x64(dtype == "float64"):
        params, *gradients = (make_tree(tree, dtype, seed) for seed in range(1 + STEPS))
        fed = [g for g in gradients for _ in range(transform.repeats)]
        tx = transform.wrap(method.make, method.settings)
        moved, updates, state = transform.run(tx, params, fed)
        expected = eager(
            method.make(**method.settings),
            transform.part(params),
            [transform.part(transform.seen(g)) for g in gradients],
        )
        for changed in (moved, updates):
            assert shapes_and_dtypes(changed) == shapes_and_dtypes(params)
            assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(changed))
        assert shapes_and_dtypes(state) == shapes_and_dtypes(
            jax.eval_shape(tx.init, params)
        )
        assert_close(transform.part(moved), expected[0], method.units)
        assert_close(transform.part(updates), expected[1], method.units)
        own, own_expected = (own_state(s, method.state) for s in (state, expected[2]))
        assert_close(own, own_expected, method.units)


# The methods. Kernels and biases are regularised, so that all leaves of all trees
# are; groups are numbered by the first axis.


L1 = regularisers.l1(0.25, where=masks.everything)


def first_axis(path, leaf):
    del path
    return 0 if leaf.ndim else ()


LASSO = regularisers.group_lasso(0.25, first_axis, where=masks.everything)
MCP = regularisers.group_mcp(0.25, 4.0, first_axis, where=masks.everything)
RATE = {"learning_rate": 0.125}
ADAM = RATE | {"b1": 0.5, "b2": 0.75, "eps": 2.0**-10}


def thresholded_adam(learning_rate, b1, b2, eps, k):
    base = optax.adam(learning_rate, b1, b2, eps)
    return hard_thresholding.iterative_hard_thresholding(
        base, k, where=masks.everything
    )


def prox_rms(learning_rate, relaxation):
    """ProxGen in the metric of RMSProp; `inject_hyperparams` would call the metric."""

    def metric(state):
        return jax.tree.map(lambda nu: jnp.sqrt(nu) + 2.0**-10, state.nu)

    return proximal.proxgen(
        learning_rate,
        MCP,
        direction=optax.scale_by_rms(0.75, 2.0**-10, eps_in_sqrt=False),
        metric=metric,
        relaxation=relaxation,
    )


def gradual_adam(learning_rate, b1, b2, eps):
    return gradual_pruning.gradual_magnitude_pruning(
        optax.adam(learning_rate, b1, b2, eps),
        cubic_density(0.25, begin=0, end=2),
        where=masks.everything,
    )


def rigl_adam(learning_rate, b1, b2, eps, density, drop):
    return dynamic_sparse.rigl(
        optax.adam(learning_rate, b1, b2, eps),
        density,
        every=2,
        end=4,
        drop=drop,
        layer_budget="uniform",
        where=masks.everything,
        key=1,
    )


def evolved_sgd(learning_rate, momentum):
    return dynamic_sparse.sparse_evolution(
        optax.sgd(learning_rate, momentum),
        0.5,
        every=1,
        end=4,
        drop=lambda count: 0.5,
        where=masks.everything,
        key=1,
    )


def ac_dc_adam(learning_rate, b1, b2, eps, density):
    return ac_dc.ac_dc(
        optax.adam(learning_rate, b1, b2, eps),
        density,
        warm_up=0,
        phase=1,
        last=1,
        total_steps=3,
        where=masks.everything,
    )


def straight_adam(learning_rate, b1, b2, eps, density):
    return straight_through.straight_through(
        optax.adam(learning_rate, b1, b2, eps), density, where=masks.everything
    )


def powers(learning_rate, alpha):
    return powerpropagation.powerpropagation(
        optax.sgd(learning_rate, 0.5), alpha, where=masks.everything
    )


def ticket(learning_rate):
    """Adam on every second weight, as a mask cannot be given before the tree is."""

    def every_second(x):
        mask = np.arange(x.size).reshape(x.shape) % 2 == 0
        return jnp.ones_like(x) * mask.astype(x.dtype) > 0  # sharded as x

    def on(tree):
        mask = jax.tree.map(every_second, tree)
        base = optax.adam(learning_rate, 0.5, 0.75, 2.0**-10)
        return lottery_ticket.sparse_optimizer(base, mask)

    def update(updates, state, params=None, **extra_args):
        return on(updates).update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(lambda x: on(x).init(x), update)


def shrunk_adam(learning_rate, b1, b2, eps, density, shrink_rate):
    return pruning_aware(
        optax.adam(learning_rate, b1, b2, eps),
        density,
        shrink_rate=shrink_rate,
        where=masks.everything,
    )


def adam_at_the_pruned(learning_rate, b1, b2, eps, density, soft_threshold):
    return pruning_aware(
        optax.adamw(learning_rate, b1, b2, eps, weight_decay=0.25),
        density,
        soft_threshold=soft_threshold,
        gradient_at="pruned",
        where=masks.everything,
    )


def normalised(learning_rate, b1, b2, eps):
    return optax.chain(
        scale_by_normalised_momentum(b1, b2, eps, where=masks.everything),
        optax.scale_by_learning_rate(learning_rate),
    )


def gsm(learning_rate, compression, momentum, weight_decay):
    return sparse_momentum.gsm(
        learning_rate, compression, momentum, weight_decay, where=masks.everything
    )


DUAL = RATE | {"momentum": 0.5, "milestones": (2,), "decay": 0.5}
BALL = {"radius": 4.0, "support": 0.5}
METHODS = {
    "prox_adam": Method(
        proximal.prox_adam, ADAM | {"regulariser": LASSO}, proximal.ProxState
    ),
    "prox_adam, l1": Method(
        proximal.prox_adam,
        ADAM | {"regulariser": L1, "weight_decay": 0.25},
        proximal.ProxState,
    ),
    "proxgen": Method(prox_rms, RATE | {"relaxation": 0.5}, proximal.ProxState),
    "prox_sgd": Method(
        proximal.prox_sgd,
        RATE | {"regulariser": LASSO, "momentum": 0.5},
        proximal.ProxState,
    ),
    "rmda": Method(
        dual_averaging.rmda,
        DUAL | {"regulariser": LASSO},
        dual_averaging.DualAveragingState,
    ),
    "rmda, l1": Method(
        dual_averaging.rmda,
        DUAL | {"regulariser": L1, "growth": "stages"},
        dual_averaging.DualAveragingState,
    ),
    "ramda": Method(
        dual_averaging.ramda,
        DUAL | {"regulariser": LASSO, "eps": 2.0**-10},
        dual_averaging.DualAveragingState,
    ),
    "ramda, l1": Method(
        dual_averaging.ramda,
        DUAL | {"regulariser": L1, "eps": 2.0**-10},
        dual_averaging.DualAveragingState,
    ),
    "fw1": Method(frank_wolfe.fw1, BALL, frank_wolfe.FrankWolfeState),
    "fw2": Method(frank_wolfe.fw2, BALL | {"beta": 0.125}, frank_wolfe.FrankWolfeState),
    "conditional_gradient": Method(
        frank_wolfe.conditional_gradient,
        RATE | BALL | {"momentum": 0.5, "dampening": 0.5},
        frank_wolfe.FrankWolfeState,
    ),
    "hard thresholding": Method(
        thresholded_adam,
        ADAM | {"k": 0.5},
        hard_thresholding.IterativeHardThresholdingState,
    ),
    "gradual pruning": Method(gradual_adam, ADAM, gradual_pruning.GradualPruningState),
    "rigl": Method(
        rigl_adam,
        ADAM | {"density": 0.5, "drop": 0.75},
        dynamic_sparse.DynamicSparseState,
    ),
    "sparse_evolution": Method(
        evolved_sgd, RATE | {"momentum": 0.5}, dynamic_sparse.DynamicSparseState
    ),
    "AC/DC": Method(ac_dc_adam, ADAM | {"density": 0.75}, ac_dc.AcDcState),
    "straight-through": Method(
        straight_adam,
        ADAM | {"density": 0.25},
        straight_through.StraightThroughState,
    ),
    "powerpropagation": Method(
        powers, RATE | {"alpha": 2.0}, powerpropagation.PowerpropagationState, 4
    ),
    "gsm": Method(
        gsm,
        RATE | {"compression": 4.0, "momentum": 0.5, "weight_decay": 0.25},
        sparse_momentum.ActiveGradientsState,
    ),
    "linbreg": Method(
        bregman.linbreg,
        RATE
        | {
            "regulariser": L1,
            "momentum": 0.5,
            "adaptive": bregman.Controller(0.5, every=1),
        },
        bregman.BregmanState,
    ),
    "adabreg": Method(
        bregman.adabreg, ADAM | {"regulariser": LASSO}, bregman.BregmanState
    ),
    "lottery ticket": Method(ticket, RATE, optax.ScaleByAdamState),
    "normalised momentum": Method(normalised, ADAM, ScaleByNormalisedMomentumState, 4),
    "pruning-aware Adam": Method(
        shrunk_adam, ADAM | {"density": 0.75, "shrink_rate": 0.25}, PruningAwareState
    ),
    "pruning-aware Adam, at the pruned": Method(
        adam_at_the_pruned,
        ADAM | {"density": 0.75, "soft_threshold": 2.0**-6},
        GradientAtPrunedState,
    ),
}


def injected_and_averaged(make, settings):
    tx = optax.chain(optax.clip(0.5), optax.inject_hyperparams(make)(**settings))
    return optax.MultiSteps(optax.apply_if_finite(tx, 1), 2).gradient_transformation()


TOGETHER = {
    "donation, MultiSteps, apply_if_finite, chain, inject_hyperparams": Transform(
        run=donated, wrap=injected_and_averaged, seen=clipped, repeats=2
    ),
    # A partition masks what it is made of.
    "scan, vmap, partition": Transform(
        run=functools.partial(vmapped, run=scanned),
        wrap=TRANSFORMS["partition"].wrap,
        part=part,
    ),
}
# Those of which another of the table is nearly the same program.
ALIKE = {
    "prox_adam, l1",
    "prox_sgd",
    "rmda, l1",
    "ramda, l1",
    "fw1",
    "fw2",
    "adabreg",
    "sparse_evolution",
}
QUICK = [method for method in METHODS if method not in ALIKE]


def example(method):
    tx = METHODS[method].make(**METHODS[method].settings)
    return tx, make_tree("dict", "float32", 0), make_tree("dict", "float32", 1)
