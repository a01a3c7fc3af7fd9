"""Failed writes name the file and the system's reason, and keep the old file."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from rhythm.system.writing import naming, remove, replace_file


def full(*arguments: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    replace_file(path, "é")
    assert path.read_bytes() == b"\xc3\xa9"
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        replace_file(path, b"new")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    assert path.read_bytes() == b"\xc3\xa9"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("target", ["directory", "file"])
def test_what_a_library_calls_a_full_disk(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.save's message does not say so: whether the disk takes a MiB does."""
    path = tmp_path if target == "directory" else tmp_path / "optimizer.pt"
    error = RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 118592 vs 118484")
    with pytest.raises(RuntimeError, match="unexpected pos") as own, naming(path):
        raise error
    assert own.value is error  # the disk has room: nothing is claimed
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught, naming(path):
        raise error
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    assert caught.value.__cause__ is error
    assert not list(tmp_path.iterdir())


def test_what_safetensors_says(tmp_path: Path) -> None:
    """Its message holds the error number."""
    with pytest.raises(OSError, match="No space left") as caught, naming(tmp_path):
        raise Exception("Error while serializing: I/O error: No space left on device (os error 28)")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path))


def test_an_error_that_names_a_file_keeps_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, naming(tmp_path):
        (tmp_path / "none").read_bytes()
    assert caught.value.filename == str(tmp_path / "none")


def test_remove(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").touch()
    (tmp_path / "link").symlink_to(kept)
    (tmp_path / "file").touch()
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory" / "file").touch()
    for name in ("link", "file", "directory", "none"):
        remove(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (kept / "file").is_file()
