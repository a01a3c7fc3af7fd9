"""What an op can be computed by: alternatives in a table, each of which says why it can't run here or take a call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Generic, TypeVar

from rhythm.ops.arguments import Request, unknown_name

Result_co = TypeVar("Result_co", covariant=True)


class Plugin(ABC, Generic[Result_co]):
    """One alternative. Backends and attention implementations of other libraries are plug-ins."""

    def unavailable(self) -> str | None:
        """Why it can't run on this machine; None: it can."""
        return None

    @abstractmethod
    def refuses(self, request: Request) -> str | None:
        """Why it can't take this request; None: it can. Reads shapes, types and devices only."""

    @abstractmethod
    def run(self, request: Request) -> Result_co:
        """What was asked for. `unavailable` and `refuses` have said None."""


AnyPlugin = TypeVar("AnyPlugin", bound=Plugin[object])


def named(
    kind: str, name: str, plugins: Mapping[str, AnyPlugin], request: Request, *, allowed: Iterable[str]
) -> AnyPlugin:
    """The plug-in called `name`. `kind` is the argument that names it, `allowed` all that it may be.

    Raises:
        ValueError: the name is unknown, or the plug-in can't take the request.
        RuntimeError: the plug-in is not available on this machine.
    """
    if name not in plugins:
        raise unknown_name(kind, name, allowed)
    plugin = plugins[name]
    if (reason := plugin.unavailable()) is not None:
        raise RuntimeError(f"{kind} {name!r} is not available: {reason}")
    if (reason := plugin.refuses(request)) is not None:
        raise ValueError(f"{kind} {name!r} can't run: {reason}")
    return plugin


def only_plain(request: Request) -> str | None:
    """Why what computes plain causal attention alone can't take the request; None: it can."""
    if not request.forms:
        return None
    return f"the call has {' and '.join(request.forms)}; it takes plain causal attention with a row for every key"
