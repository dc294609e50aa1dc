"""From a trained model to a physically smaller one.

`trace` finds which axes of which parameters belong together, `scores` and `select`
choose units under a budget, `shrink` and `small_apply` give the smaller parameters and
a function that runs at the smaller sizes, `check` compares it with the masked model.
"""

from prunadag_optax.structure.checking import check as check
from prunadag_optax.structure.choose import scores as scores
from prunadag_optax.structure.choose import select as select
from prunadag_optax.structure.costs import Cost as Cost
from prunadag_optax.structure.costs import cost as cost
from prunadag_optax.structure.folding import fold as fold
from prunadag_optax.structure.groups import Frozen as Frozen
from prunadag_optax.structure.groups import Group as Group
from prunadag_optax.structure.groups import Member as Member
from prunadag_optax.structure.groups import Structure as Structure
from prunadag_optax.structure.groups import declare as declare
from prunadag_optax.structure.groups import trace as trace
from prunadag_optax.structure.rebuilt import check_rebuilt as check_rebuilt
from prunadag_optax.structure.small import small_apply as small_apply
from prunadag_optax.structure.summaries import Units as Units
from prunadag_optax.structure.summaries import summary as summary
from prunadag_optax.structure.trees import Keep as Keep
from prunadag_optax.structure.trees import groups_left as groups_left
from prunadag_optax.structure.trees import load_keep as load_keep
from prunadag_optax.structure.trees import masked as masked
from prunadag_optax.structure.trees import save_keep as save_keep
from prunadag_optax.structure.trees import shrink as shrink

__all__ = [
    "Cost",
    "Frozen",
    "Group",
    "Keep",
    "Member",
    "Structure",
    "Units",
    "check",
    "check_rebuilt",
    "cost",
    "declare",
    "fold",
    "groups_left",
    "load_keep",
    "masked",
    "save_keep",
    "scores",
    "select",
    "shrink",
    "small_apply",
    "summary",
    "trace",
]
