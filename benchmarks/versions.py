"""Two versions of `prunadag`, by turns: `python -m benchmarks.versions --before DIR`.

DIR holds another version of the package: a checkout, or the site-packages of another
environment. Both versions are loaded into one process, so that what is measured takes
turns.

* `--equal`: 300 steps, each taken by both versions from the same iterate and state.
  Reports the largest difference of the updates, in units in the last place and
  relative, and the components that the versions put into different classes.
* `--cost`: the time of a jitted, donated step at 10^7 parameters, flat and in 150
  leaves, and the time to compile it.
* `--cost-of-bases`: the time of four such steps of `pruning_aware(optax.adam(...))`,
  over that of the `prunadag_w` of a version that had it, with Adam written out inside.
"""

import argparse
import functools
import importlib
import itertools
import pathlib
import sys
import time
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import timing

VARIANTS = ("v1", "v2", "v3", "v4", "relevant_only")
SCOPES = ("global", "leaf")
# A constant, and four densities in turn.
DENSITIES = {
    "0.1": lambda count: jnp.full((), 0.1),
    "cycle": lambda count: jnp.array([1, 0.1, 0.05, 0.02])[count % 4],
}
NAME = "prunadag_optax"


def load(folder: pathlib.Path) -> ModuleType:
    """The package as it is in a folder, beside the one that is imported already."""
    own = {k: sys.modules.pop(k) for k in [*sys.modules] if k.split(".")[0] == NAME}
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(NAME)
    finally:
        sys.path.remove(str(folder))
        for key in [k for k in sys.modules if k.split(".")[0] == NAME]:
            del sys.modules[key]
        sys.modules.update(own)


