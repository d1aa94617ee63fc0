"""Drift as rows: where in time, and against which bins, the counts of each message belong; references; drift alerts.

The counts themselves stay in the event's body. A message for a reference that is not known here waits: it is stored,
listed, and counts from the moment its reference is registered. One whose counts do not fit the bins is set aside with
its problem, told and never added. Reading is by vehicle and in chunks, so that memory holds one vehicle's sums.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from cloud.drift.bins import MOST_WINDOWS, Bins, CountsError, IntArray, read_bins
from cloud.drift.decide import Changes, Judged, Open, Scope
from cloud.store import tables
from cloud.store.items import EventItem
from cloud.store.wire_time import unix_s
from edge_agent.contract.bundle import Manifest
from edge_agent.contract.messages import DriftCounts

CHUNK = 200  # messages of some 6 kB read at a time, and decoded in a thread: 20 ms
_LOCK = 0x766F6C7464726966  # "voltdrif": PostgreSQL's advisory locks are 64-bit numbers
BEFORE = "counted before: this event came in another stream too"
MOST_LISTED = 100  # unknown references, and problems, in one answer

_drift = tables.drift.c
_known = tables.drift_reference.c
_alert = tables.drift_alert.c
# a row of an older release may say 2**62, of which two are more than SQLite adds up
_windows = sa.func.sum(sa.case((_drift.windows > MOST_WINDOWS, MOST_WINDOWS), else_=_drift.windows)).label("windows")


class _Body(msgspec.Struct, frozen=True):
    """The one part of a stored event that is read again."""

    data: DriftCounts


@dataclass(frozen=True, slots=True)
class Known:
    """A registered reference."""

    reference: str
    model_release: int
    model_name: str
    first_seen_at_s: float
    body: bytes
    window_spec: str = "{}"  # JSON

    @property
    def bins(self) -> Bins:
        """The bins, read once a process."""
        return read_bins(self.body, self.window_spec)


@dataclass(frozen=True, slots=True)
class Span:
    """From, inclusive, to, exclusive; Unix seconds."""

    from_s: float
    to_s: float


@dataclass(frozen=True, slots=True)
class Total:
    """How many windows a vehicle has in a stratum."""

    vehicle_id: str
    make: str
    stratum: str
    windows: int
    messages: int


async def add(connection: AsyncConnection, rows: list[tuple[int, EventItem, float]]) -> None:
    """Insert one row for each new drift event: (ingest_id, item, received_at_s).

    An event id of a vehicle counts once against a reference, whatever stream it came in: an outbox that was made anew,
    or a recording replayed again, tells the same counts under another stream. To be called where the vehicles' rows
    were written before in this transaction: two collectors with the same event then wait for each other.
    """
    told = [(i, item, item.data, at) for i, item, at in rows if isinstance(item.data, DriftCounts)]
    if not told:
        return
    bins = {k.reference: k.bins for k in await known(connection, {counts.reference for _, _, counts, _ in told})}
    before = await _counted_before(connection, {(item.vehicle_id, item.envelope.id) for _, item, _, _ in told})
    values: list[dict[str, object]] = []
    for ingest_id, item, counts, at in sorted(told, key=lambda one: one[0]):
        problem = _problem(bins.get(counts.reference), counts)
        name = (item.vehicle_id, item.envelope.id, counts.reference)
        if not problem:
            problem = BEFORE if name in before else ""
            before.add(name)
        values.append(_row(ingest_id, item, counts, at) | {"problem": problem})
    await connection.execute(sa.insert(tables.drift), values)


async def _counted_before(connection: AsyncConnection, names: set[tuple[str, str]]) -> set[tuple[str, str, str]]:
    """Return the (vehicle, event id, reference) that count already, of these (vehicle, event id)."""
    event = tables.event.c
    found: set[tuple[str, str, str]] = set()
    ordered = sorted(names)
    for first in range(0, len(ordered), CHUNK):
        query = (
            sa.select(event.vehicle_id, event.event_id, _drift.reference)
            .join(tables.drift, _drift.ingest_id == event.ingest_id)
            .where(sa.tuple_(event.vehicle_id, event.event_id).in_(ordered[first : first + CHUNK]))
            .where(_drift.problem == "")
        )
        found |= {(r.vehicle_id, r.event_id, r.reference) for r in await connection.execute(query)}
    return found


def _row(ingest_id: int, item: EventItem, counts: DriftCounts, received_at_s: float) -> dict[str, object]:
    dated = item.envelope.clocktrusted or item.envelope.replayed
    return {
        "ingest_id": ingest_id, "vehicle_id": item.vehicle_id, "reference": counts.reference,
        "model_release": counts.model_release, "windows": counts.windows,
        "stratum": counts.variables[0].stratum if counts.variables else "all",
        "at_s": unix_s(counts.last_time) if dated else received_at_s,
    }  # fmt: skip


def _problem(bins: Bins | None, counts: DriftCounts) -> str:
    if bins is None:
        return ""
    try:
        bins.row(counts)
    except CountsError as error:
        return str(error)
    return ""


async def register(
    connection: AsyncConnection, reference: str, manifest: Manifest, body: bytes, at_s: float
) -> bool:  # fmt: skip
    """Make a reference known, and check what waited for it; False when it was known already."""
    await _alone(connection)
    if await connection.scalar(sa.select(_known.reference).where(_known.reference == reference)) is not None:
        return False
    window_spec = msgspec.json.encode(manifest.window).decode()
    bins = read_bins(body, window_spec)
    await connection.execute(
        sa.insert(tables.drift_reference).values(
            reference=reference, model_release=manifest.release, model_name=manifest.name,
            window_spec=window_spec, body=body, first_seen_at_s=at_s,
        )
    )  # fmt: skip
    after = 0
    while chunk := await _bodies(connection, after, _drift.reference == reference):
        await set_aside(connection, await asyncio.to_thread(_misfits, bins, chunk))
        after = chunk[-1][0]
    return True


async def _alone(connection: AsyncConnection) -> None:
    """Let one transaction at a time look and then write; of SQLite's a writing one is alone anyway."""
    if connection.dialect.name == "postgresql":
        await connection.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})


