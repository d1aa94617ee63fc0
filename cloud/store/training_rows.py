"""What training asks of the store and leaves there: how people judged the alerts, and what each training run came to.

Reads and writes rows; what a verdict means for a window is `cloud.training.sample_labels`'s business.
"""

from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from cloud.store import tables


@dataclass(frozen=True, slots=True)
class JudgedAlert:
    """One alert with its label, if a person gave one. Times are the vehicle's words, ISO 8601.

    `verdict` is "confirmed", "false_alarm" or None; `label_type` and `label_severity` are set where a person corrected
    them. `ended` is None while the alert stands.
    """

    vehicle_id: str
    alert_id: str
    failure_type: str
    origin: str  # guard or model
    model_release: int | None
    since: str
    ended: str | None
    clock_trusted: bool
    verdict: str | None
    label_type: str | None
    label_severity: str | None


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """One comparison of a challenger with the champion; times in Unix seconds, `report` is JSON."""

    started_at_s: float
    finished_at_s: float
    champion_release: int | None
    verdict: str  # challenger or champion
    samples: int
    labels: int
    frozen_sha256: str
    report: str


async def judged_alerts(connection: AsyncConnection) -> dict[str, list[JudgedAlert]]:
    """Return every alert of every vehicle, judged or not, by vehicle, in the order in which they came."""
    alert, work = tables.alert.c, tables.alert_work.c
    together = tables.alert.outerjoin(
        tables.alert_work, sa.and_(work.vehicle_id == alert.vehicle_id, work.alert_id == alert.alert_id)
    )
    query = (
        sa.select(
            alert.vehicle_id, alert.alert_id, alert.failure_type, alert.origin, alert.model_release, alert.since,
            alert.cleared_time, alert.clock_trusted, work.verdict, work.failure_type.label("label_type"),
            work.severity.label("label_severity"),
        )
        .select_from(together)
        .order_by(alert.ingest_id)
    )  # fmt: skip
    found: dict[str, list[JudgedAlert]] = {}
    for row in await connection.execute(query):
        found.setdefault(row.vehicle_id, []).append(
            JudgedAlert(
                vehicle_id=row.vehicle_id,
                alert_id=row.alert_id,
                failure_type=row.failure_type,
                origin=row.origin,
                model_release=row.model_release,
                since=row.since,
                ended=row.cleared_time,
                clock_trusted=row.clock_trusted,
                verdict=row.verdict,
                label_type=row.label_type,
                label_severity=row.label_severity,
            )
        )
    return found


async def makes(connection: AsyncConnection) -> dict[str, str]:
    """Return the make of every vehicle that told one."""
    vehicle = tables.vehicle.c
    query = sa.select(vehicle.vehicle_id, vehicle.make).where(vehicle.make != "")
    return {row.vehicle_id: row.make for row in await connection.execute(query)}


async def last_seen(connection: AsyncConnection) -> dict[str, float]:
    """Return when every vehicle was last heard of, Unix seconds on the server's clock."""
    vehicle = tables.vehicle.c
    found = await connection.execute(sa.select(vehicle.vehicle_id, vehicle.last_seen_at_s))
    return {row.vehicle_id: row.last_seen_at_s for row in found}


async def add_training_run(connection: AsyncConnection, run: TrainingRun) -> int:
    """Write one run; returns its id."""
    row = {name: getattr(run, name) for name in TrainingRun.__slots__}
    written = await connection.execute(
        sa.insert(tables.training_run).values(row).returning(tables.training_run.c.run_id)
    )
    return int(written.scalar_one())


async def last_training_run(connection: AsyncConnection) -> TrainingRun | None:
    """Return the run that began last, of those recorded; None before the first."""
    run = tables.training_run.c
    query = sa.select(tables.training_run).order_by(run.started_at_s.desc(), run.run_id.desc()).limit(1)
    row = (await connection.execute(query)).mappings().first()
    return None if row is None else TrainingRun(**{name: row[name] for name in TrainingRun.__slots__})
