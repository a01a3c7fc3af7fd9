"""Computes the mean local and global attention maps of one response, reduced to a size that can be displayed.

For a short response this is the map itself. For a longer one it is a thumbnail whose cells pool `cell` rows and
columns. Either is computed one block of rows at a time, so that no [N, N] map is in memory. The band is the attention
to the nearest `width` tokens at full resolution, which shows the sawtooth of the local heads.

Shape suffixes: N tokens of the sequence, H query heads, G key heads, D head size, h chosen heads of one layer,
M response rows, R rows and C columns of the thumbnail, W distances of the band, K rows of a block.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rhythm.ops.reference import masked_scores, row_lse, visible_keys

MAX_CELLS = 192
BAND_WIDTH = 24
BLOCK_ROWS = 128


@dataclass(frozen=True)
class LayerAttention:
    """The inputs of a layer's attention maps, for one sequence without padding.

    Attributes:
        query: [N, H, D], after projection, norm and position embedding.
        key: [N, G, D], likewise; G divides H.
        scale: factor on the scores before softmax. sliding_window: keys at distance ≥ this are masked; None: none.
            softcap: scores become softcap · tanh(score / softcap); None: unchanged.
        sinks: [H], one more logit in the denominator of each row of a head; None: none.
        chunk: keys of earlier chunks of so many tokens are masked; None: none.
    """

    query: Tensor
    key: Tensor
    scale: float
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    chunk: int | None = None

    def visible(self, row_R: Tensor, column_C: Tensor) -> Tensor:
        """bool [R, C]: which keys these rows see."""
        visible_RC = visible_keys(row_R, column_C, self.sliding_window)
        if self.chunk is not None:
            visible_RC &= row_R[:, None] // self.chunk == column_C // self.chunk
        return visible_RC


@dataclass(frozen=True)
class MeanMap:
    """The mean attention map Ā of some heads (paper eq. 8) over the rows of a response, pooled.

    Attributes:
        weights: [R, C] fp32. With cell 1, Ā[P + r, c] itself; else the mean over a cell's rows of the sum over its
            columns, so each row sums to 1 (less with sinks). 0 above the diagonal.
        cell: height and width of a cell in tokens. The prompt ends at a cell boundary, so the first column and the last
            row may pool fewer.
        prompt_columns: number of columns of the prompt.
        band: [M, W] fp32, Ā[P + m, P + m − w]; NaN before the start of the sequence.
    """

    weights: Tensor
    cell: int
    prompt_columns: int
    band: Tensor


def mean_map(
    layers: Mapping[int, LayerAttention],
    heads: Sequence[tuple[int, int]],
    *,
    prompt_len: int,
    max_cells: int = MAX_CELLS,
    width: int = BAND_WIDTH,
    block_rows: int = BLOCK_ROWS,
) -> MeanMap:
    """The mean map of `heads`, (layer, query head) pairs, over the response that follows `prompt_len` tokens.

    Memory in addition to the inputs: [h, block, N] for a layer's chosen heads.

    Raises:
        ValueError: no heads, a head that is not in `layers`, a prompt_len that leaves no response, or a size below 1.
    """
    _check(layers, heads, prompt_len, max_cells=max_cells, width=width, block_rows=block_rows)
    first = layers[heads[0][0]].query
    n, device = first.shape[0], first.device
    cell = -(-n // max_cells)
    prompt_columns, shift = -(-prompt_len // cell), -prompt_len % cell
    rows = -(-(n - prompt_len) // cell)
    weights_RC = torch.zeros((rows, prompt_columns + rows), device=device)
    band_MW = torch.zeros((n - prompt_len, width), device=device)

    column_N = (torch.arange(n, device=device) + shift) // cell
    step = cell * max(1, block_rows // cell)
    for layer, chosen in _by_layer(heads).items():
        for start in range(prompt_len, n, step):
            row_K = torch.arange(start, min(start + step, n), device=device)
            weights_KN = _summed_rows(layers[layer], chosen, row_K) / len(heads)
            pooled_KC = torch.zeros((len(row_K), weights_RC.shape[1]), device=device)
            pooled_KC.index_add_(1, column_N[: weights_KN.shape[1]], weights_KN)
            weights_RC.index_add_(0, (row_K - prompt_len) // cell, pooled_KC)
            band_MW[row_K - prompt_len] += _band(weights_KN, row_K, width)
    row_M = torch.arange(n - prompt_len, device=device)
    rows_R = torch.bincount(row_M // cell, minlength=rows)
    return MeanMap(weights_RC / rows_R[:, None], cell, prompt_columns, band_MW)


def _summed_rows(layer: LayerAttention, heads: list[int], row_K: Tensor) -> Tensor:
    """Sum over heads of these rows of their maps, fp32 [K, n] with n the last row + 1."""
    head_h = torch.tensor(heads, device=layer.query.device)
    group = layer.query.shape[1] // layer.key.shape[1]
    q_NhD, k_NhD = layer.query[:, head_h], layer.key[:, head_h // group]
    sinks_h = None if layer.sinks is None else layer.sinks[head_h]
    end = int(row_K[-1]) + 1
    visible_KN = layer.visible(row_K, torch.arange(end, device=row_K.device))
    q_hKD, k_hND = (x.float().transpose(0, 1) for x in (q_NhD[row_K], k_NhD[:end]))
    score_hKN = masked_scores(q_hKD, k_hND, visible_KN, layer.scale, layer.softcap)
    return torch.exp(score_hKN - row_lse(score_hKN, sinks_h)[..., None]).sum(dim=0)


def _band(weights_KN: Tensor, row_K: Tensor, width: int) -> Tensor:
    """The weights at distances 0, 1, … W − 1, [K, W]; NaN before the sequence's first token."""
    column_KW = row_K[:, None] - torch.arange(width, device=row_K.device)
    band_KW = weights_KN.gather(1, column_KW.clamp(min=0))
    return band_KW.masked_fill(column_KW < 0, torch.nan)


def _by_layer(heads: Sequence[tuple[int, int]]) -> dict[int, list[int]]:
    chosen: dict[int, list[int]] = defaultdict(list)
    for layer, head in heads:
        chosen[layer].append(head)
    return chosen


def _check(
    layers: Mapping[int, LayerAttention], heads: Sequence[tuple[int, int]], prompt_len: int, **sizes: int
) -> None:
    if not heads:
        raise ValueError("heads is empty; there must be at least one")
    for layer, head in heads:
        if layer not in layers or not 0 <= head < layers[layer].query.shape[1]:
            raise ValueError(f"heads holds (layer {layer}, head {head}); layers, which has {sorted(layers)}, lacks it")
    n = layers[heads[0][0]].query.shape[0]
    if not 0 <= prompt_len < n:
        raise ValueError(f"prompt_len is {prompt_len}; it must be from 0 to {n - 1}, to leave a response")
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}; it must be at least 1")
