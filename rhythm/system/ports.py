"""Reserves TCP ports."""

from __future__ import annotations

import socket


class ReservedPort:
    """A port at an address of this machine that no other process is given, until it is closed.

    A socket is bound to it and doesn't listen. So a server that sets SO_REUSEADDR may still take it, as asyncio's,
    torch's and vLLM's do, and no other: of several processes that look for a port at the same time none gets this one.
    """

    def __init__(self, address: str) -> None:
        """Raises OSError where the address is not this machine's."""
        self._socket = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind((address, 0))
        self.number: int = self._socket.getsockname()[1]

    def close(self) -> None:
        """Give the port back, once its server listens or nobody needs it. May be called twice."""
        self._socket.close()
