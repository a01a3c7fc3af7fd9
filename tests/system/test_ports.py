"""Ports that several processes look for at the same time."""

from __future__ import annotations

import socket
from contextlib import closing
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from rhythm.system.ports import ReservedPort

ADDRESS = "127.0.0.1"


def test_no_two_get_the_same_port_and_nobody_else_does() -> None:
    with closing(ReservedPort(ADDRESS)) as one, closing(ReservedPort(ADDRESS)) as other:
        assert one.number != other.number
        with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
            stranger.bind((ADDRESS, one.number))
    with socket.socket() as stranger:
        stranger.bind((ADDRESS, one.number))


def test_a_server_takes_the_port_while_it_is_reserved() -> None:
    """One that sets SO_REUSEADDR."""
    with closing(ReservedPort(ADDRESS)) as port, socket.create_server((ADDRESS, port.number)) as server:
        port.close()
        with socket.create_connection((ADDRESS, port.number)) as client:
            accepted, peer = server.accept()
            accepted.close()
            assert peer == client.getsockname()


def test_torch_serves_a_store_there() -> None:
    with closing(ReservedPort(ADDRESS)) as port:
        store = TCPStore(ADDRESS, port.number, is_master=True, timeout=timedelta(seconds=20))
        store.set("key", "value")
        assert TCPStore(ADDRESS, port.number, is_master=False, timeout=timedelta(seconds=20)).get("key") == b"value"


def test_an_address_of_another_machine() -> None:
    with pytest.raises(OSError, match="assign"):
        ReservedPort("192.0.2.1")
