"""A model with Megatron-core's module names and calls, in plain torch: decoder.layers.N.self_attention.core_attention
gets (query, key, value, attention_mask, *, attn_mask_type, attention_bias, packed_seq_params).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

HEADS, KEY_HEADS, D, WIDTH, VOCABULARY = 4, 2, 8, 24, 50


def config(**changes: Any) -> Any:
    """The fields of a TransformerConfig that the tap reads."""
    fields: dict[str, Any] = {
        "num_layers": 4,
        "num_attention_heads": HEADS,
        "num_query_groups": KEY_HEADS,
        "kv_channels": D,
        "softmax_scale": None,
        "softmax_type": "vanilla",
        "window_size": None,
        "window_attn_skip_freq": None,
        "attention_dropout": 0.0,
        "context_parallel_size": 1,
    }
    return SimpleNamespace(**(fields | changes))


def packed_params(bounds: list[int], **changes: Any) -> Any:
    """A PackedSeqParams."""
    fields: dict[str, Any] = {
        "qkv_format": "thd",
        "cu_seqlens_q": torch.tensor(bounds, dtype=torch.int32),
        "cu_seqlens_q_padded": None,
    }
    return SimpleNamespace(**(fields | changes))


def pack(rows: Sequence[Tensor], multiple: int) -> tuple[Tensor, list[int]]:
    """Rows one after the other, [1, T], each padded with zeros to a multiple; where each begins, and the last ends."""
    padded = [nn.functional.pad(row, (0, -len(row) % multiple)) for row in rows]
    return torch.cat(padded)[None], [*accumulate(map(len, padded), initial=0)]


class CoreAttention(nn.Module):
    """Causal attention by its definition; `twist` makes its scores others than the configuration says."""

    def __init__(self, settings: Any, number: int) -> None:
        super().__init__()
        self.settings, self.number, self.twist = settings, number, 1.0
        self.seen: list[tuple[Tensor, Tensor]] = []
        if settings.softmax_type == "learnable":
            self.softmax_offset = nn.Parameter(torch.randn(HEADS))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Any:
        if packed_seq_params is None:
            masked = attention_mask is not None and attention_mask.ndim == 4
            hidden = attention_mask[:, 0] if masked else [None] * query.shape[1]
            parts = [self._of_one(query[:, b], key[:, b], value[:, b], hidden[b]) for b in range(query.shape[1])]
            out, lse = (torch.stack(x, dim=1) for x in zip(*parts, strict=True))
            return out.flatten(2)
        padded = packed_seq_params.cu_seqlens_q_padded
        bounds = (packed_seq_params.cu_seqlens_q if padded is None else padded).tolist()
        parts = [self._of_one(query[a:b], key[a:b], value[a:b]) for a, b in pairwise(bounds)]
        out, lse = (torch.cat(x) for x in zip(*parts, strict=True))
        return (out.flatten(1), lse.T) if self.settings.gives_lse else out.flatten(1)

    def _of_one(
        self, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, more_hidden_TS: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Output [T, H, D] and lse [T, H]."""
        k_THD, v_THD = (x.repeat_interleave(HEADS // KEY_HEADS, dim=1) for x in (k_TGD, v_TGD))
        scale = self.settings.softmax_scale or D**-0.5
        score_HTS = torch.einsum("thd,shd->hts", q_THD, k_THD) * scale * self.twist
        T = len(q_THD)
        distance_TS = torch.arange(T)[:, None] - torch.arange(T)
        hidden_TS = distance_TS < 0
        frequency = self.settings.window_attn_skip_freq
        if self.settings.window_size and not (frequency and self.number % frequency == 0):
            hidden_TS = hidden_TS | (distance_TS > self.settings.window_size[0])
        if more_hidden_TS is not None:
            hidden_TS = hidden_TS | more_hidden_TS
        score_HTS = score_HTS.masked_fill(hidden_TS, -torch.inf)
        lse_HT = score_HTS.logsumexp(dim=-1)
        if self.settings.softmax_type == "learnable":
            lse_HT = torch.logaddexp(lse_HT, self.softmax_offset[:, None])
        weight_HTS = (score_HTS - lse_HT[..., None]).exp().nan_to_num()  # of padding
        return torch.einsum("hts,shd->thd", weight_HTS, v_THD), lse_HT.T


class SelfAttention(nn.Module):
    def __init__(self, settings: Any, number: int) -> None:
        super().__init__()
        self.config, self.layer_number = settings, number
        self.attn_mask_type = SimpleNamespace(name="causal")
        self.linear_qkv = nn.Linear(WIDTH, (HEADS + 2 * KEY_HEADS) * D)
        self.linear_proj = nn.Linear(HEADS * D, WIDTH)
        self.core_attention = CoreAttention(settings, number)

    def forward(self, hidden_SBW: Tensor, mask: Tensor | None, packed: Any) -> Tensor:
        mixed = self.linear_qkv(hidden_SBW).unflatten(-1, (-1, D))
        q, k, v = mixed.split([HEADS, KEY_HEADS, KEY_HEADS], dim=2)
        if packed is not None:
            q, k, v = (x.squeeze(1) for x in (q, k, v))
        self.core_attention.seen.append((q.detach(), k.detach()))
        got = self.core_attention(q, k, v, mask, attn_mask_type=None, packed_seq_params=packed)
        out = got[0] if isinstance(got, tuple) else got
        return self.linear_proj(out if packed is None else out[:, None])


class TransformerLayer(nn.Module):
    def __init__(self, settings: Any, number: int) -> None:
        super().__init__()
        self.self_attention = SelfAttention(settings, number)

    def forward(self, hidden_SBW: Tensor, mask: Tensor | None, packed: Any) -> Tensor:
        return hidden_SBW + self.self_attention(hidden_SBW, mask, packed)


class Model(nn.Module):
    """A GPTModel: input_ids [B, S] → hidden states [S, B, W]."""

    def __init__(self, *, recompute: bool = False, gives_lse: bool = False, **changes: Any) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.config = config(gives_lse=gives_lse, **changes)
        self.recompute = recompute
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.decoder = nn.Module()
        self.decoder.layers = nn.ModuleList(TransformerLayer(self.config, 1 + i) for i in range(self.config.num_layers))
        with torch.no_grad():
            for layer in self.decoder.layers:  # sharper, but not one-hot
                layer.self_attention.linear_qkv.weight.mul_(2.5)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        packed_seq_params: Any = None,
        loss_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        hidden = self.embedding(input_ids).transpose(0, 1)
        for layer in self.decoder.layers:
            arguments = (hidden, attention_mask, packed_seq_params)
            hidden = checkpoint(layer, *arguments, use_reentrant=True) if self.recompute else layer(*arguments)
        return hidden

    def cores(self) -> list[CoreAttention]:
        return [layer.self_attention.core_attention for layer in self.decoder.layers]
