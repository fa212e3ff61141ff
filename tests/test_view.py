"""`ncalign view`: numbers of a group, the index against a plain list, the page, the server, and runs."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import re
import socket
import sqlite3
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from socketserver import BaseServer
from typing import Any
from urllib.error import HTTPError

import pytest
import torch
from werkzeug.test import Client

from ncalign.audit.kernel import score_groups
from ncalign.audit.measures import measure_group
from ncalign.cli.app import Terminated, main
from ncalign.data.groups import Candidate, Group, read_groups, write_groups
from ncalign.objectives.targets import target_weights
from ncalign.view import view
from ncalign.view.config import ViewConfig
from ncalign.view.facts import Entry, facts_of, inverted_share, kernel_weights, searched, shown, with_logprobs, words_of
from ncalign.view.index import FORM, Index, in_memory, open_index, write_index
from ncalign.view.queries import FILTERS, ORDERS, Query, matches, plain_texts
from ncalign.view.runs import round_logprobs
from ncalign.view.server import application, listening
from online_runs import settings, write_inputs

HOSTILE = '</script><script>window.hit=1</script><img src=x onerror="window.hit=1">\x1b[2J\u202e{{ 7*7 }}'
WRITTEN = r'</script><script>window.hit=1</script><img src=x onerror="window.hit=1">\x1b[2J\u202e{{ 7*7 }}'
ABOUT = {"name": "some groups", "notes": ["a note"]}


def some_groups(number: int) -> list[Group]:
    """Groups with all that is filtered by: ties, cut and empty ones, copies, long ones, missing rewards and log-probs."""
    rng = random.Random(0)
    words = ["one", "two", "three", "東京", "naïve", "x_1", "7*8", "Don't", HOSTILE]
    groups = []
    for place in range(number):
        candidates = []
        for _ in range(rng.randrange(5)):
            text = " ".join(rng.choices(words, k=rng.randrange(12)))
            reward = rng.choice([0.0, 0.5, 1.0, None])
            logprob = rng.choice([None, -rng.randrange(1, 9)]) if place % 3 else None
            source = rng.choice([None, "model-a", HOSTILE])
            candidates.append(Candidate(text, reward, logprob, source, finished=rng.random() < 0.8))
        if len(candidates) > 1 and rng.random() < 0.2:
            candidates[1] = Candidate(candidates[0].completion, 0.5)
        prompt: Any = [{"role": "user", "content": f"Question {place} {rng.choice(words)}"}]
        groups.append(Group(f"g{place}", prompt if place % 2 else f"Question {place}", candidates))
    return groups


GROUPS = some_groups(200)
ENTRIES = [Entry(group) for group in GROUPS]
QUERIES = [
    {},
    *({"filters": one.name} for one in FILTERS),
    *({"order": one.name} for one in ORDERS),
    *({"order": one.name, "reverse": True, "filters": "unscored"} for one in ORDERS),
    {"filters": "ties,copies", "order": "longest"},
    {"filters": "cut", "search": "one two", "order": "disagree"},
    *({"search": text} for text in ("ONE", '"two three"', "京", '"x 1"', "x_1", "don't", "g7", "model a", "***", "absent")),
    {"search": 'one" OR "two', "filters": "ties"},
    {"offset": 30, "limit": 7, "order": "spread"},
    {"offset": 1000},
]


@pytest.fixture(scope="module")
def index_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("index") / "i.sqlite"
    write_index(path, ENTRIES, lambda: ABOUT)
    return path


@pytest.fixture
def index(index_file: Path) -> Iterator[Index]:
    with closing(open_index(index_file)) as opened:
        yield opened


def brute_force(query: Query) -> tuple[int, list[int]]:
    """How many groups a query keeps, and the places of its page, by looking at each group."""
    facts = [facts_of(entry, words_of(entry.group)) for entry in ENTRIES]
    least = sorted((one["longest"] or 0 for one in facts), reverse=True)[round(len(facts) * 0.1) - 1]
    kept = []
    for place, one in enumerate(facts):
        values = [(one[column], wanted) for column, wanted in query.conditions({"longest": least})]
        if all(value is not None and value >= wanted for value, wanted in values) and (
            not query.search or _found(place, query.search)
        ):
            kept.append(place)
    if query.column == "place":
        kept.sort(reverse=query.reverse)
    else:
        known = [place for place in kept if facts[place][query.column] is not None]
        unknown = [place for place in kept if facts[place][query.column] is None]
        known.sort(key=lambda place: (facts[place][query.column] or 0) * (1 if query.reverse else -1))
        kept = known + unknown
    return len(kept), kept[query.offset : query.offset + query.limit]


def _found(place: int, search: str) -> bool:
    return bool(re.search(r"\w", search)) and matches(plain_texts(searched(GROUPS[place])), search)


# --- Numbers ---------------------------------------------------------------------------------------------------------


def test_a_group_s_numbers() -> None:
    texts = ("a b c d e f", "a b c d e f", "a b c x y z", "", "long " * 20)
    rewards, logprobs = (1.0, 1.0, 0.0, None, 0.5), (-3.0, -4.0, -1.0, -9.0, -5.0)
    finished = (True, True, False, False, True)
    group = Group(
        "g", "p", [Candidate(*one[:3], finished=one[3]) for one in zip(texts, rewards, logprobs, finished, strict=True)]
    )
    assert facts_of(Entry(group), words_of(group)) == {
        "candidates": 5,
        "unscored": 1,
        "spread": 1.0,
        "flat": 0,
        "tied": 2,
        "empty": 1,
        "cut": 1,  # the empty one, which was cut too, is empty
        "copies": 1,
        "longest": 20,
        "likeness": measure_group(group).likeness[1].edit,  # 3 of 6 words, to the third
        "inverted": 3 / 5,  # the third is likelier than all three that score higher
    }


def test_numbers_that_can_not_be_told() -> None:
    group = Group("g", "p", [Candidate("a"), Candidate("b")])
    facts = facts_of(Entry(group), words_of(group))
    assert (facts["spread"], facts["likeness"], facts["inverted"], facts["tied"], facts["flat"]) == (None, None, None, 0, 0)
    equal = Group("g", "p", [Candidate("a", 1.0), Candidate("b", 1.0)])
    assert [facts_of(Entry(equal), words_of(equal))[name] for name in ("flat", "tied", "likeness")] == [1, 2, None]
    many = Group("g", "p", [Candidate(f"{k}", float(k)) for k in range(257)])
    assert [facts_of(Entry(many), words_of(many))[name] for name in ("copies", "likeness")] == [None, None]


@pytest.mark.parametrize(
    ("rewards", "logprobs", "share"),
    [
        ([1, 0], [-1, -2], 0.0),
        ([1, 0], [-2, -1], 1.0),
        ([1, 0], [-1, -1], None),
        ([1, 1], [-1, -2], None),
        ([2, 1, 0], [-2, -1, -3], 1 / 3),
        ([1, None, 0], [-2, -1, None], None),
        ([1, 0], [], None),
    ],
)
def test_pairs_that_the_model_ranks_the_other_way(rewards: list[Any], logprobs: list[Any], share: float | None) -> None:
    assert inverted_share(rewards, logprobs) == share


def test_the_kernel_s_weights_are_those_of_the_objectives() -> None:
    scores = [3.0, -20.0, 40.0, 7.0]
    found = kernel_weights(scores, [2, 3, 1], beta=0.1)
    values = torch.tensor([[40.0, 7.0, -20.0]], dtype=torch.float64)
    expected = target_weights(values, torch.ones(1, 3, dtype=torch.bool), alpha=1 / 0.1)[0].tolist()
    assert list(found) == [2, 3, 1]
    assert list(found.values()) == pytest.approx(expected, abs=1e-12)
    assert kernel_weights([3.0, None, 1.0], [1, 2], beta=0.1) == {}
    assert kernel_weights([], [1, 2], beta=0.1) == {}


def test_scores_are_log_ratios_where_both_are_known() -> None:
    group = Group("g", "p", [Candidate("a", 1.0, -5.0), Candidate("b", 0.0, -7.0)])
    assert Entry(group, (-1.0, -1.0)).scores == (4.0, 6.0)
    assert Entry(group).scores == (-5.0, -7.0)
    assert Entry(group, (-1.0, None)).scores == (-1.0, None)
    assert with_logprobs(group, (), (-1.0, None)).scores == (-1.0, -7.0)
    assert with_logprobs(group, (-1.0,), ()) == Entry(group)


# --- The index -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", QUERIES, ids=lambda asked: json.dumps(asked))
def test_a_query_finds_what_looking_at_each_group_finds(asked: dict[str, Any], index: Index) -> None:
    query = Query.model_validate(asked)
    found = index.search(query)
    assert (found.total, [place for place, _ in found.entries]) == brute_force(query)
    assert [entry for _, entry in found.entries] == [ENTRIES[place] for place, _ in found.entries]


def test_each_filter_keeps_some_of_the_groups_and_not_all(index: Index) -> None:
    for one in FILTERS:
        number, _ = brute_force(Query(filters=(one.name,)))
        assert 0 < number < len(GROUPS)
        assert index.about["counts"][one.name] == number
    assert index.about["groups"] == len(GROUPS)
    assert index.about["candidates"] == sum(len(group.candidates) for group in GROUPS)
    assert {one.name for one in ORDERS if index.about["orders"][one.name]} == {one.name for one in ORDERS}


def test_an_index_in_memory_is_the_same(index: Index) -> None:
    with closing(in_memory(ENTRIES, lambda: ABOUT)) as other:
        assert other.about == index.about
        assert [entry for _, entry in other.entries()] == ENTRIES


def test_an_index_is_whole_or_not_there_and_its_user_s_alone(tmp_path: Path) -> None:
    def broken() -> Iterator[Entry]:
        yield from ENTRIES[:3]
        raise ValueError("a bad row")

    path = tmp_path / "cache" / "i.sqlite"
    with pytest.raises(ValueError, match="a bad row"):
        write_index(path, broken(), lambda: ABOUT)
    assert list(path.parent.iterdir()) == []
    write_index(path, ENTRIES[:3], lambda: ABOUT)
    assert [file.name for file in path.parent.iterdir()] == ["i.sqlite"]
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)


def test_an_index_is_only_read(index_file: Path) -> None:
    with closing(open_index(index_file)) as index, pytest.raises(sqlite3.OperationalError, match="readonly"):
        index._connection.execute("DELETE FROM facts")


@pytest.mark.parametrize("content", [b"", b"no database" * 1000])
def test_a_damaged_index_is_told(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "i.sqlite").write_bytes(content)
    with pytest.raises(ValueError, match=r"i\.sqlite is damaged \(.*\): delete it"):
        open_index(tmp_path / "i.sqlite")


def test_an_index_of_another_form_is_told(tmp_path: Path) -> None:
    path = tmp_path / "i.sqlite"
    write_index(path, ENTRIES[:1], lambda: ABOUT)
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("UPDATE about SET form = 0")
    with pytest.raises(ValueError, match=f"form 0 where {FORM} is needed"):
        open_index(path)


# --- The page --------------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "groups.jsonl"
    write_groups(GROUPS, path)
    return path


def told_in(page: Path) -> dict[str, Any]:
    [block] = re.findall(r'<script type="application/json" id="told">(.*?)</script>', page.read_text(), flags=re.DOTALL)
    found: dict[str, Any] = json.loads(block)
    return found


def test_a_page_holds_all_and_is_run_by_our_script_alone(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "out" / "view.html"
    assert main(["view", str(data), "--output", str(page), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    counts = {one.name: brute_force(Query(filters=(one.name,)))[0] for one in FILTERS}
    assert result == {
        "groups": len(GROUPS),
        "candidates": sum(len(group.candidates) for group in GROUPS),
        "filters": counts,
        "page": str(page),
    }
    told = told_in(page)
    assert told["all"] == [shown(entry, place, beta=0.1) for place, entry in enumerate(ENTRIES)]
    text = page.read_text()
    assert text.count("<script>") == 1
    assert "<img" not in text
    assert not {"\x1b", "\u202e"} & set(text)
    assert json.dumps(WRITTEN)[1:-1] in json.dumps(told)
    [policy] = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    for kind, tag in (("style-src", "style"), ("script-src", "script")):
        [own] = re.findall(rf"<{tag}>(.*?)</{tag}>", text, flags=re.DOTALL)
        assert f"{kind} 'sha256-{base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()}'" in policy
    assert policy.startswith("default-src 'none'; ")
    assert "connect-src" not in policy


def test_a_page_says_why_a_filter_is_not_available(tmp_path: Path) -> None:
    write_groups([Group("g", "p", [Candidate("a", 1.0), Candidate("b", 0.0)])], tmp_path / "groups.jsonl")
    view.run_view(ViewConfig(data=str(tmp_path / "groups.jsonl"), output=tmp_path / "view.html"))
    told = told_in(tmp_path / "view.html")
    reasons = {one["name"]: one["reason"] for one in told["filters"]}
    assert reasons["disagree"].startswith("no group has log-probs of two candidates whose rewards differ")
    assert (reasons["longest"], reasons["ties"]) == ("", "no group here")
    assert {one["name"] for one in told["orders"] if one["reason"]} == {"disagree"}


def test_what_is_there_is_not_replaced_unasked(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "view.html"
    page.write_text("mine")
    assert main(["view", str(data), "--output", str(page)]) == 1
    assert f"error: {page} exists: --overwrite replaces it" in capsys.readouterr().err
    assert main(["view", str(data), "--output", str(data), "--overwrite"]) == 1
    assert "is what data reads" in capsys.readouterr().err
    assert main(["view", str(data), "--output", str(page), "--overwrite"]) == 0
    assert told_in(page)["groups"] == len(GROUPS)


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["absent.jsonl"], 1, "no such file"),
        (["{data}", "--round", "1"], 1, "is no run, and has no rounds"),
        (["{data}", "--port", "70000"], 2, "port"),
        ([], 2, "data"),
        (["{empty}"], 1, "has no group to show"),
    ],
)
def test_what_can_not_be_shown_is_told(
    words: list[str], code: int, told: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.jsonl").touch()
    given = [word.format(data=data, empty=tmp_path / "empty.jsonl") for word in words]
    assert main(["view", *given, "--output", str(tmp_path / "view.html")]) == code
    assert told in capsys.readouterr().err
    assert not (tmp_path / "view.html").exists()


# --- The server ------------------------------------------------------------------------------------------------------


@pytest.fixture
def client(index_file: Path) -> Client:
    return Client(application(index_file, "secret", beta=0.1))


@pytest.mark.parametrize("asked", QUERIES, ids=lambda asked: json.dumps(asked))
def test_the_server_answers_a_query(asked: dict[str, Any], client: Client) -> None:
    query = Query.model_validate(asked)
    total, places = brute_force(query)
    response = client.get("/secret/groups", query_string={name: str(value) for name, value in asked.items()})
    assert response.status_code == 200
    assert response.json == {"total": total, "groups": [shown(ENTRIES[place], place, beta=0.1) for place in places]}


@pytest.mark.parametrize(
    ("method", "path", "host", "code"),
    [
        ("GET", "/secret/", "127.0.0.1:80", 200),
        ("GET", "/secret/", "localhost:9000", 200),
        ("HEAD", "/secret/", "127.0.0.1", 200),
        ("GET", "/secret/groups", "evil.example", 400),
        ("GET", "/secret/", "evil.example:8000", 400),
        ("GET", "/secret/", "127.0.0.1.evil.example", 400),
        ("GET", "/secret/", "localhost@evil.example", 400),
        ("GET", "/", "127.0.0.1", 404),
        ("GET", "/groups", "127.0.0.1", 404),
        ("GET", "/secre/groups", "127.0.0.1", 404),
        ("GET", "/secret", "127.0.0.1", 404),
        ("GET", "/secret/../../etc/passwd", "127.0.0.1", 404),
        ("GET", "/secret/%2e%2e%2fetc%2fpasswd", "127.0.0.1", 404),
        ("GET", "/secret/index.sqlite", "127.0.0.1", 404),
        ("GET", "/sécret/", "127.0.0.1", 404),
        ("POST", "/secret/groups", "127.0.0.1", 405),
        ("DELETE", "/secret/", "127.0.0.1", 405),
        ("OPTIONS", "/secret/", "127.0.0.1", 405),
        ("GET", "/secret/groups?filters=none", "127.0.0.1", 400),
        ("GET", "/secret/groups?order=place", "127.0.0.1", 400),
        ("GET", "/secret/groups?limit=100000", "127.0.0.1", 400),
        ("GET", "/secret/groups?offset=-1", "127.0.0.1", 400),
        ("GET", f"/secret/groups?search={'a' * 501}", "127.0.0.1", 400),
        ("GET", "/secret/groups?file=/etc/passwd", "127.0.0.1", 400),
        ("GET", "/secret/groups?filters=ties&order=longest", "127.0.0.1", 200),
    ],
)
def test_the_server_answers_nothing_else(method: str, path: str, host: str, code: int, client: Client) -> None:
    response = client.open(path, method=method, headers={"Host": host})
    assert response.status_code == code
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["X-Frame-Options"] == "DENY"
    assert response.headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert response.headers["Cache-Control"] == "no-store"
    assert response.headers["Content-Security-Policy"].startswith("default-src 'none'; ")
    assert "frame-ancestors 'none'" in response.headers["Content-Security-Policy"]
    assert "Access-Control-Allow-Origin" not in response.headers
    if code >= 400:
        assert response.mimetype == "text/plain"
        assert len(response.data) < 300


def test_the_served_page_holds_no_group_and_may_ask_its_server(client: Client) -> None:
    html = client.get("/secret/").text
    assert "Question" not in html
    assert "connect-src 'self'" in html


def test_it_listens_on_this_machine_alone(index_file: Path) -> None:
    with listening(index_file, port=0, beta=0.1) as (server, address):
        assert server.socket.getsockname()[0] == "127.0.0.1"
        thread = threading.Thread(target=BaseServer.serve_forever, args=(server, 0.01))
        thread.start()
        try:
            with urllib.request.urlopen(f"{address}groups?filters=ties") as response:
                assert json.load(response)["total"] == brute_force(Query(filters=("ties",)))[0]
                assert response.headers["Server"] == "ncalign"
            request = urllib.request.Request(address, headers={"Host": "evil.example"})
            with pytest.raises(HTTPError, match="400"):
                urllib.request.urlopen(request)
        finally:
            server.shutdown()
            thread.join()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port: {port} can't be listened on"), listening(index_file, port=port, beta=0.1):
            pass


def test_many_groups_are_served_from_an_index_that_is_made_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    served: list[str] = []

    def answers(server: Any, poll_interval: float = 0.5) -> None:
        served.append(f"http://127.0.0.1:{server.port}/")
        raise KeyboardInterrupt

    monkeypatch.setattr(BaseServer, "serve_forever", answers)
    monkeypatch.setattr(view, "MOST_ON_A_PAGE", 10)
    words = ["view", str(data), "--cache_dir", str(tmp_path / "cache"), "--output", str(tmp_path / "view.html")]
    assert main(words) == 0
    said = capsys.readouterr()
    assert served[0] in said.out
    assert re.search(r"/[\w-]{22}/\n", said.out)
    [made] = (tmp_path / "cache" / "view").iterdir()
    before = made.stat().st_mtime_ns
    # With --json the address goes to stderr, and the result to stdout.
    assert main([*words, "--json"]) == 0
    said = capsys.readouterr()
    assert served[1] in said.err
    assert json.loads(said.out)["index"] == str(made)
    assert made.stat().st_mtime_ns == before
    assert main([*words, "--no_serve"]) == 1
    assert "has more than 10 groups, too many for a page" in capsys.readouterr().err
    write_groups(GROUPS[1:], data)
    assert main(words) == 0
    assert len([*made.parent.iterdir()]) == 2
    assert not (tmp_path / "view.html").exists()


def test_a_server_that_is_told_to_end_says_so(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ends(server: Any, poll_interval: float = 0.5) -> None:
        raise Terminated

    monkeypatch.setattr(BaseServer, "serve_forever", ends)
    assert main(["view", str(data), "--serve", "--cache_dir", str(tmp_path / "cache")]) == 143
    # A few groups that were indexed once make a page all the same.
    assert main(["view", str(data), "--output", str(tmp_path / "view.html"), "--cache_dir", str(tmp_path / "cache")]) == 0
    assert told_in(tmp_path / "view.html")["groups"] == len(GROUPS)


# --- Runs ------------------------------------------------------------------------------------------------------------


def shown_of(folder: Path, *words: str) -> dict[str, Any]:
    page = folder / "view.html"
    assert main(["view", *words, "--output", str(page), "--overwrite"]) == 0
    return told_in(page)


@pytest.mark.parametrize("kept", ["last visits", "nothing"])
def test_a_training_run_s_log_probs(
    kept: str, groups_file: Path, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCALIGN_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "run"
    words = ["train", "--model", str(tiny_model_dir), "--data", str(groups_file), "--output_dir", str(run)]
    words += ["--max_length", "128", "--report_to", "[]", "--learning_rate", "1e-30", "--objective", "mc_po"]
    words += ["--objective.beta", "0.5"]
    visits = ["--objective.proposals", "last_visit", "--objective.acceptance", "true"] if kept == "last visits" else []
    assert main([*words, "--max_steps", "4", "--save_steps", "4", *visits]) == 0
    told = shown_of(tmp_path, str(run))
    groups = [*read_groups(groups_file)]
    measured = [measure_group(group) for group in groups]
    settings = {"model": str(tiny_model_dir), "reference_model": None, "dtype": "float32", "max_length": 128}
    scored, _ = score_groups(groups, measured, string_prompts="auto", **settings)  # type: ignore[arg-type]
    seen = 0
    for place, expected in scored.items():
        candidates = told["all"][place]["candidates"]
        if any(one["reward"] is None for one in candidates):
            continue
        assert [one["reference"] for one in candidates] == pytest.approx(expected.scores, abs=1e-4)
        # The weights did not move, so that the policy's log-probs are the reference's.
        for one, value in zip(candidates, expected.scores, strict=True):
            if one["policy"] is not None:
                seen += 1
                assert one["policy"] == pytest.approx(value, abs=1e-4)
    assert (seen > 0) == (kept == "last visits")
    assert told["beta"] == 0.5
    assert any("Reference log-probs of" in note for note in told["notes"])
    assert any(("last visit, as step-00000004" if kept == "last visits" else "not kept") in note for note in told["notes"])
    # Code of a model is never run for a look at a run's data, and a model that is gone costs the log-probs alone.
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(str(tiny_model_dir), str(tmp_path / "gone")))
    told = shown_of(tmp_path, str(run))
    assert len(told["all"]) == len(groups)
    assert all(one["reference"] is None for group in told["all"] for one in group["candidates"])
    assert any(note.startswith("No log-probs: ") for note in told["notes"])


def test_an_online_run_s_rounds(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NCALIGN_CACHE", str(tmp_path / "cache"))
    write_inputs(tmp_path)
    fields = settings(tmp_path, tiny_model_dir, "run")
    (tmp_path / "run.yaml").write_text(json.dumps({name: _written(value) for name, value in fields.items()}))
    assert main(["online", "--config", str(tmp_path / "run.yaml")]) == 0
    run = Path(fields["output_dir"])
    first = shown_of(tmp_path, str(run), "--round", "1")
    pool = [*read_groups(run / "rounds" / "000" / "pool.jsonl")]
    assert [group["id"] for group in first["all"]] == [group.id for group in pool]
    known = [one for group in first["all"] for one in group["candidates"] if one["policy"] is not None]
    assert known
    # In the first round the policy is the reference.
    assert all(one["reference"] in (None, one["policy"]) for one in known)
    assert any(one["reference"] is not None for one in known)
    last = shown_of(tmp_path, str(run))
    assert "round 3" in last["name"]
    assert main(["view", str(run), "--round", "9", "--output", str(tmp_path / "view.html"), "--overwrite"]) == 1
    assert "keeps the candidates of rounds 1, 2, 3" in capsys.readouterr().err


def _written(value: Any) -> Any:
    return str(value) if isinstance(value, os.PathLike) else value


def write_round(folder: Path, texts: list[list[str]], policy: list[Any], reference: list[Any]) -> None:
    """A round whose artefacts hold these samples, with log-probs -1, -2 and so on as they were generated."""

    def seal(content: Any, name: str) -> None:
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        (folder / name).write_text(json.dumps({"sha256": digest, "content": content}))

    samples = [
        [
            {"text": text, "num_tokens": 1, "finished": True, "token_ids": None, "logprob": -k - 1.0}
            for k, text in enumerate(row)
        ]
        for row in texts
    ]
    seal(samples, "generated-00000.json")
    seal({"policy": policy, "reference": reference}, "logprobs-00000.json")
    groups = [
        Group(f"g{number}", "p", [Candidate(text) for text in row if text]) for number, row in enumerate(texts) if any(row)
    ]
    write_groups(groups, folder / "pool.jsonl")


@pytest.mark.parametrize(
    ("texts", "policy", "reference", "mixed", "found"),
    [
        # Each completion has text; the second prompt has none at all, and no place among the groups.
        ([["a", "b"], ["", ""]], [[-3, -4]], [[-5, -6]], False, {"g0": ((-3, -4), (-5, -6))}),
        # Log-probs of all samples, or of those with text.
        ([["a", "", "c"]], [[-3, -4, -5]], [None], False, {"g0": ((-3, -5), ())}),
        ([["a", "", "c"]], [[-3, -5]], [None], False, {"g0": ((-3, -5), ())}),
        # Those of the data's own candidates follow.
        ([["a", "b"]], [[-3, -4, -9]], [[-5, -6, -9]], True, {"g0": ((-3, -4), (-5, -6))}),
        # Which is whose can't be told: those that generation counted.
        ([["a", "", "c"]], [[-3, -4, -5]], [None], True, {"g0": ((-1, -3), ())}),
        ([["a"], ["b"]], [[-3]], [[-4]], False, {"g0": ((-1,), ()), "g1": ((-1,), ())}),
    ],
)
def test_log_probs_go_to_their_candidates(
    texts: list[list[str]], policy: list[Any], reference: list[Any], mixed: bool, found: dict[str, Any], tmp_path: Path
) -> None:
    write_round(tmp_path, texts, policy, reference)
    assert round_logprobs(tmp_path, mixed=mixed)[0] == found


def test_samples_that_are_not_the_pool_s_are_not_used(tmp_path: Path) -> None:
    write_round(tmp_path, [["a", "b"]], [[-3, -4]], [None])
    write_groups([Group("g0", "p", [Candidate("a")])], tmp_path / "pool.jsonl")
    assert round_logprobs(tmp_path, mixed=False) == ({}, ("No log-probs: the round's samples are not those of its pool.",))
