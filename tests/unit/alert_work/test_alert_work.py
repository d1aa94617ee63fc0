"""Alerts as work through the real application, on SQLite and on a real PostgreSQL."""

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from fastapi import FastAPI
from starlette.testclient import TestClient

from cloud.alert_work.life_cycle import fold
from cloud.api import create_app
from cloud.api.settings import Settings
from cloud.collector import ingest
from cloud.store import tables, work_rows
from cloud.store.fleet_store import FleetStore
from cloud.store.items import Item
from edge_agent.contract import messages, topics
from tests.databases import database_url, postgres_uri

__all__ = ["database_url", "postgres_uri"]
pytestmark = pytest.mark.anyio
NOW = 1_772_000_000.0
TYPE = "inverter_overheating"
PROBLEM = "application/problem+json"
NO_MODEL = Path("none")  # nothing here asks for advice, and a server without the sentence model starts at once
ROUNDS = [f"a{n}" for n in range(8)]
REASON = "coolant pump found dead"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@contextlib.asynccontextmanager
async def serving(url: str) -> AsyncIterator[tuple[httpx.AsyncClient, FastAPI]]:
    app = create_app(Settings(database_url=url, embedding=NO_MODEL))
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://cloud") as client:
            yield client, app


def told(
    seq: int = 1, *, alert_id: str = "a1", transition: str = "raised", vehicle_id: str = "EV_1", severity: str = "high",
    failure_type: str = TYPE, model_release: int | None = 1,
) -> Item:  # fmt: skip
    alert = messages.Alert(
        alert_id=alert_id, transition=transition, failure_type=failure_type, severity=severity, origin="model",  # type: ignore[arg-type]
        since="2026-03-01T00:00:00.000Z", type_probability=0.9, model_release=model_release,
        evidence=(messages.Evidence(name="inverter_temperature", value=96.0, deviation=8.0, unit="celsius"),),
    )  # fmt: skip
    envelope = messages.event(
        alert, event_id=f"{alert_id}/{seq}", vehicle_id=vehicle_id, time=f"2026-03-01T00:{seq:02d}:00.000Z",
        stream_id=f"s/{alert_id}", seq=seq, boot_id="b", clock_trusted=True,
    )  # fmt: skip
    return ingest.decide(topics.alert(vehicle_id, failure_type), messages.encode(envelope))


@pytest.fixture
async def client(database_url: str) -> AsyncIterator[httpx.AsyncClient]:
    """The application over a store with one alert, a1 of EV_1."""
    async with serving(database_url) as (opened, app):
        await app.state.service.store.commit([told()], received_at_s=NOW)
        yield opened


async def act(client: httpx.AsyncClient, action: str, alert_id: str = "a1", **body: Any) -> httpx.Response:
    return await client.post(f"/v1/alerts/{alert_id}/{action}", json={"by": "anna", "reason": REASON, **body})


async def rows(url: str, table: sa.Table) -> list[dict[str, Any]]:
    store = FleetStore.over(url)
    async with store.reading() as connection:
        found = [dict(row) for row in (await connection.execute(sa.select(table))).mappings()]
    await store.close()
    return found


async def test_an_alert_goes_from_new_to_resolved_with_who_and_why(client: httpx.AsyncClient) -> None:
    assert (await client.get("/v1/alerts/a1")).json()["work"] == {
        "state": "new", "verdict": None, "failure_type": None, "severity": None, "updated": None,
        "possible": ["acknowledge", "confirm", "false-alarm"],
    }  # fmt: skip
    for action, state in (("acknowledge", "acknowledged"), ("confirm", "confirmed"), ("resolve", "resolved")):
        answer = await act(client, action)
        assert answer.status_code == 200
        assert answer.json()["work"]["state"] == state
    seen = (await client.get("/v1/alerts/a1")).json()
    assert [(a["action"], a["by"], a["reason"]) for a in seen["actions"]] == [
        ("acknowledge", "anna", REASON), ("confirm", "anna", REASON), ("resolve", "anna", REASON)
    ]  # fmt: skip
    assert (seen["work"]["state"], seen["work"]["verdict"]) == ("resolved", "confirmed")
    assert seen["state"] == "raised"  # the vehicle's own state is another thing
    assert (await client.get("/alerts")).json()["alerts"][0]["work"] == seen["work"]


