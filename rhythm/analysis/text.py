"""Splits a response into the texts of its tokens, and assigns tokens to sentences."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

UNFINISHED = "\ufffd"  # a decoder's output for the first bytes of a character
LONGEST_CHARACTER = 8  # tokens; bytes that are not text would never be complete
SENTENCE_END = re.compile(r"(?<=[.!?。！？])[\"'”’)\]]*\s+|\s*\n\s*")
"""White space after a full stop, question or exclamation mark (and optional closing quotes), or a line break."""


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text that each token adds to the tokens before it; joined, they are the whole text.

    If a character consists of several tokens, the last one gets the character and the others "".
    """
    texts: list[str] = []
    start = 0  # first token whose text is not assigned yet
    for i in range(len(ids)):
        # Decode with the token before, because some tokenizers drop the space before the first token.
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
    """The sentence index of each token, by its first character that is not white space; consecutive from 0."""
    starts = [match.end() for match in SENTENCE_END.finditer("".join(texts))]
    numbers: dict[int, int] = {}
    sentences, offset = [], 0
    for text in texts:
        # A token of white space belongs to the sentence before it.
        begin = offset + (len(text) - len(text.lstrip()) if text.strip() else 0)
        place = bisect_right(starts, begin) if text.strip() else bisect_right(starts, begin - 1)
        sentences.append(numbers.setdefault(place, len(numbers)))
        offset += len(text)
    return sentences


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) if ids else ""
    return text
