"""Counterfactuals for Table 1: does replacing a token with high FAI change the continuation more than one with low FAI?

At the positions of highest and of lowest FAI the token is replaced by the model's next best candidates, each is
continued greedily, and the content words of original and continuation are compared (section 4.1, eq. 11). FAI tends to
be higher early in a response, where more text is left to change, so a third group has low FAI beside the highest.

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
from rhythm.analysis.continuations import Branch, Prefill, continue_greedily, prefill
from rhythm.analysis.response import Trial
from rhythm.checkpoints import model_end_tokens
from rhythm.shapes import check_shape

Group = Literal["top", "bottom", "matched"]


class CounterfactualConfig(BaseModel, extra="forbid", frozen=True):
    """Which tokens are replaced, and how continuations are compared. The paper gives none of these settings."""

    positions: int = Field(
        default=5,
        ge=1,
        description="k: number of positions of highest FAI, and of lowest FAI, per response; half of the eligible "
        "positions if there are fewer than 2k",
    )
    matched: bool = Field(
        default=True,
        description="also replace tokens of low FAI at matched positions: for each of the highest the nearest of the "
        "half with lower FAI",
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
    responses_at_once: int = Field(default=4, ge=1, description="responses whose continuations are generated together")
    rows_at_once: int = Field(default=192, ge=1, description="continuations generated at once; limits memory")

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
        trials: of the top positions, then of the bottom positions, each sorted by FAI, the most extreme first, then of
            the matched positions in the order of the top ones; the candidates of a position from the most likely on.
        top, bottom: mean Jaccard index over the trials where it is defined; NaN if there is none.
        top_below_bottom: Pr(Top < Bottom) over all pairs of a top and a bottom trial; NaN if there is none.
        eligible: number of eligible positions.
    """

    trials: tuple[Trial, ...]
    top: float
    bottom: float
    top_below_bottom: float
    eligible: int


@dataclass(frozen=True)
class Scored:
    """A response and its FAI.

    Attributes:
        input_ids: integers [N]: the tokens of the prompt, then of the response, without padding.
        prompt_len: number of prompt tokens; at least 1, because the response's first token must be predicted.
        fai: [N], at the positions of input_ids, as returned by `observe`. Positions where it is NaN are not eligible.
    """

    input_ids: Tensor | Sequence[int]
    prompt_len: int
    fai: Tensor


def counterfactuals(
    model: Any,
    tokenizer: Any,
    responses: Sequence[Scored],
    config: CounterfactualConfig | None = None,
    *,
    end_ids: Collection[int] | None = None,
) -> list[CounterfactualResult]:
    """Replace tokens of responses at their highest and lowest FAI, and compare the continuations with the originals.

    The model runs once over each sequence, and every continuation reuses the keys and values of that pass. The
    continuations of all responses run together.

    Args:
        model: a causal transformers model; its mode (train or eval) is restored.
        tokenizer: the model's tokenizer.
        responses: one or more; their results come in this order.
        config: CounterfactualConfig() if None.
        end_ids: tokens that end a response; None: the end tokens of tokenizer and generation config.

    Raises:
        ValueError: an argument is not as described (the message names it), or the model's cache holds anything but
            keys and values.
    """
    config = config or CounterfactualConfig()
    ends = frozenset(model_end_tokens(model, tokenizer) if end_ids is None else end_ids)
    plans = [_plan(model, tokenizer, response, config, ends) for response in responses]
    asked = [plan for plan in plans if plan.prefilled is not None]
    branches = [
        Branch(position, candidate.token, plan.limits[position], sequence)
        for sequence, plan in enumerate(asked)
        for position, candidate in plan.replacements
    ]
    continued = continue_greedily(
        model,
        [plan.prefilled for plan in asked if plan.prefilled is not None],
        branches,
        end_ids=ends,
        rows_at_once=config.rows_at_once,
    )
    continuations = iter(continued)
    return [
        _compared(tokenizer, plan, [next(continuations) for _ in plan.replacements], config, ends) for plan in plans
    ]


@dataclass(frozen=True)
class _Plan:
    """What is replaced in one response. Positions count from the prompt's first token."""

    ids: list[int]
    prompt_len: int
    fai: list[float]
    eligible: int
    groups: list[tuple[Group, int]]
    limits: dict[int, int]
    replacements: list[tuple[int, Candidate]]
    prefilled: Prefill | None


