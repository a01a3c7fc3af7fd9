"""rhythm-doctor: lists what is installed and why the rest is not; the exit code says whether the core works."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rhythm import _C
from rhythm.cli import doctor
from rhythm.cli.doctor import Finding, diagnose, is_healthy, main, relative_error, self_check
from rhythm.ops import backends


@pytest.fixture(scope="module", autouse=True)
def interpreter_trouble() -> Iterator[Callable[[], str | None]]:
    """The doctor's own, which starts a process that imports torch and Triton; it is asked once for all tests."""
    real = doctor._interpreter_trouble
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor, "_interpreter_trouble", cache(real))
        yield real


@pytest.fixture(scope="module")
def findings() -> dict[str, Finding]:
    return {finding.name: finding for finding in diagnose()}


def test_finds_what_this_machine_has(findings: dict[str, Finding]) -> None:
    assert findings["torch"].found == torch.__version__
    assert findings["Python"].found == sys.version.split()[0]
    assert findings["instruction set"].found.startswith(_C.selected_isa())
    assert all(isa in findings["instruction set"].found for isa in _C.available_isas())
    assert findings["threads"].found.startswith(f"{torch.get_num_threads()} of torch")
    assert {name for name in backends.BACKENDS} <= set(findings)


def test_every_absent_thing_has_a_reason(findings: dict[str, Finding]) -> None:
    assert all(finding.found or finding.reason for finding in findings.values())
    assert {"vllm", "megatron-core", "ray", "flash-attn", "triton"} <= set(findings)


def test_self_check_measures_a_real_error() -> None:
    finding = self_check()
    assert finding.reason is None
    error = float(finding.found.removeprefix("largest error "))
    assert 0 < error <= doctor.SELF_CHECK_TOLERANCE, "fp32 against fp64 is close, and never exact"


def test_self_check_fails_on_a_wrong_op(monkeypatch: pytest.MonkeyPatch) -> None:
    right = doctor.attention_with_statistics

    def wrong(*args: object, **kwargs: object) -> object:
        out, statistics = right(*args, **kwargs)  # type: ignore[arg-type]
        return out * (1 + 1e-3), statistics

    monkeypatch.setattr(doctor, "attention_with_statistics", wrong)
    finding = self_check()
    assert finding.reason is not None
    assert "at most 1e-05" in finding.reason
    assert not is_healthy([finding])


def test_relative_error_by_hand() -> None:
    nan = torch.nan
    actual, expected = torch.tensor([1.5, nan, 110.0]), torch.tensor([1.0, nan, 100.0])
    assert relative_error(actual, expected.double()) == pytest.approx(0.5)
    assert relative_error(torch.tensor([0.01, nan]), torch.tensor([0.0, nan]).double()) == pytest.approx(0.01)
    assert relative_error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, nan]).double()) == float("inf")


def test_health_is_that_of_what_is_needed() -> None:
    good, optional = Finding("", "a", "1", needed=True), Finding("", "b", "", "not installed")
    assert is_healthy([good, optional])
    assert not is_healthy([good, optional, Finding("", "c", "", "does not import", needed=True)])


def test_without_the_extension_the_core_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        backends.BACKENDS["cpu"], "unavailable", lambda: "the extension rhythm._C does not import: gone"
    )
    broken = {finding.name: finding.reason for finding in diagnose() if finding.needed and finding.reason}
    assert set(broken) == {"instruction set", "cpu", "CPU op against reference"}
    assert all(reason is not None and "gone" in reason for reason in broken.values())
    assert main([]) == 1


def test_unknown_instruction_set_is_named() -> None:
    """In a process of its own: the kernels read the variable from the C environment."""
    program = "import sys; from rhythm.cli.doctor import main; sys.exit(main(['--json']))"
    environment = {"RHYTHM_CPU_ISA": "sse9", "PATH": ""}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert run.returncode == 1, run.stderr
    report = json.loads(run.stdout)
    assert report["healthy"] is False
    reasons = {finding["name"]: finding["reason"] for finding in report["findings"]}
    assert "sse9" in reasons["instruction set"]
    assert "sse9" in reasons["CPU op against reference"]


def test_json_holds_every_finding(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["healthy"] is True
    assert [finding["name"] for finding in report["findings"]] == [finding.name for finding in diagnose()]
    assert set(report["findings"][0]) == {"section", "name", "found", "reason", "needed"}


def test_a_dry_run_is_refused_with_the_reason(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "diagnose", lambda: pytest.fail("it looked all the same"))
    with pytest.raises(SystemExit, match="2"):
        main(["--dry-run"])
    assert "rhythm-doctor: error: --dry-run: this command changes nothing" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    shown = capsys.readouterr().out
    assert shown.startswith("usage: rhythm-doctor [--json]\n")
    assert "rejected: this command changes nothing anyway" in " ".join(shown.split())


def test_table_shows_marks_and_reasons(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(
        doctor,
        "diagnose",
        lambda: [
            Finding("Engines", "good", "1.2.3", needed=True),
            Finding("Engines", "absent", "", "not installed: pip install it[all]"),
            Finding("Backends", "broken", "", "does not import", needed=True),
        ],
    )
    assert main([]) == 1
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines == [
        "Engines",
        "✓ good 1.2.3",
        "– absent not installed: pip install it[all]",
        "Backends",
        "✗ broken does not import",
        "The core does not work.",
    ]


def test_cuda_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "build without CUDA" in (doctor._cuda()[0].reason or "")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "finds no device" in (doctor._cuda()[0].reason or "")


def test_cuda_devices_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    device = SimpleNamespace(name="H100", major=9, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    assert [finding.found for finding in doctor._cuda()] == ["12.8", "H100, sm_90, 80 GiB"]


def test_packages_are_found_without_being_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._has_module("pytest")
    assert not doctor._has_module("no_such_parent.child")
    assert doctor._package("s", "no-such-package", "pip install it").reason == "not installed: pip install it"
    assert doctor._package("s", "pytest", "").found == pytest.__version__
    # As vLLM's build for CPUs: a module that another distribution brings.
    assert doctor._package("s", "yaml", "").found == f"{version('PyYAML')} (PyYAML)"
    unpacked = "version unknown: on the path, but not installed as a package"
    (tmp_path / "unpacked_here.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert doctor._package("s", "unpacked_here", "").found == unpacked


def test_interpreter_trouble_is_the_last_line_of_the_probe(
    interpreter_trouble: Callable[[], str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="Traceback …\nImportError: no libtriton\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    assert interpreter_trouble() == "ImportError: no libtriton"
    silent = subprocess.CompletedProcess([], -11, stdout="", stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: silent)
    assert interpreter_trouble() == "a kernel in the interpreter ended with exit code -11"
