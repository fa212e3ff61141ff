"""The policy: a causal language model with its tokenizer and, optionally, a LoRA adapter."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from ncalign.core.hub import only_cached
from ncalign.core.store import Store
from ncalign.model.adapters import (
    ADAPTER_FILE,
    Task,
    adapter_base,
    adapter_shapes,
    base_from_cache,
    check_mergeable,
    hub_adapter,
    is_adapter,
    merged_into,
    reason,
    weight_of,
    with_adapter,
)
from ncalign.model.config import LoRA, Quantization, check_quantization
from ncalign.model.noise import Stated, disable_dropout
from ncalign.model.pickles import REMEDY, check_weights_file
from ncalign.model.quantized import (
    four_bits,
    hold_in_one_layout,
    refuse_stored_quantized,
    refuse_unquantizable,
    shapes_of,
    tell_of_whole_base,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
_MODEL_FILES = ("*.safetensors", "*.gguf", "*.json", "*.jinja", "*.model", "*.txt")
_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
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
        dropout: what the configuration states of dropout, which is off while the policy is in memory.
        merged_dtype: precision that the weights are saved in when an adapter is merged into them: the files', where the policy
            holds them more coarsely.
        trust_remote_code: whether code that comes with the model may run.
        quantization: how the frozen weights are held under the adapter, where they are in 4 bits.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    source: str
    fingerprint: str
    on_adapter: bool
    dropout: tuple[Stated, ...] = ()
    merged_dtype: torch.dtype = torch.float32
    trust_remote_code: bool = False
    quantization: Quantization | None = None


@contextmanager
def reference_mode(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Inside, an adapter is switched off, so that the model is the one it started from."""
    if isinstance(model, PeftModel):
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        with model.disable_adapter():
            # peft freezes what it switches off, and FSDP2 takes what is trained in its first pass for all that ever is.
            for parameter in trained:
                parameter.requires_grad_(True)
            yield
    else:
        yield


def load_policy(
    model: str,
    *,
    dtype: str | torch.dtype = "float32",
    lora: LoRA | None = None,
    quantization: Quantization | None = None,
    trust_remote_code: bool = False,
    seed: int = 0,
) -> Policy:
    """Load a policy from a Hugging Face folder or hub id (safetensors only; a folder with an adapter is merged).

    Args:
        model: folder or hub id.
        dtype: ``float32``, ``bfloat16`` or ``float64``, by name or as torch's. With bfloat16 and no adapter the weights stay
            float32, since AdamW's small steps vanish in bfloat16 weights; the computation runs under autocast.
        lora: adapter to add; every other weight is frozen.
        quantization: hold the linear layers' frozen weights in 4 bits (QLoRA); needs ``lora`` and the package bitsandbytes.
        trust_remote_code: run the code that comes with the model.
        seed: seed of the adapter's initial weights.

    Raises:
        ValueError: the model can't be loaded; the message says what was found and what is needed.
    """
    computation = str(dtype).removeprefix("torch.")
    if computation not in DTYPES:
        raise ValueError(f"dtype is {computation!r}; it must be one of {', '.join(DTYPES)}")
    check_quantization(quantization, lora, computation)
    weights_dtype = torch.float32 if computation == "bfloat16" and lora is None else DTYPES[computation]
    opened = hub_adapter(model, from_cache=only_cached(model, what="model")) or model
    loaded = load_model(opened, dtype=weights_dtype, trust_remote_code=trust_remote_code, quantization=quantization)
    tokenizer = load_tokenizer(opened, trust_remote_code=trust_remote_code)
    fingerprint = weights_fingerprint(loaded, computation=computation)
    stored = load_config(opened, trust_remote_code=trust_remote_code).dtype
    # Where the configuration does not say, weights are float32, as of old.
    stored = stored if isinstance(stored, torch.dtype) else torch.float32
    finer = torch.promote_types(stored, weights_dtype) != weights_dtype
    policy = Policy(
        loaded,
        tokenizer,
        model,
        fingerprint,
        is_adapter(opened),
        disable_dropout(loaded),
        stored if finer and quantization is None else weights_dtype,
        trust_remote_code,
        quantization,
    )
    return policy if lora is None else replace(policy, model=with_adapter(loaded, lora, model=model, seed=seed))


