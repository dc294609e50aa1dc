"""What a step of each method costs beside Adam's, and how large its state is."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import timing
from benchmarks.systems import records, training
from benchmarks.systems.records import Claim, Row
from prunadag_optax import masks, prunadag, recipes
from prunadag_optax.methods import (
    bregman,
    dual_averaging,
    frank_wolfe,
    hard_thresholding,
    proximal,
    sparse_momentum,
)
from prunadag_optax.methods import lottery_ticket as lt
from prunadag_optax.methods.penalties import regularisers

TITLE = "What a step costs"
METRICS = {"ms": 3, "/ Adam": 2, "state": 2, "compile s": 1}
ADAM = "Adam (optax)"


class Settings(NamedTuple):
    """Numbers of the measurement.

    Attributes:
      networks: by name, the sizes of the layers of multilayer perceptrons.
      repeats: timed rounds.
    """

    networks: dict[str, tuple[int, ...]] = {  # noqa: RUF012 (not changed)
        "LeNet-300-100": (784, *training.LENET, training.CLASSES),
        "10 layers of 1000": (1000,) * 11,
    }
    repeats: int = 40


QUICK = Settings(networks={"small": (64, 32, 10)}, repeats=3)


def methods(params: Any) -> dict[str, Callable[[], Any]]:
    """Every method with a step of its own, on these parameters, Adam first."""
    group_lasso, l1 = regularisers.group_lasso(1e-3), regularisers.l1(1e-3)
    size = sum(x.size for x in jax.tree.leaves(params))
    kept = masks.magnitude_mask(params, 0.9)
    controller = bregman.Controller(target=0.9)
    return {
        ADAM: lambda: optax.adam(1e-3),
        "momentum SGD (optax)": lambda: optax.sgd(1e-2, momentum=0.9),
        "prunAdag": lambda: prunadag(0.05, variant="v4"),
        "prunadag_w, targeted": lambda: recipes.targeted(1000, sparsity=0.9),
        "prunadag_w, any sparsity": lambda: recipes.any_sparsity(1000),
        "Frank-Wolfe, k-support": lambda: frank_wolfe.conditional_gradient(
            0.1, 10.0, 0.1
        ),
        "ProxSGD, group lasso": lambda: proximal.prox_sgd(1e-2, group_lasso, 0.9),
        "ProxGen, l1": lambda: proximal.prox_adam(1e-3, l1),
        "ProxGen, group lasso": lambda: proximal.prox_adam(1e-3, group_lasso),
        "ProxGen, group MCP": lambda: proximal.prox_adam(
            1e-3, regularisers.group_mcp(1e-3, 10.0)
        ),
        "RMDA, group lasso": lambda: dual_averaging.rmda(0.1, group_lasso),
        "RAMDA, group lasso": lambda: dual_averaging.ramda(0.1, group_lasso),
        "iterative hard thresholding of SGD": lambda: (
            hard_thresholding.iterative_hard_thresholding(optax.sgd(0.1), size // 10)
        ),
        "GSM": lambda: sparse_momentum.gsm(1e-2, 60),
        "LinBreg, l1": lambda: bregman.linbreg(0.1, l1),
        "LinBreg, l1, controller": lambda: bregman.linbreg(
            0.1, l1, adaptive=controller
        ),
        "AdaBreg, l1": lambda: bregman.adabreg(1e-3, l1),
        "Adam under a mask (lottery ticket, gradual pruning)": lambda: (
            lt.sparse_optimizer(optax.adam(1e-3), kept)
        ),
    }


def state_size(state: Any, params: Any) -> float:
    """Bytes of the state for each byte of the parameters.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> x = jnp.ones(1000)
      >>> round(state_size(optax.adam(1.0).init(x), x), 2)
      2.0
    """
    state_bytes, own = (
        sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(tree))
        for tree in (state, params)
    )
    return state_bytes / own


def measured(name: str, sizes: tuple[int, ...], repeats: int) -> list[Row]:
    """A row for each method on one network, all timed by turns."""
    params: Any = training.init_network(jax.random.key(0), sizes, training.KAIMING)
    keys = jax.random.split(jax.random.key(1), 2)
    gradients = [_like(key, params) for key in keys]
    steps, states = {}, {}
    for method, make in methods(params).items():
        tx = optax.with_extra_args_support(make())

        def step(params, state, gradient, tx=tx):
            updates, state = tx.update(gradient, state, params)
            return optax.apply_updates(params, updates), state

        own = jax.tree.map(jnp.copy, params)
        state = jax.jit(tx.init)(own)
        states[method] = state_size(state, params)
        steps[method] = timing.compile_step(step, (own, state), gradients)
    times = timing.interleave(
        {method: step.run for method, step in steps.items()}, repeats, label=name
    )
    return [
        records.row(
            f"{name}: {method}",
            {
                "ms": [timing.spread(times[method])["median ms"]],
                "/ Adam": [timing.ratio(times[method], times[ADAM])],
                "state": [states[method]],
                "compile s": [step.compile_s],
            },
            1e-3 * float(times[method].sum()),
        )
        for method, step in steps.items()
    ]


def _like(key: jax.Array, params: Any) -> Any:
    """Normal numbers in the shapes of the parameters."""
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    return treedef.unflatten(
        [
            0.01 * jax.random.normal(k, x.shape)
            for k, x in zip(keys, leaves, strict=True)
        ]
    )


def run(
    settings: Settings, data: training.Data | None, seeds: int
) -> tuple[list[Row], dict[str, Any]]:
    """Rows of every network; there are no curves, and neither data nor seeds matter."""
    del data, seeds
    rows = []
    for name, sizes in settings.networks.items():
        rows += measured(name, tuple(sizes), settings.repeats)
    return rows, {}


def about(settings: Settings) -> str:
    """What is measured, and how."""
    return (
        "Median wall time of one jitted, donated update on given gradients (no forward "
        f"or backward pass), {settings.repeats} rounds in which the methods take turns "
        "in random order; beside it the ratio to Adam's, the bytes of the state for "
        "each byte of the parameters, and the time to compile. Parameters: "
        + "; ".join(
            f"{name}, layers of {', '.join(map(str, sizes))}"
            for name, sizes in settings.networks.items()
        )
        + "; float32."
    )


def claims(rows: list[Row], settings: Settings) -> list[Claim]:
    """None: there is nothing published to hold this to."""
    del rows, settings
    return []


def draw(axes: Any, rows: list[Row], curves: dict[str, Any]) -> None:
    """Cost against Adam's; size of the state."""
    del curves
    names = [row.method for row in rows]
    for ax, metric, label in zip(
        axes, ("/ Adam", "state"), ("step / Adam's", "state / parameters"), strict=True
    ):
        ax.barh(names, [row.values[metric][0] for row in rows])
        ax.invert_yaxis()
        ax.set_xlabel(label)
        ax.grid(alpha=0.3, axis="x")
    axes[1].set_yticklabels([])
