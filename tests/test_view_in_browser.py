"""`ncalign view` in headless Chromium, from a file and from its server: it finds what the index finds, and keys work."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from socketserver import BaseServer
from typing import Any

import pytest

from ncalign.view.facts import shown
from ncalign.view.index import Index, open_index, write_index
from ncalign.view.page import page as page_of
from ncalign.view.queries import Query
from ncalign.view.server import listening
from test_pages_in_browser import CHROMIUM, FLAGS, WIDTHS, sync_api
from test_view import ABOUT, ENTRIES, WRITTEN

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")]

ASKED: list[dict[str, Any]] = [
    {"filters": "ties"},
    {"filters": "cut,copies"},
    {"order": "longest"},
    {"order": "disagree", "reverse": True},
    {"order": "alike", "filters": "disagree"},
    {"search": '"two three" one'},
    {"search": "京 model"},
    {"search": "don't"},
    {"search": "***"},
    {"search": "g7", "order": "file", "reverse": True},
]


@pytest.fixture(scope="module")
def index_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("index") / "i.sqlite"
    write_index(path, ENTRIES, lambda: ABOUT)
    return path


@pytest.fixture(scope="module")
def index(index_file: Path) -> Iterator[Index]:
    with closing(open_index(index_file)) as opened:
        yield opened


@pytest.fixture(scope="module")
def addresses(index_file: Path, index: Index, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Of the page as a file, and as a server has it."""
    path = tmp_path_factory.mktemp("page") / "view.html"
    path.write_text(page_of(index.about, beta=0.1, groups=[shown(entry, k, beta=0.1) for k, entry in enumerate(ENTRIES)]))
    with listening(index_file, port=0, beta=0.1) as (server, address):
        thread = threading.Thread(target=BaseServer.serve_forever, args=(server, 0.01))
        thread.start()
        yield {"file": path.as_uri(), "server": address}
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browsers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Any]]:
    with sync_api.sync_playwright() as playwright:
        contexts = {
            width: playwright.chromium.launch_persistent_context(
                tmp_path_factory.mktemp(f"profile-{width}"),
                executable_path=CHROMIUM,
                headless=True,
                args=[*FLAGS.split(), "--disable-sync"],
                viewport={"width": width, "height": 900},
                color_scheme="light" if width > 1000 else "dark",
            )
            for width in WIDTHS
        }
        yield contexts
        for context in contexts.values():
            context.close()


@pytest.fixture(params=WIDTHS)
def width(request: pytest.FixtureRequest) -> int:
    found: int = request.param
    return found


@pytest.fixture(params=["file", "server"])
def opened(request: pytest.FixtureRequest, width: int, browsers: dict[int, Any], addresses: dict[str, str]) -> Iterator[Any]:
    """The page, of which at the end nothing failed, nothing of others was run, and nothing was loaded from elsewhere."""
    told, loaded = [], []
    page = browsers[width].new_page()
    page.on("console", lambda message: told.append(message.text))
    page.on("pageerror", lambda error: told.append(str(error)))
    page.on("request", lambda asked: loaded.append(asked.url))
    page.goto(addresses[request.param])
    page.wait_for_selector("article")
    yield page
    assert page.evaluate("window.hit") is None
    page.close()
    assert told == []
    assert [url for url in loaded if not url.startswith(addresses[request.param])] == []


def places(page: Any) -> list[int]:
    """The groups that are shown, by their places."""
    return [int(text.split(".")[0]) - 1 for text in page.locator("article h2").all_inner_texts()]


def ask(page: Any, query: Query) -> None:
    """Set the page's controls, and wait for the answer."""
    for button in page.locator("#filters button").all():
        if (button.get_attribute("aria-pressed") == "true") != (button.get_attribute("data-name") in query.filters):
            button.click()
    page.locator("#order").select_option(query.order)
    page.locator("#reverse").set_checked(query.reverse)
    page.locator("#search").fill(query.search)
    page.locator("#search").press("Enter")


