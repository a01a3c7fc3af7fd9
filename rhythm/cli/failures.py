"""Turns a command's exceptions into one line on stderr and an exit code; a bug in rhythm still gives a traceback."""

from __future__ import annotations

import errno
import functools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from typing import Protocol, TextIO

from rich.console import Console

from rhythm.cluster.errors import LostError, RemoteError
from rhythm.system.directory_lock import DirectoryLockedError


class Main(Protocol):
    """The main function of a command. Takes arguments (None: those of the process), returns an exit code."""

    def __call__(self, argv: Sequence[str] | None = None, /) -> int: ...


class ExitCode(IntEnum):
    """Exit codes of all commands; `meaning` is shown in --help."""

    meaning: str

    def __new__(cls, number: int, meaning: str) -> ExitCode:
        code = int.__new__(cls, number)
        code._value_ = number
        code.meaning = meaning
        return code

    DONE = 0, "done"
    FAULT = 1, "a bug in rhythm, with a traceback (rhythm-doctor: the core does not work)"
    BAD_INPUT = 2, "an argument, the configuration or an input file can't be used, or the directory is in use"
    NOT_FINITE = 3, "the loss or a gradient is not finite"
    LOST = 4, "processes of a cluster were lost or failed"
    NO_PARITY = 5, "the engines of a cluster don't hold the same weights"
    FILES = 6, "a file can't be read or written: disk full, no permission"
    INTERRUPTED = 130, "Ctrl-C"
    BROKEN_PIPE = 141, "the reader of stdout closed it (broken pipe)"
    TERMINATED = 143, "SIGTERM"


SIGNALLED = 128  # added to the number of the signal that stopped a command
EXIT_CODES = "exit codes:\n" + "\n".join(f"  {code.value:<4}{code.meaning}" for code in ExitCode)
"""For --help."""

_MEANINGS: Mapping[type[Exception], ExitCode | None] = {
    DirectoryLockedError: ExitCode.BAD_INPUT,
    LostError: ExitCode.LOST,
    RemoteError: ExitCode.LOST,
    OSError: ExitCode.FILES,
    # These OSErrors are about processes and connections, not files: if they get here, it is a bug in rhythm.
    **dict.fromkeys((ConnectionError, ChildProcessError, ProcessLookupError, TimeoutError)),
}
_REASONS = {errno.ENOSPC: "disk full", errno.EDQUOT: "disk full: the quota is used up"}


def command(name: str, meanings: Mapping[type[Exception], ExitCode] | None = None) -> Callable[[Main], Main]:
    """Decorator for the main function of a command. Exceptions in `meanings`, and those common to all commands, are
    printed as `name: message` with the exception's notes, and give an exit code. Any other exception propagates.

    Characters that stdout's encoding lacks are written as `?`. An error in writing to stdout gives an exit code too.
    """
    known: dict[type[Exception], ExitCode | None] = {**_MEANINGS, **(meanings or {})}

    def decorate(main: Main) -> Main:
        @functools.wraps(main)
        def wrapper(argv: Sequence[str] | None = None) -> int:
            _write_what_the_encoding_has(sys.stdout)
            try:
                try:
                    code = main(argv)
                except SystemExit:  # from argparse: --help, or a wrong argument
                    flush()
                    raise
                flush()
                return code
            except _StdoutError as error:
                _discard(sys.stdout)
                if isinstance(error.reason, BrokenPipeError):
                    return ExitCode.BROKEN_PIPE
                _say(f"{name}: stdout: {_reason(error.reason)}")
                return ExitCode.FILES
            except Exception as error:  # raised again unless it has an exit code
                code_of = _code(error, known)
                if code_of is None:
                    raise
                _say("\n".join([f"{name}: {message(error)}", *getattr(error, "__notes__", [])]))
                return code_of
            except KeyboardInterrupt as error:
                _say("\n".join([f"{name}: interrupted", *getattr(error, "__notes__", [])]))
                return ExitCode.INTERRUPTED

        return wrapper

    return decorate


def message(error: BaseException) -> str:
    """The message for the user: for an OSError, its paths and the reason."""
    if not isinstance(error, OSError) or error.errno is None:
        return str(error)
    paths = [str(path) for path in (error.filename, error.filename2) if path is not None]
    return f"{' → '.join(paths)}: {_reason(error)}" if paths else _reason(error)


def show(text: str) -> None:
    """Print a command's result on stdout and flush it."""
    try:
        print(text)
    except OSError as error:
        raise _StdoutError(error) from error
    flush()


def flush() -> None:
    """Flush stdout, so that its errors are raised here and not at exit."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        raise _StdoutError(error) from error


class ErrorConsole(Console):
    """A console on stderr; if stderr's reader is gone, the command continues."""

    def __init__(self) -> None:
        super().__init__(stderr=True)

    def on_broken_pipe(self) -> None:
        """Discard further output instead of ending the process, as rich would."""
        _discard(sys.stderr)


class _StdoutError(Exception):
    def __init__(self, reason: OSError) -> None:
        super().__init__(str(reason))
        self.reason = reason


def _code(error: Exception, known: Mapping[type[Exception], ExitCode | None]) -> ExitCode | None:
    """The exit code for the exception's most specific class; None for a bug in rhythm."""
    if isinstance(error, OSError) and error.errno is None:  # transformers raises it for an invalid checkpoint
        return ExitCode.BAD_INPUT
    return next((known[kind] for kind in type(error).__mro__ if kind in known), None)


def _reason(error: OSError) -> str:
    return _REASONS.get(error.errno or 0) or error.strerror or str(error)


def _say(text: str) -> None:
    """Print on stderr, ignoring errors."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        _discard(sys.stderr)


def _write_what_the_encoding_has(stream: TextIO | None) -> None:
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")


def _discard(stream: TextIO | None) -> None:
    """Redirect the stream to /dev/null, else the interpreter prints an error when it flushes at exit."""
    try:
        number = stream.fileno() if stream is not None else None
    except (OSError, ValueError):  # the stream has no file descriptor, as in tests
        return
    if number is not None:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, number)
        os.close(devnull)
