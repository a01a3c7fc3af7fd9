"""What a backend is, and what it gives back, on the flattened token axis."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from rhythm.ops.arguments import Request
from rhythm.ops.backends import in_blocks
from rhythm.ops.backends.in_blocks import Columns
from rhythm.ops.backends.sampled_span import sampled_span
from rhythm.ops.plugins import Plugin
from rhythm.shapes import Sequences


@dataclass(frozen=True)
class BackendResult:
    """Statistics in fp32 (fp64 from the reference for fp64 inputs); T is the flattened token axis.

    out_THD is None where the request has no v, and undefined where its lse_HT is given. also_AHT: what request.also
    names, in that order; None where the backend's own sweep does not give it.
    """

    span_BH: Tensor
    waad_HT: Tensor
    fai_HT: Tensor
    lse_HT: Tensor
    out_THD: Tensor | None
    also_AHT: Tensor | None = None


class Backend(Plugin[BackendResult]):
    """Computes the statistics, and the attention output where v is given."""

    def only_by_name(self) -> str | None:
        """Why "auto" passes it over though it could run; None: it doesn't."""
        return None

    @abstractmethod
    def run(self, request: Request) -> BackendResult:
        """The statistics. span_BH is exact, whatever span_rows; it may be NaN where span is not wanted."""

    def sampled_span(self, request: Request, lse_HT: Tensor, count: int) -> Tensor:
        """span_BH, estimated from `count` rows of each response."""
        return sampled_span(request, lse_HT, count)

    def also(self, request: Request) -> Tensor:
        """[A, H, T], what request.also names, where `run` does not give it."""
        return in_blocks.answers(request)

    def columns(self, request: Request, wanted: Columns) -> Tensor:
        """[H, T]: of each key Σ_t w[t]·A[t, s] (or max_t) over response rows t within the horizon that see it.

        0 (or −inf) for a key that no row reaches; rows whose weight is 0 reach none.
        """
        return in_blocks.columns(request, wanted)

    def bands(
        self, request: Request, windows: Sequence[int], horizons: Sequence[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """(WAAD [len(windows), H, T], FAI [len(horizons), H, T]) of a request with lse_HT."""
        heads, tokens = request.q.shape[-2], request.sequences.tokens
        dtype = torch.float64 if request.q.dtype == torch.float64 else torch.float32
        waad_WHT, fai_FHT = (request.q.new_empty((len(x), heads, tokens), dtype=dtype) for x in (windows, horizons))
        for i in range(max(len(windows), len(horizons))):
            one = replace(request, window=windows[i] if i < len(windows) else 1, span=False)
            result = self.run(replace(one, horizon=horizons[i] if i < len(horizons) else (0, 0)))
            if i < len(windows):
                waad_WHT[i] = result.waad_HT
            if i < len(horizons):
                fai_FHT[i] = result.fai_HT
        return waad_WHT, fai_FHT


def mean_span(row_span_HT: Tensor, sequences: Sequences) -> Tensor:
    """[B, H]: the mean over each sequence's response rows, summed in fp64; NaN where there are none."""
    host = sequences.host
    bounds = zip(pairwise(host.cu_seqlens), host.prompt_lens, strict=True)
    lens = [count for (start, end), prompt in bounds for count in (prompt, end - start - prompt)]
    lens_2B = torch.tensor(lens, dtype=torch.int64, device=row_span_HT.device)
    row_span_TH = row_span_HT.T.to(torch.float64, memory_format=torch.contiguous_format)
    # Each segment's rows are added in order, on any device; those of the prompts are not looked at.
    sum_BH = torch.segment_reduce(row_span_TH, "sum", lengths=lens_2B, axis=0, unsafe=True)[1::2]
    return (sum_BH / lens_2B[1::2, None]).float()
