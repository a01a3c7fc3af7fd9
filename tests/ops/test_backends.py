"""The choice of a backend and of an instruction set."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from tensors import normal

from rhythm import _C
from rhythm.ops import backends
from rhythm.ops.arguments import Request, check_values
from rhythm.ops.backends import cpu
from rhythm.ops.backends.base import BackendResult
from rhythm.ops.statistics import attention_statistics
from rhythm.shapes import Sequences

Q = normal(5, 2, 8)


@pytest.fixture(autouse=True)
def _fresh_choice() -> None:
    backends._log_choice.cache_clear()


def test_auto_takes_the_kernels_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="rhythm"):
        attention_statistics(Q, Q)
        attention_statistics(Q, Q)
    assert [record.getMessage() for record in caplog.records] == ["backend auto: cpu for torch.float32 tensors on cpu"]


def test_auto_passes_over_what_cannot_take_the_type(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="rhythm"):
        statistics = attention_statistics(Q.double(), Q.double())
    assert statistics.waad.dtype == torch.float64
    assert "reference for torch.float64" in caplog.text
    assert "not cpu: q has dtype torch.float64" in caplog.text


def test_a_missing_backend_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_C", None)
    monkeypatch.setattr(cpu, "_IMPORT_ERROR", "no such file")
    with pytest.raises(RuntimeError, match=r"backend 'cpu' is not available: .*no such file"):
        attention_statistics(Q, Q, backend="cpu")
    assert "no such file" in backends.availability()["cpu"]
    assert attention_statistics(Q, Q).waad.shape == (2, 5)  # auto goes on to the reference


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RHYTHM_CPU_ISA", "avx1024")
    with pytest.raises(RuntimeError, match=r"RHYTHM_CPU_ISA is 'avx1024'; this machine runs .*portable"):
        attention_statistics(Q, Q, backend="cpu")
    monkeypatch.setenv("RHYTHM_CPU_ISA", "")
    assert _C.selected_isa() == _C.available_isas()[0]
    assert _C.available_isas()[-1] == "portable"


def test_a_gpu_too_old_for_the_kernels_is_told_what_would_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from rhythm.ops.backends import triton

    class OnGpu:
        device, dtype = torch.device("cuda", 0), torch.float16

    request = Request(
        q=OnGpu(), k=OnGpu(), v=None, sequences=Sequences(None, None, 5, 1), scale=1.0, window=10, horizon=(10, 50)
    )
    monkeypatch.setattr(triton, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    for capability, refused in (((7, 5), True), ((8, 0), False), ((9, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        triton.too_old.cache_clear()
        reason = triton.TritonBackend().refuses(request)
        assert (reason is not None) == refused
        if reason is not None:
            assert "Tesla T4 of compute capability 7.5; the kernels need 8.0" in reason
            assert "backend 'reference' runs there" in reason
    triton.too_old.cache_clear()


def test_values_on_a_gpu_are_checked_on_request_only(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        device = torch.device("cuda")
        read = False

        def tolist(self) -> list[int]:
            self.read = True
            return [0, 4, 20]

    bad = OnGpu()
    check_values(Sequences(bad, None, 10, 2))
    assert not bad.read
    monkeypatch.setenv("RHYTHM_CHECK_VALUES", "1")
    with pytest.raises(ValueError, match="cu_seqlens runs from 0 to 20; it must cover 0 to T = 10"):
        check_values(Sequences(bad, None, 10, 2))
    monkeypatch.delenv("RHYTHM_CHECK_VALUES")
    with pytest.raises(ValueError, match="cu_seqlens runs from 0 to 20"):
        check_values(Sequences(torch.tensor([0, 4, 20]), None, 10, 2))


class ShortOnly(backends.Backend):
    """A backend of another project: a table entry is all that it takes."""

    def refuses(self, request: Request) -> str | None:
        tokens = request.sequences.tokens
        return f"q has {tokens} tokens; it takes 5" if tokens > 5 else None

    def run(self, request: Request) -> BackendResult:
        result = backends.BACKENDS["reference"].run(replace(request, scale=0.0))
        return replace(result, waad_HT=result.waad_HT + request.window)


def test_a_backend_in_the_table_is_called_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.BACKENDS, "short", ShortOnly())
    statistics = attention_statistics(Q, Q, window=3, backend="short")
    even = torch.tensor([sum(min(j, 3) for j in range(t + 1)) / (t + 1) for t in range(5)])
    torch.testing.assert_close(statistics.waad, (even + 3).expand(2, 5))
    with pytest.raises(ValueError, match="backend 'short' can't run: q has 10 tokens; it takes 5"):
        attention_statistics(torch.cat([Q, Q]), torch.cat([Q, Q]), backend="short")
    # Auto tries the table in order and goes on where a backend refuses the request.
    monkeypatch.setattr(backends, "BACKENDS", {"short": ShortOnly(), "reference": backends.BACKENDS["reference"]})
    assert attention_statistics(Q, Q).waad.min() >= 10
    assert attention_statistics(torch.cat([Q, Q]), torch.cat([Q, Q])).waad.min() < 10
