"""Micro-batches of a rank: rows of the batch packed into one sequence without padding.

Shape suffixes: B rows of the whole batch, P positions of the padded batch, b rows of a micro-batch, T their tokens
on one axis, N response tokens among them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from rhythm.engines.interfaces import Rollout


@dataclass(frozen=True)
class Packed:
    """A micro-batch on the rank's device.

    Attributes:
        rows: int64 [b], its rows of the whole batch, on the CPU.
        input_ids: int64 [T].
        position_ids: int64 [T].
        cu_seqlens: int32 [b + 1].
        prompt_lens: int64 [b].
        sequences: the same for Megatron's layers.
        predicts: int64 [N]: the positions whose output a response token was drawn from.
        target: bool [b, width]: response tokens among the rows, padded as the batch is; N are true, in order.
        width: of the longest row.
    """

    rows: Tensor
    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    prompt_lens: Tensor
    sequences: PackedSeqParams
    predicts: Tensor
    target: Tensor
    width: int

    @property
    def tokens(self) -> Tensor:
        """int64 [N]: the response tokens."""
        return self.input_ids[self.predicts + 1]


def deal_micro_batches(lens_B: Tensor, data_ranks: int, micro_batch_size: int) -> list[list[Tensor]]:
    """For every data rank its micro-batches, each as row indices: rows of about equal length together.

    Rows are dealt out by falling length, forth and back, so that all ranks get about as many tokens. With fewer rows
    than ranks, some have none.
    """
    order = lens_B.argsort(descending=True, stable=True)
    turn = torch.arange(len(order))
    forth = turn % (2 * data_ranks)
    rank_of = torch.minimum(forth, 2 * data_ranks - 1 - forth)
    dealt = [order[rank_of == rank] for rank in range(data_ranks)]
    return [list(torch.split(rows, micro_batch_size)) if len(rows) else [] for rows in dealt]


def pack(rollout: Rollout, rows: Tensor, device: torch.device) -> Packed:
    """Rows of a rollout, whose padding stands on the right."""
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
        cu_seqlens=on_device,
        prompt_lens=rollout.prompt_lens[rows].to(device),
        sequences=PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=on_device,
            cu_seqlens_kv=on_device,
            max_seqlen_q=width,
            max_seqlen_kv=width,
        ),
        # The token at t was drawn from what the model said at t − 1; every row has a prompt.
        predicts=(target_bP[mask_bP].nonzero()[:, 0] - 1).to(device),
        target=target_bP[:, :width].to(device),
        width=width,
    )
