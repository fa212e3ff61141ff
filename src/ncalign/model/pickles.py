"""Weights are read from safetensors alone: a pickle can run code when it is read."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import AutoConfig, PreTrainedConfig

from ncalign.core.hub import only_cached

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
"""Endings of files that torch unpickles."""

REMEDY = (
    "pickled weights such as *.bin are not read, since they can run code: if you trust who made them, load them with "
    "transformers or peft and write them with save_pretrained, which makes *.safetensors"
)

_UNREAD = ("*.h5", "*.msgpack", "*.ot", "*.onnx", "*.gguf", "onnx/*", "openvino/*")
_WEIGHTS = ("pytorch_model", "adapter_model", "model", "consolidated")


def check_weights_file(config: PreTrainedConfig, model: str) -> None:
    """Refuse a configuration that names a pickle as the model's weights: transformers reads it, whatever it is told.

    Raises:
        ValueError: it does.
    """
    name = getattr(config, "transformers_weights", None)
    if isinstance(name, str) and name.endswith(PICKLED):
        raise ValueError(f"model {model!r}: its config.json names {name!r} as its weights; {REMEDY}")


def without_pickles(model: str, *, what: str) -> str:
    """The folder of a model for a library that would read pickled weights where it finds no others.

    Args:
        model: a folder, whose parts may lie in folders of their own; or a hub id, of which all but pickles is downloaded.
        what: what the model is, for messages.

    Raises:
        ValueError: a folder of it has pickled weights alone, or there is no such model.
    """
    from_cache = only_cached(model, what=what)
    if Path(model).is_dir():
        folder = Path(model)
    else:
        unread = [*_UNREAD, *(f"*{ending}" for ending in PICKLED)]
        folder = Path(snapshot_download(model, ignore_patterns=unread, local_files_only=from_cache))
    # One level down lie the parts of models made of several modules.
    for part in (folder, *sorted(path for path in folder.iterdir() if path.is_dir())):
        pickled = sorted(path.name for path in part.iterdir() if path.suffix in PICKLED and path.name.startswith(_WEIGHTS))
        if pickled and not any(part.glob("*.safetensors")):
            raise ValueError(f"{what} {model!r}: {part / pickled[0]} has no *.safetensors beside it; {REMEDY}")
    if (folder / "config.json").is_file():
        check_weights_file(AutoConfig.from_pretrained(folder), model)
    return str(folder)
