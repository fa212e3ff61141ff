"""Adapters given as models: merged they compute what base and adapter compute, or they are refused in words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate import Accelerator
from huggingface_hub import constants
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertLMHeadModel,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from conftest import build_model, build_tokenizer
from ncalign.core.outputs import claim
from ncalign.model.adapters import adapter_base, quiet_peft
from ncalign.model.config import LoRA
from ncalign.model.logprobs import LogprobModel
from ncalign.model.policy import Policy, load_model, load_policy, load_tokenizer, model_identity
from ncalign.rewards.model import ModelReward
from ncalign.training.export import save_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # What peft says of tied embeddings and of saving them, while these tests make adapters.
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]
IDS = torch.arange(5, 37)[None]
ATTENTION = ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def tied_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A model folder whose head is its embeddings."""
    folder = tmp_path_factory.mktemp("tied")
    model = build_model(tiny_tokenizer)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


def shake(model: torch.nn.Module, size: float = 0.1) -> None:
    """Move everything that is trained away from where it starts."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(size * torch.randn(parameter.shape, generator=generator))


def make_adapter(
    base: Path, target: Path, config: peft.PeftConfig, *, grow: int = 0, auto: type = AutoModelForCausalLM, **options: Any
) -> torch.Tensor:
    """Write an adapter that has learned something; what base and adapter compute is returned."""
    model = auto.from_pretrained(base, **options)
    if grow:
        model.resize_token_embeddings(model.config.vocab_size + grow, mean_resizing=False)
    adapted = get_peft_model(model, config)
    shake(adapted)
    adapted.save_pretrained(target)
    return logits(adapted)


def lora(**fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ATTENTION, "task_type": "CAUSAL_LM", **fields})


def load(folder: Path) -> PreTrainedModel:
    return load_model(str(folder), dtype=torch.float32, trust_remote_code=False)


def again(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Saved and loaded, as others will load it."""
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


APART: dict[str, dict[str, Any]] = {
    "adapter on the embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "adapter on the head": {"target_modules": ["lm_head"]},
    "adapter on both": {"target_modules": ["embed_tokens", "lm_head"]},
    "new embeddings": {"modules_to_save": ["embed_tokens"]},
    "new head": {"modules_to_save": ["lm_head"]},
    "new embeddings and head": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "new embeddings and adapter on the head": {"modules_to_save": ["embed_tokens"], "target_modules": ["lm_head"]},
}
TOGETHER: dict[str, dict[str, Any]] = {
    "neither": {},
    "some tokens": {"trainable_token_indices": [5, 9, 200]},
    "new embeddings tied to the head": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "adapter on embeddings tied to the head": {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
}


@pytest.mark.parametrize("change", [*APART, *TOGETHER])
def test_merging_into_tied_embeddings(change: str, tied_dir: Path, tmp_path: Path) -> None:
    expected = make_adapter(tied_dir, tmp_path / "adapter", lora(**(APART | TOGETHER)[change]))
    assert float((logits(load(tied_dir)) - expected).abs().max()) > 0.01
    model = load(tmp_path / "adapter")
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    assert model.config.tie_word_embeddings == (head.weight is embeddings.weight)
    assert change in TOGETHER or not model.config.tie_word_embeddings
    assert all(parameter.requires_grad for parameter in model.parameters())
    reloaded = again(model, tmp_path / "whole")
    torch.testing.assert_close(logits(reloaded), expected, rtol=0, atol=1e-4)
    assert reloaded.config.tie_word_embeddings == model.config.tie_word_embeddings


KINDS: dict[str, Callable[[], peft.PeftConfig]] = {
    "DoRA": lambda: lora(use_dora=True),
    "rank-stabilised": lambda: lora(use_rslora=True),
    "ranks by layer": lambda: lora(rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 32}),
    "in one layer": lambda: lora(layers_to_transform=[1], layers_pattern="layers"),
    "with layers twice": lambda: lora(layer_replication=[[0, 2], [0, 2]]),
    "without a task": lambda: lora(task_type=None),
    "AdaLoRA": lambda: peft.AdaLoraConfig(total_step=10, init_r=4, target_modules=ATTENTION, task_type="CAUSAL_LM"),
    "IA3": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
    "OFT": lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=ATTENTION, task_type="CAUSAL_LM"),
    "LoHa": lambda: peft.LoHaConfig(r=4, target_modules=ATTENTION, task_type="CAUSAL_LM"),
    "LoKr": lambda: peft.LoKrConfig(r=4, target_modules=ATTENTION, task_type="CAUSAL_LM"),
    "VeRA": lambda: peft.VeraConfig(r=4, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM"),
    "norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"], task_type="CAUSAL_LM"),
    "tokens alone": lambda: peft.TrainableTokensConfig(token_indices=[5, 9], task_type="CAUSAL_LM"),
}


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_that_can_be_merged(kind: str, tied_dir: Path, tmp_path: Path) -> None:
    expected = make_adapter(tied_dir, tmp_path / "adapter", KINDS[kind]())
    model = load(tmp_path / "adapter")
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(logits(again(model, tmp_path / "whole")), expected, rtol=0, atol=1e-4)


