"""/metrics as Prometheus' own parser reads it, on both databases; and what a hostile vehicle cannot do to it."""

import asyncio
import contextlib
import re
import sqlite3
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import sqlalchemy as sa
from fastapi import FastAPI
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families

from cloud.api import create_app, metrics
from cloud.api.settings import Settings
from cloud.collector import ingest
from cloud.drift.decide import Judged
from cloud.drift.merge import Size
from cloud.drift.statistics import Distances
from cloud.drift.watch import Last
from cloud.store import tables
from cloud.store.drift_rows import Known
from cloud.store.figures import Figures
from cloud.store.fleet_store import FleetStore
from cloud.store.items import Item, RefusedItem
from edge_agent.contract import messages, topics
from edge_agent.contract.messages import Status
from tests.databases import database_url, postgres_uri

__all__ = ["database_url", "postgres_uri"]
pytestmark = pytest.mark.anyio
ROOT = Path(__file__).resolve().parents[2]
TYPE = "inverter_overheating"
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@contextlib.asynccontextmanager
async def serving(url: str, tmp_path: Path, **changes: Any) -> AsyncIterator[tuple[httpx.AsyncClient, FastAPI]]:
    # nothing here asks for advice, and a server without the sentence model starts at once
    app = create_app(Settings(database_url=url, lake=str(tmp_path / "lake"), embedding=Path("none"), **changes))
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://cloud") as client:
            yield client, app


async def scraped(client: httpx.AsyncClient) -> Samples:
    answer = await client.get("/metrics")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def value(found: Samples, name: str, **labels: str) -> float | None:
    return found.get((f"voltwatch_{name}", frozenset(labels.items())))


def event(data: messages.EventData, topic: str, seq: int, vehicle_id: str) -> Item:
    envelope = messages.event(
        data, event_id=f"e{seq}", vehicle_id=vehicle_id, time="2026-03-01T00:00:00.000Z", stream_id="s", seq=seq,
        boot_id="b", clock_trusted=True,
    )  # fmt: skip
    return ingest.decide(topic, messages.encode(envelope))


def alert(n: int, *, vehicle_id: str = "EV_1", transition: str = "raised", origin: str = "model") -> Item:
    told = messages.Alert(
        alert_id=f"a{n}", transition=transition, failure_type=TYPE, severity="high", origin=origin,  # type: ignore[arg-type]
        since="2026-03-01T00:00:00.000Z", model_release=None if origin == "guard" else 3,
    )  # fmt: skip
    return event(told, topics.alert(vehicle_id, TYPE), n + 1000 * (transition == "cleared"), vehicle_id)


def status(vehicle_id: str, state: str = "online", **said: Any) -> Item:
    return ingest.decide(topics.status(vehicle_id), messages.encode(Status(state=state, **said)))  # type: ignore[arg-type]


