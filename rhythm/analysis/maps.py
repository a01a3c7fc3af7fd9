"""The mean local and global attention map of one response, small enough to look at.

A response that fits gets the map itself, from the reference. A longer one gets a thumbnail, whose cells pool
`cell` rows and columns, computed a block of rows at a time: no [N, N] map exists. Beside the map stands its
band, the attention to the nearest `width` tokens at the resolution of tokens, where the sawtooth of the local
heads shows.

Shape suffixes: N tokens of the sequence, H query heads, G key heads, D head size, h chosen heads of one layer,
M response rows, R rows and C columns of the thumbnail, W distances of the band, K rows of a block.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rhythm.ops.reference import attention_weights

MAX_CELLS = 192
BAND_WIDTH = 24
BLOCK_ROWS = 128


@dataclass(frozen=True)
class LayerAttention:
    """What the maps of a layer are computed from, for one sequence without padding.

    Attributes:
        query: [N, H, D]; like key, after projection, norm and position embedding.
        key: [N, G, D], G dividing H.
        scale, sliding_window, softcap: as in `rhythm.ops.reference.attention_weights`.
    """

    query: Tensor
    key: Tensor
    scale: float
    sliding_window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True)
class MeanMap:
    """The mean attention map Ā of some heads (paper eq. 8) over the rows of a response, pooled.

    Attributes:
        weights: [R, C] fp32. With cell 1 Ā[P + r, c] itself; else the mean over a cell's rows of the attention
            into its columns, so that a row sums to 1 in either case. 0 above the diagonal.
        cell: tokens a cell is high and wide. The prompt ends between two cells, so the first column and the
            last row may pool fewer.
        prompt_columns: columns that are the prompt's.
        band: [M, W] fp32, Ā[P + m, P + m − w]; NaN where the sequence has no token so far back.
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

    Memory beside the inputs: [h, N, N] of a layer's chosen heads where N ≤ max_cells, else [h, block, N].

    Raises:
        ValueError: no heads, a head whose layer is not among the layers or does not have it, a prompt_len that
            leaves no response, or a size below 1.
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
    step = n if n <= max_cells else cell * max(1, block_rows // cell)
    for layer, chosen in _by_layer(heads).items():
        for start in range(prompt_len, n, step):
            row_K = torch.arange(start, min(start + step, n), device=device)
            weights_KN = _summed_rows(layers[layer], chosen, row_K, whole=n <= max_cells) / len(heads)
            pooled_KC = torch.zeros((len(row_K), weights_RC.shape[1]), device=device)
            pooled_KC.index_add_(1, column_N[: weights_KN.shape[1]], weights_KN)
            weights_RC.index_add_(0, (row_K - prompt_len) // cell, pooled_KC)
            band_MW[row_K - prompt_len] += _band(weights_KN, row_K, width)
    row_M = torch.arange(n - prompt_len, device=device)
    rows_R = torch.bincount(row_M // cell, minlength=rows)
    return MeanMap(weights_RC / rows_R[:, None], cell, prompt_columns, band_MW)


def _summed_rows(layer: LayerAttention, heads: list[int], row_K: Tensor, *, whole: bool) -> Tensor:
    """[K, n] fp32, the rows of the heads' maps, added up; n is N for the whole map, else the last row's columns."""
    head_h = torch.tensor(heads, device=layer.query.device)
    group = layer.query.shape[1] // layer.key.shape[1]
    q_NhD, k_NhD = layer.query[:, head_h], layer.key[:, head_h // group]
    if whole:
        weights_hNN, _ = attention_weights(
            q_NhD, k_NhD, layer.scale, sliding_window=layer.sliding_window, softcap=layer.softcap
        )
        return weights_hNN[:, row_K].float().sum(dim=0)
    end = int(row_K[-1]) + 1
    score_hKN = layer.scale * (q_NhD[row_K].float().transpose(0, 1) @ k_NhD[:end].float().permute(1, 2, 0))
    if layer.softcap is not None:
        score_hKN = layer.softcap * torch.tanh(score_hKN / layer.softcap)
    distance_KN = row_K[:, None] - torch.arange(end, device=row_K.device)
    hidden_KN = distance_KN < 0
    if layer.sliding_window is not None:
        hidden_KN |= distance_KN >= layer.sliding_window
    return score_hKN.masked_fill(hidden_KN, -torch.inf).softmax(dim=-1).sum(dim=0)


def _band(weights_KN: Tensor, row_K: Tensor, width: int) -> Tensor:
    """[K, W]: the weight at distance 0, 1, …; NaN before the sequence's first token."""
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
        raise ValueError("heads is empty; a mean map needs at least one")
    for layer, head in heads:
        if layer not in layers or not 0 <= head < layers[layer].query.shape[1]:
            raise ValueError(f"heads holds (layer {layer}, head {head}); layers, which has {sorted(layers)}, lacks it")
    n = layers[heads[0][0]].query.shape[0]
    if not 0 <= prompt_len < n:
        raise ValueError(f"prompt_len is {prompt_len}; it must be from 0 to {n - 1}, to leave a response")
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}; it must be at least 1")
