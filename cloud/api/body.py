"""Read the body of a telemetry post: bounded in size and in time, JSON only, every error in plain words."""

import asyncio

from fastapi import Request
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from cloud.api.models import Telemetry
from cloud.api.problems import FieldProblem, ProblemError, from_validation
from cloud.api.settings import Settings


async def read_telemetry(request: Request, settings: Settings) -> Telemetry:
    """Return the body. Raises `ProblemError` 408, 413, 415 or 422."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        # only JSON: a form or plain text could be posted by any web page a user has open, without asking
        raise ProblemError(415, "send Content-Type: application/json")
    try:
        async with asyncio.timeout(settings.body_timeout_s):
            body = await _bounded(request, settings.max_body_bytes)
    except TimeoutError:
        raise ProblemError(408, f"the body did not come within {settings.body_timeout_s:g} s") from None
    except ClientDisconnect:
        raise ProblemError(400, "the connection ended before the body did") from None
    return parse_telemetry(body, settings)


def parse_telemetry(body: bytes | str, settings: Settings) -> Telemetry:
    """Turn JSON into telemetry. Raises `ProblemError` 413 or 422."""
    try:
        telemetry = Telemetry.model_validate_json(body)
    except ValidationError as error:
        raise from_validation(error.errors(include_url=False, include_input=False)) from None
    except ValueError as error:  # what the JSON parser itself cannot take, as a number of ten thousand digits
        raise ProblemError(422, f"the body is not valid JSON: {str(error)[:200]}", errors=[
            FieldProblem(field="", problem="is not valid JSON")
        ]) from None  # fmt: skip
    if len(telemetry.frames) > settings.max_frames:
        raise ProblemError(413, f"{len(telemetry.frames)} frames; send at most {settings.max_frames} at once")
    return telemetry


async def _bounded(request: Request, limit: int) -> bytes:
    too_large = ProblemError(
        413, f"the body is over {limit} bytes; send fewer frames at once", headers={"Connection": "close"}
    )
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and (len(announced) > 18 or int(announced) > limit):
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise too_large
    return bytes(body)
