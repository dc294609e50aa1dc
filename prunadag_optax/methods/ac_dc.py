"""AC/DC: phases of a pruned and of a dense network that take turns in one training.

At the end there are two networks: the pruned one, and the dense one of the last phase
before it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import chex
import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from prunadag_optax import masks
from prunadag_optax._common import budgets, checks
from prunadag_optax._common.opt_states import where_like_params
from prunadag_optax._common.packing import pack, packed_like, unpack
from prunadag_optax._common.transformation import checked

Phases = Callable[[jax.typing.ArrayLike], tuple[jax.Array, jax.Array]]


class AcDcState(NamedTuple):
    """State of `ac_dc`."""

    # The iterations done, shape=(), dtype=int32. optax's states have the same name.
    count: jax.typing.ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride]
    # Held in the last step; bool or packed, as params; all True in a dense phase, None
    # where a leaf is not prunable.
    mask: Any
    base: optax.OptState  # of the optimizer whose steps are taken


def phases(*, warm_up: int, phase: int, last: int, total_steps: int) -> Phases:
    r"""In which steps the network is compressed, and where a phase starts.

    After the warm-up, phases of p steps take turns, a compressed one first, each with
    a decompressed one after it; then follows the last compressed phase.

    .. math::
       \text{compressed}_k = \lfloor (k - w) / p \rfloor \text{ even and }
       w \le k < w + 2 p P, \text{ or } k \ge N - l, \quad
       P = \lfloor (N - l - w) / 2 p \rfloor

    What is left over makes the last decompressed phase longer. With 10, 5, 15 and 100
    there are seven pairs of phases, and the decompressed one of the last pair has 10.

    Args:
      warm_up: w >= 0, the length of the dense training at the beginning, in steps.
      phase: p >= 1, the length of a phase, in steps.
      last: l >= 1, the length of the last compressed phase, in steps.
      total_steps: N >= w + l, the length of the training, in steps. What trains on
        after it stays compressed.

    Returns:
      Function count -> (whether step `count` is in a compressed phase, whether a phase
      starts with it), two bool arrays like `count`, which may be traced.

    Raises:
      ValueError: for an argument out of range.

    Examples:
      >>> from prunadag_optax.methods import ac_dc
      >>> at = ac_dc.phases(warm_up=1, phase=2, last=3, total_steps=9)
      >>> [int(at(k)[0]) for k in range(10)], [k for k in range(10) if at(k)[1]]
      ([0, 1, 1, 0, 0, 0, 1, 1, 1, 1], [0, 1, 3, 6])

    References:
      A. Peste and others, AC/DC: Alternating Compressed/DeCompressed training of deep
      neural networks, NeurIPS 2021, Algorithm 1.
    """
    checks.integer("warm_up", warm_up, least=0)
    checks.integer("phase", phase, least=1)
    checks.integer("last", last, least=1)
    checks.integer("total_steps", total_steps, least=1)
    if warm_up + last > total_steps:
        raise ValueError(
            f"total_steps must be at least warm_up + last = {warm_up + last}; got "
            f"{total_steps!r}."
        )
    begin = total_steps - last
    alternating = 2 * phase * ((begin - warm_up) // (2 * phase))

    def compressed_at(count):
        done = count - warm_up
        pruned = (done // phase) % 2 == 0
        return (pruned & (done >= 0) & (done < alternating)) | (count >= begin)

    def at(count: jax.typing.ArrayLike) -> tuple[jax.Array, jax.Array]:
        # Signed: nnx.Optimizer counts in uint32, where count - warm_up wraps.
        count = jnp.asarray(count, jnp.int32)
        compressed = compressed_at(count)
        return compressed, (compressed != compressed_at(count - 1)) | (count == 0)

    return at


def ac_dc(
    base: optax.GradientTransformation,
    density: chex.Numeric,
    *,
    warm_up: int,
    phase: int,
    last: int,
    total_steps: int,
    scope: masks.Scope = "global",
    where: masks.Where | None = None,
    layer_budget: masks.Budget = "global",
    packed: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""AC/DC: any optimizer, on a pruned and on the dense network in turns.

    .. math::
       m_k &= \begin{cases}
         \text{the mask of } |x_k| \text{ that keeps the share } \delta
           & \text{a compressed phase starts} \\
         m_{k-1} & \text{within a compressed phase} \\
         1 & \text{in a decompressed phase}
       \end{cases} \\
       x_{k+1} &= m_k \odot (x_k + u_k), \quad u_k = \text{base}(m_k \odot g_k)

    In a compressed phase what is masked is exactly 0, and the base sees zero gradients
    there. When it is free again, what the base's state holds for it is as after
    `base.init`: a momentum is zero. Each compressed phase chooses anew. The training
    ends with one, and what trains on after it keeps its mask.

    The network between two phases, before the last compressed one say, is the dense
    one; it is in the training loop's hands then, and nowhere later.

    Args:
      base: the optimizer.
      density: delta in (0, 1], the share of the prunable weights that a compressed
        phase keeps. A scalar array may be traced.
      warm_up: length of the dense training at the beginning, in steps, as the next
        ones, all as in `phases`.
      phase: length of a phase.
      last: length of the last compressed phase.
      total_steps: length of the training. Under `optax.inject_hyperparams` name all
        four in `static_args`.
      scope: "global" ranks all prunable leaves together; "leaf" keeps the share of
        each; or a function, as in `masks.magnitude_mask`.
      where: predicate (path, leaf) -> bool, False for leaves never to prune; None:
        `masks.prunable`.
      layer_budget: how many each leaf keeps, as in `masks.magnitude_mask`.
      packed: whether the state has one bit a weight for the mask, and not a byte. Not
        for sharded parameters.

    Returns:
      An `optax.GradientTransformationExtraArgs` with `AcDcState`. Its `update` needs
      `params`, hands extra arguments to the base, and returns updates in the
      parameters' dtypes. A weight that is not masked moves exactly as the base moves
      it.

    Raises:
      ValueError: naming an argument out of range, or trees that do not match.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from prunadag_optax.methods.ac_dc import ac_dc
      >>> loss = lambda x: jnp.sum((x - jnp.array([3.0, 0.1, 0.2, -2.0])) ** 2) / 2
      >>> tx = ac_dc(optax.sgd(0.5), 0.5, warm_up=4, phase=2, last=20, total_steps=40)
      >>> x = jnp.zeros(4)
      >>> state, update = tx.init(x), jax.jit(tx.update)
      >>> for _ in range(40):
      ...     updates, state = update(jax.grad(loss)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> [round(value, 3) for value in x.tolist()]
      [3.0, 0.0, 0.0, -2.0]

    References:
      A. Peste and others, AC/DC: Alternating Compressed/DeCompressed training of deep
      neural networks, NeurIPS 2021, Algorithm 1.
    """
    checks.transformation("base", base)
    checks.scalar("density", density, above=0, most=1)
    checks.scope(scope)
    at = phases(warm_up=warm_up, phase=phase, last=last, total_steps=total_steps)
    budget, share = budgets.layer_budget(layer_budget), cast(Any, density)
    extended = optax.with_extra_args_support(base)
    where = where or masks.prunable

    def init(params: optax.Params) -> AcDcState:
        mask = masks.magnitude_mask(params, 0.0, scope=scope, where=where)
        mask = pack(mask) if packed else mask
        return AcDcState(jnp.zeros([], jnp.int32), mask, extended.init(params))

    def update(updates, state, params, **extra_args):
        compressed, starts = at(state.count)

        def within():
            return state.mask, state.base

        def decompress():
            held = unpack(state.mask)
            fresh = extended.init(params)
            # What was masked is as at the start; counters and the like go on.
            inner = where_like_params(extended, held, state.base, fresh)
            return packed_like(jax.tree.map(jnp.ones_like, held), state.mask), inner

        def compress():
            # The first change of a schedule: an exact count of what is kept.
            mask = masks.mask_on_schedule(
                params, None, 0, share, scope=scope, where=where, layer_budget=budget
            )
            return packed_like(mask, state.mask), state.base

        mask, inner = _one_of(
            jnp.where(starts, jnp.where(compressed, 2, 1), 0),
            (within, decompress, compress),
        )
        kept = unpack(mask)
        steps, inner = extended.update(
            masks.apply_mask(updates, kept), inner, params, **extra_args
        )
        # x + (-x) is exactly zero; a weight that stays takes the base's own step.
        held, _ = masks.keep_pruned(kept).update(
            steps, masks.KeepPrunedState(kept), params
        )
        return held, AcDcState(optax.safe_increment(state.count), mask, inner)

    return checked(init, update)


def _one_of(case: jax.Array, branches: tuple[Callable[[], Any], ...]) -> Any:
    """What the branch of that number returns."""
    # Outside of jit a switch would be compiled in each step.
    if isinstance(case, Tracer):
        return jax.lax.switch(case, branches)
    return branches[int(case)]()
