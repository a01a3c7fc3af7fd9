"""Attention outputs of other libraries with bands added, and spans from sampled rows, against the fp64 reference."""

from __future__ import annotations

import itertools
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tensors import TRITON, normal
from torch import Tensor

from rhythm import attention_statistics, attention_with_statistics
from rhythm.ops import attention
from rhythm.ops.arguments import Request
from rhythm.ops.backends.sampled_span import sampled_rows
from rhythm.ops.reference import attention_weights
from rhythm.shapes import Sequences

ROOT = Path(__file__).parents[2]
NAMES = ("span", "waad", "fai", "lse")
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy, in Triton's interpreter


def inputs(packed: bool, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], dict[str, Any]]:
    if not packed:
        return [normal(2, 60, h, 16, seed=h, dtype=dtype) for h in (4, 2, 2)], {"prompt_lens": [5, 59]}
    cu_seqlens = torch.tensor([0, 50, 50, 120], dtype=torch.int32)
    return [normal(120, h, 16, seed=h, dtype=dtype) for h in (4, 2, 2)], {
        "prompt_lens": [7, 0, 20],
        "cu_seqlens": cu_seqlens,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "batched"])
@pytest.mark.parametrize("backend", ["cpu", "reference", TRITON])
def test_sdpa_flash(backend: str, packed: bool, dtype: torch.dtype) -> None:
    (q, k, v), arguments = inputs(packed, dtype)
    exact = attention_with_statistics(q.double(), k.double(), v.double(), backend="reference", **arguments)
    out, statistics = attention_with_statistics(q, k, v, attention="sdpa_flash", backend=backend, **arguments)
    assert out.dtype == dtype
    rtol = 2e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.double(), exact[0], rtol=rtol, atol=rtol)
    for name in NAMES:
        actual, expected = getattr(statistics, name).double(), getattr(exact[1], name)
        torch.testing.assert_close(actual, expected, rtol=2e-4, atol=1e-5, equal_nan=True, msg=name)


