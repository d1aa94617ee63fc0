"""The statements that write, in a transaction that the caller holds. Every one may run twice with the same effect."""

import hashlib
from collections.abc import Sequence
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from cloud.store import drift_rows, sample_rows, tables
from cloud.store.alert_fold import Told, fold
from cloud.store.items import (
    CurrentItem,
    EventItem,
    Item,
    ParkItem,
    RefusedItem,
    StatusItem,
    TelemetryCommit,
    Written,
    folded,
)
from edge_agent.contract import messages
from edge_agent.contract.messages import Alert, DriftCounts, Loss, ReplaySummary, Sample, Status

SERVER_STREAM = "server"  # events decided here, from frames that came over HTTP; no vehicle may use this stream
MAX_PARKED = 10_000  # newer messages kept a vehicle; a vehicle repeats what is not acknowledged, so this is no loss
EXAMPLE_BYTES = 512  # of a refused payload: enough to recognise it
FOLD_ALERTS = 200  # in one statement: SQLite takes 32,766 values, an older one 999
_STATUS_COLUMNS = ("make", "source", "model_release", "model_name", "model_sha256", "clock_trusted", "last_arrival")


def insert(connection: AsyncConnection, table: sa.Table) -> "sqlite.Insert | postgresql.Insert":
    """Return the dialect's INSERT that knows ON CONFLICT."""
    return postgresql.insert(table) if connection.dialect.name == "postgresql" else sqlite.insert(table)


async def write(connection: AsyncConnection, items: Sequence[Item], received_at_s: float) -> Written:
    """Write a batch. Statuses and states of one vehicle take effect in the order given."""
    events = [item for item in items if isinstance(item, EventItem)]
    seen = dict.fromkeys(item.vehicle_id for item in events)
    await _touch(connection, list(seen), received_at_s)
    over = await sample_rows.over_quota(connection, events)
    refused = frozenset(item.key for item in over)
    events = [item for item in events if item.key not in refused]
    stored = await _store_events(connection, events, received_at_s)
    await _replays(connection, events)
    await _statuses(connection, [item for item in items if isinstance(item, StatusItem)], received_at_s)
    for item in items:
        if isinstance(item, CurrentItem):
            await _current(connection, item, received_at_s)
        elif isinstance(item, ParkItem):
            await _park(connection, item, received_at_s)
    quota = f"samples of more than {sample_rows.QUOTA_BYTES} bytes of this vehicle wait for parts"
    full = [RefusedItem("sample_quota", item.topic, quota, b"") for item in over]
    await _count_refused(connection, [*full, *(item for item in items if isinstance(item, RefusedItem))], received_at_s)
    return Written(stored=stored, duplicates=len(events) - stored, refused=refused)


async def write_telemetry(connection: AsyncConnection, step: TelemetryCommit, received_at_s: float) -> Written:
    """Store what a vehicle's server-side pipeline said together with the state it said it from."""
    await _touch(connection, [step.vehicle_id], received_at_s)
    values: dict[str, Any] = {
        "last_seen_at_s": received_at_s, "channel": "http", "state": "online", "make": step.make, "source": "http",
        "model_release": step.model_release, "model_name": step.model_name, "model_sha256": step.model_sha256,
    }  # fmt: skip
    if step.last_arrival is not None:
        values["last_arrival"] = step.last_arrival
    if step.scores is not None:
        values["scores"] = msgspec.json.encode(step.scores).decode()
    await connection.execute(
        sa.update(tables.vehicle).where(tables.vehicle.c.vehicle_id == step.vehicle_id).values(values)
    )
    if step.snapshot is not None:
        row = {
            "vehicle_id": step.vehicle_id, "make": step.make, "period_s": step.period_s, "cells": step.cells,
            "probes": step.probes, "snapshot": step.snapshot, "updated_at_s": received_at_s,
        }  # fmt: skip
        await _upsert(connection, tables.pipeline_state, row, ("vehicle_id",))
    return await _store_server_events(connection, step, received_at_s)


async def _store_server_events(connection: AsyncConnection, step: TelemetryCommit, received_at_s: float) -> Written:
    event = tables.event.c
    stored = duplicates = 0
    for wanted in step.events:
        known = await connection.scalar(
            sa.select(event.ingest_id)
            .where(event.vehicle_id == step.vehicle_id, event.event_id == wanted.event_id)
            .where(event.stream_id == SERVER_STREAM)
        )
        if known is not None:  # decided again by a pipeline that was rebuilt: the same transition, told once
            duplicates += 1
            continue
        newest = await connection.scalar(
            sa.select(sa.func.max(event.seq))
            .where(event.vehicle_id == step.vehicle_id, event.stream_id == SERVER_STREAM)
        )  # fmt: skip
        envelope = wanted.build(SERVER_STREAM, (newest or 0) + 1)
        body = messages.encode(envelope)
        checked, data = messages.decode_event(body, step.vehicle_id)
        item = EventItem(step.vehicle_id, wanted.topic, checked, folded(data), body)
        stored += await _store_events(connection, [item], received_at_s)
    return Written(stored=stored, duplicates=duplicates)


