"""`prunadag_w` and the methods: in every way to run, sharded, and with bad input.

One table of methods goes through the tests that prunAdag goes through. What a method
computes is tested in the file of its module; here it only has to be the same in every
way to run it, on every kind of tree, in every dtype and on several devices.
"""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from prunadag_optax import ScaleByPrunadagWState, prunadag_w
from prunadag_optax._common.checks import NO_PARAMS_MSG
from prunadag_optax.methods import (
    bregman,
    dual_averaging,
    frank_wolfe,
    gradual_pruning,
    hard_thresholding,
    lottery_ticket,
    proximal,
    sparse_momentum,
)
from tests import test_sharding as sharding
from tests.precision import enable_x64
from tests.test_sweep import (
    TRANSFORMS,
    TREES,
    Method,
    Transform,
    clipped,
    donated,
    make_tree,
    part,
    scanned,
    sweep,
    vmapped,
)

# Numbers that every dtype holds exactly, as in the sweep of prunAdag. Kernels and
# biases are regularised, so that all leaves of all trees are; groups are numbered by
# the first axis.


def everywhere(path, leaf):
    del path, leaf
    return True


L1 = proximal.l1(0.25, where=everywhere)


def first_axis(path, leaf):
    del path
    return 0 if leaf.ndim else ()


LASSO = proximal.group_lasso(0.25, first_axis)
MCP = proximal.group_mcp(0.25, 4.0, first_axis)
RATE = {"learning_rate": 0.125}
ADAM = RATE | {"b1": 0.5, "b2": 0.75, "eps": 2.0**-10}


def thresholded_adam(learning_rate, b1, b2, eps, k):
    base = optax.adam(learning_rate, b1, b2, eps)
    return hard_thresholding.iterative_hard_thresholding(base, k)


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
    return gradual_pruning.gradual_pruning(
        optax.adam(learning_rate, b1, b2, eps),
        gradual_pruning.cubic_sparsity(0.75, begin=0, end=2),
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


def shrunk_adam(learning_rate, b1, b2, eps, relevant, decrease_schedule):
    return prunadag_w(
        learning_rate, relevant, b1=b1, b2=b2, eps=eps, where=everywhere,
        decrease_schedule=decrease_schedule,
    )  # fmt: skip


def adam_at_the_relevant(learning_rate, b1, b2, eps, relevant, weight_decay, l1):
    return prunadag_w(
        learning_rate, relevant, b1=b1, b2=b2, eps=eps, where=everywhere,
        weight_decay=weight_decay, l1=l1, evaluate="relevant",
    )  # fmt: skip


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
    "frank_wolfe": Method(
        frank_wolfe.frank_wolfe,
        RATE | BALL | {"momentum": 0.5, "dampening": 0.5},
        frank_wolfe.FrankWolfeState,
    ),
    "hard thresholding": Method(
        thresholded_adam,
        ADAM | {"k": 0.5},
        hard_thresholding.IterativeHardThresholdingState,
    ),
    "gradual pruning": Method(gradual_adam, ADAM, gradual_pruning.GradualPruningState),
    "gsm": Method(
        sparse_momentum.gsm,
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
    "prunadag_w": Method(
        shrunk_adam,
        ADAM | {"relevant": 0.75, "decrease_schedule": 0.25},
        ScaleByPrunadagWState,
    ),
    "prunadag_w, at the relevant": Method(
        adam_at_the_relevant,
        ADAM | {"relevant": 0.75, "weight_decay": 0.25, "l1": 0.125},
        ScaleByPrunadagWState,
    ),
}
DTYPES = ["float16", "bfloat16", "float32", "float64"]


# The sweep. Most of a cell's time is the compilation of one program, so the quick part
# puts several wrappers around a method at once; the product of all is slow.


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
}
QUICK = [method for method in METHODS if method not in ALIKE]


