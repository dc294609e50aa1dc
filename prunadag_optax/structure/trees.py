"""Trees at other sizes: masked, and smaller."""

import base64
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from prunadag_optax._common.opt_states import place
from prunadag_optax.structure.groups import (
    Structure,
    Traced,
    checked_path,
    checked_structure,
    paths_of,
    unknown_group,
)

Keep = Mapping[str, Any]


def checked_keep(structure: Structure, keep: Keep) -> dict[str, np.ndarray]:
    """The choice of units as bool arrays.

    Args:
      structure: whose groups are named.
      keep: group's name -> bool[size].

    Returns:
      The same as NumPy arrays, of groups that lose a unit.

    Raises:
      TypeError, ValueError: if a name, a dtype or a size is wrong, or a group would be
        empty.
    """
    checked_structure(structure)
    if not isinstance(keep, Mapping):
        raise TypeError(
            "keep must be a mapping from a group's name to a bool array, such as "
            f"`structure.select` returns; got a {type(keep).__name__}."
        )
    groups = {group.name: group for group in structure.groups}
    checked = {}
    for name, given in keep.items():
        if name not in groups:
            raise ValueError(f"keep: {unknown_group(structure, name)}")
        if isinstance(given, Tracer):
            raise TypeError(
                f"keep[{name!r}] is traced: sizes must be known, so choose units "
                "outside jit."
            )
        mask, size = np.asarray(given), groups[name].size
        if mask.dtype != bool or mask.shape != (size,):
            raise ValueError(
                f"keep[{name!r}] must be a bool array of shape ({size},), True for a "
                f"unit that stays; got {mask.dtype}{list(mask.shape)}."
            )
        if not mask.any():
            raise ValueError(
                f"keep[{name!r}] removes all {size} units; at least one must stay."
            )
        if not mask.all():
            checked[name] = mask
    return checked


def not_traced(structure: Structure, function: str) -> Traced:
    """What a traced structure knows.

    Raises:
      ValueError: if it was declared.
    """
    checked_structure(structure)
    if structure.traced is None:
        raise ValueError(
            f"structure.{function} needs the model's program, and this structure was "
            "declared. Use `structure.trace(apply, variables, *inputs)`."
        )
    return structure.traced


def removed_atoms(structure: Structure, keep: Mapping[str, np.ndarray]) -> np.ndarray:
    """The atoms of a traced structure's units that leave.

    Args:
      structure: of `trace`.
      keep: of `checked_keep`.
    """
    removed = [
        group.atoms[~keep[group.name]]
        for group in structure.groups
        if group.name in keep and group.atoms is not None
    ]
    return np.concatenate([np.zeros(0, int), *removed]).astype(int)


def position_masks(
    structure: Structure, keep: Mapping[str, np.ndarray], reading_only: bool = False
) -> dict[str, dict[int, np.ndarray]]:
    """Which positions stay: leaf's path -> axis -> bool[axis].

    Args:
      structure: whose groups are named.
      keep: of `checked_keep`.
      reading_only: only where the units are read.
    """
    masks: dict[str, dict[int, np.ndarray]] = {}
    for group in structure.groups:
        if group.name not in keep:
            continue
        is_read = any(member.reads for member in group.members)
        for member in group.members:
            if reading_only and is_read and not member.reads:
                continue
            axes = masks.setdefault(member.path, {})
            size = structure.shapes[member.path].shape[member.axis]
            mask = axes.setdefault(member.axis, np.ones(size, bool))
            mask[member.positions[~keep[group.name]]] = False
    return masks


def groups_left(
    structure: Structure, keep: Keep, path: str, axis: int, count: int
) -> int:
    """How many of the groups of an axis, as of a grouped convolution, have a unit left.

    Args:
      structure: of `trace` or `declare`.
      keep: group's name -> bool[size].
      path: the leaf's path.
      axis: the axis, in `count` groups of consecutive positions.
      count: the number of groups.
    """
    masks = position_masks(structure, checked_keep(structure, keep)).get(path, {})
    size = structure.shapes[checked_path(structure, path)].shape[axis]
    mask = masks.get(axis, np.ones(size, bool))
    return int(mask.reshape(count, -1).any(axis=1).sum())


