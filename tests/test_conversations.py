"""Completions of several turns, with calls and thoughts: the template's own rendering of the whole; what is scored of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from chat_templates import CALL, TOOL, assistant, result, source, tokenizer_of, user
from conftest import CHATML, build_tokenizer
from ncalign.cli.app import main
from ncalign.data.groups import Candidate, Group, Message, read_groups
from ncalign.data.rendering import completion_text, last_answer
from ncalign.model.chat import ChatTemplate
from ncalign.model.config import EncodingConfig, template_kwargs
from ncalign.model.control_tokens import ControlTokens
from ncalign.model.conversations import ConversationRules
from ncalign.model.encoding import DroppedGroupError, EncodedGroup, Encoder
from ncalign.model.reference import candidate_key
from ncalign.model.thoughts import outside_thoughts, spot_in

TURNS = [assistant("Where?"), user("In Oslo."), assistant("3 degrees.")]
CALLS = [assistant("", tool_calls=[CALL]), result("3"), assistant("3 degrees.")]
THOUGHTS = [
    assistant("Where?", reasoning_content="I ask."),
    user("In Oslo."),
    assistant("3 degrees.", reasoning_content="Cold."),
]
QUESTION = [user("How is the weather?")]
TALKS = {"turns": (TURNS, None), "calls": (CALLS, [TOOL]), "thoughts": (THOUGHTS, None)}

TRAINING = (
    *("llama3", "qwen2_5", "qwen3", "qwen3_5_think", "qwen3_instruct_2507", "gemma", "gemma3", "phi3", "phi3_5"),
    *("deepseekv3", "deepseek_r1_distill", "gptoss", "glm4moe", "cohere", "cohere2", "lfm2_v2", "nemotron_3_nano"),
    *("muse_glimmer", "smolvlm", "diffusion_gemma"),
)
"""Templates of which TRL has a copy that says what an assistant writes."""
WITHOUT_CALLS = ("llama3", "gemma", "gemma3", "phi3", "phi3_5", "deepseek_r1_distill", "cohere", "cohere2", "smolvlm")
OSLO = '{"name": "weather", "arguments": {"city": "Oslo"}}'
PLAIN_JSON = '{"name": "weather", "parameters": {"city": "Oslo"}}'
NO_THOUGHT = "<think>\n\n</think>\n\n"
DEEPSEEK_END = "<\uff5cend\u2581of\u2581sentence\uff5c>"
SCORED: dict[tuple[str, str], list[str]] = {
    ("llama3", "turns"): ["Where?<|eot_id|>", "3 degrees.<|eot_id|>"],
    ("llama3_1", "turns"): ["Where?<|eot_id|>", "3 degrees.<|eot_id|>"],
    ("llama3_1", "calls"): [f"{PLAIN_JSON}<|eot_id|>", "3 degrees.<|eot_id|>"],
    ("llama3_2", "calls"): [f"{PLAIN_JSON}<|eot_id|>", "3 degrees.<|eot_id|>"],
    ("qwen2_5", "turns"): ["Where?<|im_end|>", "3 degrees.<|im_end|>"],
    ("qwen2_5", "calls"): [f"<tool_call>\n{OSLO}\n</tool_call><|im_end|>", "3 degrees.<|im_end|>"],
    # Qwen 3 writes thoughts of the turns after the last question alone, and an empty one before the last answer.
    ("qwen3", "turns"): ["Where?<|im_end|>", f"{NO_THOUGHT}3 degrees.<|im_end|>"],
    ("qwen3", "calls"): [f"<tool_call>\n{OSLO}\n</tool_call><|im_end|>", f"{NO_THOUGHT}3 degrees.<|im_end|>"],
    ("qwen3", "thoughts"): ["Where?<|im_end|>", "<think>\nCold.\n</think>\n\n3 degrees.<|im_end|>"],
    ("gemma", "turns"): ["Where?<end_of_turn>", "3 degrees.<end_of_turn>"],
    ("gemma3", "turns"): ["Where?<end_of_turn>", "3 degrees.<end_of_turn>"],
    ("gemma4_v5", "turns"): ["Where?<turn|>", "3 degrees.<turn|>"],
    ("gemma4_v5", "thoughts"): ["Where?<turn|>", "<|channel>thought\nCold.\n<channel|>3 degrees.<turn|>"],
    ("phi3", "turns"): ["Where?<|end|>", "3 degrees.<|end|>"],
    ("phi3_5", "turns"): ["Where?<|end|>", "3 degrees.<|end|>"],
    # The generation prompt opens a thought, which past turns don't have.
    ("deepseekv3", "turns"): [f"Where?{DEEPSEEK_END}", f"3 degrees.{DEEPSEEK_END}"],
    ("deepseek_r1_distill", "thoughts"): [f"Where?{DEEPSEEK_END}", f"3 degrees.{DEEPSEEK_END}"],
    ("gptoss", "thoughts"): [
        "<|channel|>final<|message|>Where?<|end|>",
        "<|channel|>analysis<|message|>Cold.<|end|><|start|>assistant<|channel|>final<|message|>3 degrees.<|return|>",
    ],
    ("gptoss", "calls"): [
        ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Oslo"}<|call|>',
        "<|channel|>final<|message|>3 degrees.<|return|>",
    ],
    # Turns have no end token: what follows them ends them, and the last one gets the tokenizer's.
    ("glm4moe", "thoughts"): ["\n<think></think>\nWhere?", "\n<think>Cold.</think>\n3 degrees.</s>"],
    ("mistral", "turns"): [" Where?</s>", " 3 degrees.</s>"],
    ("mistral", "calls"): [
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Oslo"}, "id": "abc123def"}]</s>',
        " 3 degrees.</s>",
    ],
    ("smollm", "turns"): ["Where?<|im_end|>", "3 degrees.<|im_end|>"],
    ("olmo", "turns"): ["Where?<|endoftext|>", "3 degrees.<|endoftext|>"],
    ("lfm2_v2", "calls"): ["<|tool_call_start|>[weather(city='Oslo')]<|tool_call_end|><|im_end|>", "3 degrees.<|im_end|>"],
}


def group(*completions: Any, prompt: Any = None, tools: Any = None, **metadata: Any) -> Group:
    given = {"tools": tools} if tools else {}
    candidates = [Candidate(one, float(number)) for number, one in enumerate(completions)]
    return Group("g7", QUESTION if prompt is None else prompt, candidates, {**given, **metadata}, origin="data.jsonl:7")


def encoder(tokenizer: PreTrainedTokenizerFast, **more: Any) -> Encoder:
    rules = {name: more.pop(name) for name in ("scored_turns", "thoughts", "template_kwargs") if name in more}
    return Encoder(tokenizer, max_length=4096, rules=ConversationRules(**rules), **more)


def mask_of(encoded: EncodedGroup, candidate: int = 0) -> list[bool]:
    """Which tokens of the prompt and a completion are scored."""
    mask = encoded.scored[candidate] if encoded.scored else None
    own = [True] * len(encoded.completions[candidate]) if mask is None else mask.tolist()
    return [*[False] * len(encoded.prompt), *own]


def ids_of(encoded: EncodedGroup, candidate: int = 0) -> list[int]:
    return [*encoded.prompt.tolist(), *encoded.completions[candidate].tolist()]


def scored_texts(tokenizer: PreTrainedTokenizerFast, encoded: EncodedGroup, candidate: int = 0) -> list[str]:
    """The runs of scored tokens, as text."""
    runs: list[list[int]] = [[]]
    for token, scored in zip(ids_of(encoded, candidate), mask_of(encoded, candidate), strict=True):
        if scored:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [str(tokenizer.decode(run)) for run in runs if run]


def as_parts(messages: Sequence[Message]) -> list[Message]:
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]


def written_arguments(messages: Sequence[Message]) -> list[Message]:
    """Calls with their arguments as text."""
    found = json.loads(json.dumps(list(messages)))
    for call in (call for message in found for call in message.get("tool_calls") or ()):
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    return list(found)


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("name", TRAINING)
def test_the_whole_and_the_mask_are_the_template_s(name: str, talk: str) -> None:
    tokenizer = tokenizer_of(f"{name}_training")
    completion, tools = TALKS[talk]
    if name in WITHOUT_CALLS and tools:
        with pytest.raises(DroppedGroupError, match=r"data\.jsonl:7: group 'g7': .*(leaves out|refuses)"):
            encoder(tokenizer).encode(group(completion, tools=tools))
        return
    if name == "deepseekv3":
        tools = None  # its template writes calls, and no tools
    encoded = encoder(tokenizer).encode(group(completion, tools=tools))
    whole = [*QUESTION, *completion]
    if name == "smolvlm":
        whole = as_parts(whole)
    expected = tokenizer.apply_chat_template(
        whole, tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    last = len(ids_of(encoded))
    assert expected["input_ids"][:last] == ids_of(encoded)
    assert [bool(one) for one in expected["assistant_masks"]] == [
        *mask_of(encoded),
        *[False] * (len(expected["input_ids"]) - last),
    ]
    assert any(expected["assistant_masks"])


@pytest.mark.parametrize(("name", "talk"), SCORED, ids=["-".join(key) for key in SCORED])
def test_turns_are_found_in_templates_that_don_t_mark_them(name: str, talk: str) -> None:
    tokenizer = tokenizer_of(name)
    completion, tools = TALKS[talk]
    encoded = encoder(tokenizer).encode(group(completion, tools=tools))
    assert scored_texts(tokenizer, encoded) == SCORED[name, talk]
    whole = tokenizer.apply_chat_template([*QUESTION, *completion], tools=tools, tokenize=True)["input_ids"]
    found = ids_of(encoded)
    if name == "glm4moe":
        assert found.pop() == tokenizer.eos_token_id
    assert whole[: len(found)] == found
    assert encoded.prompt.tolist() == found[: len(encoded.prompt)]


@pytest.mark.parametrize("name", ["llama3", "cohere"])
def test_found_turns_are_those_that_a_template_marks(name: str) -> None:
    """The two copies write the same; one of them marks what an assistant writes, to its end token."""
    texts = [
        tokenizer_of(f"{name}{kind}").apply_chat_template([*QUESTION, *TURNS], tokenize=False) for kind in ("", "_training")
    ]
    assert texts[0] == texts[1]
    plain, marked = (encoder(tokenizer_of(f"{name}{kind}")).encode(group(TURNS)) for kind in ("", "_training"))
    assert "{%- generation %}" not in source(name)
    assert (ids_of(plain), mask_of(plain)) == (ids_of(marked), mask_of(marked))


def test_calls_with_arguments_as_text_alone() -> None:
    """DeepSeek's template joins arguments with text: those that are objects are given to it as JSON."""
    tokenizer = tokenizer_of("deepseekv3")
    encoded = encoder(tokenizer).encode(group(CALLS))
    whole = tokenizer.apply_chat_template([*QUESTION, *written_arguments(CALLS)], tokenize=True)["input_ids"]
    assert ids_of(encoded) == whole
    call, answer = scored_texts(tokenizer, encoded)
    assert '```json\n{"city": "Oslo"}\n```' in call
    assert call.endswith(DEEPSEEK_END)
    assert answer == f"3 degrees.{DEEPSEEK_END}"


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("gemma", {"prompt": [{"role": "system", "content": "Be kind."}, *QUESTION]}, "refuses the prompt.*System role not"),
        ("gemma", {"completion": CALLS}, "refuses the prompt with its completion: Conversation roles must alternate"),
        ("lfm2", {"completion": CALLS}, "leaves out `tool_calls` of turn 2, which is the assistant's"),
        (
            "phi3",
            {"completion": [assistant("Look."), result("3"), *TURNS]},
            "leaves out the text of turn 3, which is the tool's",
        ),
        ("smollm", {"completion": CALLS, "tools": [TOOL]}, "leaves out `tools`, which a completion calls"),
        ("llama3_1", {"completion": [assistant("I look.", tool_calls=[CALL]), *CALLS[1:]]}, "leaves out the text of turn 2"),
        ("olmo", {"completion": TURNS[:2]}, "ends with a turn of 'user' .*: the assistant's must come last"),
        ("olmo", {"completion": [user("Oslo?")]}, "ends with a turn of 'user'"),
        ("olmo", {"completion": [assistant(" "), *TURNS[1:]]}, "turn 2, which is the assistant's, is empty"),
        ("olmo", {"completion": [assistant("a<|endoftext|>b"), *TURNS[1:]]}, "has an end token in its middle"),
        ("olmo", {"completion": TURNS, "chat_template_kwargs": {"enable_thinking": True}}, "does not read `enable_thinking`"),
    ],
)
def test_what_a_template_does_not_allow_is_refused_by_name(name: str, given: dict[str, Any], message: str) -> None:
    completion = given.pop("completion", TURNS)
    found = encoder(tokenizer_of(name))
    with pytest.raises(DroppedGroupError, match=rf"data\.jsonl:7: group 'g7': .*{message}"):
        found.encode(group(completion, **given))
    assert found.report.dropped.total() == 1


