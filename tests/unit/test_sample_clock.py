"""What a sample's time is worth goes with it: from the envelope into the store and the lake, and to who labels it."""

import asyncio
from dataclasses import replace
from pathlib import Path

import msgspec
import pyarrow.parquet as pq
import pytest

from cloud.lake.lake import Lake
from cloud.lake.mover import Mover
from cloud.store.fleet_store import FleetStore
from cloud.store.items import EventItem
from tests.databases import database_url, postgres_uri
from tests.windows import sample_items

__all__ = ["database_url", "postgres_uri"]
NOW = 1_772_000_000.0


def moved(url: str, lake: Lake, *, trusted: bool) -> None:
    """Store one sample's parts under such a clock, and move it into the lake."""

    async def move() -> None:
        store = FleetStore.over(url)
        await store.prepare()
        items = []
        for item in sample_items("s", parts=2):
            assert isinstance(item, EventItem)
            items.append(replace(item, envelope=msgspec.structs.replace(item.envelope, clocktrusted=trusted)))
        await store.commit(items, received_at_s=NOW)
        await Mover(store, lake, wall=lambda: NOW + 1).step()
        await store.close()

    asyncio.run(move())


@pytest.mark.parametrize("trusted", [True, False])
def test_whether_the_clock_was_trusted_reaches_the_lake(database_url: str, tmp_path: Path, trusted: bool) -> None:
    lake = Lake(str(tmp_path / "lake"))
    moved(database_url, lake, trusted=trusted)
    assert [sample.clock_trusted for sample in lake.read()] == [trusted]


def test_a_lake_file_without_the_column_is_read_and_its_times_are_not_trusted(tmp_path: Path) -> None:
    lake = Lake(str(tmp_path / "lake"))
    moved(f"sqlite:///{tmp_path / 'fleet.db'}", lake, trusted=True)
    path = tmp_path / "lake" / lake.files()[0].path
    older = pq.read_table(path, partitioning=None).drop_columns(["clock_trusted"])
    pq.write_table(older, path, write_page_checksum=True)
    assert [sample.clock_trusted for sample in lake.read()] == [False]
