"""The one rule about old outputs: nothing is replaced unasked; what ncalign reads, or did not write itself, is never replaced.

A folder in which a verb writes holds ``.ncalign/entries``: the names of what was written there, each with its verb. An entry is
ours if that record names it and, where it is a folder, if its own record names all that lies in it.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from ncalign.core.atomic import delete_folder, write_json_atomic

_FOLDER, _RECORD = ".ncalign", "entries"
Inputs = Mapping[str, object]
"""What a verb reads, by the name of its field: paths, hub ids, ``model:FOLDER``, ``FILE.py:FUNCTION``, or several."""


def claim(
    output: Path,
    names: Sequence[str] = (),
    *,
    verb: str,
    inputs: Inputs,
    overwrite: bool,
    own: Sequence[str] = (),
    instead: str = "",
) -> None:
    """Decide whether a verb may write its output; called before anything else is done, and nothing is changed by it.

    Args:
        output: the file; or, with ``names``, the folder in which entries of these names are written.
        names: of those entries.
        verb: that writes.
        inputs: what it reads.
        overwrite: whether what an earlier call wrote may be replaced.
        own: names that this verb goes on with, or replaces, unasked where it wrote them itself.
        instead: what the verb offers besides ``--overwrite``, for the message.

    Raises:
        ValueError: an input would be replaced; something is there that ncalign did not write; or an earlier output is there,
            and ``overwrite`` is not set. The message says which and what to do.
    """
    field = "output_dir" if names else "output"
    targets = [output / name for name in names] or [output]
    for label, path in _paths(inputs):
        for target in targets:
            if _would_replace(target, path, whole_folder=not names):
                raise ValueError(f"{target} is what {label} reads, and would be replaced: give another {field}")
    if not names:
        # What is no ordinary file, the writer refuses with its own words.
        if output.is_file() and not overwrite:
            raise ValueError(f"{output} exists: --overwrite replaces it, or give another {field}")
        return
    present = [target for target in targets if _is_there(target)]
    recorded = _read(output)
    for target in present:
        stranger = target if target.name not in recorded else foreign(target)
        if stranger is not None:
            raise ValueError(
                f"{stranger} is there, and no record ({output / _FOLDER / _RECORD}) says that ncalign wrote it: it is left "
                f"alone. Move it, or give another {field}"
            )
    earlier = [target.name for target in present if not (target.name in own and recorded[target.name] == verb)]
    if earlier and not overwrite:
        by = " and ".join(sorted({recorded[name] for name in earlier}))
        raise ValueError(
            f"{output} holds what an earlier `ncalign {by}` wrote ({', '.join(earlier)}): {instead}--overwrite replaces it, or "
            f"give another {field}"
        )


def foreign(entry: Path) -> Path | None:
    """What in a folder that would be replaced ncalign did not write, or None; for a file, which has no record, None too."""
    if not entry.is_dir():
        return None
    # A process that was killed may have left the record's folder without the record.
    children = [child for child in sorted(entry.iterdir()) if child.name != _FOLDER and not _is_temporary(child)]
    recorded = _read(entry)
    if children and not recorded:
        return entry
    return next((child for child in children if not any(fnmatchcase(child.name, name) for name in recorded)), None)


def record(folder: Path, names: Iterable[str], *, verb: str) -> None:
    """Note that a verb is about to write entries of these names in a folder; in a folder of one entry's own, patterns.

    What is recorded for another verb stays so.
    """
    before = _read(folder)
    after = {name: verb for name in names} | before
    if after != before:
        write_json_atomic(after, folder / _FOLDER / _RECORD)


@contextlib.contextmanager
def recorded(folder: Path, names: Sequence[str], *, verb: str) -> Iterator[None]:
    """The names are recorded while the caller writes them; where it fails before the first, the record goes again."""
    made = [path for path in (folder / _FOLDER, folder, *folder.parents) if not path.exists()]
    new = [name for name in names if name not in _read(folder)]
    try:
        record(folder, names, verb=verb)
        yield
    except BaseException:
        _forget(folder, [name for name in new if not (folder / name).exists()])
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def remove(folder: Path, names: Iterable[str]) -> None:
    """Delete those of the entries that are there, which :func:`claim` has allowed, and their record; never through a link."""
    listed = list(names)
    for path in (folder / name for name in listed):
        if path.is_file() or path.is_symlink():
            path.unlink()
        else:
            delete_folder(path)  # file by file, a kill could leave some without their record
    _forget(folder, listed)


def renew(folder: Path, names: Sequence[str], *, verb: str, folders: Sequence[str] = ()) -> None:
    """Delete an earlier call's entries and note that new ones come in their place; ``folders`` of them may hold anything."""
    remove(folder, names)
    record(folder, names, verb=verb)
    for name in folders:
        record(folder / name, ["*"], verb=verb)


def _forget(folder: Path, names: Sequence[str]) -> None:
    before = _read(folder)
    after = {name: verb for name, verb in before.items() if name not in names}
    if after:
        write_json_atomic(after, folder / _FOLDER / _RECORD)
    elif before:
        (folder / _FOLDER / _RECORD).unlink()
        with contextlib.suppress(OSError):
            (folder / _FOLDER).rmdir()


def _read(folder: Path) -> dict[str, str]:
    try:
        found = json.loads((folder / _FOLDER / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(name): str(verb) for name, verb in found.items()} if isinstance(found, dict) else {}


def _is_there(path: Path) -> bool:
    """Whether something would be lost with this path: an empty folder would not."""
    if path.is_dir():
        return any(path.iterdir())
    return path.exists() or path.is_symlink()


def _is_temporary(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(".tmp")


def _would_replace(target: Path, read: Path, *, whole_folder: bool) -> bool:
    """Whether replacing the target would take away what is read; an output file may not stand in a folder that is read."""
    place, source = target.resolve(), read.resolve()
    return source.is_relative_to(place) or (whole_folder and target.exists() and place.is_relative_to(source))


def _paths(inputs: Inputs) -> Iterator[tuple[str, Path]]:
    """The files and folders that are read, each with its field; an adapter's base model is read with it."""
    for label, value in inputs.items():
        for one in value if isinstance(value, list | tuple) else [value]:
            if one is None:
                continue
            text = re.sub(r"(?<=\.py):\w+$", "", str(one).removeprefix("model:"))
            path = Path(text)
            # Hub ids and names of functions are no paths here.
            with contextlib.suppress(OSError, ValueError):
                if not path.exists():
                    path = Path(text.rpartition(":")[0] or text)  # ``folder:split``
                if path.exists():
                    yield label, path
                    base = json.loads((path / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
                    # From here or from the adapter's folder, as it is looked for when the adapter is opened.
                    for there in (Path(base), path / base) if isinstance(base, str) and base else ():
                        if there.exists():
                            yield f"the base model of {label}", there
