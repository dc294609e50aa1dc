"""Which leaves of a tree are meant, and which of them are ranked together."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Where = Callable[[tuple[Any, ...], Any], bool]

# Names that say what a leaf is: something added to, or multiplied with, whole channels,
# such as bias, b, b1, b_out, bias_hh, logit_scale, gamma; and running statistics.
_NOT_PRUNABLE = re.compile(
    r"b\d*|b_\w+"
    r"|(?i:(.+_)?(bias|biases|scale|scales|offset|gamma|beta)(_.+)?)"
    r"|(?i:((running|moving|batch|ema)_)?(mean|var|variance|average)(_ema)?)"
)
# In a module so named a weight is a scale.
_NORMALISATION = re.compile(r"norm|(^|_)(bn|ln|gn)(\d|_|$)", re.IGNORECASE)
_SCALES = ("weight", "w", "g")


def _is_box(key: Any) -> bool:
    """Whether a key stands between a parameter's name and its array, as in nnx."""
    return getattr(key, "name", None) in ("value", "raw_value")


def _names(path: tuple[Any, ...]) -> list[str]:
    """The names in a key path, outermost first, without positions in lists.

    A key may hold several: "mlp/~/linear_0" in Haiku, "fc.weight" in files.
    """
    keys = [getattr(key, "key", getattr(key, "name", key)) for key in path]
    return re.split(r"[/.]", "/".join(key for key in keys if isinstance(key, str)))


def prunable(path: tuple[Any, ...], leaf: Any) -> bool:
    """The leaves that are pruned unless `where` says otherwise.

    The name of a leaf decides where it says what the leaf is: a bias, scale, offset,
    gamma or beta and a running mean or variance are never pruned, however many axes
    they have (layers stacked in one leaf and attention heads give a bias two or three),
    nor is the weight of a normalisation. All others are that have two axes or more, and
    a tree that is one array.

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
    while path and _is_box(path[-1]):
        path = path[:-1]
    if not path:
        return True
    *modules, name = _names(path)
    if _NOT_PRUNABLE.fullmatch(name):
        return False
    if name in _SCALES and modules and _NORMALISATION.search(modules[-1]):
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
