"""Training by a contender, on the device, an epoch in each compiled call.

Learning rate and seed are traced: trials and seeds of a contender share what is
compiled.
"""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
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

    @functools.partial(jax.jit, donate_argnums=1)
    def epoch(train, carry, rate, key, number):
        tx = optimizer(rate, key)
        epoch_key = jax.random.fold_in(jax.random.fold_in(key, 2), number)
        order = jax.random.permutation(epoch_key, len(train.targets))
        order = order[: task.steps_per_epoch * task.batch]

        def step(carry, given):
            chosen, step_key = given
            part = jax.tree.map(lambda x: x[chosen], train)
            (_, stats), gradient = grad(carry.params, step_key, carry.stats, part)
            updates, state = tx.update(gradient, carry.state, carry.params)
            params = optax.apply_updates(carry.params, updates)
            return Carry(params, stats, state), None

        keys = jax.random.split(epoch_key, task.steps_per_epoch)
        return jax.lax.scan(step, carry, (order.reshape(-1, task.batch), keys))[0]

    return start, epoch


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
    network = tasks.network(task)

    @jax.jit
    def measure(params, stats, examples, sparsity):
        pruned, _ = masks.prune(params, sparsity)

        def one(example):
            inputs, target = example
            [logits] = network.logits(pruned, stats, inputs[None])
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, target)
            return logits.argmax() == target, loss

        size = min(CHUNK, len(examples.targets))
        right, losses = jax.lax.map(one, tuple(examples), batch_size=size)
        return right.mean(), losses.mean()

    return measure


def measured(
    task: tasks.Task, fitted: Fitted, part: str, sparsities: tuple[float, ...]
) -> dict[str, dict[str, float]]:
    """Accuracy and loss of the network, pruned once to each sparsity by magnitude.

    Args:
      task: the task.
      fitted: the trained network.
      part: "validation" or "test".
      sparsities: what to prune to.

    Returns:
      By sparsity: "accuracy", %, and "loss", nats.
    """
    measure = _measures(task)
    examples = getattr(tasks.load(task), part)
    found = {}
    for sparsity in sparsities:
        right, loss = measure(
            fitted.params, fitted.stats, examples, jnp.float32(sparsity)
        )
        found[f"{sparsity:g}"] = {
            "accuracy": float(f"{100 * float(right):.6g}"),
            "loss": float(f"{float(loss):.5g}"),
        }
    return found
