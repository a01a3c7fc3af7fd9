"""The installed package, from the wheel or from an editable install."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent
COMMANDS = ["rhythm-analyze", "rhythm-doctor", "rhythm-eval", "rhythm-report", "rhythm-sweep", "rhythm-train"]


def is_editable() -> bool:
    """Whether rhythm is installed as a link to a checkout rather than from a wheel."""
    origin = metadata.distribution("rhythm").read_text("direct_url.json")
    return origin is not None and json.loads(origin).get("dir_info", {}).get("editable", False)


def run(code: str, cwd: Path, **environment: str) -> str:
    """What a new interpreter prints, started in `cwd`."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kernels_are_inside_the_package_only(tmp_path: Path) -> None:
    """`kernels` at the top level is another project's name, which transformers looks for."""
    output = run(
        "import importlib.util as u; print(u.find_spec('kernels') is None, u.find_spec('rhythm.kernels') is not None)",
        tmp_path,
    )
    assert output.split() == ["True", "True"]


def test_public_names(tmp_path: Path) -> None:
    names = {
        "AttentionStatistics",
        "AttentionTap",
        "HeadGroups",
        "RhythmCredit",
        "RhythmSignals",
        "UnsupportedAttention",
        "attention_statistics",
        "attention_with_statistics",
        "credit_weights",
        "observe",
        "sampled_layers",
        "select_heads",
    }
    shown = run("import json, rhythm; print(json.dumps([n for n in rhythm.__all__ if hasattr(rhythm, n)]))", tmp_path)
    assert names <= set(json.loads(shown))


def test_types_templates_and_kernels_are_packaged(tmp_path: Path) -> None:
    page = [f"analysis/templates/analysis.{kind}" for kind in ("html.j2", "css", "js")]
    files = ["py.typed", "_C.pyi", "reports/templates/report.html.j2", *page]
    code = f"""
from importlib.resources import files
import rhythm.kernels
package = files("rhythm")
print(*[len(package.joinpath(name).read_text()) for name in {files[1:]}], package.joinpath("py.typed").is_file())
"""
    *sizes, typed = run(code, tmp_path).split()
    assert all(int(size) > 100 for size in sizes)
    assert typed == "True"


@pytest.mark.skipif(is_editable(), reason="says what is in the wheel, and this is an editable install")
def test_the_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    files = [str(path) for path in metadata.files("rhythm") or [] if "__pycache__" not in str(path)]
    commands = [name for name in files if name.startswith("..")]
    assert sorted(Path(name).name for name in commands) == COMMANDS
    assert {name.split("/")[0].split("-")[0] for name in files if name not in commands} == {"rhythm"}
    assert any(name.startswith("rhythm/kernels/") for name in files)
    assert Path(run("import rhythm; print(rhythm.__file__)", tmp_path).strip()) == Path(
        str(metadata.distribution("rhythm").locate_file("rhythm/__init__.py"))
    )


def test_ops_are_registered(tmp_path: Path) -> None:
    ops = ["attention_statistics", "attention_with_statistics", "column_scores"]
    code = f"import torch, rhythm; print(*[getattr(torch.ops.rhythm, op) for op in {ops!r}])"
    assert run(code, tmp_path).split() == [f"rhythm.{op}" for op in ops]


