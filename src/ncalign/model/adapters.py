"""Adapters: new ones to train, and those given as models: their base model, whether they can become a part of it, merging."""

from __future__ import annotations

import copy
import functools
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from ncalign.core.hub import only_cached
from ncalign.model.config import LoRA
from ncalign.model.pickles import REMEDY

ADAPTER_FILE = "adapter_config.json"
Task = Literal["CAUSAL_LM", "SEQ_CLS"]
"""What a model computes, in peft's words: log-probs of tokens, or numbers for a whole text."""

_WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_USES = {"CAUSAL_LM": "a causal language model", "SEQ_CLS": "a reward model or another classifier"}
_WHOLE = ("weight", "base_layer.weight", "modules_to_save.weight", "token_adapter.base_layer.weight")
"""Names, within an embedding, of a tensor that holds all of its rows."""
_REPLACED = re.compile(r"\.(modules_to_save|original_module)\.\w+$")
_PROBE_TOKENS = 32
_MERGED_WITHIN = 0.01
"""How far logits may move with merging, in their standard deviations: rounding is far below, another model far above."""


def is_adapter(model: str) -> bool:
    """Whether a model's folder holds an adapter.

    Raises:
        ValueError: it holds a whole model's weights too, so that it is not clear what is meant.
    """
    folder = Path(model)
    if not (folder / ADAPTER_FILE).is_file():
        return False
    whole = sorted(path.name for path in folder.glob("model*.safetensors"))
    if whole:
        raise ValueError(
            f"{model} holds both an adapter ({ADAPTER_FILE}) and a whole model ({whole[0]}): move one of them to a folder of "
            "its own, and give the folder that is meant"
        )
    return True


@functools.cache
def hub_adapter(name: str, *, from_cache: bool) -> str | None:
    """The local copy of a hub id's adapter; None where the hub id is no adapter.

    transformers would put such an adapter beside its base model's weights unasked, and save it in place of the model.

    Args:
        name: a hub id that exists.
        from_cache: whether to ask the hub's cache alone.

    Raises:
        ValueError: the adapter can't be downloaded.
    """
    if Path(name).exists():
        return None
    try:
        there = (
            try_to_load_from_cache(name, ADAPTER_FILE, cache_dir=constants.HF_HUB_CACHE)
            if from_cache
            else HfApi().file_exists(name, ADAPTER_FILE)
        )
        if not there or not (from_cache is False or isinstance(there, str)):
            return None
        # Not the checkpoints in its folders, nor pickled weights.
        return snapshot_download(
            name, allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"], local_files_only=from_cache
        )
    except Exception as error:  # classes of the hub's HTTP client, which differ from version to version
        raise ValueError(f"the adapter {name!r} can't be downloaded: {reason(error)}") from error


def adapter_config(folder: str) -> PeftConfig:
    """The configuration of a folder's adapter.

    Raises:
        ValueError: it can't be read, or is of a kind that this version of peft does not know.
    """
    try:
        config = PeftConfig.from_pretrained(folder)
    # What a hand-made file lets peft raise differs from field to field.
    except Exception as error:
        raise ValueError(
            f"{folder}/{ADAPTER_FILE} can't be read: {reason(error)}; copy the adapter again, or fix the file"
        ) from error
    if config.peft_type is None:
        raise ValueError(f"{folder}/{ADAPTER_FILE} can't be read: it has no peft_type; copy the adapter again")
    assert isinstance(config, PeftConfig)
    return config


def adapter_base(folder: str) -> str:
    """The base model of a folder's adapter: a path that opens from here, or a hub id.

    Raises:
        ValueError: The adapter's configuration can't be read, or names no base model, or a path that leads to two.
    """
    named = adapter_config(folder).base_model_name_or_path
    file = f"{folder}/{ADAPTER_FILE}"
    if not isinstance(named, str) or not named:
        raise ValueError(f"{file} can't be read: it names no base model: set base_model_name_or_path to its folder or hub id")
    found = [path for path in dict.fromkeys([Path(named), Path(folder) / named]) if path.is_dir()]
    if len({path.resolve() for path in found}) > 1:
        raise ValueError(
            f"{file}: base_model_name_or_path {named!r} is both {found[0].resolve()} and {found[1].resolve()}: write the path "
            "of the one that is meant there"
        )
    if not found:
        return named
    if found[0].resolve() == Path(folder).resolve():
        raise ValueError(f"{file}: base_model_name_or_path {named!r} is the adapter's own folder: write its base model's there")
    return named if found[0] == Path(named) else str(found[0])


