"""The texts of single tokens, and the sentences they lie in."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

UNFINISHED = "\ufffd"  # what a decoder makes of the first bytes of a character
LONGEST_CHARACTER = 8  # tokens; bytes that are not text stay unfinished for ever
SENTENCE_END = re.compile(r"(?<=[.!?。！？])[\"'”’)\]]*\s+|\s*\n\s*")
"""White space after a full stop, question or exclamation mark (perhaps a closing quote between), or a line break."""


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text that each token adds to those before it; joined, they are the text of all.

    Where a character takes several tokens, the last of them has it and the others have "".
    """
    texts: list[str] = []
    start = 0  # of the tokens whose text is not given out yet
    for i in range(len(ids)):
        # With the token before: some tokenizers drop the space in front of the first one.
        before = list(ids[max(0, start - 1) : start])
        known, text = (_decode(tokenizer, part) for part in (before, [*before, *ids[start : i + 1]]))
        text = text[len(known) :]
        if text.endswith(UNFINISHED) and i + 1 < len(ids) and i + 1 - start < LONGEST_CHARACTER:
            texts.append("")
            continue
        texts.append(text)
        start = i + 1
    return texts


def sentence_numbers(texts: Sequence[str]) -> list[int]:
    """Which sentence each token lies in, by its first character that is not white space; from 0, none left out."""
    starts = [match.end() for match in SENTENCE_END.finditer("".join(texts))]
    numbers: dict[int, int] = {}
    sentences, offset = [], 0
    for text in texts:
        # White space alone belongs to what is before it.
        begin = offset + (len(text) - len(text.lstrip()) if text.strip() else 0)
        place = bisect_right(starts, begin) if text.strip() else bisect_right(starts, begin - 1)
        sentences.append(numbers.setdefault(place, len(numbers)))
        offset += len(text)
    return sentences


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) if ids else ""
    return text
