"""flax.nnx: pruning masks as Variables beside the model (needs the extra `flax`).

The model and the optimizer stay what they are; a `PruningMasks` object holds one
`PruningMask` for each prunable parameter and takes the optimizer's step in its hands:
`pruning.update(optimizer, model, grads)` instead of `optimizer.update(model, grads)`.

Some optimizers keep a second copy of the parameters, which is the one to evaluate:
`pruning_aware(..., gradient_at="pruned")`, and so `recipes.any_sparsity`, and optax's
schedule-free. `eval_params(optimizer, model)` has it; `prune` prunes it when the
optimizer is given.
"""

from collections.abc import Callable, Iterable
from typing import Any

import chex
import jax
import optax

try:
    from flax import nnx
except ImportError as error:
    raise ImportError(
        "prunadag_optax.nnx needs flax: pip install 'prunadag_optax[flax]'."
    ) from error

from prunadag_optax import masks as masks_lib
from prunadag_optax import structure as structures
from prunadag_optax._common import checks
from prunadag_optax._common.leaves import chosen
from prunadag_optax._common.opt_states import by_path, place
from prunadag_optax._common.packing import PackedMask, is_packed
from prunadag_optax._core import eval_params as copies


class PruningMask(nnx.Variable):
    """The mask of one parameter: bool, its shape, True = keep; or packed, in bytes."""


