from __future__ import annotations

import math

import pytest
import torch

from rhythm.engines.parity import Parity, ParityConfig, ParityError, compare, must_agree

NAN = math.nan
INFER = torch.tensor([[NAN, -1.0, -2.0, 9.0], [NAN, -3.0, -0.5, -4.0]])
TRAIN = torch.tensor([[NAN, -1.5, -2.0, 0.0], [NAN, -3.0, -1.5, -3.75]])
MASK = torch.tensor([[False, True, True, False], [False, False, True, True]])


def test_differences_are_of_the_tokens_in_the_mask() -> None:
    # |-1 + 1.5|, |-2 + 2|, |-0.5 + 1.5|, |-4 + 3.75|
    assert compare(INFER, TRAIN, MASK) == Parity(
        mean=(0.5 + 0.0 + 1.0 + 0.25) / 4, max=1.0, tokens=4, worst=(1, 2), infer=-0.5, train=-1.5
    )


def test_equal_log_probs_agree() -> None:
    parity = compare(INFER, INFER, MASK)
    assert (parity.mean, parity.max) == (0.0, 0.0)
    assert MASK[parity.worst]
    must_agree(parity, threshold=1e-9)


def test_half_precision_is_compared_without_rounding_again() -> None:
    infer, train = torch.tensor([[-10.0]]), torch.tensor([[-10.0625]], dtype=torch.bfloat16)
    assert compare(infer, train, torch.tensor([[True]])).max == 0.0625


def test_past_the_threshold_the_error_has_both_numbers() -> None:
    parity = compare(INFER, TRAIN, MASK)
    must_agree(parity, threshold=0.4375)
    with pytest.raises(ParityError) as caught:
        must_agree(parity, threshold=0.4)
    assert str(caught.value) == (
        "log-probs of actor_infer and actor_train differ by 0.438 nats on average over 4 tokens; at most 0.4 is "
        "allowed. The largest difference is 1, at row 1, position 2: -0.5 by actor_infer, -1.5 by actor_train"
    )
    assert caught.value.parity is parity


def test_a_nan_never_agrees() -> None:
    train = TRAIN.clone()
    train[0, 2] = NAN
    parity = compare(INFER, train, MASK)
    assert math.isnan(parity.mean)
    assert parity.worst == (0, 2)
    with pytest.raises(ParityError, match="differ by nan nats"):
        must_agree(parity, threshold=1e9)


def test_nothing_to_compare() -> None:
    with pytest.raises(ValueError, match="mask_BT has no token"):
        compare(INFER, TRAIN, torch.zeros_like(MASK))
    with pytest.raises(ValueError, match=r"shapes \(2, 4\), \(2, 3\), \(2, 4\): must be equal"):
        compare(INFER, TRAIN[:, :3], MASK)


@pytest.mark.parametrize("wrong", [{"threshold": 0}, {"every_steps": 0}, {"treshold": 1}])
def test_bad_settings(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ParityConfig(**wrong)
