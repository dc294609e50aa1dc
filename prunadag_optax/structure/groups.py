"""Groups of axes that must shrink together: found by tracing a model, or declared."""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from prunadag_optax._common import tables
from prunadag_optax._common.opt_states import place
from prunadag_optax.structure import program
from prunadag_optax.structure.labels import FROZEN, Reason
from prunadag_optax.structure.rules import Axis, Tracer


@dataclasses.dataclass(frozen=True, eq=False)
class Member:
    """The positions of a group's units along one axis of one leaf.

    Attributes:
      path: the leaf's path, its keys joined by "/".
      axis: the axis.
      positions: int[size of the group, positions a unit] along the axis.
      reads: whether the axis is one that a product sums over, as the first axis of a
        dense kernel: the leaf reads the units there, elsewhere it makes them.
    """

    path: str
    axis: int
    positions: np.ndarray
    reads: bool = False

    @property
    def width(self) -> int:
        """Positions a unit."""
        return self.positions.shape[1]

    def __repr__(self) -> str:
        return f"Member({self.path!r}, axis={self.axis}, width={self.width})"


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Units that can be removed, each from all of its members.

    Attributes:
      name: from the path of the leaf that makes the units.
      size: the number of units.
      members: where the units are.
      flags: "positional" if constants, random numbers or positions run along the units,
        which can then be removed but not permuted; "mixed" if a reduction runs over
        them, as in LayerNorm or softmax, so that removing one changes a statistic of
        the others.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    flags: tuple[str, ...] = ()
    atoms: np.ndarray | None = dataclasses.field(default=None, repr=False)


@dataclasses.dataclass(frozen=True, eq=False)
class Frozen:
    """Positions along an axis that must stay.

    Attributes:
      path, axis: the axis.
      count: how many of its positions.
      size: all of its positions.
      reason: why, in one sentence.
    """

    path: str
    axis: int
    count: int
    size: int
    reason: str


@dataclasses.dataclass(frozen=True, eq=False)
class Structure:
    """What can be removed from a model, and what cannot and why. Prints as tables.

    Attributes:
      groups: the groups of units.
      frozen: the axes of more than one position that are kept in part or as a whole.
      unknown: the primitives that could not be followed -> a line that uses each.
      shapes: leaf's path -> its shape and dtype.
    """

    groups: tuple[Group, ...]
    frozen: tuple[Frozen, ...]
    unknown: Mapping[str, str]
    shapes: Mapping[str, jax.ShapeDtypeStruct]
    traced: "Traced | None" = dataclasses.field(default=None, repr=False)

    def __getitem__(self, name: str) -> Group:
        """The group of a name."""
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(unknown_group(self, name))

    def explain(self, path: str, axis: int) -> str:
        """What an axis belongs to, or why it is frozen.

        Args:
          path: the leaf's path, as in `shapes`.
          axis: the axis.

        Returns:
          A few sentences.

        Raises:
          ValueError: if there is no such axis.
        """
        size = self.shapes[checked_path(self, path)].shape
        if not isinstance(axis, int) or not -len(size) <= axis < len(size):
            raise ValueError(
                f"axis must be one of the {len(size)} of {path!r}; got {axis!r}."
            )
        axis %= len(size)
        if size[axis] == 1:
            return f"{path}, axis {axis}, has a single position, which must stay."
        said = [
            f"{path}, axis {axis}: {group.size} units of {member.width} in the group "
            f"{group.name!r}."
            for group in self.groups
            for member in group.members
            if (member.path, member.axis) == (path, axis)
        ]
        said += [
            f"{path}, axis {axis}: {entry.count} of {entry.size} positions are frozen. "
            f"{entry.reason}"
            for entry in self.frozen
            if (entry.path, entry.axis) == (path, axis)
        ]
        return " ".join(said) or f"{path}, axis {axis}, is not in this structure."

    def __str__(self) -> str:
        groups = {
            "group": [group.name for group in self.groups],
            "units": [group.size for group in self.groups],
            "flags": [" ".join(group.flags) for group in self.groups],
            "members": [shown_members(group) for group in self.groups],
        }
        frozen = {
            "frozen": [f"{entry.path}:{entry.axis}" for entry in self.frozen],
            "positions": [f"{entry.count} of {entry.size}" for entry in self.frozen],
            "reason": [entry.reason for entry in self.frozen],
        }
        lines = [
            f"The primitive {name!r} ({line}) cannot be followed; the axes that go "
            "through it are frozen."
            for name, line in self.unknown.items()
        ]
        shown = [tables.to_text(groups) if self.groups else "There are no groups."]
        shown += [tables.to_text(frozen)] if self.frozen else []
        return "\n\n".join(shown + lines)


