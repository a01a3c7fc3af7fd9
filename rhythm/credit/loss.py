"""The policy loss: PPO's clipped objective, or CISPO, over token advantages (eqs. 5 and 12), normalized as in GRPO.

Shape suffixes: B responses, T positions. logprobs[b, t] is that of input_ids[b, t]; only response tokens are
read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from rhythm.shapes import check_shape
from rhythm.system.extras import needs

with needs("rhythm.credit.loss"):
    from pydantic import BaseModel, Field, model_validator

# exp(±20) is far outside any clip; beyond it, a ratio that overflows would turn gradients of 0 into NaN.
_MAX_LOG_RATIO = 20.0


class LossConfig(BaseModel, extra="forbid", frozen=True):
    """The clipped objective and what is added to it."""

    objective: Literal["clip", "cispo"] = Field(
        default="clip",
        description="clip: PPO's, no gradient of a token past the clip; cispo: the ratio, clipped and constant, times "
        "log-prob, a gradient of every token (MiniMax-M1)",
    )
    clip_low: float = Field(
        default=0.2,
        gt=0,
        le=1,
        description="ε below: the ratio is clipped at 1 − clip_low; 1: not (cispo)",
    )
    clip_high: float = Field(
        default=0.2,
        gt=0,
        description="ε above: the ratio is clipped at 1 + clip_high; DAPO takes 0.28, cispo as a rule 3 or more",
    )
    dual_clip: float | None = Field(
        default=None,
        gt=1,
        allow_inf_nan=False,
        description="clip: largest ratio that counts where the advantage is negative (dual-clip PPO's c, 3 as a rule; "
        "TRL's delta, verl's clip_ratio_c); null: none",
    )
    normalization: Literal["sequence", "token", "dr_grpo"] = Field(
        default="sequence",
        description="sequence: mean over each response's tokens, then over responses (GRPO); token: mean "
        "over all tokens of the step (DAPO); dr_grpo: sum over tokens / max_tokens, mean over responses",
    )
    max_tokens: int | None = Field(
        default=None, ge=1, description="dr_grpo's constant divisor, as a rule the longest response allowed"
    )
    kl_coef: float = Field(
        default=0.0, ge=0, allow_inf_nan=False, description="weight of the KL divergence to the reference policy"
    )
    entropy_coef: float = Field(default=0.0, ge=0, allow_inf_nan=False, description="weight of the entropy bonus")

    @model_validator(mode="after")
    def _dr_grpo_has_its_divisor(self) -> Self:
        if self.normalization == "dr_grpo" and self.max_tokens is None:
            raise ValueError("normalization is dr_grpo, which needs max_tokens; it is not set")
        return self

    @model_validator(mode="after")
    def _dual_clip_beyond_the_clip(self) -> Self:
        if self.dual_clip is None:
            return self
        if self.objective != "clip":
            raise ValueError(f"dual_clip is {self.dual_clip:g}, which needs objective clip, not {self.objective}")
        if self.dual_clip <= 1 + self.clip_high:
            raise ValueError(f"dual_clip is {self.dual_clip:g}: must be above 1 + clip_high = {1 + self.clip_high:g}")
        return self


@dataclass(frozen=True)
class BatchTotals:
    """What one gradient step averages over: the responses that have tokens, and the tokens of all of them."""

    sequences: int
    tokens: int

    @classmethod
    def of(cls, response_mask_BT: Tensor) -> BatchTotals:
        """Totals of the batch with this mask, [B, T]."""
        length_B = response_mask_BT.bool().sum(dim=-1)
        return cls(sequences=int((length_B > 0).sum()), tokens=int(length_B.sum()))


@dataclass(frozen=True)
class LossOutput:
    """The loss and what to log, scalars in fp32; only `loss` carries a gradient.

    Every field is this micro-batch's part of a mean over the whole step: the step's value is the plain sum
    over its micro-batches, and so is its gradient.

    Attributes:
        loss: what to minimise.
        clip_share: fraction of tokens whose gradient the clip cuts off; of tokens whose ratio it changes with cispo.
        dual_clip_share: fraction of tokens whose gradient the dual clip cuts off.
        approx_kl: KL(old ‖ new), nats per token, estimated as mean(r − 1 − log r) with r = new/old on the
            sampled tokens.
        ratio_mean: mean of r.
        entropy: mean of entropy_BT, nats; None if it was not given.
        reference_kl: KL(new ‖ reference), nats per token, by the k3 estimator; None without reference
            log-probs.
    """

    loss: Tensor
    clip_share: Tensor
    dual_clip_share: Tensor
    approx_kl: Tensor
    ratio_mean: Tensor
    entropy: Tensor | None
    reference_kl: Tensor | None

    def parts(self) -> Tensor:
        """fp64 [5] on the CPU: loss, clip_share, dual_clip_share, approx_kl and reference_kl, 0 where it is None."""
        kl = torch.zeros(()) if self.reference_kl is None else self.reference_kl
        parts = (self.loss, self.clip_share, self.dual_clip_share, self.approx_kl, kl)
        return torch.stack([part.detach().double().cpu() for part in parts])


def policy_loss(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    response_mask_BT: Tensor,
    config: LossConfig | None = None,
    *,
    totals: BatchTotals | None = None,
    ref_logprobs_BT: Tensor | None = None,
    entropy_BT: Tensor | None = None,
) -> LossOutput:
    """Minus the objective: by default the mean of min(r·Ã, clip(r, 1 − ε_low, 1 + ε_high)·Ã) (eq. 12).

    With dual_clip c, a token with Ã < 0 has max(that, c·Ã) (dual-clip PPO, Ye et al., 2020). With objective "cispo" a
    token has sg(clip(r, 1 − ε_low, 1 + ε_high))·Ã·log π, sg: taken as a constant (MiniMax-M1).

    With kl_coef, the k3 estimate ρ − 1 − log ρ, ρ = reference/new, is added per token; with entropy_coef, the
    entropy is subtracted. Both are averaged as the objective is. Values outside the responses, NaN included,
    change neither the loss nor a gradient; NaN inside a response makes the loss NaN. Log-ratios are cut at ±20.

    Args:
        logprobs_BT: [B, T] under the policy being trained.
        old_logprobs_BT: [B, T] under the policy that sampled.
        advantages_BT: [B, T], as from token_advantages.
        response_mask_BT: [B, T], true on response tokens.
        config: LossConfig() if None.
        totals: of the whole gradient step, where this is one of its micro-batches; None: this is the whole.
        ref_logprobs_BT: [B, T] under the reference policy; needed if kl_coef > 0, otherwise only measured.
        entropy_BT: [B, T] nats, with its graph; needed if entropy_coef > 0, otherwise only measured.

    Raises:
        ValueError: a shape that is not [B, T]; ref_logprobs or entropy missing.
    """
    config = config or LossConfig()
    shape = check_shape("response_mask", response_mask_BT, ("B", "T"))
    response_BT = response_mask_BT.bool()
    totals = totals or BatchTotals.of(response_BT)

    def inside(name: str, x_BT: Tensor) -> Tensor:
        # where, before any arithmetic: the gradient of values outside is 0, not 0 times NaN.
        check_shape(name, x_BT, shape)
        return torch.where(response_BT, x_BT.float(), 0.0)

    logprob_BT = inside("logprobs", logprobs_BT)
    old_BT = inside("old_logprobs", old_logprobs_BT.detach())
    advantage_BT = inside("advantages", advantages_BT.detach())
    log_ratio_BT = (logprob_BT - old_BT).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    ratio_BT = log_ratio_BT.exp()
    free_BT = ratio_BT * advantage_BT
    clipped_BT = ratio_BT.clamp(1 - config.clip_low, 1 + config.clip_high) * advantage_BT
    dual_BT = torch.zeros_like(response_BT)
    if config.objective == "cispo":
        loss_BT = -clipped_BT.detach() * logprob_BT
        cut_BT = clipped_BT != free_BT
    else:
        objective_BT = torch.minimum(free_BT, clipped_BT)
        if config.dual_clip is not None:
            floor_BT = torch.where(advantage_BT < 0, config.dual_clip * advantage_BT, -torch.inf)
            dual_BT = objective_BT < floor_BT
            objective_BT = torch.maximum(objective_BT, floor_BT)
        loss_BT = -objective_BT
        cut_BT = clipped_BT < free_BT

    token_BT = response_BT.float() / max(totals.tokens, 1)
    entropy = reference_kl = None
    if entropy_BT is not None:
        inside_entropy_BT = inside("entropy", entropy_BT)
        entropy = (inside_entropy_BT.detach() * token_BT).sum()
        if config.entropy_coef:
            loss_BT = loss_BT - config.entropy_coef * inside_entropy_BT
    elif config.entropy_coef:
        raise ValueError(f"entropy is None; entropy_coef = {config.entropy_coef} needs it")
    if ref_logprobs_BT is not None:
        kl_BT = _k3(inside("ref_logprobs", ref_logprobs_BT.detach()) - logprob_BT)
        reference_kl = (kl_BT.detach() * token_BT).sum()
        if config.kl_coef:
            loss_BT = loss_BT + config.kl_coef * kl_BT
    elif config.kl_coef:
        raise ValueError(f"ref_logprobs is None; kl_coef = {config.kl_coef} needs it")

    return LossOutput(
        loss=(loss_BT * _token_weights(response_BT, totals, config)).sum(),
        clip_share=(cut_BT * token_BT).sum(),
        dual_clip_share=(dual_BT * token_BT).sum(),
        approx_kl=(_k3(log_ratio_BT.detach()) * token_BT).sum(),
        ratio_mean=(ratio_BT.detach() * token_BT).sum(),
        entropy=entropy,
        reference_kl=reference_kl,
    )


def _token_weights(response_BT: Tensor, totals: BatchTotals, config: LossConfig) -> Tensor:
    """[B, T] weight of each token's loss, 0 outside the responses; over a step they sum to 1, bar dr_grpo."""
    weight_BT = response_BT.float()
    if config.normalization == "token":
        return weight_BT / max(totals.tokens, 1)
    per_response = max(totals.sequences, 1)
    if config.max_tokens is not None and config.normalization == "dr_grpo":
        return weight_BT / (per_response * config.max_tokens)
    return weight_BT / (per_response * weight_BT.sum(dim=-1, keepdim=True).clamp(min=1))


def _k3(log_ratio_BT: Tensor) -> Tensor:
    """r − 1 − log r ≥ 0: on samples of p, an unbiased estimate of KL(p ‖ q) for r = q/p (Schulman's k3)."""
    log_ratio_BT = log_ratio_BT.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    return log_ratio_BT.exp() - 1 - log_ratio_BT
