"""What a backend is, and what it gives back, on the flattened token axis."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from rhythm.ops.arguments import Request
from rhythm.ops.backends.sampled_span import sampled_span
from rhythm.ops.plugins import Plugin
from rhythm.shapes import Sequences


@dataclass(frozen=True)
class BackendResult:
    """Statistics in fp32 (fp64 from the reference for fp64 inputs); T is the flattened token axis.

    out_THD is None where the request has no v, and undefined where its lse_HT is given.
    """

    span_BH: Tensor
    waad_HT: Tensor
    fai_HT: Tensor
    lse_HT: Tensor
    out_THD: Tensor | None


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
