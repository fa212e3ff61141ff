"""What a judge is shown: two answers to compare, or one turn of an answer to rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ncalign.data.rendering import transcript
from ncalign.judging.records import Answer, Answers, Question
from ncalign.rewards.verdicts import fill, load_template, mark_of, shown_tools

# MT-Bench's categories: FastChat shows the judge a reference answer in the first, and none in the second.
_BY_REFERENCE = frozenset({"math", "reasoning", "coding"})
_WITHOUT_REFERENCE = frozenset({"writing", "roleplay", "extraction", "stem", "humanities"})

_PAIR, _SINGLE = ("question", "answer_a", "answer_b"), ("conversation", "answer")
_FILES = {
    "logprobs": ("pairwise_letter.txt", _PAIR),
    "labels": ("pairwise_labels.txt", _PAIR),
    "rating": ("rating.txt", _SINGLE),
    "reference": ("rating_reference.txt", _SINGLE),
}


def judge_templates(mode: str, file: Path | None) -> dict[str, str]:
    """The prompts that a way of judging needs.

    Args:
        mode: field ``mode`` of `EvalJudgeConfig`.
        file: the user's own prompt, in place of ours.

    Raises:
        ValueError: the file can't be read or lacks a place, or the mode is ``auto``, which needs two prompts.
    """
    if file is not None and mode == "auto":
        raise ValueError(f"judge.template {file} needs a judge.mode: logprobs, labels or rating")
    needed = {"auto": ("logprobs", "labels"), "rating": ("rating", "reference")}.get(mode, (mode,))
    return {name: load_template("ncalign.judging", *_FILES[name], file) for name in needed}


def pair_prompts(template: str, questions: Sequence[Question], ours: Answers, theirs: Answers) -> list[str]:
    """Each question twice: our answer first, and theirs first."""
    prompts = []
    for question in questions:
        asked, known = shown_tools(question.tools) + _joined(question.turns), _joined(_references(question))
        for first, second in ((ours, theirs), (theirs, ours)):
            answer_a, answer_b = (_joined(answers[question.id].turns) for answers in (first, second))
            texts = {"question": asked, "reference": known, "answer_a": answer_a, "answer_b": answer_b}
            mark = mark_of(texts)
            # A prompt of the user's own that has no place for the mark is filled as it always was.
            tag = f"reference {mark}" if "{mark}" in template else "reference"
            reference = f"\n<{tag}>\n{known}\n</{tag}>\n" if known else ""
            prompts.append(fill(template, {"mark": mark, **texts, "reference": reference}))
    return prompts


def rating_prompts(
    templates: Mapping[str, str], questions: Sequence[Question], answers: Answers
) -> list[tuple[Question, int, str]]:
    """For each turn that was answered: the question, the turn's index, and the prompt."""
    return [
        (question, turn, _rating_prompt(templates, question, answers[question.id], turn))
        for question in questions
        if question.id in answers
        for turn in range(min(len(question.turns), len(answers[question.id].turns)))
    ]


def _rating_prompt(templates: Mapping[str, str], question: Question, answer: Answer, turn: int) -> str:
    known = _references(question)
    # A later turn builds on the first, and so does its reference.
    reference = _joined(known[: turn + 1]) if turn < len(known) else ""
    conversation = shown_tools(question.tools) + transcript(question.conversation(answer.turns[:turn]))
    texts = {"conversation": conversation, "answer": answer.turns[turn], "reference": reference}
    return fill(templates["reference" if reference else "rating"], {"mark": mark_of(texts), **texts})


def num_without_reference(questions: Sequence[Question]) -> int:
    """Questions of categories that are judged by a reference, which have none."""
    return sum(question.category in _BY_REFERENCE and not _references(question) for question in questions)


def _references(question: Question) -> Sequence[str]:
    """The right answers that a judge is shown: in some of MT-Bench's categories none, whatever its file holds."""
    known = question.references if any(text.strip() for text in question.references) else ()
    return () if question.category in _WITHOUT_REFERENCE else known


def _joined(turns: Sequence[str]) -> str:
    """A text, or several turns with their numbers."""
    if len(turns) == 1:
        return turns[0]
    return "\n\n".join(f"(turn {number}) {text}" for number, text in enumerate(turns, start=1))