@dataclasses.dataclass(frozen=True, eq=False)
class Traced:
    """What a traced structure keeps to run at other sizes.

    Attributes:
      apply, state: as given to `trace`.
      inputs: the shapes of the inputs.
      freeze: as given to `trace`.
      tracer, program: the axes of all values, and the equations.
      output: the output's pytree of shapes.
    """

    apply: Callable[..., Any]
    state: Callable[..., Any] | None
    inputs: tuple[Any, ...]
    freeze: tuple[Any, ...]
    variables: Any
    tracer: Tracer
    program: program.Program
    output: Any


def trace(
    apply: Callable[..., Any],
    variables: Any,
    *inputs: Any,
    state: Callable[[Any], Mapping[str, Any]] | None = None,
    freeze: Iterable[Any] = (),
) -> Structure:
    """Finds the groups of a model by following its axes through its jaxpr.

    An axis can shrink if every value in which its positions occur can. Positions that
    an equation makes equal form one unit: the output channel of a convolution, the
    scale and statistics of its normalisation and the input channel of the next one.
    The model's inputs and outputs are frozen, and what an equation does that has no
    rule; `Structure.frozen` says why.

    Args:
      apply: (variables, *inputs) -> pytree of arrays. Shapes are enough: nothing is
        computed.
      variables: pytree of arrays or `jax.ShapeDtypeStruct`, what `apply` takes first.
      *inputs: pytrees of arrays or shapes. Groups do not depend on the batch size.
      state: of an `apply` that also returns new values of variables, as BatchNorm does
        in training: output -> {path of the variable: its new value}. Their axes are
        then those of the variables instead of frozen.
      freeze: paths, or pairs (path, axis), that must stay.

    Returns:
      The structure.

    Raises:
      TypeError: if `apply` is not a function.
      ValueError: if a path of `freeze` or `state` is not one of the variables'.

    >>> import jax, jax.numpy as jnp
    >>> from prunadag_optax import structure
    >>> def apply(params, x):
    ...     return jax.nn.relu(x @ params["in"]) @ params["out"]
    >>> params = {"in": jnp.ones((3, 8)), "out": jnp.ones((8, 2))}
    >>> structure.trace(apply, params, jnp.ones((1, 3))).groups
    (Group(name='in', size=8, members=(Member('in', axis=1, width=1), \
Member('out', axis=0, width=1)), flags=()),)
    """
    if not callable(apply):
        raise TypeError(
            "apply must be a function (variables, *inputs) -> output, such as a linen "
            f"module's `module.apply`; got a {type(apply).__name__}."
        )
    variables, inputs = jax.tree.map(_struct, (variables, inputs))
    freeze = freeze if isinstance(freeze, str) else tuple(freeze)
    values, flat, output = program.trace(apply, variables, *inputs)
    tracer = Tracer(values)
    paths = paths_of(variables)
    structs = dict(zip(paths, jax.tree.leaves(variables), strict=True))
    for index, number in enumerate(flat.inputs):
        shape = values.shape(number)
        if index < len(paths):
            tracer.axes[number] = tracer.fresh(shape, index)
        else:
            tracer.axes[number] = tracer.frozen(
                shape, "is an axis of the model's input"
            )
    of_path = dict(zip(paths, flat.inputs, strict=False))
    _freeze_given(tracer, of_path, structs, freeze)
    outputs = tracer.run(flat)
    _end(tracer, outputs, output, of_path, structs, state)
    traced = Traced(
        apply, state, inputs, tuple(freeze), variables, tracer, flat, output
    )
    axes = [
        (path, index, axis)
        for path, number in of_path.items()
        for index, axis in enumerate(tracer.axes[number])
    ]
    _freeze_unread(tracer, axes)
    groups, alone = _groups(tracer, axes)
    return Structure(
        groups,
        _frozen(tracer, axes, alone),
        {name: program.where(source) for name, source in tracer.unknown.items()},
        structs,
        traced,
    )