async def set_aside(connection: AsyncConnection, wrong: Sequence[tuple[int, str]]) -> None:
    """Say of these messages, (ingest_id, problem), that their counts do not count."""
    if wrong:
        statement = sa.update(tables.drift).where(_drift.ingest_id == sa.bindparam("row"))
        await connection.execute(
            statement.values(problem=sa.bindparam("what")), [{"row": i, "what": what} for i, what in wrong]
        )


def _misfits(bins: Bins, chunk: list[tuple[int, bytes]]) -> list[tuple[int, str]]:
    return [(i, problem) for i, body in chunk if (problem := _problem(bins, _decoder.decode(body).data))]


async def _bodies(
    connection: AsyncConnection, after: int, *where: sa.ColumnElement[bool]
) -> list[tuple[int, bytes]]:  # fmt: skip
    query = (
        sa.select(_drift.ingest_id, tables.event.c.body)
        .join(tables.event, tables.event.c.ingest_id == _drift.ingest_id)
        .where(_drift.ingest_id > after, *where)
        .order_by(_drift.ingest_id)
        .limit(CHUNK)
    )
    return [(r.ingest_id, r.body) for r in await connection.execute(query)]


_decoder = msgspec.json.Decoder(_Body)


async def known(connection: AsyncConnection, references: set[str] | None = None) -> list[Known]:
    """Return the registered references (of these), the newest release first."""
    query = sa.select(tables.drift_reference).order_by(_known.model_release.desc(), _known.reference)
    if references is not None:
        query = query.where(_known.reference.in_(sorted(references)))
    return [
        Known(r.reference, r.model_release, r.model_name, r.first_seen_at_s, bytes(r.body), r.window_spec)
        for r in await connection.execute(query)
    ]


async def newest(connection: AsyncConnection) -> int:
    """Return the ingest id of the newest drift message, 0 where there is none."""
    return await connection.scalar(sa.select(sa.func.max(_drift.ingest_id))) or 0


async def references_counted(connection: AsyncConnection, span: Span) -> list[Known]:
    """Return the registered references that counts of this span belong to."""
    there = sa.select(_drift.reference).where(_drift.at_s >= span.from_s, _drift.at_s < span.to_s).distinct()
    found = {r.reference for r in await connection.execute(there)}
    return await known(connection, found) if found else []


async def totals(
    connection: AsyncConnection, reference: str, span: Span, *, up_to: int, vehicle_id: str | None = None,
    make: str | None = None,
) -> list[Total]:  # fmt: skip
    """Return what each vehicle counted in each stratum, in the order of their ids; cheap, as no counts are read."""
    query = (
        sa.select(
            _drift.vehicle_id, tables.vehicle.c.make, _drift.stratum,
            _windows, sa.func.count().label("messages"),
        )
        .join(tables.vehicle, tables.vehicle.c.vehicle_id == _drift.vehicle_id)
        .where(*_counted(reference, span, up_to))
        .group_by(_drift.vehicle_id, tables.vehicle.c.make, _drift.stratum)
        .order_by(_drift.vehicle_id, _drift.stratum)
    )  # fmt: skip
    if vehicle_id is not None:
        query = query.where(_drift.vehicle_id == vehicle_id)
    if make is not None:
        query = query.where(tables.vehicle.c.make == make)
    return [Total(r.vehicle_id, r.make, r.stratum, int(r.windows), r.messages) for r in await connection.execute(query)]