def test_a_prompt_that_is_plain_text_is_followed_by_text_alone() -> None:
    with pytest.raises(DroppedGroupError, match="a completion of turns follows a prompt that is given as plain text"):
        encoder(build_tokenizer(), string_prompts="raw").encode(group(TURNS, prompt="Weather?"))


class TestAGroup:
    def test_shares_its_prompt(self) -> None:
        tokenizer = tokenizer_of("qwen2_5")
        completions = (TURNS, [assistant("Cold.")], CALLS, "Warm.")
        encoded = encoder(tokenizer).encode(group(*completions, tools=[TOOL]))
        fed = tokenizer.apply_chat_template(QUESTION, tools=[TOOL], add_generation_prompt=True, tokenize=False)
        assert tokenizer.decode(encoded.prompt) == fed
        for number, completion in enumerate(completions):
            turns = [assistant(completion)] if isinstance(completion, str) else completion
            whole = tokenizer.apply_chat_template([*QUESTION, *turns], tools=[TOOL], tokenize=True)["input_ids"]
            assert ids_of(encoded, number) == whole[: len(ids_of(encoded, number))]
        assert [mask is None for mask in encoded.scored] == [False, True, False, True]
        assert scored_texts(tokenizer, encoded, 3) == ["Warm.<|im_end|>"]
        report_of = encoder(tokenizer)
        report_of.encode(group(*completions, tools=[TOOL]))
        scored = sum(sum(mask_of(encoded, number)) for number in range(4))
        assert report_of.report.scored_tokens == scored
        assert report_of.report.tokens == sum(len(ids_of(encoded, number)) for number in range(4))
        assert not report_of.report.rewritten

    def test_one_message_with_text_alone_is_encoded_as_text(self) -> None:
        tokenizer = tokenizer_of("qwen3")
        text, turn = (encoder(tokenizer).encode(group(one)) for one in ("Cold.", [assistant("Cold.")]))
        assert ids_of(text) == ids_of(turn)
        assert not text.scored

    def test_a_rewritten_prompt_is_encoded_with_its_completion_and_not_scored(self) -> None:
        """Mistral writes tools before the last question: with a further one, the first question's tokens differ."""
        tokenizer = tokenizer_of("mistral")
        found = encoder(tokenizer)
        encoded = found.encode(group(TURNS, [assistant("Cold.")], tools=[TOOL]))
        assert found.report.rewritten == 1
        assert "otherwise where 1 completions follow" in " ".join(found.report.notices())
        for number, completion in enumerate((TURNS, [assistant("Cold.")])):
            whole = tokenizer.apply_chat_template([*QUESTION, *completion], tools=[TOOL], tokenize=True)["input_ids"]
            assert ids_of(encoded, number) == whole
        assert tokenizer.decode(encoded.prompt) == "<|bos|>"
        assert scored_texts(tokenizer, encoded) == [" Where?</s>", " 3 degrees.</s>"]
        assert scored_texts(tokenizer, encoded, 1) == [" Cold.</s>"]

    def test_a_prompt_with_nothing_in_common_is_refused(self) -> None:
        tokenizer = tokenizer_of("mistral")
        tokenizer.chat_template = str(tokenizer.chat_template).replace("{{- bos_token }}", "")
        with pytest.raises(DroppedGroupError, match="writes the prompt otherwise, from its first token on"):
            encoder(tokenizer).encode(group(TURNS, tools=[TOOL]))

    def test_a_prompt_that_ends_with_calls_goes_on_with_their_results(self) -> None:
        tokenizer = tokenizer_of("mistral")
        encoded = encoder(tokenizer).encode(group(CALLS[1:], prompt=[*QUESTION, CALLS[0]], tools=[TOOL]))
        assert scored_texts(tokenizer, encoded) == [" 3 degrees.</s>"]
        assert tokenizer.decode(encoded.completions[0]).startswith("[TOOL_RESULTS]")

    def test_a_half_written_turn_goes_on(self) -> None:
        tokenizer = tokenizer_of("qwen2_5")
        prompt = [*QUESTION, assistant("It has")]
        encoded = encoder(tokenizer).encode(group([assistant(" 3 degrees."), user("Sure?"), assistant("Yes.")], prompt=prompt))
        assert scored_texts(tokenizer, encoded) == [" 3 degrees.<|im_end|>", "Yes.<|im_end|>"]
        marked = tokenizer_of("qwen2_5_training")
        encoded = encoder(marked).encode(group([assistant(" 3 degrees."), user("Sure?"), assistant("Yes.")], prompt=prompt))
        assert scored_texts(marked, encoded) == [" 3 degrees.<|im_end|>\n", "\nYes.<|im_end|>\n"]
        with pytest.raises(DroppedGroupError, match="half-written turn, and the completion does not begin"):
            encoder(tokenizer).encode(group([user("Sure?"), assistant("Yes.")], prompt=prompt))

    def test_more_keys_reach_the_template(self) -> None:
        tokenizer = tokenizer_of("smollm")
        tokenizer.chat_template = str(tokenizer.chat_template).replace(
            "+ message['content']", "+ (message.mood | default('')) + message['content']"
        )
        found = encoder(tokenizer)
        encoded = found.encode(group([assistant("Cold.", mood="sad: ")]))
        assert scored_texts(tokenizer, encoded) == ["sad: Cold.<|im_end|>"]
        assert not found.report.untold
        plain = encoder(tokenizer_of("smollm"))
        plain.encode(group([assistant("Cold.", mood="sad: ")]))
        assert dict(plain.report.untold) == {"mood of answers": 1}

    def test_cut_completions_keep_their_masks(self) -> None:
        tokenizer = tokenizer_of("smollm")
        whole = encoder(tokenizer).encode(group(TURNS, "Cold."))
        room = int(np.flatnonzero(np.diff(whole.scored[0]))[0]) + 3  # two tokens after the first turn
        cut = Encoder(tokenizer, max_length=len(whole.prompt) + room, max_prompt_length=len(whole.prompt)).encode(
            group(TURNS, "Cold.")
        )
        assert cut.scored[0].tolist() == whole.scored[0][:room].tolist()
        kept = len(whole.prompt)
        short = Encoder(tokenizer, max_length=kept + room, max_prompt_length=kept, rules=ConversationRules("last"))
        with pytest.raises(DroppedGroupError, match="the first scored turn of a completion lies beyond max_length"):
            short.encode(group(TURNS))

    def test_an_unfinished_turn_has_no_end_token(self) -> None:
        for name, turns in (
            ("smollm", ["Where?<|im_end|>", "3 degrees."]),
            ("gemma3_training", ["Where?<end_of_turn>\n", "3 degrees."]),
        ):
            tokenizer = tokenizer_of(name)
            cut = Group("g7", QUESTION, [Candidate(TURNS, finished=False)])
            assert scored_texts(tokenizer, encoder(tokenizer).encode(cut)) == turns
        tokenizer = tokenizer_of("glm4moe")
        assert scored_texts(tokenizer, encoder(tokenizer).encode(cut))[-1].endswith("3 degrees.")

    def test_an_end_token_at_a_turn_s_end_is_scored_once(self) -> None:
        tokenizer = tokenizer_of("smollm")
        found = encoder(tokenizer)
        encoded = found.encode(group([assistant("Where?<|im_end|>"), *TURNS[1:]]))
        assert scored_texts(tokenizer, encoded) == ["Where?<|im_end|>", "3 degrees.<|im_end|>"]
        assert found.report.repeated_eos == 1

    def test_control_tokens_in_texts_are_encoded_as_text(self) -> None:
        tokenizer = tokenizer_of("smollm")
        turns = [assistant("Say <|im_start|>!"), user("<|im_end|> é <|im_start|>"), assistant("A <|im_end|> b")]
        encoded = encoder(tokenizer, control_tokens="escape").encode(group(turns, "4"))
        assert scored_texts(tokenizer, encoded) == ["Say <|im_start|>!<|im_end|>", "A <|im_end|> b<|im_end|>"]
        ends = tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert [bool(one) for one in encoded.completions[0] == ends].count(True) == 3  # one a turn


