"""A ladder of networks out of one training, against a training for each.

The page and its records call the ladder a family, its name when they were made.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from tqdm.auto import tqdm

from benchmarks.archive.recipe.studies import SHRINK
from benchmarks.systems import records, training
from prunadag_optax import masks, recipes

TITLE = "A family out of one training"
SPARSITIES = (0.9, 0.95, 0.98, 0.99)
HYPOTHESIS = (
    "A network at 95% is on the way to one at 98%, so one training can pass through "
    "all; each stage then has less time, but a better start."
)
ALONE = "targeted, a training for each"
PARTS: dict[str, tuple[float, ...]] = {
    "family, parts 40, 20, 20, 20%": (0.4, 0.2, 0.2, 0.2),
    "family, parts 25, 25, 25, 25%": (0.25, 0.25, 0.25, 0.25),
    "family, parts 55, 15, 15, 15%": (0.55, 0.15, 0.15, 0.15),
}


def _minibatches(data: training.Data, key: jax.Array, batch: int, steps: int) -> Any:
    """As many minibatches of a random order as there are steps."""
    size = len(data.train.labels)
    epoch = size // batch
    for number in range(-(-steps // epoch)):
        order = np.asarray(
            jax.random.permutation(jax.random.fold_in(key, number), size)
        )
        yield from order[: epoch * batch].reshape(epoch, batch)


def accuracies(
    data: training.Data,
    seed: int,
    parts: tuple[float, ...] | None,
    *,
    epochs: int,
    hidden: Any,
    batch: int,
) -> list[float]:
    """Accuracy (%) at each of SPARSITIES: of a family, or of a training for each."""
    initial, order = jax.random.split(jax.random.key(seed))
    params = training.init_network(
        initial, training.layers(data, hidden), training.KAIMING
    )
    steps = training.steps_of(data.train, batch, epochs)

    def gradient(params, rows):
        chosen = jax.tree.map(lambda x: x[rows], data.train)
        return jax.grad(training.loss)(params, chosen)

    def members(sparsities, parts):
        return recipes.ladder(
            gradient,
            params,
            _minibatches(data, order, batch, steps),
            total_steps=steps,
            sparsities=sparsities,
            parts=parts,
            shrink_rate=SHRINK,
        )

    if parts is not None:
        found = list(members(SPARSITIES, parts))
    else:
        found = [
            alone(data, params, order, gradient, steps, batch, s) for s in SPARSITIES
        ]
    return [float(training.accuracy(m, data.test)) for m in map(_params, found)]


def _params(member: Any) -> Any:
    return member.params if isinstance(member, recipes.Member) else member


def alone(
    data: training.Data,
    params: Any,
    order: jax.Array,
    gradient: Callable[..., Any],
    steps: int,
    batch: int,
    sparsity: float,
) -> Any:
    """A network trained by `recipes.targeted`, pruned."""
    rate = optax.cosine_decay_schedule(3e-3, steps)
    tx = recipes.targeted(
        steps, sparsity=sparsity, learning_rate=rate, shrink_rate=SHRINK, l1=0.0
    )

    @jax.jit
    def step(params, state, rows):
        updates, state = tx.update(gradient(params, rows), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for rows in _minibatches(data, order, batch, steps):
        params, state = step(params, state, rows)
    return masks.prune(params, sparsity)[0]


def run(
    data: training.Data, known: dict[str, Any], *, seeds: int, **settings: Any
) -> Any:
    """Accuracies by case, [seeds][sparsities], with wall time; known ones are kept."""
    cases: dict[str, Any] = {ALONE: None, **PARTS}
    for name, parts in (bar := tqdm(cases.items(), desc="family", disable=None)):
        bar.set_postfix_str(name)
        if name in known:
            continue
        began = time.perf_counter()
        found = [accuracies(data, seed, parts, **settings) for seed in range(seeds)]
        seconds = round(time.perf_counter() - began, 1)
        known[name] = {"accuracies": found, "seconds": seconds}
        yield known


def section(known: dict[str, Any]) -> str:
    """Markdown: the table and a verdict for each family."""
    head = ["case", *(f"{s:.0%}" for s in SPARSITIES), "wall time of all seeds (s)"]
    rows = [head, ["---"] * len(head)]
    lines = []
    reference = np.asarray(known[ALONE]["accuracies"])
    for name, case in known.items():
        found = np.asarray(case["accuracies"])
        cells = [records.spread(column.tolist(), 2) for column in found.T]
        rows.append([name, *cells, f"{case['seconds']:.0f}"])
        if name != ALONE:
            gains = (found - reference).mean(0)
            said = ", ".join(
                f"{gain:+.2f} at {s:.0%}"
                for gain, s in zip(gains, SPARSITIES, strict=True)
            )
            lines.append(f"* {name}: {said}.")
    return "\n\n".join(
        [
            f"## {TITLE}",
            f"**Hypothesis.** {HYPOTHESIS}",
            "**Experiment.** `recipes.family` in as many steps as `recipes.targeted` "
            "has for each sparsity alone. Validation accuracy (%): mean ± standard "
            "deviation (range) over the seeds.",
            "\n".join("| " + " | ".join(row) + " |" for row in rows),
            "**Verdict.** Points above (+) or below (-) a training for each, which "
            f"takes {len(SPARSITIES)} times as many steps in all:",
            "\n".join(lines),
        ]
    )
