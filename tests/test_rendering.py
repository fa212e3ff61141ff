"""Chat templates in the manner of public models: where an answer's turn begins and ends, on which day, and what models lack."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from transformers import (
    AddedToken,
    AutoModelForCausalLM,
    CodeGenConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from conftest import CHATML, build_model, build_tokenizer, group_row
from ncalign.audit.check import run_check
from ncalign.audit.config import CheckConfig
from ncalign.core.store import Store
from ncalign.data.groups import Candidate, Group, Message, ReadReport
from ncalign.data.rendering import Rendering
from ncalign.generation.base import Completion, LeftOutPrompts, PromptError, SamplingParams, tell_refused
from ncalign.generation.config import ServerConfig
from ncalign.generation.failures import ServerError
from ncalign.generation.generate import sample_groups
from ncalign.generation.local import TransformersGenerator
from ncalign.generation.remote import ServerGenerator
from ncalign.generation.wire import Choice
from ncalign.judging.answer import Answering, answer_questions
from ncalign.judging.records import Answer, Question
from ncalign.model.chat import ChatTemplate
from ncalign.model.encoding import DroppedGroupError, Encoder
from ncalign.model.limits import Limits, limits_of, limits_of_folder
from ncalign.rewards.base import completion_texts
from ncalign.rewards.score import score_groups
from ncalign.training.config import TrainConfig
from ncalign.training.train import run_training

QUESTION: list[Message] = [{"role": "user", "content": "2 + 3?"}]
TURNS = "{% for m in messages %}"


class Manner(NamedTuple):
    """How a family of models writes ``QUESTION`` and the answer "5.", by hand."""

    template: str
    tokens: tuple[str, ...]
    prompt: str
    scored: str


MANNERS = {
    # A channel's name stands before the last answer, which another token ends than earlier ones.
    "channels": Manner(
        TURNS + "{% if m.role == 'assistant' %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + "
        "('<|return|>' if loop.last else '<|end|>') }}{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + "
        "'<|end|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}",
        ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"),
        "<|start|>user<|message|>2 + 3?<|end|><|start|>assistant",
        "<|channel|>final<|message|>5.<|return|>",
    ),
    # The last answer is given an empty thought; thoughts of earlier ones are dropped.
    "thoughts": Manner(
        TURNS + "{% set said = m.content.split('</think>')[-1] %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' and loop.last and '</think>' in m.content %}{{ m.content }}"
        "{% elif m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' + m.content }}"
        "{% else %}{{ said }}{% endif %}"
        "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        ("<think>", "</think>"),
        "<|im_start|>user\n2 + 3?<|im_end|>\n<|im_start|>assistant\n",
        "<think>\n\n</think>\n\n5.<|im_end|>",
    ),
    # The generation prompt opens the thought that the last answer closes.
    "opened-thought": Manner(
        TURNS + "{{ '<|im_start|>' + m.role + '\n' + ('<think>\n\n</think>\n\n' if m.role == 'assistant' else '') + m.content "
        "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}",
        ("<think>", "</think>"),
        "<|im_start|>user\n2 + 3?<|im_end|>\n<|im_start|>assistant\n<think>\n",
        "\n</think>\n\n5.<|im_end|>",
    ),
    "model-role": Manner(
        "{{ bos_token }}" + TURNS + "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + "
        "m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        ("<start_of_turn>", "<end_of_turn>"),
        "<|bos|><start_of_turn>user\n2 + 3?<end_of_turn>\n<start_of_turn>model\n",
        "5.<end_of_turn>",
    ),
    # No generation prompt, and the end glued to the answer.
    "instructions": Manner(
        "{{ bos_token }}" + TURNS + "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}"
        "{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}",
        ("[INST]", "[/INST]", "</s>"),
        "<|bos|>[INST] 2 + 3? [/INST]",
        " 5.</s>",
    ),
    # A token for the end of the text follows the end of the last turn.
    "end-of-text": Manner(
        TURNS + "{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{{ '<|assistant|>\n' if add_generation_prompt else '<|endoftext|>' }}",
        ("<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
        "<|user|>\n2 + 3?<|end|>\n<|assistant|>\n",
        "5.<|end|>",
    ),
    # The answer stands between tokens of its own.
    "response": Manner(
        TURNS
        + "{{ '<|turn|>' + m.role }}{{ '<|response|>' + m.content + '<|/response|>' if m.role == 'assistant' else m.content }}"
        "{{ '<|/turn|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|turn|>assistant' }}{% endif %}",
        ("<|turn|>", "<|/turn|>", "<|response|>", "<|/response|>"),
        "<|turn|>user2 + 3?<|/turn|><|turn|>assistant",
        "<|response|>5.<|/response|>",
    ),
    "default-system": Manner(
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}" + CHATML,
        (),
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n2 + 3?<|im_end|>\n<|im_start|>assistant\n",
        "5.<|im_end|>",
    ),
}


def tokenizer_of(manner: Manner, *, special: bool = False) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with the manner's tokens added, and not marked special unless asked for."""
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token in manner.tokens])
    tokenizer.chat_template = manner.template
    return tokenizer


