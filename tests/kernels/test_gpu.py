"""Tests that need a GPU: no waiting for the device, CUDA graphs, autotuning, and torch's own forwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs the extra triton")

from rhythm import attention_statistics, attention_with_statistics

pytestmark = [
    pytest.mark.triton,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NAMES = ("span", "waad", "fai", "lse")


def qkv(tokens: int = 700) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(tokens, h, 128, generator=generator).to("cuda", torch.bfloat16) for h in (8, 2, 2)]


def lengths() -> dict[str, torch.Tensor]:
    cu_seqlens = torch.tensor([0, 300, 700], dtype=torch.int32, device="cuda")
    return {"cu_seqlens": cu_seqlens, "prompt_lens": torch.tensor([40, 100], device="cuda")}


def test_the_host_never_waits() -> None:
    (q, k, v), arguments = qkv(), lengths()
    first = attention_statistics(q, k, **arguments)  # compiles
    attention_with_statistics(q, k, v, **arguments)
    attention_statistics(q, k, lse=first.lse, span_rows=64, **arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        attention_statistics(q, k, **arguments)
        attention_with_statistics(q, k, v, **arguments)
        attention_statistics(q, k, lse=first.lse, span_rows=64, **arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_in_a_graph() -> None:
    (q, k, _), arguments = qkv(), lengths()
    expected = attention_statistics(q, k, **arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attention_statistics(q, k, **arguments)
    graph.replay()
    for name in NAMES:
        torch.testing.assert_close(
            getattr(captured, name), getattr(expected, name), rtol=0, atol=0, equal_nan=True, msg=name
        )


def test_autotuning_finds_a_tile_that_is_right(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (q, k, v), arguments = qkv(), lengths()
    expected = attention_with_statistics(q, k, v, **arguments)[1]
    monkeypatch.setenv("RHYTHM_AUTOTUNE", "1")
    monkeypatch.setenv("RHYTHM_CACHE", str(tmp_path))
    tuned = attention_with_statistics(q, k, v, **arguments)[1]
    assert (tmp_path / "tiles.json").exists()
    for name in NAMES:
        torch.testing.assert_close(
            getattr(tuned, name), getattr(expected, name), rtol=1e-3, atol=1e-4, equal_nan=True, msg=name
        )


@pytest.mark.parametrize("implementation", ["sdpa_flash", "sdpa_cudnn"])
def test_torchs_attention(implementation: str) -> None:
    q, k, v = (x.unflatten(0, (2, 350)) for x in qkv())
    expected_out, expected = attention_with_statistics(q, k, v, prompt_lens=[40, 100])
    out, statistics = attention_with_statistics(q, k, v, prompt_lens=[40, 100], attention=implementation)
    torch.testing.assert_close(out, expected_out, rtol=2e-2, atol=2e-2)
    for name in NAMES:
        actual = getattr(statistics, name)
        torch.testing.assert_close(actual, getattr(expected, name), rtol=5e-3, atol=1e-3, equal_nan=True, msg=name)


def test_packed_flash() -> None:
    (q, k, v), arguments = qkv(), lengths()
    expected_out, expected = attention_with_statistics(q, k, v, **arguments)
    out, statistics = attention_with_statistics(q, k, v, attention="sdpa_flash", **arguments)
    torch.testing.assert_close(out, expected_out, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(statistics.fai, expected.fai, rtol=5e-3, atol=1e-4, equal_nan=True)