def masked(structure: Structure, keep: Keep, tree: Any) -> Any:
    """A tree with zeros where units are removed, in the full shapes.

    Args:
      structure: of `trace` or `declare`.
      keep: group's name -> bool[size].
      tree: pytree as for `shrink`.

    Returns:
      The tree; leaves that lose nothing are the given ones.

    >>> import jax.numpy as jnp
    >>> from prunadag_optax import structure
    >>> params = {"in": jnp.ones((1, 3)), "out": jnp.ones((3, 1))}
    >>> s = structure.declare({"hidden": {"in": 1, "out": 0}}, params)
    >>> structure.masked(s, {"hidden": [True, False, True]}, params)["in"]
    Array([[1., 0., 1.]], dtype=float32)
    """
    return _map(
        structure,
        position_masks(structure, checked_keep(structure, keep)),
        tree,
        zeroed,
    )


def masked_readers(structure: Structure, keep: Keep, tree: Any) -> Any:
    """`masked` where units are read only, for models that divide by what they made."""
    masks = position_masks(structure, checked_keep(structure, keep), reading_only=True)
    return _map(structure, masks, tree, zeroed)


def shrink(
    structure: Structure,
    keep: Keep,
    tree: Any,
    *,
    optimizer: optax.GradientTransformation | None = None,
    params: Any = None,
    reinitialise: bool = False,
) -> Any:
    """A tree without the units that are removed.

    Leaves are matched to the structure's by their paths. The tree may be the variables,
    a part of them such as `variables["params"]`, or anything of the same paths:
    gradients, averages, masks, batch statistics. A leaf keeps its sharding along axes
    that still divide.

    Args:
      structure: of `trace` or `declare`.
      keep: group's name -> bool[size].
      tree: pytree of arrays or `jax.ShapeDtypeStruct`.
      optimizer: the optax optimizer of which `tree` is a state.
      params: the parameters that `optimizer` works on, full or as shapes; only with
        `optimizer`.
      reinitialise: a state with leaves that have sizes of the model but not the shape
        of a parameter (factored moments) is made anew by `optimizer.init` instead of
        being an error.

    Returns:
      The smaller tree.

    Raises:
      ValueError: if no leaf, or more than one path, fits; if shapes are not those of
        the structure; if a state has leaves that cannot be sliced.

    >>> import jax.numpy as jnp
    >>> from prunadag_optax import structure
    >>> params = {"in": jnp.ones((1, 3)), "out": jnp.ones((3, 1))}
    >>> s = structure.declare({"hidden": {"in": 1, "out": 0}}, params)
    >>> structure.shrink(s, {"hidden": [True, False, True]}, params)["in"].shape
    (1, 2)
    """
    masks = position_masks(structure, checked_keep(structure, keep))
    if optimizer is not None:
        return _state(structure, masks, tree, optimizer, params, reinitialise)
    return _map(structure, masks, tree, _sliced)


def _state(
    structure: Structure,
    masks: Mapping[str, dict[int, np.ndarray]],
    state: Any,
    optimizer: optax.GradientTransformation,
    params: Any,
    reinitialise: bool,
) -> Any:
    if params is None:
        raise ValueError(
            "params must be given with optimizer: shrink(s, keep, opt_state, "
            "optimizer=tx, params=params), the parameters that the optimizer works on."
        )
    full = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype), params
    )
    small = _map(structure, masks, full, _sliced)
    expected = jax.eval_shape(optimizer.init, small)
    names: dict[tuple[Any, ...], set[str | None]] = {}
    exact: dict[tuple[Any, ...], set[str | None]] = {}
    for (path, _), name in zip(
        jax.tree_util.tree_leaves_with_path(full), matched(structure, full), strict=True
    ):
        # A part of the parameters may be what a state is like: `LookaheadParams.fast`.
        keys = place(path)
        for start in range(1, len(keys)):
            names.setdefault(keys[start:], set()).add(name)
        exact[keys] = {name}
    names |= exact

    def like_params(tree):
        def cut(path, leaf):
            fitting = names.get(place(path), set())
            name = next(iter(fitting)) if len(fitting) == 1 else None
            is_whole = (
                name is not None and jnp.shape(leaf) == structure.shapes[name].shape
            )
            return _sliced(leaf, masks.get(name or "", {})) if is_whole else leaf

        return jax.tree_util.tree_map_with_path(cut, tree)

    # As a whole, since `optax.masked` leaves branches out.
    sliced = optax.tree.map_params(
        optimizer, like_params, state, is_leaf=lambda node: True
    )
    return _as_expected(
        sliced, expected, optimizer, params, structure, masks, reinitialise
    )


