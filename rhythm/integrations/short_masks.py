"""Masks of one number per token, [B, T], in place of transformers' [T, T]: padding, sliding windows and chunks.

A short mask is bool, true on tokens (causal attention among them), or int64: 0 on padding; w on tokens for a sliding
window, in which a token sees those at a distance below w; −c for chunks of c tokens, counted from each row's first.

Shape suffixes: B sequences, T positions, R rows of a mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeGuard

import torch
from torch import Tensor

from rhythm.system.extras import needs
from rhythm.tap.attention_form import AttentionCall, MaskReader
from rhythm.tap.padding import whole_batch

with needs("rhythm.integrations.transformers"):
    from transformers.masking_utils import causal_mask_function, sdpa_mask

PROBED_ROWS = 64
"""Rows of a mask by which its window or its chunks are recognized."""

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def is_short(mask: object) -> TypeGuard[Tensor]:
    return isinstance(mask, Tensor) and mask.ndim == 2


def sdpa_or_short_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    *,
    short: bool,
    **options: Any,
) -> Tensor | None:
    """transformers' `sdpa_mask`, with its arguments; with `short`, a short mask where one says the same. None: plain
    causal attention without padding.
    """
    # A model that asks for a mask in any case wants to change it.
    if short and q_length == kv_length and options.get("allow_is_causal_skip", True):
        if mask_function is causal_mask_function and attention_mask is not None:
            return None if attention_mask.all() else attention_mask.bool()
        if mask_function is not causal_mask_function and local_size is not None:
            real_BT = attention_mask
            if real_BT is None:
                real_BT = torch.ones((batch_size, kv_length), dtype=torch.bool, device=options.get("device", "cpu"))
            local = _local(mask_function, real_BT.bool(), local_size)
            if local is not None:
                return real_BT.bool() * local
    mask: Tensor | None = sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, local_size, **options
    )
    return mask


def _local(mask_function: MaskFunction, real_BT: Tensor, size: int) -> int | None:
    """`size` if the function is that of a sliding window, −size if that of chunks, None if neither, as some rows tell:
    what the functions are made of has no names.
    """
    B, T = real_BT.shape
    row_R = torch.linspace(0, T - 1, min(T, PROBED_ROWS), device=real_BT.device).long()
    batch_B, column_T = torch.arange(B, device=real_BT.device), torch.arange(T, device=real_BT.device)
    head = torch.zeros(1, dtype=torch.int64, device=real_BT.device)
    visible = mask_function(
        batch_B[:, None, None, None], head[None, :, None, None], row_R[None, None, :, None], column_T[None, None, None]
    )
    return next((local for local in (size, -size) if (visible == _visible(real_BT, local, row_R)).all()), None)


def _visible(real_BT: Tensor, local: int, row_R: Tensor) -> Tensor:
    """bool [B, 1, R, T]: what rows see by the window or the chunks, padding aside."""
    column_T = torch.arange(real_BT.shape[1], device=real_BT.device)
    distance_RT = row_R[:, None] - column_T
    if local > 0:
        near_RT = (distance_RT >= 0) & (distance_RT < local)
        return near_RT.expand(len(real_BT), 1, *near_RT.shape)
    first_B1 = real_BT.int().argmax(dim=1, keepdim=True)
    chunk_BT = torch.div(column_T - first_B1, -local, rounding_mode="floor")
    return ((distance_RT >= 0) & (chunk_BT[:, row_R, None] == chunk_BT[:, None]))[:, None]


def whole_mask(mask_BT: Tensor) -> Tensor:
    """bool [B, 1, T, T] of a short mask."""
    real_BT = mask_BT.bool()
    local = _local_of(mask_BT) or mask_BT.shape[1]  # a window as long as the row hides nothing
    return _visible(real_BT, local, torch.arange(mask_BT.shape[1], device=mask_BT.device)) & real_BT[:, None, None]


def _local_of(mask_BT: Tensor) -> int:
    """Window, or −chunk, of a short mask; 0 if it has none. Waits for the device."""
    if mask_BT.dtype == torch.bool:
        return 0
    least, most = mask_BT.aminmax()
    return int(most) or int(least)


class ShortMaskReader(MaskReader):
    """A MaskReader that also knows short masks."""

    def window(self, call: AttentionCall) -> int | None:
        if not is_short(call.mask):
            return super().window(call)
        local = self._local(call, call.mask)
        # Read as if there were no padding: what is left is whether the layer is causal.
        B, T = call.mask.shape
        everything = whole_batch(B, T, torch.zeros(B, dtype=torch.int64), [0] * B, call.mask.device)
        window = MaskReader(everything).window(replace(call, mask=None))
        return local if local > 0 else window

    def chunk(self, call: AttentionCall) -> int | None:
        if not is_short(call.mask):
            return super().chunk(call)
        chunk = -self._local(call, call.mask)
        return chunk if 0 < chunk < self.batch.host.longest else None

    def _local(self, call: AttentionCall, mask: Tensor) -> int:
        """Window or −chunk of a short mask, whose padding must be the batch's."""
        if (id(mask), None, None) not in self._windows:
            if not mask.bool().equal(self.on(mask.device).real):
                raise call.refusal("a padding mask other than that of the layers before")
            self._windows[id(mask), None, None] = (mask, _local_of(mask))
        return self._windows[id(mask), None, None][1] or 0
