"""From rewards to token advantages: normalized within each prompt's group (eq. 6), shaped by γ (eq. 12).

Shape suffixes: B responses, G groups, T positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rhythm.credit.config import ApplyTo
from rhythm.shapes import check_shape
from rhythm.system.extras import needs

with needs("rhythm.credit"):
    from pydantic import BaseModel, Field


class AdvantageConfig(BaseModel, extra="forbid", frozen=True):
    """How rewards become advantages."""

    normalize: Literal["std", "mean"] = Field(
        default="std",
        description="std: subtract the group's mean reward, divide by its standard deviation (GRPO); "
        "mean: subtract only (Dr. GRPO)",
    )
    eps: float = Field(
        default=1e-4, gt=0, allow_inf_nan=False, description="added to the standard deviation before dividing"
    )


def group_advantages(rewards_B: Tensor, group_B: Tensor, config: AdvantageConfig | None = None) -> Tensor:
    """Advantage of each response over its group, (r − mean)/(std + eps) of the group's rewards (eq. 6).

    The standard deviation is the unbiased one (n − 1), as in TRL and verl. Where all rewards of a group are
    equal, as in a group of one, the advantages are exactly 0.

    Args:
        rewards_B: [B], finite.
        group_B: [B] integers; responses with equal numbers form a group, of any size, in any order.
        config: AdvantageConfig() if None.

    Returns:
        [B] fp32, detached.

    Raises:
        ValueError: shapes that are not [B] each; group_B not of integers; a reward that is not finite.
    """
    config = config or AdvantageConfig()
    (B,) = check_shape("rewards", rewards_B, ("B",))
    check_shape("group", group_B, (B,))
    if group_B.is_floating_point() or group_B.is_complex():
        raise ValueError(f"group is {group_B.dtype}; it must hold integers")
    reward_B = rewards_B.detach().double()
    if not reward_B.isfinite().all():
        raise ValueError(f"rewards must be finite, but row {int((~reward_B.isfinite()).nonzero()[0])} is not")

    names_G, index_B = torch.unique(group_B, return_inverse=True)
    G = len(names_G)
    # Measured from the group's smallest reward, equal rewards are exactly 0, as are their mean and deviation.
    smallest_G = reward_B.new_full((G,), torch.inf).scatter_reduce(0, index_B, reward_B, "amin")
    reward_B = reward_B - smallest_G[index_B]
    # A row per group, summed along the row: a fixed order, where adding by index has none on a GPU.
    member_GB = index_B == torch.arange(G, device=index_B.device)[:, None]
    size_G = member_GB.sum(dim=-1)
    mean_G = torch.where(member_GB, reward_B, 0.0).sum(dim=-1) / size_G
    advantage_B: Tensor = reward_B - mean_G[index_B]
    if config.normalize == "std":
        squares_G = torch.where(member_GB, advantage_B**2, 0.0).sum(dim=-1)
        std_G = (squares_G / (size_G - 1).clamp(min=1)).sqrt()
        advantage_B = advantage_B / (std_G + config.eps)[index_B]
    return advantage_B.float()


def token_advantages(
    advantages_B: Tensor, gamma_BT: Tensor, response_mask_BT: Tensor, apply_to: ApplyTo = "nonnegative"
) -> Tensor:
    """Ã_t = γ_t·A on response tokens (eq. 12), 0 elsewhere.

    Args:
        advantages_B: [B] of the responses, or [B, T] of their tokens.
        gamma_BT: [B, T], as from batch_credit_weights.
        response_mask_BT: [B, T], true on response tokens.
        apply_to: "nonnegative" leaves negative advantages as they are; "all" multiplies them as well.

    Returns:
        [B, T] fp32, detached.

    Raises:
        ValueError: shapes that do not go together; an unknown apply_to.
    """
    if apply_to not in ("nonnegative", "all"):
        raise ValueError(f"apply_to is {apply_to!r}; it must be 'nonnegative' or 'all'")
    B, T = check_shape("response_mask", response_mask_BT, ("B", "T"))
    check_shape("gamma", gamma_BT, (B, T))
    per_token = advantages_B.ndim == 2
    check_shape("advantages", advantages_B, (B, T) if per_token else (B,))
    plain = advantages_B.detach().float()
    plain_BT = (plain if per_token else plain[:, None]).expand(B, T)
    shaped_BT = gamma_BT.detach().float() * plain_BT
    if apply_to == "nonnegative":
        shaped_BT = torch.where(plain_BT >= 0, shaped_BT, plain_BT)
    return torch.where(response_mask_BT.bool(), shaped_BT, 0.0)


@dataclass(frozen=True)
class GammaShare:
    """What γ did to a batch; scalars, fp32.

    Attributes:
        mass: the part of Σ|Ã| over response tokens that γ added, (Σ|Ã| − Σ|A|)/Σ|Ã|; 0 where all advantages
            are 0, negative where γ took some away (mean_preserving).
        amplified: fraction of the response tokens with γ > 1.
        applied: fraction of the response tokens whose advantage γ changed: amplified, of a response whose
            advantage is not 0, nor negative unless apply_to is "all".
    """

    mass: Tensor
    amplified: Tensor
    applied: Tensor


def gamma_share(
    advantages_B: Tensor, gamma_BT: Tensor, response_mask_BT: Tensor, apply_to: ApplyTo = "nonnegative"
) -> GammaShare:
    """γ's share in the advantages; arguments and errors as in token_advantages. 0 without responses."""
    shaped_BT = token_advantages(advantages_B, gamma_BT, response_mask_BT, apply_to)
    plain_BT = token_advantages(advantages_B, torch.ones_like(gamma_BT), response_mask_BT, apply_to)
    response_BT = response_mask_BT.bool()
    shaped, plain = shaped_BT.abs().sum(), plain_BT.abs().sum()
    tokens = response_BT.sum().clamp(min=1)
    return GammaShare(
        mass=torch.where(shaped > 0, (shaped - plain) / shaped, 0.0),
        amplified=(response_BT & (gamma_BT > 1)).sum() / tokens,
        applied=(shaped_BT != plain_BT).sum() / tokens,
    )