def test_the_librarys_output_and_lse_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's output and lse are returned and used as they are, even if wrong."""
    (q, k, v), arguments = inputs(packed=True)
    right = attention_with_statistics(q, k, v, backend="cpu", **arguments)[1]

    def run(self: object, request: Request) -> tuple[Tensor, Tensor]:
        return torch.full_like(request.q, 7.0), torch.full((4, 120), 100.0)

    monkeypatch.setattr(attention.SdpaFlash, "run", run)
    out, statistics = attention_with_statistics(
        q, k, v, attention="sdpa_flash", backend="cpu", span_rows=4, **arguments
    )
    assert (out == 7).all()
    assert statistics.fai[:, :10].nan_to_num().max() < 1e-30 < right.fai[:, :10].nan_to_num().max()
    assert statistics.span[0].max() < 1e-30 < right.span[0].max()


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[dict[str, Any]]]:
    """Installs a stand-in module with flash-attn's varlen signature, which computes in plain torch."""

    def install(version: str) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []

        def compute(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float) -> tuple[Tensor, Tensor]:
            calls.append({"longest": longest})
            out, lse = torch.empty_like(q), torch.empty(q.shape[1], q.shape[0])
            bounds = cu.tolist()
            for a, b in itertools.pairwise(bounds):
                assert b - a <= longest
                weights, lse[:, a:b] = attention_weights(q[a:b], k[a:b], scale)
                v_NHD = v[a:b].float().repeat_interleave(q.shape[1] // v.shape[1], dim=1)
                out[a:b] = (weights @ v_NHD.transpose(0, 1)).transpose(0, 1).to(q.dtype)
            return out, lse

        def two(  # flash-attn 2: (out, softmax_lse, S_dmask)
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
            causal=False, window_size=(-1, -1), return_attn_probs=False,
        ):  # fmt: skip
            assert causal
            assert dropout_p == 0
            assert cu_seqlens_q.dtype == torch.int32
            out, lse = compute(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale)
            return (out, lse, None) if return_attn_probs else out

        def three(  # flash-attn 3: (out, softmax_lse)
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
            softmax_scale=None, causal=False, return_softmax_lse=False,
        ):  # fmt: skip
            assert causal
            out, lse = compute(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale)
            return (out, lse) if return_softmax_lse else out

        module = ModuleType(version)
        module.__spec__ = __import__("importlib.machinery").machinery.ModuleSpec(version, None)
        module.flash_attn_varlen_func = two if version == "flash_attn" else three
        monkeypatch.setitem(sys.modules, version, module)
        monkeypatch.setattr(attention.FlashAttn, "refuses", lambda self, request: None)  # it would ask for a GPU
        return calls

    return install


@pytest.mark.parametrize("version", ["flash_attn", "flash_attn_interface"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "batched"])
def test_flash_attn(flash_attn: Callable[[str], list[dict[str, Any]]], version: str, packed: bool) -> None:
    calls = flash_attn(version)
    (q, k, v), arguments = inputs(packed, torch.bfloat16)
    expected_out, expected = attention_with_statistics(q, k, v, backend="reference", **arguments)
    out, statistics = attention_with_statistics(q, k, v, attention="flash_attn", backend="cpu", **arguments)
    assert calls == [{"longest": 120 if packed else 60}]
    torch.testing.assert_close(out, expected_out, rtol=1e-2, atol=1e-2)
    for name in NAMES:
        actual = getattr(statistics, name)
        torch.testing.assert_close(actual, getattr(expected, name), rtol=2e-4, atol=1e-5, equal_nan=True, msg=name)


def test_what_an_implementation_cannot_take() -> None:
    (q, k, v), arguments = inputs(packed=True)
    with pytest.raises(ValueError, match="attention is 'flash'; allowed are fused, flash_attn, sdpa_flash"):
        attention_with_statistics(q, k, v, attention="flash", **arguments)
    with pytest.raises(
        RuntimeError, match="'flash_attn' is not available: neither flash_attn_interface nor flash_attn"
    ):
        attention_with_statistics(q, k, v, attention="flash_attn", **arguments)
    cudnn = attention.SdpaCudnn()
    on_gpu = torch.empty(4, 2, 20, dtype=torch.bfloat16, device="meta")
    on_gpu = type("OnGpu", (), {"is_cuda": True, "dtype": on_gpu.dtype, "shape": on_gpu.shape, "device": "cuda:0"})()

    def request(q: object, sequences: Sequences) -> Request:
        return Request(q=q, k=k, v=v, sequences=sequences, scale=1.0, window=10, horizon=(10, 50))

    packed = Sequences(torch.tensor([0, 2, 4]), None, 4, 2)
    assert "cu_seqlens packs 2 sequences" in cudnn.refuses(request(on_gpu, packed))
    one = Sequences(None, None, 4, 1)
    assert "head size 20; it takes multiples of 8" in cudnn.refuses(request(on_gpu, one))
    assert "q is on cpu" in cudnn.refuses(request(q, packed))
    on_gpu.dtype = torch.float32
    assert "dtype torch.float32; it takes" in attention.SdpaFlash().refuses(request(on_gpu, packed))
    assert "dtype torch.float64" in attention.SdpaFlash().refuses(request(q.double(), packed))
    with pytest.raises(ValueError, match=r"^forward is now attention$"):
        attention_with_statistics(q, k, v, **{"forward": "sdpa_flash"}, **arguments)


def test_auto_follows_the_records(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    (q, k, v), arguments = inputs(packed=False)
    attention._log_choice.cache_clear()
    with caplog.at_level(logging.INFO, logger="rhythm"):
        for _ in range(2):
            fused, _ = attention_with_statistics(q, k, v, attention="auto", backend="cpu", **arguments)
    assert caplog.text.count("attention auto: fused for torch.float32 on cpu") == 1
    assert torch.equal(fused, attention_with_statistics(q, k, v, backend="cpu", **arguments)[0])
    records = [{"device": "cpu", "dtype": "float32", "min_tokens": 60, "attention": "sdpa_flash"}]
    monkeypatch.setattr(attention, "_records", lambda: records)
    ran = []
    monkeypatch.setattr(
        attention.SdpaFlash, "run", lambda self, request: ran.append(1) or (request.q.clone(), torch.zeros(4, 120))
    )
    attention_with_statistics(q, k, v, attention="auto", backend="cpu", **arguments)
    assert ran == [1]
    # Shorter than the record says, or of a type that it does not name: ours.
    attention_with_statistics(q[:, :59], k[:, :59], v[:, :59], attention="auto", backend="cpu", prompt_lens=[5, 5])
    attention_with_statistics(*(x.bfloat16() for x in (q, k, v)), attention="auto", backend="cpu", **arguments)
    assert ran == [1]


def test_packaged_records_name_what_was_measured() -> None:
    for record in attention._records():
        assert record["attention"] in attention.NAMES
        measured = json.loads((ROOT / record["record"]).read_text(encoding="utf-8"))
        metrics = measured["parts"][f"race_{record['dtype']}"]["metrics"]
        (ratio,) = [metric["value"] for metric in metrics if metric["name"].startswith("with output")]
        assert record["time"] == round(ratio, 2)


def test_sampled_rows() -> None:
    cpu = torch.device("cpu")
    assert sampled_rows(12, 4, cpu).tolist() == [1, 4, 7, 10]  # the middles of 0–2, 3–5, 6–8, 9–11
    assert sampled_rows(10, 4, cpu).tolist() == [1, 3, 6, 8]
    assert sampled_rows(4, 4, cpu).tolist() == sampled_rows(4, 9, cpu).tolist() == [0, 1, 2, 3]
    assert sampled_rows(0, 4, cpu).tolist() == []


@pytest.mark.parametrize("backend", ["cpu", "reference", TRITON])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "batched"])
@pytest.mark.parametrize("count", [1, 9, 45, 1000])
def test_sampled_span(backend: str, packed: bool, count: int) -> None:
    """The mean over just those rows of the map; with rows to spare, the exact span."""
    (q, k, _), arguments = inputs(packed)
    exact = attention_statistics(q.double(), k.double(), backend="reference", **arguments)
    bounds = [0, 50, 50, 120] if packed else [0, 60, 120]
    q_THD, k_TGD = q.flatten(0, -3), k.flatten(0, -3)
    expected = torch.full((len(bounds) - 1, 4), torch.nan, dtype=torch.float64)
    for i, (a, b, prompt) in enumerate(zip(bounds[:-1], bounds[1:], arguments["prompt_lens"], strict=True)):
        if b - a > prompt:
            weights, _ = attention_weights(q_THD[a:b].double(), k_TGD[a:b].double(), 0.25)
            position = torch.arange(b - a)
            row_spans = (weights * (position[:, None] - position)).sum(-1)
            expected[i] = row_spans[:, prompt + sampled_rows(b - a - prompt, count, torch.device("cpu"))].mean(-1)
    actual = attention_statistics(q, k, lse=exact.lse.float(), span_rows=count, backend=backend, **arguments)
    torch.testing.assert_close(actual.span.double(), expected, rtol=2e-5, atol=1e-5, equal_nan=True)
    if count >= 55:
        torch.testing.assert_close(actual.span.double(), exact.span, rtol=2e-5, atol=1e-5, equal_nan=True)
    for name in ("waad", "fai"):
        torch.testing.assert_close(
            getattr(actual, name).double(), getattr(exact, name), rtol=2e-4, atol=1e-5, equal_nan=True
        )


