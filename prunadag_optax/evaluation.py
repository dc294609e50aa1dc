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
        those of batch normalisation (see `recalibrate_batch_norm`).
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


def recalibrate_batch_norm(
    forward: Any,
    variables: Any,
    batches: Any = None,
    *,
    progress: bool = True,
) -> Any:
    r"""The statistics of batch normalisation, computed anew over given batches.

    Pruning changes what the layers see, and the running averages of training no longer
    fit. Here each BatchNorm layer gets the mean and the variance of all its inputs,
    whatever its momentum. With n_j the number of values of a feature in batch j, and
    with their mean and variance in that batch,

    .. math::
      \mu = \sum_j \frac{n_j}{n} \mu_j, \quad
      \sigma^2 = \sum_j \frac{n_j}{n} \left(
        \sigma_j^2 + (\mu_j - \mu)^2 \right), \quad n = \sum_j n_j

    The model runs once over each batch, as in training: what a layer passes on is
    normalised by the statistics of the batch. Batches of the size that was trained on
    serve best; a few thousand examples are enough.

    Args:
      forward: function (variables, batch) that runs a linen model in training mode and
        returns what `model.apply` does, as in the example. It is compiled once for each
        function: define it before a loop. For an nnx model a function (model, batch),
        or nothing: `recalibrate_batch_norm(model, batches)` calls `model(batch)`.
      variables: the linen variables, with "params" and "batch_stats", or the nnx model.
        An nnx model runs in evaluation mode but for its BatchNorm layers, so that
        dropout drops nothing; in a linen model `forward` decides that.
      batches: iterable of batches, pytrees of arrays, such as a list or a generator.
        Their sizes may differ; each shape is compiled.
      progress: show a bar (tqdm, if it is installed) when it takes over a second.

    Returns:
      For linen new variables, like those given but for "batch_stats", of which a layer
      that is no BatchNorm keeps its part. An nnx model is changed in place, and
      returned; momentum and mode stay as they are, and an error changes nothing.

    Raises:
      ImportError: without flax.
      ValueError: for a model without batch normalisation, for no batches, for swapped
        arguments, and if `forward` does not run the model in training mode.

    Warns:
      UserWarning: if a part of the layers was not reached and keeps its statistics.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from prunadag_optax import evaluation
      >>> class Net(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x, train=False):
      ...         x = nn.Dense(8, use_bias=False)(x)
      ...         x = nn.BatchNorm(use_running_average=not train)(x)
      ...         return nn.Dense(1)(nn.relu(x))
      >>> batches = jax.random.normal(jax.random.key(0), (3, 32, 4))
      >>> model = Net()
      >>> variables = model.init(jax.random.key(1), batches[0])
      >>> def forward(variables, x):
      ...     return model.apply(variables, x, train=True, mutable=["batch_stats"])
      >>> def recalibrate(params, sparsity):
      ...     pruned = {**variables, "params": params}
      ...     return evaluation.recalibrate_batch_norm(forward, pruned, batches)
      >>> curve = evaluation.pruning_curve(
      ...     lambda variables: variables["batch_stats"]["BatchNorm_0"]["var"].mean(),
      ...     variables["params"], [0.0, 0.5], recalibrate=recalibrate
      ... )
      >>> dense, half = curve.values["metric"]
      >>> half < dense
      True

    References:
      S. Ioffe, C. Szegedy, Batch normalization, ICML 2015, algorithm 2.
    """
    try:
        from flax import nnx

        from prunadag_optax._core import recalibration
    except ImportError as error:
        raise ImportError(
            "evaluation.recalibrate_batch_norm needs flax: pip install "
            "'prunadag_optax[flax]'."
        ) from error
    if batches is None and isinstance(forward, nnx.Module):
        forward, variables, batches = None, forward, variables
    _check_recalibrated(forward, variables)
    checks.batches(batches)
    each: Any = batches
    each = with_progress(each, "recalibration", progress)
    if isinstance(variables, nnx.Module):
        recalibration.of_model(forward, variables, each)
        return variables
    return recalibration.of_variables(forward, variables, each)


