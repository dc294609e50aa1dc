"""Other ways to compute prunAdag's step, to be timed beside it.

`top_k` is the method as one would first write it in JAX: all |g| in one vector, its T
largest by `lax.top_k`. The functions on PyTorch tensors follow the way of the public
PyTorch implementation, written anew from the specification: tensor by tensor
(scope="leaf"), `torch.topk`, boolean indexing, in place, eager. They need PyTorch:
`pip install "prunadag_optax[rivals]"`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from prunadag_optax._core import accumulators, steps
from prunadag_optax._core.classes import acceptable
from prunadag_optax._core.variants import Statistics, bounds_of
from prunadag_optax._ranking.counts import target_count

if TYPE_CHECKING:
    import torch  # pyright: ignore[reportMissingImports]


class TopKState(NamedTuple):
    """State of `top_k`: a counter and the two accumulators."""

    step: jax.Array  # shape=(), dtype=int32
    optimisable_weight: Any  # w^O, shapes of params
    decreasable_weight: Any  # w^D, shapes of params


def top_k(
    learning_rate: float,
    relevant: float = 0.1,
    *,
    variant: str = "v3",
    initial_weight: float = 0.01,
) -> optax.GradientTransformation:
    """`prunadag` with the T-th largest |g| by `lax.top_k`, scope "global".

    Args:
      learning_rate: eta.
      relevant: T/n.
      variant: a key of Table 1.
      initial_weight: zeta.

    Returns:
      The transformation, for parameters and gradients in float32.
    """
    lower, upper = bounds_of(variant)

    def init_fn(params: Any) -> TopKState:
        w_o, w_d = (accumulators.initial(params, initial_weight) for _ in range(2))
        return TopKState(jnp.zeros((), jnp.int32), w_o, w_d)

    def update_fn(updates: Any, state: Any, params: Any = None) -> Any:
        def norm(members: Any, values: Any) -> jax.Array:
            kept = jax.tree.map(lambda m, v: jnp.where(m, v, 0), members, values)
            return optax.tree.norm(kept)

        magnitudes = [jnp.abs(g).ravel() for g in jax.tree.leaves(updates)]
        joined = jnp.concatenate(magnitudes)
        target = int(target_count(relevant, joined.size))
        threshold = lax.top_k(joined, target)[0][-1]
        in_r = jax.tree.map(lambda g: jnp.abs(g) >= threshold, updates)
        same = jax.tree.map(lambda g, x: jnp.sign(g) == jnp.sign(x), updates, params)
        g_norm = norm(in_r, updates)
        x_norm = norm(jax.tree.map(lambda r, s: ~r & s, in_r, same), params)
        balance = jnp.where(x_norm > 0, g_norm / jnp.where(x_norm > 0, x_norm, 1), 0)
        statistics = Statistics(1.0 / (state.step + 1.0), g_norm, x_norm, balance)

        def leaf(g, x, r, w_o, w_d):
            a, b = (bound(jnp.abs(x), statistics) for bound in (lower, upper))
            adagrad = steps.optimisable_step(
                g, accumulators.accumulate(w_o, g), learning_rate
            )
            optimisable = r | acceptable(g, x, r, a, b, adagrad)
            w_o = accumulators.accumulate_where(optimisable, w_o, g)
            w_d = accumulators.accumulate_where(~optimisable, w_d, x)
            decrease = steps.decreasable_step(g, x, a, steps.trust_radius(x, w_d))
            return jnp.where(optimisable, adagrad, decrease), w_o, w_d

        weights = state.optimisable_weight, state.decreasable_weight
        found = jax.tree.map(leaf, updates, params, in_r, *weights)
        step, w_o, w_d = jax.tree.transpose(
            jax.tree.structure(params), jax.tree.structure((0, 0, 0)), found
        )
        return step, TopKState(state.step + 1, w_o, w_d)

    return optax.GradientTransformation(init_fn, update_fn)


class TorchState(NamedTuple):
    """What `torch_step` changes in place.

    Attributes:
      params: x.
      optimisable_weights: w^O.
      decreasable_weights: w^D.
    """

    params: "list[torch.Tensor]"
    optimisable_weights: "list[torch.Tensor]"
    decreasable_weights: "list[torch.Tensor]"


def torch_init(
    params: "Sequence[torch.Tensor]", initial_weight: float = 0.01
) -> TorchState:
    """The state before the first step.

    Args:
      params: x, copied.
      initial_weight: zeta.

    Returns:
      The state.
    """
    import torch  # pyright: ignore[reportMissingImports]

    def initial() -> list[torch.Tensor]:
        return [torch.full_like(x, initial_weight) for x in params]

    return TorchState([x.clone() for x in params], initial(), initial())


def torch_step(
    state: TorchState,
    gradients: "Sequence[torch.Tensor]",
    count: int,
    *,
    learning_rate: float,
    relevant: float = 0.1,
    variant: str = "v3",
) -> None:
    """One step of prunAdag on PyTorch tensors, in place, scope "leaf".

    Args:
      state: parameters and weights, changed.
      gradients: g, one tensor a parameter.
      count: k, the steps done.
      learning_rate: eta.
      relevant: T/n of each tensor.
      variant: "v3" or "v4".
    """
    import torch  # pyright: ignore[reportMissingImports]

    with torch.no_grad():
        for x, w_o, w_d, g in zip(*state, gradients, strict=True):
            target = int(target_count(relevant, g.numel()))
            largest = torch.topk(g.abs().flatten(), target).indices
            in_r = torch.zeros(g.numel(), dtype=torch.bool, device=g.device)
            in_r[largest] = True
            in_r = in_r.view_as(g)
            same = torch.sign(x) == torch.sign(g)
            factor = 1.0 / (count + 1.0)
            if variant == "v3":
                below = x[~in_r & same].norm()
                factor *= torch.where(below > 0, g[in_r].norm() / below, 0.0)
            a = x.abs() * factor
            accumulated = (w_o**2 + g**2).sqrt()
            step = learning_rate * g / accumulated
            length = step.abs()
            optimisable = in_r | (same & (a <= length) & (length <= x.abs()))
            decreasable = ~optimisable
            w_o[optimisable] = accumulated[optimisable]
            w_d[decreasable] = (w_d[decreasable] ** 2 + x[decreasable] ** 2).sqrt()
            shrinks = decreasable & same
            limit = torch.minimum(a[shrinks], x[shrinks].abs() / w_d[shrinks])
            x[optimisable] -= step[optimisable]
            x[shrinks] -= torch.sign(x[shrinks]) * limit


def to_torch(tree: Any, device: str = "cpu") -> "list[torch.Tensor]":
    """The leaves of a pytree of arrays as PyTorch tensors, copied."""
    import numpy as np
    import torch  # pyright: ignore[reportMissingImports]

    return [torch.tensor(np.asarray(x), device=device) for x in jax.tree.leaves(tree)]


def torch_missing() -> str:
    """Why PyTorch cannot be timed; empty if it can."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        return (
            "PyTorch is not installed, so its rows are left out; to have them: "
            'pip install "prunadag_optax[rivals]".'
        )
    del torch
    return ""
