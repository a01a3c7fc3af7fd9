"""Parses and evaluates arithmetic expressions in exact fractions, for Countdown's rewards.

Grammar (ASCII only; blanks are allowed between tokens):

    sum     = product { ("+" | "-") product }
    product = factor  { ("*" | "/") factor }
    factor  = literal | "(" sum ")"
    literal = "0" | nonzero digit { digit }

There are no signs, powers or decimal points, and Python's own parser is never used. A model's answer is untrusted
input: its length is limited before parsing, the parser keeps its own stack instead of recursing, and callers check
`Expression.literals` before computing the value, so that no answer takes more than a fraction of a millisecond.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

MAX_LENGTH = 256
"""Longest text, in characters, that is parsed. An expression of six two-digit numbers has about forty."""


_TOKEN = re.compile(r"[ \t\n]*(0|[1-9][0-9]*|[-+*/()])")
_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}


class ExpressionError(ValueError):
    """The text does not match the grammar, or its value is undefined (a division by zero)."""


@dataclass(frozen=True)
class Expression:
    """A parsed expression in postfix order: `(1+2)*3` is `(1, 2, "+", 3, "*")`."""

    postfix: tuple[int | str, ...]

    @property
    def literals(self) -> tuple[int, ...]:
        """The numbers as written, left to right."""
        return tuple(token for token in self.postfix if isinstance(token, int))

    def value(self) -> Fraction:
        """The exact value. Raises ExpressionError on a division by zero."""
        stack: list[Fraction] = []
        for token in self.postfix:
            if isinstance(token, int):
                stack.append(Fraction(token))
            else:
                right = stack.pop()
                stack.append(apply(stack.pop(), token, right))
        return stack.pop()


def apply(left: Fraction, operator: str, right: Fraction) -> Fraction:
    """`left operator right`, exactly. Raises ExpressionError on a division by zero."""
    if operator == "+":
        return left + right
    if operator == "-":
        return left - right
    if operator == "*":
        return left * right
    if right == 0:
        raise ExpressionError("division by zero")
    return left / right


def parse(text: str) -> Expression:
    """Parse `text`. Raises ExpressionError if it does not match the grammar.

    Dijkstra's shunting-yard algorithm: `operators` is the stack of operators whose right operand is not complete yet,
    and of open brackets.
    """
    postfix: list[int | str] = []
    operators: list[str] = []
    operand_next = True
    for token in _tokens(text):
        if operand_next != (token == "(" or token.isdigit()):
            raise ExpressionError(f"{token!r} is where {'a number' if operand_next else 'an operator'} is expected")
        if token.isdigit():
            postfix.append(int(token))
            operand_next = False
        elif token == "(":
            operators.append(token)
        elif token == ")":
            _unwind(operators, postfix, above=0)
            if not operators:
                raise ExpressionError("')' has no matching '('")
            operators.pop()
        else:
            _unwind(operators, postfix, above=_PRECEDENCE[token])
            operators.append(token)
            operand_next = True
    if operand_next:
        raise ExpressionError("the expression ends where a number is expected")
    _unwind(operators, postfix, above=0)
    if operators:
        raise ExpressionError("'(' is never closed")
    return Expression(tuple(postfix))


def evaluate(text: str, numbers: Iterable[int]) -> Fraction:
    """The value of `text`, which must use each of `numbers` exactly once and no other number.

    Raises ExpressionError where it does not, where it does not match the grammar, and on a division by zero.
    """
    expression = parse(text)
    if sorted(expression.literals) != sorted(numbers):
        raise ExpressionError(f"uses {list(expression.literals)}, not each of {list(numbers)} exactly once")
    return expression.value()


def _tokens(text: str) -> list[str]:
    if len(text) > MAX_LENGTH:
        raise ExpressionError(f"{len(text)} characters, more than the {MAX_LENGTH} allowed")
    text = text.rstrip(" \t\n")
    tokens: list[str] = []
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise ExpressionError(f"unexpected {text[position]!r}")
        tokens.append(match[1])
        position = match.end()
    return tokens


def _unwind(operators: list[str], postfix: list[int | str], above: int) -> None:
    """Pop operators of precedence `above` or higher from the stack to the output, down to an open bracket."""
    while operators and operators[-1] != "(" and _PRECEDENCE[operators[-1]] >= above:
        postfix.append(operators.pop())
