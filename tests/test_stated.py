"""Where a completion states its answer: real completions with verdicts by hand, and answers made to fool the scorer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ncalign.data.groups import Candidate, Group
from ncalign.rewards.stated import is_equation, stated_number
from ncalign.rewards.verifiable import ReasoningGymReward

# Completions of SmolLM2-135M-Instruct, drawn at random (most from those that contain the right number), with verdicts made by
# reading them: "full" for the right number in one equation that repeats the question's expression and nothing else, "right"
# for the right number stated in other words, "none" for everything else.
VERDICTS = [json.loads(line) for line in Path(__file__).with_name("verdicts.jsonl").read_text(encoding="utf-8").splitlines()]


def test_verdicts_agree_with_those_made_by_hand() -> None:
    assert len(VERDICTS) >= 60
    wrong = []
    for row in VERDICTS:
        question, text = row["question"], row["completion"]
        right = row["finished"] and stated_number(text, question) == row["answer"]
        found = ("full" if is_equation(text, question) else "right") if right else "none"
        if found != row["verdict"]:
            wrong.append((found, row))
    assert len(wrong) <= 0.02 * len(VERDICTS), wrong


QUESTION = "Calculate 6 * 3."


@pytest.mark.parametrize(
    "text",
    [
        "18", "18.", " 18\n", "**18**", "6 * 3 = 18", "6 x 3 = 18.", "3 * 6 = 18", "The product of 6 and 3 is 18.",
        "18 is the answer.",
        "The answer is: 18", "6 multiplied by 3 equals 18!", "So 6 * 3 comes out as 18.", "6 * 3 = 6 + 12 = 18", "9 * 2 = 18",
        "To solve 6 * 3, I multiply 6 by 3.\n\nThe result is 18", "\\boxed{18}", "$6 \\times 3 = 18$", "6 * 3 is 18, as asked.",
        "6 + 6 = 12 and 12 + 6 = 18, so the answer is 18.", "x = 18.0", "Let's multiply: 6 * 3 = 18",
        "It looks impossible, but the answer is 18.",
    ],
)  # fmt: skip
def test_a_stated_answer_counts(text: str) -> None:
    assert stated_number(text, QUESTION) == "18"


@pytest.mark.parametrize(
    ("question", "text"),
    [
        # The question again, in any order; its numbers hold the answer.
        ("Calculate 0 * 7.", "Solve the equation 7 * 0 =."),
        ("Calculate 0 * 7.", "0 * 7"),
        ("Calculate 3 * 1.", "What is 1 times 3."),
        ("Find the LCM of 3, 12", "The numbers are 3 and 12."),
        ("Find the LCM of 3, 12", "Find the LCM of 3, 12"),
        ("Find the LCM of 3, 12", "LCM(3, 12)"),
        # Lists of numbers.
        (QUESTION, "1 2 3 6 9 18"),
        (QUESTION, "1, 2, 3, 6, 9, 18."),
        (QUESTION, "16\n17\n18"),
        (QUESTION, "The answer is 17. The answer is 18."),
        (QUESTION, "The answer is 17 or 18."),
        (QUESTION, "6 * 3 = 17, 6 * 3 = 18"),
        # Cut in the middle of a sentence.
        (QUESTION, "The answer is 18, because when you multiply"),
        (QUESTION, "6 x 3 is 18.\n\nDon't forget to remember the 18 as a decimal,"),
        (QUESTION, "6 * 3 = 18\n\nTo check, 6"),
        # Denied, asked, assumed, or no result of anything.
        (QUESTION, "It is not 18."),
        (QUESTION, "Is it 18?"),
        (QUESTION, "Let's say the answer is 18."),
        (QUESTION, "18 = 18"),
        (QUESTION, "7 = 18"),
        (QUESTION, "9 * 2 = 17"),
        ("Calculate 2 - 3.", "2 + 3 = -1"),
        (QUESTION, "6 * 3 = 17. The answer is 18."),
        ("Calculate 1 * 1.", "1 is a multiplicative identity that has an inverse: 1 * (-1) = 1."),
        ("Calculate 1 * 1.", "1 is 1."),
        ("Calculate 3 * 1.", "10 is 2 times the number 3."),
        ("Find the LCM of 13, 1", "The LCM of 13 and 18 is 13."),
        (QUESTION, "I'm ready to help!"),
        (QUESTION, ""),
    ],
)
def test_nothing_is_earned_by_what_states_no_answer(question: str, text: str) -> None:
    assert stated_number(text, question) is None


@pytest.mark.parametrize("text", ["6 * 3 = 18", "6*3=18.", " 6 x 3 = 18\n", "(6 * 3) = 18", "6 * 3 = 17"])
def test_an_equation_is_the_questions_expression_and_a_number(text: str) -> None:
    assert is_equation(text, QUESTION)
    assert is_equation("LCM(6, 4) = 12", "Find the LCM of these numbers: 6, 4")


@pytest.mark.parametrize(
    "text",
    ["18", "18 = 18", "9 * 2 = 18", "3 * 6 = 18", "6 * 3 is 18",
     "The answer: 6 * 3 = 18", "6 * 3 = 18 = 18", "6 * 3 = 18\n6 * 3 = 18", "6 * 3 ="],
)  # fmt: skip
def test_anything_else_is_not_the_equation(text: str) -> None:
    assert not is_equation(text, QUESTION)


def test_the_reward_has_three_levels() -> None:
    entry = {"question": QUESTION, "answer": "18", "metadata": {"source_dataset": "basic_arithmetic", "expression": "6 * 3"}}
    texts = ["6 * 3 = 18", "The answer is 18.", "6 * 3 = 17", "1, 2, 18."]
    candidates = [
        *(Candidate([{"role": "assistant", "content": text}]) for text in texts),
        Candidate("6 * 3 = 18", finished=False),
    ]
    metadata = {"task": "basic_arithmetic", "entry": entry, "extract": "stated", "form": "equation"}
    group = Group(id="a", prompt=[{"role": "user", "content": QUESTION}], candidates=candidates, metadata=metadata)
    assert ReasoningGymReward().score(group) == [1.0, 0.5, 0.0, 0.0, 0.0]
    del metadata["form"]
    assert ReasoningGymReward().score(group) == [1.0, 1.0, 0.0, 0.0, 0.0]
