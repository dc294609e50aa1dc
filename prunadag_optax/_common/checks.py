"""Checks of arguments and trees: what was given, where, and what is allowed."""

import inspect
import math
import numbers
import operator
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from prunadag_optax._common.dtypes import FLOAT_DTYPES

NO_PARAMS_MSG = (
    "params must be given to update: tx.update(gradients, state, params). With None "
    "there are no parameters to classify or to prune."
)


def is_number(value: Any) -> bool:
    """Whether `value` is a Python or NumPy real number, bool excluded."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool | np.bool_)


def is_scalar_array(value: Any) -> bool:
    """Whether `value` is a scalar array, as `optax.inject_hyperparams` passes."""
    return isinstance(value, jax.Array | np.ndarray) and value.ndim == 0


def scalar(
    name: str,
    value: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> None:
    """Raises a ValueError unless `value` is a finite number in range.

    The value of a scalar array is not looked at: it may be traced.

    Args:
      name: the argument's name, for the message.
      value: what was given.
      least: smallest value, or None.
      above: a value that must be exceeded, or None.
      most: largest value, or None.
      below: a value that must not be reached, or None.

    Raises:
      ValueError: naming the argument, the value and what is allowed.
    """
    if is_scalar_array(value):
        return
    limits: dict[str, tuple[Any, Any]] = {
        ">=": (least, operator.ge),
        ">": (above, operator.gt),
        "<=": (most, operator.le),
        "<": (below, operator.lt),
    }
    limits = {sign: limit for sign, limit in limits.items() if limit[0] is not None}
    if not (
        is_number(value)
        and math.isfinite(value)
        and all(holds(value, limit) for limit, holds in limits.values())
    ):
        allowed = " and ".join(f"{sign} {limit}" for sign, (limit, _) in limits.items())
        raise ValueError(f"{name} must be a finite number {allowed}; got {value!r}.")


def scalar_or_schedule(name: str, value: Any, **limits: Any) -> None:
    """`scalar` for a number; a schedule is taken as it is.

    Args:
      name: the argument's name, for the message.
      value: what was given.
      **limits: as for `scalar`.

    Raises:
      ValueError: naming the argument, the value and what is allowed.
    """
    if callable(value):
        takes(name, value, "count")
    else:
        scalar(name, value, **limits)


def function(name: str, value: Any, *parameters: str) -> None:
    """Raises a ValueError unless `value` is a function that takes these arguments.

    Args:
      name: the argument's name, for the message.
      value: what was given.
      *parameters: what the function is called with, in words.

    Raises:
      ValueError: naming the argument, what was given and what is allowed.
    """
    if not is_function(value):
        raise ValueError(
            f"{name} must be a function ({', '.join(parameters)}) -> ...; got "
            f"{shown(value)}."
        )
    takes(name, value, *parameters)


def takes(name: str, value: Any, *parameters: str) -> None:
    """Raises a ValueError where a function cannot be called with so many arguments.

    Args:
      name: the argument's name, for the message.
      value: a function.
      *parameters: what it is called with, in words.

    Raises:
      ValueError: naming the argument, its signature and what it is called with.
    """
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):  # some of those that are not written in Python
        return
    try:
        signature.bind(*parameters)
    except TypeError as error:
        raise ValueError(
            f"{name} must be a function ({', '.join(parameters)}) -> ...; got one with "
            f"the arguments {str(signature)[:80]}."
        ) from error


def sequence(name: str, value: Any, example: str) -> list[Any]:
    """The entries of a sequence; a ValueError for what is none.

    Args:
      name: the argument's name, for the message.
      value: what was given.
      example: what may be given, for the message.

    Returns:
      The entries.

    Raises:
      ValueError: naming the argument, what was given and the line to write.
    """
    unordered = isinstance(value, str | bytes | Mapping)
    if unordered or not iterable(value):
        raise ValueError(
            f"{name} must be a list of numbers, such as {example}; got {shown(value)}."
        )
    return list(value)


def iterable(value: Any) -> bool:
    """Whether `value` can be gone through; an array without axes cannot."""
    return isinstance(value, Iterable) and not is_scalar_array(value)


def batches(value: Any) -> None:
    """Raises a ValueError unless `value` is an iterable of batches.

    Args:
      value: the argument `batches`.

    Raises:
      ValueError: naming the value and what is allowed.
    """
    if not iterable(value):
        raise ValueError(
            "batches must be an iterable of batches, such as a list or a generator; "
            f"got {shown(value)}."
        )


def key(name: str, value: Any) -> None:
    """Raises a ValueError unless `value` is a key of `jax.random`.

    Args:
      name: the argument's name, for the message.
      value: what was given.

    Raises:
      ValueError: naming the argument, what was given and the line to write.
    """
    dtype = dtype_of(value)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    raw = dtype == np.uint32 and np.ndim(value) == 1
    if not ((typed and np.ndim(value) == 0) or raw):
        raise ValueError(
            f"{name} must be a key of jax.random, such as jax.random.key(0); got "
            f"{shown(value)}."
        )


def integer(name: str, value: Any, *, least: int) -> None:
    """Raises a ValueError unless `value` is a Python or NumPy integer of some size.

    Args:
      name: the argument's name, for the message.
      value: what was given.
      least: smallest value.

    Raises:
      ValueError: naming the argument, the value and what is allowed.
    """
    right = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not (right and int(value) >= least):
        hint = ""
        if is_scalar_array(value):
            hint = f" Under optax.inject_hyperparams name it: static_args=({name!r},)."
        raise ValueError(f"{name} must be an integer >= {least}; got {value!r}.{hint}")


def choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises a ValueError unless `value` is one of `choices`.

    Args:
      name: the argument's name, for the message.
      value: what was given.
      choices: what is allowed.

    Raises:
      ValueError: naming the argument, the value and what is allowed.
    """
    if not isinstance(value, str) or value not in choices:
        allowed = " or ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be {allowed}; got {value!r}.")


