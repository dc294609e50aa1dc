"""Timing by turns, and what the compiler says of a step.

What is compared takes turns within each round, in an order drawn anew each time, so
that neither a change of the machine's speed nor what a neighbour leaves in the caches
falls on one of them only. A step donates its parameters and its state, as training
loops do, and is timed until its results are there.
"""

import itertools
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from tqdm.auto import tqdm

_Item = TypeVar("_Item")
_Key = TypeVar("_Key", bound=Hashable)


def progress(items: Iterable[_Item], label: str) -> Iterable[_Item]:
    """The items, with a bar where the output is a terminal."""
    return tqdm(items, desc=label, leave=False, disable=None)


def interleave(
    runs: Mapping[_Key, Callable[[], Any]],
    repeats: int,
    *,
    every: Mapping[_Key, int] | None = None,
    warm_up: int = 3,
    label: str = "",
) -> dict[_Key, np.ndarray]:
    """Times several calls by turns.

    Args:
      runs: what to call, by name; a call returns when its work is done.
      repeats: timed rounds.
      every: for slow ones, by name: take part in each `every`-th round only, and in one
        round of the warm-up.
      warm_up: rounds before that which are not timed.
      label: what the progress bar says.

    Returns:
      Wall times, ms, shape [repeats], NaN in the rounds that a call sat out.
    """
    every = every or {}
    names, order = list(runs), np.random.default_rng(0)
    times = {name: np.full(repeats, np.nan) for name in names}
    rounds = range(-warm_up, repeats)
    for turn in progress(rounds, label):
        for i in order.permutation(len(names)):
            name = names[i]
            if (turn if turn >= 0 else turn + warm_up) % every.get(name, 1):
                continue
            began = time.perf_counter()
            runs[name]()
            if turn >= 0:
                times[name][turn] = 1e3 * (time.perf_counter() - began)
    return times


def spread(times: np.ndarray) -> dict[str, Any]:
    """Median and quartiles of wall times.

    Args:
      times: from `interleave`, ms.

    Returns:
      "median ms" and "quartiles ms".
    """
    low, median, high = np.nanquantile(times, (0.25, 0.5, 0.75))
    return {"median ms": float(median), "quartiles ms": [float(low), float(high)]}


def ratio(times: np.ndarray, base: np.ndarray) -> float:
    """Ratio of two medians."""
    return float(np.nanmedian(times) / np.nanmedian(base))


def paired_ratio(times: np.ndarray, base: np.ndarray) -> float:
    """Median of the ratios within each round that both took part in."""
    return float(np.nanmedian(times / base))


class Step(NamedTuple):
    """A compiled step and what its compilation tells.

    Attributes:
      run: takes one step, on from where the last one ended, and waits for it.
      compile_s: wall time of lowering and compiling, s.
      accessed: bytes that XLA expects to be accessed, or None if it does not say. It
        counts the body of a loop once.
      traced: how often the step has been traced so far, and so compiled.
      memory: bytes of temporaries ("temp"), of arguments, of outputs, and of outputs
        that take the place of donated arguments ("alias"); empty if XLA does not say.
    """

    run: Callable[[], Any]
    compile_s: float
    accessed: float | None
    traced: Callable[[], int]
    memory: dict[str, int]


def compile_step(
    step: Callable[..., tuple[Any, ...]], carry: tuple[Any, ...], inputs: Sequence[Any]
) -> Step:
    """Compiles a step that donates what it carries on.

    Args:
      step: function (*carry, input) -> carry.
      carry: its first carry, in buffers of its own, as they are donated.
      inputs: what it reads, one at every step, over and over.

    Returns:
      The `Step`.
    """
    traced = 0

    def counted(*arguments: Any) -> tuple[Any, ...]:
        nonlocal traced
        traced += 1
        return step(*arguments)

    jitted = jax.jit(counted, donate_argnums=tuple(range(len(carry))))
    began = time.perf_counter()
    compiled = jitted.lower(*carry, inputs[0]).compile()
    seconds = time.perf_counter() - began
    following = itertools.cycle(inputs)

    # Through `jitted`, whose call is the one that users make; it finds the program
    # compiled.
    def run() -> None:
        nonlocal carry
        carry = jax.block_until_ready(jitted(*carry, next(following)))

    cost: Any = compiled.cost_analysis()
    if isinstance(cost, list):  # a list of one in older versions of jax
        cost = cost[0] if cost else None
    memory: Any = compiled.memory_analysis()
    return Step(
        run,
        seconds,
        cost.get("bytes accessed") if cost else None,
        lambda: traced,
        {
            kind: getattr(memory, f"{kind}_size_in_bytes")
            for kind in ("temp", "argument", "output", "alias")
            if memory is not None
        },
    )
