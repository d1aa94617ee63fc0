"""What the API shows of samples: totals, and a page of them."""

from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from cloud.store import tables

DAY_S = 86_400
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class SampleFilter:
    """Which samples; None means any."""

    states: tuple[str, ...] | None = None
    vehicle_id: str | None = None
    reason: str | None = None
    alert_id: str | None = None


@dataclass(frozen=True, slots=True)
class Total:
    """How many samples of one kind there are, and their packed bytes."""

    state: str
    reason: str
    day: int  # of arrival: whole days since 1970, UTC
    samples: int
    bytes: int


async def totals(connection: AsyncConnection) -> list[Total]:
    """Return the numbers of samples by state, reason and day of arrival."""
    sample = tables.sample.c
    day = sa.cast(sa.func.floor(sample.received_at_s / DAY_S), sa.Integer).label("day")
    query = sa.select(
        sample.state, sample.reason, day, sa.func.count().label("samples"), sa.func.sum(sample.length).label("bytes")
    ).group_by(sample.state, sample.reason, day)
    return [
        Total(row.state, row.reason, int(row.day), int(row.samples), int(row.bytes))
        for row in await connection.execute(query)
    ]


async def by_state(connection: AsyncConnection) -> dict[str, int]:
    """Return the numbers of samples by state; quick, from an index."""
    sample = tables.sample.c
    query = sa.select(sample.state, sa.func.count().label("samples")).group_by(sample.state)
    return {row.state: int(row.samples) for row in await connection.execute(query)}


async def page(connection: AsyncConnection, wanted: SampleFilter, *, before: int | None, limit: int) -> list[Row]:
    """Return up to `limit` samples, the newest arrival first, beginning behind ingest id `before`."""
    sample = tables.sample.c
    query = sa.select(tables.sample).order_by(sample.ingest_id.desc()).limit(limit)
    if before is not None:
        query = query.where(sample.ingest_id < before)
    if wanted.states is not None:
        query = query.where(sample.state.in_(wanted.states))
    for name in ("vehicle_id", "reason", "alert_id"):
        value = getattr(wanted, name)
        if value is not None:
            query = query.where(sample[name] == value)
    return [dict(row) for row in (await connection.execute(query)).mappings()]
