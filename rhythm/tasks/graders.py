"""Graders: is the answer in a response the right one? Each is a class over the right answer, built once per instance.

The right answer is trusted, the response is hostile: it is never evaluated as Python, and what would make computer
algebra run for ever (towers of powers, factorials of large numbers) is compared as text. What still takes too long is
for the deadline of isolated rewards to end.
"""

from __future__ import annotations

import logging
import re
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal, Protocol

from rhythm.system.extras import needs
from rhythm.tasks.answers import Which, behind_thoughts, find_answer
from rhythm.tasks.base import Reward

GraderName = Literal["math", "choice", "exact", "numeric"]

MAX_DIGITS = 100
"""Of a number that is read as one."""
MAX_LATEX = 500
"""Characters of an answer that computer algebra gets to see."""
_NUMBER = r"[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)?(?:\.[0-9]+|(?<=[0-9])\.?)(?:[eE][-+]?[0-9]{1,3})?"
_NUMERIC = re.compile(rf"(?<![\w.])({_NUMBER})(?:\s*/\s*([0-9]{{1,{MAX_DIGITS}}}))?(?![0-9])\s*(\\?%)?")
_ONE_CHOICE = re.compile(r"\(?([A-Z])(?:[).:](?:\s.*)?)?", re.DOTALL)
_ENDLESS = re.compile(
    r"\\(?:d?binom|sum|prod|int)|\*\*"  # sums and products are carried out
    r"|\^\s*\{[^{}]*\^|\^\s*\{?\s*\([^()]*\^|\^\s*\w?\s*\^"  # a power in an exponent
    r"|\^\s*[{(]*\s*[-+]?\s*[0-9.]{4,}"  # an exponent of four digits
    r"|[)}]\s*!|[0-9]{4,}\s*!|!\s*!"  # factorials of more than three digits
)


class Grader(Protocol):
    """A grader, of right answers and of responses."""

    def check(self, answer: str) -> None:
        """Raise ValueError, saying what is allowed, for a right answer whose form the grader doesn't know."""

    def grade(self, answer: str, response: str, which: Which = "first") -> Reward:
        """The reward of `response`, where `answer` is right: 1 or 0."""


class MathGrader:
    """Mathematical equality by math-verify, of the response's answer block (LaTeX) and the right answer (LaTeX)."""

    def __init__(self) -> None:
        with needs("grader math"):
            import math_verify  # noqa: F401
        logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time-outs are off

    def check(self, answer: str) -> None:
        """See Grader."""
        if _number(answer) is None and not any(not isinstance(part, str) for part in _parse(answer)):
            raise ValueError("must be LaTeX that math-verify reads, or a number")

    def grade(self, answer: str, response: str, which: Which = "first") -> Reward:
        """See Grader."""
        given = find_answer(response, which)
        if not given:
            return _reward(readable=False, correct=False)
        if _squeezed(given) == _squeezed(answer):
            return _reward(readable=True, correct=True)
        numbers = _number(given), _number(answer)
        if None not in numbers:
            return _reward(readable=True, correct=numbers[0] == numbers[1])
        if len(given) > MAX_LATEX or _ENDLESS.search(given):
            return _reward(readable=True, correct=False)
        from math_verify import verify

        parsed = _parse(given)
        # math-verify's time-outs are signals, which only a main thread gets: the deadline is the caller's.
        return _reward(
            readable=bool(parsed),
            correct=bool(parsed) and verify(list(_parse(answer)), list(parsed), timeout_seconds=None),
        )


class NumericGrader:
    """Equality of numbers: `1,234.5`, `-3/4`, `2e3`, `12%`, with a unit or a sign of currency around it or not."""

    def check(self, answer: str) -> None:
        """See Grader."""
        if _number(answer) is None:
            raise ValueError("must be one number, such as 1,234.5 or -3/4")

    def grade(self, answer: str, response: str, which: Which = "first") -> Reward:
        """See Grader."""
        given = find_answer(response, which)
        value = None if given is None else _number(given, alone=False)
        right = _number(answer)
        if value is None or right is None:
            return _reward(readable=False, correct=False)
        return _reward(readable=True, correct=abs(value - right) <= abs(right) / 10**6)


