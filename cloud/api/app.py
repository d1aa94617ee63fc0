"""The ASGI application: endpoints, one error shape, and the life of the service behind them."""

import contextlib
import sys
from collections.abc import AsyncIterator
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi_offline import FastAPIOffline
from pydantic.json_schema import models_json_schema
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cloud.api import metrics, problems, routes, stream
from cloud.api.http_metrics import HttpMetrics
from cloud.api.models import SocketError, Telemetry, TelemetryReply
from cloud.api.problems import Problem
from cloud.api.service import Service
from cloud.api.settings import Settings
from cloud.api.v1 import advice, alerts, drift, labels, models, retraining, samples, vehicles
from edge_agent.contract.errors import VoltwatchError

DESCRIPTION = """Predictive maintenance for electric vehicles.

Vehicles with an agent score themselves and report over MQTT. Vehicles without one send raw frames here, which are
windowed and scored by the same code. Errors are RFC 9457 problem details; lists are paged by cursor; a number that is
not known is null.

**WebSocket `/ws/telemetry`** takes the bodies of `POST /telemetry`, one JSON message each, and answers every message in
order with a `TelemetryReply`, or with a `SocketError` when it could not be used (the socket stays open; after 20 such
messages in a row it is closed with 1008).
"""


class _PlainStartFault:
    """Settings that cannot be used are one line in the server's log, which ends it with its non-zero exit."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application; Starlette reports a start that failed from inside its `except`, with the traceback."""

        async def without_traceback(message: Message) -> None:
            fault = sys.exception()
            if message["type"] == "lifespan.startup.failed" and isinstance(fault, VoltwatchError):
                message = {**message, "message": f"voltwatch: error: {fault}"}
            await send(message)

        await self._app(scope, receive, without_traceback if scope["type"] == "lifespan" else send)


def create_app(settings: Settings | None = None) -> FastAPI:
    """Make the application; without `settings` the environment is read when it starts."""

    @contextlib.asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        service = Service(settings or Settings.from_environment())
        app.state.service = service
        await service.start()
        try:
            yield
        finally:
            await app.state.metrics.stop()
            await service.stop()

    app = FastAPIOffline(  # its pages come with the package: a fleet's server may have no way out
        redoc_url=None, title="Voltwatch", version=version("voltwatch"), description=DESCRIPTION, lifespan=life,
        redirect_slashes=False, license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
    )  # fmt: skip
    problems.install(app)
    app.state.metrics = metrics.Metrics()
    app.add_middleware(HttpMetrics, histogram=app.state.metrics.http)
    app.add_middleware(_PlainStartFault)
    app.include_router(routes.router)
    app.include_router(stream.router)
    app.include_router(metrics.router)
    for area in (advice, alerts, drift, labels, models, retraining, samples, vehicles):
        app.include_router(area.router)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's page, with the schemas of what it does not see: bodies read by hand, the socket, the problems."""
    if app.openapi_schema is None:
        schema = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes,
            license_info=app.license_info,
        )  # fmt: skip
        _, more = models_json_schema(
            [(Telemetry, "validation"), (TelemetryReply, "serialization"), (SocketError, "serialization"),
             (Problem, "serialization"),
             *((body, "validation") for body in alerts.BODIES)],
            ref_template="#/components/schemas/{model}",
        )  # fmt: skip
        known = schema.setdefault("components", {}).setdefault("schemas", {})
        for name, definition in more["$defs"].items():
            known.setdefault(name, definition)
        for unused in ("HTTPValidationError", "ValidationError"):
            known.pop(unused, None)
        app.openapi_schema = schema
    return app.openapi_schema
