"""Recognizes the rows of a batch by their tokens, however a Megatron trainer packs, orders and splits them.

Shape suffixes: B sequences of a forward pass, S positions of a padded row, T of a packed one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from hashlib import blake2b
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from rhythm.integrations.adapter import response_mask
from rhythm.tap.attention_form import UnsupportedAttention
from rhythm.tap.megatron import MegatronTap, attach
from rhythm.tap.megatron_layers import MicroBatch, decoder_layers
from rhythm.tap.signals_config import SignalsConfig


def attach_by_tokens(chunks: Sequence[nn.Module], signals: SignalsConfig, shift: int) -> MegatronTap:
    """A tap on every forward pass whose arguments are input_ids, loss_mask and packed_seq_params or a 2D attention_mask
    (1 on tokens).

    Args:
        shift: how many positions before a token its entry in loss_mask stands.

    Raises:
        UnsupportedAttention: context parallelism: rows can't be told by the tokens that a rank has of them.
    """
    for layer in decoder_layers(chunks):
        if layer.context_ranks > 1:
            raise layer.refusal(f"context parallelism, whose {layer.context_ranks} ranks see parts of each sequence")
    return attach(chunks, signals, locate=partial(_located, shift))


def response_signals(
    tap: MegatronTap,
    tokens: Sequence[Tensor],
    response_lens: Sequence[int],
    counts: Sequence[bool],
) -> dict[str, list[Tensor]]:
    """WAAD and FAI of each response, [R]. A collective of the ranks that the model is split over.

    Args:
        tokens: [n] of each row of the batch.
        response_lens: how many of them, at the end, are the response.
        counts: whether the loss counts it.
    """
    lens = [len(row) for row in tokens]
    signals = tap.signals(response_mask(lens, response_lens, counts), [name_of(row) for row in tokens])
    return {
        name: [row[n - r : n] for row, n, r in zip(value, lens, response_lens, strict=True)]
        for name, value in (("waad", signals.waad), ("fai", signals.fai))
    }


def name_of(tokens: Tensor) -> str:
    """Of a row, [n], by its tokens."""
    return blake2b(tokens.cpu().long().numpy().tobytes(), digest_size=16).hexdigest()


def bounds(kwargs: dict[str, Any]) -> list[int]:
    """Where each sequence of a packed forward pass begins in its row, and where the last one ends, with what pads it.

    Raises:
        UnsupportedAttention: packed rows without packed_seq_params.
    """
    packed = kwargs.get("packed_seq_params")
    if packed is None:
        raise UnsupportedAttention(
            "a forward pass with neither packed_seq_params nor a 2D attention_mask, so without the lengths of sequences"
        )
    padded = getattr(packed, "cu_seqlens_q_padded", None)
    where: list[int] = (packed.cu_seqlens_q if padded is None else padded).tolist()
    return where


def _located(shift: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> MicroBatch:
    """The rows of a forward pass. A response begins with the first token that counts."""
    ids, counted, mask = kwargs["input_ids"].cpu(), kwargs["loss_mask"].cpu(), kwargs.get("attention_mask")
    first: list[int] | None = None
    if kwargs.get("packed_seq_params") is None and isinstance(mask, Tensor) and mask.ndim == 2:
        lens = mask.sum(dim=-1).tolist()
        rows = [(ids[row, :n], counted[row, :n]) for row, n in enumerate(lens)]
    else:
        first = bounds(kwargs)[:-1]
        lens = [end - start for start, end in pairwise(kwargs["packed_seq_params"].cu_seqlens_q.tolist())]
        rows = [
            (ids[0, start : start + n], counted[0, start : start + n]) for start, n in zip(first, lens, strict=True)
        ]
        if not rows[-1][1].any() and not rows[-1][0].any():  # padding to a multiple, as a segment of its own
            del rows[-1], lens[-1], first[-1]
    places = [mask.nonzero().flatten().tolist() for _, mask in rows]
    prompts = [shift + found[0] if found else n for found, n in zip(places, lens, strict=True)]
    return MicroBatch([name_of(tokens) for tokens, _ in rows], lens, prompts, first)
