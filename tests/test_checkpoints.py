"""Checkpoints: what orbax saves of a pruned training run comes back bit for bit.

States, masks and steps go through orbax into freshly initialised templates, and through
a process that is killed while it saves (`tests/resumable.py`). The rest says what orbax
does where the template has other masks than the checkpoint. From one layout of devices
to another they go in `tests/sharding/test_restore.py`.
"""

import functools
import pathlib
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("flax", minversion="0.12.7")

import flax.linen as nn
import orbax.checkpoint as ocp
from flax import nnx

from prunadag_optax import ScaleByPrunadagState, masks, prunadag
from prunadag_optax import nnx as pruning_nnx
from prunadag_optax.linen import PruningTrainState
from tests import bases, resumable
from tests.compiling import as_here
from tests.helpers import enable_x64, environment
from tests.resumable import assert_same, through_checkpointer

ROOT = pathlib.Path(__file__).parents[1]
MODEL = nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(3, param_dtype=jnp.bfloat16)])
X = np.random.default_rng(0).normal(size=(5, 16)).astype(np.float32)
OPTIMIZERS = {
    "prunadag": prunadag(0.05),
    "momentum, bf16 accumulators": prunadag(
        0.05, momentum=0.9, accumulator_dtype=jnp.bfloat16
    ),
    "clip, inject_hyperparams": optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.inject_hyperparams(prunadag)(optax.linear_schedule(0.1, 0.0, 10)),
    ),
    "keep_pruned": optax.chain(
        prunadag(0.05),
        masks.keep_pruned(lambda params: masks.magnitude_mask(params, 0.0)),
    ),
    "masked": optax.masked(
        prunadag(0.05), lambda params: jax.tree.map(lambda x: x.ndim > 1, params)
    ),
}


def through_manager(directory, state, template):
    """Saved third where two are kept, and restored by another manager."""
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager(directory, options=options) as manager:
        for step in (1, 2):
            manager.save(step, args=ocp.args.StandardSave(template))
        manager.save(7, args=ocp.args.StandardSave(state))
    with ocp.CheckpointManager(directory, options=options) as manager:
        assert sorted(manager.all_steps()) == [2, 7]
        latest = manager.latest_step()
        return manager.restore(latest, args=ocp.args.StandardRestore(template))


through_orbax = pytest.mark.parametrize(
    "through", [through_checkpointer, through_manager]
)


def scrambled(tree):
    """Other numbers in every leaf, of the same dtypes: a state late in training."""
    rng = np.random.default_rng(0)

    def numbers(leaf):
        leaf = jnp.asarray(leaf)
        low, high = (0, 2) if leaf.dtype == jnp.bool_ else (2, 9)
        return jnp.asarray(rng.integers(low, high, leaf.shape), leaf.dtype)

    return jax.tree.map(numbers, tree)


# Linen.


@functools.cache
def linen_params(seed):
    return MODEL.init(jax.random.key(seed), X)["params"]


def linen_state(tx, seed=0):
    params = linen_params(seed)
    return PruningTrainState.create(apply_fn=MODEL.apply, params=params, tx=tx)


@jax.jit
def linen_step(state):
    def loss(params):
        return (state.apply_fn({"params": params}, X) ** 2).sum()

    return state.apply_gradients(grads=jax.grad(loss)(state.params))


def linen_trained(tx):
    """A state after a step, pruned by half, and another step."""
    return linen_step(linen_step(linen_state(tx)).prune(0.5))


@through_orbax
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_linen_state_comes_back(tmp_path, through, name):
    template = linen_state(OPTIMIZERS[name]).prune(0.0)
    state = scrambled(template)
    restored = through(tmp_path, state, template)
    assert_same(restored, state)
    assert restored.step == state.step != template.step
    assert restored.masks["layers_0"]["bias"] is None
    assert restored.masks["layers_0"]["kernel"].dtype == jnp.bool_
    assert 0 < float(restored.sparsity()) < 1


@through_orbax
def test_linen_training_goes_on(tmp_path, through):
    tx = OPTIMIZERS["momentum, bf16 accumulators"]
    state = linen_trained(tx)
    template = linen_state(tx, seed=1).prune(0.0)
    restored = through(tmp_path, state, template)
    assert_same(restored, state)
    assert restored.step == 2
    assert float(restored.sparsity()) == 0.5
    assert_same(linen_step(restored), linen_step(state))


