"""flax.linen: a training state that holds pruning masks (needs the extra `flax`)."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self, TypeVar

import chex
import jax
import jax.numpy as jnp
import optax

try:
    import flax.linen as nn
    from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
    from flax.training import train_state
except ImportError as error:
    raise ImportError(
        "prunadag_optax.linen needs flax: pip install 'prunadag_optax[flax]'."
    ) from error

from prunadag_optax import evaluation
from prunadag_optax import masks as masks_lib
from prunadag_optax import structure as structures
from prunadag_optax._common import checks
from prunadag_optax._common.packing import packed_like
from prunadag_optax._core import eval_params as copies


class PruningTrainState(train_state.TrainState):
    """A flax `TrainState` with pruning masks.

    While a mask is held, pruned weights are exactly zero after every step, whatever the
    optimizer: gradients are masked before `tx.update`, so that clipping norms and
    moments see live weights only, and parameters after it, so that momentum, weight
    decay and noise change nothing. What the optimizer had accumulated for a weight goes
    with it when it is pruned.

    Some optimizers keep a second copy of the parameters, which is the one to evaluate
    (see `prunadag_optax.eval_params`): `pruning_aware(..., gradient_at="pruned")`, and
    so `recipes.any_sparsity`, and optax's schedule-free. Everything here is about that
    copy. `params`, which the training loop holds, is for the loss; it is pruned to the
    same masks.

    Attributes:
      masks: pytree of bool like the trained parameters (True = keep, None for leaves
        that are never pruned), or None before anything was pruned. fp8's parameters
        that are overwritten with their gradient have no masks.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, optax
      >>> from prunadag_optax import prunadag
      >>> from prunadag_optax.linen import PruningTrainState
      >>> model = nn.Dense(2)
      >>> params = model.init(jax.random.key(0), jnp.ones((1, 4)))["params"]
      >>> state = PruningTrainState.create(
      ...     apply_fn=model.apply, params=params, tx=prunadag(0.1)
      ... )
      >>> state = state.prune(0.5)
      >>> grads = jax.tree.map(jnp.ones_like, state.params)
      >>> state = state.apply_gradients(grads=grads)
      >>> float(state.sparsity()), int((state.params["kernel"] == 0).sum())
      (0.5, 4)
    """

    masks: Any = None

    @classmethod
    def create(cls, *, apply_fn, params, tx, **kwargs):
        """A new state at step 0; see `flax.training.train_state.TrainState.create`.

        Args:
          apply_fn: usually `model.apply`.
          params: pytree of parameters.
          tx: optax gradient transformation.
          **kwargs: further fields, among them `masks`.

        Returns:
          The state; with `masks` its parameters are pruned to them.

        Raises:
          ValueError: if `params` is a model or a state, if `tx` is no transformation,
            or if `masks` do not fit the parameters.
        """
        checks.parameters("params", params)
        checks.transformation("tx", tx)
        state = super().create(apply_fn=apply_fn, params=params, tx=tx, **kwargs)
        if state.masks is None:
            return state
        # A copy: donating the state must not delete the caller's masks.
        return state._pruned_to(jax.tree.map(jnp.array, state.masks))

    def apply_gradients(self, *, grads: Any, **extra: Any) -> Self:
        """One step of the optimizer, with pruned weights held at zero.

        Args:
          grads: pytree of gradients like `params`.
          **extra: what is a field of the state (such as `batch_stats` in a subclass) is
            replaced, as flax does; everything else goes to `tx.update`.

        Returns:
          The state after the step.

        Raises:
          ValueError: if `grads` are not like `params`.
        """
        fields = {
            k: extra.pop(k) for k in list(extra) if k in self.__dataclass_fields__
        }
        overwritten = _has_overwritten(grads)
        trained_grads = grads["params"] if overwritten else grads
        checks.same_trees("grads", trained_grads, "params", self._trained)
        if self.masks is not None:
            trained_grads = masks_lib.apply_mask(trained_grads, self.masks)
        tx = self.tx
        if isinstance(tx, optax.GradientTransformation):
            # Those that take no extra arguments ignore them. optax.MultiSteps, which
            # is none, hands them on.
            tx = optax.with_extra_args_support(tx)
        updates, opt_state = tx.update(
            trained_grads, self.opt_state, self._trained, **extra
        )
        trained = optax.apply_updates(self._trained, updates)
        if self.masks is not None:
            trained = masks_lib.apply_mask(trained, self.masks)
            opt_state = copies.mask_copies(opt_state, trained, self.masks)
        state = self.replace(step=self.step + 1, opt_state=opt_state)
        state = state._with_trained(trained)
        if overwritten:
            owned = {OVERWRITE_WITH_GRADIENT: grads[OVERWRITE_WITH_GRADIENT]}
            state = state.replace(params={**state.params, **owned})
        return state.replace(**fields)

    def prune(
        self,
        sparsity: chex.Numeric,
        *,
        scope: masks_lib.Scope = "global",
        where: masks_lib.Where | None = None,
        score: masks_lib.Score = "magnitude",
        layer_budget: masks_lib.Budget = "global",
        packed: bool = False,
    ) -> Self:
        """Prunes the evaluated parameters; what was pruned before stays pruned.

        They become the loop's `params` with `gradient_at="pruned"`, so that these have
        the zeros that `sparsity()` reports. What the optimizer's state holds for a
        pruned weight is as in a new state: moments and copies are zero, prunAdag's
        accumulators have their initial value.

        `prune(0.0)` sets masks that keep everything: a compiled step that starts from
        them need not be compiled again when they change. `prune(0.0,
        where=masks.everything)` is the template to restore a pruned state into, with
        masks of whatever leaves: orbax drops the mask of a leaf for which the template
        has none.

        Args:
          sparsity: share of the prunable weights to be pruned afterwards, in [0, 1].
          scope: what is ranked together, as in `masks.magnitude_mask`.
          where: predicate (path, leaf) -> bool; None: the leaves that have masks
            already, or `masks.prunable`.
          score: what is ranked, as in `masks.magnitude_mask`.
          layer_budget: how many each leaf keeps, as in `masks.magnitude_mask`.
          packed: whether the state holds one bit a weight, as `masks.pack` makes it. A
            state whose masks are packed stays so. Not for sharded parameters.

        Returns:
          The state with pruned parameters and their masks.

        Raises:
          ValueError: if `sparsity` is outside [0, 1] or below what is pruned already,
            or if the state has an axis of replicas or members.
        """
        self._check_one()
        _, masks = masks_lib.prune_further(
            self._evaluated,
            sparsity,
            self.masks,
            scope=scope,
            where=where,
            score=score,
            opt_state=self.opt_state,
            layer_budget=layer_budget,
        )
        masks = masks_lib.pack(masks) if packed else masks
        opt_state, trained = copies.all_relevant(self.opt_state, self._trained)
        state = self.replace(opt_state=opt_state)._with_trained(trained)
        return state._pruned_to(masks)

    def prune_on_schedule(
        self,
        density: optax.ScalarOrSchedule,
        *,
        every: int = 1,
        scope: masks_lib.Scope = "global",
        where: masks_lib.Where | None = None,
        score: masks_lib.Score = "magnitude",
        layer_budget: masks_lib.Budget = "global",
        n_m: str | None = None,
    ) -> Self:
        """Prunes to `density(step)` at every so many steps, inside a compiled step.

        Args:
          density: schedule step -> share of the prunable weights to keep, such as
            `schedules.cubic_density`. Where it rises, nothing is undone.
          every: number of steps from one change of the masks to the next.
          scope: what is ranked together, as in `prune`.
          where: predicate (path, leaf) -> bool, as in `prune`.
          score: what is ranked, as in `prune`.
          layer_budget: how many each leaf keeps, as in `prune`.
          n_m: an N:M pattern such as "2:4", as in `masks.mask_on_schedule`.

        Returns:
          The state, with new masks where the step is a multiple of `every`.

        Raises:
          ValueError: as `masks.mask_on_schedule`.

        Examples:
          >>> import jax, jax.numpy as jnp, optax
          >>> from prunadag_optax import schedules
          >>> from prunadag_optax.linen import PruningTrainState
          >>> state = PruningTrainState.create(
          ...     apply_fn=None, params=jnp.arange(1.0, 11.0), tx=optax.sgd(0.1)
          ... ).prune(0.0)
          >>> density = schedules.cubic_density(0.5, begin=0, end=4)
          >>> @jax.jit
          ... def step(state):
          ...     state = state.apply_gradients(grads=jnp.zeros(10))
          ...     return state.prune_on_schedule(density)
          >>> for _ in range(4):
          ...     state = step(state)
          >>> float(state.sparsity())
          0.5
        """
        self._check_one()
        masks = masks_lib.mask_on_schedule(
            self._evaluated,
            self.masks,
            self.step,
            density,
            every=every,
            scope=scope,
            where=where,
            score=score,
            opt_state=self.opt_state,
            layer_budget=layer_budget,
            n_m=n_m,
        )
        return self._pruned_to(masks)

    @property
    def eval_params(self) -> Any:
        """The parameters to evaluate and save; see `prunadag_optax.eval_params`."""
        return self._with_trained(self._evaluated).params

    def sparsity(self) -> jax.Array:
        """The share of the prunable weights that is pruned; 0 without masks."""
        return masks_lib.sparsity(self.masks)

    def curve(
        self,
        metric_fn: Callable[[Any], Any],
        sparsities: Iterable[float],
        **kwargs: Any,
    ) -> evaluation.PruningCurve:
        """`evaluation.pruning_curve` of the evaluated parameters.

        Args:
          metric_fn: function params -> scalar or mapping of names to scalars.
          sparsities: shares to prune, each in [0, 1].
          **kwargs: further arguments of `evaluation.pruning_curve`; `where` is by
            default the leaves that have masks, or `masks.prunable`.

        Returns:
          The `PruningCurve`.

        Raises:
          ValueError: as `evaluation.pruning_curve`, or if the state has an axis of
            replicas or members.
        """
        self._check_one()
        # fp8's own parameters are not pruned, but the model needs them.
        whole = lambda trained: self._with_trained(trained).params  # noqa: E731
        kwargs.setdefault("opt_state", self.opt_state)
        kwargs.setdefault("where", masks_lib.where_held(None, self.masks))
        recalibrate = kwargs.pop("recalibrate", None) or (lambda params, _: params)
        return evaluation.pruning_curve(
            metric_fn,
            self._evaluated,
            sparsities,
            recalibrate=lambda trained, sparsity: recalibrate(whole(trained), sparsity),
            **kwargs,
        )

    def finalised(self) -> Any:
        """The evaluated parameters to ship, plain, pruned weights at +0.0."""
        if self.masks is None:
            return self.eval_params
        trained = masks_lib.finalise(self._evaluated, self.masks)
        return self._with_trained(trained).params

    @property
    def _trained(self) -> Any:
        """The parameters that the optimizer trains: all but those of fp8."""
        params: Any = self.params
        return params["params"] if _has_overwritten(params) else params

    @property
    def _evaluated(self) -> Any:
        return copies.eval_params(self.opt_state, self._trained)

    def _pruned_to(self, masks: Any) -> Self:
        """The masks held, by the loop's parameters and by the optimizer's state."""
        trained = masks_lib.apply_mask(self._trained, masks)
        opt_state = copies.forget_pruned(self.tx, self.opt_state, trained, masks)
        return self._with_trained(trained).replace(opt_state=opt_state, masks=masks)

    def _check_one(self) -> None:
        if jnp.ndim(self.step):
            raise ValueError(
                "state must be that of one training; its step has the shape "
                f"{jnp.shape(self.step)}, so it holds replicas or an ensemble, whose "
                "weights would be ranked together. Write "
                "jax.vmap(lambda state: state.prune(0.5))(state), or prune inside pmap."
            )

    def shrink(
        self,
        structure: structures.Structure,
        keep: structures.Keep,
        *,
        apply_fn: Callable[..., Any] | None = None,
        reinitialise: bool = False,
    ) -> Self:
        """The state of the smaller model: parameters, masks, the optimizer's state.

        Args:
          structure: of `structure.trace` of the model.
          keep: group's name -> bool[size], True for units that stay.
          apply_fn: the smaller model, such as `rebuild(...).apply`; None keeps the
            state's own.
          reinitialise: as in `structure.shrink`, for the optimizer's state.

        Returns:
          The state. The optimizer's state is that of the smaller parameters, sliced.

        Raises:
          ValueError: if the parameters are not those of the structure.
        """
        return self.replace(
            apply_fn=self.apply_fn if apply_fn is None else apply_fn,
            params=structures.shrink(structure, keep, self.params),
            masks=packed_like(
                structures.shrink(structure, keep, masks_lib.unpack(self.masks)),
                self.masks,
            ),
            opt_state=structures.shrink(
                structure,
                keep,
                self.opt_state,
                optimizer=self.tx,
                params=self.params,
                reinitialise=reinitialise,
            ),
        )

    def _with_trained(self, trained: Any) -> Self:
        params: Any = self.params
        if _has_overwritten(params):
            trained = {**params, "params": trained}
        return self.replace(params=trained)


def _has_overwritten(tree: Any) -> bool:
    """Whether fp8 parameters, overwritten with their gradient, are in the tree."""
    return isinstance(tree, Mapping) and OVERWRITE_WITH_GRADIENT in tree


def _check_state(state: Any) -> None:
    if not isinstance(state, PruningTrainState):
        raise ValueError(
            "state must be a prunadag_optax.linen.PruningTrainState; got "
            f"{checks.shown(state)}."
        )


State = TypeVar("State", bound=PruningTrainState)


def fine_tune(
    state: State,
    loss_fn: Callable[[Any, Any], jax.Array],
    batches: Iterable[Any],
    *,
    progress: bool = True,
) -> tuple[State, jax.Array]:
    """Trains on with the mask held.

    Args:
      state: a state with masks.
      loss_fn: function (params, batch) -> scalar loss.
      batches: batches in the order of training, pytrees of arrays of one shape.
      progress: show a bar (tqdm, if it is installed) when it takes over a second.

    Returns:
      The state after one step on each batch, and the losses before each step.

    Raises:
      ValueError: if `state` is no `PruningTrainState`, or has no masks: prune first.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from prunadag_optax import linen
      >>> state = linen.PruningTrainState.create(
      ...     apply_fn=None, params=jnp.array([0.1, 2.0]), tx=optax.sgd(0.1)
      ... ).prune(0.5)
      >>> loss = lambda params, target: jnp.sum((params - target) ** 2)
      >>> state, losses = linen.fine_tune(state, loss, [jnp.ones(2)] * 20)
      >>> float(state.params[0]), bool(losses[-1] < losses[0])
      (0.0, True)
    """
    _check_state(state)
    if state.masks is None:
        raise ValueError("state has no masks; call state.prune(sparsity) first.")
    checks.function("loss_fn", loss_fn, "params", "batch")
    checks.batches(batches)

    @jax.jit
    def step(state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(state.params, batch)
        return state.apply_gradients(grads=grads), loss

    losses = []
    for batch in evaluation.with_progress(batches, "fine-tuning", progress):
        state, loss = step(state, batch)
        losses.append(loss)
    return state, jnp.asarray(losses)


@dataclasses.dataclass(frozen=True)
class SmallModule:
    """A linen module that runs at smaller sizes (see `rebuild`).

    Attributes:
      module: the module.
      sizes: path of a submodule -> the attributes that it has at the smaller sizes, as
        {"Conv_0": {"features": 16}}.
      deviation: from the masked model, relative to the largest output.
    """

    module: nn.Module
    sizes: Mapping[str, Mapping[str, Any]]
    deviation: float = 0.0

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """`module.apply` with the smaller variables."""

        def at_smaller_sizes(call, args, kwargs, context):
            path = "/".join(context.module.path)
            for name, value in self.sizes.get(path, {}).items():
                # A bound copy, made for this call.
                object.__setattr__(context.module, name, value)
            return call(*args, **kwargs)

        with nn.intercept_methods(at_smaller_sizes):
            return self.module.apply(variables, *args, **kwargs)


def rebuild(
    module: nn.Module,
    structure: structures.Structure,
    keep: structures.Keep,
    variables: Any,
    *inputs: Any,
    tolerance: float = 1e-4,
    allow_inexact: bool = False,
    **kwargs: Any,
) -> SmallModule:
    """A linen module at smaller sizes, without changing its code.

    The layers of Flax inside get the sizes of their smaller kernels when they are
    called. The result is compared with `structure.small_apply`, which equals the masked
    model.

    Args:
      module: the module that was traced.
      structure: of `structure.trace(module.apply, variables, *inputs)`.
      keep: group's name -> bool[size], True for units that stay.
      variables: the full variables.
      *inputs: example inputs, to compare on.
      tolerance: largest deviation, relative to the largest output.
      allow_inexact: whether a larger deviation is accepted; fine-tune then.
      **kwargs: of `module.apply`.

    Returns:
      A `SmallModule`; its `apply` takes `structure.shrink(structure, keep, variables)`.

    Raises:
      ValueError: if the smaller module fails or deviates.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, numpy as np
      >>> from prunadag_optax import linen, structure
      >>> module = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(2)])
      >>> x = jnp.ones((1, 4))
      >>> variables = module.init(jax.random.key(0), x)
      >>> s = structure.trace(module.apply, variables, x)
      >>> keep = {"layers_0": np.arange(8) < 3}
      >>> small = linen.rebuild(module, s, keep, variables, x)
      >>> small.sizes
      {'layers_0': {'features': 3}}
      >>> small.apply(structure.shrink(s, keep, variables), x).shape
      (1, 2)
    """
    shrunk = structures.shrink(structure, keep, variables)
    sizes: dict[str, dict[str, Any]] = {}

    def note(call, args, kwargs, context):
        if context.method_name == "__call__":
            path = "/".join(context.module.path)
            new = _sizes(context.module, shrunk.get("params", {}), structure, keep)
            if new:
                sizes[path] = new
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        jax.eval_shape(lambda: module.apply(variables, *inputs, **kwargs))
    small = SmallModule(module, sizes)
    deviation = structures.check_rebuilt(
        structure,
        keep,
        lambda *inputs: small.apply(shrunk, *inputs, **kwargs),
        shrunk,
        *inputs,
        tolerance=tolerance,
        allow_inexact=allow_inexact,
    )
    return dataclasses.replace(small, deviation=deviation)


def _sizes(
    module: nn.Module,
    params: Any,
    structure: structures.Structure,
    keep: structures.Keep,
) -> dict[str, Any]:
    """The sizes of a layer of Flax that change."""

    def left(leaf, axis, count):
        path = "/".join(("params", *module.path, leaf))
        return structures.groups_left(structure, keep, path, axis, count)

    for name in module.path:
        params = params.get(name, {}) if isinstance(params, Mapping) else {}
    if isinstance(module, nn.Embed) and "embedding" in params:
        new = {"features": params["embedding"].shape[-1]}
    elif isinstance(module, nn.GroupNorm) and module.num_groups:
        new = {"num_groups": left("scale", 0, module.num_groups)}
    elif "kernel" not in params:
        return {}
    elif isinstance(module, nn.Conv | nn.ConvTranspose):
        new = {"features": params["kernel"].shape[-1]}
        count = getattr(module, "feature_group_count", 1)
        if count > 1:
            axis = params["kernel"].ndim - 1
            new["feature_group_count"] = left("kernel", axis, count)
    elif isinstance(module, nn.Dense):
        new = {"features": params["kernel"].shape[-1]}
    elif isinstance(module, nn.DenseGeneral):
        features = module.features
        count = 1 if isinstance(features, int) else len(features)
        shape = params["kernel"].shape[-count:]
        new = {"features": shape[0] if isinstance(features, int) else shape}
    else:
        return {}
    return {
        name: value for name, value in new.items() if getattr(module, name) != value
    }
