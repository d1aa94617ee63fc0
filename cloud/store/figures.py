"""What monitoring asks of the store: counts and sums over the whole fleet, each one statement, never one row a vehicle.

The one thing that is not a sum in SQL is what agents say of themselves (`statuses`): JSON, of a bounded number of
vehicles. How often all this may be asked is for the caller to bound.
"""

from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from cloud.store import reading, tables
from cloud.store.reading import Row

MAX_STATUSES = 20_000  # vehicles whose own counters are summed: some 20 MB of JSON, a fifth of a second
MAX_REASONS = 50  # as /health shows


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """The store at one moment."""

    newest_ingest_id: int
    vehicles: dict[tuple[str, str], int]  # (state, channel)
    newest_seen_at_s: float | None  # Unix seconds, server's clock: of whichever vehicle spoke last
    open_alerts: dict[tuple[str, str, str], int]  # (failure type, severity, state of its work)
    work: dict[str, int]  # alerts by state of their work, those that somebody looked at
    judged: dict[tuple[str, int | None, str], int]  # (failure type, model release, what people said): see `JUDGED`
    refused: dict[str, int]  # messages by reason, ever
    parked: int
    losses: tuple[int, int]  # records, messages
    drift_alerts: dict[tuple[str, str], int]  # open: (scope, kind of variable)
    fleet_drift: list[Row]  # open alerts of the fleet: variable, kind, stratum, model_release, value, threshold
    samples: dict[str, tuple[int, int]]  # state: how many, and their packed bytes
    trained_at_s: float | None  # the newest training run's end
    statuses: list[str]  # JSON, of the agents seen last


JUDGED = ("right", "other_type", "false_alarm")  # confirmed as told; confirmed as another type; nothing there


async def figures(connection: AsyncConnection, *, now_s: float, http_silence_s: float, most_drifted: int) -> Figures:
    """Count. `now_s` is the server's clock, `http_silence_s` how long a vehicle over HTTP may be silent."""
    vehicle, training = tables.vehicle.c, tables.training_run.c
    statuses = (
        sa.select(vehicle.status).where(vehicle.channel == "mqtt")
        .order_by(vehicle.last_seen_at_s.desc()).limit(MAX_STATUSES)
    )  # fmt: skip
    return Figures(
        newest_ingest_id=await reading.newest_ingest_id(connection),
        vehicles=await _vehicles(connection, now_s - http_silence_s),
        newest_seen_at_s=await connection.scalar(sa.select(sa.func.max(vehicle.last_seen_at_s))),
        open_alerts=await _open_alerts(connection),
        work=await _work(connection),
        judged=await _judged(connection),
        refused={row["reason"]: row["count"] for row in await reading.refused(connection)},
        parked=await reading.parked_count(connection),
        losses=await reading.loss_totals(connection),
        drift_alerts=await _drift_alerts(connection),
        fleet_drift=await _fleet_drift(connection, most_drifted),
        samples=await _samples(connection),
        trained_at_s=await connection.scalar(sa.select(sa.func.max(training.finished_at_s))),
        statuses=list(await connection.scalars(statuses)),
    )


async def _vehicles(connection: AsyncConnection, heard_since_s: float) -> dict[tuple[str, str], int]:
    vehicle = tables.vehicle.c
    state = sa.case(
        (vehicle.channel != "http", vehicle.state),
        (vehicle.last_seen_at_s >= heard_since_s, "online"),
        else_="offline",
    ).label("now")
    query = sa.select(state, vehicle.channel, sa.func.count()).group_by(sa.text("1"), vehicle.channel)
    return {(row[0], row[1]): row[2] for row in await connection.execute(query)}


async def _open_alerts(connection: AsyncConnection) -> dict[tuple[str, str, str], int]:
    alert, work = tables.alert.c, tables.alert_work.c
    state = sa.func.coalesce(work.state, "new")
    query = (
        sa.select(alert.failure_type, alert.severity, state, sa.func.count())
        .join_from(
            tables.alert, tables.alert_work,
            sa.and_(work.vehicle_id == alert.vehicle_id, work.alert_id == alert.alert_id), isouter=True,
        )
        .where(alert.state != "cleared")
        .group_by(alert.failure_type, alert.severity, work.state)
    )  # fmt: skip
    return {(row[0], row[1], row[2]): row[3] for row in await connection.execute(query)}


async def _work(connection: AsyncConnection) -> dict[str, int]:
    work = tables.alert_work.c
    query = sa.select(work.state, sa.func.count()).group_by(work.state)
    return {row[0]: row[1] for row in await connection.execute(query)}


async def _judged(connection: AsyncConnection) -> dict[tuple[str, int | None, str], int]:
    alert, work = tables.alert.c, tables.alert_work.c
    said = sa.case(
        (work.verdict == "false_alarm", "false_alarm"),
        (sa.func.coalesce(work.failure_type, alert.failure_type) == alert.failure_type, "right"),
        else_="other_type",
    ).label("said")
    query = (
        sa.select(alert.failure_type, alert.model_release, said, sa.func.count())
        .join_from(
            tables.alert_work, tables.alert,
            sa.and_(work.vehicle_id == alert.vehicle_id, work.alert_id == alert.alert_id),
        )
        .where(work.verdict.is_not(None), alert.origin == "model")
        .group_by(alert.failure_type, alert.model_release, sa.text("3"))
    )  # fmt: skip
    return {(row[0], row[1], row[2]): row[3] for row in await connection.execute(query)}


async def _drift_alerts(connection: AsyncConnection) -> dict[tuple[str, str], int]:
    drift = tables.drift_alert.c
    query = (
        sa.select(drift.scope, drift.kind, sa.func.count())
        .where(drift.cleared_at_s.is_(None))
        .group_by(drift.scope, drift.kind)
    )
    return {(row[0], row[1]): row[2] for row in await connection.execute(query)}


async def _fleet_drift(connection: AsyncConnection, most: int) -> list[Row]:
    drift = tables.drift_alert.c
    query = (
        sa.select(drift.variable, drift.kind, drift.stratum, drift.model_release, drift.value, drift.threshold)
        .where(drift.scope == "fleet", drift.cleared_at_s.is_(None))
        .order_by((drift.value / drift.threshold).desc(), drift.drift_alert_id)
        .limit(most)
    )
    return [dict(row) for row in (await connection.execute(query)).mappings()]


async def _samples(connection: AsyncConnection) -> dict[str, tuple[int, int]]:
    sample = tables.sample.c
    query = sa.select(sample.state, sa.func.count(), sa.func.sum(sample.length)).group_by(sample.state)
    return {row[0]: (int(row[1]), int(row[2])) for row in await connection.execute(query)}
