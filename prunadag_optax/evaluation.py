"""How much a model loses when it is pruned: curves, errors, and a table by leaf."""

import dataclasses
import pathlib
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from prunadag_optax import masks
from prunadag_optax._common import checks, tables
from prunadag_optax._common.transformation import find_state
from prunadag_optax._core.algorithm import (
    ScaleByPrunadagState,
    Settings,
    classification_at,
)


@dataclasses.dataclass(frozen=True)
class PruningCurve:
    """Metrics of a model at rising sparsity, from `pruning_curve`.

    Attributes:
      sparsities: shares pruned in [0, 1], in the order they were asked for.
      values: metric name -> its values, one for each sparsity.

    Examples:
      >>> from prunadag_optax.evaluation import PruningCurve
      >>> curve = PruningCurve((0.0, 0.9), {"accuracy": (0.95, 0.94)})
      >>> print(curve)
      sparsity  accuracy
           0.0    0.9500
           0.9    0.9400
    """

    sparsities: tuple[float, ...]
    values: dict[str, tuple[float, ...]]

    def to_dict(self) -> dict[str, list[float]]:
        """The columns by name, "sparsity" first, as JSON takes them."""
        columns = {"sparsity": self.sparsities, **self.values}
        return {name: list(column) for name, column in columns.items()}

    def to_csv(self, path: str | pathlib.Path | None = None) -> str:
        """The table as CSV text, also written to `path` when one is given."""
        return tables.to_csv(self.to_dict(), path)

    def __str__(self) -> str:
        return tables.to_text(self.to_dict())


class PruningError(NamedTuple):
    """The article's measures of robustness, one value for each sparsity.

    Attributes:
      rho: ||grad f(x_pruned)||, in units of the gradient.
      omega: sqrt(|f(x_pruned) - f(x)|), in units of the square root of the loss.
    """

    rho: jax.Array
    omega: jax.Array


class Summary(tables.Table):
    """One row a leaf, then a total, from `summary`.

    Attributes:
      columns: "leaf", "shape", "size", "kept", "sparsity" and, when gradients and state
        were given, "optimisable", the share of the leaf's components in O_k.
    """


def pruning_curve(
    metric_fn: Callable[[optax.Params], Any],
    params: optax.Params,
    sparsities: Iterable[float],
    *,
    scope: masks.Scope = "global",
    where: masks.Where | None = None,
    score: masks.Score = "magnitude",
    opt_state: Any = None,
    layer_budget: masks.Budget = "global",
    recalibrate: Callable[[Any, float], Any] | None = None,
    progress: bool = True,
) -> PruningCurve:
    r"""A metric of the model, pruned in one shot to each of several sparsities.

    .. math:: \sigma \mapsto \text{metric}(\text{prune}(x, \sigma))

    Every mask is made from the same parameters, with exact counts, so the masks are
    nested. `metric_fn` is called as it is; jit it if it can be jitted.

    Args:
      metric_fn: function params -> scalar, or -> mapping of names to scalars.
      params: pytree of trained parameters.
      sparsities: shares to prune, each in [0, 1], in any order.
      scope: "global", "leaf" or a function, as in `masks.magnitude_mask`.
      where: predicate (path, leaf) -> bool; None is `masks.prunable`.
      score: "magnitude", "lamp", a function or a tree, as in `masks.magnitude_mask`.
      opt_state: as in `masks.magnitude_mask`.
      layer_budget: as in `masks.magnitude_mask`.
      recalibrate: function (pruned params, sparsity) -> what `metric_fn` gets in place
        of the pruned parameters; for statistics that pruning has made wrong, such as
        those of batch normalisation, computed anew on training data.
      progress: show a bar (tqdm, if it is installed) when it takes over a second.

    Returns:
      A `PruningCurve`, which prints and exports; `plotting.plot_curves` draws it.

    Raises:
      ValueError: if a sparsity is outside [0, 1], if there is none, or if a metric is
        not a scalar.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax import evaluation
      >>> x = jnp.array([4.0, 0.3, 2.0, 0.1])
      >>> print(evaluation.pruning_curve(lambda p: p.sum(), x, [0, 0.5, 0.75]))
      sparsity  metric
          0.00  6.4000
          0.50  6.0000
          0.75  4.0000
    """
    _check_function("metric_fn", metric_fn, "pruning_curve(metric_fn, params, ...)")
    chosen = _check_sparsities(sparsities)
    rows = []
    if recalibrate is not None:
        checks.function("recalibrate", recalibrate, "pruned params", "sparsity")
    for sparsity in with_progress(chosen, "pruning curve", progress):
        pruned, _ = masks.prune(
            params,
            sparsity,
            scope=scope,
            where=where,
            score=score,
            opt_state=opt_state,
            layer_budget=layer_budget,
        )
        if recalibrate is not None:
            pruned = recalibrate(pruned, sparsity)
        result = metric_fn(pruned)
        named = result if isinstance(result, Mapping) else {"metric": result}
        if not named or (rows and named.keys() != rows[0].keys()):
            before = f" after {list(rows[0])!r:.80}" if rows else ""
            raise ValueError(
                "metric_fn must return a scalar, or a mapping of the same names to "
                f"scalars each time; got {list(named)!r:.80}{before}."
            )
        for name, value in named.items():
            if checks.dtype_of(value) is None or np.size(value) != 1:
                got = f"shape {np.shape(value)}" if np.ndim(value) else repr(value)
                raise ValueError(
                    f"metric_fn must return scalars; got {got:.80} for {name!r}."
                )
        rows.append({name: np.asarray(v).item() for name, v in named.items()})
    return PruningCurve(
        tuple(chosen), {name: tuple(row[name] for row in rows) for name in rows[0]}
    )