async def test_an_alert_is_shown_with_its_evidence_history_samples_and_links(database_url: str) -> None:
    async with serving(database_url) as (client, app):
        store: FleetStore = app.state.service.store
        await store.commit([told(1), told(2, transition="escalated", severity="critical")], received_at_s=NOW)
        await store.commit([told(3, transition="cleared")], received_at_s=NOW + 60)
        async with store.writing() as connection:
            for n, state in enumerate(("lake", "lake", "waiting")):
                await connection.execute(sa.insert(tables.sample).values(
                    vehicle_id="EV_1", sample_id=f"x{n}", ingest_id=n, reason="alert", alert_id="a1", failure_type=TYPE,
                    stratum="driving", end_time="2026-03-01T00:00:00.000Z", elapsed_s=60.0, coverage=1.0, state_id="s",
                    parts=1, length=10, sha256="0" * 64, received_at_s=NOW, state=state,
                ))  # fmt: skip
        seen = (await client.get("/v1/alerts/a1")).json()
        told_here = [(t["transition"], t["severity"], t["type_probability"]) for t in seen["history"]]
        assert told_here == [("raised", "high", 0.9), ("escalated", "critical", 0.9), ("cleared", "high", 0.9)]
        assert (seen["transitions"], seen["severity"], seen["state"]) == (3, "critical", "cleared")
        assert seen["evidence"] == [
            {"name": "inverter_temperature", "value": 96.0, "deviation": 8.0, "unit": "celsius"}
        ]
        assert seen["samples"] == {"lake": 2, "waiting": 1}
        assert seen["links"]["advice"] == "/v1/alerts/a1/advice?vehicle_id=EV_1"
        assert (await client.get(seen["links"]["vehicle"])).status_code == 200
        assert (await client.get(seen["links"]["self"])).json() == seen


async def test_a_cleared_alert_can_still_be_confirmed(database_url: str) -> None:
    async with serving(database_url) as (client, app):
        await app.state.service.store.commit([told(1), told(2, transition="cleared")], received_at_s=NOW)
        assert (await act(client, "confirm")).json()["work"]["verdict"] == "confirmed"


async def test_a_transition_that_comes_later_leaves_the_work_alone(database_url: str) -> None:
    async with serving(database_url) as (client, app):
        await app.state.service.store.commit([told(1)], received_at_s=NOW)
        await act(client, "confirm", severity="critical")
        await app.state.service.store.commit([told(2, transition="cleared")], received_at_s=NOW)
        seen = (await client.get("/v1/alerts/a1")).json()
        assert (seen["state"], seen["work"]["verdict"], seen["work"]["severity"]) == (
            "cleared",
            "confirmed",
            "critical",
        )


async def test_a_label_for_an_alert_that_does_not_exist_is_refused_and_stores_nothing(
    client: httpx.AsyncClient, database_url: str
) -> None:
    for action in ("acknowledge", "confirm", "false-alarm", "resolve"):
        answer = await act(client, action, alert_id="nobody")
        assert (answer.status_code, answer.headers["content-type"]) == (404, PROBLEM)
        assert "there is no alert nobody" in answer.json()["detail"]
    assert (await client.get("/v1/alerts/nobody")).status_code == 404
    assert (await rows(database_url, tables.alert_action), await rows(database_url, tables.alert_work)) == ([], [])


async def test_what_does_not_fit_is_a_409_that_says_what_does(client: httpx.AsyncClient, database_url: str) -> None:
    answer = await act(client, "resolve")
    assert (answer.status_code, answer.headers["content-type"]) == (409, PROBLEM)
    assert answer.json()["detail"] == (
        "alert a1 is new, which resolve does not fit; possible now: acknowledge, confirm, false-alarm"
    )
    assert await rows(database_url, tables.alert_action) == []