def dtype(name: str, value: Any) -> None:
    """Raises a ValueError unless `value` is None or a real floating dtype.

    Args:
      name: the argument's name, for the message.
      value: what was given.

    Raises:
      ValueError: naming the argument, the value and what is allowed.
    """
    if value is None:
        return
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        dtype = None
    if dtype is None or dtype.name not in FLOAT_DTYPES:
        raise ValueError(
            f"{name} must be None or one of {', '.join(FLOAT_DTYPES)}; got {value!r}."
        )


def fraction_or_count(name: str, value: Any) -> None:
    """Raises a ValueError unless `value` is a fraction or a count of components.

    The value of a scalar array is not looked at: it may be traced.

    Args:
      name: the argument's name, for the message.
      value: what was given.

    Raises:
      ValueError: naming the argument, the value and what is allowed.
    """
    if is_scalar_array(value):
        return
    right = is_number(value) and (
        int(value) >= 1 if isinstance(value, numbers.Integral) else 0 < value <= 1
    )
    if not right:
        raise ValueError(
            f"{name} must be a fraction in (0, 1] as a float or a count >= 1 as an "
            f"integer; got {value!r}."
        )


def relevant(value: Any, size: int | None = None, name: str = "relevant") -> None:
    """Raises a ValueError unless `value` is a fraction, a count or a schedule.

    Args:
      value: the argument `relevant` of `prunadag` or `density` of `pruning_aware`.
      size: the number of components that a count may not exceed, where it is known.
      name: the argument's name, for the message.

    Raises:
      ValueError: naming the value and what is allowed.
    """
    allowed = (
        "a fraction in (0, 1] as a float, a count >= 1 as an integer, or a schedule "
        "count -> value of either"
    )
    if callable(value):
        # A schedule that counts but returns floats would be read as fractions above 1.
        first = at_start(name, value)
        if not isinstance(first, Tracer):
            try:
                relevant(first, name=name)
            except ValueError:
                raise ValueError(
                    f"{name} must be {allowed}; the schedule returned {first!r} at "
                    "step 0 (a schedule of counts must return integers)."
                ) from None
        return
    if is_scalar_array(value) and not jnp.issubdtype(value.dtype, jnp.bool_):
        return
    if not is_number(value):
        raise ValueError(f"{name} must be {allowed}; got {value!r}.")
    if isinstance(value, numbers.Integral):
        if int(value) < 1:
            raise ValueError(f"{name} must be {allowed}; got {value!r}.")
        if size and int(value) > size:
            raise ValueError(
                f"{name} must be {allowed}; got the count {value!r}, more than "
                f"the {size} parameters there are."
            )
    elif not 0 < value <= 1:
        raise ValueError(f"{name} must be {allowed}; got {value!r}.")