def pruning_error(
    loss_fn: Callable[[optax.Params], jax.Array],
    params: optax.Params,
    sparsities: Iterable[float],
    *,
    scope: masks.Scope = "global",
    where: masks.Where | None = None,
    score: masks.Score = "magnitude",
) -> PruningError:
    r"""The article's rho and omega at several sparsities.

    .. math::
      \rho(\sigma) = \|\nabla f(x_\sigma)\|, \qquad
      \omega(\sigma) = \sqrt{|f(x_\sigma) - f(x)|}

    with x_sigma the parameters whose smallest magnitudes, a share sigma, are zero.

    Args:
      loss_fn: differentiable function f: params -> scalar.
      params: pytree of trained parameters.
      sparsities: shares to prune, each in [0, 1].
      scope: "global" (the article), "leaf" or a function, as in
        `masks.magnitude_mask`.
      where: predicate (path, leaf) -> bool; None is `masks.prunable`.
      score: "magnitude" (the article), "lamp", a function or a tree, as in
        `masks.magnitude_mask`.

    Returns:
      `PruningError(rho, omega)`, two arrays with one value for each sparsity. Works
      under jit and vmap.

    Raises:
      ValueError: if a sparsity is outside [0, 1] or if there is none.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax import evaluation
      >>> loss = lambda x: jnp.sum((x - jnp.array([3.0, 2.0])) ** 2)
      >>> rho, omega = evaluation.pruning_error(loss, jnp.array([3.0, 2.0]), [0, 0.5])
      >>> rho.tolist(), omega.tolist()
      ([0.0, 4.0], [0.0, 2.0])

    References:
      Porcelli, Seraghiti, Toint (2026), section 4.
    """
    _check_function("loss_fn", loss_fn, "pruning_error(loss_fn, params, ...)")
    checks.parameters("params", params)
    chosen = _check_sparsities(sparsities)
    value = jax.eval_shape(loss_fn, params)
    if not isinstance(value, jax.ShapeDtypeStruct) or value.shape:
        got = checks.shown(value)
        if isinstance(value, jax.ShapeDtypeStruct):
            got = f"shape {value.shape}"
        raise ValueError(f"loss_fn must return a scalar; got {got}.")
    value_and_grad = jax.jit(jax.value_and_grad(loss_fn))
    dense, _ = value_and_grad(params)
    rho, omega = [], []
    for sparsity in chosen:
        pruned, _ = masks.prune(params, sparsity, scope=scope, where=where, score=score)
        value, gradient = value_and_grad(pruned)
        rho.append(optax.tree.norm(gradient))
        omega.append(jnp.sqrt(jnp.abs(value - dense)))
    return PruningError(jnp.stack(rho), jnp.stack(omega))