class PruningMasks(nnx.Pytree):
    """The masks of a model, to be held while it is trained on.

    Made by `prune`. It is an nnx object like the model: it goes through `nnx.jit`,
    `nnx.split` and `nnx.merge`, and checkpoints as `nnx.state(pruning)`.

    Attributes:
      masks: nnx.State like the parameters that `wrt` selects, of `PruningMask`
        Variables, None for parameters that are never pruned.
      wrt: nnx filter that selects the parameters.
    """

    def __init__(self, masks: Any, *, wrt: nnx.filterlib.Filter = nnx.Param):
        """Holds the masks given.

        Args:
          masks: nnx.State of bool arrays or of `PruningMask` Variables, None for
            parameters that are never pruned.
          wrt: nnx filter that selects the parameters of the model it is like.
        """
        self.masks = nnx.data(
            jax.tree.map(
                lambda mask: mask if _is_mask(mask) else _mask_of(mask, {}),
                masks,
                is_leaf=lambda node: _is_mask(node) or is_packed(node),
            )
        )
        self.wrt = wrt

    def tree(self) -> Any:
        """The masks as an nnx.State of plain arrays."""
        return masks_lib.unpack(jax.tree.map(_value, self.masks, is_leaf=_is_mask))

    def sparsity(self) -> jax.Array:
        """The share of the prunable weights that is pruned, a float32 scalar."""
        return masks_lib.sparsity(self.tree())

    def apply(self, model: nnx.Module, optimizer: nnx.Optimizer | None = None) -> None:
        """Sets the pruned weights of the model to zero, in place.

        Args:
          model: the model that the masks were made for.
          optimizer: its optimizer; a copy of the parameters in its state gets the
            zeros, too.

        Raises:
          ValueError: if the masks do not fit the model.
        """
        _check_model(model)
        nnx.update(model, masks_lib.apply_mask(self._params(model), self.tree()))
        if optimizer is not None:
            state, params = _loop(optimizer, model)
            _set(optimizer, copies.mask_copies(state, params, self._like(params)))

    def update(
        self, optimizer: nnx.Optimizer, model: nnx.Module, grads: Any, **extra: Any
    ) -> None:
        """One step of the optimizer, with pruned weights held at zero, in place.

        Gradients are masked before the step, so that clipping norms and moments see
        live weights only, and after it the parameters and the copies of them that the
        optimizer keeps, so that what is evaluated has exactly the zeros.

        Args:
          optimizer: an `nnx.Optimizer` for the model.
          model: the model.
          grads: gradients, as `optimizer.update` takes them; those of some parameters,
            such as adapters, if the optimizer is for these.
          **extra: further arguments for `optimizer.update`, which `tx.update` gets.

        Raises:
          ValueError: if `optimizer` or `model` is none, or the masks do not fit.
        """
        _check_optimizer(optimizer)
        _check_model(model)
        grads = nnx.state(grads)
        pure = nnx.as_pure(grads)
        unknown = set(by_path(pure)) - set(by_path(nnx.as_pure(nnx.state(model))))
        if unknown:
            raise ValueError(
                "grads must be gradients of the model, as nnx.grad(loss)(model) has "
                f"them; got {min(unknown, key=str)}, which is none of its parameters."
            )
        masked = masks_lib.apply_mask(pure, self._like(pure))
        # The optimizer selects by the type of Variable, so the gradients keep theirs.
        grads = jax.tree.unflatten(jax.tree.structure(grads), jax.tree.leaves(masked))
        if isinstance(optimizer, getattr(nnx, "ModelAndOptimizer", ())):
            both: Any = optimizer
            if both.model is not model:
                raise ValueError(
                    "model must be the one that the nnx.ModelAndOptimizer holds; got "
                    "another. Write pruning.update(optimizer, optimizer.model, grads)."
                )
            both.update(grads, **extra)
        else:
            optimizer.update(model, grads, **extra)
        self.apply(model, optimizer)

    def prune(
        self,
        model: nnx.Module,
        sparsity: chex.Numeric,
        *,
        optimizer: nnx.Optimizer | None = None,
        scope: masks_lib.Scope = "global",
        where: masks_lib.Where | None = None,
        score: masks_lib.Score = "magnitude",
        layer_budget: masks_lib.Budget = "global",
    ) -> None:
        """Prunes further, in place; what was pruned before stays pruned.

        Args:
          model: the model.
          sparsity: share of the prunable weights to be pruned afterwards, in [0, 1].
          optimizer: as in `nnx.prune`.
          scope: what is ranked together, as in `masks.magnitude_mask`.
          where: predicate (path, leaf) -> bool; None: the parameters that have masks.
          score: what is ranked, as in `masks.magnitude_mask`.
          layer_budget: how many each leaf keeps, as in `masks.magnitude_mask`.

        Raises:
          ValueError: if `sparsity` is outside [0, 1] or below what is pruned already,
            or if `where` chooses a parameter that has no mask.
        """
        params, held = _evaluated(model, self.wrt, optimizer), self.tree()
        if where is not None:
            checks.masks_for(chosen(params, where), held, params)
        _, masks = masks_lib.prune_further(
            params,
            sparsity,
            held,
            scope=scope,
            where=where,
            score=score,
            opt_state=optimizer,
            layer_budget=layer_budget,
        )
        self._store(masks)
        self._begin(model, optimizer)

    def prune_on_schedule(
        self,
        model: nnx.Module,
        step: jax.typing.ArrayLike,
        density: optax.ScalarOrSchedule,
        *,
        optimizer: nnx.Optimizer | None = None,
        every: int = 1,
        scope: masks_lib.Scope = "global",
        score: masks_lib.Score = "magnitude",
        layer_budget: masks_lib.Budget = "global",
        n_m: str | None = None,
    ) -> None:
        """Prunes to `density(step)` at every so many steps, in place, under nnx.jit.

        Args:
          model: the model.
          step: number of steps done, such as `optimizer.step[...]`.
          density: schedule step -> share of the prunable weights to keep, such as
            `schedules.cubic_density`. Where it rises, nothing is undone.
          optimizer: as in `nnx.prune`.
          every: number of steps from one change of the masks to the next.
          scope: what is ranked together, as in `masks.magnitude_mask`.
          score: what is ranked, as in `masks.magnitude_mask`.
          layer_budget: how many each leaf keeps, as in `masks.magnitude_mask`.
          n_m: an N:M pattern such as "2:4", as in `masks.mask_on_schedule`.

        Raises:
          ValueError: as `masks.mask_on_schedule`.
        """
        masks = masks_lib.mask_on_schedule(
            _evaluated(model, self.wrt, optimizer),
            self.tree(),
            step,
            density,
            every=every,
            scope=scope,
            score=score,
            opt_state=optimizer,
            layer_budget=layer_budget,
            n_m=n_m,
        )
        self._store(masks)
        self._hold(model, optimizer)

    def finalised(
        self, model: nnx.Module, optimizer: nnx.Optimizer | None = None
    ) -> Any:
        """The plain parameters to ship, pruned weights at +0.0.

        Args:
          model: the model.
          optimizer: its optimizer, so that they are those to evaluate; None: the
            model's.

        Returns:
          nnx.State of arrays, those that `wrt` selects.
        """
        return masks_lib.finalise(_evaluated(model, self.wrt, optimizer), self.tree())

    def _store(self, masks: Any) -> None:
        variables = jax.tree.leaves(self.masks, is_leaf=_is_mask)
        masks = jax.tree.leaves(masks_lib.unpack(masks))
        for variable, mask in zip(variables, masks, strict=True):
            packed = is_packed(_value(variable))
            variable.set_value(masks_lib.pack(mask).bits if packed else mask)

    def _params(self, model: nnx.Module) -> Any:
        return nnx.as_pure(nnx.state(model, self.wrt))

    def _like(self, params: Any) -> Any:
        """The masks for some of the parameters, None where one has none."""
        return _like_in(params, self.tree(), lambda _: None)

    def _begin(self, model: nnx.Module, optimizer: nnx.Optimizer | None) -> None:
        """The model and the state at the evaluated parameters, pruned."""
        if optimizer is not None:
            state, params = copies.all_relevant(*_loop(optimizer, model))
            nnx.update(model, params)
            _set(optimizer, state)
        self._hold(model, optimizer)

    def _hold(self, model: nnx.Module, optimizer: nnx.Optimizer | None) -> None:
        """Zeros in the model, and what a new state has in that of the optimizer."""
        self.apply(model)
        if optimizer is not None:
            state, params = _loop(optimizer, model)
            masks = self._like(params)
            state = copies.forget_pruned(optimizer.tx, state, params, masks)
            _set(optimizer, state)


