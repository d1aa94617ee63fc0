"""Drift counts and samples of vehicles without an agent: events of the server's own stream, stored with their state."""

import asyncio
import contextlib
import math
import sqlite3
from pathlib import Path
from typing import Any

import httpx
import pytest

from cloud.api import service as service_module
from cloud.api import telemetry
from cloud.store import connect
from cloud.store.fleet_store import StoreAwayError
from edge_agent.contract import messages
from edge_agent.contract.arrivals import ArrivalBlock
from edge_agent.contract.signals import default_catalogue
from edge_agent.pipeline.bundle_dir import load_bundle
from edge_agent.pipeline.chain import Pipeline
from edge_agent.pipeline.reports import reports
from tests.bundles import build_bundle
from tests.telemetry import quiet
from tests.unit.test_api_telemetry import serving

pytestmark = pytest.mark.anyio
CATALOGUE = default_catalogue()
START = 1_772_000_000.0
SPEED = "Vehicle.Speed"
HOUR_AND_A_HALF = 5_400
CHUNK = 300


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return build_bundle(tmp_path / "bundle", CATALOGUE)


def drive(seconds: int = HOUR_AND_A_HALF) -> ArrivalBlock:
    """A drive whose second third is faster than half of the speed's range: the tiny bundle's first alert."""
    block = quiet([START + n for n in range(seconds)], cells=4, probes=2)
    block.scalars[seconds // 3 : 2 * seconds // 3, CATALOGUE.scalar_index[SPEED]] = 200.0
    return block


def frames(block: ArrivalBlock) -> list[dict[str, Any]]:
    return [
        {"time": float(time_s), "signals": dict(zip(CATALOGUE.scalar_names, map(float, row), strict=True)),
         "cell_voltage": list(map(float, cells)), "cell_temperature": list(map(float, probes))}
        for time_s, row, cells, probes in zip(
            block.time_s, block.scalars, block.cell_voltage, block.cell_temperature, strict=True
        )
    ]  # fmt: skip


async def post(client: httpx.AsyncClient, some: list[dict[str, Any]], vehicle_id: str = "EV_1") -> httpx.Response:
    known = [{**f, "signals": {k: v for k, v in f["signals"].items() if math.isfinite(v)}} for f in some]
    return await client.post("/telemetry", json={"vehicle_id": vehicle_id, "make": "volta", "frames": known})


def rows(tmp_path: Path, query: str) -> list[tuple[Any, ...]]:
    with contextlib.closing(sqlite3.connect(tmp_path / "v.db")) as database:
        return database.execute(query).fetchall()


def counted(tmp_path: Path) -> int:
    return sum(windows for (windows,) in rows(tmp_path, "SELECT windows FROM drift"))


async def test_frames_over_http_give_the_counts_and_samples_that_a_replay_of_them_gives(
    tmp_path: Path, bundle: Path
) -> None:
    sent = frames(drive())
    async with serving(tmp_path, bundle=bundle) as client:
        for begin in range(0, len(sent), CHUNK):
            assert (await post(client, sent[begin : begin + CHUNK])).status_code == 200
        stored = rows(tmp_path, "SELECT event_id FROM event WHERE type LIKE '%drift' OR type LIKE '%sample'")
    loaded = load_bundle(bundle, CATALOGUE)
    pipeline = Pipeline(CATALOGUE, vehicle_id="EV_1", cells=4, probes=2, bundle=loaded)
    outcomes = pipeline.push(drive()) + pipeline.complete()
    said = [r for o in outcomes for r in reports(o, vehicle_id="EV_1", bundle=loaded) if r.stream != "alert"]
    assert {r.stream for r in said} == {"drift", "sample"}
    assert {event_id for (event_id,) in stored} == {r.event_id for r in said}
    assert counted(tmp_path) == sum(r.data.windows for r in said if isinstance(r.data, messages.DriftCounts)) > 0
    samples = rows(tmp_path, "SELECT reason, alert_id != '' FROM sample WHERE vehicle_id = 'EV_1'")
    assert ("alert", 1) in samples


async def test_a_restart_of_the_server_counts_every_window_exactly_once(
    tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry, "SILENT_S", 0.0)
    sent, scored = frames(drive()), 0
    for begin in range(0, len(sent), 3 * CHUNK):
        async with serving(tmp_path, bundle=bundle) as client:
            for part in range(begin, begin + 3 * CHUNK, CHUNK):
                scored += (await post(client, sent[part : part + CHUNK])).json()["predictions"]
                await post(client, sent[part : part + CHUNK])  # sent again
            if begin + 3 * CHUNK >= len(sent):
                await client._transport.app.state.service.telemetry.rest()  # type: ignore[attr-defined]
    assert counted(tmp_path) == scored > 80


async def test_counts_of_a_vehicle_that_fell_silent_leave(
    tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tmp_path, bundle=bundle) as client:
        service = client._transport.app.state.service.telemetry  # type: ignore[attr-defined]
        for begin in range(0, 600, CHUNK):
            await post(client, frames(drive(600))[begin : begin + CHUNK])
        await service.rest()
        assert counted(tmp_path) == 0, "it may still send"
        monkeypatch.setattr(telemetry, "SILENT_S", 0.0)
        await service.rest()
        await service.rest()
        assert counted(tmp_path) == 6


async def test_counts_decided_while_the_store_is_locked_are_stored_with_the_next_frames(
    tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connect, "BUSY_TIMEOUT_MS", 50)
    sent = frames(drive())
    async with serving(tmp_path, bundle=bundle) as client:
        for begin in range(0, 3_600, CHUNK):
            await post(client, sent[begin : begin + CHUNK])
        assert counted(tmp_path) == 0
        locker = sqlite3.connect(tmp_path / "v.db", isolation_level=None)
        locker.execute("BEGIN IMMEDIATE")
        assert (await post(client, sent[3_600:3_900])).status_code == 503
        locker.execute("ROLLBACK")
        locker.close()
        assert (await post(client, sent[3_600:3_900])).status_code == 200
        assert counted(tmp_path) == 60, "an hour of windows, one a minute"


async def test_counts_that_a_locked_store_refused_are_counted_once_also_over_a_crash(
    tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connect, "BUSY_TIMEOUT_MS", 50)
    sent = frames(drive(2_700))
    scored = 0
    async with serving(tmp_path, bundle=bundle) as client:
        service = client._transport.app.state.service.telemetry  # type: ignore[attr-defined]
        for begin in range(0, 900, CHUNK):
            scored += (await post(client, sent[begin : begin + CHUNK])).json()["predictions"]
        monkeypatch.setattr(telemetry, "SILENT_S", 0.0)
        with contextlib.closing(sqlite3.connect(tmp_path / "v.db", isolation_level=None)) as locker:
            locker.execute("BEGIN IMMEDIATE")
            with contextlib.suppress(StoreAwayError):
                await service.rest()
            locker.execute("ROLLBACK")
        assert counted(tmp_path) == 0
        await service.rest()
        assert counted(tmp_path) == scored, "a second try stores what the first could not"
        monkeypatch.setattr(telemetry, "SILENT_S", 300.0)
        assert (await post(client, sent[900:910])).json()["predictions"] == 0

        async def crash(*_: object, **__: object) -> bool:
            return True

        monkeypatch.setattr(service, "_put_aside", crash)  # what comes now was never saved
    async with serving(tmp_path, bundle=bundle) as client:
        service = client._transport.app.state.service.telemetry  # type: ignore[attr-defined]
        for begin in range(900, 2_700, CHUNK):
            scored += (await post(client, sent[begin : begin + CHUNK])).json()["predictions"]
        monkeypatch.setattr(telemetry, "SILENT_S", 0.0)
        await service.rest()
    assert counted(tmp_path) == scored


async def test_the_service_lets_silent_vehicles_counts_leave_by_itself(
    tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "REST_STEP_S", 0.05)
    monkeypatch.setattr(telemetry, "SILENT_S", 0.0)
    sent = frames(drive(900))
    async with serving(tmp_path, bundle=bundle) as client:
        scored = 0
        for begin in range(0, 900, CHUNK):
            scored += (await post(client, sent[begin : begin + CHUNK])).json()["predictions"]
        for _ in range(100):
            if counted(tmp_path) == scored > 0:
                break
            await asyncio.sleep(0.05)
        assert counted(tmp_path) == scored > 0
