"""The linen training state: pruned weights at +0.0 whatever the optimizer does.

It holds `PruningTrainState` to flax's `TrainState` where there are no masks, to exact
zeros and live-only norms where there are, to exact and nested counts when it prunes
again, by hand or on a schedule, and to one compilation throughout.
"""

import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("flax", minversion="0.12.7")

import flax.linen as nn
from flax.core import FrozenDict
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training.train_state import TrainState

from prunadag_optax import masks, prunadag
from prunadag_optax._common.dtypes import value_at
from prunadag_optax.linen import PruningTrainState, fine_tune
from prunadag_optax.schedules import cubic_density, one_shot_density
from tests.helpers import refused

OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.1, momentum=0.9),
    "nesterov": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adamw": lambda: optax.adamw(0.05, weight_decay=0.1),
    "lion": lambda: optax.lion(0.01, weight_decay=0.1),
    "prunadag": lambda: prunadag(0.05),
    "prunadag with momentum": lambda: prunadag(0.05, momentum=0.9),
    "clip and adam": lambda: optax.chain(
        optax.clip_by_global_norm(0.5), optax.adam(0.05)
    ),
    "MultiSteps": lambda: optax.MultiSteps(optax.adamw(0.05, weight_decay=0.1), 4),
}
# Those of which another is a special case are slow.
OFTEN_AND_RARE = [
    pytest.param(
        name,
        marks=pytest.mark.slow if name in ("nesterov", "lion", "prunadag") else (),
    )
    for name in OPTIMIZERS
]
KERNELS = 8 * 6 + 6 * 2


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.tanh(nn.Dense(6)(x)))


X = jnp.asarray(np.random.default_rng(0).normal(size=(16, 8)), jnp.float32)
Y = jnp.stack([jnp.sin(X.sum(1)), X[:, 0] * X[:, 1]], axis=1)


def loss(params, batch=(X, Y)):
    x, y = batch
    return jnp.mean((Net().apply({"params": params}, x) - y) ** 2)


def kernels(path, leaf):
    del path
    return leaf.ndim > 1


@pytest.fixture(scope="module")
def params():
    return Net().init(jax.random.key(0), X)["params"]


def vector(seed=0, size=10):
    return jnp.asarray(np.random.default_rng(seed).normal(size=size), jnp.float32)


def make(params, tx=None, cls=PruningTrainState, **kwargs):
    tx = optax.sgd(0.1, momentum=0.9) if tx is None else tx
    return cls.create(apply_fn=None, params=params, tx=tx, **kwargs)


def train_step(state):
    return state.apply_gradients(grads=jax.grad(loss)(state.params))


def counted(function, **options):
    """The function jitted, and a list with one entry for each time it was traced."""
    traces = []

    def call(state):
        traces.append(None)
        return function(state)

    return jax.jit(call, **options), traces


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def pruned_values(state):
    """The weights that the masks leave out."""
    values = jax.tree.map(
        lambda keep, x: np.asarray(x)[~np.asarray(keep)],
        state.masks,
        masks_only(state.params, state.masks),
    )
    return flat(values)


def masks_only(tree, mask):
    def none(leaf):
        return leaf is None

    return jax.tree.map(
        lambda keep, x: None if keep is None else x, mask, tree, is_leaf=none
    )


def assert_pruned(state, count):
    """So many weights are pruned and every bit of them is 0, as of +0.0 only."""
    values = pruned_values(state)
    assert values.size == count
    np.testing.assert_array_equal(values.view(np.uint32), 0)


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


# Zeros.


@pytest.mark.parametrize("name", OFTEN_AND_RARE)
def test_pruned_weights_stay_zero(params, name):
    step, traces = counted(train_step, donate_argnums=0)
    state = make(jax.tree.map(jnp.copy, params), OPTIMIZERS[name]()).prune(
        0.0, where=kernels
    )
    # Momentum builds up in what is to be pruned.
    for _ in range(10):
        state = step(state)
    assert (flat(masks_only(state.params, state.masks)) != 0).all()
    state = state.prune(0.5)
    start = jax.tree.map(jnp.copy, state.params)
    for _ in range(100):
        state = step(state)
    assert_pruned(state, KERNELS // 2)
    assert len(traces) == 1
    assert state.step == 110
    assert np.isfinite(flat(state.params)).all()
    keep = flat(state.masks)
    before, after = (flat(masks_only(p, state.masks)) for p in (start, state.params))
    assert (before != after)[keep].mean() > 0.25
    assert loss(state.params) < loss(start)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -1.0])
