"""Advice through the real application, on SQLite and on a real PostgreSQL."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from cloud.advice.advise import MAX_QUESTION_CHARS, Advice, Facts
from cloud.api import create_app
from cloud.api.settings import Settings
from cloud.collector import ingest
from cloud.store.items import Item
from edge_agent.contract import messages, topics
from edge_agent.contract.errors import ConfigError
from tests.databases import database_url, postgres_uri

__all__ = ["database_url", "postgres_uri"]
pytestmark = pytest.mark.anyio
NOW = 1_772_000_000.0
PROBLEM = "application/problem+json"
COOLANT = "Vehicle.Powertrain.ElectricMotor.CoolantTemperature"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@contextlib.asynccontextmanager
async def serving(
    url: str, tmp_path: Path, embedding: Path | None = None
) -> AsyncIterator[tuple[httpx.AsyncClient, FastAPI]]:
    none = tmp_path / "no_model"
    app = create_app(Settings(database_url=url, lake=str(tmp_path / "lake"), embedding=embedding or none))
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://cloud") as client:
            yield client, app


def told(
    alert_id: str = "a1", vehicle_id: str = "EV_1", failure_type: str = "inverter_overheating", severity: str = "high"
) -> Item:
    alert = messages.Alert(
        alert_id=alert_id, transition="raised", failure_type=failure_type, severity=severity, origin="model",  # type: ignore[arg-type]
        since="2026-03-01T00:00:00.000Z", type_probability=0.9, model_release=1,
        evidence=(messages.Evidence(name=f"{COOLANT}.mean", value=78.0, deviation=6.0),),
    )  # fmt: skip
    envelope = messages.event(
        alert, event_id=f"{alert_id}/1", vehicle_id=vehicle_id, time="2026-03-01T00:00:00.000Z",
        stream_id=f"s/{alert_id}", seq=1, boot_id="b", clock_trusted=True,
    )  # fmt: skip
    return ingest.decide(topics.alert(vehicle_id, failure_type), messages.encode(envelope))


async def ask(client: httpx.AsyncClient, alert_id: str = "a1", **parameters: Any) -> httpx.Response:
    return await client.get(f"/v1/alerts/{alert_id}/advice", params=parameters)


async def test_advice_is_safety_first_then_cited_sections_with_their_reason(database_url: str, tmp_path: Path) -> None:
    async with serving(database_url, tmp_path) as (client, app):
        await app.state.service.store.commit([told()], received_at_s=NOW)
        body = (await ask(client)).json()
        assert body["outcome"] == "cited"
        assert [s["id"] for s in body["safety"]][:2] == ["HV-01", "HV-02"]
        assert body["sections"][0]["id"] in ("INV-02", "INV-04")
        for section in body["sections"]:
            assert section["kind"] == "repair"
            assert section["why"].startswith("written for inverter_overheating")
            assert section["steps"]
            assert section["stop"]
            assert section["sources"]
        assert body["sections"][0]["matched"] == [f"{COOLANT}.mean"]
        assert body["retrieval"]["method"] == "bm25"
        assert "coolant" in body["retrieval"]["query"].lower()
        assert "maker" in body["manual"]["notice"]


async def test_a_question_is_searched_and_an_off_topic_one_has_no_source(tmp_path: Path, sentence_model: Path) -> None:
    async with serving(f"sqlite:///{tmp_path}/v.db", tmp_path, sentence_model) as (client, app):
        await app.state.service.store.commit([told()], received_at_s=NOW)
        found = (await ask(client, question=" circulation pump makes no sound ")).json()
        assert found["retrieval"]["method"] == "hybrid"
        assert found["question"] == "circulation pump makes no sound"
        assert found["sections"][0]["id"] == "INV-03"
        refused = (await ask(client, question="how do I bake bread")).json()
        assert refused["outcome"] == "no_source"
        assert refused["sections"] == []
        assert refused["safety"], "safety stands beside every answer"
        assert "No source" in refused["summary"]


async def test_an_alert_that_does_not_exist_is_404_and_a_wrong_question_names_its_field(
    database_url: str, tmp_path: Path
) -> None:
    async with serving(database_url, tmp_path) as (client, app):
        await app.state.service.store.commit([told()], received_at_s=NOW)
        for parameters in ({"alert_id": "nobody"}, {"alert_id": "a1", "vehicle_id": "EV_9"}):
            absent = await ask(client, **parameters)
            assert (absent.status_code, absent.headers["content-type"]) == (404, PROBLEM)
        for question in ("", "x", "y" * (MAX_QUESTION_CHARS + 1), "a\nb", "a\x00b"):
            wrong = await ask(client, question=question)
            assert wrong.status_code == 422, question
            assert wrong.json()["errors"][0]["field"] == "question"
        unknown = await ask(client, qestion="hot")
        assert unknown.status_code == 422
        assert "question" in unknown.json()["detail"]


async def test_an_id_that_two_vehicles_use_asks_for_the_vehicle(database_url: str, tmp_path: Path) -> None:
    async with serving(database_url, tmp_path) as (client, app):
        both = [told(), told(vehicle_id="EV_2", failure_type="charging_fault")]
        await app.state.service.store.commit(both, received_at_s=NOW)
        unclear = await ask(client)
        assert unclear.status_code == 409
        assert "vehicle_id" in unclear.json()["detail"]
        assert (await ask(client, vehicle_id="EV_2")).json()["sections"][0]["id"].startswith("CHG")


async def test_what_a_person_says_it_really_was_is_what_advice_is_about(database_url: str, tmp_path: Path) -> None:
    async with serving(database_url, tmp_path) as (client, app):
        await app.state.service.store.commit([told()], received_at_s=NOW)
        said = {"by": "anna", "reason": "smelled of solvent", "failure_type": "thermal_runaway_risk"}
        assert (await client.post("/v1/alerts/a1/confirm", json=said)).status_code == 200
        body = (await ask(client)).json()
        assert body["failure_type"] == "thermal_runaway_risk"
        assert body["safety"][0]["id"] == "EM-01"


async def test_a_store_that_is_away_is_503(tmp_path: Path) -> None:
    database = tmp_path / "v.db"
    async with serving(f"sqlite:///{database}", tmp_path) as (client, app):
        await app.state.service.store.close()
        database.unlink()
        database.mkdir()
        away = await ask(client)
        assert (away.status_code, away.headers["content-type"]) == (503, PROBLEM)
        assert away.headers["retry-after"]
        database.rmdir()


async def test_a_slow_search_does_not_hold_up_other_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(f"sqlite:///{tmp_path}/v.db", tmp_path) as (client, app):
        await app.state.service.store.commit([told()], received_at_s=NOW)
        real = app.state.service.advisor.answer

        def slow(facts: Facts, question: str | None = None) -> Advice:
            time.sleep(1.0)
            answer: Advice = real(facts, question)
            return answer

        monkeypatch.setattr(app.state.service.advisor, "answer", slow)
        asked = asyncio.create_task(ask(client))
        await asyncio.sleep(0.1)
        assert (await asyncio.wait_for(client.get("/"), 0.5)).status_code == 200
        assert not asked.done()
        assert (await asked).status_code == 200


async def test_a_wrong_manual_is_one_clear_line_at_the_start(tmp_path: Path) -> None:
    manual = tmp_path / "manual.json"
    manual.write_text('{"title": "mine", "version": "1", "notice": "none", "sections": []}')
    app = create_app(Settings(database_url=f"sqlite:///{tmp_path}/v.db", manual=manual))
    with pytest.raises(ConfigError, match=r"manual .*manual\.json: .*sections") as caught:
        async with app.router.lifespan_context(app):
            pass
    assert "\n" not in str(caught.value)
