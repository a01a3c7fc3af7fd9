"""Statistics → heads → signals → γ → advantages → loss: pure functions over tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rhythm.system.lazy import lazy

if TYPE_CHECKING:
    from rhythm.credit.advantages import group_advantages, token_advantages
    from rhythm.credit.config import CreditConfig
    from rhythm.credit.gamma import batch_credit_weights, credit_weights
    from rhythm.credit.loss import policy_loss

__all__ = [
    "CreditConfig",
    "batch_credit_weights",
    "credit_weights",
    "group_advantages",
    "policy_loss",
    "token_advantages",
]

# Their options are pydantic models; heads and signals need torch alone.
__getattr__, __dir__ = lazy(
    __name__,
    globals(),
    {
        "CreditConfig": "rhythm.credit.config",
        "batch_credit_weights": "rhythm.credit.gamma",
        "credit_weights": "rhythm.credit.gamma",
        "group_advantages": "rhythm.credit.advantages",
        "policy_loss": "rhythm.credit.loss",
        "token_advantages": "rhythm.credit.advantages",
    },
)