def declare(
    groups: Mapping[str, Mapping[Any, int]],
    variables: Any,
    *,
    reads: Iterable[Any] = (),
) -> Structure:
    """The groups that a person writes down, for a model that cannot be traced.

    Every position along a member's axis is one unit, in the same order in all members.
    Nothing is checked but the sizes.

    Args:
      groups: name -> {path: axis}, a path as "params/Dense_0/kernel" or as a tuple of
        keys ("params", "Dense_0", "kernel").
      variables: pytree of arrays or shapes.
      reads: the paths of leaves that read the units instead of making them.

    Returns:
      The structure. All other axes are frozen.

    Raises:
      ValueError: if a path or an axis does not exist, sizes within a group differ, or
        an axis is in two groups.

    >>> import jax.numpy as jnp
    >>> from prunadag_optax import structure
    >>> params = {"in": jnp.ones((3, 8)), "out": jnp.ones((8, 2))}
    >>> structure.declare({"hidden": {"in": 1, "out": 0}}, params)["hidden"].size
    8
    """
    paths = paths_of(variables)
    structs = dict(zip(paths, map(_struct, jax.tree.leaves(variables)), strict=True))
    bare = Structure((), (), {}, structs)
    if not isinstance(groups, Mapping):
        raise TypeError(
            'groups must be a mapping, {"hidden": {"Dense_0/kernel": 1, ...}}; got a '
            f"{type(groups).__name__}."
        )
    reading = {checked_path(bare, path, "reads") for path in reads}
    taken: dict[tuple[str, int], str] = {}
    made = []
    for name, axes in groups.items():
        members = []
        if not isinstance(axes, Mapping) or not axes:
            raise ValueError(
                f"groups[{name!r}] must map the path of each member to its axis, "
                f'{{"Dense_0/kernel": 1, ...}}; got {axes!r}.'
            )
        for given, axis in axes.items():
            path = checked_path(bare, given, f"groups[{name!r}]")
            rank = len(structs[path].shape)
            is_axis = isinstance(axis, int) and not isinstance(axis, bool)
            if not is_axis or not -rank <= axis < rank:
                raise ValueError(
                    f"groups[{name!r}][{path!r}] must be one of the leaf's {rank} "
                    f"axes; got {axis!r}."
                )
            axis %= rank
            if (path, axis) in taken:
                raise ValueError(
                    f"groups: axis {axis} of {path!r} is in {taken[path, axis]!r} and "
                    f"in {name!r}; an axis can be declared once."
                )
            taken[path, axis] = name
            positions = np.arange(structs[path].shape[axis])[:, None]
            members.append(Member(path, axis, positions, path in reading))
        sizes = {f"{m.path}:{m.axis}": len(m.positions) for m in members}
        if len(set(sizes.values())) != 1:
            raise ValueError(
                f"groups[{name!r}]: all members must have one size, the number of "
                f"units; got {sizes}."
            )
        made.append(Group(name, len(members[0].positions), tuple(members)))
    frozen = tuple(
        Frozen(path, axis, size, size, "It is in no declared group.")
        for path, struct in structs.items()
        for axis, size in enumerate(struct.shape)
        if size > 1 and (path, axis) not in taken
    )
    return Structure(tuple(made), frozen, {}, structs)


def paths_of(tree: Any) -> list[str]:
    """The paths of a tree's leaves, their keys joined by "/"."""
    return [
        _joined(place(path)) for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]


def checked_structure(structure: Any) -> None:
    """Raises a TypeError unless the argument `structure` is one."""
    if not isinstance(structure, Structure):
        raise TypeError(
            f"structure must be a Structure; got a {type(structure).__name__}. "
            "structure.trace(apply, variables, *inputs) makes one."
        )


def checked_path(structure: Structure, path: Any, name: str = "path") -> str:
    """A path of a structure.

    Raises:
      ValueError: with the argument's name and some of the paths if there is no such
        leaf.
    """
    path = _joined(path) if isinstance(path, tuple) else path
    # As JAX writes the path of an nnx.Variable.
    unboxed = str(path).removesuffix("/value")
    if path not in structure.shapes and unboxed in structure.shapes:
        return unboxed
    if path not in structure.shapes:
        some = ", ".join(map(repr, list(structure.shapes)[:3]))
        raise ValueError(
            f"{name}: there is no leaf {path!r}; the first paths are {some}."
        )
    return path


def unknown_group(structure: Structure, name: Any) -> str:
    """The message for a group that does not exist."""
    names = [group.name for group in structure.groups]
    shown = ", ".join(map(repr, names[:6])) + (", ..." if len(names) > 6 else "")
    return f"There is no group {name!r}; the {len(names)} groups are {shown}."


def shown_members(group: Group) -> str:
    """A group's members in a line, at most four."""
    shown = [
        f"{member.path}:{member.axis}"
        + (f" x{member.width}" if member.width > 1 else "")
        for member in group.members[:4]
    ]
    more = len(group.members) - 4
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")


def _joined(path: Any) -> str:
    return path if isinstance(path, str) else "/".join(map(str, path))