def diagonal():
    """Each method in each of these, with trees and dtypes taking turns."""
    trees = [tree for tree in TREES if tree != "empty"]
    for i, method in enumerate(QUICK):
        for j, name in enumerate(TOGETHER):
            tree, dtype = trees[(i + 4 * j) % len(trees)], DTYPES[(i + i // 4 + j) % 4]
            # What optax cannot do; see `test_sweep_of_methods`.
            if "inject" in name and tree == "mixed dtypes":
                tree = "dict"
            yield method, name, tree, dtype


@pytest.mark.parametrize(("method", "name", "tree", "dtype"), list(diagonal()))
def test_diagonal_of_methods(method, name, tree, dtype):
    sweep(METHODS[method], TOGETHER[name], tree, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TRANSFORMS | TOGETHER)
@pytest.mark.parametrize("method", METHODS)
def test_sweep_of_methods(method, name, dtype):
    for tree in TREES:
        if "inject" in name and tree == "mixed dtypes":
            # optax knows no highest dtype of float16 and bfloat16, and its momenta
            # widen to the dtype of the injected numbers.
            continue
        sweep(METHODS[method], (TRANSFORMS | TOGETHER)[name], tree, dtype)


# Citizens of optax.

each_method = pytest.mark.parametrize("method", METHODS)


def example(method):
    tx = METHODS[method].make(**METHODS[method].settings)
    return tx, make_tree("dict", "float32", 0), make_tree("dict", "float32", 1)


@each_method
def test_the_state_shares_no_buffer(method):
    # Donated with the parameters, it may hold nothing twice, and nothing of theirs.
    make, settings, *_ = METHODS[method]
    params = make_tree("dict", "float32", 0)
    state = optax.inject_hyperparams(make)(**settings).init(params)
    buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((params, state))]
    assert len(set(buffers)) == len(buffers)


@pytest.mark.parametrize("method", QUICK)
def test_nan_gradients_flow_and_extra_arguments_do_nothing(method):
    tx, params, gradients = example(method)
    state = tx.init(params)
    jax.tree.map(
        np.testing.assert_array_equal,
        tx.update(gradients, state, params, value=1.0, grad=params, anything="else"),
        tx.update(gradients, state, params),
    )
    # Of the ticket a weight that is kept.
    bad = {**gradients, "kernel": gradients["kernel"].at[2, 2].set(jnp.nan)}
    updates, after = tx.update(bad, state, params)
    assert jnp.isnan(updates["kernel"][2, 2])
    # A step later the parameter is NaN, if nothing else.
    params = optax.apply_updates(params, updates)
    updates, _ = tx.update(gradients, after, params)
    assert jnp.isnan(optax.apply_updates(params, updates)["kernel"][2, 2])


@each_method
def test_what_is_refused(method):
    tx, params, gradients = example(method)
    with pytest.raises(ValueError, match=re.escape(NO_PARAMS_MSG)):
        tx.update(gradients, tx.init(params))
    if method == "lottery ticket":
        return  # takes what its base takes
    bad = {**params, "kernel": params["kernel"] + 1j}
    with pytest.raises(ValueError, match=r"params\['kernel'\] has dtype complex64"):
        tx.init(bad)
    with pytest.raises(ValueError, match=r"params\['kernel'\] has dtype complex64"):
        tx.update(gradients, tx.init(params), bad)
    with pytest.raises(ValueError, match=r"updates\['kernel'\] has dtype complex64"):
        tx.update(bad, tx.init(params), params)


# Sharded programs.

needs_devices = sharding.pytestmark
# What a step moves between devices: nothing where every weight is updated by itself;
# scalars where all are ranked, counted or measured together; and for groups that extend
# over several devices a number for each of them, in every step of Newton's method.
NOTHING = {"prox_adam, l1", "rmda, l1", "ramda, l1", "lottery ticket"}
GROUPED = {"prox_adam", "proxgen", "prox_sgd", "rmda", "ramda", "adabreg"}


def on_meshes(kind, methods):
    """All cases, and slow all but FSDP on a mesh of that kind for these methods.

    In that layout groups extend over devices.
    """
    cases = itertools.product(
        METHODS, sharding.LAYOUTS, (AxisType.Auto, AxisType.Explicit)
    )
    return pytest.mark.parametrize(
        ("method", "layout", "kind"),
        [
            pytest.param(*case, marks=() if quick else pytest.mark.slow)
            for case in cases
            for quick in [case[0] in methods and case[1:] == ("fsdp", kind)]
        ],
        ids=str,
    )


@functools.cache
def on_one_device(method, layout):
    tx = METHODS[method].make(**METHODS[method].settings)
    params, *gradients = (
        jax.tree.map(
            np.float64,
            sharding.drawn(layout.shapes(64), seed, sharding.normal),
        )
        for seed in range(4)
    )
    # Gradients with which some weights and some groups, but not all, become zero.
    gradients = [jax.tree.map(lambda g: 16 * g, tree) for tree in gradients]
    start = params, gradients
    result = sharding.updates_of(tx, params, tx.init(params), gradients)
    return tx, start, jax.device_get(result)


@needs_devices
@on_meshes(AxisType.Explicit, ["ramda", "gsm"])
def test_methods_give_what_one_device_gives(method, layout, kind):
    # In float64, where no rounding brings a weight across a threshold.
    layout = sharding.LAYOUTS[layout]
    mesh = layout.mesh(kind)
    shardings, _ = layout.shardings(mesh, 64)
    with enable_x64():
        tx, (params, gradients), expected = on_one_device(method, layout)
        with jax.set_mesh(mesh):
            params = jax.device_put(params, shardings)
            gradients = [jax.device_put(g, shardings) for g in gradients]
            result = sharding.updates_of(tx, params, tx.init(params), gradients)
    updates, moved, _ = result
    sharding.assert_placed((updates, moved), (len(updates) * [shardings], shardings))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12),
        jax.device_get(result),
        expected,
    )


@needs_devices
@on_meshes(AxisType.Auto, QUICK)
def test_what_methods_move(method, layout, kind):
    layout = sharding.LAYOUTS[layout]
    mesh = layout.mesh(kind)
    tx = METHODS[method].make(**METHODS[method].settings)
    with jax.set_mesh(mesh):
        params, _ = sharding.abstract(layout, mesh, sharding.WIDTH)
        state = sharding.state_of(tx, params, mesh)
        found = sharding.compiled(tx.update, params, state, params)
    if method in NOTHING:
        assert not found
    elif method in GROUPED:
        # A float for each row of a kernel.
        assert max(size for _, size in found) == 4 * sharding.WIDTH
    else:
        assert max(size for _, size in found) < sharding.SMALL
