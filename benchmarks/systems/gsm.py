"""Global sparse momentum on LeNet-300-100: one weight in sixty, without fine-tuning.

A dense network is trained, goes through GSM, and is pruned by magnitude in one shot;
beside it the dense network pruned in the same way. The masks that both leave are tried
as lottery tickets: the initial weights under the mask, trained anew.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.systems import figures, records, training
from benchmarks.systems.records import Claim, Row
from prunadag_optax import masks
from prunadag_optax.methods import lottery_ticket as lt
from prunadag_optax.methods import sparse_momentum

TITLE = "LeNet-300-100 at 60x compression: GSM"
METRICS = {"accuracy": 2, "against dense": 2, "weights left": 3}
DENSE, MAGNITUDE, GSM = "dense", "dense, pruned", "GSM, pruned"
TICKETS = {MAGNITUDE: "magnitude ticket", GSM: "GSM ticket"}
# Shares pruned in the figure; 60x is 98.3%.
SPARSITIES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.97, 0.98, 59 / 60, 0.987, 0.99)
PUBLISHED_FIGURES = {
    DENSE: {"accuracy": "98.19"},
    GSM: {"accuracy": "98.18", "against_dense": "-0.01", "weights_left": "1.66"},
    TICKETS[MAGNITUDE]: {"accuracy": "97.39", "weights_left": "1.66"},
    TICKETS[GSM]: {"accuracy": "98.22", "weights_left": "1.66"},
}


class Settings(NamedTuple):
    """Numbers of the experiment.

    Attributes:
      hidden: sizes of the hidden layers.
      compression: C, prunable weights for each that stays.
      epochs: of the dense training; its learning rate is a tenth after each fifth.
      gsm_epochs: of GSM; its learning rate is a tenth after 160, 200 and 240 parts of
        280.
      batch: size of a minibatch.
      rate: of the dense training.
      momentum: of the dense training.
      gsm_rate: of GSM.
      gsm_momentum: beta.
      weight_decay: eta, of GSM.
    """

    hidden: tuple[int, ...] = training.LENET
    compression: float = 60
    epochs: int = 50
    gsm_epochs: int = 140
    batch: int = 256
    rate: float = 3e-2
    momentum: float = 0.9
    gsm_rate: float = 1e-2
    gsm_momentum: float = 0.99
    weight_decay: float = 2e-3


PUBLISHED = Settings(epochs=200, gsm_epochs=280, weight_decay=5e-4)
QUICK = Settings(
    hidden=(32,),
    compression=10,
    epochs=40,
    gsm_epochs=140,
    batch=25,
    gsm_momentum=0.95,
    weight_decay=1e-2,
)


def milestones(epochs: int, parts: tuple[int, ...], whole: int) -> tuple[int, ...]:
    """Epochs in the proportion of a published schedule, each at least 1.

    Examples:
      >>> milestones(70, (160, 200, 240), 280)
      (40, 50, 60)
    """
    return tuple(max(1, round(epochs * part / whole)) for part in parts)


def rates(
    settings: Settings, data: training.Data
) -> tuple[optax.Schedule, optax.Schedule]:
    """The learning rates of dense training, which tickets have too, and of GSM."""
    dense, gsm = (
        milestones(settings.epochs, (40, 80, 120, 160), 200),
        milestones(settings.gsm_epochs, (160, 200, 240), 280),
    )
    return (
        training.stepwise(settings.rate, data.train, settings.batch, dense),
        training.stepwise(settings.gsm_rate, data.train, settings.batch, gsm),
    )


def pruned(params: Any, settings: Settings) -> tuple[Any, Any]:
    """The parameters pruned by magnitude to one in C of the weights, and their mask."""
    return masks.prune(params, 1 - 1 / settings.compression)


def measure(params: Any, state: Any, data: training.Data) -> dict[str, jax.Array]:
    """Test accuracy, %."""
    del state
    return {"accuracy": training.accuracy(params, data.test)}


def weights_left(params: Any) -> jax.Array:
    """Share of the kernels' weights that are not zero, %."""
    return 100 * (1 - masks.sparsity(training.prunable(params)))


def pruning_curve(params: Any, data: training.Data) -> jax.Array:
    """Test accuracy (%) after one-shot pruning to each of SPARSITIES."""
    return jnp.stack(
        [_pruned_accuracy(params, data, jnp.float32(s)) for s in SPARSITIES]
    )


@jax.jit
def _pruned_accuracy(params, data, sparsity) -> jax.Array:
    less, _ = masks.prune(params, sparsity)
    return training.accuracy(less, data.test)


