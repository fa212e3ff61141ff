"""Groups on disk: prompts with scored candidates, read and validated row by row, and written whole or not at all."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

from ncalign.core.atomic import atomic_path, check_writable
from ncalign.core.errors import DataError, shown
from ncalign.data.config import OnBadRow, Target
from ncalign.data.formats import (
    REWARDS_OF,
    TRL_PROMPTS,
    LeftOut,
    Schema,
    SchemaName,
    adapted,
    jsonl,
    native,
    parquet,
    recognise,
    schemas,
)
from ncalign.data.formats.group import JSON, Candidate, Group, Message, Text
from ncalign.data.formats.joined import PARTS_OF_PROMPT, JoinedRows, ReadRow, merge
from ncalign.data.formats.messages import with_lists
from ncalign.data.formats.pairs import write_pairs
from ncalign.data.formats.parsing import Row
from ncalign.data.formats.seen import Seen
from ncalign.data.formats.sources import Source, find_sources, kind_of
from ncalign.data.formats.values import json_row, without_odd

__all__ = [
    "JSON",
    "Candidate",
    "DataError",
    "Group",
    "Message",
    "ReadReport",
    "Text",
    "convert",
    "check_output",
    "read_groups",
    "recorded_steps",
    "rewards_origin",
    "write_groups",
]

NUM_EXAMPLES = 5
REWARD_STEPS = "reward_steps"
"""Key of a group's metadata that lists the steps that made its rewards."""


@dataclass(frozen=True)
class Rules:
    """What is done with rows as they are read.

    Attributes:
        on_bad_row: stop at a row that can't be used, or leave it out and count it.
        allow_empty: whether prompts without candidates are groups too.
        join_rows: whether rows with the same prompt are one group, in schemas whose rows are completions or pairs.
    """

    on_bad_row: OnBadRow = "error"
    allow_empty: bool = False
    join_rows: bool = True


@dataclass
class ReadReport:
    """Counts of what was read from a file.

    Attributes:
        rows: Rows read, blank lines not counted.
        groups: Groups handed on.
        skipped: Rows left out.
        joined: Rows that went into the group of an earlier row with the same prompt; ``rows`` is always
            ``groups + skipped + joined`` of what was read.
        joined_groups: Groups made of several rows.
        reasons: Rows left out, by kind of problem.
        examples: The whole messages of the first few.
        notes: What was read otherwise than it is written, as a text without its number, and how often.
        unread: Columns that are in the metadata alone, though a model might be meant to see them, and in how many rows.
        schema: The schema of the row read last.
        most: How many examples are kept.
    """

    rows: int = 0
    groups: int = 0
    skipped: int = 0
    joined: int = 0
    joined_groups: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)
    unread: dict[str, int] = field(default_factory=dict)
    schema: SchemaName | None = None
    most: int = NUM_EXAMPLES

    def skip(self, error: DataError, rows: int = 1) -> None:
        """Count rows left out for an error, and keep the first few messages."""
        self.leave_out(error.reason, rows)
        if len(self.examples) < self.most:
            self.examples.append(str(error))

    def add(self, other: ReadReport) -> None:
        """Add another file's counts."""
        self.rows, self.groups = self.rows + other.rows, self.groups + other.groups
        self.joined, self.joined_groups = self.joined + other.joined, self.joined_groups + other.joined_groups
        for reason, rows in other.reasons.items():
            self.leave_out(reason, rows)
        self.examples = (self.examples + other.examples)[: self.most]
        self.note(other.notes)
        for name, rows in other.unread.items():
            self.unread[name] = self.unread.get(name, 0) + rows

    def note(self, notes: Mapping[str, int]) -> None:
        """Count what was read otherwise than it is written."""
        for text, number in notes.items():
            self.notes[text] = self.notes.get(text, 0) + number

    def leave_unread(self, columns: Iterable[str]) -> None:
        """Count a row's columns that no model sees, though it might be meant to."""
        for name in columns:
            self.unread[name] = self.unread.get(name, 0) + 1

    def listed(self) -> str:
        """Return the rows left out, by kind of problem, with the first few messages."""
        ordered = sorted(self.reasons.items(), key=lambda item: -item[1])
        kinds = ", ".join(f"{reason}: {count}" for reason, count in ordered)
        shown = [*self.examples, *([f"and {more} more"] if (more := self.skipped - len(self.examples)) > 0 else [])]
        return "\n".join([f"{self.skipped} ({kinds})", *(f"  {text}" for text in shown)])

    def leave_out(self, reason: str, rows: int = 1) -> None:
        """Count rows left out."""
        self.skipped += rows
        self.reasons[reason] = self.reasons.get(reason, 0) + rows

    def notice(self, path: str | Path) -> str:
        """Return what a user should know of rows left out, with the first few, and of those read otherwise; may be empty."""
        left_out = [f"note: {path}: {self.summary()}", *(f"  {example}" for example in self.examples)]
        return "\n".join([*(left_out if self.skipped else []), *(f"note: {path}: {text}" for text in self.counted_notes())])

    def counted_notes(self) -> list[str]:
        """Return the notes, each with its number."""
        joined = (
            f"{self.joined + self.joined_groups:,} rows joined into {self.joined_groups:,} groups by their prompt "
            "(join_rows: false keeps them apart)"
        )
        columns = ", ".join(f"`{name}` ({rows:,} rows)" for name, rows in self.unread.items())
        unread = (
            f"no model sees {columns}: kept in the metadata; what belongs to the prompt goes into `prompt` or `system`, and "
            "rewards of a pair into `chosen_reward` and `rejected_reward`"
        )
        notes = [f"{number} {text}" for text, number in self.notes.items()]
        return [*([joined] if self.joined else []), *notes, *([unread] if self.unread else [])]

    def summary(self) -> str:
        """Return one line of counts, and the reasons when rows were left out."""
        joined = f" of {self.groups + self.joined} rows" if self.joined else ""
        text = f"{self.rows} rows read, {self.groups} groups{joined}, {self.skipped} rows skipped"
        ordered = sorted(self.reasons.items(), key=lambda item: -item[1])
        reasons = ", ".join(f"{reason}: {count}" for reason, count in ordered)
        return f"{text} ({reasons})" if reasons else text


