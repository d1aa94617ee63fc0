"""`fleet-cloud serve`, `fleet-cloud broker` and uvicorn as real processes: how they start, refuse and end."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import paho.mqtt.client as paho
import pytest
import websockets
from paho.mqtt.enums import CallbackAPIVersion

from edge_agent.contract import messages, topics
from edge_agent.contract.signals import default_catalogue
from tests.brokers import free_port, wait_for
from tests.bundles import build_bundle, without_a_graph

pytestmark = pytest.mark.e2e
TYPE = "charging_fault"


@contextlib.contextmanager
def process(*command: str, cwd: Path, **environment: str) -> Iterator[subprocess.Popen[str]]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("VOLTWATCH_", "DATABASE_"))}
    with subprocess.Popen(
        [sys.executable, "-m", *command], cwd=cwd, env=inherited | environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as running:  # fmt: skip
        try:
            yield running
        finally:
            running.kill()


def command_line(*words: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "cloud", *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=60)


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2).status_code in (200, 503)
    except httpx.HTTPError:
        return False


def health(port: int) -> dict[str, Any]:
    told: dict[str, Any] = httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).json()
    return told


def leave(running: "subprocess.Popen[str]", number: int = signal.SIGTERM) -> tuple[int, float, str]:
    began = time.monotonic()
    running.send_signal(number)
    output, _ = running.communicate(timeout=20)
    return running.returncode, time.monotonic() - began, output


def test_uvicorn_serves_the_app_with_the_environment_alone(tmp_path: Path) -> None:
    port = free_port()
    with process("uvicorn", "cloud.api:app", "--port", str(port), cwd=tmp_path) as server:
        wait_for(lambda: answers(f"http://127.0.0.1:{port}/"), what="serves")
        assert health(port)["broker"]["configured"] is False
        assert (tmp_path / "var" / "voltwatch.db").is_file()
        status, _, output = leave(server)
    assert status in (0, -signal.SIGTERM), output
    assert "Traceback" not in output


def test_sigterm_ends_it_in_five_seconds_with_sockets_open_and_the_state_saved(tmp_path: Path) -> None:
    port = free_port()
    bundle = build_bundle(tmp_path / "bundle", default_catalogue())
    arguments = ("cloud", "serve", "--port", str(port), "--broker", f"127.0.0.1:{free_port()}", "--bundle", str(bundle))

    async def stream(begin: int, count: int) -> dict[str, Any]:
        reply: dict[str, Any] = {}
        async with contextlib.AsyncExitStack() as stack:
            sockets = [
                await stack.enter_async_context(websockets.connect(f"ws://127.0.0.1:{port}/ws/telemetry"))
                for _ in range(5)
            ]
            for second in range(begin, begin + count):
                await sockets[0].send(
                    json.dumps({"vehicle_id": "EV_1", "time": second, "signals": {"Vehicle.Speed": 5}})
                )
                reply = json.loads(await sockets[0].recv())
            server.send_signal(signal.SIGTERM)
            await asyncio.gather(*(ws.wait_closed() for ws in sockets))
        return reply

    for begin, count, filled in ((1000, 100, 100), (1100, 10, 110)):
        with process(*arguments, cwd=tmp_path) as server:
            wait_for(lambda: answers(f"http://127.0.0.1:{port}/"), what="serves")
            assert "refused" in health(port)["broker"]["detail"]
            reply = asyncio.run(stream(begin, count))
            began = time.monotonic()
            output, _ = server.communicate(timeout=20)
            assert time.monotonic() - began < 5, output
            assert server.returncode == 0, output
            assert "Traceback" not in output
        assert reply["window"]["filled_s"] == filled  # the second process continued the first one's window


def test_a_port_in_use_is_one_line_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for command in ("serve", "broker"):
            done = command_line(command, "--port", str(port), cwd=tmp_path)
            assert done.returncode == 69
            assert done.stdout == ""
            (line,) = done.stderr.splitlines()
            assert line.startswith(
                f"fleet-cloud: error: port {port} on 127.0.0.1 cannot be used: address already in use"
            )
    assert not (tmp_path / "var").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("--bundle", "nowhere"), 65, "nowhere: no such bundle directory"),
        (("--database", "mysql://h/n"), 78, "DATABASE_URL: 'mysql' is not supported"),
        (("--schema", "none.json"), 78, "schema none.json: cannot be read"),
        (("--broker", "host:port:x"), 78, "write HOST:PORT"),
    ],
)
def test_what_can_never_work_is_one_line_and_its_exit_code(
    tmp_path: Path, arguments: tuple[str, ...], status: int, words: str
) -> None:
    done = command_line("serve", "--port", "0", *arguments, cwd=tmp_path)
    assert done.returncode == status
    (line,) = done.stderr.splitlines()
    assert line.startswith("fleet-cloud: error: ")
    assert words in line


def test_serve_refuses_a_bundle_whose_graph_does_not_load(tmp_path: Path) -> None:
    unloadable = without_a_graph(build_bundle(tmp_path / "bundle", default_catalogue()))
    done = command_line("serve", "--port", "0", "--bundle", str(unloadable), cwd=tmp_path)
    assert done.returncode == 65
    (line,) = done.stderr.splitlines()
    assert "model.onnx: does not load" in line


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("DATABASE_URL", "mysql://h/n", "DATABASE_URL: 'mysql' is not supported"),
        ("VOLTWATCH_SCHEMA", "none.json", "schema none.json: cannot be read"),
        ("VOLTWATCH_BROKER", "host:port:x", "write HOST:PORT"),
    ],
)
def test_uvicorn_says_in_one_line_what_can_never_work_and_fails(
    tmp_path: Path, variable: str, value: str, words: str
) -> None:
    with process("uvicorn", "cloud.api:app", "--port", "0", cwd=tmp_path, **{variable: value}) as server:
        output, _ = server.communicate(timeout=60)
    assert server.returncode not in (0, -signal.SIGKILL)
    assert "Traceback" not in output
    (line,) = [line for line in output.splitlines() if "voltwatch: error: " in line]
    assert words in line


def test_an_alert_through_the_embedded_broker_is_stored_acknowledged_and_listed(tmp_path: Path) -> None:
    mqtt, port = free_port(), free_port()
    with (
        process("cloud", "broker", "--port", str(mqtt), cwd=tmp_path) as broker,
        process("cloud", "serve", "--port", str(port), "--broker", f"127.0.0.1:{mqtt}", cwd=tmp_path) as server,
    ):
        wait_for(lambda: answers(f"http://127.0.0.1:{port}/"), what="serves")
        wait_for(lambda: health(port)["broker"]["connected"], what="collects")
        assert health(port)["broker"]["protocol"] == "MQTT 5"
        listening = subprocess.run(["ss", "-ltnH"], capture_output=True, text=True, check=True).stdout
        assert f"127.0.0.1:{mqtt}" in listening
        assert f"0.0.0.0:{mqtt}" not in listening

        acked: list[messages.Ack] = []
        vehicle = paho.Client(CallbackAPIVersion.VERSION2, client_id="EV_7", protocol=paho.MQTTv5)
        vehicle.will_set(topics.status("EV_7"), messages.encode(messages.Status(state="offline")), qos=1, retain=True)
        vehicle.on_connect = lambda client, *_: client.subscribe(topics.ack("EV_7"), 1)
        vehicle.on_message = lambda _c, _u, message: acked.append(messages.decode_ack(bytes(message.payload)))
        vehicle.connect("127.0.0.1", mqtt, 30)
        vehicle.loop_start()
        status = messages.Status(state="online", make="sim", model_release=4)
        vehicle.publish(topics.status("EV_7"), messages.encode(status), qos=1, retain=True)
        alert = messages.Alert(
            alert_id="a1", transition="raised", failure_type=TYPE, severity="high", origin="model", since="x",
            model_release=4,
        )  # fmt: skip
        envelope = messages.event(
            alert, event_id="e", vehicle_id="EV_7", time="2026-03-01T00:00:00.000Z", stream_id="s", seq=1, boot_id="b",
            clock_trusted=True,
        )  # fmt: skip
        vehicle.publish(topics.alert("EV_7", TYPE), messages.encode(envelope), qos=1)
        wait_for(lambda: acked, what="acknowledged to the vehicle")
        assert acked[0].ranges == ((1, 1),)
        (listed,) = httpx.get(f"http://127.0.0.1:{port}/alerts").json()["alerts"]
        assert (listed["alert_id"], listed["severity"], listed["model_release"]) == ("a1", "high", 4)

        def shown() -> dict[str, Any]:
            (only,) = httpx.get(f"http://127.0.0.1:{port}/vehicles").json()["vehicles"]
            return dict(only)

        wait_for(lambda: shown()["state"] == "online", what="online")
        assert shown()["open_alerts"][0]["alert_id"] == "a1"
        vehicle.loop_stop()
        vehicle.socket().close()  # type: ignore[union-attr]
        wait_for(lambda: shown()["state"] == "offline", what="the last will")
        for running in (server, broker):
            code, seconds, output = leave(running, signal.SIGINT)
            assert (code, "Traceback" in output) == (0, False), output
            assert seconds < 5
    with pytest.raises(ConnectionRefusedError):  # the embedded broker's own child is gone too
        socket.create_connection(("127.0.0.1", mqtt), 1)
