"""One process at a time in a directory: a lock that the system drops when the process dies, however it dies."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

log = logging.getLogger(__name__)

LOCK_NAME = ".lock"
_HELD_ELSEWHERE = (errno.EAGAIN, errno.EACCES)
_NO_LOCKS_HERE = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)

_held: set[int] = set()


def _leave_to_parent() -> None:
    """A forked child shares the lock's open file, and would keep the lock when its parent dies."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_leave_to_parent)  # children that exec lose it anyway: it is not inheritable


class DirectoryLockedError(ValueError):
    """Another process works in the directory; the message says on which host, its process id and since when."""


@contextmanager
def lock_directory(directory: Path) -> Iterator[None]:
    """Hold the lock of `directory`, which is made if missing, until the block is left or the process dies.

    The lock is flock's, on a file `.lock` that is gone after the block; one that a killed process left behind holds
    nothing. Where the file system knows no locks a warning says so, and the block runs without one.

    Raises:
        DirectoryLockedError: at once, if another process holds it; nothing has been written.
        OSError: the directory or the file can't be made.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / LOCK_NAME
    descriptor = _acquire(path)
    _held.add(descriptor)
    try:
        _sign(path, descriptor)
        yield
    finally:
        _held.discard(descriptor)
        with suppress(OSError):
            path.unlink()  # while it is locked: who has it open, and locks it next, sees that it has no name left
        os.close(descriptor)


def content(directory: Path) -> list[Path]:
    """What a directory holds beside its lock; nothing if there is no such directory."""
    return [path for path in directory.iterdir() if path.name != LOCK_NAME] if directory.is_dir() else []


def _acquire(path: Path) -> int:
    """A descriptor that holds the lock on the file that now has the name `path`."""
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
                "%s can't be locked (%s): take care that no second process works in it", path.parent, error.strerror
            )
            return descriptor
        if os.fstat(descriptor).st_nlink:
            return descriptor
        os.close(descriptor)  # its holder left, and removed it, between the two calls


def _sign(path: Path, descriptor: int) -> None:
    """Say in the file who holds it. Raises OSError naming the file."""
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": datetime.now(UTC).isoformat(" ", "seconds")}
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _holder(descriptor: int) -> str:
    """What the file says, for a message; who has just taken the lock may be about to write it."""
    for _ in range(20):
        try:
            holder = json.loads(os.pread(descriptor, 1000, 0))
            return f"process {holder['pid']} on {holder['host']}, since {holder['since']}; wait for it, or end it"
        except (ValueError, TypeError, KeyError):
            time.sleep(0.01)
    return "another process, which has not said which"
