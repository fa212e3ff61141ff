"""`ncalign report`: the page of one run, whatever verb it is of, or one page of several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ncalign.cli.config import ReportConfig
from ncalign.core.atomic import write_text_atomic
from ncalign.core.json import read_results
from ncalign.core.outputs import claim, record
from ncalign.report.evaluation_page import write_evaluation_page
from ncalign.report.html import PAGE
from ncalign.report.online_page import rewrite_rounds_report
from ncalign.report.page import write_report
from ncalign.report.runs import AUDIT, ONLINE_DEMO, STUDY, Kind, evaluations_in, kind_of, names_of, read_run
from ncalign.report.several_page import several_page

_VERBS: dict[Kind, str] = {
    "train": "train",
    "online": "online",
    "demo": "demo",
    "online demo": "demo",
    "evaluation": "evaluate",
    "audit": "audit",
    "study": "study",
}


def run_report(config: ReportConfig) -> dict[str, Any]:
    """Write the page, and return its path, the runs that are on it, and the printable ``text``.

    Raises:
        ValueError: a folder is no run's, a file in it is damaged, or something of another origin is in the way.
        OSError: the page can't be written.
    """
    folders = list(config.runs)
    names, kinds = names_of(folders), [kind_of(folder) for folder in folders]
    if len(folders) == 1:
        page = _page_of(folders[0], kinds[0], config.output, overwrite=config.overwrite)
    else:
        page = config.output or Path(PAGE)
        claim(page, verb="report", inputs={"runs": config.runs}, overwrite=config.overwrite)
        known = {folder.resolve() for folder in folders}
        folders += [inner for folder in config.runs for inner in evaluations_in(folder) if inner.resolve() not in known]
        names = names_of(folders)
        runs = [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]
        write_text_atomic(several_page(runs), page)
        kinds = [run.kind for run in runs]
    return {"page": str(page), "runs": dict(zip(names, kinds, strict=True)), "text": f"Report: {page}"}


def _page_of(folder: Path, kind: Kind, output: Path | None, *, overwrite: bool) -> Path:
    """The page of one run: its own, which is made anew, or a file elsewhere."""
    page = output or folder / ("audit.html" if kind == "audit" else PAGE)
    if output is not None:
        claim(page, verb="report", inputs={"runs": folder}, overwrite=overwrite)
    else:
        claim(folder, [page.name], verb="report", inputs={}, overwrite=True)
        record(folder, [page.name], verb=_VERBS[kind])
    if kind in ("train", "demo"):
        return write_report(folder, page)
    if kind == "online":
        return rewrite_rounds_report(folder, page)
    if kind == "evaluation":
        return write_evaluation_page(folder, page)
    if kind == "study":
        # These bring torch, which the other pages do without.
        from ncalign.study.page import write_page

        return write_page(folder, read_results(folder / STUDY), page)
    if kind == "audit":
        from ncalign.audit.page import write_page as write_audit_page

        return write_audit_page(page, read_results(folder / AUDIT))
    results = read_results(folder / ONLINE_DEMO)
    runs = [read_run(folder / arm) for arm in results["arms"]]
    title = f"{results['method']} on one pool, and sampled again"
    write_text_atomic(several_page(runs, title=title, comparison=results["comparison"]), page)
    return page
