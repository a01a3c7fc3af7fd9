"""The choice of a backend and of an instruction set."""

from __future__ import annotations

import logging

import pytest
import torch

from rhythm import _C, backends
from rhythm.backends import cpu
from rhythm.statistics import attention_statistics

Q = torch.randn(5, 2, 8)


@pytest.fixture(autouse=True)
def _fresh_choice() -> None:
    backends._automatic.cache_clear()


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
    assert "not cpu: it has dtype torch.float64" in caplog.text


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