def at_start(name: str, schedule: Any) -> Any:
    """What a schedule returns at step 0.

    Args:
      name: the argument's name, for the message.
      schedule: function count -> value.

    Returns:
      A Python number, a tracer, or what else the schedule returns.

    Raises:
      ValueError: if it is no function of one argument.
    """
    takes(name, schedule, "count")
    with jax.ensure_compile_time_eval():
        first: Any = schedule(jnp.zeros([], jnp.int32))
    plain = not isinstance(first, Tracer) and dtype_of(first) and not np.ndim(first)
    return np.asarray(first).item() if plain else first


def transformation(name: str, value: Any) -> None:
    """Raises a ValueError unless `value` is an optax transformation.

    Args:
      name: the argument's name, for the message.
      value: what was given.

    Raises:
      ValueError: naming the argument, the value and the line to write.
    """
    if not (callable(getattr(value, "init", None)) and hasattr(value, "update")):
        raise ValueError(
            f"{name} must be an optax transformation, such as optax.adam(1e-3); got "
            f"{value!r:.80}."
        )


def score(value: Any) -> None:
    """Raises a ValueError unless `value` is the name of a score or a function.

    Args:
      value: the argument `score`.

    Raises:
      ValueError: naming the value and what is allowed.
    """
    if not callable(value) and value not in ("magnitude", "lamp"):
        raise ValueError(
            "score must be 'magnitude', 'lamp' or a function params -> tree of scores; "
            f"got {value!r:.80}."
        )
    if callable(value):
        takes("score", value, "params")


def scope(value: Any) -> None:
    """Raises a ValueError unless `value` says what is ranked together.

    Args:
      value: the argument `scope`.

    Raises:
      ValueError: naming the value and what is allowed.
    """
    if not callable(value) and value not in ("global", "leaf"):
        raise ValueError(
            "scope must be 'global', 'leaf' or a function (path, leaf) -> how many "
            f"leading axes stack layers; got {value!r:.80}."
        )
    if callable(value):
        takes("scope", value, "path", "leaf")


def where(value: Any) -> None:
    """Raises a ValueError unless `value` is a predicate.

    Args:
      value: the argument `where`.

    Raises:
      ValueError: naming the value and the line to write.
    """
    # nnx filters may be classes; a predicate is none.
    if not is_function(value) or isinstance(value, type):
        name = value if isinstance(value, str) else "kernel"
        raise ValueError(
            "where must be a function (path, leaf) -> bool, such as "
            f"masks.named({name!r:.40}); got {shown(value)}."
        )
    takes("where", value, "path", "leaf")


def is_function(value: Any) -> bool:
    """Whether `value` is a function, and no module that is a tree and callable."""
    return callable(value) and jax.tree_util.all_leaves([value])


def shown(value: Any) -> str:
    """A value in few words: never a tree of arrays."""
    simple = value is None or isinstance(value, str | numbers.Number)
    return repr(value)[:80] if simple else f"a {type(value).__name__}"


# What is taken for parameters, by package and class, and what to write instead.
_INSTEAD = {
    ("flax.nnx", "Module"): "the nnx module {0}: take nnx.state(model, nnx.Param), or "
    "prune with prunadag_optax.nnx.prune(model, sparsity)",
    ("flax.nnx", "Optimizer"): "the nnx optimizer {0}: take nnx.state(model, "
    "nnx.Param), or prune with prunadag_optax.nnx.prune(model, sparsity)",
    ("flax.linen", "Module"): "the linen module {0}, which holds none: take "
    "model.init(key, inputs)['params']",
    ("flax.training", "TrainState"): "the {0}: take state.params, or prune with "
    "state.prune(sparsity) of a prunadag_optax.linen.PruningTrainState",
    ("optax", "GradientTransformation"): "an optax transformation: take the parameters "
    "that it trains",
    ("optax", "LookaheadParams"): "optax's {0}, which hold every weight twice: take "
    "params.slow, and with what is pruned go on from "
    "optax.LookaheadParams.init_synced(pruned)",
}