def test_gradients_of_pruned_weights_are_not_looked_at(bad):
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1))
    state = make(jnp.array([4.0, -0.1, -3.0, 0.2]), tx).prune(0.5)
    grads = jnp.array([1.0, bad, 2.0, bad])
    spoiled = state.apply_gradients(grads=grads)
    clean = state.apply_gradients(grads=grads.at[jnp.array([1, 3])].set(0.0))
    assert_equal(spoiled.params, clean.params)
    assert_equal(spoiled.opt_state, clean.opt_state)
    assert_pruned(spoiled, 2)


def test_clipping_norm_is_that_of_the_live_weights():
    x, g = vector(0), 10 * vector(1)
    state = make(x, optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0)))
    state = state.prune(0.5)
    moved = state.apply_gradients(grads=g)
    keep = np.asarray(state.masks)
    live = np.asarray(g, np.float64)[keep]
    expected = np.asarray(x, np.float64)[keep] - live / np.linalg.norm(live)
    np.testing.assert_allclose(np.asarray(moved.params)[keep], expected, rtol=1e-5)
    assert_pruned(moved, 5)


def test_moments_of_pruned_weights_are_zero_and_change_no_live_weight():
    grads = [vector(seed) for seed in range(1, 9)]

    def run(spoil):
        state = make(vector(), optax.adam(0.1))
        for g in grads[:3]:
            state = state.apply_gradients(grads=g)
        state = state.prune(0.3)
        for g in grads[3:6]:
            state = state.apply_gradients(grads=jnp.where(state.masks, g, spoil))
        state = state.prune(0.6)
        for g in grads[6:]:
            state = state.apply_gradients(grads=jnp.where(state.masks, g, spoil))
        return state

    state, spoiled = run(0.0), run(1e6)
    assert_equal(state.params, spoiled.params)
    assert_equal(state.opt_state, spoiled.opt_state)
    assert_pruned(state, 6)
    for moment in (state.opt_state[0].mu, state.opt_state[0].nu):
        np.testing.assert_array_equal(moment == 0, ~np.asarray(state.masks))


def test_one_compilation_over_steps_and_masks(params):
    step, traces = counted(train_step)
    state = make(params, optax.adamw(0.01)).prune(0.0, where=kernels)
    for sparsity in (0.1, 0.5, 0.5, 0.95, 1.0):
        for _ in range(3):
            state = step(state)
        state = state.prune(sparsity)
    state = step(state)
    assert_pruned(state, KERNELS)
    assert len(traces) == 1


# What apply_gradients takes.


def scale_by_value():
    """Steps of the size of `value`, recorded in the state; other arguments too."""

    def update(updates, state, params=None, *, value, other=0.0, **extra_args):
        del state, params, extra_args
        return jax.tree.map(lambda g: -value * g, updates), jnp.array([value, other])

    return optax.GradientTransformationExtraArgs(lambda params: jnp.zeros(2), update)


class BatchStatsState(PruningTrainState):
    batch_stats: Any = None


@pytest.mark.parametrize("sparsity", [None, 0.5])
def test_extra_arguments_go_to_the_optimizer(sparsity):
    state = make(jnp.array([1.0, 2.0]), scale_by_value(), BatchStatsState)
    state = state if sparsity is None else state.prune(sparsity)

    @jax.jit
    def step(state, value):
        return state.apply_gradients(
            grads=jnp.ones(2), value=value, batch_stats={"mean": value}, unknown=1
        )

    state = step(state, 0.25)
    assert state.params.tolist() == [0.75 if sparsity is None else 0.0, 1.75]
    assert state.opt_state.tolist() == [0.25, 0.0]
    assert state.batch_stats == {"mean": 0.25}
    state = state.apply_gradients(grads=jnp.ones(2), value=0.5, other=7.0)
    assert state.opt_state.tolist() == [0.5, 7.0]
    assert state.batch_stats == {"mean": 0.25}
    assert state.step == 2


