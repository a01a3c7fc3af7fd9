"""A padded batch: where in [B, T] the tokens of each sequence lie, and which of them are its response.

Lengths are kept on the host as well as on the device, so that nothing that is made of a batch waits for the device.

Shape suffixes: B sequences, T positions of input_ids, N tokens of all sequences with the padding left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from rhythm.ops import arguments
from rhythm.shapes import check_dense, check_shape


@dataclass(frozen=True)
class HostLengths:
    """first, lens and prompt_lens of a PaddedBatch as numbers."""

    first: list[int]
    lens: list[int]
    prompt_lens: list[int]

    @property
    def cu_seqlens(self) -> list[int]:
        """Where each sequence begins once the padding is left out, and where the last one ends: B + 1 numbers."""
        return [0, *accumulate(self.lens)]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lens, default=0)

    @property
    def starts_late(self) -> bool:
        """Whether any sequence has padding before its tokens."""
        return any(self.first)


@dataclass(frozen=True)
class PaddedBatch:
    """Sequences padded on the left, on the right or on both sides; or packed, one after the other in one row, [1, T],
    where there may be padding after each.

    Attributes:
        real: bool [B, T], true on tokens, false on padding; one contiguous run per row.
        first: int64 [B], position of each sequence's first token; 0 for an empty row.
        lens: int64 [B], tokens of each sequence.
        prompt_lens: int64 [B], how many of them are its prompt.
        host: the last three on the host.
        one_row: whether they are packed.
    """

    real: Tensor
    first: Tensor
    lens: Tensor
    prompt_lens: Tensor
    host: HostLengths
    one_row: bool = False

    @classmethod
    def from_cu_seqlens(
        cls,
        cu_seqlens: Tensor,
        prompt_lens: Tensor | Sequence[int] | None = None,
        response_mask_1T: Tensor | None = None,
        device: torch.device | None = None,
    ) -> PaddedBatch:
        """Sequences packed into one row. Waits for the tensors' devices.

        Args:
            cu_seqlens: int32 or int64 [B + 1], from 0 to T: where each sequence begins, and where the last one ends.
            prompt_lens: [B] integers, tokens of each sequence that are its prompt.
            response_mask_1T: [1, T], 1 on the responses, the last tokens of each sequence; instead of prompt_lens.
            device: of the batch; None: that of cu_seqlens.

        Raises:
            ValueError: an argument is not as described; the message names it.
        """
        check_one_of(prompt_lens, response_mask_1T)
        check_dense("cu_seqlens", cu_seqlens)
        if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
            raise ValueError(
                f"cu_seqlens has shape {list(cu_seqlens.shape)} and dtype {cu_seqlens.dtype}; it must be int32 or "
                "int64 [B + 1], from 0 to T"
            )
        device = cu_seqlens.device if device is None else device
        bounds: list[int] = cu_seqlens.tolist()
        lens = [end - start for start, end in pairwise(bounds)]
        if bounds[0] != 0 or min(lens) < 0:
            raise ValueError(f"cu_seqlens is {bounds}; it must begin at 0 and not fall")
        if response_mask_1T is not None:
            check_dense("response_mask", response_mask_1T)
            check_shape("response_mask", response_mask_1T, (1, bounds[-1]))
            of_sequence = torch.split(response_mask_1T[0].cpu().long(), lens)
            prompts = [length - int(marked.sum()) for length, marked in zip(lens, of_sequence, strict=True)]
        else:
            assert prompt_lens is not None
            given = integers(arguments.prompt_lens_tensor(prompt_lens, torch.device("cpu")))
            check_shape("prompt_lens", given, (len(lens),))
            prompts = given.tolist()
        host = HostLengths(bounds[:-1], lens, prompts)
        _check_prompts(host)
        first_B, lens_B, prompts_B = (torch.tensor(x, device=device) for x in (bounds[:-1], lens, prompts))
        real_1T = torch.ones((1, bounds[-1]), dtype=torch.bool, device=device)
        batch = cls(real_1T, first_B, lens_B, prompts_B, host, one_row=True)
        if response_mask_1T is not None and not batch.response.equal(response_mask_1T.to(device) == 1):
            raise ValueError("response_mask must mark the last tokens of each sequence of cu_seqlens, in one run")
        return batch

    @classmethod
    def from_lengths(
        cls,
        lens: Sequence[int],
        prompt_lens: Sequence[int],
        first: Sequence[int] | None,
        width: int,
        packed: bool,
        device: torch.device,
    ) -> PaddedBatch:
        """Sequences of known lengths: in rows of `width` positions each, or packed into one. Waits for no device.

        Args:
            first: where the tokens of each begin in its row, or in the packed one. None: at 0, or one after the other.

        Raises:
            ValueError: prompt_lens beyond lens; sequences that overlap or end after `width`.
        """
        starts = (
            list(first) if first is not None else [*accumulate(lens, initial=0)][:-1] if packed else [0] * len(lens)
        )
        host = HostLengths(starts, list(lens), list(prompt_lens))
        _check_prompts(host)
        ends = [start + length for start, length in zip(starts, lens, strict=True)]
        limits = [*starts[1:], width] if packed else [width] * len(lens)
        for row, (start, end, limit) in enumerate(zip(starts, ends, limits, strict=True)):
            if start < 0 or end > limit:
                raise ValueError(f"lens[{row}] is {lens[row]} from position {start}; there is room up to {limit}")
        real = torch.zeros(1 if packed else len(lens), width, dtype=torch.bool)
        for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
            real[0 if packed else row, start:end] = True
        first_B, lens_B, prompts_B = (
            copied(torch.tensor(x, dtype=torch.int64), device) for x in (starts, host.lens, host.prompt_lens)
        )
        return cls(copied(real, device), first_B, lens_B, prompts_B, host, one_row=packed)

    @cached_property
    def rows(self) -> PaddedBatch:
        """The packed sequences in a row each, [B, N of the longest], padded on the right; itself if not packed."""
        if not self.one_row:
            return self
        real_BN = torch.arange(self.host.longest, device=self.lens.device) < self.lens[:, None]
        host = HostLengths([0] * len(self.lens), self.host.lens, self.host.prompt_lens)
        return PaddedBatch(real_BN, torch.zeros_like(self.first), self.lens, self.prompt_lens, host)

    def in_rows(self, x_BTX: Tensor, on_padding: float) -> Tensor:
        """x at the positions of `rows`."""
        return self.rows.padded(self.packed(x_BTX), on_padding) if self.one_row else x_BTX

    def from_rows(self, x_BNX: Tensor, on_padding: float) -> Tensor:
        """x at the positions of this batch, from those of `rows`."""
        return self.padded(self.rows.packed(x_BNX), on_padding) if self.one_row else x_BNX

    @cached_property
    def sequence(self) -> Tensor:
        """int64 [N], the sequence of each token; of a packed row, of each position, a gap's being the one before it."""
        if self.one_row:
            position_T = torch.arange(self.real.shape[1], device=self.real.device)
            return (torch.searchsorted(self.first, position_T, right=True) - 1).clamp(min=0)
        index_B = torch.arange(len(self.lens), device=self.lens.device)
        return torch.repeat_interleave(index_B, self.lens, output_size=sum(self.host.lens))

    @classmethod
    def from_mask(
        cls,
        attention_mask_BT: Tensor,
        prompt_lens: Tensor | Sequence[int] | None = None,
        response_mask_BT: Tensor | None = None,
    ) -> PaddedBatch:
        """The batch that a 2D attention mask describes. Waits for the mask's device, once.

        Args:
            attention_mask_BT: [B, T], any type; 1 on tokens, 0 on padding.
            prompt_lens: [B] integers, tokens of each sequence (padding not counted) that are its prompt.
            response_mask_BT: [B, T], 1 on the response, the last tokens of each row; instead of prompt_lens.

        Raises:
            ValueError: a mask that is not 2D, holds other values or has padding between tokens; prompt_lens
                that are not integers, not [B], or not in 0 … the tokens of their sequence; a response_mask of
                another shape, or that doesn't mark the last tokens of each row; both of them, or neither.
        """
        check_one_of(prompt_lens, response_mask_BT)
        B, T = check_shape("attention_mask", attention_mask_BT, ("B", "T"))
        real_BT = attention_mask_BT.bool()
        response_BT = None
        if response_mask_BT is not None:
            check_dense("response_mask", response_mask_BT)
            check_shape("response_mask", response_mask_BT, (B, T))
            response_BT = response_mask_BT.to(real_BT.device).bool()
            prompt_lens_B = (real_BT & ~response_BT).sum(dim=1)
        else:
            assert prompt_lens is not None
            prompt_lens_B = integers(arguments.prompt_lens_tensor(prompt_lens, real_BT.device).to(real_BT.device))
            check_shape("prompt_lens", prompt_lens_B, (B,))
        # A row of one run turns from padding to tokens once, before its first token or within the row.
        runs_B = real_BT[:, :1].sum(dim=1) + (real_BT[:, 1:] & ~real_BT[:, :-1]).sum(dim=1)
        others_B = (attention_mask_BT != real_BT.to(attention_mask_BT.dtype)).sum(dim=1)
        lens_B = real_BT.sum(dim=1)
        # argmax takes the first of equals, and 0 for a row without tokens.
        first_B = real_BT.long().argmax(dim=1) if T else torch.zeros_like(lens_B)
        misplaced_B = torch.zeros_like(lens_B)
        if response_BT is not None:
            start_B1 = (first_B + prompt_lens_B)[:, None]
            last_BT = real_BT & (torch.arange(T, device=real_BT.device) >= start_B1)
            misplaced_B = (response_BT != last_BT).sum(dim=1)
        others, runs, misplaced, *on_host = torch.stack(
            [others_B, runs_B, misplaced_B, first_B, lens_B, prompt_lens_B]
        ).tolist()
        if any(others):
            raise ValueError(
                "attention_mask holds values other than 0 and 1; sequences packed into one row are not allowed"
            )
        if broken := [row for row, count in enumerate(runs) if count > 1]:
            raise ValueError(
                f"attention_mask has padding between the tokens of row {broken[0]}; it may only be before or after"
            )
        if wrong := [row for row, count in enumerate(misplaced) if count]:
            raise ValueError(
                "response_mask must mark the last tokens of each row, in one run, and no padding; "
                f"that of row {wrong[0]} does not"
            )
        host = HostLengths(*on_host)
        _check_prompts(host)
        return cls(real_BT, first_B, lens_B, prompt_lens_B, host)

    @property
    def response(self) -> Tensor:
        """bool [B, T], true on response tokens."""
        if self.one_row:
            return self.real & (self.positions >= self.prompt_lens[self.sequence])
        return self.real & (self.positions >= self.prompt_lens[:, None])

    @property
    def positions(self) -> Tensor:
        """int64 [B, T], place of each token in its own sequence, 0-based; meaningless on padding."""
        position_T = torch.arange(self.real.shape[1], device=self.real.device)
        if self.one_row:
            return (position_T - self.first[self.sequence])[None]
        return (position_T - self.first[:, None]).clamp(min=0)

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """int32 [B + 1], where each sequence begins once the padding is left out."""
        return torch.nn.functional.pad(self.lens.cumsum(0), (1, 0)).to(torch.int32)

    @property
    def is_whole(self) -> bool:
        """Whether each row is one sequence without padding."""
        return not self.one_row and self.has_no_padding

    @property
    def has_no_padding(self) -> bool:
        """Whether every position holds a token."""
        return sum(self.host.lens) == self.real.numel()

    @cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """(row, position) of every token, int64 [N] each, row after row."""
        return self._places(torch.zeros_like(self.lens), sum(self.host.lens))

    @cached_property
    def _flat_places(self) -> Tensor:
        """int64 [N], `places` in rows put one after the other: faster than two indices."""
        row_N, position_N = self.places
        return row_N * self.real.shape[1] + position_N

    @property
    def drawn_places(self) -> tuple[Tensor, Tensor]:
        """(row, position) of every response token with a token before it, int64 [n] each, row after row."""
        lengths = zip(self.host.lens, self.host.prompt_lens, strict=True)
        count = sum(max(length - max(prompt, 1), 0) for length, prompt in lengths)
        return self._places(self.prompt_lens.clamp(min=1), count)

    def packed(self, x_BTX: Tensor) -> Tensor:
        """[N, …] of [B, T, …], the padding left out."""
        return x_BTX.flatten(0, 1).index_select(0, self._flat_places)

    def padded(self, x_NX: Tensor, on_padding: float) -> Tensor:
        """[B, T, …] of packed [N, …]."""
        x_BTX = x_NX.new_full((*self.real.shape, *x_NX.shape[1:]), on_padding)
        x_BTX.flatten(0, 1).index_copy_(0, self._flat_places, x_NX)
        return x_BTX

    def to(self, device: torch.device) -> PaddedBatch:
        """The batch on that device; the host does not wait for the copies to a GPU."""
        if device == self.real.device:
            return self
        tensors = (self.real, self.first, self.lens, self.prompt_lens)
        real_BT, first_B, lens_B, prompt_lens_B = (copied(x, device) for x in tensors)
        return PaddedBatch(real_BT, first_B, lens_B, prompt_lens_B, self.host, self.one_row)

    def _places(self, skipped_B: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """(row, position) of all tokens but the first `skipped` of each sequence, `count` in all.

        Arithmetic rather than nonzero(), which waits for the device to learn the count.
        """
        count_B, device = (self.lens - skipped_B).clamp(min=0), self.lens.device
        sequence_N = torch.repeat_interleave(torch.arange(len(count_B), device=device), count_B, output_size=count)
        shift_B = self.first + skipped_B - (count_B.cumsum(0) - count_B)
        row_N = torch.zeros_like(sequence_N) if self.one_row else sequence_N
        return row_N, torch.arange(count, device=device) + shift_B[sequence_N]


def copied(x: Tensor, device: torch.device) -> Tensor:
    """A copy to a GPU is from pinned memory: from any other the host waits until the GPU's queue is empty."""
    if device.type != "cuda":
        return x.to(device)
    return (x.pin_memory() if x.device.type == "cpu" else x).to(device, non_blocking=True)


def whole_batch(B: int, T: int, prompt_lens_B: Tensor, prompt_lens: list[int], device: torch.device) -> PaddedBatch:
    """B sequences of T tokens without padding. Waits for no device.

    Args:
        prompt_lens_B: int64, on any device.
        prompt_lens: what it holds.

    Raises:
        ValueError: prompt_lens_B is not [B], or not in 0 … T.
    """
    check_shape("prompt_lens", prompt_lens_B, (B,))
    host = HostLengths([0] * B, [T] * B, prompt_lens)
    _check_prompts(host)
    first_B, lens_B = (torch.full((B,), value, device=device) for value in (0, T))
    real_BT = torch.ones((B, T), dtype=torch.bool, device=device)
    return PaddedBatch(real_BT, first_B, lens_B, copied(prompt_lens_B, device), host)


def check_one_of(prompt_lens: object, response_mask: object) -> None:
    """Raises ValueError unless exactly one of them says where the responses are."""
    if (prompt_lens is None) == (response_mask is None):
        given = "neither is" if prompt_lens is None else "both are"
        raise ValueError(f"prompt_lens and response_mask: {given} given; it must be exactly one of them")


def integers(prompt_lens: Tensor) -> Tensor:
    """int64; ValueError for anything but integers."""
    if prompt_lens.is_floating_point() or prompt_lens.dtype == torch.bool:
        raise ValueError(f"prompt_lens has dtype {prompt_lens.dtype}; it must be integers")
    return prompt_lens.long()


def _check_prompts(host: HostLengths) -> None:
    for row, (prompt, length) in enumerate(zip(host.prompt_lens, host.lens, strict=True)):
        if not 0 <= prompt <= length:
            raise ValueError(f"prompt_lens[{row}] is {prompt}; its sequence allows 0 to {length}")