async def _touch(connection: AsyncConnection, vehicle_ids: list[str], received_at_s: float) -> None:
    """Make sure that these vehicles have a row, and say that they were seen."""
    if not vehicle_ids:
        return
    statement = insert(connection, tables.vehicle)
    rows = [
        {
            "vehicle_id": vehicle_id, "first_seen_at_s": received_at_s, "last_seen_at_s": received_at_s,
            "channel": "mqtt", "state": "unknown",
        }
        for vehicle_id in sorted(vehicle_ids)
    ]  # fmt: skip
    await connection.execute(
        statement.on_conflict_do_update(
            index_elements=["vehicle_id"], set_={"last_seen_at_s": statement.excluded.last_seen_at_s}
        ),
        rows,
    )


async def _store_events(connection: AsyncConnection, events: list[EventItem], received_at_s: float) -> int:
    if not events:
        return 0
    unique: dict[tuple[str, str, int], EventItem] = {}
    for item in events:
        unique.setdefault(item.key, item)  # the first of each, as the database would keep it
    rows = [_event_row(item, received_at_s) for item in unique.values()]
    columns = tables.event.c
    statement = (
        insert(connection, tables.event)
        .on_conflict_do_nothing(index_elements=["vehicle_id", "stream_id", "seq"])
        .returning(columns.ingest_id, columns.vehicle_id, columns.stream_id, columns.seq)
    )
    new = {(r.vehicle_id, r.stream_id, r.seq): r.ingest_id for r in await connection.execute(statement, rows)}
    losses, alerts = [], set()
    drift: list[tuple[int, EventItem, float]] = []
    samples: list[tuple[int, EventItem, float]] = []
    for key, ingest_id in new.items():
        item = unique[key]
        if isinstance(item.data, Loss):
            losses.append(_loss_row(item, item.data, ingest_id))
        elif isinstance(item.data, Alert):
            alerts.add((item.vehicle_id, item.data.alert_id))
        elif isinstance(item.data, DriftCounts):
            drift.append((ingest_id, item, received_at_s))
        elif isinstance(item.data, Sample):
            samples.append((ingest_id, item, received_at_s))
    if losses:
        await connection.execute(insert(connection, tables.loss).on_conflict_do_nothing(), losses)
    await _fold_alerts(connection, alerts)
    await drift_rows.add(connection, drift)
    await sample_rows.add(connection, samples)
    return len(new)


def _event_row(item: EventItem, received_at_s: float) -> dict[str, Any]:
    envelope = item.envelope
    return {
        "vehicle_id": item.vehicle_id, "stream_id": envelope.streamid, "seq": envelope.seq, "event_id": envelope.id,
        "type": envelope.type, "topic": item.topic, "time": envelope.time, "boot_id": envelope.bootid,
        "clock_trusted": envelope.clocktrusted, "replayed": envelope.replayed,
        "alert_id": item.data.alert_id if isinstance(item.data, Alert) else None,
        # a sample's payload waits for the lake in sample_part: kept once, not twice
        "received_at_s": received_at_s, "body": b"" if isinstance(item.data, Sample) else item.body,
    }  # fmt: skip


def _loss_row(item: EventItem, told: Loss, ingest_id: int) -> dict[str, Any]:
    return {
        "ingest_id": ingest_id, "vehicle_id": item.vehicle_id, "stream_id": told.stream_id, "stream": told.stream,
        "first_seq": told.first_seq, "last_seq": told.last_seq, "count": told.count, "reason": told.reason,
        "time": item.envelope.time,
    }  # fmt: skip


async def _fold_alerts(connection: AsyncConnection, alerts: set[tuple[str, str]]) -> None:
    event = tables.event.c
    ordered = sorted(alerts)
    for first in range(0, len(ordered), FOLD_ALERTS):
        chunk = ordered[first : first + FOLD_ALERTS]
        found = await connection.execute(
            sa.select(event.ingest_id, event.received_at_s, event.vehicle_id, event.alert_id, event.body)
            .where(sa.tuple_(event.vehicle_id, event.alert_id).in_(chunk))
        )  # fmt: skip
        told: dict[tuple[str, str], list[Told]] = {}
        for r in found:
            told.setdefault((r.vehicle_id, r.alert_id), []).append(
                Told(r.ingest_id, r.received_at_s, r.vehicle_id, r.body)
            )
        rows = [fold(transitions) for transitions in told.values()]
        statement = insert(connection, tables.alert)
        changed = {name: statement.excluded[name] for name in rows[0] if name not in ("vehicle_id", "alert_id")}
        await connection.execute(
            statement.on_conflict_do_update(index_elements=["vehicle_id", "alert_id"], set_=changed), rows
        )


