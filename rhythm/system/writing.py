"""Writes files atomically, and gives errors in writing the file's name and the reason."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PROBE_BYTES = 1 << 20
_RUST = re.compile(r"\(os error (\d+)\)")  # safetensors and tokenizers


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Context for writing to `path`, a file or a directory: its OSErrors name the path.

    Libraries report a full disk in various ways (torch.save: "unexpected pos 118592 vs 118484"). If a library raises
    and `path` can't be written to, an OSError with the system's reason is raised from the library's error.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    except Exception as error:
        said = _RUST.search(str(error))
        number = int(said[1]) if said else _trouble(path)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def replace_file(path: Path, data: str | bytes) -> None:
    """Write a file atomically (text as UTF-8): after a crash it is the complete old file or the complete new one.

    Raises OSError naming the path; the old file is kept then.
    """
    aside = path.with_name(f".{path.name}.part")
    with naming(path), replacing(aside, path), aside.open("wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def replacing(aside: Path, path: Path) -> Iterator[None]:
    """Context in which the block writes `aside`, which is then renamed to `path`, or removed if the block fails."""
    try:
        yield
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def remove(path: Path) -> None:
    """Remove a file, a link or a directory with its content."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _trouble(path: Path) -> int | None:
    """The error number from writing one MiB into the directory, or into the file's directory; None if that works."""
    directory = path if path.is_dir() else path.parent
    if not directory.is_dir():
        return None
    probe = directory / f".probe-{os.getpid()}"
    try:
        with probe.open("wb") as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno
    finally:
        with suppress(OSError):  # on a read-only file system it does not exist
            probe.unlink()
    return None