async def test_the_fleets_figures_are_what_the_store_holds(database_url: str, tmp_path: Path) -> None:
    async with serving(database_url, tmp_path) as (client, app):
        store: FleetStore = app.state.service.store
        now = app.state.service.wall()
        loss = messages.Loss(stream_id="s", stream="alert", first_seq=1, last_seq=7, count=7, reason="quota")
        await store.commit([
            *(alert(n) for n in range(1, 7)), alert(7, origin="guard"), alert(6, transition="cleared"),
            event(loss, topics.notice("EV_1"), 900, "EV_1"),
            RefusedItem("malformed", "t", "d", b"x"), RefusedItem("malformed", "t", "d", b"x"),
            status("EV_1", counters={"windows_scored": 40, "samples_sent": 2}, outbox={"alert": 3, "sample": 9}),
            status("EV_2", counters={"windows_scored": 2}, outbox={"alert": 1}), status("EV_3", state="offline"),
        ], received_at_s=now)  # fmt: skip
        for n, action, body in (
            (1, "confirm", {}), (2, "confirm", {}), (3, "confirm", {"failure_type": "charging_fault"}),
            (4, "false-alarm", {}), (5, "acknowledge", {}), (7, "false-alarm", {}),
        ):  # fmt: skip
            posted = await client.post(f"/v1/alerts/a{n}/{action}", json={"by": "anna", "reason": "r", **body})
            assert posted.status_code == 200
        async with store.writing() as connection:
            await _more_rows(connection, now)
        found = await scraped(client)
    assert value(found, "store_up") == 1
    assert value(found, "vehicles", state="online", channel="mqtt") == 2
    assert value(found, "vehicles", state="offline", channel="mqtt") == 1
    assert value(found, "newest_message_timestamp_seconds") == pytest.approx(now)
    assert value(found, "alerts_open", failure_type=TYPE, severity="high", work="confirmed") == 3
    assert value(found, "alerts_open", failure_type=TYPE, severity="high", work="false_alarm") == 2
    assert value(found, "alerts_open", failure_type=TYPE, severity="high", work="new") is None  # a6 is cleared
    assert value(found, "alerts_worked", state="acknowledged") == 1
    assert value(found, "alert_labels", failure_type=TYPE, release="3", said="right") == 2
    assert value(found, "alert_labels", failure_type=TYPE, release="3", said="other_type") == 1
    assert value(found, "alert_labels", failure_type=TYPE, release="3", said="false_alarm") == 1
    assert value(found, "alert_precision_ratio", failure_type=TYPE, release="3") == 0.5
    assert value(found, "alert_precision_ratio", failure_type=TYPE, release="none") is None  # a guard is no model
    assert value(found, "messages_refused_total", reason="malformed") == 2
    assert value(found, "losses_total") == 1
    assert value(found, "messages_lost_total") == 7
    assert value(found, "agents_summed") == 3
    assert value(found, "agents_waiting_messages", stream="alert") == 4
    assert value(found, "agents_waiting_messages", stream="sample") == 9
    assert value(found, "agents_reported", counter="windows_scored") == 42
    assert value(found, "agents_reported", counter="samples_sent") == 2
    assert value(found, "samples", state="lake") == 2
    assert value(found, "samples_bytes", state="lake") == 30
    assert value(found, "samples", state="broken") == 0
    assert value(found, "drift_alerts_open", scope="fleet", kind="signal") == 1
    assert value(found, "drift_alerts_open", scope="fleet", kind="score") == 0
    drifted = {"variable": "Vehicle.Speed", "kind": "signal", "stratum": "driving", "release": "3"}
    assert value(found, "drift_psi", **drifted) == 0.4
    assert value(found, "drift_psi_limit", **drifted) == 0.25
    assert value(found, "training_newest_timestamp_seconds") == pytest.approx(now - 5)
    assert value(found, "retraining_due") == 0
    assert value(found, "retraining_trigger_value", trigger="drift_alerts") == 1
    assert value(found, "retraining_trigger_limit", trigger="drift_alerts") == 3
    assert value(found, "retraining_trigger_due", trigger="age_days") == 0
    assert value(found, "retraining_trigger_value", trigger="performance_drop") is None  # no release is loaded


async def _more_rows(connection: Any, now: float) -> None:
    for n in range(2):
        await connection.execute(sa.insert(tables.sample).values(
            vehicle_id="EV_1", sample_id=f"x{n}", ingest_id=n, reason="random", alert_id="", failure_type="", parts=1,
            stratum="driving", end_time="2026-03-01T00:00:00.000Z", elapsed_s=60.0, coverage=1.0, state_id="s",
            length=15, sha256="0" * 64, received_at_s=now, state="lake",
        ))  # fmt: skip
    for cleared_at_s in (None, now):
        await connection.execute(sa.insert(tables.drift_alert).values(
            scope="fleet", scope_id="", reference="0" * 64, model_release=3, stratum="driving", kind="signal",
            variable="Vehicle.Speed", measure="psi", value=0.4, threshold=0.25, windows=900, vehicles=5,
            raised_at_s=now, updated_at_s=now, cleared_at_s=cleared_at_s,
        ))  # fmt: skip
    await connection.execute(sa.insert(tables.training_run).values(
        started_at_s=now - 60, finished_at_s=now - 5, verdict="champion", samples=1, labels=1, frozen_sha256="0" * 64,
        report="{}",
    ))  # fmt: skip


async def test_a_store_that_is_away_leaves_the_page_alive_and_says_so(tmp_path: Path) -> None:
    async with serving(f"sqlite:///{tmp_path}/v.db", tmp_path) as (client, app):
        service = app.state.service
        await service.store.close()
        (tmp_path / "v.db").rename(tmp_path / "kept.db")
        (tmp_path / "v.db").mkdir()
        found = await scraped(client)
        assert value(found, "store_up") == 0
        assert value(found, "newest_ingest_id") is None  # an old figure would look like a new one
        assert value(found, "broker_configured") == 0
        (tmp_path / "v.db").rmdir()
        (tmp_path / "kept.db").rename(tmp_path / "v.db")
        app.state.metrics._answered_s -= metrics.CACHE_S
        found = await scraped(client)
        assert (value(found, "store_up"), value(found, "newest_ingest_id")) == (1, 0)


