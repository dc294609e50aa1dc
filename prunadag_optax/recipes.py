r"""prunAdag with the settings to begin with, for a training of known length.

Three ways to a network that can be pruned:

* `targeted`: one sparsity, known before training, without a mask on the way.
* `any_sparsity`: one training, one network, to be pruned to any sparsity afterwards.
* `family`: one training that passes through several sparsities and hands over a network
  at each.

All give to `prunadag_w` a learning rate that falls to zero, and a schedule of the
relevant components. Its steps are Adam's, or with `b2=None` those of momentum SGD, for
which `learning_rate` has to be in the scale of SGD's. The figures behind the settings
are in benchmarks/results/recipe.md and networks.md.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import optax

from prunadag_optax import masks, schedules
from prunadag_optax._common import checks
from prunadag_optax._core.pruning_aware import eval_params, prunadag_w

# Parts of the training: before it the network is dense, after it the density is final.
BEGIN, END = 0.1, 0.7
# Strength of the l1 norm, with the steps of Adam and of SGD.
ADAM_L1, SGD_L1 = 0.1, 1e-3


def targeted(
    total_steps: int,
    sparsity: chex.Numeric,
    learning_rate: optax.ScalarOrSchedule = 3e-3,
    *,
    begin: float = BEGIN,
    end: float = END,
    l1: optax.ScalarOrSchedule | None = None,
    **settings: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""For one sparsity that is known before training.

    .. math:: T_k / n = 1 - \sigma + \sigma (1 - u)^3

    with u from 0 to 1 between the parts `begin` and `end` of the training. What is no
    longer relevant shrinks by half in a step, so that at the end
    `masks.prune(params, sparsity)` takes away what is zero but for rounding. The l1
    norm takes relevant weights that the loss does not ask for to zero before the share
    does, and makes room for others.

    Args:
      total_steps: length of the training, in steps.
      sparsity: sigma in [0, 1), the share of the prunable weights to prune afterwards.
      learning_rate: of the first 60% of the training, in the scale of Adam's; from
        there it falls to zero linearly. Or a schedule, taken as it is.
      begin: part of the training with the dense network, in [0, 1).
      end: part of the training after which T is final, in (begin, 1].
      l1: mu of `prunadag_w` in the first 60% of the training; from there it falls to
        zero linearly, as the learning rate does. Or a schedule, taken as it is. None:
        0.1, or with `b2=None`, where learning rates are a hundred times as large,
        0.001.
      **settings: further arguments of `prunadag_w`.

    Returns:
      An `optax.GradientTransformationExtraArgs`; see `prunadag_w`.

    Raises:
      ValueError: for an argument out of range.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from prunadag_optax import masks, recipes
      >>> loss = lambda x: jnp.sum((x - jnp.array([2.0, 0.1, -3.0, 0.2])) ** 2)
      >>> tx = recipes.targeted(400, 0.5, 0.1)
      >>> x = jnp.array([1.0, 0.5, -1.0, 0.5])
      >>> state, update = tx.init(x), jax.jit(tx.update)
      >>> for _ in range(400):
      ...     updates, state = update(jax.grad(loss)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> pruned, mask = masks.prune(x, 0.5)
      >>> mask.tolist(), bool(jnp.abs(x - pruned).max() < 1e-4)
      ([True, False, True, False], True)
    """
    _check_length(total_steps, begin, end)
    checks.scalar("sparsity", sparsity, least=0, below=1)
    relevant = schedules.cubic_density(
        1 - sparsity, begin=begin * total_steps, end=end * total_steps
    )
    return prunadag_w(
        _falling("learning_rate", learning_rate, total_steps),
        relevant,
        l1=_pull(l1, total_steps, settings),
        **settings,
    )


