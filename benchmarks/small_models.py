"""What smaller networks save in time (`python -m benchmarks.small_models`).

A VGG-like network with BatchNorm, 64, 128 and 256 channels, on 32 images of 32 x 32
pixels, with random weights: full, with units masked, and with them removed. Forward
passes are jitted and timed by turns in one run; the small networks are compared with
the masked ones on the same images. The table goes to results/small_models.md.
"""

import argparse
import os
import pathlib
import platform

import jax

from benchmarks.examples.shrink import VGG, milliseconds
from benchmarks.speed_report import Table, to_markdown
from prunadag_optax import structure

NOTE = f"""Made by `python -m benchmarks.small_models` with jax {jax.__version__} on
{os.cpu_count()} {platform.machine()} CPU cores: a forward pass of a VGG-like network
with BatchNorm (64, 128 and 256 channels) over 32 images of 32 x 32 pixels, the median
of calls that take turns. "Parameters", "operations" and "time" are shares of the full
network's. "Deviation" is the largest difference to the masked network's output,
relative to the largest output. Units that are only masked cost as much as others."""
DENSITIES = (0.5, 0.25)
RESULTS = pathlib.Path(__file__).parent / "results" / "small_models.md"


def run(widths: tuple[int, ...] = (64, 128, 256), repeats: int = 30) -> str:
    """Times the networks.

    Args:
      widths: channels of the stages.
      repeats: timed calls of each network.

    Returns:
      The table, as Markdown.
    """
    module = VGG(widths)
    images = jax.random.normal(jax.random.key(1), (32, 32, 32, 3))
    variables = module.init(jax.random.key(0), images)
    found = structure.trace(module.apply, variables, images)
    scores = structure.scores(found, variables["params"])
    networks, costs, deviations = {"full": (module.apply, variables)}, {}, {}
    costs["full"] = whole = structure.cost(found)
    for density in DENSITIES:
        keep = structure.select(found, scores, density=density, per_group=True)
        left = f"{density:.0%} of the channels"
        masked = structure.masked(found, keep, variables)
        small = structure.shrink(found, keep, variables)
        networks[f"masked, {left}"] = (module.apply, masked)
        networks[f"small, {left}"] = (structure.small_apply(found, keep), small)
        costs[f"masked, {left}"] = whole
        costs[f"small, {left}"] = structure.cost(found, keep)
        deviations[f"small, {left}"] = structure.check(
            found, variables, images, keep=keep
        )["small"]
    medians = milliseconds(networks, images, repeats)
    rows = [
        {
            "network": name,
            "parameters": round(costs[name].params / whole.params, 3),
            "operations": round(costs[name].flops / whole.flops, 3),
            "ms": round(medians[name], 1),
            "time": round(medians[name] / medians["full"], 2),
            "deviation": f"{deviations[name]:.0e}" if name in deviations else "",
        }
        for name in networks
    ]
    return to_markdown(Table("What smaller networks save in time", NOTE, rows))


def main() -> None:
    """Writes the page and prints it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=30)
    table = run(repeats=parser.parse_args().repeats)
    RESULTS.write_text(f"#{table}\n")
    print(table)


if __name__ == "__main__":
    main()