def eval_params(optimizer: nnx.Optimizer, model: nnx.Module) -> Any:
    """The parameters of a model to evaluate and save: `prunadag_optax.eval_params`.

    Args:
      optimizer: the optimizer that trains the model.
      model: the model, with the parameters that the training loop holds.

    Returns:
      nnx.State of plain arrays, those that the optimizer trains; `nnx.update` puts them
      into a copy of the model.

    Raises:
      ValueError: if the arguments are swapped, or the optimizer is another model's.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> from prunadag_optax import nnx as pruning_nnx
      >>> from prunadag_optax import recipes
      >>> model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
      >>> tx = recipes.any_sparsity(10, densities=(0.25,), begin=0.0)
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> loss = lambda model: (model(jnp.ones((3, 4))) ** 2).mean()
      >>> for _ in range(10):
      ...     _ = optimizer.update(model, nnx.grad(loss)(model))
      >>> evaluated = nnx.clone(model)
      >>> nnx.update(evaluated, pruning_nnx.eval_params(optimizer, model))
      >>> [int((m.kernel[...] == 0).sum()) for m in (model, evaluated)]
      [6, 0]
    """
    _check_optimizer(optimizer)
    _check_model(model)
    return copies.eval_params(*_loop(optimizer, model))


def prune(
    model: nnx.Module,
    sparsity: chex.Numeric,
    *,
    optimizer: nnx.Optimizer | None = None,
    wrt: nnx.filterlib.Filter = nnx.Param,
    scope: masks_lib.Scope = "global",
    where: masks_lib.Where | None = None,
    score: masks_lib.Score = "magnitude",
    layer_budget: masks_lib.Budget = "global",
    packed: bool = False,
) -> PruningMasks:
    """Prunes a model, in place, and returns its masks.

    `prune(model, 0.0)` prunes nothing and gives masks to prune with later, without
    compiling anew.

    Args:
      model: an nnx model; its pruned weights become zero.
      sparsity: share of the prunable weights to prune, in [0, 1].
      optimizer: the optimizer that trains the model, if there is one. The parameters to
        evaluate are then pruned, and become the model's with `gradient_at="pruned"`;
        what its state holds for a pruned weight is as in a new state. Without it the
        model's own parameters are ranked, which are not those to evaluate if the
        optimizer keeps a copy; the copy gets the zeros in the next `update`.
      wrt: nnx filter that selects the parameters, such as `nnx.Param` or
        `nnx.All(nnx.Param, nnx.PathContains("kernel"))`.
      scope: what is ranked together, as in `masks.magnitude_mask`.
      where: predicate (path, leaf) -> bool over the selected parameters; None is
        `masks.prunable`.
      score: what is ranked, as in `masks.magnitude_mask`.
      layer_budget: how many each leaf keeps, as in `masks.magnitude_mask`.
      packed: whether to hold one bit a weight, as `masks.pack` makes it. Not for
        sharded parameters.

    Returns:
      The `PruningMasks` to train on with.

    Raises:
      ValueError: if `sparsity` is outside [0, 1], or if `model` is no nnx model.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from prunadag_optax import prunadag
      >>> from prunadag_optax import nnx as pruning_nnx
      >>> model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(model, prunadag(0.1), wrt=nnx.Param)
      >>> pruning = pruning_nnx.prune(model, 0.5, optimizer=optimizer)
      >>> @nnx.jit
      ... def step(model, optimizer, pruning, x):
      ...     grads = nnx.grad(lambda model: (model(x) ** 2).mean())(model)
      ...     pruning.update(optimizer, model, grads)
      >>> step(model, optimizer, pruning, jnp.ones((3, 4)))
      >>> float(pruning.sparsity()), int((model.kernel[...] == 0).sum())
      (0.5, 4)
    """
    params = _evaluated(model, wrt, optimizer)
    _, masks = masks_lib.prune(
        params,
        sparsity,
        scope=scope,
        where=where,
        score=score,
        opt_state=optimizer,
        layer_budget=layer_budget,
    )
    # With the metadata by which the parameter is sharded.
    variables = nnx.to_flat_state(nnx.state(model, wrt))
    metadata = {path: _sharding(variable) for path, variable in variables}
    held = [
        (path, mask if mask is None else _mask_of(mask, metadata[path], packed))
        for path, mask in nnx.to_flat_state(masks)
    ]
    pruning = PruningMasks(nnx.from_flat_state(held), wrt=wrt)
    pruning._begin(model, optimizer)
    return pruning


