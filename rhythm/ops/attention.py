"""Attention implementations of other libraries, to whose lse the bands are added.

Each gives (out, lse): out as q, lse fp32 [H, T] natural on the flattened axis of q's rows.

Shape suffixes: B sequences, T tokens of all sequences, H query heads, G key heads, D head size.
"""

from __future__ import annotations

import json
import logging
from functools import cache
from importlib import import_module
from importlib.resources import files
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from rhythm.ops.arguments import Request
from rhythm.ops.plugins import Plugin, named, only_plain
from rhythm.shapes import Sequences

logger = logging.getLogger("rhythm")

HALF = (torch.float16, torch.bfloat16)


Attended = tuple[Tensor, Tensor]
"""(out shaped and typed as q, lse [H, T])."""


class Attention(Plugin[Attended]):
    """A library's causal attention."""


class FlashAttn(Attention):
    """The package flash_attn (flash_attn_interface of version 3 where it is installed): varlen, on the GPU."""

    def unavailable(self) -> str | None:
        return None if _flash_attn_module() else "neither flash_attn_interface nor flash_attn is installed"

    def refuses(self, request: Request) -> str | None:
        q = request.q
        if not q.is_cuda:
            return f"q is on {q.device}; it takes tensors on a GPU"
        return _dtype_refused(q) or ("it has no sinks" if request.sinks_H is not None else None)

    def run(self, request: Request) -> Attended:
        q, k, v, sequences, scale = _inputs(request)
        varlen = import_module(_flash_attn_module()).flash_attn_varlen_func
        q_SHD, k_TGD, v_TGD = (x.flatten(0, -3) for x in (q, k, v))
        cu_seqlens, longest = _cu_seqlens(sequences, q.device), _longest(sequences)
        cu_rows, most_rows = cu_seqlens, longest
        if sequences.fewer_rows:
            of_rows = Sequences(sequences.cu_rows, None, q_SHD.shape[0], sequences.count)
            cu_rows, most_rows = _cu_seqlens(of_rows, q.device), _longest(of_rows)
        form: dict[str, Any] = {}
        if request.sliding_window is not None:
            form["window_size"] = (request.sliding_window - 1, 0)
        if request.softcap is not None:
            form["softcap"] = request.softcap
        result = varlen(
            q_SHD,
            k_TGD,
            v_TGD,
            cu_rows,
            cu_seqlens,
            most_rows,
            longest,
            softmax_scale=scale,
            causal=True,
            **form,
            **_asking_for_lse(varlen),
        )
        out_THD, lse_HT = result[0], result[1]
        return out_THD.view(q.shape), lse_HT


class SdpaFlash(Attention):
    """torch's own flash attention: on the GPU packed and batched, on the CPU one sequence at a time."""

    def refuses(self, request: Request) -> str | None:
        q = request.q
        if request.forms:
            return only_plain(request)
        if q.is_cuda:
            return _dtype_refused(q) or _head_size_refused(q)
        return None if q.dtype in (torch.float32, *HALF) else f"q has dtype {q.dtype}; it takes fp32, fp16 and bf16"

    def run(self, request: Request) -> Attended:
        q, k, v, sequences, scale = _inputs(request)
        if not q.is_cuda:
            return self._on_cpu(request)
        if sequences.cu_seqlens is None:
            q_BHTD, k_BGTD, v_BGTD = (_batched(x) for x in (q, k, v))
            flash = torch.ops.aten._scaled_dot_product_flash_attention
            out, lse, *_ = flash(q_BHTD, *_per_query_head(q_BHTD, k_BGTD, v_BGTD), is_causal=True, scale=scale)
            return out.transpose(1, 2).reshape(q.shape), _flat(lse, q)
        longest = _longest(sequences)
        out_THD, lse_HT, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, sequences.cu_seqlens, sequences.cu_seqlens, longest, longest, 0.0, True, False, scale=scale
        )
        if lse_HT.shape != (q.shape[1], q.shape[0]):
            raise RuntimeError(f"torch's flash attention gave lse of shape {tuple(lse_HT.shape)}; [Hq, T] was expected")
        return out_THD, lse_HT

    def _on_cpu(self, request: Request) -> Attended:
        q, k, v, sequences, scale = _inputs(request)
        q_THD, k_TGD, v_TGD = (x.flatten(0, -3) for x in (q, k, v))
        out_THD = torch.empty_like(q_THD, memory_format=torch.contiguous_format)
        lse_HT = torch.empty((q_THD.shape[1], q_THD.shape[0]))
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        for start, end in pairwise(sequences.host.cu_seqlens):
            if end > start:
                q_BHTD, k_BGTD, v_BGTD = (_batched(x[start:end]) for x in (q_THD, k_TGD, v_TGD))
                k_BHTD, v_BHTD = _per_query_head(q_BHTD, k_BGTD, v_BGTD)
                out, lse = flash(q_BHTD, k_BHTD, v_BHTD, is_causal=True, scale=scale)
                out_THD[start:end], lse_HT[:, start:end] = out[0].transpose(0, 1), lse[0]
        return out_THD.view(q.shape), lse_HT


