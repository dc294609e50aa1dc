"""Population statistics of batch normalisation in Flax's two APIs (needs `flax`).

While a model runs in training mode, each of its BatchNorm layers adds the statistics of
its input to sums that lie beside its running averages. They have the same shape and the
same collection, so that they go through `nn.scan`, `nn.vmap` and the like as these do.
"""

import functools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from prunadag_optax._common import checks
from prunadag_optax._common.dtypes import working

# Beside "mean" and "var": how many values each feature had, their mean and variance.
_SUMS = ("recalibration_count", "recalibration_mean", "recalibration_var")
_LINEN = (
    "Write forward = lambda variables, x: model.apply(variables, x, train=True, "
    'mutable=["batch_stats"]), in training mode.'
)


def _start(mean: Any) -> list[jax.Array]:
    """The sums of no batches."""
    return [jnp.zeros_like(working(jnp.asarray(mean))) for _ in _SUMS]


def _added(sums: list[Any], count: jax.Array, mean: Any, var: Any) -> list[jax.Array]:
    r"""The statistics of n values and m further ones together.

    .. math:: \bar x = \bar x_n + s \, \delta, \quad
       v = v_n + s (v_m - v_n) + s (1 - s) \delta^2, \quad
       \delta = \bar x_m - \bar x_n, \quad s = m / (n + m)
    """
    before, old_mean, old_var = sums
    total = before + count.astype(before.dtype)
    share = count.astype(before.dtype) / jnp.maximum(total, 1)
    delta = mean.astype(old_mean.dtype) - old_mean
    step = var.astype(old_var.dtype) - old_var + (1 - share) * delta**2
    # Under a mask a feature may have no value, and then NaN for a mean.
    new_mean = jnp.where(count > 0, old_mean + share * delta, old_mean)
    new_var = jnp.where(count > 0, old_var + share * step, old_var)
    return [total, new_mean, new_var]


def _count(layer: Any, x: Any, mask: Any, shape: tuple[int, ...]) -> jax.Array:
    """How many values of each feature a BatchNorm layer averages over."""
    ndim = jnp.ndim(x)
    axes = layer.axis if isinstance(layer.axis, tuple | list) else (layer.axis,)
    features = [axis % ndim for axis in axes]
    others = tuple(axis for axis in range(ndim) if axis not in features)
    if mask is None:
        count = jnp.full(shape, math.prod(jnp.shape(x)[axis] for axis in others))
    else:
        here = jnp.broadcast_to(jnp.asarray(mask, bool), jnp.shape(x))
        count = jnp.sum(here, others).reshape(shape)
    if layer.axis_name is not None:
        groups = layer.axis_index_groups
        count = lax.psum(count, layer.axis_name, axis_index_groups=groups)
    return count


def _settled(sums: Any, mean: Any, var: Any) -> tuple[jax.Array, jax.Array]:
    """The statistics to store; where there was no value, those from before."""
    mean, var = jnp.asarray(mean), jnp.asarray(var)
    count, new_mean, new_var = sums
    return (
        jnp.where(count > 0, new_mean.astype(mean.dtype), mean),
        jnp.where(count > 0, new_var.astype(var.dtype), var),
    )


def _run(
    step: Callable[[Any, Any], Any],
    sums: Any,
    batches: Iterable[Any],
    by_layer: Callable[[Any], dict[str, Any]] = lambda sums: sums,
) -> dict[str, Any]:
    """The sums over all batches: layer's name -> count, mean and variance.

    Args:
      step: function (sums, batch) -> sums.
      sums: those of no batches.
      batches: what is gone through.
      by_layer: function from what `step` returns to the sums by layer.

    Returns:
      The sums by layer.

    Raises:
      ValueError: if there is no batch, or if nothing was summed.
    """
    first = True
    for batch in batches:
        sums = step(sums, batch)
        if first and not any(_reached(by_layer(sums)).values()):
            raise ValueError(
                "forward must run the model in training mode; got one in which no "
                f"BatchNorm normalised by the statistics of its input. {_LINEN}"
            )
        first = False
    if first:
        raise ValueError(
            "batches must hold at least one batch; got none. A generator can be gone "
            "through once: make a new one for each call."
        )
    found = by_layer(sums)
    left = [name for name, reached in _reached(found).items() if not reached]
    if left:
        warnings.warn(
            f"{len(left)} of {len(found)} layers keep their statistics, such as "
            f"{left[0]!r:.80}: forward does not call them, or not in training mode, or "
            "they are no BatchNorm of Flax.",
            stacklevel=4,
        )
    return found