def read_groups(
    path: str | Path,
    *,
    schema: SchemaName = "auto",
    adapter: str | None = None,
    on_bad_row: OnBadRow = "error",
    report: ReadReport | None = None,
    allow_empty: bool = False,
    join_rows: bool = True,
) -> Generator[Group, None, None]:
    """Read groups one by one, validating each; the whole file is never in memory.

    Args:
        path: A .jsonl, .json, .csv, .tsv (each also with .gz) or .parquet file in any schema of docs/data.md; a folder of
            such files, read in the order of their names; a folder that `datasets` saved; or a hub id, ``owner/name``.
            ``folder:split`` and ``owner/name:split`` name one of several splits.
        schema: The schema, or "auto" to tell it by the first row's columns.
        adapter: ``file.py:function``, called with each row; it returns a row of our schema, or None to leave it out.
        on_bad_row: Stop at a row that can't be used, or leave it out and count it.
        report: Filled in while reading.
        allow_empty: Whether prompts without candidates are groups too.
        join_rows: Whether rows with the same prompt are one group, in schemas whose rows are completions or pairs.

    Returns:
        An iterator over the groups, in the order in which their prompts come first; where rows are joined, it begins once
        all are read. The file is closed at its end, on an error, or by ``close()``.

    Raises:
        ValueError: The file is not there or of no known kind; or, while iterating, a row that can't be used under
            ``on_bad_row="error"``, or a file that can't be read to its end.
    """
    if on_bad_row not in ("error", "skip"):
        raise DataError(f"on_bad_row is {on_bad_row!r}: `error` or `skip` is needed")
    tried = schemas(schema, allow_empty) if adapter is None else (adapted(adapter),)
    sources = find_sources(path)
    found = report if report is not None else ReadReport()
    return read_sources(sources, tried, Rules(on_bad_row, allow_empty, join_rows), report=found, many=len(sources) > 1)


def read_sources(
    sources: Sequence[Source],
    tried: tuple[Schema, ...],
    rules: Rules,
    *,
    report: ReadReport,
    many: bool,
) -> Generator[Group, None, None]:
    """Read sources one after the other, as :func:`read_groups` does, in one of the schemas ``tried``.

    ``many``: these are some of several files, so that ids which rows lack begin with the file's name.
    """
    with ExitStack() as stack:
        reader = _Reader(tried, rules, report, stack)
        for source in sources:
            with closing(reader.groups(source, prefix=f"{source.name}:" if many else "")) as groups:
                yield from groups
        yield from reader.joined()


def joins(source: Source, tried: tuple[Schema, ...]) -> bool:
    """Whether a source's first usable row is of a schema whose rows are joined by their prompt."""
    with closing(source.rows()) as rows:
        for _, row in rows:
            try:
                if isinstance(row, dict):
                    return recognise(with_lists(json_row(row)[0]), tried).joins
            except DataError:
                continue  # such a row is told, or left out, when it is read
    return False


