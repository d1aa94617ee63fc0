"""Samples in the store, on SQLite and on a real PostgreSQL: parts in any order, parts that do not fit, and the lake."""

import asyncio
import itertools
import zlib
from pathlib import Path
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa

from cloud.collector import ingest
from cloud.lake.lake import Lake, LakeAwayError
from cloud.lake.mover import Mover, MoverConfig, plan, wait_s
from cloud.store import sample_reading, tables
from cloud.store.fleet_store import FleetStore
from cloud.store.items import EventItem, Item, ServerEvent, TelemetryCommit
from cloud.store.sample_moves import Candidate
from cloud.store.sample_reading import SampleFilter
from edge_agent.contract import messages, topics
from edge_agent.contract.samples import pack, unpack
from tests.databases import database_url, postgres_uri, store
from tests.windows import drift_counts, event_bytes, sample_events, sample_items, window

__all__ = ["database_url", "postgres_uri", "store"]
pytestmark = pytest.mark.anyio
NOW = 1_772_000_000.0
DAY_S = 86_400.0


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def rows(store: FleetStore) -> list[dict[str, Any]]:
    async with store.reading() as connection:
        return await sample_reading.page(connection, SampleFilter(), before=None, limit=500)


async def only(store: FleetStore) -> dict[str, Any]:
    (row,) = await rows(store)
    return row


async def parts_left(store: FleetStore) -> int:
    async with store.reading() as connection:
        return await connection.scalar(sa.select(sa.func.count()).select_from(tables.sample_part)) or 0


async def bodies(store: FleetStore) -> list[bytes]:
    async with store.reading() as connection:
        found = await connection.execute(sa.select(tables.event.c.body).order_by(tables.event.c.seq))
        return [bytes(body) for body in found.scalars()]


# --- parts ---


async def test_parts_become_whole_in_any_order_one_by_one_or_at_once_and_sent_again(store: FleetStore) -> None:
    for number, order in enumerate(itertools.permutations(range(3))):
        parts = sample_items(f"one-{number}", parts=3, stream_id=f"a{number}")
        for place in order:
            await store.commit([parts[place]], received_at_s=NOW)
        together = sample_items(f"all-{number}", parts=3, stream_id=f"b{number}")
        await store.commit([together[place] for place in order], received_at_s=NOW)
        again = await store.commit([*parts, *together], received_at_s=NOW)
        assert (again.stored, again.duplicates) == (0, 6)
    assert {(row["state"], row["detail"]) for row in await rows(store)} == {("whole", "")}
    assert len(await rows(store)) == 12
    assert await parts_left(store) == 36
    assert set(await bodies(store)) == {b""}  # a payload is kept once: with its sample


async def test_a_sample_that_waits_says_for_what(store: FleetStore) -> None:
    parts = sample_items("s", parts=4)
    await store.commit(parts[1:2], received_at_s=NOW)
    assert (await only(store))["state"] == "waiting"
    assert (await only(store))["detail"] == "parts 1, 3, 4 of 4 have not come"
    await store.commit([parts[0], parts[3]], received_at_s=NOW + 5)
    assert (await only(store))["detail"] == "part 3 of 4 has not come"


async def test_a_part_sent_again_under_another_number_changes_nothing(store: FleetStore) -> None:
    await store.commit(sample_items("s", parts=2), received_at_s=NOW)
    packed = pack(window(1))
    await store.commit(sample_items("s", parts=2, first_seq=11, packed=packed), received_at_s=NOW)
    row = await only(store)
    assert (row["state"], row["detail"], await parts_left(store)) == ("whole", "", 2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sha256": "0" * 64}, "announces another sum"), ({"length": 7}, "announces another length"),
        ({"parts": 9}, "announces another number of parts"),
    ],
)  # fmt: skip
async def test_a_part_of_another_sample_under_this_id_breaks_nothing_and_is_said(
    store: FleetStore, change: dict[str, Any], said: str
) -> None:
    parts = sample_events("s", parts=2)
    foreign = event_bytes(messages.Sample(**{**_said(parts[0]), **change}), 11)
    topic = topics.sample("EV_1")
    for body in (parts[0], foreign):
        await store.commit([ingest.decide(topic, body)], received_at_s=NOW)
    row = await only(store)
    assert row["state"] == "waiting"
    assert said in row["detail"]
    assert "part 2 of 2 has not come" in row["detail"]
    await store.commit([ingest.decide(topic, parts[1])], received_at_s=NOW)
    assert (await only(store))["state"] == "whole"  # the sum is the judge
    assert said in (await only(store))["detail"]
    assert set(await bodies(store)) == {b""}


