"""Groups → TRL's preference pairs: `prompt, chosen, rejected` and both scores."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ncalign.core.atomic import atomic_path
from ncalign.core.errors import DataError
from ncalign.data.config import Target
from ncalign.data.formats import jsonl
from ncalign.data.formats.group import TEMPLATE_KWARGS, TOOLS, Candidate, Group
from ncalign.data.formats.parsing import Row
from ncalign.data.formats.sources import kind_of

_BATCH = 1024
_FOR_THE_TEMPLATE = (TOOLS, TEMPLATE_KWARGS)
"""What TRL looks for beside the prompt."""
_MOST_PAIRED = 2000
"""Candidates of a group: two million rows."""


def pairs_of(group: Group, target: Target, seed: int) -> list[tuple[Candidate, Candidate]]:
    """A group's pairs of a better and a worse candidate; none where no two rewards differ.

    Ties for the best, or the worst, are decided at random, the same for a group's id and a seed.
    """
    scored = [candidate for candidate in group.candidates if candidate.reward is not None]
    if target == "all_pairs":
        if len(scored) > _MOST_PAIRED:
            raise DataError(
                f"{group.origin or 'group'}: group {group.id!r}: target all_pairs makes {math.comb(len(scored), 2):,} rows of "
                f"its {len(scored)} candidates, and {_MOST_PAIRED} is the most that it takes: leave candidates out, or take "
                "another target",
                reason="too many candidates for all_pairs",
            )
        both = itertools.permutations(scored, 2)
        return [(a, b) for a, b in both if (a.reward or 0.0) > (b.reward or 0.0)]
    chance = random.Random(f"{seed} {group.id}")
    rewards = sorted({candidate.reward or 0.0 for candidate in scored})
    if len(rewards) < 2:
        return []
    best = chance.choice([candidate for candidate in scored if candidate.reward == rewards[-1]])
    worse = [c for c in scored if (c.reward == rewards[0] if target == "best_vs_worst" else (c.reward or 0.0) < rewards[-1])]
    return [(best, chance.choice(worse))]


def write_pairs(groups: Iterable[Group], path: Path, *, target: Target, seed: int, allow_none: bool = False) -> int:
    """Write the pairs of groups, a row each, and return how many.

    Raises:
        ValueError: there is no pair to write, unless that is allowed.
    """
    kind = kind_of(path)
    with atomic_path(path) as temporary:
        rows = _rows(groups, target, seed)
        if kind == "parquet":
            count = _write_parquet(rows, temporary)
        else:
            count = jsonl.write_rows(rows, temporary, compressed=kind == "jsonl.gz")
        if not count and not allow_none:
            raise DataError("no pair to write: in no group do two rewards differ", reason="no pairs")
    return count


def _rows(groups: Iterable[Group], target: Target, seed: int) -> Iterator[Row]:
    for group in groups:
        for number, (chosen, rejected) in enumerate(pairs_of(group, target, seed)):
            yield {
                "id": f"{group.id}-{number}" if target == "all_pairs" else group.id,
                "prompt": group.prompt,
                "chosen": chosen.completion,
                "rejected": rejected.completion,
                "score_chosen": chosen.reward,
                "score_rejected": rejected.reward,
                # Where TRL looks for them.
                **{name: group.metadata[name] for name in _FOR_THE_TEMPLATE if name in group.metadata},
                **({"metadata": more} if (more := _of_no_template(group)) else {}),
            }


def _of_no_template(group: Group) -> dict[str, Any]:
    return {name: value for name, value in group.metadata.items() if name not in _FOR_THE_TEMPLATE}


def _write_parquet(rows: Iterator[Row], path: Path) -> int:
    writer, count = None, 0
    with path.open("wb") as file:
        while batch := list(itertools.islice(rows, _BATCH)):
            stored = [_stored(row) for row in batch]
            try:
                table = pa.Table.from_pylist(stored, schema=None if writer is None else writer.schema)
            except pa.ArrowException as error:
                raise DataError(
                    f"prompts or completions are strings in some groups and conversations in others: {error}; write .jsonl",
                    reason="mixed kinds",
                ) from error
            if writer is None:
                writer = pq.ParquetWriter(file, table.schema, compression="zstd")
            writer.write_table(table)
            count += len(batch)
        if writer is not None:
            writer.close()
    return count


def _stored(row: Row) -> Row:
    """A row as Parquet holds it: what differs in its keys from row to row is JSON."""
    stored = {name: json.dumps(row[name], ensure_ascii=False) if name in row else None for name in _FOR_THE_TEMPLATE}
    return {**row, **stored, "metadata": json.dumps(row.get("metadata", {}), ensure_ascii=False)}