def summary(
    params: optax.Params,
    mask: Any = None,
    *,
    gradients: optax.Updates | None = None,
    state: optax.OptState | None = None,
    **settings: Any,
) -> Summary:
    """A table with one row a leaf: shape, size, kept, sparsity, share optimisable.

    Args:
      params: pytree of parameters.
      mask: pytree of bool like `params`, None for leaves that are not prunable;
        without a mask, what is not exactly zero counts as kept.
      gradients: pytree of gradients at `params`; with `state` it adds the share of each
        leaf that the next update would classify as optimisable.
      state: the optimizer state, as it comes from an optax chain.
      **settings: the arguments given to `prunadag` (learning_rate, relevant, variant,
        relevance, decrease_schedule, momentum, scope), where they are not its defaults.

    Returns:
      A `Summary`, which prints and exports; the last row is the total.
      `plotting.plot_summary` draws it.

    Raises:
      ValueError: if `mask` does not fit, if only one of `gradients` and `state` is
        given, or if `state` holds no prunAdag state for these parameters.

    Warns:
      UserWarning: for each leaf emptied: with every weight pruned or, without a mask,
        with two or more axes and every weight zero.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax import masks, evaluation
      >>> params = {"b": jnp.ones(2), "w": jnp.array([[1.0, 0.1], [2.0, 0.2]])}
      >>> pruned, mask = masks.prune(params, 0.5)
      >>> print(evaluation.summary(pruned, mask))
      leaf   shape   size  kept  sparsity
      ['b']  (2,)       2     2    0.0000
      ['w']  (2, 2)     4     2    0.5000
      total             6     4    0.3333
    """
    checks.parameters("params", params)
    known = [field.name for field in dataclasses.fields(Settings)]
    for name in settings:
        if name not in known:
            raise TypeError(
                f"{name} must be an argument of prunadag, one of {', '.join(known)}."
            )
    if (gradients is None) != (state is None):
        names = ["gradients", "state"]
        given, missing = names if state is None else reversed(names)
        raise ValueError(f"{given} was given without {missing}; give both or neither.")
    if mask is None:
        kept = [jnp.sum(masks.nonzero(x)) for x in jax.tree.leaves(params)]
    else:
        checks.mask(mask, params)
        kept = jax.tree.leaves(
            jax.tree.map(
                lambda keep, x: jnp.size(x) if keep is None else jnp.sum(keep),
                mask,
                params,
                is_leaf=lambda leaf: leaf is None,
            )
        )
    paths_leaves = jax.tree_util.tree_leaves_with_path(params)
    sizes = [jnp.size(leaf) for _, leaf in paths_leaves]
    kept = [int(count) for count in kept]
    for (path, leaf), size, count in zip(paths_leaves, sizes, kept, strict=True):
        if size and not count and (mask is not None or jnp.ndim(leaf) > 1):
            warnings.warn(
                f"params{jax.tree_util.keystr(path)} is empty: all its {size} weights "
                "are pruned. Lower the sparsity, use scope='leaf', or leave it out "
                "with `where`.",
                stacklevel=2,
            )
    columns: dict[str, list[Any]] = {
        "leaf": [jax.tree_util.keystr(path) for path, _ in paths_leaves] + ["total"],
        "shape": [str(jnp.shape(leaf)) for _, leaf in paths_leaves] + [""],
        "size": _with_total(sizes),
        "kept": _with_total(kept),
    }
    columns["sparsity"] = [
        1 - count / size if size else 0.0
        for count, size in zip(columns["kept"], columns["size"], strict=True)
    ]
    if gradients is not None and state is not None:
        own = find_state(state, ScaleByPrunadagState)
        weight = own.optimisable_weight
        checks.same_trees("state.optimisable_weight", weight, "params", params)
        classes = classification_at(gradients, own, params, Settings(**settings))
        counts = _with_total(
            [int(m.sum()) for m in jax.tree.leaves(classes.optimisable)]
        )
        columns["optimisable"] = [
            count / size if size else 0.0
            for count, size in zip(counts, columns["size"], strict=True)
        ]
    return Summary(columns)


def _with_total(counts: list[int]) -> list[int]:
    return [*counts, sum(counts)]


def _check_function(name: str, value: Any, call: str) -> None:
    if not checks.is_function(value):
        raise ValueError(
            f"{name} must be a function of the parameters, as in {call}; got "
            f"{checks.shown(value)}."
        )
    checks.takes(name, value, "params")


def _check_sparsities(sparsities: Iterable[float]) -> list[float]:
    chosen = checks.sequence("sparsities", sparsities, "[0.5, 0.9]")
    if not chosen:
        raise ValueError("sparsities must hold at least one value; got none.")
    for sparsity in chosen:
        checks.scalar("sparsities", sparsity, least=0, most=1)
    return [float(sparsity) for sparsity in chosen]


def with_progress(items: Iterable[Any], label: str, progress: bool) -> Iterable[Any]:
    """The items, with a tqdm bar when that is wanted, possible and worth it.

    Args:
      items: what to go through.
      label: what the bar says.
      progress: whether a bar is wanted.

    Returns:
      The items again.
    """
    if not progress:
        return items
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    # `disable=None`: no bar where the output is not a terminal.
    return tqdm(items, desc=label, delay=1.0, leave=False, disable=None)
