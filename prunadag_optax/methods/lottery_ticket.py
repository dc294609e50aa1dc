"""Lottery tickets: iterative magnitude pruning with rewinding, and its controls.

Training is the caller's: a function of the parameters to start from and of the mask to
keep to. The driver around it prunes what was trained, rewinds what is left, and has it
trained again. It is a generator: a round is trained when it is asked for, so a loop can
stop early, save each round, or show its progress. Nothing in it depends on values, so
`jax.vmap` of a function that goes through it runs a batch of tickets at once.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from prunadag_optax import masks
from prunadag_optax._common import checks
from prunadag_optax._common.leaves import parts_of
from prunadag_optax._ranking import counts
from prunadag_optax._ranking.exact import mask_of_parts
from prunadag_optax._ranking.scoring import tree_of_scores

Fraction = float | Callable[[tuple[Any, ...], jax.Array], float]


class Ticket(NamedTuple):
    """A round of `iterative_magnitude_pruning`.

    Attributes:
      mask: pytree of bool, True = weight of the ticket, None = not prunable.
      start: the parameters rewound, pruned weights at zero.
      trained: the parameters that training made of `start`.
      aux: what training returned beside them, or None.
    """

    mask: Any
    start: Any
    trained: Any
    aux: Any


def iterative_magnitude_pruning(
    train: Callable[[Any, Any], Any],
    params: optax.Params,
    *,
    rounds: int,
    fraction: Fraction = 0.2,
    scope: str = "global",
    where: masks.Where | None = None,
    score: masks.Score = "magnitude",
    rewind: Callable[[Any], Any] | None = None,
    mask: Any = None,
    has_aux: bool = False,
) -> Iterator[Ticket]:
    r"""Iterative magnitude pruning with rewinding: trains R + 1 ever smaller tickets.

    .. math::
       \theta_k = \text{rewind}(\theta_0), \quad m_0 = 1, \\
       \theta^{(r)} = \text{train}(m_r \odot \theta_k, m_r), \quad
       m_{r+1} = m_r \text{ without the share } p \text{ of its weights
       whose } |\theta^{(r)}| \text{ is smallest}

    So (1 - p)^r of the weights remain in round r, up to rounding. The optimizer's state
    is not rewound: `train` starts it anew, as it does everything else that is not in
    the parameters, and it trains from step k on.

    Args:
      train: function (start, mask) -> trained parameters, which keeps pruned weights at
        zero; `sparse_optimizer` makes any optimizer do so.
      params: theta_0, pytree of real floating arrays.
      rounds: R >= 0, how often to prune. Round 0 is dense.
      fraction: p in [0, 1), the share of the remaining weights to prune in a round; a
        function (path, leaf) -> p, with scope "leaf", gives each leaf its own.
      scope: "global" ranks all prunable leaves together; "leaf" prunes the share p of
        each.
      where: predicate (path, leaf) -> bool, True for prunable leaves; None:
        `masks.prunable`.
      score: what is ranked of what was trained: "magnitude", "lamp", or a function of
        the trained parameters to a tree of scores, such as those of `scores`.
      rewind: function theta_0 -> theta_k, the first k steps of dense training. None:
        k = 0.
      mask: m_0, to go on from an earlier round; None: all prunable weights.
      has_aux: whether `train` returns a pair of the trained parameters and of anything
        else, which the ticket keeps.

    Returns:
      Iterator over the R + 1 tickets.

    Raises:
      ValueError: for an argument out of range or a tree that does not fit; while
        iterating, if `train` has not kept a pruned weight at zero.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax import masks
      >>> from prunadag_optax.methods import lottery_ticket as lt
      >>> params = {"kernel": jnp.array([[1.0, -3.0], [2.0, 4.0]]), "bias": jnp.ones(2)}
      >>> def train(start, mask):
      ...     grown = {"kernel": 2 * start["kernel"], "bias": start["bias"] + 1}
      ...     return masks.apply_mask(grown, mask)
      >>> tickets = lt.iterative_magnitude_pruning(
      ...     train, params, rounds=2, fraction=0.5
      ... )
      >>> for ticket in tickets:
      ...     print(ticket.start["kernel"].ravel(), ticket.trained["kernel"].ravel())
      [ 1. -3.  2.  4.] [ 2. -6.  4.  8.]
      [ 0. -3.  0.  4.] [ 0. -6.  0.  8.]
      [0. 0. 0. 4.] [0. 0. 0. 8.]

    References:
      J. Frankle, M. Carbin, The Lottery Ticket Hypothesis, ICLR 2019, arXiv:1803.03635,
      section 1 and appendix B (strategy 2, resetting). J. Frankle, G. K. Dziugaite,
      D. M. Roy, M. Carbin, Linear Mode Connectivity and the Lottery Ticket Hypothesis,
      ICML 2020, arXiv:1912.05671, algorithm 2 (rewinding to step k).
    """
    checks.scalar("rounds", rounds, least=0)
    if not isinstance(rounds, int):
        raise ValueError(f"rounds must be an integer >= 0; got {rounds!r}.")
    checks.function("train", train, "params", "mask")
    if rewind is not None:
        checks.function("rewind", rewind, "params")
    if mask is None:
        mask = dense_mask(params, where)
    _check(params, mask, fraction, scope)
    if isinstance(score, str):
        checks.score(score)
    # Checked at once, and not when the first ticket is asked for.
    prune = functools.partial(
        prune_remaining, fraction=fraction, scope=scope, score=score
    )
    return _tickets(train, params, mask, rounds, prune, rewind, has_aux)


def _tickets(train, params, mask, rounds, prune, rewind, has_aux) -> Iterator[Ticket]:
    if rewind is not None:
        early = rewind(params)
        checks.same_trees("rewind(params)", early, "params", params)
        params = early
    for count in range(rounds + 1):
        start = masks.apply_mask(params, mask)
        trained = train(start, mask)
        trained, aux = trained if has_aux else (trained, None)
        checks.same_trees("train(start, mask)", trained, "params", params)
        _check_pruned(trained, mask)
        yield Ticket(mask, start, trained, aux)
        if count < rounds:
            mask = prune(trained, mask)


def _check(params: Any, mask: Any, fraction: Any, scope: str) -> None:
    checks.choice("scope", scope, ("global", "leaf"))
    checks.mask(mask, params)
    for path, leaf, keep in _rows(params, mask):
        if keep is not None:
            checks.real_leaf("params", path, leaf)
    if not callable(fraction):
        checks.scalar("fraction", fraction, least=0, below=1)
    elif scope == "global":
        raise ValueError(
            "fraction must be a number in [0, 1) with scope='global', where all leaves "
            f"are ranked together; got the function {fraction!r}."
        )


def _check_pruned(trained: Any, mask: Any) -> None:
    for path, leaf, keep in _rows(trained, mask):
        if keep is None or isinstance(leaf, Tracer) or isinstance(keep, Tracer):
            continue
        if bool(jnp.any(masks.nonzero(leaf) & ~keep)):
            raise ValueError(
                "train must keep pruned weights at zero, as `sparse_optimizer` does; "
                f"got others in train(start, mask){jax.tree_util.keystr(path)}."
            )


def _for_each_leaf(mask: Any, params: Any) -> Any:
    """The mask, with a None for every leaf of a part for which it has one None."""
    return jax.tree.map(
        lambda keep, part: jax.tree.map(lambda _: None, part) if keep is None else keep,
        mask,
        params,
        is_leaf=lambda leaf: leaf is None,
    )


def _rows(tree: Any, mask: Any) -> list[tuple[Any, Any, Any]]:
    """(path, leaf, its mask or None) of every leaf."""
    paths_leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    held = treedef.flatten_up_to(_for_each_leaf(mask, tree))
    return [(*one, keep) for one, keep in zip(paths_leaves, held, strict=True)]


def dense_mask(params: optax.Params, where: masks.Where | None = None) -> Any:
    r"""The mask that keeps every weight.

    .. math:: m = 1

    Args:
      params: pytree of arrays.
      where: predicate (path, leaf) -> bool, True for prunable leaves; None:
        `masks.prunable`.

    Returns:
      Pytree like `params`: bool arrays of True, None where `where` is False.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax.methods import lottery_ticket as lt
      >>> lt.dense_mask({"kernel": jnp.ones((1, 2)), "bias": jnp.ones(2)})
      {'bias': None, 'kernel': Array([[ True,  True]], dtype=bool)}
    """
    return masks.magnitude_mask(params, 0.0, where=where)


def prune_remaining(
    params: optax.Params,
    mask: Any,
    fraction: Fraction,
    *,
    scope: str = "global",
    score: masks.Score = "magnitude",
) -> Any:
    r"""The mask without the smallest magnitudes among the weights that it keeps.

    .. math:: \mathrm{round}(p \, n_{kept}) \text{ of the } n_{kept}
       \text{ remaining weights go, those with the smallest } |x_i|

    Among equal magnitudes the one with the lowest index goes first. What is pruned
    already stays so and is not counted, whatever stands there.

    Args:
      params: pytree of trained parameters.
      mask: pytree of bool like `params`, None for leaves that are not prunable. Where
        it is traced, p n_kept is computed in float32, and exact below 2^24.
      fraction: p in [0, 1), or a function (path, leaf) -> p with scope "leaf".
      scope: "global" or "leaf", as in `iterative_magnitude_pruning`.
      score: what is ranked: "magnitude", "lamp", a function of the parameters to a tree
        of scores, or that tree.

    Returns:
      Pytree like `mask`.

    Raises:
      ValueError: for an argument out of range or a mask that does not fit.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax.methods import lottery_ticket as lt
      >>> mask = jnp.array([True, True, False, True])
      >>> lt.prune_remaining(jnp.array([2.0, -1.0, 9.0, 3.0]), mask, 0.3).tolist()
      [True, False, False, True]
    """
    _check(params, mask, fraction, scope)
    rows = _rows(params, mask)

    def pruned(group, size):
        share: Any = fraction
        if callable(fraction):
            path, leaf, _ = rows[group[0]]
            share = fraction(path, leaf)
            name = f"fraction({jax.tree_util.keystr(path)})"
            checks.scalar(name, share, least=0, below=1)
        dtype = counts.count_dtype(size)
        each = (jnp.sum(rows[i][2], dtype=dtype) for i in group)
        kept = sum(each, jnp.zeros((), dtype))
        if isinstance(kept, Tracer) or checks.is_scalar_array(share):
            return size - kept + jnp.round(share * kept).astype(dtype)
        return size - int(kept) + round(float(share) * int(kept))

    parts = parts_of(params, masks.where_held(None, mask), scope)
    scores = tree_of_scores(params, parts, score)
    return mask_of_parts(params, parts, pruned, _for_each_leaf(mask, params), scores)


def sparse_optimizer(
    base: optax.GradientTransformation, mask: Any
) -> optax.GradientTransformationExtraArgs:
    r"""An optimizer on the weights of a ticket: the others stay at exactly zero.

    .. math:: g \leftarrow m \odot g, \quad
       u = m \odot \text{base}(g) - (1 - m) \odot x

    Zero gradients of pruned weights keep them out of norms and moments, which `base`
    may compute over the whole tree.

    Args:
      base: any optimizer.
      mask: pytree of bool like the parameters, None for leaves that are not prunable.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: from `init` if the mask does not fit the parameters; from `update`
        without `params`.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from prunadag_optax.methods import lottery_ticket as lt
      >>> params, mask = jnp.array([0.0, 1.0]), jnp.array([False, True])
      >>> tx = lt.sparse_optimizer(optax.sgd(0.5), mask)
      >>> updates, _ = tx.update(jnp.array([3.0, 3.0]), tx.init(params), params)
      >>> optax.apply_updates(params, updates)
      Array([ 0. , -0.5], dtype=float32)
    """
    checks.transformation("base", base)
    gradients_kept = optax.stateless(lambda g, _: masks.apply_mask(g, mask))
    return optax.chain(gradients_kept, base, masks.keep_pruned(mask))


def random_mask(key: chex.PRNGKey, mask: Any) -> Any:
    r"""A control: a random mask that keeps as many weights of each leaf.

    .. math:: m' = \text{a random permutation of } m \text{ within each leaf}

    Args:
      key: random key.
      mask: pytree of bool, None for leaves that are not prunable.

    Returns:
      Pytree like `mask`.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from prunadag_optax.methods import lottery_ticket as lt
      >>> mask = {"bias": None, "kernel": jnp.array([[True, True], [False, False]])}
      >>> int(lt.random_mask(jax.random.key(0), mask)["kernel"].sum())
      2
    """
    checks.key("key", key)
    leaves, treedef = jax.tree.flatten(mask)
    keys = jax.random.split(key, max(len(leaves), 1))
    return treedef.unflatten(
        [
            jax.random.permutation(k, jnp.ravel(keep)).reshape(jnp.shape(keep))
            for k, keep in zip(keys, leaves, strict=False)
        ]
    )


def reinitialised(
    key: chex.PRNGKey, init: Callable[[chex.PRNGKey], Any], mask: Any
) -> Any:
    r"""A control: the same mask on other initial weights.

    .. math:: m \odot \theta_0', \quad \theta_0' \sim \text{init}

    Args:
      key: random key, another than that of theta_0.
      init: function key -> parameters.
      mask: pytree of bool like the parameters, None for leaves that are not prunable.

    Returns:
      The parameters to train under `mask`.

    Raises:
      ValueError: if `mask` does not fit what `init` makes.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from prunadag_optax.methods import lottery_ticket as lt
      >>> mask = jnp.array([True, False])
      >>> init = lambda key: jax.random.normal(key, (2,))
      >>> (lt.reinitialised(jax.random.key(1), init, mask) == 0).tolist()
      [False, True]
    """
    checks.key("key", key)
    checks.function("init", init, "key")
    return masks.apply_mask(init(key), mask)
