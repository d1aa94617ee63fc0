"""What the endpoints share: the running service, a strict query, common parameters and problems."""

import math
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import Depends, Query, Request
from fastapi.dependencies.models import Dependant

from cloud.api.problems import MEDIA_TYPE, FieldProblem, ProblemError
from cloud.api.service import Service

Word = Annotated[str, Query(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]
Limit = Annotated[int, Query(ge=1, le=500, description="At most so many.")]


async def service(request: Request) -> Service:
    """Return the running service."""
    found: Service = request.app.state.service
    return found


async def only_known_parameters(request: Request) -> None:
    """Refuse a query parameter that this path does not have: a mistyped filter would silently show everything."""
    known = _query_names(request.scope["route"].dependant)
    for name in request.query_params:
        if name not in known:
            words = f"is not a parameter here; there {'are' if known else 'is'} {', '.join(sorted(known)) or 'none'}"
            shown = name[:80].encode("ascii", "replace").decode()
            raise ProblemError(422, f"{shown}: {words}", errors=[FieldProblem(field=shown, problem=words)])


def _query_names(dependant: Dependant) -> set[str]:
    names = {field.alias for field in dependant.query_params}
    return names.union(*(_query_names(part) for part in dependant.dependencies))


def problem(description: str) -> dict[str, Any]:
    """Describe one error answer for the OpenAPI page."""
    return {
        "description": description,
        "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }


AWAY: dict[int | str, dict[str, Any]] = {
    503: problem("The store cannot be used at the moment; try again after Retry-After seconds.")
}
WRONG: dict[int | str, dict[str, Any]] = {422: problem("A parameter or field is wrong; `errors` names each.")}
NOT_FOUND: dict[int | str, dict[str, Any]] = {404: problem("There is no such thing here; the detail names it.")}
Running = Annotated[Service, Depends(service)]


async def since(
    since: Annotated[
        str | None,
        Query(
            max_length=40, examples=["2026-03-01T00:00:00Z"],
            description="Only what arrived at the server at or after this time: ISO 8601 (UTC if it names no zone) or "
            "Unix seconds.",
        ),
    ] = None,
) -> float | None:  # fmt: skip
    """Read the query parameter `since`, Unix seconds."""
    return None if since is None else read_time("since", since)


def read_time(name: str, text: str) -> float:
    """Read a time given as ISO 8601 or Unix seconds. Raises a 422 that names the parameter."""
    try:
        seconds = float(text)
    except ValueError:
        try:
            text = text.strip()
            read = datetime.fromisoformat(text.replace(" ", "+") if "T" in text else text)  # a + arrives as a space
            seconds = (read if read.tzinfo else read.replace(tzinfo=UTC)).timestamp()
        except (ValueError, OverflowError):
            seconds = math.nan
    if not math.isfinite(seconds):
        words = "must be an ISO 8601 time, as 2026-03-01T00:00:00Z, or Unix seconds"
        raise ProblemError(422, f"{name}: {words}", errors=[FieldProblem(field=name, problem=words)])
    return seconds
