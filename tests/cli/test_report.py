"""rhythm-report: the path on stdout, or the reason on stderr."""

from __future__ import annotations

from pathlib import Path

import pytest

from rhythm.cli.report import main


def test_command_prints_where_the_report_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    assert "Mean reward" in (tmp_path / "report.html").read_text()


def test_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "no metrics.jsonl" in captured.err


def test_dry_run_says_what_would_be_drawn_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path), "--dry-run"]) == 2
    assert "no metrics.jsonl" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "accuracy": 0.1}\n{"step": 3, "reward": 0.5}\n')
    (tmp_path / "samples").mkdir()
    row = '{"step": 3, "prompt": "1>", "tokens": ["a"], "reward": 1.0}\n'
    (tmp_path / "samples" / "step_000003.jsonl").write_text(row * 2)
    assert main(["--dry-run", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "# steps: 0 to 3, 2 recorded",
        "# sampled responses: 2, of 1 steps",
        "# configuration: none",
        f"# report: {tmp_path / 'report.html'} (new)",
    ]
    assert not (tmp_path / "report.html").exists()
    (tmp_path / "report.html").touch()
    assert main([str(tmp_path), "--dry-run"]) == 0
    assert "it would be replaced" in capsys.readouterr().out
    assert (tmp_path / "report.html").read_bytes() == b""


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: rhythm-report RUN_DIR… [CONFIG] [key=value …] [--dry-run]\n\nOf one run: write")
    assert "  baseline  str | null = null\n" in shown
