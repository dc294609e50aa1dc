"""One set of parameters: what is evaluated later has the zeros that were reported.

The property is asked of every optimizer of optax by itself, inside `pruning_aware` and
inside schedule-free: pruned at a random step to a random sparsity and trained on, the
evaluated parameters are zero exactly where the masks say so. Then what pruning leaves
in the state, and two whole trainings with any_sparsity.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("flax", minversion="0.12.7")

import flax.linen as nn
import orbax.checkpoint as ocp
from flax import nnx
from sklearn.datasets import load_digits

from prunadag_optax import eval_params, masks, prunadag, pruning_aware, recipes
from prunadag_optax import nnx as pruning_nnx
from prunadag_optax.linen import PruningTrainState, fine_tune

contrib = optax.contrib
# Those that take a learning rate first; others of optax are parts of these.
PLAIN = (
    "adabelief adadelta adafactor adagrad adam adamax adamaxw adamw adan amsgrad "
    "fromage lamb lars lion nadam nadamw novograd optimistic_adam_v2 "
    "optimistic_gradient_descent radam rmsprop rprop sign_sgd signum sm3 yogi"
)
CONTRIB = (
    "acprop ademamix adopt cocob dadapt_adamw dog dowg galore madgrad momo momo_adam "
    "muon prodigy schedule_free_adamw schedule_free_sgd simplified_ademamix sophia"
)
OPTIMIZERS: dict = {name: getattr(optax, name) for name in PLAIN.split(" ")}
OPTIMIZERS |= {name: getattr(contrib, name) for name in CONTRIB.split(" ")}
# With what they cannot do without.
OPTIMIZERS |= {
    "sgd": lambda rate: optax.sgd(rate, momentum=0.9),
    "noisy_sgd": lambda rate: optax.noisy_sgd(rate, key=0),
    "polyak_sgd": optax.polyak_sgd,
    "lbfgs": lambda rate: optax.lbfgs(rate, linesearch=None),
    "mechanize": lambda rate: contrib.mechanize(optax.sgd(rate)),
    "MultiSteps": lambda rate: optax.MultiSteps(
        optax.adamw(rate), 2
    ).gradient_transformation(),
    "prunadag": prunadag,
}
LEFT_OUT = {
    "dpsgd": "takes the gradient of each example",
    "schedule_free": "a wrapper, which every optimizer is put into",
    "optimistic_adam": "deprecated for optimistic_adam_v2",
    "lookahead": "its parameters are pairs, which are refused (test_cases)",
    "sam": "its parameters stand still while it looks for the worst ones nearby",
}
WRAPPERS = {
    "alone": lambda tx: tx,
    "at params": lambda tx: pruning_aware(tx, 0.5),
    "at pruned": lambda tx: pruning_aware(tx, 0.5, gradient_at="pruned"),
    "schedule-free": lambda tx: contrib.schedule_free(tx, 0.1),
}
PARAMS = {
    "in": {
        "kernel": jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), "float32"),
        "bias": jnp.array([0.5, -0.25, 1.0]),
    },
    "out": {"kernel": jnp.array([[1.5], [-0.75], [0.3]])},
}
COUNT = 15
X = jnp.asarray(np.random.default_rng(1).normal(size=(8, 4)), jnp.float32)


def loss(params, *_):
    hidden = jnp.tanh(X @ params["in"]["kernel"] + params["in"]["bias"][None])
    return jnp.mean((hidden @ params["out"]["kernel"] - X[:, :1]) ** 2)


def step(state):
    value, grads = jax.value_and_grad(loss)(state.params)
    extra = {"value": value, "grad": grads, "obj_fn": loss}
    return state.apply_gradients(grads=grads, **extra)


def test_every_optimizer_of_optax_is_asked_or_left_out():
    def takes_a_rate(function):
        try:
            names = list(inspect.signature(function).parameters)
        except (TypeError, ValueError):
            return False
        return bool(names) and "learning_rate" in names[0]

    found = {
        name
        for module in (optax, contrib)
        for name, function in vars(module).items()
        if takes_a_rate(function)
        and not name.lower().startswith(("_", "scaleby", "scale_by"))
    }
    assert found <= set(OPTIMIZERS) | set(LEFT_OUT)
    assert not set(OPTIMIZERS) & set(LEFT_OUT)


# Kinds of state: moments, factors, vectors, matrices, copies, none, an average within.
OFTEN = "adafactor adamw lion mechanize muon noisy_sgd schedule_free_sgd sm3"


@pytest.mark.parametrize(
    ("name", "wrapper"),
    [
        pytest.param(
            name,
            wrapper,
            id=f"{name}-{wrapper}",
            marks=() if often else pytest.mark.slow,
        )
        for name in sorted(OPTIMIZERS)
        for wrapper in WRAPPERS
        for often in [wrapper == "alone" or name in OFTEN.split(" ")]
    ],
)
def test_evaluated_parameters_have_exactly_the_zeros(name, wrapper):
    tx = WRAPPERS[wrapper](OPTIMIZERS[name](0.01))
    # Masks that keep everything, so that steps before and after may be one program.
    start = PruningTrainState.create(apply_fn=None, params=PARAMS, tx=tx).prune(0.0)
    start = jax.tree.map(jnp.asarray, start)  # the step is a Python number
    update, prune = jax.jit(step), PruningTrainState.prune
    if wrapper == "at pruned":
        prune = jax.jit(prune)

    def run(steps, sparsity):
        state = start
        for _ in range(steps):
            state = update(state)
        state = prune(state.replace(masks=None), sparsity)
        at_once = state.params, state.eval_params
        for _ in range(3):
            state = update(state)
        return state.masks, state.sparsity(), *at_once, state.eval_params

    @settings(max_examples=3, deadline=None, derandomize=True)
    @given(st.integers(0, 5), st.integers(1, COUNT - 1))
    def check(steps, pruned):
        masks, sparsity, *trees = run(steps, jnp.float32(pruned / COUNT))
        np.testing.assert_allclose(sparsity, pruned / COUNT, rtol=1e-6)
        for params in trees:
            assert masks["in"]["bias"] is None
            assert np.isfinite(params["in"]["bias"]).all()
            for layer in ("in", "out"):
                kernel = params[layer]["kernel"]
                np.testing.assert_array_equal(kernel != 0, masks[layer]["kernel"])

    check()


# What pruning leaves in the state.


STATES = {
    "adam": (lambda: optax.adam(0.1), 2),
    "momentum in a chain": (
        lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, 0.9)),
        1,
    ),
    "prunadag": (lambda: prunadag(0.1, initial_weight=0.25), 2),
    "schedule-free": (lambda: contrib.schedule_free_adamw(0.1), 2),
    "at pruned": (lambda: pruning_aware(optax.adam(0.1), 0.5, gradient_at="pruned"), 3),
    "MultiSteps": (lambda: optax.MultiSteps(optax.adam(0.1), 2), 3),
    "masked": (
        lambda: optax.masked(
            optax.adam(0.1), {"in": {"kernel": True, "bias": True}, "out": False}
        ),
        2,
    ),
    "inject_hyperparams": (
        lambda: optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
        2,
    ),
}


@pytest.mark.parametrize("name", STATES)
def test_the_state_of_a_pruned_weight_is_new(name):
    make, trees = STATES[name]
    state = PruningTrainState.create(apply_fn=None, params=PARAMS, tx=make())
    for _ in range(3):
        state = step(state)
    pruned = state.prune(0.5)
    keep = pruned.masks["in"]["kernel"]
    new = pruned.tx.init(pruned.params)
    seen = 0
    for path, x in jax.tree_util.tree_leaves_with_path(pruned.opt_state):
        (before,) = [
            y
            for other, y in jax.tree_util.tree_leaves_with_path(state.opt_state)
            if other == path
        ]
        (fresh,) = [
            y for other, y in jax.tree_util.tree_leaves_with_path(new) if other == path
        ]
        if x.shape == keep.shape:
            seen += 1
            np.testing.assert_array_equal(x, jnp.where(keep, before, fresh))
            constant = 0.25 if name == "prunadag" else 0.0
            np.testing.assert_array_equal(x[~keep], constant)
        elif not jax.tree_util.keystr(path).endswith((".threshold", "['kernel']")):
            np.testing.assert_array_equal(x, before)
    assert seen == trees


def test_masks_of_keep_pruned_stay():
    mask = jax.tree.map(lambda x: x > -0.5, PARAMS)
    tx = optax.chain(optax.adam(0.1), masks.keep_pruned(mask))
    state = PruningTrainState.create(apply_fn=None, params=PARAMS, tx=tx)
    state = step(state).prune(0.5)
    jax.tree.map(np.testing.assert_array_equal, state.opt_state[-1].mask, mask)


def test_a_schedule_prunes_the_state_too():
    tx = pruning_aware(optax.adam(0.1), 0.5, gradient_at="pruned")

    @jax.jit
    def follow(state):
        return step(state).prune_on_schedule(lambda count: 1 - 0.1 * count)

    state = PruningTrainState.create(apply_fn=None, params=PARAMS, tx=tx).prune(0.0)
    for count in range(1, 6):
        before = step(state)
        state = follow(state)
        zeros = COUNT - round((1 - 0.1 * count) * COUNT)
        for kernel, keep, mu in zip(
            jax.tree.leaves(state.eval_params)[1:],
            jax.tree.leaves(state.masks),
            jax.tree.leaves(state.opt_state.base[0].mu)[1:],
            strict=True,
        ):
            np.testing.assert_array_equal(kernel != 0, keep)
            np.testing.assert_array_equal(mu[~keep], 0)
        gone = sum(int((~keep).sum()) for keep in jax.tree.leaves(state.masks))
        assert gone == zeros
        # The dense parameters were ranked.
        expected = masks.prune_further(before.eval_params, gone / COUNT, before.masks)[
            1
        ]
        jax.tree.map(np.testing.assert_array_equal, state.masks, expected)


def test_masks_given_at_the_start_are_in_the_copies():
    mask = masks.magnitude_mask(PARAMS, 0.5)
    tx = pruning_aware(optax.adam(0.1), 0.5, gradient_at="pruned")
    state = PruningTrainState.create(apply_fn=None, params=PARAMS, tx=tx, masks=mask)
    pruned = masks.apply_mask(PARAMS, mask)
    for params in (state.params, state.eval_params, state.finalised()):
        jax.tree.map(np.testing.assert_array_equal, params, pruned)


# Two whole trainings.


DIGITS = load_digits()
IMAGES = jnp.asarray(DIGITS.data / 16, jnp.float32)
LABELS = jnp.asarray(DIGITS.target)
STEPS = 300


def cross_entropy(logits, i):
    rows = (jnp.arange(128) + 128 * i) % len(LABELS)
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits(IMAGES[rows]), LABELS[rows]
    )
    return losses.mean()


def accuracy(logits):
    return (logits(IMAGES).argmax(-1) == LABELS).mean().item()


def zeros_of(kernels):
    return masks.sparsity(kernels).item()


def recipe():
    return recipes.any_sparsity(STEPS, learning_rate=5e-3)


def saved_and_restored(tree, path, like):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path, like)


def test_linen_pruned_midway_tuned_and_restored(tmp_path):
    model = nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(10)])
    params = model.init(jax.random.key(0), IMAGES[:1])["params"]
    state = PruningTrainState.create(apply_fn=model.apply, params=params, tx=recipe())

    def logits(params):
        return lambda x: model.apply({"params": params}, x)

    def kernels(params):
        return [layer["kernel"] for layer in params.values()]

    def loss(params, i):
        return cross_entropy(logits(params), i)

    @jax.jit
    def step(state, i):
        return state.apply_gradients(grads=jax.grad(loss)(state.params, i))

    def measure(state):
        """Sparsity, zeros and accuracy, each asked for in every way there is."""
        evaluated = eval_params(state.opt_state, state.params)
        zeros = zeros_of(kernels(evaluated))
        assert zeros == state.sparsity() == zeros_of(kernels(state.finalised()))
        right = accuracy(logits(evaluated))
        assert right == accuracy(logits(state.finalised()))
        (drawn,) = state.curve(
            lambda params: accuracy(logits(params)), [zeros], progress=False
        ).values["metric"]
        assert drawn == right
        return zeros, right

    for i in range(200):
        state = step(state, i)
    dense = accuracy(logits(state.eval_params))
    assert dense > 0.9
    state = state.prune(0.8)
    at_once = measure(state)
    assert zeros_of(kernels(state.params)) == at_once[0]
    for i in range(200, STEPS):
        state = step(state, i)
    zeros, trained = measure(state)
    assert zeros == at_once[0]
    assert trained > at_once[1] - 0.02
    state, _ = fine_tune(state, loss, range(20), progress=False)
    zeros, tuned = measure(state)
    assert zeros == at_once[0]
    assert tuned > 0.9

    fresh = PruningTrainState.create(apply_fn=model.apply, params=params, tx=state.tx)
    restored = saved_and_restored(state, tmp_path / "state", fresh.prune(0.0))
    assert measure(restored) == (zeros, tuned)
    jax.tree.map(np.testing.assert_array_equal, restored.masks, state.masks)
    further = step(restored, 0)
    jax.tree.map(np.testing.assert_array_equal, further.params, step(state, 0).params)
    assert measure(restored.prune(0.9))[0] == masks.sparsity(
        masks.prune(kernels(restored.eval_params), 0.9)[1]
    )


class Network(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(64, 32, rngs=rngs)
        self.out = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.hidden(x)))


def test_nnx_pruned_midway_tuned_and_restored(tmp_path):
    def make(seed):
        model = Network(nnx.Rngs(seed))
        optimizer = nnx.Optimizer(model, recipe(), wrt=nnx.Param)
        return model, optimizer, pruning_nnx.prune(model, 0.0, optimizer=optimizer)

    @nnx.jit
    def step(model, optimizer, pruning, i):
        grads = nnx.grad(lambda model: cross_entropy(model, i))(model)
        pruning.update(optimizer, model, grads)

    def measure(model, optimizer, pruning):
        evaluated = nnx.clone(model)
        nnx.update(evaluated, pruning_nnx.eval_params(optimizer, model))
        shipped = nnx.clone(model)
        nnx.update(shipped, pruning.finalised(model, optimizer))
        zeros, right = zip(
            *(
                (zeros_of([m.hidden.kernel[...], m.out.kernel[...]]), accuracy(m))
                for m in (evaluated, shipped)
            ),
            strict=True,
        )
        assert zeros[0] == zeros[1] == pruning.sparsity()
        assert right[0] == right[1]
        return zeros[0], right[0]

    whole = model, optimizer, pruning = make(0)
    for i in range(200):
        step(*whole, i)
    dense = nnx.clone(model)
    nnx.update(dense, pruning_nnx.eval_params(optimizer, model))
    assert accuracy(dense) > 0.9
    pruning.prune(model, 0.8, optimizer=optimizer)
    at_once = measure(*whole)
    assert at_once[1] == accuracy(model)
    for i in range(200, STEPS + 20):
        step(*whole, i)
    zeros, tuned = measure(*whole)
    assert zeros == at_once[0]
    assert tuned > 0.9

    again = make(1)
    like = nnx.state(again)
    saved = nnx.to_pure_dict(nnx.state(whole))
    restored = saved_and_restored(saved, tmp_path / "state", nnx.to_pure_dict(like))
    nnx.replace_by_pure_dict(like, restored)
    nnx.update(again, like)
    assert measure(*again) == (zeros, tuned)
    for each in (whole, again):
        step(*each, 0)
    assert measure(*again) == measure(*whole)
