"""Beside the step itself: its rival forms, masks and pruning curves, ensembles."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import methods, rivals, timing, trees
from prunadag_optax import evaluation, masks, prunadag

# Rivals that take seconds where the others take milliseconds: in each fifth round only.
_SLOW = 5
_SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.98)


def rival_forms(
    size: int, repeats: int, shapes: dict[str, trees.Shapes | None]
) -> list[dict[str, Any]]:
    """The same step in other forms, tree by tree, by turns.

    Args:
      size: n.
      repeats: timed rounds; the rivals take part in each fifth.
      shapes: the trees.

    Returns:
      A row a form and tree: times, and the ratio to the package's own form with the
      same variant and scope.
    """
    rows = []
    for tree, shape in shapes.items():
        own_forms = methods.optimizers()
        forms = {"optax.adagrad": own_forms["optax.adagrad"]}
        # Of each form, the one of the package that computes the same.
        same: dict[str, str] = {}
        for variant in ("v3", "v4"):
            own = f"{variant}, global"
            forms[own] = own_forms[own]
            forms[f"{own}, lax.top_k"] = own_forms[own]._replace(
                tx=rivals.top_k(methods.RATE, variant=variant)
            )
            same[f"{own}, lax.top_k"] = own
        if shape is not None and not rivals.torch_missing():
            # A flat array is its own only leaf: both scopes are the same there.
            forms |= {name: own_forms[name] for name in ("v3, leaf", "v4, leaf")}
        compiled = methods.compile_all(forms, size, shape)
        runs = {name: step.run for name, step in compiled.items()}
        if not rivals.torch_missing():
            for name, run in _torch_runs(size, shape).items():
                runs[name] = run
                if name in ("v3, PyTorch", "v4, PyTorch"):
                    scope = "global" if shape is None else "leaf"
                    same[name] = f"{name[:2]}, {scope}"
        every = dict.fromkeys(same, _SLOW)
        times = timing.interleave(
            runs, repeats, every=every, label=f"rivals, {tree}, n = {size}"
        )
        for name, own in times.items():
            base = same.get(name)
            row: dict[str, Any] = {"parameters": tree, "n": size, "form": name}
            row |= timing.spread(own)
            row["/ adagrad"] = timing.ratio(own, times["optax.adagrad"])
            row["same method as"] = base
            row["/ that"] = timing.ratio(own, times[base]) if base else None
            rows.append(row)
    return rows


def _torch_runs(
    size: int, shapes: trees.Shapes | None
) -> dict[str, Callable[[], None]]:
    """The PyTorch steps to time, and PyTorch's own Adagrad beside them."""
    import torch  # pyright: ignore[reportMissingImports]

    on_gpu = jax.default_backend() == "gpu" and torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    params, gradients = jax.tree.map(
        lambda x: rivals.to_torch(trees.as_tree(x, shapes), device),
        trees.random_data(size),
    )

    def finished() -> None:
        if on_gpu:
            torch.cuda.synchronize()

    def runner(variant: str) -> Callable[[], None]:
        state, count = rivals.torch_init(params), 0

        def run() -> None:
            nonlocal count
            rivals.torch_step(
                state,
                gradients[count % len(gradients)],
                count,
                learning_rate=methods.RATE,
                variant=variant,
            )
            count += 1
            finished()

        return run

    own = [x.clone() for x in params]
    for x, g in zip(own, gradients[0], strict=True):
        x.grad = g
    adagrad = torch.optim.Adagrad(own, lr=methods.RATE)

    def run_adagrad() -> None:
        adagrad.step()
        finished()

    return {
        "torch.optim.Adagrad": run_adagrad,
        "v3, PyTorch": runner("v3"),
        "v4, PyTorch": runner("v4"),
    }


