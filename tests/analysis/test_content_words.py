from __future__ import annotations

import math

import pytest

from rhythm.analysis.content_words import STOP_WORDS, content_words, jaccard


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("We need to follow these steps: need, Follow!", {"need", "follow", "steps"}),
        ("It costs 1,250.50 or 75.00; 3 of 4.", {"costs", "1,250.50", "75.00", "3", "4"}),
        (r"$$\frac{5.00 \text{ dollars}}{4} = 1.25$$", {"5.00", "dollars", "4", "1.25"}),
        ("Terry’s yogurt isn't Terry's, let's say", {"terry's", "yogurt", "say"}),
        ("3*4+5 = 17", {"3", "4", "5", "17"}),
        ("step-by-step in 30days", {"step", "30", "days"}),
        ("naïve Äpfel", {"naïve", "äpfel"}),
        ("so it is, and then + - ()", set()),
    ],
)
def test_the_words_of_a_text(text: str, expected: set[str]) -> None:
    assert content_words(text) == expected


def test_a_sentence_of_the_papers_appendix() -> None:
    original = content_words(" Terry spends on yogurt over 30 days, we need to follow these steps:")
    perturbed = content_words(" yogurts Terry will eat in 30 days, we start by calculating the")
    assert original == {"terry", "spends", "yogurt", "30", "days", "need", "follow", "steps"}
    assert perturbed == {"yogurts", "terry", "eat", "30", "days", "start", "calculating"}
    assert jaccard(original, perturbed) == 3 / 12


def test_pattern_and_stop_words_may_be_others() -> None:
    assert content_words("3*4 and 5", pattern=r"[-+*/]|\d") == {"3", "*", "4", "5"}
    assert content_words("the red one", stop_words=("red",)) == {"the", "one"}


def test_jaccard_at_its_ends() -> None:
    some, other = frozenset({"a", "b"}), frozenset({"c"})
    assert jaccard(some, some) == 1
    assert jaccard(some, other) == 0
    assert jaccard(some, frozenset()) == 0
    assert math.isnan(jaccard(frozenset(), frozenset()))


def test_stop_words_are_folded_and_listed_once() -> None:
    assert list(STOP_WORDS) == sorted({word.casefold() for word in STOP_WORDS})
    assert {"the", "we", "will", "over", "don't"} <= set(STOP_WORDS)
    assert not {"one", "two", "total", "first"} & set(STOP_WORDS)
