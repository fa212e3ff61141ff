"""Groups → token ids: boundary, end token, truncation, dropped groups, for chat templates as they are found in the wild."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from conftest import CHATML, SENTENCES, build_tokenizer
from ncalign.data.groups import Candidate, Group, Message
from ncalign.model.chat import ChatTemplate
from ncalign.model.encoding import DroppedGroupError, EncodedGroup, Encoder

QUESTION: list[Message] = [{"role": "user", "content": "What is seven plus five?"}]
ANSWERS = ("The answer is twelve.", "12", "It is\n\n  twelve  times one", "👩‍🔬 שלום \x00 é ﷽")


class Style(NamedTuple):
    """A way of writing conversations."""

    template: str
    eos: str
    specials: tuple[str, ...]
    end: str
    before_content: str
    before_end: str
    trims: bool


_ROLES = "{% for m in messages %}"
_EMPTY_THOUGHT = "<think>\n\n</think>\n\n"
_ROLES_ONLY = CHATML.split("{% if add_generation_prompt %}")[0]
STYLES = {
    "chatml": Style(CHATML, "<|im_end|>", ("<|im_start|>",), "<|im_end|>", "", "", False),
    "llama2": Style(
        "{{ bos_token }}" + _ROLES + "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}",
        *("</s>", ("<|im_start|>",), "</s>", " ", " ", False),
    ),
    "zephyr": Style(
        _ROLES + "{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        *("</s>", (), "</s>", "", "", False),
    ),
    "gemma": Style(
        "{{ bos_token }}" + _ROLES + "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + "
        "m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        *("<eos>", ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>", "", "", True),
    ),
    "no-end": Style(
        _ROLES + "{{ m.role + ':\n' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}",
        *("</s>", (), "</s>", "", "", False),
    ),
    "thinks": Style(
        CHATML.replace("assistant\n", "assistant\n<think>\n"),
        *("<|im_end|>", ("<|im_start|>",), "<|im_end|>", "", "", False),
    ),
    # The last turn is rendered with a thought in front of its answer, though generation begins without one.
    "thought-in-front": Style(
        CHATML.replace(
            "'\n' + message['content']",
            f"'\n' + ('{_EMPTY_THOUGHT}' if loop.last and message.role == 'assistant' else '') + message['content']".replace(
                "\n", "\\n"
            ),
        ),
        *("<|im_end|>", ("<|im_start|>",), "<|im_end|>", _EMPTY_THOUGHT, "", False),
    ),
    # No generation prompt: what the template writes before an answer belongs to the prompt.
    "no-generation-prompt": Style(_ROLES_ONLY, *("<|im_end|>", ("<|im_start|>",), "<|im_end|>", "", "", False)),
    "role-and-space": Style(
        _ROLES + "{{ m.role + ': ' + m.content + eos_token + '\n' }}{% endfor %}",
        *("</s>", (), "</s>", " ", "", False),
    ),
}
OPENINGS = {"no-generation-prompt": "<|im_start|>assistant\n", "role-and-space": "assistant:"}
"""What stands before an answer where the template has no generation prompt."""
REWRITES = ("thinks",)


def tokenizer_of(style: Style) -> PreTrainedTokenizerFast:
    """The tiny BPE tokenizer with a style's special tokens and template."""
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"eos_token": style.eos, "additional_special_tokens": list(style.specials)})
    tokenizer.chat_template = style.template
    return tokenizer


def chat_group(*answers: str, prompt: list[Message] | str | None = None) -> Group:
    return Group(
        "g7", QUESTION if prompt is None else prompt, [Candidate(text, reward=float(i)) for i, text in enumerate(answers)]
    )


def text_group(prompt: str, *completions: str) -> Group:
    return Group("g7", prompt, [Candidate(text, reward=0.0) for text in completions], origin="data.jsonl:7")


def decoded(tokenizer: PreTrainedTokenizerFast, encoded: EncodedGroup) -> list[str]:
    return [tokenizer.decode(completion) for completion in encoded.completions]


