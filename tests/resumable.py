"""A training run that goes on from its latest checkpoint, whenever it was killed.

    python -m tests.resumable CHECKPOINTS RESULT --api linen

trains a small network on digits with prunAdag, prunes it on a schedule, saves every few
steps and writes all that training changes to RESULT (npz) at the end. It prints the
step that it starts from and the sparsity there. The batch is a function of the step
alone, so that a checkpoint needs no place in the data.
"""

import argparse
import functools
import os
import pathlib
import signal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from sklearn.datasets import load_digits

from prunadag_optax import masks, prunadag
from prunadag_optax import nnx as pruning_nnx
from prunadag_optax.linen import PruningTrainState
from prunadag_optax.schedules import cubic_density

STEPS = 48
EVERY = 6  # steps from one checkpoint to the next
BATCH = 64
DENSITY = cubic_density(0.2, begin=0, end=40)
TX = optax.chain(
    optax.clip_by_global_norm(1.0), prunadag(0.05, relevant=0.1, momentum=0.9)
)
MODEL = nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(16)])


def mean_loss(logits, labels):
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return loss.mean()


def start_linen(seed=0):
    """The state before the first step, and the step: (state, x, y) -> state."""
    params = jax.jit(MODEL.init)(jax.random.key(seed), jnp.ones((1, 64)))["params"]
    state = PruningTrainState.create(apply_fn=MODEL.apply, params=params, tx=TX)

    @jax.jit
    def step(state, x, y):
        def loss(params):
            return mean_loss(state.apply_fn({"params": params}, x), y)

        state = state.apply_gradients(grads=jax.grad(loss)(state.params))
        return state.prune_on_schedule(DENSITY, every=3)

    return state.prune(0.0), step


def start_nnx(seed=0):
    """As `start_linen`; the state is the nnx.State of model, optimizer and masks."""
    rngs = nnx.Rngs(seed)
    model = nnx.Sequential(
        nnx.Linear(64, 32, rngs=rngs), nnx.relu, nnx.Linear(32, 16, rngs=rngs)
    )
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
    pruning = pruning_nnx.prune(model, 0.0)
    graphdef, state = nnx.split(
        {"model": model, "optimizer": optimizer, "pruning": pruning}
    )

    @jax.jit
    def step(state, x, y):
        parts = nnx.merge(graphdef, state)
        model, optimizer = parts["model"], parts["optimizer"]
        grads = nnx.grad(lambda model: mean_loss(model(x), y))(model)
        parts["pruning"].update(optimizer, model, grads)
        parts["pruning"].prune_on_schedule(model, optimizer.step[...], DENSITY, every=3)
        return nnx.state(parts)

    return state, step


START = {"linen": start_linen, "nnx": start_nnx}


def masks_of(state):
    """The masks in a state of either API."""
    return state["pruning"] if isinstance(state, nnx.State) else state.masks


@functools.cache
def digits():
    return load_digits(return_X_y=True)


def batch_at(step):
    """The batch of a step, the same in every run."""
    x, y = digits()
    chosen = np.random.default_rng(step).choice(len(x), BATCH, replace=False)
    return (x[chosen] / 16).astype(np.float32), y[chosen].astype(np.int32)


def manager_of(directory):
    options = ocp.CheckpointManagerOptions(max_to_keep=3)
    return ocp.CheckpointManager(pathlib.Path(directory).resolve(), options=options)


def die_while_saving(directory, manager):
    """Kills this process, as nobody can catch, if a checkpoint is half written."""
    while manager.is_saving_in_progress():
        if any("tmp" in path.name for path in pathlib.Path(directory).iterdir()):
            os.kill(os.getpid(), signal.SIGKILL)


def through_checkpointer(directory, state, template):
    """A state as it comes back from a checkpoint, into a template."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(directory / "state", template)


def assert_same(actual, expected):
    """The same tree (types of its nodes and Nones too), dtypes and bits."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    leaves = jax.tree_util.tree_leaves_with_path(actual)
    for (path, x), y in zip(leaves, jax.tree.leaves(expected), strict=True):
        # flax's step is a Python int at first, and so it is restored into a new state.
        x, y = np.asarray(jnp.asarray(x)), np.asarray(jnp.asarray(y))
        assert (x.dtype, x.shape) == (y.dtype, y.shape), path
        assert x.tobytes() == y.tobytes(), path


def train(directory, api, dies=False):
    """Trains from the latest checkpoint in the directory, or from the start.

    Args:
      directory: of the checkpoints.
      api: "linen" or "nnx".
      dies: whether the process kills itself while it saves its third checkpoint, or a
        later one if that is written too fast.

    Returns:
      The state after `STEPS` steps.
    """
    state, step = START[api]()
    with manager_of(directory) as manager:
        done = manager.latest_step() or 0
        if done:
            state = manager.restore(done, args=ocp.args.StandardRestore(state))
        print(done, masks.sparsity(masks_of(state)), flush=True)
        for number in range(done, STEPS):
            state = step(state, *batch_at(number))
            if (number + 1) % EVERY == 0:
                manager.save(number + 1, args=ocp.args.StandardSave(state))
                if dies and number + 1 >= 3 * EVERY:
                    die_while_saving(directory, manager)
    return state


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoints")
    parser.add_argument("result")
    parser.add_argument("--api", choices=START, default="linen")
    parser.add_argument("--dies", action="store_true")
    args = parser.parse_args()
    state = train(args.checkpoints, args.api, args.dies)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    np.savez(args.result, **{jax.tree_util.keystr(p): leaf for p, leaf in leaves})


if __name__ == "__main__":
    main()
