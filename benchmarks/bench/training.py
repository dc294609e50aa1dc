"""Training by a contender, on the device, compiled.

Learning rate and seed are traced: trials and seeds of a contender share what is
compiled.
"""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.bench import tasks
from benchmarks.bench.contenders import Contender, Plan
from prunadag_optax import eval_params, masks

# Examples that are evaluated at once.
CHUNK = 1000


class Carry(NamedTuple):
    """What a step changes."""

    params: Any
    stats: Any  # of normalisation layers
    state: Any  # of the optimizer


class Fitted(NamedTuple):
    """The end of a training.

    Attributes:
      params: those to evaluate, prune and save.
      stats: of normalisation layers.
      state: of the optimizer.
      step_ms: wall time of a step, ms, in the fastest epoch.
    """

    params: Any
    stats: Any
    state: Any
    step_ms: float


def steps_of(task: tasks.Task, contender: Contender, epochs: int) -> int:
    """The steps of a training of so many epochs, as the contender's length has it."""
    return round(epochs * contender.length) * task.steps_per_epoch


@functools.lru_cache(maxsize=4)
def _compiled(
    task: tasks.Task, contender: Contender, plan: Plan
) -> tuple[Callable[..., Carry], Callable[..., Carry]]:
    """How to start, and an epoch."""
    network = tasks.network(task)
    grad = contender.gradient(jax.value_and_grad(network.loss, has_aux=True), plan)

    def optimizer(rate, key):
        tx = contender.make(rate, plan, jax.random.fold_in(key, 1))
        return optax.with_extra_args_support(tx)

    @jax.jit
    def start(rate, key):
        params, stats = network.init(jax.random.fold_in(key, 0))
        state = optimizer(rate, key).init(params)
        # A method whose network is sparse from the first step on says so here.
        return Carry(eval_params(state, params), stats, state)

    def step(train, carry, given, rate, key):
        chosen, step_key = given
        part = tasks.minibatch(task, train, chosen, jax.random.fold_in(step_key, 1))
        (_, stats), gradient = grad(carry.params, step_key, carry.stats, part)
        tx = optimizer(rate, key)
        updates, state = tx.update(gradient, carry.state, carry.params)
        return Carry(optax.apply_updates(carry.params, updates), stats, state)

    @jax.jit
    def planned(train, key, number):
        epoch_key = jax.random.fold_in(jax.random.fold_in(key, 2), number)
        keys = jax.random.split(epoch_key, task.steps_per_epoch)
        return tasks.order(task, train, epoch_key), keys

    @functools.partial(jax.jit, donate_argnums=1)
    def scanned(train, carry, rate, key, number):
        def one(carry, given):
            return step(train, carry, given, rate, key), None

        return jax.lax.scan(one, carry, planned(train, key, number))[0]

    one_step = jax.jit(step, donate_argnums=1)

    def looped(train, carry, rate, key, number):
        for given in zip(*planned(train, key, number), strict=True):
            carry = one_step(train, carry, given, rate, key)
        return carry

    return start, looped if task.looped else scanned


def fit(
    task: tasks.Task,
    contender: Contender,
    *,
    sparsity: float | None,
    sparsities: tuple[float, ...],
    rate: float,
    seed: int,
    epochs: int,
) -> Fitted:
    """Trains.

    Args:
      task: the task.
      contender: the method.
      sparsity: to train for, or None.
      sparsities: those that will be asked for.
      rate: the learning rate.
      seed: gives the initial weights, the minibatches and what is random in the method.
      epochs: how many, of those who train the usual length.

    Returns:
      The end of the training.
    """
    steps = steps_of(task, contender, epochs)
    plan = Plan(steps, 0.0 if sparsity is None else sparsity, sparsities)
    start, epoch = _compiled(task, contender, plan)
    train = tasks.load(task).train
    given = jnp.float32(rate), jax.random.key(seed)
    carry = start(*given)
    times = []
    for number in range(steps // task.steps_per_epoch):
        began = time.perf_counter()
        carry = jax.block_until_ready(epoch(train, carry, *given, number))
        times.append(1e3 * (time.perf_counter() - began) / task.steps_per_epoch)
    params = eval_params(carry.state, carry.params)
    return Fitted(params, carry.stats, carry.state, min(times))


@functools.lru_cache(maxsize=4)
def _measures(task: tasks.Task) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """How many are right, and the sum of the losses."""
    network = tasks.network(task)

    @jax.jit
    def measure(params, stats, examples):
        logits = network.logits(params, stats, examples.inputs)
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits, examples.targets
        )
        return (logits.argmax(-1) == examples.targets).sum(), losses.sum()

    return measure


_prune = jax.jit(
    lambda params, sparsity, score: masks.prune(params, sparsity, score=score)[0],
    static_argnames="score",
)


def measured(
    task: tasks.Task,
    fitted: Fitted,
    part: str,
    sparsities: tuple[float, ...],
    score: str = "magnitude",
) -> dict[str, dict[str, float]]:
    """Accuracy and loss of the network, pruned once to each sparsity.

    The statistics of batch normalisation are computed anew after pruning.

    Args:
      task: the task.
      fitted: the trained network.
      part: "validation" or "test".
      sparsities: what to prune to.
      score: what is ranked.

    Returns:
      By sparsity: "accuracy", %, and "loss", nats.
    """
    measure, network = _measures(task), tasks.network(task)
    data = tasks.load(task)
    examples = getattr(data, part)
    found = {}
    for sparsity in sparsities:
        pruned = _prune(fitted.params, jnp.float32(sparsity), score=score)
        stats = network.recalibrated(pruned, fitted.stats, data.train)
        sums = np.zeros(2)
        for begin in range(0, len(examples.targets), CHUNK):
            chunk = jax.tree.map(lambda x, i=begin: x[i : i + CHUNK], examples)
            sums += np.asarray(measure(pruned, stats, chunk), float)
        right, loss = sums / examples.targets.size
        found[f"{sparsity:g}"] = {
            "accuracy": float(f"{100 * right:.6g}"),
            "loss": float(f"{loss:.5g}"),
        }
    return found