async def test_a_repeat_of_an_action_changes_nothing(client: httpx.AsyncClient, database_url: str) -> None:
    first = (await act(client, "confirm", severity="critical")).json()
    again = (await act(client, "confirm", severity="critical")).json()
    assert (first["repeated"], again["repeated"]) == (False, True)
    assert again["action"] == first["action"]
    assert again["work"] == first["work"]
    assert len(await rows(database_url, tables.alert_action)) == 1


async def test_a_mind_may_be_changed_and_both_verdicts_stay_on_record(client: httpx.AsyncClient) -> None:
    await act(client, "confirm", failure_type="charging_fault")
    changed = await act(client, "false-alarm", reason="looked again: the sensor was loose")
    assert changed.json()["work"]["verdict"] == "false_alarm"
    assert changed.json()["work"]["failure_type"] is None
    seen = (await client.get("/v1/alerts/a1")).json()
    assert [a["action"] for a in seen["actions"]] == ["confirm", "false-alarm"]


async def test_another_persons_label_is_changed_only_by_naming_it(client: httpx.AsyncClient) -> None:
    first = (await act(client, "confirm")).json()["action"]["action_id"]
    refused = await act(client, "false-alarm", by="ben")
    assert refused.status_code == 409
    assert f'"revises": {first}' in refused.json()["detail"]
    assert "'anna'" in refused.json()["detail"]
    changed = await act(client, "false-alarm", by="ben", revises=first)
    assert changed.json()["work"]["verdict"] == "false_alarm"
    late = await act(client, "confirm", by="eve", revises=first)
    assert late.status_code == 409


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"by": "anna"}, "reason"),
        ({"reason": REASON}, "by"),
        ({"by": "anna", "reason": "   "}, "reason"),
        ({"by": "anna", "reason": "x" * 2001}, "reason"),
        ({"by": "a" * 129, "reason": REASON}, "by"),
        ({"by": "an\u0000na", "reason": REASON}, "by"),
        ({"by": "anna", "reason": "two\nlines"}, "reason"),
        ({"by": "anna", "reason": "\u202eright to left"}, "reason"),
        ({"by": "anna", "reason": 7}, "reason"),
        ({"by": "anna", "reason": REASON, "failure_type": "flux_capacitor"}, "failure_type"),
        ({"by": "anna", "reason": REASON, "severity": "catastrophic"}, "severity"),
        ({"by": "anna", "reason": REASON, "verdict": "confirmed"}, "verdict"),
        ({"by": "anna", "reason": REASON, "revises": 2**63}, "revises"),
        ([], ""),
    ],
)
async def test_a_label_that_cannot_be_used_names_the_field_and_stores_nothing(
    client: httpx.AsyncClient, database_url: str, body: Any, field: str
) -> None:
    answer = await client.post("/v1/alerts/a1/confirm", json=body)
    assert (answer.status_code, answer.headers["content-type"]) == (422, PROBLEM)
    assert answer.json()["errors"][0]["field"] == field
    assert await rows(database_url, tables.alert_action) == []


async def test_only_a_confirmation_says_what_it_really_was(client: httpx.AsyncClient) -> None:
    for action in ("acknowledge", "false-alarm", "resolve"):
        assert (await act(client, action, failure_type=TYPE)).status_code == 422


async def test_a_body_that_is_no_json_or_too_large_is_refused(client: httpx.AsyncClient) -> None:
    path = "/v1/alerts/a1/confirm"
    assert (await client.post(path, content=b"by=anna", headers={"content-type": "text/plain"})).status_code == 415
    headers = {"content-type": "application/json"}
    assert (await client.post(path, content=b"{", headers=headers)).status_code == 422
    assert (await client.post(path, content=b'"' + b"x" * 70_000 + b'"', headers=headers)).status_code == 413