def asked(*answers: str, prompt: list[Message] = QUESTION) -> Group:
    return Group("g7", prompt, [Candidate(text) for text in answers], origin="a.jsonl:7")


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("name", MANNERS)
def test_the_scored_tokens_are_the_template_s_turn(name: str, special: bool) -> None:
    manner = MANNERS[name]
    tokenizer = tokenizer_of(manner, special=special)
    encoder = Encoder(tokenizer)
    encoded = encoder.encode(asked("5.", "It is 5."))
    assert tokenizer.decode(encoded.prompt) == manner.prompt
    assert [tokenizer.decode(ids) for ids in encoded.completions] == [
        manner.scored,
        manner.scored.replace("5.", "It is 5."),
    ]
    assert encoder.report.notices() == []


@pytest.mark.parametrize("name", MANNERS)
def test_a_half_written_turn_goes_on(name: str) -> None:
    manner = MANNERS[name]
    tokenizer = tokenizer_of(manner)
    begun: list[Message] = [*QUESTION, {"role": "assistant", "content": "It is"}]
    encoder = Encoder(tokenizer)
    encoded = encoder.encode(asked(" 5.", prompt=begun))
    whole = tokenizer.apply_chat_template([*QUESTION, {"role": "assistant", "content": "It is 5."}], tokenize=False)
    prompt = tokenizer.decode(encoded.prompt)
    assert prompt == whole[: whole.rindex(" 5.")]
    assert ChatTemplate(tokenizer).prompt(begun) == prompt
    assert tokenizer.decode(encoded.completions[0]) == " 5." + manner.scored.rpartition("5.")[2]
    assert encoder.report.template_mismatches == 0


def test_an_answer_with_a_thought_of_its_own_gets_no_other() -> None:
    manner = MANNERS["thoughts"]
    tokenizer = tokenizer_of(manner)
    encoder = Encoder(tokenizer)
    encoded = encoder.encode(asked("<think>2, 3</think>5.", "5."))
    assert [tokenizer.decode(ids) for ids in encoded.completions] == ["<think>2, 3</think>5.<|im_end|>", manner.scored]
    assert encoder.report.template_mismatches == 0


def test_an_assistant_s_call_of_a_tool_is_a_whole_turn() -> None:
    called: list[Message] = [*QUESTION, {"role": "assistant", "content": "", "tool_calls": [{"name": "add"}]}]
    assert ChatTemplate(build_tokenizer()).prompt(called).endswith("<|im_end|>\n<|im_start|>assistant\n")


class TestGeneration:
    def test_a_template_s_end_stops_an_answer(self) -> None:
        tokenizer = tokenizer_of(MANNERS["model-role"])
        end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
        model = build_model(tokenizer)
        with torch.no_grad():
            model.lm_head.weight.zero_()
        model.lm_head.bias = torch.nn.Parameter(torch.nn.functional.one_hot(torch.tensor(end), len(tokenizer)).float())
        [[one]] = TransformersGenerator(model, tokenizer, progress=False).generate(
            [QUESTION], num_samples=1, params=SamplingParams(5, temperature=0), seed=0
        )
        assert (one.token_ids, one.finished, one.text) == ((end,), True, "")

    def test_a_header_is_no_part_of_the_answer(self) -> None:
        tokenizer = tokenizer_of(MANNERS["channels"], special=True)
        generator = TransformersGenerator(build_model(tokenizer), tokenizer, progress=False)
        for text in ("<|channel|>final<|message|>5.<|return|>", "5.<|return|>"):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert generator._decode(ids, 0.0).text == "5."

    def test_prompts_that_can_t_be_answered_are_told_of(self) -> None:
        tokenizer = build_tokenizer()
        tokenizer.chat_template = (
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + CHATML
        )
        tokenizer.add_tokens(["<extra>"])
        model = build_model(build_tokenizer())
        prompts: list[Any] = ["Hi", "word " * 600, [{"role": "system", "content": "a"}, *QUESTION], "<extra>", QUESTION]
        left_out = LeftOutPrompts()
        found = TransformersGenerator(model, tokenizer, progress=False).generate(
            prompts, num_samples=2, params=SamplingParams(3), seed=0, refuse=left_out.among("abcde")
        )
        assert [len(row) for row in found] == [2, 0, 0, 0, 2]
        assert sorted(left_out.names) == ["b", "c", "d"]
        notice = left_out.notice("p.jsonl")
        assert notice is not None
        for part in ("3 prompts", "context of 512 tokens", "no system turns", "'<extra>' (id 384) has no embedding"):
            assert part in notice
        with pytest.raises(ValueError, match=r"prompt 2: .*context of 512 .*2 more prompts can't be answered"):
            TransformersGenerator(model, tokenizer, progress=False).generate(
                prompts, num_samples=2, params=SamplingParams(3), seed=0
            )