def _as_expected(
    sliced: Any,
    expected: Any,
    optimizer: optax.GradientTransformation,
    params: Any,
    structure: Structure,
    masks: Mapping[str, dict[int, np.ndarray]],
    reinitialise: bool,
) -> Any:
    leaves, treedef = jax.tree_util.tree_flatten_with_path(sliced)
    wanted = jax.tree.leaves(expected)
    wrong = [
        index
        for index, ((_, leaf), want) in enumerate(zip(leaves, wanted, strict=True))
        if jnp.shape(leaf) != want.shape
    ]
    if not wrong:
        return sliced
    if not reinitialise:
        path, leaf = leaves[wrong[0]]
        raise ValueError(
            f"{len(wrong)} leaves of the optimizer's state depend on the model's sizes "
            "but do not have the shape of a parameter, so their units cannot be "
            "removed; the first is "
            f"{'/'.join(map(str, place(path)))} {list(jnp.shape(leaf))}, which becomes "
            f"{list(wanted[wrong[0]].shape)}. With reinitialise=True the "
            "states that hold them start anew."
        )
    fresh = jax.tree.leaves(optimizer.init(_map(structure, masks, params, _sliced)))
    # With their counters and other factors: a late decay does not fit a new average.
    anew = {_owner(leaves[index][0]) for index in wrong}
    return jax.tree.unflatten(
        treedef,
        [
            fresh[index] if _owner(path) in anew else leaf
            for index, (path, leaf) in enumerate(leaves)
        ],
    )


def _owner(path: tuple[Any, ...]) -> tuple[Any, ...]:
    """The path of the state, a NamedTuple, that holds a leaf."""
    last = max(
        (
            index
            for index, key in enumerate(path)
            if isinstance(key, jax.tree_util.GetAttrKey)
        ),
        default=0,
    )
    return path[:last]


def matched(structure: Structure, tree: Any) -> list[str | None]:
    """The structure's path of each leaf; None for leaves without axes of the model."""
    leaves = jax.tree.leaves(tree)
    paths = paths_of(tree)
    ends: dict[str, list[str]] = {}
    for path in structure.shapes:
        keys = path.split("/")
        for start in range(len(keys)):
            ends.setdefault("/".join(keys[start:]), []).append(path)
    matches: list[str | None] = []
    for path, leaf in zip(paths, leaves, strict=True):
        shape = jnp.shape(leaf)
        fitting = (
            [path]
            if path in structure.shapes
            else _fitting(structure, ends, path, shape)
        )
        if len(fitting) > 1:
            raise ValueError(
                f"The leaf {path!r} could be any of {fitting[:3]}; give the tree with "
                "the structure's own paths, such as the whole variables."
            )
        if not fitting and shape:
            some = ", ".join(map(repr, list(structure.shapes)[:3]))
            raise ValueError(
                f"The leaf {path!r} {list(shape)} is none of the structure's; its "
                f"paths are {some}, ... For the state of an optimizer give optimizer= "
                "and params=."
            )
        if fitting and shape != structure.shapes[fitting[0]].shape:
            raise ValueError(
                f"The leaf {path!r} must have the shape "
                f"{list(structure.shapes[fitting[0]].shape)} that was traced; got "
                f"{list(shape)}."
            )
        matches.append(fitting[0] if fitting else None)
    return matches


def _fitting(
    structure: Structure,
    ends: Mapping[str, list[str]],
    path: str,
    shape: tuple[int, ...],
) -> list[str]:
    """The structure's paths that end as a path does, or that it ends as."""
    if path in ends:
        return ends[path]
    keys = path.split("/")
    for start in range(1, len(keys)):
        end = "/".join(keys[start:])
        if end in ends:
            return [name for name in ends[end] if structure.shapes[name].shape == shape]
    return []


def _map(
    structure: Structure,
    masks: Mapping[str, dict[int, np.ndarray]],
    tree: Any,
    function: Any,
) -> Any:
    matches = matched(structure, tree)
    leaves, treedef = jax.tree.flatten(tree)
    return jax.tree.unflatten(
        treedef,
        [
            leaf if name is None or name not in masks else function(leaf, masks[name])
            for leaf, name in zip(leaves, matches, strict=True)
        ],
    )


def zeroed(leaf: Any, masks: Mapping[int, np.ndarray]) -> Any:
    """A leaf with zeros where masks, one for each of some axes, are False."""
    for axis, mask in masks.items():
        shape = [1] * np.ndim(leaf)
        shape[axis] = -1
        leaf = jnp.where(mask.reshape(shape), leaf, jnp.zeros((), leaf.dtype))
    return leaf