async def test_an_id_that_two_vehicles_use_asks_for_the_vehicle(client: httpx.AsyncClient, database_url: str) -> None:
    store = FleetStore.over(database_url)
    await store.commit([told(vehicle_id="EV_2"), told(vehicle_id="EV_3")], received_at_s=NOW)
    await store.close()
    refused = await act(client, "confirm")
    assert refused.status_code == 409
    assert "EV_1, EV_2" in refused.json()["detail"]
    assert "?vehicle_id=" in refused.json()["detail"]
    assert (await client.get("/v1/alerts/a1")).status_code == 409
    answer = await client.post(
        "/v1/alerts/a1/confirm", params={"vehicle_id": "EV_2"}, json={"by": "anna", "reason": REASON}
    )
    assert answer.json()["vehicle_id"] == "EV_2"
    assert [row["vehicle_id"] for row in await rows(database_url, tables.alert_work)] == ["EV_2"]
    assert (await client.get("/v1/alerts/a1", params={"vehicle_id": "EV_9"})).status_code == 404


@pytest.mark.parametrize("path", ["%00", "a%0ab", "%E2%80%AE", "..%2f..", "a" * 129, "'; DROP TABLE alert; --", "<b>"])
async def test_no_alert_id_in_a_path_breaks_anything(client: httpx.AsyncClient, path: str) -> None:
    answer = await client.get(f"/v1/alerts/{path}")
    assert answer.status_code in (404, 422)
    assert answer.headers["content-type"] == PROBLEM
    assert (await act(client, "confirm", alert_id=path)).status_code in (404, 422)


async def test_alerts_are_found_by_their_work(database_url: str) -> None:
    async with serving(database_url) as (client, app):
        store: FleetStore = app.state.service.store
        for n in range(1, 7):
            await store.commit([told(alert_id=f"a{n}", vehicle_id=f"EV_{n % 2}")], received_at_s=NOW)
        await store.commit([told(2, alert_id="a6", vehicle_id="EV_0", transition="cleared")], received_at_s=NOW)
        await act(client, "acknowledge", "a1")
        await act(client, "confirm", "a2")
        await act(client, "false-alarm", "a3")
        await act(client, "confirm", "a4")
        await act(client, "resolve", "a4")

        async def ids(**params: Any) -> list[str]:
            return [a["alert_id"] for a in (await client.get("/v1/alerts", params=params)).json()["alerts"]]

        assert await ids() == ["a6", "a5", "a4", "a3", "a2", "a1"]
        assert await ids(work="new") == ["a6", "a5"]
        assert await ids(work="new", state="open") == ["a5"]
        assert await ids(work="acknowledged") == ["a1"]
        assert await ids(work="resolved") == ["a4"]
        assert await ids(verdict="confirmed") == ["a4", "a2"]
        assert await ids(verdict="false_alarm") == ["a3"]
        assert await ids(verdict="none", vehicle_id="EV_1") == ["a5", "a1"]
        assert await ids(severity="low") == []
        first = (await client.get("/v1/alerts", params={"limit": 4})).json()
        rest = (await client.get("/v1/alerts", params={"limit": 4, "cursor": first["next"]})).json()
        assert [a["alert_id"] for a in first["alerts"] + rest["alerts"]] == ["a6", "a5", "a4", "a3", "a2", "a1"]
        assert rest["next"] is None
        assert (await client.get("/v1/alerts", params={"verdicts": "confirmed"})).status_code == 422


async def test_every_label_is_listed_once_as_it_stands_with_who_gave_it(database_url: str) -> None:
    async with serving(database_url) as (client, app):
        store: FleetStore = app.state.service.store
        for n in range(1, 6):
            await store.commit([told(alert_id=f"a{n}")], received_at_s=NOW)
        await act(client, "acknowledge", "a1")
        await act(client, "confirm", "a2", failure_type="charging_fault", severity="low")
        await act(client, "confirm", "a4")
        await act(client, "false-alarm", "a4", reason="looked again")
        await act(client, "resolve", "a4", by="ben")
        await act(client, "false-alarm", "a3", by="eve")
        first = (await client.get("/v1/labels", params={"limit": 2})).json()
        rest = (await client.get("/v1/labels", params={"limit": 2, "cursor": first["next"]})).json()
        assert rest["next"] is None
        found = first["labels"] + rest["labels"]
        assert [
            (row["alert_id"], row["verdict"], row["failure_type"], row["severity"], row["by"]) for row in found
        ] == [
            ("a2", "confirmed", "charging_fault", "low", "anna"),
            ("a3", "false_alarm", TYPE, "high", "eve"),
            ("a4", "false_alarm", TYPE, "high", "anna"),
        ]
        assert (found[0]["alert_failure_type"], found[0]["alert_severity"]) == (TYPE, "high")
        assert (found[2]["reason"], found[2]["work"]) == ("looked again", "resolved")
        of_type = (await client.get("/v1/labels", params={"failure_type": "charging_fault"})).json()["labels"]
        assert [row["alert_id"] for row in of_type] == ["a2"]
        assert (await client.get("/v1/labels", params={"changed_since": "2999-01-01T00:00:00Z"})).json()["labels"] == []


