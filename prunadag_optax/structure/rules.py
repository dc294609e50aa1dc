"""What each primitive says about the axes of its inputs and outputs.

A rule gets the axes of an equation's inputs and returns those of its outputs. What is
not listed freezes all of its axes, and the primitive is named in the result.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from prunadag_optax.structure.labels import ATOM, FROZEN, Ids, Labels, Reason
from prunadag_optax.structure.program import (
    JVP,
    VJP,
    Equation,
    Program,
    Values,
    is_float,
)

# Applied to each element; operands of size 1 are broadcast.
ELEMENTWISE = frozenset([
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan",
    "atan2", "atanh", "bessel_i0e", "bessel_i1e", "cbrt", "ceil", "clamp", "clz",
    "complex", "conj", "convert_element_type", "copy", "copy_p", "cos", "cosh",
    "digamma", "div", "eq", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1",
    "floor", "ge", "gt", "igamma", "igammac", "imag", "integer_pow", "is_finite",
    "le", "lgamma", "log", "log1p", "logistic", "lt", "max", "min", "mul",
    "mul_no_nan", "name", "ne", "neg", "nextafter", "not", "or", "polygamma",
    "population_count", "pow", "pvary", "real", "reduce_precision",
    "regularized_incomplete_beta", "rem", "round", "rsqrt", "select_n",
    "sharding_constraint", "shift_left", "shift_right_arithmetic",
    "shift_right_logical", "sign", "sin", "sinh", "sqrt", "square", "stop_gradient",
    "sub", "tan", "tanh", "xor",
])  # fmt: skip
# New along their axes: what stands at a position depends on its number.
POSITIONAL = frozenset([
    "iota", "random_bits", "random_clone", "random_fold_in", "random_gamma",
    "random_seed", "random_split", "random_unwrap", "random_wrap",
    "rng_bit_generator", "threefry2x32",
])  # fmt: skip
CUMULATIVE = frozenset(["cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"])
REDUCTIONS = frozenset([
    "reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_prod",
    "reduce_sum", "reduce_xor",
])  # fmt: skip
POSITIONAL_FLAG = "positional"
MIXED_FLAG = "mixed"


@dataclasses.dataclass(eq=False)
class Axis:
    """The sets along one axis of a value.

    Attributes:
      ids: int32[n] numbers of sets, None for an axis without a known size, which is
        never pruned.
      origin: (number of the model's variable, its axis) while this is that axis as it
        is; None once it was computed with something else.
    """

    ids: Ids | None
    origin: tuple[int, int] | None = None

    def __len__(self) -> int:
        """The number of positions; 0 if it is not known."""
        return 0 if self.ids is None else len(self.ids)


Axes = list[Axis]
Rule = Callable[["Tracer", Equation, list[Axes]], list[Axes]]


class Tracer:
    """Runs programs over axes instead of arrays.

    Attributes:
      labels: the sets of atoms.
      axes: the axes of each value.
      unknown: the primitives without a rule, each with the source of one equation.
      consumed: the variables' axes over which a product was summed.
      conv_groups: the axis of groups of each convolution, by its output.
    """

    def __init__(self, values: Values) -> None:
        self.values = values
        self.labels = Labels()
        self.axes: dict[int, Axes] = {}
        self.unknown: dict[str, Any] = {}
        self.consumed: set[tuple[int, int]] = set()
        self.conv_groups: dict[int, Axis] = {}
        self._equation: Equation | None = None

    def run(self, program: Program) -> list[Axes]:
        """Applies the rule of each equation; the axes of the program's outputs."""
        outer = self._equation
        for equation in program.equations:
            self._equation = equation
            inputs = [self.of(number) for number in equation.inputs]
            outputs = self._rule(equation.name)(self, equation, inputs)
            for number, axes in zip(equation.outputs, outputs, strict=True):
                self.axes[number] = axes
                for axis in axes:
                    # What is alone on its axis cannot be removed from it.
                    if (
                        len(axis) == 1
                        and self.labels.kind(self.resolved(axis))[0] != FROZEN
                    ):
                        self.freeze(axis, "is taken alone by")
        # An equation with bodies goes on after they ran.
        self._equation = outer
        return [self.of(number) for number in program.outputs]

    def enter(self, program: Program, inputs: Sequence[Axes]) -> list[Axes]:
        """Runs a body on the axes of its inputs."""
        for number, axes in zip(program.inputs, inputs, strict=True):
            self.axes[number] = axes
        return self.run(program)

    def of(self, number: int) -> Axes:
        """The axes of a value; those of a constant are made at its first use."""
        if number not in self.axes:
            self.axes[number] = self.positional(self.values.shape(number))
        return self.axes[number]

    def fresh(self, shape: Sequence[Any], variable: int | None = None) -> Axes:
        """New atoms along each axis of more than one position."""
        return [
            self._axis(size, None if variable is None else (variable, axis))
            for axis, size in enumerate(shape)
        ]

    def positional(self, shape: Sequence[Any]) -> Axes:
        """New atoms that cannot be permuted."""
        axes = self.fresh(shape)
        for axis in axes:
            self.flag(axis, POSITIONAL_FLAG)
        return axes

    def frozen(self, shape: Sequence[Any], text: str) -> Axes:
        """Frozen positions along each axis."""
        reason = self.reason(text)
        return [self.frozen_axis(size, reason) for size in shape]

    def frozen_axis(self, size: Any, reason: Reason) -> Axis:
        """One axis of frozen positions."""
        if not isinstance(size, int):
            return Axis(None)
        return Axis(np.full(size, self.labels.frozen(reason), np.int32))

    def reason(self, text: str) -> Reason:
        """A reason at the equation that is being run."""
        if self._equation is None:
            return Reason(text)
        return Reason(text, self._equation.name, self._equation.source)

    def unify(self, first: Axis, second: Axis, text: str) -> None:
        """Makes two axes survive together."""
        if first is second:
            return
        if first.ids is None or second.ids is None or len(first) != len(second):
            self.freeze(first, text)
            self.freeze(second, text)
            return
        self.labels.unify(first.ids, second.ids, self.reason(text))

    def unify_all(self, first: Axes, second: Axes, text: str) -> None:
        """`unify` for all axes of two values of one shape."""
        for one, other in zip(first, second, strict=True):
            self.unify(one, other, text)

    def freeze(self, axis: Axis, text: str) -> None:
        """Freezes an axis, because of the equation that is being run."""
        if axis.ids is not None:
            self.labels.freeze(axis.ids, self.reason(text))

    def flag(self, axis: Axis, name: str) -> None:
        """Gives all atoms of an axis a flag."""
        if axis.ids is not None:
            self.labels.flag(axis.ids, name)

    def resolved(self, axis: Axis) -> Ids:
        """The sets of an axis as they stand now; for an axis of known size."""
        assert axis.ids is not None
        axis.ids = self.labels.resolve(axis.ids)
        return axis.ids

    def consume(self, *axes: Axis) -> None:
        """Notes which variables' axes are summed over in a product."""
        self.consumed.update(axis.origin for axis in axes if axis.origin is not None)

    def _axis(self, size: Any, origin: tuple[int, int] | None) -> Axis:
        if not isinstance(size, int):
            return Axis(None, origin)
        if size == 1:
            return Axis(np.array([self.labels.one], np.int32), origin)
        return Axis(self.labels.fresh(size), origin)

    def _rule(self, name: str) -> Rule:
        if name in _RULES:
            return _RULES[name]
        if name in ELEMENTWISE:
            return elementwise
        if name in POSITIONAL:
            return new_positions
        if name in REDUCTIONS:
            return reduction
        if name in CUMULATIVE:
            return cumulative
        if name.startswith("reduce_window"):
            return window
        return unknown


def part(axis: Axis, index: Any) -> Axis:
    """The positions of an axis that an index chooses."""
    return Axis(None if axis.ids is None else axis.ids[index])


def bare(axis: Axis) -> Axis:
    """An axis that is no longer that of a variable."""
    return Axis(axis.ids) if axis.origin is not None else axis


def shapes(tracer: Tracer, equation: Equation) -> list[tuple[Any, ...]]:
    """The shapes of an equation's outputs."""
    return [tracer.values.shape(number) for number in equation.outputs]


def unknown(tracer: Tracer, equation: Equation, inputs: list[Axes]) -> list[Axes]:
    """Freezes all axes of a primitive that has no rule."""
    tracer.unknown.setdefault(equation.name, equation.source)
    text = f"goes through the primitive {equation.name!r}, which cannot be followed"
    for axis in itertools.chain(*inputs):
        tracer.freeze(axis, text)
    return [tracer.frozen(shape, text) for shape in shapes(tracer, equation)]


def elementwise(tracer: Tracer, equation: Equation, inputs: list[Axes]) -> list[Axes]:
    """Equal axes survive together; axes of size 1 and scalars are broadcast."""
    arrays = [axes for axes in inputs if axes]
    (shape, *_) = shapes(tracer, equation)
    output: Axes = []
    for index, size in enumerate(shape):
        # A size-1 axis beside a longer one is repeated along it.
        full = [axes[index] for axes in arrays if len(axes[index]) != 1 or size == 1]
        for other in full[1:]:
            tracer.unify(full[0], other, "is combined with")
        output.append(full[0] if len(full) == 1 else bare(full[0]))
    return [output] * len(equation.outputs)


def same_as_inputs(
    tracer: Tracer, equation: Equation, inputs: list[Axes]
) -> list[Axes]:
    """Each output has the axes of its input."""
    del tracer, equation
    return inputs


def bitcast(tracer: Tracer, equation: Equation, inputs: list[Axes]) -> list[Axes]:
    """The same positions, unless the width of a number changes."""
    (shape,) = shapes(tracer, equation)
    if len(shape) == len(inputs[0]):
        return inputs
    return unknown(tracer, equation, inputs)


def new_positions(tracer: Tracer, equation: Equation, inputs: list[Axes]) -> list[Axes]:
    """What depends on the number of a position, as random bits do."""
    for axis in itertools.chain(*inputs):
        tracer.freeze(axis, "is the seed of")
    outputs = []
    for shape in shapes(tracer, equation):
        axes = tracer.fresh(shape)
        changing = (
            [equation.params["dimension"]]
            if equation.name == "iota"
            else range(len(shape))
        )
        for index in changing:
            tracer.flag(axes[index], POSITIONAL_FLAG)
        outputs.append(axes)
    return outputs


def reduction(tracer: Tracer, equation: Equation, inputs: list[Axes]) -> list[Axes]:
    """Drops axes; a group along one of them changes a statistic when it shrinks."""
    dropped = equation.params["axes"]
    for axes in inputs:
        for index in dropped:
            tracer.flag(axes[index], MIXED_FLAG)
    return [
        [bare(axis) for index, axis in enumerate(axes) if index not in dropped]
        for axes in inputs
    ]


def arg_reduction(tracer: Tracer, equation: Equation, inputs: list[Axes]) -> list[Axes]:
    """The axis whose positions are numbered cannot be pruned."""
    for index in equation.params["axes"]:
        tracer.freeze(inputs[0][index], "has its positions numbered by")
    return reduction(tracer, equation, inputs)


def cumulative(tracer: Tracer, equation: Equation, inputs: list[Axes]) -> list[Axes]:
    """Running sums depend on the order of positions."""
    for axes in inputs:
        tracer.freeze(axes[equation.params["axis"]], "is summed in order by")
    return inputs


def sort(tracer: Tracer, equation: Equation, inputs: list[Axes]) -> list[Axes]:
    """The sorted axis is frozen, the others are those of all operands."""
    for axes in inputs:
        tracer.freeze(axes[equation.params["dimension"]], "is sorted by")
        tracer.unify_all(inputs[0], axes, "is sorted together with")
    return inputs


def top_k(tracer: Tracer, equation: Equation, inputs: list[Axes]) -> list[Axes]:
    """The axis that is chosen from is frozen."""
    params = equation.params
    last = len(inputs[0]) - 1
    axis = params.get("axis", params.get("reduction_dimension", last))
    tracer.freeze(inputs[0][axis], "is chosen from by")
    outputs = []
    for shape in shapes(tracer, equation):
        axes = list(inputs[0])
        axes[axis] = tracer.frozen_axis(shape[axis], tracer.reason("is chosen by"))
        outputs.append(axes)
    return outputs


def fft(tracer: Tracer, equation: Equation, inputs: list[Axes]) -> list[Axes]:
    """The transformed axes are frozen."""
    (shape,) = shapes(tracer, equation)
    kept = len(shape) - len(equation.params["fft_lengths"])
    for axis in inputs[0][kept:]:
        tracer.freeze(axis, "is transformed by")
    text = "is transformed by"
    return [[*inputs[0][:kept], *tracer.frozen(shape[kept:], text)]]


def window(tracer: Tracer, equation: Equation, inputs: list[Axes]) -> list[Axes]:
    """Axes with windows of one position are carried, the others frozen."""
    params = equation.params
    outputs = []
    for axes, shape in zip(inputs, shapes(tracer, equation), strict=False):
        output = []
        for index, size in enumerate(params["window_dimensions"]):
            if size == 1 and len(axes[index]) == shape[index]:
                output.append(axes[index])
                continue
            tracer.freeze(axes[index], "has windows over it in")
            reason = tracer.reason("comes from windows in")
            output.append(tracer.frozen_axis(shape[index], reason))
        outputs.append(output)
    return outputs


def broadcast(tracer: Tracer, equation: Equation, inputs: list[Axes]) -> list[Axes]:
    """Carries axes; new positions are free and follow what they are combined with."""
    (shape,) = shapes(tracer, equation)
    output = tracer.fresh(shape)
    for axis, index in zip(
        inputs[0], equation.params["broadcast_dimensions"], strict=True
    ):
        if len(axis) == len(output[index]):
            output[index] = axis
    return [output]


def transpose(tracer: Tracer, equation: Equation, inputs: list[Axes]) -> list[Axes]:
    """Carries axes."""
    del tracer
    return [[inputs[0][index] for index in equation.params["permutation"]]]


def squeeze(tracer: Tracer, equation: Equation, inputs: list[Axes]) -> list[Axes]:
    """Drops axes of size 1."""
    del tracer
    dropped = equation.params["dimensions"]
    return [[axis for index, axis in enumerate(inputs[0]) if index not in dropped]]


def reverse(tracer: Tracer, equation: Equation, inputs: list[Axes]) -> list[Axes]:
    """Positions in the reversed order."""
    del tracer
    turned = equation.params["dimensions"]
    return [
        [
            part(axis, slice(None, None, -1)) if index in turned else axis
            for index, axis in enumerate(inputs[0])
        ]
    ]


def concatenate(tracer: Tracer, equation: Equation, inputs: list[Axes]) -> list[Axes]:
    """Positions side by side."""
    along = equation.params["dimension"]
    first, *others = inputs
    for other in others:
        for index, axis in enumerate(other):
            if index != along:
                tracer.unify(first[index], axis, "is concatenated with")
    output = [bare(axis) for axis in first]
    pieces = [axes[along].ids for axes in inputs]
    known = [piece for piece in pieces if piece is not None]
    if len(known) == len(pieces):
        output[along] = Axis(np.concatenate(known))
    else:
        for axes in inputs:
            tracer.freeze(
                axes[along], "is concatenated with an axis without a known size by"
            )
        output[along] = Axis(None)
    return [output]


def slice_(tracer: Tracer, equation: Equation, inputs: list[Axes]) -> list[Axes]:
    """The chosen positions."""
    del tracer
    params = equation.params
    strides = params["strides"] or [1] * len(inputs[0])
    bounds = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    return [
        [
            axis if (start, stride) == (0, 1) and stop == len(axis)
            # An axis of unknown size is only ever taken as a whole or frozen.
            else part(axis, slice(start, stop, stride))
            for axis, (start, stop, stride) in zip(inputs[0], bounds, strict=True)
        ]
    ]  # fmt: skip


def split(tracer: Tracer, equation: Equation, inputs: list[Axes]) -> list[Axes]:
    """Consecutive positions."""
    del tracer
    along, outputs, start = equation.params["axis"], [], 0
    for size in equation.params["sizes"]:
        output = list(inputs[0])
        output[along] = part(output[along], slice(start, start + size))
        outputs.append(output)
        start += size
    return outputs


def pad(tracer: Tracer, equation: Equation, inputs: list[Axes]) -> list[Axes]:
    """New positions at the ends are frozen; anything else freezes the axis."""
    output: Axes = []
    (shape,) = shapes(tracer, equation)
    config = equation.params["padding_config"]
    for axis, (low, high, inner), size in zip(inputs[0], config, shape, strict=True):
        if (low, high, inner) == (0, 0, 0):
            output.append(bare(axis))
            continue
        edge = tracer.labels.frozen(tracer.reason("is padding of"))
        if axis.ids is None or inner or low < 0 or high < 0:
            tracer.freeze(axis, "is cut or spread by")
            output.append(
                tracer.frozen_axis(size, tracer.reason("is cut or spread by"))
            )
            continue
        sides = [np.full(width, edge, np.int32) for width in (low, high)]
        output.append(Axis(np.concatenate([sides[0], axis.ids, sides[1]])))
    return [output]


def dot_general(tracer: Tracer, equation: Equation, inputs: list[Axes]) -> list[Axes]:
    """Summed and batch axes survive together, the rest is carried."""
    (left_sum, right_sum), (left_batch, right_batch) = equation.params[
        "dimension_numbers"
    ]
    left, right = inputs
    for one, other in zip(left_sum, right_sum, strict=True):
        tracer.unify(left[one], right[other], "is multiplied and summed with")
        tracer.consume(left[one], right[other])
    for one, other in zip(left_batch, right_batch, strict=True):
        tracer.unify(left[one], right[other], "is multiplied with")
    used = (set(left_sum) | set(left_batch), set(right_sum) | set(right_batch))
    output = [left[index] for index in left_batch]
    for axes, gone in zip(inputs, used, strict=True):
        output += [axis for index, axis in enumerate(axes) if index not in gone]
    return [[bare(axis) for axis in output]]


def convolution(tracer: Tracer, equation: Equation, inputs: list[Axes]) -> list[Axes]:
    """Features in and out; grouped ones are a product with an atom for each group."""
    params = equation.params
    numbers, count = params["dimension_numbers"], params["feature_group_count"]
    (shape,) = shapes(tracer, equation)
    batch, features, *space = (inputs[0][index] for index in numbers.lhs_spec)
    out, inner, *taps = (inputs[1][index] for index in numbers.rhs_spec)
    for axis in (*space, *taps):
        tracer.freeze(axis, "is a spatial axis of")
    if params["batch_group_count"] > 1:
        for axis in (batch, features, out, inner):
            tracer.freeze(axis, "is grouped by batch in")
    groups = tracer.fresh((count,))[0]
    tracer.conv_groups[equation.outputs[0]] = groups
    tracer.consume(inner)
    if count == 1:
        tracer.unify(features, inner, "is multiplied and summed with")
    else:
        each = tracer.fresh((len(out) // count,))[0]
        tracer.unify(features, merged(tracer, [groups, inner]), "is read in groups by")
        tracer.unify(out, merged(tracer, [groups, each]), "is made in groups by")
    output = tracer.frozen(shape, "is a spatial axis of")
    output[numbers.out_spec[1]] = bare(out)
    if params["batch_group_count"] == 1:
        output[numbers.out_spec[0]] = bare(batch)
    return [output]


def merged(tracer: Tracer, axes: Axes) -> Axis:
    """The axis that several axes make when they are flattened."""
    ids = tracer.resolved(axes[0])
    for axis in axes[1:]:
        ids = _outer(tracer.labels, ids, tracer.resolved(axis))
    return Axis(ids)


def _outer(labels: Labels, first: Ids, second: Ids) -> Ids:
    """Every union of a set of one axis with a set of another, the second one inner."""
    shape = (len(first), len(second))
    a = np.broadcast_to(first[:, None], shape).ravel()
    b = np.broadcast_to(second, shape).ravel()
    output = np.where(labels.kind(a) == FROZEN, b, a)
    both = (labels.kind(a) != FROZEN) & (labels.kind(b) != FROZEN) & (a != b)
    pairs = zip(a[both].tolist(), b[both].tolist(), strict=True)
    output[both] = [labels.join(one, other) for one, other in pairs]
    return output


def reshape(tracer: Tracer, equation: Equation, inputs: list[Axes]) -> list[Axes]:
    """Splits and merges axes as products of sets."""
    (shape,) = shapes(tracer, equation)
    old = tracer.values.shape(equation.inputs[0])
    axes = inputs[0]
    # The primitive may transpose first.
    order = equation.params.get("dimensions") or range(len(old))
    old, axes = [old[index] for index in order], [axes[index] for index in order]
    output: Axes = [tracer.fresh((1,))[0] for _ in shape]
    for before, after in _factors(old, shape):
        before = [index for index in before if old[index] != 1]
        after = [index for index in after if shape[index] != 1]
        if len(before) == len(after) == 1:
            output[after[0]] = axes[before[0]]
        elif any(axes[index].ids is None for index in before):
            for index in before:
                tracer.freeze(
                    axes[index], "is merged with an axis without a known size by"
                )
            for index in after:
                reason = tracer.reason("comes from an axis without a known size in")
                output[index] = tracer.frozen_axis(shape[index], reason)
        elif after:
            flat = merged(tracer, [axes[index] for index in before])
            sizes = [shape[index] for index in after]
            for index, axis in zip(after, _split(tracer, flat, sizes), strict=True):
                output[index] = axis
    return [output]


def _factors(old: Sequence[Any], new: Sequence[Any]) -> list[tuple[range, range]]:
    """The smallest runs of axes of two shapes with one product each."""
    runs, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        start, left, right = (i, j), 1, 1
        while (i, j) == start or left != right:
            grows_left = i < len(old) and (j == len(new) or _fits(left, right))
            if grows_left:
                left, i = left * old[i], i + 1
            else:
                right, j = right * new[j], j + 1
        runs.append((range(start[0], i), range(start[1], j)))
    return runs


def _fits(left: Any, right: Any) -> bool:
    """Whether the old axes have not outgrown the new ones."""
    if isinstance(left, int) and isinstance(right, int):
        return left <= right
    # Of sizes that are symbols only equality and divisibility can be asked.
    return left == right or right % left == 0


def _split(tracer: Tracer, flat: Axis, sizes: Sequence[int]) -> Axes:
    """The axes of which one axis is the product; new atoms if it is not one yet."""
    labels = tracer.labels
    if len(sizes) == 1:
        return [flat]
    ids = tracer.resolved(flat)
    if (labels.kind(ids) != ATOM).any():
        grid = ids.reshape(sizes)
        parts = []
        for index, size in enumerate(sizes):
            rows = np.moveaxis(grid, index, 0).reshape(size, -1)
            parts.append(Axis(np.array([labels.common(row) for row in rows], np.int32)))
        again = tracer.resolved(merged(tracer, parts))
        same = (again == ids) | (
            (labels.kind(again) == FROZEN) & (labels.kind(ids) == FROZEN)
        )
        if same.all():
            return parts
    parts = tracer.fresh(sizes)
    tracer.unify(flat, merged(tracer, parts), "is split by")
    return parts


def gather(tracer: Tracer, equation: Equation, inputs: list[Axes]) -> list[Axes]:
    """Axes that are read whole are carried, those that are indexed frozen."""
    numbers, sizes = (
        equation.params["dimension_numbers"],
        equation.params["slice_sizes"],
    )
    operand, indices = inputs
    batch = tuple(getattr(numbers, "operand_batching_dims", ()))
    partners = tuple(getattr(numbers, "start_indices_batching_dims", ()))
    for one, other in zip(batch, partners, strict=True):
        tracer.unify(operand[one], indices[other], "is read together with")
    old, (shape,) = tracer.values.shape(equation.inputs[0]), shapes(tracer, equation)
    for index, axis in enumerate(operand):
        is_indexed = sizes[index] != old[index] or index in numbers.start_index_map
        if index not in batch and is_indexed:
            tracer.freeze(axis, "is indexed by")
    gone = {*numbers.collapsed_slice_dims, *batch}
    kept = iter(index for index in range(len(operand)) if index not in gone)
    rest = iter(indices[:-1])
    output = []
    for index, size in enumerate(shape):
        if index not in numbers.offset_dims:
            output.append(bare(next(rest)))
            continue
        axis = operand[next(kept)]
        output.append(bare(axis) if len(axis) == size else part(axis, slice(0, size)))
    return [output]


def scatter(tracer: Tracer, equation: Equation, inputs: list[Axes]) -> list[Axes]:
    """Axes that are written whole survive with those of the update."""
    numbers = equation.params["dimension_numbers"]
    operand, indices, updates = inputs
    batch = tuple(getattr(numbers, "operand_batching_dims", ()))
    partners = tuple(getattr(numbers, "scatter_indices_batching_dims", ()))
    for one, other in zip(batch, partners, strict=True):
        tracer.unify(operand[one], indices[other], "is written together with")
    gone = {*numbers.inserted_window_dims, *batch}
    kept = iter(index for index in range(len(operand)) if index not in gone)
    rest = iter(axis for axis in indices[:-1])
    written = set()
    for index, axis in enumerate(updates):
        if index not in numbers.update_window_dims:
            tracer.unify(axis, next(rest), "is written by")
            continue
        target = next(kept)
        if len(axis) == len(operand[target]):
            tracer.unify(axis, operand[target], "is written by")
            written.add(target)
        else:
            tracer.freeze(axis, "is written in part by")
    for index, axis in enumerate(operand):
        if index not in written and index not in batch:
            tracer.freeze(axis, "is indexed by")
    return [[bare(axis) for axis in operand]]


def dynamic_slice(tracer: Tracer, equation: Equation, inputs: list[Axes]) -> list[Axes]:
    """An axis that is cut at a computed place is frozen."""
    (shape,) = shapes(tracer, equation)
    output = []
    for axis, size in zip(inputs[0], shape, strict=True):
        if len(axis) != size and axis.ids is not None:
            tracer.freeze(axis, "is cut at a computed place by")
            axis = part(axis, slice(0, size))
        output.append(axis)
    return [output]


def dynamic_update_slice(
    tracer: Tracer, equation: Equation, inputs: list[Axes]
) -> list[Axes]:
    """An axis that is written at a computed place is frozen."""
    del equation
    operand, update = inputs[:2]
    for axis, written in zip(operand, update, strict=True):
        if len(axis) == len(written):
            tracer.unify(axis, written, "is written by")
        else:
            tracer.freeze(axis, "is written at a computed place by")
            tracer.freeze(written, "is written at a computed place by")
    return [[bare(axis) for axis in operand]]


def scan(tracer: Tracer, equation: Equation, inputs: list[Axes]) -> list[Axes]:
    """One body for all steps, each with its own units; the stacked axis is frozen."""
    params = equation.params
    start = params["num_consts"]
    stop = start + params["num_carry"]
    stacked = inputs[stop:]
    for axes in stacked:
        tracer.freeze(axes[0], "is stepped through by")
    outputs = tracer.enter(
        equation.bodies[0], inputs[:stop] + [axes[1:] for axes in stacked]
    )
    carried = outputs[: stop - start]
    for before, after in zip(inputs[start:stop], carried, strict=True):
        tracer.unify_all(before, after, "is carried from step to step by")
    reason = tracer.reason("is stepped through by")
    length = tracer.frozen_axis(params["length"], reason)
    return carried + [[length, *axes] for axes in outputs[stop - start :]]


def while_(tracer: Tracer, equation: Equation, inputs: list[Axes]) -> list[Axes]:
    """What is carried keeps its axes."""
    condition, body = equation.bodies
    first, second = equation.params["cond_nconsts"], equation.params["body_nconsts"]
    carried = inputs[first + second :]
    tracer.enter(condition, inputs[:first] + carried)
    outputs = tracer.enter(body, inputs[first:])
    for before, after in zip(carried, outputs, strict=True):
        tracer.unify_all(before, after, "is carried from step to step by")
    return carried


def cond(tracer: Tracer, equation: Equation, inputs: list[Axes]) -> list[Axes]:
    """All branches give the same axes."""
    first, *others = (tracer.enter(body, inputs[1:]) for body in equation.bodies)
    for outputs in others:
        for one, other in zip(first, outputs, strict=True):
            tracer.unify_all(one, other, "comes from the branches of")
    return [[bare(axis) for axis in axes] for axes in first]


def own_jvp(tracer: Tracer, equation: Equation, inputs: list[Axes]) -> list[Axes]:
    """A function and its rule: tangents have the axes of what they belong to."""
    function, rule = equation.bodies
    outputs = tracer.enter(function, inputs)
    tangents = tracer.enter(rule, inputs + _of_floats(tracer, equation, inputs))
    for one, other in zip(outputs, tangents, strict=True):
        tracer.unify_all(one, other, "has a derivative of its own in")
    return outputs


def own_vjp(tracer: Tracer, equation: Equation, inputs: list[Axes]) -> list[Axes]:
    """A function and its rule: cotangents have the axes of what they belong to."""
    function, rule = equation.bodies
    outputs = tracer.enter(function, inputs)
    cotangents = tracer.enter(rule, inputs + outputs)
    floats = _of_floats(tracer, equation, inputs)
    for one, other in zip(floats, cotangents, strict=True):
        tracer.unify_all(one, other, "has a derivative of its own in")
    return outputs


def _of_floats(tracer: Tracer, equation: Equation, inputs: list[Axes]) -> list[Axes]:
    types = [tracer.values.types[number] for number in equation.inputs]
    return [axes for axes, type_ in zip(inputs, types, strict=True) if is_float(type_)]


def silent(tracer: Tracer, equation: Equation, inputs: list[Axes]) -> list[Axes]:
    """What has no outputs that depend on sizes, as printing."""
    del inputs
    return [tracer.fresh(shape) for shape in shapes(tracer, equation)]


_RULES: dict[str, Rule] = {
    "optimization_barrier": same_as_inputs,
    "bitcast_convert_type": bitcast,
    "argmax": arg_reduction,
    "argmin": arg_reduction,
    "sort": sort,
    "top_k": top_k,
    "approx_top_k": top_k,
    "fft": fft,
    "broadcast_in_dim": broadcast,
    "transpose": transpose,
    "squeeze": squeeze,
    "rev": reverse,
    "concatenate": concatenate,
    "slice": slice_,
    "split": split,
    "pad": pad,
    "dot_general": dot_general,
    "conv_general_dilated": convolution,
    "reshape": reshape,
    "gather": gather,
    **dict.fromkeys(
        ("scatter", "scatter_add", "scatter-add", "scatter_sub", "scatter_mul",
         "scatter_min", "scatter_max"),
        scatter,
    ),
    "dynamic_slice": dynamic_slice,
    "dynamic_update_slice": dynamic_update_slice,
    "scan": scan,
    "while": while_,
    "cond": cond,
    JVP: own_jvp,
    VJP: own_vjp,
    "debug_callback": silent,
    "debug_print": silent,
    "dimension_as_value": silent,
}  # fmt: skip
