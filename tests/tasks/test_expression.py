from __future__ import annotations

import random
import re
import time
from fractions import Fraction

import pytest

from rhythm.tasks.expression import MAX_LENGTH, ExpressionError, evaluate, parse


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", Fraction(7)),
        ("1+2*3", Fraction(7)),
        ("(1+2)*3", Fraction(9)),
        ("8-3-2", Fraction(3)),
        ("24/4/3", Fraction(2)),
        ("1/3*6", Fraction(2)),
        ("2-3*4", Fraction(-10)),
        ("((2))*(3+(4-5))", Fraction(4)),
        ("1-2/(3-4)*5", Fraction(11)),
        (" 12 +\n( 3\t* 4 ) ", Fraction(24)),
        ("1/3", Fraction(1, 3)),
        ("0*5", Fraction(0)),
    ],
)
def test_values_worked_by_hand(text: str, value: Fraction) -> None:
    assert parse(text).value() == value


def test_postfix_and_literals_keep_the_order_written() -> None:
    parsed = parse("(1+2)*3-40")
    assert parsed.postfix == (1, 2, "+", 3, "*", 40, "-")
    assert parsed.literals == (1, 2, 3, 40)


def test_agrees_with_python_on_random_expressions() -> None:
    rng = random.Random(0)

    def grow(depth: int) -> str:
        if depth == 0 or rng.random() < 0.2:
            return str(rng.randint(0, 20))
        inner = grow(depth - 1) + rng.choice("+-*/") + grow(depth - 1)
        return f"({inner})" if rng.random() < 0.6 else inner

    zero_divisions = 0
    for _ in range(500):
        text = grow(3)
        try:
            expected = eval(re.sub("[0-9]+", r"Fraction(\g<0>)", text))
        except ZeroDivisionError:
            zero_divisions += 1
            with pytest.raises(ExpressionError, match="division by zero"):
                parse(text).value()
        else:
            assert parse(text).value() == expected, text
    assert 0 < zero_divisions < 250


BROKEN = "() ( ) 1+ *2 + 1+*2 (1 1) (1)) )1( 1(2) (1)(2) 2( (+1) -1 +1 1--2 1+-2 05 00"
OTHER_SYNTAX = "2**3 2//3 2%3 2^3 1e5 1.5 .5 1_5 0x1 1j 1,2 (1,5) 1=1 1==1 1<2 a nan inf [1] {1} 1;2 ~1 lambda:1"
NOT_ASCII = "١+٢ 1٢ １+２ ² 1×2 4÷2 3−1 1\u200b+2"
BLANKS = ["", " ", "1 5", "1 if 1 else 1", "__import__('os')", "1\u00a0+2", "1\u2003+2", "1\x00", "1\r+2"]


@pytest.mark.parametrize("text", [*BROKEN.split(), *OTHER_SYNTAX.split(), *NOT_ASCII.split(), *BLANKS])
def test_everything_else_is_no_expression(text: str) -> None:
    with pytest.raises(ExpressionError):
        parse(text)


def test_the_length_is_capped_before_anything_is_read() -> None:
    brackets = MAX_LENGTH // 2 - 1
    longest = "(" * brackets + "12" + ")" * brackets
    assert len(longest) == MAX_LENGTH
    assert parse(longest).value() == 12
    with pytest.raises(ExpressionError, match=f"{MAX_LENGTH + 1} characters"):
        parse(longest + " ")


@pytest.mark.timing
def test_what_is_over_the_cap_costs_nothing() -> None:
    start = time.perf_counter()
    for _ in range(1000):
        with pytest.raises(ExpressionError, match="characters"):
            parse("(" * 1000)
    assert time.perf_counter() - start < 0.5


@pytest.mark.timing
def test_the_costliest_text_under_the_cap_is_cheap() -> None:
    text = ("9" * 62 + "/7*" + "8" * 62 + "+") * 2
    text = text[: MAX_LENGTH - 1] + "1"
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        parse(text).value()
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1e-3


def test_evaluate_wants_every_number_exactly_once() -> None:
    assert evaluate("(5-1)*5/2", [1, 2, 5, 5]) == 10
    for text in ("(5-1)*5", "(5-1)*5/2+2", "(5-1)*2/2", "51*5/2", "(5-1)*5/2+0"):
        with pytest.raises(ExpressionError, match="exactly once"):
            evaluate(text, [1, 2, 5, 5])