def _plan(model: Any, tokenizer: Any, response: Scored, config: CounterfactualConfig, ends: frozenset[int]) -> _Plan:
    prompt_len, fai = response.prompt_len, response.fai
    ids_N = torch.as_tensor(response.input_ids)
    (length,) = check_shape("input_ids", ids_N, ("N",))
    check_shape("fai", fai, (length,))
    if not 1 <= prompt_len < length:
        raise ValueError(
            f"prompt_len is {prompt_len}: must be from 1 to {length - 1}, as input_ids has {length} tokens"
        )
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    if length > context:
        raise ValueError(f"input_ids has {length} tokens: the model's context is {context}")

    ids, fai_n = ids_N.tolist(), fai.tolist()
    eligible = eligible_positions(fai_n, prompt_len, config.min_following)
    groups = extremes(fai_n, eligible, config.positions)
    if config.matched:
        top = [position for group, position in groups if group == "top"]
        groups += [("matched", position) for position in matched_positions(fai_n, eligible, top)]
    if not groups:
        return _Plan(ids, prompt_len, fai_n, len(eligible), [], {}, [], None)
    positions = sorted({position for _, position in groups})
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
    return _Plan(ids, prompt_len, fai_n, len(eligible), groups, limits, replacements, prefilled)


def _compared(
    tokenizer: Any,
    plan: _Plan,
    continuations: Sequence[Sequence[int]],
    config: CounterfactualConfig,
    ends: frozenset[int],
) -> CounterfactualResult:
    """The trials of one response; a position that is in two groups has the same trials in both."""

    def words(text: str) -> frozenset[str]:
        return content_words(text, config.word_pattern, config.stop_words)

    def decoded(tokens: Sequence[int]) -> str:
        text: str = tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    trials: list[Trial] = []
    for group, position in plan.groups:
        original = words(decoded(plan.ids[position + 1 : position + 1 + plan.limits[position]]))
        for (at, candidate), continuation in zip(plan.replacements, continuations, strict=True):
            if at != position:
                continue
            text = decoded(continuation)
            trials.append(
                Trial(
                    group=group,
                    position=position - plan.prompt_len,
                    fai=plan.fai[position],
                    original_id=plan.ids[position],
                    original_token=tokenizer.decode([plan.ids[position]]),
                    replacement_id=candidate.token,
                    replacement_token=tokenizer.decode([candidate.token]),
                    candidate=candidate.rank,
                    probability=candidate.probability,
                    jaccard=jaccard(original, words(text)),
                    continuation=text,
                    finished=(candidate.token, *continuation)[-1] in ends,
                )
            )
    return _result(tuple(trials), eligible=plan.eligible)


def eligible_positions(fai: Sequence[float], prompt_len: int, min_following: int) -> list[int]:
    """Response positions with a defined FAI and at least `min_following` tokens after them, ascending."""
    return [t for t in range(prompt_len, len(fai) - min_following) if not math.isnan(fai[t])]


def extremes(fai: Sequence[float], eligible: Sequence[int], k: int) -> list[tuple[Group, int]]:
    """The k eligible positions of highest FAI, the highest first, then the k of lowest, the lowest first.

    Ties go to the earlier position. With fewer than 2k eligible positions, half of them (rounded down) are top and the
    same number bottom, so that none is both.
    """
    k = min(k, len(eligible) // 2)
    top = sorted(eligible, key=lambda t: (-fai[t], t))[:k]
    bottom = sorted(set(eligible).difference(top), key=lambda t: (fai[t], t))[:k]
    return [*(("top", t) for t in top), *(("bottom", t) for t in bottom)]


def matched_positions(fai: Sequence[float], eligible: Sequence[int], top: Sequence[int]) -> list[int]:
    """For each of the `top` positions, in order, the nearest one not taken yet of the eligible half with lower FAI.

    Of two at the same distance the one with lower FAI is taken, then the earlier. `top` is at most half of the eligible
    positions, as from `extremes`; their other half, rounded down, is that of lower FAI.
    """
    lower = set(sorted(set(eligible).difference(top), key=lambda t: (fai[t], t))[: len(eligible) // 2])
    matched: list[int] = []
    for position in top:
        nearest = min(lower, key=lambda t: (abs(t - position), fai[t], t))
        lower.remove(nearest)
        matched.append(nearest)
    return matched


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
