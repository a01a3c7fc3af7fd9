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
    spans = [
        row_span_HT[:, start + prompt : end].mean(dim=-1, dtype=torch.float64).float()
        for (start, end), prompt in zip(pairwise(host.cu_seqlens), host.prompt_lens, strict=True)
    ]
    return torch.stack(spans) if spans else row_span_HT.new_empty((0, row_span_HT.shape[0]))
