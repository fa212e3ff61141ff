"""`ncalign push`: a model folder, or a run's model, and a card for it, to the Hugging Face hub."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from ncalign.core.progress import say
from ncalign.model.adapters import ADAPTER_FILE
from ncalign.model.pickles import PICKLED, REMEDY
from ncalign.model.runs import model_of
from ncalign.training.card import base_of_card, card_of_folder, card_of_run, hub_id_of, run_of
from ncalign.training.config import PushConfig
from ncalign.training.space import in_words

_CARD = "README.md"
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_NAMES = frozenset(
    "config.json generation_config.json adapter_config.json quantization.json tokenizer.json tokenizer_config.json vocab.json "
    "merges.txt vocab.txt special_tokens_map.json added_tokens.json chat_template.jinja chat_template.json "
    "preprocessor_config.json processor_config.json".split()
)
_ENDINGS = (".safetensors", ".safetensors.index.json", ".model")
_SECRET = re.compile(rb"\b(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{30,})")
_MOST_TEXT = 2**24
"""Bytes of a file that is searched for secrets; longer ones are weights and vocabularies."""


@dataclass(frozen=True)
class Package:
    """What would be uploaded.

    Attributes:
        files: their content, or where it lies, by their names in the repository.
        left_out: files of the folder that are no part of a model.
        base: hub id of the base model.
    """

    files: Mapping[str, bytes | Path]
    left_out: tuple[str, ...]
    base: str | None

    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        return {
            name: len(content) if isinstance(content, bytes) else content.stat().st_size for name, content in self.files.items()
        }


def run_push(config: PushConfig) -> dict[str, Any]:
    """Upload a model with its card in one commit; a dry run where the hub is not to be asked (``HF_HUB_OFFLINE``).

    Returns:
        ``repo``, ``files`` with their bytes, ``left_out``, ``base_model``, ``card``, ``pushed``, and the ``url`` of the commit.

    Raises:
        ValueError: the folder is not to be uploaded as it is, or the hub refuses.
    """
    if constants.HF_HUB_OFFLINE:
        say("note: HF_HUB_OFFLINE is set: this is a dry run")
        return plan_push(config)
    package = _package(config)
    api = HfApi()
    with _told(config.repo):
        api.create_repo(config.repo, private=config.private, exist_ok=True)
        _refuse_a_mixture(config.repo, api.list_repo_files(config.repo), package)
        operations = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=content if isinstance(content, bytes) else str(content))
            for name, content in package.files.items()
        ]
        commit = api.create_commit(config.repo, operations, commit_message=config.message)
    return _result(config, package, url=str(commit.commit_url))


def plan_push(config: PushConfig) -> dict[str, Any]:
    """What :func:`run_push` would upload; nothing leaves this machine, and nothing is written."""
    return _result(config, _package(config), url=None)


def _result(config: PushConfig, package: Package, *, url: str | None) -> dict[str, Any]:
    sizes, card = package.sizes(), package.files[_CARD]
    assert isinstance(card, bytes)
    head = f"{config.repo}: {url}" if url else f"{config.repo}: nothing was uploaded (dry run); this would be"
    lines = [head, *(f"  {name}  {in_words(size)}" for name, size in sizes.items())]
    lines += [f"left out, since they are no part of the model: {', '.join(package.left_out)}"] if package.left_out else []
    text = card.decode()
    return {
        "repo": config.repo,
        "pushed": url is not None,
        "url": url,
        "base_model": package.base,
        "files": sizes,
        "left_out": list(package.left_out),
        "card": text,
        "text": "\n".join(lines if url else [*lines, "", text]),
    }


def _package(config: PushConfig) -> Package:
    """Collect what makes up the model, and write its card.

    Raises:
        ValueError: it holds no model, pickles, or what looks like a secret; or its base model can't be told.
    """
    if not _REPO.fullmatch(config.repo):
        raise ValueError(f"repo is {config.repo!r}, and owner/name is needed: letters, digits, '-', '_' and '.'")
    folder = Path(model_of(config.model))
    if not folder.is_dir():
        raise ValueError(f"{config.model}: there is no such folder; a run, a model or an adapter on this machine is pushed")
    pickles = sorted(path.name for path in folder.rglob("*") if path.suffix in PICKLED)
    if pickles:
        raise ValueError(f"{folder} holds {pickles[0]}, which is not uploaded: {REMEDY}")
    paths = {path.name: path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")}
    files: dict[str, bytes | Path] = {name: path for name, path in paths.items() if name in _NAMES or name.endswith(_ENDINGS)}
    if not any(name.endswith(".safetensors") for name in files):
        raise ValueError(f"{folder} holds no weights (*.safetensors): give the folder of a finished run or of a model")
    base, adapter = _base(config, folder), ADAPTER_FILE in files
    if adapter:
        files[ADAPTER_FILE] = _changed(paths[ADAPTER_FILE], {"base_model_name_or_path": base})
    if "config.json" in files:
        # The folder that transformers loaded the model from.
        files["config.json"] = _changed(paths["config.json"], {}, without="_name_or_path")
    run, evaluations = run_of(folder), config.evaluations
    if run is not None:
        name = config.repo.rpartition("/")[2]
        card = card_of_run(run, name, base=base, adapter=adapter, evaluations=evaluations)
    else:
        card = card_of_folder(folder, base=base, adapter=adapter, evaluations=evaluations)
    files[_CARD] = card.encode()
    _refuse_secrets(files)
    left_out = sorted(path.name for path in folder.iterdir() if path.name not in files and path.name != ".ncalign")
    return Package(files, tuple(left_out), base)


def _base(config: PushConfig, folder: Path) -> str | None:
    """Hub id of the base model; None for a whole model whose base nobody knows.

    Raises:
        ValueError: an adapter's base model is known by a folder of this machine alone.
    """
    if config.base_model is not None:
        return config.base_model
    if not (folder / ADAPTER_FILE).is_file():
        return base_of_card(folder) if run_of(folder) is None else hub_id_of(str(folder))
    named = _read(folder / ADAPTER_FILE).get("base_model_name_or_path")
    base = hub_id_of(named) if isinstance(named, str) else None
    if base is None:
        raise ValueError(
            f"the adapter's base model is {named!r}, a folder of this machine, which nobody else has: give its hub id "
            "(base_model), or push the merged model (ncalign merge)"
        )
    return base


def _changed(path: Path, changes: Mapping[str, object], *, without: str = "") -> bytes:
    """A configuration with some values changed, and one left out."""
    found = {name: value for name, value in _read(path).items() if name != without}
    return json.dumps({**found, **changes}, indent=2).encode()


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} can't be read: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no object: it is no configuration")
    return found


def _refuse_secrets(files: Mapping[str, bytes | Path]) -> None:
    """Refuse files that hold something that looks like a key, or the hub's token itself."""
    token = (get_token() or "").encode()
    for name, content in files.items():
        if isinstance(content, Path):
            content = content.read_bytes() if content.stat().st_size <= _MOST_TEXT and content.suffix != ".safetensors" else b""
        if _SECRET.search(content) or (len(token) > 8 and token in content):
            raise ValueError(f"{name} holds what looks like an access token: remove it; nothing was uploaded")


def _refuse_a_mixture(repo: str, there: list[str], package: Package) -> None:
    """Refuse a repository with weights that this push would leave beside its own."""
    stale = sorted(name for name in there if name.endswith((*PICKLED, ".safetensors")) and name not in package.files)
    if stale:
        raise ValueError(
            f"{repo} holds {stale[0]}, which is no part of this model and would stay beside it: delete it there, or give "
            "another repo; nothing was uploaded"
        )


@contextlib.contextmanager
def _told(repo: str) -> Iterator[None]:
    """Raise ValueError in place of what the hub's client raises."""
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise ValueError("you are not logged in to the hub: run `hf auth login`; --dry-run needs no login") from error
    except HfHubHTTPError as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise ValueError(
            f"the hub refuses {repo} ({reason}): the token must be one that may write there (`hf auth login`)"
        ) from error
    except ValueError:
        raise
    except Exception as error:  # classes of the library's own HTTP client, which differ from version to version
        raise ValueError(
            f"{constants.ENDPOINT} can't be reached ({error}): nothing was uploaded; --dry-run shows what would be"
        ) from error
