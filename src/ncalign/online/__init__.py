"""`ncalign online`: rounds of generate, score, rank and train, in one run folder that survives interruptions."""

from typing import TYPE_CHECKING

from ncalign.core.lazy import importer

if TYPE_CHECKING:
    from ncalign.online.config import OnlineConfig
    from ncalign.online.drift import Drift, estimate_drift
    from ncalign.online.online import run_online, summary

__all__ = ["Drift", "OnlineConfig", "estimate_drift", "run_online", "summary"]

__getattr__ = importer(
    __name__,
    {
        "Drift": "ncalign.online.drift",
        "OnlineConfig": "ncalign.online.config",
        "estimate_drift": "ncalign.online.drift",
        "run_online": "ncalign.online.online",
        "summary": "ncalign.online.online",
    },
)