@pytest.mark.parametrize("name", STYLES)
class TestChatTemplates:
    def test_one_end_token_at_the_end(self, name: str) -> None:
        style = STYLES[name]
        tokenizer = tokenizer_of(style)
        end = tokenizer.convert_tokens_to_ids(style.end)
        encoded = Encoder(tokenizer).encode(chat_group(*ANSWERS))
        for completion in encoded.completions:
            assert completion[-1] == end
            assert int((completion == end).sum()) == 1
            assert len(completion) >= 2

    def test_the_prompt_is_what_generation_feeds(self, name: str) -> None:
        tokenizer = tokenizer_of(STYLES[name])
        encoded = Encoder(tokenizer).encode(chat_group(*ANSWERS))
        rendered = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)
        fed = rendered + OPENINGS.get(name, "")
        assert ChatTemplate(tokenizer).prompt(QUESTION) == fed
        assert encoded.prompt.tolist() == tokenizer(fed, add_special_tokens=False)["input_ids"]

    def test_text_comes_back(self, name: str) -> None:
        style = STYLES[name]
        tokenizer = tokenizer_of(style)
        answers = [*ANSWERS, "  spaces on both sides  "]
        found = decoded(tokenizer, Encoder(tokenizer).encode(chat_group(*answers)))
        expected = [text.strip() if style.trims else text for text in answers]
        assert found == [style.before_content + text + style.before_end + style.end for text in expected]

    def test_whole_rendering_comes_back(self, name: str) -> None:
        style = STYLES[name]
        tokenizer = tokenizer_of(style)
        encoder = Encoder(tokenizer)
        encoded = encoder.encode(chat_group("12"))
        whole = tokenizer.decode([*encoded.prompt, *encoded.completions[0]])
        rendered = tokenizer.apply_chat_template([*QUESTION, {"role": "assistant", "content": "12"}], tokenize=False)
        if name in REWRITES:
            # The rendering has <think> where generation does not: the completion stands after what generation begins with.
            assert whole == ChatTemplate(tokenizer).prompt(QUESTION) + "12<|im_end|>"
            assert encoder.report.template_mismatches == 1
            assert "renders 1 completions differently" in encoder.report.notices()[0]
        else:
            shown = (
                rendered[: rendered.rindex("12") + 2]
                if name == "no-end"
                else rendered.removesuffix("\n").removesuffix(style.end)
            )
            assert whole == shown + style.end
            assert encoder.report.template_mismatches == 0
            assert encoder.report.notices() == []

    def test_an_end_in_the_text_is_scored_once(self, name: str) -> None:
        style = STYLES[name]
        tokenizer = tokenizer_of(style)
        encoder = Encoder(tokenizer)
        texts = ["12", f"12{style.end}", f"12{style.end}{style.end}", f"12{style.end}\n", f"12{style.eos}"]
        encoded = encoder.encode(chat_group(*texts))
        assert len({completion.tobytes() for completion in encoded.completions}) == 1
        assert encoder.report.repeated_eos == 4
        assert "4 completions ended with an EOS of their own" in encoder.report.notices()[0]

    def test_an_end_inside_drops_the_group(self, name: str) -> None:
        style = STYLES[name]
        encoder = Encoder(tokenizer_of(style))
        with pytest.raises(DroppedGroupError, match=r"'g7'.*end token in its middle") as caught:
            encoder.encode(chat_group("12", f"1{style.end}2"))
        assert caught.value.reason == "EOS inside a completion"
        assert encoder.report.dropped == {"EOS inside a completion": 1}
        assert encoder.report.groups == 0

    @pytest.mark.parametrize("empty", ["", " ", "\n\t ", "END", "END\n"])
    def test_an_empty_completion_drops_the_group(self, name: str, empty: str) -> None:
        style = STYLES[name]
        encoder = Encoder(tokenizer_of(style))
        with pytest.raises(DroppedGroupError, match=r"'g7'.*empty") as caught:
            encoder.encode(chat_group("12", empty.replace("END", style.end)))
        assert caught.value.reason == "empty completion"
        assert encoder.report.dropped == {"empty completion": 1}


def test_an_answer_that_the_template_rewrites_is_counted_by_itself() -> None:
    # Templates of reasoning models cut thoughts out of an answer: that answer alone is encoded as plain text.
    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHATML.replace("message['content']", "message['content'].split('</think>')[-1]")
    encoder = Encoder(tokenizer)
    encoded = encoder.encode(chat_group("12", "<think>7 + 5</think>12"))
    assert decoded(tokenizer, encoded) == ["12<|im_end|>", "<think>7 + 5</think>12<|im_end|>"]
    assert encoder.report.template_mismatches == 1


