"""How commands end: exit codes, one-line messages for users' errors, and streams that fail or lack characters."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from rhythm.cli import analyze, doctor, report, train
from rhythm.cli.failures import EXIT_CODES, ExitCode, command
from rhythm.cluster.errors import LostError, TrainLostError
from rhythm.system.directory_lock import DirectoryLockedError
from rhythm.tiny.warm_start import WarmStartConfig, cache_key

COMMAND = [sys.executable, "-c", "import sys; from rhythm.cli.report import main; sys.exit(main(sys.argv[1:]))"]


class OwnError(ValueError):
    """In the table of the command below."""


def ended(error: BaseException) -> int:
    @command("rhythm-test", {OwnError: ExitCode.NO_PARITY})
    def main(argv: Sequence[str] | None = None) -> int:
        raise error

    return main([])


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/runs/a"), 6, "/runs/a: disk full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/runs/a"), 6, "/runs/a: disk full: the quota is used up"),
        (PermissionError(errno.EROFS, "Read-only file system", "/runs/a"), 6, "/runs/a: Read-only file system"),
        (OSError(errno.EXDEV, "Invalid link", "a", None, "b"), 6, "a → b: Invalid link"),
        (OSError("no file named model.safetensors"), 2, "no file named model.safetensors"),
        (DirectoryLockedError("runs/a is in use"), 2, "runs/a is in use"),
        (LostError("step", {"train 0": "died"}), 4, "step: train 0 died"),
        (TrainLostError("step", {"train 0": "died"}), 4, "step: train 0 died"),
        (OwnError("no"), 5, "no"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_a_user_can_mend_is_a_line_and_a_code(
    error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    error.add_note("what is finished stays")
    assert ended(error) == code
    assert capsys.readouterr().err == f"rhythm-test: {message}\nwhat is finished stays\n"


@pytest.mark.parametrize("error", [KeyError("x"), ValueError("x"), BrokenPipeError(errno.EPIPE, "Broken pipe")])
def test_a_fault_of_our_own_keeps_its_traceback(error: Exception) -> None:
    """BrokenPipeError: of a pipe to some process; stdout's is told apart."""
    with pytest.raises(type(error)) as caught:
        ended(error)
    assert caught.value is error


@pytest.mark.parametrize("main", [train.main, analyze.main, report.main, doctor.main])
def test_help_lists_the_exit_codes(main: object, capsys: pytest.CaptureFixture[str]) -> None:
    with suppress(SystemExit):
        main(["--help"])  # type: ignore[operator]
    shown = capsys.readouterr().out
    assert EXIT_CODES in shown
    assert "6   a file can't be read or written: disk full, no permission" in shown


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n', encoding="utf-8")
    return tmp_path


def test_nobody_reads_the_output(run_dir: Path) -> None:
    """As with `| head -1` when head has left: nothing on stderr, neither from us nor from the interpreter's end."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*COMMAND, run_dir], stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")
    assert (run_dir / "report.html").is_file()


def test_the_output_goes_to_a_full_disk(run_dir: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*COMMAND, run_dir], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (6, "rhythm-report: stdout: disk full\n")


def test_an_output_of_few_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    """--help has γ and Δ."""
    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding="latin-1"))
    assert train.main(["--help"]) == 0
    assert b"? of a selected token; all others keep 1" in output.getvalue()


def test_a_c_locale() -> None:
    """Help can be shown, and a warm start's key, of sources that are not ASCII, be found."""
    script = (
        "import sys; from rhythm.cli.train import main; from rhythm.tiny.warm_start import WarmStartConfig, cache_key;"
        "print(cache_key([('a', 'b')], WarmStartConfig())); sys.exit(main(['--help']))"
    )
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode("ascii").startswith(cache_key([("a", "b")], WarmStartConfig()))
    assert b"? of a selected token; all others keep 1" in done.stdout


def test_every_file_is_opened_with_its_encoding() -> None:
    """A C locale's would be ASCII. Ruff's rule for it is a preview."""
    package = Path(train.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--preview", "--isolated", "--select", "PLW1514", package],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_run_directory_in_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rhythm.system.directory_lock import lock_directory

    config = tmp_path / "run.yaml"
    config.write_text(f"name: it\nruns_dir: {tmp_path}\n", encoding="utf-8")
    with lock_directory(tmp_path / "it"):
        for resume in ([], ["--resume"]):
            assert train.main([str(config), *resume]) == 2
            assert f"{tmp_path / 'it'} is in use by process {os.getpid()} on " in capsys.readouterr().err
        assert [path.name for path in (tmp_path / "it").iterdir()] == [".lock"]


@pytest.mark.parametrize("runs_dir", ["file/runs", "/proc/runs"])
def test_a_runs_dir_that_cannot_be_made(runs_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    config = tmp_path / "run.yaml"
    config.write_text(f"name: it\nruns_dir: {tmp_path / runs_dir}\n", encoding="utf-8")
    assert train.main([str(config)]) == 6
    shown = capsys.readouterr().err
    assert shown.startswith(f"rhythm-train: {tmp_path / runs_dir}")
    assert shown.count("\n") == 1
