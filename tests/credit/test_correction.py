"""Truncated and masked importance sampling between the engine that generated and the trainer, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rhythm.credit.correction import CorrectionConfig, rollout_correction
from rhythm.credit.loss import LossConfig, policy_loss

NAN = math.nan
# Responses of 3 tokens and of 2. Ratios trainer/rollout: 2, 4, ¼ (product 2) and ½, ½ (product ¼).
MASK = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]]).bool()
RATIO = torch.tensor([[1, 2, 4, 0.25], [0.5, 0.5, 1, 1]])
ROLLOUT = torch.tensor([[0.0, -3, -2.5, -0.5], [-1.5, -2, 0, 0]])
TRAIN = torch.where(MASK, ROLLOUT + RATIO.log(), NAN)


def weights(mode: str, **bounds: float | None) -> list[list[float]]:
    correction = rollout_correction(ROLLOUT, TRAIN, MASK, CorrectionConfig.model_validate({"mode": mode, **bounds}))
    return [[round(x, 5) for x in row] for row in correction.weight.tolist()]


@pytest.mark.parametrize(
    ("mode", "bounds", "expected"),
    [
        ("none", {}, [[1, 1, 1, 1], [1, 1, 1, 1]]),
        ("token_truncate", {}, [[1, 2, 3, 0.25], [0.5, 0.5, 1, 1]]),
        ("token_truncate", {"high": 1.5, "low": 0.4}, [[1, 1.5, 1.5, 0.4], [0.5, 0.5, 1, 1]]),
        ("token_mask", {}, [[1, 2, 0, 0.25], [0.5, 0.5, 1, 1]]),
        ("token_mask", {"high": None, "low": 0.4}, [[1, 2, 4, 0], [0.5, 0.5, 1, 1]]),
        ("sequence_truncate", {}, [[1, 2, 2, 2], [0.25, 0.25, 1, 1]]),
        ("sequence_truncate", {"high": 1.5, "low": 0.5}, [[1, 1.5, 1.5, 1.5], [0.5, 0.5, 1, 1]]),
        ("sequence_mask", {"high": 1.5}, [[1, 0, 0, 0], [0.25, 0.25, 1, 1]]),
        ("sequence_mask", {"high": 2.5, "low": 0.5}, [[1, 2, 2, 2], [0, 0, 1, 1]]),
    ],
)
def test_weights(mode: str, bounds: dict[str, float | None], expected: list[list[float]]) -> None:
    assert weights(mode, **bounds) == expected


@pytest.mark.parametrize(
    ("mode", "outside"),
    [("none", 0), ("token_truncate", 2 / 5), ("token_mask", 2 / 5), ("sequence_truncate", 3 / 5)],
)
def test_measures(mode: str, outside: float) -> None:
    """Token ratios above 1.5: two of five tokens; responses: the one of three."""
    correction = rollout_correction(ROLLOUT, TRAIN, MASK, CorrectionConfig.model_validate({"mode": mode, "high": 1.5}))
    assert float(correction.outside) == pytest.approx(outside)
    assert float(correction.ratio_mean) == pytest.approx((2 + 4 + 0.25 + 0.5 + 0.5) / 5)
    assert float(correction.ratio_max) == pytest.approx(4)
    assert float(correction.sequence_ratio_mean) == pytest.approx((2 + 0.25) / 2)
    # ρ − 1 − log ρ of each.
    k3 = [ratio - 1 - math.log(ratio) for ratio in (2, 4, 0.25, 0.5, 0.5)]
    assert float(correction.kl) == pytest.approx(sum(k3) / 5)


def test_weighted_advantages_are_a_weighted_loss() -> None:
    """Each token's clipped objective times its weight, for either sign of the advantage; the averages stay the same."""
    weight = rollout_correction(ROLLOUT, TRAIN, MASK, CorrectionConfig(mode="token_mask")).weight
    advantages = torch.tensor([[9.0, 1, 1, -2], [-1, 0.5, 9, 9]])
    now = torch.where(MASK, TRAIN + torch.tensor([[0, 0.4, 0.1, 0.5], [-0.4, 0.3, 0, 0]]), NAN)

    def per_token(where: Tensor, advantages: Tensor) -> Tensor:
        losses = torch.zeros(2, 4)
        for row, place in where.nonzero().tolist():
            only = torch.zeros_like(MASK)
            only[row, place] = True
            losses[row, place] = policy_loss(now, TRAIN, advantages, only, LossConfig(normalization="token")).loss
        return losses

    expected = (per_token(MASK, advantages) * weight).sum() / 5
    loss = policy_loss(now, TRAIN, weight * advantages, MASK, LossConfig(normalization="token")).loss
    torch.testing.assert_close(loss, expected)
    assert float(loss) != pytest.approx(float(policy_loss(now, TRAIN, advantages, MASK).loss))


def test_far_apart_stays_finite_and_undefined_shows() -> None:
    train = TRAIN.clone()
    train[0, 1] = ROLLOUT[0, 1] + 500
    correction = rollout_correction(ROLLOUT, train, MASK, CorrectionConfig(mode="sequence_truncate", high=None))
    assert correction.weight.isfinite().all()
    assert float(correction.ratio_max) == pytest.approx(math.exp(20), rel=1e-5)
    train[0, 1] = NAN
    correction = rollout_correction(ROLLOUT, train, MASK, CorrectionConfig(mode="token_truncate"))
    assert correction.weight.isnan().nonzero().tolist() == [[0, 1]]
    assert rollout_correction(ROLLOUT[:0], TRAIN[:0], MASK[:0]).weight.shape == (0, 4)


def test_defaults_are_trls() -> None:
    from trl import GRPOConfig

    defaults = {name: field.default for name, field in GRPOConfig.__dataclass_fields__.items()}
    config = CorrectionConfig()
    assert config.high == defaults["vllm_importance_sampling_clip_max"]
    assert config.low == defaults["vllm_importance_sampling_clip_min"]
    CorrectionConfig(mode=defaults["vllm_importance_sampling_mode"])
    assert config.mode == "none"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "token"}, "mode"),
        ({"high": 0}, "high"),
        ({"low": -1}, "low"),
        ({"low": 2, "high": 1.5}, r"low is 2: must be at most high = 1\.5"),
        ({"cap": 3}, "cap"),
    ],
)
def test_what_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CorrectionConfig.model_validate(options)


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"rollout_logprobs has shape \[2, 3\]"):
        rollout_correction(ROLLOUT[:, 1:], TRAIN, MASK)
    with pytest.raises(ValueError, match=r"train_logprobs has shape \[1, 4\]"):
        rollout_correction(ROLLOUT, TRAIN[:1], MASK)
