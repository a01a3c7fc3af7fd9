"""Locks a directory for one process; the operating system releases the lock when the process dies."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

log = logging.getLogger(__name__)

LOCK_NAME = ".lock"
_HELD_ELSEWHERE = (errno.EAGAIN, errno.EACCES)
_NO_LOCKS_HERE = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)

_WAIT_SECONDS = 0.2

_held: set[int] = set()


def _leave_to_parent() -> None:
    """Close the lock files in a forked child: it shares them, and would keep the lock after its parent died."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_leave_to_parent)  # not needed for exec: the descriptor is not inheritable


class DirectoryLockedError(ValueError):
    """Another process uses the directory; the message gives its host, its process id and since when."""


@contextmanager
def lock_directory(
    directory: Path, name: str = LOCK_NAME, *, waiting: Callable[[str], object] | None = None
) -> Iterator[None]:
    """Hold the lock of `directory`, which is created if missing, until the block is left or the process dies.

    The lock is an flock on the file `name`, which is deleted after the block. A file left behind by a killed process
    is not locked. If the file system doesn't support locks, a warning is logged and the block runs without one.

    waiting: if given, wait for another process that holds the lock, after telling this once which one it is.

    Raises:
        DirectoryLockedError: if another process holds the lock and there is no `waiting`; nothing has been written.
        OSError: the directory or the file can't be created.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / name
    descriptor = _acquire(path) if waiting is None else _wait_for(path, waiting)
    _held.add(descriptor)
    try:
        _sign(path, descriptor)
        yield
    finally:
        _held.discard(descriptor)
        with suppress(OSError):
            path.unlink()  # while it is locked, so that the next process to lock it sees that it was deleted
        os.close(descriptor)


def content(directory: Path) -> list[Path]:
    """A directory's entries except its lock; empty if there is no such directory."""
    return [path for path in directory.iterdir() if path.name != LOCK_NAME] if directory.is_dir() else []


def _acquire(path: Path) -> int:
    """Lock the file `path` and return its descriptor."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            try:
                if error.errno in _HELD_ELSEWHERE:
                    raise DirectoryLockedError(f"{path.parent} is in use by {_holder(descriptor)}") from None
                if error.errno not in _NO_LOCKS_HERE:
                    raise
            except BaseException:
                os.close(descriptor)
                raise
            log.warning(
                "%s can't be locked (%s): make sure that no second process uses it", path.parent, error.strerror
            )
            return descriptor
        if os.fstat(descriptor).st_nlink:
            return descriptor
        os.close(descriptor)  # its holder deleted it between open and flock: try again


def _wait_for(path: Path, waiting: Callable[[str], object]) -> int:
    """`_acquire`, as soon as no other process holds the lock."""
    told = False
    while True:
        try:
            return _acquire(path)
        except DirectoryLockedError as error:
            if not told:
                waiting(str(error))
                told = True
            time.sleep(_WAIT_SECONDS)


def _sign(path: Path, descriptor: int) -> None:
    """Write host, process id and time into the file. Raises OSError naming the file."""
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": datetime.now(UTC).isoformat(" ", "seconds")}
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _holder(descriptor: int) -> str:
    """The holder as written in the file, for a message. Retries, since the holder may not have written it yet."""
    for _ in range(20):
        try:
            holder = json.loads(os.pread(descriptor, 1000, 0))
            return f"process {holder['pid']} on {holder['host']}, since {holder['since']}; wait for it, or end it"
        except (ValueError, TypeError, KeyError):
            time.sleep(0.01)
    return "another process (it has not written its id)"
