"""The parameters that are evaluated, wherever an optimizer's state keeps them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from prunadag_optax._common import checks
from prunadag_optax._common.opt_states import (
    by_path,
    is_hole,
    place,
    where_like_params,
)
from prunadag_optax._common.packing import unpack
from prunadag_optax._common.transformation import find_states
from prunadag_optax._core.pruning_aware import GradientAtPrunedState

# The states that keep a copy of the parameters, the outermost first, and where.
_COPIES = {GradientAtPrunedState: "dense", contrib.ScheduleFreeState: "z"}
# The states with a `mask` outside of which the evaluated parameters are zero.
_MASKED: list[type] = []


def keeps_dense(kind: type) -> type:
    """Declares that the states of a kind keep the dense parameters, in `dense`.

    With them is a `threshold`, zero where the loop holds all of `dense`.

    Args:
      kind: the class of the states, a NamedTuple.

    Returns:
      The class, for use as a decorator.
    """
    before = dict(_COPIES)
    _COPIES.clear()
    # Outside of the states of optax, which may be its base's.
    _COPIES.update({kind: "dense", **before})
    return kind


def keeps_mask(kind: type) -> type:
    """Declares that the network of a kind of state is the one under its `mask`.

    Args:
      kind: the class of the states, a NamedTuple.

    Returns:
      The class, for use as a decorator.
    """
    _MASKED.append(kind)
    return kind


def eval_params(opt_state: optax.OptState, params: optax.Params) -> Any:
    r"""The parameters to evaluate, prune and save.

    With `pruning_aware(..., gradient_at="pruned")` the training loop holds
    :math:`P_{R_k} x_k`, and all components of x_k are in the state; with optax's
    schedule-free the loop holds an interpolation, and the average is computed from it.
    With any other optimizer the loop holds what is evaluated.

    Args:
      opt_state: the optimizer's state, or an `nnx.Optimizer`. The state in question may
        be anywhere inside: in a chain, a partition, under a mask, in MultiSteps,
        apply_if_finite or inject_hyperparams.
      params: the parameters that the training loop holds: a pytree of arrays, or an
        `nnx.State`.

    Returns:
      Pytree like `params`.

    Raises:
      ValueError: if the arguments are swapped, if `opt_state` is an optimizer or
        `params` a model, or if the state is one of another tree.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from prunadag_optax import eval_params, pruning_aware
      >>> tx = pruning_aware(optax.sgd(0.0), 1, shrink_rate=0.0, gradient_at="pruned")
      >>> x = jnp.array([1.0, -2.0])
      >>> updates, state = tx.update(jnp.ones(2), tx.init(x), x)
      >>> (x + updates).tolist(), eval_params(state, x + updates).tolist()
      ([0.0, -2.0], [1.0, -2.0])
    """
    bare = params if isinstance(params, tuple | dict) else ()
    for state in filter(_is_state, jax.tree.leaves(bare, is_leaf=_is_state)):
        raise ValueError(
            "params must be the parameters that the training loop holds; got an "
            f"optimizer's state ({type(state).__name__}). Write eval_params(opt_state, "
            "params), the state first."
        )
    checks.parameters("params", params)
    checks.opt_state(opt_state, params)
    opt_state = getattr(opt_state, "opt_state", opt_state)  # nnx.Optimizer
    for kind in _COPIES:
        for state in find_states(opt_state, kind):
            params = _evaluated(state, params)
    for kind in _MASKED:
        for state in find_states(opt_state, kind):
            params = _masked(state, params)
    return params


def _masked(state: Any, params: Any) -> Any:
    """The parameters under the mask of a state."""
    kept = by_path(unpack(state.mask))

    def leaf(path, x):
        keep = kept.get(place(path))
        if keep is None or is_hole(keep):
            return x
        return jnp.where(keep, x, jnp.zeros_like(x))

    return jax.tree_util.tree_map_with_path(leaf, params)


def _is_state(node: Any) -> bool:
    """Whether a node is a state as optax names them, such as ScaleByAdamState."""
    return hasattr(node, "_fields") and type(node).__name__.endswith("State")


def _evaluated(state: Any, params: Any) -> Any:
    """The parameters to evaluate; the loop's where a mask hides leaves from the state.

    Leaves go by their places: the state of an `nnx.Optimizer` has boxes of another kind
    than the model.
    """
    copies = by_path(getattr(state, _COPIES[type(state)]))

    def leaf(path, y):
        at = place(path)
        hidden = (is_hole(copies.get(at[:n])) for n in range(len(at) + 1))
        if any(hidden):  # alone or with a branch
            return y
        x = copies.get(at)
        if x is None or jnp.shape(x) != jnp.shape(y):
            raise ValueError(
                "opt_state must be that of params: params"
                f"{jax.tree_util.keystr(path)} has the shape {jnp.shape(y)}, its "
                f"{type(state).__name__} has "
                + ("no such leaf." if x is None else f"{jnp.shape(x)}.")
            )
        if not isinstance(state, contrib.ScheduleFreeState):
            return x
        (b1,) = jax.tree.leaves(state.b1)
        # A number, or one for each replica on the first axis.
        b1 = jnp.reshape(b1, jnp.shape(b1) + (1,) * (jnp.ndim(x) - jnp.ndim(b1)))
        return ((y - (1 - b1) * x) / b1).astype(jnp.result_type(y))

    return jax.tree_util.tree_map_with_path(leaf, params)


# With masks held.


def all_relevant(opt_state: optax.OptState, params: optax.Params) -> tuple[Any, Any]:
    """The loop at all of x_k, and a state that says so: R_k is everything.

    Args:
      opt_state: the optimizer's state.
      params: the parameters that the training loop holds.

    Returns:
      The state and the loop's parameters, both as they are where the state keeps no
      x_k of `pruning_aware(..., gradient_at="pruned")`.
    """
    for state in _dense_states(opt_state):
        # A copy: donating the state and the parameters must not delete one of them.
        params = jax.tree.map(jnp.array, _evaluated(state, params))

    def reset(state):
        if not hasattr(state, "threshold"):
            return state
        return state._replace(threshold=jnp.zeros_like(state.threshold))

    return _map_copies(reset, opt_state), params


def _dense_states(opt_state: Any) -> list[Any]:
    kinds = [kind for kind, field in _COPIES.items() if field == "dense"]
    return [state for kind in kinds for state in find_states(opt_state, kind)]


def forget_pruned(
    tx: optax.GradientTransformation,
    opt_state: optax.OptState,
    params: optax.Params,
    masks: Any,
) -> Any:
    """What the optimizer's state holds for a pruned weight becomes that of a new one.

    Moments and copies of the parameters become zero, the accumulators of prunAdag
    their initial value: all real-float leaves with the tree and shapes of the
    parameters, as in `tx.init(params)`. Other leaves stay.

    Args:
      tx: the optimizer.
      opt_state: its state.
      params: the parameters that the training loop holds, pruned.
      masks: pytree of bool like `params`, None for leaves that are not prunable.

    Returns:
      The state.
    """
    return where_like_params(
        tx, _of_each_leaf(masks, params), opt_state, tx.init(params)
    )


def mask_copies(opt_state: optax.OptState, params: optax.Params, masks: Any) -> Any:
    """The masks applied to what `eval_params` takes from the state.

    Args:
      opt_state: the optimizer's state.
      params: the parameters that the training loop holds.
      masks: pytree of bool like `params`, None for leaves that are not prunable.

    Returns:
      The state. With the masks applied to the loop's parameters, too, the evaluated
      ones have their zeros.
    """
    of_path = by_path(_of_each_leaf(masks, params))

    def masked(state):
        def leaf(path, x):
            keep = None if is_hole(x) else of_path.get(place(path))
            return x if keep is None else jnp.where(keep, x, jnp.zeros_like(x))

        name = _COPIES[type(state)]
        copy = getattr(state, name)
        copy = jax.tree_util.tree_map_with_path(leaf, copy, is_leaf=is_hole)
        return state._replace(**{name: copy})

    return _map_copies(masked, opt_state)


def _of_each_leaf(masks: Any, params: Any) -> Any:
    """A mask or None for each leaf; a None may stand for a whole branch."""
    return jax.tree.map(
        lambda keep, branch: jax.tree.map(lambda _: keep, branch),
        unpack(masks),
        params,
        is_leaf=lambda leaf: leaf is None,
    )


def _map_copies(function: Callable[[Any], Any], tree: Any) -> Any:
    """The tree with function(state) for each state that keeps a copy."""

    def is_copy(node):
        return isinstance(node, tuple(_COPIES))

    def visit(node):
        if not is_copy(node):
            return node
        # One may be within another.
        inside = (_map_copies(function, field) for field in node)
        return function(type(node)(*inside))

    return jax.tree.map(visit, tree, is_leaf=is_copy)