def base_from_cache(folder: str, base: str) -> bool:
    """:func:`ncalign.core.hub.only_cached` for an adapter's base model, with all places that were tried in the message."""
    try:
        return only_cached(base, what="base model")
    except ValueError as error:
        raise ValueError(
            f"the adapter in {folder!r} needs its base model: {error}; nor is there a folder {str(Path(folder) / base)!r}. Set "
            f"base_model_name_or_path in {folder}/{ADAPTER_FILE} to where it is"
        ) from error


def check_mergeable(folder: str, task: Task) -> None:
    """Refuse, before its base model is loaded, an adapter that can't become a part of the model.

    Raises:
        ValueError: it is made for another task, adds virtual tokens or layers, mixes others, or has no weights in safetensors.
    """
    config = adapter_config(folder)
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    made_for = getattr(config.task_type, "value", config.task_type)
    if made_for not in (None, task):
        raise ValueError(
            f"the adapter in {folder!r} is made for {_USES.get(made_for, 'another task')} (task_type {made_for}), and is given "
            f"as {_USES[task]} ({task})"
        )
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise ValueError(
            f"the adapter in {folder!r} is of type {kind}: it adds virtual tokens or layers to the model and can't be merged "
            "into its base model's weights; give its base model, or an adapter that can be merged (LoRA and its like)"
        )
    if kind == "XLORA":
        raise ValueError(f"the adapter in {folder!r} is of type {kind}: it mixes other adapters, and can't be merged; give one")
    check_weights(folder)


def check_weights(folder: str) -> None:
    """Refuse an adapter without weights in safetensors: peft would read pickled ones.

    Raises:
        ValueError: it has none.
    """
    if not (Path(folder) / _WEIGHTS_FILE).is_file():
        raise ValueError(f"the adapter in {folder!r} has no {_WEIGHTS_FILE} ({REMEDY})")


def adapter_shapes(folder: str) -> dict[str, tuple[int, ...]]:
    """Shapes of an adapter's tensors, by their names in the base model.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        with safe_open(str(Path(folder) / _WEIGHTS_FILE), framework="pt") as file:
            return {name.removeprefix(_PREFIX): tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder}/{_WEIGHTS_FILE} is damaged ({reason(error)}): copy the adapter again") from error


def with_adapter(loaded: PreTrainedModel, lora: LoRA, *, model: str, seed: int) -> PeftModel:
    """The model with a new LoRA adapter, which alone is trained.

    Args:
        loaded: the model.
        lora: the adapter.
        model: what the adapter is to call its base model, a folder or hub id.
        seed: seed of its initial weights.

    Raises:
        ValueError: the model has no such modules or parameters.
    """
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    names = [name for name, _ in loaded.named_parameters()]
    for target in lora.target_parameters:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            stacked = sorted({_in_layer(name) for name, weight in loaded.named_parameters() if weight.ndim == 3})
            raise ValueError(
                f"lora.target_parameters: {target!r} is no parameter of {model}; its experts' are "
                f"{', '.join(stacked) or 'modules of their own, which lora.target_modules names'}"
            )
    adapter = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        target_parameters=list(lora.target_parameters) or None,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]), quiet_peft():
        torch.manual_seed(seed)
        try:
            adapted = get_peft_model(loaded, adapter)
        except ValueError as error:
            if lora.dropout and "lora_dropout" in str(error):
                raise ValueError(
                    f"lora.dropout ({lora.dropout:g}) must be 0: lora.target_modules={lora.target_modules!r} takes in the "
                    f"experts of {model}, which are parameters, and an adapter on a parameter has no input to drop; or name "
                    "modules outside the experts"
                ) from error
            raise ValueError(f"lora.target_modules={lora.target_modules!r} does not fit {model}: {error}") from error
    assert isinstance(adapted, PeftModel)
    adapted.active_peft_config.base_model_name_or_path = absolute_base(model)
    return adapted


def _in_layer(name: str) -> str:
    """A parameter's name from its layer on: the same in all layers."""
    return re.split(r"\.\d+\.", name)[-1]


