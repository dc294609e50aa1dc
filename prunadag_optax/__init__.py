"""prunAdag for JAX: train once, choose the sparsity afterwards."""

from prunadag_optax import export as export
from prunadag_optax import masks as masks
from prunadag_optax import plotting as plotting
from prunadag_optax import robustness as robustness
from prunadag_optax.classification import Bounds as Bounds
from prunadag_optax.classification import Classification as Classification
from prunadag_optax.classification import capped as capped
from prunadag_optax.classification import classify as classify
from prunadag_optax.prunadag import ScaleByPrunadagState as ScaleByPrunadagState
from prunadag_optax.prunadag import prunadag as prunadag
from prunadag_optax.prunadag import scale_by_prunadag as scale_by_prunadag
from prunadag_optax.selection import kth_largest_magnitude as kth_largest_magnitude

__all__ = [
    "Bounds",
    "Classification",
    "ScaleByPrunadagState",
    "capped",
    "classify",
    "export",
    "kth_largest_magnitude",
    "masks",
    "plotting",
    "prunadag",
    "robustness",
    "scale_by_prunadag",
]
__version__ = "0.1.0"
