from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rhythm.credit.advantages import AdvantageConfig, gamma_share, group_advantages, token_advantages

NAN = math.nan


def close(actual: Tensor, expected: list[float] | list[list[float]]) -> None:
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-6, atol=1e-6)


def test_group_advantages() -> None:
    # Group 7: 1, 0, 0, 1. Mean ½; deviation √(4·¼/3) = 0.5773503; ½/0.5774503 = 0.8658754.
    # Group 2: 1, 0, 0. Mean ⅓; squares 4/9 + 1/9 + 1/9 = ⅔, deviation √(⅔/2) = 0.5773503;
    #          ⅔/0.5774503 = 1.1545006, −⅓/0.5774503 = −0.5772503.
    rewards = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0])
    group = torch.tensor([7, 2, 7, 2, 7, 7, 2])
    expected = [0.8658754, 1.1545006, -0.8658754, -0.5772503, -0.8658754, 0.8658754, -0.5772503]
    close(group_advantages(rewards, group), expected)
    # Dr. GRPO: the mean is subtracted, no more.
    mean = AdvantageConfig(normalize="mean")
    close(group_advantages(rewards, group, mean), [0.5, 2 / 3, -0.5, -1 / 3, -0.5, 0.5, -1 / 3])
    # eps 1: ½/1.5773503.
    assert group_advantages(rewards, group, AdvantageConfig(eps=1.0))[0].item() == pytest.approx(0.3169872)


@pytest.mark.parametrize("normalize", ["std", "mean"])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, -1 / 3, 1e6 + 0.1])
def test_equal_rewards_give_exactly_nothing(normalize: str, reward: float) -> None:
    rewards = torch.tensor([reward] * 7 + [5.0, 3.0], dtype=torch.float64)
    group = torch.tensor([0] * 6 + [1] + [2, 2])  # six equal, one alone, one pair that differs
    advantages = group_advantages(rewards, group, AdvantageConfig(normalize=normalize))
    assert advantages[:7].tolist() == [0.0] * 7
    assert advantages[7] > 0 > advantages[8]


def test_against_each_group_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(64, generator=generator) * 3 + 10
    group = (torch.randperm(64, generator=generator) % 9) * 1000 - 5
    advantages = group_advantages(rewards, group)
    for name in group.unique():
        own = rewards[group == name]
        torch.testing.assert_close(advantages[group == name], (own - own.mean()) / (own.std() + 1e-4))
    order = torch.randperm(64, generator=generator)
    torch.testing.assert_close(group_advantages(rewards[order], group[order]), advantages[order])


def test_advantages_are_detached_and_an_empty_batch_is_fine() -> None:
    rewards = torch.tensor([1.0, 2.0], requires_grad=True)
    assert not group_advantages(rewards, torch.tensor([0, 0])).requires_grad
    assert group_advantages(torch.empty(0), torch.empty(0, dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize(
    ("rewards", "group", "named"),
    [
        (torch.ones(2, 1), torch.zeros(2, dtype=torch.int64), "rewards has shape"),
        (torch.ones(2), torch.zeros(3, dtype=torch.int64), "group has shape"),
        (torch.ones(2), torch.zeros(2), "group is torch.float32"),
        (torch.tensor([1.0, NAN]), torch.zeros(2, dtype=torch.int64), "rewards must be finite, but row 1"),
        (
            torch.tensor([math.inf, 0.0]),
            torch.zeros(2, dtype=torch.int64),
            "rewards must be finite, but row 0",
        ),
    ],
)
def test_group_advantages_refuses(rewards: Tensor, group: Tensor, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        group_advantages(rewards, group)


@pytest.mark.parametrize("values", [{"normalize": "median"}, {"eps": 0.0}, {"epsilon": 1e-4}])
def test_config_refuses(values: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        AdvantageConfig.model_validate(values)


# Three responses: 3 tokens of advantage 2, 2 tokens of advantage −1, 2 tokens of advantage 0.
ADVANTAGES = torch.tensor([2.0, -1.0, 0.0])
MASK = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1]]).bool()
GAMMA = torch.tensor([[NAN, 1.5, 1.0, 1.25], [1.5, 1.0, NAN, 9.0], [9.0, 1.0, 1.5, 1.0]])


def test_advantages_per_token_are_multiplied_one_by_one() -> None:
    advantages_BT = torch.tensor([[2.0, -2.0, 0.0, 3.0]])
    gamma_BT = torch.tensor([[1.5, 1.5, 1.5, 1.5]])
    mask_BT = torch.tensor([[True, True, True, False]])
    assert token_advantages(advantages_BT, gamma_BT, mask_BT).tolist() == [[3.0, -2.0, 0.0, 0.0]]
    assert token_advantages(advantages_BT, gamma_BT, mask_BT, "all").tolist() == [[3.0, -3.0, 0.0, 0.0]]


def test_gamma_multiplies_nonnegative_advantages() -> None:
    shaped = token_advantages(ADVANTAGES, GAMMA, MASK)
    close(shaped, [[0, 3.0, 2.0, 2.5], [-1.0, -1.0, 0, 0], [0.0, 0.0, 0.0, 0.0]])


def test_gamma_multiplies_all_advantages() -> None:
    shaped = token_advantages(ADVANTAGES, GAMMA, MASK, apply_to="all")
    close(shaped, [[0, 3.0, 2.0, 2.5], [-1.5, -1.0, 0, 0], [0.0, 0.0, 0.0, 0.0]])


def test_token_advantages_are_detached() -> None:
    shaped = token_advantages(ADVANTAGES.clone().requires_grad_(), GAMMA.clone().requires_grad_(), MASK)
    assert not shaped.requires_grad


def test_gamma_share() -> None:
    # Plain mass 3·2 + 2·1 = 8. Shaped 3 + 2 + 2.5 + 1 + 1 = 9.5, or with "all" 10.
    # γ > 1 on 4 of 7 tokens; it changes 2 of them, or with "all" 3: an advantage of 0 stays 0.
    share = gamma_share(ADVANTAGES, GAMMA, MASK)
    assert share.mass.item() == pytest.approx(1.5 / 9.5)
    assert share.amplified.item() == pytest.approx(4 / 7)
    assert share.applied.item() == pytest.approx(2 / 7)
    share = gamma_share(ADVANTAGES, GAMMA, MASK, apply_to="all")
    assert share.mass.item() == pytest.approx(2 / 10)
    assert share.amplified.item() == pytest.approx(4 / 7)
    assert share.applied.item() == pytest.approx(3 / 7)


def test_gamma_share_of_nothing_is_zero() -> None:
    for advantages, mask in ((torch.zeros(3), MASK), (ADVANTAGES, torch.zeros_like(MASK))):
        share = gamma_share(advantages, GAMMA, mask)
        assert share.mass.item() == share.applied.item() == 0.0
    assert share.amplified.item() == 0.0


@pytest.mark.parametrize("function", [token_advantages, gamma_share])
def test_token_advantages_refuse(function: object) -> None:
    assert callable(function)
    with pytest.raises(ValueError, match=r"advantages has shape \[2\]; it must be \[3\]"):
        function(ADVANTAGES[:2], GAMMA, MASK)
    with pytest.raises(ValueError, match="gamma has shape"):
        function(ADVANTAGES, GAMMA[:, 1:], MASK)
    with pytest.raises(ValueError, match="response_mask has shape"):
        function(ADVANTAGES, GAMMA, MASK[0])
    with pytest.raises(ValueError, match="apply_to is 'some'"):
        function(ADVANTAGES, GAMMA, MASK, apply_to="some")
