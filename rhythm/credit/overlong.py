"""Responses that are too long: a penalty that grows towards the limit, and a loss without those cut off at it (DAPO).

Shape suffix: B responses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rhythm.system.extras import needs

with needs("rhythm.credit.overlong"):
    from pydantic import BaseModel, Field


class OverlongConfig(BaseModel, extra="forbid", frozen=True):
    """What happens to responses that are too long."""

    mask: bool = Field(
        default=False,
        description="leave responses that were cut off at the longest length out of the loss and its averages; their "
        "rewards still count in their groups. TRL's mask_truncated_completions",
    )
    penalty_tokens: int | None = Field(
        default=None,
        ge=1,
        description="the last tokens before the longest length, over which a penalty grows from 0 to -1, added to the "
        "reward (DAPO's L_cache; verl's overlong_buffer.len); null: none",
    )
    max_tokens: int | None = Field(
        default=None,
        ge=1,
        description="response length at which the penalty is -1 (DAPO's L_max); null: sampling.max_new_tokens",
    )


def overlong_penalty(response_lens_B: Tensor, max_tokens: int, penalty_tokens: int) -> Tensor:
    """What to add to the rewards: 0 up to max_tokens − penalty_tokens, then falling linearly, −1 from max_tokens on
    (DAPO, eq. 13).

    Args:
        response_lens_B: [B] integers, tokens.
        max_tokens: L_max.
        penalty_tokens: L_cache, 1 to max_tokens.

    Returns:
        [B] fp32.

    Raises:
        ValueError: penalty_tokens outside 1 to max_tokens.
    """
    if not 1 <= penalty_tokens <= max_tokens:
        raise ValueError(f"penalty_tokens is {penalty_tokens}; it must be 1 to max_tokens = {max_tokens}")
    free = max_tokens - penalty_tokens
    return ((free - response_lens_B).to(torch.float32) / penalty_tokens).clamp(-1.0, 0.0)
