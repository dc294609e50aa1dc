"""Which leaves of a tree are meant, and which of them are ranked together."""

import dataclasses
import math
import numbers
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from prunadag_optax._common import budgets, checks

Where = Callable[[tuple[Any, ...], Any], bool]
# "global", "leaf", or how many leading axes of a leaf stack layers.
Scope = str | Callable[[tuple[Any, ...], Any], int]

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


def is_box(key: Any) -> bool:
    """Whether a key stands between a parameter's name and its array, as in nnx."""
    return getattr(key, "name", None) in ("value", "raw_value")


def _names(path: tuple[Any, ...]) -> list[str]:
    """The names in a key path, outermost first, without positions in lists.

    A key may hold several: "mlp/~/linear_0" in Haiku, "fc.weight" in files.
    """
    while path and is_box(path[-1]):
        path = path[:-1]
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
    dtype = checks.dtype_of(leaf)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        return False
    if all(is_box(key) for key in path):
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


def named(*names: str) -> Where:
    """The `where` that chooses the leaves of some names, whatever module they are in.

    Args:
      *names: the last name in the path of a leaf, such as "kernel" or "embedding".

    Returns:
      A predicate (path, leaf) -> bool.

    Raises:
      ValueError: without a name, or if one is no string.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax import masks
      >>> params = {"dense": {"kernel": jnp.array([1.0, -3.0]), "bias": jnp.ones(2)}}
      >>> mask = masks.magnitude_mask(params, 0.5, where=masks.named("kernel"))
      >>> mask["dense"]["kernel"].tolist(), mask["dense"]["bias"]
      ([False, True], None)
    """
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(
            "names must be strings, such as masks.named('kernel', 'embedding'); got "
            f"{names!r:.80}."
        )
    return lambda path, leaf: _names(path)[-1] in names


def contracted_axes(paths: Sequence[Any]) -> Callable[[Any, Any], tuple[int, ...]]:
    """What tells which axes of a leaf its layer contracts, by names and shape.

    Args:
      paths: key paths of all leaves of the tree.

    Returns:
      A function (path, leaf) -> axes, which raises a ValueError where it would guess.
    """
    modules = [_names(path)[:-1] for path in paths]
    # What stands beside a query is part of an attention.
    attentions = {tuple(names[:-1]) for names in modules if names[-1:] == ["query"]}

    def axes_of(path: Any, leaf: Any) -> tuple[int, ...]:
        *module, name = _names(path)
        ndim = jnp.ndim(leaf)
        if name.startswith("weight") and ndim > 1:
            return (1,)
        if ndim > 2 and tuple(module[:-1]) in attentions:
            if module[-1] in ("query", "key", "value"):
                return (-3,)
            if module[-1] == "out":
                return (-3, -2)
        if ndim == 3 and not any("conv" in part.lower() for part in module):
            raise ValueError(
                "axis must be given where it would be a guess which axes a layer "
                f"contracts: params{jax.tree_util.keystr(path)} has the shape "
                f"{jnp.shape(leaf)}. Write axis=-2 for layers stacked in one leaf or a "
                "convolution, axis=0 for a projection to heads, or axis=lambda path, "
                "leaf: ... for trees that have both."
            )
        return (-2,) if ndim > 1 else (0,)

    return axes_of


def chosen(tree: Any, where: Where | None = None) -> list[bool]:
    """Which leaves of a tree are chosen, in the order of `jax.tree.leaves`.

    Args:
      tree: pytree of arrays.
      where: predicate (path, leaf) -> bool; None is `prunable`.

    Returns:
      A bool for each leaf.

    Raises:
      ValueError: if the tree is none of parameters, or if it has leaves and none of
        them is chosen.
    """
    where = prunable if where is None else where
    checks.where(where)
    checks.parameters("params", tree)
    paths_leaves = jax.tree_util.tree_leaves_with_path(tree)
    members = [_member(where, path, leaf) for path, leaf in paths_leaves]
    if paths_leaves and not any(members):
        raise ValueError(nothing_chosen(paths_leaves, where))
    return members


