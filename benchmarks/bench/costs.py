"""What the optimizers' steps cost, in turns with Adam's."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import timing
from benchmarks.bench import tasks
from benchmarks.bench.contenders import Contender, Plan
from benchmarks.methods import optimizer_step

REFERENCE = ("optax.adam", "", "Adam")
# Untimed steps, as a share of the timed ones.
BEFORE = 0.2
SPARSITY = 0.9


def bytes_of(state: Any) -> int:
    """The bytes of all arrays of an optimizer's state."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def rows(
    contenders: Sequence[Contender],
    task: tasks.Task,
    sparsities: tuple[float, ...],
    rounds: int,
) -> list[dict[str, Any]]:
    """Times a step of each.

    Args:
      contenders: whose steps.
      task: whose parameters.
      sparsities: those that will be asked for.
      rounds: timed steps of each.

    Returns:
      The rows of the CSV, Adam's first.
    """
    params, _ = tasks.network(task).init(jax.random.key(0))
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    steps = task.epochs * task.steps_per_epoch
    plan = Plan(steps, SPARSITY, sparsities)
    gradients = [_noise(params, seed) for seed in range(1, 4)]
    optimizers: dict[tuple[str, str, str], Any] = {REFERENCE: (optax.adam(1e-3), 1)}
    for row in contenders:
        rate = jnp.float32(1e-3)
        tx = row.make(rate, plan, jax.random.key(0))
        optimizers[row.method, row.setting, row.base] = (tx, row.passes)
    runs, held = {}, {}
    for name, (tx, _) in timing.progress(optimizers.items(), "compiling"):
        # Copies: buffers that are donated must be the method's own.
        carry = jax.tree.map(jnp.copy, (params, _halfway(tx, params, steps)))
        held[name] = bytes_of(carry[1])
        step = timing.compile_step(optimizer_step(tx), carry, gradients)
        runs[name] = step.run
    before = round(BEFORE * rounds)
    times = timing.interleave(runs, rounds, warm_up=before, label="steps")
    reference = times[REFERENCE]
    found = []
    for name, own in times.items():
        known = timing.spread(own)
        low, high = known["quartiles ms"]
        found.append(
            {
                **dict(zip(("method", "setting", "base"), name, strict=True)),
                "gradients": optimizers[name][1],
                "bytes a weight": f"{held[name] / size:.2f}",
                "ms": f"{known['median ms']:.3f}",
                "quartiles": f"{low:.3f}-{high:.3f}",
                "/ adam": f"{timing.ratio(own, reference):.2f}",
                "/ adam, means": f"{np.mean(own) / np.mean(reference):.2f}",
                "rounds": rounds,
                "weights": size,
                "device": jax.local_devices()[0].device_kind,
                "jax": jax.__version__,
            }
        )
    return found


def _halfway(tx: optax.GradientTransformation, params: Any, steps: int) -> Any:
    """The state whose schedules are those of the middle of a training."""
    state = jax.jit(tx.init)(params)
    return optax.tree.set(state, count=jnp.int32(steps // 2))


def _noise(params: Any, seed: int) -> Any:
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return treedef.unflatten(
        1e-2 * jax.random.normal(key, leaf.shape)
        for key, leaf in zip(keys, leaves, strict=True)
    )