def merged_into(base: PreTrainedModel, folder: str) -> PreTrainedModel:
    """The base model with a folder's adapter merged into its weights; its vocabulary becomes the adapter's.

    Raises:
        ValueError: the adapter does not fit the base model, or can't be merged.
    """
    try:
        _resize_vocabulary(base, folder)
        with quiet_peft(), warnings.catch_warnings(record=True) as warned:
            warnings.filterwarnings("always", message="Found missing adapter keys")
            model = PeftModel.from_pretrained(base, folder, use_safetensors=True)
            mapping = getattr(base, "_checkpoint_conversion_mapping", None)
            result: Any = set_peft_model_state_dict(model, load_peft_weights(folder, device="cpu", key_mapping=mapping))
        # Beside a module's new weights peft writes what they replace, and passes it over in loading.
        lost = sorted(name for name in result.unexpected_keys if not _REPLACED.search(name))
        if lost:
            raise ValueError(f"{len(lost)} of its weights have no place in it (first: {lost[0]})")
        if warned:
            raise ValueError(str(warned[0].message)[:200])
    # Hand-made or foreign adapters make peft raise what it likes.
    except Exception as error:
        raise ValueError(
            f"the adapter in {folder!r} can't be put on its base model {base.name_or_path!r}: {reason(error)} (it needs "
            f"{_WEIGHTS_FILE}, made for this base model)"
        ) from error
    try:
        before = _logits(model)
        whole = merged(model)
        moved = float((_logits(whole) - before).abs().max() / before.std(correction=0).clamp(min=1.0))
    except Exception as error:
        raise ValueError(_unmergeable(folder, model, reason(error))) from error
    if not moved <= _MERGED_WITHIN:
        raise ValueError(_unmergeable(folder, model, f"merged it gives other logits, {moved:.2g} standard deviations off"))
    return whole


def _unmergeable(folder: str, model: PeftModel, why: str) -> str:
    kind = model.active_peft_config.peft_type
    return (
        f"the adapter in {folder!r} (type {getattr(kind, 'value', kind)}) can't be merged into its base model's weights: "
        f"{why}; give its base model, or an adapter that can be merged (LoRA and its like)"
    )