def _member(where: Where, path: tuple[Any, ...], leaf: Any) -> bool:
    member: Any = where(path, leaf)
    if isinstance(member, Tracer) or np.size(member) > 1:
        raise ValueError(
            "where must return True or False for a leaf, by its path, shape or dtype; "
            f"got {checks.shown(member)} for params{jax.tree_util.keystr(path)}. To "
            "prune some weights of a leaf give the mask itself."
        )
    return bool(member)


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
    return [group for group, _, _ in parts_of(tree, where, scope).groups]


@dataclasses.dataclass(frozen=True)
class Parts:
    """What is ranked in a tree: chosen leaves, or the layers that are stacked in them.

    Attributes:
      leaves: for each chosen leaf its index among `jax.tree.leaves`, how many leading
        axes stack layers in it, and its shape.
      together: whether all parts are ranked together, or each on its own.
      budget: how many each part keeps.
      names: for each chosen leaf its path, as patterns see it.
    """

    leaves: tuple[tuple[int, int, tuple[int, ...]], ...]
    together: bool
    budget: budgets.LayerBudget = budgets.GLOBAL
    names: tuple[str, ...] = ()

    @property
    def sizes(self) -> list[int]:
        """The number of elements of each part."""
        return [
            math.prod(shape[axes:])
            for _, axes, shape in self.leaves
            for _ in range(math.prod(shape[:axes]))
        ]

    @property
    def groups(self) -> list[tuple[list[int], int, int]]:
        """Leaves ranked together, axes that stack layers, components in a ranking."""
        if self.together:
            size = sum(math.prod(shape) for _, _, shape in self.leaves)
            return [([i for i, _, _ in self.leaves], 0, size)]
        return [([i], axes, math.prod(shape[axes:])) for i, axes, shape in self.leaves]

    def __len__(self) -> int:
        return len(self.sizes)

    def kept(self, total_of: Callable[[int], Any], alive: Any = None) -> list[Any]:
        """How many each part keeps where parts are ranked on their own.

        Args:
          total_of: function n -> how many of n weights are kept.
          alive: how many each part can keep at most; None: all.

        Returns:
          A count for each part.
        """
        sizes, least = self.sizes, self.budget.least
        if self.budget.ranks_together:  # each its own share
            return [max_of(total_of(size), min(least, size)) for size in sizes]
        repeats = [math.prod(shape[:axes]) for _, axes, shape in self.leaves]
        names = [n for n, k in zip(self.names, repeats, strict=True) for _ in range(k)]
        shapes = [
            shape[axes:]
            for (_, axes, shape), k in zip(self.leaves, repeats, strict=True)
            for _ in range(k)
        ]
        total = total_of(sum(sizes))
        return budgets.kept_of_parts(self.budget, names, shapes, total, alive)

    def by_leaf(self, of_part: Sequence[Any]) -> dict[int, Any]:
        """Numbers of the parts by the index of the leaf: one, or one for each layer."""
        found, done = {}, 0
        for i, axes, shape in self.leaves:
            lead = shape[:axes]
            own = of_part[done : done + math.prod(lead)]
            done += math.prod(lead)
            if not axes:
                found[i] = own[0]
            elif own:
                found[i] = jnp.stack([jnp.asarray(x) for x in own]).reshape(lead)
            else:
                found[i] = jnp.zeros(lead, jnp.int32)
        return found

    def split(self, tree: Any) -> list[jax.Array]:
        """The parts of a tree, as arrays."""
        leaves, parts = jax.tree.leaves(tree), []
        for i, axes, shape in self.leaves:
            if axes:
                parts += [*jnp.reshape(leaves[i], (-1, *shape[axes:]))]
            else:
                parts.append(jnp.asarray(leaves[i]))
        return parts

    def compare(
        self, function: Callable[..., jax.Array], tree: Any, of_part: jax.Array
    ) -> Any:
        """The tree of function(leaf, numbers of its parts), True for leaves not chosen.

        Args:
          function: from a chosen leaf, and an array that broadcasts against it, to a
            bool array like the leaf.
          tree: pytree of arrays.
          of_part: a number for each part, shape (parts,).

        Returns:
          Pytree of bool arrays.
        """
        leaves, treedef = jax.tree.flatten(tree)
        masks: list[Any] = [jnp.ones_like(x, bool) for x in leaves]
        done = 0
        for i, axes, shape in self.leaves:
            lead = shape[:axes]
            numbers = of_part[done : done + math.prod(lead)]
            done += math.prod(lead)
            masks[i] = function(
                leaves[i], numbers.reshape(lead + (1,) * (len(shape) - axes))
            )
        return treedef.unflatten(masks)

    def map(self, function: Callable[..., Any], *trees: Any, otherwise: Any) -> Any:
        """The tree of function(leaves) where a leaf is chosen, else of `otherwise`."""
        treedef = jax.tree.structure(otherwise)
        columns = [treedef.flatten_up_to(tree) for tree in trees]
        leaves = treedef.flatten_up_to(otherwise)
        for i, *_ in self.leaves:
            leaves[i] = function(*(column[i] for column in columns))
        return treedef.unflatten(leaves)


