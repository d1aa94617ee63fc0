"""Frames to the API, held against the API's own model and real servers on loopback."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from typing import Any

import numpy as np
import pytest
from websockets.sync.server import ServerConnection, serve

from cloud.api.models import Telemetry
from edge_agent.contract.errors import ConfigError, MessageError, UnavailableError
from firmware_sim import web
from firmware_sim.ride import RideSpec, blocks
from firmware_sim.web import Post, Socket, WebOutput, frame_json

SPEC = RideSpec(vehicle_id="EV_007", seed=1, start_s=1_767_600_000.0)
REPLY = {"frames_accepted": 3, "predictions": 1, "alerts": [], "prediction": {"failure_probability": 0.25}}


class Server(ThreadingHTTPServer):
    """Keeps the bodies it gets; answers with `statuses` in turn, then 200."""

    def __init__(self) -> None:
        self.bodies: list[Any] = []
        self.statuses: list[int] = []
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, Server)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status = self.server.statuses.pop(0) if self.server.statuses else 200
        if status == 200:
            self.server.bodies.append((self.path, body))
        text = json.dumps(REPLY if status == 200 else {"detail": "because"}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield running
    running.shutdown()
    running.server_close()


def test_frames_are_what_the_api_takes_with_null_for_a_missing_value() -> None:
    block = next(blocks(SPEC))
    block.scalars[0, 3] = np.nan
    block.cell_voltage[5] = np.nan
    frames = [frame_json(block, row) for row in range(10)]
    text = json.dumps({"vehicle_id": "EV_007", "make": "aurora", "frames": frames}, allow_nan=False)
    parsed = Telemetry.model_validate_json(text)
    assert len(parsed.frames) == 10
    assert None in frames[0]["signals"].values()
    assert frames[0]["cell_voltage"][5] is None
    assert "cell_voltage" not in frames[1]
    assert all(len(str(v)) < 9 for v in frames[0]["signals"].values() if v is not None), "shortest decimals"


def test_a_single_second_is_posted_as_the_runbooks_single_frame_and_more_as_a_batch(server: Server) -> None:
    output = WebOutput(Post(server.url), "EV_007", "aurora")
    block = next(blocks(SPEC))
    output.second(block, 0)
    output.flush()
    for row in range(1, 4):
        output.second(block, row)
    output.flush()
    output.flush()
    (path, single), (_, batch) = server.bodies
    assert path == "/telemetry"
    assert single["signals"]
    assert "frames" not in single
    assert [f["time"] for f in batch["frames"]] == [SPEC.start_s + i for i in range(1, 4)]
    Telemetry.model_validate_json(json.dumps(single))
    assert output.summary() == {
        "frames_accepted": 6, "predictions": 2, "alerts": 0, "failure_probability": 0.25
    }  # fmt: skip
    output.close()


def test_a_long_backlog_is_posted_in_bounded_batches(server: Server) -> None:
    output = WebOutput(Post(server.url), "EV_007", "aurora")
    for block in islice(blocks(SPEC), 15):
        for row in range(10):
            output.second(block, row)
    output.flush()
    sizes = [len(body.get("frames", [body])) for _, body in server.bodies]
    assert sum(sizes) >= 140
    assert max(sizes) <= web.MOST_FRAMES_A_POST


def test_a_server_that_restarts_is_waited_for(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "RETRY_AFTER_S", (0.01, 0.01))
    output = WebOutput(Post(server.url), "EV_007", "aurora")
    block = next(blocks(SPEC))
    output.second(block, 0)
    output.flush()
    server.statuses = [503, 503]
    output.second(block, 1)
    output.flush()
    assert len(server.bodies) == 2


def test_a_refusal_is_one_clear_line_with_the_servers_reason(server: Server) -> None:
    server.statuses = [422]
    output = WebOutput(Post(server.url), "EV_007", "aurora")
    output.second(next(blocks(SPEC)), 0)
    with pytest.raises(MessageError, match="refused the frames: 422 because"):
        output.flush()


def test_a_server_that_is_away_is_one_clear_line() -> None:
    output = WebOutput(Post("http://127.0.0.1:9"), "EV_007", "aurora")
    output.second(next(blocks(SPEC)), 0)
    with pytest.raises(UnavailableError, match="is the cloud running there"):
        output.flush()
    with pytest.raises(UnavailableError, match="is the cloud running there"):
        Socket("ws://127.0.0.1:9")


@pytest.mark.parametrize("url", ["ftp://host", "no url at all", "http://", ""])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="URL"):
        Post(url)


def test_the_socket_sends_a_message_and_reads_its_reply() -> None:
    got: list[Any] = []

    def answer(connection: ServerConnection) -> None:
        for message in connection:
            got.append(json.loads(message))
            refused = len(got) > 1
            connection.send(json.dumps({"status": 422, "detail": "no such signal"} if refused else REPLY))

    with serve(answer, "127.0.0.1", 0) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        output = WebOutput(Socket(f"ws://127.0.0.1:{running.socket.getsockname()[1]}"), "EV_007", "aurora")
        block = next(blocks(SPEC))
        output.second(block, 0)
        output.flush()
        assert output.summary()["frames_accepted"] == 3
        Telemetry.model_validate_json(json.dumps(got[0]))
        output.second(block, 1)
        with pytest.raises(MessageError, match="no such signal"):
            output.flush()
        output.close()
        running.shutdown()
