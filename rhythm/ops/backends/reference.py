"""The reference as a backend: any device, any float type, memory O(Hq·N²) of the longest sequence."""

from __future__ import annotations

from rhythm.ops import reference
from rhythm.ops.arguments import Request
from rhythm.ops.backends.base import Backend, BackendResult


class ReferenceBackend(Backend):
    def refuses(self, request: Request) -> str | None:
        return None

    def run(self, request: Request) -> BackendResult:
        host, v = request.sequences.host, request.v
        span_BH, waad_HT, fai_HT, lse_HT, out_THD = reference.attention_statistics(
            request.q.flatten(0, -3),
            request.k.flatten(0, -3),
            bounds=host.cu_seqlens,
            prompt_lens=host.prompt_lens,
            row_bounds=host.cu_rows,
            scale=request.scale,
            window=request.window,
            horizon=request.horizon,
            lse_HT=request.lse_HT,
            v_TGD=None if v is None else v.flatten(0, -3),
            sliding_window=request.sliding_window,
            softcap=request.softcap,
            sinks_H=request.sinks_H,
        )
        return BackendResult(span_BH, waad_HT, fai_HT, lse_HT, out_THD)