def _sliced(leaf: Any, masks: Mapping[int, np.ndarray]) -> Any:
    shape = tuple(
        int(masks[axis].sum()) if axis in masks else size
        for axis, size in enumerate(leaf.shape)
    )
    sharding = _sharding(leaf, shape)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)
    take = np.take if isinstance(leaf, np.ndarray) else jnp.take

    def cut(leaf):
        for axis, mask in masks.items():
            leaf = take(leaf, np.flatnonzero(mask), axis=axis)
        return leaf

    return cut(leaf) if sharding is None else jax.jit(cut, out_shardings=sharding)(leaf)


def _sharding(leaf: Any, shape: Sequence[int]) -> Any:
    """The leaf's sharding without axes that no longer divide; None on one device."""
    sharding = None if isinstance(leaf, Tracer) else getattr(leaf, "sharding", None)
    if (
        not isinstance(sharding, jax.sharding.NamedSharding)
        or sharding.num_devices == 1
    ):
        return None
    return still_dividing(sharding, shape)


def still_dividing(
    sharding: jax.sharding.NamedSharding, shape: Sequence[int]
) -> jax.sharding.NamedSharding:
    """A sharding without the axes that a smaller shape no longer divides among."""

    def named(*spec):
        partition = jax.sharding.PartitionSpec(*spec)
        return jax.sharding.NamedSharding(sharding.mesh, partition)

    spec = list(sharding.spec)
    for axis, names in enumerate(spec):
        try:
            named(names).shard_shape((shape[axis],))
        except ValueError:
            spec[axis] = None
    return named(*spec)


def checked_shapes(
    structure: Structure, keep: Mapping[str, np.ndarray], tree: Any
) -> None:
    """Raises a ValueError unless a tree has the shapes that are left."""
    masks = position_masks(structure, keep)
    leaves = jax.tree.leaves(tree)
    if len(leaves) != len(structure.shapes):
        raise ValueError(
            f"The small variables must have the {len(structure.shapes)} leaves that "
            "were traced; "
            f"got {len(leaves)}. `structure.shrink(s, keep, variables)` makes them."
        )
    for (path, struct), leaf in zip(structure.shapes.items(), leaves, strict=True):
        small = _sliced(
            jax.ShapeDtypeStruct(struct.shape, struct.dtype), masks.get(path, {})
        )
        if jnp.shape(leaf) != small.shape:
            raise ValueError(
                f"The small variables' {path!r} must have the shape "
                f"{list(small.shape)}; got "
                f"{list(jnp.shape(leaf))}. `structure.shrink(s, keep, variables)` "
                "makes them."
            )


def save_keep(path: str | pathlib.Path, structure: Structure, keep: Keep) -> None:
    """Writes a choice of units to a small JSON file.

    Args:
      path: the file.
      structure: whose groups are named.
      keep: group's name -> bool[size].
    """
    packed = {
        name: {
            "size": mask.size,
            "bits": base64.b64encode(np.packbits(mask).tobytes()).decode(),
        }
        for name, mask in checked_keep(structure, keep).items()
    }
    pathlib.Path(path).write_text(json.dumps({"keep": packed}, indent=1) + "\n")


def load_keep(path: str | pathlib.Path, structure: Structure) -> dict[str, np.ndarray]:
    """Reads a choice of units.

    Args:
      path: the file that `save_keep` wrote.
      structure: of the same model; shapes are enough to trace it.

    Returns:
      Group's name -> bool[size].

    Raises:
      ValueError: if the file is not one of `save_keep`, or of another model.
    """
    checked_structure(structure)
    try:
        read = json.loads(pathlib.Path(path).read_text())["keep"]
        keep = {name: _unpacked(entry) for name, entry in read.items()}
    except (KeyError, TypeError, ValueError, RecursionError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a file of structure.save_keep: {error!r}"
        ) from None
    return checked_keep(structure, keep)


def _unpacked(entry: Any) -> np.ndarray:
    size, bits = int(entry["size"]), base64.b64decode(entry["bits"], validate=True)
    if size < 1 or len(bits) != -(-size // 8):
        raise ValueError(f"{len(bits)} bytes do not hold {size} bits")
    return np.unpackbits(np.frombuffer(bits, np.uint8), count=size).astype(bool)