def _reached(sums: dict[str, Any]) -> dict[str, bool]:
    return {name: bool(jnp.any(layer[0] > 0)) for name, layer in sums.items()}


# linen.


def of_variables(
    forward: Callable[[Any, Any], Any], variables: Any, batches: Iterable[Any]
) -> Any:
    """Variables of a linen model with the population statistics.

    Args:
      forward: function (variables, batch) -> what `model.apply` returns in training
        mode with `mutable=["batch_stats"]`.
      variables: mapping with the collections "params" and "batch_stats".
      batches: iterable of batches.

    Returns:
      The variables.

    Raises:
      ValueError: as `evaluation.recalibrate_batch_norm`.
    """
    stats = variables["batch_stats"]
    start: dict[str, Any] = {}

    def begin(path, layer):
        start["/".join(path)] = _start(layer["mean"])

    def settled(path, layer):
        mean, var = _settled(sums["/".join(path)], layer["mean"], layer["var"])
        return {**layer, "mean": mean, "var": var}

    _mapped(begin, stats)
    if not start:
        raise ValueError(
            "variables must hold the statistics of batch normalisation in "
            '"batch_stats", a "mean" and a "var" for each layer; got none. Without '
            "them there is nothing to recalibrate."
        )
    sums = _run(functools.partial(_linen_step, forward, variables), start, batches)
    new = type(stats)(_mapped(settled, stats))
    return type(variables)({**variables, "batch_stats": new})


def _mapped(function: Callable[..., Any], node: Any, path: tuple[str, ...] = ()) -> Any:
    """A collection with function(path, layer) in place of each layer's statistics."""
    if not isinstance(node, Mapping):
        return node
    if "mean" in node and "var" in node and not isinstance(node["mean"], Mapping):
        return function(path, dict(node))
    return {key: _mapped(function, of, (*path, key)) for key, of in node.items()}


# The function is a key of what is compiled: a loop over sparsities compiles once.
@functools.partial(jax.jit, static_argnums=0)
def _linen_step(forward: Any, variables: Any, sums: dict[str, Any], batch: Any) -> Any:
    def begin(path, layer):
        return {**layer, **dict(zip(_SUMS, sums["/".join(path)], strict=True))}

    def take(path, layer):
        if _SUMS[0] in layer:
            after["/".join(path)] = [layer[name] for name in _SUMS]

    after = dict(sums)
    stats = _mapped(begin, variables["batch_stats"])
    variables = type(variables)({**variables, "batch_stats": stats})
    with nn.intercept_methods(_in_linen):
        result = forward(variables, batch)
    state = result[-1] if isinstance(result, tuple) and result else result
    if not isinstance(state, Mapping) or "batch_stats" not in state:
        raise ValueError(
            "forward must return what model.apply does, the outputs and the new "
            f"statistics; got {checks.shown(result)}. {_LINEN}"
        )
    _mapped(take, state["batch_stats"])
    return after


