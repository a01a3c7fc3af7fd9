from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import rhythm
from rhythm.credit.config import CreditConfig
from rhythm.credit.gamma import batch_credit_weights
from rhythm.tap.rhythm_credit import RhythmCredit
from rhythm.tap.signals_config import SignalsConfig


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.3,
    )
    return transformers.Qwen3ForCausalLM(config).eval()


PROMPT_LENS, LENGTHS, T = [6, 0, 9], [40, 31, 22], 40


def batch(left: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids, attention_mask and response_mask of three rows of 40, 31 and 22 tokens."""
    input_ids = torch.randint(0, 61, (3, T), generator=torch.Generator().manual_seed(1))
    attention_mask, response_mask = torch.zeros(2, 3, T, dtype=torch.int64)
    for i, (prompt_len, length) in enumerate(zip(PROMPT_LENS, LENGTHS, strict=True)):
        start = T - length if left else 0
        if left:
            input_ids[i] = input_ids[i].roll(start)
        attention_mask[i, start : start + length] = 1
        response_mask[i, start + prompt_len : start + length] = 1
    return input_ids, attention_mask, response_mask


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("strategy", ["local_chunk", "global_anchor", "coupled", "entropy"])
def test_gamma_is_that_of_each_response_alone(model: Any, strategy: Any, left: bool) -> None:
    input_ids, attention_mask, response_mask = batch(left)
    gamma = RhythmCredit(strategy=strategy, top_fraction=0.3)(model, input_ids, attention_mask, response_mask)
    assert gamma.shape == (3, T)
    assert gamma.dtype == torch.float32
    assert not gamma.requires_grad
    for i, prompt_len in enumerate(PROMPT_LENS):
        row = input_ids[i, attention_mask[i].bool()]
        signals = rhythm.observe(model, row[None], prompt_lens=[prompt_len], entropy=True)
        assert signals.entropy is not None
        alone = rhythm.credit_weights(
            signals.waad[0, prompt_len:],
            signals.fai[0, prompt_len:],
            entropy=signals.entropy[0, prompt_len:],
            strategy=strategy,
            q=0.3,
        )
        response = response_mask[i].bool()
        assert gamma[i, response].equal(alone)
        assert (gamma[i, ~response] == 1).all()
        assert 1 < gamma[i, response].max() <= 2


def test_observe_options_reach_observe(model: Any) -> None:
    input_ids, attention_mask, response_mask = batch()
    options = SignalsConfig(layers=[0, 5], window=3, horizon=(1, 4), quantile=0.5, grouping="batch")
    config = CreditConfig(strategy="global_anchor")
    gamma = RhythmCredit(config, signals=options)(model, input_ids, attention_mask, response_mask)
    signals = rhythm.observe(model, input_ids, attention_mask=attention_mask, prompt_lens=PROMPT_LENS, signals=options)
    for i in range(3):
        response = response_mask[i].bool()
        alone = rhythm.credit_weights(signals.waad[i, response], signals.fai[i, response], strategy="global_anchor")
        assert gamma[i, response].equal(alone)
    fixed = RhythmCredit(config, signals=options, groups=signals.groups)
    assert fixed(model, input_ids, attention_mask, response_mask).equal(gamma)
    default = RhythmCredit(config)(model, input_ids, attention_mask, response_mask)
    assert not default.equal(gamma)


def test_no_attention_mask_is_no_padding(model: Any) -> None:
    input_ids, _, _ = batch()
    response_mask = torch.arange(T).expand(3, T) >= torch.tensor([[5], [0], [39]])
    credit = RhythmCredit(strategy="coupled")
    without = credit(model, input_ids, None, response_mask)
    assert without.equal(credit(model, input_ids, torch.ones(3, T), response_mask))
    assert (without != 1).any(dim=1).tolist() == [True, True, False]


def test_rows_without_a_response_keep_one(model: Any) -> None:
    input_ids, attention_mask, response_mask = batch()
    response_mask[1] = 0
    gamma = RhythmCredit(strategy="coupled")(model, input_ids, attention_mask, response_mask)
    assert (gamma[1] == 1).all()
    assert (gamma[0] > 1).any()


def test_generator_of_the_random_strategy(model: Any) -> None:
    def gamma(seed: int) -> Tensor:
        credit = RhythmCredit(strategy="random", generator=torch.Generator().manual_seed(seed))
        return credit(model, *batch())

    assert gamma(0).equal(gamma(0))
    assert not gamma(0).equal(gamma(1))


def changed(mask: Tensor, row: int, position: int) -> Tensor:
    mask = mask.clone()
    mask[row, position] = 1 - mask[row, position]
    return mask


@pytest.mark.parametrize(("row", "position"), [(0, 20), (0, 39), (0, 2), (2, 30), (1, 31)])
def test_response_must_be_the_end_of_the_row(model: Any, row: int, position: int) -> None:
    input_ids, attention_mask, response_mask = batch()
    with pytest.raises(ValueError, match="response_mask must mark the last tokens of each row, in one run"):
        RhythmCredit()(model, input_ids, attention_mask, changed(response_mask, row, position))


def test_bad_arguments_are_named(model: Any) -> None:
    input_ids, attention_mask, response_mask = batch()
    credit = RhythmCredit()
    assert credit.config == CreditConfig()
    for arguments, message in [
        ((input_ids[0], attention_mask, response_mask), "input_ids has shape [40]"),
        (
            (input_ids, attention_mask[:2], response_mask),
            "attention_mask has shape [2, 40]; it must be [3, 40]",
        ),
        ((input_ids, None, response_mask[:, 1:]), "response_mask has shape [3, 39]; it must be [3, 40]"),
        ((input_ids, changed(attention_mask, 0, 3), response_mask), "attention_mask has padding between"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            credit(model, *arguments)
    with pytest.raises(ValueError, match="config is given, and so are top_fraction, alpha"):
        RhythmCredit(CreditConfig(), top_fraction=0.1, alpha=0.2)
    with pytest.raises(ValueError, match=re.escape("window is an option of signals: SignalsConfig(window=…)")):
        RhythmCredit(strategy="coupled", window=3)
    with pytest.raises(ValueError, match="q is now top_fraction"):
        RhythmCredit(strategy="coupled", q=0.3)
    with pytest.raises(ValueError, match="gama_amp"):
        RhythmCredit(gama_amp=2)


def test_calibrated_groups_are_those_of_the_first_batch(model: Any) -> None:
    input_ids, attention_mask, response_mask = batch()
    credit = RhythmCredit(strategy="coupled", signals=SignalsConfig(grouping="calibrated"))
    shared = RhythmCredit(strategy="coupled", signals=SignalsConfig(grouping="batch"))
    first = (model, input_ids[:1], attention_mask[:1], response_mask[:1])
    later = (model, input_ids[1:], attention_mask[1:], response_mask[1:])
    assert credit(*first).equal(shared(*first))
    kept = credit.groups
    assert kept is not None
    assert kept.local.shape[0] == 1
    fixed = RhythmCredit(strategy="coupled", groups=kept)
    assert credit(*later).equal(fixed(*later))
    assert credit.groups is kept


@pytest.mark.parametrize(
    ("strategy", "passes", "taps"), [("none", 0, 0), ("random", 0, 0), ("entropy", 1, 0), ("coupled", 1, 1)]
)
def test_no_more_runs_than_the_strategy_reads(
    model: Any, strategy: str, passes: int, taps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    input_ids, attention_mask, response_mask = batch()
    seen = {"passes": 0, "taps": 0}

    def count(what: str) -> Any:
        def add(*_: Any) -> None:
            seen[what] += 1

        return add

    enter = rhythm.AttentionTap.__enter__
    monkeypatch.setattr(rhythm.AttentionTap, "__enter__", lambda tap: [count("taps")(), enter(tap)][1])
    hook = model.model.layers[0].register_forward_pre_hook(count("passes"))
    credit = RhythmCredit(strategy=strategy, generator=torch.Generator().manual_seed(0))
    gamma = credit(model, input_ids, attention_mask, response_mask)
    hook.remove()
    assert seen == {"passes": passes, "taps": taps}
    # The same γ as from all signals.
    signals = rhythm.observe(model, input_ids, attention_mask=attention_mask, response_mask=response_mask, entropy=True)
    expected = batch_credit_weights(signals, response_mask, credit.config, torch.Generator().manual_seed(0))
    assert gamma.equal(expected)
    with pytest.raises(ValueError, match="response_mask must mark the last tokens of each row"):
        credit(model, input_ids, attention_mask, changed(response_mask, 0, 39))
