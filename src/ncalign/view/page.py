"""The page of a browser: what its script is told, and its content security policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from ncalign.core.terminal import visible
from ncalign.report.html import asset, content_policy, render
from ncalign.view.queries import FILTERS, ORDERS

_NONE_KEPT = "no group here"


def page(about: Mapping[str, Any], *, beta: float, groups: Sequence[Mapping[str, Any]] | None) -> str:
    """The page as HTML; its texts are those of data and models, and are shown as text by its script.

    Args:
        about: of the index.
        beta: of the kernel.
        groups: all of them, as :func:`ncalign.view.facts.shown` writes them; None where the page asks a server for them.
    """
    told = {
        "name": visible(about["name"]),
        "groups": about["groups"],
        "candidates": about["candidates"],
        "notes": [*map(visible, about["notes"])],
        "beta": beta,
        "filters": [
            {
                "name": one.name,
                "label": one.label,
                "meaning": one.meaning,
                "column": one.column,
                "least": about["least"][one.name],
                "count": about["counts"][one.name],
                "reason": "" if about["counts"][one.name] else _reason(one.column, one.untold, about),
            }
            for one in FILTERS
        ],
        "orders": [
            {
                "name": one.name,
                "label": one.label,
                "column": one.column,
                "reason": "" if about["orders"][one.name] else one.untold or _NONE_KEPT,
            }
            for one in ORDERS
        ],
        "all": groups,
    }
    style, script = _assets()
    return render("view", name=about["name"], told=told, style=style, script=script, policy=policy(asks=groups is None))


def policy(*, asks: bool) -> Markup:
    """The content security policy of the page: our own style and script and, if it ``asks``, its own server."""
    return content_policy(*_assets(), asks=asks)


def _assets() -> tuple[Markup, Markup]:
    return asset("page.css") + asset("view.css"), asset("view.js")


def _reason(column: str, untold: str, about: Mapping[str, Any]) -> str:
    return _NONE_KEPT if column in about["known"] else untold or _NONE_KEPT
