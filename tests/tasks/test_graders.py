from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from rhythm.tasks import Reward
from rhythm.tasks.graders import GRADERS, GraderName

RIGHT, WRONG, UNREADABLE = Reward(1.0, True, True), Reward(0.0, False, True), Reward(0.0, False, False)


@pytest.mark.parametrize(
    ("answer", "given", "right"),
    [
        (r"\frac{1}{2}", "0.5", True),
        (r"\frac{1}{2}", r"\dfrac12", True),
        (r"2\sqrt{3}", r"\sqrt{12}", True),
        (r"2\sqrt{3}", r"\sqrt{13}", False),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)", True),
        (r"\text{Evelyn}", "Evelyn", True),
        (r"x^2+y^2", r"y^2+x^2", True),
        (r"x^2+y^2", r"x^2-y^2", False),
        (r"90^\circ", "90", True),
        ("$1,2$", "2, 1", True),
        ("70000", "70,000", True),
        ("34", "34.0", True),
        ("34", "35", False),
        ("34", "", None),
    ],
)
def test_math(answer: str, given: str, right: bool | None) -> None:
    expected = UNREADABLE if right is None else RIGHT if right else WRONG
    assert GRADERS["math"]().grade(answer, f"so \\boxed{{{given}}}") == expected


@pytest.mark.parametrize(
    ("answer", "given", "right"),
    [
        ("1234.5", "1,234.50", True),
        ("18", r"\$18", True),
        ("18", r"18 \text{ dollars}", True),
        ("-3/4", "-0.75", True),
        ("0.75", r"\frac{3}{4}", True),
        ("12", "12%", True),
        ("0.333333333", "1/3", True),
        ("2000", "2e3", True),
        ("18", "17", False),
        ("18", "17 or 18", None),
        ("18", "eighteen", None),
        ("3", "٣", None),
        ("3", "³", None),
        ("3", "1/0", None),
    ],
)
def test_numeric(answer: str, given: str, right: bool | None) -> None:
    expected = UNREADABLE if right is None else RIGHT if right else WRONG
    assert GRADERS["numeric"]().grade(answer, f"so \\boxed{{{given}}}") == expected


def test_exact() -> None:
    grader = GRADERS["exact"]()
    assert grader.grade("a  b\nc", "<answer>\na b c </answer>") == RIGHT
    assert grader.grade("a b c", "<answer>A b c</answer>") == WRONG
    assert grader.grade("a b c", "a b c") == UNREADABLE


@pytest.mark.parametrize(
    ("answer", "response", "expected"),
    [
        ("B", r"\boxed{B}", RIGHT),
        ("B", r"\boxed{(B) Oxygen}", RIGHT),
        ("(B)", r"\boxed{\text{B}}", RIGHT),
        ("B. Oxygen", r"\boxed{B}", RIGHT),
        ("B", r"\boxed{option B}", RIGHT),
        ("B", r"\boxed{A}", WRONG),
        ("B", r"\boxed{b}", WRONG),
        ("B", "I think the answer is (B).", Reward(1.0, True, False)),  # right, though in no box
        ("B", "The answer is A. So B?", UNREADABLE),
        ("B", "B", Reward(1.0, True, False)),
        ("B", "Because of this, B", Reward(1.0, True, False)),  # the first capital of a response without an answer
        ("B", "<think>Perhaps the answer is A.</think>So the answer is B.", Reward(1.0, True, False)),
        ("B", "Perhaps the answer is B.</think>So the answer is A.", UNREADABLE),  # the prompt opened the thought
        ("B", "<think>Hmm, one moment</think>B", Reward(1.0, True, False)),
        ("B", "<think>Boron</think>none", UNREADABLE),
        ("B", "<think>Hmm, so the answer is B", Reward(1.0, True, False)),  # a thought without an end is no thought
        ("B", "none", UNREADABLE),
        ("Sodium chloride", r"\boxed{sodium  chloride.}", RIGHT),
        ("Sodium chloride", r"\boxed{Sodium}", WRONG),
        ("Sodium chloride", "sodium chloride", UNREADABLE),
    ],
)
def test_choice(answer: str, response: str, expected: Reward) -> None:
    assert GRADERS["choice"]().grade(answer, response) == expected


@pytest.mark.parametrize(
    ("response", "first", "last"),
    [
        (r"\boxed{A} \boxed{B}", "A", "B"),
        (r"</think>\boxed{A}</think>\boxed{B}", "A", "B"),
        ("The answer is A. No, the answer is B.", "A", "B"),
        ("</think>The answer is A.</think>The answer is B.", "A", "B"),
        ("</think>(A)</think>(B)", "A", "B"),
        ("<think>Could the answer is C?</think>(B)", "B", "B"),
    ],
)
def test_choice_of_the_first_or_the_last_answer(response: str, first: str, last: str) -> None:
    grader = GRADERS["choice"]()
    assert [letter for letter in "ABC" if grader.grade(letter, response).correct] == [first]
    assert [letter for letter in "ABC" if grader.grade(letter, response, "last").correct] == [last]


@pytest.mark.parametrize(
    ("grader", "answer"),
    [("math", ""), ("math", r"\frac{"), ("numeric", "three"), ("numeric", "1 2"), ("choice", " "), ("exact", "")],
)
def test_a_right_answer_of_a_form_that_the_grader_does_not_know(grader: GraderName, answer: str) -> None:
    with pytest.raises(ValueError, match="must"):
        GRADERS[grader]().check(answer)


HOSTILE = [
    "99**98**97",
    "99^{98^{97}}",
    "9^9^9",
    r"2^{(3^{(4^5)})}",
    "(10^{9})!",
    "99999999!",
    r"\binom{999999}{99999}",
    r"\sum_{i=1}^{999999999} i",
    r"\exp(\exp(\exp(100)))",
    r"\frac{1}{" * 50 + "2" + "}" * 50,
    "9" * 1_900,
    "1e999999999",
    "{" * 900 + "}" * 900,
    "٣",
    "x" * 10**6,
    "{" * 500_000 + "}" * 500_000,
]


@pytest.mark.parametrize("grader", GRADERS)
@pytest.mark.parametrize("given", HOSTILE, ids=lambda given: given[:20])
def test_a_hostile_answer_is_wrong_and_cheap(grader: GraderName, given: str) -> None:
    built = GRADERS[grader]()
    built.grade("3", r"\boxed{x+1}")  # loads sympy
    start = time.process_time()
    assert not built.grade("3", f"\\boxed{{{given}}}").correct
    assert time.process_time() - start < 3


@pytest.mark.parametrize("grader", GRADERS)
def test_an_answer_is_never_run_as_python(grader: GraderName, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    code = f"__import__('pathlib').Path('{trap}').touch()"
    for given in (code, f"\\text{{{code}}}", f"x = {code}", f"[{code}]"):
        assert not GRADERS[grader]().grade("3", f"\\boxed{{{given}}}").correct
        assert not GRADERS[grader]().grade("3", f"<answer>{given}</answer>").correct
    assert not trap.exists()


def test_math_needs_no_signals_so_it_works_outside_the_main_thread() -> None:
    judged: list[Reward] = []
    thread = threading.Thread(target=lambda: judged.append(GRADERS["math"]().grade(r"2\sqrt{3}", r"\boxed{\sqrt{12}}")))
    thread.start()
    thread.join(60)
    assert judged == [RIGHT]
