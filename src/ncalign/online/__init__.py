"""`ncalign online`: rounds of generate, score, rank and train, in one run folder that survives interruptions."""

from ncalign.online.config import OnlineConfig
from ncalign.online.drift import Drift, estimate_drift
from ncalign.online.online import run_online, summary

__all__ = ["Drift", "OnlineConfig", "estimate_drift", "run_online", "summary"]