@pytest.mark.parametrize("number", range(len(ASKED)), ids=lambda number: str(ASKED[number]))
def test_filters_orders_and_searches_find_what_the_index_finds(number: int, opened: Any, index: Index) -> None:
    query = Query.model_validate(ASKED[number])
    expected = index.search(query)
    ask(opened, query)
    word = "group" if expected.total == 1 else "groups"
    sync_api.expect(opened.locator("#status")).to_have_text(re.compile(f"^{expected.total} {word} of 200, "))
    assert places(opened) == [place for place, _ in expected.entries]
    # What is asked for is in the address: a page that is loaded again shows the same.
    opened.reload()
    sync_api.expect(opened.locator("#status")).to_have_text(re.compile(f"^{expected.total} {word} of 200, "))
    assert places(opened) == [place for place, _ in expected.entries]


def test_it_fits_and_shows_hostile_text_as_text(opened: Any, width: int) -> None:
    assert opened.evaluate("[document.documentElement.scrollWidth, innerWidth]") == [width, width]
    for fold in opened.locator("summary:visible").all():
        fold.click()
    opened.locator("#search").fill("onerror")
    opened.locator("#search").press("Enter")
    sync_api.expect(opened.locator("#status")).not_to_have_text(re.compile("^200 "))
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    assert any(WRITTEN in text for text in opened.locator("article pre").all_inner_texts())
    assert opened.locator("img").count() == 0
    assert opened.locator("script:not([type='application/json'])").count() == 1


def test_keys_go_from_group_to_group_and_to_the_search(opened: Any) -> None:
    def current() -> int:
        [found] = opened.locator("article.current h2").all_inner_texts()
        return int(found.split(".")[0]) - 1

    opened.keyboard.press("j")
    assert current() == 0
    assert opened.evaluate("document.activeElement.matches('article.current')")
    opened.keyboard.press("ArrowRight")
    opened.keyboard.press("j")
    assert current() == 2
    opened.keyboard.press("k")
    opened.keyboard.press("ArrowLeft")
    opened.keyboard.press("k")
    assert current() == 0
    for _ in range(20):
        opened.keyboard.press("j")
    sync_api.expect(opened.locator("article.current h2")).to_have_text(re.compile(r"^21\. "))
    opened.keyboard.press("k")
    sync_api.expect(opened.locator("article.current h2")).to_have_text(re.compile(r"^20\. "))
    opened.keyboard.press("n")
    sync_api.expect(opened.locator("article.current h2")).to_have_text(re.compile(r"^21\. "))
    opened.keyboard.press("p")
    sync_api.expect(opened.locator("article.current h2")).to_have_text(re.compile(r"^1\. "))
    opened.keyboard.press("Enter")
    assert opened.locator("article.current.whole").count() == 1
    opened.keyboard.press("/")
    assert opened.evaluate("document.activeElement.id") == "search"
    # In the search keys are letters.
    opened.keyboard.type("jk")
    sync_api.expect(opened.locator("#status")).to_have_text(re.compile("^0 groups"))
    opened.locator("#search").fill("")
    sync_api.expect(opened.locator("#status")).to_have_text(re.compile("^200 groups"))
    opened.keyboard.press("Escape")
    assert current() == 0
    assert opened.evaluate("document.activeElement.id") != "search"


def test_the_last_page_ends_and_a_server_that_ended_is_told(index_file: Path, browsers: dict[int, Any]) -> None:
    page = browsers[WIDTHS[0]].new_page()
    with listening(index_file, port=0, beta=0.1) as (server, address):
        thread = threading.Thread(target=BaseServer.serve_forever, args=(server, 0.01))
        thread.start()
        page.goto(f"{address}#offset=180")
        page.wait_for_selector("article")
        assert places(page) == list(range(180, 200))
        assert page.locator("#next").is_disabled()
        assert page.locator("#where").inner_text() == "181–200 of 200"
        server.shutdown()
        thread.join()
    # A connection that is kept alive would still be answered by its thread, which ends with the process only.
    page.route("**/*", lambda route: route.abort())
    page.locator("#before").click()
    page.wait_for_selector("#status.bad")
    assert "has ncalign view ended?" in page.locator("#status").inner_text()
    page.close()
