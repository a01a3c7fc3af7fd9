"""Packs the rows of a micro-batch into one sequence, without padding unless ranks split it.

Shape suffixes: B rows of the whole batch, P positions of the padded batch, b rows of a micro-batch, T all their
tokens (of context parallel ranks: this rank's, padding included), N the response tokens that they predict.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor, distributed

from rhythm.engines.interfaces import Rollout
from rhythm.engines.megatron.context import ContextRows, padded_rows
from rhythm.tap.megatron_layers import MicroBatch


@dataclass
class PackedRows(PackedSeqParams):  # type: ignore[misc]  # Megatron is untyped here
    """Where the sequences of a packed micro-batch lie, in the form that Megatron's layers take.

    The RoPE of Megatron's plain layers reads cu_seqlens_q and cu_seqlens_kv in each layer: they are on the host, so
    that it doesn't wait for the device there. Fused RoPE (TransformerEngine's) takes them on the device.

    Attributes:
        bounds: cu_seqlens, int32 [b + 1], on the rank's device, for core_attention.
        context: what a context parallel rank has of the rows; cu_seqlens are those of whole rows, padding included.
            None: all of them.
    """

    bounds: Tensor | None = None
    context: ContextRows | None = None


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
        tokens: int64 [N], these tokens.
        target: bool [b, width], True on the response tokens of the padded rows.
        own: bool [b, width], True on the N of them that this rank predicts: on all without context parallelism.
        width: length of the longest row.
    """

    rows: Tensor
    input_ids: Tensor
    position_ids: Tensor
    sequences: PackedRows
    micro: MicroBatch
    predicts: Tensor
    tokens: Tensor
    target: Tensor
    own: Tensor
    width: int


def pack(
    rollout: Rollout,
    rows: Tensor,
    device: torch.device,
    *,
    fused_rope: bool = False,
    context: distributed.ProcessGroup | None = None,
    multiple: int = 1,
) -> Packed:
    """Pack rows of a right-padded rollout.

    Args:
        fused_rope: whether TransformerEngine applies RoPE.
        context: the ranks that split each row; None, or one rank: it has them whole.
        multiple: a divisor of this rank's tokens, for which the last row is padded: tensor ranks that split them.
    """
    mask_bP, target_bP = rollout.attention_mask[rows], rollout.response_mask[rows]
    lens = mask_bP.sum(dim=1).tolist()
    ranks = 1 if context is None else context.size()
    padded = lens if ranks == 1 else padded_rows(lens, ranks)
    of_all = ranks * multiple if ranks == 1 else math.lcm(2 * ranks, ranks * multiple)
    padded = [*padded[:-1], padded[-1] + -sum(padded) % of_all]
    starts = [*accumulate(padded, initial=0)]
    cu_seqlens = torch.tensor(starts, dtype=torch.int32)
    on_device = cu_seqlens.to(device)
    # Of whole rows: the place on the packed axis of each token, its id and its position.
    place = torch.cat([torch.arange(length) + start for start, length in zip(starts, lens, strict=False)])
    ids, positions = torch.zeros(2, starts[-1], dtype=torch.int64)
    ids[place] = rollout.input_ids[rows][mask_bP]
    positions[place] = torch.cat([torch.arange(length) for length in lens])
    # The token at t was sampled from the model's output at t − 1, which exists since every row has a prompt.
    sampled = place[target_bP[mask_bP]]
    predicts, own = sampled - 1, torch.ones(len(sampled), dtype=torch.bool)
    shard = None if context is None or ranks == 1 else ContextRows.of(padded, context, device)
    tokens = ids[sampled]
    if shard is not None:
        at = torch.full((starts[-1],), -1)
        at[shard.places] = torch.arange(len(shard.places))
        own = at[predicts] >= 0
        predicts, tokens = at[predicts][own], tokens[own]
        ids, positions = ids[shard.places], positions[shard.places]
    width = max(lens)
    target_bW = target_bP[:, :width]
    return Packed(
        rows=rows,
        input_ids=ids.to(device),
        position_ids=positions.to(device),
        sequences=PackedRows(
            qkv_format="thd",
            cu_seqlens_q=on_device if fused_rope else cu_seqlens,
            cu_seqlens_kv=on_device if fused_rope else cu_seqlens,
            max_seqlen_q=max(padded),
            max_seqlen_kv=max(padded),
            bounds=on_device,
            context=shard,
        ),
        micro=MicroBatch(
            rows.tolist(), lens, rollout.prompt_lens[rows].tolist(), None if padded == lens else starts[:-1]
        ),
        predicts=predicts.to(device),
        tokens=tokens.to(device),
        target=target_bW.to(device),
        own=torch.zeros_like(target_bW).masked_scatter(target_bW, own).to(device),
        width=width,
    )
