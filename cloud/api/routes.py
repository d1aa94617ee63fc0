"""The HTTP endpoints: read the question, ask the store or the pipeline, show the answer."""

import asyncio
import time
from importlib.metadata import version
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query, Request, Response

from cloud.api import models, shown
from cloud.api.body import read_telemetry
from cloud.api.endpoint import AWAY, WRONG, Limit, Running, Word, only_known_parameters, problem, since
from cloud.api.service import Service
from cloud.store import reading
from cloud.store.fleet_store import StoreAwayError
from cloud.store.reading import AlertFilter, Row
from edge_agent.contract.messages import finite
from edge_agent.pipeline.alerts import iso

HEALTH_TIMEOUT_S = 3.0  # a store that needs longer to say 1 is not well

router = APIRouter(dependencies=[Depends(only_known_parameters)], responses=WRONG)


@router.get("/", summary="Health check", tags=["service"])
async def root() -> models.Service:
    """Answer as long as the process runs, whatever state the store and the broker are in (`/health` tells)."""
    return models.Service(service="voltwatch", version=version("voltwatch"), docs="/docs", health="/health")


@router.get(
    "/health", summary="Detailed health status", tags=["service"],
    responses={503: {"model": models.Health, "description": "`down`: the store is away, nothing can be stored."}},
)  # fmt: skip
async def health(running: Running, response: Response) -> models.Health:
    """Say how the store, the broker link and the bundle are, and count what was stored, refused, parked and lost.

    200 for `ok` and `degraded` (something is missing, `problems` says what, the rest works); 503 for `down`.
    """
    store = models.StoreHealth(ok=False, name=running.store.name)
    refused: list[Row] = []
    parked, losses = 0, (0, 0)
    try:
        async with asyncio.timeout(HEALTH_TIMEOUT_S):
            if not running.store_ready:
                await running.store.check()
                raise StoreAwayError("its tables are not ready yet")  # noqa: TRY301
            async with running.store.reading() as connection:
                store.newest_ingest_id = await reading.newest_ingest_id(connection)
                refused = await reading.refused(connection)
                parked = await reading.parked_count(connection)
                losses = await reading.loss_totals(connection)
            store.ok = True
    except StoreAwayError as error:
        store.detail = str(error)
    except TimeoutError:
        store.detail = f"store {running.store.name}: no answer within {HEALTH_TIMEOUT_S:g} s"
    broker = _broker(running)
    bundle = _bundle(running)
    lake = _lake(running)
    releases = running.renewal.detail if running.renewal else ""
    problems = [text for text in (store.detail, broker.detail, bundle.detail, lake.detail, releases) if text]
    status: Literal["ok", "degraded", "down"] = "down" if not store.ok else "degraded" if problems else "ok"
    response.status_code = 503 if status == "down" else 200
    return models.Health(
        status=status, problems=problems, version=version("voltwatch"), time=iso(running.wall()),
        uptime_s=round(time.monotonic() - running.started_s, 3),
        store=store, broker=broker, bundle=bundle, lake=lake,
        collector=dict(running.collector.counters) if running.collector else {},
        telemetry={**running.telemetry.counters, "sockets": running.sockets},
        refused=[
            models.RefusedCount(
                reason=row["reason"], count=row["count"], last_time=iso(row["last_at_s"]),
                last_topic=row["last_topic"], last_detail=row["last_detail"],
            )
            for row in refused
        ],
        parked=parked, losses={"records": losses[0], "messages": losses[1]},
    )  # fmt: skip


def _broker(running: Service) -> models.BrokerHealth:
    if running.collector is None:
        return models.BrokerHealth(configured=False, connected=False)
    link = running.collector.link
    return models.BrokerHealth(
        configured=True,
        connected=link.connected,
        address=link.address,
        protocol=link.protocol,
        connected_since=None if link.since_s is None else iso(link.since_s),
        detail=link.detail or running.collector.store_detail or link.warning(running.wall()),
    )


def _lake(running: Service) -> models.LakeHealth:
    mover = running.mover
    usage = mover.usage
    return models.LakeHealth(
        ok=not mover.detail, name=mover.lake.name, detail=mover.detail, files=usage.files if usage else None,
        bytes=usage.bytes if usage else None,
    )  # fmt: skip


def _bundle(running: Service) -> models.BundleHealth:
    if running.bundle is None:
        return models.BundleHealth(loaded=False, detail=running.bundle_detail)
    manifest = running.bundle.manifest
    return models.BundleHealth(
        loaded=True, release=manifest.release, name=manifest.name, sha256=running.bundle.sha256,
        heads=list(manifest.heads),
    )  # fmt: skip


