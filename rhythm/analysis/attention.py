"""Attention weights of one layer and sequence, computed tile by tile from query, key and lse, never the whole map.

Shape suffixes: N positions of prompt and response, H query heads, G key heads, D head size, R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rhythm.analysis.maps import LayerAttention
from rhythm.ops.reference import masked_scores

TILE_ELEMENTS = 2**24  # fp32 weights held at a time: 64 MB


@dataclass(frozen=True, kw_only=True)
class ObservedAttention(LayerAttention):
    """Query, key and lse of a layer, kept from the forward pass over a response.

    Attributes:
        lse: fp32 [H, N], log Σ exp(score), natural; NaN on prompt rows.
        prompt_len: number of prompt rows.
    """

    lse: Tensor
    prompt_len: int

    def weights(self, rows: Tensor, columns: Tensor, heads: Tensor) -> Tensor:
        """A[h, t, s] of these heads, rows and columns (int64 indices), fp32 [H, R, C]; NaN on prompt rows."""
        group = self.query.shape[1] // self.key.shape[1]
        query_HRD = self.query[rows][:, heads].transpose(0, 1).float()
        key_HCD = self.key[columns][:, heads // group].transpose(0, 1).float()
        visible_RC = self.visible(rows, columns)
        # Masked before exp: a hidden score may be far above its row's lse.
        score_HRC = masked_scores(query_HRD, key_HCD, visible_RC, self.scale, self.softcap)
        return torch.exp(score_HRC - self.lse[heads][:, rows, None])

    def row_tiles(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(rows [R], A [H, R, last row + 1]) of all heads and response rows, a few rows at a time."""
        n, heads, device = self.query.shape[0], self.query.shape[1], self.query.device
        all_heads = torch.arange(heads, device=device)
        size = max(1, TILE_ELEMENTS // (heads * n))
        for rows in torch.split(torch.arange(self.prompt_len, n, device=device), size):
            columns = torch.arange(int(rows[-1]) + 1, device=device)
            yield rows, self.weights(rows, columns, all_heads)