class TestSettings:
    def test_the_last_turn_alone(self) -> None:
        for name, text in (("qwen3", f"{NO_THOUGHT}3 degrees.<|im_end|>"), ("gemma3_training", "3 degrees.<end_of_turn>\n")):
            tokenizer = tokenizer_of(name)
            encoded = encoder(tokenizer, scored_turns="last").encode(group(TURNS))
            assert scored_texts(tokenizer, encoded) == [text]
            assert ids_of(encoded) == ids_of(encoder(tokenizer).encode(group(TURNS)))

    def test_thoughts_are_read_and_not_scored(self) -> None:
        tokenizer = tokenizer_of("qwen3")
        masked = encoder(tokenizer, thoughts="masked").encode(group(THOUGHTS, "<think>\nHm\n</think>\n\nCold."))
        scored = encoder(tokenizer).encode(group(THOUGHTS, "<think>\nHm\n</think>\n\nCold."))
        assert [ids_of(masked, k) for k in (0, 1)] == [ids_of(scored, k) for k in (0, 1)]
        assert scored_texts(tokenizer, masked) == ["Where?<|im_end|>", "\n\n3 degrees.<|im_end|>"]
        assert scored_texts(tokenizer, masked, 1) == ["\n\nCold.<|im_end|>"]

    def test_thoughts_that_the_generation_prompt_opens(self) -> None:
        tokenizer = build_tokenizer()
        tokenizer.chat_template = CHATML.replace("assistant\n", "assistant\n<think>\n")
        encoded = encoder(tokenizer, thoughts="masked").encode(group("Hm</think>Cold.", "Hm"))
        assert scored_texts(tokenizer, encoded) == ["Cold.<|im_end|>"]
        assert scored_texts(tokenizer, encoded, 1) == ["<|im_end|>"]

    def test_thoughts_of_raw_text(self) -> None:
        tokenizer = build_tokenizer()
        encoded = encoder(tokenizer, thoughts="masked", string_prompts="raw").encode(
            group(" 4", "<think>so</think> 5", prompt="2 + 2 =")
        )
        assert [scored_texts(tokenizer, encoded, k) for k in (0, 1)] == [[" 4<|im_end|>"], [" 5<|im_end|>"]]

    def test_thoughts_before_the_last_question_are_left_out(self) -> None:
        tokenizer = tokenizer_of("smollm")
        prompt = [user("2?"), assistant("<think>Hm</think>\n\n2."), user("Weather?")]
        turns = [assistant("<think>a</think>Where?"), user("Oslo."), assistant("<think>b</think>3.")]
        encoded = encoder(tokenizer, thoughts="stripped").encode(group(turns, prompt=prompt))
        assert tokenizer.decode(ids_of(encoded)).count("<think>") == 1
        assert scored_texts(tokenizer, encoded) == ["Where?<|im_end|>", "<think>b</think>3.<|im_end|>"]
        kept = encoder(tokenizer).encode(group(turns, prompt=prompt))
        assert tokenizer.decode(ids_of(kept)).count("<think>") == 3
        # What a model is fed before it answers has none of them either.
        template = ConversationRules(thoughts="stripped").template(tokenizer, None)
        assert template.prompt(prompt) == tokenizer.decode(encoded.prompt)

    def test_values_for_the_template(self) -> None:
        tokenizer = tokenizer_of("qwen3")
        of_run = encoder(tokenizer, template_kwargs={"enable_thinking": False}).encode(group("Cold."))
        of_row = encoder(tokenizer, template_kwargs={"enable_thinking": True}).encode(
            group("Cold.", chat_template_kwargs={"enable_thinking": False})
        )
        fed = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, enable_thinking=False, tokenize=False)
        assert fed.endswith(NO_THOUGHT)
        assert [tokenizer.decode(one.prompt) for one in (of_run, of_row)] == [fed, fed]
        assert scored_texts(tokenizer, of_row) == ["Cold.<|im_end|>"]
        assert not tokenizer.decode(encoder(tokenizer).encode(group("Cold.")).prompt).endswith(NO_THOUGHT)

    def test_values_that_the_template_does_not_read_are_refused(self) -> None:
        with pytest.raises(ValueError, match="does not read `enable_thinkin`: leave it out of chat_template_kwargs"):
            encoder(tokenizer_of("qwen3"), template_kwargs={"enable_thinkin": False})

    def test_values_are_written_as_names_and_values_or_as_a_mapping(self) -> None:
        config = EncodingConfig(chat_template_kwargs={"enable_thinking": "false", "n": 3, "mode": "fast"})
        assert template_kwargs(config.chat_template_kwargs) == {"enable_thinking": False, "n": 3, "mode": "fast"}
        for wrong in (("enable_thinking",), ("a=1", "a=2"), ("tools=[]",), ("1a=2",)):
            with pytest.raises(ValueError, match=r"NAME=VALUE|twice|no value for a chat template"):
                EncodingConfig(chat_template_kwargs=wrong)