async def test_a_store_that_is_too_slow_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "TIMEOUT_S", 0.2)
    async with serving(f"sqlite:///{tmp_path}/v.db", tmp_path) as (client, app):
        service = app.state.service
        for step in service._tasks:
            step.cancel()
        await asyncio.sleep(0)
        await service.store.close()  # the next connection is a new one, which waits for the lock to read the schema
        holder = sqlite3.connect(tmp_path / "v.db", isolation_level=None)
        holder.execute("PRAGMA locking_mode=EXCLUSIVE")
        holder.execute("BEGIN EXCLUSIVE")
        for _ in range(3):
            began = time.monotonic()
            assert value(await scraped(client), "store_up") == 0
            assert time.monotonic() - began < 2
        asking = app.state.metrics._asking
        holder.execute("ROLLBACK")
        holder.close()
        await asyncio.wait({asking})
        assert value(await scraped(client), "store_up") == 1


async def test_the_store_is_asked_once_however_often_the_page_is_read(tmp_path: Path) -> None:
    async with serving(f"sqlite:///{tmp_path}/v.db", tmp_path) as (client, app):
        asked = 0

        def count(*_: object) -> None:
            nonlocal asked
            asked += 1

        sa.event.listen(app.state.service.store.engine.sync_engine, "before_cursor_execute", count)
        await scraped(client)
        once = asked
        assert 0 < once < 40
        for _ in range(5):
            await scraped(client)
        assert asked - once < once  # the background steps ask too


async def test_a_request_is_counted_under_its_route_whatever_is_in_its_path(tmp_path: Path) -> None:
    async with serving(f"sqlite:///{tmp_path}/v.db", tmp_path) as (client, _):
        for n in range(20):
            await client.get(f"/v1/alerts/none{n}")
            await client.get(f"/nothing/{n}")
            await client.request(f"VERB{n}", "/health")
        await client.get("/vehicles")
        found = await scraped(client)
        counted = {
            tuple(dict(labels)[name] for name in ("method", "route", "status")): n
            for (name, labels), n in found.items() if name == "voltwatch_http_request_duration_seconds_count"
        }  # fmt: skip
        assert counted == {
            ("GET", "/v1/alerts/{alert_id}", "4xx"): 20, ("GET", "unknown", "4xx"): 20,
            ("unknown", "/health", "4xx"): 20, ("GET", "/vehicles", "2xx"): 1,
        }  # fmt: skip
        sums = [n for (name, _), n in found.items() if name == "voltwatch_http_request_duration_seconds_sum"]
        assert all(0 < n < 20 for n in sums)


async def test_openmetrics_is_given_where_it_is_asked_for(tmp_path: Path) -> None:
    async with serving(f"sqlite:///{tmp_path}/v.db", tmp_path) as (client, _):
        answer = await client.get("/metrics", headers={"accept": "application/openmetrics-text; version=garbage"})
        assert answer.headers["content-type"] == "application/openmetrics-text; version=1.0.0; charset=utf-8"
        assert "voltwatch_store_up" in {family.name for family in openmetrics_families(answer.text)}


async def test_frames_over_http_are_counted_and_their_vehicle_goes_offline_by_silence(
    database_url: str, tmp_path: Path
) -> None:
    async with serving(database_url, tmp_path) as (client, app):
        body = {"vehicle_id": "EV_9", "time": 1_772_000_000.0, "signals": {"Vehicle.Speed": 50.0}}
        assert (await client.post("/telemetry", json=body)).status_code == 200
        found = await scraped(client)
        assert value(found, "vehicles", state="online", channel="http") == 1
        assert value(found, "telemetry_steps_total", step="frames") == 1
        async with app.state.service.store.writing() as connection:
            await connection.execute(sa.update(tables.vehicle).values(last_seen_at_s=0.0))
        app.state.metrics._answered_s -= metrics.CACHE_S
        assert value(await scraped(client), "vehicles", state="offline", channel="http") == 1


