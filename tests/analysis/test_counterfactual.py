"""Counterfactuals of a model whose continuation depends on exactly one token of the response."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot
from transformers import DynamicCache, Qwen3Config

from rhythm.analysis.counterfactual import (
    Candidate,
    CounterfactualConfig,
    CounterfactualResult,
    Scored,
    candidates,
    counterfactuals,
    eligible_positions,
    extremes,
    matched_positions,
)
from rhythm.tiny.model import TinyModelConfig, build_model, build_tokenizer

PROMPT = "Say:"
STORY = "go A: then red 20 green blue days, the red end"
OTHER_STORY = "go ?: then iron 20 lead blue, and no tin. So lead"
KEY = STORY.index("A")
P = 1 + len(PROMPT)  # the begin token in front
# Content words after the key.
WORDS = {"red", "20", "green", "blue", "days", "end"}
OTHER_WORDS = {"iron", "20", "lead", "blue", "tin"}
EXPECTED = len(WORDS & OTHER_WORDS) / len(WORDS | OTHER_WORDS)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer()


class Storyteller(nn.Module):
    """Tells STORY where the token at the key, as its cache has it, is "A", and OTHER_STORY otherwise.

    A causal language model as transformers has them: keys of the cache hold the tokens, values their positions.
    Next after the story's own token it likes "x", "y", "z", each two nats less than the one before.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.config = Qwen3Config(num_hidden_layers=1, max_position_embeddings=200)
        self.generation_config = SimpleNamespace(eos_token_id=[tokenizer.eos_token_id])
        self.device = torch.device("cpu")
        self.vocabulary = len(tokenizer) + 3  # as models have them, more than the tokenizer knows
        self.key, self.decisive = P + KEY, tokenizer.convert_tokens_to_ids("A")
        self.liked = tokenizer.convert_tokens_to_ids(["x", "y", "z"])
        self.stories = torch.full((2, 200), tokenizer.eos_token_id)  # each ends right after its text
        for row, story in enumerate((STORY, OTHER_STORY)):
            told = tokenizer(story, add_special_tokens=False, return_tensors="pt").input_ids[0]
            self.stories[row, P : P + len(told)] = told

    def can_generate(self) -> bool:
        return True

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        use_cache: bool = False,
        logits_to_keep: Tensor | int = 0,
    ) -> SimpleNamespace:
        assert use_cache
        assert past_key_values is not None
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1])[None].expand_as(input_ids)
        tokens_BT, positions_BT = (
            x[:, 0, :, 0]
            for x in past_key_values.update(input_ids[:, None, :, None], position_ids[:, None, :, None], 0)
        )
        seen_BT = torch.ones_like(tokens_BT) if attention_mask is None else attention_mask
        assert seen_BT.shape == tokens_BT.shape
        other_BT = seen_BT.bool() & (positions_BT == self.key) & (tokens_BT != self.decisive)
        # What comes next does not depend on what comes later.
        other_BQ = (other_BT[:, None] & (positions_BT[:, None] <= position_ids[..., None])).any(dim=-1).long()
        next_BQ = self.stories[other_BQ, position_ids + 1]
        logits_BQV = 9.0 * one_hot(next_BQ, self.vocabulary)
        for rank, token in enumerate(self.liked):
            logits_BQV[..., token] = torch.maximum(logits_BQV[..., token], torch.tensor(7.0 - 2 * rank))
        logits_BQV[..., -1] = 8.0  # a token that the tokenizer does not know
        if isinstance(logits_to_keep, Tensor):
            logits_BQV = logits_BQV[:, logits_to_keep]
        return SimpleNamespace(logits=logits_BQV)


def told(tokenizer: Any, story: str = STORY, finished: bool = True) -> Tensor:
    """Prompt and response as tokens."""
    return torch.tensor(tokenizer(PROMPT + story).input_ids + [tokenizer.eos_token_id] * finished)


def fai_with(ids_N: Tensor, high: dict[int, float], else_: float = 0.5) -> Tensor:
    """FAI that is `else_` at all response tokens but those of `high`, which are offsets in the response."""
    fai_N = torch.full((len(ids_N),), else_)
    fai_N[:P] = torch.nan
    for offset, value in high.items():
        fai_N[P + offset] = value
    return fai_N


def run(tokenizer: Any, fai: dict[int, float], finished: bool = True, **settings: Any) -> CounterfactualResult:
    ids_N = told(tokenizer, finished=finished)
    settings = {"candidates": 2, "rows_at_once": 3} | settings
    return alone(Storyteller(tokenizer), tokenizer, ids_N, fai_with(ids_N, fai), **settings)


