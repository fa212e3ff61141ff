"""Where ncalign keeps what it can make again: converted models, reference log-probs, answers and verdicts.

It holds what users asked and were answered: folders and files that are made here are their user's alone, whatever the umask.
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$NCALIGN_CACHE``, or ``ncalign`` in the user's cache folder (``$XDG_CACHE_HOME``, ``~/.cache``)."""
    own = os.environ.get("NCALIGN_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ncalign"


def private_folder(folder: Path) -> Path:
    """The folder, made with those above it that are missing, which nobody else may enter; one that is there stays as it is.

    Raises:
        OSError: it can't be made.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(mode=0o700, exist_ok=True)
    return folder


def make_private_file(path: Path) -> None:
    """Make an empty file that nobody else may read or write; one that is there stays as it is.

    Raises:
        OSError: it can't be made.
    """
    os.close(os.open(path, os.O_CREAT | os.O_RDWR | getattr(os, "O_CLOEXEC", 0), 0o600))