def trace(
    model: nnx.Module, *inputs: Any, freeze: Iterable[Any] = ()
) -> structures.Structure:
    """Finds which axes of a model's variables belong together: `structure.trace`.

    The model is traced as it is evaluated: without dropout, normalised by its running
    averages. Paths are those of its attributes, as "conv/kernel".

    Args:
      model: an nnx model.
      *inputs: example inputs of its `__call__`, or their shapes.
      freeze: paths, or pairs (path, axis), that must stay.

    Returns:
      The structure of all variables but random number streams.

    Raises:
      ValueError: if `model` is no nnx model.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from prunadag_optax import nnx as pruning_nnx
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(
      ...     nnx.Linear(4, 8, rngs=rngs), nnx.relu, nnx.Linear(8, 2, rngs=rngs)
      ... )
      >>> s = pruning_nnx.trace(model, jnp.ones((1, 4)))
      >>> [(group.name, group.size) for group in s.groups]
      [('layers/0', 8)]
    """
    _check_model(model)
    apply, variables = _evaluation(model)
    return structures.trace(apply, variables, *inputs, freeze=freeze)


def shrink(
    model: nnx.Module,
    structure: structures.Structure,
    keep: structures.Keep,
    *inputs: Any,
    optimizer: nnx.Optimizer | None = None,
    tolerance: float = 1e-4,
    allow_inexact: bool = False,
    reinitialise: bool = False,
) -> float:
    """Removes units from a model, in place: its variables and its layers' sizes.

    A shrunken copy runs on the inputs first and is compared with
    `structure.small_apply`, which equals the masked model. Where they differ - a
    LayerNorm over fewer units divides by the smaller size, attention scales by the
    smaller head - the model is left as it was.

    Args:
      model: the model that was traced.
      structure: of `trace(model, *inputs)`.
      keep: group's name -> bool[size], True for units that stay.
      *inputs: example inputs, to compare on.
      optimizer: the optimizer that trains the model; its state shrinks too.
      tolerance: largest deviation, relative to the largest output.
      allow_inexact: whether a larger deviation is accepted; fine-tune then.
      reinitialise: as in `structure.shrink`, for the optimizer's state.

    Returns:
      The deviation.

    Raises:
      ValueError: if the shrunken model fails or deviates.

    Examples:
      >>> import jax.numpy as jnp, numpy as np
      >>> from flax import nnx
      >>> from prunadag_optax import nnx as pruning_nnx
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(
      ...     nnx.Linear(4, 8, rngs=rngs), nnx.relu, nnx.Linear(8, 2, rngs=rngs)
      ... )
      >>> x = jnp.ones((1, 4))
      >>> s = pruning_nnx.trace(model, x)
      >>> keep = {"layers/0": np.arange(8) < 3}
      >>> _ = pruning_nnx.shrink(model, s, keep, x)
      >>> model.layers[0].out_features, model.layers[2].kernel.shape
      (3, (3, 2))
    """
    _check_model(model)
    small = structures.shrink(structure, keep, _evaluation(model)[1])
    state = None
    if optimizer is not None:
        _check_optimizer(optimizer)
        opt_state, params = _loop(optimizer, model)
        state = structures.shrink(
            structure,
            keep,
            opt_state,
            optimizer=optimizer.tx,
            params=params,
            reinitialise=reinitialise,
        )
    copy = nnx.clone(model)
    _resize(copy, small, structure, keep)
    apply, variables = _evaluation(copy)
    deviation = structures.check_rebuilt(
        structure,
        keep,
        lambda *inputs: apply(variables, *inputs),
        small,
        *inputs,
        tolerance=tolerance,
        allow_inexact=allow_inexact,
    )
    _resize(model, small, structure, keep)
    if optimizer is not None:
        _set(optimizer, state)
    return deviation


