"""How long requests take, by route: a pure ASGI middleware over one histogram.

The labels are bounded whatever a client sends: the route's template and not the path, one label for everything that is
no route, known methods, the status's class.
"""

import time

from prometheus_client import CollectorRegistry, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
UNKNOWN = "unknown"  # a path that is no route here, or a method that is none
BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)  # a window scores in some 5 ms


class HttpMetrics:
    """Wraps an application and measures every request until its answer has been sent."""

    def __init__(self, app: ASGIApp, histogram: Histogram) -> None:
        self._app = app
        self._histogram = histogram

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application; a client that left before its answer counts as `none`, a fault of ours as `5xx`."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = "none"

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = f"{message['status'] // 100}xx"
            await send(message)

        began = time.perf_counter()
        try:
            await self._app(scope, receive, noting)
        except Exception:
            status = "5xx"  # the answer is made outside of here
            raise
        finally:
            method = scope["method"] if scope["method"] in METHODS else UNKNOWN
            taken_s = time.perf_counter() - began
            self._histogram.labels(method=method, route=_template(scope), status=status).observe(taken_s)


def _template(scope: Scope) -> str:
    path = getattr(scope.get("route"), "path", None)  # set by the router on the way in
    return path if isinstance(path, str) else UNKNOWN


def histogram(registry: CollectorRegistry) -> Histogram:
    """Make the histogram that the middleware fills."""
    return Histogram(
        "voltwatch_http_request_duration_seconds", "Time from a request's headers to the end of its answer.",
        ("method", "route", "status"), registry=registry, buckets=BUCKETS_S,
    )  # fmt: skip