async def test_a_part_with_other_bytes_is_said_and_the_sum_decides(store: FleetStore) -> None:
    topic = topics.sample("EV_1")
    good = sample_events("s", parts=2)
    other = event_bytes(
        messages.Sample(**{**_said(good[0]), "payload": b"other bytes"}), 11
    )  # fmt: skip
    for body in (good[0], other, good[1]):
        await store.commit([ingest.decide(topic, body)], received_at_s=NOW)
    row = await only(store)
    assert row["state"] == "whole"
    assert "part 1 came again with other bytes" in row["detail"]
    assert set(await bodies(store)) == {b""}


def _said(body: bytes) -> dict[str, Any]:
    _, data = messages.decode_event(body, "EV_1")
    assert isinstance(data, messages.Sample)
    return {name: getattr(data, name) for name in data.__struct_fields__}


def crafted(**changes: Any) -> bytes:
    """Pack a window with fields that no sender of ours would write."""
    return zlib.compress(msgspec.msgpack.encode(msgspec.msgpack.decode(zlib.decompress(pack(window()))) | changes))


@pytest.mark.parametrize(
    ("items", "said"),
    [
        (lambda: sample_items("bad", packed=pack(window())[:-40], length=len(pack(window()))), "bytes together, but"),
        (lambda: sample_items("bad", sha256="0" * 64), "bytes have the sum"),
        (lambda: sample_items("bad", packed=pack(window())[:-40]), "does not unpack: a sample that ends in the middle"),
        (lambda: sample_items("bad", packed=b"no packed window"), "does not unpack"),
        (lambda: sample_items("bad", packed=crafted(values=[2**62, [], [], b""], signals=[])), "length they state"),
        (lambda: sample_items("bad", packed=crafted(state={"x": [[0, 2**62], b""]})), "length it states"),
    ],
)  # fmt: skip
async def test_a_sample_that_cannot_be_used_says_why_and_holds_up_no_other(
    store: FleetStore, tmp_path: Path, items: Any, said: str
) -> None:
    good = sample_items("good", stream_id="other")
    await store.commit([*items(), *good], received_at_s=NOW)
    lake = Lake(str(tmp_path / "lake"))
    mover = Mover(store, lake, wall=lambda: NOW)
    await mover.step()
    found = {row["sample_id"]: row for row in await rows(store)}
    assert found["good"]["state"] == "lake"
    assert found["bad"]["state"] == "broken"
    assert said in found["bad"]["detail"]
    assert [sample.sample_id for sample in lake.read()] == ["good"]
    assert await parts_left(store) == 1  # what is broken can still be looked at
    assert mover.detail == ""


async def test_two_collectors_with_a_part_each_make_one_whole_sample(database_url: str) -> None:
    stores = [FleetStore.over(database_url) for _ in range(2)]
    await stores[0].prepare()
    try:
        for turn in range(20):
            parts = sample_items(f"s{turn}", parts=2, stream_id=f"t{turn}")
            await asyncio.gather(
                *(store.commit([part], received_at_s=NOW) for store, part in zip(stores, parts, strict=True))
            )
        assert {(row["state"], row["detail"]) for row in await rows(stores[0])} == {("whole", "")}
    finally:
        for store in stores:
            await store.close()