def test_the_opening_of_a_turn_is_asked_for_each_prompt() -> None:
    # A generation prompt after a user's turn only: a prompt that ends with a tool's still opens a new turn.
    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHATML.replace(
        "if add_generation_prompt", "if add_generation_prompt and messages[-1].role == 'user'"
    )
    said: list[Message] = [*QUESTION, {"role": "tool", "content": "12"}]
    for prompt in (QUESTION, said):
        assert ChatTemplate(tokenizer).prompt(prompt).endswith("<|im_end|>\n<|im_start|>assistant\n")
        assert decoded(tokenizer, Encoder(tokenizer).encode(chat_group("12", prompt=prompt))) == ["12<|im_end|>"]


def test_a_prompt_that_holds_the_probe_is_rendered_whole() -> None:
    tokenizer = tokenizer_of(STYLES["no-generation-prompt"])
    prompt: list[Message] = [{"role": "user", "content": "What is ncalign?"}]
    expected = "<|im_start|>user\nWhat is ncalign?<|im_end|>\n<|im_start|>assistant\n"
    assert ChatTemplate(tokenizer).prompt(prompt) == expected


@pytest.mark.parametrize("prompt", ["What is seven", [{"role": "user", "content": "What is seven?"}]])
def test_a_completion_that_was_cut_has_no_end_token(prompt: str | list[Message]) -> None:
    whole, cut = Candidate(" plus five"), Candidate(" plus five", finished=False)
    encoded = Encoder(build_tokenizer()).encode(Group(id="g", prompt=prompt, candidates=[whole, cut]))
    assert encoded.completions[0].tolist()[:-1] == encoded.completions[1].tolist()
    assert encoded.completions[0][-1] == build_tokenizer().eos_token_id


def test_dropped_groups_are_counted_by_reason() -> None:
    encoder = Encoder(build_tokenizer())
    for answer in ("", " ", "a<|im_end|>b"):
        with pytest.raises(DroppedGroupError):
            encoder.encode(chat_group(answer, "fine"))
    encoder.encode(chat_group("fine"))
    assert encoder.report.dropped == {"empty completion": 2, "EOS inside a completion": 1}
    assert encoder.report.groups == 1


def test_the_report_counts_tokens() -> None:
    encoder = Encoder(build_tokenizer())
    encoded = encoder.encode(chat_group("12", "The answer is twelve."))
    lengths = [len(completion) for completion in encoded.completions]
    assert encoder.report.candidates == 2
    assert encoder.report.scored_tokens == sum(lengths)
    assert encoder.report.tokens == sum(lengths) + 2 * len(encoded.prompt)
    assert encoder.report.longest == encoded.length == len(encoded.prompt) + max(lengths)


def test_rewards_and_references_are_carried_along() -> None:
    group = Group("g", QUESTION, [Candidate("a", reward=0.5, reference_logprob=-3.25), Candidate("b")], origin="x.jsonl:3")
    encoded = Encoder(build_tokenizer()).encode(group)
    assert (encoded.id, encoded.origin) == ("g", "x.jsonl:3")
    assert encoded.rewards == (0.5, None)
    assert encoded.reference_logprobs == (-3.25, None)