async def test_a_label_written_past_the_log_is_listed_without_a_name(
    client: httpx.AsyncClient, database_url: str
) -> None:
    store = FleetStore.over(database_url)
    async with store.writing() as connection:
        await connection.execute(sa.insert(tables.alert_work).values(
            vehicle_id="EV_1", alert_id="a1", state="confirmed", verdict="confirmed", updated_at_s=NOW
        ))  # fmt: skip
    await store.close()
    (label,) = (await client.get("/v1/labels")).json()["labels"]
    assert (label["by"], label["given"], label["verdict"]) == (None, "2026-02-25T06:13:20.000Z", "confirmed")
    assert (await act(client, "false-alarm")).json()["work"]["verdict"] == "false_alarm"


async def test_one_vehicle_is_shown_with_its_alerts(client: httpx.AsyncClient) -> None:
    await act(client, "confirm")
    seen = (await client.get("/v1/vehicles/EV_1")).json()
    assert [(a["alert_id"], a["work"]["verdict"]) for a in seen["alerts"]] == [("a1", "confirmed")]
    assert [a["alert_id"] for a in seen["open_alerts"]] == ["a1"]
    (listed,) = (await client.get("/vehicles")).json()["vehicles"]
    assert {name: seen[name] for name in listed} == listed
    missing = await client.get("/v1/vehicles/EV_9")
    assert (missing.status_code, missing.headers["content-type"]) == (404, PROBLEM)


async def test_the_examples_of_the_openapi_page_work(client: httpx.AsyncClient) -> None:
    page = (await client.get("/openapi.json")).json()
    for action in ("acknowledge", "confirm", "false-alarm", "resolve"):
        operation = page["paths"][f"/v1/alerts/{{alert_id}}/{action}"]["post"]
        (example,) = operation["requestBody"]["content"]["application/json"]["examples"].values()
        assert (await client.post(f"/v1/alerts/a1/{action}", json=example["value"])).status_code == 200


def at_one_moment(url: str, people: list[tuple[str, str]]) -> list[list[int]]:
    """Let each of the (action, by) act on each of ROUNDS alerts, all of them at the same moment; return the statuses.

    Each has a whole server of their own over the same store, as processes of the API would be: a thread, an event loop,
    connections.
    """
    together = threading.Barrier(len(people))

    async def prepare() -> None:
        store = FleetStore.over(url)
        await store.prepare()
        await store.commit([told(alert_id=alert_id) for alert_id in ROUNDS], received_at_s=NOW)
        await store.close()

    async def one(action: str, by: str) -> list[int]:
        async with serving(url) as (client, _):
            answers = []
            await client.get("/v1/alerts")  # the connection is open before it counts
            for alert_id in ROUNDS:
                together.wait(timeout=60)
                answers.append((await act(client, action, alert_id, by=by, reason=f"{by} says so")).status_code)
            return answers

    asyncio.run(prepare())
    with concurrent.futures.ThreadPoolExecutor(len(people)) as pool:
        return list(pool.map(lambda person: asyncio.run(one(*person)), people))


