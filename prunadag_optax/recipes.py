r"""Pruning-aware training of known length, with the settings to begin with.

Three ways to a network that can be pruned:

* `targeted`: one sparsity, known before training, without a mask on the way.
* `any_sparsity`: one training, one network, to be pruned to any sparsity afterwards.
* `ladder`: one training that passes through several sparsities and hands over a network
  at each.

The three give to `pruning_aware` a base optimizer, a learning rate that falls, and a
schedule of the density. After `total_steps` the learning rate stays at 1% of its peak,
and the density and the soft threshold keep their last values: what trains on still
trains. The figures behind the settings are in benchmarks/archive/results/recipe.md and
networks.md. Beside them stands `ac_dc`, a rival of `targeted` with the settings of its
article.

Under `optax.inject_hyperparams` name `total_steps` and `dense_share` in `static_args`.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from prunadag_optax import masks, schedules
from prunadag_optax._common import checks
from prunadag_optax._common.budgets import Budget
from prunadag_optax._common.leaves import Scope, Where, prunable
from prunadag_optax._common.patterns import share
from prunadag_optax._core.eval_params import eval_params
from prunadag_optax._core.normalised_momentum import scale_by_normalised_momentum
from prunadag_optax._core.pruning_aware import Score, pruning_aware
from prunadag_optax.methods.ac_dc import ac_dc as alternating

# Parts of the training: before it the network is dense, after it the density is final.
BEGIN, END = 0.1, 0.7

Base = str | Callable[[optax.ScalarOrSchedule], optax.GradientTransformation]


class _Kind(NamedTuple):
    """A kind of base optimizer, with the settings that belong together.

    Attributes:
      make: function (learning rate, weight decay, where) -> the optimizer.
      learning_rate: in the first part of the training.
      l1: strength mu of the l1 norm; the soft threshold of a step is eta mu.
      weight_decay: of `any_sparsity`, decoupled.
    """

    make: Callable[..., optax.GradientTransformation]
    learning_rate: Any
    l1: float
    weight_decay: float


def _decayed(where: Where | None) -> Callable[[Any], Any]:
    """Which leaves weight decay is for: what is prunable, and other matrices."""

    def leaf(path, x):
        return (where or prunable)(path, x) or jnp.ndim(x) > 1

    return lambda params: jax.tree_util.tree_map_with_path(leaf, params)


def _adam(rate: Any, decay: Any, where: Where | None) -> optax.GradientTransformation:
    return optax.adamw(rate, weight_decay=decay, mask=_decayed(where))


def _momentum(
    rate: Any, decay: Any, where: Where | None
) -> optax.GradientTransformation:
    return optax.chain(
        optax.trace(0.9),
        optax.add_decayed_weights(decay, _decayed(where)),
        optax.scale_by_learning_rate(rate),
    )


def _normalised_momentum(
    rate: Any, decay: Any, where: Where | None
) -> optax.GradientTransformation:
    return optax.chain(
        scale_by_normalised_momentum(where=where),
        optax.add_decayed_weights(decay, _decayed(where)),
        optax.scale_by_learning_rate(rate),
    )


# Momentum SGD has learning rates a hundred times as large, and the rest to match. The
# normalised momentum's are in units of the weights, as Adam's.
_KINDS = {
    "adam": _Kind(_adam, 3e-3, l1=0.1, weight_decay=0.1),
    "momentum": _Kind(_momentum, 0.15, l1=1e-3, weight_decay=1e-3),
    "normalised_momentum": _Kind(_normalised_momentum, 1e-2, l1=1e-2, weight_decay=0.0),
}


def _kind_of(base: Base, learning_rate: Any) -> _Kind:
    if isinstance(base, str) and base in _KINDS:
        kind = _KINDS[base]
    elif callable(base):
        if learning_rate is None:
            raise ValueError(
                "learning_rate must be given with a base of your own: "
                "targeted(total_steps, sparsity=0.9, base=optax.lion, "
                "learning_rate=1e-4)."
            )
        checks.takes("base", base, "learning_rate")
        kind = _Kind(lambda rate, decay, where: base(rate), learning_rate, 0.0, 0.0)
    else:
        raise ValueError(
            f"base must be one of {sorted(_KINDS)} or a function learning_rate -> "
            f"optax transformation, such as optax.lion; got {base!r:.80}."
        )
    return kind if learning_rate is None else kind._replace(learning_rate=learning_rate)


def targeted(
    total_steps: int,
    *,
    sparsity: chex.Numeric,
    base: Base = "adam",
    learning_rate: optax.ScalarOrSchedule | None = None,
    l1: optax.ScalarOrSchedule | None = None,
    weight_decay: chex.Numeric = 0.0,
    begin: float = BEGIN,
    end: float = END,
    shrink_rate: optax.ScalarOrSchedule = 0.5,
    score: Score = "magnitude",
    where: Where | None = None,
    scope: Scope = "global",
    layer_budget: Budget = "global",
) -> optax.GradientTransformationExtraArgs:
    r"""For one sparsity that is known before training.

    .. math:: T_k / n = 1 - \sigma + \sigma (1 - u)^3

    with u from 0 to 1 between the parts `begin` and `end` of the training. What is no
    longer relevant shrinks by half in a step, so that at the end
    `masks.prune(params, sparsity)` takes away what is zero but for rounding. The l1
    norm takes relevant weights that the loss does not ask for to zero before the
    density does, and makes room for others.

    Args:
      total_steps: length of the training, in steps.
      sparsity: sigma in [0, 1), the share of the prunable weights to prune afterwards.
      base: "adam"; "momentum", SGD with momentum 0.9; "normalised_momentum", see
        `scale_by_normalised_momentum`; or a function learning_rate -> transformation,
        such as `optax.lion`.
      learning_rate: eta of the first 60% of the training; from there it falls to 1%
        linearly. Or a schedule, taken as it is. None: 3e-3 with "adam", 0.15 with
        "momentum", 0.01 with "normalised_momentum".
      l1: mu of the first 60% of the training, which falls as eta does; a step's soft
        threshold is eta mu. Or a schedule, taken as it is. None: 0.1 with "adam", 0.001
        with "momentum", 0.01 with "normalised_momentum", 0 with a base of your own.
      weight_decay: decoupled, of prunable leaves and other matrices, with a named base;
        a base of your own has its own.
      begin: part of the training with the dense network, in [0, 1).
      end: part of the training after which T is final, in (begin, 1].
      shrink_rate: see `pruning_aware`, as the others.
      score: what is ranked; give `masks.prune` the same.
      where: predicate (path, leaf) -> bool; None: `masks.prunable`.
      scope: what is ranked together.
      layer_budget: how it is shared out among the leaves.

    Returns:
      An `optax.GradientTransformationExtraArgs`; see `pruning_aware`.

    Raises:
      ValueError: for an argument out of range.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from prunadag_optax import masks, recipes
      >>> loss = lambda x: jnp.sum((x - jnp.array([2.0, 0.1, -3.0, 0.2])) ** 2)
      >>> tx = recipes.targeted(400, sparsity=0.5, learning_rate=0.1)
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
    density = schedules.cubic_density(
        1 - sparsity, begin=begin * total_steps, end=end * total_steps
    )
    optimizer, soft_threshold = _base_of(
        base, total_steps, learning_rate, l1, weight_decay, where
    )
    return pruning_aware(
        optimizer,
        density,
        score=score,
        shrink_rate=shrink_rate,
        soft_threshold=soft_threshold,
        where=where,
        scope=scope,
        layer_budget=layer_budget,
    )