class TestMessages:
    def test_an_assistant_message_is_a_completion(self) -> None:
        encoder = Encoder(build_tokenizer())
        message = Group("g", QUESTION, [Candidate([{"role": "assistant", "content": "12"}])])
        assert encoder.encode(message).completions[0].tolist() == encoder.encode(chat_group("12")).completions[0].tolist()

    @pytest.mark.parametrize(
        "turns",
        [[{"role": "user", "content": "12"}], [{"role": "assistant", "content": "12"}, {"role": "user", "content": "Sure?"}]],
    )
    def test_a_completion_ends_with_an_answer(self, turns: list[Message]) -> None:
        group = Group("g7", QUESTION, [Candidate(turns)], origin="data.jsonl:7")
        with pytest.raises(ValueError, match=r"data\.jsonl:7: group 'g7': a completion ends with a turn of 'user'"):
            Encoder(build_tokenizer()).encode(group)

    def test_earlier_turns_of_the_prompt_are_not_scored(self) -> None:
        prompt = [*QUESTION, {"role": "assistant", "content": "twelve"}, {"role": "user", "content": "As digits?"}]
        tokenizer = build_tokenizer()
        encoded = Encoder(tokenizer).encode(chat_group("12", prompt=prompt))
        assert decoded(tokenizer, encoded) == ["12<|im_end|>"]
        assert tokenizer.decode(encoded.prompt).count("<|im_end|>") == 3

    def test_no_chat_template(self) -> None:
        tokenizer = build_tokenizer()
        tokenizer.chat_template = None
        with pytest.raises(ValueError, match=r"'g7': the prompt is a conversation .* no chat template: put a chat_template"):
            Encoder(tokenizer).encode(chat_group("12"))

    def test_a_template_that_refuses_the_prompt(self) -> None:
        tokenizer = build_tokenizer()
        tokenizer.chat_template = "{{ raise_exception('no system turns') }}"
        with pytest.raises(ValueError, match="'g7': the chat template refuses the prompt: no system turns"):
            Encoder(tokenizer).encode(chat_group("12"))

    def test_a_template_that_refuses_the_completion(self) -> None:
        # A prompt that ends with a tool's turn renders, its completion does not.
        tokenizer = build_tokenizer()
        tokenizer.chat_template = (
            "{% for m in messages %}{% if m.role == 'assistant' and messages[loop.index0 - 1].role == 'tool' %}"
            "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }}{% endfor %}"
        )
        prompt: list[Message] = [*QUESTION, {"role": "tool", "content": "12"}]
        with pytest.raises(ValueError, match=r"'g7': .* refuses the prompt with its completion: roles must alternate"):
            Encoder(tokenizer).encode(chat_group("12", prompt=prompt))

    def test_a_template_that_rewrites_every_answer(self) -> None:
        tokenizer = build_tokenizer()
        tokenizer.chat_template = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
        with pytest.raises(ValueError, match="'g7': the chat template does not render an assistant's turn as it is"):
            Encoder(tokenizer).encode(chat_group("12"))

    @pytest.mark.parametrize("string_prompts", ["auto", "user_turn"])
    def test_string_prompts_as_a_users_turn(self, string_prompts: Any) -> None:
        tokenizer = build_tokenizer()
        as_string = Encoder(tokenizer, string_prompts=string_prompts).encode(chat_group("12", prompt=QUESTION[0]["content"]))
        as_chat = Encoder(tokenizer).encode(chat_group("12"))
        assert as_string.prompt.tolist() == as_chat.prompt.tolist()
        assert as_string.completions[0].tolist() == as_chat.completions[0].tolist()
        raw = Encoder(tokenizer, string_prompts="raw").encode(chat_group("12", prompt=QUESTION[0]["content"]))
        assert tokenizer.decode(raw.prompt) == QUESTION[0]["content"]
        tokenizer.chat_template = None
        without = Encoder(tokenizer).encode(chat_group("12", prompt=QUESTION[0]["content"]))
        assert without.prompt.tolist() == raw.prompt.tolist()


