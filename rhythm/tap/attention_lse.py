"""Runs a layer's own attention so that the lse of its rows comes with the output, where its kernel computes one.

torch's fused attention and flash_attn compute lse beside the output, for the backward pass, and the functions around
them drop it. It is read off the kernel's results while the model's own function runs: which kernel that is, its
output and its gradients stay what they are.

Shape suffixes: B sequences, T positions, N tokens of all sequences with the padding left out, H query heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rhythm.tap.attention_form import AttentionCall, AttentionForm
from rhythm.tap.padding import PaddedBatch

SHORT_ATTENTION = "rhythm_short"
"""The local engine's implementation, which calls sdpa's where sequences are not short."""

WATCHED = {"sdpa", SHORT_ATTENTION, "flash_attention_2"}
"""Implementations whose kernel is watched. What torch compiles runs uncompiled while its kernels are watched, so flex
attention, and functions that are not known here, are not.
"""

KERNELS = {
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "flash_attn::_flash_attn_forward",
    "flash_attn::_flash_attn_varlen_forward",
}
"""Their first argument is q, their first two results the output and lse, natural. q is [B, H, T, D] in torch's kernels,
[B, T, H, D] in flash_attn's, and [N, H, D] in the last.
"""


def bands_pay(form: AttentionForm, longest: int, window: int, horizon: tuple[int, int | None]) -> bool:
    """Whether the bands near the diagonal, with a given lse, take less time than a sweep over all keys: where they are
    at most half of the map. Otherwise they spare too little to watch the kernel for.

    Args:
        longest: tokens of the longest sequence.
        window, horizon: of SignalsConfig.
    """
    lo, hi = horizon
    reach = max(window, lo if hi is None else hi)  # to the end, FAI is a sweep of its own in any case
    keys = longest / 2  # of a row, on average
    if form.window is not None:
        keys = min(keys, form.window)
    if form.chunk is not None:
        keys = min(keys, form.chunk / 2)
    return keys >= 2 * reach


def run_with_lse(
    call: AttentionCall, form: AttentionForm, batch: PaddedBatch
) -> tuple[tuple[Tensor, Tensor | None], Tensor | None]:
    """(what `call.run()` gives, bit for bit and with its gradients; lse [B, H, T] fp32, detached, or None).

    lse is that of the call's own queries and keys in its form, at the positions of input_ids, without meaning on
    padding. None where the kernel gives none (eager attention, torch's math kernel, its memory-efficient and cuDNN ones
    without gradients), where it is not in fp32 (flex attention gives it in the type of the values), where there are
    sinks, which none of the kernels counts in, and where autocast has the kernel take q and k in another type.

    Args:
        batch: on the call's device.
    """
    if form.sinks is not None or (call.implementation not in WATCHED and call.implementation != "flex_attention"):
        return call.run(), None
    if call.implementation == "flex_attention":
        result = call.run()
        return result, _of_queries(result[1], call)
    with _Kernels() as seen:
        result = call.run()
    if len(seen.calls) != 1:
        return result, None
    name, query, lse = seen.calls[0]
    if query.dtype != call.query.dtype:
        return result, None
    if name == "flash_attn::_flash_attn_varlen_forward":
        shape_NH = (sum(batch.host.lens), call.query.shape[1])
        if query.shape[:2] != shape_NH or lse.shape != shape_NH[::-1] or lse.dtype != torch.float32:
            return result, None
        lse = batch.padded(lse.detach().T, torch.nan).transpose(1, 2)
    return result, _of_queries(lse, call)


def _of_queries(lse: Tensor | None, call: AttentionCall) -> Tensor | None:
    """lse [B, H, T] without what some kernels pad its rows to; None where it is not one, in fp32."""
    B, H, T, _ = call.query.shape
    if lse is None or lse.dtype != torch.float32:
        return None
    if lse.ndim == 4 and lse.shape[-1] == 1:  # cuDNN's
        lse = lse[..., 0]
    if lse.ndim != 3 or lse.shape[:2] != (B, H) or lse.shape[2] < T:
        return None
    return lse.detach()[..., :T]


class _Kernels(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own lack of types
    """While open, notes q and lse of each call of one of KERNELS: (name, q, lse)."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[str, Tensor, Tensor]] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.scaled_dot_product_attention.default:
            # Without autograd (inference mode) it arrives whole, its kernel not yet chosen.
            with self:
                return func.decompose(*args, **kwargs)
        results = func(*args, **kwargs)
        name = func._schema.name
        if name in KERNELS:
            self.calls.append((name, args[0], results[1]))
        return results
