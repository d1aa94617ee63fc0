"""What training reads from the store and leaves there, on SQLite and on a real PostgreSQL."""

import asyncio
from dataclasses import replace

from cloud.store.fleet_store import FleetStore
from cloud.store.training_rows import TrainingRun, add_training_run, judged_alerts, last_training_run, makes
from cloud.training.retrain_command import record
from tests.databases import database_url, postgres_uri
from tests.lakes import TestAlert, write_store

__all__ = ["database_url", "postgres_uri"]
NOW = 1_772_000_000.0
RUN = TrainingRun(
    started_at_s=NOW, finished_at_s=NOW + 90, champion_release=3, verdict="champion", samples=261, labels=21,
    frozen_sha256="0" * 64, report='{"reasons": ["na\u00efve"]}',
)  # fmt: skip


def test_every_alert_comes_with_what_people_said_of_it(database_url: str) -> None:
    kind = "inverter_overheating"
    told = [
        TestAlert("EV_1", "a1", kind, NOW, NOW + 60, "confirm", "charging_fault", "critical"),
        TestAlert("EV_1", "a2", kind, NOW + 600, NOW + 660, "false-alarm"),
        TestAlert("EV_2", "a3", kind, NOW, NOW + 60),
    ]

    async def read() -> None:
        await write_store(database_url, told)
        store = FleetStore.over(database_url)
        async with store.reading() as connection:
            found = await judged_alerts(connection)
            assert await makes(connection) == {}
        await store.close()
        assert {v: [a.alert_id for a in of] for v, of in found.items()} == {"EV_1": ["a1", "a2"], "EV_2": ["a3"]}
        confirmed, wrong = found["EV_1"]
        assert (confirmed.verdict, confirmed.label_type, confirmed.label_severity) == (
            "confirmed", "charging_fault", "critical",
        )  # fmt: skip
        assert (wrong.verdict, wrong.label_type) == ("false_alarm", None)
        assert (found["EV_2"][0].verdict, found["EV_2"][0].clock_trusted) == (None, True)
        assert confirmed.ended is not None

    asyncio.run(read())


def test_the_last_training_run_is_the_one_that_read_the_lake_last(database_url: str) -> None:
    async def read() -> None:
        store = FleetStore.over(database_url)
        await store.prepare()
        async with store.reading() as connection:
            assert await last_training_run(connection) is None
        newest = replace(
            RUN, started_at_s=NOW + 60, finished_at_s=NOW + 80, verdict="challenger", champion_release=None
        )
        async with store.writing() as connection:
            first = await add_training_run(connection, newest)
        assert await record(database_url, RUN) > first
        async with store.reading() as connection:
            assert await last_training_run(connection) == newest
        await store.close()

    asyncio.run(read())
