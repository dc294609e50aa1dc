"""How long tracing and shrinking take (`python -m tests.structure.times`).

Models of real sizes, from their shapes alone, each traced once and halved.
"""

import time

import jax
import numpy as np

from prunadag_optax import structure
from tests.structure.models import LARGE


def main():
    for name, make in LARGE.items():
        model = make()
        start = time.perf_counter()
        found = structure.trace(model.apply, model.variables, *model.inputs)
        traced = time.perf_counter()
        keep = {group.name: np.arange(group.size) % 2 == 0 for group in found.groups}
        shapes = jax.eval_shape(lambda tree: tree, model.variables)
        structure.shrink(found, keep, shapes)
        shrunk = time.perf_counter()
        print(
            f"{name}: {len(found.groups)} groups, traced in {traced - start:.2f} s, "
            f"shapes shrunk in {shrunk - traced:.3f} s"
        )


if __name__ == "__main__":
    main()