def load_model(
    model: str,
    *,
    dtype: torch.dtype,
    trust_remote_code: bool,
    task: Task = "CAUSAL_LM",
    what: str = "model",
    quantization: Quantization | None = None,
) -> PreTrainedModel:
    """The model in evaluation mode, all of its weights trainable, with an adapter folder's adapter merged into its base.

    Args:
        model: folder or hub id.
        dtype: of the weights.
        trust_remote_code: run the code that comes with the model.
        task: what it is to compute.
        what: what it is, for messages.
        quantization: how its linear layers are held, where not in ``dtype``; no weight is trainable then.

    Raises:
        ValueError: the model can't be loaded, is of another kind, or holds an adapter that can't be merged.
    """
    if quantization is not None:
        loaded = _load_quantized(
            model, four_bits(quantization, dtype), dtype=dtype, trust_remote_code=trust_remote_code, task=task, what=what
        )
    else:
        loaded = _load(model, (), dtype=dtype, trust_remote_code=trust_remote_code, task=task, what=what)
    loaded.requires_grad_(quantization is None)
    loaded.eval()
    return loaded


def _load_quantized(
    model: str, settings: BitsAndBytesConfig, *, dtype: torch.dtype, trust_remote_code: bool, task: Task, what: str
) -> PreTrainedModel:
    """Load a model with its linear layers in 4 bits; what an adapter and its base make up is quantized as a whole."""
    config = load_config(model, trust_remote_code=trust_remote_code)
    refuse_stored_quantized(config, model, what=what)
    refuse_unquantizable(shapes_of(config, dtype=dtype, trust_remote_code=trust_remote_code), model)
    load = partial(_load_whole, dtype=dtype, trust_remote_code=trust_remote_code, task=task, what=what, settings=settings)
    if is_adapter(model):
        # bitsandbytes quantizes what it reads from files.
        with tempfile.TemporaryDirectory() as folder:
            whole = _load(model, (), dtype=dtype, trust_remote_code=trust_remote_code, task=task, what=what)
            with quiet_transformers():
                whole.save_pretrained(folder)
            del whole
            loaded = load(folder, ())
    else:
        loaded = load(model, ())
    hold_in_one_layout(loaded)
    return loaded


def _load(
    model: str, adapters: tuple[str, ...], *, dtype: torch.dtype, trust_remote_code: bool, task: Task, what: str
) -> PreTrainedModel:
    """Load a model; ``adapters`` are the folders of those that will be put on it, the last one first."""
    if not is_adapter(model):
        return _load_whole(model, adapters, dtype=dtype, trust_remote_code=trust_remote_code, task=task, what=what)
    if Path(model).resolve() in (Path(other).resolve() for other in adapters):
        raise ValueError(f"the adapters in {', '.join(map(repr, adapters))} name each other as their base model")
    base = adapter_base(model)
    check_mergeable(model, task)
    tell_of_whole_base(model)
    loaded = _load(
        base,
        (model, *adapters),
        # Added to bfloat16 weights the adapter's update would be rounded with every sum.
        dtype=torch.promote_types(dtype, torch.float32),
        trust_remote_code=trust_remote_code,
        task=task,
        what="base model",
    )
    loaded = merged_into(loaded, model)
    cast_weights(loaded, dtype)
    return loaded


