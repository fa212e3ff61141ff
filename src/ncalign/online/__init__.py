"""`ncalign online`: rounds of generate, score, rank and train, in one run folder that survives."""

from ncalign.online.drift import Drift, estimate_drift
from ncalign.online.run import run_online, summary
from ncalign.online_config import OnlineConfig

__all__ = ["Drift", "OnlineConfig", "estimate_drift", "run_online", "summary"]