async def _replays(connection: AsyncConnection, events: list[EventItem]) -> None:
    """Show a vehicle that is known by a recording alone as what the recording says; a live one's row stays its own."""
    for item in events:
        if item.envelope.type != messages.TYPE_PREFIX + "replay":
            continue
        _, said = messages.decode_event(item.body, item.vehicle_id)
        if isinstance(said, ReplaySummary):
            await connection.execute(
                sa.update(tables.vehicle)
                .where(tables.vehicle.c.vehicle_id == item.vehicle_id, tables.vehicle.c.state == "unknown")
                .values(source="replay", model_release=said.model_release, last_arrival=said.last_time)
            )


async def _statuses(connection: AsyncConnection, items: list[StatusItem], received_at_s: float) -> None:
    live = dict.fromkeys(item.vehicle_id for item in items if not item.retained)
    await _touch(connection, list(live), received_at_s)
    vehicle = tables.vehicle.c
    for item in items:
        known = (
            await connection.execute(
                sa.select(vehicle.status, vehicle.scores, vehicle.first_seen_at_s, vehicle.last_seen_at_s)
                .where(vehicle.vehicle_id == item.vehicle_id)
            )
        ).first()  # fmt: skip
        row: dict[str, Any] = {
            "vehicle_id": item.vehicle_id,
            "first_seen_at_s": known.first_seen_at_s if known else received_at_s,
            "last_seen_at_s": known.last_seen_at_s if known else received_at_s,
            "channel": "mqtt",
            **_status_values(item.status, known.status if known else "{}"),
        }
        await _upsert(connection, tables.vehicle, row, ("vehicle_id",))


def _status_values(status: Status, known: str) -> dict[str, Any]:
    """Columns that this status sets. What it leaves unset stays: the last will says only "offline"."""
    said = msgspec.to_builtins(status)
    values: dict[str, Any] = {"state": said.pop("state")}
    for name in _STATUS_COLUMNS:
        if name in said:
            values[name] = said.pop(name)
    if values["state"] == "offline":  # a last will was written at connect time: its clock says nothing about now
        values.pop("clock_trusted", None)
        said = {name: value for name, value in said.items() if name not in ("boot_id", "time")}
    scores = said.pop("scores", None)
    if scores is not None:
        values["scores"] = msgspec.json.encode(scores).decode()
    values["status"] = msgspec.json.encode({**msgspec.json.decode(known), **said}).decode()
    return values


async def _current(connection: AsyncConnection, item: CurrentItem, received_at_s: float) -> None:
    if item.current is None:
        column = tables.current.c
        await connection.execute(
            sa.delete(tables.current)
            .where(column.vehicle_id == item.vehicle_id, column.failure_type == item.failure_type)
        )  # fmt: skip
        return
    row = {
        "vehicle_id": item.vehicle_id, "failure_type": item.failure_type, "alert_id": item.current.alert_id,
        "severity": item.current.severity, "received_at_s": received_at_s, "body": item.body,
    }  # fmt: skip
    await _upsert(connection, tables.current, row, ("vehicle_id", "failure_type"))


async def _park(connection: AsyncConnection, item: ParkItem, received_at_s: float) -> None:
    column = tables.parked.c
    kept = await connection.scalar(sa.select(sa.func.count()).where(column.vehicle_id == item.vehicle_id))
    if (kept or 0) >= MAX_PARKED:
        full = RefusedItem("parked_full", item.topic, f"{MAX_PARKED} newer messages are parked already", item.body)
        await _count_refused(connection, [full], received_at_s)
        return
    row = {
        "vehicle_id": item.vehicle_id, "topic": item.topic, "body": item.body, "received_at_s": received_at_s,
        "body_sha256": hashlib.sha256(item.body).hexdigest(),
    }  # fmt: skip
    await connection.execute(insert(connection, tables.parked).on_conflict_do_nothing(), [row])


async def _count_refused(connection: AsyncConnection, items: list[RefusedItem], received_at_s: float) -> None:
    by_reason: dict[str, list[RefusedItem]] = {}
    for item in items:
        by_reason.setdefault(item.reason, []).append(item)
    for reason, found in sorted(by_reason.items()):
        last = found[-1]
        statement = insert(connection, tables.refused).values(
            reason=reason, count=len(found), last_topic=_printable(last.topic), last_detail=_printable(last.detail),
            last_payload=last.payload[:EXAMPLE_BYTES], last_at_s=received_at_s,
        )  # fmt: skip
        new = statement.excluded
        await connection.execute(
            statement.on_conflict_do_update(
                index_elements=["reason"],
                set_={
                    "count": tables.refused.c.count + new.count, "last_topic": new.last_topic,
                    "last_detail": new.last_detail, "last_payload": new.last_payload, "last_at_s": new.last_at_s,
                },
            )
        )  # fmt: skip


def _printable(text: str) -> str:
    """Return text that any database and any page can hold: no NUL, no control characters, no lone surrogates."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[:512])


async def _upsert(connection: AsyncConnection, table: sa.Table, row: dict[str, Any], key: tuple[str, ...]) -> None:
    statement = insert(connection, table).values(row)
    changed = {name: statement.excluded[name] for name in row if name not in key}
    await connection.execute(statement.on_conflict_do_update(index_elements=list(key), set_=changed))