def _check_recalibrated(forward: Any, variables: Any) -> None:
    """What runs the model, and the linen variables or the nnx model."""
    import flax.linen as nn
    from flax import nnx

    if isinstance(forward, nn.Module):
        raise ValueError(
            f"forward must be a function (variables, batch) -> ...; got the module "
            f"{type(forward).__name__}. Write lambda variables, x: model.apply("
            'variables, x, train=True, mutable=["batch_stats"]).'
        )
    if forward is not None or not isinstance(variables, nnx.Module):
        checks.function("forward", forward, "variables", "batch")
    if isinstance(variables, nnx.Module):
        return
    if hasattr(variables, "apply_fn") and hasattr(variables, "params"):
        raise ValueError(
            f"variables must be those of the model; got the {type(variables).__name__}."
            ' Take {"params": state.eval_params, "batch_stats": state.batch_stats}, or '
            "state.params where the state has no eval_params."
        )
    if not isinstance(variables, Mapping):
        raise ValueError(
            'variables must be a mapping with "params" and "batch_stats", or an nnx '
            f"model; got {checks.shown(variables)}. Write recalibrate_batch_norm("
            "forward, variables, batches)."
        )
    if "batch_stats" not in variables:
        raise ValueError(
            'variables must hold "params" and "batch_stats"; got only '
            f"{', '.join(map(repr, variables)):.80}. A model without batch "
            "normalisation needs no recalibration."
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
    _check_settings(settings)
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
        classes = _classification(gradients, state, params, settings)
        counts = _with_total(
            [int(m.sum()) for m in jax.tree.leaves(classes.optimisable)]
        )
        columns["optimisable"] = [
            count / size if size else 0.0
            for count, size in zip(counts, columns["size"], strict=True)
        ]
    return Summary(columns)


def metrics(
    opt_state: Any,
    params: optax.Params | None = None,
    *,
    gradients: optax.Updates | None = None,
    **settings: Any,
) -> dict[str, jax.Array]:
    """What the optimizer is doing now: scalars for any tracker.

    The scalars are those that the state holds, wherever in it: in a chain, a partition,
    under a mask, in MultiSteps, as the base of another optimizer. What is not there has
    no key. For one optimizer the keys are the same at every step, so that the dict can
    be returned from a compiled step or stacked by a scan.

    ================= ==============================================================
    key               value
    ================= ==============================================================
    step              steps done, int32: of the training state if it is one, else of
                      the first optimizer of this package in it, else of any other
    threshold         the least relevant score at the last step, of prunAdag,
                      `pruning_aware`, `active_gradients` and the like; the smallest
                      where leaves have their own. NaN while an N:M pattern is in use
    threshold_max     the largest, where there is one threshold a leaf
    sparsity          the share of the prunable weights that a mask holds at zero:
                      of `keep_pruned`, gradual pruning, `rigl` and the like, of a
                      `PruningTrainState`. For an adaptive `linearised_bregman` the
                      share of zeros when it was last measured
    density           1 - sparsity
    strength          that of the regulariser in `linearised_bregman`
    learning_rate, .. every scalar hyperparameter of `optax.inject_hyperparams`, by its
                      name, as it was in the last step
    zeros             with `params`: the share of exact zeros in the prunable leaves.
                      With `gradient_at="pruned"` the loop's parameters are zero
                      outside R_k, and this is what is not relevant
    share_relevant    with `params` and `gradients`, for prunAdag: the shares of the
    share_acceptable  components that the next update classifies as relevant, as
    share_decreasable acceptable and as decreasable; they add up to 1
    ================= ==============================================================

    What is in a branch of `optax.partition` has the branch's label before its name, as
    "adam/learning_rate". A second value of the same name has "/1" after it.

    Args:
      opt_state: the state of any optax transformation, a `PruningTrainState` or another
        `TrainState` of Flax, or an `nnx.Optimizer`.
      params: the parameters that the training loop holds.
      gradients: gradients at `params`. To classify them takes about as long as a step.
      **settings: with `gradients`, the arguments given to `prunadag`, as for `summary`.

    Returns:
      From name to scalar array. Works under jit, scan and vmap.

    Raises:
      ValueError: if `opt_state` is no state or one of several members, if `gradients`
        are given without `params` or without a state of prunAdag, or settings without
        gradients.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from prunadag_optax import evaluation, masks
      >>> x = jnp.array([1.0, -2.0, 0.5, 0.25])
      >>> sgd = optax.inject_hyperparams(optax.sgd)(learning_rate=0.5)
      >>> tx = optax.chain(sgd, masks.keep_pruned(masks.magnitude_mask(x, 0.75)))
      >>> updates, state = tx.update(x, tx.init(x), x)
      >>> now = evaluation.metrics(state, x + updates)
      >>> for name, value in now.items():
      ...     print(name, value)
      step 1
      learning_rate 0.5
      sparsity 0.75
      density 0.25
      zeros 0.75
    """
    _check_settings(settings)
    if settings and gradients is None:
        raise ValueError(
            f"{next(iter(settings))} was given without gradients, which it is for; "
            "give params and gradients, too."
        )
    if params is not None:
        checks.parameters("params", params)
    step, held, opt_state = _parts_of_state(opt_state, params)
    states = list(_states(opt_state))
    counts = [_field(state, "count") for _, state in states if _is_own(state)]
    counts += [_field(state, "count") for _, state in states]
    counts = [count for count in (step, *counts) if count is not None]
    if any(map(jnp.ndim, counts)):
        raise ValueError(
            "opt_state must be the state of one training; its counts have the shape "
            f"{max(map(jnp.shape, counts))}, so it holds replicas or an ensemble. "
            "Write jax.vmap(evaluation.metrics)(opt_state)."
        )
    found = [("step", count) for count in counts[:1]] + held
    for prefix, state in states:
        found += [(prefix + name, value) for name, value in _readings(state)]
    if params is not None:
        leaves = jax.tree_util.tree_leaves_with_path(params)
        chosen = [leaf for path, leaf in leaves if masks.prunable(path, leaf)]
        found.append(("zeros", masks.sparsity(chosen)))
    if gradients is not None:
        if params is None:
            raise ValueError("gradients was given without params; give both.")
        found += _shares(gradients, opt_state, params, settings)
    result: dict[str, jax.Array] = {}
    for name, value in found:
        unique, number = name, 0
        while unique in result:
            number += 1
            unique = f"{name}/{number}"
        result[unique] = jnp.asarray(value)
    return result


def _parts_of_state(opt_state: Any, params: Any) -> tuple[Any, list[Any], Any]:
    """Its step and what its masks hold, if it is a training state, and the optimizer's.

    Args:
      opt_state: as in `metrics`.
      params: as in `metrics`.

    Returns:
      The step or None, readings, and the state of an optax transformation.

    Raises:
      ValueError: for what is no state.
    """
    checks.opt_state(opt_state, () if params is None else params)
    inner = getattr(opt_state, "opt_state", None)
    if inner is None:
        empty = isinstance(opt_state, tuple) and not opt_state  # no transformation
        if not (empty or list(_states(opt_state))):
            raise ValueError(
                "opt_state must be an optimizer's state; got "
                f"{checks.shown(opt_state)} without any. Take opt_state = "
                "tx.init(params), or as it is after tx.update."
            )
        return None, [], opt_state
    if not hasattr(opt_state, "apply_fn"):
        from flax import nnx

        # An nnx.Optimizer: plain arrays in place of Variables.
        return opt_state.step[...], [], nnx.as_pure(inner)
    held = []
    if hasattr(opt_state, "masks"):
        held = _held(masks.sparsity(opt_state.masks))
    return opt_state.step, held, inner


def _states(tree: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """The optimizers' states in a tree, the outermost first, with their labels."""
    if isinstance(tree, optax.PartitionState):
        for label, inner in tree.inner_states.items():
            yield from _states(inner, f"{prefix}{label}/")
    elif isinstance(tree, tuple | list):
        if hasattr(tree, "_fields"):
            yield prefix, tree
        for inner in tree:
            yield from _states(inner, prefix)
    elif isinstance(tree, Mapping):
        for inner in tree.values():
            yield from _states(inner, prefix)


def _is_own(state: Any) -> bool:
    """Whether a state is one of this package."""
    return type(state).__module__.partition(".")[0] == __name__.partition(".")[0]


def _field(state: Any, name: str) -> Any:
    """A field of a state; None if there is none. Every tuple has a method `count`."""
    return getattr(state, name) if name in state._fields else None


def _readings(state: Any) -> list[tuple[str, Any]]:
    """The scalars in a state by name."""
    if isinstance(hyperparams := _field(state, "hyperparams"), Mapping):
        return [
            (name, value)
            for name, value in sorted(hyperparams.items())
            if checks.dtype_of(value) is not None and jnp.ndim(value) == 0
        ]
    if not _is_own(state):
        return []
    found: list[tuple[str, Any]] = []
    for name in ("threshold", "threshold_hint"):
        threshold = _field(state, name)
        if threshold is None or not jnp.size(threshold):
            continue  # nothing is ranked
        # A negative number says which N:M pattern is in use.
        threshold = jnp.where(threshold < 0, jnp.nan, threshold)
        found.append(("threshold", jnp.min(threshold)))
        if jnp.ndim(threshold):
            found.append(("threshold_max", jnp.max(threshold)))
    if "mask" in state._fields:
        found += _held(masks.sparsity(_field(state, "mask")))
    if "strength" in state._fields:
        found.append(("strength", _field(state, "strength")))
    if "sparsity" in state._fields:
        found += _held(_field(state, "sparsity"))
    return found


def _held(sparsity: Any) -> list[tuple[str, Any]]:
    return [("sparsity", sparsity), ("density", 1 - sparsity)]


def _shares(
    gradients: Any, opt_state: Any, params: Any, settings: dict[str, Any]
) -> list[tuple[str, Any]]:
    """The shares of prunAdag's classes at the next update."""
    classes = _classification(gradients, opt_state, params, settings)
    size = sum(jnp.size(leaf) for leaf in jax.tree.leaves(params))
    return [
        (f"share_{name}", 1 - masks.sparsity(getattr(classes, name)) if size else 0.0)
        for name in ("relevant", "acceptable", "decreasable")
    ]


def _classification(
    gradients: Any, state: Any, params: Any, settings: dict[str, Any]
) -> Any:
    """The classes of prunAdag at the next update, from a state that has one of it."""
    own = find_state(state, ScaleByPrunadagState)
    weight = own.optimisable_weight
    checks.same_trees("state.optimisable_weight", weight, "params", params)
    return classification_at(gradients, own, params, Settings(**settings))


def _check_settings(settings: dict[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(Settings)]
    for name in settings:
        if name not in known:
            raise TypeError(
                f"{name} must be an argument of prunadag, one of {', '.join(known)}."
            )


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
