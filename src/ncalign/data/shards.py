"""A folder of shards converted into a folder of shards: several at once, and only those that are not finished yet.

Beside the shards lies `.ncalign/`: for each finished one, what it was made from and how, the counts of its rows, and
the digests of its ids, which show ids that repeat across shards. Where rows are joined by their prompt, a group may have
rows of several shards: then one process reads them all, and one record tells what they all were made from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from ncalign.core.atomic import atomic_path, check_writable, delete_abandoned, write_json_atomic
from ncalign.core.code_digest import code_digest
from ncalign.core.errors import DataError
from ncalign.core.locks import held
from ncalign.core.outputs import claim, record
from ncalign.core.parallel import map_chunks, num_workers
from ncalign.core.progress import Bar
from ncalign.data.config import OnBadRow, ShardKind, Target
from ncalign.data.formats import SchemaName
from ncalign.data.formats.folders import with_split
from ncalign.data.formats.group import Group
from ncalign.data.formats.pairs import write_pairs
from ncalign.data.formats.seen import Seen, digest
from ncalign.data.formats.sources import Source, find_sources
from ncalign.data.groups import ReadReport, Rules, convertible, joins, read_groups, read_sources, write_groups

_ACCOUNT = ".ncalign"
_READER = 3
"""Raised when the same rows are read as other groups, so that a folder never holds groups of two readings."""
_JOINED = ".joined.json"


@dataclass(frozen=True)
class Recipe:
    """How shards are made: the options of :func:`ncalign.data.groups.convert`, and the kind of the files."""

    schema: SchemaName = "auto"
    adapter: str | None = None
    target: Target = "ncalign"
    seed: int = 0
    on_bad_row: OnBadRow = "error"
    join_rows: bool = True
    kind: ShardKind = "jsonl"

    @property
    def rules(self) -> Rules:
        """How rows are read."""
        return Rules(self.on_bad_row, join_rows=self.join_rows)


DEFAULT = Recipe()


@dataclass(frozen=True)
class Shard:
    """One stream of rows and the file that is made of it."""

    source: Source
    output: Path
    account: Path

    def made_from(self, recipe: Recipe) -> dict[str, Any]:
        """What the output depends on: when any of it changes, the file is converted again."""
        path = Path(self.source.label)
        found = path.stat() if path.exists() else None
        size = None if found is None else [found.st_size, found.st_mtime_ns]
        return {
            "source": self.source.label,
            "size": size,
            **asdict(recipe),
            "code": code_digest(recipe.adapter),
            "reader": _READER,
        }

    def done(self, recipe: Recipe) -> ReadReport | None:
        """The counts of an earlier call with the same inputs; None where the file must be converted."""
        account = _account(self.account)
        if account is None or account["made_from"] != self.made_from(recipe):
            return None
        ids = self.account.with_suffix(".ids")
        whole = ids.is_file() and ids.stat().st_size == len(digest("")) * account["report"].groups
        return account["report"] if whole and (self.output.exists() or account["written"] == 0) else None


def _unfinished_or_same(shards: Sequence[Shard], recipe: Recipe, joined: Path) -> list[str]:
    """Names of the files that no earlier call finished with other inputs or options."""
    every, together = [shard.made_from(recipe) for shard in shards], _account(joined)
    others = _files(together) if together is not None and together["made_from"] != every else set()
    found = []
    for shard, made_from in zip(shards, every, strict=True):
        account = _account(shard.account)
        if str(shard.output) not in others and (account is None or account["made_from"] == made_from):
            found.append(shard.output.name)
    return found


class _Account(TypedDict):
    """What a call records of a shard, or of shards that it made together, once it is on disk."""

    made_from: Any
    report: ReadReport
    written: int | list[str]


_ACCOUNTS = TypeAdapter(_Account)


def _account(path: Path) -> _Account | None:
    """What an earlier call recorded; None where it recorded nothing that can be read."""
    try:
        return _ACCOUNTS.validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def _files(account: _Account) -> set[str]:
    """The files that were made together."""
    return set(account["written"]) if isinstance(account["written"], list) else set()


def convert_folder(input: str | Path, output: Path, recipe: Recipe = DEFAULT, *, overwrite: bool = False) -> ReadReport:
    """Convert each file of a folder into a file of another, in worker processes; what an earlier call finished is kept.

    Where rows are joined by their prompt, a group lies in the file of its first row, and one process makes all files.
    ``overwrite`` replaces files that an earlier call made of other inputs or in another way.

    Returns:
        The counts over all shards.

    Raises:
        ValueError: as :func:`ncalign.data.groups.convert`; ids that repeat across shards; the output lies in the
            input's folder, or holds files that this input does not make, or another process converts into it.
        OSError: the output can't be written.
    """
    shards = _shards(input, output, recipe)
    check_writable(output / _ACCOUNT / "account")
    with held(output, busy=f"another process is converting into {output}: wait for it, or give another output"):
        return _converted(input, output, shards, recipe, overwrite=overwrite)


def _converted(input: str | Path, output: Path, shards: Sequence[Shard], recipe: Recipe, *, overwrite: bool) -> ReadReport:
    names = [shard.output.name for shard in shards]
    claim(
        output,
        names,
        verb="convert",
        inputs={"input": input, "adapter": recipe.adapter},
        overwrite=overwrite,
        own=_unfinished_or_same(shards, recipe, output / _ACCOUNT / _JOINED),
    )
    record(output, names, verb="convert")
    tried = convertible(recipe.schema, recipe.adapter)
    if recipe.join_rows and len(shards) > 1 and any(joins(shard.source, tried) for shard in shards):
        total = _convert_together(shards, recipe, output / _ACCOUNT / _JOINED)
    else:
        (output / _ACCOUNT / _JOINED).unlink(missing_ok=True)
        total = _convert_apart(shards, recipe)
    if not total.groups:
        raise DataError(f"{input}: no group to write: {total.summary()}" + "".join(f"\n  {e}" for e in total.examples))
    return total


def _convert_apart(shards: Sequence[Shard], recipe: Recipe) -> ReadReport:
    """Convert the shards that are not finished yet, several at once."""
    reports = {k: found for k, shard in enumerate(shards) if (found := shard.done(recipe)) is not None}
    open_ = [(k, shard) for k, shard in enumerate(shards) if k not in reports]
    with Bar("Converting shards", len(shards), completed=len(reports)) as bar:
        work = partial(_convert_some, recipe)
        for done in map_chunks(work, open_, workers=num_workers(), size=1, alone=0 if num_workers() > 1 else len(open_)):
            reports.update(done)
            bar.advance(len(done))
    # A worker of an earlier call that was killed may have ended after its file was made here.
    for shard in shards:
        for path in (shard.output, shard.account, shard.account.with_suffix(".ids")):
            delete_abandoned(path)
    total = ReadReport()
    for k in range(len(shards)):
        total.add(reports[k])
    if recipe.target == "ncalign" and total.groups:
        _check_ids(shards)
    return total


def _convert_together(shards: Sequence[Shard], recipe: Recipe, record: Path) -> ReadReport:
    """Convert all shards in this process, as one stream of rows, unless an earlier call finished them."""
    made_from, account = [shard.made_from(recipe) for shard in shards], _account(record)
    if account is not None and account["made_from"] == made_from and all(Path(path).exists() for path in _files(account)):
        return account["report"]
    for stale in (record, *(shard.account for shard in shards)):
        stale.unlink(missing_ok=True)  # they tell of files that are replaced now
    outputs, report, written = {shard.source.name: shard.output for shard in shards}, ReadReport(), []
    sources, tried = [shard.source for shard in shards], convertible(recipe.schema, recipe.adapter)
    with (
        Bar("Converting shards", len(shards)) as bar,
        closing(read_sources(sources, tried, recipe.rules, report=report, many=True)) as groups,
    ):
        for name, some in groupby(groups, key=lambda group: str(group.origin).rpartition(":")[0]):
            if _write(some, outputs[name], recipe):
                written.append(outputs[name])
            bar.advance()
    for output in set(outputs.values()).difference(written):
        output.unlink(missing_ok=True)  # all its rows are in groups of other files, or none makes a pair
    write_json_atomic({"made_from": made_from, "report": asdict(report), "written": [*map(str, written)]}, record)
    return report


def _write(groups: Iterable[Group], output: Path, recipe: Recipe) -> int:
    """Write a shard's groups or pairs, and return how many."""
    if recipe.target == "ncalign":
        return write_groups(groups, output)
    return write_pairs(groups, output, target=recipe.target, seed=recipe.seed, allow_none=True)


