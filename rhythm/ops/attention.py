"""Plain attention forwards of other libraries, whose lse the bands are added to.

Each gives (out, lse): out as q, lse fp32 [H, T] natural on the flattened token axis, of all rows.

Shape suffixes: B sequences, T tokens of all sequences, H query heads, G key heads, D head size.
"""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from functools import cache
from importlib import import_module
from importlib.resources import files
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from rhythm.ops.arguments import Layout

logger = logging.getLogger("rhythm")

HALF = (torch.float16, torch.bfloat16)


class Forward(ABC):
    """A library's causal attention."""

    def unavailable(self) -> str | None:
        """Why it can't run on this machine; None: it can."""
        return None

    @abstractmethod
    def refuses(self, q: Tensor, k: Tensor, layout: Layout) -> str | None:
        """Why it can't take these tensors; None: it can."""

    @abstractmethod
    def run(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> tuple[Tensor, Tensor]:
        """(out shaped and typed as q, lse [H, T])."""


class FlashAttn(Forward):
    """The package flash_attn (flash_attn_interface of version 3 where it is installed): varlen, on the GPU."""

    def unavailable(self) -> str | None:
        return None if _flash_attn_module() else "neither flash_attn_interface nor flash_attn is installed"

    def refuses(self, q: Tensor, k: Tensor, layout: Layout) -> str | None:
        if not q.is_cuda:
            return f"q is on {q.device}; it takes tensors on a GPU"
        return _dtype_refused(q)

    def run(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> tuple[Tensor, Tensor]:
        varlen = import_module(_flash_attn_module()).flash_attn_varlen_func
        q_THD, k_TGD, v_TGD = (x.flatten(0, -3) for x in (q, k, v))
        cu_seqlens = _cu_seqlens(layout, q.device)
        longest = _longest(layout)
        found = varlen(
            q_THD,
            k_TGD,
            v_TGD,
            cu_seqlens,
            cu_seqlens,
            longest,
            longest,
            softmax_scale=scale,
            causal=True,
            **_asking_for_lse(varlen),
        )
        out_THD, lse_HT = found[0], found[1]
        return out_THD.view(q.shape), lse_HT


class SdpaFlash(Forward):
    """torch's own flash attention: on the GPU packed and batched, on the CPU a sequence at a time."""

    def refuses(self, q: Tensor, k: Tensor, layout: Layout) -> str | None:
        if q.is_cuda:
            return _dtype_refused(q) or _head_size_refused(q)
        return None if q.dtype in (torch.float32, *HALF) else f"q has dtype {q.dtype}; it takes fp32, fp16 and bf16"

    def run(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> tuple[Tensor, Tensor]:
        if not q.is_cuda:
            return self._on_cpu(q, k, v, layout, scale)
        if layout.cu_seqlens is None:
            q_BHTD, k_BGTD, v_BGTD = (_batched(x) for x in (q, k, v))
            flash = torch.ops.aten._scaled_dot_product_flash_attention
            out, lse, *_ = flash(q_BHTD, *_per_query_head(q_BHTD, k_BGTD, v_BGTD), is_causal=True, scale=scale)
            return out.transpose(1, 2).reshape(q.shape), _flat(lse, q)
        longest = _longest(layout)
        out_THD, lse_HT, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, layout.cu_seqlens, layout.cu_seqlens, longest, longest, 0.0, True, False, scale=scale
        )
        if lse_HT.shape != (q.shape[1], q.shape[0]):
            raise RuntimeError(f"torch's flash attention gave lse of shape {tuple(lse_HT.shape)}; [Hq, T] was expected")
        return out_THD, lse_HT

    def _on_cpu(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> tuple[Tensor, Tensor]:
        q_THD, k_TGD, v_TGD = (x.flatten(0, -3) for x in (q, k, v))
        out_THD = torch.empty_like(q_THD, memory_format=torch.contiguous_format)
        lse_HT = torch.empty((q_THD.shape[1], q_THD.shape[0]))
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        for start, end in pairwise(layout.bounds):
            if end > start:
                q_BHTD, k_BGTD, v_BGTD = (_batched(x[start:end]) for x in (q_THD, k_TGD, v_TGD))
                k_BHTD, v_BHTD = _per_query_head(q_BHTD, k_BGTD, v_BGTD)
                out, lse = flash(q_BHTD, k_BHTD, v_BHTD, is_causal=True, scale=scale)
                out_THD[start:end], lse_HT[:, start:end] = out[0].transpose(0, 1), lse[0]
        return out_THD.view(q.shape), lse_HT


class SdpaCudnn(Forward):
    """cuDNN's attention through torch: one sequence or a batch, on the GPU."""

    def unavailable(self) -> str | None:
        cudnn: Any = torch.backends.cudnn  # without types
        return None if cudnn.is_available() else "torch has no cuDNN here"

    def refuses(self, q: Tensor, k: Tensor, layout: Layout) -> str | None:
        if not q.is_cuda:
            return f"q is on {q.device}; it takes tensors on a GPU"
        if layout.cu_seqlens is not None and layout.count > 1:
            return f"cu_seqlens packs {layout.count} sequences; it takes one, or a batch [B, T, H, D]"
        return _dtype_refused(q) or _head_size_refused(q)

    def run(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> tuple[Tensor, Tensor]:
        q_BHTD, k_BGTD, v_BGTD = (_batched(x) for x in (q, k, v))
        k_BHTD, v_BHTD = _per_query_head(q_BHTD, k_BGTD, v_BGTD)
        cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention
        out, lse, *_ = cudnn(q_BHTD, k_BHTD, v_BHTD, None, True, 0.0, True, False, scale=scale)
        return out.transpose(1, 2).reshape(q.shape), _flat(lse.reshape(q_BHTD.shape[:3]), q)


FORWARDS: dict[str, Forward] = {"flash_attn": FlashAttn(), "sdpa_flash": SdpaFlash(), "sdpa_cudnn": SdpaCudnn()}
NAMES = ("fused", *FORWARDS, "auto")


def choose(name: str, q: Tensor, k: Tensor, layout: Layout) -> Forward | None:
    """The forward called `name`; None: ours, in the same sweep as the statistics.

    "auto" takes what the packaged records (attention_records.json) say was fastest for the device and type, if it can
    take the tensors, else ours.

    Raises:
        ValueError: the name is unknown, or the named forward can't take the tensors.
        RuntimeError: the named forward is not available on this machine.
    """
    if name == "auto":
        name = recorded(
            _device_name(q.device), str(q.dtype).removeprefix("torch."), layout.tokens // max(layout.count, 1)
        )
        if name != "fused" and (FORWARDS[name].unavailable() or FORWARDS[name].refuses(q, k, layout)):
            name = "fused"
        _say(name, _device_name(q.device), q.dtype)
    if name == "fused":
        return None
    if name not in FORWARDS:
        raise ValueError(f"forward is {name!r}; allowed are {', '.join(NAMES)}")
    forward = FORWARDS[name]
    if (reason := forward.unavailable()) is not None:
        raise RuntimeError(f"forward {name!r} is not available: {reason}")
    if (reason := forward.refuses(q, k, layout)) is not None:
        raise ValueError(f"forward {name!r} can't run: {reason}")
    return forward


def recorded(device: str, dtype: str, tokens: int) -> str:
    """The forward that the records name for sequences of `tokens` on the device; "fused" where nothing was measured."""
    for record in _records():
        if record["device"] in device and record["dtype"] == dtype and tokens >= record["min_tokens"]:
            return str(record["forward"])
    return "fused"


@cache
def _records() -> list[dict[str, Any]]:
    text = files("rhythm.ops").joinpath("attention_records.json").read_text(encoding="utf-8")
    records: list[dict[str, Any]] = json.loads(text)["records"]
    return records


@cache
def _say(name: str, device: str, dtype: torch.dtype) -> None:
    """Cached, so that the choice for a device and type is said once."""
    logger.info("forward auto: %s for %s on %s", name, dtype, device)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _flash_attn_module() -> str:
    return next((name for name in ("flash_attn_interface", "flash_attn") if find_spec(name)), "")


def _asking_for_lse(varlen: Any) -> dict[str, bool]:
    """The name under which a version of flash_attn_varlen_func gives lse beside the output."""
    names = varlen.__code__.co_varnames[: varlen.__code__.co_argcount + varlen.__code__.co_kwonlyargcount]
    return {name: True for name in ("return_attn_probs", "return_softmax_lse") if name in names}


def _dtype_refused(q: Tensor) -> str | None:
    return None if q.dtype in HALF else f"q has dtype {q.dtype}; it takes torch.float16 and torch.bfloat16"


def _head_size_refused(q: Tensor) -> str | None:
    return f"q has head size {q.shape[-1]}; it takes multiples of 8" if q.shape[-1] % 8 else None


def _cu_seqlens(layout: Layout, device: torch.device) -> Tensor:
    if layout.cu_seqlens is not None:
        return layout.cu_seqlens
    length = layout.tokens // layout.count
    return torch.arange(layout.count + 1, dtype=torch.int32, device=device) * length


def _longest(layout: Layout) -> int:
    """An upper bound of the sequences' lengths that needs no look at them."""
    return layout.tokens if layout.cu_seqlens is not None else layout.tokens // layout.count


def _batched(x: Tensor) -> Tensor:
    """[B, heads, T, D]."""
    return (x if x.ndim == 4 else x[None]).transpose(1, 2)


def _per_query_head(q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor) -> tuple[Tensor, Tensor]:
    """A key head for every query head: torch's inner functions share none."""
    group = q_BHTD.shape[1] // k_BGTD.shape[1]
    return k_BGTD.repeat_interleave(group, dim=1), v_BGTD.repeat_interleave(group, dim=1)


def _flat(lse_BHT: Tensor, q: Tensor) -> Tensor:
    """[H, B·T] fp32, without what some versions pad the rows to."""
    return lse_BHT[..., : q.shape[-3]].float().transpose(0, 1).flatten(1)
