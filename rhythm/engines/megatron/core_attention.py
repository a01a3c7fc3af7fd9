"""Causal attention over packed sequences, as Megatron's core_attention.

Shape suffixes: T tokens of all sequences on one axis, H this rank's query heads, G its key heads, D head size.
"""

from __future__ import annotations

import inspect
from itertools import pairwise
from typing import Any

import torch
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rhythm.engines.megatron.packing import PackedRows


class PackedAttention(MegatronModule):  # type: ignore[misc]
    """core_attention of Megatron's layers for sequences packed into one row without padding."""

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_: Any):
        super().__init__(config=config)
        self.scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale

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
        return packed_attention(query, key, value, packed_seq_params, self.scale)


def packed_attention(q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, packed: PackedRows, scale: float) -> Tensor:
    """Causal attention output [T, H, D], differentiable: by torch's varlen flash attention on a GPU in half precision,
    else by SDPA one sequence at a time.
    """
    if q_THD.is_cuda and q_THD.dtype in (torch.float16, torch.bfloat16):
        return _varlen(q_THD, k_TGD, v_TGD, packed, scale)
    bounds = packed.cu_seqlens_q.tolist()
    parts = []
    for start, end in pairwise(bounds):
        q_HTD, k_GTD, v_GTD = (x[start:end].transpose(0, 1)[None] for x in (q_THD, k_TGD, v_TGD))
        out = scaled_dot_product_attention(q_HTD, k_GTD, v_GTD, is_causal=True, scale=scale, enable_gqa=True)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


def _varlen(q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, packed: PackedRows, scale: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    takes = inspect.signature(varlen_attn).parameters
    # The argument for causal attention changed between torch versions.
    causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in takes else {"is_causal": True}
    if "enable_gqa" in takes:
        causal["enable_gqa"] = True
    else:
        group = q_THD.shape[1] // k_TGD.shape[1]
        k_TGD, v_TGD = (x.repeat_interleave(group, dim=1) for x in (k_TGD, v_TGD))
    cu_seqlens, longest = packed.bounds, packed.max_seqlen_q
    assert cu_seqlens is not None
    out = varlen_attn(q_THD, k_TGD, v_TGD, cu_seqlens, cu_seqlens, longest, longest, scale=scale, **causal)
    assert isinstance(out, Tensor)  # it returns (out, lse) only if lse is requested
    return out