@router.post(
    "/telemetry", summary="Ingest frames", tags=["telemetry"], responses={
        **AWAY, 408: problem("The body came too slowly."),
        413: problem("The body or its number of frames is too large."),
        415: problem("The body is not declared as JSON."), 400: problem("The connection ended before the body did."),
    },
    openapi_extra={"requestBody": {"required": True, "content": {"application/json": {
        "schema": {"$ref": "#/components/schemas/Telemetry"},
        "examples": {
            "batch": {"summary": "Several frames", "value": models.EXAMPLE_BATCH},
            "single": {"summary": "One frame", "value": models.EXAMPLE_SINGLE},
        },
    }}}},
)  # fmt: skip
async def telemetry(request: Request, running: Running) -> models.TelemetryReply:
    """Take raw frames of one vehicle, window and score them with the pipeline that runs on a vehicle.

    The first prediction needs a whole window (300 frames at 1 Hz), then one comes every stride (60 s). Frames may come
    in any number and, within one request, in any order; send the requests of one vehicle one after the other. A request
    that is sent again after an error counts once: frames not newer than the newest before are left out, and `notes`
    says so; one that lies more than an hour behind is taken for a clock set back. Values outside a signal's range count
    as missing. A signal name that the catalogue does not know is refused, naming the nearest. Alerts are stored like a
    vehicle's own.
    """
    return await running.telemetry.accept(await read_telemetry(request, running.settings))


@router.get("/vehicles", summary="List vehicles", tags=["fleet"], responses={**AWAY})
async def vehicles(
    running: Running,
    limit: Limit = 100,
    cursor: Annotated[Word | None, Query(description="`next` of the page before.")] = None,
) -> models.VehiclePage:
    """Every vehicle ever heard of, by id: whether it is online, what scores it, its newest scores, its open alerts."""
    async with running.store.reading() as connection:
        rows = await reading.vehicles(connection, after=cursor, limit=limit + 1)
        page = rows[:limit]
        alerts = await reading.open_alerts(connection, [row["vehicle_id"] for row in page])
    by_vehicle: dict[str, list[models.OpenAlert]] = {}
    for alert in alerts:
        by_vehicle.setdefault(alert["vehicle_id"], []).append(shown.open_alert(alert))
    now = running.wall()
    return models.VehiclePage(
        vehicles=[shown.vehicle(row, by_vehicle.get(row["vehicle_id"], []), now) for row in page],
        next=page[-1]["vehicle_id"] if len(rows) > limit else None,
    )


@router.get("/alerts", summary="View recent alerts", tags=["fleet"], responses={**AWAY})
async def alerts(
    *,
    running: Running,
    vehicle_id: Annotated[Word | None, Query(description="Only of this vehicle.", examples=["EV_001"])] = None,
    failure_type: Annotated[Word | None, Query(examples=["inverter_overheating"])] = None,
    severity: Annotated[Literal["low", "medium", "high", "critical"] | None, Query()] = None,
    state: Annotated[
        Literal["open", "raised", "escalated", "cleared"] | None, Query(description="open = raised or escalated.")
    ] = None,
    origin: Annotated[Literal["model", "guard"] | None, Query(description="A model's head, or a fixed rule.")] = None,
    since_s: Annotated[float | None, Depends(since)] = None,
    limit: Limit = 100,
    cursor: Annotated[int | None, Query(ge=0, le=2**62, description="`next` of the page before.")] = None,
) -> models.AlertPage:
    """Alerts of the fleet in the order of their arrival here, the newest first: clocks of vehicles may be wrong."""
    wanted = AlertFilter(
        vehicle_id=vehicle_id, failure_type=failure_type, severity=severity, state=state, origin=origin, since_s=since_s
    )
    async with running.store.reading() as connection:
        rows = await reading.alerts(connection, wanted, before=cursor, limit=limit + 1)
    page = rows[:limit]
    return models.AlertPage(
        alerts=[shown.alert(row) for row in page], next=str(page[-1]["ingest_id"]) if len(rows) > limit else None
    )


@router.get("/thresholds", summary="Current thresholds", tags=["models"])
async def thresholds(running: Running) -> models.ThresholdsOut:
    """Return the thresholds of the bundle that scores here: the policy in force, and the other stated policies.

    `precision` and `percentile` are the metrics spec's (80 % precision, 95th percentile); `false_alarm_budget` is the
    default for alerting. Without a bundle everything is empty, and `bundle.detail` says why.
    """
    bundle = running.bundle
    if bundle is None:
        return models.ThresholdsOut(
            bundle=_bundle(running), active=None, types={}, failure=None, anomaly=None, decision=None, policies={}
        )
    told = bundle.thresholds
    policies = {
        name: models.Policy(
            description=policy.description, failure=finite(policy.failure), anomaly=finite(policy.anomaly),
            types={
                kind: models.TypeThreshold(raise_at=finite(t.raise_at), clear_below=finite(t.clear_below))
                for kind, t in policy.types.items()
            },
            measured={kind: finite(value) for kind, value in policy.measured.items()},
        )
        for name, policy in told.policies.items()
    }  # fmt: skip
    active = policies[told.active]
    rule = told.decision
    return models.ThresholdsOut(
        bundle=_bundle(running), active=told.active, types=active.types, failure=active.failure,
        anomaly=active.anomaly, policies=policies,
        decision=models.DecisionRule(k=rule.k, n=rule.n, clear_windows=rule.clear_windows, cooldown_s=rule.cooldown_s),
    )  # fmt: skip
