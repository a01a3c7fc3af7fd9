"""Finds free TCP ports."""

from __future__ import annotations

import socket


def free_port(address: str) -> int:
    """A port that is free at this machine's address, until something else takes it."""
    with socket.socket() as listener:
        listener.bind((address, 0))
        return int(listener.getsockname()[1])
