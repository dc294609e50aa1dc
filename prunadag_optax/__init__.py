"""prunAdag for JAX: train once, choose the sparsity afterwards."""

from prunadag_optax import evaluation as evaluation
from prunadag_optax import export as export
from prunadag_optax import masks as masks
from prunadag_optax import recipes as recipes
from prunadag_optax import schedules as schedules
from prunadag_optax import scores as scores
from prunadag_optax import structure as structure
from prunadag_optax._core.algorithm import ScaleByPrunadagState as ScaleByPrunadagState
from prunadag_optax._core.algorithm import prunadag as prunadag
from prunadag_optax._core.algorithm import scale_by_prunadag as scale_by_prunadag
from prunadag_optax._core.classes import Classification as Classification
from prunadag_optax._core.classes import classify as classify
from prunadag_optax._core.eval_params import eval_params as eval_params
from prunadag_optax._core.normalised_momentum import (
    scale_by_normalised_momentum as scale_by_normalised_momentum,
)
from prunadag_optax._core.pruning_aware import pruning_aware as pruning_aware
from prunadag_optax._core.variants import Bounds as Bounds
from prunadag_optax._core.variants import capped as capped
from prunadag_optax._ranking.threshold import (
    kth_largest_magnitude as kth_largest_magnitude,
)

__all__ = [
    "Bounds",
    "Classification",
    "ScaleByPrunadagState",
    "capped",
    "classify",
    "eval_params",
    "evaluation",
    "export",
    "kth_largest_magnitude",
    "masks",
    "prunadag",
    "pruning_aware",
    "recipes",
    "scale_by_normalised_momentum",
    "scale_by_prunadag",
    "schedules",
    "scores",
    "structure",
]
__version__ = "0.1.0"
