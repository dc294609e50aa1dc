"""flax.nnx: pruning masks as Variables beside the model (needs the extra `flax`).

The model and the optimizer stay what they are; a `PruningMasks` object holds one
`PruningMask` for each prunable parameter and takes the optimizer's step in its hands:
`pruning.update(optimizer, model, grads)` instead of `optimizer.update(model, grads)`.
"""

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
from prunadag_optax._common import checks
from prunadag_optax._common.leaves import chosen


class PruningMask(nnx.Variable):
    """The mask of one parameter: bool, its shape, True = keep."""


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
          masks: nnx.State of bool arrays, None for parameters that are never pruned.
          wrt: nnx filter that selects the parameters of the model it is like.
        """
        self.masks = nnx.data(jax.tree.map(PruningMask, masks))
        self.wrt = wrt

    def tree(self) -> Any:
        """The masks as an nnx.State of plain arrays."""
        return nnx.as_pure(self.masks)

    def sparsity(self) -> jax.Array:
        """The share of the prunable weights that is pruned, a float32 scalar."""
        return masks_lib.sparsity(self.tree())

    def apply(self, model: nnx.Module) -> None:
        """Sets the pruned weights of the model to zero, in place.

        Args:
          model: the model that the masks were made for.

        Raises:
          ValueError: if the masks do not fit it.
        """
        nnx.update(model, masks_lib.apply_mask(self._params(model), self.tree()))

    def update(
        self, optimizer: nnx.Optimizer, model: nnx.Module, grads: Any, **extra: Any
    ) -> None:
        """One step of the optimizer, with pruned weights held at zero, in place.

        Gradients are masked before the step, so that clipping norms and moments see
        live weights only, and the parameters after it.

        Args:
          optimizer: an `nnx.Optimizer` for the model.
          model: the model.
          grads: gradients, as `optimizer.update` takes them.
          **extra: further arguments for `optimizer.update`, which `tx.update` gets.
        """
        chosen, rest = nnx.split_state(nnx.state(grads), self.wrt, ...)
        masked = masks_lib.apply_mask(nnx.as_pure(chosen), self.tree())
        # The optimizer selects by the type of Variable, so the gradients keep theirs.
        chosen = jax.tree.unflatten(jax.tree.structure(chosen), jax.tree.leaves(masked))
        optimizer.update(model, nnx.merge_state(chosen, rest), **extra)
        self.apply(model)

    def prune(
        self,
        model: nnx.Module,
        sparsity: chex.Numeric,
        *,
        scope: str = "global",
        where: masks_lib.Where | None = None,
    ) -> None:
        """Prunes further, in place; what was pruned before stays pruned.

        Args:
          model: the model.
          sparsity: share of the prunable weights to be pruned afterwards, in [0, 1].
          scope: "global" or "leaf", as in `masks.magnitude_mask`.
          where: predicate (path, leaf) -> bool; None: the parameters that have masks.

        Raises:
          ValueError: if `sparsity` is outside [0, 1] or below what is pruned already,
            or if `where` chooses a parameter that has no mask.
        """
        params, held = self._params(model), self.tree()
        if where is not None:
            checks.masks_for(chosen(params, where), held, params)
        params, masks = masks_lib.prune_further(
            params, sparsity, held, scope=scope, where=where
        )
        self._store(masks)
        nnx.update(model, params)

    def prune_on_schedule(
        self,
        model: nnx.Module,
        step: jax.typing.ArrayLike,
        density: optax.ScalarOrSchedule,
        *,
        every: int = 1,
        scope: str = "global",
    ) -> None:
        """Prunes to `density(step)` at every so many steps, in place, under nnx.jit.

        Args:
          model: the model.
          step: number of steps done, such as `optimizer.step[...]`.
          density: schedule step -> share of the prunable weights to keep, such as
            `schedules.cubic_density`. Where it rises, nothing is undone.
          every: number of steps from one change of the masks to the next.
          scope: "global" or "leaf".

        Raises:
          ValueError: as `masks.mask_on_schedule`.
        """
        masks = masks_lib.mask_on_schedule(
            self._params(model), self.tree(), step, density, every=every, scope=scope
        )
        self._store(masks)
        self.apply(model)

    def finalised(self, model: nnx.Module) -> Any:
        """The model's plain parameters to ship, pruned weights at +0.0.

        Args:
          model: the model.

        Returns:
          nnx.State of arrays, those that `wrt` selects.
        """
        return masks_lib.finalise(self._params(model), self.tree())

    def _store(self, masks: Any) -> None:
        variables = jax.tree.leaves(
            self.masks, is_leaf=lambda node: isinstance(node, PruningMask)
        )
        for variable, mask in zip(variables, jax.tree.leaves(masks), strict=True):
            variable.set_value(mask)

    def _params(self, model: nnx.Module) -> Any:
        return nnx.as_pure(nnx.state(model, self.wrt))


def prune(
    model: nnx.Module,
    sparsity: chex.Numeric,
    *,
    wrt: nnx.filterlib.Filter = nnx.Param,
    scope: str = "global",
    where: masks_lib.Where | None = None,
) -> PruningMasks:
    """Prunes a model by magnitude, in place, and returns its masks.

    `prune(model, 0.0)` prunes nothing and gives masks to prune with later, without
    compiling anew.

    Args:
      model: an nnx model; its pruned weights become zero.
      sparsity: share of the prunable weights to prune, in [0, 1].
      wrt: nnx filter that selects the parameters, such as `nnx.Param` or
        `nnx.All(nnx.Param, nnx.PathContains("kernel"))`.
      scope: "global" or "leaf", as in `masks.magnitude_mask`.
      where: predicate (path, leaf) -> bool over the selected parameters; None is
        `masks.prunable`.

    Returns:
      The `PruningMasks` to train on with.

    Raises:
      ValueError: if `sparsity` is outside [0, 1].

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from prunadag_optax import prunadag
      >>> from prunadag_optax import nnx as pruning_nnx
      >>> model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(model, prunadag(0.1), wrt=nnx.Param)
      >>> pruning = pruning_nnx.prune(model, 0.5)
      >>> @nnx.jit
      ... def step(model, optimizer, pruning, x):
      ...     grads = nnx.grad(lambda model: (model(x) ** 2).mean())(model)
      ...     pruning.update(optimizer, model, grads)
      >>> step(model, optimizer, pruning, jnp.ones((3, 4)))
      >>> float(pruning.sparsity()), int((model.kernel[...] == 0).sum())
      (0.5, 4)
    """
    params = nnx.as_pure(nnx.state(model, wrt))
    params, masks = masks_lib.prune(params, sparsity, scope=scope, where=where)
    nnx.update(model, params)
    return PruningMasks(masks, wrt=wrt)
