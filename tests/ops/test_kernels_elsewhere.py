"""Kernels in a process of their own: those of arm64 from a cross compiler, in an emulator.

`make arm64` runs the other tests of the ops on them.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from kernels_elsewhere import KernelServer
from tensors import normal, random_qkv

from rhythm import attention_bands, attention_with_statistics, column_scores
from rhythm.cli.doctor import self_check
from rhythm.ops.backends import cpu

ROOT = Path(__file__).parents[2]
EMULATOR = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
SERVER = ROOT / "build/arm64/kernel_server"
PRESENT = EMULATOR is not None and shutil.which("aarch64-linux-gnu-g++") is not None

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PRESENT, reason="arm64 is not tested: apt-get install g++-aarch64-linux-gnu qemu-user"),
]


@pytest.fixture(scope="module")
def arm64() -> Iterator[KernelServer]:
    subprocess.run(["make", SERVER.relative_to(ROOT)], cwd=ROOT, check=True)
    server = KernelServer(f"{EMULATOR} {SERVER}")
    yield server
    server.close()


def test_the_emulated_processor_chooses_its_kernels(arm64: KernelServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert arm64.available_isas() == ["neon_bf16", "neon", "portable"]
    assert arm64.selected_isa() == "neon_bf16"
    monkeypatch.setenv("RHYTHM_CPU_ISA", "avx2")
    with pytest.raises(RuntimeError, match="RHYTHM_CPU_ISA is 'avx2'; this machine runs neon_bf16, neon, portable"):
        arm64.selected_isa()


def test_a_processor_without_bf16_is_not_given_it(arm64: KernelServer) -> None:
    server = KernelServer(f"{EMULATOR} -cpu cortex-a72 {SERVER}")
    assert server.available_isas() == ["neon", "portable"]
    server.close()


@pytest.mark.parametrize("isa", ["neon", "portable"])
def test_the_kernels_of_arm64_agree_with_the_reference(
    arm64: KernelServer, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RHYTHM_CPU_ISA", isa)
    monkeypatch.setattr(cpu, "_C", arm64)
    finding = self_check()
    assert finding.reason is None, finding


@pytest.mark.parametrize(
    ("isa", "dtype"),
    [*(("neon", dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)), ("neon_bf16", torch.bfloat16)],
    ids=str,
)
def test_every_argument_reaches_the_kernels_of_arm64(
    arm64: KernelServer, isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from this processor's portable kernels, which differ in rounding only."""
    q, k, v = (x[:, :, ::2] for x in random_qkv(150, 4, 2, 34, dtype))  # with strides
    forms = {"softcap": 5.0, "sliding_window": 70, "sinks": normal(4), "backend": "cpu"}
    packed = {"cu_seqlens": torch.tensor([0, 60, 150], dtype=torch.int32), "prompt_lens": [7, 0]}
    rows = {
        "cu_seqlens": torch.tensor([0, 20, 100], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, 60, 150], dtype=torch.int32),
        "prompt_lens": [45, 12],
    }
    answers = ("max_logit", "top1", "entropy", "first_mass", "prompt_mass")

    def results() -> list[torch.Tensor]:
        out, given = attention_with_statistics(
            q[:100], k, v, **forms, **rows, window=9, horizon=(2, 30), also=answers, first=3
        )
        full = attention_with_statistics(q, k, v, **forms, **packed, scale=-0.3)[1]
        bands = attention_bands(q, k, full.lse, windows=[3, 20], horizons=[(0, 5), (4, None)], **forms, **packed)
        scores = column_scores(
            q,
            k,
            reduce="max",
            row_weights=normal(1, 150).abs().expand(4, 150),
            **forms,
            cu_seqlens=packed["cu_seqlens"],
        )
        fields = [getattr(given, name) for name in ("span", "waad", "fai", "lse", *answers)]
        return [out, *fields, full.waad, full.fai, *bands, scores]

    monkeypatch.setenv("RHYTHM_CPU_ISA", "portable")
    here = results()
    monkeypatch.setenv("RHYTHM_CPU_ISA", isa)
    monkeypatch.setattr(cpu, "_C", arm64)
    for actual, expected in zip(results(), here, strict=True):
        assert not expected.isnan().all()
        tolerance = 2e-5 if expected.dtype == torch.float32 else 1e-2
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
