"""Read the body of a post: bounded in size and in time, JSON only, every error in plain words."""

import asyncio
from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from cloud.api.models import Telemetry
from cloud.api.problems import FieldProblem, ProblemError, from_validation
from cloud.api.settings import Settings

MAX_FORM_BYTES = 65_536  # a reason of 2,000 characters, escaped, is some 24 kB
M = TypeVar("M", bound=BaseModel)


async def read_telemetry(request: Request, settings: Settings) -> Telemetry:
    """Return the body of a telemetry post. Raises `ProblemError` 400, 408, 413, 415 or 422."""
    too_large = f"the body is over {settings.max_body_bytes} bytes; send fewer frames at once"
    body = await _read(request, settings.max_body_bytes, settings.body_timeout_s, too_large)
    return parse_telemetry(body, settings)


async def read_model(request: Request, model: type[M], settings: Settings) -> M:
    """Return a small body, such as a form's, as a pydantic model. Raises `ProblemError` 400, 408, 413, 415 or 422."""
    too_large = f"the body is over {MAX_FORM_BYTES} bytes"
    body = await _read(request, MAX_FORM_BYTES, settings.body_timeout_s, too_large)
    return _parse(body, model)


async def _read(request: Request, max_bytes: int, timeout_s: float, too_large: str) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        # only JSON: a form or plain text could be posted by any web page a user has open, without asking
        raise ProblemError(415, "send Content-Type: application/json")
    try:
        async with asyncio.timeout(timeout_s):
            return await _bounded(request, max_bytes, too_large)
    except TimeoutError:
        raise ProblemError(408, f"the body did not come within {timeout_s:g} s") from None
    except ClientDisconnect:
        raise ProblemError(400, "the connection ended before the body did") from None


def parse_telemetry(body: bytes | str, settings: Settings) -> Telemetry:
    """Turn JSON into telemetry. Raises `ProblemError` 413 or 422."""
    telemetry = _parse(body, Telemetry)
    if len(telemetry.frames) > settings.max_frames:
        raise ProblemError(413, f"{len(telemetry.frames)} frames; send at most {settings.max_frames} at once")
    return telemetry


def _parse(body: bytes | str, model: type[M]) -> M:
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise from_validation(error.errors(include_url=False, include_input=False)) from None
    except ValueError as error:  # what the JSON parser itself cannot take, as a number of ten thousand digits
        raise ProblemError(422, f"the body is not valid JSON: {str(error)[:200]}", errors=[
            FieldProblem(field="", problem="is not valid JSON")
        ]) from None  # fmt: skip


async def _bounded(request: Request, limit: int, words: str) -> bytes:
    too_large = ProblemError(413, words, headers={"Connection": "close"})
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and (len(announced) > 18 or int(announced) > limit):
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise too_large
    return bytes(body)
