"""Lottery tickets of LeNet-300-100, against their random controls.

Iterative magnitude pruning with rewinding to the initial weights, and, at two of its
rounds, the same mask on other initial weights, and the initial weights under a random
mask of the same densities.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.systems import figures, records, training
from benchmarks.systems.records import Claim, Row
from prunadag_optax import masks
from prunadag_optax.methods import lottery_ticket as lt

TITLE = "Lottery tickets: iterative pruning against random controls"
METRICS = {
    "weights left": 1,
    "accuracy": 2,
    "accuracy at stop": 2,
    "stop iteration": 0,
}
REINITIALISED, RANDOM = "reinitialised", "random mask"
COMPARED = (7, 15)  # rounds with controls: 21.1% and 3.6% of the weights


class Settings(NamedTuple):
    """Numbers of the experiment.

    Attributes:
      layers: sizes of the hidden layers.
      rounds: of pruning.
      compared: rounds that have controls.
      hidden: share of the remaining weights of hidden layers to prune in a round.
      output: the same of the output layer.
      epochs: of each training.
      batch: size of a minibatch.
      rate: of Adam.
      validation: training images held out to choose when to stop.
      parts: how often to look in an epoch.
    """

    layers: tuple[int, ...] = training.LENET
    rounds: int = 15
    compared: tuple[int, ...] = COMPARED
    hidden: float = 0.2
    output: float = 0.1
    epochs: int = 8
    batch: int = 60
    rate: float = 1.2e-3
    validation: int = 5000
    parts: int = 4


QUICK = Settings(
    layers=(32,),
    rounds=2,
    compared=(2,),
    epochs=10,
    batch=25,
    rate=3e-3,
    validation=300,
)


def measure(params: Any, state: Any, data: training.Data) -> dict[str, jax.Array]:
    """Loss on the validation images, and test accuracy (%)."""
    del state
    assert data.validation is not None
    return {
        "validation loss": training.loss(params, data.validation),
        "accuracy": training.accuracy(params, data.test),
    }


def fraction_of(settings: Settings) -> lt.Fraction:
    """The share to prune of each layer."""
    output = f"Dense_{len(settings.layers)}"
    return lambda path, leaf: (
        settings.output if path[0].key == output else settings.hidden
    )


def name_of(number: int, kind: str = "ticket") -> str:
    """Of a row."""
    return "dense" if number == 0 else f"round {number}, {kind}"


def run(
    settings: Settings, data: training.Data, seeds: int
) -> tuple[list[Row], dict[str, Any]]:
    """A row for each round and control; how accuracy grows, and where it ends."""
    data = training.with_validation(data, settings.validation)
    fit = training.trainer(
        lambda mask: lt.sparse_optimizer(optax.adam(settings.rate), mask),
        batch=settings.batch,
        measure=measure,
        parts=settings.parts,
    )
    seconds: dict[str, float] = {}

    def one(key):
        initial_key, order, other, shuffle = jax.random.split(key, 4)

        def init(key):
            return training.init_network(
                key,
                training.layers(data, settings.layers),
                training.GLOROT,
            )

        def train(start, mask):
            fitted = fit(
                data, start, order, epochs=settings.epochs, argument=mask, bar=bar
            )
            return fitted.params, fitted.history

        initial, found = init(initial_key), {}
        tickets = lt.iterative_magnitude_pruning(
            train,
            initial,
            rounds=settings.rounds,
            fraction=fraction_of(settings),
            scope="leaf",
            has_aux=True,
        )
        for number in range(settings.rounds + 1):
            name = name_of(number)
            with training.timed(seconds, name, bar):
                ticket = next(tickets)
            left = 100 * (1 - masks.sparsity(ticket.mask))
            found[name] = ticket.aux | {"weights left": left}
            if number not in settings.compared:
                continue
            random = lt.random_mask(jax.random.fold_in(shuffle, number), ticket.mask)
            new = jax.random.fold_in(other, number)
            for kind, start, mask in (
                (REINITIALISED, lt.reinitialised(new, init, ticket.mask), ticket.mask),
                (RANDOM, masks.apply_mask(initial, random), random),
            ):
                name = name_of(number, kind)
                with training.timed(seconds, name, bar):
                    _, history = train(start, mask)
                found[name] = history | {"weights left": left}
        return found

    trainings = settings.rounds + 1 + 2 * len(settings.compared)
    with training.progress(trainings * settings.epochs, "lottery") as bar:
        found = training.over_seeds(one, seeds)
    interval = training.steps_of(data.train, settings.batch, 1) // settings.parts
    times = [interval * (i + 1) for i in range(settings.epochs * settings.parts)]
    rows, curves = [], {}
    # In the order of the rounds, in which vmap does not hand them back.
    for name in seconds:
        values = found[name]
        stop = jnp.argmin(values["validation loss"], axis=1)
        at_stop = jnp.take_along_axis(values["accuracy"], stop[:, None], axis=1)[:, 0]
        figures_ = {
            "weights left": values["weights left"],
            "accuracy": values["accuracy"][:, -1],
            "accuracy at stop": at_stop,
            "stop iteration": interval * (stop + 1),
        }
        rows.append(records.row(name, figures_, seconds[name]))
        curves[name] = records.curve(times, accuracy=values["accuracy"])
    return rows, curves


def about(settings: Settings) -> str:
    """What was run, and how it differs from what was published."""
    steps = 55_000 // settings.batch * settings.epochs
    return (
        f"LeNet-300-100 on MNIST, {settings.validation} of the training images held "
        f"out; Glorot-normal initial weights, Adam ({settings.rate:g}), minibatches of "
        f"{settings.batch}, {settings.epochs} epochs: {steps:,} iterations a training "
        f"(published: 50,000). {settings.rounds} rounds prune {settings.hidden:.0%} of "
        f"what remains of each hidden layer and {settings.output:.0%} of the output "
        "layer, and rewind to the initial weights. Stop is where the validation loss "
        "is least; the test accuracy is looked at then, and at the end. Reinitialised: "
        "the ticket's mask on other initial weights; random mask: as many weights of "
        "each layer, at random. Published (Frankle and Carbin 2019, section 2): the "
        "ticket at 51.3% learns faster than the dense network, that at 21.1% fastest, "
        "that at 3.6% about as the dense one; reinitialised ones learn ever more "
        "slowly and reach less. The paper shows these as curves, so there is no figure "
        "to stand beside a row."
    )


def claims(rows: list[Row], settings: Settings) -> list[Claim]:
    """What the paper says, held to what was measured."""
    found = []

    def mean(name, metric):
        return records.mean(rows, name, metric)

    for number in settings.compared:
        ticket, control = name_of(number), name_of(number, REINITIALISED)
        left = mean(ticket, "weights left")
        a, b = (mean(name, "accuracy at stop") for name in (ticket, control))
        found.append(
            Claim(
                f"at {left:.1f}% the ticket reaches a higher accuracy than its "
                "reinitialised control",
                a > b,
                f"{a:.2f}% against {b:.2f}% at the stop",
            )
        )
        a, b = (mean(name, "stop iteration") for name in (ticket, control))
        found.append(
            Claim(
                f"at {left:.1f}% the ticket learns faster than its reinitialised "
                "control",
                a < b,
                f"iteration {a:.0f} against {b:.0f}",
            )
        )
    first, dense = name_of(settings.compared[0]), name_of(0)
    a, b = (mean(name, "accuracy at stop") for name in (first, dense))
    found.append(
        Claim(
            f"at {mean(first, 'weights left'):.1f}% the ticket reaches at least the "
            "dense network's accuracy",
            a >= b,
            f"{a:.2f}% against {b:.2f}%",
        )
    )
    return found


def draw(axes: Any, rows: list[Row], curves: dict[str, Any]) -> None:
    """Accuracy at the stop against the weights left; accuracy over the iterations."""
    for kind, style in (("ticket", "o-"), (REINITIALISED, "s--"), (RANDOM, "^:")):
        own = [row for row in rows if kind in row.method]
        if kind == "ticket":
            own = [row for row in rows if row.method == "dense"] + own
        left, values = (
            np.array([row.values[metric] for row in own])
            for metric in ("weights left", "accuracy at stop")
        )
        axes[0].errorbar(
            left.mean(1),
            values.mean(1),
            abs(np.stack([values.min(1), values.max(1)]) - values.mean(1)),
            fmt=style,
            markersize=4,
            capsize=2,
            label=kind,
        )
    axes[0].set_xscale("log")
    axes[0].invert_xaxis()
    axes[0].grid(alpha=0.3)
    axes[0].set_xlabel("weights left (%)")
    axes[0].set_ylabel("test accuracy at the stop (%)")
    shown = {
        name: curve
        for name, curve in curves.items()
        if name == "dense" or len([n for n in curves if n.startswith(name[:8])]) > 1
    }
    figures.curves(axes[1], shown, "accuracy")
    axes[1].set_ylim(94, 98.8)
    axes[1].set_xlabel("iteration")
    axes[1].set_ylabel("test accuracy (%)")
    axes[1].legend(frameon=False, fontsize="x-small")