def test_masks_have_reference_log_probs_of_their_own() -> None:
    tokenizer = tokenizer_of("smollm")
    every, last = (encoder(tokenizer, scored_turns=kind).encode(group(TURNS, "Cold.")) for kind in ("assistant", "last"))
    assert candidate_key(every, 0) != candidate_key(last, 0)
    assert candidate_key(every, 1) == candidate_key(last, 1)


def test_a_tokenizer_that_does_not_say_where_its_tokens_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_of("smollm")
    expected = encoder(tokenizer).encode(group(TURNS))
    monkeypatch.setattr(type(tokenizer), "is_fast", property(lambda self: False))
    assert mask_of(encoder(tokenizer).encode(group(TURNS))) == mask_of(expected)
    with pytest.raises(ValueError, match="joins what is scored with what is not"):
        ControlTokens(tokenizer).encode_spans("What is", [(2, 7)])


@pytest.mark.parametrize(
    ("text", "spans", "scored"),
    [
        ("What is it?", [(0, 4)], ["What"]),
        # A token that lies in a part with one letter is scored.
        ("What is it?", [(3, 7)], ["What is"]),
        ("é👩‍🔬 is", [(1, 4)], ["👩‍🔬"]),
        ("a  b", [(1, 2)], [" "]),
    ],
)
def test_tokens_of_parts_of_a_text(text: str, spans: list[tuple[int, int]], scored: list[str]) -> None:
    tokenizer = build_tokenizer()
    ids, inside = ControlTokens(tokenizer).encode_spans(text, spans)
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert [tokenizer.decode([token for token, one in zip(ids, inside, strict=True) if one])] == scored