def _shards(input: str | Path, output: Path, recipe: Recipe) -> list[Shard]:
    source_folder, _ = with_split(input)
    if source_folder.exists() and output.resolve().is_relative_to(source_folder.resolve()):
        raise DataError(f"{output} lies in {input}, which is read: name another folder")
    shards = []
    for source in find_sources(input):
        stem = source.name.replace("/", "--")
        for suffix in (".gz", ".jsonl", ".json", ".parquet", ".csv", ".tsv", ".arrow"):
            stem = stem.removesuffix(suffix)
        shards.append(Shard(source, output / f"{stem}.{recipe.kind}", output / _ACCOUNT / f"{stem}.json"))
    names = {shard.output for shard in shards}
    if len(names) < len(shards):
        raise DataError(f"{input} has files that differ in their kind alone, such as a.jsonl and a.parquet: rename one")
    others = [path for path in output.glob("*") if path not in names and not path.name.startswith(".")]
    if others:
        raise DataError(f"{output} holds {others[0].name}, which is not made from {input}: name an empty folder, or remove it")
    return shards


def _convert_some(recipe: Recipe, numbered: Sequence[tuple[int, Shard]]) -> dict[int, ReadReport]:
    return {k: _convert_one(recipe, shard) for k, shard in numbered}


def _convert_one(recipe: Recipe, shard: Shard) -> ReadReport:
    """Write one file, then its record: if the process is killed between the two, the file is written again."""
    made_from, report, digests = shard.made_from(recipe), ReadReport(), bytearray()
    tried = convertible(recipe.schema, recipe.adapter)
    with closing(read_sources([shard.source], tried, recipe.rules, report=report, many=True)) as groups:
        written = _write(_noting(groups, digests), shard.output, recipe)
    if not written:
        shard.output.unlink()  # an empty file of some kinds can't be read
    with atomic_path(shard.account.with_suffix(".ids")) as temporary:
        temporary.write_bytes(digests)
    write_json_atomic({"made_from": made_from, "report": asdict(report), "written": written}, shard.account)
    return report


def _noting(groups: Iterable[Group], digests: bytearray) -> Iterator[Group]:
    for group in groups:
        digests += digest(group.id)
        yield group


def _check_ids(shards: Sequence[Shard]) -> None:
    """Raise where two shards use one id; each shard's own were checked as it was made."""
    size = len(digest(""))
    with closing(Seen()) as seen:
        for shard in shards:
            digests = shard.account.with_suffix(".ids").read_bytes()
            for index in range(len(digests) // size):
                before = seen.add_digest(digests[index * size : (index + 1) * size], shard.source.name)
                if before is not None:
                    raise DataError(
                        f"group id {_group_at(shard.output, index).id!r} is in {before} and in {shard.source.name}: ids must "
                        "differ; rename one, or leave the column id out to have ids made of the files' names",
                        reason="duplicate id",
                    )


def _group_at(path: Path, index: int) -> Group:
    with closing(read_groups(path, schema="ncalign")) as groups:
        return next(islice(groups, index, None))
