from __future__ import annotations

import time

import pytest

from rhythm.tasks import Reward
from rhythm.tasks.countdown import Countdown, CountdownConfig, CountdownInstance, Step, as_expression
from rhythm.tasks.expression import evaluate
from rhythm.tasks.prompts import ChatPrompt

RIGHT, WRONG, UNREADABLE = Reward(1.0, True, True), Reward(0.0, False, True), Reward(0.0, False, False)

INSTANCE = CountdownInstance((25, 3, 4), 88, (Step(25, "-", 3, 22), Step(22, "*", 4, 88)))
TWINS = CountdownInstance((4, 4, 8), 2, ())


def countdown(**keys: object) -> Countdown:
    one = {"train_size": 1, "test_size": 1, "numbers": 3, "max_number": 20}
    return Countdown(CountdownConfig.model_validate(one | keys))


def answers(**keys: object) -> Countdown:
    return countdown(format="answer", **keys)


def steps(**keys: object) -> Countdown:
    return countdown(format="steps", **keys)


# --- text ---


def test_text_of_both_formats() -> None:
    assert steps().prompt(INSTANCE) == "25,3,4>88:"
    assert steps().solution(INSTANCE) == "25-3=22,22*4=88"
    prompt = answers().prompt(INSTANCE)
    assert prompt.startswith("Make 88 from the numbers 25, 3, 4:")
    assert prompt.endswith("\n<think>")
    assert answers().solution(INSTANCE) == "25-3=22,22*4=88</think>\n<answer>(25-3)*4</answer>"


def test_wordings_and_chat() -> None:
    own, tinyzero, chat = (
        answers(**options).prompt(INSTANCE)
        for options in ({}, {"wording": "tinyzero"}, {"wording": "tinyzero", "chat": True, "system": "Be brief."})
    )
    question = (
        "Using the numbers [25, 3, 4], create an equation that equals 88. You can use basic arithmetic operations "
        "(+, -, *, /) and each number can only be used once. Show your work in <think> </think> tags. And return the "
        "final answer in <answer> </answer> tags, for example <answer> (1 + 2) / 3 </answer>."
    )
    assert "create an equation" not in own
    assert tinyzero.startswith("A conversation between User and Assistant.")
    assert tinyzero.endswith(f"\nUser: {question}\nAssistant: Let me solve this step by step.\n<think>")
    assert isinstance(chat, ChatPrompt)  # the model's template says who speaks
    assert chat.messages == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]
    assert answers(chat=True).prompt(INSTANCE) == own.removesuffix("\n<think>")
    assert answers(template="Hi! {prompt}").prompt(INSTANCE) == f"Hi! {own}"


def test_equal_numbers_are_told_apart_in_the_expression() -> None:
    solution = (Step(5, "+", 5, 10), Step(10, "-", 5, 5), Step(5, "*", 2, 10))
    instance = CountdownInstance((5, 2, 5, 5), 10, solution)
    assert evaluate(as_expression(instance), instance.numbers) == 10


# --- rewards ---


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("<answer>(25-3)*4</answer>", RIGHT),
        ("Let me see. <answer> 4 * (25 - 3) </answer> done", RIGHT),
        ("Answer: 25 or \\boxed{25}, <answer>(25-3)*4</answer>", RIGHT),  # no other form of block counts
        ("<answer>(25-3)*4</answer> and <answer>open", RIGHT),
        ("<answer>1 + <answer>(25-3)*4</answer>", RIGHT),
        ("<answer>25*4-3*4</answer>", WRONG),  # 88, with 4 twice
        ("<answer>88</answer>", WRONG),
        ("<answer>(25-3)*4+0</answer>", WRONG),
        ("<answer>(25-3)*4=88</answer>", UNREADABLE),
        ("<answer>25/(3-3)*4</answer>", WRONG),
        ("<answer>4/(25-25)</answer>", WRONG),
        ("<answer></answer>", UNREADABLE),
        ("</answer>(25-3)*4<answer>", UNREADABLE),
        ("(25-3)*4</answer>", UNREADABLE),
        ("(25-3)*4", UNREADABLE),
        ("<ANSWER>(25-3)*4</ANSWER>", UNREADABLE),
        ("", UNREADABLE),
    ],
)
def test_answers(response: str, reward: Reward) -> None:
    assert answers().reward(INSTANCE, response) == reward


