"""A padded batch: where in [B, T] the tokens of each sequence lie, and which of them are its response.

Shape suffixes: B sequences, T positions of input_ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rhythm.signals import check_shape


@dataclass(frozen=True)
class PaddedBatch:
    """Sequences padded on the left, on the right or on both sides.

    Attributes:
        real: bool [B, T], true on tokens, false on padding; one contiguous run a row.
        first: int64 [B], position of each sequence's first token; 0 for an empty one.
        lens: int64 [B], tokens of each sequence.
        prompt_lens: int64 [B], how many of them are its prompt.
    """

    real: Tensor
    first: Tensor
    lens: Tensor
    prompt_lens: Tensor

    @property
    def response(self) -> Tensor:
        """bool [B, T], true on response tokens."""
        return self.real & (self.positions >= self.prompt_lens[:, None])

    @property
    def positions(self) -> Tensor:
        """int64 [B, T], place of each token in its own sequence, 0-based; meaningless on padding."""
        return (torch.arange(self.real.shape[1], device=self.real.device) - self.first[:, None]).clamp(min=0)

    @property
    def cu_seqlens(self) -> Tensor:
        """int32 [B + 1], where each sequence begins once the padding is left out."""
        return torch.nn.functional.pad(self.lens.cumsum(0), (1, 0)).to(torch.int32)

    def to(self, device: torch.device) -> PaddedBatch:
        return PaddedBatch(
            self.real.to(device),
            self.first.to(device),
            self.lens.to(device),
            self.prompt_lens.to(device),
        )


def padded_batch(attention_mask_BT: Tensor, prompt_lens: Tensor | Sequence[int]) -> PaddedBatch:
    """The batch that a 2D attention mask describes.

    Args:
        attention_mask_BT: [B, T], any type; 1 on tokens, 0 on padding.
        prompt_lens: [B] integers, tokens of each sequence (padding not counted) that are its prompt.

    Raises:
        ValueError: a mask that is not 2D, holds other values or has padding between tokens; prompt_lens
            that are not integers, not [B], or not in 0 … the tokens of their sequence.
    """
    B, _ = check_shape("attention_mask", attention_mask_BT, (None, None))
    real_BT = attention_mask_BT.bool()
    if (attention_mask_BT != real_BT.to(attention_mask_BT.dtype)).any():
        raise ValueError(
            "attention_mask holds values other than 0 and 1; sequences packed into one row are not allowed"
        )
    # A row of one run turns from padding to tokens once, before its first token or within the row.
    runs_B = real_BT[:, :1].sum(dim=1) + (real_BT[:, 1:] & ~real_BT[:, :-1]).sum(dim=1)
    if (runs_B > 1).any():
        row = int((runs_B > 1).nonzero()[0])
        raise ValueError(f"attention_mask has padding between the tokens of row {row}; it may only be before or after")

    prompt_lens_B = torch.as_tensor(prompt_lens, device=real_BT.device)
    if prompt_lens_B.is_floating_point() or prompt_lens_B.dtype == torch.bool:
        raise ValueError(f"prompt_lens has dtype {prompt_lens_B.dtype}; it must be integers")
    check_shape("prompt_lens", prompt_lens_B, (B,))
    lens_B = real_BT.sum(dim=1)
    for row, (prompt, length) in enumerate(zip(prompt_lens_B.tolist(), lens_B.tolist(), strict=True)):
        if not 0 <= prompt <= length:
            raise ValueError(f"prompt_lens[{row}] is {prompt}; its sequence allows 0 to {length}")
    # argmax takes the first of equals, and 0 for a row without tokens.
    first_B = real_BT.long().argmax(dim=1) if real_BT.shape[1] else torch.zeros_like(lens_B)
    return PaddedBatch(real_BT, first_B, lens_B, prompt_lens_B.long())
