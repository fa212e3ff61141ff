"""Where ncalign keeps what it can make again: converted models, reference log-probs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$NCALIGN_CACHE``, or ``ncalign`` in the user's cache folder (``$XDG_CACHE_HOME``, ``~/.cache``)."""
    own = os.environ.get("NCALIGN_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ncalign"