@torch.no_grad()
def _logits(model: PreTrainedModel | PeftModel) -> Tensor:
    """Logits of some tokens from all over the vocabulary, those that an adapter trains among them."""
    causal = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(causal, PreTrainedModel)
    size = int(weight_of(causal.get_input_embeddings()).shape[0])
    ids = torch.arange(1, _PROBE_TOKENS + 1) * max(1, size // _PROBE_TOKENS) % size
    ids = ids[: getattr(causal.config.get_text_config(), "max_position_embeddings", None) or _PROBE_TOKENS]
    logits: Tensor = torch.nn.Module.__call__(causal.eval(), input_ids=ids.to(causal.device)[None], use_cache=False).logits
    return logits.double()


def _resize_vocabulary(base: PreTrainedModel, folder: str) -> None:
    """Give the base model as many token embeddings as the adapter was trained with.

    Raises:
        ValueError: the adapter does not hold the embeddings that the base model lacks.
    """
    shapes = adapter_shapes(folder)
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    size = int(weight_of(embedding).shape[0])
    places = {name for name, module in base.named_modules() if module is embedding or (head is not None and module is head)}
    sizes = {rows for place in places for rows in _vocabularies(place, shapes)}
    if sizes <= {size}:
        return
    whole = {place for place in places if any(f"{place}.{name}" in shapes for name in _WHOLE)}
    if len(sizes) > 1 or (max(sizes) > size and whole != places):
        raise ValueError(
            f"it was trained with a vocabulary of size {', '.join(map(str, sorted(sizes)))}, its base model has one of size "
            f"{size}, and the adapter does not hold the further embeddings: name the resized model as its base model"
        )
    base.resize_token_embeddings(max(sizes), mean_resizing=False)


def weight_of(embedding: torch.nn.Module) -> Tensor:
    """An embedding's rows."""
    weight = embedding.weight
    assert isinstance(weight, Tensor)
    return weight


def _vocabularies(place: str, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[int]:
    """The vocabulary's size by each tensor that an adapter holds for an embedding or a head."""
    rows = {f"{place}.{name}": 0 for name in (*_WHOLE, "lora_B.weight")} | {f"{place}.lora_embedding_A": 1}
    for name, axis in rows.items():
        if name in shapes and len(shapes[name]) == 2:
            yield shapes[name][axis]


def merged(model: PeftModel) -> PreTrainedModel:
    """The model with its adapter merged; the given one is used up.

    Where the adapter changes one of several modules that share a weight, such as embeddings tied to the head, each first gets
    a weight of its own: merging adds to it in place, and would change the others too. If they are the same again afterwards,
    they are tied again; if not, the configuration says that they are not.
    """
    base = model.get_base_model()
    assert isinstance(base, PreTrainedModel)
    untied = _untie(model)
    tied = [part for part in _configured(base) if part.config.tie_word_embeddings] if untied else []
    for part in tied:
        part.config.tie_word_embeddings = False
    with quiet_peft():
        whole = model.merge_and_unload(safe_merge=True)
    assert isinstance(whole, PreTrainedModel)
    if untied:
        for part in tied:
            part.config.tie_word_embeddings = True
        pairs = whole.get_expanded_tied_weights_keys(all_submodels=True)
        if all(torch.equal(whole.get_parameter(one), whole.get_parameter(other)) for one, other in pairs.items()):
            whole.tie_weights()
        else:
            for part in tied:
                part.config.tie_word_embeddings = False
                part.all_tied_weights_keys = {}
    return whole


def _configured(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The model and the models inside it whose configuration can tie embeddings."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and hasattr(module.config, "tie_word_embeddings"):
            yield module


def _untie(model: PeftModel) -> bool:
    """Give each module a weight of its own, if the adapter changes one whose weight others share; returns whether it does."""
    users: dict[int, list[tuple[torch.nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                users.setdefault(id(parameter), []).append((module, name))
    adapted = {
        id(inside)
        for module in model.modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
        for inside in module.modules()
    }
    shared = [found for found in users.values() if len(found) > 1]
    if not any(id(module) in adapted for found in shared for module, _ in found):
        return False
    for found in shared:
        for module, name in found[1:]:
            weight = getattr(module, name)
            setattr(module, name, torch.nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad))
    return True


def shallow_copy(model: PeftModel) -> PeftModel:
    """A copy with the same weights in the same memory: what replaces a weight of the copy leaves the model as it is."""
    tensors = [*model.parameters(), *model.buffers()]
    shared = {
        id(t): torch.nn.Parameter(t.data, requires_grad=False) if isinstance(t, torch.nn.Parameter) else t for t in tensors
    }
    return copy.deepcopy(model, shared)


def adapter_rank(folder: str) -> int:
    """The rank of a folder's LoRA adapter.

    Raises:
        ValueError: it is no LoRA adapter.
    """
    rank = getattr(adapter_config(folder), "r", None)
    if not isinstance(rank, int):
        raise ValueError(f"the adapter in {folder!r} has no rank: only LoRA adapters can be used here")
    return rank


def absolute_base(source: str) -> str:
    """What an adapter calls its base model, so that it opens from anywhere: a local folder's whole path, or the hub id."""
    return str(Path(source).resolve()) if Path(source).is_dir() else source


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Silence what peft warns of and is seen to here."""
    with warnings.catch_warnings():
        # peft 0.21 asks transformers 5.23 for a property under its old name.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        # It sets this itself, as it says, for layers that store their weights the other way round.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False but the target", category=UserWarning)
        # `merged` unties what an adapter sets apart.
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`", category=UserWarning)
        # It looks for them among modules, where parameters have taken them.
        warnings.filterwarnings("ignore", message=r"The following \w+_pattern keys did not match", category=RuntimeWarning)
        yield


def reason(error: Exception) -> str:
    """The first line of a library's error that says something; its class where the words alone would not."""
    first, *others = str(error).strip().split("\n")
    text = f"{first} {others[0].strip()}" if others and first.endswith(":") else first.strip()
    if isinstance(error, LookupError | TypeError | AttributeError | AssertionError | ArithmeticError) or not text:
        return f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text
