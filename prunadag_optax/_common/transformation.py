"""The frame of every optimizer here: what an optax transformation is given, checked."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from prunadag_optax._common import checks
from prunadag_optax._common.dtypes import cast_like


def checked(
    init: Callable[[optax.Params], Any],
    update: Callable[..., tuple[optax.Updates, Any]],
    *,
    like_params: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """An optax transformation that checks its trees before it uses them.

    Args:
      init: function params -> state. Of shapes and dtypes alone the transformation
        makes a state of shapes and dtypes.
      update: function (updates, state, params, **extra_args) -> (updates, state). It
        may return updates in any dtype; they are cast to the parameters'.
      like_params: the name of a field of the state that has the shapes of the
        parameters, so that a state of another tree is told; None: there is none.

    Returns:
      The transformation. Its `init` and `update` raise a ValueError for leaves that are
      not real floats, `update` also for trees that do not match and without `params`.
    """

    def init_fn(params: optax.Params) -> Any:
        checks.parameters("params", params)
        checks.real_leaves("params", params)
        if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(params)):
            return jax.eval_shape(init, params)
        return init(params)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        if params is None:
            raise ValueError(checks.NO_PARAMS_MSG)
        checks.real_leaves("params", params)
        checks.real_leaves("updates", updates)
        checks.same_trees("updates", updates, "params", params)
        try:
            if like_params is not None:
                field = getattr(state, like_params)
                checks.same_shapes(f"state.{like_params}", field, "params", params)
            steps, state = update(updates, state, params, **extra_args)
        except (AttributeError, TypeError, ValueError):
            # Asked only now: to know the kind of the state takes as long as `init`.
            checks.state_of(init, state, params)
            raise
        return cast_like(steps, params), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def find_states(opt_state: optax.OptState, kind: type) -> list[Any]:
    """All states of one kind in an optimizer's state, such as within a chain.

    Args:
      opt_state: the state of any optax transformation.
      kind: the class of the state, a NamedTuple.

    Returns:
      The states, in the order of the tree.
    """
    found = optax.tree.get_all_with_path(opt_state, kind.__name__)
    return [state for _, state in found if isinstance(state, kind)]


def find_state(opt_state: optax.OptState, kind: type) -> Any:
    """The one state of its kind in an optimizer's state, such as within a chain.

    Args:
      opt_state: the state of any optax transformation.
      kind: the class of the state, a NamedTuple.

    Returns:
      The state.

    Raises:
      ValueError: if there is none, or more than one.
    """
    found = find_states(opt_state, kind)
    if len(found) != 1:
        raise ValueError(
            f"state must hold one {kind.__name__}; got {len(found)} in it."
        )
    return found[0]
