"""Checks that the generating and the training engine hold the same weights, by their log-probs of the same tokens.

Shape suffixes: B responses, T positions of input_ids.
"""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel, Field
from torch import Tensor


class ParityConfig(BaseModel, extra="forbid", frozen=True):
    """The check that actor_infer and actor_train give the same log-probs."""

    every_steps: int = Field(
        default=1, ge=1, description="training steps between checks; the first step after a start is always checked"
    )
    threshold: float = Field(
        default=0.1, gt=0, description="largest allowed mean absolute difference of log-probs, in nats"
    )


@dataclass(frozen=True)
class Parity:
    """Absolute differences of log-probs, in nats.

    mean, max: over `tokens` tokens, NaN if any log-prob is NaN; worst: (row, position) of the largest difference, or of
    the first NaN; infer, train: the two log-probs there.
    """

    mean: float
    max: float
    tokens: int
    worst: tuple[int, int]
    infer: float
    train: float


class ParityError(RuntimeError):
    """The engines' log-probs differ too much: one of them probably holds the wrong weights."""

    def __init__(self, parity: Parity, threshold: float) -> None:
        row, position = parity.worst
        super().__init__(
            f"log-probs of actor_infer and actor_train differ by {parity.mean:.3g} nats on average over "
            f"{parity.tokens} tokens; at most {threshold:g} is allowed. The largest difference is {parity.max:.3g}, at "
            f"row {row}, position {position}: {parity.infer:.6g} by actor_infer, {parity.train:.6g} by actor_train"
        )
        self.parity = parity
        self.threshold = threshold


def compare(infer_BT: Tensor, train_BT: Tensor, mask_BT: Tensor) -> Parity:
    """Differences of two engines' log-probs [B, T] where `mask_BT` is True.

    Raises ValueError if the shapes differ or the mask is all False.
    """
    if not infer_BT.shape == train_BT.shape == mask_BT.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (infer_BT, train_BT, mask_BT))
        raise ValueError(f"infer_BT, train_BT and mask_BT have shapes {shapes}: must be equal")
    mask_BT = mask_BT.bool().cpu()
    if not mask_BT.any():
        raise ValueError("mask_BT has no token: there is nothing to compare")
    infer_BT, train_BT = infer_BT.detach().double().cpu(), train_BT.detach().double().cpu()
    difference_BT = (infer_BT - train_BT).abs()
    chosen = difference_BT[mask_BT]
    row, position = divmod(int(difference_BT.masked_fill(~mask_BT, -1.0).argmax()), mask_BT.shape[1])
    return Parity(
        mean=chosen.mean().item(),
        max=chosen.max().item(),
        tokens=chosen.numel(),
        worst=(row, position),
        infer=infer_BT[row, position].item(),
        train=train_BT[row, position].item(),
    )


def must_agree(parity: Parity, threshold: float) -> None:
    """Raise ParityError if the mean difference is above `threshold` or NaN."""
    if not parity.mean <= threshold:
        raise ParityError(parity, threshold)
