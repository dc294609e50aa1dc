r"""Scores: what is pruned in the place of the smallest magnitudes.

Each function makes a tree of scores like the parameters. `masks.prune(score=)`, gradual
pruning and lottery tickets take such a tree, or a function of the parameters that
returns one; the smallest scores are pruned.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from prunadag_optax._common import budgets, checks
from prunadag_optax._common.dtypes import working
from prunadag_optax._common.leaves import Where, chosen, parts_of
from prunadag_optax._ranking.lamp import lamp_scores


def random(params: optax.Params, key: jax.Array) -> Any:
    """Random scores: the pruning that any other has to beat.

    Args:
      params: pytree of arrays.
      key: a key of `jax.random`. With equal keys the scores are equal, on any number of
        devices.

    Returns:
      Pytree like `params` of float32 numbers, uniform in [0, 1).

    Raises:
      ValueError: if `key` is no key.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from prunadag_optax import masks, scores
      >>> params = {"kernel": jnp.ones((8, 8))}
      >>> random = scores.random(params, jax.random.key(0))
      >>> float(masks.sparsity(masks.magnitude_mask(params, 0.25, score=random)))
      0.25
    """
    checks.parameters("params", params)
    checks.key("key", key)
    leaves, treedef = jax.tree.flatten(params)

    def leaf(i, x):
        numbers = jax.random.uniform(jax.random.fold_in(key, i), x.shape, jnp.float32)
        # A sum with something like x is sharded as x is.
        return jnp.zeros_like(x, jnp.float32) + numbers

    return treedef.unflatten(leaf(i, jnp.asarray(x)) for i, x in enumerate(leaves))


def lamp(params: optax.Params, *, where: Where | None = None) -> Any:
    r"""Magnitudes that know how much of their layer is left: `score="lamp"` as a tree.

    .. math:: s_u = \frac{x_u^2}{\sum_{v : |x_v| \ge |x_u|} x_v^2}

    Args:
      params: pytree of real floating arrays.
      where: predicate (path, leaf) -> bool, which leaves are layers; None:
        `masks.prunable`.

    Returns:
      Pytree like `params`, in at least float32; 0 for leaves that are not chosen.

    Raises:
      ValueError: if `where` chooses no leaf.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax import scores
      >>> scores.lamp(jnp.array([1.0, 1.0, 0.0])).tolist()
      [0.5, 0.5, 0.0]

    References:
      J. Lee, S. Park, S. Mo, S. Ahn, J. Shin, Layer-adaptive sparsity for the
      magnitude-based pruning, ICLR 2021, equation (1).
    """
    parts = parts_of(params, where)
    none = jax.tree.map(lambda x: jnp.zeros_like(working(x)), params)
    return parts.map(lamp_scores, params, otherwise=none)


def saliency(
    grad: Callable[[Any, Any], Any], params: optax.Params, batches: Iterable[Any]
) -> Any:
    r"""By how much the loss changes, to first order, when a weight is set to zero.

    .. math:: s_i = \Bigl| x_i \, \frac{1}{B} \sum_{b=1}^{B} g_{i,b} \Bigr|

    The gradients are averaged before the magnitude is taken: this is the change of the
    mean loss over all batches, in which noise of either sign cancels. For batches of
    one size it does not matter how the data are split.

    Args:
      grad: function (params, batch) -> gradient, such as `jax.grad(loss)`. It is
        compiled.
      params: pytree of real floating arrays.
      batches: iterable of the minibatches to take gradients of.

    Returns:
      Pytree like `params`, in at least float32, in the unit of the loss.

    Raises:
      ValueError: if there is no batch, or if `grad` returns no tree like `params`.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from prunadag_optax import scores
      >>> loss = lambda x, batch: jnp.sum(batch * x)
      >>> batches = jnp.array([[1.0, -3.0], [3.0, 3.0]])
      >>> scores.saliency(jax.grad(loss), jnp.array([-1.0, 5.0]), batches).tolist()
      [2.0, 0.0]

    References:
      M. C. Mozer, P. Smolensky, Skeletonization, NIPS 1988. N. Lee, T. Ajanthan, P.
      Torr, SNIP: single-shot network pruning based on connection sensitivity, ICLR
      2019, equation (6), of which this is the numerator.
    """
    checks.function("grad", grad, "params", "batch")
    checks.parameters("params", params)
    checks.real_leaves("params", params)
    checks.batches(batches)

    @jax.jit
    def added(sums, batch):
        gradient = grad(params, batch)
        checks.same_trees("grad(params, batch)", gradient, "params", params)
        return jax.tree.map(lambda total, g: total + working(g), sums, gradient)

    sums = jax.tree.map(lambda x: jnp.zeros_like(working(x)), params)
    number = 0
    for batch in batches:
        sums, number = added(sums, batch), number + 1
    if not number:
        raise ValueError(_NO_BATCHES)
    return jax.tree.map(lambda x, g: jnp.abs(working(x) * (g / number)), params, sums)


_NO_BATCHES = (
    "batches must hold at least one batch; got none. A generator can be gone through "
    "once: make a new one for each call."
)


def layer_inputs(*arguments: Any) -> dict[str, jax.Array]:
    r"""The norms of what the dense layers of a model are given, for `wanda`.

    .. math:: \|X_j\|_2 = \Bigl( \sum_t X_{t,j}^2 \Bigr)^{1/2}

    over all t: examples, positions, and calls of the layer. The layers are `Dense` and
    `DenseGeneral` of linen, `Linear` and `LinearGeneral` of nnx.

    Args:
      *arguments: `(forward, variables, batches)` for linen, with forward a function
        (variables, batch), such as `model.apply`; `(model, batches)` for an nnx model
        that is called with a batch, or `(forward, model, batches)` with a function
        (model, batch). A model of nnx runs in evaluation mode.

    Returns:
      From the path of a layer, such as "layers_0" or "blocks/0/mlp", to the norms,
      of the shape of the axes that its kernel contracts, in at least float32.

    Raises:
      ValueError: for other arguments, without a batch, for a model without a dense
        layer, or with one inside of `nn.scan` or `nn.remat`.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from prunadag_optax import masks, scores
      >>> model = nn.Sequential([nn.Dense(3), nn.relu, nn.Dense(2)])
      >>> variables = model.init(jax.random.key(0), jnp.ones((1, 4)))
      >>> batches = [jnp.ones((9, 4)), jnp.ones((7, 4))]
      >>> inputs = scores.layer_inputs(model.apply, variables, batches)
      >>> inputs["layers_0"].tolist()
      [4.0, 4.0, 4.0, 4.0]
      >>> params = variables["params"]
      >>> wanda = scores.wanda(params, inputs)
      >>> masks.prune(params, 0.5, score=wanda)[1]["layers_0"]["kernel"].sum(0).tolist()
      [2, 2, 2]
    """
    try:
        from prunadag_optax._core import layer_inputs as flax_inputs
    except ImportError as error:
        raise ImportError(
            "scores.layer_inputs needs flax: pip install 'prunadag_optax[flax]'."
        ) from error
    squares = flax_inputs.squares_of(arguments, _NO_BATCHES)
    return {name: jnp.sqrt(total) for name, total in squares.items()}


def wanda(
    params: optax.Params, inputs: Mapping[str, Any], *, where: Where | None = None
) -> Any:
    r"""Wanda: the magnitude of a weight times the norm of its input, by output.

    .. math:: w_{ij} = |x_{ij}| \, \|X_i\|_2, \quad
       s_{ij} = \frac{\text{rank of } w_{ij} \text{ in column } j}{\text{inputs}}

    Wanda compares the weights of each output with one another, and with no others.
    So the score of a weight is its rank within its output, from 1 / inputs to 1:
    ranked together or by leaf, every output of every layer keeps the same share.

    Args:
      params: pytree of real floating arrays, with kernels [inputs, outputs].
      inputs: from the path of a layer to the norms of its inputs, as `layer_inputs`
        gives them.
      where: predicate (path, leaf) -> bool, which leaves to score; None:
        `masks.prunable`.

    Returns:
      Pytree like `params` of float32 numbers in [0, 1]; 0 for leaves not chosen.

    Raises:
      ValueError: for a chosen leaf that is no kernel of a layer in `inputs`, or is of
        another size.

    Examples:
      >>> import jax.numpy as jnp
      >>> from prunadag_optax import scores
      >>> params = {"dense": {"kernel": jnp.array([[3.0, 1.0], [2.0, 2.0]])}}
      >>> scores.wanda(params, {"dense": jnp.array([1.0, 4.0])})["dense"]["kernel"]
      Array([[0.5, 0.5],
             [1. , 1. ]], dtype=float32)

    References:
      M. Sun, Z. Liu, A. Bair, J. Z. Kolter, A simple and effective pruning approach for
      large language models, ICLR 2024, equation (1).
    """
    if not isinstance(inputs, Mapping):
        raise ValueError(
            "inputs must be a mapping from paths of layers to norms, such as "
            "scores.layer_inputs(model.apply, variables, batches); got "
            f"{checks.shown(inputs)}."
        )
    paths_leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    members = chosen(params, where)
    return treedef.unflatten(
        _by_output(path, x, inputs) if member else jnp.zeros(jnp.shape(x), jnp.float32)
        for member, (path, x) in zip(members, paths_leaves, strict=True)
    )


def _by_output(path: Any, x: Any, inputs: Mapping[str, Any]) -> jax.Array:
    """The ranks of a kernel's weights within their outputs."""
    checks.real_leaf("params", path, x)
    name, _, last = budgets.name_of(path).rpartition("/")
    norms = inputs.get(name.removeprefix("params").lstrip("/"))
    if norms is None or last != "kernel":
        raise ValueError(
            f"inputs must have the layer of params{jax.tree_util.keystr(path)}; it has "
            f"{', '.join(map(repr, list(inputs)[:3]))}. Wanda is for dense layers: "
            "leave others out with where=lambda path, leaf: ..., and prune them by "
            "another score."
        )
    norms, shape = working(norms), jnp.shape(x)
    if norms.shape != shape[: norms.ndim]:
        raise ValueError(
            f"inputs[{name!r}] must have the shape of what the kernel of shape {shape} "
            f"contracts; got {norms.shape}."
        )
    flat = jnp.abs(working(x)).reshape(norms.size, -1) * norms.reshape(-1, 1)
    # From 1 for the smallest; of equal ones the lowest index comes first.
    rank = jnp.argsort(jnp.argsort(flat, axis=0, stable=True), axis=0) + 1
    return (rank / norms.size).astype(jnp.float32).reshape(shape)
