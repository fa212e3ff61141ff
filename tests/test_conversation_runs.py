"""Conversations through files, verbs, servers, rewards and the model: tools, calls, turns, values for the template."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from chat_templates import CALL, TOOL, assistant, result, tokenizer_of, user
from conftest import CHATML, build_model, build_tokenizer
from ncalign.audit.texts import prompt_key
from ncalign.cli.app import main
from ncalign.core.errors import DataError
from ncalign.data.groups import Candidate, Group, Message, convert, read_groups, write_groups
from ncalign.model.batching import collate
from ncalign.model.conversations import ConversationRules
from ncalign.model.encoding import DroppedGroupError, EncodedGroup, Encoder
from ncalign.model.layout import completions_layout, padded_layout, prompts_layout, shared_layout
from ncalign.model.logprobs import chosen_logprobs, completion_logprobs
from ncalign.model.sharing import share_prompts
from ncalign.rewards.base import completion_texts, last_answers
from ncalign.rewards.judge import prompt_text
from ncalign.rewards.model import ModelReward
from ncalign.training.data import mismatched_groups
from server_double import ServerDouble, serving
from test_conversations import CALLS, QUESTION, TURNS, ids_of, mask_of
from test_logprobs import PAD, build, weighted_gradients

THINKS = CHATML.replace(
    "'<|im_start|>assistant\n'", "'<|im_start|>assistant\n' + ('' if enable_thinking | default(true) else '<think></think>')"
)
"""ChatML whose generation prompt depends on a value."""


# --- Log-probs --------------------------------------------------------------------------------------------------------


def masked(seed: int, prompt: int, masks: list[str | None]) -> EncodedGroup:
    """A group of random tokens; of each completion which tokens are scored, ``x`` for those that are."""
    rng = np.random.default_rng(seed)
    lengths = [len(mask or "....") for mask in masks]
    return EncodedGroup(
        str(seed),
        "",
        rng.integers(3, 90, prompt, dtype=np.int32),
        tuple(rng.integers(3, 90, length, dtype=np.int32) for length in lengths),
        tuple(float(k) for k in range(len(masks))),
        (None,) * len(masks),
        scored=tuple(None if mask is None else np.array([letter == "x" for letter in mask]) for mask in masks),
    )


GROUPS = [masked(1, 5, ["..x.xx", None, "x....x."]), masked(2, 3, [None]), masked(3, 6, [".x", "...xxx"])]


def of_scored_tokens(model: PreTrainedModel, group: EncodedGroup, k: int) -> torch.Tensor:
    """The sum over the scored tokens, from the logits of the text alone."""
    ids = torch.tensor([*group.prompt.tolist(), *group.completions[k].tolist()])[None]
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    token = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    mask = group.masks[k]
    scored = torch.ones(len(group.completions[k]), dtype=torch.bool) if mask is None else torch.from_numpy(mask)
    return (token[len(group.prompt) - 1 :] * scored).sum()


@pytest.mark.parametrize("shares", [False, True], ids=["padded", "shared"])
def test_log_probs_are_sums_over_the_scored_tokens(shares: bool) -> None:
    model = build("llama", dtype=torch.float64)
    expected = [[of_scored_tokens(model, group, k) for k in range(len(group.completions))] for group in GROUPS]
    wanted = weighted_gradients(model, [value for row in expected for value in row])
    if shares:
        assert share_prompts(model) is None
    batch = collate(GROUPS, pad_token_id=PAD)
    assert batch.completion_lengths.tolist() == [[3, 4, 2], [4, 0, 0], [1, 3, 0]]
    found = completion_logprobs(model, batch)
    for b, row in enumerate(expected):
        for k, value in enumerate(row):
            # Norms compute in float32 inside, in other rows here.
            assert found[b, k].item() == pytest.approx(value.item(), abs=1e-5)
    gradients = weighted_gradients(model, completion_logprobs(model, batch)[batch.candidate_mask])
    scale = max(float(gradient.norm()) for gradient in wanted.values())
    assert all(float((gradients[name] - one).norm()) <= 1e-5 * scale for name, one in wanted.items())
    if shares:
        every = torch.tensor([[0, 1, 2], [0, -1, -1], [0, 1, -1]])
        chosen = chosen_logprobs(model, batch, lambda scores: every, scoring=torch.no_grad())
        torch.testing.assert_close(chosen.logprobs, found, rtol=0, atol=1e-5)
        assert chosen.scores is not None
        torch.testing.assert_close(chosen.scores, found, rtol=0, atol=1e-5)


def test_layouts_leave_out_what_is_not_scored() -> None:
    group = masked(1, 2, [".xx", None])
    batch = collate([group], pad_token_id=PAD)
    first, second = (one.tolist() for one in group.completions)
    of_both = [*first[1:], *second]
    shared = shared_layout(batch.tokens, batch.spans, [[0, 1]], scored=batch.scored)
    assert (shared.targets.tolist(), shared.owners.tolist()) == (of_both, [0, 0, 1, 1, 1, 1])
    assert shared.predictors.tolist() == [2, 3, 1, 5, 6, 7]
    padded = padded_layout(batch.tokens, batch.spans, [[0, 1]], pad_token_id=PAD, scored=batch.scored)
    assert (padded.targets.tolist(), padded.predictors.tolist()) == (of_both, [2, 3, 7, 8, 9, 10])
    prompts = prompts_layout(batch.tokens, batch.spans)
    assert prompts.segments is not None
    alone = completions_layout(batch.tokens, batch.spans, [[0]], prompts.segments, scored=batch.scored)
    assert (alone.targets.tolist(), alone.predictors.tolist(), alone.owners.tolist()) == (first[1:], [1, 2], [0, 0])


def test_a_batch_without_masks_has_none() -> None:
    plain = dataclasses.replace(GROUPS[0], scored=(None, None, None))
    assert collate([plain], pad_token_id=PAD).scored is None


def test_mismatched_completions_keep_their_masks() -> None:
    cut, whole = mismatched_groups(GROUPS[:1] + GROUPS[2:], max_length=100)
    assert [mask.tolist() for mask in (*cut.masks, *whole.masks)] == [[False, True], [letter == "x" for letter in "..x.xx"]]
    # Its only scored token is cut off: all that is left of it counts.
    assert mismatched_groups(GROUPS[:1] + GROUPS[2:], max_length=6)[0].masks == (None,)


# --- Random conversations ---------------------------------------------------------------------------------------------

texts = st.text(st.sampled_from("aé 4\n.<>{}\"'\\[]👩‍🔬\ue000"), max_size=12)


@st.composite
def conversations(draw: st.DrawFn) -> tuple[list[Message], list[Message]]:
    prompt = [user(draw(texts.filter(str.strip)))]
    turns: list[Message] = []
    for _ in range(draw(st.integers(1, 3))):
        if draw(st.booleans()):
            call = {**CALL, "function": {"name": draw(st.sampled_from(["f", "weather"])), "arguments": {"a": draw(texts)}}}
            turns += [assistant("", tool_calls=[call]), result(draw(texts))]
        turns += [assistant(draw(texts)), user(draw(texts))]
    return prompt, turns[:-1]


def encoded_or_refused(encoder: Encoder, group: Group) -> EncodedGroup | str:
    try:
        return encoder.encode(group)
    except DroppedGroupError as error:
        return str(error)


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "mistral", "lfm2_2_5", "gptoss", "qwen3_training"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(talk=conversations())
def test_any_conversation_is_the_template_s_rendering_or_refused(name: str, talk: tuple[list[Message], list[Message]]) -> None:
    tokenizer, (prompt, completion) = tokenizer_of(name), talk
    group = Group("g", prompt, [Candidate(completion, 1.0)], {"tools": [TOOL]}, origin="x.jsonl:1")
    encoded = encoded_or_refused(Encoder(tokenizer, max_length=100_000), group)
    if isinstance(encoded, str):
        assert "x.jsonl:1: group 'g'" in encoded
        return
    whole = tokenizer.apply_chat_template(
        [*prompt, *completion],
        tools=[TOOL],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=name.endswith("training"),
    )
    found = ids_of(encoded)
    assert whole["input_ids"][: len(found)] == found
    if name.endswith("training"):
        assert [bool(one) for one in whole["assistant_masks"]][: len(found)] == mask_of(encoded)
    scored = [token for token, one in zip(found, mask_of(encoded), strict=True) if one]
    said = tokenizer.decode(scored)
    for turn in completion:
        if turn["role"] == "assistant":
            assert turn["content"].strip() in said or "<" in turn["content"]
    assert not mask_of(encoded)[0]
    assert mask_of(encoded)[-1]


# --- Files ------------------------------------------------------------------------------------------------------------

KWARGS = {"enable_thinking": False}
EXTRA = [
    Group(
        "a",
        [{**user("Q"), "mood": "good"}],
        [Candidate(CALLS, 1.0), Candidate([assistant("b", reasoning_content="Hm")], 0.0)],
        {"tools": [TOOL], "chat_template_kwargs": KWARGS, "more": 1},
    ),
    Group("b", QUESTION, [Candidate(TURNS, 1.0), Candidate([assistant("c")], 0.0)]),
]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "jsonl.gz"])
def test_conversations_come_back_as_they_were(kind: str, tmp_path: Path) -> None:
    write_groups(EXTRA, tmp_path / f"groups.{kind}")
    assert list(read_groups(tmp_path / f"groups.{kind}")) == EXTRA
    convert(tmp_path / f"groups.{kind}", tmp_path / f"pairs.{kind}", target="best_vs_worst")
    back = list(read_groups(tmp_path / f"pairs.{kind}"))
    assert [group.candidates for group in back] == [group.candidates for group in EXTRA]
    assert [(group.prompt, group.tools, group.template_kwargs) for group in back] == [
        (group.prompt, group.tools, group.template_kwargs) for group in EXTRA
    ]
    assert back[0].metadata == EXTRA[0].metadata


def test_keys_of_messages_that_are_no_text_need_json_lines(tmp_path: Path) -> None:
    group = Group("a", [{**user("Q"), "loss": 1.5}], [Candidate([assistant("b")], 0.0)])
    with pytest.raises(DataError, match=r"`loss` of a message of prompt is no text.*use JSONL"):
        write_groups([group], tmp_path / "groups.parquet")
    write_groups([group], tmp_path / "groups.jsonl")
    assert list(read_groups(tmp_path / "groups.jsonl")) == [group]


@pytest.mark.filterwarnings("ignore")
def test_trl_writes_the_same_of_what_convert_writes(tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    from trl.data_utils import apply_chat_template

    tokenizer = tokenizer_of("qwen3")
    rows = [
        {"prompt": QUESTION, "chosen": TURNS, "rejected": [assistant("b")], "chat_template_kwargs": KWARGS, "tools": [TOOL]},
        {"chosen": [*QUESTION, *CALLS], "rejected": [*QUESTION, assistant("b")], "tools": [TOOL]},
        {"prompt": QUESTION, "chosen": [assistant("<think>\nHm\n</think>\n\na")], "rejected": [assistant("b")]},
    ]
    convert(write_jsonl(rows), tmp_path / "pairs.jsonl", target="best_vs_worst")
    written = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    for row, pair, group in zip(rows, written, read_groups(write_jsonl(rows)), strict=True):
        theirs = apply_chat_template({"prompt": QUESTION, **pair}, tokenizer, tools=row.get("tools"))
        assert pair.get("chat_template_kwargs") == row.get("chat_template_kwargs")
        encoded = Encoder(tokenizer, max_length=4096).encode(group)
        for number, side in enumerate(("chosen", "rejected")):
            text = tokenizer.decode(ids_of(encoded, number))
            assert theirs["prompt"] + theirs[side] == text + "\n"


def test_prompts_with_other_tools_are_others() -> None:
    def key(**metadata: Any) -> str:
        return prompt_key(Group("g", QUESTION, [], metadata))

    assert key() == prompt_key(Group("g", [user("how IS the weather")], []))
    assert len({key(), key(tools=[TOOL]), key(tools=[{**TOOL, "n": 1}]), key(chat_template_kwargs=KWARGS)}) == 4
    asked = [prompt_key(Group("g", [*QUESTION, CALLS[0], result("3")][:n], [])) for n in (1, 2)]
    assert asked[0] != asked[1]


def test_check_counts_prompts_with_other_tools_apart(
    write_jsonl: Callable[..., Path], tiny_model_dir: Path, capsys: Any
) -> None:
    pair = {"prompt": QUESTION, "chosen": [assistant("a")], "rejected": [assistant("b")]}
    words = ["check", str(write_jsonl([pair, {**pair, "tools": [TOOL]}])), "--model", str(tiny_model_dir), "--json"]
    main([*words, "--max_length", "800"])
    assert json.loads(capsys.readouterr().out)["repeated_prompts"] == 0


# --- Rewards ----------------------------------------------------------------------------------------------------------


def test_rewards_read_conversations_as_text() -> None:
    group = Group("g", [*QUESTION, CALLS[0], result("3")], [Candidate(TURNS, 0.0), Candidate("Cold.", 1.0)], {"tools": [TOOL]})
    assert completion_texts(group) == ["Assistant: Where?\n\nUser: In Oslo.\n\nAssistant: 3 degrees.", "Cold."]
    assert last_answers(group) == ["3 degrees.", "Cold."]
    shown = prompt_text(group)
    assert shown.startswith("Tools: [")
    assert shown.endswith('Assistant: [call weather {"city": "Oslo"}]\n\nTool: 3')


def test_a_reward_model_reads_conversations_by_its_own_template(
    reward_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = ModelReward(str(reward_model_dir))
    read: list[str] = []
    scored = source._logits

    def watched(batch: Any) -> list[float]:
        read.extend(source._tokenizer.decode(ids) for ids in batch)
        return scored(batch)

    monkeypatch.setattr(source, "_logits", watched)
    found = source.score(Group("g", QUESTION, [Candidate(TURNS), Candidate([assistant("Cold.")])]))
    assert all(isinstance(reward, float) for reward in found)
    whole = source._tokenizer.apply_chat_template([*QUESTION, *TURNS], tokenize=False)
    assert whole in read


# --- Verbs and servers ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def thinking_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("thinking"), build_tokenizer()
    tokenizer.chat_template = THINKS
    build_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def reward_model_dir(tmp_path: Path) -> Path:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    return tmp_path / "reward"


ROWS = [
    {"id": "a", "prompt": QUESTION, "candidates": [{"completion": TURNS, "reward": 1.0}, {"completion": "b", "reward": 0.0}]},
    {
        "id": "b",
        "prompt": QUESTION,
        "chat_template_kwargs": {"enable_thinking": True},
        "candidates": [{"completion": "c", "reward": 1.0}, {"completion": TURNS, "reward": 0.0}],
    },
]


def test_values_reach_training_and_are_recorded(
    thinking_model: Path, write_jsonl: Callable[..., Path], tmp_path: Path, capsys: Any
) -> None:
    words = ["train", "--model", str(thinking_model), "--data", str(write_jsonl(ROWS)), "--output_dir", str(tmp_path / "run")]
    words += ["--max_length", "256", "--max_steps", "1", "--per_device_train_batch_size", "2", "--dtype", "float32"]
    words += ["--gradient_accumulation_steps", "1", "--report_to", "none", "--chat_template_kwargs", "enable_thinking=false"]
    assert main([*words, "--scored_turns", "last"]) == 0
    recorded = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (recorded["chat_template_kwargs"], recorded["scored_turns"]) == (["enable_thinking=false"], "last")
    assert main([*words, "--chat_template_kwargs", "enable_thinkin=false", "--output_dir", str(tmp_path / "other")]) == 1
    assert "does not read `enable_thinkin`" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["generate", "answer"])
def test_values_reach_sampling(
    verb: str, thinking_model: Path, write_jsonl: Callable[..., Path], tmp_path: Path, monkeypatch: Any
) -> None:
    from ncalign.generation.local import TransformersGenerator

    fed: list[str] = []
    sample, tokenizer = TransformersGenerator._sample, build_tokenizer()

    def watched(self: Any, prompts: list[list[int]], *arguments: Any) -> Any:
        fed.extend(tokenizer.decode(ids) for ids in prompts)
        return sample(self, prompts, *arguments)

    monkeypatch.setattr(TransformersGenerator, "_sample", watched)
    rows = str(write_jsonl([{"id": row["id"], "prompt": QUESTION, **_kwargs(row)} for row in ROWS]))
    own = {
        "generate": ["--prompts", rows, "--num_samples", "2"],
        "answer": ["--set_name", rows, "--cache_dir", str(tmp_path / "cache")],
    }
    words = [verb, "--model", str(thinking_model), *own[verb], "--max_new_tokens", "4", "--output", str(tmp_path / "out.jsonl")]
    assert main([*words, "--chat_template_kwargs", "enable_thinking=false"]) == 0
    assert sorted(text.endswith("<think></think>") for text in fed) == [False, True]
    if verb == "generate":
        kept = {group.id: group.template_kwargs for group in read_groups(tmp_path / "out.jsonl")}
        assert kept["b"] == {"enable_thinking": True}


def test_values_and_conversations_go_through_a_round(
    thinking_model: Path, write_jsonl: Callable[..., Path], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rewards.py").write_text("def place(prompt, completions):\n    return list(range(len(completions)))\n")
    seen: list[EncodedGroup] = []
    encode = Encoder.encode

    def watched(self: Encoder, group: Group) -> EncodedGroup:
        seen.append(encode(self, group))
        return seen[-1]

    monkeypatch.setattr(Encoder, "encode", watched)
    words = ["online", "--model", str(thinking_model), "--data", str(write_jsonl(ROWS)), "--output_dir", "run"]
    words += ["--reward", "rewards.py:place", "--num_samples", "2", "--max_new_tokens", "4", "--max_steps", "1"]
    words += ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", "--max_length", "400"]
    words += ["--regenerate_at", "[]", "--eval_fraction", "0", "--report_to", "none", "--dtype", "float32"]
    words += ["--candidates", "fresh_and_offline", "--thoughts", "masked", "--chat_template_kwargs", "enable_thinking=false"]
    assert main(words) == 0
    tokenizer = build_tokenizer()
    prompts = {group.id: tokenizer.decode(group.prompt) for group in seen if len(group.completions) > 2}
    assert prompts["b"].endswith("assistant\n")
    # What the generation prompt of "a" adds stands before no turn that others follow.
    assert prompts["a"].endswith("assistant\n")
    assert any(mask is not None for group in seen for mask in group.masks)


@pytest.mark.parametrize("verb", ["generate", "answer"])
def test_a_server_is_sent_the_values(verb: str, write_jsonl: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    double, rows = ServerDouble(), [{"id": row["id"], "prompt": QUESTION, **_kwargs(row)} for row in ROWS]
    with serving(double) as url:
        server = ["--server.base_url", url, "--server.model", "m", "--chat_template_kwargs", "enable_thinking=false,n=1"]
        data, output = str(write_jsonl(rows)), ["--output", str(tmp_path / "out.jsonl")]
        words = {"generate": ["--prompts", data], "answer": ["--set_name", data, "--cache_dir", str(tmp_path / "cache")]}
        assert main([verb, *words[verb], *output, *server]) == 0
    sent = [body["chat_template_kwargs"] for _, body in double.requests]
    assert {json.dumps(one) for one in sent} == {
        '{"enable_thinking": false, "n": 1}',
        '{"enable_thinking": true, "n": 1}',
    }
    assert "2 prompts have `chat_template_kwargs`: the server is sent them" in capsys.readouterr().err


def _kwargs(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("chat_template_kwargs",) if name in row}


def test_a_server_that_does_not_take_them_is_not_asked_without(
    write_jsonl: Callable[..., Path], tmp_path: Path, capsys: Any
) -> None:
    double = ServerDouble()
    double.fault_of = lambda body: (400, b'{"error": {"message": "unsupported", "param": "chat_template_kwargs"}}')
    with serving(double) as url:
        words = [
            "generate",
            "--prompts",
            str(write_jsonl([{"id": "a", "prompt": QUESTION}])),
            "--output",
            str(tmp_path / "o.jsonl"),
        ]
        server = ["--server.base_url", url, "--server.model", "m", "--chat_template_kwargs", "enable_thinking=false"]
        assert main([*words, *server]) == 1
    assert all("chat_template_kwargs" in body for _, body in double.requests)


def test_stripped_thoughts_are_not_sent(write_jsonl: Callable[..., Path]) -> None:
    from ncalign.generation.base import SamplingParams
    from ncalign.generation.config import ServerConfig
    from ncalign.generation.remote import ServerGenerator

    double = ServerDouble()
    prompt = [user("2?"), assistant("<think>Hm</think>2."), user("Sure?")]
    with serving(double) as url:
        generator = ServerGenerator(ServerConfig(base_url=url, model="m"), progress=False, strip_thoughts=True)
        generator.generate([prompt], num_samples=1, params=SamplingParams(4), seed=0)
    assert [body["messages"][1]["content"] for _, body in double.requests] == ["2."]


def test_the_date_and_the_values_are_given_together() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%Y') }}{{ mood }}" + CHATML
    template = ConversationRules(template_kwargs={"mood": "glad"}).template(tokenizer, None)
    assert template.render(QUESTION, kwargs={"mood": "sad"})[4:7] == "sad"
    assert template.render(QUESTION)[4:8] == "glad"
