"""Parts of samples as rows: each part kept until its sample lies in the lake, and what state each sample is in.

    waiting   parts are still to come; `detail` says which
    whole     every part is here, and their sum is the one that was announced
    lake      it lies in the lake (`lake_file`); its parts are gone
    broken    it can never be used; `detail` says why, and its parts stay here to be looked at

The sum is the judge. A part that its sample has no place for (it announces another sum or number of parts, or brings
other bytes under a number that is taken) breaks nothing: what a vehicle was told is stored stays stored, so it is kept
with its event, `detail` says so, and the sample becomes whole if the others do match.

Written in the transaction that stores the events, each event once. Two collectors that get parts of one sample at the
same moment wait for each other at the sample's row. Whether the joined bytes unpack is asked where they are moved.
"""

import hashlib
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from cloud.store import tables
from cloud.store.items import EventItem
from edge_agent.contract.messages import Sample

Key = tuple[str, str]  # vehicle_id, sample_id
KEYS = 200  # in one statement: SQLite takes 32,766 values, an older one 999
_KEPT = "kept with its event"
_SHOWN = 10  # numbers of missing parts in a detail
_HEADER = (
    "reason", "alert_id", "failure_type", "stratum", "end_time", "elapsed_s", "coverage", "state_id", "model_release",
    "parts", "length", "sha256",
)  # fmt: skip


async def add(connection: AsyncConnection, rows: list[tuple[int, EventItem, float]]) -> None:
    """Take the parts of new sample events: (ingest_id, item, received_at_s)."""
    by_sample: dict[Key, list[tuple[int, EventItem, Sample, float]]] = {}
    for ingest_id, item, received_at_s in sorted(rows, key=lambda row: row[0]):
        if isinstance(item.data, Sample):
            key = (item.vehicle_id, item.data.sample_id)
            by_sample.setdefault(key, []).append((ingest_id, item, item.data, received_at_s))
    keys = sorted(by_sample)  # every transaction takes its locks in this order
    for first in range(0, len(keys), KEYS):
        await _add(connection, {key: by_sample[key] for key in keys[first : first + KEYS]})


async def _add(connection: AsyncConnection, by_sample: dict[Key, list[tuple[int, EventItem, Sample, float]]]) -> None:
    sample, part = tables.sample.c, tables.sample_part.c
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    await connection.execute(
        insert(tables.sample).on_conflict_do_nothing(index_elements=["vehicle_id", "sample_id"]),
        [
            {"vehicle_id": key[0], "sample_id": key[1], "ingest_id": found[0][0], "received_at_s": found[0][3],
             "state": "waiting", **{name: getattr(found[0][2], name) for name in _HEADER}}
            for key, found in by_sample.items()
        ],
    )  # fmt: skip
    keys = list(by_sample)
    locked = (
        sa.select(tables.sample)
        .where(sa.tuple_(sample.vehicle_id, sample.sample_id).in_(keys))
        .order_by(sample.vehicle_id, sample.sample_id)
        .with_for_update()
    )
    headers = {(row["vehicle_id"], row["sample_id"]): row for row in (await connection.execute(locked)).mappings()}
    have: dict[Key, set[int]] = {key: set() for key in keys}
    known = sa.select(part.vehicle_id, part.sample_id, part.part)
    for row in await connection.execute(known.where(sa.tuple_(part.vehicle_id, part.sample_id).in_(keys))):
        have[row.vehicle_id, row.sample_id].add(row.part)
    for key, found in by_sample.items():
        await _take(connection, dict(headers[key]), have[key], found)


async def _take(
    connection: AsyncConnection, row: dict[str, Any], have: set[int], found: list[tuple[int, EventItem, Sample, float]]
) -> None:
    """Put the new parts of one sample into their places, and say what state it is in now."""
    state, notes = row["state"], []
    for ingest_id, item, data, _ in found:
        note = "came after its sample was in the lake" if state == "lake" else conflict(row, data)
        if not note and data.part in have:
            if await _payload(connection, row, data.part) == data.payload:
                continue  # sent again under another number of its stream
            note = "came again with other bytes"
        if note:
            notes.append(f"part {data.part} {note}: {_KEPT} {ingest_id}")
            event = tables.event
            await connection.execute(sa.update(event).where(event.c.ingest_id == ingest_id).values(body=item.body))
            continue
        have.add(data.part)
        place = {"part": data.part, "ingest_id": ingest_id, "payload": data.payload}
        await connection.execute(
            sa.insert(tables.sample_part).values(vehicle_id=row["vehicle_id"], sample_id=row["sample_id"], **place)
        )
    detail = row["detail"]
    if state == "waiting":
        missing = [n for n in range(1, row["parts"] + 1) if n not in have]
        earlier = [note for note in detail.split("; ") if _KEPT in note]
        detail = _missing(missing, row["parts"]) or mismatch(row, await joined(connection, row))
        state = "waiting" if missing else "broken" if detail else "whole"
        notes = earlier + notes
    elif not notes:
        return
    sample = tables.sample.c
    await connection.execute(
        sa.update(tables.sample)
        .where(sample.vehicle_id == row["vehicle_id"], sample.sample_id == row["sample_id"])
        .values(state=state, detail="; ".join(filter(None, (detail, *notes)))[:512])
    )


async def joined(connection: AsyncConnection, row: dict[str, Any]) -> bytes:
    """Return the parts of a sample, in order, as one."""
    part = tables.sample_part.c
    query = sa.select(part.payload).where(part.vehicle_id == row["vehicle_id"], part.sample_id == row["sample_id"])
    return b"".join((await connection.execute(query.order_by(part.part))).scalars())


async def _payload(connection: AsyncConnection, row: dict[str, Any], number: int) -> bytes:
    part = tables.sample_part.c
    query = sa.select(part.payload).where(part.vehicle_id == row["vehicle_id"], part.sample_id == row["sample_id"])
    return bytes(await connection.scalar(query.where(part.part == number)) or b"")


def conflict(row: dict[str, Any], data: Sample) -> str:
    """Say why a part does not belong to the sample that `row` describes; empty when it does."""
    for name, words in (("sha256", "sum"), ("length", "length"), ("parts", "number of parts")):
        if getattr(data, name) != row[name]:
            return f"announces another {words} than the first ({getattr(data, name)}, not {row[name]})"
    return ""


def mismatch(row: dict[str, Any], data: bytes) -> str:
    """Say why the joined parts are not the sample that was announced; empty when they are."""
    if len(data) != row["length"]:
        return f"its parts are {len(data)} bytes together, but {row['length']} were announced"
    found = hashlib.sha256(data).hexdigest()
    return "" if found == row["sha256"] else f"its bytes have the sum {found}, but {row['sha256']} was announced"


def _missing(numbers: list[int], parts: int) -> str:
    if not numbers:
        return ""
    shown = ", ".join(map(str, numbers[:_SHOWN])) + (", …" if len(numbers) > _SHOWN else "")
    return f"part {shown} of {parts} has not come" if len(numbers) == 1 else f"parts {shown} of {parts} have not come"
