from __future__ import annotations

import time

import pytest

from rhythm.tasks.answers import _TAGGED, MAX_ANSWER, find_answer, find_tagged


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("so <answer> 7 </answer>.", "7"),
        (r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"the set \boxed{\{1, 2\}}", r"\{1, 2\}"),
        ("5 + 2 = 7\n#### 7\n", "7"),
        ("work\nAnswer: 7", "7"),
        ("**Final answer:** 7", "** 7"),
        (r"Answer: $\boxed{7}$", "7"),
        (r"#### <answer>7</answer>", "7"),
        (r"\boxed{a \boxed{b}", "b"),
        (r"<answer>\boxed{7}</answer>", r"\boxed{7}"),
        ("the answer is 7", None),
        (r"\boxed{7", None),
        ("<answer>7", None),
        (r"<think>\boxed{1}</think>\boxed{2}", "2"),
        (r"\boxed{1}</think>\boxed{2}", "2"),  # the prompt opened the thought
        (r"I will fill in \boxed{}. <think>\boxed{1}</think>\boxed{2}", "2"),
        (r"<think>\boxed{1}", "1"),  # a thought without an end is no thought
        ("", None),
    ],
)
def test_what_an_answer_block_is(response: str, answer: str | None) -> None:
    assert find_answer(response) == answer


@pytest.mark.parametrize(
    "second",
    [
        "\nProblem: 2 + 2?\n#### 4",
        r" Next: \boxed{4}",
        "\n<|user|>\n<think>two</think><answer>4</answer>",
        "\nAnswer: 4",
    ],
)
def test_a_second_problem_that_the_model_invents_does_not_change_the_first_answer(second: str) -> None:
    response = "<think>3</think>\n<answer>3</answer>" + second
    assert find_answer(response) == "3"
    assert find_answer(response, "last") == "4"


def test_an_answer_before_the_thoughts_about_a_second_problem() -> None:
    """The first problem was answered without thoughts."""
    response = "<answer>3</answer>\nUser: 2 + 2?\n<think>two: <answer>5</answer></think><answer>4</answer>"
    assert (find_answer(response), find_tagged(response)) == ("3", "3")
    assert (find_answer(response, "last"), find_tagged(response, "last")) == ("4", "4")


@pytest.mark.parametrize(
    "response",
    [
        "<answer>1</answer><answer>2</answer>",
        "</answer><answer>1</answer></answer>",
        "<answer>1<answer>2</answer>3</answer><answer>",
        "<answer>1</answer><answer>2<answer>3",
        "<answer></answer>1",
        "</answer>1<answer>",
        "1",
    ],
)
def test_tagged_answers_are_those_of_the_pattern(response: str) -> None:
    contents = [match[1] for match in _TAGGED.finditer(response)] or [None]
    assert (find_tagged(response), find_tagged(response, "last")) == (contents[0], contents[-1])


def test_tagged_answers_alone() -> None:
    response = "Answer: 1\n#### 2 \\boxed{3} <answer> 4 </answer> \\boxed{5}"
    assert (find_tagged(response), find_tagged(response, "last")) == (" 4 ", " 4 ")


def test_an_answer_of_too_many_characters_is_none() -> None:
    assert find_answer(f"<answer>{'1' * MAX_ANSWER}</answer>") == "1" * MAX_ANSWER
    assert find_tagged(f"<answer>{'1' * MAX_ANSWER}</answer>") == "1" * MAX_ANSWER
    for find in (find_answer, find_tagged):
        assert find(f"<answer>{'1' * (MAX_ANSWER + 1)}</answer>") is None


MEGABYTE = [
    r"\boxed{" * 150_000,
    r"\boxed{3" + "}" * 10**6,
    "{" * 10**6,
    "}" * 10**6,
    "<answer>" * 125_000,
    "<answer></answer>" * 60_000,
    "</think>" * 125_000,
    "####" * 250_000,
    "Answer:" * 140_000,
    "\n" * 10**6,
    " " * 10**6,
    "*" * 10**6,
]


@pytest.mark.parametrize("hostile", MEGABYTE, ids=lambda text: repr(text[:8]))
def test_a_megabyte_costs_less_than_a_deadline(hostile: str) -> None:
    start = time.process_time()
    find_answer(hostile)
    find_answer(hostile, "last")
    assert time.process_time() - start < 5  # half a second each, on an idle machine; quadratic would be hours
