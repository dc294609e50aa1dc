"""Which leaves of a tree are meant, and which of them are ranked together."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Where = Callable[[tuple[Any, ...], Any], bool]

# Names that say what a leaf is: something added to, or multiplied with, whole channels.
_NOT_PRUNABLE = re.compile(
    r"b\d*|b_[a-z]+"
    r"|(?i:(.+_)?(bias|biases|scale|scales|offset|gamma|beta|mean|var|variance)(_.+)?)"
)
# In a module so named a `weight` is a scale.
_NORMALISATION = re.compile(r"norm|(^|_)(bn|ln|gn)(\d|_|$)", re.IGNORECASE)
# What stands between a parameter's name and its array in trees of boxes.
_BOXES = ("value", "raw_value")


def _names(path: tuple[Any, ...]) -> list[str]:
    """The names in a key path, without positions in lists and without boxes."""
    names = []
    for key in path:
        for attribute in ("key", "name"):
            name = getattr(key, attribute, None)
            if isinstance(name, str):
                names.append(name)
    if isinstance(path[-1] if path else None, str):  # a path written by hand
        names.append(path[-1])
    return [name for name in names if name not in _BOXES] or names


def prunable(path: tuple[Any, ...], leaf: Any) -> bool:
    """The leaves that are pruned unless `where` says otherwise.

    The name of a leaf decides where it says what the leaf is: a bias, scale, offset,
    gamma, beta, mean or variance is never pruned, however many axes it has (layers
    stacked in one leaf and attention heads give a bias two or three), nor the weight of
    a normalisation. Of all others those with two axes or more are, and a tree that is
    one array.

    Args:
      path: key path of the leaf, as `jax.tree_util.tree_map_with_path` has it.
      leaf: array, or its shape and dtype.

    Returns:
      Whether the leaf is prunable.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from prunadag_optax import masks
      >>> params = {"kernel": jnp.ones((4, 2, 3)), "bias": jnp.ones((2, 3))}
      >>> jax.tree_util.tree_map_with_path(masks.prunable, params)
      {'bias': False, 'kernel': True}
      >>> masks.prunable((), jnp.ones(3))
      True
    """
    dtype = getattr(leaf, "dtype", None) or jnp.result_type(leaf)
    if not jnp.issubdtype(dtype, jnp.floating):
        return False
    if not path:
        return True
    *modules, name = _names(path) or [""]
    if _NOT_PRUNABLE.fullmatch(name):
        return False
    if name in ("weight", "w") and modules and _NORMALISATION.search(modules[-1]):
        return False
    return jnp.ndim(leaf) >= 2


def everything(path: tuple[Any, ...], leaf: Any) -> bool:
    """The `where` that chooses every leaf, biases and scales too.

    Args:
      path: key path of the leaf.
      leaf: array.

    Returns:
      True.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax import masks
      >>> params = {"bias": jnp.array([1.0, -3.0])}
      >>> masks.prune(params, 0.5, where=masks.everything)[0]["bias"].tolist()
      [0.0, -3.0]
    """
    del path, leaf
    return True


def chosen(tree: Any, where: Where | None = None) -> list[bool]:
    """Which leaves of a tree are chosen, in the order of `jax.tree.leaves`.

    Args:
      tree: pytree of arrays.
      where: predicate (path, leaf) -> bool; None is `prunable`.

    Returns:
      A bool for each leaf.
    """
    where = where or prunable
    return [
        bool(where(path, leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def ranked_together(
    tree: Any, where: Where | None = None, scope: str = "global"
) -> list[list[int]]:
    """The chosen leaves by the groups in which they are ranked, as indices.

    Args:
      tree: pytree of arrays.
      where: predicate (path, leaf) -> bool; None is `prunable`.
      scope: "global": one group, "leaf": a group for each leaf.

    Returns:
      Lists of indices into `jax.tree.leaves(tree)`.
    """
    indices = [i for i, member in enumerate(chosen(tree, where)) if member]
    return [indices] if scope == "global" else [[i] for i in indices]
