"""Groups on disk: prompts with scored candidates, read and validated row by row, and written whole or not at all."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
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
    trl,
)
from ncalign.data.formats.group import JSON, Candidate, Group, Message, Text
from ncalign.data.formats.pairs import write_pairs
from ncalign.data.formats.parsing import Row
from ncalign.data.formats.seen import Seen
from ncalign.data.formats.sources import Source, find_sources, kind_of

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


@dataclass
class ReadReport:
    """Counts of what was read from a file.

    Attributes:
        rows: Rows read, blank lines not counted.
        groups: Groups handed on.
        skipped: Rows left out.
        joined: Rows that went into the group of the row before, as unpaired ones of one prompt do; ``rows`` is always
            ``groups + skipped + joined`` of what was read.
        reasons: Rows left out, by kind of problem.
        examples: The whole messages of the first few.
        schema: The schema of the row read last.
    """

    rows: int = 0
    groups: int = 0
    skipped: int = 0
    joined: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)
    schema: SchemaName | None = None

    def skip(self, error: DataError, rows: int = 1) -> None:
        """Count rows left out for an error, and keep the first few messages."""
        self.leave_out(error.reason, rows)
        if len(self.examples) < NUM_EXAMPLES:
            self.examples.append(str(error))

    def add(self, other: ReadReport) -> None:
        """Add another file's counts."""
        self.rows, self.groups = self.rows + other.rows, self.groups + other.groups
        self.joined += other.joined
        for reason, rows in other.reasons.items():
            self.leave_out(reason, rows)
        self.examples = (self.examples + other.examples)[:NUM_EXAMPLES]

    def leave_out(self, reason: str, rows: int = 1) -> None:
        """Count rows left out."""
        self.skipped += rows
        self.reasons[reason] = self.reasons.get(reason, 0) + rows

    def notice(self, path: str | Path) -> str:
        """Return what a user should know of the rows left out, with the first few; empty when there are none."""
        if not self.skipped:
            return ""
        return "\n".join([f"note: {path}: {self.summary()}", *(f"  {example}" for example in self.examples)])

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
) -> Generator[Group, None, None]:
    """Read groups one by one, validating each; the whole file is never in memory.

    Args:
        path: A .jsonl, .jsonl.gz, .json or .parquet file in any schema of docs/data.md; a folder of such files, read in the
            order of their names; a folder that `datasets` saved; or a hub id, ``owner/name`` or ``owner/name:split``.
        schema: The schema, or "auto" to tell it by the first row's columns.
        adapter: ``file.py:function``, called with each row; it returns a row of our schema, or None to leave it out.
        on_bad_row: Stop at a row that can't be used, or leave it out and count it.
        report: Filled in while reading.
        allow_empty: Whether prompts without candidates are groups too.

    Returns:
        An iterator over the groups, in the file's order; the file is closed at its end, on an error, or by ``close()``.

    Raises:
        ValueError: The file is not there or of no known kind; or, while iterating, a row that can't be used under
            ``on_bad_row="error"``, or a file that can't be read to its end.
    """
    if on_bad_row not in ("error", "skip"):
        raise DataError(f"on_bad_row is {on_bad_row!r}: `error` or `skip` is needed")
    tried = schemas(schema, allow_empty) if adapter is None else (adapted(adapter),)
    sources = find_sources(path)
    found = report if report is not None else ReadReport()
    return read_sources(sources, tried, on_bad_row=on_bad_row, report=found, allow_empty=allow_empty, many=len(sources) > 1)


