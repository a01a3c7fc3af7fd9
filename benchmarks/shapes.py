"""Shapes of the benchmarks, their input tensors, and the FLOPs and bytes that the computation needs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

WINDOW = 10
HORIZON = (10, 50)


@dataclass(frozen=True)
class Shape:
    """One sequence: `tokens`, of which the first `prompt` are the prompt; heads of size `head_size`."""

    tokens: int
    prompt: int = 0
    query_heads: int = 8
    key_heads: int = 2
    head_size: int = 128

    def __str__(self) -> str:
        return f"T={self.tokens}, Hq={self.query_heads}, Hkv={self.key_heads}, D={self.head_size}"

    @property
    def causal_pairs(self) -> int:
        """Pairs (t, s) of one head with t a response row and s ≤ t."""
        return sum(range(self.prompt + 1, self.tokens + 1))

    @property
    def band_pairs(self) -> int:
        """Pairs at a distance that WAAD (below the window) or FAI (within the horizon) uses."""
        lo, hi = HORIZON
        distances = set(range(WINDOW)) | set(range(lo, hi + 1))
        return sum(self.tokens - max(self.prompt, distance) for distance in distances if distance < self.tokens)


@dataclass(frozen=True)
class Inputs:
    """q [T, Hq, D], k and v [T, Hkv, D] of one shape."""

    shape: Shape
    q: Tensor
    k: Tensor
    v: Tensor
    backend: str = "cpu"  # of rhythm's ops; never "auto", which might time another backend
    sliding_window: int | None = None  # of `statistics` and the references, tokens; the other ops have none
    also: tuple[str, ...] = ()  # of `statistics`

    @property
    def scale(self) -> float:
        return float(self.shape.head_size**-0.5)

    @cached_property
    def prompt_lens(self) -> Tensor | None:
        """[1] int32 on the device of q; None without a prompt. Cached, so that timed calls don't copy it."""
        if self.shape.prompt == 0:
            return None
        return torch.tensor([self.shape.prompt], dtype=torch.int32, device=self.q.device)

    @cached_property
    def lse(self) -> Tensor:
        """[Hq, T] fp32, for the ops that are given it; NaN on prompt rows."""
        return _log_sum_exp(self.q, self.k, self.shape)


def make_inputs(
    shape: Shape, dtype: torch.dtype, device: str = "cpu", backend: str = "cpu", sliding_window: int | None = None
) -> Inputs:
    """Normally distributed q, k, v from a fixed seed, drawn on the device; q is doubled so that attention is not
    flat.
    """
    generator = torch.Generator(device=device).manual_seed(0)

    def normal(heads: int) -> Tensor:
        size = (shape.tokens, heads, shape.head_size)
        return torch.randn(size, generator=generator, device=device).to(dtype)

    q, k, v = 2 * normal(shape.query_heads), normal(shape.key_heads), normal(shape.key_heads)
    return Inputs(shape, q, k, v, backend, sliding_window)


def score_flops(shape: Shape, sliding_window: int | None = None) -> int:
    """2·D FLOPs for each score of a causal pair within the sliding window, over the query heads."""
    rows = range(shape.prompt, shape.tokens)
    pairs = shape.causal_pairs if sliding_window is None else sum(min(t + 1, sliding_window) for t in rows)
    return 2 * shape.head_size * pairs * shape.query_heads


def band_flops(shape: Shape) -> int:
    """2·D FLOPs for each score of a pair in a band, over the query heads."""
    return 2 * shape.head_size * shape.band_pairs * shape.query_heads


def operand_bytes(shape: Shape, dtype: torch.dtype, heads: int) -> int:
    """Bytes of that many heads of T × D elements."""
    return shape.tokens * heads * shape.head_size * dtype.itemsize


def statistics_bytes(shape: Shape) -> int:
    """Bytes of waad, fai and lse, fp32."""
    return 3 * 4 * shape.tokens * shape.query_heads


def _log_sum_exp(q_THD: Tensor, k_TGD: Tensor, shape: Shape, block: int = 256) -> Tensor:
    lse_HT = q_THD.new_full((shape.query_heads, shape.tokens), torch.nan, dtype=torch.float32)
    k_HDT = k_TGD.float().permute(1, 2, 0).repeat_interleave(shape.query_heads // shape.key_heads, dim=0)
    for start in range(shape.prompt, shape.tokens, block):
        end = min(start + block, shape.tokens)
        score = q_THD[start:end].float().transpose(0, 1) @ k_HDT[..., :end] * shape.head_size**-0.5
        row = torch.arange(start, end, device=q_THD.device)[:, None]
        score.masked_fill_(torch.arange(end, device=q_THD.device) > row, -torch.inf)
        lse_HT[:, start:end] = score.logsumexp(dim=-1)
    return lse_HT
