"""Drift messages as rows: where in time, and against which bins, the counts of each belong.

The counts themselves stay in the event's body. Written in the transaction that stores the event, once.
"""

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from cloud.store import tables
from cloud.store.items import EventItem
from cloud.store.wire_time import unix_s
from edge_agent.contract.messages import DriftCounts


async def add(connection: AsyncConnection, rows: list[tuple[int, EventItem, float]]) -> None:
    """Insert one row for each new drift event: (ingest_id, item, received_at_s)."""
    values = [
        _row(ingest_id, item, item.data, received_at_s)
        for ingest_id, item, received_at_s in rows
        if isinstance(item.data, DriftCounts)
    ]
    if values:
        await connection.execute(sa.insert(tables.drift), values)


def _row(ingest_id: int, item: EventItem, counts: DriftCounts, received_at_s: float) -> dict[str, object]:
    known = item.envelope.clocktrusted or item.envelope.replayed
    return {
        "ingest_id": ingest_id, "vehicle_id": item.vehicle_id, "reference": counts.reference,
        "model_release": counts.model_release, "windows": counts.windows,
        "stratum": counts.variables[0].stratum if counts.variables else "all",
        "at_s": unix_s(counts.last_time) if known else received_at_s,
    }  # fmt: skip