DATED = "{{ '<|im_start|>system\n' + strftime_now('FORMAT') + '<|im_end|>\n' }}" + CHATML


class TestDates:
    @pytest.mark.parametrize(
        ("form", "written"),
        [
            ("%d %b %Y", "02 Jan 2025"),
            ("%Y-%m-%d", "2025-01-02"),
            ("%B %-d, %Y (%A)", "January 2, 2025 (Thursday)"),
            ("%H:%M", "00:00"),
        ],
    )
    def test_a_fixed_date_is_written(self, form: str, written: str) -> None:
        tokenizer = build_tokenizer()
        tokenizer.chat_template = DATED.replace("FORMAT", form)
        encoded = Encoder(tokenizer, today=date(2025, 1, 2)).encode(asked("5."))
        assert tokenizer.decode(encoded.prompt).startswith(f"<|im_start|>system\n{written}<|im_end|>\n<|im_start|>user")

    @pytest.mark.parametrize(
        "template",
        [
            "{% if strftime_now is defined %}{% set today = strftime_now('%d %b %Y') %}{% endif %}{{ today }}" + CHATML,
            "{% macro head() %}{{ strftime_now('%d %b %Y') }}{% endmacro %}{{ head() }}" + CHATML,
            "{%- if not date_string is defined %}\n    {%- set date_string = strftime_now('%d %b %Y') %}\n{%- endif %}\n"
            "{{- date_string }}" + CHATML,
        ],
    )
    def test_wherever_the_template_asks_for_it(self, template: str) -> None:
        tokenizer = build_tokenizer()
        tokenizer.chat_template = template
        assert ChatTemplate(tokenizer, date(2025, 1, 2)).prompt(QUESTION).startswith("02 Jan 2025<|im_start|>user")

    def test_all_else_of_a_template_is_as_it_was(self) -> None:
        tokenizer = build_tokenizer()
        tokenizer.chat_template = "\n  {% if true %}\n  x{% endif %} {{ strftime_now('') }}" + CHATML
        plain = tokenizer.apply_chat_template(QUESTION, tokenize=False)
        assert ChatTemplate(tokenizer, date(2025, 1, 2)).render(QUESTION) == plain

    def test_a_run_keeps_its_day(
        self, tiny_model_dir: Path, groups_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Later(date):
            @classmethod
            def today(cls) -> date:
                return date(2031, 5, 6)

        model = dated_model(tmp_path)
        config = TrainConfig(
            model=str(model),
            data=groups_file,
            output_dir=tmp_path / "run",
            max_steps=2,
            save_steps=1,
            report_to=(),
            cache_dir=tmp_path,
        )
        run_training(config)
        written = yaml.safe_load((tmp_path / "run/config.yaml").read_text())["template_date"]
        assert written == str(date.today())
        (tmp_path / "run/results.json").unlink()
        monkeypatch.setattr("ncalign.model.chat.date", Later)
        run_training(config.model_copy(update={"resume": True}))
        assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["template_date"] == written


def dated_model(folder: Path) -> Path:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = DATED.replace("FORMAT", "%Y-%m-%d")
    build_model(tokenizer).save_pretrained(folder / "dated")
    tokenizer.save_pretrained(folder / "dated")
    return folder / "dated"


SMALL: dict[str, Any] = {"vocab_size": 99, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}


class TestLimits:
    @pytest.mark.parametrize(
        ("config", "positions"),
        [
            (
                OPTConfig(
                    **SMALL, hidden_size=8, ffn_dim=8, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=20
                ),
                20,
            ),
            (GPT2Config(**SMALL, n_embd=8, n_layer=1, n_head=2, n_positions=20), 20),
            (CodeGenConfig(**SMALL, n_embd=32, n_layer=1, n_head=4, n_positions=20, rotary_dim=4), 20),
            (
                RobertaConfig(
                    **SMALL,
                    hidden_size=8,
                    intermediate_size=8,
                    num_hidden_layers=1,
                    num_attention_heads=2,
                    max_position_embeddings=22,
                    is_decoder=True,
                ),
                20,
            ),
            (LlamaConfig(**SMALL, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2), None),
        ],
        ids=lambda value: getattr(value, "model_type", None),
    )
    def test_positions_by_the_model_s_tables(self, config: Any, positions: int | None, tmp_path: Path) -> None:
        model = AutoModelForCausalLM.from_config(config).eval()
        found = limits_of(model)
        assert (found.vocabulary, found.positions) == (99, positions)
        config.save_pretrained(tmp_path)
        assert limits_of_folder(str(tmp_path), trust_remote_code=False) == found
        if positions is not None:
            model(input_ids=torch.full((1, positions), 5))  # the last one has a place
            with pytest.raises((IndexError, RuntimeError), match=r"out of (range|bounds)"):
                model(input_ids=torch.full((1, positions + 1), 5))

    def test_what_has_no_place_is_told_with_its_group(self) -> None:
        tokenizer = build_tokenizer()
        tokenizer.add_tokens(["<tool>"])
        number = len(tokenizer) - 1
        encoder = Encoder(tokenizer, limits=Limits(vocabulary=number))
        message = (
            rf"a\.jsonl:7: group 'g7': the token '<tool>' \(id {number}\) has no embedding in the model, which has {number}"
        )
        for group in (asked("<tool>", "5."), asked("5.", prompt=[{"role": "user", "content": "<tool>"}])):
            with pytest.raises(DroppedGroupError, match=message):
                encoder.encode(group)
        encoded = Encoder(tokenizer).encode(asked("5."))
        for limit, fits in ((encoded.length, True), (encoded.length - 1, False)):
            encoder = Encoder(tokenizer, limits=Limits(positions=limit))
            if fits:
                encoder.encode(asked("5."))
            else:
                with pytest.raises(DroppedGroupError, match=rf"than the model has positions, {limit}: lower max_length"):
                    encoder.encode(asked("5."))

    def test_check_and_train_name_the_token(self, tmp_path: Path, groups_file: Path) -> None:
        tokenizer = build_tokenizer()
        tokenizer.add_special_tokens({"pad_token": "<padding>"})  # never embedded: padding is masked
        tokenizer.add_tokens(["<tool>"])
        build_model(build_tokenizer()).save_pretrained(tmp_path / "m")
        tokenizer.save_pretrained(tmp_path / "m")
        config = TrainConfig(
            model=str(tmp_path / "m"),
            data=groups_file,
            output_dir=tmp_path / "r",
            max_steps=1,
            report_to=(),
            cache_dir=tmp_path,
        )
        run_training(config)
        rows = [json.loads(line) for line in groups_file.read_text().splitlines()]
        rows[4]["prompt"][0]["content"] = "<tool>"
        bad = tmp_path / "bad.jsonl"
        bad.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(ValueError, match=r"1 x the token '<tool>' .*\(first: bad\.jsonl:5, group 'g4'\)"):
            run_training(config.model_copy(update={"data": bad, "overwrite": True}))
        mend = run_check(CheckConfig(model=str(tmp_path / "m"), data=str(bad), max_length=128))["mend"]
        assert [("the token '<tool>'" in text, "bad.jsonl:5" in text) for text in mend] == [(True, True)]


REFUSING = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + CHATML


def test_check_lists_every_bad_row(tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = REFUSING
    build_model(tokenizer).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    rows: list[Any] = [group_row(index, [1.0, 0.0]) for index in range(30)]
    for index in range(3, 28):
        rows[index]["prompt"].insert(0, {"role": "system", "content": "Hm."})
    rows[0] = rows[1] = "{"
    data = write_jsonl(rows)
    found = run_check(CheckConfig(model=str(tmp_path / "m"), data=str(data), max_length=128))
    unreadable, refused = found["mend"]
    assert "groups.jsonl:1" in unreadable
    assert "groups.jsonl:2" in unreadable
    assert refused.startswith("25 groups can't be encoded: the chat template refuses the prompt: no system turns; ")
    # Twenty places, lines 4 to 23, and the number of the others.
    assert [line.strip() for line in refused.splitlines()[1:]] == [
        *(f"groups.jsonl:{line}" for line in range(4, 24)),
        "and 5 more",
    ]
    assert found["groups_dropped"] == {"the chat template refuses the prompt: no system turns": 25}


class Refusing:
    """Answers every prompt but those that say "no"."""

    string_prompts: Rendering = "user_turn"

    def generate(
        self, prompts: Any, *, num_samples: int, params: SamplingParams, seed: int, tools: Any = None, refuse: Any = None
    ) -> list[list[Completion]]:
        bad = [index for index, prompt in enumerate(prompts) if "no" in str(prompt)]
        tell_refused([PromptError(index, "it says no", reason="says no") for index in bad], refuse)
        return [[] if k in bad else [Completion("Yes.", 2, True)] * num_samples for k in range(len(prompts))]


class TestSkip:
    @pytest.mark.parametrize("on_bad_row", ["error", "skip"])
    def test_questions_that_can_t_be_asked(self, on_bad_row: Any, tmp_path: Path) -> None:
        questions = [Question("1", ("A?", "no")), Question("2", ("C?",)), Question("3", ("no",))]
        answering = Answering(9, on_bad_row=on_bad_row)
        store = Store(tmp_path / "answers")

        def ask() -> list[Answer]:
            return answer_questions(questions, Refusing(), answering, model="m", identity="w", store=store, at_a_time=2)

        if on_bad_row == "skip":
            assert [answer.question for answer in ask()] == ["2"]
        else:
            with pytest.raises(ValueError, match="question '3': it says no"):
                ask()

    @pytest.mark.parametrize("skip", [False, True])
    def test_groups_that_can_t_be_scored(self, skip: bool) -> None:
        class Length:
            def score(self, group: Group) -> list[float | None]:
                if group.id == "bad":
                    raise DroppedGroupError(group, "too odd", "it is too odd")
                return [float(len(text)) for text in completion_texts(group)]

        several: list[Message] = [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
        groups = [asked("5.", "It is 5."), Group("bad", QUESTION, [Candidate(several)], origin="a.jsonl:8"), asked("6")]
        left_out = ReadReport() if skip else None
        if not skip:
            with pytest.raises(ValueError, match=r"a\.jsonl:8: group 'bad': it is too odd"):
                list(score_groups(groups, Length(), left_out))
            return
        found = list(score_groups(groups, Length(), left_out))
        assert [[candidate.reward for candidate in group.candidates] for group in found] == [[2.0, 8.0], [1.0]]
        assert left_out is not None
        assert left_out.reasons == {"too odd": 1}
        assert "a.jsonl:8" in left_out.listed()

    def test_groups_whose_samples_are_refused(self) -> None:
        left_out = LeftOutPrompts()
        prompts = [Group(text, text, [], origin=f"p.jsonl:{place}") for place, text in enumerate(("yes", "no"), start=1)]
        groups, counts = sample_groups(
            prompts, Refusing(), num_samples=2, params=SamplingParams(4), seed=0, source="m", left_out=left_out
        )
        assert [len(group.candidates) for group in groups] == [2, 0]
        assert (counts.candidates, counts.missing, left_out.names) == (2, 0, ["p.jsonl:2: group 'no'"])
        with pytest.raises(ValueError, match=r"p\.jsonl:2: group 'no': it says no"):
            sample_groups(prompts, Refusing(), num_samples=2, params=SamplingParams(4), seed=0, source="m")


@pytest.mark.parametrize("skip", [False, True])
def test_a_server_s_refusal_is_of_one_prompt(skip: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openai")
    generator = ServerGenerator(ServerConfig(), progress=False)
    refusal = ServerError("Error code: 400 - content filter", refused=True)
    asked_for: list[Any] = []

    def ask(requests: Any, *, done: Any) -> list[Any]:
        asked_for.extend(requests)
        return [[Choice("Yes.", True)], refusal]

    monkeypatch.setattr(generator.server, "ask", ask)
    half: list[Message] = [*QUESTION, {"role": "assistant", "content": "It is"}]
    left_out = LeftOutPrompts()
    options: dict[str, Any] = {"num_samples": 1, "params": SamplingParams(4), "seed": 0}
    if skip:
        found = generator.generate([half, "b"], **options, refuse=left_out.among(["a", "b"]))
        assert ([len(row) for row in found], left_out.names) == ([1, 0], ["b"])
    else:
        with pytest.raises(PromptError, match="prompt 2: Error code: 400 - content filter"):
            generator.generate([half, "b"], **options)
    bodies = [request.body for request in asked_for]
    assert bodies[0].items() >= {"continue_final_message": True, "add_generation_prompt": False, "messages": half}.items()
    assert "continue_final_message" not in bodies[1]