def test_a_vehicle_with_names_and_numbers_of_its_own_does_not_grow_the_page_or_break_it() -> None:
    fleet = [msgspec.json.encode({"counters": {f"c{n}": 1 for n in range(60)}}).decode()] * 3
    hostile = [
        msgspec.json.encode({
            "counters": {f"a{v}_{n}": 1 for n in range(500)}, "outbox": {f"s{n}": 1 for n in range(99)}
        }).decode()
        for v in range(2)
    ]  # fmt: skip
    hostile += ['{"counters": {"c1": ' + "9" * 400 + "}}", '{"counters": {"c2": -5}}', '{"counters": []}', "[]", "{"]
    found = metrics.summed(fleet + hostile)
    assert len(found.counters) == metrics.MAX_NAMES + 1
    assert all(found.counters[f"c{n}"] == 3 for n in range(60) if n != 1)
    assert found.counters["c1"] <= 3 + metrics.MAX_COUNT
    assert len(found.waiting) == metrics.MAX_STREAMS + 1
    assert sum(found.counters.values()) - found.counters["c1"] == 59 * 3 + 1000


def test_what_the_fleet_uses_is_kept_before_what_one_vehicle_uses() -> None:
    assert metrics.popular({"a": 5, "b": 1, "c": 2, "other": 1}, {"a": 1, "b": 9, "c": 9, "other": 1}, 2) == {
        "b": 1, "c": 2, "other": 6
    }  # fmt: skip


def test_the_newest_look_at_the_fleet_is_shown_and_bounded() -> None:
    known = Known("0" * 64, 3, "model", 0.0, b"")
    fleet = tuple(
        Judged(
            f"v{n}", "feature", "driving", "drift" if n > 100 else "ok", "", Distances(n / 100, 0.1, 0.1), 0.5,
            "config", Size(900, 5, 5.0, 180.0), 900,
        )
        for n in range(150)
    )  # fmt: skip
    few = replace(fleet[149], variable="few", verdict="too_few", threshold=None)
    families = {family.name: family for family in metrics._drift(_nothing(), (Last(9.0, known, (*fleet, few)),))}
    shown = {sample.labels["variable"]: sample.value for sample in families["voltwatch_drift_psi"].samples}
    assert list(shown) == [f"v{n}" for n in range(149, 49, -1)]
    assert shown["v60"] == 0.6  # also what is below its limit
    assert families["voltwatch_drift_look_timestamp_seconds"].samples[0].value == 9.0


def _nothing() -> Figures:
    return Figures(
        newest_ingest_id=0, vehicles={}, newest_seen_at_s=None, open_alerts={}, work={}, judged={}, refused={},
        parked=0, losses=(0, 0), drift_alerts={}, fleet_drift=[], samples={}, trained_at_s=None, statuses=[],
    )  # fmt: skip


async def test_every_metric_that_the_alert_rules_name_is_on_the_page(tmp_path: Path) -> None:
    rules = (ROOT / "deploy" / "prometheus" / "voltwatch.rules.yml").read_text(encoding="utf-8")
    named = set(re.findall(r"voltwatch_[a-z_]+", "\n".join(re.findall(r"expr: (.*)", rules))))
    async with serving(f"sqlite:///{tmp_path}/v.db", tmp_path, broker="127.0.0.1:9") as (client, app):
        refused = RefusedItem("malformed", "t", "d", b"x")
        await app.state.service.store.commit([alert(1), refused], received_at_s=app.state.service.wall())
        on_page = {name for name, _ in await scraped(client)}
    assert len(named) >= 8
    assert named <= on_page


async def test_every_metric_is_documented_and_every_documented_one_exists() -> None:
    page = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
    table = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    named = {f"voltwatch_{name}" for cell in table for name in re.findall(r"`([a-z_]+)(?:\{[^}]*\})?`", cell)}
    code = (ROOT / "cloud" / "api" / "metrics.py").read_text(encoding="utf-8")
    made = {f"voltwatch_{name}" for name in re.findall(r'_(?:gauge|gauges)\(\s*"([a-z_]+)"', code)}
    made |= {f"voltwatch_{name}_total" for name in re.findall(r'_(?:counter|counters)\(\s*"([a-z_]+)"', code)}
    made |= {"voltwatch_build_info", "voltwatch_bundle_info", "voltwatch_http_request_duration_seconds"}
    assert named == made