def mask_costs(
    size: int, repeats: int, shapes: dict[str, trees.Shapes | None]
) -> list[dict[str, Any]]:
    """A magnitude mask and a pruning curve, beside one `jnp.sort` of the same size.

    Args:
      size: n.
      repeats: timed rounds; the sort and the curves take part in each fifth.
      shapes: the trees.

    Returns:
      A row a call: times, and the ratio to the sort.
    """
    flat, _ = trees.random_data(size)
    sort = jax.jit(lambda x: jnp.sort(jnp.abs(x)))
    # A metric that costs next to nothing: what is timed is the pruning.
    metric = jax.jit(lambda params: jax.tree.leaves(params)[0].ravel()[0])
    runs: dict[tuple[str, str], Callable[[], Any]] = {
        ("flat", "jnp.sort"): lambda: jax.block_until_ready(sort(flat))
    }
    every = {("flat", "jnp.sort"): _SLOW}
    curve_name = f"pruning_curve, {len(_SPARSITIES)} sparsities"
    for tree, shape in shapes.items():
        params = trees.as_tree(flat, shape)
        for scope in ("global", "leaf"):

            def mask(params=params, scope=scope) -> Any:
                made = masks.magnitude_mask(
                    params, 0.9, scope=scope, where=masks.everything
                )
                return jax.block_until_ready(made)

            def curve(params=params, scope=scope) -> Any:
                return evaluation.pruning_curve(
                    metric,
                    params,
                    _SPARSITIES,
                    scope=scope,
                    where=masks.everything,
                    progress=False,
                )

            runs[tree, f"magnitude_mask, {scope}"] = mask
            runs[tree, f"{curve_name}, {scope}"] = curve
            every[tree, f"{curve_name}, {scope}"] = _SLOW
    times = timing.interleave(runs, repeats, every=every, warm_up=1, label="masks")
    return [
        {"parameters": tree, "n": size, "call": name}
        | timing.spread(own)
        | {"/ jnp.sort": timing.ratio(own, times["flat", "jnp.sort"])}
        for (tree, name), own in times.items()
    ]


def ensemble(
    members: int,
    repeats: int,
    batch: int = 128,
    widths: tuple[int, ...] = (784, 64, 10),
) -> list[dict[str, Any]]:
    """Training steps of many small networks at once, by `jax.vmap`.

    Args:
      members: networks.
      repeats: timed rounds.
      batch: examples a step, each network's own.
      widths: units of the layers, input to output.

    Returns:
      A row an optimizer: compilations, times of a step of one network and of all, what
      each network costs against training one alone, and against optax.adagrad's.
    """
    keys = jax.random.split(jax.random.key(0), members)
    pairs = list(itertools.pairwise(widths))

    def init(key: jax.Array) -> Any:
        normal = jax.random.normal
        return [
            {"kernel": normal(k, pair) / np.sqrt(pair[0]), "bias": jnp.zeros(pair[1])}
            for k, pair in zip(jax.random.split(key, len(pairs)), pairs, strict=True)
        ]

    def examples(key: jax.Array) -> Any:
        one, other = jax.random.split(key)
        x = jax.random.uniform(one, (batch, widths[0]))
        return x, jax.random.randint(other, (batch,), 0, widths[-1])

    def loss(params: Any, data: Any) -> jax.Array:
        x, labels = data
        for layer in params[:-1]:
            x = jax.nn.relu(x @ layer["kernel"] + layer["bias"][None])
        logits = x @ params[-1]["kernel"] + params[-1]["bias"][None]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def training_step(tx: optax.GradientTransformation) -> Callable[..., Any]:
        update = methods.optimizer_step(tx)
        return lambda params, state, data: update(
            params, state, jax.grad(loss)(params, data)
        )

    optimizers = {
        "optax.adagrad": optax.adagrad(0.05),
        "v3, global": prunadag(0.05),
        "v4, global": prunadag(0.05, variant="v4"),
        "v4, global, magnitude": prunadag(0.05, variant="v4", relevance="magnitude"),
    }
    steps: dict[tuple[str, int], timing.Step] = {}
    seeds = (jax.random.split(jax.random.key(i), members) for i in (1, 2))
    batches = [jax.vmap(examples)(seed) for seed in seeds]
    for name, tx in optimizers.items():
        step = training_step(tx)
        params = jax.vmap(init)(keys)
        carry = params, jax.vmap(tx.init)(params)
        one = jax.tree.map(lambda x: jnp.copy(x[0]), (carry, batches))
        steps[name, 1] = timing.compile_step(step, *one)
        steps[name, members] = timing.compile_step(jax.vmap(step), carry, batches)
    runs = {key: step.run for key, step in steps.items()}
    times = timing.interleave(runs, repeats, label="ensemble")
    rows = []
    for name in optimizers:
        single, all_ = times[name, 1], times[name, members]
        rows.append(
            {
                "optimizer": name,
                "networks": members,
                "compilations": steps[name, members].traced(),
                **timing.spread(all_),
                "one alone, ms": float(np.nanmedian(single)),
                "a network / one alone": timing.ratio(all_, single) / members,
                "/ adagrad": timing.ratio(all_, times["optax.adagrad", members]),
                "one alone / adagrad": timing.ratio(single, times["optax.adagrad", 1]),
            }
        )
    return rows
