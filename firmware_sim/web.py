"""Outputs of a drive to the cloud's API: frames as JSON, by `POST /telemetry` or over `WS /ws/telemetry`.

JSON has no NaN: a missing value is null. A server that is away is an error at once at the start; in the middle of a
drive it is tried again for a while, so a restart of the server is survived.
"""

import json
import math
import time
from contextlib import ExitStack
from typing import Any, Protocol

import httpx
import numpy as np
from websockets.exceptions import InvalidHandshake, InvalidURI, WebSocketException
from websockets.sync.client import ClientConnection, connect

from edge_agent.contract.errors import ConfigError, MessageError, UnavailableError
from firmware_sim.ride import Block
from firmware_sim.sensors import CATALOGUE

RETRY_AFTER_S = (0.2, 0.5, 1.0, 2.0, 4.0)
TIMEOUT_S = 10.0
MOST_FRAMES_A_POST = 60


def frame_json(block: Block, row: int) -> dict[str, Any]:
    """Return one second as the API's frame; the cells stand in the first second of ten."""
    frame: dict[str, Any] = {
        "time": float(block.time_s[row]),
        "signals": dict(zip(CATALOGUE.scalar_names, _numbers(block.scalars[row]), strict=True)),
    }
    if row == 0:
        frame["cell_voltage"] = _numbers(block.cell_voltage)
        frame["cell_temperature"] = _numbers(block.cell_temperature)
    return frame


def _numbers(values: "np.ndarray[Any, np.dtype[np.float32]]") -> list[float | None]:
    # A float32's shortest decimal form is what the sensor reported: 367.2, not 367.20001220703125.
    return [float(str(v)) if math.isfinite(v) else None for v in values]


class Replies:
    """What the server said, counted; new alerts are kept for the screen."""

    def __init__(self) -> None:
        self.accepted = self.predictions = self.alerts = 0
        self.last_probability: float | None = None

    def take(self, reply: Any) -> None:
        """Count one reply; one that is no object, or lacks a field, counts as nothing."""
        if not isinstance(reply, dict):
            return
        self.accepted += int(reply.get("frames_accepted") or 0)
        self.predictions += int(reply.get("predictions") or 0)
        self.alerts += len(reply.get("alerts") or ())
        prediction = reply.get("prediction")
        if isinstance(prediction, dict):
            self.last_probability = prediction.get("failure_probability")

    def summary(self) -> dict[str, Any]:
        """Counters for the report line."""
        known: dict[str, Any] = {
            "frames_accepted": self.accepted,
            "predictions": self.predictions,
            "alerts": self.alerts,
        }
        if self.last_probability is not None:
            known["failure_probability"] = round(self.last_probability, 3)
        return known


class _Transport(Protocol):
    def exchange(self, bodies: list[dict[str, Any]], replies: Replies) -> None:
        """Deliver frames' bodies and take the replies that are there."""

    def close(self) -> None:
        """End the connection."""


class WebOutput:
    """Collects the seconds of one wake-up and sends them together."""

    def __init__(self, transport: _Transport, vehicle_id: str, make: str) -> None:
        self._transport = transport
        self._about = {"vehicle_id": vehicle_id, "make": make}
        self._waiting: list[dict[str, Any]] = []
        self.replies = Replies()

    def fileno(self) -> int | None:
        """Nothing to wake up for."""
        return None

    def poll(self) -> None:
        """Do nothing: replies are read when frames are sent."""

    def second(self, block: Block, row: int) -> None:
        """Take one reported second; a silent one (every signal missing) is not sent."""
        if not np.isnan(block.scalars[row]).all():
            self._waiting.append(frame_json(block, row))

    def flush(self) -> None:
        """Send what has been collected."""
        while self._waiting:
            now, self._waiting = self._waiting[:MOST_FRAMES_A_POST], self._waiting[MOST_FRAMES_A_POST:]
            body = {**self._about, **now[0]} if len(now) == 1 else {**self._about, "frames": now}
            self._transport.exchange([body], self.replies)

    def summary(self) -> dict[str, Any]:
        """Counters for the report line."""
        return self.replies.summary()

    def close(self) -> None:
        """End the connection."""
        self._transport.close()