def write_groups(groups: Iterable[Group], path: str | Path) -> int:
    """Write groups as they come; the file appears when the last one is written, and replaces an older one.

    Args:
        groups: The groups; their ids must differ.
        path: A .jsonl, .jsonl.gz or .parquet file; its folder is made when missing.

    Returns:
        How many groups were written.

    Raises:
        ValueError: Two groups share an id, or Parquet would need strings and conversations in one column.
        OSError: The file can't be written, for instance on a full disk.

    >>> import tempfile
    >>> group = Group(id="sum", prompt="2 + 2 = ", candidates=[Candidate("4", reward=1.0), Candidate("5", reward=0.0)])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     count = write_groups([group], f"{folder}/groups.jsonl")
    ...     list(read_groups(f"{folder}/groups.jsonl")) == [group]
    True
    """
    path = Path(path)
    kind = kind_of(path)
    distinct = _with_distinct_ids(groups)
    with atomic_path(path) as temporary:
        if kind == "parquet":
            return parquet.write_groups(distinct, temporary)
        rows = (native.to_row(group) for group in distinct)
        return jsonl.write_rows(rows, temporary, compressed=kind == "jsonl.gz")


def rewards_origin(path: str | Path, schema: SchemaName | None) -> str:
    """Where rewards came from, when the groups record nothing: the column of the schema, or the file.

    >>> rewards_origin("data/uf.jsonl", "ultrafeedback"), rewards_origin("data/own.jsonl", "ncalign")
    ('ultrafeedback: overall_score', 'given in own.jsonl')
    """
    named = None if schema is None else REWARDS_OF.get(schema)
    return f"given in {Path(path).name}" if named is None else f"{schema}: {named}"


def recorded_steps(group: Group) -> tuple[str, ...]:
    """The steps that made the group's rewards, from ``metadata["reward_steps"]``; empty where nothing is recorded.

    Raises:
        ValueError: It is not a list of strings.
    """
    found = group.metadata.get(REWARD_STEPS, [])
    if not isinstance(found, list) or not all(isinstance(step, str) for step in found):
        raise DataError(
            f"metadata.{REWARD_STEPS} is {shown(found)}: a list of strings is needed, which says how the rewards came to be; "
            "rename the entry if it means something else",
            reason="wrong type",
        )
    return tuple(found)


def check_output(path: str | Path) -> None:
    """Raise what ``write_groups`` would raise about the path, before hours of work.

    Raises:
        ValueError: The name does not tell the kind of file.
        OSError: No file can be written there.
    """
    kind_of(Path(path))
    check_writable(path)


def convertible(schema: SchemaName, adapter: str | None) -> tuple[Schema, ...]:
    """The schemas that `convert` accepts: the readable ones, and rows that hold a prompt alone."""
    if adapter is not None:
        return (adapted(adapter),)
    return (*schemas(schema, False), *((TRL_PROMPTS,) if schema == "auto" else ()))


def convert(
    input: str | Path,
    output: str | Path,
    *,
    schema: SchemaName = "auto",
    adapter: str | None = None,
    target: Target = "ncalign",
    seed: int = 0,
    on_bad_row: OnBadRow = "error",
    join_rows: bool = True,
) -> ReadReport:
    """Read any schema and write our own, or TRL's preference pairs.

    Returns:
        The counts of rows read, groups written and rows skipped.

    Raises:
        ValueError: As ``read_groups`` and ``write_groups``; also when no group is left to write.
        OSError: The output can't be written.
    """
    report, sources = ReadReport(), find_sources(input)
    tried, rules = convertible(schema, adapter), Rules(on_bad_row, join_rows=join_rows)
    with closing(read_sources(sources, tried, rules, report=report, many=len(sources) > 1)) as groups:
        checked = _at_least_one(groups, input, report)
        if target == "ncalign":
            write_groups(checked, output)
        else:
            write_pairs(checked, Path(output), target=target, seed=seed)
    return report


def _at_least_one(groups: Iterator[Group], path: str | Path, report: ReadReport) -> Iterator[Group]:
    yield from groups
    if report.groups == 0:
        examples = "".join(f"\n  {example}" for example in report.examples)
        raise DataError(f"{path}: no group to write: {report.summary()}{examples}", reason="no groups")