def _load_whole(
    model: str,
    adapters: tuple[str, ...],
    *,
    dtype: torch.dtype,
    trust_remote_code: bool,
    task: Task,
    what: str,
    settings: BitsAndBytesConfig | None = None,
) -> PreTrainedModel:
    """Load a model that is no adapter; the adapters that will be put on it may bring weights that it lacks."""
    _check_folder(model)
    from_cache = base_from_cache(adapters[0], model) if adapters else only_cached(model, what=what)
    adapter = hub_adapter(model, from_cache=from_cache)
    if adapter is not None:
        return _load(adapter, adapters, dtype=dtype, trust_remote_code=trust_remote_code, task=task, what=what)
    config = load_config(model, trust_remote_code=trust_remote_code, from_cache=from_cache)
    refuse_stored_quantized(config, model, what=what)
    made_as = "a causal language model" if task == "CAUSAL_LM" else "a sequence classifier"
    if task == "CAUSAL_LM" and config.is_encoder_decoder:
        raise ValueError(
            f"{what} {model!r} can't be loaded as {made_as}: it is an encoder-decoder model (model_type {config.model_type})"
        )
    check_weights_file(config, model)
    supplied = {name: shape for folder in adapters for name, shape in adapter_shapes(folder).items()}
    head = next((shape[0] for name, shape in supplied.items() if name in ("score.weight", "classifier.weight")), None)
    if task == "SEQ_CLS" and head is not None:
        config.num_labels = head
    make = AutoModelForCausalLM if task == "CAUSAL_LM" else AutoModelForSequenceClassification
    try:
        with quiet_transformers(model):
            found: Any = make.from_pretrained(
                model,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                local_files_only=from_cache,
                quantization_config=settings,
            )
    # What a configuration that does not fit makes the library raise differs from model to model.
    except Exception as error:
        raise ValueError(f"{what} {model!r} can't be loaded as {made_as}: {_why_not_loaded(model, error)}") from error
    loaded, report = found
    assert isinstance(loaded, PreTrainedModel)
    compute_as_configured(loaded, dtype)
    missing = set(report["missing_keys"]) - supplied.keys()
    if missing:
        raise ValueError(
            f"{what} {model!r} lacks {len(missing)} weights that its config.json asks for in {made_as} (first: "
            f"{min(missing)}): copy or download it again, fix its config.json, or give a model of this kind"
        )
    if task == "CAUSAL_LM" and getattr(config, "is_decoder", None) is False:
        _refuse_bidirectional(loaded, model)
    return loaded