def _struct(leaf: Any) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    type_ = jax.typeof(leaf)
    return jax.ShapeDtypeStruct(type_.shape, type_.dtype, weak_type=type_.weak_type)


def _freeze_given(
    tracer: Tracer,
    numbers: Mapping[str, int],
    structs: Mapping[str, Any],
    freeze: Iterable[Any],
) -> None:
    known = Structure((), (), {}, structs)
    if isinstance(freeze, str):
        raise ValueError(
            f"freeze must be a list of paths or of pairs (path, axis), such as "
            f"[{freeze!r}]; got the string {freeze!r}."
        )
    for entry in freeze:
        is_pair = isinstance(entry, tuple) and isinstance(entry[-1], int)
        path = checked_path(known, entry[0] if is_pair else entry, "freeze")
        axes = tracer.axes[numbers[path]]
        if is_pair and not -len(axes) <= entry[1] < len(axes):
            raise ValueError(
                f"freeze: {path!r} has {len(axes)} axes; there is no axis {entry[1]}."
            )
        for axis in [axes[entry[1]]] if is_pair else axes:
            tracer.freeze(axis, "is listed in freeze")


def _end(
    tracer: Tracer,
    outputs: Sequence[list[Axis]],
    output: Any,
    numbers: Mapping[str, int],
    structs: Mapping[str, Any],
    state: Callable[[Any], Mapping[str, Any]] | None,
) -> None:
    """Freezes the outputs; ties those that are new values of variables to them."""
    known = Structure((), (), {}, structs)
    tied = {
        index: checked_path(known, path, "state")
        for index, path in tied_outputs(state, output).items()
    }
    for index, axes in enumerate(outputs):
        if index in tied:
            variable = tracer.axes[numbers[tied[index]]]
            tracer.unify_all(axes, variable, "is a new value of the variable")
        else:
            for axis in axes:
                tracer.freeze(axis, "is an axis of the model's output")


def tied_outputs(
    state: Callable[[Any], Mapping[str, Any]] | None, output: Any
) -> dict[int, str]:
    """Which leaves of an output are new values of variables: number -> path."""
    if state is None:
        return {}
    numbers = list(range(len(jax.tree.leaves(output))))
    marked = jax.tree.unflatten(jax.tree.structure(output), numbers)
    return {number: path for path, number in dict(state(marked)).items()}


def _freeze_unread(tracer: Tracer, axes: Sequence[tuple[str, int, Axis]]) -> None:
    """Freezes positions of variables that nothing is computed from.

    These are rows of a table of positions beyond the length of the traced inputs: other
    inputs may read them.
    """
    is_read = np.zeros(len(tracer.labels), bool)
    for value in tracer.axes.values():
        for axis in value:
            if axis.origin is None and axis.ids is not None:
                is_read[tracer.labels.expand(tracer.resolved(axis))[0]] = True
    for _, _, axis in axes:
        if axis.ids is not None:
            atoms, positions = tracer.labels.expand(tracer.resolved(axis))
            unread = axis.ids[positions[~is_read[atoms]]]
            if unread.size:
                tracer.labels.freeze(unread, Reason("is not read at the traced inputs"))


def _signatures(tracer: Tracer) -> np.ndarray:
    """A key for each atom of where it occurs: uint64[len(labels), 2].

    Atoms with one key occur in the same axes of the same values, as often in each: they
    are the units of one group. The key is a sum of random numbers, one for each axis
    and count, in two independent copies.
    """
    labels = tracer.labels
    random = np.random.default_rng(0)
    known: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for axes in tracer.axes.values():
        for axis in axes:
            if axis.ids is not None:
                tracer.resolved(axis)
    keys = np.zeros((len(labels), 2), np.uint64)
    for axes in tracer.axes.values():
        for axis in axes:
            draw = random.integers(1 << 63, size=2, dtype=np.uint64) * np.uint64(
                2
            ) + np.uint64(1)
            if axis.ids is None or len(axis.ids) == 1:
                continue
            if id(axis) not in known:
                known[id(axis)] = np.unique(
                    labels.expand(axis.ids)[0], return_counts=True
                )
            atoms, counts = known[id(axis)]
            mixed = (
                counts.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
            ) ^ np.uint64(0x5851F)
            keys[atoms] += draw * mixed[:, None]
    return keys