class TestPlainText:
    def test_prompt_completion_and_eos(self) -> None:
        tokenizer = build_tokenizer()
        encoded = Encoder(tokenizer, string_prompts="raw").encode(text_group("What is", " seven", " twelve?"))
        assert tokenizer.decode(encoded.prompt) == "What is"
        assert decoded(tokenizer, encoded) == [" seven<|im_end|>", " twelve?<|im_end|>"]

    @pytest.mark.parametrize("empty", ["", "  ", "<|im_end|>"])
    def test_empty_completions_drop_the_group(self, empty: str) -> None:
        encoder = Encoder(build_tokenizer(), string_prompts="raw")
        with pytest.raises(DroppedGroupError, match=r"data\.jsonl:7: group 'g7'"):
            encoder.encode(text_group("What is", " seven", empty))
        assert encoder.report.dropped == {"empty completion": 1}

    def test_a_token_across_the_boundary_is_counted_and_never_scored(self) -> None:
        tokenizer = build_tokenizer()
        joined = tokenizer("answer")["input_ids"]
        alone = tokenizer("ans")["input_ids"]
        # Else this is no test of a merge.
        assert joined[: len(alone)] != alone
        encoder = Encoder(tokenizer, string_prompts="raw")
        encoded = encoder.encode(text_group("ans", "wer", " is"))
        assert encoded.prompt.tolist() == alone
        assert encoded.completions[0].tolist() == [*tokenizer("wer")["input_ids"], tokenizer.eos_token_id]
        assert encoder.report.boundary_merges == 1
        assert "1 completions would merge a token" in encoder.report.notices()[0]

    def test_a_space_at_the_end_of_the_prompt(self) -> None:
        # Byte-level tokenizers join a space with the letter after it; no token here joins it with a digit.
        tokenizer = build_tokenizer()
        prompt = tokenizer("is ")["input_ids"]
        assert tokenizer("is seven")["input_ids"][: len(prompt)] != prompt
        assert tokenizer("is 7")["input_ids"][: len(prompt)] == prompt
        encoder = Encoder(tokenizer, string_prompts="raw")
        encoded = encoder.encode(text_group("is ", "seven", "7"))
        assert tokenizer.decode(encoded.prompt) == "is "
        assert decoded(tokenizer, encoded) == ["seven<|im_end|>", "7<|im_end|>"]
        assert encoder.report.boundary_merges == 1

    @settings(deadline=None, max_examples=150)
    @given(
        prompt=st.text(st.sampled_from("answer 12.\n é👩"), min_size=1, max_size=12),
        completions=st.lists(st.text(st.sampled_from("swer 0x\n é\x00👩"), min_size=1, max_size=12), min_size=1, max_size=4),
    )
    def test_any_split_of_any_text(self, prompt: str, completions: list[str]) -> None:
        tokenizer = _SHARED
        encoder = Encoder(tokenizer, string_prompts="raw")
        group = text_group(prompt, *completions)
        if not all(text.strip() for text in completions):
            with pytest.raises(DroppedGroupError):
                encoder.encode(group)
            return
        encoded = encoder.encode(group)
        # The prompt's tokens are those that generation feeds, whatever follows, and each side decodes to its own text.
        assert encoded.prompt.tolist() == tokenizer(prompt)["input_ids"]
        assert decoded(tokenizer, encoded) == [text + "<|im_end|>" for text in completions]
        merged = 0
        for text, completion in zip(completions, encoded.completions, strict=True):
            whole = tokenizer(prompt + text)["input_ids"]
            merged += whole != [*encoded.prompt.tolist(), *completion[:-1].tolist()]
        assert encoder.report.boundary_merges == merged

    def test_a_boundary_that_can_not_be_kept_drops_the_group(self) -> None:
        # This tokenizer writes a space before any text: a completion that continues a word can't be encoded alone.
        vocabulary = {"<unk>": 0, "</s>": 1, "▁": 2, "a": 3, "b": 4, "ab": 5}
        core = Tokenizer(models.BPE(vocabulary, [("a", "b")], unk_token="<unk>"))
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        core.decoder = decoders.Metaspace(prepend_scheme="always")
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")
        encoder = Encoder(tokenizer, string_prompts="raw")
        with pytest.raises(DroppedGroupError, match=r"merges prompt and completion into one token.*'b'.*word boundary"):
            encoder.encode(text_group("a", "b"))
        assert encoder.report.dropped == {"unsplittable boundary": 1}
        # One that does not merge goes through, without the space.
        assert encoder.encode(text_group("a", "a")).completions[0].tolist() == [3, 1]


_SHARED = build_tokenizer()


class TestBeginningOfText:
    @staticmethod
    def adding_bos() -> PreTrainedTokenizerFast:
        tokenizer = build_tokenizer()
        core = tokenizer.backend_tokenizer
        bos = tokenizer.bos_token_id
        core.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", bos)])
        made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<|bos|>", eos_token="<|im_end|>", pad_token="<|pad|>")
        assert made("a")["input_ids"][0] == bos
        return made

    @pytest.mark.parametrize("prompt", ["What is", "<|bos|>What is"])
    def test_plain_text_has_it_once_where_the_tokenizer_adds_it(self, prompt: str) -> None:
        tokenizer = self.adding_bos()
        encoded = Encoder(tokenizer, string_prompts="raw").encode(text_group(prompt, " seven", " five"))
        assert encoded.prompt.tolist() == tokenizer("What is")["input_ids"]
        for completion in encoded.completions:
            assert tokenizer.bos_token_id not in completion

    def test_plain_text_has_none_where_the_tokenizer_adds_none(self) -> None:
        tokenizer = build_tokenizer()
        assert (
            tokenizer.bos_token_id
            not in Encoder(tokenizer, string_prompts="raw").encode(text_group("What is", " seven")).prompt
        )

    @pytest.mark.parametrize(("in_template", "count"), [("{{ bos_token }}", 1), ("", 0)])
    def test_in_a_conversation_the_template_decides(self, in_template: str, count: int) -> None:
        tokenizer = self.adding_bos()
        tokenizer.chat_template = in_template + CHATML
        encoded = Encoder(tokenizer, string_prompts="raw").encode(chat_group("12", "7"))
        assert int((encoded.prompt == tokenizer.bos_token_id).sum()) == count
        assert all(tokenizer.bos_token_id not in completion for completion in encoded.completions)


