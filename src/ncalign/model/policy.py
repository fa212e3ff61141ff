"""The policy: a causal language model with its tokenizer and, optionally, a LoRA adapter."""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from ncalign.core.hub import only_cached
from ncalign.core.store import Store
from ncalign.model.config import LoRA

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
_ADAPTER_FILE = "adapter_config.json"
_MODEL_FILES = ("*.safetensors", "*.gguf", "*.json", "*.jinja", "*.model", "*.txt")
_NOT_NUMBERS = frozenset({"_name_or_path", "transformers_version", "architectures"})


@dataclass(frozen=True)
class Policy:
    """A model, its tokenizer and what identifies the weights it started from.

    Attributes:
        model: the causal language model; a ``PeftModel`` when an adapter is trained.
        tokenizer: its tokenizer, with a padding token.
        source: the folder or hub id the model was loaded from.
        fingerprint: SHA-256 over the starting weights' names, shapes, precision and bytes, the configuration and the
            attention code.
        on_adapter: whether the source is an adapter, which loading merged: a further adapter fits these weights only.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    source: str
    fingerprint: str
    on_adapter: bool


@contextmanager
def reference_mode(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Inside, an adapter is switched off, so that the model is the one it started from."""
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            yield
    else:
        yield


def load_policy(
    model: str,
    *,
    dtype: str | torch.dtype = "float32",
    lora: LoRA | None = None,
    trust_remote_code: bool = False,
    seed: int = 0,
) -> Policy:
    """Load a policy from a Hugging Face folder or hub id (safetensors only; a folder with an adapter is merged).

    Args:
        model: folder or hub id.
        dtype: ``float32``, ``bfloat16`` or ``float64``, by name or as torch's. With bfloat16 and no adapter the weights stay
            float32, since AdamW's small steps vanish in bfloat16 weights; the computation runs under autocast.
        lora: adapter to add; every other weight is frozen.
        trust_remote_code: run the code that comes with the model.
        seed: seed of the adapter's initial weights.

    Raises:
        ValueError: the model can't be loaded; the message says what was found and what is needed.
    """
    computation = str(dtype).removeprefix("torch.")
    if computation not in DTYPES:
        raise ValueError(f"dtype is {computation!r}; it must be one of {', '.join(DTYPES)}")
    weights_dtype = torch.float32 if computation == "bfloat16" and lora is None else DTYPES[computation]
    loaded = load_model(model, dtype=weights_dtype, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    disable_dropout(loaded)
    fingerprint = weights_fingerprint(loaded, computation=computation)
    on_adapter = (Path(model) / _ADAPTER_FILE).is_file()
    if lora is None:
        return Policy(loaded, tokenizer, model, fingerprint, on_adapter)
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    adapter = LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets, task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng(devices=[]), _peft_quirk():
        torch.manual_seed(seed)
        try:
            adapted = get_peft_model(loaded, adapter)
        except ValueError as error:
            raise ValueError(f"lora.target_modules={lora.target_modules!r} does not fit {model}: {error}") from error
    return Policy(adapted, tokenizer, model, fingerprint, on_adapter)


def load_model(model: str, *, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    """The model in evaluation mode, with an adapter folder's adapter merged into its base."""
    folder = Path(model)
    base, loading_dtype = model, dtype
    if (folder / _ADAPTER_FILE).is_file():
        # Added to bfloat16 weights the adapter's update would be rounded with every sum.
        base, loading_dtype = adapter_base(model), torch.promote_types(dtype, torch.float32)
    elif folder.exists() and not (folder / "config.json").is_file():
        raise ValueError(f"model {model!r} has no config.json: give a Hugging Face model folder, or a hub id")
    from_cache = only_cached(base, what="model")
    try:
        with quiet_transformers(base):
            found: Any = AutoModelForCausalLM.from_pretrained(
                base,
                dtype=loading_dtype,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                local_files_only=from_cache,
            )
    # A size that does not fit is a RuntimeError; a damaged file is safetensors' own.
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"model {base!r} can't be loaded as a causal language model: {_why_not_loaded(base, error)}"
        ) from error
    loaded, report = found
    if report["missing_keys"]:
        raise ValueError(
            f"model {base!r} lacks {len(report['missing_keys'])} weights that its config.json asks for (first: "
            f"{min(report['missing_keys'])}): copy or download it again, or fix its config.json"
        )
    if base != model:
        try:
            with _peft_quirk():
                loaded = PeftModel.from_pretrained(loaded, model, use_safetensors=True).merge_and_unload()
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"the adapter in {model!r} can't be put on its base model {base!r}: {_first_line(error)} (it needs "
                "adapter_model.safetensors, made for this base model)"
            ) from error
        _cast_weights(loaded, dtype)
    assert isinstance(loaded, PreTrainedModel)
    loaded.eval()
    return loaded