def compute_as_configured(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Choose code for experts and attention that computes what the configuration says, in this precision."""
    if dtype == torch.float64:
        # torch multiplies all experts at once in lower precisions only.
        model.set_experts_implementation("eager")
    text = model.config.get_text_config()
    # Before 5.21 transformers chooses sdpa for Gemma 2, which leaves the cap on scores out without a word.
    if getattr(text, "attn_logit_softcapping", None) is not None and text._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")


@torch.no_grad()
def _refuse_bidirectional(loaded: PreTrainedModel, model: str) -> None:
    """Masked language models load as causal ones, and give each token a log-prob that knows what comes after it."""
    ids = torch.arange(1, 9)[None] % weight_of(loaded.get_input_embeddings()).shape[0]
    changed = torch.cat([ids[:, :-1], ids[:, :1]], dim=1)
    one, other = (loaded.eval()(input_ids=tokens, use_cache=False).logits[:, :-1] for tokens in (ids, changed))
    if not torch.allclose(one, other, atol=1e-4, rtol=1e-3):
        raise ValueError(
            f"model {model!r} can't be loaded as a causal language model: its tokens attend to those after them, as a masked "
            f"language model's do (model_type {loaded.config.model_type}, is_decoder false)"
        )


def load_config(model: str, *, trust_remote_code: bool, from_cache: bool | None = None) -> PreTrainedConfig:
    """The configuration of a model, or of the base model of an adapter's folder.

    Raises:
        ValueError: it can't be read.
    """
    seen = set()
    while is_adapter(model) and model not in seen:
        seen.add(model)
        model = adapter_base(model)
    if from_cache is None:
        from_cache = only_cached(model, what="model")
    try:
        with quiet_transformers(model):
            config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code, local_files_only=from_cache)
    # What a hand-made file makes the library raise differs from field to field.
    except Exception as error:
        raise ValueError(f"the config.json of model {model!r} can't be read: {_why_not_loaded(model, error)}") from error
    assert isinstance(config, PreTrainedConfig)
    return config


def _check_folder(model: str) -> None:
    """Refuse a folder without a model; one may lie inside it."""
    folder = Path(model)
    if not folder.exists() or (folder / "config.json").is_file():
        return
    inside = sorted(
        path.name for path in folder.iterdir() if (path / "config.json").is_file() or (path / ADAPTER_FILE).is_file()
    )
    there = f"; it holds models or adapters in {', '.join(inside)}: give one of those" if inside else ""
    raise ValueError(f"model {model!r} has no config.json: give a Hugging Face model folder, or a hub id{there}")


def cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast the weights as loading in this precision would: buffers such as rotary frequencies keep theirs."""
    kept = tuple(model._keep_in_fp32_modules_strict or ())
    for name, parameter in model.named_parameters():
        if not any(part in name for part in kept):
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def _why_not_loaded(base: str, error: Exception) -> str:
    """The library's reason, and the remedy for a folder."""
    why = reason(error).rstrip(".")
    if "trust_remote_code" in str(error):
        return "it needs code that comes with it, which is not run unasked: look at it, and set trust_remote_code"
    if isinstance(error, SafetensorError):
        return f"a safetensors file is damaged ({why}): copy or download it again"
    if isinstance(error, RuntimeError):
        return "its weights do not have the sizes that its config.json asks for: they belong to different models"
    if isinstance(error, OSError) and Path(base).is_dir():
        return f"{why} (a folder needs config.json and *.safetensors; {REMEDY})"
    return why


def load_tokenizer(model: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a padding token (EOS where it has none of its own); an adapter without one has its base's."""
    if is_adapter(model) and not any((Path(model) / name).is_file() for name in _TOKENIZER_FILES):
        tokenizer = load_tokenizer(adapter_base(model), trust_remote_code=trust_remote_code)
        template = Path(model) / "chat_template.jinja"
        if template.is_file():
            tokenizer.chat_template = template.read_text(encoding="utf-8")
        return tokenizer
    from_cache = only_cached(model, what="model")
    adapter = hub_adapter(model, from_cache=from_cache)
    if adapter is not None:
        return load_tokenizer(adapter, trust_remote_code=trust_remote_code)
    try:
        with quiet_transformers(model):
            tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code, local_files_only=from_cache)
    # It reads config.json too: what a hand-made file makes the library raise differs from field to field.
    except Exception as error:
        folder = Path(model)
        if not folder.exists():
            raise ValueError(f"the tokenizer of {model!r} can't be loaded: {_why_not_loaded(model, error)}") from error
        if not is_adapter(model):
            _check_folder(model)
            load_config(model, trust_remote_code=trust_remote_code)
        raise ValueError(
            f"the tokenizer of {model!r} can't be loaded: {reason(error).rstrip('.: ')} (tokenizer.json and "
            "tokenizer_config.json are needed, as the tokenizer's save_pretrained writes them)"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {model!r} has no EOS token: set eos_token in its tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


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


def reading_fingerprint(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of how texts become tokens and back, and of what ends an answer: tokenizer, chat template, end tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # Calls with padding or truncation leave their settings behind; a tokenizer without a backend is known by its words.
    own = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str()) | {"padding": None, "truncation": None}
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return Store.key(type(tokenizer).__name__, own, tokenizer.chat_template, special, ends)


def model_identity(model: str) -> str:
    """Stands for a model in fingerprints: for a folder its files' names, sizes and times, and an adapter's base; else its name.

    Weights are not read: a folder that was copied counts as another one, and is evaluated again.
    """
    folder = Path(model)
    if not folder.is_dir():
        return Store.key(model)
    files = sorted({path for pattern in _MODEL_FILES for path in folder.glob(pattern) if path.is_file()})
    described: list[object] = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    if is_adapter(model):
        described.append(model_identity(adapter_base(model)))
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
