"""What people do about alerts, as rows: an append-only log, and beside it where each alert's work stands.

Both are written in one transaction, after the alert's own row is locked (PostgreSQL: FOR UPDATE; SQLite: the writer's
BEGIN IMMEDIATE), so that actions on one alert take effect one after the other. A commit whose answer was lost may be
repeated: `life_cycle.judge` knows the action again. What is allowed is decided there, not here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from cloud.alert_work.life_cycle import VERDICTS, Action, Refused, Repeated, Work, judge
from cloud.store import tables
from cloud.store.reading import Row
from cloud.store.writing import insert

alert, alert_action, alert_work = tables.alert.c, tables.alert_action.c, tables.alert_work.c


@dataclass(frozen=True, slots=True)
class LabelFilter:
    """Which labels; None means any. `since_s` is when the label was given or changed last, Unix seconds."""

    vehicle_id: str | None = None
    verdict: str | None = None
    failure_type: str | None = None  # the label's, after correction
    since_s: float | None = None


@dataclass(frozen=True, slots=True)
class Done:
    """An action that is on record, and the work as it now stands; `repeated`: it was on record before."""

    action: Action
    work: Work
    repeated: bool


async def found(
    connection: AsyncConnection, alert_id: str, vehicle_id: str | None = None, *, lock: bool = False
) -> list[Row]:
    """Return the alerts of this id, at most two of them: (vehicle_id, alert_id, failure_type, severity).

    An id is one vehicle's, unless a vehicle made up another's; `vehicle_id` then tells them apart. `lock`: until the
    end of this transaction nobody else acts on them.
    """
    query = (
        sa.select(alert.vehicle_id, alert.alert_id, alert.failure_type, alert.severity)
        .where(alert.alert_id == alert_id)
        .order_by(alert.vehicle_id)
        .limit(2)
    )
    if vehicle_id is not None:
        query = query.where(alert.vehicle_id == vehicle_id)
    if lock:
        query = query.with_for_update()
    return [dict(row) for row in (await connection.execute(query)).mappings()]


async def act(
    connection: AsyncConnection, target: Row, action: Action, *, revises: int | None = None
) -> Done | Refused:
    """Take one action on an alert that `found` returned locked."""
    vehicle_id, alert_id = target["vehicle_id"], target["alert_id"]
    of_alert = (alert_action.vehicle_id == vehicle_id, alert_action.alert_id == alert_id)
    present = await work(connection, vehicle_id, alert_id)
    decision = judge(
        present, action, told_type=target["failure_type"], told_severity=target["severity"], revises=revises,
        own=await _newest(connection, *of_alert, alert_action.actor == action.actor),
        labelled=await _newest(connection, *of_alert, alert_action.action.in_(tuple(VERDICTS))),
    )  # fmt: skip
    if isinstance(decision, Refused):
        return decision
    if isinstance(decision, Repeated):
        return Done(decision.action, present, repeated=True)
    key = {"vehicle_id": vehicle_id, "alert_id": alert_id}
    told = {
        "action": action.action, "actor": action.actor, "reason": action.reason, "failure_type": action.failure_type,
        "severity": action.severity, "at_s": action.at_s,
    }  # fmt: skip
    action_id = await connection.scalar(
        sa.insert(tables.alert_action).values({**key, **told}).returning(alert_action.action_id)
    )
    after = decision.work
    values = {
        "state": after.state, "verdict": after.verdict, "failure_type": after.failure_type, "severity": after.severity,
        "updated_at_s": after.updated_at_s,
    }  # fmt: skip
    await connection.execute(
        insert(connection, tables.alert_work)
        .values({**key, **values})
        .on_conflict_do_update(index_elements=["vehicle_id", "alert_id"], set_=values)
    )
    return Done(replace(action, action_id=action_id), after, repeated=False)


async def work(connection: AsyncConnection, vehicle_id: str, alert_id: str) -> Work:
    """Return where an alert's work stands."""
    query = sa.select(
        alert_work.state, alert_work.verdict, alert_work.failure_type, alert_work.severity, alert_work.updated_at_s
    ).where(alert_work.vehicle_id == vehicle_id, alert_work.alert_id == alert_id)
    row = (await connection.execute(query)).mappings().first()
    return Work() if row is None else Work(**row)