def read_sources(
    sources: Sequence[Source],
    tried: tuple[Schema, ...],
    *,
    on_bad_row: OnBadRow,
    report: ReadReport,
    allow_empty: bool = False,
    many: bool,
) -> Generator[Group, None, None]:
    """Read sources one after the other, as :func:`read_groups` does, in one of the schemas ``tried``.

    ``many``: these are some of several files, so that ids which rows lack begin with the file's name.
    """
    with closing(Seen()) as seen:
        reader = _Reader(tried, on_bad_row, report, allow_empty, seen)
        for source in sources:
            with closing(reader.groups(source, prefix=f"{source.name}:" if many else "")) as groups:
                yield from groups


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
) -> ReadReport:
    """Read any schema and write our own, or TRL's preference pairs.

    Returns:
        The counts of rows read, groups written and rows skipped.

    Raises:
        ValueError: As ``read_groups`` and ``write_groups``; also when no group is left to write.
        OSError: The output can't be written.
    """
    report, sources = ReadReport(), find_sources(input)
    tried = convertible(schema, adapter)
    with closing(read_sources(sources, tried, on_bad_row=on_bad_row, report=report, many=len(sources) > 1)) as groups:
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
    """Rows → groups: the schema, the policy for bad rows, ids seen so far."""

    def __init__(
        self, tried: tuple[Schema, ...], on_bad_row: OnBadRow, report: ReadReport, allow_empty: bool, seen: Seen
    ) -> None:
        self._tried = tried
        self._on_bad_row = on_bad_row
        self._report = report
        self._allow_empty = allow_empty
        self._seen = seen
        self._schema: Schema | None = None

    def groups(self, source: Source, *, prefix: str) -> Generator[Group, None, None]:
        """Yield a source's groups, and close the source with this generator; ids made of row numbers begin with ``prefix``."""
        self._source, self._prefix, self._schema = source, prefix, None
        with closing(source.rows()) as rows:
            yield from self._groups(rows)

    def _groups(self, rows: Iterable[tuple[int, Row | DataError]]) -> Iterator[Group]:
        """Yield the groups that pass; neighbouring rows of one prompt are joined where the schema says so."""
        pending: list[tuple[int, Group]] = []
        for number, row in rows:
            self._report.rows += 1
            group = self._read(number, row)
            if group is None:
                continue
            if self._schema is None or not self._schema.one_completion_a_row:
                yield from self._checked([(number, group)])
                continue
            if pending and pending[0][1].prompt != group.prompt:
                yield from self._checked(pending)
                pending = []
            pending.append((number, group))
        if pending:
            yield from self._checked(pending)

    def _read(self, number: int, row: Row | DataError) -> Group | None:
        try:
            if isinstance(row, DataError):
                raise row
            if self._schema is None:
                self._schema = recognise(row, self._tried)
                self._report.schema = self._schema.name
            return self._schema.read(row, f"{self._prefix}{number}", f"{self._source.name}:{number}")
        except LeftOut:
            self._report.leave_out("left out by the adapter")
            return None
        except DataError as error:
            self._refuse(number, row.get("id") if isinstance(row, dict) else None, error)
            return None

    def _checked(self, numbered: list[tuple[int, Group]]) -> Iterator[Group]:
        """Yield the group that the rows make, unless it has no candidates or its id was used before."""
        number = numbered[0][0]
        group = trl.merge([group for _, group in numbered])
        if not group.candidates and not self._allow_empty and self._schema is not TRL_PROMPTS:
            error = DataError("candidates is empty: at least one completion is needed", reason="no candidates")
        else:
            before = self._seen.add(group.id, self._place(number))
            if before is None:
                self._report.groups += 1
                self._report.joined += len(numbered) - 1
                yield group
                return
            error = DataError(f"the id was used before, at {before}: ids must differ", reason="duplicate id")
        self._refuse(number, group.id, error, rows=len(numbered))

    def _refuse(self, number: int, group_id: object, error: DataError, rows: int = 1) -> None:
        where = f"{self._source.label}:{self._source.unit}{number}"
        if isinstance(group_id, str) or (type(group_id) is int and group_id.bit_length() <= 64):
            where += f": group {group_id!r:.80}"
        located = error.within(where)
        if self._on_bad_row == "skip":
            self._report.skip(located, rows)
            return
        raise DataError(f"{located}. Fix it, or leave such rows out with `on_bad_row: skip`", reason=error.reason) from error

    def _place(self, number: int) -> str:
        place = f"{self._source.unit or 'line '}{number}"
        return f"{self._source.name}, {place}" if self._prefix else place
