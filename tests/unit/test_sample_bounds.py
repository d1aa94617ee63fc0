"""What samples nobody can use may cost, on SQLite and PostgreSQL: parts expire, duplicates and floods are nothing."""

from typing import Any

import pytest
import sqlalchemy as sa

from cloud.collector import ingest
from cloud.lake.lake import Lake
from cloud.lake.mover import Mover
from cloud.store import reading, sample_expiry, sample_reading, sample_rows, tables
from cloud.store.fleet_store import FleetStore
from cloud.store.items import EventItem, Item
from cloud.store.sample_expiry import BROKEN_KEPT, WAIT_DAYS
from cloud.store.sample_reading import SampleFilter
from tests.databases import database_url, postgres_uri, store
from tests.windows import sample_items

__all__ = ["database_url", "postgres_uri", "store"]
pytestmark = pytest.mark.anyio
NOW = 1_772_000_000.0
DAY_S = 86_400.0


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def rows(store: FleetStore) -> dict[str, dict[str, Any]]:
    async with store.reading() as connection:
        page = await sample_reading.page(connection, SampleFilter(), before=None, limit=500)
    return {row["sample_id"]: row for row in page}


async def held(store: FleetStore) -> tuple[int, int]:
    """Bytes of parts, and of events, in the store."""
    async with store.reading() as connection:
        parts = await connection.scalar(sa.select(sa.func.sum(sa.func.length(tables.sample_part.c.payload))))
        events = await connection.scalar(sa.select(sa.func.sum(sa.func.length(tables.event.c.body))))
    return int(parts or 0), int(events or 0)


async def test_a_sample_that_waits_too_long_becomes_broken_and_its_parts_go(store: FleetStore) -> None:
    await store.commit(sample_items("late", parts=4, stream_id="a")[:2], received_at_s=NOW)
    await store.commit(sample_items("fresh", parts=4, stream_id="b")[:2], received_at_s=NOW + DAY_S)
    end = NOW + WAIT_DAYS * DAY_S
    await sample_expiry.step(store, end - 1)
    assert {row["state"] for row in (await rows(store)).values()} == {"waiting"}
    before, _ = await held(store)
    await sample_expiry.step(store, end + 1)
    found = await rows(store)
    assert (found["late"]["state"], found["late"]["detail"]) == (
        "broken", f"parts 3, 4 of 4 never came, {WAIT_DAYS:g} days after the first",
    )  # fmt: skip
    assert found["fresh"]["state"] == "waiting"
    assert (await held(store))[0] == before / 2
    await store.commit(sample_items("late", parts=4, stream_id="a")[2:], received_at_s=end + 2)
    await store.commit(sample_items("fresh", parts=4, stream_id="b")[2:], received_at_s=end + 2)
    assert [(await rows(store))[name]["state"] for name in ("late", "fresh")] == ["broken", "whole"]
    assert (await held(store))[0] == found["fresh"]["length"]


async def test_broken_samples_keep_the_parts_of_the_newest_few_and_not_for_ever(store: FleetStore) -> None:
    for n in range(BROKEN_KEPT + 5):
        for vehicle in ("EV_1", "EV_2"):
            items = sample_items(f"{vehicle}/{n}", vehicle_id=vehicle, stream_id=f"s{n}", sha256="0" * 64)
            await store.commit(items, received_at_s=NOW + n)
    await sample_expiry.step(store, NOW + 60)
    assert await _with_parts(store) == {f"{v}/{n}" for v in ("EV_1", "EV_2") for n in range(5, BROKEN_KEPT + 5)}
    await sample_expiry.step(store, NOW + WAIT_DAYS * DAY_S + 60)
    assert await _with_parts(store) == set()
    assert {row["state"] for row in (await rows(store)).values()} == {"broken"}
    assert all(
        "were announced" in row["detail"] or "was announced" in row["detail"] for row in (await rows(store)).values()
    )


async def _with_parts(store: FleetStore) -> set[str]:
    async with store.reading() as connection:
        return set(await connection.scalars(sa.select(tables.sample_part.c.sample_id)))


@pytest.mark.parametrize("change", [{}, {"sha256": "0" * 64}, {"length": 7}])
async def test_nothing_is_kept_of_parts_that_come_when_their_sample_is_stored(
    store: FleetStore, tmp_path: Any, change: dict[str, Any]
) -> None:
    await store.commit(sample_items("s"), received_at_s=NOW)
    mover = Mover(store, Lake(str(tmp_path / "lake")), wall=lambda: NOW)
    again = [item for n in range(2, 30) for item in sample_items("s", first_seq=n, **change)]
    await store.commit(again[:10], received_at_s=NOW)
    whole, _ = await held(store)
    await mover.step()
    await store.commit(again[10:], received_at_s=NOW)
    assert whole < 2 * (await rows(store))["s"]["length"]
    assert await held(store) == (0, 0)
    assert (await rows(store))["s"]["state"] == "lake"


async def test_a_sample_that_brings_more_than_it_announced_is_broken_before_it_is_whole(store: FleetStore) -> None:
    parts = sample_items("s", parts=9, length=10)
    for part in parts:
        await store.commit([part], received_at_s=NOW)
    row = (await rows(store))["s"]
    assert row["state"] == "broken"
    assert "but 10 were announced" in row["detail"]
    assert (await held(store))[0] <= 2 * max(len(p.data.payload) for p in parts)  # type: ignore[union-attr]


async def test_a_vehicle_may_have_so_much_wait_and_no_more_and_is_not_told_that_the_rest_is_stored(
    store: FleetStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample_rows, "QUOTA_BYTES", 5 * 65_536)
    items = [sample_items(f"s{n}", parts=2, stream_id=f"t{n}") for n in range(8)]
    firsts: list[Item] = [parts[0] for parts in items]
    other = sample_items("other", vehicle_id="EV_2", parts=2, stream_id="o")[:1]
    written = await store.commit([*firsts, *other], received_at_s=NOW)
    assert written.stored == 6  # five of the one, and the other's
    refused = [item for item in firsts if isinstance(item, EventItem) and item.key in written.refused]
    assert refused == firsts[5:]
    async with store.reading() as connection:
        assert [(r["reason"], r["count"]) for r in await reading.refused(connection)] == [("sample_quota", 3)]
    # single parts never wait, the rest of what waits always comes in, and then there is room again
    assert not (await store.commit(sample_items("one", stream_id="one"), received_at_s=NOW)).refused
    assert not (await store.commit([parts[1] for parts in items[:5]], received_at_s=NOW)).refused
    assert not (await store.commit(refused, received_at_s=NOW)).refused
    await store.commit([parts[1] for parts in items[5:]], received_at_s=NOW)
    assert {row["state"] for name, row in (await rows(store)).items() if name != "other"} == {"whole"}
    assert ingest.ack_keys(refused)  # they are events like any other: it is `refused` that keeps them unacknowledged
