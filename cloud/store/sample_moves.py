"""Which samples go into which file of the lake, and when their parts may go. Statements for the lake's mover.

The order that makes each sample lie in exactly one file, wherever the mover dies:

    claim    the samples of one file are given its name, and committed
    (write)  the file is written, whole, under that name
    finish   the samples are marked as in the lake, and their parts removed, in one transaction

A mover that starts finds the claims that were not finished, and writes the same file under the same name again.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from cloud.store import tables
from cloud.store.sample_rows import KEYS, Key


@dataclass(frozen=True, slots=True)
class Candidate:
    """A whole sample that no file has yet."""

    key: Key
    received_at_s: float
    length: int


async def candidates(connection: AsyncConnection, limit: int, *, hold: bool = False) -> list[Candidate]:
    """Return the whole samples that no file has yet, the oldest arrival first.

    `hold`: they stay this transaction's own until its end; another mover passes over them (PostgreSQL) or waits.
    """
    sample = tables.sample.c
    query = (
        sa.select(sample.vehicle_id, sample.sample_id, sample.received_at_s, sample.length)
        .where(sample.state == "whole", sample.lake_file == "")
        .order_by(sample.ingest_id)
        .limit(limit)
    )
    found = await connection.execute(query.with_for_update(skip_locked=True) if hold else query)
    return [Candidate((r.vehicle_id, r.sample_id), r.received_at_s, r.length) for r in found]


async def claim(connection: AsyncConnection, path: str, keys: Sequence[Key]) -> None:
    """Give these samples the file they will lie in."""
    sample = tables.sample.c
    for chunk in _chunks(keys):
        await connection.execute(
            sa.update(tables.sample)
            .where(sa.tuple_(sample.vehicle_id, sample.sample_id).in_(chunk))
            .values(lake_file=path)
        )


async def claimed(connection: AsyncConnection) -> list[str]:
    """Return the files that were begun and not finished."""
    sample = tables.sample.c
    query = sa.select(sample.lake_file).where(sample.state == "whole", sample.lake_file != "").distinct()
    return list((await connection.execute(query.order_by(sample.lake_file))).scalars())


async def load(connection: AsyncConnection, path: str) -> list[tuple[dict[str, Any], bytes]]:
    """Return the samples claimed for a file, each with its joined parts, always in the same order.

    One statement, so that it sees all of them, or none when another mover has just finished the file.
    """
    sample, part = tables.sample.c, tables.sample_part.c
    same = sa.and_(part.vehicle_id == sample.vehicle_id, part.sample_id == sample.sample_id)
    query = (
        sa.select(tables.sample, part.payload)
        .join_from(tables.sample, tables.sample_part, same)
        .where(sample.state == "whole", sample.lake_file == path)
        .order_by(sample.ingest_id, part.part)
    )
    rows: dict[Key, tuple[dict[str, Any], list[bytes]]] = {}
    for found in (await connection.execute(query)).mappings():
        row = dict(found)
        payload = row.pop("payload")
        rows.setdefault((row["vehicle_id"], row["sample_id"]), (row, []))[1].append(payload)
    return [(row, b"".join(payloads)) for row, payloads in rows.values()]


async def finish(connection: AsyncConnection, path: str, broken: dict[Key, str], stored_at_s: float) -> int:
    """Mark the samples of a written file as in the lake, and remove their parts; returns how many.

    `broken`: what of them could not be used, and why; their parts stay.
    """
    sample, part = tables.sample.c, tables.sample_part.c
    ours = sa.and_(sample.state == "whole", sample.lake_file == path)
    for (vehicle_id, sample_id), detail in broken.items():
        await connection.execute(
            sa.update(tables.sample)
            .where(ours, sample.vehicle_id == vehicle_id, sample.sample_id == sample_id)
            .values(state="broken", detail=detail[:512], lake_file="")
        )
    query = sa.select(sample.vehicle_id, sample.sample_id).where(ours).order_by(sample.vehicle_id, sample.sample_id)
    keys = [(row.vehicle_id, row.sample_id) for row in await connection.execute(query.with_for_update())]
    for chunk in _chunks(keys):
        await connection.execute(
            sa.update(tables.sample)
            .where(sa.tuple_(sample.vehicle_id, sample.sample_id).in_(chunk))
            .values(state="lake", stored_at_s=stored_at_s)
        )
        await connection.execute(
            sa.delete(tables.sample_part).where(sa.tuple_(part.vehicle_id, part.sample_id).in_(chunk))
        )
    return len(keys)


def _chunks(keys: Sequence[Key]) -> Iterable[Sequence[Key]]:
    return (keys[first : first + KEYS] for first in range(0, len(keys), KEYS))
