"""Megatron's layers: where their core_attention is, and which attention it computes.

Nothing of Megatron is imported: modules are found by the names that megatron-core gives them, and options are read off
their TransformerConfig.

Shape suffixes: B sequences, S positions of a padded row, T tokens of a packed one, H query heads of a rank, G its key
heads, D head size, E that of the values.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, distributed, nn

from rhythm.tap.attention_form import AttentionCall, AttentionForm, UnsupportedAttention
from rhythm.tap.context_parallel import Shard
from rhythm.tap.padding import PaddedBatch

CORE_ATTENTION = re.compile(r"(?:^|\.)decoder\.layers\.\d+\.self_attention\.core_attention$")
OTHER_TOWERS = re.compile(r"(?:^|\.)(?:mtp|vision\w*|visual|audio\w*)\.")
CAUSAL_MASKS = {"causal", "padding_causal", "causal_bottom_right", "padding_causal_bottom_right", "arbitrary"}
ARGUMENTS = ("query", "key", "value", "attention_mask", "attn_mask_type", "attention_bias", "packed_seq_params")


@dataclass(frozen=True)
class MicroBatch:
    """The sequences of one forward pass, in its order.

    Attributes:
        rows: what each sequence is in the batch: its index there, or any other name.
        lens: tokens of each.
        prompt_lens: how many of them are its prompt.
        first: where the tokens of each begin: on the packed axis, or in its padded row. None: packed one after the
            other, or padded on the right.

    With context parallelism these are of whole sequences, on the axis of all ranks.
    """

    rows: Sequence[Hashable]
    lens: Sequence[int]
    prompt_lens: Sequence[int]
    first: Sequence[int] | None = None

    def __post_init__(self) -> None:
        for name in ("lens", "prompt_lens", "first"):
            given = getattr(self, name)
            if given is not None and len(given) != len(self.rows):
                raise ValueError(f"{name} has length {len(given)}; it must have one entry per row, {len(self.rows)}")

    def placed(self, width: int, packed: bool, device: torch.device) -> PaddedBatch:
        """Where the tokens are: in rows of `width` positions, or in one packed row of so many. ValueError if they don't
        fit.
        """
        return PaddedBatch.from_lengths(self.lens, self.prompt_lens, self.first, width, packed, device)


@dataclass(frozen=True)
class Layer:
    """The attention of a decoder layer. index: from 0, over the whole model."""

    index: int
    attention: nn.Module
    core: nn.Module

    @property
    def config(self) -> Any:
        """Its TransformerConfig."""
        return self.attention.config

    @property
    def where(self) -> str:
        """For messages."""
        return f"Megatron's {type(self.core).__name__}, layer {self.index}"

    def refusal(self, feature: str) -> UnsupportedAttention:
        """The error for attention whose statistics would be wrong."""
        return UnsupportedAttention(f"{self.where}: {feature}; statistics of such attention can't be computed")

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[AttentionCall, Any]:
        """A call of core_attention in the form of transformers' attention interface, and its packed_seq_params, None
        for padded rows.

        Raises:
            UnsupportedAttention: attention of another kind than causal self-attention.
        """
        given = dict(zip(ARGUMENTS, args, strict=False)) | kwargs
        if given.get("attention_bias") is not None:
            raise self.refusal("an attention bias")
        if self.core.training and self.config.attention_dropout:
            raise self.refusal(f"attention dropout of {self.config.attention_dropout} in train mode")
        kind = given.get("attn_mask_type")
        kind = getattr(self.attention, "attn_mask_type", None) if kind is None else kind
        if (name := getattr(kind, "name", str(kind))) not in CAUSAL_MASKS:
            raise self.refusal(f"a mask of type {name}, which is not causal")
        packed = given.get("packed_seq_params")
        packed = packed if getattr(packed, "qkv_format", None) == "thd" else None
        tensors = [given[name].detach() for name in ("query", "key", "value")]
        if packed is not None:  # [T, H, D] or [T, 1, H, D]
            tensors = [x.flatten(0, -3)[:, None] for x in tensors]
        elif tensors[0].ndim != 4:
            raise self.refusal("packed rows without packed_seq_params, so without the lengths of the sequences")
        query, key, value = (x.permute(1, 2, 0, 3) for x in tensors)
        if query.shape[2] != key.shape[2]:
            raise self.refusal(f"{key.shape[2]} keys for {query.shape[2]} queries, as with a KV cache")
        return AttentionCall(
            where=self.where,
            layer=self.index,
            # The probe rounds scores as the local DotProductAttention does, which multiplies in the model's type.
            implementation="eager" if hasattr(self.core, "scale_mask_softmax") else type(self.core).__name__,
            function=self.core.forward,
            module=self.core,
            query=query,
            key=key,
            value=value,
            mask=given.get("attention_mask"),
            options={},
        ), packed

    @property
    def context_ranks(self) -> int:
        """Ranks that split each sequence."""
        return int(getattr(self.config, "context_parallel_size", 1))

    def shard(self, packed: Any, batch: PaddedBatch, group: distributed.ProcessGroup, positions: int) -> Shard:
        """What this rank of a context parallel group has of a batch. Waits for the device of packed_seq_params.

        Args:
            packed: packed_seq_params; None for padded rows.
            positions: of this rank, on the packed axis or in each of its padded rows.

        Raises:
            UnsupportedAttention: sequences that Megatron doesn't cut into chunks for this group.
        """
        ranks = group.size()
        if packed is None:
            rows = [positions * ranks] * len(batch.lens)
        else:
            if getattr(packed, "local_cp_size", None) not in (None, ranks):
                raise self.refusal(f"context parallelism of {packed.local_cp_size} ranks in a group of {ranks}")
            bounds = _cu_seqlens(packed).tolist()
            rows = [end - start for start, end in pairwise(bounds)]
            if bounds[-1] != positions * ranks:
                raise self.refusal(f"packed sequences of {bounds[-1]} positions, of which this rank has {positions}")
        try:
            return Shard(batch, rows, ranks, group.rank())
        except ValueError as error:
            raise self.refusal(f"context parallelism, {error}") from None

    def form(self, call: AttentionCall) -> AttentionForm:
        """Raises UnsupportedAttention for a window that looks ahead, or a softmax of an unknown type."""
        config, H, D = self.config, call.query.shape[1], call.query.shape[3]
        scale = getattr(self.attention, "softmax_scale", None)  # of multi-latent attention
        scale = getattr(config, "softmax_scale", None) if scale is None else scale
        sinks, kind = None, getattr(config, "softmax_type", "vanilla")
        if kind == "off-by-one":
            sinks = torch.zeros(H, device=call.query.device)
        elif kind == "learnable":
            offset: Any = self.core.softmax_offset
            sinks = offset.detach().flatten()
        elif kind != "vanilla":
            raise self.refusal(f"a softmax of type {kind!r}")
        return AttentionForm(
            scale=D**-0.5 if scale is None else scale, window=self._window(), softcap=None, sinks=sinks
        )

    def _window(self) -> int | None:
        """Keys that a token sees, itself among them; None: all."""
        window = getattr(self.config, "window_size", None)
        skipped = getattr(self.config, "window_attn_skip_freq", None)
        if window and isinstance(skipped, int) and (self.index + 1) % skipped == 0:
            return None
        if not window or (isinstance(skipped, list) and not skipped[self.index]):
            return None
        behind, ahead = window
        if ahead > 0 or behind < 0:
            raise self.refusal(f"a window of {tuple(window)}, which is not (tokens behind, 0)")
        return int(behind) + 1


def decoder_layers(chunks: Sequence[nn.Module]) -> list[Layer]:
    """The attention of every decoder layer in these chunks of a Megatron model, those of vision towers and of
    multi-token prediction left out.

    Raises ValueError for two of one layer number.
    """
    found: dict[int, Layer] = {}
    for chunk in chunks:
        for name, core in chunk.named_modules():
            if not CORE_ATTENTION.search(name) or OTHER_TOWERS.search(name):
                continue
            attention: Any = chunk.get_submodule(name.rpartition(".")[0])
            layer = Layer(int(attention.layer_number) - 1, attention, core)
            if layer.index in found:
                raise ValueError(f"model has two layers of number {layer.index + 1}; attach to one model at a time")
            found[layer.index] = layer
    return [found[index] for index in sorted(found)]


def output_BTHE(output: Any, call: AttentionCall) -> Tensor:
    """core_attention's output, [T, H·E], [T, H, E] or [S, B, H·E], as check_output takes it."""
    B, H, T, _ = call.query.shape
    tensor: Tensor = output[0] if isinstance(output, tuple) else output
    return tensor.detach().reshape(T, B, H, call.value.shape[-1]).transpose(0, 1)


def check_bounds(layer: Layer, packed: Any, batch: PaddedBatch) -> tuple[Tensor, UnsupportedAttention]:
    """(whether packed_seq_params and batch have the sequences at other places, the error for that)."""
    cu_seqlens = _cu_seqlens(packed)
    error = layer.refusal("packed sequences that are not where the micro-batch has them")
    B = len(batch.lens)
    if len(cu_seqlens) <= B:
        raise error
    starts_B, ends_B = cu_seqlens[:B].to(batch.first), cu_seqlens[1 : B + 1].to(batch.first)
    return ((starts_B != batch.first) | (batch.first + batch.lens > ends_B)).any(), error


def _cu_seqlens(packed: Any) -> Tensor:
    """int32 [sequences + 1]: where each begins on the packed axis, its padding included."""
    padded = getattr(packed, "cu_seqlens_q_padded", None)
    cu_seqlens: Tensor = packed.cu_seqlens_q if padded is None else padded
    return cu_seqlens
