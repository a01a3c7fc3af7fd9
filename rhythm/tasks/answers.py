"""Where in a response the answer stands.

An answer block is `<answer>…</answer>`, `\\boxed{…}` with balanced braces, what follows `####` on its line, or a line
that begins with `Answer:`. A model that goes on after its answer and invents a second problem, or a second user, writes
a second block: by default the first one counts. Everything is linear in the length of the response.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal

Which = Literal["first", "last"]

MAX_ANSWER = 2_000
"""Characters of an answer; a longer one is none."""

_OPEN_THOUGHT, _CLOSE_THOUGHT = "<think>", "</think>"
_OPEN, _CLOSE = "<answer>", "</answer>"
_TAGGED = re.compile(r"<answer>((?:(?!</?answer>)[\s\S])*)</answer>")
_LINE = re.compile(r"^.*?####(.*)$|^[ \t*]*(?:final )?answer[ \t*]*:(.*)$", re.MULTILINE | re.IGNORECASE)
_BRACE = re.compile(r"\\boxed\s{0,3}\{|\\[{}\\]|[{}]")


def find_answer(response: str, which: Which = "first") -> str | None:
    """The content of the first or last answer block outside the thoughts, which end with `</think>`; None: there is
    none, or it has more than `MAX_ANSWER` characters.

    The first block also counts where it stands before a `<think>` of the response itself: what the model thinks of a
    second problem comes after the answer to the first.
    """
    content = _first_of(response, which, _find_block)
    return None if content is None else content.strip()


def find_tagged(response: str, which: Which = "first") -> str | None:
    """`find_answer` for `<answer>…</answer>` alone, with the white space around the content."""
    return _first_of(response, which, _find_tagged)


def behind_thoughts(response: str, which: Which = "first") -> str:
    """What follows the first or last `</think>`; the whole response where there is none."""
    return _around_thoughts(response, which)[1]


def _first_of(response: str, which: Which, find: Callable[[str, Which], str | None]) -> str | None:
    """What `find` finds before the thoughts, unless it is blank, or else behind them."""
    before, behind = _around_thoughts(response, which)
    content = find(before, which)
    if content is None or not content.strip():
        content = find(behind, which)
    return content if content is not None and len(content) <= MAX_ANSWER else None


def _around_thoughts(response: str, which: Which) -> tuple[str, str]:
    """(what stands before the first thought, what follows the first or last one).

    Before it stands nothing where the prompt opened the thought, nor where the last answer is asked for.
    """
    if which == "last":
        return "", response.rpartition(_CLOSE_THOUGHT)[2]
    thoughts, closed, behind = response.partition(_CLOSE_THOUGHT)
    if not closed:
        return "", response
    before, opened, _ = thoughts.partition(_OPEN_THOUGHT)
    return before if opened else "", behind


def _find_block(text: str, which: Which) -> str | None:
    outermost: list[tuple[int, int, str]] = []
    for block in sorted(_blocks(text), key=lambda block: (block[0], -block[1])):
        if not outermost or block[0] >= outermost[-1][1]:
            outermost.append(block)
    return outermost[0 if which == "first" else -1][2] if outermost else None


def _find_tagged(text: str, which: Which) -> str | None:
    """The content of the first or last match of _TAGGED, which looks ahead at every character, by searches alone."""
    if which == "first":
        opened = text.find(_OPEN)
        end = text.find(_CLOSE, opened) if opened >= 0 else -1
        start = text.rfind(_OPEN, opened, end) if end >= 0 else -1
    else:
        closed = text.rfind(_CLOSE)
        start = text.rfind(_OPEN, 0, closed) if closed >= 0 else -1
        end = text.find(_CLOSE, start)
    return text[start + len(_OPEN) : end] if start >= 0 else None


def _blocks(text: str) -> list[tuple[int, int, str]]:
    """(start, end, content) of every block."""
    blocks = [(match.start(), match.end(), match[1]) for match in _TAGGED.finditer(text)]
    for match in _LINE.finditer(text):
        group = 1 if match[1] is not None else 2
        # The marker comes just before; a \boxed{…} or a tag that stands behind it on the line is the block then.
        if match[group].strip() and not re.search(r"\\boxed|<answer>", match[group]):
            blocks.append((match.start(group) - 1, match.end(), match[group]))
    open_braces: list[tuple[int, int] | None] = []  # (start, start of the content) of \boxed{, None of any other
    for match in _BRACE.finditer(text):
        if match[0] == "}":
            boxed = open_braces.pop() if open_braces else None
            if boxed is not None:
                blocks.append((boxed[0], match.end(), text[boxed[1] : match.start()]))
        elif match[0] == "{":
            open_braces.append(None)
        elif match[0].startswith("\\boxed"):
            open_braces.append((match.start(), match.end()))
    return blocks
