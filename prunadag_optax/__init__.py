"""prunAdag for JAX: train once, choose the sparsity afterwards."""

from prunadag_optax import export as export
from prunadag_optax import masks as masks
from prunadag_optax import plotting as plotting
from prunadag_optax import recipes as recipes
from prunadag_optax import robustness as robustness
from prunadag_optax import schedules as schedules
from prunadag_optax.classification import Bounds as Bounds
from prunadag_optax.classification import Classification as Classification
from prunadag_optax.classification import capped as capped
from prunadag_optax.classification import classify as classify
from prunadag_optax.prunadag import ScaleByPrunadagState as ScaleByPrunadagState
from prunadag_optax.prunadag import prunadag as prunadag
from prunadag_optax.prunadag import scale_by_prunadag as scale_by_prunadag
from prunadag_optax.selection import kth_largest_magnitude as kth_largest_magnitude
from prunadag_optax.stochastic import ScaleByPrunadagWState as ScaleByPrunadagWState
from prunadag_optax.stochastic import eval_params as eval_params
from prunadag_optax.stochastic import prunadag_w as prunadag_w

__all__ = [
    "Bounds",
    "Classification",
    "ScaleByPrunadagState",
    "ScaleByPrunadagWState",
    "capped",
    "classify",
    "eval_params",
    "export",
    "kth_largest_magnitude",
    "masks",
    "plotting",
    "prunadag",
    "prunadag_w",
    "recipes",
    "robustness",
    "scale_by_prunadag",
    "schedules",
]
__version__ = "0.1.0"
