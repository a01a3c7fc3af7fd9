"""Content words of a text, and their overlap between two texts (paper eq. 11)."""

from __future__ import annotations

import re
from collections.abc import Collection

WORD_PATTERN = r"\d+(?:[.,]\d+)*|(?<![\\A-Za-z])[^\W\d_]+(?:'[^\W\d_]+)*"
"""A number with decimal and thousands separators, or letters with apostrophes inside; LaTeX commands don't match."""

_GRAMMAR = """
a an the this that these those
i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his himself
she her hers herself it its itself they them their theirs themselves
who whom whose which what when where why how
am is are was were be been being do does did doing done have has had having
can could may might must shall should will would
and or but nor so yet if then else than as because while although though since until unless whether
of in on at by for with about against between into through during before after above below to from
up down out off over under along across around within without per toward towards upon onto
again further once here there all any both each every either neither few more most much many other
another some such no not only own same too very just also now even still
it's that's there's here's what's who's let's he's she's i'm you're we're they're
i've you've we've they've i'll you'll he'll she'll it'll we'll they'll i'd you'd he'd she'd we'd they'd
isn't aren't wasn't weren't don't doesn't didn't haven't hasn't hadn't
can't cannot couldn't won't wouldn't shouldn't mustn't
"""
STOP_WORDS = tuple(sorted(_GRAMMAR.split()))
"""English function words: articles, pronouns, auxiliaries, prepositions, conjunctions, and adverbs of degree."""


def content_words(text: str, pattern: str = WORD_PATTERN, stop_words: Collection[str] = STOP_WORDS) -> frozenset[str]:
    """S(·) of eq. 11: the set of words in `text` that match `pattern`, case folded, without the stop words."""
    folded = text.replace("’", "'").casefold()
    return frozenset(match.group() for match in re.finditer(pattern, folded)).difference(stop_words)


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """Size of intersection over size of union: 1 for equal sets, 0 for disjoint ones, NaN for two empty ones."""
    union = len(a | b)
    return len(a & b) / union if union else float("nan")
