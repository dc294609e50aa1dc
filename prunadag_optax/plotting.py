"""Plots of pruning curves, pruning errors and summaries (needs the extra `plot`).

Matplotlib is imported when a plot is drawn, so the package works without it. Every
function draws on the axes it is given, or on new ones, and returns the axes.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from prunadag_optax._common import checks

if TYPE_CHECKING:
    from prunadag_optax.evaluation import PruningCurve, PruningError, Summary
    from prunadag_optax.structure import Units

_MARKERS = "osD^vP*X<>"


def _new_axes(ax: Any) -> Any:
    if ax is not None:
        if not hasattr(ax, "plot"):
            raise ValueError(
                f"ax must be matplotlib axes or None; got {checks.shown(ax)}."
            )
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "plotting needs matplotlib: pip install 'prunadag_optax[plot]'."
        ) from error
    return plt.subplots(figsize=(6.4, 4.0), layout="constrained")[1]


def _named(name: str, records: Any, kind: str, *fields: str) -> dict[str, Any]:
    """The records by label, checked to have the fields of their kind."""
    named = dict(records) if isinstance(records, Mapping) else {"": records}
    wrong = [x for x in named.values() if not all(hasattr(x, f) for f in fields)]
    if wrong or not named:
        got = checks.shown(wrong[0]) if wrong else "none"
        raise ValueError(
            f"{name} must be a {kind} or a mapping of labels to them, at least one; "
            f"got {got}."
        )
    return named


def _columns(name: str, table: Any, source: str, *needed: str) -> Any:
    """The columns of a table, checked to be that of its function."""
    columns = getattr(table, "columns", {})
    if not all(column in columns for column in needed):
        raise ValueError(
            f"{name} must be what {source} returns; got {checks.shown(table)}."
        )
    return columns


def _draw(ax: Any, i: int, label: str, sparsities: Any, values: Any) -> None:
    """The i-th line, from low to high sparsity, whatever the order of evaluation."""
    if np.shape(sparsities) != np.shape(values):
        raise ValueError(
            "sparsities must be as many as there are values; got "
            f"{np.shape(sparsities)} and {np.shape(values)}"
            + (f" for {label!r}." if label else ".")
        )
    order = np.argsort(sparsities)
    ax.plot(
        100 * np.asarray(sparsities)[order],
        np.asarray(values)[order],
        marker=_MARKERS[i % len(_MARKERS)],
        markersize=4,
        label=label or None,
    )


def _finish(ax: Any, names: Sequence[str], xlabel: str) -> Any:
    ax.set_xlabel(xlabel)
    ax.grid(alpha=0.3)
    if any(names):
        ax.legend(frameon=False, fontsize="small")
    return ax


def plot_curves(
    curves: "PruningCurve | Mapping[str, PruningCurve]",
    *,
    metric: str | None = None,
    ax: Any = None,
) -> Any:
    """A metric against sparsity, one line for each curve.

    Args:
      curves: one `PruningCurve`, or a mapping of labels to curves.
      metric: the metric to draw; None takes each curve's first.
      ax: matplotlib axes; None makes new ones.

    Returns:
      The axes, sparsity in percent along x.

    Raises:
      ValueError: if a curve lacks `metric`, or if there is no curve.
      ImportError: if matplotlib is not installed.

    Examples:
      >>> from prunadag_optax import plotting
      >>> from prunadag_optax.evaluation import PruningCurve
      >>> curve = PruningCurve((0.0, 0.9), {"accuracy": (0.95, 0.94)})
      >>> ax = plotting.plot_curves({"prunAdag": curve})
      >>> ax.get_ylabel()
      'accuracy'
    """
    named = _named("curves", curves, "PruningCurve", "sparsities", "values")
    if not all(curve.values for curve in named.values()):
        raise ValueError("curves must have at least one metric each; got one of none.")
    ax = _new_axes(ax)
    ylabel = metric
    for i, (label, curve) in enumerate(named.items()):
        name = metric or next(iter(curve.values))
        if name not in curve.values:
            raise ValueError(
                f"metric must be one of {sorted(curve.values)} for curve {label!r}; "
                f"got {metric!r}."
            )
        ylabel = ylabel or name
        _draw(ax, i, label, curve.sparsities, curve.values[name])
    ax.set_ylabel(ylabel)
    return _finish(ax, list(named), "weights pruned (%)")


def plot_errors(
    sparsities: Sequence[float],
    errors: "PruningError | Mapping[str, PruningError]",
    *,
    measure: str = "rho",
    ax: Any = None,
) -> Any:
    """Rho or omega against sparsity on a logarithmic axis, one line for each error.

    Args:
      sparsities: the shares pruned, in [0, 1], that the errors were computed for.
      errors: one `PruningError`, or a mapping of labels to them.
      measure: "rho" or "omega".
      ax: matplotlib axes; None makes new ones.

    Returns:
      The axes, sparsity in percent along x.

    Raises:
      ValueError: for another `measure`, or if there is no error, or one with another
        number of values than `sparsities`.
      ImportError: if matplotlib is not installed.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax import plotting, evaluation
      >>> loss = lambda x: jnp.sum((x - 1) ** 2)
      >>> error = evaluation.pruning_error(loss, jnp.ones(4), [0.25, 0.5])
      >>> plotting.plot_errors([0.25, 0.5], error).get_yscale()
      'log'
    """
    labels = {
        "rho": r"$\rho = \|\nabla f(x_\sigma)\|$",
        "omega": r"$\omega = |f(x_\sigma) - f(x)|^{1/2}$",
    }
    if measure not in labels:
        raise ValueError(f"measure must be 'rho' or 'omega'; got {measure!r}.")
    named = _named("errors", errors, "PruningError", "rho", "omega")
    ax = _new_axes(ax)
    for i, (label, error) in enumerate(named.items()):
        _draw(ax, i, label, sparsities, getattr(error, measure))
    ax.set_yscale("log")
    ax.set_ylabel(labels[measure])
    return _finish(ax, list(named), "weights pruned (%)")


def plot_summary(summary: "Summary", *, ax: Any = None) -> Any:
    """The share kept in every leaf, as bars, with the share optimisable if known.

    Args:
      summary: from `evaluation.summary`.
      ax: matplotlib axes; None makes new ones.

    Returns:
      The axes, one bar a leaf, percent along x.

    Raises:
      ImportError: if matplotlib is not installed.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax import plotting, evaluation
      >>> table = evaluation.summary({"w": jnp.array([1.0, 0.0])})
      >>> [float(bar.get_width()) for bar in plotting.plot_summary(table).patches]
      [50.0]
    """
    columns = _columns("summary", summary, "evaluation.summary", "leaf", "sparsity")
    ax = _new_axes(ax)
    leaves = columns["leaf"][:-1]
    rows = np.arange(len(leaves))
    kept = 100 * (1 - np.asarray(columns["sparsity"][:-1]))
    ax.barh(rows, kept, height=0.6, color="tab:blue", alpha=0.7, label="kept")
    if "optimisable" in columns:
        share = 100 * np.asarray(columns["optimisable"][:-1])
        ax.plot(share, rows, "k|", markersize=12, label="optimisable")
    ax.set_yticks(rows, leaves, fontsize="small")
    ax.invert_yaxis()
    ax.set_xlim(0, 100)
    return _finish(ax, ["kept"], "share of the leaf (%)")


def plot_units(units: "Units", *, ax: Any = None) -> Any:
    """The units that stay in every group, as bars over those of the full model.

    Args:
      units: from `structure.summary`.
      ax: matplotlib axes; None makes new ones.

    Returns:
      The axes, two bars a group, the number of units along x.

    Raises:
      ImportError: if matplotlib is not installed.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax import plotting, structure
      >>> params = {"in": jnp.ones((3, 4)), "out": jnp.ones((4, 2))}
      >>> s = structure.declare({"hidden": {"in": 1, "out": 0}}, params)
      >>> units = structure.summary(s, {"hidden": [True, False, True, True]})
      >>> [float(bar.get_width()) for bar in plotting.plot_units(units).patches]
      [4.0, 3.0]
    """
    needed = "group", "units", "kept"
    columns = _columns("units", units, "structure.summary", *needed)
    ax = _new_axes(ax)
    rows = np.arange(len(columns["group"]) - 1)
    full, kept = (columns[name][:-1] for name in ("units", "kept"))
    ax.barh(rows, full, height=0.6, color="tab:gray", alpha=0.3, label="full model")
    bars = ax.barh(rows, kept, height=0.6, color="tab:blue", alpha=0.7, label="kept")
    ax.bar_label(bars, padding=3, fontsize="small")
    ax.set_yticks(rows, columns["group"][:-1], fontsize="small")
    ax.invert_yaxis()
    return _finish(ax, ["full model", "kept"], "units")