def parameters(name: str, tree: Any) -> None:
    """Raises a ValueError for a model, an optimizer or a state in place of parameters.

    Args:
      name: the argument's name, for the message.
      tree: what was given.

    Raises:
      ValueError: naming what was given and the line to write.
    """
    for cls in type(tree).__mro__:
        for (package, kind), instead in _INSTEAD.items():
            if cls.__name__ == kind and f"{cls.__module__}.".startswith(f"{package}."):
                got = instead.format(type(tree).__name__)
                raise ValueError(f"{name} must be a pytree of parameters; got {got}.")
    states = [tree, *tree] if isinstance(tree, tuple) else []
    for state in states:
        kind = type(state).__name__
        if isinstance(state, tuple) and hasattr(state, "_fields") and "State" in kind:
            raise ValueError(
                f"{name} must be a pytree of parameters; got an optimizer's state "
                f"({kind}): take the parameters that it trains."
            )
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = hasattr(leaf, "dtype") and hasattr(leaf, "shape")
        if not (array or isinstance(leaf, numbers.Number)):
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} must be an array; got "
                f"{shown(leaf)}. Keep out of {name} what is no parameter."
            )


def opt_state(value: Any, params: Any) -> None:
    """Raises a ValueError for what is no state of an optimizer.

    Args:
      value: the argument `opt_state`, or an `nnx.Optimizer`.
      params: the parameters beside it.

    Raises:
      ValueError: naming what was given and the line to write.
    """
    got = None
    if callable(getattr(value, "init", None)) and hasattr(value, "update"):
        got = "the optimizer itself"
    elif isinstance(value, str | numbers.Number) or is_function(value):
        got = shown(value)
    else:
        own, others = jax.tree.leaves(value), jax.tree.leaves(params)
        same = len(own) == len(others) and all(map(operator.is_, own, others))
        got = "the parameters" if own and same else None
    if got is not None:
        raise ValueError(
            f"opt_state must be an optimizer's state; got {got}. Take opt_state = "
            "tx.init(params), or as it is after tx.update."
        )


def state_of(init: Any, state: Any, params: Any) -> None:
    """Raises a ValueError unless a state is of the kind that `init` makes.

    Args:
      init: function params -> state.
      state: what was given for the state.
      params: pytree of arrays.

    Raises:
      ValueError: naming both kinds.
    """
    expected = type(jax.eval_shape(init, params)).__name__
    if type(state).__name__ != expected:
        raise ValueError(
            f"state must be that of this optimizer, a {expected}; got {shown(state)}. "
            "Write state = tx.init(params), then updates, state = tx.update(gradients, "
            "state, params)."
        )


def dtype_of(leaf: Any) -> Any:
    """The dtype of an array, a number or a shape with a dtype; None for what is none.

    Args:
      leaf: a leaf of a tree.

    Returns:
      The dtype or None.
    """
    dtype = getattr(leaf, "dtype", None)
    if dtype is not None and hasattr(leaf, "shape"):
        return dtype
    return jnp.result_type(leaf) if isinstance(leaf, numbers.Number) else None


def real_leaf(name: str, path: tuple[Any, ...], leaf: Any) -> None:
    """Raises a ValueError if a leaf is complex, integer or boolean.

    Args:
      name: the argument's name, for the message.
      path: the leaf's key path.
      leaf: an array, or its shape and dtype.

    Raises:
      ValueError: naming the leaf, its dtype and what is allowed.
    """
    dtype = dtype_of(leaf)
    if dtype is None:
        raise ValueError(
            f"{name}{jax.tree_util.keystr(path)} must be an array; got {shown(leaf)}. "
            "Keep out of the optimizer and of pruning what is no parameter."
        )
    if dtype.name not in FLOAT_DTYPES:
        raise ValueError(
            f"{name}{jax.tree_util.keystr(path)} has dtype {dtype}; allowed are real "
            f"floating-point leaves ({', '.join(FLOAT_DTYPES)}). Keep other leaves "
            "out of the optimizer with optax.masked or optax.partition, out of "
            "pruning with `where`."
        )


