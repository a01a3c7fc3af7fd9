"""Statistics under context parallelism, where each of c ranks has the queries and keys of a part of every sequence.

Megatron cuts the row of a sequence, padding included, into 2·c chunks of one length, and rank r has chunks r and
2·c − 1 − r, so that all ranks have about the same work. A rank gathers the keys of all, and computes the statistics of
its own queries: each chunk is the last rows of a sequence that ends with it. Such statistics are parts: those of the
whole sequences are their sum over the ranks.

Shape suffixes: B sequences, T positions of all rows on one axis, t those of them that a rank has, N tokens of all
sequences with the padding left out, K keys of a rank's pieces, Q queries of these, H query heads, G key heads, X any.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, distributed

from rhythm.ops.statistics import attention_statistics
from rhythm.tap.attention_form import AttentionCall
from rhythm.tap.chunks import rows_in_reach
from rhythm.tap.padding import PaddedBatch, copied


def shard_places(rows: Sequence[int], size: int, rank: int) -> Tensor:
    """int64 [t]: which positions rank `rank` of `size` has, in its order.

    Args:
        rows: positions of each row, multiples of 2·size; row i + 1 begins where row i ends.
    """
    places = []
    for start, length in zip(accumulate(rows, initial=0), rows, strict=False):
        chunk = length // (2 * size)
        for index in (rank, 2 * size - 1 - rank):
            places.append(torch.arange(chunk) + start + index * chunk)
    return torch.cat(places) if places else torch.zeros(0, dtype=torch.int64)


def gathered(x_tX: Tensor, group: distributed.ProcessGroup) -> Tensor:
    """[T, X] of all ranks of the context parallel group, in the order of the ranks. A collective."""
    x_tX = x_tX.contiguous()
    x_TX = x_tX.new_empty((group.size() * len(x_tX), *x_tX.shape[1:]))
    # Newer versions of torch have another name for it.
    all_gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
    all_gather(x_TX, x_tX, group=group)
    return x_TX


@dataclass(frozen=True)
class _Piece:
    """The part of a sequence up to the end of one of a rank's chunks.

    Attributes:
        sequence: which.
        keys: tokens of it.
        rows: how many of them, the last ones, the rank has a query of.
    """

    sequence: int
    keys: int
    rows: int


@dataclass(frozen=True)
class Shard:
    """What one rank of a context parallel group has of a batch.

    Attributes:
        batch: the whole sequences, on the rank's device.
        rows: positions of the row of each sequence, one after the other, and perhaps of more rows of padding.
        size, rank: of the context parallel group.

    Raises:
        ValueError: a row that can't be cut into 2·size chunks, or that its sequence is not in.
    """

    batch: PaddedBatch
    rows: Sequence[int]
    size: int
    rank: int

    def __post_init__(self) -> None:
        host, chunks = self.batch.host, 2 * self.size
        if wrong := [length for length in self.rows if length % chunks]:
            raise ValueError(f"a row of {wrong[0]} positions can't be cut into {chunks} chunks for {self.size} ranks")
        if len(self.rows) < len(host.lens):
            raise ValueError(f"there are {len(self.rows)} rows for {len(host.lens)} sequences")
        for i, (first, length) in enumerate(zip(self._begins, host.lens, strict=True)):
            if first < 0 or first + length > self.rows[i]:
                raise ValueError(f"sequence {i} of {length} tokens is not within its row of {self.rows[i]} positions")

    @property
    def _begins(self) -> list[int]:
        """Where in its row each sequence begins."""
        if not self.batch.one_row:
            return self.batch.host.first
        starts = accumulate(self.rows, initial=0)
        return [first - start for first, start in zip(self.batch.host.first, starts, strict=False)]

    @cached_property
    def _halves(self) -> list[list[_Piece]]:
        """The pieces of the rank's first chunks that have rows of a response, and those of its second ones."""
        host = self.batch.host
        halves: list[list[_Piece]] = []
        for index in (self.rank, 2 * self.size - 1 - self.rank):
            halves.append([])
            for i, (begin, length, prompt) in enumerate(zip(self._begins, host.lens, host.prompt_lens, strict=True)):
                chunk = self.rows[i] // (2 * self.size)
                end = min((index + 1) * chunk - begin, length)  # in the sequence
                rows = end - max(index * chunk - begin, 0)
                if rows > 0 and end > prompt:
                    halves[-1].append(_Piece(i, end, rows))
        return halves

    @property
    def _pieces(self) -> list[_Piece]:
        return [piece for half in self._halves for piece in half]

    @cached_property
    def pieces(self) -> PaddedBatch:
        """The pieces, if there are any, as sequences of a packed row, [1, K]: `key_places` says of which keys. Tokens
        without a query on this rank count as prompt.
        """
        lens, prompts = [piece.keys for piece in self._pieces], self.batch.host.prompt_lens
        prompt_lens = [max(prompts[piece.sequence], piece.keys - piece.rows) for piece in self._pieces]
        return PaddedBatch.from_lengths(lens, prompt_lens, None, sum(lens), True, self.batch.lens.device)

    @cached_property
    def _home(self) -> Tensor:
        """int64 [T]: where each position is among those of all ranks, in the order of the ranks."""
        places = [shard_places(self.rows, self.size, rank) for rank in range(self.size)]
        return torch.cat(places).argsort()

    @cached_property
    def key_places(self) -> Tensor:
        """int64 [K]: where the keys of the pieces are in what `gathered` gives."""
        return copied(self._home_of_keys, self._device)

    @cached_property
    def row_places(self) -> Tensor:
        """int64 [K]: where the query of each of these keys is among the rank's; anywhere if it has none."""
        t = sum(self.rows) // self.size
        return copied((self._home_of_keys - self.rank * t).clamp(0, max(t - 1, 0)), self._device)

    @cached_property
    def query_places(self) -> Tensor:
        """int64 [Q]: where the queries of the pieces are among the rank's."""
        own_K = torch.cat([torch.arange(p.keys) >= p.keys - p.rows for p in self._pieces])
        return copied(self._home_of_keys[own_K] - self.rank * (sum(self.rows) // self.size), self._device)

    @cached_property
    def _home_of_keys(self) -> Tensor:
        starts = [*accumulate(self.rows, initial=0)]
        begins = [starts[p.sequence] + self._begins[p.sequence] for p in self._pieces]
        keys = [self._home[begin : begin + p.keys] for begin, p in zip(begins, self._pieces, strict=True)]
        return torch.cat([self._home[:0], *keys])

    @property
    def _device(self) -> torch.device:
        return self.batch.lens.device

    @property
    def has_rows(self) -> bool:
        """Whether this rank has rows of a response."""
        return bool(self._pieces)

    def seen(self, call: AttentionCall, group: distributed.ProcessGroup) -> AttentionCall:
        """A call of attention on this rank's positions as one of its queries [1, H, t, D] with the keys [1, G, K, D]
        and values of the pieces. A collective of the group.
        """
        key, value = (
            gathered(x.transpose(1, 2).flatten(0, 1), group)[self.key_places].transpose(0, 1)[None]
            for x in (call.key, call.value)
        )
        query = call.query.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None]
        return replace(call, query=query, key=key, value=value)

    def statistics(
        self, q_tHD: Tensor, k_KGD: Tensor, *, horizon: tuple[int, int | None], lse_Ht: Tensor | None, **options: Any
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """(span [B, H], waad [H, N], fai [H, N]): this rank's parts, whose sums over the ranks are the statistics of
        the whole sequences. NaN on every rank where these are undefined.

        Args:
            q_tHD: this rank's queries.
            k_KGD: the keys of the pieces.
            lse_Ht: that of these queries, if it is known.
            options: of `attention_statistics`, but for lengths and horizon.
        """
        batch, longest = self.batch, self.batch.host.longest
        B, N, H = len(batch.lens), sum(batch.host.lens), q_tHD.shape[1]
        dtype = torch.float64 if q_tHD.dtype == torch.float64 else torch.float32
        span_BH, waad_HN, fai_HN = (q_tHD.new_zeros(shape, dtype=dtype) for shape in ((B, H), (H, N), (H, N)))
        position_N, rows_B = batch.packed(batch.positions), batch.lens - batch.prompt_lens
        prompt_N, end_N = (x.repeat_interleave(batch.lens, output_size=N) for x in (batch.prompt_lens, batch.lens))
        whole_N = rows_in_reach(position_N, prompt_N, end_N, horizon, longest)
        if self.has_rows:
            pieces = self.pieces
            got = attention_statistics(
                q_tHD[self.query_places],
                k_KGD,
                cu_seqlens=self._cu_rows,
                cu_seqlens_k=pieces.cu_seqlens,
                prompt_lens=pieces.prompt_lens,
                horizon=horizon,
                lse=None if lse_Ht is None else lse_Ht[:, self.query_places],
                **options,
            )
            position_K, piece_K = pieces.positions[0], pieces.sequence
            prompt_K, end_K = pieces.prompt_lens[piece_K], pieces.lens[piece_K]
            part_K = rows_in_reach(position_K, prompt_K, end_K, horizon, longest)
            waad_HK = torch.where(position_K >= prompt_K, got.waad, 0.0)
            fai_HK = torch.where(part_K > 0, got.fai * part_K, 0.0)
            for half_P, half_K, sequence_P, token_K in self._places:
                # Of a half's pieces no two are of one sequence: nothing is added twice, whatever the order.
                waad_HN[:, token_K] += waad_HK[:, half_K]
                fai_HN[:, token_K] += fai_HK[:, half_K]
                if got.span is not None:
                    rows_P = (pieces.lens - pieces.prompt_lens)[half_P, None]
                    span_BH[sequence_P] += got.span[half_P] * rows_P / rows_B[sequence_P, None]
        return (
            span_BH.masked_fill(rows_B[:, None] == 0, torch.nan) if options.get("span", True) else None,
            waad_HN.masked_fill(position_N < prompt_N, torch.nan),
            (fai_HN / whole_N).masked_fill(whole_N == 0, torch.nan),
        )

    @cached_property
    def _cu_rows(self) -> Tensor:
        """int32 [pieces + 1], where the queries of each piece begin."""
        bounds = [*accumulate((piece.rows for piece in self._pieces), initial=0)]
        return copied(torch.tensor(bounds, dtype=torch.int32), self._device)

    @cached_property
    def _places(self) -> list[tuple[slice, slice, Tensor, Tensor]]:
        """Of each half: its pieces, their keys, the sequences of the pieces, and the place of each key among the N."""
        cu_seqlens, found, pieces, keys = self.batch.host.cu_seqlens, [], 0, 0
        for half in self._halves:
            sequences = torch.tensor([piece.sequence for piece in half], dtype=torch.int64)
            tokens = [torch.arange(piece.keys) + cu_seqlens[piece.sequence] for piece in half]
            token_K = torch.cat([torch.zeros(0, dtype=torch.int64), *tokens])
            here = slice(pieces, pieces + len(half)), slice(keys, keys + len(token_K))
            found.append((*here, copied(sequences, self._device), copied(token_K, self._device)))
            pieces, keys = here[0].stop, here[1].stop
        return found