def test_a_mark_changes_nothing_that_templates_look_at() -> None:
    assert [spot_in(text) for text in ("<tool_response>\n3</tool_response>", "", "  ?", "<think>ab</think>")] == [
        17,
        None,
        3,
        8,
    ]
    assert outside_thoughts("[THINK]a[/THINK]b<think>c", [(0, 24)]) == [(16, 17)]


def test_templates_of_models_that_see_pictures_are_given_parts() -> None:
    template = ChatTemplate(tokenizer_of("smolvlm"))
    assert "How is the weather?" in template.prompt(QUESTION)
    assert template.render(QUESTION) == template.tokenizer.apply_chat_template(as_parts(QUESTION), tokenize=False)


def test_a_template_of_its_own_for_tools() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = {"default": CHATML, "tool_use": "{{ tools | tojson }}" + CHATML}
    template = ChatTemplate(tokenizer)
    assert template.render(QUESTION) == "<|im_start|>user\nHow is the weather?<|im_end|>\n"
    assert template.render(QUESTION, tools=[TOOL]) == json.dumps([TOOL]) + template.render(QUESTION)


def test_a_completion_as_plain_text() -> None:
    assert completion_text(TURNS) == "Assistant: Where?\n\nUser: In Oslo.\n\nAssistant: 3 degrees."
    assert completion_text(CALLS) == 'Assistant: [call weather {"city": "Oslo"}]\n\nTool: 3\n\nAssistant: 3 degrees.'
    assert completion_text([assistant("Look.", tool_calls=[CALL])]) == 'Look.\n[call weather {"city": "Oslo"}]'
    assert last_answer(Candidate(CALLS)) == "3 degrees."