def _cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast the weights as loading in this precision would: buffers such as rotary frequencies keep theirs."""
    kept = tuple(model._keep_in_fp32_modules_strict or ())
    for name, parameter in model.named_parameters():
        if not any(part in name for part in kept):
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def adapter_base(folder: str) -> str:
    """The base model of a folder's adapter.

    Raises:
        ValueError: The adapter's configuration can't be read, or names no base model.
    """
    try:
        base = PeftConfig.from_pretrained(folder).base_model_name_or_path
        if not base:
            raise ValueError("it names no base model")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder}/{_ADAPTER_FILE} can't be read: {_first_line(error)}; copy the adapter again") from error
    return str(base)


def _why_not_loaded(base: str, error: Exception) -> str:
    """The library's reason, and the remedy for a folder."""
    reason = _first_line(error).rstrip(".")
    if isinstance(error, SafetensorError):
        return f"a safetensors file is damaged ({reason}): copy or download it again"
    if isinstance(error, RuntimeError):
        return "its weights do not have the sizes that its config.json asks for: they belong to different models"
    if Path(base).is_dir():
        return f"{reason} (a folder needs config.json and *.safetensors; pickled weights such as *.bin are not read)"
    return reason


def load_tokenizer(model: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a padding token (EOS where it has none of its own)."""
    from_cache = only_cached(model, what="model")
    try:
        with quiet_transformers(model):
            tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code, local_files_only=from_cache)
    except (OSError, ValueError) as error:
        folder = Path(model)
        if not folder.exists():
            raise ValueError(f"the tokenizer of {model!r} can't be loaded: {_why_not_loaded(model, error)}") from error
        if not any((folder / name).is_file() for name in ("config.json", _ADAPTER_FILE)):
            raise ValueError(f"model {model!r} has no config.json: give a Hugging Face model folder, or a hub id") from error
        raise ValueError(
            f"the tokenizer of {model!r} can't be loaded: {_first_line(error).rstrip('.: ')} (tokenizer.json and "
            "tokenizer_config.json are needed, as the tokenizer's save_pretrained writes them)"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {model!r} has no EOS token: set eos_token in its tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def disable_dropout(model: torch.nn.Module) -> None:
    """Set every dropout of the model to 0: log-ratios between two noisy passes would not start at 0."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "hidden_dropout", "resid_pdrop", "attn_pdrop", "embd_pdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def weights_fingerprint(model: PreTrainedModel, *, computation: str) -> str:
    """SHA-256 over what a log-prob depends on besides the tokens: weights, configuration, precision and attention code."""
    # Where the files lie and who wrote them changes no number; a rotary base or a window does, and no weight shows it.
    config = {name: value for name, value in model.config.to_dict().items() if name not in _NOT_NUMBERS}
    described = json.dumps(config, sort_keys=True, default=str)
    digest = hashlib.sha256(f"{computation}|{model.config._attn_implementation}|{described}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def model_identity(model: str) -> str:
    """Stands for a model in fingerprints: for a folder its files' names, sizes and times, and an adapter's base; else its name.

    Weights are not read: a folder that was copied counts as another one, and is evaluated again.
    """
    folder = Path(model)
    if not folder.is_dir():
        return Store.key(model)
    files = sorted({path for pattern in _MODEL_FILES for path in folder.glob(pattern) if path.is_file()})
    described: list[object] = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    if (folder / _ADAPTER_FILE).is_file():
        base = adapter_base(model)
        described.append(base if Path(base).resolve() == folder.resolve() else model_identity(base))
    return Store.key(described)


@contextmanager
def quiet_transformers(model: str | None = None) -> Iterator[None]:
    """Keep transformers' bars and reports off stderr; errors are raised, and ncalign prints its own lines.

    Args:
        model: what is loaded; bars of a download, which may take long, are left for what is not a local folder. None where
            nothing is downloaded, as in saving.
    """
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    hidden = bars and (model is None or Path(model).is_dir())
    transformers_logging.set_verbosity(logging.CRITICAL)
    if hidden:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if hidden:
            transformers_logging.enable_progress_bar()


@contextmanager
def _peft_quirk() -> Iterator[None]:
    """Silence peft 0.21, which asks transformers 5.23 for a property under its old name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        yield


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0].strip()
