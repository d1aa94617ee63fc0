"""Parts of samples as rows: each part kept until its sample lies in the lake, and what state each sample is in.

    waiting   parts are still to come; `detail` says which
    whole     every part is here, and their sum is the one that was announced
    lake      it lies in the lake (`lake_file`); its parts are gone
    broken    it can never be used; `detail` says why, and its parts stay here for a while to be looked at

The sum is the judge. A part that its sample has no place for (it announces another sum or number of parts, or brings
other bytes under a number that is taken) breaks nothing: it could never become part of a whole, so nothing of it is
kept, `detail` says so, and the sample becomes whole if the others do match. Nothing is kept either of parts of a
sample that is whole, in the lake, or broken already.

What one vehicle makes wait is bounded: first parts beyond `QUOTA_BYTES` are refused and not acknowledged, so the
vehicle sends them again when others are whole, or expired (`cloud.store.sample_expiry`).

Written in the transaction that stores the events, each event once. Two collectors that get parts of one sample at the
same moment wait for each other at the sample's row. Whether the joined bytes unpack is asked where they are moved.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from cloud.store import tables
from cloud.store.items import EventItem
from edge_agent.contract.messages import MAX_MESSAGE_BYTES, Sample

Key = tuple[str, str]  # vehicle_id, sample_id
KEYS = 200  # in one statement: SQLite takes 32,766 values, an older one 999
_NOT_KEPT = "it is not kept"
# announced, of samples of a vehicle that are not whole: twice a batch of the collector, all of it parts, and 500 days
# of what a vehicle sends by default
QUOTA_BYTES = 64 * 2**20
_SHOWN = 10  # numbers of missing parts in a detail
_HEADER = (
    "reason", "alert_id", "failure_type", "stratum", "end_time", "elapsed_s", "coverage", "state_id", "model_release",
    "parts", "length", "sha256",
)  # fmt: skip


async def over_quota(connection: AsyncConnection, items: Sequence[EventItem]) -> list[EventItem]:
    """Return which of these parts begin samples that their vehicle may not have wait here beside its others.

    To be called where the vehicles' rows were written before in this transaction: collectors then wait for each other.
    """
    begun: dict[Key, list[EventItem]] = {}
    for item in items:
        if isinstance(item.data, Sample) and item.data.parts > 1:
            begun.setdefault((item.vehicle_id, item.data.sample_id), []).append(item)
    sample = tables.sample.c
    keys = sorted(begun)
    for first in range(0, len(keys), KEYS):
        known = sa.select(sample.vehicle_id, sample.sample_id)
        chunk = keys[first : first + KEYS]
        for row in await connection.execute(known.where(sa.tuple_(sample.vehicle_id, sample.sample_id).in_(chunk))):
            del begun[row.vehicle_id, row.sample_id]
    waiting: dict[str, int] = {}
    for vehicle_id in sorted({key[0] for key in begun}):
        reserved = sa.case((sample.length < MAX_MESSAGE_BYTES, MAX_MESSAGE_BYTES), else_=sample.length)
        query = sa.select(sa.func.sum(reserved)).where(sample.vehicle_id == vehicle_id, sample.state == "waiting")
        waiting[vehicle_id] = int(await connection.scalar(query) or 0)
    refused: list[EventItem] = []
    for (vehicle_id, _), parts in begun.items():
        length = max(part.data.length for part in parts if isinstance(part.data, Sample))
        reserve = max(MAX_MESSAGE_BYTES, length)
        if waiting[vehicle_id] + reserve > QUOTA_BYTES:
            refused += parts
        else:
            waiting[vehicle_id] += reserve
    return refused


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
             "state": "waiting", "clock_trusted": found[0][1].envelope.clocktrusted,
             **{name: getattr(found[0][2], name) for name in _HEADER}}
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
    have: dict[Key, dict[int, int]] = {key: {} for key in keys}
    known = sa.select(part.vehicle_id, part.sample_id, part.part, sa.func.length(part.payload).label("bytes"))
    for row in await connection.execute(known.where(sa.tuple_(part.vehicle_id, part.sample_id).in_(keys))):
        have[row.vehicle_id, row.sample_id][row.part] = row.bytes
    for key, found in by_sample.items():
        await _take(connection, dict(headers[key]), have[key], found)


async def _take(
    connection: AsyncConnection, row: dict[str, Any], have: dict[int, int],
    found: list[tuple[int, EventItem, Sample, float]],
) -> None:  # fmt: skip
    """Put the new parts of one sample into their places, and say what state it is in now.

    `have`: the length in bytes of each part that is here.
    """
    state, notes = row["state"], []
    for ingest_id, _, data, _ in found:
        note = conflict(row, data)
        if not note and state != "waiting":
            continue  # sent again, and its bytes are here or in the lake; or no part mends it
        if not note and data.part in have:
            if await _payload(connection, row, data.part) == data.payload:
                continue  # sent again under another number of its stream
            note = "came again with other bytes"
        if note:
            notes.append(f"part {data.part} {note}: {_NOT_KEPT}")
            continue
        have[data.part] = len(data.payload)
        place = {"part": data.part, "ingest_id": ingest_id, "payload": data.payload}
        await connection.execute(
            sa.insert(tables.sample_part).values(vehicle_id=row["vehicle_id"], sample_id=row["sample_id"], **place)
        )
    detail = row["detail"]
    if state == "waiting":
        missing = [n for n in range(1, row["parts"] + 1) if n not in have]
        earlier = [note for note in detail.split("; ") if _NOT_KEPT in note]
        size = sum(have.values())
        if missing and size > row["length"]:  # it can be whole no more, and would hold more than its quota
            detail, missing = f"its parts are {size} bytes already, but {row['length']} were announced", []
        else:
            detail = missing_words(missing, row["parts"]) or mismatch(row, await joined(connection, row))
        state = "waiting" if missing else "broken" if detail else "whole"
        notes = earlier + [note for note in notes if note not in earlier]
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


def missing_words(numbers: list[int], parts: int, one: str = "has not come", many: str = "have not come") -> str:
    """Say which parts are missing; empty when none is. `one` and `many` are what is said of them."""
    if not numbers:
        return ""
    shown = ", ".join(map(str, numbers[:_SHOWN])) + (", …" if len(numbers) > _SHOWN else "")
    return f"part {shown} of {parts} {one}" if len(numbers) == 1 else f"parts {shown} of {parts} {many}"
