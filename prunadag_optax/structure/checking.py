"""Is the structure right, and the small model the masked one? Measured, on inputs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prunadag_optax._common import checks
from prunadag_optax.structure.groups import Group, Structure, tied_outputs
from prunadag_optax.structure.rules import MIXED_FLAG, POSITIONAL_FLAG
from prunadag_optax.structure.small import small_apply
from prunadag_optax.structure.trees import (
    Keep,
    checked_keep,
    masked,
    masked_readers,
    not_traced,
    paths_of,
    shrink,
)


def check(
    structure: Structure,
    variables: Any,
    *inputs: Any,
    keep: Keep | None = None,
    tolerance: float = 1e-4,
    seed: int = 0,
) -> dict[str, float]:
    """Runs the model to see that the groups are right, or that the small model is.

    Without `keep`, the units of each group are permuted in all of its members, which
    must leave the output as it is; groups that are positional are left out. With
    `keep`, the small model is compared with the full one whose removed units are
    masked. Where that is not a number - a weight normalisation divides by what is
    masked - only what reads the units is masked.

    Args:
      structure: of `trace`.
      variables: the variables, in full.
      *inputs: example inputs.
      keep: group's name -> bool[size], or None.
      tolerance: largest deviation allowed, relative to the largest output.
      seed: of the permutations.

    Returns:
      Group's name -> relative deviation; with `keep`, {"small": deviation}.

    Raises:
      ValueError: if a deviation exceeds the tolerance, with the groups concerned.

    >>> import jax, jax.numpy as jnp
    >>> from prunadag_optax import structure
    >>> def apply(params, x):
    ...     return jax.nn.relu(x @ params["in"]) @ params["out"]
    >>> params = {"in": jnp.eye(3, 8), "out": jnp.ones((8, 2))}
    >>> s = structure.trace(apply, params, jnp.ones((1, 3)))
    >>> structure.check(s, params, jnp.ones((1, 3)))
    {'in': 0.0}
    """
    traced = not_traced(structure, "check")
    checks.scalar("tolerance", tolerance, above=0.0)
    _checked_variables(structure, variables)
    apply = jax.jit(traced.apply)
    if keep is not None:
        kept = checked_keep(structure, keep)
        small = jax.jit(small_apply(structure, kept))(
            shrink(structure, kept, variables), *inputs
        )
        expected = apply(masked(structure, kept, variables), *inputs)
        if not _is_finite(expected):
            expected = apply(masked_readers(structure, kept, variables), *inputs)
        small, expected = (
            without_state(structure, small),
            without_state(structure, expected),
        )
        deviation = relative(small, expected)
        if not deviation <= tolerance:
            mixed = [
                g.name
                for g in structure.groups
                if g.name in kept and MIXED_FLAG in g.flags
            ]
            raise ValueError(
                f"The small model deviates from the masked one by {deviation:.1e} of "
                f"the largest output, more than tolerance={tolerance:.0e}. "
                + (
                    f"A reduction runs over the units of {', '.join(mixed[:4])}, so "
                    "that masking and removing them differ; leave them whole, or give "
                    "a tolerance and fine-tune."
                    if mixed
                    else "Please report the model: its groups are wrong."
                )
            )
        return {"small": deviation}
    whole = apply(variables, *inputs)
    rng = np.random.default_rng(seed)
    deviations = {}
    for group in structure.groups:
        if POSITIONAL_FLAG not in group.flags:
            permuted = apply(permute(structure, group, variables, rng), *inputs)
            deviations[group.name] = relative(
                without_state(structure, permuted), without_state(structure, whole)
            )
    wrong = {
        name: value for name, value in deviations.items() if not value <= tolerance
    }
    if wrong:
        shown = ", ".join(
            f"{name} {value:.1e}" for name, value in list(wrong.items())[:6]
        )
        raise ValueError(
            f"Permuting the units of {len(wrong)} groups changes the output by more "
            f"than tolerance={tolerance:.0e}: {shown}. Please report the model, and "
            "keep these groups whole with freeze=."
        )
    return deviations


def _checked_variables(structure: Structure, variables: Any) -> None:
    given = dict(zip(paths_of(variables), jax.tree.leaves(variables), strict=True))
    for path in [*structure.shapes, *given]:
        got = jnp.shape(given[path]) if path in given else "no such leaf"
        known = structure.shapes.get(path)
        if known is None or known.shape != got:
            raise ValueError(
                f"variables must be the full ones that were traced, in which {path!r} "
                f"{f'has the shape {list(known.shape)}' if known else 'is no leaf'}; "
                f"got {got if isinstance(got, str) else list(got)}."
            )


def permute(
    structure: Structure, group: Group, tree: Any, rng: np.random.Generator
) -> Any:
    """The variables with a group's units in another order, in all members."""
    order = rng.permutation(group.size)
    leaves = dict(zip(paths_of(tree), jax.tree.leaves(tree), strict=True))
    for member in group.members:
        index = np.arange(structure.shapes[member.path].shape[member.axis])
        index[member.positions.ravel()] = member.positions[order].ravel()
        leaves[member.path] = jnp.take(leaves[member.path], index, axis=member.axis)
    return jax.tree.unflatten(jax.tree.structure(tree), list(leaves.values()))


def relative(output: Any, expected: Any) -> float:
    """The largest deviation of two outputs, relative to the largest number in them."""
    worst = 0.0
    for one, other in zip(
        jax.tree.leaves(output), jax.tree.leaves(expected), strict=True
    ):
        wide = np.complex128 if jnp.iscomplexobj(other) else np.float64
        one, other = (np.asarray(x, wide) for x in (one, other))
        # Infinities, as of masked logits, must be the same ones.
        differ = one != other
        scale = np.abs(other[np.isfinite(other)]).max(initial=0.0) or 1.0
        error = np.abs(one[differ] - other[differ])
        if np.isnan(error).any():
            return float("nan")
        worst = max(worst, float(error.max(initial=0.0) / scale))
    return worst


def _is_finite(tree: Any) -> bool:
    return all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(tree))


def without_state(structure: Structure, output: Any) -> list[Any]:
    """The outputs that are not new values of variables: those change with the units."""
    traced = not_traced(structure, "check")
    tied = tied_outputs(traced.state, output)
    leaves = enumerate(jax.tree.leaves(output))
    return [leaf for number, leaf in leaves if number not in tied]
