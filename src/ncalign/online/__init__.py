"""`ncalign online`: rounds of generate, score, rank and train, in one run folder that survives interruptions."""

from ncalign.core.lazy import importer

__getattr__ = importer(
    __name__,
    drift="Drift estimate_drift",
    config="OnlineConfig",
    online="run_online summary",
)
