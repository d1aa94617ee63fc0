"""One error shape everywhere: RFC 9457 problem details, whoever refuses, in words that a person can act on."""

import logging
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException

from cloud.store.fleet_store import StoreAwayError
from edge_agent.contract.errors import VoltwatchError

log = logging.getLogger(__name__)
MEDIA_TYPE = "application/problem+json"
MAX_ERRORS = 20  # named in one answer; more helps nobody


class FieldProblem(BaseModel):
    """One field that is wrong: where, and what to do."""

    field: str = Field(examples=["frames[0].signals.Vehicle.Speed"])
    problem: str = Field(examples=["must be a number, or null where there is no value"])


class Problem(BaseModel):
    """Problem details (RFC 9457). `errors` names each field of a 422."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "type": "about:blank",
                    "title": "Unprocessable Content",
                    "status": 422,
                    "detail": "frames[0].signals.Vehicle.Speed: must be a number, or null where there is no value",
                    "errors": [
                        {
                            "field": "frames[0].signals.Vehicle.Speed",
                            "problem": "must be a number, or null where there is no value",
                        }
                    ],
                }
            ]
        }
    )

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    errors: list[FieldProblem] = []


class ProblemError(Exception):
    """Raise to answer with a problem."""

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        errors: list[FieldProblem] | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.problem = Problem(title=title(status), status=status, detail=detail, errors=errors or [])
        self.headers = headers


def title(status: int) -> str:
    """Return the phrase of a status, which is the title of a problem without a type of its own."""
    if status in (413, 422):  # RFC 9110's names; Python's are older
        return {413: "Content Too Large", 422: "Unprocessable Content"}[status]
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Error"


def from_validation(errors: list[ErrorDetails], prefix: tuple[str, ...] = ()) -> ProblemError:
    """Turn pydantic's errors into a 422 that says where and what in plain words."""
    found = [FieldProblem(field=field_path((*prefix, *e["loc"])), problem=_words(e)) for e in errors[:MAX_ERRORS]]
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    first = found[0]
    detail = f"{first.field}: {first.problem}{more}" if first.field else f"{first.problem}{more}"
    return ProblemError(422, detail, errors=found)


def field_path(location: tuple[int | str, ...]) -> str:
    """Write a path as a person would: frames[2].signals.Vehicle.Speed."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part != "[key]":
            path += f".{_shown(part)}" if path else _shown(part)
    return path


def _shown(text: str) -> str:
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[:120])


_WORDS = {
    "missing": "is required",
    "extra_forbidden": "is not a field here",
    "finite_number": "must be a finite number; write null where there is no value",
    "float_type": "must be a number, or null where there is no value",
    "float_parsing": "must be a number, or null where there is no value",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "string_type": "must be text",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
}


def _words(error: ErrorDetails) -> str:
    if error["type"] == "json_invalid":
        reason = error.get("ctx", {}).get("error", "")
        return f"the body is not valid JSON: {reason} (NaN and Infinity are not JSON either: write null)"
    words = _WORDS.get(error["type"])
    if words is not None:
        return words
    message = error["msg"].removeprefix("Value error, ")
    return _shown(message[:1].lower() + message[1:300])


def response(problem: Problem, headers: dict[str, str] | None = None) -> JSONResponse:
    """Make the answer that carries a problem."""
    return JSONResponse(
        problem.model_dump(exclude_defaults=False), status_code=problem.status, headers=headers, media_type=MEDIA_TYPE
    )


def install(app: FastAPI) -> None:
    """Make every error of this application a problem."""

    @app.exception_handler(ProblemError)
    async def _problem(_request: Request, error: ProblemError) -> JSONResponse:
        return response(error.problem, error.headers)

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        details = {
            404: f"there is nothing at {_shown(request.url.path)}; /docs lists what there is",
            405: f"{request.method} is not possible on {_shown(request.url.path)}",
        }
        detail = details.get(error.status_code, str(error.detail))
        problem = Problem(title=title(error.status_code), status=error.status_code, detail=detail)
        return response(problem, dict(error.headers) if error.headers else None)

    @app.exception_handler(RequestValidationError)
    async def _validation(_request: Request, error: RequestValidationError) -> JSONResponse:
        errors: list[Any] = [
            {**e, "loc": e["loc"][1:] if e["loc"] and e["loc"][0] in ("query", "path", "body") else e["loc"]}
            for e in error.errors()
        ]
        return response(from_validation(errors).problem)

    @app.exception_handler(StoreAwayError)
    async def _store_away(_request: Request, error: StoreAwayError) -> JSONResponse:
        log.warning("api: %s", error)
        detail = "the store cannot be used at the moment; try again in a few seconds (see /health)"
        return response(Problem(title=title(503), status=503, detail=detail), {"Retry-After": "5"})

    @app.exception_handler(VoltwatchError)
    async def _ours(_request: Request, error: VoltwatchError) -> JSONResponse:
        log.error("api: %s", error)
        return response(Problem(title=title(500), status=500, detail=str(error)))

    @app.exception_handler(Exception)
    async def _unexpected(request: Request, error: Exception) -> JSONResponse:
        log.error("api: %s %s failed", request.method, request.url.path, exc_info=error)
        detail = "something went wrong here; the server's log has the details"
        return response(Problem(title=title(500), status=500, detail=detail))