def run(
    settings: Settings, data: training.Data, seeds: int
) -> tuple[list[Row], dict[str, Any]]:
    """Rows, and accuracies against the share pruned in one shot."""
    dense_rate, gsm_rate = rates(settings, data)

    def dense_tx(mask):
        base = optax.sgd(dense_rate, settings.momentum)
        return base if mask is None else lt.sparse_optimizer(base, mask)

    def gsm_tx(_):
        return sparse_momentum.gsm(
            gsm_rate, settings.compression, settings.gsm_momentum, settings.weight_decay
        )

    fit, fit_gsm = (
        training.trainer(tx, batch=settings.batch, measure=measure)
        for tx in (dense_tx, gsm_tx)
    )
    seconds: dict[str, float] = {}
    total = 3 * settings.epochs + settings.gsm_epochs

    def one(key):
        keys = jax.random.split(key, 5)
        initial = training.init_network(
            keys[0],
            training.layers(data, settings.hidden),
            training.KAIMING,
        )
        trained, kept, tickets = {}, {}, {}
        with training.timed(seconds, DENSE, bar):
            trained[MAGNITUDE] = dense = fit(
                data, initial, keys[1], epochs=settings.epochs, bar=bar
            ).params
        with training.timed(seconds, GSM, bar):
            trained[GSM] = fit_gsm(
                data, dense, keys[2], epochs=settings.gsm_epochs, bar=bar
            ).params
        for name, key in zip((MAGNITUDE, GSM), keys[3:], strict=True):
            kept[name], mask = pruned(trained[name], settings)
            with training.timed(seconds, TICKETS[name], bar):
                tickets[TICKETS[name]] = fit(
                    data,
                    masks.apply_mask(initial, mask),
                    key,
                    epochs=settings.epochs,
                    argument=mask,
                    bar=bar,
                ).params
        accuracies = {
            name: (training.accuracy(params, data.test), weights_left(params))
            for name, params in {DENSE: dense, **kept, **tickets}.items()
        }
        return accuracies, {
            name: pruning_curve(params, data) for name, params in trained.items()
        }

    with training.progress(total, "gsm") as bar:
        accuracies, pruning = training.over_seeds(one, seeds)
    rows = [
        records.row(
            name,
            {
                "accuracy": accuracy,
                "against dense": accuracy - accuracies[DENSE][0],
                "weights left": left,
            },
            seconds.get(name, 0.0),
            **PUBLISHED_FIGURES.get(name, {}),
        )
        for name in (DENSE, MAGNITUDE, GSM, *TICKETS.values())
        for accuracy, left in [accuracies[name]]
    ]
    percent = [100 * sparsity for sparsity in SPARSITIES]
    curves = {
        label: records.curve(percent, accuracy=pruning[name])
        for name, label in ((MAGNITUDE, "dense"), (GSM, "GSM"))
    }
    return rows, curves


def about(settings: Settings) -> str:
    """What was run, and how it differs from what was published."""
    whole = "as published"
    if (settings.epochs, settings.gsm_epochs) != (
        PUBLISHED.epochs,
        PUBLISHED.gsm_epochs,
    ):
        whole = (
            f"published are {PUBLISHED.epochs} and {PUBLISHED.gsm_epochs}; the "
            "learning rate falls at the same shares of them"
        )
    if settings.weight_decay != PUBLISHED.weight_decay:
        whole += (
            f"; the published weight decay is {PUBLISHED.weight_decay:g}, and how far "
            "a passive weight shrinks is set by its product with the number of epochs"
        )
    return (
        f"LeNet-300-100 on all of MNIST, minibatches of {settings.batch}: momentum "
        f"SGD ({settings.rate:g}, {settings.momentum:g}) for {settings.epochs} epochs, "
        f"then GSM ({settings.gsm_rate:g}, momentum {settings.gsm_momentum:g}, "
        f"weight decay {settings.weight_decay:g}) for {settings.gsm_epochs} ({whole}). "
        f"Then one weight in {settings.compression:g} is kept, by magnitude over all "
        "layers, with no training after it. Tickets: the initial weights under that "
        f"mask, trained for {settings.epochs} epochs as the dense network. Published: "
        "Ding et al. 2019, tables 1 and 4; its best rival there is DNS with 98.01% at "
        "55.6x."
    )


def claims(rows: list[Row], settings: Settings) -> list[Claim]:
    """What the paper says, held to what was measured."""
    lost = records.mean(rows, GSM, "against dense")
    ticket, rival = (
        records.mean(rows, TICKETS[name], "accuracy") for name in (GSM, MAGNITUDE)
    )
    return [
        Claim(
            f"GSM at {settings.compression:g}x is within 0.3 points of its dense base",
            lost >= -0.3,
            f"{lost:+.2f} points",
        ),
        Claim(
            "GSM's mask is the better lottery ticket than the dense network's",
            ticket > rival,
            f"{ticket:.2f}% against {rival:.2f}%",
        ),
    ]


def draw(axes: Any, rows: list[Row], curves: dict[str, Any]) -> None:
    """Accuracy against the share pruned in one shot, whole and near the end."""
    del rows
    for ax in axes:
        figures.curves(ax, curves, "accuracy", marker="o", markersize=3)
        ax.set_xlabel("weights pruned in one shot (%)")
        ax.set_ylabel("test accuracy (%)")
    axes[1].set_xlim(94.5, 99.2)
    axes[1].set_ylim(90, 99)