def _evaluation(model: nnx.Module) -> tuple[Callable[..., Any], Any]:
    """The model as a function of its variables, as it is evaluated."""
    graph, streams, variables = nnx.split(model, nnx.RngState, ...)

    def apply(variables, *inputs):
        model = nnx.merge(graph, streams, variables)
        model.eval()
        return model(*inputs)

    return apply, nnx.as_pure(variables)


def _resize(
    model: nnx.Module,
    small: Any,
    structure: structures.Structure,
    keep: structures.Keep,
) -> None:
    """Puts smaller variables into a model and sets the sizes of Flax's layers."""
    nnx.update(model, small)
    module: Any
    for path, module in nnx.iter_modules(model):
        name = "/".join(map(str, (*path, "kernel")))
        sizes = _sizes(module)
        groups = getattr(module, "feature_group_count", 1)
        if groups > 1:
            last = len(module.kernel.shape) - 1
            groups = structures.groups_left(structure, keep, name, last, groups)
            sizes["feature_group_count"] = groups
            sizes["in_features"] = module.kernel.shape[-2] * groups
        if isinstance(module, nnx.GroupNorm) and "num_features" in sizes:
            scale = "/".join(map(str, (*path, "scale")))
            groups = structures.groups_left(
                structure, keep, scale, 0, module.num_groups
            )
            sizes["num_groups"] = groups
            sizes["group_size"] = sizes["num_features"] // groups
        for attribute, value in sizes.items():
            if hasattr(module, attribute):
                setattr(module, attribute, value)