def test_extra_arguments_go_through_multi_steps():
    state = make(jnp.array([1.0, 2.0]), optax.MultiSteps(scale_by_value(), 2))
    state = state.prune(0.5)
    for _ in range(2):
        state = state.apply_gradients(grads=jnp.ones(2), value=0.25)
    assert state.params.tolist() == [0.0, 1.75]


def test_a_plain_transformation_ignores_extra_arguments():
    plain = optax.GradientTransformation(
        lambda params: optax.EmptyState(),
        lambda updates, state, params=None: (
            jax.tree.map(jnp.negative, updates),
            state,
        ),
    )
    state = make(jnp.array([1.0, 2.0]), plain, BatchStatsState).prune(0.5)
    state = state.apply_gradients(
        grads=jnp.ones(2), value=3.0, anything="else", batch_stats=1
    )
    assert state.params.tolist() == [0.0, 1.0]
    assert state.batch_stats == 1


def test_masks_can_be_replaced_as_a_field():
    state = make(jnp.array([1.0, 2.0])).prune(0.5)
    state = state.apply_gradients(grads=jnp.ones(2), masks=jnp.array([False, False]))
    assert state.apply_gradients(grads=jnp.ones(2)).params.tolist() == [0.0, 0.0]


# flax's own state.


@pytest.mark.parametrize("name", OFTEN_AND_RARE)
def test_without_masks_it_is_flax_train_state(params, name):
    tx = OPTIMIZERS[name]()
    step = jax.jit(train_step)
    ours, theirs = make(params, tx), make(params, tx, TrainState)
    for _ in range(3):
        ours, theirs = step(ours), step(theirs)
    for part in ("step", "params", "opt_state"):
        assert_equal(getattr(ours, part), getattr(theirs, part))
    assert ours.masks is None
    assert ours.sparsity() == 0
    assert_equal(ours.finalised(), ours.params)


@pytest.mark.parametrize(
    "tree",
    [{"w": vector()}, FrozenDict({"w": vector()}), [vector(), vector(1)], vector()],
    ids=["dict", "FrozenDict", "list", "array"],
)
def test_any_tree_of_parameters(tree):
    size = flat(tree).size
    state = make(tree).prune(0.5, where=masks.everything)
    state = jax.jit(lambda s: s.apply_gradients(grads=s.params))(state)
    assert jax.tree.structure(state.params) == jax.tree.structure(tree)
    assert_pruned(state, size // 2)


def fp8_params():
    return {
        "params": {"kernel": jnp.arange(1.0, 7.0).reshape(3, 2), "bias": jnp.ones(2)},
        OVERWRITE_WITH_GRADIENT: {"scale": jnp.full(1, 0.5), "amax": jnp.zeros(4)},
    }


def fp8_grads(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), fp8_params()
    )


def test_fp8_parameters_are_overwritten_as_by_flax():
    ours = make(fp8_params(), optax.adam(0.1))
    theirs = make(fp8_params(), optax.adam(0.1), TrainState)
    for seed in range(3):
        grads = fp8_grads(seed)
        ours = ours.apply_gradients(grads=grads)
        theirs = theirs.apply_gradients(grads=grads)
        assert_equal(ours.params, theirs.params)
        assert_equal(ours.opt_state, theirs.opt_state)


def test_fp8_parameters_are_never_pruned():
    state = make(fp8_params(), optax.adam(0.1)).prune(0.5, where=kernels)
    step = jax.jit(lambda state, grads: state.apply_gradients(grads=grads))
    for seed in range(3):
        grads = fp8_grads(seed)
        state = step(state, grads)
        owned = state.params[OVERWRITE_WITH_GRADIENT]
        assert_equal(owned, grads[OVERWRITE_WITH_GRADIENT])
        assert_equal(state.finalised()[OVERWRITE_WITH_GRADIENT], owned)
        assert int((state.params["params"]["kernel"] == 0).sum()) == 3
    assert jax.tree.structure(state.masks) == jax.tree.structure(
        {"kernel": 0, "bias": None}
    )
    everything = make(fp8_params()).prune(1.0, where=masks.everything)
    assert_equal(flat(everything.params["params"]), 0)
    assert_equal(
        everything.params[OVERWRITE_WITH_GRADIENT],
        fp8_params()[OVERWRITE_WITH_GRADIENT],
    )
    scheduled = make(fp8_params()).prune_on_schedule(one_shot_density(0.5, step=0))
    assert_equal(scheduled.params, make(fp8_params()).prune(0.5).params)


