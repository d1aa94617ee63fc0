"""What the store knows about whether a training run is due; what it means is `cloud.drift.retraining`'s business."""

from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from cloud.drift.retraining import Champion, Evidence, Judgements
from cloud.store import tables

MOST_ALERTS = 50  # in one answer: the newest; the count is of all

_alert = tables.drift_alert.c
_FLEET_WIDE = _alert.scope.in_(("fleet", "make"))  # one vehicle that changed is a matter for the workshop


async def evidence(connection: AsyncConnection, champion: Champion | None, since_s: float | None) -> Evidence:
    """Count what came since `since_s` (None: ever), and the judged alerts of the champion's release."""
    since = since_s or 0.0
    drifted = await connection.execute(
        sa.select(_alert.variable).where(*_drifted(champion, since)).distinct().order_by(_alert.variable)
    )
    samples = await connection.scalar(
        sa.select(sa.func.count()).where(tables.sample.c.state == "lake", tables.sample.c.stored_at_s >= since)
    )
    return Evidence(
        tuple(row.variable for row in drifted), samples or 0, await _judged(connection, champion) if champion else {}
    )


async def _judged(connection: AsyncConnection, champion: Champion) -> dict[str, Judgements]:
    alert, work = tables.alert.c, tables.alert_work.c
    right = sa.and_(
        work.verdict == "confirmed", sa.or_(work.failure_type.is_(None), work.failure_type == alert.failure_type)
    )
    query = (
        sa.select(
            alert.failure_type, sa.func.sum(sa.case((right, 1), else_=0)).label("confirmed"),
            sa.func.count().label("judged"),
        )
        .join_from(
            tables.alert, tables.alert_work,
            sa.and_(work.vehicle_id == alert.vehicle_id, work.alert_id == alert.alert_id),
        )
        .where(work.verdict.is_not(None), alert.origin == "model", alert.model_release == champion.release)
        .group_by(alert.failure_type)
    )  # fmt: skip
    return {
        r.failure_type: Judgements(int(r.confirmed), r.judged - int(r.confirmed))
        for r in await connection.execute(query)
    }


def _drifted(champion: Champion | None, since_s: float) -> tuple[sa.ColumnElement[bool], ...]:
    """Of the champion's reference; of any where none is known: old releases drift on their own."""
    told = (_FLEET_WIDE, _alert.raised_at_s >= since_s)
    return told if champion is None else (*told, _alert.reference == champion.reference)


async def drift_alerts(
    connection: AsyncConnection, champion: Champion | None, since_s: float | None
) -> list[dict[str, Any]]:
    """Return the drift alerts that the trigger counts, raised since then, the newest first."""
    query = (
        sa.select(tables.drift_alert)
        .where(*_drifted(champion, since_s or 0.0))
        .order_by(_alert.drift_alert_id.desc())
        .limit(MOST_ALERTS)
    )
    return [dict(row) for row in (await connection.execute(query)).mappings()]