@pytest.mark.parametrize(
    ("response", "first", "last"),
    [
        ("<answer>25</answer> no: <answer>(25-3)*4</answer>", WRONG, RIGHT),
        ("<answer>(25-3)*4</answer> or <answer>25+3+4</answer>", RIGHT, WRONG),
        ("so</think>\n<answer>(25-3)*4</answer>\nUser: 9 from 4, 5?\n<answer>4+5</answer>", RIGHT, WRONG),
        ("so</think><answer>(25-3)*4</answer>\n<think>4, 5</think><answer>4+5</answer>", RIGHT, WRONG),
        ("<answer>(25-3)*4</answer>\n<think>4, 5</think><answer>4+5</answer>", RIGHT, WRONG),
        ("write <answer>(1+2)/3</answer>? no</think><answer>(25-3)*4</answer>", RIGHT, RIGHT),
        ("<think>write <answer>(1+2)/3</answer>?</think><answer>(25-3)*4</answer>", RIGHT, RIGHT),
        ("maybe <answer>(25-3)*4</answer></think>none", UNREADABLE, UNREADABLE),
    ],
)
def test_which_answer_block_counts(response: str, first: Reward, last: Reward) -> None:
    assert answers().reward(INSTANCE, response) == answers(answer_block="first").reward(INSTANCE, response) == first
    assert answers(answer_block="last").reward(INSTANCE, response) == last


@pytest.mark.parametrize(
    "response",
    [
        "25-3=22</think>\n<answer>(25-3)*4</answer>",
        "<answer>(25-3)*4</answer>",
        "<answer>25+3+4</answer>\nfor sure",
        "25-3=22,22*4=88",
        "25-3=22,22*4=89",
        "25-3",
        "",
    ],
)
@pytest.mark.parametrize("format", ["answer", "steps"])
def test_one_answer_block_or_none_scores_the_same_whichever_counts(format: str, response: str) -> None:
    """So do all responses in format steps, which have no blocks: those of the recorded runs of the tiny model."""
    first, last = (countdown(format=format, format_score=0.1, answer_block=which) for which in ("first", "last"))
    assert first.reward(INSTANCE, response) == last.reward(INSTANCE, response)


def test_exact_fractions_on_the_way_count() -> None:
    instance = CountdownInstance((1, 3, 6), 2, ())
    assert answers().reward(instance, "<answer>1/3*6</answer>") == RIGHT
    assert answers().reward(CountdownInstance((1, 3, 3), 1, ()), "<answer>1/3*3</answer>") == RIGHT
    almost = CountdownInstance((10**8, 1, 10**8), 1, ())
    assert answers().reward(almost, f"<answer>({10**8}+1)/{10**8}</answer>") == WRONG


def test_a_division_by_zero_scores_nothing() -> None:
    instance = CountdownInstance((3, 3, 4), 5, ())
    assert not answers().reward(instance, "<answer>4/(3-3)</answer>").correct
    assert not steps().reward(instance, "3-3=0,4/0=5").correct
    assert not steps().reward(CountdownInstance((3, 3, 4), 0, ()), "3-3=0,4/0=0").correct


@pytest.mark.parametrize(
    ("instance", "response", "reward"),
    [
        (INSTANCE, "25-3=22,22*4=88", RIGHT),
        (INSTANCE, "25-3=22,4*22=88", RIGHT),
        (INSTANCE, "25-3=21,21*4=88", WRONG),  # 25−3 is 22
        (INSTANCE, "25-3=22,22*4=89", WRONG),
        (INSTANCE, "25-3=22,22+4=26", WRONG),
        (INSTANCE, "25-3=22,25*4=100", WRONG),  # 25 is used
        (INSTANCE, "88-3=85,85+3=88", WRONG),  # 88 was not given
        (INSTANCE, "22*4=88,25-3=22", WRONG),  # before it is made
        (INSTANCE, "3-25=22,22*4=88", WRONG),
        (INSTANCE, "22*4=88", UNREADABLE),
        (INSTANCE, "25-3=22,22*4=88,88*1=88", UNREADABLE),
        (INSTANCE, "25-3=22,22*4=88,", UNREADABLE),
        (INSTANCE, "25-3=22;22*4=88", UNREADABLE),
        (INSTANCE, "25-3=22, 22*4=88", UNREADABLE),
        (INSTANCE, "25-3=22,22*4=88\n", UNREADABLE),
        (INSTANCE, "25-3=022,22*4=88", UNREADABLE),
        (INSTANCE, "25-3=22,22×4=88", UNREADABLE),
        (INSTANCE, "２５-3=22,22*4=88", UNREADABLE),
        (INSTANCE, "", UNREADABLE),
        (TWINS, "8/4=2,4-2=2", RIGHT),
        (TWINS, "4+4=8,8/8=1", WRONG),
        (TWINS, "8/4=2,8/4=2", WRONG),  # 8 was there once
        (TWINS, "4-4=0,8*0=0", WRONG),
        (TWINS, "4/8=0,4/2=2", WRONG),  # no whole result
    ],
)
def test_steps(instance: CountdownInstance, response: str, reward: Reward) -> None:
    assert steps().reward(instance, response) == reward
    assert steps(answer_block="last").reward(instance, response) == reward