def alone(
    model: Any, tokenizer: Any, ids: Any, fai_N: Tensor, prompt_len: int = P, **settings: Any
) -> CounterfactualResult:
    """The counterfactuals of one response, by default at one position and without matched ones."""
    config = CounterfactualConfig(**{"positions": 1, "matched": False} | settings)
    (result,) = counterfactuals(model, tokenizer, [Scored(ids, prompt_len, fai_N)], config)
    return result


@pytest.mark.parametrize("elsewhere", [0, 1, KEY + 4, 20])
def test_only_the_token_that_decides_changes_what_follows(tokenizer: Any, elsewhere: int) -> None:
    high_at_key = run(tokenizer, {KEY: 0.9, elsewhere: 0.1})
    assert [(t.group, t.position) for t in high_at_key.trials] == [("top", KEY)] * 2 + [("bottom", elsewhere)] * 2
    assert high_at_key.top == pytest.approx(EXPECTED)
    assert high_at_key.bottom == 1
    assert high_at_key.top_below_bottom == 1
    # The other way round, were FAI high where nothing is decided:
    low_at_key = run(tokenizer, {KEY: 0.1, elsewhere: 0.9})
    assert low_at_key.top == 1
    assert low_at_key.bottom == pytest.approx(EXPECTED)
    assert low_at_key.top_below_bottom == 0


def test_a_trial_says_what_was_done(tokenizer: Any) -> None:
    result = run(tokenizer, {KEY: 0.75, 20: 0.25})
    first, second = result.trials[:2]
    assert (first.original_token, first.original_id) == ("A", tokenizer.convert_tokens_to_ids("A"))
    assert (first.replacement_token, second.replacement_token) == ("x", "y")
    assert first.replacement_id == tokenizer.convert_tokens_to_ids("x")
    # "A" is the likeliest; what the tokenizer does not know has no say.
    assert (first.candidate, second.candidate) == (2, 3)
    total = math.exp(9) + math.exp(7) + math.exp(5) + math.exp(3) + (len(tokenizer) - 4)
    assert first.probability == pytest.approx(math.exp(7) / total)
    assert second.probability == pytest.approx(math.exp(5) / total)
    assert (first.fai, result.trials[2].fai) == (0.75, 0.25)
    assert first.continuation == OTHER_STORY[KEY + 1 :]
    assert first.finished
    assert result.trials[2].continuation == STORY[21:]
    assert result.eligible == len(STORY)  # all but the end token, which nothing follows


def test_the_highest_come_first_and_each_is_tried_with_every_candidate(tokenizer: Any) -> None:
    result = run(tokenizer, {KEY: 0.8, 9: 0.9, 10: 0.2, 12: 0.1}, positions=2, candidates=3)
    assert [t.position for t in result.trials] == [9] * 3 + [KEY] * 3 + [12] * 3 + [10] * 3
    assert [t.replacement_token for t in result.trials] == ["x", "y", "z"] * 4
    assert result.top == pytest.approx((1 + EXPECTED) / 2)
    assert result.top_below_bottom == pytest.approx(1 / 2)  # the other half are ties


def test_both_sides_are_cut_at_the_longest_continuation(tokenizer: Any) -> None:
    result = run(tokenizer, {KEY: 0.9, 20: 0.1}, max_new_tokens=14)
    top, bottom = result.trials[0], result.trials[2]
    assert top.continuation == OTHER_STORY[KEY + 1 : KEY + 15] == ": then iron 20"
    assert not top.finished
    assert STORY[KEY + 1 : KEY + 15] == ": then red 20 "
    assert top.jaccard == pytest.approx(1 / 3)  # 20 of red, 20, iron
    assert bottom.jaccard == 1


def test_an_unfinished_response_is_continued_no_further_than_it_goes(tokenizer: Any) -> None:
    ids_N = told(tokenizer, story=STORY[:30], finished=False)
    fai_N = fai_with(ids_N, {KEY: 0.9, 20: 0.1})
    result = alone(Storyteller(tokenizer), tokenizer, ids_N, fai_N, candidates=1)
    assert [t.continuation for t in result.trials] == [OTHER_STORY[KEY + 1 : 30], STORY[21:30]]
    assert not any(t.finished for t in result.trials)
    assert result.bottom == 1


