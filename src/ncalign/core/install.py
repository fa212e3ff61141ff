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
    origin = _origin()
    folder = Path(url2pathname(urlsplit(str(origin.get("url", ""))).path))
    if "dir_info" not in origin or not (folder / "pyproject.toml").is_file():
        return f"pip install 'ncalign[{extra}]'"
    return f"pip install {'-e ' * bool(origin['dir_info'].get('editable'))}{shlex.quote(f'{folder}[{extra}]')}"


def _origin() -> dict[str, Any]:
    """What pip recorded of where ncalign was installed from; empty where it came from an index."""
    try:
        recorded = distribution("ncalign").read_text("direct_url.json")
    except PackageNotFoundError:
        # Run from its source, without having been installed.
        return {"dir_info": {"editable": True}, "url": Path(__file__).resolve().parents[3].as_uri()}
    origin: dict[str, Any] = json.loads(recorded) if recorded else {}
    return origin