def _counted(reference: str, span: Span, up_to: int) -> tuple[sa.ColumnElement[bool], ...]:
    return (
        _drift.reference == reference, _drift.at_s >= span.from_s, _drift.at_s < span.to_s, _drift.problem == "",
        _drift.ingest_id <= up_to,
    )  # fmt: skip


async def messages_counted(
    connection: AsyncConnection, span: Span, *, vehicle_id: str | None = None, make: str | None = None,
    stratum: str | None = None,
) -> int:  # fmt: skip
    """Return how many messages a look at this span would read."""
    query = sa.select(sa.func.count()).select_from(tables.drift)
    query = query.where(_drift.at_s >= span.from_s, _drift.at_s < span.to_s, _drift.problem == "")
    query = query.where(_drift.reference.in_(sa.select(_known.reference)))
    if vehicle_id is not None:
        query = query.where(_drift.vehicle_id == vehicle_id)
    if stratum is not None:
        query = query.where(_drift.stratum == stratum)
    if make is not None:
        query = query.where(
            _drift.vehicle_id.in_(sa.select(tables.vehicle.c.vehicle_id).where(tables.vehicle.c.make == make))
        )
    return await connection.scalar(query) or 0


async def vehicle_sums(
    connection: AsyncConnection,
    known_reference: Known,
    span: Span,
    vehicle_id: str,
    *,
    up_to: int,
    stratum: str | None = None,
) -> tuple[dict[str, IntArray], list[tuple[int, str]]]:
    """Add up one vehicle's counts by stratum; and name the messages, (ingest_id, problem), that do not fit.

    Decoding and adding is done in a thread, chunk by chunk: a fleet's takes many seconds, and others want answers.
    """
    bins = known_reference.bins
    sums: dict[str, IntArray] = {}
    wrong: list[tuple[int, str]] = []
    after = 0
    where: tuple[sa.ColumnElement[bool], ...] = (
        _drift.vehicle_id == vehicle_id,
        *_counted(known_reference.reference, span, up_to),
    )
    if stratum is not None:
        where += (_drift.stratum == stratum,)
    while chunk := await _bodies(connection, after, *where):
        await asyncio.to_thread(_add_up, bins, chunk, sums, wrong)
        after = chunk[-1][0]
        if len(chunk) < CHUNK:
            break
    return sums, wrong


def _add_up(
    bins: Bins, chunk: list[tuple[int, bytes]], sums: dict[str, IntArray], wrong: list[tuple[int, str]]
) -> None:
    for ingest_id, body in chunk:
        counts = _decoder.decode(body).data
        try:
            row = bins.row(counts)
        except CountsError as error:  # stored while its reference was being registered, or by an older release
            wrong.append((ingest_id, str(error)))
            continue
        stratum = counts.variables[0].stratum
        held = sums.get(stratum)
        if held is None:
            sums[stratum] = np.array(row)
        else:
            held += row


async def waiting(connection: AsyncConnection, span: Span, vehicle_id: str | None = None) -> list[dict[str, Any]]:
    """Return the references that nobody registered, with how much waits for each."""
    query = (
        sa.select(
            _drift.reference, sa.func.min(_drift.model_release).label("first_release"),
            sa.func.max(_drift.model_release).label("last_release"), sa.func.count().label("messages"),
            _windows,
            sa.func.count(sa.distinct(_drift.vehicle_id)).label("vehicles"),
        )
        .where(_drift.at_s >= span.from_s, _drift.at_s < span.to_s)
        .where(_drift.reference.not_in(sa.select(_known.reference)))
        .group_by(_drift.reference)
        .order_by(sa.func.count().desc(), _drift.reference)
        .limit(MOST_LISTED)
    )  # fmt: skip
    if vehicle_id is not None:
        query = query.where(_drift.vehicle_id == vehicle_id)
    return [dict(row) for row in (await connection.execute(query)).mappings()]


async def problems(connection: AsyncConnection, span: Span, vehicle_id: str | None = None) -> list[dict[str, Any]]:
    """Return why counts were set aside, and how often, by reference."""
    query = (
        sa.select(
            _drift.reference, _drift.problem, sa.func.count().label("messages"),
            sa.func.count(sa.distinct(_drift.vehicle_id)).label("vehicles"),
        )
        .where(_drift.problem != "", _drift.at_s >= span.from_s, _drift.at_s < span.to_s)
        .group_by(_drift.reference, _drift.problem)
        .order_by(sa.func.count().desc(), _drift.problem)
        .limit(MOST_LISTED)
    )  # fmt: skip
    if vehicle_id is not None:
        query = query.where(_drift.vehicle_id == vehicle_id)
    return [dict(row) for row in (await connection.execute(query)).mappings()]


