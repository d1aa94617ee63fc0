"""GET /v1/drift, /v1/drift/alerts and /v1/retraining through the real app, on both databases."""

import asyncio
import contextlib
import hashlib
import json
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import msgspec
import pytest
import sqlalchemy as sa
import typer
from fastapi import FastAPI
from typer.testing import CliRunner

from cloud.__main__ import COMMANDS
from cloud.api import create_app
from cloud.api.settings import Settings
from cloud.api.v1 import drift as drift_endpoint
from cloud.drift.bins import Bins, IntArray
from cloud.drift.commands import register_reference
from cloud.drift.watch import LOOKS
from cloud.store import tables
from cloud.store.items import Item
from cloud.store.training_rows import TrainingRun, add_training_run
from edge_agent.contract import bundle as contract
from edge_agent.contract import messages
from edge_agent.contract.bundle import parse_thresholds
from edge_agent.contract.signals import FAILURE_TYPES, default_catalogue
from tests.bundles import build_bundle, rewrite_manifest
from tests.databases import database_url, postgres_uri
from tests.drift_fleet import HEAT, REFERENCE, SPEED, iso, manifest, sha256, status, told, with_reference

__all__ = ["database_url", "postgres_uri"]
pytestmark = pytest.mark.anyio
HOUR = 3600.0
KIND = FAILURE_TYPES[0]
PROBLEM = "application/problem+json"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A release made five days ago that states a precision of 0.9 for its first type."""
    folder = with_reference(build_bundle(tmp_path / "bundle", default_catalogue()))
    told_thresholds = parse_thresholds((folder / contract.THRESHOLDS).read_bytes(), "")
    policy = msgspec.structs.replace(told_thresholds.policy, measured={f"{KIND}.window_precision": 0.9})
    data = msgspec.json.encode(msgspec.structs.replace(told_thresholds, policies={told_thresholds.active: policy}))
    (folder / contract.THRESHOLDS).write_bytes(data)
    files = json.loads((folder / contract.MANIFEST).read_bytes())["files"]
    files[contract.THRESHOLDS] = {"length": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    rewrite_manifest(folder, files=files, created=iso(time.time() - 5 * 86_400))
    return folder


@contextlib.asynccontextmanager
async def serving(
    url: str, tmp_path: Path, bundle: Path | None
) -> AsyncIterator[tuple[httpx.AsyncClient, FastAPI]]:  # fmt: skip
    app = create_app(Settings(database_url=url, bundle=bundle, lake=str(tmp_path / "lake")))
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://cloud") as client:
            yield client, app


async def commit(app: FastAPI, items: list[Item], at_s: float | None = None) -> None:
    await app.state.service.store.commit(items, received_at_s=at_s or time.time())


def fleet(reference: str, vehicles: int, *, shift: float = 0.0) -> list[Item]:
    now = time.time()
    return [
        told(f"EV_{v}", hour + 1, now - hour * HOUR - 60, reference, shift=shift)
        for v in range(1, vehicles + 1)
        for hour in range(10)
    ]


async def test_the_drift_of_fleet_make_and_vehicle_is_answered_with_its_sample_size(
    database_url: str, tmp_path: Path, bundle: Path
) -> None:
    async with serving(database_url, tmp_path, bundle) as (client, app):
        await commit(app, [status(f"EV_{v}", "m") for v in range(1, 5)])
        await app.state.service.drift.step()
        await commit(app, fleet(sha256(bundle), 4, shift=0.9))
        for query, scope in (("", "fleet"), ("?make=m", "make"), ("?vehicle_id=EV_1", "vehicle")):
            answer = await client.get(f"/v1/drift{query}")
            assert answer.status_code == 200, answer.text
            body = answer.json()
            assert (body["scope"], body["verdict"]) == (scope, "drift" if scope != "vehicle" else "ok")
            against = body["references"][0]
            assert against["model_release"] == 1
            assert against["calibration"]["false_alarm_rate"] == 0.01
            speed = next(v for v in against["variables"] if v["name"] == SPEED)
            assert speed["size"]["vehicles"] == (1 if scope == "vehicle" else 4)
            assert speed["size"]["windows"] == (600 if scope == "vehicle" else 2400)
            assert speed["psi"] > 0.5
            assert 0 < speed["ks"] < 1
            assert speed["threshold_source"] == "release"
        only = (await client.get("/v1/drift?kind=feature&stratum=driving")).json()
        assert [v["name"] for v in only["references"][0]["variables"]] == [HEAT]
        parked = (await client.get("/v1/drift?stratum=parked")).json()
        assert (parked["references"], parked["verdict"]) == ([], "too_few")


async def test_a_question_over_too_many_messages_is_answered_with_how_to_narrow_it(
    database_url: str, tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drift_endpoint, "MOST_MESSAGES", 15)
    async with serving(database_url, tmp_path, bundle) as (client, app):
        await app.state.service.drift.step()
        await commit(app, [status("EV_1", "one"), *fleet(sha256(bundle), 2)])
        answer = await client.get("/v1/drift")
        assert (answer.status_code, answer.headers["content-type"]) == (422, PROBLEM)
        assert "20 drift messages lie between `from` and `to`" in answer.json()["detail"]
        assert [e["field"] for e in answer.json()["errors"]] == ["from"]
        since = iso(time.time() - 5 * HOUR)
        for narrower in ("vehicle_id=EV_1", "make=one", "stratum=parked", f"from={since}"):
            assert (await client.get(f"/v1/drift?{narrower}")).status_code == 200, narrower


async def test_large_questions_wait_their_turn_and_are_read_beside_the_event_loop(
    database_url: str, tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drift_endpoint, "FEW_MESSAGES", 15)
    monkeypatch.setattr(drift_endpoint, "TURN_WAIT_S", 0.2)
    threads: set[int] = set()
    row = Bins.row

    def seen(self: Bins, told: messages.DriftCounts) -> IntArray:
        threads.add(threading.get_ident())
        return row(self, told)

    async with serving(database_url, tmp_path, bundle) as (client, app):
        await app.state.service.drift.step()
        await commit(app, fleet(sha256(bundle), 2))
        monkeypatch.setattr(Bins, "row", seen)
        turns = app.state.service.drift.turns
        for _ in range(LOOKS):
            await turns.acquire()
        refused = await client.get("/v1/drift")
        assert (refused.status_code, refused.headers["retry-after"]) == (503, str(drift_endpoint.RETRY_AFTER_S))
        assert (await client.get("/v1/drift?vehicle_id=EV_1")).status_code == 200  # a small one has no need of a turn
        waits = asyncio.create_task(client.get("/v1/drift"))
        await asyncio.sleep(0.05)
        turns.release()
        assert (await waits).status_code == 200
        assert (await client.get("/v1/drift")).status_code == 200  # its turn was given back
    assert threads
    assert threading.get_ident() not in threads


async def test_a_span_holds_what_ended_within_it(database_url: str, tmp_path: Path, bundle: Path) -> None:
    async with serving(database_url, tmp_path, bundle) as (client, app):
        await app.state.service.drift.step()
        now = time.time()
        old = [told("EV_1", n, now - 40 * 86_400 - n * 60, sha256(bundle)) for n in range(1, 11)]
        await commit(app, [*old, told("EV_1", 50, now - 60, sha256(bundle))])
        recent = (await client.get("/v1/drift?vehicle_id=EV_1")).json()
        assert recent["references"][0]["messages"] == 1
        assert recent["verdict"] == "too_few"
        whole = (await client.get("/v1/drift", params={"vehicle_id": "EV_1", "from": iso(now - 60 * 86_400)})).json()
        assert whole["references"][0]["messages"] == 11
        before = {"vehicle_id": "EV_1", "from": str(now - 60 * 86_400), "to": str(now - 30 * 86_400)}
        assert (await client.get("/v1/drift", params=before)).json()["references"][0]["messages"] == 10


async def test_no_data_is_an_empty_answer_with_too_few(database_url: str, tmp_path: Path) -> None:
    async with serving(database_url, tmp_path, None) as (client, app):
        await commit(app, [status("EV_1", "m")])
        for query in ("", "?vehicle_id=EV_1", "?make=never%20heard%20of"):
            body = (await client.get(f"/v1/drift{query}")).json()
            assert (body["verdict"], body["references"], body["unknown_references"]) == ("too_few", [], [])
        assert (await client.get("/v1/drift/alerts")).json() == {"alerts": [], "next": None}


@pytest.mark.parametrize(
    ("query", "code", "words"),
    [
        ("vehicle_id=nobody", 404, "nobody"),
        ("from=2026-03-02T00:00:00Z&to=2026-03-01T00:00:00Z", 422, "must lie before `to`"),
        ("from=2020-01-01T00:00:00Z&to=2026-03-01T00:00:00Z", 422, "at most 366 days"),
        ("from=yesterday", 422, "from: must be an ISO 8601 time"),
        ("vehicle_id=EV_1&make=m", 422, "not both"),
        ("stratum=flying", 422, "stratum"),
        ("vehicle=EV_1", 422, "not a parameter here"),
    ],
)
async def test_a_wrong_question_is_answered_with_what_is_wrong(
    tmp_path: Path, query: str, code: int, words: str
) -> None:
    async with serving(f"sqlite:///{tmp_path}/v.db", tmp_path, None) as (client, _):
        answer = await client.get(f"/v1/drift?{query}")
        assert (answer.status_code, answer.headers["content-type"]) == (code, PROBLEM)
        assert words in answer.json()["detail"]


async def test_counts_of_an_unknown_release_are_listed_and_count_after_the_operator_registers_it(
    database_url: str, tmp_path: Path, bundle: Path
) -> None:
    async with serving(database_url, tmp_path, None) as (client, app):
        await commit(app, fleet(sha256(bundle), 3))
        body = (await client.get("/v1/drift")).json()
        waiting = body["unknown_references"][0]
        assert (waiting["reference"], waiting["messages"], waiting["vehicles"]) == (sha256(bundle), 30, 3)
        assert "register-reference" in waiting["what_to_do"]
        assert "register-reference" in COMMANDS
        assert (await client.get("/v1/drift?vehicle_id=EV_2")).json()["unknown_references"][0]["messages"] == 10
    command = typer.Typer()
    command.command()(register_reference)
    for said in ("is registered", "was registered before"):
        ran = await asyncio.to_thread(CliRunner().invoke, command, [str(bundle), "--database", database_url])
        assert (ran.exit_code, said in ran.output) == (0, True), ran.output
    async with serving(database_url, tmp_path, None) as (client, _):
        body = (await client.get("/v1/drift")).json()
        assert body["unknown_references"] == []
        assert body["verdict"] == "ok"
        assert body["references"][0]["messages"] == 30


async def test_counts_set_aside_are_shown(database_url: str, tmp_path: Path, bundle: Path) -> None:
    wrong = messages.DriftCounts(
        model_release=1, reference=sha256(bundle), first_time=iso(time.time() - 60), last_time=iso(time.time() - 60),
        windows=60, variables=(messages.DriftVariable(name=HEAT, stratum="driving", counts=(30, 30)),),
    )  # fmt: skip
    async with serving(database_url, tmp_path, bundle) as (client, app):
        await app.state.service.drift.step()
        await commit(app, [told("EV_1", 1, time.time() - 60, sha256(bundle), counts=wrong)])
        body = (await client.get("/v1/drift")).json()
        assert body["set_aside"] == [
            {
                "reference": sha256(bundle), "problem": "'heat' has 2 counts, its bins are 3", "messages": 1,
                "vehicles": 1,
            }
        ]  # fmt: skip
        assert body["references"] == []


async def test_a_release_without_limits_of_its_own_is_judged_by_the_configuration_and_the_answer_says_so(
    database_url: str, tmp_path: Path
) -> None:
    plain = msgspec.structs.replace(
        REFERENCE, calibration=None, variables=tuple(msgspec.structs.replace(v, limits={}) for v in REFERENCE.variables)
    )
    old = with_reference(build_bundle(tmp_path / "old", default_catalogue()), plain)
    async with serving(database_url, tmp_path, old) as (client, app):
        await app.state.service.drift.step()
        await commit(app, fleet(sha256(old), 4, shift=0.9))
        against = (await client.get("/v1/drift")).json()["references"][0]
        assert against["calibration"] is None
        assert "no calibrated limits" in against["note"]
        assert {(v["threshold"], v["threshold_source"]) for v in against["variables"]} == {(0.25, "config")}
        assert against["verdict"] == "drift"


async def test_drift_alerts_are_paged_and_make_retraining_due(database_url: str, tmp_path: Path, bundle: Path) -> None:
    async with serving(database_url, tmp_path, bundle) as (client, app):
        service = app.state.service
        calm = (await client.get("/v1/retraining")).json()
        assert not calm["due"]
        assert calm["last_training_source"] == "release"
        await service.drift.step()
        await commit(app, fleet(sha256(bundle), 4, shift=0.9))
        await service.drift.evaluate()
        page = (await client.get("/v1/drift/alerts?scope=fleet&limit=1")).json()
        rest = (await client.get(f"/v1/drift/alerts?scope=fleet&cursor={page['next']}")).json()
        alerts = page["alerts"] + rest["alerts"]
        assert {a["variable"] for a in alerts} == {SPEED, HEAT}
        assert {(a["state"], a["measure"], a["vehicles"]) for a in alerts} == {("open", "psi", 4)}
        assert (await client.get("/v1/drift/alerts?state=cleared")).json()["alerts"] == []
        found = (await client.get("/v1/retraining")).json()
        trigger = {t["name"]: t for t in found["triggers"]}
        assert trigger["drift_alerts"]["value"] == 2
        assert not found["due"]  # two variables are not three
        assert found["drifted_variables"] == sorted([SPEED, HEAT])
        assert len(found["drift_alerts"]) == 2
        async with service.store.writing() as connection:  # an older release's vehicles drift on: no news of this one
            await connection.execute(sa.update(tables.drift_alert).values(reference="0" * 64))
        older = (await client.get("/v1/retraining")).json()
        assert older["triggers"][0]["value"] == 0
        assert older["drifted_variables"] == older["drift_alerts"] == []


async def test_labels_are_held_against_the_stated_precision(database_url: str, tmp_path: Path, bundle: Path) -> None:
    async with serving(database_url, tmp_path, bundle) as (client, app):
        rows = [
            {
                "vehicle_id": "EV_1", "alert_id": f"a{i}", "ingest_id": i + 1, "last_ingest_id": i + 1,
                "received_at_s": 1.0, "updated_at_s": 1.0, "failure_type": KIND, "origin": "model", "rule": "",
                "state": "raised", "severity": "high", "since": "", "time": "", "transitions": 1,
                "clock_trusted": True, "replayed": False, "model_release": 1, "model_name": "", "body": "{}",
            }
            for i in range(30)
        ]  # fmt: skip
        verdicts = ["confirmed"] * 16 + ["false_alarm"] * 8 + [None] * 6
        work = [
            {
                "vehicle_id": "EV_1", "alert_id": f"a{i}", "state": "acknowledged", "verdict": verdict,
                "failure_type": FAILURE_TYPES[1] if i == 0 else None, "updated_at_s": 1.0,
            }
            for i, verdict in enumerate(verdicts)
        ]  # fmt: skip
        async with app.state.service.store.writing() as connection:
            await connection.execute(sa.insert(tables.alert), rows)
            await connection.execute(sa.insert(tables.alert_work), work)
        found = (await client.get("/v1/retraining")).json()
        told_performance = found["performance"]
        assert (told_performance["judged"], told_performance["confirmed"]) == (24, 15)  # one was another type
        assert told_performance["stated_precision"] == 0.9
        drop = next(t for t in found["triggers"] if t["name"] == "performance_drop")
        assert drop["due"]
        assert told_performance["observed_precision"] == 15 / 24
        assert drop["value"] == pytest.approx((0.9 - told_performance["observed_precision_upper"]) / 0.9)
        assert 0.1 < drop["value"] < (0.9 - 15 / 24) / 0.9  # what is proven, not what is estimated
        assert found["due"]
        async with app.state.service.store.writing() as connection:  # another release's alerts are not its fault
            await connection.execute(sa.update(tables.alert).values(model_release=2))
        few = (await client.get("/v1/retraining")).json()["triggers"][3]
        assert few["why"].startswith("too few labels: 0")


async def test_a_training_run_starts_the_count_anew_and_is_shown(
    database_url: str, tmp_path: Path, bundle: Path
) -> None:
    async with serving(database_url, tmp_path, bundle) as (client, app):
        now = time.time()
        sample = {
            "vehicle_id": "EV_1", "reason": "random", "alert_id": "", "failure_type": "", "stratum": "driving",
            "end_time": "", "elapsed_s": 60.0, "coverage": 1.0, "state_id": "", "parts": 1, "length": 1, "sha256": "",
            "received_at_s": now, "state": "lake", "stored_at_s": now - 60,
        }  # fmt: skip
        rows = [{**sample, "sample_id": str(i), "ingest_id": i} for i in range(1, 8)]
        waiting = {**sample, "sample_id": "w", "ingest_id": 99, "state": "waiting", "stored_at_s": None}
        run = TrainingRun(now - 30, now - 20, 1, "champion", 7, 3, "0" * 64, "{}")
        async with app.state.service.store.writing() as connection:
            await connection.execute(sa.insert(tables.sample), [*rows, waiting])
        before = (await client.get("/v1/retraining")).json()
        assert before["triggers"][2]["value"] == 7
        assert before["last_run"] is None
        async with app.state.service.store.writing() as connection:
            await add_training_run(connection, run)
        after = (await client.get("/v1/retraining")).json()
        assert after["triggers"][2]["value"] == 0
        assert after["last_training_source"] == "training_run"
        assert after["counted_from"] == after["last_run"]["started"]
        async with app.state.service.store.writing() as connection:  # while the run went on: it has not read this one
            late = {**sample, "sample_id": "late", "ingest_id": 100, "stored_at_s": now - 25}
            await connection.execute(sa.insert(tables.sample), [late])
        assert (await client.get("/v1/retraining")).json()["triggers"][2]["value"] == 1
        assert (after["last_run"]["verdict"], after["last_run"]["samples"]) == ("champion", 7)
        assert after["command"].startswith("fleet-cloud retrain ")


async def test_a_service_without_a_bundle_says_what_it_cannot_know(database_url: str, tmp_path: Path) -> None:
    async with serving(database_url, tmp_path, None) as (client, _):
        body = (await client.get("/v1/retraining")).json()
        assert body["champion"] is None
        assert body["last_training_source"] == "unknown"
        unknown = [t for t in body["triggers"] if t["value"] is None]
        assert {t["name"] for t in unknown} == {"age_days", "performance_drop"}
        assert all("no release is loaded" in t["why"] for t in unknown)


async def test_the_service_itself_registers_its_release_and_watches(
    database_url: str, tmp_path: Path, bundle: Path
) -> None:
    async with serving(database_url, tmp_path, bundle) as (client, app):
        await commit(app, fleet(sha256(bundle), 4, shift=0.9))
        for _ in range(100):
            if app.state.service.counters["drift_runs"]:
                break
            await asyncio.sleep(0.05)
        assert app.state.service.counters["drift_failures"] == 0
        assert app.state.service.counters["drift_runs"] >= 1
        assert (await client.get("/v1/drift")).json()["unknown_references"] == []
        async with app.state.service.store.reading() as connection:
            row = (await connection.execute(sa.select(tables.drift_reference))).one()
    assert (row.reference, row.model_release, row.model_name) == (sha256(bundle), 1, manifest(bundle).name)
    assert bytes(row.body) == (bundle / contract.DRIFT_REFERENCE).read_bytes()
