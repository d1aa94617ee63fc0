"""Frames over HTTP when things go wrong around them: a locked store, many vehicles, requests at once, a restart."""

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cloud.api import create_app
from cloud.api.settings import Settings
from cloud.store import connect
from cloud.store.fleet_store import FleetStore
from cloud.store.items import TelemetryCommit, Written
from edge_agent.contract.bundle import Decision
from edge_agent.contract.signals import default_catalogue
from tests.bundles import build_bundle
from tests.databases import database_url, postgres_uri

__all__ = ["database_url", "postgres_uri"]
pytestmark = pytest.mark.anyio
START = 1_772_000_000.0
SPEED = "Vehicle.Speed"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@contextlib.asynccontextmanager
async def serving(tmp_path: Path, **changes: Any) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(Settings(**{"database_url": f"sqlite:///{tmp_path}/v.db", "lake": f"{tmp_path}/lake", **changes}))
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://cloud") as client,
    ):
        yield client


def frames(vehicle_id: str, begin: int, count: int) -> dict[str, Any]:
    every = {s.name: (s.min + s.max) / 4 for s in default_catalogue().scalars}
    return {
        "vehicle_id": vehicle_id,
        "frames": [{"time": START + begin + n, "signals": every} for n in range(count)],
    }


async def test_an_alert_decided_while_the_store_is_locked_is_stored_with_the_next_frames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connect, "BUSY_TIMEOUT_MS", 50)
    async with serving(tmp_path) as client:

        def probes(second: int, *values: float) -> dict[str, Any]:
            return {"vehicle_id": "EV_1", "time": START + second, "cell_temperature": list(values)}

        for second in (0, 10):
            await client.post("/telemetry", json=probes(second, 25.0, 25.5))
        locker = sqlite3.connect(tmp_path / "v.db", isolation_level=None)
        locker.execute("BEGIN IMMEDIATE")
        refused = await client.post("/telemetry", json=probes(20, 120.0, 121.0))
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
        locker.execute("ROLLBACK")
        locker.close()
        assert (await client.get("/alerts")).json()["alerts"] == []
        again = await client.post("/telemetry", json=probes(20, 120.0, 121.0))  # as a client does that was told 503
        assert again.status_code == 200
        (alert,) = (await client.get("/alerts")).json()["alerts"]
        assert (alert["failure_type"], alert["origin"]) == ("thermal_runaway_risk", "guard")


async def test_vehicles_that_were_put_aside_go_on_where_they_were(tmp_path: Path, database_url: str) -> None:
    bundle = build_bundle(tmp_path / "bundle", default_catalogue())
    names = [f"EV_{n}" for n in range(5)]
    async with serving(tmp_path, bundle=bundle, max_vehicles_in_memory=2, database_url=database_url) as client:
        for begin in range(0, 300, 50):
            for name in names:
                reply = (await client.post("/telemetry", json=frames(name, begin, 50))).json()
                assert reply["predictions"] == (1 if begin == 250 else 0)
        health = (await client.get("/health")).json()
        assert health["telemetry"]["states_restored"] == 25


