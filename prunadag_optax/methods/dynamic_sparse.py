r"""Dynamic sparse training: sparse from the first step, with masks that change.

No weight but the active ones is ever trained, and there are as many of them in each
leaf at every step. Now and then the smallest of them are dropped and as many others
grown: those with the largest gradients (`rigl`), or any (`sparse_evolution`), or none
ever (`static_sparse`). All three begin with a random mask.
"""

import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from prunadag_optax import masks, scores
from prunadag_optax._common import budgets, checks
from prunadag_optax._common.dtypes import cast_like, working
from prunadag_optax._common.leaves import Parts, parts_of
from prunadag_optax._common.opt_states import where_like_params
from prunadag_optax._common.packing import pack, packed_like, unpack
from prunadag_optax._common.transformation import checked
from prunadag_optax._core.eval_params import keeps_mask
from prunadag_optax._ranking import counts, exact


@keeps_mask
class DynamicSparseState(NamedTuple):
    """State of `rigl`, `sparse_evolution` and `static_sparse`."""

    # The iterations done, shape=(), dtype=int32. optax's states have the same name.
    count: jax.typing.ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride]
    mask: Any  # bool or packed, as params; None for leaves that are not prunable
    base: optax.OptState  # of the optimizer whose steps are taken
    key: jax.Array  # the data of a random key, dtype=uint32


