"""Global sparse momentum in the published setting, which does less well here."""

from typing import Any

from benchmarks.systems import gsm
from benchmarks.systems.gsm import METRICS, QUICK, about, claims, draw, run

__all__ = ["METRICS", "QUICK", "TITLE", "Settings", "about", "claims", "draw", "run"]

TITLE = f"{gsm.TITLE}, published weight decay"


def Settings(**known: Any) -> gsm.Settings:  # noqa: N802 (stands for the class)
    """The published length and weight decay of GSM; dense training as in `gsm`."""
    published = gsm.PUBLISHED
    own = {
        "gsm_epochs": published.gsm_epochs,
        "weight_decay": published.weight_decay,
    }
    return gsm.Settings(**(own | known))
