"""Files that are whole or not there, and errors of writing that name the file and the reason."""

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
    """OSErrors of a block that writes to `path`, a file or a directory, name it.

    Libraries call a full disk what they like (torch.save: "unexpected pos 118592 vs 118484"). When one fails and
    `path` can't be written to, OSError with the system's reason is raised from the library's error.
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
    """Write a file, text as UTF-8, in one go: before and after a crash it is whole, the old one or the new.

    Raises OSError naming the path; the old file stays then.
    """
    aside = path.with_name(f".{path.name}.part")
    with naming(path), replacing(aside, path), aside.open("wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def replacing(aside: Path, path: Path) -> Iterator[None]:
    """Give `aside`, which the block writes, the name `path`; if the block fails, remove it."""
    try:
        yield
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def remove(path: Path) -> None:
    """Remove a file, a link or a directory with all in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _trouble(path: Path) -> int | None:
    """The error number of writing one MiB in a directory, or beside a file; None if that works."""
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
        with suppress(OSError):  # on a read-only file system there is none
            probe.unlink()
    return None
