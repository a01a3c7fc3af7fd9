"""Texts of tokens that split characters, and sentences."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rhythm.analysis.text import sentence_numbers, token_texts
from rhythm.tiny.model import build_tokenizer


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """Words with their space in front, which decoding drops from the first one."""
    tokenizer = Tokenizer(models.WordLevel({"▁So": 0, "▁we": 1, "▁add": 2, "?": 3}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_the_last_token_of_a_character_has_it() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("é=🙂!").input_ids
    assert token_texts(tokenizer, ids) == ["", "é", "=", "", "", "", "🙂", "!"]
    cut = token_texts(tokenizer, ids[:5])  # within a character
    assert len(cut) == 5
    assert "".join(cut) == tokenizer.decode(ids[:5])


def test_bytes_that_are_no_text_hold_nothing_up() -> None:
    tokenizer = byte_tokenizer()
    a = tokenizer("a").input_ids[0]
    stray = tokenizer("é").input_ids[1]
    texts = token_texts(tokenizer, [stray] * 20 + [a])
    assert len(texts) == 21
    assert texts[-1].endswith("a")
    assert any(texts[:10])


def test_spaces_stay() -> None:
    tokenizer = metaspace_tokenizer()
    assert token_texts(tokenizer, [0, 1, 2]) == ["So", " we", " add"]


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("Add 3.5 and 4. That is 7.5! Done", ["Add 3.5 and 4. ", "That is 7.5! ", "Done"]),
        ("One\n\n Two:\nthree", ["One\n\n ", "Two:\n", "three"]),
        ('He said "no." Then left.', ['He said "no." ', "Then left."]),
        ("", []),
    ],
)
def test_sentences(text: str, sentences: list[str]) -> None:
    numbers = sentence_numbers(list(text))
    pieces = ["".join(c for c, n in zip(text, numbers, strict=True) if n == i) for i in range(len(sentences))]
    assert pieces == sentences


def test_a_token_lies_where_its_first_letter_does() -> None:
    assert sentence_numbers(["One", ".", " Two", "", ".\n", "\n", "Three"]) == [0, 0, 1, 1, 1, 1, 2]


def test_tokens_of_the_tiny_tokenizer() -> None:
    tokenizer = build_tokenizer()
    ids = [*tokenizer("6-5=1", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    assert token_texts(tokenizer, ids) == ["6", "-", "5", "=", "1", "<|eos|>"]
