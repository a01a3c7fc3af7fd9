"""Where in a response the answer stands.

An answer block is `<answer>…</answer>`, `\\boxed{…}` with balanced braces, what follows `####` on its line, or a line
that begins with `Answer:`. A model that goes on after its answer and invents a second problem, or a second user, writes
a second block: by default the first one counts. Everything is linear in the length of the response.
"""

from __future__ import annotations

import re
from typing import Literal

Which = Literal["first", "last"]

MAX_ANSWER = 2_000
"""Characters of an answer; a longer one is none."""

_END_OF_THOUGHT = "</think>"
_TAGGED = re.compile(r"<answer>((?:(?!</?answer>)[\s\S])*)</answer>")
_LINE = re.compile(r"^.*?####(.*)$|^[ \t*]*(?:final )?answer[ \t*]*:(.*)$", re.MULTILINE | re.IGNORECASE)
_BRACE = re.compile(r"\\boxed\s{0,3}\{|\\[{}\\]|[{}]")


def find_answer(response: str, which: Which = "first") -> str | None:
    """The content of the first or last answer block behind the thoughts, which end with `</think>`; None: there is
    none, or it has more than `MAX_ANSWER` characters.
    """
    if _END_OF_THOUGHT in response:
        before_after = response.split(_END_OF_THOUGHT, 1) if which == "first" else response.rsplit(_END_OF_THOUGHT, 1)
        response = before_after[1]
    outermost: list[tuple[int, int, str]] = []
    for block in sorted(_blocks(response), key=lambda block: (block[0], -block[1])):
        if not outermost or block[0] >= outermost[-1][1]:
            outermost.append(block)
    if not outermost:
        return None
    content = outermost[0 if which == "first" else -1][2]
    return content.strip() if len(content) <= MAX_ANSWER else None


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