def test_curve_leaves_fp8_parameters_alone():
    owned = fp8_params()[OVERWRITE_WITH_GRADIENT]
    seen = []

    def metric(params):
        seen.append(params[OVERWRITE_WITH_GRADIENT])
        return (flat(params["params"]) == 0).sum()

    curve = make(fp8_params()).curve(metric, [0.5, 1.0], where=masks.everything)
    for params in seen:
        assert_equal(params, owned)
    assert curve.values["metric"] == (4, 8)


# Pruning, and pruning again.


def test_previously_pruned_stay_pruned():
    state = make(jnp.array([5.0, 0.1, 4.0, 0.2, 3.0, 2.0, 1.0, 6.0])).prune(0.25)
    gone = ~np.asarray(state.masks)
    assert gone.tolist() == [False, True, False, True, False, False, False, False]
    # A live weight is exactly zero now, others are tiny, and one is subnormal.
    live = jnp.array([0.0, 0.0, 1e-40, 0.0, -0.0, 1e-20, 1.0, 6.0])
    state = state.replace(params=live)
    for sparsity, expected in [
        (0.25, [1, 3]),
        (0.375, [0, 1, 3]),
        (0.5, [0, 1, 3, 4]),
        (0.625, [0, 1, 2, 3, 4]),
        (0.75, [0, 1, 2, 3, 4, 5]),
        (1.0, list(range(8))),
    ]:
        state = state.prune(sparsity)
        assert np.flatnonzero(~np.asarray(state.masks)).tolist() == expected
        assert_pruned(state, len(expected))
        assert state.sparsity() == sparsity


def test_pruned_again_where_live_weights_are_smaller():
    # What is pruned stays so even where its values were put back from elsewhere.
    state = make(jnp.array([1.0, 2.0, 3.0, 4.0])).prune(0.5)
    state = state.replace(params=jnp.array([9.0, 9.0, 3.0, 4.0])).prune(0.75)
    assert state.masks.tolist() == [False, False, False, True]
    assert state.params.tolist() == [0.0, 0.0, 0.0, 4.0]


@pytest.mark.parametrize("lower", [0.0, 0.3, 0.49])
def test_lower_sparsity_is_an_error(lower):
    state = make(vector(size=100)).prune(0.5)
    with pytest.raises(ValueError, match=r"at least 0\.5, what is pruned.*checkpoint"):
        state.prune(lower)
    assert_pruned(state, 50)


@pytest.mark.parametrize("scope", ["global", "leaf"])
@pytest.mark.parametrize("sizes", [(3, 3), (5, 3, 1), (7,), (1, 1, 1)])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_the_same_sparsity_again_changes_nothing(sparsity, sizes, scope):
    once = make([vector(i, size) for i, size in enumerate(sizes)])
    once = once.prune(sparsity, scope=scope, where=masks.everything)
    twice = once.prune(sparsity, scope=scope)
    assert_equal(twice.masks, once.masks)


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("sparsity", [-0.1, 1.1, float("nan"), "half", True, None])
def test_sparsity_out_of_range(sparsity, held):
    state = make(vector())
    state = state.prune(0.0) if held else state
    with pytest.raises(ValueError, match="sparsity must be a finite number >= 0 and"):
        state.prune(sparsity)


def test_unknown_scope():
    with pytest.raises(ValueError, match="scope must be 'global', 'leaf' or a func"):
        make(vector()).prune(0.5, scope="layer")


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({"w": jnp.ones(3, bool)}, r"mask\['w'\] must have the shape \(4,\)"),
        ({"w": jnp.ones(4)}, r"mask\['w'\] must be bool"),
        ({"v": jnp.ones(4, bool)}, "mask must have the tree structure of params"),
        (jnp.ones(4, bool), "mask must have the tree structure of params"),
    ],
)
def test_masks_that_do_not_fit_at_create(mask, message):
    with pytest.raises(ValueError, match=message):
        make({"w": vector(size=4)}, masks=mask)


def test_create_with_masks_prunes():
    pruned, mask = masks.prune(vector(), 0.5)
    state = make(vector(), masks=mask)
    assert_pruned(state, 5)
    assert_equal(state.params, pruned)
    state = make([vector(), vector(1)], masks=[None, mask])
    assert_equal(state.params[0], vector())
    assert_pruned(state, 5)