def test_the_models_context_ends_a_continuation(tokenizer: Any) -> None:
    model = Storyteller(tokenizer)
    ids_N = told(tokenizer)
    model.config.max_position_embeddings = len(ids_N) + 1
    result = alone(model, tokenizer, ids_N, fai_with(ids_N, {KEY: 0.9, 20: 0.1}))
    room = len(ids_N) + 1 - (P + KEY) - 1
    assert len(OTHER_STORY) - KEY - 1 > room  # or this tests nothing
    assert {t.continuation for t in result.trials[:3]} == {OTHER_STORY[KEY + 1 :][:room]}
    model.config.max_position_embeddings = len(ids_N) - 1
    with pytest.raises(ValueError, match=f"input_ids has {len(ids_N)} tokens: the model's context is {len(ids_N) - 1}"):
        alone(model, tokenizer, ids_N, fai_with(ids_N, {}))


def test_special_tokens_are_candidates_only_if_asked_for(tokenizer: Any) -> None:
    model = Storyteller(tokenizer)
    model.liked[0] = tokenizer.eos_token_id
    ids_N = told(tokenizer)
    fai_N = fai_with(ids_N, {KEY: 0.9, 20: 0.1})
    without = alone(model, tokenizer, ids_N, fai_N, candidates=1)
    assert {t.replacement_token for t in without.trials} == {"y"}
    with_ = alone(model, tokenizer, ids_N, fai_N, candidates=1, special_tokens=True)
    for trial in with_.trials:
        assert trial.replacement_id == tokenizer.eos_token_id
        assert (trial.continuation, trial.finished, trial.jaccard) == ("", True, 0)


def test_words_are_what_the_config_says(tokenizer: Any) -> None:
    only_numbers = run(tokenizer, {KEY: 0.9, 20: 0.1}, word_pattern=r"\d+")
    assert only_numbers.top == 1
    assert math.isnan(only_numbers.bottom)  # no number after 20 on either side: undefined, and left out
    assert math.isnan(only_numbers.trials[2].jaccard)
    assert math.isnan(only_numbers.top_below_bottom)
    fewer = run(tokenizer, {KEY: 0.9, 20: 0.1}, stop_words=("THEN", "the", "and", "no", "so", "tin", "days"))
    assert fewer.top == pytest.approx(2 / 7)


def test_where_nothing_is_eligible_nothing_is_tried(tokenizer: Any) -> None:
    ids_N = told(tokenizer)
    result = alone(Storyteller(tokenizer), tokenizer, ids_N, torch.full((len(ids_N),), torch.nan), matched=True)
    assert (result.trials, result.eligible) == ((), 0)
    assert math.isnan(result.top)
    assert math.isnan(result.bottom)


def test_eligible_positions() -> None:
    nan = math.nan
    fai = [0.9, 0.9, nan, 0.1, 0.2, nan, 0.3, 0.4]
    assert eligible_positions(fai, 2, 1) == [3, 4, 6]
    assert eligible_positions(fai, 1, 2) == [1, 3, 4]


def test_extremes_break_ties_by_position_and_never_overlap() -> None:
    fai = [0.3, 0.1, 0.9, 0.1, 0.9, 0.5]
    assert extremes(fai, range(6), 2) == [("top", 2), ("top", 4), ("bottom", 1), ("bottom", 3)]
    assert extremes(fai, range(6), 1) == [("top", 2), ("bottom", 1)]
    assert extremes(fai, [0, 1, 5], 5) == [("top", 5), ("bottom", 1)]  # three: one each
    assert extremes(fai, [5], 5) == []
    assert extremes([1.0] * 4, range(4), 2) == [("top", 0), ("top", 1), ("bottom", 2), ("bottom", 3)]


def test_matched_positions_are_the_nearest_of_low_fai() -> None:
    fai = [0.9, 0.4, 0.8, 0.1, 0.2, 0.7, 0.3, 0.6, 0.05, 0.5]
    assert matched_positions(fai, range(10), [0, 2]) == [1, 3]  # lower half: 1, 3, 4, 6, 8
    assert matched_positions(fai, range(10), [5, 7]) == [4, 8]  # 4 before 6, and 8 before 6, by their FAI
    assert matched_positions(fai, range(10), [2, 0]) == [3, 1]  # in the order of the top ones
    assert matched_positions([1.0] * 4, range(4), [0, 1]) == [2, 3]
    assert matched_positions(fai, [], []) == []


