"""Reference log-probs as data: computed once per candidate with the starting weights, and kept on disk.

A value is filed under the policy's fingerprint (weights, precision, attention code) and the candidate's token ids with their
split into prompt and completion; tokenizer, chat template, encoding rules, truncation and text all act through these ids. Every
objective, epoch and later run finds it there.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ncalign.core.atomic import atomic_path
from ncalign.core.cache import private_folder
from ncalign.core.progress import say
from ncalign.model.encoding import EncodedGroup

_SCHEMA = pa.schema([("key", pa.binary(16)), ("logprob", pa.float64())])
_FLUSH_EVERY = 4096


class ReferenceCache:
    """Reference log-probs of one fingerprint: a folder of Parquet parts that are only ever added to.

    Processes and runs may share the folder: each writes parts of its own, whole or not at all.
    """

    def __init__(self, folder: Path) -> None:
        """Read the parts that are there; one that is not as it was written is left out, and its values computed again."""
        self.folder = folder
        self.values: dict[bytes, float] = {}
        self._pending: dict[bytes, float] = {}
        parts = sorted(folder.glob("*.parquet"))
        whole = [part for part in parts if _digest(part) == part.stem]
        if len(whole) < len(parts):
            lost = f"{len(parts) - len(whole)} of {len(parts)} parts are damaged or another user's"
            say(f"{folder}: {lost}; their log-probs are computed again")
        for part in whole:
            table = pq.read_table(part, schema=_SCHEMA)
            keys, logprobs = table.column("key").to_pylist(), table.column("logprob").to_pylist()
            self.values.update(zip(keys, logprobs, strict=True))

    def add(self, key: bytes, logprob: float) -> None:
        """Keep a value; it reaches the disk with the next flush."""
        self.values[key] = self._pending[key] = logprob
        if len(self._pending) >= _FLUSH_EVERY:
            self.flush()

    def flush(self) -> None:
        """Write what is new as one part."""
        if not self._pending:
            return
        table = pa.table({"key": list(self._pending), "logprob": list(self._pending.values())}, schema=_SCHEMA)
        written = io.BytesIO()
        pq.write_table(table, written)
        content = written.getbuffer()
        # The name tells whether the content is still what was written.
        part = private_folder(self.folder) / f"{hashlib.blake2b(content, digest_size=16).hexdigest()}.parquet"
        with atomic_path(part, mode=0o600) as temporary:
            temporary.write_bytes(content)
        self._pending.clear()


def _digest(part: Path) -> str:
    try:
        return hashlib.blake2b(part.read_bytes(), digest_size=16).hexdigest()
    except OSError:
        return ""


def reference_folder(
    cache_dir: Path, fingerprint: str, *, shared: bool, uncast: bool = False, fused: bool = False, compiled: bool = False
) -> Path:
    """The folder of a fingerprint's reference log-probs.

    Shared prompts round differently, and so do bfloat16 without autocast, Liger's head and compiled norms and MLPs: they have
    folders of their own.
    """
    kinds = {"-shared": shared, "-uncast": uncast, "-liger": fused, "-compiled": compiled}
    return cache_dir / "reference" / (fingerprint[:32] + "".join(name for name, is_so in kinds.items() if is_so))


def candidate_key(group: EncodedGroup, candidate: int) -> bytes:
    """A 16-byte digest of a prompt's and a completion's token ids, and of which are scored where not all are."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(len(group.prompt).to_bytes(4, "big"))
    digest.update(group.prompt.tobytes())
    digest.update(group.completions[candidate].tobytes())
    if (mask := group.masks[candidate]) is not None:
        digest.update(b"scored" + mask.tobytes())
    return digest.digest()


def missing_groups(groups: Sequence[EncodedGroup], cache: ReferenceCache) -> list[int]:
    """Positions of the groups with a candidate that the cache does not hold."""
    return [
        position
        for position, group in enumerate(groups)
        if any(candidate_key(group, k) not in cache.values for k in range(len(group.completions)))
    ]


def data_digest(groups: Sequence[EncodedGroup]) -> str:
    """A digest of these groups, their order and rewards: a resumed run must have the same."""
    digest = hashlib.blake2b(digest_size=16)
    for group in groups:
        digest.update(b"".join(candidate_key(group, k) for k in range(len(group.completions))))
        digest.update(repr(group.rewards).encode())
    return digest.hexdigest()


def with_reference(groups: Sequence[EncodedGroup], lookup: Callable[[bytes], float]) -> list[EncodedGroup]:
    """The groups with their reference log-probs filled in."""
    return [
        replace(group, reference_logprobs=tuple(lookup(candidate_key(group, k)) for k in range(len(group.completions))))
        for group in groups
    ]
