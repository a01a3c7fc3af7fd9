"""Credit of equal mass: `mass`, `mean_preserving` and `random_like`, worked by hand."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor

from rhythm.credit.config import CreditConfig
from rhythm.credit.gamma import batch_credit_weights
from rhythm.credit.heads import HeadGroups
from rhythm.credit.random_like import BINS, positions_like
from rhythm.credit.signals import RhythmSignals
from rhythm.credit.strategies import STRATEGIES

NAN = math.nan
# Two responses, of 5 and 3 tokens, in rows of 6. FAI is undefined at the last two tokens of each.
MASK = torch.tensor([[0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0]]).bool()
WAAD = torch.tensor([[NAN, 3, 1, 2, 2, 5], [NAN, NAN, 1, 4, 4, NAN]], dtype=torch.float32)
FAI = torch.tensor([[NAN, 0.1, 0.3, 0.2, NAN, NAN], [NAN, NAN, 0.5, NAN, NAN, NAN]])
ENTROPY = torch.tensor([[9, 0.5, 2.0, 0.1, 1.0, 0.2], [9, 9, 0.3, 0.2, 0.9, 9]])


def signals(waad: Tensor = WAAD, fai: Tensor = FAI) -> RhythmSignals:
    heads = torch.zeros(len(waad), 1, dtype=torch.bool)
    return RhythmSignals(waad=waad, fai=fai, entropy=None, span=heads.float(), groups=HeadGroups(heads, heads))


def gamma(**options: object) -> Tensor:
    config = CreditConfig.model_validate(options)
    return batch_credit_weights(signals(), MASK, config, torch.Generator().manual_seed(0), entropy=ENTROPY)


def test_matched_by_hand() -> None:
    # FAI: ⌈0.4·3⌉ = 2 and ⌈0.4·1⌉ = 1 anchors, 3 of 8 tokens. Σ(γ − 1) is to be 0.5·0.4·8 = 1.6, so 1.6/3 each.
    expected = torch.ones(2, 6)
    expected[0, 2] = expected[0, 3] = expected[1, 2] = 1 + 1.6 / 3
    torch.testing.assert_close(gamma(strategy="global_anchor", mass="matched"), expected, rtol=1e-6, atol=0)
    expected[expected > 1] = 1.5
    assert torch.equal(gamma(strategy="global_anchor", mass="as_is"), expected)
    # Entropy: ⌈0.4·5⌉ + ⌈0.4·3⌉ = 4 tokens, of which each gets 1.6/4.
    expected = torch.ones(2, 6)
    expected[0, 2] = expected[0, 4] = expected[1, 2] = expected[1, 4] = 1.4
    torch.testing.assert_close(gamma(strategy="entropy", mass="matched"), expected, rtol=1e-6, atol=0)


def test_plain_grpo_of_the_same_mass_is_a_larger_step() -> None:
    expected = torch.where(MASK, 1.2, 1.0)
    assert torch.equal(gamma(strategy="none", mass="matched"), expected)
    assert torch.equal(gamma(strategy="none"), torch.ones(2, 6))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("options", [{"gamma_amp": 3.0, "top_fraction": 0.25}, {"alpha": 0.1}])
def test_matched_strategies_have_one_mass(strategy: str, options: dict[str, float]) -> None:
    weights = gamma(strategy=strategy, mass="matched", **options)
    mean = (options.get("gamma_amp", 1.5) - 1) * options.get("top_fraction", 0.4)
    assert float((weights - 1)[MASK].double().mean()) == pytest.approx(mean, rel=1e-6)
    assert (weights[~MASK] == 1).all()
    # The shares of the tokens in it are those of the strategy as it is.
    as_is = gamma(strategy=strategy, **options) - 1
    if strategy != "none":
        torch.testing.assert_close((weights - 1) / (weights - 1).max(), as_is / as_is.max())


def test_matched_is_of_the_whole_batch_wherever_its_rows_are() -> None:
    """Rows alone, with the sums of both, have the γ that they have together; alone and by themselves another."""
    config = CreditConfig(strategy="global_anchor", mass="matched")
    together = batch_credit_weights(signals(), MASK, config)
    sums: list[Tensor] = []

    def note(x: Tensor) -> Tensor:
        sums.append(x)
        return x

    alone = [
        batch_credit_weights(signals(WAAD[[row]], FAI[[row]]), MASK[[row]], config, whole_batch=note) for row in (0, 1)
    ]
    assert not torch.equal(torch.cat(alone), together)
    total = sum(sums)
    apart = [
        batch_credit_weights(signals(WAAD[[row]], FAI[[row]]), MASK[[row]], config, whole_batch=lambda x: total)
        for row in (0, 1)
    ]
    assert torch.equal(torch.cat(apart), together)


def test_where_nothing_is_selected_nothing_is_scaled() -> None:
    undefined = torch.full_like(FAI, NAN)
    config = CreditConfig(strategy="global_anchor", mass="matched")
    assert torch.equal(batch_credit_weights(signals(WAAD, undefined), MASK, config), torch.ones(2, 6))


def test_mean_preserving_by_hand() -> None:
    # Row 0: 2 of 5 tokens have 1.5, mean 1.2; row 1: 1 of 3, mean 3.5/3.
    expected = torch.ones(2, 6)
    expected[0, 1:] = torch.tensor([1, 1.5, 1.5, 1, 1]) / 1.2
    expected[1, 2:5] = torch.tensor([1.5, 1, 1]) / (3.5 / 3)
    torch.testing.assert_close(gamma(strategy="global_anchor", mean_preserving=True), expected, rtol=1e-6, atol=0)
    assert torch.equal(gamma(strategy="none", mean_preserving=True), torch.ones(2, 6))


# --- random_like


def batch_of(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """(response, chosen): responses after prompts of unlike lengths; chosen falls off linearly and never at the end."""
    generator = torch.Generator().manual_seed(seed)
    response = torch.zeros(len(lengths), max(lengths) + 3, dtype=torch.bool)
    chosen = torch.zeros_like(response)
    for row, n in enumerate(lengths):
        first = row % 4
        response[row, first : first + n] = True
        place = (torch.arange(n) + 0.5) / n
        chosen[row, first : first + n] = torch.rand(n, generator=generator) < (0.75 - place).clamp(min=0) * 1.3
    return response, chosen


def test_as_many_positions_in_each_response_and_the_same_distribution() -> None:
    response, chosen = batch_of([40] * 120 + [17, 0, 1, 80])
    draws = torch.stack([positions_like(chosen, response, torch.Generator().manual_seed(s)) for s in range(60)])
    assert draws.dtype == torch.bool
    assert not draws[:, ~response].any()
    assert torch.equal(draws.sum(dim=-1), chosen.sum(dim=-1).expand(60, -1))
    # Of 40 tokens two lie in each bin: as often as they are chosen over all responses, to 5 standard errors.
    rows = [torch.stack([x[row, row % 4 : row % 4 + 40] for row in range(120)]) for x in (chosen, *draws)]
    rate = rows[0].float().view(120, BINS, 2).mean(dim=(0, 2))
    drawn = torch.stack(rows[1:]).float().mean(dim=(0, 1)).view(BINS, 2)
    error = (rate * (1 - rate) / (60 * 120)).sqrt()[:, None]
    assert (rate[0] > 0.8) & (rate[-4:] == 0).all()
    assert (drawn - rate[:, None]).abs().le(5 * error + 0.03).all()  # 0.03: four rows more, and rows of other sums
    assert (drawn[-4:] == 0).all()
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], chosen)


def test_inclusion_is_capped_at_one_and_scaled_to_the_count() -> None:
    """Rates 1, ½, ¼ over bins of one token: a row that chose both tokens of two bins takes the first always."""
    response = torch.ones(4, BINS, dtype=torch.bool)
    chosen = torch.zeros_like(response)
    chosen[:, 0] = True
    chosen[:2, 1] = True
    chosen[0, 2] = True
    # Row 0 wants 3 of rates (1, ½, ¼): all. Row 1 wants 2: 1 + λ(½ + ¼) = 2, λ = 4/3. Row 2 wants 1: λ = 4/7.
    draws = torch.stack([positions_like(chosen, response, torch.Generator().manual_seed(s)) for s in range(4000)])
    share = draws.float().mean(dim=0)[:, :3]
    assert share[0].tolist() == [1, 1, 1]
    torch.testing.assert_close(share[1], torch.tensor([1, 2 / 3, 1 / 3]), rtol=0, atol=0.04)
    torch.testing.assert_close(share[2], torch.tensor([4 / 7, 2 / 7, 1 / 7]), rtol=0, atol=0.04)
    assert draws[:, :, 3:].sum() == 0


def test_the_control_of_a_strategy() -> None:
    """As many tokens as coupled gives a bonus, all with the whole one; none where FAI is undefined."""
    coupled = gamma(strategy="coupled") > 1
    like = gamma(strategy="random", random_like="coupled")
    assert torch.equal((like > 1).sum(dim=-1), coupled.sum(dim=-1))
    assert set(like.unique().tolist()) == {1.0, 1.5}
    assert (gamma(strategy="random", random_like="global_anchor")[:, 4:] == 1).all()
    # Rates are those of all processes: with responses elsewhere whose choice is always at nine tenths, so is this one.
    elsewhere = torch.zeros(2, BINS, dtype=torch.float64)
    elsewhere[0, 18] = 1e9
    elsewhere[1] = 1e9
    config = CreditConfig(strategy="random", random_like="entropy", top_fraction=0.1)
    drawn = batch_credit_weights(None, MASK, config, entropy=ENTROPY, whole_batch=lambda x: x + elsewhere)
    assert drawn[0].tolist() == [1, 1, 1, 1, 1, 1.5]  # the middle of the last of 5 tokens: (4 + ½)/5
    assert CreditConfig(strategy="random", random_like="entropy").reads == {"entropy"}
    assert CreditConfig(strategy="random", random_like="coupled").reads == {"attention"}
    with pytest.raises(ValueError, match='signals is None; the strategy "coupled" needs them'):
        batch_credit_weights(None, MASK, CreditConfig(strategy="random", random_like="coupled"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mass": "equal"}, "mass"),
        ({"mass": "matched", "mean_preserving": True}, "mass is matched, and mean_preserving true"),
        ({"random_like": "coupled"}, "random_like is 'coupled', which needs strategy random, not 'coupled'"),
        (
            {"strategy": "random", "random_like": "random"},
            "must be one of entropy, local_chunk, global_anchor, coupled",
        ),
        ({"strategy": "random", "random_like": "couple"}, "or null, got 'couple'"),
    ],
)
def test_what_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        CreditConfig.model_validate(options)
