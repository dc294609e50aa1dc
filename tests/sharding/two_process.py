"""A training run over several processes, and over its own death.

    python -m tests.sharding.two_process RESULT --processes 2 --process 0 --port PORT
        --checkpoints DIRECTORY

trains a small network on digits with prunAdag over four host devices in all, whatever
the number of processes: data and parameters are divided over all of them. Process 0
writes the parameters and the optimizer's state to RESULT (npz) at the end. Each process
prints the step that it starts from and then every step that it has done. The batch is a
function of the step alone, so that a checkpoint needs no place in the data.
"""

import argparse
import contextlib
import os
import pathlib
import time

DEVICES = 4  # of all processes together
STEPS = 12
EVERY = 2  # steps from one checkpoint to the next
BATCH = 64


def parse():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--process", type=int, default=0)
    parser.add_argument("--port", type=int)
    parser.add_argument("--checkpoints")
    parser.add_argument("--pause", type=float, default=0.0)
    return parser.parse_args()


def report(step):
    # On a line of its own wherever gloo, which prints too, has just stopped.
    print(f"\nstep {step}", flush=True)


def start(params):
    """The optimizer's state before the first step, and the step."""
    import jax
    import jax.numpy as jnp
    import optax

    from prunadag_optax import prunadag

    tx = optax.chain(
        optax.clip_by_global_norm(1.0), prunadag(0.05, relevant=0.2, momentum=0.9)
    )

    def loss(params, x, y):
        h = jnp.tanh(x @ params["in"]["kernel"] + params["in"]["bias"])
        logits = h @ params["out"]["kernel"] + params["out"]["bias"]
        each = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return each.mean()

    @jax.jit
    def step(params, state, x, y):
        updates, state = tx.update(jax.grad(loss)(params, x, y), state, params)
        return optax.apply_updates(params, updates), state

    return tx.init(params), step


def train(mesh, checkpoints, pause):
    """Trains from the latest checkpoint, or from the start.

    Args:
      mesh: all devices, on the axis "data".
      checkpoints: absolute path of their directory, or None for none.
      pause: seconds to wait after each step.

    Returns:
      The parameters and the optimizer's state after `STEPS` steps.
    """
    import jax
    import numpy as np
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P
    from sklearn.datasets import load_digits

    divided = NamedSharding(mesh, P("data"))

    def place(value):
        return jax.make_array_from_callback(value.shape, divided, lambda i: value[i])

    rng = np.random.default_rng(0)
    params = {
        "in": {"kernel": rng.normal(size=(64, 128)) / 8, "bias": np.zeros(128)},
        "out": {"kernel": rng.normal(size=(128, 16)) / 12, "bias": np.zeros(16)},
    }
    params = jax.tree.map(place, params)
    state, step = start(params)
    x, y = load_digits(return_X_y=True)
    done, manager = 0, None
    with contextlib.ExitStack() as stack:
        if checkpoints is not None:
            import orbax.checkpoint as ocp

            options = ocp.CheckpointManagerOptions(max_to_keep=2)
            manager = ocp.CheckpointManager(checkpoints, options=options)
            stack.enter_context(manager)
            done = manager.latest_step() or 0
            if done:
                params, state = manager.restore(
                    done, args=ocp.args.StandardRestore((params, state))
                )
        report(done)
        for number in range(done, STEPS):
            chosen = np.random.default_rng(number).choice(len(x), BATCH, replace=False)
            batch = place(x[chosen] / 16), place(y[chosen].astype(np.int32))
            params, state = step(params, state, *batch)
            jax.block_until_ready(params)
            report(number + 1)
            if manager is not None and (number + 1) % EVERY == 0:
                manager.save(number + 1, args=ocp.args.StandardSave((params, state)))
            time.sleep(pause)
    return params, state


def main():
    args = parse()
    count = DEVICES // args.processes
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={count}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    # In double precision the order of a sum cannot change the class of a component.
    jax.config.update("jax_enable_x64", True)
    if args.processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            f"127.0.0.1:{args.port}",
            args.processes,
            args.process,
            initialization_timeout=60,
        )
    assert jax.device_count() == DEVICES
    assert jax.process_count() == args.processes
    mesh = jax.make_mesh((DEVICES,), ("data",), (jax.sharding.AxisType.Auto,))
    directory = args.checkpoints and pathlib.Path(args.checkpoints).resolve()
    # The context puts the optimizer's counter on all processes' devices too.
    with jax.set_mesh(mesh):
        trained = train(mesh, directory, args.pause)
        whole = multihost_utils.process_allgather(trained, tiled=True)
    if args.process == 0:
        leaves = jax.tree_util.tree_leaves_with_path(whole)
        np.savez(
            args.result, **{jax.tree_util.keystr(p): np.asarray(x) for p, x in leaves}
        )


if __name__ == "__main__":
    main()
