"""The argument `score` of everything that prunes: a name, a function or a tree."""

from typing import Any

import jax
import optax

from prunadag_optax._common import checks
from prunadag_optax._common.leaves import Parts
from prunadag_optax._ranking.lamp import lamp_scores

# "magnitude", "lamp", a function params -> tree of scores, or that tree.
Score = Any


def tree_of_scores(params: optax.Params, parts: Parts, score: Score) -> Any:
    """The tree that is ranked in place of the parameters; None: they themselves.

    Args:
      params: pytree of arrays.
      parts: what is ranked.
      score: a name, a function params -> tree, or the tree.

    Returns:
      Pytree like `params`, or None.

    Raises:
      ValueError: for an unknown name or a tree of another kind.
    """
    if isinstance(score, str):
        checks.score(score)
        # Within a layer the two have one order.
        if score == "magnitude" or not parts.together:
            return None
        return parts.map(lamp_scores, params, otherwise=params)
    scores = score
    if checks.is_function(score):
        checks.takes("score", score, "params")
        scores = score(params)
    checks.same_trees("score", scores, "params", params)
    paths_leaves = jax.tree_util.tree_leaves_with_path(scores)
    for i, *_ in parts.leaves:
        checks.real_leaf("score", *paths_leaves[i])
    return scores
