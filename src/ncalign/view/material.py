"""What is browsed: the groups of data or of a run, and what of them is known beside their texts and rewards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ncalign.data.formats.sources import find_sources
from ncalign.data.groups import Group, ReadReport, read_groups
from ncalign.view.config import ViewConfig
from ncalign.view.facts import Entry
from ncalign.view.index import FORM

BETA = 0.1


@dataclass(frozen=True)
class Material:
    """Groups to browse.

    Attributes:
        name: what they are called.
        data: what is read.
        options: of :func:`ncalign.data.groups.read_groups`.
        beta: scale of the kernel's scores.
        notes: what a reader should know, such as where log-probs are from; asked for once the groups are read.
        files: what else the entries depend on.
        fill: a group with what else is known of it.
    """

    name: str
    data: str | Path
    options: Mapping[str, Any]
    beta: float
    notes: Callable[[], tuple[str, ...]] = tuple
    files: tuple[Path, ...] = ()
    fill: Callable[[Group], Entry] = Entry

    def entries(self, report: ReadReport) -> Generator[Entry, None, None]:
        """The groups one by one; ``report`` counts what was read.

        Raises:
            ValueError: the data can't be read.
        """
        with closing(read_groups(self.data, report=report, allow_empty=True, **self.options)) as groups:
            yield from map(self.fill, groups)

    def digest(self) -> str | None:
        """A digest of all that an index of it depends on; None for data that are no files of this machine."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(json.dumps([FORM, self.name, dict(self.options)], sort_keys=True).encode())
        paths = [Path(source.label) for source in find_sources(self.data)]
        for path in (*paths, *self.files):
            if not path.is_file():
                return None
            digest.update(_digest_of(path))
        return digest.hexdigest()


def data_material(config: ViewConfig) -> Material:
    """The groups of data.

    Raises:
        ValueError: a setting has no meaning for them.
    """
    if config.round is not None:
        raise ValueError(f"round: {config.round}: {config.data} is no run, and has no rounds; leave round out")
    options = {"schema": config.schema_name, "on_bad_row": config.on_bad_row, "join_rows": config.join_rows}
    return Material(str(config.data), config.data, options, config.beta or BETA)


def _digest_of(path: Path) -> bytes:
    digest = hashlib.blake2b(path.name.encode(errors="surrogateescape"))
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.digest()
