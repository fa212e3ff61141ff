"""The site that `make docs` built: its formulas are drawn, also from disk and without a network.

Nothing is built here: `make docs` builds the site and runs these tests, and `make test` runs them again on what it left.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "site"
SOURCES = {".md", ".py", ".js", ".css"}
# Elements that HTML never closes.
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
CODE = {"code", "pre", "script", "style"}
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --virtual-time-budget=10000 --enable-logging=stderr --dump-dom"
).split()


class Page(HTMLParser):
    """A page's formulas, and its text outside formulas and code."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[tuple[str, bool]] = []
        self.formulas: list[str] = []
        self.text: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            is_formula = "arithmatex" in (dict(attrs).get("class") or "").split()
            self.open.append((tag, is_formula))
            if is_formula:
                self.formulas.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in (name for name, _ in self.open):
            while self.open.pop()[0] != tag:
                pass

    def handle_data(self, data: str) -> None:
        if any(is_formula for _, is_formula in self.open):
            self.formulas[-1] += data
        elif not any(name in CODE for name, _ in self.open):
            self.text.append(data)


@pytest.fixture(scope="module")
def pages() -> dict[str, Page]:
    """The pages of the built site by their path in it."""
    inputs = [path for folder in ("docs", "src") for path in (ROOT / folder).rglob("*") if path.suffix in SOURCES]
    newest = max(path.stat().st_mtime for path in [ROOT / "mkdocs.yml", *inputs])
    if not SITE.exists() or (SITE / "index.html").stat().st_mtime < newest:
        pytest.skip("site/ is missing or older than its sources: `make docs` builds it")
    return {path.relative_to(SITE).as_posix(): Page(path.read_text(encoding="utf-8")) for path in SITE.rglob("*.html")}


def opened(page: Path, folder: Path) -> str:
    """A page's HTML after its scripts ran in a headless browser, whose console stayed empty."""
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("no chromium on this machine")
    command = [browser, *FLAGS, f"--user-data-dir={folder / 'profile'}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr
    return done.stdout


def test_every_formula_is_marked_as_one(pages: dict[str, Page]) -> None:
    assert sum(len(page.formulas) for page in pages.values()) > 100
    for name, page in pages.items():
        left = re.search(r".*(?:\$|\\[a-zA-Z(\[]).*", "".join(page.text))
        assert left is None, f"{name}: LaTeX reaches the reader: {left[0].strip()}"


def test_doctests_are_code_and_not_quotations(pages: dict[str, Page]) -> None:
    for name, page in pages.items():
        assert ">>>" not in "".join(page.text), name
        assert "<blockquote>\n<blockquote>" not in (SITE / name).read_text(encoding="utf-8"), name


def test_nothing_is_loaded_from_elsewhere(pages: dict[str, Page]) -> None:
    for name in pages:
        html = (SITE / name).read_text(encoding="utf-8")
        assert not re.search(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=\"?(?:https?:)?//", html), name
    katex = SITE / "assets" / "katex"
    fonts = re.findall(r"url\((fonts/[^)]+\.woff2)\)", (katex / "katex.min.css").read_text(encoding="utf-8"))
    assert fonts
    assert [font for font in fonts if not (katex / font).exists()] == []


def test_a_method_page_draws_its_formulas_from_disk(pages: dict[str, Page], tmp_path: Path) -> None:
    drawn = opened(SITE / "methods" / "nca.html", tmp_path)
    assert drawn.count('class="katex-html"') == len(pages["methods/nca.html"].formulas) > 1
    assert "katex-error" not in drawn


def test_every_formula_of_the_site_can_be_drawn(pages: dict[str, Page], tmp_path: Path) -> None:
    formulas = sorted({formula for page in pages.values() for formula in page.formulas})
    assets = [(SITE / "assets" / name).as_uri() for name in ("katex/katex.min.js", "formulas.js")]
    scripts = "".join(f'<script src="{asset}"></script>' for asset in assets)
    page = tmp_path / "formulas.html"
    body = "".join(f'<div class="arithmatex">{escape(formula)}</div>\n' for formula in formulas)
    page.write_text(f'<!doctype html><meta charset="utf-8"><body>{body}{scripts}</body>', encoding="utf-8")
    drawn = opened(page, tmp_path)
    assert drawn.count('class="katex-html"') == len(formulas)
    assert re.findall(r'class="katex-error" title="([^"]*)"', drawn) == []
