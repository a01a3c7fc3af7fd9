"""Counterfactuals for Table 1: does replacing a token with high FAI change the continuation more than one with low FAI?

At the positions of highest and of lowest FAI the token is replaced by the model's next best candidates, each is
continued greedily, and the content words of original and continuation are compared (section 4.1, eq. 11).

Shape suffixes: N tokens of prompt and response, V vocabulary (the tokenizer's).
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, Field, field_validator
from torch import Tensor

from rhythm.analysis.content_words import STOP_WORDS, WORD_PATTERN, content_words, jaccard
from rhythm.analysis.continuations import Branch, continue_greedily, prefill
from rhythm.analysis.results import Trial
from rhythm.checkpoints import model_end_tokens
from rhythm.shapes import check_shape

Group = Literal["top", "bottom"]


class CounterfactualConfig(BaseModel, extra="forbid", frozen=True):
    """Which tokens are replaced, and how continuations are compared. The paper gives none of these settings."""

    positions: int = Field(
        default=5,
        ge=1,
        description="k: number of positions of highest FAI, and of lowest FAI, per response; half of the eligible "
        "positions if there are fewer than 2k",
    )
    candidates: int = Field(
        default=3, ge=1, description="replacements per position: the most likely tokens other than the original"
    )
    max_new_tokens: int = Field(
        default=256,
        ge=1,
        description="longest continuation, in tokens; the same number of original tokens is compared. Shorter at the "
        "end of the model's context, and in a response that was cut off",
    )
    min_following: int = Field(
        default=1, ge=1, description="tokens that must follow a position in the response for it to be eligible"
    )
    special_tokens: bool = Field(
        default=False,
        description="allow special tokens as candidates; an end token is not continued",
    )
    word_pattern: str = Field(
        default=WORD_PATTERN,
        description="regular expression of a word, applied to the case-folded text; the default matches numbers and "
        "letters with apostrophes inside, but not LaTeX commands, operators and punctuation",
    )
    stop_words: tuple[str, ...] = Field(default=STOP_WORDS, description="words that are not content words")
    rows_at_once: int = Field(default=32, ge=1, description="continuations generated at once; limits memory")

    @field_validator("word_pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"is not a regular expression: {error}") from error
        return pattern

    @field_validator("stop_words")
    @classmethod
    def _folded(cls, words: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(word.casefold() for word in words)


@dataclass(frozen=True)
class CounterfactualResult:
    """The counterfactuals of one response.

    Attributes:
        trials: of the top positions, then of the bottom positions, each sorted by FAI, the most extreme first; the
            candidates of a position from the most likely on.
        top, bottom: mean Jaccard index over the trials where it is defined; NaN if there is none.
        top_below_bottom: Pr(Top < Bottom) over all pairs of a top and a bottom trial; NaN if there is none.
        eligible: number of eligible positions.
    """

    trials: tuple[Trial, ...]
    top: float
    bottom: float
    top_below_bottom: float
    eligible: int


def counterfactuals(
    model: Any,
    tokenizer: Any,
    input_ids: Tensor | Sequence[int],
    prompt_len: int,
    fai: Tensor,
    config: CounterfactualConfig | None = None,
    *,
    end_ids: Collection[int] | None = None,
) -> CounterfactualResult:
    """Replace tokens of one response at its highest and lowest FAI, and compare the continuations with the original.

    The model runs once over the sequence, and every continuation reuses the keys and values of that pass.

    Args:
        model: a causal transformers model; its mode (train or eval) is restored.
        tokenizer: the model's tokenizer.
        input_ids: integers [N]: the tokens of the prompt, then of the response, without padding.
        prompt_len: number of prompt tokens; at least 1, because the response's first token must be predicted.
        fai: [N], at the positions of input_ids, as returned by `observe`. Positions where it is NaN are not eligible.
        config: CounterfactualConfig() if None.
        end_ids: tokens that end a response; None: the end tokens of tokenizer and generation config.

    Raises:
        ValueError: an argument is not as described (the message names it), or the model's cache holds anything but
            keys and values.
    """
    config = config or CounterfactualConfig()
    ids_N = torch.as_tensor(input_ids)
    (length,) = check_shape("input_ids", ids_N, ("N",))
    check_shape("fai", fai, (length,))
    if not 1 <= prompt_len < length:
        raise ValueError(
            f"prompt_len is {prompt_len}: must be from 1 to {length - 1}, as input_ids has {length} tokens"
        )
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    if length > context:
        raise ValueError(f"input_ids has {length} tokens: the model's context is {context}")
    ends = frozenset(model_end_tokens(model, tokenizer) if end_ids is None else end_ids)

    ids, fai_n = ids_N.tolist(), fai.tolist()
    eligible = eligible_positions(fai_n, prompt_len, config.min_following)
    groups = extremes(fai_n, eligible, config.positions)
    if not groups:
        return _result((), eligible=len(eligible))

    positions = sorted(groups)
    prefilled = prefill(model, ids_N, positions)
    never = frozenset() if config.special_tokens else ends.union(tokenizer.all_special_ids)
    replacements = [
        (position, candidate)
        for position, logits_V in zip(positions, prefilled.logits_KV, strict=True)
        for candidate in candidates(logits_V[: len(tokenizer)], never | {ids[position]}, config.candidates)
    ]
    # Original and continuation have the same limit: the end of the model's context, or of a response that was cut off.
    end = context if ids[-1] in ends else length
    limits = {position: min(config.max_new_tokens, end - position - 1) for position in positions}
    continuations = continue_greedily(
        model,
        prefilled,
        [Branch(position, candidate.token, limits[position]) for position, candidate in replacements],
        end_ids=ends,
        rows_at_once=config.rows_at_once,
    )

    def decoded(tokens: Sequence[int]) -> str:
        text: str = tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def words(text: str) -> frozenset[str]:
        return content_words(text, config.word_pattern, config.stop_words)

    originals = {
        position: words(decoded(ids[position + 1 : position + 1 + limits[position]])) for position in positions
    }
    trials = [
        Trial(
            group=groups[position],
            position=position - prompt_len,
            fai=fai_n[position],
            original_id=ids[position],
            original_token=tokenizer.decode([ids[position]]),
            replacement_id=candidate.token,
            replacement_token=tokenizer.decode([candidate.token]),
            candidate=candidate.rank,
            probability=candidate.probability,
            jaccard=jaccard(originals[position], words(text := decoded(continuation))),
            continuation=text,
            finished=(candidate.token, *continuation)[-1] in ends,
        )
        for (position, candidate), continuation in zip(replacements, continuations, strict=True)
    ]
    place = {position: index for index, position in enumerate(groups)}
    trials.sort(key=lambda trial: place[trial.position + prompt_len])  # a stable sort keeps the order of the candidates
    return _result(tuple(trials), eligible=len(eligible))


def eligible_positions(fai: Sequence[float], prompt_len: int, min_following: int) -> list[int]:
    """Response positions with a defined FAI and at least `min_following` tokens after them, ascending."""
    return [t for t in range(prompt_len, len(fai) - min_following) if not math.isnan(fai[t])]


def extremes(fai: Sequence[float], eligible: Sequence[int], k: int) -> dict[int, Group]:
    """The k eligible positions of highest FAI, the highest first, then the k of lowest, the lowest first.

    Ties go to the earlier position. With fewer than 2k eligible positions, half of them (rounded down) are top and the
    same number bottom, so that none is both.
    """
    k = min(k, len(eligible) // 2)
    top = sorted(eligible, key=lambda t: (-fai[t], t))[:k]
    bottom = sorted(set(eligible).difference(top), key=lambda t: (fai[t], t))[:k]
    groups: dict[int, Group] = dict.fromkeys(top, "top")
    return groups | dict.fromkeys(bottom, "bottom")


@dataclass(frozen=True)
class Candidate:
    """A replacement token; rank 1 is the most likely token of the tokenizer's vocabulary."""

    token: int
    rank: int
    probability: float


def candidates(logits_V: Tensor, excluded: Collection[int], count: int) -> list[Candidate]:
    """The `count` most likely tokens that are not excluded, in descending order; ties go to the lower id."""
    probability_V = logits_V.softmax(dim=-1)
    order = logits_V.argsort(descending=True, stable=True)[: count + len(excluded)].tolist()
    ranked = [Candidate(t, rank, float(probability_V[t])) for rank, t in enumerate(order, 1) if t not in excluded]
    return ranked[:count]


def _result(trials: tuple[Trial, ...], *, eligible: int) -> CounterfactualResult:
    top, bottom = (
        [trial.jaccard for trial in trials if trial.group == group and not math.isnan(trial.jaccard)]
        for group in ("top", "bottom")
    )
    return CounterfactualResult(
        trials=trials,
        top=_mean(top),
        bottom=_mean(bottom),
        top_below_bottom=_mean([float(a < b) for a in top for b in bottom]),
        eligible=eligible,
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
