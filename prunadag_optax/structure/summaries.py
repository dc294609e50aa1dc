"""What a choice of units leaves of each group."""

import numpy as np

from prunadag_optax._common import tables
from prunadag_optax.structure.costs import cost
from prunadag_optax.structure.groups import Structure
from prunadag_optax.structure.trees import Keep, checked_keep


class Units(tables.Table):
    """One row a group, then the model, from `summary`.

    Attributes:
      columns: "group", "units" of the full model, "kept" units, "params" that one unit
        fewer saves and, for a traced structure, "flops"; in the last row what is left
        in all.
    """


def summary(structure: Structure, keep: Keep | None = None) -> Units:
    """The units of each group, those that stay, and what one costs.

    Args:
      structure: of `trace` or `declare`.
      keep: group's name -> bool[size]; None keeps all units.

    Returns:
      A table that prints and exports, and that `plotting.plot_units` draws.

    Raises:
      ValueError: if `keep` does not fit.

    >>> import jax.numpy as jnp
    >>> from prunadag_optax import structure
    >>> params = {"in": jnp.ones((3, 8)), "out": jnp.ones((8, 2))}
    >>> s = structure.declare({"hidden": {"in": 1, "out": 0}}, params)
    >>> print(structure.summary(s, {"hidden": [True, False] * 4}))
    group   units  kept  params
    hidden      8     4       5
    model       8     4      20
    """
    kept = checked_keep(structure, {} if keep is None else keep)
    whole = cost(structure, kept)
    left = [
        int(np.sum(kept.get(group.name, np.ones(group.size, bool))))
        for group in structure.groups
    ]
    names = [group.name for group in structure.groups]
    sizes = [group.size for group in structure.groups]
    a_unit = [whole.units.get(name, (0, 0)) for name in names]
    columns = {
        "group": [*names, "model"],
        "units": [*sizes, sum(sizes)],
        "kept": [*left, sum(left)],
        "params": [*(round(params) for params, _ in a_unit), whole.params],
    }
    if whole.flops is not None:
        flops = [round(flops or 0) for _, flops in a_unit]
        columns["flops"] = [*flops, round(whole.flops)]
    return Units(columns)
