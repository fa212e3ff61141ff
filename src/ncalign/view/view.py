"""`ncalign view`: a page of up to 2,000 groups, or a server for more."""

from __future__ import annotations

from contextlib import closing
from functools import partial
from itertools import chain, islice
from pathlib import Path
from socketserver import BaseServer
from typing import Any

from ncalign.core.atomic import write_text_atomic
from ncalign.core.cache import cache_folder
from ncalign.core.outputs import claim
from ncalign.core.progress import say
from ncalign.core.store import Store
from ncalign.core.terminal import TalkStream
from ncalign.data.groups import ReadReport
from ncalign.view.config import ViewConfig
from ncalign.view.facts import shown
from ncalign.view.index import Index, in_memory, open_index, write_index
from ncalign.view.material import Material, data_material
from ncalign.view.page import page
from ncalign.view.runs import is_run, run_material
from ncalign.view.server import listening

MOST_ON_A_PAGE = 2000
_FOLDER = "view"


def run_view(config: ViewConfig) -> dict[str, Any]:
    """Write a page of groups, or serve them until Ctrl-C.

    Returns:
        ``groups``, ``candidates``, ``filters`` (how many groups each keeps), and the ``page`` or the ``index``.

    Raises:
        ValueError: the data can't be read, there are too many groups for a page, or the page is there already.
        OSError: page or index can't be written.
    """
    material = run_material(config) if is_run(Path(config.data)) else data_material(config)
    digest = material.digest()
    # What is streamed from elsewhere may have changed: it is indexed each time.
    name = f"streamed-{Store.key(material.name)}" if digest is None else digest
    path = (config.cache_dir or cache_folder()) / _FOLDER / f"{name}.sqlite"
    if digest is not None and path.is_file():
        with closing(open_index(path)) as index:
            if config.serve is not True and index.about["groups"] <= MOST_ON_A_PAGE:
                return _write_page(config, material, index)
        return _serve(config, material, path)
    report = ReadReport()
    with closing(material.entries(report)) as entries:
        first = [] if config.serve is True else [*islice(entries, MOST_ON_A_PAGE + 1)]
        if config.serve is not True and len(first) <= MOST_ON_A_PAGE:
            with closing(in_memory(first, partial(_about, material, report))) as index:
                return _write_page(config, material, index)
        _refuse_page(config)
        write_index(path, chain(first, entries), partial(_about, material, report))
    return _serve(config, material, path)


def _about(material: Material, report: ReadReport) -> dict[str, Any]:
    """What an index tells of its groups, once they are read."""
    if not report.groups:
        raise ValueError(f"{material.name} has no group to show: {report.summary()}")
    if notice := report.notice(material.name):
        say(notice)
    left_out = [f"{report.summary()}."] if report.skipped else []
    return {"name": material.name, "notes": [*material.notes(), *left_out]}


def _refuse_page(config: ViewConfig) -> None:
    if config.serve is False:
        raise ValueError(
            f"{config.data} has more than {MOST_ON_A_PAGE:,} groups, too many for a page: leave serve out for a server, or "
            "give a smaller file"
        )


def _write_page(config: ViewConfig, material: Material, index: Index) -> dict[str, Any]:
    claim(config.output, verb="view", inputs={"data": config.data}, overwrite=config.overwrite)
    groups = [shown(entry, place, beta=material.beta) for place, entry in index.entries()]
    write_text_atomic(page(index.about, beta=material.beta, groups=groups), config.output)
    found = _told(index)
    return {**found, "page": str(config.output), "text": f"{_summary(found)}\n{config.output}: open it in a browser"}


def _serve(config: ViewConfig, material: Material, path: Path) -> dict[str, Any]:
    """Serve until Ctrl-C, which is how this ends."""
    _refuse_page(config)
    with closing(open_index(path)) as index:
        found = _told(index)
    with listening(path, port=config.port, beta=material.beta) as (server, address):
        TalkStream().write(f"{_summary(found)}\n{address}\nOpen it in a browser of this machine; Ctrl-C ends the server.\n")
        try:
            # The library's own would take SIGTERM for Ctrl-C.
            BaseServer.serve_forever(server)
        except KeyboardInterrupt as stop:
            if type(stop) is not KeyboardInterrupt:  # SIGTERM
                raise
    return {**found, "index": str(path), "text": f"The index stays in {path} ({path.stat().st_size / 1e6:,.0f} MB)."}


def _told(index: Index) -> dict[str, Any]:
    about = index.about
    return {"groups": about["groups"], "candidates": about["candidates"], "filters": dict(about["counts"])}


def _summary(found: dict[str, Any]) -> str:
    kept = ", ".join(f"{name} {number:,}" for name, number in found["filters"].items() if number)
    return f"{found['groups']:,} groups with {found['candidates']:,} candidates ({kept or 'no filter keeps any'})"
