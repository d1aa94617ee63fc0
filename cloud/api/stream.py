"""WS /ws/telemetry: the frames of `POST /telemetry`, one JSON message in, one JSON reply out, in order.

A message that cannot be used gets an error reply and the socket stays; after too many in a row it is closed (1008). A
client that does not read its replies is let go (1013). One message is worked on at a time, so a fast sender is slowed
down by TCP and nothing queues here.
"""

import asyncio
import contextlib
import logging
from urllib.parse import urlsplit

from fastapi import APIRouter, WebSocket, WebSocketDisconnect

from cloud.api.body import parse_telemetry
from cloud.api.models import SocketError
from cloud.api.problems import Problem, ProblemError, title
from cloud.api.service import Service
from cloud.store.fleet_store import StoreAwayError

log = logging.getLogger(__name__)
router = APIRouter()
CLOSE_S = 1.0
POLICY_VIOLATION, TRY_AGAIN_LATER = 1008, 1013  # RFC 6455 and IANA's registry


@router.websocket("/ws/telemetry")
async def telemetry(socket: WebSocket) -> None:
    """Take frames until the client leaves."""
    running: Service = socket.app.state.service
    if not _same_origin(socket):
        await socket.close(POLICY_VIOLATION, "another site's page may not use this socket")
        return
    await socket.accept()
    if running.sockets >= running.settings.max_sockets:
        await socket.close(TRY_AGAIN_LATER, "too many sockets are open")
        return
    running.sockets += 1
    try:
        await _serve(socket, running)
    except WebSocketDisconnect:
        pass
    except TimeoutError:
        with contextlib.suppress(TimeoutError):  # the farewell has to pass the same full buffer
            async with asyncio.timeout(CLOSE_S):
                await socket.close(TRY_AGAIN_LATER, "replies are not being read")
    finally:
        running.sockets -= 1


async def _serve(socket: WebSocket, running: Service) -> None:
    bad = 0
    while True:
        message = await socket.receive()
        if message["type"] == "websocket.disconnect":
            return
        raw = message.get("text") if message.get("text") is not None else message.get("bytes")
        reply, good = await _answer(raw or b"", running)
        async with asyncio.timeout(running.settings.send_timeout_s):
            await socket.send_text(reply)
        bad = 0 if good else bad + 1
        if bad >= running.settings.max_bad_messages:
            await socket.close(POLICY_VIOLATION, f"{bad} messages in a row could not be used")
            return


async def _answer(raw: bytes | str, running: Service) -> tuple[str, bool]:
    """Return the reply to one message, and whether the message could be used."""
    limit = running.settings.max_socket_message_bytes
    try:
        if len(raw) > limit:
            raise ProblemError(413, f"a message of {len(raw)} bytes; at most {limit} at once")  # noqa: TRY301
        return (await running.telemetry.accept(parse_telemetry(raw, running.settings))).model_dump_json(), True
    except ProblemError as error:
        return _error(error.problem), False
    except StoreAwayError as error:
        log.warning("api: %s", error)
        detail = "the store cannot be used at the moment; send these frames again in a few seconds"
        return _error(Problem(title=title(503), status=503, detail=detail)), True
    except Exception:
        log.exception("api: a message on /ws/telemetry failed")
        detail = "something went wrong here; the server's log has the details"
        return _error(Problem(title=title(500), status=500, detail=detail)), False


def _error(problem: Problem) -> str:
    return SocketError(error=problem.model_dump()).model_dump_json()


def _same_origin(socket: WebSocket) -> bool:
    """Programs send no Origin; a browser sends its page's, which must be this server's own."""
    origin = socket.headers.get("origin")
    return origin is None or urlsplit(origin).netloc == socket.headers.get("host", "")
