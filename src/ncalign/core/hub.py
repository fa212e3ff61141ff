"""Whether a hub id names something, asked once and with a time limit: the libraries themselves retry for a minute."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

TIMEOUT_SECONDS = 8.0
"""Of the one question: a network that drops everything must not take longer."""


def only_cached(name: str, *, what: str, kind: Literal["model", "dataset"] = "model") -> bool:
    """Look for a model folder or hub id before a library does.

    Args:
        name: a folder, or a hub id.
        what: what the name stands for, for messages.
        kind: of the hub's repository.

    Returns:
        Whether to load it from the hub's cache alone: the hub can't be reached, or refuses, and the cache has it.

    Raises:
        ValueError: it is no folder, and the hub doesn't have it or can't be asked.
    """
    if Path(name).exists():
        return False
    # Imported where it is needed: the command line must answer before.
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError

    snapshots = Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}" / "snapshots"
    cached = snapshots.is_dir() and any(snapshots.iterdir())
    try:
        ask = HfApi().model_info if kind == "model" else HfApi().dataset_info
        ask(name, timeout=TIMEOUT_SECONDS)
    except HFValidationError:
        reason = "it has not the form owner/name"
    except RepositoryNotFoundError:
        reason = "the hub has none of this name, or lets only others read it (hf auth login): check the name"
    except OfflineModeIsEnabled:
        reason = "it is not in the hub's cache, and HF_HUB_OFFLINE forbids asking the hub: check the name, or unset it"
    except Exception as error:  # classes of the library's own HTTP client, which differ from version to version
        cause = str(error).strip().split("\n", 1)[0] or type(error).__name__
        unreachable = f"{constants.ENDPOINT} can't be asked ({cause})"
        reason = f"it is not in the hub's cache, and {unreachable}: check the name and the network"
    else:
        return False
    if cached:
        return True
    raise ValueError(
        f"{what} {name!r}: there is no such folder (relative paths start at {Path.cwd()}), and as a hub id: {reason}"
    )
