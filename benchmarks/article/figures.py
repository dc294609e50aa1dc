"""The article's figures, drawn from the results: medians, and quartiles as bands."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.article import published
from benchmarks.article.methods import VARIANTS
from benchmarks.article.pruning import SPARSITIES
from benchmarks.article.results import Family, Quantities, Results
from benchmarks.article.runs import DELTAS, QUANTILES, recording_points

COLORS = {
    "v1": "tab:green",
    "v2": "tab:purple",
    "v3": "tab:orange",
    "v4": "tab:blue",
    "relevant_only": "tab:pink",
    "Adagrad": "tab:gray",
    "FW1": "tab:red",
    "FW2": "tab:brown",
}
DASHES = {"FW1": "--", "FW2": "--", "Adagrad": ":", "relevant_only": "-."}
PERCENT = 100 * np.array(SPARSITIES)
RHO = r"$\rho = \|\nabla f(x_\sigma)\|$"
OMEGA = r"$\omega = |f(x_\sigma) - f(x)|^{1/2}$"


def _panels(rows: int, columns: int, title: str) -> tuple[Figure, list[Any]]:
    size = (1.2 + 3.4 * columns, 1.0 + 2.7 * rows)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(f"{title} (median and quartiles)")
    return figure, list(np.atleast_1d(figure.subplots(rows, columns)).flat)


def _band(ax: Any, x: np.ndarray, spread: np.ndarray, **style: Any) -> None:
    """A line and the band around it; spread is [quantiles, points]."""
    low, middle, high = spread
    ax.plot(x, middle, linewidth=1.3, **style)
    ax.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)


def _method(name: str) -> dict[str, Any]:
    return {
        "label": name,
        "color": COLORS[name],
        "linestyle": DASHES.get(name, "-"),
    }


def _finish(
    figure: Figure, axes: Iterable[Any], xlabel: str, ylabel: str = ""
) -> Figure:
    axes = list(axes)
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.set_xlabel(xlabel)
        if ylabel:
            ax.set_ylabel(ylabel)
    handles = {
        label: handle
        for ax in axes
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside right upper", frameon=False
    )
    return figure


def _iterations(family: Family, problem: str) -> np.ndarray:
    """The recording points of a problem, 0 shown as one half on a logarithmic axis."""
    points = recording_points(family.about["problems"][problem]["limit"])
    return np.where(points == 0, 0.5, points)


def _log_iterations(axes: Iterable[Any]) -> None:
    for ax in axes:
        ax.set_xscale("log")


def gradient_norms(family: Family) -> Figure:
    """||g|| along the iterations, a panel a problem."""
    figure, axes = _panels(2, -(-len(family.problems) // 2), "Gradient norm")
    for ax, (problem, methods) in zip(axes, family.problems.items(), strict=False):
        for name, quantities in methods.items():
            _band(
                ax, _iterations(family, problem), quantities["norms"], **_method(name)
            )
        ax.set_title(problem)
        ax.set_yscale("log")
    _log_iterations(axes)
    return _finish(figure, axes, "iteration", r"$\|g\|$")


def shares_below(family: Family) -> Figure:
    """The share of small components along the iterations, a panel a level."""
    problem, methods = next(iter(family.problems.items()))
    figure, axes = _panels(1, len(DELTAS), f"{problem}: components below a level")
    for i, (ax, delta) in enumerate(zip(axes, DELTAS, strict=True)):
        for name, quantities in methods.items():
            share = 100 * quantities["below"][:, :, i]
            _band(ax, _iterations(family, problem), share, **_method(name))
        ax.set_title(f"$|x_i| <$ {delta:g}")
    _log_iterations(axes)
    return _finish(figure, axes, "iteration", "components (%)")


def class_sizes(family: Family) -> Figure:
    """|O|, |A| and |D| along the iterations, a panel a variant."""
    problem, methods = next(iter(family.problems.items()))
    variants = [name for name in VARIANTS if name in methods]
    figure, axes = _panels(1, len(variants), f"{problem}: sizes of the classes")
    names = ("optimisable, |O|", "acceptable, |A|", "decreasable, |D|")
    colors = ("tab:blue", "tab:orange", "tab:green")
    for ax, variant in zip(axes, variants, strict=True):
        for i, (name, color) in enumerate(zip(names, colors, strict=True)):
            size = methods[variant]["classes"][:, :, i]
            points = _iterations(family, problem)
            _band(ax, points, size, label=name, color=color)
        ax.set_title(variant)
    _log_iterations(axes)
    return _finish(figure, axes, "iteration", "components")


def _spread(quantities: Quantities, name: str) -> np.ndarray:
    return np.quantile(quantities[name], QUANTILES, axis=0)


def influence(family: Family) -> Figure:
    """Rho against sparsity for several T, a panel a variant."""
    problem, methods = next(iter(family.problems.items()))
    cases = {**family.influence, "n/10": methods}
    names = sorted(cases, key=lambda name: -int(name.removeprefix("n/")))
    shown = list(next(iter(family.influence.values())))
    figure, axes = _panels(1, len(shown), f"{problem}: influence of T")
    for ax, variant in zip(axes, shown, strict=True):
        for i, name in enumerate(names):
            spread = _spread(cases[name][variant], "rho")
            style = {"label": f"T = {name}", "color": f"C{i}"}
            _band(ax, PERCENT, spread, **style)
        ax.set_title(variant)
        ax.set_yscale("log")
    return _finish(figure, axes, "pruned (%)", RHO)


def errors(family: Family, title: str) -> Figure:
    """Rho (above) and omega (below) against sparsity, a panel a problem."""
    rows = -(-len(family.problems) // 3)
    figure, axes = _panels(2 * rows, 3, title)
    labels = {"rho": RHO, "omega": OMEGA}
    for first, quantity in ((0, "rho"), (3 * rows, "omega")):
        for ax in axes[first + len(family.problems) : first + 3 * rows]:
            ax.set_visible(False)
        panels = zip(axes[first:], family.problems.items(), strict=False)
        for ax, (problem, methods) in panels:
            for name, quantities in methods.items():
                # Without pruning omega is 0, which has no logarithm.
                spread = _spread(quantities, quantity)[:, 1:]
                _band(ax, PERCENT[1:], spread, **_method(name))
            ax.set_title(problem)
            ax.set_yscale("log")
            ax.set_ylabel(labels[quantity])
    return _finish(figure, axes, "pruned (%)")


def digits(family: Family) -> Figure:
    """Rho against sparsity, and one digit as it is reconstructed at each."""
    methods = next(iter(family.problems.values()))
    figure = Figure(figsize=(13.0, 8.0), layout="constrained")
    halves: Any = figure.subfigures(1, 2, width_ratios=(1.0, 1.1))
    left, right = halves
    ax = left.subplots()
    for name, quantities in methods.items():
        _band(ax, PERCENT, _spread(quantities, "rho"), **_method(name))
    ax.set_yscale("log")
    ax.set_xlabel("pruned (%)")
    ax.set_ylabel(RHO)
    ax.set_title("Sparse coding (median and quartiles)")
    ax.grid(alpha=0.3)
    ax.legend(frameon=False, fontsize="small")
    shown = family.about["digits"]  # shares pruned, beside the digit itself
    titles = ["digit", *(f"{100 * s:.0f}%" for s in shown)]
    images = right.subplots(len(methods), len(titles), squeeze=False)
    for ax, title in zip(images[0], titles, strict=True):
        ax.set_title(title, fontsize="small")
    for row, (name, quantities) in zip(images, methods.items(), strict=True):
        for ax, pixels in zip(row, quantities["digits"], strict=True):
            ax.imshow(pixels.reshape(28, 28), cmap="gray_r", vmin=0, vmax=1)
            ax.set_xticks([])
            ax.set_yticks([])
        row[0].set_ylabel(name, fontsize="small")
    return figure


def accuracies(family: Family) -> Figure:
    """Test accuracy against sparsity, a panel a problem."""
    count = len(family.problems)
    figure, axes = _panels(1, count, "Classification of test examples")
    for ax, (problem, methods) in zip(axes, family.problems.items(), strict=True):
        for name, quantities in methods.items():
            _band(ax, PERCENT, 100 * _spread(quantities, "accuracy"), **_method(name))
        named = published.NAMED.get(problem)
        ax.set_title(f"{problem} (the article's {named})" if named else problem)
    return _finish(figure, axes, "pruned (%)", "accuracy (%)")


# By the file's name: the family, and what draws it.
FIGURES: dict[str, tuple[str, Callable[[Family], Figure]]] = {
    "figure_1_gradient_norms": ("least_squares", gradient_norms),
    "figure_2_shares_below": ("least_squares", shares_below),
    "figure_3_class_sizes": ("least_squares", class_sizes),
    "figure_4_influence_of_T": ("least_squares", influence),
    "figure_5_least_squares": (
        "least_squares",
        lambda family: errors(family, "Least squares"),
    ),
    "figure_6_sparco": ("sparco", lambda family: errors(family, "SPARCO")),
    "figure_7_sparse_coding": ("sparse_coding", digits),
    "figure_8_classification": ("classification", accuracies),
}


def draw(results: Results) -> dict[str, Figure]:
    """The figures of the families that were run, by the names of their files."""
    return {
        name: function(results[family])
        for name, (family, function) in FIGURES.items()
        if family in results and results[family].problems
    }