def test_optimizer_states_stay_namedtuples(tmp_path):
    template = linen_state(OPTIMIZERS["prunadag"]).prune(0.0)
    state = scrambled(template)
    own = through_checkpointer(tmp_path, state, template).opt_state[0]
    assert type(own) is ScaleByPrunadagState
    assert own.count.dtype == jnp.int32
    assert own.count == state.opt_state[0].count != 0
    assert own.mu is None


def test_shapes_and_dtypes_do_for_a_template(tmp_path):
    tx = OPTIMIZERS["prunadag"]
    state = scrambled(linen_state(tx).prune(0.0))
    template = jax.eval_shape(lambda: linen_state(tx, 1).prune(0.0))
    assert_same(through_checkpointer(tmp_path, state, template), state)


# nnx.


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(16, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.last = nnx.Linear(8, 3, param_dtype=jnp.bfloat16, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.tanh(self.norm(self.first(x))))


def nnx_parts(tx, sparsity, seed=0):
    model = Net(nnx.Rngs(seed))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    pruning = pruning_nnx.prune(model, sparsity)
    return model, optimizer, pruning


@nnx.jit
def nnx_step(model, optimizer, pruning):
    grads = nnx.grad(lambda model: (model(X) ** 2).sum())(model)
    pruning.update(optimizer, model, grads)


@through_orbax
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nnx_states_come_back(tmp_path, through, name):
    template = [nnx.state(part) for part in nnx_parts(OPTIMIZERS[name], 0.0)]
    state = scrambled(template)
    restored = through(tmp_path, state, template)
    assert_same(restored, state)
    assert 0 < float(masks.sparsity(restored[-1])) < 1


@through_orbax
def test_nnx_training_goes_on(tmp_path, through):
    tx = OPTIMIZERS["momentum, bf16 accumulators"]
    parts = nnx_parts(tx, 0.5)
    nnx_step(*parts)
    fresh = nnx_parts(tx, 0.0, seed=1)
    state = [nnx.state(part) for part in parts]
    restored = through(tmp_path, state, [nnx.state(part) for part in fresh])
    for part, values in zip(fresh, restored, strict=True):
        nnx.update(part, values)
    _, optimizer, pruning = fresh
    assert int(optimizer.step[...]) == 1
    assert isinstance(pruning.masks["first"]["kernel"], pruning_nnx.PruningMask)
    assert "bias" not in nnx.state(pruning)["masks"]["first"]
    assert float(pruning.sparsity()) == 0.5
    nnx_step(*parts)
    nnx_step(*fresh)
    assert_same([nnx.state(part) for part in fresh], [nnx.state(p) for p in parts])


@through_orbax
def test_nnx_split_and_merge_come_back(tmp_path, through):
    tx = OPTIMIZERS["momentum, bf16 accumulators"]
    parts = nnx_parts(tx, 0.5)
    nnx_step(*parts)
    _, state = nnx.split(parts)
    graphdef, template = nnx.split(nnx_parts(tx, 0.0, seed=1))
    restored = through(tmp_path, state, template)
    assert_same(restored, state)
    merged = nnx.merge(graphdef, restored)
    nnx_step(*parts)
    nnx_step(*merged)
    assert_same(nnx.state(merged), nnx.state(parts))


# Other masks in the template than in the checkpoint.


@through_orbax
def test_no_masks_come_back_as_none(tmp_path, through):
    template = linen_state(OPTIMIZERS["prunadag"])
    state = scrambled(template)
    restored = through(tmp_path, state, template)
    assert_same(restored, state)
    assert restored.masks is None


@pytest.mark.parametrize("saved_masks", [True, False])
def test_masks_on_one_side_only_are_an_error(tmp_path, saved_masks):
    tx = OPTIMIZERS["prunadag"]
    without = linen_state(tx)
    state, template = without.prune(0.5), without
    if not saved_masks:
        state, template = without, without.prune(0.0)
    with pytest.raises(ValueError, match=r"structures do not match:\s+masks"):
        through_checkpointer(tmp_path, state, template)


@pytest.mark.parametrize("where", [masks.everything, masks.prunable])
def test_a_template_that_masks_everything_takes_any_masks(tmp_path, where):
    # The Nones of the checkpoint come back where the template has masks, but not the
    # other way (next test).
    tx = OPTIMIZERS["prunadag"]
    state = linen_state(tx).prune(0.5, where=where)
    template = linen_state(tx, seed=1).prune(0.0, where=masks.everything)
    restored = through_checkpointer(tmp_path, state, template)
    assert_same(restored, state)


def test_a_none_in_the_template_drops_that_mask(tmp_path):
    # orbax takes a None in the template for "do not restore this", and says nothing.
    tx = OPTIMIZERS["prunadag"]
    state = linen_state(tx).prune(0.5, where=masks.everything)
    template = linen_state(tx, seed=1).prune(0.0)
    restored = through_checkpointer(tmp_path, state, template)
    assert state.masks["layers_0"]["bias"] is not None
    assert restored.masks["layers_0"]["bias"] is None
    assert_same(restored.params, state.params)


@pytest.mark.parametrize(
    ("where", "other"),
    [(masks.everything, masks.prunable), (masks.prunable, masks.everything)],
)
def test_nnx_template_needs_the_same_leaves_masked(tmp_path, where, other):
    tx = OPTIMIZERS["prunadag"]
    model = Net(nnx.Rngs(0))
    saved = nnx.state(pruning_nnx.prune(model, 0.5, where=where))
    template = nnx.state(pruning_nnx.prune(model, 0.0, where=other))
    with pytest.raises(ValueError, match=r"structures do not match:\s+masks\.\w+\.\w+"):
        through_checkpointer(tmp_path, saved, template)
    without = nnx.state(nnx.Optimizer(model, tx, wrt=nnx.Param))
    with pytest.raises(ValueError, match="structures do not match"):
        through_checkpointer(tmp_path / "other", saved, without)


# A process that is killed.


def command(directory, result, api, *options):
    # A module, so that the package need not be installed.
    script = [sys.executable, "-m", "tests.resumable", str(directory), str(result)]
    return [*script, "--api", api, *options]


def complete(directory):
    """The steps of the checkpoints that were written to their end."""
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit())