OTHERS: dict[str, Callable[[], peft.PeftConfig]] = {
    "PROMPT_TUNING": lambda: peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "P_TUNING": lambda: peft.PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=8, task_type="CAUSAL_LM"),
    "ADAPTION_PROMPT": lambda: peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=1, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_kinds_that_can_not_be_merged(kind: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir), OTHERS[kind]()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"is of type {kind}: it adds virtual tokens or layers .* can't be merged"):
        load(tmp_path)


def test_a_mixture_of_adapters_is_refused_before_they_are_read(tiny_model_dir: Path, tmp_path: Path) -> None:
    make_adapter(tiny_model_dir, tmp_path, lora())
    path = tmp_path / "adapter_config.json"
    named = {"peft_type": "XLORA", "adapters": {"other": str(tmp_path / "other")}, "hidden_size": 4}
    path.write_text(json.dumps({"base_model_name_or_path": str(tiny_model_dir)} | named))
    with pytest.raises(ValueError, match="is of type XLORA: it mixes other adapters"):
        load(tmp_path)


def test_an_adapter_that_acts_on_some_texts_only_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    make_adapter(tiny_model_dir, tmp_path, lora(alora_invocation_tokens=[7, 8, 9]))
    with pytest.raises(ValueError, match=r"type LORA\) can't be merged into its base model's weights"):
        load(tmp_path)


