"""How a user installs an extra of this ncalign: by its name, or from the folder that it was installed from."""

from __future__ import annotations

import json
import shlex
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname


def install_hint(extra: str) -> str:
    """The command that installs an extra.

    A package index need not have this version, so an ncalign that was installed from a folder is named by that folder, which
    pip records (PEP 610).

    >>> install_hint("demo").startswith("pip install ")
    True
    """
    folder, editable = _from_folder()
    if folder is None:
        return f"pip install 'ncalign[{extra}]'"
    return f"pip install {'-e ' * editable}{shlex.quote(f'{folder}[{extra}]')}"


def install_pattern() -> str:
    """The same for any extra, without naming a folder: for texts that are shown to others.

    >>> "[NAME]" in install_pattern()
    True
    """
    folder, editable = _from_folder()
    if folder is None:
        return "pip install 'ncalign[NAME]'"
    return f"pip install {'-e ' * editable}'.[NAME]', in the folder that ncalign was installed from"


def _from_folder() -> tuple[Path | None, bool]:
    """The folder that ncalign was installed from, where there is one, and whether it is run from there."""
    origin = _origin()
    folder = Path(url2pathname(urlsplit(str(origin.get("url", ""))).path))
    if "dir_info" not in origin or not (folder / "pyproject.toml").is_file():
        return None, False
    return folder, bool(origin["dir_info"].get("editable"))


def _origin() -> dict[str, Any]:
    """What pip recorded of where ncalign was installed from; empty where it came from an index."""
    try:
        recorded = distribution("ncalign").read_text("direct_url.json")
    except PackageNotFoundError:
        # Run from its source, without having been installed.
        return {"dir_info": {"editable": True}, "url": Path(__file__).resolve().parents[3].as_uri()}
    origin: dict[str, Any] = json.loads(recorded) if recorded else {}
    return origin