def test_format_score_goes_to_what_can_be_read_and_is_wrong() -> None:
    for task, wrong, right in (
        (answers(format_score=0.1), "<answer>25+3+4</answer>", "<answer>(25-3)*4</answer>"),
        (steps(format_score=0.1), "25+3=28,28+4=32", "25-3=22,22*4=88"),
    ):
        assert task.reward(INSTANCE, wrong) == Reward(0.1, False, True)
        assert task.reward(INSTANCE, right) == RIGHT
        assert task.reward(INSTANCE, "nothing") == UNREADABLE


MEGABYTE = 1 << 20
NUMBERS = "1.5 15 1_5 51 0x1+5 (1,5) 1,5 1e5 5-(-1) +1+5 5+1+0 5/(1-1) nan inf NaN float('inf') 6"
SYNTAX = "1//5 1%5 __import__('os').system('true') exit() 1+5=6 1+5;1 1+5# [1+5][0] \x001+5"
NOT_ASCII = "１+５ １５ ١+٥ ¹+⁵ 1＋5 1+5\u200b"
BLANKS = ["1 5", "1\u00a0+5", "1+5 if 1 else 0"]
LONG = [
    "9**9**9",
    "9**9**9**9**9**9",
    "(" * MEGABYTE,
    "(" * MEGABYTE + "1" + ")" * MEGABYTE,
    "(" * 10_000 + "1+5" + ")" * 10_000,
    "9" * MEGABYTE,
    "1+" * MEGABYTE + "5",
    "-" * MEGABYTE + "6",
]
HOSTILE = [*NUMBERS.split(), *SYNTAX.split(), *NOT_ASCII.split(), *BLANKS, *LONG]


def hostile_responses(text: str) -> list[tuple[Countdown, str]]:
    """Tasks, and a response for each whose answer is `text`."""
    return [
        (answers(format_score=0.1), f"<answer>{text}</answer>"),
        (steps(format_score=0.1), text.replace("=6", "")),
    ]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: repr(text[:24]))
def test_hostile_answers_score_nothing(text: str) -> None:
    """6 from 1 and 5."""
    instance = CountdownInstance((1, 5), 6, ())
    assert answers().reward(instance, "<answer>1+5</answer>") == RIGHT
    assert steps().reward(instance, "1+5=6") == RIGHT
    for task, response in hostile_responses(text):
        reward = task.reward(instance, response)
        assert not reward.correct
        assert reward.score in ((0.0, 0.1) if reward.format_ok else (0.0,))


@pytest.mark.timing
@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: repr(text[:24]))
def test_hostile_answers_cost_nothing(text: str) -> None:
    instance = CountdownInstance((1, 5), 6, ())
    for task, response in hostile_responses(text):
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            task.reward(instance, response)
            seconds.append(time.perf_counter() - start)
        # A longer response is searched for the end of its thoughts, at a millisecond per megabyte.
        assert min(seconds) < (1e-3 if len(response) < MEGABYTE else 2e-2)


LONG = {
    "opened": "<answer>" * (MEGABYTE // 2),
    "closed": "</answer>" * (MEGABYTE // 2),
    "answers": "<answer>(25-3)*</answer>" * (MEGABYTE // 8),
    "angles": "<" * (4 * MEGABYTE),
    "almost": "</answer" * (MEGABYTE // 2) + ">",
    "long": "<answer>" + "x" * (4 * MEGABYTE) + "</answer>",
}


@pytest.mark.parametrize("response", LONG.values(), ids=LONG)
def test_a_response_of_megabytes_is_no_answer(response: str) -> None:
    assert len(response) >= 3 * MEGABYTE
    for which in ("first", "last"):
        assert answers(answer_block=which).reward(INSTANCE, response) == UNREADABLE


@pytest.mark.timing
@pytest.mark.parametrize("response", LONG.values(), ids=LONG)
@pytest.mark.parametrize("which", ["first", "last"])
def test_a_response_of_megabytes_is_read_in_one_pass(response: str, which: str) -> None:
    task = answers(answer_block=which)
    start = time.perf_counter()
    task.reward(INSTANCE, response)
    assert time.perf_counter() - start < 0.1
