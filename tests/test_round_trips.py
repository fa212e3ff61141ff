"""What is written is read back: generated groups of every kind of text, through every kind of file, and pairs."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ncalign.core.errors import DataError
from ncalign.data.formats.group import MAX_NUMBER
from ncalign.data.formats.pairs import Target, pairs_of, write_pairs
from ncalign.data.groups import Candidate, Group, convert, read_groups, write_groups

# Any character but halves of surrogate pairs, and those that readers and terminals stumble over.
SPECIAL = [
    "\x00",
    "\x1a",
    "\u2028",
    "\u2029",
    "\x85",
    "\ufeff",
    "\r",
    "\r\n",
    "\\",
    '"',
    "👩‍👩‍👧‍👦",
    "‏שלום",
    "‮abc‬",
    "e\u0301",
    "\U0010ffff",
]
texts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
    st.lists(st.sampled_from(SPECIAL), max_size=8).map("".join),
)
filled = texts.filter(bool)
numbers = st.one_of(st.none(), st.floats(-MAX_NUMBER, MAX_NUMBER))


def turns(first: str) -> st.SearchStrategy[list[dict[str, str]]]:
    """A conversation that begins with a role: a completion never repeats its prompt, which readers take off."""
    rest = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": texts}), max_size=2)
    return st.builds(lambda content, more: [{"role": first, "content": content}, *more], texts, rest)


values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=5,
)


@st.composite
def groups(draw: st.DrawFn) -> list[Group]:
    """A file of groups, all strings or all conversations, with 1 to 64 candidates."""
    talk = draw(st.booleans())
    found = []
    for number in range(draw(st.integers(1, 4))):
        completion = turns("assistant") if talk else texts
        completions = draw(st.lists(completion, min_size=1, max_size=3) | completion.map(lambda one: [one] * 64))
        candidates = [
            Candidate(completion, draw(numbers), draw(numbers), draw(st.none() | texts), draw(st.booleans()))
            for completion in completions
        ]
        prompt = draw(turns("user") if talk else filled)
        metadata = draw(st.dictionaries(texts, values, max_size=2))
        found.append(Group(f"{number}{draw(texts)}", prompt, candidates, metadata))
    return found


SETTINGS = settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
@SETTINGS
@given(given_groups=groups())
def test_groups_come_back_as_they_were(kind: str, given_groups: list[Group]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, other = Path(folder) / f"groups.{kind}", Path(folder) / "again.jsonl"
        assert write_groups(given_groups, path) == len(given_groups)
        assert list(read_groups(path)) == given_groups
        report = convert(path, other)
        assert (report.rows, report.groups, report.skipped) == (len(given_groups),) * 2 + (0,)
        assert list(read_groups(other)) == given_groups


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("target", ["best_vs_random", "best_vs_worst", "all_pairs"])
@SETTINGS
@given(given_groups=groups(), seed=st.integers(0, 3))
def test_pairs_keep_prompt_completions_and_both_rewards(
    kind: str, target: Target, given_groups: list[Group], seed: int
) -> None:
    expected = [
        (group.prompt, better.completion, worse.completion, better.reward, worse.reward)
        for group in given_groups
        for better, worse in pairs_of(group, target, seed)
    ]
    if not expected:
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"pairs.{kind}"
        assert write_pairs(given_groups, path, target=target, seed=seed) == len(expected)
        found = list(read_groups(path, schema="trl_preference", join_rows=False))
    pairs = [(g.prompt, *(c.completion for c in g.candidates), *(c.reward for c in g.candidates)) for g in found]
    assert pairs == expected
    assert all(better > worse for *_, better, worse in expected if better is not None and worse is not None)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
@pytest.mark.parametrize("part", SPECIAL)
def test_sixty_four_candidates_of_a_hundred_thousand_characters(kind: str, part: str, tmp_path: Path) -> None:
    text = (part * 100_000)[:100_000]
    group = Group("g", text, [Candidate(text, reward=float(k)) for k in range(64)], {"text": text})
    path = tmp_path / f"groups.{kind}"
    write_groups([group], path)
    assert list(read_groups(path)) == [group]


def test_all_pairs_of_very_many_candidates_are_refused(tmp_path: Path) -> None:
    many = Group("g", "p", [Candidate("a", reward=float(k)) for k in range(2001)])
    with pytest.raises(
        DataError, match="group 'g': target all_pairs makes 2,001,000 rows of its 2001 candidates, and 2000 is the"
    ):
        write_pairs([many], tmp_path / "pairs.jsonl", target="all_pairs", seed=0)
