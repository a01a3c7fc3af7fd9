"""DAPO's soft penalty, eq. 13, by hand."""

from __future__ import annotations

import pytest
import torch

from rhythm.credit.overlong import OverlongConfig, overlong_penalty


def test_the_penalty_grows_over_the_last_tokens() -> None:
    # L_max 10, L_cache 4: 0 up to 6, (6 − n)/4 up to 10, −1 beyond.
    lens = torch.tensor([0, 5, 6, 7, 8, 10, 11, 40])
    penalty = overlong_penalty(lens, max_tokens=10, penalty_tokens=4)
    assert penalty.dtype == torch.float32
    assert penalty.tolist() == [0, 0, 0, -0.25, -0.5, -1, -1, -1]


def test_the_papers_own_numbers() -> None:
    # "the expected maximum length as 16,384 tokens", with 4,096 tokens as the punish cache: L_max = 20,480.
    penalty = overlong_penalty(torch.tensor([16384, 18432, 20480]), max_tokens=20480, penalty_tokens=4096)
    assert penalty.tolist() == [0, -0.5, -1]


@pytest.mark.parametrize("tokens", [0, 11])
def test_a_penalty_longer_than_the_response_is_refused(tokens: int) -> None:
    with pytest.raises(ValueError, match=rf"penalty_tokens is {tokens}; it must be 1 to max_tokens = 10"):
        overlong_penalty(torch.tensor([1]), max_tokens=10, penalty_tokens=tokens)


@pytest.mark.parametrize("options", [{"penalty_tokens": 0}, {"max_tokens": 0}, {"mask": 2}, {"cache": 5}])
def test_what_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        OverlongConfig.model_validate(options)
