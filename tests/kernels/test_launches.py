"""Which kernels an op launches, and the results of the small ones."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs the extra triton")

from rhythm import attention_statistics, attention_with_statistics
from rhythm.kernels import BlockSums, Sequences, bands, undefined_results
from rhythm.kernels.launch import launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.triton,
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # numpy, on rows beyond the end
]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that are launched; filling a tensor by torch raises."""
    names: list[str] = []

    def recorded(kernel: Any, programs: int, **arguments: Any) -> None:
        names.append(kernel.fn.__name__)
        launch(kernel, programs, **arguments)

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("torch launched a kernel of its own")

    for module in ("results", "row_sweep", "bands", "values"):
        monkeypatch.setattr(sys.modules[f"rhythm.kernels.{module}"], "launch", recorded)
    monkeypatch.setattr(torch, "full", refuse)
    monkeypatch.setattr(torch.Tensor, "new_full", refuse)
    return names


def test_what_an_op_launches(launches: list[str]) -> None:
    q = torch.ones(20, 2, 16, device=DEVICE)
    lse = torch.arange(1.0, 21, device=DEVICE).log().expand(2, 20).contiguous()
    attention_statistics(q, q, backend="triton")
    assert launches == ["results_kernel", "row_sweep_kernel", "narrow_bands_kernel"]
    launches.clear()
    attention_statistics(q, q, lse=lse, backend="triton")
    assert launches == ["results_kernel", "row_sweep_kernel", "narrow_bands_kernel"]
    launches.clear()
    attention_statistics(q, q, lse=lse, span=False, backend="triton")
    assert launches == ["results_kernel", "narrow_bands_kernel"]
    launches.clear()
    attention_with_statistics(q, q, q, backend="triton")
    assert launches == ["results_kernel", "row_values_kernel", "mend_output_kernel", "narrow_bands_kernel"]


def test_results_are_undefined_until_written() -> None:
    """More sequences than tokens, more than one program, and a lse whose infinities become NaN."""
    lse = torch.linspace(-5, 5, 2 * 3000, device=DEVICE).view(2, 3000)
    lse[0, 7], lse[1, 2999], lse[1, 0] = torch.inf, -torch.inf, torch.nan
    results = undefined_results(5000, 2, 3000, torch.device(DEVICE), lse)
    assert results.span.shape == (5000, 2)
    assert results.waad.shape == results.fai.shape == results.lse.shape == (2, 3000)
    for x in (results.span, results.waad, results.fai, results.lse):
        assert x.isnan().all()
    assert len({x.untyped_storage().data_ptr() for x in (results.span, results.waad, results.fai, results.lse)}) == 4
    expected = lse.masked_fill(lse.isinf(), torch.nan)
    torch.testing.assert_close(results.given_lse, expected, rtol=0, atol=0, equal_nan=True)
    assert results.softmax is None
    assert undefined_results(2, 2, 0, torch.device(DEVICE), None).span.isnan().all()
    without = undefined_results(2, 2, 3000, torch.device(DEVICE), None)
    assert without.given_lse is None
    assert without.softmax is not None
    assert without.softmax.steep.tolist() == [0]


@pytest.mark.parametrize("fewer", [False, True], ids=["as many rows", "fewer rows"])
@pytest.mark.parametrize("from_prompt", [True, False])
def test_spans_from_sums_of_blocks(from_prompt: bool, fewer: bool) -> None:
    """Sequences of several blocks, one block and none, and of more blocks than one step adds; unused sums are NaN."""
    rows, heads = 2, 2
    lengths, prompts = [4, 0, 2105, 3, 10], [1, 0, 17, 3, 0]
    counts = [2, 0, 2090, 1, 5] if fewer else lengths
    bounds, row_bounds = (torch.tensor([0, *n]).cumsum(0) for n in (lengths, counts))
    sequences = Sequences(
        bounds.to(DEVICE, torch.int32),
        torch.tensor(prompts, device=DEVICE),
        int(bounds[-1]),
        len(lengths),
        row_bounds.to(DEVICE, torch.int32) if fewer else None,
        int(row_bounds[-1]),
    )
    prompts = [max(prompt, length - n) for prompt, length, n in zip(prompts, lengths, counts, strict=True)]
    generator = torch.Generator().manual_seed(0)
    sums = torch.full((sequences.blocks(rows), heads), torch.nan, dtype=torch.float64)
    expected = torch.full((len(lengths), heads), torch.nan, dtype=torch.float64)
    for i, (length, prompt, count) in enumerate(zip(lengths, prompts, counts, strict=True)):
        blocks = -(-(length - prompt if from_prompt else count) // rows)
        of_sequence = torch.randn(blocks, heads, generator=generator, dtype=torch.float64)
        first = int(bounds[i]) // rows + i
        for block in range(blocks):  # the last lies first
            sums[sums.shape[0] - 1 - first - block] = of_sequence[block]
        if length > prompt:
            expected[i] = of_sequence.sum(0) / (length - prompt)
    spans = [torch.empty(len(lengths), heads, device=DEVICE) for _ in range(2)]
    q, k = (torch.zeros(n, heads, 16, device=DEVICE) for n in (int(row_bounds[-1]), int(bounds[-1])))
    lse, waad, fai = (torch.zeros(heads, int(bounds[-1]), device=DEVICE) for _ in range(3))
    for span in spans:
        of_blocks = BlockSums(sums.to(DEVICE), rows, from_prompt)
        near: dict[str, Any] = {"scale": 1.0, "window": 1, "horizon": (0, 0), "sums": of_blocks, "span_BH": span}
        bands(q, k, lse, sequences, waad, fai, None, **near)
    torch.testing.assert_close(spans[0].cpu().double(), expected, rtol=1e-6, atol=1e-9, equal_nan=True)
    torch.testing.assert_close(spans[0], spans[1], rtol=0, atol=0, equal_nan=True)
