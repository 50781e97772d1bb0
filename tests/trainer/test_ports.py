"""Who listens is found by asking, and a free port is free."""

from __future__ import annotations

import socket

from trainer.ports import PORTS, free_port, listens, why_taken


def test_a_port_is_free_until_somebody_listens() -> None:
    port = free_port("127.0.0.1")
    assert port in PORTS and why_taken("127.0.0.1", port) is None
    assert not listens(f"127.0.0.1:{port}")
    with socket.socket() as server:
        server.bind(("127.0.0.1", port))
        server.listen()
        assert listens(f"127.0.0.1:{port}")
        assert why_taken("127.0.0.1", port) == "Address already in use"
    assert "assign" in str(why_taken("192.0.2.1", port)), "an address of another machine"
