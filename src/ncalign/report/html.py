"""HTML pages from templates that escape every value, with pictures inside: a page needs no network and no script."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ncalign.core.atomic import write_text_atomic
from ncalign.core.terminal import visible

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
_ENVIRONMENT.filters["base64"] = lambda data: base64.b64encode(data).decode()


def render(template: str, **values: object) -> str:
    """A page as HTML, from a file of ``templates/`` (without its ending) and its values; a missing value is an error."""
    return _ENVIRONMENT.get_template(f"{template}.html.j2").render(values)


def write_run_page(run_folder: Path, template: str, **values: object) -> Path:
    """Write ``report.html``, named after its folder, into a run folder."""
    page = run_folder / "report.html"
    write_text_atomic(render(template, name=run_folder.name, **values), page)
    return page


def png(figure: Figure) -> bytes:
    """A figure as a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def label_axes(axes: Axes, title: str, x: str, y: str) -> None:
    """Name a plot and its axes, and draw a faint grid; a legend is added where several lines have names."""
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(fontsize="small")