async def vehicle_known(connection: AsyncConnection, vehicle_id: str) -> bool:
    """Whether this vehicle was ever heard of."""
    found = sa.select(tables.vehicle.c.vehicle_id).where(tables.vehicle.c.vehicle_id == vehicle_id)
    return await connection.scalar(found) is not None


async def open_alerts(
    connection: AsyncConnection, reference: str
) -> dict[tuple[Scope, str], list[Open]]:  # fmt: skip
    """Return the open drift alerts against a reference, by scope and its id."""
    query = sa.select(tables.drift_alert).where(_alert.reference == reference, _alert.cleared_at_s.is_(None))
    found: dict[tuple[Scope, str], list[Open]] = {}
    for r in await connection.execute(query):
        found.setdefault((r.scope, r.scope_id), []).append(
            Open(r.drift_alert_id, r.variable, r.stratum, r.updated_at_s)
        )
    return found


async def references_alerted(connection: AsyncConnection) -> list[Known]:
    """Return the references with open alerts: they are to be cleared even where nothing is counted any more."""
    query = sa.select(_alert.reference).where(_alert.cleared_at_s.is_(None)).distinct()
    found = {r.reference for r in await connection.execute(query)}
    return await known(connection, found) if found else []


async def write_changes(
    connection: AsyncConnection, reference: Known, scope: Scope, scope_id: str, changes: Changes, at_s: float
) -> None:
    """Write what one evaluation of a scope changed; what another server has raised meanwhile is raised once."""
    await _alone(connection)
    there = {
        (r.variable, r.stratum)
        for r in await connection.execute(
            sa.select(_alert.variable, _alert.stratum).where(
                _alert.reference == reference.reference, _alert.scope == scope, _alert.scope_id == scope_id,
                _alert.cleared_at_s.is_(None),
            )
        )
    }  # fmt: skip
    raised = [one for one in changes.raised if (one.variable, one.stratum) not in there]
    if raised:
        rows = [
            {
                "scope": scope, "scope_id": scope_id, "reference": reference.reference,
                "model_release": reference.model_release, "stratum": one.stratum, "variable": one.variable,
                "kind": one.kind, "measure": "psi", "raised_at_s": at_s, **_figures(one, at_s),
            }
            for one in raised
        ]  # fmt: skip
        await connection.execute(sa.insert(tables.drift_alert), rows)
    for alert_id, one in changes.updated:
        await connection.execute(
            sa.update(tables.drift_alert).where(_alert.drift_alert_id == alert_id).values(_figures(one, at_s))
        )
    if changes.cleared:
        await connection.execute(
            sa.update(tables.drift_alert)
            .where(_alert.drift_alert_id.in_(changes.cleared))
            .values(cleared_at_s=at_s, updated_at_s=at_s)
        )


def _figures(one: Judged, at_s: float) -> dict[str, Any]:
    assert one.distances is not None and one.threshold is not None  # noqa: PT018, S101 - a verdict has both
    return {
        "value": one.distances.psi, "threshold": one.threshold, "windows": one.size.windows,
        "vehicles": one.size.vehicles, "updated_at_s": at_s,
    }  # fmt: skip


@dataclass(frozen=True, slots=True)
class AlertWanted:
    """Which drift alerts; None means any."""

    scope: str | None = None
    scope_id: str | None = None
    is_open: bool | None = None
    since_s: float | None = None


async def alerts(
    connection: AsyncConnection, wanted: AlertWanted, *, before: int | None, limit: int
) -> list[dict[str, Any]]:
    """Return up to `limit` drift alerts, the newest first, beginning behind id `before`."""
    query = sa.select(tables.drift_alert).order_by(_alert.drift_alert_id.desc()).limit(limit)
    if before is not None:
        query = query.where(_alert.drift_alert_id < before)
    if wanted.scope is not None:
        query = query.where(_alert.scope == wanted.scope)
    if wanted.scope_id is not None:
        query = query.where(_alert.scope_id == wanted.scope_id)
    if wanted.is_open is not None:
        query = query.where(_alert.cleared_at_s.is_(None) if wanted.is_open else _alert.cleared_at_s.is_not(None))
    if wanted.since_s is not None:
        query = query.where(_alert.raised_at_s >= wanted.since_s)
    return [dict(row) for row in (await connection.execute(query)).mappings()]
