"""Bases of `pruning_aware`, one of each kind of state, and a training run with each.

    python -m tests.bases CHECKPOINT RESULT --base adamw --at pruned

restores the run that another process saved there in the middle into a new state, goes
on to the end and writes the parameters and the state to RESULT (npz). Runs are in
float64, where the order of sums changes nothing that a test could see.
"""

import argparse
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

from prunadag_optax import pruning_aware, scale_by_normalised_momentum

BASES: dict[str, optax.GradientTransformation] = {
    "adam": optax.adam(0.01),
    # optax keeps the weight decay in float32, which holds an eighth.
    "adamw": optax.adamw(0.01, weight_decay=0.125),
    "momentum": optax.sgd(0.01, momentum=0.9),
    "nadam": optax.nadam(0.01),
    "lion": optax.lion(0.001),
    "lamb": optax.lamb(0.01),
    "rmsprop": optax.rmsprop(0.01),
    "adagrad": optax.adagrad(0.1),
    "adafactor": optax.adafactor(0.01, min_dim_size_to_factor=4),
    "muon": optax.contrib.muon(0.01),
    "schedule-free": optax.contrib.schedule_free_adamw(0.01),
    "normalised momentum": optax.chain(
        scale_by_normalised_momentum(), optax.scale(-0.01)
    ),
    "clipped": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.01)),
    "injected": optax.inject_hyperparams(optax.adam)(0.01),
    "several steps": optax.MultiSteps(optax.adam(0.01), 2).gradient_transformation(),
}
PLACES = ("params", "pruned")
SHAPES = {"a": {"bias": (4,), "kernel": (6, 4)}, "b": {"kernel": (4, 3)}}
# The middle is in the middle of an accumulation of MultiSteps.
STEPS, MIDDLE = 6, 3
DENSITY = 0.5


def drawn(seed, shapes=SHAPES, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: rng.normal(size=shape).astype(dtype),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def start():
    return jax.tree.map(jnp.asarray, drawn(0))


def gradients():
    return [drawn(1 + k) for k in range(STEPS)]


def made(name, at, density=DENSITY):
    return pruning_aware(BASES[name], density, gradient_at=at)


def step(tx, x, state, gradient):
    updates, state = tx.update(gradient, state, x)
    return optax.apply_updates(x, updates), state


@functools.cache
def compiled(name, at):
    """A step as one program: (density, x, state, gradient) -> (x, state).

    The density is an operand, so that one program does for all tests.
    """
    return jax.jit(lambda density, *args: step(made(name, at, density), *args))


def run(name, at, x, state, gradients, density=DENSITY):
    """The points after each step, and the last state."""
    path, density = [], jnp.asarray(density)
    for gradient in gradients:
        x, state = compiled(name, at)(density, x, state, gradient)
        path.append(x)
    return path, state


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=pathlib.Path)
    parser.add_argument("result")
    parser.add_argument("--base", choices=BASES, required=True)
    parser.add_argument("--at", choices=PLACES, required=True)
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", True)

    import orbax.checkpoint as ocp

    fresh = jax.tree.map(jnp.zeros_like, start())
    template = fresh, made(args.base, args.at).init(fresh)
    with ocp.StandardCheckpointer() as checkpointer:
        x, state = checkpointer.restore(args.checkpoint, template)
    path, state = run(args.base, args.at, x, state, gradients()[MIDDLE:])
    leaves = jax.tree_util.tree_leaves_with_path((path[-1], state))
    np.savez(args.result, **{jax.tree_util.keystr(p): leaf for p, leaf in leaves})


if __name__ == "__main__":
    main()