def max_of(count: Any, least: int) -> Any:
    """The larger of two counts, a Python int where the first is one."""
    return max(count, least) if isinstance(count, int) else jnp.maximum(count, least)


def nothing_chosen(paths_leaves: Any, where: Any) -> str:
    """The message for a `where` that chooses no leaf of a tree that has leaves."""
    shown = ", ".join(
        f"{jax.tree_util.keystr(path)} {jnp.shape(leaf)}"
        for path, leaf in paths_leaves[:3]
    )
    more = f" and {len(paths_leaves) - 3} more" if len(paths_leaves) > 3 else ""
    what = "masks.prunable, the default where," if where is prunable else "where"
    return (
        f"{what} must choose at least one leaf of params; it chose none of {shown}"
        f"{more}. A path is a tuple of jax's keys, such as DictKey('kernel'): write "
        "where=masks.named('kernel') for the leaves of that name, "
        "where=masks.everything for all leaves."
    )


def parts_of(
    tree: Any,
    where: Where | None = None,
    scope: Scope = "global",
    layer_budget: budgets.Budget = budgets.GLOBAL,
) -> Parts:
    """What is ranked in a tree.

    Args:
      tree: pytree of arrays, or of their shapes and dtypes.
      where: predicate (path, leaf) -> bool; None is `prunable`.
      scope: "global", "leaf", or a function (path, leaf) -> how many leading axes of
        the leaf stack layers, each of which is ranked on its own.
      layer_budget: how what is kept is shared out; with any but "global" each leaf is
        ranked on its own.

    Returns:
      The `Parts`.

    Raises:
      ValueError: if a tree that has leaves has none that is chosen, or if `scope`
        returns no number of axes of its leaf.
    """
    checks.scope(scope)
    budget = budgets.layer_budget(layer_budget)
    members, leaves, names = chosen(tree, where), [], []
    for i, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(tree)):
        if not members[i]:
            continue
        shape, axes = jnp.shape(leaf), scope(path, leaf) if callable(scope) else 0
        whole = isinstance(axes, numbers.Integral) and not isinstance(axes, bool)
        if not (whole and 0 <= axes < max(len(shape), 1)):
            raise ValueError(
                "scope must return how many leading axes stack layers, 0 to "
                f"{max(len(shape) - 1, 0)} for params{jax.tree_util.keystr(path)} of "
                f"shape {shape}; got {axes!r:.80}."
            )
        leaves.append((i, int(axes), shape))
        names.append(budgets.name_of(path))
    together = scope == "global" and budget.ranks_together
    return Parts(tuple(leaves), together, budget, tuple(names))