async def actions(connection: AsyncConnection, vehicle_id: str, alert_id: str, *, limit: int) -> list[Action]:
    """Return the newest actions on one alert, oldest of them first."""
    query = (
        sa.select(tables.alert_action)
        .where(alert_action.vehicle_id == vehicle_id, alert_action.alert_id == alert_id)
        .order_by(alert_action.action_id.desc())
        .limit(limit)
    )
    return [_action(row) for row in reversed((await connection.execute(query)).mappings().all())]


async def labels(
    connection: AsyncConnection, wanted: LabelFilter, *, after: int | None, limit: int
) -> list[tuple[Row, Action | None]]:
    """Return up to `limit` labels in the order in which their alerts came, each with the action that gave it.

    None for the action: somebody wrote the work at the database, past the log.

    A row has the alert's columns `ingest_id`, `vehicle_id`, `alert_id`, `failure_type`, `severity`, `origin`, `rule`,
    `state`, `since`, `cleared_time`, `model_release`, `model_name`, and of the work `verdict`, `label_failure_type` and
    `label_severity` (None where the alert's stands), `work_state`, `updated_at_s`.
    """
    shown = (
        "ingest_id", "vehicle_id", "alert_id", "failure_type", "severity", "origin", "rule", "state", "since",
        "cleared_time", "model_release", "model_name",
    )  # fmt: skip
    query = (
        sa.select(
            *(alert[name] for name in shown), alert_work.verdict, alert_work.failure_type.label("label_failure_type"),
            alert_work.severity.label("label_severity"), alert_work.state.label("work_state"), alert_work.updated_at_s,
        )
        .join_from(tables.alert_work, tables.alert, _same_alert(alert_work, alert))
        .where(alert_work.verdict.is_not(None))
        .order_by(alert.ingest_id)
        .limit(limit)
    )  # fmt: skip
    if after is not None:
        query = query.where(alert.ingest_id > after)
    if wanted.vehicle_id is not None:
        query = query.where(alert_work.vehicle_id == wanted.vehicle_id)
    if wanted.verdict is not None:
        query = query.where(alert_work.verdict == wanted.verdict)
    if wanted.failure_type is not None:
        query = query.where(sa.func.coalesce(alert_work.failure_type, alert.failure_type) == wanted.failure_type)
    if wanted.since_s is not None:
        query = query.where(alert_work.updated_at_s >= wanted.since_s)
    rows = [dict(row) for row in (await connection.execute(query)).mappings()]
    gave = await _labelled(connection, [(row["vehicle_id"], row["alert_id"]) for row in rows])
    return [(row, gave.get((row["vehicle_id"], row["alert_id"]))) for row in rows]


async def _labelled(connection: AsyncConnection, keys: Sequence[tuple[str, str]]) -> dict[tuple[str, str], Action]:
    if not keys:
        return {}
    newest = (
        sa.select(sa.func.max(alert_action.action_id))
        .where(sa.tuple_(alert_action.vehicle_id, alert_action.alert_id).in_(keys))
        .where(alert_action.action.in_(tuple(VERDICTS)))
        .group_by(alert_action.vehicle_id, alert_action.alert_id)
    )
    query = sa.select(tables.alert_action).where(alert_action.action_id.in_(newest))
    rows = (await connection.execute(query)).mappings()
    return {(row["vehicle_id"], row["alert_id"]): _action(row) for row in rows}


async def _newest(connection: AsyncConnection, *conditions: sa.ColumnElement[bool]) -> Action | None:
    query = sa.select(tables.alert_action).where(*conditions).order_by(alert_action.action_id.desc()).limit(1)
    row = (await connection.execute(query)).mappings().first()
    return None if row is None else _action(row)


def _same_alert(one: Any, other: Any) -> sa.ColumnElement[bool]:
    return sa.and_(one.vehicle_id == other.vehicle_id, one.alert_id == other.alert_id)


def _action(row: sa.RowMapping) -> Action:
    return Action(
        action=row["action"], actor=row["actor"], reason=row["reason"], at_s=row["at_s"],
        failure_type=row["failure_type"], severity=row["severity"], action_id=row["action_id"],
    )  # fmt: skip
