"""Training of a network by a contender, on the device, compiled.

Hyperparameter, target and the order of the minibatches are traced: trials, seeds and
targets of a contender share their compilation. What is compiled is kept by the
settings, so that tasks that differ in their data only share it too.
"""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.bench import models
from benchmarks.networks import tasks
from benchmarks.networks.plans import Contender, Plan
from benchmarks.networks.tasks import Examples, Settings

# The weight of the old averages of normalisation, in a step.
MEMORY = 0.9


class Carry(NamedTuple):
    """What a step changes."""

    params: Any
    # The collection "batch_stats", empty without; each average with a leading axis, one
    # entry for each share of the weights that has its turns.
    stats: Any
    state: Any  # of the optimizer
    count: Any  # steps done


class Turns(NamedTuple):
    """Steps that train different shares of the weights, one after another.

    Attributes:
      levels: the shares that come up, rising.
      places: of each step's share in them.
      memory: of each share, the weight of the old averages of normalisation.
    """

    levels: np.ndarray
    places: np.ndarray
    memory: np.ndarray

    @classmethod
    def of(cls, shares: tuple[float, ...]) -> Self:
        """The turns by their shares; of none, one for the whole network."""
        levels, places, counts = np.unique(
            shares or (1.0,), return_inverse=True, return_counts=True
        )
        # Averages forget as quickly in steps, but are never of one minibatch alone.
        memory = np.maximum(MEMORY ** (len(places) / counts), 0.5)
        return cls(levels, places, memory.astype(np.float32))


class Fitted(NamedTuple):
    """The end of a training.

    Attributes:
      params: those to evaluate.
      stats: the collection "batch_stats", with a leading axis for `Turns.levels`.
      shares: see `Contender.shares`.
      trained: those that the optimizer has last moved.
      step_seconds: wall time of a step, of the fastest epoch.
    """

    params: Any
    stats: Any
    shares: tuple[float, ...]
    trained: Any
    step_seconds: float


def module_of(settings: Settings, classes: int) -> Any:
    """The network of a task."""
    return models.MODELS[settings.model](settings.widths, classes)


def losses(logits: jax.Array, examples: Examples) -> jax.Array:
    """Cross entropy of each example, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, examples.targets)


def loss(
    module: Any,
    params: Any,
    stats: Any,
    examples: Examples,
    memory: jax.typing.ArrayLike = MEMORY,
) -> tuple[jax.Array, Any]:
    """The mean cross entropy of a minibatch, and the new averages of normalisation."""
    logits, new = module.apply(
        {"params": params, "batch_stats": stats},
        examples.inputs,
        train=True,
        momentum=memory,
        mutable=["batch_stats"],
    )
    return losses(logits, examples).mean(), new.get("batch_stats", {})


def stacked(stats: Any, shares: tuple[float, ...]) -> Any:
    """The averages once for each share that comes up, along a new first axis."""
    count = len(Turns.of(shares).levels)
    return jax.tree.map(lambda x: jnp.stack([x] * count), stats)


def averages_at(stats: Any, shares: tuple[float, ...], share: float) -> Any:
    """The averages for a share of the weights, from those of the shares that had turns.

    Linear in the logarithm of the share between them, constant beyond.

    Args:
      stats: pytree of averages, each with a leading axis for `Turns.levels`.
      shares: see `Contender.shares`.
      share: of the weights that are left, in (0, 1].

    Returns:
      The averages without the leading axis.

    Examples:
      >>> import jax.numpy as jnp
      >>> stats = jnp.array([[1.0], [3.0]])
      >>> averages_at(stats, (1.0, 0.01, 1.0), 0.1).tolist()
      [2.0]
    """
    levels = Turns.of(shares).levels
    # The hat functions of the levels, at the share.
    hats = [
        np.interp(np.log(share), np.log(levels), hat) for hat in np.eye(len(levels))
    ]
    weights = np.array(hats, np.float32)
    return jax.tree.map(lambda x: jnp.tensordot(weights, x, 1), stats)


def epoch_of(
    settings: Settings,
    module: Any,
    make_tx: Callable[[Any], optax.GradientTransformation],
    shares: tuple[float, ...] = (),
) -> Callable[[Examples, Carry, Any, jax.Array], Carry]:
    """Makes a function that trains for an epoch; it is compiled when first called.

    Args:
      settings: of the task.
      module: its network.
      make_tx: the optimizer from an argument, a pytree of arrays.
      shares: see `Contender.shares`.

    Returns:
      Function (training examples, carry, argument, random key of the run and the epoch)
      -> carry; the carry given is donated.
    """
    turns = Turns.of(shares)

    def step(train, carry, argument, chosen, key):
        place = jnp.asarray(turns.places)[carry.count % len(turns.places)]
        memory = jnp.asarray(turns.memory)[place]
        tx = optax.with_extra_args_support(make_tx(argument))
        part = tasks.minibatch(settings, train, chosen, key)
        stats = jax.tree.map(lambda x: x[place], carry.stats)
        gradients, stats = jax.grad(
            lambda params: loss(module, params, stats, part, memory), has_aux=True
        )(carry.params)
        stats = jax.tree.map(lambda x, new: x.at[place].set(new), carry.stats, stats)
        updates, state = tx.update(gradients, carry.state, carry.params)
        params = optax.apply_updates(carry.params, updates)
        return Carry(params, stats, state, carry.count + 1)

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
        stats = stacked(variables.get("batch_stats", {}), contender.shares)
        return Carry(params, stats, tx_of(given).init(params), jnp.int32(0))

    next_epoch = epoch_of(settings, module, tx_of, contender.shares)
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
        params,
        carry.stats,
        contender.shares,
        carry.params,
        min(seconds) / settings.steps_per_epoch,
    )