class TestTruncation:
    @settings(deadline=None, max_examples=200)
    @given(
        prompt=st.lists(st.sampled_from(SENTENCES), min_size=1, max_size=4).map(" ".join),
        completions=st.lists(
            st.text(st.sampled_from("seven five 12."), min_size=1, max_size=60), min_size=1, max_size=4
        ).filter(lambda texts: all(text.strip() for text in texts)),
        max_length=st.integers(2, 80),
        share=st.floats(0, 1),
    )
    def test_the_rule(self, prompt: str, completions: list[str], max_length: int, share: float) -> None:
        max_prompt = 1 + round(share * (max_length - 2))
        group = text_group(prompt, *completions)
        whole = Encoder(_SHARED, string_prompts="raw", max_length=10_000).encode(group)
        encoder = Encoder(_SHARED, string_prompts="raw", max_length=max_length, max_prompt_length=max_prompt)
        cut = encoder.encode(group)
        eos = _SHARED.eos_token_id
        longest = max(map(len, whole.completions))

        assert cut.length <= max_length
        # The prompt keeps its end, and all the room that the longest completion leaves, but never less than its share.
        kept = len(cut.prompt)
        assert cut.prompt.tolist() == whole.prompt.tolist()[len(whole.prompt) - kept :]
        assert kept == min(len(whole.prompt), max(max_prompt, max_length - longest))
        # Completions keep their beginning, are cut at one length for the group, and only the cut ones lose their EOS.
        room = max_length - kept if len(whole.prompt) + longest > max_length else longest
        for before, after in zip(whole.completions, cut.completions, strict=True):
            assert len(after) >= 1
            assert after.tolist() == before.tolist()[:room]
            assert (after[-1] == eos) == (len(before) <= room)
        assert encoder.report.prompts_truncated == (kept < len(whole.prompt))
        assert encoder.report.completions_truncated == sum(len(before) > room for before in whole.completions)
        assert bool(encoder.report.notices()) >= (cut.length < whole.length)

    @pytest.mark.parametrize(("text", "expected"), [("<|bos|>abcdef", ["<|bos|>", "e", "f"]), ("abcdef", ["d", "e", "f"])])
    def test_bos_stays_in_front(self, text: str, expected: list[str]) -> None:
        # One token a letter, so that the cut can be counted.
        letters = Tokenizer(models.WordLevel({c: i for i, c in enumerate(["<eos>", "<|bos|>", *"abcdef"])}))
        letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, bos_token="<|bos|>", eos_token="<eos>")
        encoder = Encoder(tokenizer, string_prompts="raw", max_length=6, max_prompt_length=3)
        encoded = encoder.encode(text_group(text, "abcdef"))
        assert tokenizer.convert_ids_to_tokens(encoded.prompt.tolist()) == expected
        assert tokenizer.convert_ids_to_tokens(encoded.completions[0].tolist()) == ["a", "b", "c"]
        assert encoder.report.prompts_truncated == 1

    @pytest.mark.parametrize(("max_length", "share"), [(1024, 512), (256, 128), (9, 4), (2, 1)])
    def test_the_prompt_is_sure_of_half_by_default(self, max_length: int, share: int) -> None:
        group = text_group("What is " * 600, " seven" * 600)
        encoded = Encoder(_SHARED, string_prompts="raw", max_length=max_length).encode(group)
        assert (len(encoded.prompt), len(encoded.completions[0])) == (share, max_length - share)

    def test_what_fits_exactly_is_left_alone(self) -> None:
        group = text_group("What is", " seven plus five?", " 12")
        length = Encoder(_SHARED, string_prompts="raw").encode(group).length
        encoder = Encoder(_SHARED, string_prompts="raw", max_length=length, max_prompt_length=1)
        assert encoder.encode(group).completions[0][-1] == _SHARED.eos_token_id
        assert encoder.report.prompts_truncated == encoder.report.completions_truncated == 0

    def test_the_notice_names_the_first_group(self) -> None:
        encoder = Encoder(_SHARED, string_prompts="raw", max_length=4, max_prompt_length=1)
        encoder.encode(text_group("What is seven plus five?", " The answer is twelve.", " 12"))
        (notice,) = encoder.report.notices()
        assert "1 prompts lost their beginning and 1 completions their end (first: data.jsonl:7: group 'g7'" in notice

    @pytest.mark.parametrize(("max_length", "max_prompt_length"), [(256, 512), (8, 8), (8, 0)])
    def test_completions_need_room(self, max_length: int, max_prompt_length: int) -> None:
        with pytest.raises(ValueError, match=f"max_prompt_length is {max_prompt_length} and max_length {max_length}"):
            Encoder(_SHARED, string_prompts="raw", max_length=max_length, max_prompt_length=max_prompt_length)