def test_matched_trials_are_those_of_their_positions(tokenizer: Any) -> None:
    """The key is decisive, has low FAI, and stands beside the token of highest FAI."""
    result = run(tokenizer, {KEY: 0.1, KEY + 1: 0.9, 20: 0.05}, matched=True)
    assert [(t.group, t.position) for t in result.trials[::2]] == [("top", KEY + 1), ("bottom", 20), ("matched", KEY)]
    assert [t.jaccard for t in result.trials] == pytest.approx([1, 1, 1, 1, EXPECTED, EXPECTED])
    both = run(tokenizer, {KEY: 0.1, KEY + 1: 0.9}, matched=True).trials  # the lowest is also the nearest
    assert [(t.group, t.position) for t in both[2:]] == [("bottom", KEY)] * 2 + [("matched", KEY)] * 2
    assert [t.continuation for t in both[2:4]] == [t.continuation for t in both[4:]]


def test_responses_together_are_as_each_alone(tokenizer: Any) -> None:
    model = build_model(
        TinyModelConfig(layers=2, hidden_size=32, mlp_size=48, query_heads=4, key_heads=2, head_size=16), tokenizer
    )
    with torch.no_grad():  # fresh weights attend to everything alike, and then a wrong prefix would not show
        for name, weight in model.named_parameters():
            if "self_attn" in name:
                weight.mul_(10)
    long, short = told(tokenizer), told(tokenizer, story=OTHER_STORY[9:31], finished=False)
    none = torch.full((len(short),), torch.nan)
    scored = [
        Scored(short, P, fai_with(short, {t: t * 0.01 for t in range(20)})),
        Scored(short, P, none),
        Scored(long, P, fai_with(long, {t: (7 * t % 11) * 0.01 for t in range(len(STORY))})),
    ]
    config = CounterfactualConfig(positions=3, max_new_tokens=9)
    together = counterfactuals(model, tokenizer, scored, config)
    assert [len(result.trials) for result in together] == [27, 0, 27]
    assert repr(together) == repr([counterfactuals(model, tokenizer, [one], config)[0] for one in scored])


def test_candidates_are_ranked_in_the_whole_vocabulary() -> None:
    logits_V = torch.tensor([1.0, 4.0, 3.0, 3.0, 2.0])
    share = logits_V.softmax(0).tolist()
    assert candidates(logits_V, {1, 3}, 2) == [Candidate(2, 2, share[2]), Candidate(4, 4, share[4])]
    assert [c.token for c in candidates(logits_V, (), 3)] == [1, 2, 3]
    assert [c.token for c in candidates(logits_V, {0, 1, 2}, 5)] == [3, 4]


def test_a_pass_over_the_sequence_and_then_only_new_tokens(tokenizer: Any) -> None:
    """On a real model, and the same trials however many run at once."""
    model = build_model(
        TinyModelConfig(layers=2, hidden_size=32, mlp_size=48, query_heads=4, key_heads=2, head_size=16), tokenizer
    )
    ids_N = told(tokenizer)
    fai_N = fai_with(ids_N, {t: t * 0.01 for t in range(len(STORY))})
    calls: list[int] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs["input_ids"].numel()), with_kwargs=True)
    results = []
    for rows_at_once in (1, 7, 64):
        calls.clear()
        settings = {"positions": 5, "max_new_tokens": 8, "rows_at_once": rows_at_once}
        results.append(alone(model, tokenizer, ids_N.tolist(), fai_N, **settings))
        last = P + max(trial.position for trial in results[-1].trials)
        assert calls[0] == last
        assert sum(calls) <= last + 30 * 8
    assert repr(results[0]) == repr(results[1]) == repr(results[2])  # NaN is not equal to itself
    assert len(results[0].trials) == 30


def test_bad_arguments_are_named(tokenizer: Any) -> None:
    model, ids_N = Storyteller(tokenizer), told(tokenizer)
    fai_N = fai_with(ids_N, {})
    with pytest.raises(ValueError, match=r"prompt_len is 0: must be from 1"):
        alone(model, tokenizer, ids_N, fai_N, prompt_len=0)
    with pytest.raises(ValueError, match=f"prompt_len is {len(ids_N)}: must be from 1 to {len(ids_N) - 1}"):
        alone(model, tokenizer, ids_N, fai_N, prompt_len=len(ids_N))
    with pytest.raises(ValueError, match=r"fai has shape \[3\]"):
        alone(model, tokenizer, ids_N, fai_N[:3])
    with pytest.raises(ValueError, match="input_ids has shape"):
        alone(model, tokenizer, ids_N[None], fai_N)
    with pytest.raises(ValueError, match="is not a regular expression"):
        CounterfactualConfig(word_pattern="(")
    with pytest.raises(ValueError, match="candidates"):
        CounterfactualConfig(candidates=0)