def test_of_two_contradicting_verdicts_at_one_moment_exactly_one_wins(database_url: str) -> None:
    people = [("confirm" if n % 2 else "false-alarm", f"person{n}") for n in range(4)]
    answers = at_one_moment(database_url, people)
    stored = asyncio.run(rows(database_url, tables.alert_action))
    work = {row["alert_id"]: row["verdict"] for row in asyncio.run(rows(database_url, tables.alert_work))}
    for n, alert_id in enumerate(ROUNDS):
        told_here = {(action, statuses[n]) for (action, _), statuses in zip(people, answers, strict=True)}
        (won,) = (action for action, status in told_here if status == 200)
        (lost,) = (action for action, status in told_here if status == 409)
        assert {won, lost} == {"confirm", "false-alarm"}
        assert [row["action"] for row in stored if row["alert_id"] == alert_id] == [won, won]
        assert work[alert_id] == {"confirm": "confirmed", "false-alarm": "false_alarm"}[won]


def test_one_request_sent_many_times_at_once_is_one_action(database_url: str) -> None:
    answers = at_one_moment(database_url, [("confirm", "anna")] * 4)
    assert answers == [[200] * len(ROUNDS)] * 4
    stored = asyncio.run(rows(database_url, tables.alert_action))
    assert sorted(row["alert_id"] for row in stored) == sorted(ROUNDS)


async def test_people_and_a_vehicle_that_act_on_one_alert_at_the_same_time_lose_nothing(
    client: httpx.AsyncClient, database_url: str
) -> None:
    vehicle = FleetStore.over(database_url)

    async def transitions() -> None:
        for seq in range(2, 22):
            transition = "escalated" if seq % 2 else "raised"
            await vehicle.commit([told(seq, transition=transition), told(seq, alert_id="a0")], received_at_s=NOW)

    async def verdicts(by: str) -> list[int]:
        return [(await act(client, "confirm", by=by, reason=f"look {n}")).status_code for n in range(10)]

    _, *answers = await asyncio.gather(transitions(), verdicts("anna"), verdicts("ben"))
    await vehicle.close()
    assert answers == [[200] * 10, [200] * 10]
    seen = (await client.get("/v1/alerts/a1")).json()
    assert (seen["transitions"], len(seen["actions"]), seen["work"]["state"]) == (21, 20, "confirmed")


async def test_what_stands_beside_the_log_is_the_logs_fold(client: httpx.AsyncClient, database_url: str) -> None:
    for action, by in (
        ("acknowledge", "anna"), ("confirm", "anna"), ("false-alarm", "anna"), ("resolve", "ben"), ("confirm", "ben"),
        ("confirm", "anna"), ("acknowledge", "ben"), ("false-alarm", "anna"), ("resolve", "anna"),
    ):  # fmt: skip
        await act(client, action, by=by, reason=f"{action} by {by}")
    store = FleetStore.over(database_url)
    async with store.reading() as connection:
        log = await work_rows.actions(connection, "EV_1", "a1", limit=100)
        assert len(log) >= 7
        assert await work_rows.work(connection, "EV_1", "a1") == fold(log)
    await store.close()


def test_a_store_that_is_away_asks_to_come_back_and_the_action_counts_once(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/v.db"
    with TestClient(create_app(Settings(database_url=url, embedding=NO_MODEL))) as client:
        service = client.app.state.service  # type: ignore[attr-defined]
        client.portal.call(lambda: service.store.commit([told()], received_at_s=NOW))  # type: ignore[union-attr]
        client.portal.call(service.store.close)  # type: ignore[union-attr]
        (tmp_path / "v.db").rename(tmp_path / "kept.db")
        (tmp_path / "v.db").mkdir()
        body = {"by": "anna", "reason": REASON}
        for path in ("confirm", "acknowledge"):
            answer = client.post(f"/v1/alerts/a1/{path}", json=body)
            assert (answer.status_code, answer.headers["content-type"]) == (503, PROBLEM)
            assert int(answer.headers["retry-after"]) > 0
        assert client.get("/v1/alerts/a1").status_code == client.get("/v1/labels").status_code == 503
        (tmp_path / "v.db").rmdir()
        (tmp_path / "kept.db").rename(tmp_path / "v.db")
        assert client.post("/v1/alerts/a1/confirm", json=body).json()["repeated"] is False
        assert client.post("/v1/alerts/a1/confirm", json=body).json()["repeated"] is True
        assert len(client.get("/v1/alerts/a1").json()["actions"]) == 1