def real_leaves(name: str, tree: optax.Params) -> None:
    """`real_leaf` for every leaf of a tree.

    Args:
      name: the argument's name, for the message.
      tree: pytree of arrays.

    Raises:
      ValueError: naming the leaf, its dtype and what is allowed.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        real_leaf(name, path, leaf)


def same_trees(name: str, tree: Any, other_name: str, other: Any) -> None:
    """Raises a ValueError unless two trees agree in structure and in shapes.

    Args:
      name: name of the first argument, for the message.
      tree: its pytree of arrays.
      other_name: name of the second argument.
      other: its pytree of arrays.

    Raises:
      ValueError: naming both arguments and the first place where they differ.
    """
    if jax.tree.structure(tree) != jax.tree.structure(other):
        raise ValueError(
            f"{name} and {other_name} must have the same tree structure; got "
            f"{_difference(name, tree, other_name, other)}."
        )
    same_shapes(name, tree, other_name, other)


def _difference(name: str, tree: Any, other_name: str, other: Any, **is_leaf) -> str:
    """Where two trees differ, in one line."""
    paths = [
        [
            jax.tree_util.keystr(path) or "one array"
            for path, _ in jax.tree_util.tree_leaves_with_path(x, **is_leaf)
        ]
        for x in (tree, other)
    ]
    only = []
    for owner, own, others in ((name, *paths), (other_name, *paths[::-1])):
        extra = [path for path in own if path not in others]
        if extra:
            more = f" and {len(extra) - 3} more" if len(extra) > 3 else ""
            only.append(f"{', '.join(extra[:3])}{more} in {owner} only")
    kinds = f"{type(tree).__name__} and {type(other).__name__}"
    return "; ".join(only) or f"the same leaves in other containers ({kinds})"


def _is_none(leaf: Any) -> bool:
    return leaf is None


def same_shapes(name: str, tree: Any, other_name: str, other: Any) -> None:
    """Raises a ValueError where the leaves of two trees differ in shape.

    Args:
      name: name of the first argument, for the message.
      tree: its pytree of arrays.
      other_name: name of the second argument.
      other: its pytree of arrays, with as many leaves.

    Raises:
      ValueError: naming both arguments and the first place where they differ.
    """
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(other), strict=True
    )
    for (path, leaf), other_leaf in pairs:
        if jnp.shape(leaf) != jnp.shape(other_leaf):
            where = jax.tree_util.keystr(path)
            raise ValueError(
                f"{name}{where} and {other_name}{where} must have the same "
                f"shape; got {jnp.shape(leaf)} and {jnp.shape(other_leaf)}."
            )


def mask(mask: Any, params: optax.Params) -> None:
    """Raises a ValueError unless `mask` fits `params`.

    Args:
      mask: pytree of bool arrays and Nones.
      params: pytree of arrays.

    Raises:
      ValueError: naming the first leaf that is missing, of another shape, or not bool.
    """
    treedef = jax.tree.structure(mask, is_leaf=_is_none)
    paths = jax.tree_util.tree_leaves_with_path(mask, is_leaf=_is_none)
    try:
        parts = treedef.flatten_up_to(params)
        for (_, keep), part in zip(paths, parts, strict=True):
            if keep is not None and not jax.tree_util.all_leaves([part]):
                raise ValueError("one array where params have a tree")
    except (ValueError, TypeError) as error:
        raise ValueError(
            "mask must have the tree structure of params, with None for leaves that "
            "are not prunable; got "
            f"{_difference('mask', mask, 'params', params, is_leaf=_is_none)}."
        ) from error
    for (path, keep), part in zip(paths, parts, strict=True):
        if keep is None:
            continue
        name = f"mask{jax.tree_util.keystr(path)}"
        dtype = dtype_of(keep)
        if dtype != jnp.bool_:
            got = shown(keep) if dtype is None else f"dtype {dtype}"
            raise ValueError(f"{name} must be bool (True = keep) or None; got {got}.")
        if jnp.shape(keep) != jnp.shape(part):
            raise ValueError(
                f"{name} must have the shape {jnp.shape(part)} of its parameter; got "
                f"{jnp.shape(keep)}."
            )


def masks_for(chosen: list[bool], mask: Any, params: optax.Params) -> None:
    """Raises a ValueError where a leaf that is chosen has no mask.

    Args:
      chosen: which leaves are chosen, in the order of `jax.tree.leaves(params)`.
      mask: the masks held, a pytree like `params` with Nones.
      params: pytree of arrays.

    Raises:
      ValueError: naming the first such leaf.
    """
    paths_leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    held = treedef.flatten_up_to(mask)
    for member, keep, (path, _) in zip(chosen, held, paths_leaves, strict=True):
        if member and keep is None:
            raise ValueError(
                "where must choose parameters that have masks already; got "
                f"params{jax.tree_util.keystr(path)}, which has none. Make new masks "
                "with `prune`."
            )
