"""The end of samples that nobody can use: a step that gives their bytes back, so that no vehicle fills the store.

One whose parts did not all come within `WAIT_DAYS` of the first becomes broken, with what never came, and its parts
go. Of other broken ones, the newest `BROKEN_KEPT` of each vehicle keep their parts as long, to be looked at. The rows
themselves stay and say what happened. A collector that is just adding a part has the sample's row; it is passed over.
"""

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from cloud.store import tables
from cloud.store.fleet_store import FleetStore
from cloud.store.sample_rows import KEYS, Key, missing_words

WAIT_DAYS = 30.0  # a vehicle that stands for weeks sends the rest of its outbox when it is driven again
BROKEN_KEPT = 10  # of a vehicle: at most 64 parts of 48 kB each, usually one
EVERY_S = 60.0
_DAY_S = 86_400.0


async def step(store: FleetStore, now_s: float) -> None:
    """Expire what is due. Raises `StoreAwayError`."""
    async with store.reading() as connection:  # no writing transaction, and on SQLite no lock, where nothing is due
        due = await _expired(connection, now_s, hold=False) or await _kept_too_long(connection, now_s)
    if due:
        async with store.writing() as connection:
            await expire(connection, now_s)


async def expire(connection: AsyncConnection, now_s: float) -> None:
    """Expire up to `KEYS` waiting and as many broken samples."""
    sample, part = tables.sample.c, tables.sample_part.c
    late = await _expired(connection, now_s, hold=True)
    have: dict[Key, set[int]] = {key: set() for key in late}
    query = sa.select(part.vehicle_id, part.sample_id, part.part)
    for row in await connection.execute(query.where(sa.tuple_(part.vehicle_id, part.sample_id).in_(list(late)))):
        have[row.vehicle_id, row.sample_id].add(row.part)
    for (vehicle_id, sample_id), parts in late.items():
        came = have[vehicle_id, sample_id]
        words = missing_words([n for n in range(1, parts + 1) if n not in came], parts, "never came", "never came")
        await connection.execute(
            sa.update(tables.sample)
            .where(sample.vehicle_id == vehicle_id, sample.sample_id == sample_id)
            .values(state="broken", detail=f"{words}, {WAIT_DAYS:g} days after the first")
        )
    for keys in (list(late), await _kept_too_long(connection, now_s)):
        await connection.execute(
            sa.delete(tables.sample_part).where(sa.tuple_(part.vehicle_id, part.sample_id).in_(keys))
        )


async def _expired(connection: AsyncConnection, now_s: float, *, hold: bool) -> dict[Key, int]:
    """Return the samples that waited long enough, with their number of parts."""
    sample = tables.sample.c
    query = (
        sa.select(sample.vehicle_id, sample.sample_id, sample.parts)
        .where(sample.state == "waiting", sample.received_at_s < now_s - WAIT_DAYS * _DAY_S)
        .order_by(sample.vehicle_id, sample.sample_id)
        .limit(KEYS)
    )
    found = await connection.execute(query.with_for_update(skip_locked=True) if hold else query)
    return {(r.vehicle_id, r.sample_id): r.parts for r in found}


async def _kept_too_long(connection: AsyncConnection, now_s: float) -> list[Key]:
    """Return broken samples whose parts are still here and need not be."""
    sample, part = tables.sample.c, tables.sample_part.c
    place = sa.func.row_number().over(partition_by=sample.vehicle_id, order_by=sample.ingest_id.desc()).label("place")
    with_parts = sa.exists().where(part.vehicle_id == sample.vehicle_id, part.sample_id == sample.sample_id)
    ranked = (
        sa.select(sample.vehicle_id, sample.sample_id, sample.received_at_s, place)
        .where(sample.state == "broken", with_parts)
        .subquery()
    )
    old = ranked.c.received_at_s < now_s - WAIT_DAYS * _DAY_S
    query = sa.select(ranked.c.vehicle_id, ranked.c.sample_id).where(sa.or_(ranked.c.place > BROKEN_KEPT, old))
    return [(r.vehicle_id, r.sample_id) for r in await connection.execute(query.limit(KEYS))]