def ac_dc(
    total_steps: int,
    *,
    sparsity: chex.Numeric,
    base: Base = "momentum",
    learning_rate: optax.ScalarOrSchedule | None = None,
    weight_decay: chex.Numeric | None = None,
    warm_up: float = 0.1,
    phase: float = 0.05,
    last: float = 0.15,
    where: Where | None = None,
    scope: Scope = "global",
    layer_budget: Budget = "global",
    packed: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""For one sparsity, with the pruned and the dense network trained in turns.

    .. math:: x_{k+1} = m_k \odot (x_k + \text{base}(m_k \odot g_k))

    with m_k chosen by magnitude at the start of each compressed phase, and all True in
    the others. The training ends with a compressed phase: the weights that are masked
    are exactly zero, and `masks.prune(params, sparsity)` changes nothing but where
    others have become zero too.

    Args:
      total_steps: length of the training, in steps.
      sparsity: sigma in [0, 1), the share of the prunable weights to prune.
      base: see `targeted`; here "momentum" is the default.
      learning_rate: see `targeted`.
      weight_decay: see `any_sparsity`. A base of your own has its own.
      warm_up: part of the training with the dense network at the beginning, in [0, 1).
      phase: part of the training that a phase takes, in (0, 1).
      last: part of the training that the last compressed phase takes, in (0, 1).
      where: predicate (path, leaf) -> bool; None: `masks.prunable`.
      scope: what is ranked together.
      layer_budget: how it is shared out among the leaves.
      packed: whether the state has one bit a weight for the mask, and not a byte. Not
        for sharded parameters.

    Returns:
      An `optax.GradientTransformationExtraArgs`; see `methods.ac_dc.ac_dc`.

    Raises:
      ValueError: for an argument out of range.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from prunadag_optax import masks, recipes
      >>> loss = lambda x: jnp.sum((x - jnp.array([2.0, 0.1, -3.0, 0.2])) ** 2)
      >>> tx = recipes.ac_dc(100, sparsity=0.5, learning_rate=0.05)
      >>> x = jnp.array([1.0, 0.5, -1.0, 0.5])
      >>> state, update = tx.init(x), jax.jit(tx.update)
      >>> for _ in range(100):
      ...     updates, state = update(jax.grad(loss)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> (x != 0).tolist()
      [True, False, True, False]

    References:
      A. Peste and others, AC/DC: Alternating Compressed/DeCompressed training of deep
      neural networks, NeurIPS 2021, whose ImageNet training of 100 epochs has these
      parts.
    """
    checks.integer("total_steps", total_steps, least=1)
    checks.scalar("sparsity", sparsity, least=0, below=1)
    checks.scalar("warm_up", warm_up, least=0, below=1)
    checks.scalar("phase", phase, above=0, below=1)
    checks.scalar("last", last, above=0, most=1 - warm_up)
    optimizer, _ = _base_of(base, total_steps, learning_rate, None, weight_decay, where)
    # A short training has at least a step of it.
    length = max(1, round(last * total_steps))
    return alternating(
        optimizer,
        1 - sparsity,
        warm_up=min(round(warm_up * total_steps), total_steps - length),
        phase=max(1, round(phase * total_steps)),
        last=length,
        total_steps=total_steps,
        where=where,
        scope=scope,
        layer_budget=layer_budget,
        packed=packed,
    )


def any_sparsity(
    total_steps: int,
    *,
    base: Base = "adam",
    learning_rate: optax.ScalarOrSchedule | None = None,
    l1: optax.ScalarOrSchedule | None = None,
    weight_decay: chex.Numeric | None = None,
    dense_share: float = 0.1,
    densities: Sequence[float | str] | None = None,
    begin: float = BEGIN,
    end: float = 0.6,
    shrink_rate: optax.ScalarOrSchedule = 0.0,
    score: Score = "magnitude",
    where: Where | None = None,
    scope: Scope = "global",
    layer_budget: Budget = "global",
) -> optax.GradientTransformationExtraArgs:
    r"""For any sparsity, chosen after training.

    .. math:: T_k / n = \max(\ell_{k \bmod L}, f_k), \quad g_k = \nabla f(P_{R_k} x_k)

    The densities l take turns, and each step trains what is left of the network at that
    density, and nothing else (`gradient_at="pruned"`); f_k comes down from 1 to the
    smallest of them as in `targeted`. So the networks at all densities, which lie
    within one another, are trained together. The l1 norm makes the larger ones lean on
    the smaller: a weight that does not earn its place falls in the ranking.

    The training loop then holds pruned parameters. Take those to evaluate and to save
    from `eval_params(state, params)`, and prune them by `masks.prune`; the Flax helpers
    do. Running averages of BatchNorm have seen all densities in turn and want to be
    recomputed for the one chosen, or kept for each density (docs/recipes.md).

    Convolutional networks and transformers want `base="momentum"`: with Adam's steps
    they are points worse (docs/recipes.md).

    Args:
      total_steps: length of the training, in steps.
      base: see `targeted`.
      learning_rate: see `targeted`.
      l1: see `targeted`. More helps the smallest networks and costs the larger.
      weight_decay: see `targeted`; None: 0.1 with "adam", 0.001 with "momentum", 0 with
        "normalised_momentum".
      dense_share: share of the turns that train the dense network, in [0, 1). The more
        it has the better it is, and the worse the sparse ones.
      densities: the turns l themselves, in (0, 1], in their order; N:M patterns such as
        "2:4" take turns, too. None is `schedules.density_cycle(dense_share)`.
      begin: part of the training with the dense network, in [0, 1).
      end: part of the training after which all densities take turns, in (begin, 1].
      shrink_rate: see `pruning_aware`, as the others.
      score: what is ranked; give `masks.prune` the same.
      where: predicate (path, leaf) -> bool; None: `masks.prunable`.
      scope: what is ranked together.
      layer_budget: how it is shared out among the leaves.

    Returns:
      An `optax.GradientTransformationExtraArgs`; see `pruning_aware`.

    Raises:
      ValueError: for an argument out of range.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from prunadag_optax import eval_params, masks, recipes
      >>> matrix = jnp.array([[1.0, 0.5], [0.0, 0.1]])
      >>> loss = lambda x: jnp.sum((matrix @ x - jnp.array([2.0, 0.1])) ** 2)
      >>> tx = recipes.any_sparsity(1000, learning_rate=0.1, densities=(1.0, 0.5))
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
    if densities is None:
        densities = schedules.density_cycle(dense_share)
    densities = checks.sequence("densities", densities, "(1.0, 0.1)")
    shares = [share("densities", density)[0] for density in densities]
    least = schedules.cubic_density(
        min(shares, default=1.0), begin=begin * total_steps, end=end * total_steps
    )
    optimizer, soft_threshold = _base_of(
        base, total_steps, learning_rate, l1, weight_decay, where
    )
    return pruning_aware(
        optimizer,
        schedules.cyclic_density(densities, least=least),
        score=score,
        shrink_rate=shrink_rate,
        soft_threshold=soft_threshold,
        gradient_at="pruned",
        where=where,
        scope=scope,
        layer_budget=layer_budget,
    )


class Member(NamedTuple):
    """A network of a ladder."""

    sparsity: float  # the share of the prunable weights that is zero
    step: int  # the steps done
    params: Any  # pruned
    mask: Any  # see `masks`
    aux: Any  # what `gradient` passes on


def ladder(
    gradient: Callable[..., Any],
    params: optax.Params,
    batches: Iterable[Any],
    *,
    total_steps: int,
    sparsities: Sequence[float] = (0.9, 0.95, 0.98, 0.99),
    parts: Sequence[float] | None = None,
    base: Base = "adam",
    learning_rate: chex.Numeric | None = None,
    aux: Any = None,
    shrink_rate: optax.ScalarOrSchedule = 0.5,
    score: Score = "magnitude",
    where: Where | None = None,
    scope: Scope = "global",
    layer_budget: Budget = "global",
) -> Iterator[Member]:
    r"""Networks at rising sparsities, one after another out of one training.

    The density comes down a staircase, with one plateau for each
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
      base: see `targeted`.
      learning_rate: where each half cosine begins; None is that of `targeted`.
      aux: pytree to pass from step to step, or None.
      shrink_rate: see `pruning_aware`, as the others.
      score: what is ranked, and pruned by.
      where: predicate (path, leaf) -> bool; None: `masks.prunable`.
      scope: what is ranked together.
      layer_budget: how it is shared out among the leaves.

    Yields:
      A `Member` for each sparsity, as soon as it is there.

    Raises:
      ValueError: for an argument out of range, or when there are too few batches.

    Examples:
      >>> import itertools, jax, jax.numpy as jnp
      >>> from prunadag_optax import recipes
      >>> target = jnp.array([2.0, 0.1, -3.0, 0.2])
      >>> loss = lambda x, batch: jnp.sum((x - target + batch) ** 2)
      >>> members = recipes.ladder(
      ...     jax.grad(loss), jnp.array([1.0, 0.5, -1.0, 0.5]), itertools.repeat(0.0),
      ...     total_steps=600, sparsities=(0.5, 0.75), learning_rate=0.1,
      ... )
      >>> [(m.step, [round(x, 2) for x in m.params.tolist()]) for m in members]
      [(240, [2.0, 0.0, -3.0, 0.0]), (600, [0.0, 0.0, -3.0, 0.0])]
    """
    checks.function("gradient", gradient, *_arguments(aux))
    checks.parameters("params", params)
    checks.batches(batches)
    sparsities = checks.sequence("sparsities", sparsities, "(0.9, 0.95)")
    for sparsity in sparsities:
        checks.scalar("sparsities", sparsity, above=0, below=1)
    if any(a >= b for a, b in itertools.pairwise(sparsities)):
        raise ValueError(f"sparsities must rise; got {tuple(sparsities)!r:.80}.")
    checks.integer("total_steps", total_steps, least=max(len(sparsities), 1))
    if parts is None:
        later = len(sparsities) - 1
        parts = [0.4] + [0.6 / later] * later if later else [1.0]
    parts = checks.sequence("parts", parts, "(0.4, 0.6)")
    if len(parts) != len(sparsities):
        raise ValueError(
            f"parts must have one entry for each of the {len(sparsities)} sparsities; "
            f"got {parts!r}."
        )
    ends, done = [], 0.0
    for part in parts:
        checks.scalar("parts", part, above=0, most=1)
        done += part
        ends.append(round(total_steps * done / sum(parts)))
    density = schedules.staircase_density([1 - s for s in sparsities], ends=ends)
    kind = _kind_of(base, learning_rate)
    checks.scalar("learning_rate", kind.learning_rate, least=0)
    tx = pruning_aware(
        kind.make(_restarts(kind.learning_rate, ends), 0.0, where),
        density,
        score=score,
        shrink_rate=shrink_rate,
        where=where,
        scope=scope,
        layer_budget=layer_budget,
    )

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
                score=score,
                where=where,
                scope=scope,
                layer_budget=layer_budget,
            )
            yield Member(sparsity, end, pruned, mask, aux)
            begin = end

    return members()


def _arguments(aux: Any) -> tuple[str, ...]:
    """What the argument `gradient` of `ladder` is called with."""
    return ("params", "batch") if aux is None else ("params", "aux", "batch")


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
    """Constant for 60% of the training, then falling to 1%; a schedule as it is."""
    if callable(value):
        return value
    checks.scalar(name, value, least=0)
    return schedules.stable_decay(value, total_steps)


def _base_of(
    base: Base,
    total_steps: int,
    learning_rate: Any,
    l1: Any,
    weight_decay: Any,
    where: Where | None,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The base optimizer and the soft threshold, with the defaults of its kind."""
    kind = _kind_of(base, learning_rate)
    rate = _falling("learning_rate", kind.learning_rate, total_steps)
    strength = _falling("l1", kind.l1 if l1 is None else l1, total_steps)
    decay = kind.weight_decay if weight_decay is None else weight_decay
    checks.scalar("weight_decay", decay, least=0)
    return kind.make(rate, decay, where), lambda count: rate(count) * strength(count)


def _check_length(total_steps: int, begin: float, end: float) -> None:
    checks.integer("total_steps", total_steps, least=1)
    checks.scalar("begin", begin, least=0, below=1)
    checks.scalar("end", end, above=begin, most=1)
