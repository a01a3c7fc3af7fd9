"""Attention of single queries and short sequences on the CPU as two plain products: faster there than torch's kernel.

torch's fused attention works in tiles made for long sequences, and the key heads are copied once per query head for it
as soon as there is a mask. Here query heads that share a key head are rows of one product, and nothing is copied.

Shape suffixes: B sequences, H query heads, G key heads, g = H / G, T queries, S keys, D head size, E value head size;
N = B · G products of R = g · T rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rhythm.tap.attention_lse import SHORT_ATTENTION as _NAME

LARGEST = 48 * 48
"""Most pairs of query and key in a sequence; beyond them torch's kernel is faster. A single query, as in generation,
may have any number of keys.
"""


@contextmanager
def short_attention(model: Any) -> Iterator[None]:
    """While open, sdpa attention on the CPU is computed by products for single queries and for sequences up to LARGEST
    in fp32, and without copies of keys and values for single queries in other types. Other calls are sdpa's, and so is
    all attention of a model with another implementation, or whose backward pass computes activations again: that pass
    comes after the context.
    """
    config = model.config.get_text_config(decoder=True)
    again = torch.is_grad_enabled() and getattr(model, "is_gradient_checkpointing", False)
    if config._attn_implementation != "sdpa" or model.device.type != "cpu" or again:
        yield
        return
    if _NAME not in AttentionInterface():
        AttentionMaskInterface.register(_NAME, AttentionMaskInterface()["sdpa"])
        AttentionInterface.register(_NAME, _attention)
    # As a dict: a plain name would go to the configurations of sub-models too, such as a vision tower's.
    config._attn_implementation = {"": _NAME}
    try:
        yield
    finally:
        config._attn_implementation = {"": "sdpa"}


def _attention(
    module: nn.Module,
    query_BHTD: Tensor,
    key_BGSD: Tensor,
    value_BGSD: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function that transformers calls: as sdpa's, up to rounding. On queries that see no key, what it
    gives has no meaning.
    """
    single = query_BHTD.shape[2] == 1
    plain = dropout == 0 and options.get("position_bias") is None and options.get("cache") is None
    masked = single if attention_mask is None else attention_mask.dtype == torch.bool
    exact = query_BHTD.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if not (plain and masked and (single or (exact and query_BHTD.shape[2] * key_BGSD.shape[2] <= LARGEST))):
        result: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
            module, query_BHTD, key_BGSD, value_BGSD, attention_mask, dropout=dropout, scaling=scaling, **options
        )
        return result
    if not exact:  # the products would round the scores
        return _grouped(query_BHTD, key_BGSD, value_BGSD, attention_mask, scaling), None
    batch, heads, queries, size = query_BHTD.shape
    groups, keys = key_BGSD.shape[1:3]
    scale = size**-0.5 if scaling is None else scaling
    query_NRD = query_BHTD.reshape(batch * groups, -1, size)
    key_NDS = key_BGSD.reshape(batch * groups, keys, size).transpose(1, 2)
    if attention_mask is None:
        score_NRS = (scale * query_NRD) @ key_NDS
    else:
        # The product is added to the mask, which takes neither a pass of its own nor a gradient.
        hidden = torch.finfo(query_BHTD.dtype).min
        mask_BHTS = query_BHTD.new_zeros(attention_mask.shape).masked_fill_(~attention_mask, hidden)
        mask_NRS = mask_BHTS.expand(batch, heads, queries, keys).reshape(batch * groups, -1, keys)
        score_NRS = torch.baddbmm(mask_NRS, query_NRD, key_NDS, alpha=scale)
    out_NRE = score_NRS.softmax(dim=-1) @ value_BGSD.reshape(batch * groups, keys, -1)
    return out_NRE.view(batch, heads, queries, -1).transpose(1, 2).contiguous(), None


def _grouped(
    query_BH1D: Tensor, key_BGSD: Tensor, value_BGSD: Tensor, mask_B11S: Tensor | None, scale: float | None
) -> Tensor:
    """torch's attention of one query per sequence, [B, 1, H, D]: the heads of a group are queries of one head."""
    batch, heads, _, size = query_BH1D.shape
    query_BGgD = query_BH1D.reshape(batch, key_BGSD.shape[1], -1, size)
    mask = None if mask_B11S is None else mask_B11S.expand(-1, -1, query_BGgD.shape[2], -1)
    out_BGgD = scaled_dot_product_attention(query_BGgD, key_BGSD, value_BGSD, attn_mask=mask, scale=scale)
    return out_BGgD.reshape(batch, 1, heads, value_BGSD.shape[3])
