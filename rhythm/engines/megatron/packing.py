"""Packs the rows of a micro-batch into one sequence without padding.

Shape suffixes: B rows of the whole batch, P positions of the padded batch, b rows of a micro-batch, T all their
tokens, N the response tokens among them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from rhythm.engines.interfaces import Rollout
from rhythm.tap.megatron_layers import MicroBatch


@dataclass
class PackedRows(PackedSeqParams):  # type: ignore[misc]  # Megatron is untyped here
    """Where the sequences of a packed micro-batch lie, in the form that Megatron's layers take.

    The RoPE of Megatron's plain layers reads cu_seqlens_q and cu_seqlens_kv in each layer: they are on the host, so
    that it doesn't wait for the device there. Fused RoPE (TransformerEngine's) takes them on the device.

    Attributes:
        bounds: cu_seqlens, int32 [b + 1], on the rank's device, for core_attention.
    """

    bounds: Tensor | None = None


@dataclass(frozen=True)
class Packed:
    """A packed micro-batch on the rank's device.

    Attributes:
        rows: int64 [b], indices of its rows in the whole batch, on the CPU.
        input_ids: int64 [T].
        position_ids: int64 [T].
        sequences: where the rows lie, in the form that Megatron's layers take.
        micro: rows and lengths in the form that a tap takes.
        predicts: int64 [N], positions whose output predicts a response token.
        target: bool [b, width], True on the N response tokens of the padded rows.
        width: length of the longest row.
    """

    rows: Tensor
    input_ids: Tensor
    position_ids: Tensor
    sequences: PackedRows
    micro: MicroBatch
    predicts: Tensor
    target: Tensor
    width: int

    @property
    def tokens(self) -> Tensor:
        """The response tokens, int64 [N]."""
        return self.input_ids[self.predicts + 1]


def pack(rollout: Rollout, rows: Tensor, device: torch.device, *, fused_rope: bool = False) -> Packed:
    """Pack rows of a right-padded rollout. `fused_rope`: whether TransformerEngine applies RoPE."""
    mask_bP, target_bP = rollout.attention_mask[rows], rollout.response_mask[rows]
    lens = mask_bP.sum(dim=1)
    width = int(lens.max())
    cu_seqlens = torch.zeros(len(rows) + 1, dtype=torch.int32)
    cu_seqlens[1:] = lens.cumsum(0)
    positions_bP = torch.arange(mask_bP.shape[1]).expand_as(mask_bP)
    on_device = cu_seqlens.to(device)
    return Packed(
        rows=rows,
        input_ids=rollout.input_ids[rows][mask_bP].to(device),
        position_ids=positions_bP[mask_bP].to(device),
        sequences=PackedRows(
            qkv_format="thd",
            cu_seqlens_q=on_device if fused_rope else cu_seqlens,
            cu_seqlens_kv=on_device if fused_rope else cu_seqlens,
            max_seqlen_q=width,
            max_seqlen_kv=width,
            bounds=on_device,
        ),
        micro=MicroBatch(rows.tolist(), lens.tolist(), rollout.prompt_lens[rows].tolist()),
        # The token at t was sampled from the model's output at t − 1, which exists since every row has a prompt.
        predicts=(target_bP[mask_bP].nonzero()[:, 0] - 1).to(device),
        target=target_bP[:, :width].to(device),
        width=width,
    )