class ExactGrader:
    """The same text, runs of white space counting as one blank."""

    def check(self, answer: str) -> None:
        """See Grader."""
        if not answer.strip():
            raise ValueError("must not be empty")

    def grade(self, answer: str, response: str, which: Which = "first") -> Reward:
        """See Grader."""
        given = find_answer(response, which)
        return _reward(readable=given is not None, correct=given is not None and given.split() == answer.split())


class ChoiceGrader:
    """The letter of a choice, or a text.

    A letter (`B`, `(B)`, `B. Oxygen`) is right where the first capital of the answer is that letter; the answer is the
    last or first answer block, without one what follows `answer is` behind the thoughts, and without that all that
    stands behind them. With `last`, ROLL's rule for CrossThink-QA does the same (its crossthinkqa_rule_reward_worker),
    but knows `\\boxed{…}` alone as a block. Any other right answer is compared with the answer block as text, but for
    case, white space and a full stop.
    """

    def check(self, answer: str) -> None:
        """See Grader."""
        if not answer.strip():
            raise ValueError("must be the letter of a choice, or the text of the answer")

    def grade(self, answer: str, response: str, which: Which = "first") -> Reward:
        """See Grader."""
        block = find_answer(response, which)
        letter = _ONE_CHOICE.fullmatch(answer.strip())
        if letter is None:
            correct = block is not None and _plain(block) == _plain(answer)
            return _reward(readable=block is not None, correct=correct)
        text = _untexted(block) if block is not None else _after_answer_is(behind_thoughts(response, which), which)
        capital = next((character for character in text if character.isupper()), None)
        return _reward(readable=block is not None, correct=capital == letter[1])


GRADERS: dict[GraderName, type[Grader]] = {
    "math": MathGrader,
    "choice": ChoiceGrader,
    "exact": ExactGrader,
    "numeric": NumericGrader,
}


def _reward(*, readable: bool, correct: bool) -> Reward:
    return Reward(float(correct), correct=correct, format_ok=readable)


def _number(text: str, *, alone: bool = True) -> Fraction | None:
    """The one number that `text` consists of, or, not `alone`, the one number in it, whatever stands around it."""
    text = _untexted(text).replace(r"\$", "").replace("$", "").replace(r"\,", "").replace(r"\!", "").strip()
    text = re.sub(r"\\[dt]?frac\{([0-9]{1,50})\}\{([0-9]{1,50})\}", r"\1/\2", text)
    if len(text) > 4 * MAX_DIGITS:
        return None
    numbers = [match for match in _NUMERIC.finditer(text) if any(map(str.isdigit, match[1]))]
    if len(numbers) != 1 or (alone and numbers[0][0].strip() != text):
        return None
    number, below, percent = numbers[0].groups()
    if sum(map(str.isdigit, number)) > MAX_DIGITS or (below is not None and int(below) == 0):
        return None
    value = Fraction(number.replace(",", "").rstrip(".")) / int(below or 1)
    return value / 100 if percent and alone else value


@lru_cache(maxsize=4096)
def _parse(latex: str) -> tuple[Any, ...]:
    """What math-verify reads: sympy's expressions and the text. Never its plain expressions, which sympy evaluates."""
    from math_verify import LatexExtractionConfig, parse

    bare = latex.strip().strip("$").strip()
    return tuple(parse(f"\\boxed{{{bare}}}", [LatexExtractionConfig()], parsing_timeout=None))


def _squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text.strip().strip("$"))


def _untexted(text: str) -> str:
    return re.sub(r"\\(?:text|mathrm|textbf|mathbf)\s{0,3}\{([^{}]*)\}", r"\1", text).strip()


def _plain(text: str) -> str:
    return " ".join(_untexted(text).strip("$").casefold().split()).rstrip(" .")


def _after_answer_is(text: str, which: Which) -> str:
    lower = text.lower()
    at = lower.find("answer is") if which == "first" else lower.rfind("answer is")
    # Lowering some letters changes how many characters they are; then the places don't agree and nothing is cut off.
    return text[at + len("answer is") :] if at >= 0 and len(lower) == len(text) else text