def _with_distinct_ids(groups: Iterable[Group]) -> Iterator[Group]:
    with closing(Seen()) as seen:
        for group in groups:
            if seen.add(group.id) is not None:
                origin = f"{group.origin}: " if group.origin else ""
                raise DataError(
                    f"{origin}group id {group.id!r} is used twice: ids must differ; rename one", reason="duplicate id"
                )
            yield group


class _Reader:
    """Rows → groups: the schema, the rules, ids seen so far, rows that wait for others with the same prompt."""

    def __init__(self, tried: tuple[Schema, ...], rules: Rules, report: ReadReport, stack: ExitStack) -> None:
        self._tried, self._rules, self._report, self._stack = tried, rules, report, stack
        self._seen = stack.enter_context(closing(Seen()))
        self._waiting: JoinedRows | None = None
        self._schema: Schema | None = None

    def groups(self, source: Source, *, prefix: str) -> Generator[Group, None, None]:
        """Yield a source's groups, except for those of rows that may be joined with others, and close the source.

        Ids made of row numbers begin with ``prefix``.
        """
        self._source, self._prefix, self._schema = source, prefix, None
        with closing(source.rows()) as rows:
            for number, row in rows:
                self._report.rows += 1
                read = self._read(number, row)
                if read is not None:
                    yield from self._used(read)

    def joined(self) -> Iterator[Group]:
        """Yield the groups of the rows that waited, each made of all rows with its prompt."""
        if self._waiting is not None:
            for rows in self._waiting.together():
                yield from self._checked(rows, allow_empty=False)

    def _used(self, row: ReadRow) -> Iterator[Group]:
        """Yield a row's group, or let it wait for others with the same prompt."""
        assert self._schema is not None
        if not (self._rules.join_rows and self._schema.joins):
            yield from self._checked([row], allow_empty=self._schema is TRL_PROMPTS)
            return
        if self._waiting is None:
            self._waiting = self._stack.enter_context(closing(JoinedRows()))
        self._waiting.add(row)

    def _read(self, number: int, row: Row | DataError) -> ReadRow | None:
        where = f"{self._source.label}:{self._source.unit}{number}"
        try:
            if isinstance(row, DataError):
                raise row
            row, missing, odd = json_row(row)
            row = with_lists(row)
            if self._schema is None:
                self._schema = recognise(row, self._tried)
                self._report.schema = self._schema.name
            row, left_out = without_odd(row, odd, self._schema.known(row))
            group = self._schema.read(row, f"{self._prefix}{number}", f"{self._source.name}:{number}")
            self._report.leave_unread(self._schema.unread(group, row))
            for notes in (self._schema.notes(row), missing, left_out):
                self._report.note(notes)
        except LeftOut:
            self._report.leave_out("left out by the adapter")
            return None
        except DataError as error:
            self._refuse(where, row.get("id") if isinstance(row, dict) else None, error)
            return None
        place = f"{self._source.unit or 'line '}{number}"
        shown_place = f"{self._source.name}, {place}" if self._prefix else place
        # The value of a part of the prompt is null now: whether it was the same as another row's can't be told.
        alone = bool(left_out) and not {*odd}.isdisjoint((*PARTS_OF_PROMPT, "metadata"))
        return ReadRow(where, shown_place, row.get("id") is not None, group, alone)

    def _checked(self, rows: list[ReadRow], *, allow_empty: bool) -> Iterator[Group]:
        """Yield the group that the rows make, unless it has no candidates or its id was used before."""
        try:
            group = merge(rows)
        except DataError as too_deep:  # a list of the rows' values is nested one level deeper than they are
            self._refuse(rows[0].where, rows[0].group.id, too_deep, rows=len(rows))
            return
        if not group.candidates and not self._rules.allow_empty and not allow_empty:
            error = DataError("candidates is empty: at least one completion is needed", reason="no candidates")
        else:
            before = self._seen.add(group.id, rows[0].place)
            if before is None:
                self._report.groups += 1
                self._report.joined += len(rows) - 1
                self._report.joined_groups += len(rows) > 1
                yield group
                return
            error = DataError(f"the id was used before, at {before}: ids must differ", reason="duplicate id")
        self._refuse(rows[0].where, group.id, error, rows=len(rows))

    def _refuse(self, where: str, group_id: object, error: DataError, rows: int = 1) -> None:
        if isinstance(group_id, str) or (type(group_id) is int and group_id.bit_length() <= 64):
            where += f": group {group_id!r:.80}"
        located = error.within(where)
        if self._rules.on_bad_row == "skip":
            self._report.skip(located, rows)
            return
        raise DataError(f"{located}. Fix it, or leave such rows out with `on_bad_row: skip`", reason=error.reason) from error
