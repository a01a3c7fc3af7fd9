"""Corrects the loss, by importance sampling, for differences between the trainer and the engine that generated.

Both hold the same weights, but round differently, so that a response is drawn from another distribution than the one
whose gradient is taken. Each token's loss is weighted by the ratio of the two, trainer over rollout, within bounds:
truncated (Yao et al., 2025; Espeholt et al., 2018) or masked outside them.

Shape suffixes: B responses, T positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from rhythm.shapes import check_shape
from rhythm.system.extras import needs

with needs("rhythm.credit.correction"):
    from pydantic import BaseModel, Field, model_validator

_MAX_LOG_RATIO = 20.0


class CorrectionConfig(BaseModel, extra="forbid", frozen=True):
    """How the loss is corrected for rollouts drawn by an engine that rounds differently from the trainer."""

    mode: Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = Field(
        default="none",
        description="ratio trainer/rollout of each token, or of the whole response for all its tokens; outside the "
        "bounds it is cut to them (truncate), or the loss is left out (mask). TRL's vllm_importance_sampling_mode",
    )
    high: float | None = Field(
        default=3.0, gt=0, allow_inf_nan=False, description="largest ratio; null: none. TRL's …_clip_max"
    )
    low: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="smallest ratio; null: none. TRL's …_clip_min"
    )

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low is {self.low:g}: must be at most high = {self.high:g}")
        return self


@dataclass(frozen=True)
class Correction:
    """The weights, and the measures of the ratios that they come from; scalars in fp32.

    Attributes:
        weight: [B, T] fp32, factor on each token's policy loss; 1 outside the responses and with mode "none".
        ratio_mean, ratio_max: of the ratios trainer/rollout, over response tokens.
        sequence_ratio_mean: of their products, over the responses that have tokens.
        kl: KL(rollout ‖ trainer), nats per token, by the k3 estimator.
        outside: share of the response tokens whose ratio was cut or masked; 0 with mode "none".
    """

    weight: Tensor
    ratio_mean: Tensor
    ratio_max: Tensor
    sequence_ratio_mean: Tensor
    kl: Tensor
    outside: Tensor


def rollout_correction(
    rollout_logprobs_BT: Tensor,
    train_logprobs_BT: Tensor,
    response_mask_BT: Tensor,
    config: CorrectionConfig | None = None,
) -> Correction:
    """The weights that correct the loss for the engine that generated. Log-ratios are cut at ±20.

    Weights of the policy term alone, and never negative, so multiplying the advantages by them is the same; a masked
    token still counts in the loss's averages (as in TRL; verl takes it out of them).

    Args:
        rollout_logprobs_BT: [B, T] nats, as sampled.
        train_logprobs_BT: [B, T] nats, by the trainer, with the same weights.
        response_mask_BT: [B, T], true on response tokens; nothing outside is read.
        config: CorrectionConfig() if None.

    Raises:
        ValueError: a shape that is not [B, T].
    """
    config = config or CorrectionConfig()
    shape = check_shape("response_mask", response_mask_BT, ("B", "T"))
    check_shape("rollout_logprobs", rollout_logprobs_BT, shape)
    check_shape("train_logprobs", train_logprobs_BT, shape)
    response_BT = response_mask_BT.bool()
    difference_BT = (train_logprobs_BT - rollout_logprobs_BT).detach().float()
    log_ratio_BT = torch.where(response_BT, difference_BT, 0.0)
    sequence_B1 = log_ratio_BT.sum(dim=-1, keepdim=True).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
    log_ratio_BT = log_ratio_BT.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    ratio_BT = log_ratio_BT.exp()

    used_BT = sequence_B1.expand(shape) if config.mode.startswith("sequence") else ratio_BT
    low = 0.0 if config.low is None else config.low
    high = torch.inf if config.high is None else config.high
    outside_BT = response_BT & ((used_BT < low) | (used_BT > high))
    if config.mode == "none":
        weight_BT, outside_BT = torch.ones_like(ratio_BT), torch.zeros_like(response_BT)
    elif config.mode.endswith("truncate"):
        weight_BT = used_BT.clamp(low, high)
    else:
        weight_BT = torch.where(outside_BT, 0.0, used_BT)

    tokens = response_BT.sum().clamp(min=1)
    has_tokens_B = response_BT.any(dim=-1)
    return Correction(
        weight=torch.where(response_BT, weight_BT, 1.0),
        ratio_mean=(ratio_BT * response_BT).sum() / tokens,
        ratio_max=torch.where(response_BT, ratio_BT, -torch.inf).amax() if ratio_BT.numel() else ratio_BT.sum(),
        sequence_ratio_mean=(sequence_B1[:, 0] * has_tokens_B).sum() / has_tokens_B.sum().clamp(min=1),
        kl=((ratio_BT - 1 - log_ratio_BT) * response_BT).sum() / tokens,
        outside=outside_BT.sum() / tokens,
    )