def rigl(
    base: optax.GradientTransformation,
    density: chex.Numeric,
    *,
    every: int = 100,
    begin: int = 0,
    end: int,
    drop: optax.ScalarOrSchedule = 0.3,
    layer_budget: masks.Budget = "erk",
    where: masks.Where | None = None,
    key: int | jax.Array = 0,
    packed: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""RigL: drops the smallest weights and grows those with the largest gradients.

    .. math::
       x_{k+1} &= m_k \odot (x_k + u_k), \quad u_k = \text{base}(m_k \odot g_k)
       \quad \text{in most steps; every so many, in each leaf,} \\
       d &= \lfloor a f_k \rfloor, \quad
       f_k = \frac{\alpha}{2} \left(1 + \cos \frac{\pi k}{k_1} \right) \\
       s &= \text{the } a - d \text{ of the } a \text{ active weights with the largest }
       |x_k| \\
       m_{k+1} &= s \cup \text{the } d \text{ others with the largest } |g_k|, \quad
       x_{k+1} = m_k \odot m_{k+1} \odot x_k

    Such a step takes the place of one of the base: no weight moves but those dropped,
    which become zero, not even in leaves that are not prunable. What was dropped may be
    grown at once; then it keeps its value. Other grown weights start at zero, and with
    the base's state for a new weight; its counters stay. Of equal magnitudes the one
    with the lowest index is dropped, and the one with the highest index grown.

    The gradients must be those of all weights, at the sparse network. The base sees
    only those of active weights. The initial mask is random, so initial parameters are
    not sparse: take the first gradient at `eval_params(state, params)`. Where it is
    taken at dense parameters all the same, the first step makes them sparse.

    Args:
      base: the optimizer.
      density: share of the prunable weights that is active, in (0, 1], or their number
        as an integer.
      every: number of steps from one change of the mask to the next.
      begin: the step before which the mask does not change.
      end: k_1, the step from which the mask does not change; three quarters of the
        training is usual.
      drop: alpha in [0, 1], the share of the active weights that is dropped at first,
        or a schedule count -> share, f_k itself.
      layer_budget: how the active weights are shared out among the leaves: "erk" or
        "er", in proportion to the sum of a leaf's dimensions over their product, the
        last two with "er"; "uniform"; a mapping from patterns of paths, such as
        "*/embedding", to densities; or a `masks.LayerBudget` of one of these and of a
        least number for each leaf.
      where: predicate (path, leaf) -> bool, False for leaves to train dense; None:
        `masks.prunable`.
      key: a seed in 0..2^32 - 1 or a key of `jax.random`, for the initial mask. With
        equal keys two optimizers begin with equal masks.
      packed: whether the state's mask has one bit a weight, as `masks.pack` makes it.
        Not for sharded parameters.

    Returns:
      An `optax.GradientTransformationExtraArgs` with `DynamicSparseState`. Its `update`
      needs `params`, hands extra arguments to the base, and returns updates in the
      parameters' dtypes.

    Raises:
      ValueError: naming an argument out of range, if the mask would never change, or
        for trees that do not match.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from prunadag_optax import eval_params
      >>> from prunadag_optax.methods import dynamic_sparse
      >>> target = jnp.array([[0.0, 3.0, 0.1, 0.0], [-2.0, 0.2, 0.0, 0.0]])
      >>> loss = lambda x: jnp.sum((x - target) ** 2) / 2
      >>> tx = dynamic_sparse.rigl(optax.sgd(0.5), 3, every=5, end=40, drop=0.7)
      >>> x = jnp.zeros((2, 4))
      >>> state, update = tx.init(x), jax.jit(tx.update)
      >>> x = eval_params(state, x)
      >>> for _ in range(60):
      ...     updates, state = update(jax.grad(loss)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> x.round(1)
      Array([[ 0. ,  3. ,  0.1,  0. ],
             [-2. ,  0. ,  0. ,  0. ]], dtype=float32)

    References:
      U. Evci and others, Rigging the lottery: making all tickets winners, ICML 2020,
      section 3, algorithm 1.
    """
    exchange = _exchange(every, begin, end, drop, lambda gradients, key: gradients)
    return _sparse(base, density, layer_budget, where, key, packed, exchange)


def sparse_evolution(
    base: optax.GradientTransformation,
    density: chex.Numeric,
    *,
    every: int = 100,
    begin: int = 0,
    end: int,
    drop: optax.ScalarOrSchedule = 0.3,
    layer_budget: masks.Budget = "erk",
    where: masks.Where | None = None,
    key: int | jax.Array = 0,
    packed: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Sparse evolutionary training (SET): drops the smallest weights, grows any.

    .. math:: m_{k+1} = \text{the } a - d \text{ active weights with the largest } |x_k|
       \text{, and } d \text{ of the others at random}

    All else is as in `rigl`, but no gradient of an inactive weight is used.

    Args:
      base: the optimizer.
      density: as in `rigl`.
      every: as in `rigl`.
      begin: as in `rigl`.
      end: as in `rigl`.
      drop: as in `rigl`; `optax.constant_schedule(0.3)` for a constant share.
      layer_budget: as in `rigl`; published with "er".
      where: as in `rigl`.
      key: a seed or a key of `jax.random`, for the initial mask and all that grows.
      packed: as in `rigl`.

    Returns:
      An `optax.GradientTransformationExtraArgs` with `DynamicSparseState`. Its `update`
      needs `params`, hands extra arguments to the base, and returns updates in the
      parameters' dtypes.

    Raises:
      ValueError: as `rigl`.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from prunadag_optax import masks
      >>> from prunadag_optax.methods import dynamic_sparse
      >>> tx = dynamic_sparse.sparse_evolution(optax.sgd(0.1), 0.25, end=1000)
      >>> state = tx.init(jnp.ones((40, 40)))
      >>> float(masks.sparsity(state.mask))
      0.75

    References:
      D. C. Mocanu and others, Scalable training of artificial neural networks with
      adaptive sparse connectivity inspired by network science, Nature Communications 9,
      2018, algorithm 1.
    """
    exchange = _exchange(every, begin, end, drop, scores.random)
    return _sparse(base, density, layer_budget, where, key, packed, exchange)


def static_sparse(
    base: optax.GradientTransformation,
    density: chex.Numeric,
    *,
    layer_budget: masks.Budget = "erk",
    where: masks.Where | None = None,
    key: int | jax.Array = 0,
    packed: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Trains a random part of the weights and no others: what `rigl` is to beat.

    .. math:: x_{k+1} = m \odot (x_k + u_k), \quad u_k = \text{base}(m \odot g_k)

    Args:
      base: the optimizer.
      density: as in `rigl`.
      layer_budget: as in `rigl`.
      where: as in `rigl`.
      key: a seed or a key of `jax.random`, for the mask.
      packed: as in `rigl`.

    Returns:
      An `optax.GradientTransformationExtraArgs` with `DynamicSparseState`. Its `update`
      needs `params`, hands extra arguments to the base, and returns updates in the
      parameters' dtypes.

    Raises:
      ValueError: as `rigl`.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from prunadag_optax.methods import dynamic_sparse
      >>> x = jnp.ones((2, 3))
      >>> tx = dynamic_sparse.static_sparse(optax.sgd(0.5), 2)
      >>> updates, state = tx.update(x, tx.init(x), x)
      >>> sorted((x + updates).ravel().tolist())
      [0.0, 0.0, 0.0, 0.0, 0.5, 0.5]

    References:
      Evci et al. (2020), section 4, "Static".
    """
    return _sparse(base, density, layer_budget, where, key, packed, None)


class _Exchange(NamedTuple):
    """When weights are dropped and grown, how many, and which are grown."""

    every: int
    begin: int
    end: int
    drop: Any
    # From gradients and a random key to the tree whose largest magnitudes are grown.
    scores: Callable[[Any, jax.Array], Any]

    def due(self, count: Any) -> Any:
        """Whether the mask changes in this step."""
        inside = (count >= max(self.begin, 1)) & (count < self.end)
        return inside & (count % self.every == 0)

    def share(self, count: Any) -> Any:
        """The share of the active weights that is dropped in this step."""
        if callable(self.drop):
            return self.drop(count)
        angle = jnp.pi / self.end * jnp.asarray(count, float)
        return working(self.drop) / 2 * (1 + jnp.cos(angle))


def _exchange(
    every: int,
    begin: int,
    end: int,
    drop: Any,
    scores: Callable[[Any, jax.Array], Any],
) -> _Exchange:
    """The arguments of the public functions, checked."""
    checks.integer("every", every, least=1)
    checks.integer("begin", begin, least=0)
    checks.integer("end", end, least=1)
    first = -(-max(begin, 1) // every) * every
    if end <= first:
        raise ValueError(
            f"end must be > {first}, the first step at which the mask can change "
            f"(every={every}, begin={begin}); got {end}. Lower every, or write "
            "static_sparse for a mask that does not change."
        )
    checks.scalar_or_schedule("drop", drop, least=0, most=1)
    if callable(drop):
        share = checks.at_start("drop", drop)
        if not isinstance(share, Tracer):
            checks.scalar("drop", share, least=0, most=1)
    return _Exchange(every, begin, end, drop, scores)


def _sparse(
    base: optax.GradientTransformation,
    density: Any,
    layer_budget: Any,
    where: masks.Where | None,
    key: Any,
    packed: bool,
    exchange: _Exchange | None,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer: the base on active weights, and now and then an exchange."""
    checks.transformation("base", base)
    extended = optax.with_extra_args_support(base)
    checks.fraction_or_count("density", density)
    budget = budgets.layer_budget(layer_budget)
    if budget.ranks_together:
        raise ValueError(
            "layer_budget must say how many weights each leaf keeps: 'erk', 'er', "
            "'uniform' or a mapping from patterns of paths to densities; got 'global', "
            "which leaves it to a ranking, and a random mask has none."
        )
    _check_key(key)

    def init(params: optax.Params) -> DynamicSparseState:
        own, random = jax.random.split(_typed(key))
        mask = _random_mask(params, where, budget, density, random)
        inner = extended.init(masks.apply_mask(params, mask))
        mask = pack(mask) if packed else mask
        count = jnp.zeros([], jnp.int32)
        return DynamicSparseState(count, mask, inner, jax.random.key_data(own))

    def update(updates, state, params, **extra_args):
        held = unpack(state.mask)
        checks.mask(held, params)
        count = optax.safe_increment(state.count)

        def step():
            # Weights that are not active are zero, whatever the parameters hold.
            steps, inner = extended.update(
                masks.apply_mask(updates, held),
                state.base,
                masks.apply_mask(params, held),
                **extra_args,
            )
            steps = _only(held, steps, params)
            return steps, DynamicSparseState(count, state.mask, inner, state.key)

        def change(exchange):
            own, random = jax.random.split(_typed(state.key, like=key))
            mask = _changed(
                params,
                parts_of(params, where, "leaf"),
                held,
                exchange.share(state.count),
                exchange.scores(updates, random),
            )
            # What is active now and was before goes on; all else is new.
            stays = jax.tree.map(jnp.logical_and, held, mask)
            steps = _only(stays, jax.tree.map(jnp.zeros_like, params), params)
            new = extended.init(masks.apply_mask(params, stays))
            inner = where_like_params(extended, stays, state.base, new)
            mask = packed_like(mask, state.mask)
            return steps, DynamicSparseState(
                count, mask, inner, jax.random.key_data(own)
            )

        if exchange is None:
            return step()
        due = exchange.due(state.count)
        if isinstance(due, Tracer):
            # The first step of a base may widen its state, in mixed dtypes.
            like = jax.eval_shape(step)
            return jax.lax.cond(due, lambda: cast_like(change(exchange), like), step)
        return change(exchange) if due else step()

    return checked(init, update)


def _only(mask: Any, steps: Any, params: Any) -> Any:
    """The steps where the mask is True, and to zero where it is not."""
    tx = masks.keep_pruned(mask)
    steps, _ = tx.update(steps, masks.KeepPrunedState(mask), params)
    return cast_like(steps, params)


def _random_mask(
    params: Any,
    where: masks.Where | None,
    budget: budgets.LayerBudget,
    density: Any,
    key: jax.Array,
) -> Any:
    """A mask of the budget's counts, each choice of weights as likely as any."""
    parts = parts_of(params, where, "leaf", budget)
    if not parts.leaves:
        return params
    size = sum(parts.sizes)
    if isinstance(density, numbers.Integral):
        checks.relevant(density, size, "density")
    kept = parts.by_leaf(parts.kept(lambda n: counts.target_count(density, n)))
    return exact.mask_of_parts(
        params,
        parts,
        lambda group, size: size - kept[group[0]],
        scores=scores.random(params, key),
    )


def _changed(params: Any, parts: Parts, held: Any, share: Any, scores: Any) -> Any:
    """The mask after an exchange: as many weights of each leaf as before."""
    treedef = jax.tree.structure(params)
    before = treedef.flatten_up_to(held)
    share = working(share)
    dropped = {}
    for i, _, shape in parts.leaves:
        active = jnp.sum(before[i], dtype=counts.count_dtype(math.prod(shape)))
        number = jnp.floor(share * active.astype(share.dtype)).astype(active.dtype)
        dropped[i] = active, jnp.clip(number, 0, active)

    def all_but_kept(group, size):
        active, number = dropped[group[0]]
        return size - active + number

    kept = exact.mask_of_parts(params, parts, all_but_kept, held)
    others = jax.tree.map(jnp.logical_not, kept)
    grown = exact.mask_of_parts(
        params,
        parts,
        lambda group, size: size - dropped[group[0]][1],
        others,
        scores,
    )
    return jax.tree.map(jnp.logical_or, kept, grown)


def _check_key(key: Any) -> None:
    """Raises a ValueError for what is neither a seed nor a random key."""
    if _is_typed(key) or np.ndim(key):
        checks.key("key", key)
        return
    checks.integer("key", key, least=0)
    if key >= 2**32:
        raise ValueError(
            f"key must be a seed below 2^32; got {key!r}. Write key=jax.random.key(0) "
            "for a key of any kind."
        )


def _is_typed(key: Any) -> bool:
    dtype = checks.dtype_of(key)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def _typed(key: Any, like: Any = None) -> jax.Array:
    """The random key of a seed, a key or the data of one.

    Args:
      key: a seed, or a key as an array of either kind.
      like: a key of the kind to make of data, or None for the default one.

    Returns:
      The key.
    """
    if _is_typed(key):
        return key
    if not np.ndim(key):
        return jax.random.key(key)
    impl = jax.random.key_impl(like) if _is_typed(like) else None
    return jax.random.wrap_key_data(key, impl=impl)
