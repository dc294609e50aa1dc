"""Flax nnx: prunAdag on nnx trees, and the masks held beside a model.

`PruningMasks` is held to exact zeros under `nnx.jit` whatever the optimizer and the
filter select, to leave everything else of the model alone, to survive `nnx.split` and
`nnx.merge`, to compile once, and to the numbers of the linen state.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("flax", minversion="0.12.7")

import flax.linen as nn
from flax import nnx

from prunadag_optax import masks, prunadag
from prunadag_optax.linen import PruningTrainState
from prunadag_optax.nnx import PruningMask, PruningMasks, prune
from prunadag_optax.schedules import cubic_density, one_shot_density
from tests.helpers import assert_close, jitted, refused

OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.1, momentum=0.9),
    "adamw": lambda: optax.adamw(0.05, weight_decay=0.1),
    "lion": lambda: optax.lion(0.01, weight_decay=0.1),
    "prunadag": lambda: prunadag(0.05),
    "clip and adam": lambda: optax.chain(
        optax.clip_by_global_norm(0.5), optax.adam(0.05)
    ),
}
KERNELS = nnx.All(nnx.Param, nnx.PathContains("kernel"))
COUNT = 3 * 16 + 16


class Model(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(3, 16, rngs=rngs)
        self.out = nnx.Linear(16, 1, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.tanh(self.hidden(x)))


class Normalised(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(3, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.out = nnx.Linear(16, 1, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.norm(self.hidden(x))))


def squared_error(model):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(32, 3)), jnp.float32)
    return jnp.mean((model(x) - jnp.sin(x.sum(axis=1, keepdims=True))) ** 2)


def kernels(path, leaf):
    del path
    return leaf.ndim > 1


def setup(tx=None, wrt=nnx.Param, cls=Model):
    model = cls(nnx.Rngs(0))
    tx = optax.sgd(0.1, momentum=0.9) if tx is None else tx
    return model, nnx.Optimizer(model, tx, wrt=wrt)


def stepper(after=lambda model, optimizer, pruning: None, wrt=nnx.Param):
    """A compiled training step, and a list with one entry for each trace of it."""
    traces = []

    @nnx.jit
    def step(model, optimizer, pruning):
        traces.append(None)
        argnums = nnx.DiffState(0, wrt)
        loss, grads = nnx.value_and_grad(squared_error, argnums=argnums)(model)
        pruning.update(optimizer, model, grads)
        after(model, optimizer, pruning)
        return loss

    return step, traces


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def pure(model, wrt=nnx.Param):
    return nnx.to_pure_dict(nnx.state(model, wrt))


def kernel_values(model):
    return flat([model.hidden.kernel[...], model.out.kernel[...]])


def assert_pruned(model, pruning, count):
    """So many weights are pruned and every bit of them is 0, as of +0.0 only."""
    flat_masks = nnx.to_flat_state(pruning.masks)
    held = {path: m[...] for path, m in flat_masks if m is not None}
    values = nnx.to_flat_state(nnx.state(model, pruning.wrt))
    gone = [np.asarray(v[...])[~held[path]] for path, v in values if path in held]
    gone = np.concatenate(gone)
    assert gone.size == count
    np.testing.assert_array_equal(gone.view(np.uint32), 0)


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


# prunAdag on nnx trees.


def test_nnx_optimizer_lowers_the_loss():
    model, optimizer = setup(prunadag(0.05))

    @nnx.jit
    def step(model, optimizer):
        loss, gradients = nnx.value_and_grad(squared_error)(model)
        optimizer.update(model, gradients)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(30)]
    assert losses[-1] < losses[0] / 2


def test_nnx_state_is_a_tree_like_any_other():
    graph, variables = nnx.split(Model(nnx.Rngs(0)), nnx.Param)
    gradients = jax.grad(lambda v: squared_error(nnx.merge(graph, v)))(variables)
    plain, plain_gradients = nnx.to_pure_dict(variables), nnx.to_pure_dict(gradients)
    moved, _, _ = jitted(prunadag(0.5), variables, [gradients] * 5)
    expected, _, _ = jitted(prunadag(0.5), plain, [plain_gradients] * 5)
    assert isinstance(moved, nnx.State)
    assert_close(nnx.to_pure_dict(moved), expected)


# Zeros.


@pytest.mark.parametrize(
    ("name", "wrt"),
    # What is trained has next to nothing to do with the optimizer.
    [
        pytest.param(
            name,
            wrt,
            id=f"{name}-{'Param' if wrt is nnx.Param else 'kernels'}",
            marks=() if name == "prunadag" or wrt is nnx.Param else pytest.mark.slow,
        )
        for name in OPTIMIZERS
        for wrt in (nnx.Param, KERNELS)
    ],
)
def test_pruned_weights_stay_zero(name, wrt):
    # The optimizer's filter is broader than that of the masks in half of these.
    model, optimizer = setup(OPTIMIZERS[name]())
    pruning = prune(model, 0.0, wrt=wrt, where=kernels)
    step, traces = stepper()
    # Momentum builds up in what is to be pruned.
    for _ in range(10):
        step(model, optimizer, pruning)
    assert (kernel_values(model) != 0).all()
    pruning.prune(model, 0.5)
    start, biases = kernel_values(model), flat(model.hidden.bias[...])
    losses = [float(step(model, optimizer, pruning)) for _ in range(100)]
    assert_pruned(model, pruning, COUNT // 2)
    assert pruning.sparsity() == 0.5
    after = kernel_values(model)
    assert np.isfinite(after).all()
    assert (after != start)[start != 0].mean() > 0.25
    if name != "prunadag":  # which leaves zero biases alone that are not relevant
        assert (flat(model.hidden.bias[...]) != biases).all()
    assert losses[-1] < losses[0]
    assert len(traces) == 1


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_gradients_of_pruned_weights_are_not_looked_at(bad):
    def run(value):
        tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1))
        model, optimizer = setup(tx)
        pruning = prune(model, 0.5, where=masks.everything)
        grads = nnx.grad(squared_error)(model)
        spoiled = jax.tree.map(
            lambda g, keep: jnp.where(keep, g, value),
            nnx.as_pure(grads),
            pruning.tree(),
        )
        nnx.update(grads, spoiled)
        pruning.update(optimizer, model, grads)
        return pure(model), flat(nnx.state(optimizer))

    assert_equal(run(bad), run(0.0))


def test_optimizer_and_masks_of_the_same_narrow_filter():
    model, optimizer = setup(optax.adamw(0.05), wrt=KERNELS)
    pruning = prune(model, 0.75, wrt=KERNELS)
    biases = pure(model)["hidden"]["bias"], pure(model)["out"]["bias"]
    step, traces = stepper(wrt=KERNELS)
    for _ in range(5):
        step(model, optimizer, pruning)
    assert_pruned(model, pruning, round(0.75 * COUNT))
    assert_equal((model.hidden.bias[...], model.out.bias[...]), biases)
    assert len(traces) == 1


def test_extra_arguments_go_to_the_optimizer():
    def update(updates, state, params=None, *, value, **extra_args):
        del state, params, extra_args
        return jax.tree.map(lambda g: -value * g, updates), {"v": jnp.asarray(value)}

    tx = optax.GradientTransformationExtraArgs(lambda p: {"v": jnp.zeros(())}, update)
    model = nnx.Linear(2, 1, use_bias=False, rngs=nnx.Rngs(0))
    model.kernel[...] = jnp.array([[1.0], [2.0]])
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    pruning = prune(model, 0.5)
    grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    pruning.update(optimizer, model, grads, value=0.25)
    assert model.kernel[...].tolist() == [[0.0], [1.75]]
    assert optimizer.opt_state["v"][...] == 0.25
    assert optimizer.step[...] == 1


# What is selected.


def test_where_and_filters_select_the_same():
    by_where, by_filter = Model(nnx.Rngs(0)), Model(nnx.Rngs(0))
    one = prune(by_where, 0.6, where=kernels)
    other = prune(by_filter, 0.6, wrt=KERNELS)
    assert_equal(pure(by_where), pure(by_filter))
    assert_equal(jax.tree.leaves(one.tree()), jax.tree.leaves(other.tree()))
    assert one.tree()["hidden"]["bias"] is None
    assert "bias" not in other.tree()["hidden"]
    for model, pruning in [(by_where, one), (by_filter, other)]:
        assert_pruned(model, pruning, round(0.6 * COUNT))
        np.testing.assert_allclose(
            float(pruning.sparsity()), round(0.6 * COUNT) / COUNT
        )
        # What was left out stays out.
        pruning.prune(model, 1.0)
        assert_pruned(model, pruning, COUNT)
        assert pruning.sparsity() == 1


def test_masks_are_variables_of_their_own_type():
    pruning = prune(Model(nnx.Rngs(0)), 0.5, where=masks.everything)
    held = jax.tree.leaves(pruning.masks, is_leaf=lambda m: isinstance(m, PruningMask))
    assert len(held) == 4
    assert all(isinstance(m, PruningMask) and m[...].dtype == bool for m in held)
    assert len(jax.tree.leaves(nnx.state(pruning, PruningMask))) == 4


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 1.0])
def test_scope_leaf_counts_each_leaf(sparsity):
    model = Model(nnx.Rngs(0))
    before = pure(model)
    pruning = prune(model, sparsity, scope="leaf", where=masks.everything)
    for keep, x, leaf in zip(
        *map(jax.tree.leaves, (pruning.tree(), before, pure(model))), strict=True
    ):
        assert (~keep).sum() == round(sparsity * x.size)
        np.testing.assert_array_equal(leaf, jnp.where(keep, x, 0))
    twice = pruning.tree()
    pruning.prune(model, sparsity, scope="leaf")
    assert_equal(pruning.tree(), twice)


def test_batch_statistics_are_left_alone():
    def run(sparsity):
        model, optimizer = setup(cls=Normalised)
        model.train()
        pruning = prune(model, sparsity, where=kernels)
        step, traces = stepper()
        for _ in range(3):
            step(model, optimizer, pruning)
        assert_pruned(model, pruning, round(sparsity * COUNT))
        assert len(traces) == 1
        return model, optimizer, pruning

    model, optimizer, pruning = run(0.0)
    plain, plain_optimizer = setup(cls=Normalised)
    plain.train()

    @nnx.jit
    def plain_step(model, optimizer):
        optimizer.update(model, nnx.grad(squared_error)(model))

    for _ in range(3):
        plain_step(plain, plain_optimizer)
    assert_close(pure(model), pure(plain))
    assert_close(pure(model, nnx.BatchStat), pure(plain, nnx.BatchStat))

    model, optimizer, pruning = run(0.5)
    statistics, scale = pure(model, nnx.BatchStat), pure(model)["norm"]
    assert (statistics["norm"]["mean"] != 0).any()
    assert (statistics["norm"]["var"] != 1).any()
    pruning.apply(model)
    pruning.prune(model, 0.9)
    assert_equal(pure(model, nnx.BatchStat), statistics)
    assert_equal(pure(model)["norm"], scale)
    assert optimizer.step[...] == 3


# The object.


@pytest.mark.parametrize("where", [masks.everything, kernels])
def test_split_and_merge_round_trip(where):
    model, optimizer = setup(optax.adam(0.05))
    pruning = prune(model, 0.5, where=where)
    count = int((~flat(pruning.tree())).sum())
    step, _ = stepper()
    step(model, optimizer, pruning)
    graph, state = nnx.split((model, optimizer, pruning))
    leaves, treedef = jax.tree.flatten(state)
    state = treedef.unflatten([np.asarray(leaf) for leaf in leaves])
    again, optimizer_again, pruning_again = nnx.merge(
        graph, jax.tree.map(jnp.asarray, state)
    )
    assert isinstance(pruning_again, PruningMasks)
    assert pruning_again.wrt == pruning.wrt
    assert_equal(pruning_again.tree(), pruning.tree())
    for _ in range(3):
        step(model, optimizer, pruning)
        step(again, optimizer_again, pruning_again)
    assert_equal(pure(again), pure(model))
    assert_pruned(again, pruning_again, count)


def test_functional_training_loop():
    model, optimizer = setup(optax.adam(0.05))
    pruning = prune(model, 0.5, wrt=KERNELS)
    graph, state = nnx.split((model, optimizer, pruning))

    @jax.jit
    def run(state):
        def one(state, _):
            model, optimizer, pruning = nnx.merge(graph, state)
            pruning.update(optimizer, model, nnx.grad(squared_error)(model))
            return nnx.state((model, optimizer, pruning)), None

        return jax.lax.scan(one, state, length=5)[0]

    trained, _, held = nnx.merge(graph, run(state))
    step, _ = stepper()
    for _ in range(5):
        step(model, optimizer, pruning)
    assert_close(pure(trained), pure(model))
    assert_pruned(trained, held, COUNT // 2)


def test_masks_restored_from_their_state():
    model = Model(nnx.Rngs(0))
    pruning = prune(model, 0.5, where=kernels)
    fresh_model = Model(nnx.Rngs(0))
    fresh = prune(fresh_model, 0.0, where=kernels)
    nnx.update(fresh, nnx.state(pruning))
    fresh.apply(fresh_model)
    assert_equal(pure(fresh_model), pure(model))
    assert fresh.sparsity() == 0.5


def test_apply_zeroes_what_is_not_zero_and_checks_the_model():
    model, other = Model(nnx.Rngs(0)), Model(nnx.Rngs(1))
    pruning = prune(model, 0.5, where=masks.everything)
    pruning.apply(other)
    assert_pruned(other, pruning, round(0.5 * (COUNT + 17)))
    with pytest.raises(ValueError, match=r"mask\['hidden'\].* must have the shape"):
        pruning.apply(
            nnx.Dict(hidden=nnx.Linear(3, 4, rngs=nnx.Rngs(0)), out=model.out)
        )
    with pytest.raises(ValueError, match="mask must have the tree structure of params"):
        pruning.apply(model.hidden)


def test_finalised_is_plain_and_positive_zero():
    model = Model(nnx.Rngs(0))
    pruning = prune(model, 0.5, where=kernels)
    # As a checkpoint may bring them.
    nnx.update(model, jax.tree.map(lambda x: jnp.where(x == 0, -0.0, x), pure(model)))
    shipped = pruning.finalised(model)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(shipped))
    nnx.update(model, shipped)
    assert_pruned(model, pruning, COUNT // 2)
    assert_equal(pruning.finalised(model), shipped)


# Pruning again.


def test_previously_pruned_stay_pruned():
    model = nnx.Linear(4, 2, use_bias=False, rngs=nnx.Rngs(0))
    model.kernel[...] = jnp.array([[5.0, 0.1], [4.0, 0.2], [3.0, 2.0], [1.0, 6.0]])
    pruning = prune(model, 0.25)
    # Live weights are exactly zero now, tiny, and subnormal; one pruned is back.
    model.kernel[...] = jnp.array([[0.0, 0.0], [1e-40, 7.0], [-0.0, 1e-20], [1.0, 6.0]])
    for sparsity, expected in [
        (0.25, [1, 3]),
        (0.375, [0, 1, 3]),
        (0.5, [0, 1, 3, 4]),
        (0.625, [0, 1, 2, 3, 4]),
        (1.0, list(range(8))),
    ]:
        pruning.prune(model, sparsity)
        gone = np.flatnonzero(~np.asarray(pruning.tree()["kernel"]))
        assert gone.tolist() == expected
        assert_pruned(model, pruning, len(expected))


def test_masks_for_other_parameters_are_an_error():
    # The masks of a compiled step cannot grow leaves; the model must not change then.
    model = Model(nnx.Rngs(0))
    pruning = prune(model, 0.5, where=kernels)
    before, held = pure(model), pruning.tree()
    with pytest.raises(
        ValueError, match="where must choose parameters that have masks"
    ):
        pruning.prune(model, 0.5, where=lambda path, leaf: leaf.ndim > 0)
    assert_equal(pure(model), before)
    assert_equal(pruning.tree(), held)


@pytest.mark.parametrize("lower", [0.0, 0.3, 0.49])
def test_lower_sparsity_is_an_error(lower):
    model = Model(nnx.Rngs(0))
    pruning = prune(model, 0.5, wrt=KERNELS)
    with pytest.raises(ValueError, match=r"at least 0\.5, what is pruned.*checkpoint"):
        pruning.prune(model, lower)
    assert_pruned(model, pruning, COUNT // 2)


@pytest.mark.parametrize("sparsity", [-0.1, 1.1, float("nan"), "half", None])
def test_sparsity_out_of_range(sparsity):
    model = Model(nnx.Rngs(0))
    with pytest.raises(ValueError, match="sparsity must be a finite number >= 0 and"):
        prune(model, sparsity)
    pruning = prune(model, 0.0)
    with pytest.raises(ValueError, match="sparsity must be a finite number >= 0 and"):
        pruning.prune(model, sparsity)


# On a schedule.

SCHEDULES = {
    "cubic": (cubic_density(0.1, begin=3, end=18), 1),
    "cubic, every 5": (cubic_density(0.1, begin=3, end=18, initial=0.8), 5),
    "one-shot, every 5": (one_shot_density(0.5, step=7), 5),
    "rising": (lambda count: 1 - 0.8 * (0.5 ** (count / 4)), 1),
}
# Where a schedule comes to its last value the masks do, too.
ENDS = {"cubic, every 5": 18, "one-shot, every 5": 7}


@pytest.mark.parametrize("wrt", [nnx.Param, KERNELS], ids=["Param", "kernels"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_is_followed_exactly(name, wrt):
    density, every = SCHEDULES[name]
    model, optimizer = setup(optax.adam(0.01))
    pruning = prune(model, 0.0, wrt=wrt, where=kernels)

    def after(model, optimizer, pruning):
        pruning.prune_on_schedule(model, optimizer.step[...], density, every=every)

    step, traces = stepper(after)
    expected, kept = 0, flat(pruning.tree())
    for count in range(1, 22):
        step(model, optimizer, pruning)
        if count % every == 0 or count == ENDS.get(name):
            expected = max(expected, COUNT - round(float(density(count)) * COUNT))
        assert_pruned(model, pruning, expected)
        assert not (flat(pruning.tree()) & ~kept).any()
        kept = flat(pruning.tree())
    assert expected > 0
    assert len(traces) == 1


# The linen state.


def test_equals_the_linen_state():
    model, optimizer = setup(optax.adamw(0.05, weight_decay=0.1))
    graph, params = nnx.split(model, nnx.Param)
    params = nnx.to_pure_dict(params)
    state = PruningTrainState.create(
        apply_fn=None, params=params, tx=optax.adamw(0.05, weight_decay=0.1)
    )

    def loss(params):
        return squared_error(
            nnx.merge(graph, nnx.State(jax.tree.map(nnx.Param, params)))
        )

    linen_step = jax.jit(lambda s: s.apply_gradients(grads=jax.grad(loss)(s.params)))
    step, _ = stepper()
    pruning = prune(model, 0.0)
    state = state.prune(0.0)
    for sparsity in (0.3, 0.6, 0.9):
        pruning.prune(model, sparsity)
        state = state.prune(sparsity)
        assert_equal(nnx.to_pure_dict(pruning.tree()), state.masks)
        for _ in range(4):
            step(model, optimizer, pruning)
            state = linen_step(state)
        # Two programs, whose sums differ in order.
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
            pure(model),
            state.params,
        )
    assert pruning.sparsity() == state.sparsity() == masks.sparsity(state.masks)


# Mistakes.


def mistakes():
    model, optimizer = setup()
    pruning = prune(nnx.clone(model), 0.5)
    grads = nnx.grad(squared_error)(model)
    state = nnx.state(model, nnx.Param)
    return {
        "a state": (lambda: prune(state, 0.5), "model must be an nnx model", "State"),
        "a pytree": (lambda: prune({"w": 1.0}, 0.5), "model must be", "masks.prune"),
        "a linen module": (lambda: prune(nn.Dense(2), 0.5), "model must be", "Dense"),
        "an optimizer": (lambda: prune(optimizer, 0.5), "model must be", "Optimizer"),
        "a transformation": (
            lambda: prune(model, 0.5, optimizer=optax.adam(0.1)),
            "optimizer must be an nnx.Optimizer",
            "nnx.Optimizer(model, tx, wrt=nnx.Param)",
        ),
        "swapped": (
            lambda: pruning.update(model, optimizer, grads),
            "optimizer must be an nnx.Optimizer",
            "Model",
        ),
        "a model to masks.prune": (
            lambda: masks.prune(model, 0.5),
            "params must be a pytree of parameters",
            "nnx.state(model, nnx.Param)",
        ),
        "gradients of another model": (
            lambda: pruning.update(
                optimizer, model, nnx.state(nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
            ),
            "grads",
        ),
    }


@pytest.mark.parametrize("name", mistakes())
def test_mistakes(name):
    call, *parts = mistakes()[name]
    with refused(*parts) as caught:
        call()
    assert len(str(caught.value)) < 500
