"""Where the sequences lie, and which program works on which block of which sequence.

Everything stays on the device: nothing here waits for it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sequences:
    """cu_seqlens int32 [B + 1] on the flattened token axis, prompt_lens int32 [B], tokens = cu_seqlens[-1]."""

    cu_seqlens: Tensor
    prompt_lens: Tensor
    tokens: int

    @property
    def count(self) -> int:
        return self.prompt_lens.shape[0]

    def blocks(self, size: int, skip_prompts: bool) -> tuple[Tensor, int]:
        """A table int32 [2, programs]: sequence and first row (or key) of each block; sequence B: nothing to do.

        The number of programs is a bound that needs no look at the lengths. The last blocks of each sequence come
        first, since their rows are the longest.
        """
        first = self.prompt_lens if skip_prompts else torch.zeros_like(self.prompt_lens)
        lengths = self.cu_seqlens.diff() - first
        ends = ((lengths + size - 1) // size).cumsum(0)
        programs = self.tokens // size + self.count
        block = torch.arange(programs, device=ends.device)
        sequence = torch.searchsorted(ends, block, right=True)
        held = sequence.clamp(max=self.count - 1)
        row = first[held] + (ends[held] - 1 - block) * size
        return torch.stack([sequence, row]).to(torch.int32), programs


def tensor_strides(x: Tensor) -> tuple[int, int, int, int]:
    """(batch, token, head, dim) of x [T, H, D] or [B, T, H, D]; the batch stride of packed x is 0."""
    return x.stride() if x.ndim == 4 else (0, *x.stride())


def dot_precision() -> str:
    """Of fp32 products: torch's own switch between full fp32 and TF32."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def upcast(dtype: torch.dtype) -> bool:
    """Triton's interpreter multiplies the bit patterns of bf16 matrices: there they are made fp32 first."""
    return dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1"
