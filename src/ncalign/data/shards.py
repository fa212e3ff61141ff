"""A folder of shards converted into a folder of shards: several at once, and only those that are not finished yet.

Beside the shards lies `.ncalign/`: for each finished one, what it was made from and how, the counts of its rows, and
the digests of its ids, which show ids that repeat across shards.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from ncalign.core.atomic import atomic_path, check_writable, write_json_atomic
from ncalign.core.errors import DataError
from ncalign.core.parallel import map_chunks, num_workers
from ncalign.core.progress import Bar
from ncalign.core.user_code import code_digest
from ncalign.data.config import OnBadRow, ShardKind, Target
from ncalign.data.formats import SchemaName
from ncalign.data.formats.group import Group
from ncalign.data.formats.pairs import write_pairs
from ncalign.data.formats.seen import Seen, digest
from ncalign.data.formats.sources import Source, find_sources
from ncalign.data.groups import ReadReport, convertible, read_groups, read_sources, write_groups

_ACCOUNT = ".ncalign"


@dataclass(frozen=True)
class Recipe:
    """How a shard is made: the options of `convert_folder`, and a digest of the adapter's code."""

    schema: SchemaName
    adapter: str | None
    target: Target
    seed: int
    on_bad_row: OnBadRow
    kind: ShardKind
    code: str


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
        return {"source": self.source.label, "size": size, **asdict(recipe)}

    def done(self, recipe: Recipe) -> ReadReport | None:
        """The counts of an earlier call with the same inputs; None where the file must be converted."""
        try:
            account = json.loads(self.account.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if account.get("made_from") != self.made_from(recipe) or not (self.output.exists() or account["written"] == 0):
            return None
        return ReadReport(**account["report"])


def convert_folder(
    input: str | Path,
    output: Path,
    *,
    schema: SchemaName = "auto",
    adapter: str | None = None,
    target: Target = "ncalign",
    seed: int = 0,
    on_bad_row: OnBadRow = "error",
    kind: ShardKind = "jsonl",
) -> ReadReport:
    """Convert each file of a folder into a file of another, in worker processes; what an earlier call finished is kept.

    Returns:
        The counts over all shards.

    Raises:
        ValueError: as :func:`ncalign.data.groups.convert`; ids that repeat across shards; the output lies in the
            input's folder, or holds files that this input does not make.
        OSError: the output can't be written.
    """
    recipe = Recipe(schema, adapter, target, seed, on_bad_row, kind, code_digest(adapter))
    shards = _shards(input, output, recipe)
    check_writable(output / _ACCOUNT / "account")
    reports = {k: found for k, shard in enumerate(shards) if (found := shard.done(recipe)) is not None}
    open_ = [(k, shard) for k, shard in enumerate(shards) if k not in reports]
    with Bar("Converting shards", len(shards), completed=len(reports)) as bar:
        work = partial(_convert_some, recipe)
        for done in map_chunks(work, open_, workers=num_workers(), size=1, alone=0 if num_workers() > 1 else len(open_)):
            reports.update(done)
            bar.advance(len(done))
    total = ReadReport()
    for k in range(len(shards)):
        total.add(reports[k])
    if not total.groups:
        raise DataError(f"{input}: no group to write: {total.summary()}" + "".join(f"\n  {e}" for e in total.examples))
    if target == "ncalign":
        _check_ids(shards)
    return total


def _shards(input: str | Path, output: Path, recipe: Recipe) -> list[Shard]:
    source_folder = Path(input)
    if source_folder.exists() and output.resolve().is_relative_to(source_folder.resolve()):
        raise DataError(f"{output} lies in {input}, which is read: name another folder")
    shards = []
    for source in find_sources(input):
        stem = source.name.replace("/", "--")
        for suffix in (".gz", ".jsonl", ".json", ".parquet", ".arrow"):
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
    for left in shard.output.parent.glob(f".{glob.escape(shard.output.name)}.*.tmp"):
        left.unlink()  # by a call that was killed
    tried = convertible(recipe.schema, recipe.adapter)
    with closing(read_sources([shard.source], tried, on_bad_row=recipe.on_bad_row, report=report, many=True)) as groups:
        noted = _noting(groups, digests)
        if recipe.target == "ncalign":
            written = write_groups(noted, shard.output)
        else:
            written = write_pairs(noted, shard.output, target=recipe.target, seed=recipe.seed, allow_none=True)
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
