"""A WebSocket client that never reads its replies: it is let go, and the others do not notice."""

import base64
import contextlib
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn

from cloud.api import create_app
from cloud.api.settings import Settings
from tests.brokers import wait_for

BAD = {"vehicle_id": "EV_1", "time": 1, "signals": {f"Vehicle.Nonsense.{n:0100d}": 1 for n in range(20)}}


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    settings = Settings(database_url=f"sqlite:///{tmp_path}/v.db", send_timeout_s=0.5, max_bad_messages=10**6)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(settings), log_level="warning", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    wait_for(lambda: server.started, what="serves")
    yield listener.getsockname()[1]
    server.should_exit = True
    thread.join(10)
    assert not thread.is_alive()


def open_socket(port: int) -> socket.socket:
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", port))
    key = base64.b64encode(os.urandom(16)).decode()
    client.sendall(
        f"GET /ws/telemetry HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
    )
    assert client.recv(4096).startswith(b"HTTP/1.1 101")
    return client


def text_frame(text: str) -> bytes:
    """One masked text frame (RFC 6455 5.2); a mask of zeros leaves the payload as it is."""
    return b"\x81" + struct.pack("!BH", 0x80 | 126, len(text)) + bytes(4) + text.encode()


def test_a_client_that_never_reads_is_let_go_and_others_do_not_notice(port: int) -> None:
    deaf = open_socket(port)
    deaf.settimeout(0.5)
    frame = text_frame(json.dumps(BAD))
    url = f"http://127.0.0.1:{port}"

    def sockets() -> int:
        return int(httpx.get(f"{url}/health").json()["telemetry"]["sockets"])

    slowest = 0.0
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        began = time.monotonic()
        if sockets() == 0:
            break
        slowest = max(slowest, time.monotonic() - began)
        with contextlib.suppress(TimeoutError, OSError):
            deaf.sendall(frame * 100)
    assert sockets() == 0
    assert slowest < 2
    deaf.close()
