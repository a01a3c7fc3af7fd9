"""Analysis directories that are damaged, in use or full, and problems read from a pipe."""

from __future__ import annotations

import errno
import logging
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from rhythm.analysis import Analysis, AnalysisConfig, analyze
from rhythm.analysis.results import response_path
from rhythm.system.directory_lock import DirectoryLockedError, lock_directory
from rhythm.tiny.model import TinyModelConfig, build_model, build_tokenizer

CONFIG = AnalysisConfig.model_validate(
    {
        "sampling": {"max_new_tokens": 8},
        "signals": {"horizon": [2, 6]},
        "counterfactuals": None,
        "table2": {"permutations": 3, "resamples": 3},
        "maps": 0,
    }
)
ROWS = '{"prompt": "1,2,3>6:"}\n{"prompt": "7,8,9>24:", "response": "7+8=15,15+9=24"}\n'


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    shape = TinyModelConfig(layers=3, hidden_size=32, mlp_size=32, query_heads=4, key_heads=2, head_size=8)
    return build_model(shape, tokenizer)


@pytest.fixture
def done(model: Any, tokenizer: Any, tmp_path: Path) -> Analysis:
    (tmp_path / "problems.jsonl").write_text(ROWS, encoding="utf-8")
    return again(model, tokenizer, tmp_path)


def again(model: Any, tokenizer: Any, directory: Path) -> Analysis:
    source = directory / "problems.jsonl"
    return analyze(model, tokenizer, source, out=directory / "out", config=CONFIG, page=False)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe", b"{}", b"[" * 100_000])
def test_a_damaged_response_is_analyzed_again(
    damage: bytes, done: Analysis, model: Any, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = contents(done.directory)
    path = response_path(done.directory, done.names[0])
    path.write_bytes(damage)
    with caplog.at_level(logging.WARNING):
        again(model, tokenizer, tmp_path)
    assert f"{path} is damaged: this response is analyzed again" in caplog.text
    assert contents(done.directory) == before


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe", b"7", b"[" * 100_000])
def test_damaged_settings_are_named(damage: bytes, done: Analysis, model: Any, tokenizer: Any, tmp_path: Path) -> None:
    (done.directory / "settings.json").write_bytes(damage)
    before = contents(done.directory)
    with pytest.raises(ValueError, match=r"settings\.json is damaged, .*restore it, or use another directory"):
        again(model, tokenizer, tmp_path)
    assert contents(done.directory) == before


def test_a_directory_claimed_by_a_killed_process_can_be_used(
    done: Analysis, model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    """Killed between making responses/ and writing settings.json, whole or aside."""
    before = contents(done.directory)
    for left in ([], ["settings.json"], [".settings.json.part", ".lock"]):
        for path in sorted(done.directory.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        (done.directory / "responses").mkdir()
        for name in left:
            (done.directory / name).touch()
        again(model, tokenizer, tmp_path)
        assert contents(done.directory) == before


def test_another_process_works_there(done: Analysis, model: Any, tokenizer: Any, tmp_path: Path) -> None:
    with lock_directory(done.directory):
        before = contents(done.directory)
        with pytest.raises(DirectoryLockedError, match=f"out is in use by process {os.getpid()} on "):
            again(model, tokenizer, tmp_path)
        assert contents(done.directory) == before
    again(model, tokenizer, tmp_path)
    assert not (done.directory / ".lock").exists()


def test_a_full_disk_is_named_and_what_is_finished_stays(
    done: Analysis, model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    whole = contents(done.directory)
    path = response_path(done.directory, done.names[1])
    path.unlink()
    before = contents(done.directory)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        again(model, tokenizer, tmp_path)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    assert contents(done.directory) == before
    monkeypatch.undo()
    again(model, tokenizer, tmp_path)
    assert contents(done.directory) == whole


def test_problems_come_through_a_pipe(done: Analysis, model: Any, tokenizer: Any, tmp_path: Path) -> None:
    """They are read twice: once to look at every row, once to work."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=(ROWS,))
    writer.start()
    results = analyze(model, tokenizer, pipe, out=tmp_path / "piped", config=CONFIG, page=False)
    writer.join()
    assert results.problems == str(pipe)
    assert results.names == done.names
    for name in results.names:
        assert response_path(results.directory, name).read_bytes() == response_path(done.directory, name).read_bytes()