class TestVocabulary:
    def test_grown_with_new_embeddings_and_head(self, tied_dir: Path, tmp_path: Path) -> None:
        expected = make_adapter(tied_dir, tmp_path / "a", lora(modules_to_save=["embed_tokens", "lm_head"]), grow=3)
        model = load(tmp_path / "a")
        assert model.config.vocab_size == model.get_output_embeddings().weight.shape[0] == expected.shape[-1]
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(logits(again(model, tmp_path / "whole")), expected, rtol=0, atol=1e-4)

    @pytest.mark.parametrize("folder", ["tiny_model_dir", "tied_dir"])
    def test_grown_and_kept_beside_the_adapter(self, folder: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
        # peft saves embeddings that nothing trains, where their number changed.
        expected = make_adapter(request.getfixturevalue(folder), tmp_path / "a", lora(), grow=3)
        torch.testing.assert_close(logits(load(tmp_path / "a")), expected, rtol=0, atol=1e-4)

    def test_shrunk(self, tiny_model_dir: Path, tmp_path: Path) -> None:
        expected = make_adapter(tiny_model_dir, tmp_path / "a", lora(), grow=-3)
        torch.testing.assert_close(logits(load(tmp_path / "a")), expected, rtol=0, atol=1e-4)

    def test_grown_and_lost(self, tiny_model_dir: Path, tmp_path: Path) -> None:
        make_adapter(tiny_model_dir, tmp_path / "a", lora(modules_to_save=["embed_tokens"]), grow=3)
        path = tmp_path / "a" / "adapter_model.safetensors"
        save_file({name: tensor for name, tensor in load_file(path).items() if "lm_head" not in name}, path)
        size = AutoModelForCausalLM.from_pretrained(tiny_model_dir).config.vocab_size
        with pytest.raises(ValueError, match=f"a vocabulary of size {size + 3}, its base model has one of size {size}"):
            load(tmp_path / "a")


class TestFiles:
    def test_weights_without_a_place(self, tiny_model_dir: Path, tmp_path: Path) -> None:
        make_adapter(tiny_model_dir, tmp_path / "a", lora())
        path = tmp_path / "a" / "adapter_model.safetensors"
        save_file({name.replace("layers.1", "layers.7"): tensor for name, tensor in load_file(path).items()}, path)
        with pytest.raises(ValueError, match=r"4 of its weights have no place in it \(first: .*layers\.7"):
            load(tmp_path / "a")

    def test_weights_that_are_missing(self, tiny_model_dir: Path, tmp_path: Path) -> None:
        make_adapter(tiny_model_dir, tmp_path / "a", lora())
        path = tmp_path / "a" / "adapter_model.safetensors"
        save_file({name: tensor for name, tensor in load_file(path).items() if "layers.1" not in name}, path)
        with pytest.raises(ValueError, match=r"can't be put on its base model .*: Found missing adapter keys"):
            load(tmp_path / "a")
        make_adapter(tiny_model_dir, tmp_path / "b", lora(modules_to_save=["lm_head"]))
        path = tmp_path / "b" / "adapter_model.safetensors"
        save_file({name: tensor for name, tensor in load_file(path).items() if "lm_head" not in name}, path)
        with pytest.raises(ValueError, match=r"can't be put on its base model .*: KeyError: .*lm_head"):
            load(tmp_path / "b")

    def test_of_another_model(self, tiny_model_dir: Path, tmp_path: Path) -> None:
        make_adapter(tiny_model_dir, tmp_path / "a", lora(target_modules=["q_proj"]))
        path = tmp_path / "a" / "adapter_model.safetensors"
        save_file({name: tensor.repeat(1, 2) for name, tensor in load_file(path).items()}, path)
        with pytest.raises(ValueError, match="can't be put on its base model"):
            load(tmp_path / "a")

    def test_damaged_and_pickled_weights(self, tiny_model_dir: Path, tmp_path: Path) -> None:
        make_adapter(tiny_model_dir, tmp_path, lora())
        path = tmp_path / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(ValueError, match=r"adapter_model\.safetensors is damaged"):
            load(tmp_path)
        path.rename(tmp_path / "adapter_model.bin")
        with pytest.raises(ValueError, match=r"has no adapter_model\.safetensors \(pickled weights .* save_pretrained"):
            load(tmp_path)

    def test_several_in_one_folder(self, tiny_model_dir: Path, tmp_path: Path) -> None:
        for name in ("careful", "brave"):
            make_adapter(tiny_model_dir, tmp_path / name, lora())
        with pytest.raises(ValueError, match="it holds models or adapters in brave, careful: give one of those"):
            load(tmp_path)

    def test_one_on_another(self, tiny_model_dir: Path, tmp_path: Path) -> None:
        make_adapter(tiny_model_dir, tmp_path / "one", lora())
        load(tmp_path / "one").save_pretrained(tmp_path / "merged")
        expected = make_adapter(tmp_path / "merged", tmp_path / "two", lora())
        rename(tmp_path / "two", str(tmp_path / "one"))
        torch.testing.assert_close(logits(load(tmp_path / "two")), expected, rtol=0, atol=1e-4)
        rename(tmp_path / "one", str(tmp_path / "two"))
        with pytest.raises(ValueError, match="name each other as their base model"):
            load(tmp_path / "two")

    def test_a_configuration_beside_it_is_no_model(self, tiny_model_dir: Path, tmp_path: Path) -> None:
        # Some trainers write the base model's config.json beside an adapter.
        expected = make_adapter(tiny_model_dir, tmp_path, lora())
        shutil.copy(tiny_model_dir / "config.json", tmp_path)
        torch.testing.assert_close(logits(load(tmp_path)), expected, rtol=0, atol=1e-4)


def test_an_adapter_of_the_hub(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As the hub's cache holds it: offline, nothing else is asked.
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--adapter"
    expected = make_adapter(tiny_model_dir, repository / "snapshots" / "0123", lora())
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    policy = load_policy("someone/adapter")
    assert policy.on_adapter
    assert policy.source == "someone/adapter"
    torch.testing.assert_close(logits(policy.model), expected, rtol=0, atol=1e-4)
    assert policy.tokenizer.get_vocab() == load_tokenizer(str(tiny_model_dir)).get_vocab()
    torch.testing.assert_close(logits(load(Path("someone/adapter"))), expected, rtol=0, atol=1e-4)


class TestTokenizer:
    def test_is_the_bases_where_the_adapter_has_none(self, tiny_model_dir: Path, tmp_path: Path) -> None:
        make_adapter(tiny_model_dir, tmp_path, lora())
        found, base = load_tokenizer(str(tmp_path)), load_tokenizer(str(tiny_model_dir))
        assert found.get_vocab() == base.get_vocab()
        assert found.chat_template == base.chat_template
        assert load_policy(str(tmp_path)).tokenizer.get_vocab() == base.get_vocab()

    def test_has_the_template_beside_the_adapter(self, tiny_model_dir: Path, tmp_path: Path) -> None:
        make_adapter(tiny_model_dir, tmp_path, lora())
        (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
        assert load_tokenizer(str(tmp_path)).chat_template == "{{ messages }}"

    def test_is_the_adapters_own(self, tiny_model_dir: Path, tmp_path: Path) -> None:
        make_adapter(tiny_model_dir, tmp_path, lora())
        tokenizer = build_tokenizer()
        tokenizer.add_tokens(["<new>"])
        tokenizer.save_pretrained(tmp_path)
        assert "<new>" in load_tokenizer(str(tmp_path)).get_vocab()


def rename(adapter: Path, base: str | None) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": base}))


class TestWhereTheBaseIs:
    @pytest.fixture(autouse=True)
    def folders(self, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """``work/base``, ``work/adapter`` trained there under the path ``base``, and another folder ``elsewhere``."""
        shutil.copytree(tiny_model_dir, tmp_path / "work" / "base")
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "work")
        make_adapter(Path("base"), Path("adapter"), lora())
        rename(Path("adapter"), "base")

    def test_from_where_it_was_trained(self, tmp_path: Path) -> None:
        assert adapter_base("adapter") == "base"

    def test_beside_or_under_the_adapter(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path / "elsewhere")
        rename(Path("../work/adapter"), "../base")
        assert Path(adapter_base("../work/adapter")).resolve() == tmp_path / "work" / "base"
        here = logits(load(Path("../work/adapter")))
        identity = model_identity("../work/adapter")
        monkeypatch.chdir(tmp_path / "work")
        rename(Path("adapter"), "base")
        assert torch.equal(logits(load(Path("adapter"))), here)
        assert identity != model_identity("adapter")  # the adapter's file changed

    def test_nowhere(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path / "elsewhere")
        with pytest.raises(ValueError, match=r"the adapter in '\.\./work/adapter' needs its base model") as caught:
            load(Path("../work/adapter"))
        message = str(caught.value)
        assert f"relative paths start at {tmp_path / 'elsewhere'}" in message
        assert "nor is there a folder '../work/adapter/base'. Set base_model_name_or_path in ../work/adapter" in message

    def test_in_two_places(self, tmp_path: Path) -> None:
        shutil.copytree("base", "adapter/base")
        with pytest.raises(ValueError, match=r"base_model_name_or_path 'base' is both .*work/base and .*work/adapter/base"):
            load(Path("adapter"))

    def test_an_adapter_of_ours_opens_from_anywhere(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        policy = load_policy("base", lora=LoRA(r=2))
        shake(policy.model)
        written = export(policy, tmp_path / "out", merge=False)
        assert json.loads((written / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
            tmp_path / "work" / "base"
        )
        monkeypatch.chdir(tmp_path / "elsewhere")
        torch.testing.assert_close(logits(load(written)), logits(policy.model), rtol=0, atol=1e-4)

    def test_is_never_replaced(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path / "elsewhere")
        rename(Path("../work/adapter"), "../base")
        with pytest.raises(ValueError, match="the base model of model"):
            claim(Path("../work/base"), verb="train", inputs={"model": "../work/adapter"}, overwrite=True)


def export(policy: Policy, target: Path, *, merge: bool) -> Path:
    save_model(policy, LogprobModel(policy.model), Accelerator(cpu=True), merge=merge, card=None, target=target)
    return target


class TestOurOwn:
    @pytest.mark.parametrize("modules", [("embed_tokens", "q_proj"), ("lm_head",), ("embed_tokens", "lm_head"), ("q_proj",)])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_merged_and_written_while_training_goes_on(
        self, modules: tuple[str, ...], dtype: str, tied_dir: Path, tmp_path: Path
    ) -> None:
        policy = load_policy(str(tied_dir), dtype=dtype, lora=LoRA(r=4, target_modules=modules))
        shake(policy.model)
        before = logits(policy.model)
        adapter, whole = export(policy, tmp_path / "adapter", merge=False), export(policy, tmp_path / "whole", merge=True)
        # Training goes on with the same model.
        assert isinstance(policy.model, PeftModel)
        assert torch.equal(logits(policy.model), before)
        assert policy.model.config.tie_word_embeddings
        assert export(policy, tmp_path / "adapter", merge=False) == adapter
        with quiet_peft():
            base = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tied_dir), adapter)
        # Weights that are stored in float32 are not rounded to the precision of training before the adapter is added.
        merged = AutoModelForCausalLM.from_pretrained(whole)
        assert merged.dtype == torch.float32
        torch.testing.assert_close(logits(merged), logits(base), rtol=0, atol=1e-4)
        assert merged.config.tie_word_embeddings == (modules == ("q_proj",))

    def test_weights_stored_in_bfloat16_stay_so(self, tiny_model_dir: Path, tmp_path: Path) -> None:
        model = LlamaForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16)
        model.save_pretrained(tmp_path / "base")
        build_tokenizer().save_pretrained(tmp_path / "base")
        policy = load_policy(str(tmp_path / "base"), dtype="bfloat16", lora=LoRA(r=4))
        (file,) = export(policy, tmp_path / "whole", merge=True).glob("*.safetensors")
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}

    def test_all_weights_of_a_merged_adapter_are_trained(self, tied_dir: Path, tmp_path: Path) -> None:
        expected = make_adapter(tied_dir, tmp_path / "adapter", lora(target_modules=["embed_tokens"]))
        policy = load_policy(str(tmp_path / "adapter"))
        assert all(parameter.requires_grad for parameter in policy.model.parameters())
        whole = export(policy, tmp_path / "whole", merge=False)
        torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(whole)), expected, rtol=0, atol=1e-4)