class Post:
    """`POST /telemetry` with one connection kept open."""

    def __init__(self, url: str) -> None:
        self._url = _endpoint(url, ("http", "https"), "/telemetry")
        self._client = httpx.Client(timeout=TIMEOUT_S)
        self._reached = False

    def exchange(self, bodies: list[dict[str, Any]], replies: Replies) -> None:
        """Post each body; raises `UnavailableError` or, for what the server refuses, `MessageError`."""
        for body in bodies:
            replies.take(self._post(body))

    def _post(self, body: dict[str, Any]) -> Any:
        for wait_s in (*RETRY_AFTER_S, None):
            reason = ""
            try:
                answer = self._client.post(self._url, json=body)
            except httpx.InvalidURL as error:
                raise ConfigError(f"--http {self._url}: {error}") from error
            except httpx.HTTPError as error:
                reason = str(error) or type(error).__name__
            else:
                if answer.status_code < 400:
                    self._reached = True
                    return answer.json()
                if answer.status_code not in {408, 429, 502, 503, 504}:
                    raise MessageError(f"{self._url} refused the frames: {answer.status_code} {_detail(answer)}")
                reason = f"{answer.status_code} {_detail(answer)}"
            if wait_s is None or not self._reached:
                raise UnavailableError(f"cannot reach {self._url}: {reason}; is the cloud running there?")
            time.sleep(wait_s)
        raise AssertionError("the loop returns or raises")

    def close(self) -> None:
        """Close the connection."""
        self._client.close()


class Socket:
    """`WS /ws/telemetry`: the server answers every message in order; one answer is awaited for each."""

    def __init__(self, url: str) -> None:
        self._url = _endpoint(url, ("ws", "wss"), "/ws/telemetry")
        self._exit = ExitStack()
        self._socket: ClientConnection | None = self._connect()

    def _connect(self) -> ClientConnection:
        try:
            return self._exit.enter_context(connect(self._url, open_timeout=TIMEOUT_S))
        except (OSError, InvalidHandshake, InvalidURI, TimeoutError) as error:
            raise UnavailableError(f"cannot reach {self._url}: {error}; is the cloud running there?") from error

    def exchange(self, bodies: list[dict[str, Any]], replies: Replies) -> None:
        """Send each body and take its reply."""
        for body in bodies:
            text = json.dumps(body, allow_nan=False)
            for wait_s in (*RETRY_AFTER_S, None):
                try:
                    self._socket = self._socket or self._connect()
                    self._socket.send(text)
                    reply = json.loads(self._socket.recv(timeout=TIMEOUT_S))
                    break
                except (WebSocketException, UnavailableError, TimeoutError, OSError) as error:
                    self.close()
                    if wait_s is None:
                        raise UnavailableError(
                            f"lost {self._url}: {error}; is the cloud still running there?"
                        ) from error
                    time.sleep(wait_s)
            if isinstance(reply, dict) and "frames_accepted" not in reply:
                raise MessageError(f"{self._url} refused the frames: {str(reply)[:300]}")
            replies.take(reply)

    def close(self) -> None:
        """Close the socket."""
        self._exit.close()
        self._socket = None


def _endpoint(url: str, schemes: tuple[str, ...], path: str) -> str:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ConfigError(f"{url!r} is no URL: {error}") from error
    if parsed.scheme not in schemes or not parsed.host:
        raise ConfigError(f"{url!r} is no URL of this kind; write {schemes[0]}://HOST:PORT")
    return str(parsed if parsed.path.rstrip("/") else parsed.copy_with(path=path))


def _detail(answer: httpx.Response) -> str:
    try:
        return str(answer.json().get("detail", ""))[:300]
    except (ValueError, AttributeError):
        return answer.text[:120].replace("\n", " ")