def test_where_sticks(params):
    state = make(params).prune(0.3, where=kernels).prune(0.9)
    assert all(layer["bias"] is None for layer in state.masks.values())
    assert_pruned(state, round(0.9 * KERNELS))
    np.testing.assert_allclose(float(state.sparsity()), 0.9)
    # A leaf that held its mask keeps it when others are pruned.
    first = make([vector(0), vector(1)]).prune(
        0.5, where=lambda path, x: path[0].idx < 1
    )
    both = first.prune(0.5, where=lambda path, x: path[0].idx == 1)
    assert_equal(both.masks[0], first.masks[0])
    assert_pruned(both, 10)


def test_lower_is_lower_than_what_the_chosen_leaves_have_pruned():
    def chosen(i):
        return lambda path, leaf: path[0].idx == i

    first = make([vector(0), vector(1)]).prune(0.5, where=chosen(0))
    # Nothing of the other leaf is pruned yet.
    both = first.prune(0.2, where=chosen(1))
    assert_pruned(both, 7)
    with pytest.raises(ValueError, match=r"at least 0\.5, what is pruned already"):
        both.prune(0.4, where=chosen(0))


def test_scope_leaf_counts_each_leaf(params):
    state = make(params).prune(0.5, scope="leaf", where=masks.everything)
    counts = jax.tree.map(lambda keep: int((~keep).sum()), state.masks)
    assert counts == jax.tree.map(lambda x: round(0.5 * x.size), params)


# On a schedule.

SCHEDULES = {
    "cubic": (cubic_density(0.1, begin=3, end=18), 1),
    "cubic, every 5": (cubic_density(0.1, begin=3, end=18, initial=0.8), 5),
    "one-shot": (one_shot_density(0.5, step=7), 1),
    "one-shot, every 5": (one_shot_density(0.5, step=7), 5),
    "rising": (lambda count: 1 - 0.8 * (0.5 ** (count / 4)), 1),
    "a number": (0.3, 5),
}
# Where a schedule comes to its last value the masks do, too.
ENDS = {"cubic, every 5": 18, "one-shot, every 5": 7}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_is_followed_exactly(params, name):
    density, every = SCHEDULES[name]

    def step_and_prune(state):
        return train_step(state).prune_on_schedule(density, every=every)

    step, traces = counted(step_and_prune)
    state = make(params, optax.adam(0.01)).prune(0.0, where=kernels)
    expected, kept = 0, flat(state.masks)
    for count in range(1, 22):
        state = step(state)
        if count % every == 0 or count == ENDS.get(name):
            share = float(value_at(density, count))
            expected = max(expected, KERNELS - round(share * KERNELS))
        assert_pruned(state, expected)
        np.testing.assert_allclose(float(state.sparsity()), expected / KERNELS, 1e-6)
        assert not (flat(state.masks) & ~kept).any()
        kept = flat(state.masks)
    assert expected > 0
    assert len(traces) == 1


@pytest.mark.parametrize("scope", ["global", "leaf"])
def test_schedule_equals_pruning_by_hand(params, scope):
    def density(count):
        return 1 - jnp.asarray(count) / 10

    @jax.jit
    def follow(state):
        return train_step(state).prune_on_schedule(density, scope=scope)

    @jax.jit
    def prune(state, sparsity):
        return train_step(state).prune(sparsity, scope=scope)

    scheduled = by_hand = make(params).prune(0.0)
    for count in range(1, 4):
        scheduled = follow(scheduled)
        by_hand = prune(by_hand, jnp.asarray(count) / 10)
        assert_equal(scheduled.masks, by_hand.masks)
        assert_equal(scheduled.params, by_hand.params)