class TestRewardModels:
    """An adapter for sequence classification brings the head that a language model lacks."""

    @pytest.mark.parametrize("labels", [1, 2])
    def test_on_a_language_model(self, labels: int, tied_dir: Path, tmp_path: Path) -> None:
        config = lora(task_type="SEQ_CLS")
        model = AutoModelForSequenceClassification
        with torch.random.fork_rng(devices=[]):
            expected = make_adapter(tied_dir, tmp_path, config, auto=model, num_labels=labels, pad_token_id=0)
        if labels == 2:
            with pytest.raises(ValueError, match="has 2 labels: a reward is one number"):
                ModelReward(str(tmp_path))
            return
        found = logits(ModelReward(str(tmp_path))._model)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)

    def test_of_the_other_task(self, tied_dir: Path, tmp_path: Path) -> None:
        make_adapter(tied_dir, tmp_path / "policy", lora())
        with pytest.raises(ValueError, match=r"made for a causal language model \(task_type CAUSAL_LM\), and is given as"):
            ModelReward(str(tmp_path / "policy"))
        get_peft_model(AutoModelForSequenceClassification.from_pretrained(tied_dir), lora(task_type="SEQ_CLS")).save_pretrained(
            tmp_path / "reward"
        )
        with pytest.raises(ValueError, match=r"is made for a reward model or another classifier \(task_type SEQ_CLS\)"):
            load(tmp_path / "reward")
        rename(tmp_path / "reward", str(tied_dir))

    def test_a_language_model_has_no_head_for_it(self, tiny_model_dir: Path) -> None:
        with pytest.raises(ValueError, match=r"lacks 1 weights that .* asks for in a sequence classifier \(first: score"):
            ModelReward(str(tiny_model_dir))


def test_a_masked_language_model_is_refused(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    # At the usual scale the tokens of one untrained layer hardly see each other.
    config.initializer_range = 1.0
    BertLMHeadModel(config).save_pretrained(tmp_path / "masked")
    with pytest.raises(ValueError, match=r"its tokens attend to those after them.*\(model_type bert, is_decoder false\)"):
        load(tmp_path / "masked")
    config.is_decoder = True
    BertLMHeadModel(config).save_pretrained(tmp_path / "causal")
    assert load(tmp_path / "causal").config.model_type == "bert"