def test_kernels_compile_ahead_starts(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rhythm.kernels.inspect.compile_ahead", "--help"]
    shown = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert "--arch" in shown
    assert "--json" in shown


def test_commands_start(tmp_path: Path) -> None:
    """One by itself; the scripts of all in one process, since loading torch and transformers takes seconds."""
    programs = [str(Path(sys.executable).with_name(command)) for command in COMMANDS]
    shown = subprocess.run([programs[1], "--help"], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert COMMANDS[1] in shown
    code = f"""
import contextlib, io, runpy, sys
for program in {programs!r}:
    sys.argv = [program, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        try:
            runpy.run_path(program, run_name="__main__")
        except SystemExit as end:
            code = end.code
    print(code, program.rpartition("/")[2] in shown.getvalue())
"""
    assert run(code, tmp_path).splitlines() == ["0 True"] * len(COMMANDS)


def test_ops_give_what_the_reference_gives(tmp_path: Path) -> None:
    """A caller of the public op, of the registered one, and of the one with the output."""
    code = """
import torch, rhythm
q, k, v = (torch.randn(90, heads, 32, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 2))
cu_seqlens, prompt_lens = torch.tensor([0, 30, 90], dtype=torch.int32), torch.tensor([4, 0])
exact = rhythm.attention_statistics(
    q.double(), k.double(), cu_seqlens=cu_seqlens, prompt_lens=prompt_lens, backend="reference"
)
fused = rhythm.attention_statistics(q, k, cu_seqlens=cu_seqlens, prompt_lens=prompt_lens)
_, with_output = rhythm.attention_with_statistics(q, k, v, cu_seqlens=cu_seqlens, prompt_lens=prompt_lens)
span, waad, fai, lse = torch.ops.rhythm.attention_statistics(
    q, k, cu_seqlens, prompt_lens, 32**-0.5, 10, 10, 50, None, True, "auto"
)
registered = rhythm.AttentionStatistics(span, waad, fai, lse)
for statistics in (fused, with_output, registered):
    for name in ("span", "waad", "fai", "lse"):
        torch.testing.assert_close(
            getattr(statistics, name), getattr(exact, name).float(), rtol=1e-4, atol=1e-5, equal_nan=True
        )
        print(int(getattr(statistics, name).isfinite().sum()))
"""
    # span of 2 sequences; 26 and 60 response rows; FAI of keys with a response row 10 tokens later: 20 and 50.
    assert run(code, tmp_path).split() == [str(4 * n) for n in (2, 86, 70, 86)] * 3


def test_triton_kernels_run_in_the_interpreter(tmp_path: Path) -> None:
    code = """
import sys, torch, rhythm
q, k, v = (torch.randn(70, heads, 16, generator=torch.Generator().manual_seed(heads)) for heads in (2, 1, 1))
expected_out, expected = rhythm.attention_with_statistics(q, k, v, prompt_lens=[5], backend="reference")
assert "rhythm.kernels" not in sys.modules
out, actual = rhythm.attention_with_statistics(q, k, v, prompt_lens=[5], backend="triton")
bands = rhythm.attention_statistics(q, k, prompt_lens=[5], lse=actual.lse, span=False, backend="triton")
close = dict(rtol=1e-4, atol=1e-5, equal_nan=True)
torch.testing.assert_close(out, expected_out, **close)
for name in ("span", "waad", "fai", "lse"):
    torch.testing.assert_close(getattr(actual, name), getattr(expected, name), **close)
for name in ("waad", "fai", "lse"):
    torch.testing.assert_close(getattr(bands, name), getattr(expected, name), **close)
print(sys.modules["rhythm.kernels"].__name__, "kernels" in sys.modules)
"""
    shown = run(code, tmp_path, TRITON_INTERPRET="1", TRITON_CACHE_DIR=str(tmp_path / "cache"))
    assert shown.split() == ["rhythm.kernels", "False"]


def benchmark(cwd: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """The run of a copy of bench_installed.py in `cwd`, and its JSON."""
    script = shutil.copy(FOLDER / "bench_installed.py", cwd)
    shape = ["--tokens", "200", "--heads", "4", "--key-heads", "1", "--size", "64", "--device", "cpu"]
    command = [sys.executable, script, *shape, "--seconds", "0.02", "--json", "times.json", *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.stderr == ""
    return done, json.loads((cwd / "times.json").read_text())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_benchmark_of_another_project(dtype: str, tmp_path: Path) -> None:
    done, report = benchmark(tmp_path, "--dtype", dtype)
    assert done.returncode == 0
    assert report["correctness"]["passed"] is True
    assert len(report["correctness"]["errors"]) == 12
    assert all(0 < error < (0.02 if name == "out" else 1e-4) for name, error in report["correctness"]["errors"].items())
    assert (report["dtype"], report["shape"]["tokens"]) == (dtype, 200)
    times = report["milliseconds"]
    assert set(times) == {
        "statistics", "statistics with the output", "bands given lse", "eager reference", "SDPA forward",
    }  # fmt: skip
    assert all(0 < time < 10_000 for time in times.values())
    assert all(f"| {name} | {time:.3f} |" in done.stdout for name, time in times.items())


@pytest.mark.timing
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_statistics_beat_the_eager_reference(dtype: str, tmp_path: Path) -> None:
    times = benchmark(tmp_path, "--dtype", dtype)[1]["milliseconds"]
    assert times["statistics"] < times["eager reference"]


def test_benchmark_reports_no_time_when_a_result_is_wrong(tmp_path: Path) -> None:
    done, report = benchmark(tmp_path, "--strictness", "0")
    assert done.returncode == 1
    assert report["correctness"]["passed"] is False
    assert "milliseconds" not in report
    assert done.stdout.startswith("wrong, so nothing is timed: out by ")