async def test_samples_and_counts_of_frames_over_http_take_the_same_way(store: FleetStore) -> None:
    def event(data: messages.EventData, name: str) -> ServerEvent:
        def build(stream_id: str, seq: int) -> messages.Event:
            return messages.event(
                data, event_id=name, vehicle_id="EV_1", time="2026-03-01T00:00:00.000Z", stream_id=stream_id, seq=seq,
                boot_id="server", clock_trusted=True,
            )  # fmt: skip

        return ServerEvent(name, topics.sample("EV_1"), build)

    sample = messages.Sample(**_said(sample_events("s")[0]))
    step = TelemetryCommit(
        vehicle_id="EV_1", make="sim", period_s=1.0, cells=2, probes=1, snapshot=b"s", last_arrival="t", scores=None,
        model_release=3, model_name="m", model_sha256="",
        events=(event(sample, "e-sample"), event(drift_counts(), "e-drift")),
    )  # fmt: skip
    for _ in range(2):
        await store.commit_telemetry(step, received_at_s=NOW)
    assert (await only(store))["state"] == "whole"
    async with store.reading() as connection:
        (counted,) = (await connection.execute(sa.select(tables.drift))).all()
    assert (counted.reference, counted.stratum, counted.windows) == ("ab" * 32, "driving", 2)


async def test_drift_counts_are_stored_once_with_their_body(store: FleetStore) -> None:
    item = ingest.decide(topics.drift("EV_1"), event_bytes(drift_counts(), 1))
    for _ in range(2):
        await store.commit([item, item], received_at_s=NOW)
    async with store.reading() as connection:
        assert len((await connection.execute(sa.select(tables.drift))).all()) == 1
    assert isinstance(item, EventItem)
    assert await bodies(store) == [item.body]


# --- into the lake ---


async def test_what_comes_out_of_the_lake_is_what_the_vehicle_packed(store: FleetStore, tmp_path: Path) -> None:
    await store.commit(
        sample_items("s", parts=3, reason="alert", alert_id="a1", failure_type="charging_fault"), received_at_s=NOW
    )
    lake = Lake(str(tmp_path / "lake"))
    mover = Mover(store, lake, wall=lambda: NOW + 1)
    await mover.step()
    (sample,) = lake.read()
    assert (sample.key, sample.reason, sample.alert_id, sample.failure_type) == (
        ("EV_1", "s"), "alert", "a1", "charging_fault",
    )  # fmt: skip
    assert (sample.end_s, sample.received_at_s, sample.model_release) == (1_772_323_200.0, NOW, 7)
    assert (sample.state_id, sample.stratum, sample.elapsed_s, sample.coverage) == ("st1", "driving", 60.0, 1.0)
    assert sample.packed == pack(window(1))
    assert unpack(sample.packed).signals == window(1).signals
    row = await only(store)
    assert (row["state"], row["stored_at_s"], await parts_left(store)) == ("lake", NOW + 1, 0)
    assert (tmp_path / "lake" / row["lake_file"]).is_file()
    assert "day=2026-02-25" in row["lake_file"]
    assert mover.usage is not None
    assert (mover.usage.files, mover.usage.bytes) == (1, lake.files()[0].bytes)


async def test_nothing_is_kept_of_a_part_that_comes_after_its_sample_is_in_the_lake(
    store: FleetStore, tmp_path: Path
) -> None:
    lake = Lake(str(tmp_path / "lake"))
    await store.commit(sample_items("s"), received_at_s=NOW)
    mover = Mover(store, lake, wall=lambda: NOW)
    await mover.step()
    late = sample_events("s", first_seq=9, packed=pack(window(1)))[0]
    await store.commit([ingest.decide(topics.sample("EV_1"), late)], received_at_s=NOW)
    await mover.step()
    row = await only(store)
    assert row["state"] == "lake"
    assert (row["detail"], await parts_left(store)) == ("", 0)
    assert set(await bodies(store)) == {b""}
    assert len(list(lake.read())) == 1