def trees(size: int, seed: int, dtype: Any) -> dict[str, dict[str, np.ndarray]]:
    """Parameters of about a size: one array, and 150 leaves as of a transformer."""
    rng = np.random.default_rng(seed)
    width = max(4, int(np.sqrt(size / 25 / 12)) // 4 * 4)
    shapes = {}
    for layer in range(25):
        shapes[f"{layer}_in"] = (width, 4 * width)
        shapes[f"{layer}_out"] = (4 * width, width)
        shapes[f"{layer}_attention"] = (width, 4 * width)
        for name in ("a", "b", "c"):
            shapes[f"{layer}_{name}"] = (width,)
    leaves = {k: rng.normal(size=s).astype(dtype) for k, s in shapes.items()}
    return {"flat": {"x": rng.normal(size=size).astype(dtype)}, "150 leaves": leaves}


def noise(tree: Any, seed: int) -> Any:
    """Gradients of random sign and scale, some of them zero."""
    rng = np.random.default_rng(seed)

    def leaf(x):
        g = rng.normal(size=x.shape) * np.exp(rng.normal(size=x.shape))
        return (g * (rng.random(x.shape) > 0.02)).astype(x.dtype)

    return jax.tree.map(leaf, tree)


def equality(before: ModuleType, now: ModuleType, steps: int) -> list[dict[str, Any]]:
    """The largest differences over a number of steps, for every setting."""
    rows = []
    dtypes = ("float32", "float64")
    for dtype, variant, scope in itertools.product(dtypes, VARIANTS, SCOPES):
        jax.config.update("jax_enable_x64", dtype == "float64")
        for name, tree in trees(20_000, 0, dtype).items():
            settings = {"variant": variant, "scope": scope}
            rows.append(
                {"dtype": dtype, "variant": variant, "scope": scope, "tree": name}
                | _difference(before, now, settings, tree, steps)
            )
            print(rows[-1], flush=True)
    jax.config.update("jax_enable_x64", False)
    return rows


def _difference(before, now, settings, tree, steps) -> dict[str, Any]:
    old, new = (version.scale_by_prunadag(0.1, **settings) for version in (before, now))
    old_update, new_update = jax.jit(old.update), jax.jit(new.update)
    x = jax.tree.map(jnp.asarray, tree)
    state = new.init(x)
    kind = type(old.init(x))
    ulps = relative = 0.0
    apart = 0
    for k in range(steps):
        # Minimise |x - target|^2 with noise: signs agree now and then.
        g = jax.tree.map(lambda x, n: 0.1 * (x + n), x, noise(tree, k + 1))
        mine, after = new_update(g, state, x)
        theirs, _ = old_update(g, kind(*state), x)
        for u, v in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
            u, v = np.asarray(u), np.asarray(v)
            # In other classes the steps are other ones, not other in the last places.
            other = np.abs(u - v) > 1e-3 * np.maximum(np.abs(u), np.abs(v))
            apart += int(other.sum())
            u, v = u[~other], v[~other]
            gap = np.abs(u - v)
            ulps = max(ulps, float(np.max(gap / np.spacing(np.abs(v)), initial=0)))
            size = np.where(v == 0, 1, np.abs(v))
            relative = max(relative, float(np.max(gap / size, initial=0)))
        x = jax.tree.map(lambda x, u: x - u, x, mine)
        state = after
    n = sum(leaf.size for leaf in jax.tree.leaves(tree)) * steps
    return {"ulps": ulps, "relative": relative, "other class": apart, "of": n}


def cost(
    before: ModuleType, now: ModuleType, size: int, repeats: int, compilations: int
) -> list[dict[str, Any]]:
    """The time of a step and of compiling it, both versions by turns."""
    rows = []
    for name, tree in trees(size, 0, "float32").items():
        gradients = [
            jax.tree.map(lambda g, s=scale: jnp.asarray(g * s), noise(tree, 1))
            for scale in (1.0, 1.3, 0.8)
        ]
        for scope in SCOPES if name != "flat" else ("global",):
            for variant in VARIANTS:
                runs, compiled = {}, {}
                for label, version in (("before", before), ("now", now)):
                    tx = version.prunadag(0.1, variant=variant, scope=scope)
                    runs[label], compiled[label] = _step(
                        tx, tree, gradients, compilations
                    )
                runs["adagrad"], _ = _step(optax.adagrad(0.1), tree, gradients, 1)
                times = timing.interleave(runs, repeats)
                medians = {k: float(np.median(v)) for k, v in times.items()}
                rows.append(
                    {
                        "tree": name,
                        "scope": scope,
                        "variant": variant,
                        "before ms": medians["before"],
                        "now ms": medians["now"],
                        "now / before": float(
                            np.median(times["now"] / times["before"])
                        ),
                        "before / adagrad": medians["before"] / medians["adagrad"],
                        "now / adagrad": medians["now"] / medians["adagrad"],
                        "compile now / before": compiled["now"] / compiled["before"],
                        "compile s": compiled["now"],
                    }
                )
                print(
                    {
                        k: round(v, 3) if isinstance(v, float) else v
                        for k, v in rows[-1].items()
                    },
                    flush=True,
                )
    return rows


def _step(tx, tree, gradients, compilations):
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(x, state, g):
        updates, state = tx.update(g, state, x)
        return optax.apply_updates(x, updates), state

    held = [jax.tree.map(jnp.array, tree)]
    held.append(tx.init(held[0]))

    def compiled_anew():
        jax.clear_caches()
        began = time.perf_counter()
        return step.lower(*held, gradients[0]).compile(), time.perf_counter() - began

    programs, seconds = zip(
        *(compiled_anew() for _ in range(compilations)), strict=True
    )
    turn = itertools.cycle(gradients)

    def run():
        held[:] = programs[-1](*held, next(turn))
        jax.block_until_ready(held)

    return run, float(np.median(seconds))


def cost_of_bases(
    before: ModuleType, now: ModuleType, size: int, repeats: int
) -> list[dict[str, Any]]:
    """The time of four steps with Adam as the base, over that of Adam written out."""
    rows = []
    evaluate = {"params": "params", "pruned": "relevant"}
    settings = itertools.product(DENSITIES, evaluate, SCOPES)
    cases = itertools.product(trees(size, 0, "float32").items(), settings)
    for (name, tree), (density, at, scope) in cases:
        if name == "flat" and scope == "leaf":
            continue
        g = jax.tree.map(jnp.asarray, noise(tree, 1))
        own = {"where": lambda path, x: x.ndim > 1 or x.size == size, "scope": scope}
        runs = {
            "before": before.prunadag_w(
                1e-3, DENSITIES[density], evaluate=evaluate[at], **own
            )
        }
        for score in ("magnitude", "lamp"):
            runs[score] = now.pruning_aware(
                optax.adam(1e-3), DENSITIES[density], score=score, gradient_at=at, **own
            )
        calls = {k: _step(tx, tree, [g], 1)[0] for k, tx in runs.items()}
        # All four densities: the steps of one are not those of another.
        times = timing.interleave(
            {k: lambda run=run: [run() for _ in range(4)] for k, run in calls.items()},
            repeats,
        )
        rows.append(
            {"tree": name, "density": density, "gradient_at": at, "scope": scope}
            | {"before ms": round(float(np.median(times["before"])) / 4, 1)}
            | {
                f"{k} / before": round(timing.paired_ratio(v, times["before"]), 3)
                for k, v in times.items()
                if k != "before"
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", type=pathlib.Path, required=True)
    parser.add_argument("--equal", action="store_true")
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--cost-of-bases", action="store_true")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--size", type=float, default=1e7)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--compilations", type=int, default=5)
    arguments = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    before, now = load(arguments.before), importlib.import_module(NAME)
    print(before.__file__, now.__file__)
    if arguments.equal:
        equality(before, now, arguments.steps)
    if arguments.cost:
        cost(
            before, now, int(arguments.size), arguments.repeats, arguments.compilations
        )
    if arguments.cost_of_bases:
        cost_of_bases(before, now, int(arguments.size), arguments.repeats)


if __name__ == "__main__":
    main()
