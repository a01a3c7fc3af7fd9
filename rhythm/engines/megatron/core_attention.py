"""Causal attention over packed sequences, as Megatron's core_attention.

Shape suffixes: T tokens of all sequences on one axis (of context parallel ranks: this rank's), Q queries and K keys of
some of them, H this rank's query heads, G its key heads, D head size.
"""

from __future__ import annotations

import inspect
from itertools import pairwise
from typing import Any

import torch
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rhythm.engines.megatron.context import ContextRows, gathered_with_gradient
from rhythm.engines.megatron.packing import PackedRows


class PackedAttention(MegatronModule):  # type: ignore[misc]
    """core_attention of Megatron's layers for sequences packed into one row without padding."""

    def __init__(
        self, config: TransformerConfig, layer_number: int, softmax_scale: float | None = None, **_: Any
    ) -> None:
        super().__init__(config=config)
        scale = config.softmax_scale if softmax_scale is None else softmax_scale
        self.scale = config.kv_channels**-0.5 if scale is None else scale
        self.window = window_of(config, layer_number)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedRows | None = None,
    ) -> Tensor:
        """query [T, H, D], key and value [T, G, D] → [T, H, D]. Raises ValueError unless the batch is packed."""
        if packed_seq_params is None or attention_bias is not None:
            raise ValueError("rhythm's core_attention needs packed sequences (qkv_format thd) and supports no bias")
        return packed_attention(query, key, value, packed_seq_params, self.scale, self.window)


def window_of(config: TransformerConfig, layer_number: int) -> int | None:
    """Keys that a token of a layer sees, itself among them; None: all. `layer_number`: from 1, over the model."""
    if config.window_size is None or not config.window_attn_skip_freq[layer_number - 1]:
        return None
    return int(config.window_size[0]) + 1


def packed_attention(
    q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, packed: PackedRows, scale: float, window: int | None = None
) -> Tensor:
    """Causal attention output [T, H, D], differentiable: by torch's varlen flash attention on a GPU in half precision,
    else by SDPA one sequence at a time. Context parallel ranks gather keys and values. `window`: keys that a token
    sees, itself among them.
    """
    if packed.context is not None:
        return _over_ranks(q_THD, k_TGD, v_TGD, packed.context, scale, window)
    if _is_for_flash(q_THD):
        assert packed.bounds is not None
        longest = packed.max_seqlen_q
        return _varlen(q_THD, k_TGD, v_TGD, packed.bounds, packed.bounds, longest, longest, scale, window)
    return _one_by_one(q_THD, k_TGD, v_TGD, packed.cu_seqlens_q, packed.cu_seqlens_q, scale, window)


def _over_ranks(
    q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, context: ContextRows, scale: float, window: int | None
) -> Tensor:
    """This rank's queries: its first chunks, then its second ones, each against the keys up to its end."""
    # One collective, and in the backward pass one: in the same order on every rank.
    both_T2GD = gathered_with_gradient(torch.stack([k_TGD, v_TGD], dim=1), context.group)
    parts = []
    for half in context.halves:
        # index_select of places that are all different: gradients are added in no order that could vary.
        q_QHD, (k_KGD, v_KGD) = q_THD.index_select(0, half.queries), both_T2GD.index_select(0, half.keys).unbind(1)
        if _is_for_flash(q_THD):
            longest = (half.longest_queries, half.longest_keys)
            parts.append(_varlen(q_QHD, k_KGD, v_KGD, half.cu_queries, half.cu_keys, *longest, scale, window))
        else:
            parts.append(_one_by_one(q_QHD, k_KGD, v_KGD, half.cu_queries, half.cu_keys, scale, window))
    return torch.cat(parts).index_select(0, context.order)


def _is_for_flash(q_THD: Tensor) -> bool:
    return q_THD.is_cuda and q_THD.dtype in (torch.float16, torch.bfloat16)


def _one_by_one(
    q_QHD: Tensor,
    k_KGD: Tensor,
    v_KGD: Tensor,
    cu_queries: Tensor,
    cu_keys: Tensor,
    scale: float,
    window: int | None,
) -> Tensor:
    """Queries are those of the last tokens of each sequence."""
    parts = []
    for rows, keys in zip(pairwise(cu_queries.tolist()), pairwise(cu_keys.tolist()), strict=True):
        q_HQD = q_QHD[slice(*rows)].transpose(0, 1)[None]
        k_GKD, v_GKD = (x[slice(*keys)].transpose(0, 1)[None] for x in (k_KGD, v_KGD))
        Q, K = q_HQD.shape[2], k_GKD.shape[2]
        whole = Q == K and (window is None or window >= K)
        seen_QK = None if whole else torch.ones(Q, K, dtype=torch.bool, device=q_QHD.device).tril(K - Q)
        if seen_QK is not None and window is not None:
            seen_QK = seen_QK.triu(K - Q - window + 1)
        out = scaled_dot_product_attention(
            q_HQD, k_GKD, v_GKD, attn_mask=seen_QK, is_causal=whole, scale=scale, enable_gqa=True
        )
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


def _varlen(
    q_QHD: Tensor,
    k_KGD: Tensor,
    v_KGD: Tensor,
    cu_queries: Tensor,
    cu_keys: Tensor,
    longest_queries: int,
    longest_keys: int,
    scale: float,
    window: int | None,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    takes = inspect.signature(varlen_attn).parameters
    behind = -1 if window is None else window - 1
    # The argument for causal attention changed between torch versions.
    causal: dict[str, Any] = {"window_size": (behind, 0)} if "window_size" in takes else {"is_causal": True}
    if window is not None and "window_size" not in takes:
        raise ValueError(f"torch {torch.__version__} has no varlen_attn with windows: gemma3_text needs a newer one")
    if "enable_gqa" in takes:
        causal["enable_gqa"] = True
    else:
        group = q_QHD.shape[1] // k_KGD.shape[1]
        k_KGD, v_KGD = (x.repeat_interleave(group, dim=1) for x in (k_KGD, v_KGD))
    out = varlen_attn(q_QHD, k_KGD, v_KGD, cu_queries, cu_keys, longest_queries, longest_keys, scale=scale, **causal)
    assert isinstance(out, Tensor)  # it returns (out, lse) only if lse is requested
    return out
