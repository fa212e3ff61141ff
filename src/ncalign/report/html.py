"""HTML pages from templates that escape every value, with style, script and data inside: a page needs no network.

A page's content security policy names the digests of our own style and script, so that a browser runs nothing else, whatever
the page's texts say.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ncalign.core.atomic import write_text_atomic
from ncalign.core.json import json_ready
from ncalign.core.terminal import visible

PAGE = "report.html"
"""The page of a run folder."""
# What would end a script element, or begin a comment in it.
_IN_SCRIPT = {ord(character): f"\\u{ord(character):04x}" for character in "<>&"}


def data_block(value: object) -> Markup:
    r"""A value as JSON for a script element that is no script: nothing in it ends the element.

    Raises:
        TypeError: JSON has no form for it.

    >>> print(data_block(["</script>"]))
    ["\u003c/script\u003e"]
    """
    text = json.dumps(_seen(json_ready(value)), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Markup(text.translate(_IN_SCRIPT))


def _seen(value: Any) -> Any:
    """A JSON value whose texts have control characters, and what reorders letters, written out."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, list):
        return [_seen(one) for one in value]
    return {visible(name): _seen(one) for name, one in value.items()} if isinstance(value, dict) else value


@cache
def asset(name: str) -> Markup:
    """A file of ``assets/``: our own style or script."""
    return Markup((files("ncalign.report") / "assets" / name).read_text(encoding="utf-8"))


def content_policy(style: str, script: str, *, asks: bool = False) -> Markup:
    """A content security policy under which this style and this script alone are used, and nothing is loaded.

    With ``asks`` the script may ask the server that the page came from.
    """
    digests = {
        name: f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        for name, text in {"style-src": style, "script-src": script}.items()
    }
    allowed = "; ".join(f"{name} {digest}" for name, digest in digests.items())
    server = "; connect-src 'self'" if asks else ""
    return Markup(f"default-src 'none'; {allowed}; img-src data:{server}; base-uri 'none'; form-action 'none'")


_ENVIRONMENT = Environment(
    loader=PackageLoader("ncalign.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    # A page's letters stand in the order in which they were written.
    finalize=lambda value: visible(value) if type(value) is str else value,
)
_ENVIRONMENT.filters |= {"data_block": data_block}


def render(template: str, **values: object) -> str:
    """A page as HTML, from a file of ``templates/`` (without its ending) and its values; a missing value is an error."""
    style, script = asset("page.css"), asset("page.js")
    fixed: Mapping[str, object] = {"style": style, "script": script, "policy": content_policy(style, script)}
    return _ENVIRONMENT.get_template(f"{template}.html.j2").render({**fixed, **values})


def write_run_page(run_folder: Path, template: str, page: Path | None = None, **values: object) -> Path:
    """Write the page of a run folder, named after it: ``report.html`` in it, or where ``page`` says."""
    target = run_folder / PAGE if page is None else page
    write_text_atomic(render(template, name=run_folder.resolve().name, **values), target)
    return target