class SdpaCudnn(Attention):
    """cuDNN's attention through torch: one sequence or a batch, on the GPU."""

    def unavailable(self) -> str | None:
        cudnn: Any = torch.backends.cudnn  # without types
        return None if cudnn.is_available() else "torch has no cuDNN here"

    def refuses(self, request: Request) -> str | None:
        q = request.q
        if not q.is_cuda:
            return f"q is on {q.device}; it takes tensors on a GPU"
        sequences = request.sequences
        if sequences.cu_seqlens is not None and sequences.count > 1:
            return f"cu_seqlens packs {sequences.count} sequences; it takes one, or a batch [B, T, H, D]"
        return _dtype_refused(q) or _head_size_refused(q) or only_plain(request)

    def run(self, request: Request) -> Attended:
        q, k, v, _, scale = _inputs(request)
        q_BHTD, k_BGTD, v_BGTD = (_batched(x) for x in (q, k, v))
        k_BHTD, v_BHTD = _per_query_head(q_BHTD, k_BGTD, v_BGTD)
        cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention
        out, lse, *_ = cudnn(q_BHTD, k_BHTD, v_BHTD, None, True, 0.0, True, False, scale=scale)
        return out.transpose(1, 2).reshape(q.shape), _flat(lse.reshape(q_BHTD.shape[:3]), q)


IMPLEMENTATIONS: dict[str, Attention] = {
    "flash_attn": FlashAttn(),
    "sdpa_flash": SdpaFlash(),
    "sdpa_cudnn": SdpaCudnn(),
}
NAMES = ("fused", *IMPLEMENTATIONS, "auto")


def choose(name: str, request: Request) -> Attention | None:
    """The implementation called `name`; None: ours, in the same sweep as the statistics.

    "auto" takes what the packaged records (attention_records.json) say was fastest for the device and type, if it can
    take the request, else ours.

    Raises:
        ValueError: the name is unknown, or the named implementation can't take the request.
        RuntimeError: the named implementation is not available on this machine.
    """
    if name == "auto":
        q, sequences = request.q, request.sequences
        device, dtype = _device_name(q.device), str(q.dtype).removeprefix("torch.")
        name = recorded(device, dtype, sequences.tokens // max(sequences.count, 1))
        if name != "fused" and (IMPLEMENTATIONS[name].unavailable() or IMPLEMENTATIONS[name].refuses(request)):
            name = "fused"
        _log_choice(name, device, q.dtype)
    if name == "fused":
        return None
    return named("attention", name, IMPLEMENTATIONS, request, allowed=NAMES)


def recorded(device: str, dtype: str, tokens: int) -> str:
    """The implementation that the records name for sequences of `tokens`; "fused" where nothing was measured."""
    for record in _records():
        if record["device"] in device and record["dtype"] == dtype and tokens >= record["min_tokens"]:
            return str(record["attention"])
    return "fused"


@cache
def _records() -> list[dict[str, Any]]:
    text = files("rhythm.ops").joinpath("attention_records.json").read_text(encoding="utf-8")
    records: list[dict[str, Any]] = json.loads(text)["records"]
    return records


@cache
def _log_choice(name: str, device: str, dtype: torch.dtype) -> None:
    """Cached, so that the choice for a device and type is logged once."""
    logger.info("attention auto: %s for %s on %s", name, dtype, device)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _flash_attn_module() -> str:
    return next((name for name in ("flash_attn_interface", "flash_attn") if find_spec(name)), "")


def _asking_for_lse(varlen: Any) -> dict[str, bool]:
    """The name under which a version of flash_attn_varlen_func returns lse along with the output."""
    names = varlen.__code__.co_varnames[: varlen.__code__.co_argcount + varlen.__code__.co_kwonlyargcount]
    return {name: True for name in ("return_attn_probs", "return_softmax_lse") if name in names}


def _dtype_refused(q: Tensor) -> str | None:
    return None if q.dtype in HALF else f"q has dtype {q.dtype}; it takes torch.float16 and torch.bfloat16"


def _head_size_refused(q: Tensor) -> str | None:
    return f"q has head size {q.shape[-1]}; it takes multiples of 8" if q.shape[-1] % 8 else None


def _inputs(request: Request) -> tuple[Tensor, Tensor, Tensor, Sequences, float]:
    assert request.v is not None  # attention is asked for with v only
    return request.q, request.k, request.v, request.sequences, request.scale


def _cu_seqlens(sequences: Sequences, device: torch.device) -> Tensor:
    if sequences.cu_seqlens is not None:
        return sequences.cu_seqlens
    length = sequences.tokens // sequences.count
    return torch.arange(sequences.count + 1, dtype=torch.int32, device=device) * length


def _longest(sequences: Sequences) -> int:
    """An upper bound of the sequences' lengths that reads nothing from the device."""
    return sequences.tokens if sequences.cu_seqlens is not None else sequences.tokens // sequences.count


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