def _groups(
    tracer: Tracer, axes: Sequence[tuple[str, int, Axis]]
) -> tuple[tuple[Group, ...], np.ndarray]:
    """The groups, and the atoms that are alone in theirs."""
    keys = _signatures(tracer)
    parts = []
    for number, (_, _, axis) in enumerate(axes):
        if axis.ids is not None and len(axis.ids) > 1:
            atoms, positions = tracer.labels.expand(tracer.resolved(axis))
            parts.append(np.stack([atoms, np.full_like(atoms, number), positions]))
    if not parts:
        return (), np.zeros(0, int)
    atom, member, position = np.concatenate(parts, axis=1)
    # Units in the order in which they first occur.
    units, first = np.unique(atom, return_index=True)
    _, kind = np.unique(keys[units], axis=0, return_inverse=True)
    kind = kind.reshape(-1)
    rows_of_kind = collections.defaultdict(list)
    for row in np.argsort(first, kind="stable").tolist():
        rows_of_kind[int(kind[row])].append(row)
    alone = np.array(
        [int(units[rows[0]]) for rows in rows_of_kind.values() if len(rows) == 1], int
    )
    rank = np.full(len(tracer.labels), -1)
    group_of = np.full(len(tracer.labels), -1)
    kept = [rows for rows in rows_of_kind.values() if len(rows) > 1]
    for index, rows in enumerate(kept):
        rank[units[rows]] = np.arange(len(rows))
        group_of[units[rows]] = index
    order = np.lexsort((position, rank[atom], member, group_of[atom]))
    order = order[group_of[atom[order]] >= 0]
    made: list[list[Member]] = [[] for _ in kept]
    if order.size:
        where = np.stack([group_of[atom[order]], member[order]])
        starts = np.flatnonzero(np.any(np.diff(where, axis=1, prepend=-1), axis=0))
        for run in np.split(order, starts[1:]):
            index = int(group_of[atom[run[0]]])
            path, axis, label = axes[int(member[run[0]])]
            positions = position[run].reshape(len(kept[index]), -1)
            made[index].append(
                Member(path, axis, positions, label.origin in tracer.consumed)
            )
    ranks = collections.Counter(path for path, _, _ in axes)
    names = _names(made, ranks)
    return (
        tuple(
            Group(
                name,
                len(rows),
                tuple(members),
                tracer.labels.flags(units[rows]),
                units[rows],
            )
            for name, rows, members in zip(names, kept, made, strict=True)
        ),
        alone,
    )


def _names(groups: Sequence[Sequence[Member]], ranks: Mapping[str, int]) -> list[str]:
    """The modules that make the units, with the axis where that is not enough."""
    # A kernel makes the units that its bias and its normalisation only pass on.
    makers = [
        min(members, key=lambda member: (member.reads, ranks[member.path] < 2))
        for members in groups
    ]
    several = {maker.path for maker in makers if "/" in maker.path}
    modules = collections.Counter(_module(path) for path in several)
    names, seen = [], collections.Counter()
    of_leaf = collections.Counter(maker.path for maker in makers)
    for maker in makers:
        name = _module(maker.path)
        if modules[name] > 1 or not name:
            name = _without_collection(maker.path)
        if of_leaf[maker.path] > 1:
            name += f":{maker.axis}"
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return names


def _without_collection(path: str) -> str:
    return path.removeprefix("params/")


def _module(path: str) -> str:
    return _without_collection(path).rpartition("/")[0] or _without_collection(path)


def _frozen(
    tracer: Tracer, axes: Sequence[tuple[str, int, Axis]], alone: np.ndarray
) -> tuple[Frozen, ...]:
    entries = []
    for path, index, axis in axes:
        size = len(axis)
        if size == 1:
            continue
        ids = tracer.resolved(axis)
        fixed = tracer.labels.kind(ids) == FROZEN
        if fixed.any():
            reason = tracer.labels.reason(ids[fixed][0])
            entries.append(
                Frozen(path, index, int(fixed.sum()), size, sentence(reason))
            )
        atoms, positions = tracer.labels.expand(ids)
        lonely = np.unique(positions[np.isin(atoms, alone)])
        if lonely.size:
            text = (
                "Each of these is a group with a single unit, which cannot be removed."
            )
            entries.append(Frozen(path, index, lonely.size, size, text))
    return tuple(entries)


def sentence(reason: Reason) -> str:
    """A reason in words, with the primitive and the user's line."""
    root = reason.root()
    first = _clause(reason)
    if root is reason:
        return f"It {first}."
    return f"It {first}; that is frozen because it {_clause(root)}."


def _clause(reason: Reason) -> str:
    if reason.primitive is None:
        return reason.text
    text = reason.text
    if text.endswith((" with", "from", "together with", "and summed with")):
        text += f" a frozen axis in {reason.primitive!r}"
    elif repr(reason.primitive) not in text:
        text += f" {reason.primitive!r}"
    return f"{text} at {program.where(reason.source)}"