def test_sampled_span_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    (q, k, _), arguments = inputs(packed=True)
    lse = attention_statistics(q, k, backend="cpu", **arguments).lse
    whole = attention_statistics(q, k, lse=lse, span_rows=9, backend="cpu", **arguments).span
    monkeypatch.setattr("rhythm.ops.backends.sampled_span.SCORES_AT_ONCE", 4 * 9 * 7)
    chunked = attention_statistics(q, k, lse=lse, span_rows=9, backend="cpu", **arguments).span
    torch.testing.assert_close(chunked, whole, equal_nan=True)


def test_span_rows_where_it_makes_no_sense() -> None:
    (q, k, v), arguments = inputs(packed=True)
    with pytest.raises(ValueError, match="span_rows is 8; it goes with lse given"):
        attention_statistics(q, k, span_rows=8, **arguments)
    with pytest.raises(ValueError, match="span_rows is 8; it goes with attention other than 'fused'"):
        attention_with_statistics(q, k, v, span_rows=8, **arguments)
    with pytest.raises(ValueError, match="span_rows is 0; it must be an integer of at least 1"):
        attention_with_statistics(q, k, v, attention="sdpa_flash", span_rows=0, **arguments)


@pytest.mark.parametrize(
    "options", [{}, {"attention": "sdpa_flash"}, {"attention": "sdpa_flash", "span_rows": 8}], ids=str
)
def test_compiled(options: dict[str, Any]) -> None:
    (q, k, v), arguments = inputs(packed=False)
    arguments["prompt_lens"] = torch.tensor(arguments["prompt_lens"])

    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, statistics = attention_with_statistics(q, k, v, backend="cpu", **options, **arguments)
        return out, statistics.span

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(q, k, v), forward(q, k, v), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
