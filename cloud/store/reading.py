"""The statements that read, for the API: pages by cursor, each with a limit, never the whole table."""

from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from cloud.store import tables
from cloud.store.items import PipelineState

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class AlertFilter:
    """Which alerts; None means any. `since_s` is by arrival here, Unix seconds: a vehicle's clock may be anything."""

    vehicle_id: str | None = None
    failure_type: str | None = None
    severity: str | None = None
    state: str | None = None  # raised, escalated, cleared; or open, which is the first two
    origin: str | None = None
    since_s: float | None = None
    work: str | None = None  # a state of cloud.alert_work.life_cycle; new: nobody has looked at it
    verdict: str | None = None  # confirmed, false_alarm; or none


async def vehicles(connection: AsyncConnection, *, after: str | None, limit: int) -> list[Row]:
    """Return up to `limit` vehicles in the order of their ids, beginning behind `after`."""
    query = sa.select(tables.vehicle).order_by(tables.vehicle.c.vehicle_id).limit(limit)
    if after is not None:
        query = query.where(tables.vehicle.c.vehicle_id > after)
    return [dict(row) for row in (await connection.execute(query)).mappings()]


async def open_alerts(connection: AsyncConnection, vehicle_ids: list[str], *, per_vehicle: int = 20) -> list[Row]:
    """Return the alerts of these vehicles that are not cleared, newest arrival first, so many a vehicle at most."""
    alert = tables.alert.c
    place = sa.func.row_number().over(partition_by=alert.vehicle_id, order_by=alert.ingest_id.desc()).label("place")
    ranked = (
        sa.select(alert.vehicle_id, alert.alert_id, alert.failure_type, alert.severity, alert.state, alert.origin,
                  alert.since, alert.ingest_id, place)
        .where(alert.vehicle_id.in_(vehicle_ids), alert.state != "cleared")
        .subquery()
    )  # fmt: skip
    query = sa.select(ranked).where(ranked.c.place <= per_vehicle).order_by(ranked.c.ingest_id.desc())
    return [dict(row) for row in (await connection.execute(query)).mappings()]


async def alerts(connection: AsyncConnection, wanted: AlertFilter, *, before: int | None, limit: int) -> list[Row]:
    """Return up to `limit` alerts, newest arrival first, beginning behind ingest id `before`.

    Beside the alert's own columns: `work_state` and `verdict` (both None while nobody has looked at it), the label's
    `work_failure_type` and `work_severity` where a person corrected them, `work_updated_at_s`.
    """
    alert = tables.alert.c
    query = _alerts_with_work().order_by(alert.ingest_id.desc()).limit(limit)
    if before is not None:
        query = query.where(alert.ingest_id < before)
    for condition in _conditions(wanted):
        query = query.where(condition)
    return [dict(row) for row in (await connection.execute(query)).mappings()]


async def alert(connection: AsyncConnection, vehicle_id: str, alert_id: str) -> Row | None:
    """Return one alert with the columns that `alerts` has."""
    column = tables.alert.c
    query = _alerts_with_work().where(column.vehicle_id == vehicle_id, column.alert_id == alert_id)
    row = (await connection.execute(query)).mappings().first()
    return None if row is None else dict(row)


def _alerts_with_work() -> sa.Select[Any]:
    alert, work = tables.alert.c, tables.alert_work.c
    return sa.select(
        tables.alert, work.state.label("work_state"), work.verdict, work.failure_type.label("work_failure_type"),
        work.severity.label("work_severity"), work.updated_at_s.label("work_updated_at_s"),
    ).join_from(
        tables.alert, tables.alert_work,
        sa.and_(work.vehicle_id == alert.vehicle_id, work.alert_id == alert.alert_id), isouter=True,
    )  # fmt: skip