@pytest.mark.parametrize("verb", ["check", "train"])
def test_verbs_take_conversations(
    verb: str, write_jsonl: Callable[..., Path], tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"id": "a", "prompt": QUESTION, "chosen": TURNS, "rejected": [*TURNS[:2], assistant("4 degrees.")]}]
    data = str(write_jsonl(rows))
    model = ["--model", str(tiny_model_dir), "--max_length", "512"]
    words = {
        "check": ["check", data, *model],
        "train": ["train", "--data", data, *model, "--output_dir", str(tmp_path / "run"), "--dry_run"],
    }
    assert main(words[verb]) == 0
    said = capsys.readouterr().out
    shown = said.replace("][", "")
    assert "[Where?<|im_end|>]" in shown
    assert "<|im_start|>user\\nIn Oslo.<|im_end|>" in shown
    assert "[4 degrees.<|im_end|>]" in shown
    assert [len(one.completion) for one in next(read_groups(data)).candidates] == [3, 3]


class TestWhatIsTold:
    def test_thoughts_of_earlier_answers_that_the_template_takes_out(self) -> None:
        inside = [assistant("<think>\nI ask.\n</think>\n\nWhere?"), *THOUGHTS[1:]]
        for turns in (THOUGHTS, inside):
            found = encoder(tokenizer_of("qwen3"))
            found.encode(group(turns))
            assert dict(found.report.untold) == {"thoughts of earlier answers": 1}
        for name, rules in (("qwen3_training", {}), ("qwen3", {"thoughts": "stripped"})):
            found = encoder(tokenizer_of(name), **rules)
            found.encode(group(inside))
            assert not found.report.untold

    def test_thoughts_with_marks_that_are_not_known_can_t_be_masked(self) -> None:
        found = encoder(tokenizer_of("muse_glimmer"), thoughts="masked")
        with pytest.raises(DroppedGroupError, match="where the thought of turn 2 begins and ends in this chat template"):
            found.encode(group(THOUGHTS))
        encoder(tokenizer_of("gptoss"), thoughts="masked").encode(group(THOUGHTS))

    @pytest.mark.parametrize(
        ("name", "prompt", "told"),
        [
            ("phi3", [*QUESTION, assistant("I look."), result("3 C")], {"tool turns": 1}),
            ("qwen2_5", [*QUESTION, CALLS[0], result("3 C")], {}),
            ("olmo", [{"role": "system", "content": "Be kind."}, *QUESTION], {}),
            ("glm4moe", [{"role": "critic", "content": "Be kind."}, *QUESTION], {"critic turns": 1}),
        ],
    )
    def test_turns_of_a_prompt_that_the_template_passes_over(self, name: str, prompt: Any, told: dict[str, int]) -> None:
        found = encoder(tokenizer_of(name))
        found.encode(group("Cold.", prompt=prompt))
        assert dict(found.report.untold) == told


@pytest.mark.parametrize(
    ("template", "scored"),
    [
        (CHATML.split("{% if add_generation_prompt %}")[0], ["Where?<|im_end|>", "3 degrees.<|im_end|>"]),
        (
            "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token + '\n' }}{% endfor %}",
            [" Where?<|im_end|>", " 3 degrees.<|im_end|>"],
        ),
    ],
)
def test_templates_without_a_generation_prompt(template: str, scored: list[str]) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    encoded = encoder(tokenizer).encode(group(TURNS, "Cold."))
    assert scored_texts(tokenizer, encoded) == scored
    assert (
        ids_of(encoded)
        == tokenizer.apply_chat_template([*QUESTION, *TURNS], tokenize=True)["input_ids"][: len(ids_of(encoded))]
    )
    assert tokenizer.decode(encoded.prompt).endswith("assistant\n" if "im_start" in template else "assistant:")