async def test_batches_are_full_or_wait_and_hold_one_day_each(store: FleetStore, tmp_path: Path) -> None:
    now = NOW
    lake = Lake(str(tmp_path / "lake"))
    config = MoverConfig(batch_samples=4, wait_s=10, wait_more_s=10, wait_max_s=30)
    mover = Mover(store, lake, wall=lambda: now, config=config)
    for day in range(2):
        items: list[Item] = []
        for n in range(6):
            items += sample_items(f"{day}/{n}", stream_id=f"{day}/{n}")
        await store.commit(items, received_at_s=NOW + day * DAY_S)
    await mover.step()
    assert [file.day for file in lake.files()] == ["2026-02-25", "2026-02-25", "2026-02-26"]
    assert [row["state"] for row in await rows(store)].count("whole") == 2  # they fill no file, and wait their time
    await mover.step()
    assert len(lake.files()) == 3
    for _ in range(6):
        now += 10
        await mover.step()
    sizes = [(file.day, len(list(lake.read_file(file.path)))) for file in lake.files()]
    assert sorted(sizes) == [("2026-02-25", 2), ("2026-02-25", 4), ("2026-02-26", 2), ("2026-02-26", 4)]
    assert len(list(lake.read())) == 12


def test_a_batch_ends_at_its_bytes_and_never_holds_two_days() -> None:
    waiting = [Candidate(("EV", str(n)), NOW + DAY_S * (n // 3), 10) for n in range(6)]
    assert plan(waiting, MoverConfig(batch_bytes=25)) == (waiting[:2], True)
    assert plan(waiting, MoverConfig(batch_bytes=5)) == (waiting[:1], True)
    assert plan(waiting, MoverConfig()) == (waiting[:3], False)
    assert plan([], MoverConfig()) == ([], False)


def test_a_day_has_a_bounded_number_of_small_files() -> None:
    config, now, files = MoverConfig(), 0.0, 0
    while now < DAY_S:
        files += 1
        now += wait_s(files, config)
    assert 150 < files < 250


async def test_two_movers_put_each_sample_into_one_file(database_url: str, tmp_path: Path) -> None:
    stores = [FleetStore.over(database_url) for _ in range(2)]
    await stores[0].prepare()
    lake = Lake(str(tmp_path / "lake"))
    config = MoverConfig(batch_samples=2)
    movers = [Mover(store, lake, wall=lambda: NOW, config=config) for store in stores]
    try:
        await stores[0].commit(
            [item for n in range(20) for item in sample_items(f"s{n}", stream_id=f"t{n}")], received_at_s=NOW
        )
        for _ in range(3):
            await asyncio.gather(*(mover.step() for mover in movers))
        raw = [sample.sample_id for file in lake.files() for sample in lake.read_file(file.path)]
        assert sorted(raw) == sorted(f"s{n}" for n in range(20))
        assert {row["state"] for row in await rows(stores[0])} == {"lake"}
        assert [mover.detail for mover in movers] == ["", ""]
    finally:
        for store in stores:
            await store.close()


async def test_a_lake_that_does_not_answer_is_said_and_asked_once(store: FleetStore, tmp_path: Path) -> None:
    """A directory on a file system that hangs: a FIFO in place of the file makes the open wait."""
    import os  # noqa: PLC0415

    lake = Lake(str(tmp_path / "lake"))
    mover = Mover(store, lake, wall=lambda: NOW, config=MoverConfig(patience_s=0.2))
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(LakeAwayError, match=r"no answer within 0\.2 s"):
        await mover._in_thread(pipe.read_bytes)
    await store.commit(sample_items("s"), received_at_s=NOW)
    await mover.step()
    assert "no answer within 0.2 s" in mover.detail
    assert (await only(store))["state"] == "whole"
    pipe.write_bytes(b"")  # it answers at last
    await asyncio.sleep(0.1)
    await mover.step()
    assert mover.detail == ""
    assert (await only(store))["state"] == "lake"