def test_schedule_without_masks_makes_them(params):
    state = make(params).prune_on_schedule(lambda count: 0.5, where=kernels)
    assert_pruned(state, KERNELS // 2)


def test_schedule_for_leaves_without_masks_is_an_error(params):
    state = make(params).prune(0.0, where=kernels)
    with pytest.raises(ValueError, match="where must choose"):
        jax.jit(
            lambda s: s.prune_on_schedule(lambda count: 0.5, where=masks.everything)
        )(state)


@pytest.mark.parametrize("every", [0, -1, "often"])
def test_every_out_of_range(every):
    with pytest.raises(ValueError, match="every must be an integer >= 1"):
        make(vector()).prune_on_schedule(lambda count: 0.5, every=every)


# Fine-tuning, curve, shipping.


@pytest.mark.parametrize("progress", [False, True])
def test_fine_tune_lowers_the_loss_and_keeps_zeros(params, progress):
    state = make(params, optax.adam(0.02)).prune(0.6, where=kernels)
    tuned, losses = fine_tune(state, loss, [(X, Y)] * 40, progress=progress)
    assert losses.shape == (40,)
    np.testing.assert_allclose(losses[0], loss(state.params), rtol=1e-6)
    assert losses[-1] < 0.7 * losses[0]
    assert_pruned(tuned, round(0.6 * KERNELS))
    assert_equal(tuned.masks, state.masks)
    assert tuned.step == 40


def test_fine_tune_takes_no_batches_and_any_iterable(params):
    state = make(params).prune(0.5)
    same, losses = fine_tune(state, loss, [])
    assert losses.shape == (0,)
    assert_equal(same.params, state.params)
    _, losses = fine_tune(state, loss, ((X, Y) for _ in range(3)))
    assert losses.shape == (3,)


def test_fine_tune_needs_masks(params):
    with pytest.raises(ValueError, match=r"no masks; call state\.prune\(sparsity\)"):
        fine_tune(make(params), loss, [(X, Y)])


def test_curve_is_that_of_the_parameters(params):
    state = make(params).prune(0.5, where=kernels)
    curve = state.curve(
        lambda p: {"zeros": (flat(p) == 0).sum(), "loss": loss(p)},
        [0.0, 0.5, 0.9],
        where=kernels,
        progress=False,
    )
    held = int((flat(state.params) == 0).sum())
    assert curve.values["zeros"][:2] == (held, held)
    assert curve.values["loss"][1] == loss(state.params).item()
    assert curve.values["loss"][2] == loss(masks.prune(params, 0.9, where=kernels)[0])


def test_finalised_is_plain_and_positive_zero(params):
    state = make(params).prune(0.5, where=kernels)
    # As a checkpoint may bring them.
    signed = jax.tree.map(lambda x: jnp.where(x == 0, -0.0, x), state.params)
    shipped = state.replace(params=signed).finalised()
    assert jax.tree.structure(shipped) == jax.tree.structure(params)
    assert_pruned(state.replace(params=shipped), KERNELS // 2)
    assert_equal(state.replace(params=shipped).finalised(), shipped)


@pytest.mark.parametrize("module", ["linen", "nnx"])
def test_without_flax(module):
    code = f"""
import sys
sys.modules["flax"] = None
import prunadag_optax.masks, prunadag_optax.evaluation
try:
    import prunadag_optax.{module}
except ImportError as error:
    print(error)
"""
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == (
        f"prunadag_optax.{module} needs flax: pip install 'prunadag_optax[flax]'."
    )


# Mistakes.


MISTAKES = {
    "a module": (
        lambda: make(nn.Dense(2)),
        ("params must be a pytree of parameters", "linen module Dense", "model.init"),
    ),
    "a TrainState": (
        lambda: make(TrainState.create(apply_fn=None, params=X, tx=optax.sgd(0.1))),
        ("params must be a pytree of parameters", "TrainState", "state.params"),
    ),
    "lookahead": (
        lambda: make(optax.LookaheadParams.init_synced({"w": X})),
        ("params must be", "LookaheadParams", "params.slow", "init_synced(pruned)"),
    ),
    "tx without init": (
        lambda: make(X, tx=lambda grads: grads),
        ("tx must be an optax transformation", "optax.adam(1e-3)"),
    ),
    "flax's state to fine-tune": (
        lambda: fine_tune(make(X, cls=TrainState), loss, []),
        ("state must be a prunadag_optax.linen.PruningTrainState", "TrainState"),
    ),
    "a module to masks.prune": (
        lambda: masks.prune(Net(), 0.5),
        ("params must be a pytree of parameters", "linen module Net"),
    ),
    "a state to masks.prune": (
        lambda: masks.prune(make(X), 0.5),
        ("params must be a pytree of parameters", "state.prune(sparsity)"),
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name):
    call, parts = MISTAKES[name]
    with refused(*parts) as caught:
        call()
    assert len(str(caught.value)) < 500