def any_sparsity(
    total_steps: int,
    learning_rate: optax.ScalarOrSchedule = 3e-3,
    *,
    levels: Sequence[float] = schedules.SELDOM_DENSE,
    begin: float = BEGIN,
    end: float = 0.6,
    weight_decay: optax.ScalarOrSchedule | None = None,
    l1: optax.ScalarOrSchedule | None = None,
    **settings: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""For any sparsity, chosen after training.

    .. math:: T_k / n = \max(\ell_{k \bmod L}, f_k), \quad g_k = \nabla f(P_{R_k} x_k)

    The shares take turns, and each step trains what is left of the network at that
    share, and nothing else (`evaluate="relevant"`); f_k comes down from 1 to the
    smallest of them as in `targeted`. So the networks at all shares, which lie within
    one another, are trained together. The l1 norm makes the larger ones lean on the
    smaller: a weight that does not earn its place falls in the ranking.

    The training loop then holds pruned parameters. Take those to evaluate and to save
    from `eval_params(state, params)`, and prune them by `masks.prune`; running averages
    of BatchNorm have seen all shares in turn and want to be recomputed for the one
    chosen, or kept for each share (docs/recipes.md).

    Convolutional networks and transformers want the steps of momentum SGD, `b2=None`,
    with a learning rate of 0.15, say: with Adam's they are points worse
    (docs/recipes.md).

    Every tenth step of the default levels trains the dense network, with
    `levels=schedules.LEVELS` every fourth. The more often it has its turn the better it
    is, and the worse the others. To lose little or next to nothing of it, take
    `schedules.OFTEN_DENSE`, two steps in three, or `schedules.MOSTLY_DENSE`, seven in
    eight, with `l1=0.0`.

    Args:
      total_steps: length of the training, in steps.
      learning_rate: of the first 60% of the training, in the scale of Adam's; from
        there it falls to zero linearly. Or a schedule, taken as it is.
      levels: the shares l of the prunable weights to train, in (0, 1], in their order;
        one that comes up twice has two turns.
      begin: part of the training with the dense network, in [0, 1).
      end: part of the training after which all shares take turns, in (begin, 1].
      weight_decay: lambda of `prunadag_w`; None: 0.1, or with `b2=None`, where learning
        rates are a hundred times as large, 0.001.
      l1: mu of `prunadag_w` in the first 60% of the training; from there it falls to
        zero linearly, as the learning rate does. Or a schedule, taken as it is. More
        helps the smallest networks and costs the larger. None: 0.1, or with `b2=None`
        0.001.
      **settings: further arguments of `prunadag_w`; decreasable weights do not shrink
        unless `decrease_schedule` says so.

    Returns:
      An `optax.GradientTransformationExtraArgs`; see `prunadag_w`.

    Raises:
      ValueError: for an argument out of range.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from prunadag_optax import eval_params, masks, recipes
      >>> matrix = jnp.array([[1.0, 0.5], [0.0, 0.1]])
      >>> loss = lambda x: jnp.sum((matrix @ x - jnp.array([2.0, 0.1])) ** 2)
      >>> tx = recipes.any_sparsity(1000, 0.1, levels=(1.0, 0.5))
      >>> x = jnp.array([1.0, 0.5])
      >>> state, update = tx.init(x), jax.jit(tx.update)
      >>> for _ in range(1000):
      ...     updates, state = update(jax.grad(loss)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> dense = eval_params(state, x)
      >>> pruned, _ = masks.prune(dense, 0.5)
      >>> bool(loss(dense) < loss(pruned) < 0.05)
      True
    """
    _check_length(total_steps, begin, end)
    least = schedules.cubic_density(
        min(levels, default=1.0), begin=begin * total_steps, end=end * total_steps
    )
    settings = {"decrease_schedule": 0.0, "evaluate": "relevant"} | settings
    if weight_decay is None:
        weight_decay = 1e-3 if _is_sgd(settings) else 0.1
    return prunadag_w(
        _falling("learning_rate", learning_rate, total_steps),
        schedules.cyclic_density(levels, least=least),
        weight_decay=weight_decay,
        l1=_pull(l1, total_steps, settings),
        **settings,
    )


class Member(NamedTuple):
    """A network of a family."""

    sparsity: float  # the share of the prunable weights that is zero
    step: int  # the steps done
    params: Any  # pruned
    mask: Any  # see `masks`
    aux: Any  # what `gradient` passes on


def family(
    gradient: Callable[..., Any],
    params: optax.Params,
    batches: Iterable[Any],
    *,
    total_steps: int,
    sparsities: Sequence[float] = (0.9, 0.95, 0.98, 0.99),
    parts: Sequence[float] | None = None,
    learning_rate: chex.Numeric = 3e-3,
    aux: Any = None,
    **settings: Any,
) -> Iterator[Member]:
    r"""Networks at rising sparsities, one after another out of one training.

    The share of relevant components comes down a staircase, with one plateau for each
    sparsity. In each stage the learning rate falls from its start to zero along a half
    cosine, and at the end of the stage the network is pruned and handed over; training
    goes on from where it was.

    Args:
      gradient: function (params, batch) -> gradients; with `aux`, function (params,
        aux, batch) -> (gradients, aux), such as for running averages of BatchNorm. It
        is compiled.
      params: pytree of parameters to start from.
      batches: minibatches, at least `total_steps` of them.
      total_steps: length of the training, in steps.
      sparsities: of the members, rising, in (0, 1).
      parts: of the training, for each stage its part; None is 2/5 of it for the first
        and the rest in equal parts.
      learning_rate: where each half cosine begins, in the scale of Adam's.
      aux: pytree to pass from step to step, or None.
      **settings: further arguments of `prunadag_w`.

    Yields:
      A `Member` for each sparsity, as soon as it is there.

    Raises:
      ValueError: for an argument out of range, or when there are too few batches.

    Examples:
      >>> import itertools, jax, jax.numpy as jnp
      >>> from prunadag_optax import recipes
      >>> target = jnp.array([2.0, 0.1, -3.0, 0.2])
      >>> loss = lambda x, batch: jnp.sum((x - target + batch) ** 2)
      >>> members = recipes.family(
      ...     jax.grad(loss), jnp.array([1.0, 0.5, -1.0, 0.5]), itertools.repeat(0.0),
      ...     total_steps=600, sparsities=(0.5, 0.75), learning_rate=0.1,
      ... )
      >>> [(m.step, [round(x, 2) for x in m.params.tolist()]) for m in members]
      [(240, [2.0, 0.0, -3.0, 0.0]), (600, [0.0, 0.0, -3.0, 0.0])]
    """
    if parts is None:
        later = len(sparsities) - 1
        parts = [0.4] + [0.6 / later] * later if later else [1.0]
    if len(parts) != len(sparsities):
        raise ValueError(
            f"parts must have one entry for each of the {len(sparsities)} sparsities; "
            f"got {parts!r}."
        )
    for sparsity in sparsities:
        checks.scalar("sparsities", sparsity, above=0, below=1)
    ends, done = [], 0.0
    for part in parts:
        checks.scalar("parts", part, above=0, most=1)
        done += part
        ends.append(round(total_steps * done / sum(parts)))
    relevant = schedules.staircase_density([1 - s for s in sparsities], ends=ends)
    tx = prunadag_w(_restarts(learning_rate, ends), relevant, **settings)
    where = settings.get("where") or masks.prunable

    @jax.jit
    def step(params, state, aux, batch):
        if aux is None:
            gradients = gradient(params, batch)
        else:
            gradients, aux = gradient(params, aux, batch)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, aux

    def members():
        nonlocal params, aux
        state, taken = tx.init(params), iter(batches)
        begin = 0
        for sparsity, end in zip(sparsities, ends, strict=True):
            for number in range(begin, end):
                try:
                    batch = next(taken)
                except StopIteration:
                    raise ValueError(
                        f"batches must be at least total_steps = {total_steps}; got "
                        f"{number}."
                    ) from None
                params, state, aux = step(params, state, aux, batch)
            pruned, mask = masks.prune(
                eval_params(state, params),
                sparsity,
                where=where,
                scope=settings.get("scope", "global"),
            )
            yield Member(sparsity, end, pruned, mask, aux)
            begin = end

    return members()


def _restarts(learning_rate: chex.Numeric, ends: Sequence[int]) -> optax.Schedule:
    """A half cosine in each stage."""
    begins = [0, *ends[:-1]]
    return optax.join_schedules(
        [
            optax.cosine_decay_schedule(learning_rate, end - begin)
            for begin, end in zip(begins, ends, strict=True)
        ],
        begins[1:],
    )


def _falling(
    name: str, value: optax.ScalarOrSchedule, total_steps: int
) -> optax.Schedule:
    """Constant for 60% of the training, then falling to zero; a schedule as it is."""
    if callable(value):
        return value
    checks.scalar(name, value, least=0)
    return schedules.stable_decay(value, total_steps)


def _is_sgd(settings: Mapping[str, Any]) -> bool:
    """Whether the settings of `prunadag_w` ask for the steps of SGD."""
    return settings.get("b2", 0.999) is None


def _pull(
    l1: optax.ScalarOrSchedule | None, total_steps: int, settings: Mapping[str, Any]
) -> optax.Schedule:
    """The strength of the l1 norm; None is the default of the steps."""
    if l1 is None:
        l1 = SGD_L1 if _is_sgd(settings) else ADAM_L1
    return _falling("l1", l1, total_steps)


def _check_length(total_steps: int, begin: float, end: float) -> None:
    checks.scalar("total_steps", total_steps, least=1)
    checks.scalar("begin", begin, least=0, below=1)
    checks.scalar("end", end, above=begin, most=1)