def _sizes(module: nnx.Module) -> dict[str, Any]:
    """What the sizes in the attributes of a layer of Flax are, by its variables."""
    if isinstance(
        module, nnx.Linear | nnx.LinearGeneral | nnx.Conv | nnx.ConvTranspose
    ):
        shape = tuple(module.kernel.shape)
        if isinstance(module, nnx.LinearGeneral):
            split = len(shape) - len(module.out_features)
            batch = len(shape) - len(module.in_features) - len(module.out_features)
            return {"in_features": shape[batch:split], "out_features": shape[split:]}
        return {
            "in_features": shape[-2],
            "out_features": shape[-1],
            "kernel_shape": shape,
        }
    if isinstance(module, nnx.Embed):
        rows, features = module.embedding.shape
        return {"num_embeddings": rows, "features": features}
    if isinstance(module, nnx.MultiHeadAttention):
        inputs, heads, size = module.query.kernel.shape
        return {
            "num_heads": heads,
            "head_dim": size,
            "qkv_features": heads * size,
            "in_features": inputs,
            "out_features": module.out.kernel.shape[-1],
        }
    held = (getattr(module, name, None) for name in ("scale", "bias", "mean"))
    sizes = {
        variable.shape[-1] for variable in held if isinstance(variable, nnx.Variable)
    }
    return {"num_features": sizes.pop()} if len(sizes) == 1 else {}


def _evaluated(
    model: nnx.Module, wrt: nnx.filterlib.Filter, optimizer: nnx.Optimizer | None
) -> Any:
    """The parameters that `wrt` selects, as they are evaluated."""
    _check_model(model)
    params = nnx.as_pure(nnx.state(model, wrt))
    if optimizer is None:
        return params
    return _like_in(params, eval_params(optimizer, model), lambda own: own)


def _sharding(variable: nnx.Variable) -> dict[str, Any]:
    metadata = variable.get_metadata()
    names = ("out_sharding", "sharding_rules", "mesh")
    return {name: metadata[name] for name in names if name in metadata}


def _is_mask(node: Any) -> bool:
    return isinstance(node, PruningMask)


def _mask_of(mask: Any, metadata: dict[str, Any], packed: bool = False) -> PruningMask:
    """The variable of a mask; a packed one is its bytes, with the shape beside them."""
    mask = masks_lib.pack(mask) if packed else mask
    if is_packed(mask):
        return PruningMask(mask.bits, packed_shape=mask.shape)
    return PruningMask(mask, **metadata)


def _value(variable: PruningMask) -> Any:
    shape = variable.get_metadata().get("packed_shape")
    value = variable.get_value()
    return value if shape is None else PackedMask(value, shape)


def _like_in(like: Any, tree: Any, default: Callable[[Any], Any]) -> Any:
    """The leaves of a tree at the paths of another; where it has none, the default."""
    found = by_path(tree)

    def leaf(path, own):
        at = place(path)
        return found[at] if at in found else default(own)

    return jax.tree_util.tree_map_with_path(leaf, like)


def _loop(optimizer: nnx.Optimizer, model: nnx.Module) -> tuple[Any, Any]:
    """The optimizer's state and the parameters that it trains, as plain arrays."""
    params = nnx.state(model, optimizer.wrt, graph=optimizer.graph)
    return nnx.as_pure(optimizer.opt_state), nnx.as_pure(params)


def _set(optimizer: nnx.Optimizer, opt_state: Any) -> None:
    nnx.update(optimizer.opt_state, nnx.state(opt_state, graph=optimizer.graph))


def _check_model(model: Any) -> None:
    if not isinstance(model, nnx.Pytree) or isinstance(
        model, nnx.Optimizer | PruningMasks
    ):
        raise ValueError(
            f"model must be an nnx model; got {checks.shown(model)}. For a pytree of "
            "parameters there is prunadag_optax.masks.prune(params, sparsity)."
        )


def _check_optimizer(optimizer: Any) -> None:
    if not isinstance(optimizer, nnx.Optimizer):
        raise ValueError(
            f"optimizer must be an nnx.Optimizer; got {checks.shown(optimizer)}. Write "
            "nnx.Optimizer(model, tx, wrt=nnx.Param)."
        )