def _conditions(wanted: AlertFilter) -> list[sa.ColumnElement[bool]]:
    alert, work = tables.alert.c, tables.alert_work.c
    conditions = [
        alert[name] == getattr(wanted, name)
        for name in ("vehicle_id", "failure_type", "severity", "origin")
        if getattr(wanted, name) is not None
    ]
    if wanted.state == "open":
        conditions.append(alert.state != "cleared")
    elif wanted.state is not None:
        conditions.append(alert.state == wanted.state)
    if wanted.since_s is not None:
        conditions.append(alert.received_at_s >= wanted.since_s)
    if wanted.work is not None:
        conditions.append(work.state.is_(None) if wanted.work == "new" else work.state == wanted.work)
    if wanted.verdict is not None:
        conditions.append(work.verdict.is_(None) if wanted.verdict == "none" else work.verdict == wanted.verdict)
    return conditions


async def vehicle(connection: AsyncConnection, vehicle_id: str) -> Row | None:
    """Return one vehicle."""
    query = sa.select(tables.vehicle).where(tables.vehicle.c.vehicle_id == vehicle_id)
    row = (await connection.execute(query)).mappings().first()
    return None if row is None else dict(row)


async def transitions(
    connection: AsyncConnection, vehicle_id: str, alert_id: str, *, limit: int
) -> list[tuple[int, float, bytes]]:
    """Return the newest stored events of one alert, first come first: (ingest_id, received_at_s, body)."""
    event = tables.event.c
    query = (
        sa.select(event.ingest_id, event.received_at_s, event.body)
        .where(event.vehicle_id == vehicle_id, event.alert_id == alert_id)
        .order_by(event.ingest_id.desc())
        .limit(limit)
    )
    return [(row[0], row[1], bytes(row[2])) for row in reversed((await connection.execute(query)).all())]


async def samples_of_alert(connection: AsyncConnection, vehicle_id: str, alert_id: str) -> dict[str, int]:
    """Return how many samples stand around one alert, by state."""
    sample = tables.sample.c
    query = (
        sa.select(sample.state, sa.func.count())
        .where(sample.vehicle_id == vehicle_id, sample.alert_id == alert_id)
        .group_by(sample.state)
    )
    return {row[0]: row[1] for row in await connection.execute(query)}


async def pipeline_state(connection: AsyncConnection, vehicle_id: str) -> PipelineState | None:
    """Return what the server-side pipeline of a vehicle continues from."""
    state = tables.pipeline_state.c
    row = (
        await connection.execute(sa.select(tables.pipeline_state).where(state.vehicle_id == vehicle_id))
    ).first()  # fmt: skip
    if row is None:
        return None
    return PipelineState(row.make, row.period_s, row.cells, row.probes, bytes(row.snapshot))


async def refused(connection: AsyncConnection) -> list[Row]:
    """Return the counts of refused messages by reason, with the last example of each."""
    query = sa.select(tables.refused).order_by(tables.refused.c.count.desc()).limit(50)
    return [dict(row) for row in (await connection.execute(query)).mappings()]


async def newest_ingest_id(connection: AsyncConnection) -> int:
    """Return the id of the newest event, 0 for an empty store; cheap at any size, unlike a count."""
    return await connection.scalar(sa.select(sa.func.max(tables.event.c.ingest_id))) or 0


async def parked_count(connection: AsyncConnection) -> int:
    """Return how many messages of a newer major version are kept."""
    return await connection.scalar(sa.select(sa.func.count()).select_from(tables.parked)) or 0


async def loss_totals(connection: AsyncConnection) -> tuple[int, int]:
    """Return (records, messages) that vehicles said they lost."""
    # in floating point, as SQLite's sum of integers fails beyond 2**63; whole up to 2**53
    count = sa.func.coalesce(sa.func.sum(sa.cast(tables.loss.c.count, sa.Double)), 0.0)
    row = (await connection.execute(sa.select(sa.func.count(), count).select_from(tables.loss))).one()
    return int(row[0]), int(row[1])