def run_to_the_end(directory, result, api):
    """What a training process prints: the step it starts from, the sparsity there."""
    done = subprocess.run(
        command(directory, result, api),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout.split()


@pytest.mark.parametrize(
    "api",
    ["linen", pytest.param("nnx", marks=pytest.mark.slow)],  # half a minute each
)
@pytest.mark.slow
def test_killed_training_ends_as_if_it_had_not_been(tmp_path, api):
    directory, result = tmp_path / "killed", tmp_path / "result.npz"
    killed = subprocess.run(
        command(directory, result, api, "--dies"),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL == -9
    assert any("tmp" in path.name for path in directory.iterdir())
    assert not result.exists()
    latest = complete(directory)[-1]
    assert 0 < latest < resumable.STEPS

    step, sparsity = run_to_the_end(directory, result, api)
    assert int(step) == latest
    assert 0 < float(sparsity) < 0.8
    # The run that was never interrupted is a process of its own as well.
    whole = tmp_path / "whole.npz"
    assert run_to_the_end(tmp_path / "whole", whole, api) == ["0", "0.0"]
    with np.load(result) as actual, np.load(whole) as expected:
        assert_same(dict(actual), dict(expected))
        held = [x for x in expected.values() if x.dtype == bool]
    assert float(masks.sparsity(held)) == pytest.approx(0.8)


def test_another_process_goes_on_with_a_pruning_aware_run(tmp_path):
    name, at = "adamw", "pruned"
    checkpoint, result = tmp_path / "middle", tmp_path / "result.npz"
    with enable_x64():
        x, gradients = bases.start(), bases.gradients()
        state = bases.made(name, at).init(x)
        path, state = bases.run(name, at, x, state, gradients[: bases.MIDDLE])
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(checkpoint, (path[-1], state))
        path, state = bases.run(name, at, path[-1], state, gradients[bases.MIDDLE :])
    script = [sys.executable, "-m", "tests.bases", checkpoint, result]
    subprocess.run(
        [*script, "--base", name, "--at", at],
        cwd=ROOT,
        env=environment(**as_here()),
        check=True,
    )
    leaves = jax.tree_util.tree_leaves_with_path((path[-1], state))
    expected = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
    with np.load(result) as actual, enable_x64():
        assert_same(dict(actual), expected)