def _in_linen(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    """A call of a layer; BatchNorm adds the statistics of its input to the sums."""
    layer = context.module
    if not (isinstance(layer, nn.BatchNorm) and context.method_name == "__call__"):
        return call(*args, **kwargs)
    given = args[1] if len(args) > 1 else kwargs.get("use_running_average")
    frozen = layer.use_running_average if given is None else given
    if frozen or not layer.has_variable("batch_stats", _SUMS[0]):
        return call(*args, **kwargs)
    if not layer.is_mutable_collection("batch_stats"):
        raise ValueError(
            f"forward must let the model change its batch statistics. {_LINEN}"
        )
    x = args[0] if args else kwargs["x"]
    before = {name: layer.get_variable("batch_stats", name) for name in ("mean", "var")}
    for name, value in before.items():
        # Where training has diverged, 0 * NaN would be NaN.
        layer.put_variable("batch_stats", name, jnp.zeros_like(value))
    # A bound copy, made for this call of the model.
    object.__setattr__(layer, "momentum", 0.0)
    object.__setattr__(layer, "use_fast_variance", False)
    result = call(*args, **kwargs)
    found = [layer.get_variable("batch_stats", name) for name in before]
    count = _count(layer, x, kwargs.get("mask"), jnp.shape(found[0]))
    sums = [layer.get_variable("batch_stats", name) for name in _SUMS]
    after = dict(zip(_SUMS, _added(sums, count, *found), strict=True))
    for name, value in (before | after).items():
        layer.put_variable("batch_stats", name, value)
    return result


# nnx.


def of_model(
    forward: Callable[[Any, Any], Any] | None, model: nnx.Module, batches: Iterable[Any]
) -> None:
    """Sets the population statistics in an nnx model.

    Args:
      forward: function (model, batch), or None for `model(batch)`.
      model: the model.
      batches: iterable of batches.

    Raises:
      ValueError: as `evaluation.recalibrate_batch_norm`.
    """
    # A second model of the same arrays: whatever happens, the user's is not left half
    # changed.
    double = nnx.merge(*nnx.split(model))
    double.eval()
    names: list[str] = []
    for path, layer in nnx.iter_modules(double):
        if isinstance(layer, nnx.BatchNorm):
            names.append("/".join(map(str, path)))
            layer.momentum, layer.use_fast_variance = 0.0, False
            for name, value in zip(_SUMS, _start(layer.mean[...]), strict=True):
                setattr(layer, name, nnx.BatchStat(value))
            object.__setattr__(layer, "__class__", _summing(type(layer)))
    if not names:
        raise ValueError(
            f"model must have an nnx.BatchNorm; got the {type(model).__name__}, which "
            "has none. There is nothing to recalibrate."
        )
    graph, start, others = nnx.split(double, _is_sum, ...)

    def step(state, batch):
        return _nnx_step(forward or _call, graph, state, others, batch)

    def sums_of(state):
        nnx.update(double, state)
        return {
            "/".join(map(str, path)): [getattr(layer, name)[...] for name in _SUMS]
            for path, layer in nnx.iter_modules(double)
            if isinstance(layer, nnx.BatchNorm)
        }

    sums = _run(step, start, batches, sums_of)
    for path, layer in nnx.iter_modules(model):
        if isinstance(layer, nnx.BatchNorm):
            found = sums["/".join(map(str, path))]
            mean, var = _settled(found, layer.mean[...], layer.var[...])
            layer.mean[...], layer.var[...] = mean, var


def _call(model: Any, batch: Any) -> Any:
    return model(batch)


def _is_sum(path: tuple[Any, ...], value: Any) -> bool:
    del value
    return path[-1] in _SUMS


@functools.partial(jax.jit, static_argnums=(0, 1))
def _nnx_step(forward: Any, graph: Any, sums: Any, others: Any, batch: Any) -> Any:
    model = nnx.merge(graph, sums, others)
    forward(model, batch)
    return nnx.state(model, _is_sum)


@functools.cache
def _summing(kind: type[nnx.BatchNorm]) -> type[nnx.BatchNorm]:
    """The class of a layer that adds the statistics of its input to its sums.

    Whatever mode the layer is asked for, it normalises by those of its input.
    """

    class Summing(kind):
        def __call__(self, x, use_running_average=None, *, mask=None):
            del use_running_average
            before = self.mean[...], self.var[...]
            # Where training has diverged, 0 * NaN would be NaN.
            self.mean[...], self.var[...] = map(jnp.zeros_like, before)
            result = super().__call__(x, use_running_average=False, mask=mask)
            found = self.mean[...], self.var[...]
            count = _count(self, x, mask, jnp.shape(found[0]))
            sums = [getattr(self, name)[...] for name in _SUMS]
            for name, value in zip(_SUMS, _added(sums, count, *found), strict=True):
                getattr(self, name)[...] = value
            self.mean[...], self.var[...] = before
            return result

    return Summing
