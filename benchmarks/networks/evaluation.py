"""What is measured of a trained network: metric and loss against sparsity.

One-shot: pruned by magnitude, nothing else done; where shares of the weights take turns
in training, with the running averages kept for the share that is left. Recalibrated:
batch statistics are computed anew on training images, without labels, after pruning.
Fine-tuned: trained for one epoch more with the mask held, by the same optimizer for
all.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.networks import tasks, training
from benchmarks.networks.tasks import Examples, Settings
from benchmarks.systems.training import prunable
from prunadag_optax import masks
from prunadag_optax.methods import lottery_ticket as lt

SPARSITIES = (0.0, 0.5, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99)
FINE_TUNED = (0.9, 0.95, 0.98, 0.99)
# Of Adam in fine-tuning, falling to 0 as a cosine.
FINE_TUNING_RATE = 1e-3
# Training images that batch statistics are computed anew on, and those of a batch.
CALIBRATION, CHUNK = 2000, 500


def chunks(count: int, most: int = CHUNK) -> int:
    """The largest size, up to `most`, of equal parts.

    Examples:
      >>> chunks(10_000), chunks(600), chunks(397)
      (500, 300, 397)
    """
    return max(size for size in range(1, most + 1) if count % size == 0)


class Evaluator(NamedTuple):
    """Compiled measurements of a task.

    Attributes:
      measure: function (params, stats, examples) -> metric (%), loss (nats).
      statistics: function (params, stats, images) -> the statistics of the images.
      fine_tune: function (params, stats, train, mask, key) -> params, stats; trains the
        pruned parameters.
    """

    measure: Callable[..., tuple[float, float]]
    statistics: Callable[..., Any]
    fine_tune: Callable[..., tuple[Any, Any]]


def evaluator(settings: Settings, classes: int) -> Evaluator:
    """The measurements of a task, compiled when first used."""
    return _evaluator(settings._replace(data=""), classes)


@functools.lru_cache(maxsize=8)
def _evaluator(settings: Settings, classes: int) -> Evaluator:
    module = training.module_of(settings, classes)

    def right_and_loss(params, stats, examples):
        logits = module.apply({"params": params, "batch_stats": stats}, examples.inputs)
        right = logits.argmax(-1) == examples.targets
        return right.mean(), training.losses(logits, examples).mean()

    def batch_statistics(params, stats, images):
        # momentum 0: what is stored are the statistics of this batch and no other.
        _, new = module.apply(
            {"params": params, "batch_stats": stats},
            images,
            train=True,
            momentum=0.0,
            mutable=["batch_stats"],
        )
        return new["batch_stats"]

    mean_right_and_loss = _mean_over_chunks(right_and_loss, settings.looped)

    def measure(params, stats, examples):
        right, loss = mean_right_and_loss(params, stats, examples)
        return 100 * float(right), float(loss)

    def sparse_adam(mask):
        rate = optax.cosine_decay_schedule(FINE_TUNING_RATE, settings.steps_per_epoch)
        return lt.sparse_optimizer(optax.adam(rate), mask)

    epoch = training.epoch_of(settings, module, sparse_adam)

    def fine_tune(params, stats, train, mask, key):
        state = sparse_adam(mask).init(params)
        # Copies, which may be donated.
        params = jax.tree.map(jnp.array, params)
        stats = training.stacked(stats, ())
        carry = training.Carry(params, stats, state, jnp.int32(0))
        carry = epoch(train, carry, mask, key)
        return carry.params, training.averages_at(carry.stats, (), 1.0)

    return Evaluator(
        measure, _mean_over_chunks(batch_statistics, settings.looped), fine_tune
    )


def _mean_over_chunks(function: Callable[..., Any], looped: bool) -> Callable[..., Any]:
    """The mean of what a function (params, stats, examples) gives for equal parts."""

    @jax.jit
    def mapped(params, stats, examples):
        found = jax.lax.map(lambda x: function(params, stats, x), _in_chunks(examples))
        return jax.tree.map(lambda x: x.mean(0), found)

    one, split = jax.jit(function), jax.jit(_in_chunks)

    def one_by_one(params, stats, examples):
        parts = split(examples)
        count = len(jax.tree.leaves(parts)[0])
        found = [
            one(params, stats, jax.tree.map(lambda x, i=i: x[i], parts))
            for i in range(count)
        ]
        return jax.tree.map(lambda *each: sum(each) / count, *found)

    return one_by_one if looped else mapped


@jax.jit
def pruned(params: Any, sparsity: jax.Array) -> tuple[Any, Any]:
    """The parameters with that share of the prunable weights at zero, and the mask."""
    return masks.prune(params, sparsity)


def _in_chunks(tree: Any) -> Any:
    """The first axis of every array in two, [parts, examples of a part]."""

    def parts(x):
        return x.reshape(-1, chunks(len(x)), *x.shape[1:])

    return jax.tree.map(parts, tree)


def measured(
    settings: Settings,
    data: tasks.Data,
    fitted: training.Fitted,
    split: str,
    fine_tune_at: tuple[float, ...] = (),
    seed: int = 0,
) -> dict[str, Any]:
    """All that is reported of a run, as JSON.

    Args:
      settings: of the task.
      data: of the task.
      fitted: the trained network.
      split: "validation" or "test".
      fine_tune_at: sparsities to fine-tune at.
      seed: of the minibatches of fine-tuning.

    Returns:
      By name a list of one number for each of SPARSITIES, or by sparsity.
    """
    use = evaluator(settings, tasks.classes(settings, data))
    examples: Examples = getattr(data, split)
    params = fitted.params
    images = data.train.inputs[:CALIBRATION]
    key = jax.random.fold_in(jax.random.key(seed), 1_000_000)
    known: dict[str, Any] = {}

    def add(name, sparsity, params, stats):
        metric, loss = use.measure(params, stats, examples)
        known.setdefault(name, {})[f"{sparsity:g}"] = _rounded(metric)
        known.setdefault(f"{name} loss", {})[f"{sparsity:g}"] = _rounded(loss)

    for sparsity in SPARSITIES:
        cut, mask = pruned(params, jnp.float32(sparsity))
        stats = training.averages_at(fitted.stats, fitted.shares, 1 - sparsity)
        add("one-shot", sparsity, cut, stats)
        if settings.normalised:
            fitting = use.statistics(cut, stats, images)
            add("recalibrated", sparsity, cut, fitting)
        if sparsity in fine_tune_at:
            tuned = use.fine_tune(cut, stats, data.train, mask, key)
            add("fine-tuned", sparsity, *tuned)
    return {
        name: found if name.startswith("fine-tuned") else list(found.values())
        for name, found in known.items()
    }


def _rounded(x: float) -> float:
    return float(f"{x:.6g}")


def zeros(params: Any) -> jax.Array:
    """The share of the prunable weights that is exactly zero."""
    return masks.sparsity(prunable(params))