async def test_requests_at_once_for_one_vehicle_take_effect_one_after_the_other(tmp_path: Path) -> None:
    bundle = build_bundle(tmp_path / "bundle", default_catalogue())
    async with serving(tmp_path, bundle=bundle) as client:
        replies = await asyncio.gather(
            *(client.post("/telemetry", json=frames(f"EV_{n % 2}", n // 2 * 10, 10)) for n in range(60))
        )
        assert {r.status_code for r in replies} == {200}
        predictions = [r.json() for r in replies if r.json()["predictions"]]
        assert sorted(p["vehicle_id"] for p in predictions) == ["EV_0", "EV_1"]


async def test_a_request_sent_again_changes_nothing(tmp_path: Path) -> None:
    bundle = build_bundle(tmp_path / "bundle", default_catalogue())
    async with serving(tmp_path, bundle=bundle) as client:
        for _ in range(3):
            reply = (await client.post("/telemetry", json=frames("EV_1", 0, 200))).json()
        overlapping = (await client.post("/telemetry", json=frames("EV_1", 150, 100))).json()
        assert (reply["window"]["filled_s"], overlapping["window"]["filled_s"]) == (200, 250)
        assert (await client.post("/telemetry", json=frames("EV_1", 250, 50))).json()["predictions"] == 1


async def test_a_vehicle_that_reports_every_ten_seconds_is_scored(tmp_path: Path) -> None:
    bundle = build_bundle(tmp_path / "bundle", default_catalogue())
    async with serving(tmp_path, bundle=bundle) as client:
        whole = frames("EV_1", 0, 310)["frames"][::10]
        scored = []
        for n, one in enumerate(whole):
            body = {"vehicle_id": "EV_1", "period_s": 10.0, "frames": [one]}
            reply = (await client.post("/telemetry", json=body)).json()
            scored += [n] if reply["prediction"] else []
        assert scored == [30]
        assert reply["prediction"]["coverage"] == 1.0


async def test_a_state_that_cannot_be_used_is_left_and_the_vehicle_begins_anew(tmp_path: Path) -> None:
    async with serving(tmp_path) as client:
        await client.post("/telemetry", json=frames("EV_1", 0, 100))
    with contextlib.closing(sqlite3.connect(tmp_path / "v.db")) as database:
        database.execute("UPDATE pipeline_state SET snapshot = x'00ff00'")
        database.commit()
    async with serving(tmp_path) as client:
        reply = (await client.post("/telemetry", json=frames("EV_1", 100, 1))).json()
        assert reply["window"]["filled_s"] == 1
        assert (await client.get("/health")).json()["telemetry"]["states_discarded"] == 1


async def test_a_request_sent_again_after_another_one_or_a_restart_changes_nothing(
    tmp_path: Path, database_url: str
) -> None:
    bundle = build_bundle(tmp_path / "bundle", default_catalogue())
    first, second = frames("EV_1", 0, 100), frames("EV_1", 100, 100)
    async with serving(tmp_path, bundle=bundle, database_url=database_url) as client:
        for body in (first, second, first):
            reply = (await client.post("/telemetry", json=body)).json()
        assert reply["window"]["filled_s"] == 200
        assert reply["frames_accepted"] == 0
        assert reply["notes"] == ["frames not newer than the newest one before, left out as sent again: 100"]
    async with serving(tmp_path, bundle=bundle, database_url=database_url) as client:
        assert (await client.post("/telemetry", json=second)).json()["window"]["filled_s"] == 200
        assert (await client.get("/health")).json()["telemetry"]["frames_repeated"] == 100
        assert (await client.post("/telemetry", json=frames("EV_1", 200, 100))).json()["predictions"] == 1


@pytest.mark.parametrize("at_once", [1, 50])
async def test_a_clock_set_back_is_followed_so_a_frame_from_the_future_locks_nobody_out(
    tmp_path: Path, at_once: int
) -> None:
    bundle = build_bundle(tmp_path / "bundle", default_catalogue())
    async with serving(tmp_path, bundle=bundle) as client:
        await client.post("/telemetry", json=frames("EV_1", 10**8, 1))
        predictions = 0
        for begin in range(0, 400, at_once):
            predictions += (await client.post("/telemetry", json=frames("EV_1", begin, at_once))).json()["predictions"]
        assert predictions >= 1


def inverter(begin: int, count: int, celsius: float, **more: Any) -> dict[str, Any]:
    name = "Vehicle.Powertrain.Inverter.Temperature"
    each = [{"time": START + begin + n, "signals": {name: celsius}, **more} for n in range(count)]
    return {"vehicle_id": "EV_1", "frames": each}


@pytest.mark.parametrize(
    ("in_frame", "in_body"),
    [
        ({"cell_voltage": [3.7] * 96}, {}),
        ({"cell_temperature": [25.0] * 8}, {}),
        ({}, {"period_s": 2.0}),
        ({"cell_voltage": [3.7] * 96, "cell_temperature": [25.0] * 8}, {"period_s": 2.0}),
    ],
)
async def test_a_standing_alert_goes_on_and_ends_when_cells_turn_up_or_the_period_changes(
    tmp_path: Path, in_frame: dict[str, Any], in_body: dict[str, Any]
) -> None:
    async with serving(tmp_path) as client:
        await client.post("/telemetry", json=inverter(0, 400, 60.0))
        (raised,) = (await client.post("/telemetry", json=inverter(400, 20, 140.0))).json()["alerts"]
        standing = await client.post("/telemetry", json={**inverter(420, 10, 140.0, **in_frame), **in_body})
        assert standing.json()["alerts"] == []
        (cleared,) = (await client.post("/telemetry", json=inverter(430, 700, 60.0))).json()["alerts"]
        assert (cleared["transition"], cleared["alert_id"]) == ("cleared", raised["alert_id"])
        (listed,) = (await client.get("/alerts")).json()["alerts"]
        assert listed["state"] == "cleared"


async def test_a_model_alert_goes_on_and_ends_when_cells_turn_up(tmp_path: Path) -> None:
    rule = Decision(k=1, n=1, clear_windows=1)
    bundle = build_bundle(tmp_path / "bundle", default_catalogue(), decision=rule)

    def speed(begin: int, count: int, km_h: float) -> dict[str, Any]:
        body = frames("EV_1", begin, count)
        for one in body["frames"]:
            one["signals"] = {**one["signals"], SPEED: km_h}
        return body

    async with serving(tmp_path, bundle=bundle) as client:
        raised = (await client.post("/telemetry", json=speed(0, 400, 200.0))).json()["alerts"]
        wider = speed(400, 700, 10.0)
        for one in wider["frames"]:
            one["cell_voltage"] = [3.7] * 8
        told = (await client.post("/telemetry", json=wider)).json()["alerts"]
        ended = {alert["alert_id"] for alert in told if alert["transition"] == "cleared"}
        assert raised
        assert {alert["alert_id"] for alert in raised} <= ended


async def test_a_state_that_the_store_refuses_costs_no_other_vehicle(tmp_path: Path) -> None:
    async with serving(tmp_path, max_vehicles_in_memory=2) as client:
        await client.get("/health")
        with contextlib.closing(sqlite3.connect(tmp_path / "v.db")) as database:
            database.execute(
                "CREATE TRIGGER poison BEFORE INSERT ON pipeline_state WHEN NEW.vehicle_id = 'BAD' "
                "BEGIN SELECT RAISE(ABORT, 'cannot be held'); END"
            )
        for name in ("BAD", "EV_1", "EV_2", "EV_3"):
            assert (await client.post("/telemetry", json=frames(name, 0, 100))).status_code == 200
    async with serving(tmp_path) as client:
        for name in ("EV_1", "EV_2", "EV_3"):
            reply = (await client.post("/telemetry", json=frames(name, 100, 1))).json()
            assert reply["window"]["filled_s"] == 101


async def test_a_vehicle_is_put_aside_under_its_own_lock_and_no_alert_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the eviction's commit is slow, the vehicle's next request waits; what it says is stored after it."""
    real = FleetStore.commit_telemetry
    begun, gate = asyncio.Event(), asyncio.Event()

    async def slow(store: FleetStore, step: TelemetryCommit, *, received_at_s: float) -> Written:
        if step.vehicle_id == "EV_1" and step.snapshot is not None and not begun.is_set():
            begun.set()
            await gate.wait()
        return await real(store, step, received_at_s=received_at_s)

    async with serving(tmp_path, max_vehicles_in_memory=1) as client:
        await client.post("/telemetry", json=inverter(0, 20, 60.0))
        monkeypatch.setattr(FleetStore, "commit_telemetry", slow)
        other = asyncio.create_task(client.post("/telemetry", json=frames("EV_2", 0, 5)))
        await begun.wait()
        hot = asyncio.create_task(client.post("/telemetry", json=inverter(20, 20, 140.0)))
        done, _ = await asyncio.wait({hot}, timeout=0.3)
        assert not done
        gate.set()
        assert (await other).status_code == 200
        (raised,) = (await hot).json()["alerts"]
        (listed,) = (await client.get("/alerts")).json()["alerts"]
        assert listed["alert_id"] == raised["alert_id"]
        assert (await client.get("/health")).json()["telemetry"]["states_restored"] == 1
