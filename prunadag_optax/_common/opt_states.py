"""What an optimizer's state holds for each parameter, chosen weight by weight."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from prunadag_optax._common.leaves import is_box


def is_hole(node: Any) -> bool:
    """Whether a node stands for a leaf that `optax.masked` hides from a state."""
    return isinstance(node, optax.MaskedNode)


def place(path: tuple[Any, ...]) -> tuple[Any, ...]:
    """A key path as plain keys, the same in a model, in its pure dict and in a state.

    Args:
      path: key path of a leaf.

    Returns:
      Its names and indices, without the boxes that an array may be in.
    """
    return tuple(
        getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))
        for key in path
        if not is_box(key)
    )


def by_path(tree: Any) -> dict[tuple[Any, ...], Any]:
    """The leaves of a tree by their places, and what stands for hidden ones.

    Args:
      tree: pytree of arrays, `optax.MaskedNode` where `optax.masked` hides a branch.

    Returns:
      From `place(path)` to the leaf.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_hole)
    return {place(path): leaf for path, leaf in leaves}


def where_like_params(
    tx: optax.GradientTransformation, masks: Any, state: Any, otherwise: Any
) -> Any:
    """The state where the masks are True, another one where they are False.

    This is for the real-float leaves that have the tree and the shapes of the
    parameters, such as moments. All others are those of `state`: counters, masks, and
    what a factored or a matrix-valued optimizer keeps.

    Args:
      tx: the transformation whose states they are.
      masks: pytree like the parameters of bool arrays, None for a leaf that stays.
      state: a state of `tx`.
      otherwise: another state of `tx`.

    Returns:
      A state of `tx`.
    """
    of_path = by_path(masks)

    def mark(tree):
        # What stands for a parameter may be a tree, and then has other paths: SM3 has
        # a list of vectors.
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: _mark(leaf, of_path.get(place(path))),
            tree,
            is_leaf=is_hole,
        )

    marks = optax.tree.map_params(
        tx,
        mark,
        state,
        transform_non_params=lambda leaf: None,
        # The trees of the parameters as they are, not leaf by leaf.
        is_leaf=lambda tree: True,
    )
    return jax.tree.map(
        lambda mask, x, y: x if mask is None else jnp.where(mask, x, y),
        marks,
        state,
        otherwise,
        is_leaf=lambda leaf: leaf is None,
    )


def _mark(leaf: Any, mask: Any) -> Any:
    """The mask if the leaf is like its parameter, else None."""
    alike = (
        mask is not None
        and not is_hole(leaf)
        and jnp.shape(leaf) == jnp.shape(mask)
        and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    )
    return mask if alike else None
