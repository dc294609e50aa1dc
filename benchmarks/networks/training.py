"""Training of a network by a contender, on the device, compiled.

Hyperparameter, target and the order of the minibatches are traced: trials, seeds and
targets of a contender share their compilation. What is compiled is kept by the
settings, so that tasks that differ in their data only share it too.
"""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.networks import models, tasks
from benchmarks.networks.plans import Contender, Plan
from benchmarks.networks.tasks import Examples, Settings


class Carry(NamedTuple):
    """What a step changes."""

    params: Any
    stats: Any  # the collection "batch_stats", empty without
    state: Any  # of the optimizer


class Fitted(NamedTuple):
    """The end of a training.

    Attributes:
      params: those to evaluate.
      stats: the collection "batch_stats".
      trained: those that the optimizer has last moved.
      step_seconds: wall time of a step, of the fastest epoch.
    """

    params: Any
    stats: Any
    trained: Any
    step_seconds: float


def module_of(settings: Settings, classes: int) -> Any:
    """The network of a task."""
    return models.MODELS[settings.model](settings.widths, classes)


def losses(logits: jax.Array, examples: Examples) -> jax.Array:
    """Cross entropy of each example, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, examples.targets)


def loss(
    module: Any, params: Any, stats: Any, examples: Examples
) -> tuple[jax.Array, Any]:
    """The mean cross entropy of a minibatch, and the new averages of normalisation."""
    logits, new = module.apply(
        {"params": params, "batch_stats": stats},
        examples.inputs,
        train=True,
        mutable=["batch_stats"],
    )
    return losses(logits, examples).mean(), new.get("batch_stats", {})


def epoch_of(
    settings: Settings,
    module: Any,
    make_tx: Callable[[Any], optax.GradientTransformation],
) -> Callable[[Examples, Carry, Any, jax.Array], Carry]:
    """Makes a function that trains for an epoch; it is compiled when first called.

    Args:
      settings: of the task.
      module: its network.
      make_tx: the optimizer from an argument, a pytree of arrays.

    Returns:
      Function (training examples, carry, argument, random key of the run and the epoch)
      -> carry; the carry given is donated.
    """

    def step(train, carry, argument, chosen, key):
        tx = optax.with_extra_args_support(make_tx(argument))
        part = tasks.minibatch(settings, train, chosen, key)
        gradients, stats = jax.grad(
            lambda params: loss(module, params, carry.stats, part), has_aux=True
        )(carry.params)
        updates, state = tx.update(gradients, carry.state, carry.params)
        return Carry(optax.apply_updates(carry.params, updates), stats, state)

    def minibatches(train, key):
        order_key, step_key = jax.random.split(key)
        order = tasks.order(settings, train, order_key)
        return order, jax.random.split(step_key, len(order))

    @functools.partial(jax.jit, donate_argnums=1)
    def scanned(train, carry, argument, key):
        def body(carry, given):
            return step(train, carry, argument, *given), None

        return jax.lax.scan(body, carry, minibatches(train, key))[0]

    one_step = jax.jit(step, donate_argnums=1)
    ordered = jax.jit(minibatches)

    def looped(train, carry, argument, key):
        order, keys = ordered(train, key)
        for chosen, step_key in zip(np.asarray(order), keys, strict=True):
            carry = one_step(train, carry, argument, chosen, step_key)
        return carry

    return looped if settings.looped else scanned


@functools.lru_cache(maxsize=16)
def _compiled(
    settings: Settings, classes: int, contender: Contender, epochs: int, target: Any
) -> tuple[Callable[..., Carry], Callable[..., Carry]]:
    """How to start, and an epoch; `target` is None where it is traced."""
    module = module_of(settings, classes)

    def tx_of(given):
        hyperparameter, traced = given
        plan = Plan(
            epochs * settings.steps_per_epoch,
            settings.steps_per_epoch,
            traced if target is None else target,
        )
        return contender.make(hyperparameter, plan)

    @jax.jit
    def start(inputs, given, key):
        init_key, start_key = jax.random.split(key)
        variables = module.init(init_key, inputs)
        params = contender.start(start_key, variables["params"])
        return Carry(
            params, variables.get("batch_stats", {}), tx_of(given).init(params)
        )

    next_epoch = epoch_of(settings, module, tx_of)
    return start, next_epoch


def fit(
    settings: Settings,
    contender: Contender,
    data: tasks.Data,
    *,
    hyperparameter: float,
    target: float | None,
    seed: int,
    epochs: int,
) -> Fitted:
    """Trains.

    Args:
      settings: of the task.
      contender: the method.
      data: of the task.
      hyperparameter: of the method.
      target: sparsity to train for, or None.
      seed: gives the initial weights and the minibatches.
      epochs: how many.

    Returns:
      What has become of the parameters.
    """
    static = None if contender.traced_target or target is None else target
    start, next_epoch = _compiled(
        settings._replace(data=""),
        tasks.classes(settings, data),
        contender,
        epochs,
        static,
    )
    given = (
        jnp.float32(hyperparameter),
        jnp.float32(0.0 if target is None else target),
    )
    key = jax.random.key(seed)
    first = data.validation.inputs[:1]
    carry = start(first, given, jax.random.fold_in(key, 0))
    seconds = []
    for number in range(epochs):
        began = time.perf_counter()
        carry = next_epoch(
            data.train, carry, given, jax.random.fold_in(key, number + 1)
        )
        jax.block_until_ready(carry)
        seconds.append(time.perf_counter() - began)
    params = contender.read(carry.state, carry.params, hyperparameter)
    return Fitted(
        params, carry.stats, carry.params, min(seconds) / settings.steps_per_epoch
    )
