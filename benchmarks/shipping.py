"""What a pruned model saves on disk and in time (`python -m benchmarks.shipping`).

File sizes: the demo's multilayer perceptron, trained with "prunAdag, magnitude", pruned
and written dense, deflated and compressed sparse. Time: x @ W for x [128, n] and a
pruned W [n, n], dense against BCOO; the two take turns, jitted and warmed up, on the
same pruned matrix. Combinations too slow to measure are named, with the reason.
"""

import argparse
import json
import pathlib
import platform
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from benchmarks import demo
from prunadag_optax import export, masks

RESULTS = pathlib.Path(__file__).parent / "results"
SHIPPED = (0.5, 0.8, 0.9, 0.95, 0.98)
SPARSITIES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999)
ROWS = 128
# A combination whose call would take longer than this, s, is not measured.
LONGEST = 2.0


def file_sizes(epochs: int) -> list[dict[str, Any]]:
    """Trains the demo's model and writes it at each of `SHIPPED`.

    Args:
      epochs: passes over the 4,000 training images.

    Returns:
      One row a sparsity: "sparsity", "test accuracy", and the bytes of each file.
    """
    x_train, x_test, y_train, y_test = demo.load_images()
    model = demo.MLP()

    @jax.jit
    def accuracy(params):
        logits: Any = model.apply(params, x_test)
        return (logits.argmax(-1) == y_test).mean()

    tx = demo.optimizers(epochs * (len(x_train) // demo.BATCH))["prunAdag, magnitude"]
    with tqdm(total=epochs, desc="training", unit="epoch", disable=None) as bar:
        params = demo.train(model, tx, x_train, y_train, epochs, bar)
    rows = []
    for sparsity in SHIPPED:
        pruned, mask = masks.prune(params, sparsity)
        columns = export.file_sizes(params, mask).to_dict()
        rows.append(
            {
                "sparsity": sparsity,
                "test accuracy": float(accuracy(pruned)),
                "bytes": dict(zip(columns["file"], columns["bytes"], strict=True)),
            }
        )
    return rows


def seconds(run: Callable[..., jax.Array], *arguments: Any) -> float:
    """Wall time of one call, s."""
    began = time.perf_counter()
    run(*arguments).block_until_ready()
    return time.perf_counter() - began


def compare(
    x: jax.Array, kernel: jax.Array, repeats: int, budget: float
) -> dict[str, Any]:
    """Times x @ kernel, dense and BCOO in turns.

    Args:
      x: [rows, n].
      kernel: [n, n], pruned.
      repeats: rounds at most.
      budget: s, after which no round starts once five are done.

    Returns:
      Medians and quartiles, ms, and the ratio of the medians, dense / BCOO.
    """

    def product(x, w):
        return x @ w

    kernels = {"dense": kernel, "bcoo": export.to_bcoo(kernel)}
    runs = {n: jax.jit(product).lower(x, w).compile() for n, w in kernels.items()}
    results = [run(x, kernels[name]) for name, run in runs.items()]
    scale = float(jnp.abs(results[0]).max()) + 1e-30
    assert float(jnp.abs(results[0] - results[1]).max()) < 1e-4 * scale
    times: dict[str, list[float]] = {name: [] for name in runs}
    began = time.perf_counter()
    for repeat in range(repeats):
        if repeat >= 5 and time.perf_counter() - began > budget:
            break
        for name, run in runs.items():
            times[name].append(1e3 * seconds(run, x, kernels[name]))
    row: dict[str, Any] = {"repeats": len(times["dense"])}
    for name, values in times.items():
        row[f"{name}_ms"] = float(np.median(values))
        row[f"{name}_quartiles_ms"] = np.quantile(values, (0.25, 0.75)).tolist()
    row["ratio"] = row["dense_ms"] / row["bcoo_ms"]
    return row


def products(sizes: list[int], repeats: int, budget: float) -> list[dict[str, Any]]:
    """Compares dense and BCOO at every size and sparsity, sparsest first.

    Args:
      sizes: values of n.
      repeats: rounds a combination, at most.
      budget: s a combination, see `compare`.

    Returns:
      One row a combination: "n", "sparsity" and what `compare` measures or, where a
      call would take over `LONGEST`, "skipped": the seconds it was expected to take.
    """
    rows = []
    combinations = [(n, s) for n in sizes for s in sorted(SPARSITIES, reverse=True)]
    measured: dict[int, float] = {}  # n -> s a nonzero, at the sparsity before
    for n, sparsity in tqdm(combinations, desc="matrix products", disable=None):
        nonzeros = n * n - round(sparsity * n * n)
        row: dict[str, Any] = {"n": n, "sparsity": sparsity}
        expected = measured.get(n, 0.0) * nonzeros
        if expected > LONGEST:
            rows.append({**row, "skipped": expected})
            continue
        keys = jax.random.split(jax.random.key(n))
        x = jax.random.normal(keys[0], (ROWS, n))
        kernel, _ = masks.prune(jax.random.normal(keys[1], (n, n)), sparsity)
        rows.append({**row, **compare(x, kernel, repeats, budget)})
        measured[n] = 1e-3 * rows[-1]["bcoo_ms"] / nonzeros
    return sorted(rows, key=lambda row: (row["n"], row["sparsity"]))


def wins(rows: list[dict[str, Any]]) -> list[str]:
    """For each size, one sentence: from which sparsity on BCOO is faster.

    BCOO wins where its upper quartile lies below the lower quartile of dense.
    """
    sentences = []
    for n in sorted({row["n"] for row in rows}):
        won = [
            row
            for row in rows
            if row["n"] == n
            and "skipped" not in row
            and row["bcoo_quartiles_ms"][1] < row["dense_quartiles_ms"][0]
        ]
        if won:
            first = min(won, key=lambda row: row["sparsity"])
            sentences.append(
                f"n = {n}: BCOO first wins at {100 * first['sparsity']:g}% "
                f"({first['ratio']:.2g} times as fast as dense)."
            )
        else:
            most = max(row["sparsity"] for row in rows if row["n"] == n)
            sentences.append(f"n = {n}: BCOO never wins, up to {100 * most:g}%.")
    return sentences


def sizes_to_markdown(rows: list[dict[str, Any]]) -> str:
    """The file sizes as a Markdown table, with the ratio to dense."""
    files = list(rows[0]["bytes"])
    head = " | ".join(["pruned", "test accuracy", *(f"{f}, bytes" for f in files)])
    lines = [f"| {head} |", "|---" * (len(files) + 2) + "|"]
    for row in rows:
        dense = row["bytes"][files[0]]
        cells = [f"{b:,} ({b / dense:.3f})" for b in row["bytes"].values()]
        shares = [f"{100 * row['sparsity']:g}%", f"{100 * row['test accuracy']:.1f}%"]
        lines.append(f"| {' | '.join(shares + cells)} |")
    return "\n".join(lines)


def products_to_markdown(rows: list[dict[str, Any]]) -> str:
    """The times as a Markdown table."""
    lines = [
        "| n | pruned | dense, ms (quartiles) | BCOO, ms (quartiles) | dense / BCOO |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        start = f"| {row['n']} | {100 * row['sparsity']:g}%"
        if "skipped" in row:
            reason = f"skipped: about {row['skipped']:.1f} s a call expected"
            lines.append(f"{start} | | {reason} | |")
            continue
        cells = []
        for name in ("dense", "bcoo"):
            low, high = row[f"{name}_quartiles_ms"]
            cells.append(f"{row[f'{name}_ms']:.3g} ({low:.3g}-{high:.3g})")
        lines.append(f"{start} | {' | '.join(cells)} | {row['ratio']:.3g} |")
    return "\n".join(lines)


def main() -> None:
    """Measures, prints the tables, writes them as JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--repeats", type=int, default=51)
    parser.add_argument("--budget", type=float, default=3.0)
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS)
    arguments = parser.parse_args()
    files = file_sizes(arguments.epochs)
    times = products(arguments.sizes, arguments.repeats, arguments.budget)
    verdict = wins(times)
    machine = (
        f"{jax.devices()[0].device_kind}, {platform.machine()}, jax {jax.__version__}"
    )
    points = "\n".join(f"- {sentence}" for sentence in verdict)
    text = (
        f"`python -m benchmarks.shipping` on {machine}\n\n"
        f"Files of the demo's 784-256-128-10 perceptron (float32, {arguments.epochs} "
        'epochs of "prunAdag, magnitude"; share of the kernel weights pruned; in '
        "brackets the ratio to dense as trained).\n\n"
        f"{sizes_to_markdown(files)}\n\n"
        f"Time of x [{ROWS}, n] @ W [n, n], float32, W dense and as BCOO.\n\n"
        f"{products_to_markdown(times)}\n\n{points}\n"
    )
    print(text)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "shipping.md").write_text(text)
    record = {"machine": machine, "files": files, "products": times, "wins": verdict}
    (arguments.output / "shipping.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
