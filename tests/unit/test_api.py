"""The API in one process: bodies, pages, errors, and frames scored by a real (tiny) bundle."""

import contextlib
import json
import math
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from cloud.api import create_app
from cloud.api.service import Service
from cloud.api.settings import Settings
from cloud.collector import ingest
from edge_agent.contract import messages, topics
from edge_agent.contract.bundle import Decision
from edge_agent.contract.signals import default_catalogue
from tests.bundles import build_bundle, without_a_graph
from tests.databases import database_url, postgres_uri

__all__ = ["database_url", "postgres_uri"]  # what is read back from a store is asked of both kinds
pytestmark = pytest.mark.anyio
START = 1_772_000_000.0
SPEED, VOLTAGE = "Vehicle.Speed", "Vehicle.Powertrain.TractionBattery.CurrentVoltage"
EVERY = {s.name: (s.min + s.max) / 4 for s in default_catalogue().scalars}  # half of their types stay quiet
PROBLEM = "application/problem+json"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its type_probability[0] is the share of the window in which the speed stood above 125 km/h."""
    return build_bundle(tmp_path_factory.mktemp("bundle") / "b", default_catalogue(), decision=Decision(k=1, n=1))


def settings(tmp_path: Path, **changes: Any) -> Settings:
    return Settings(**{"database_url": f"sqlite:///{tmp_path}/v.db", "lake": f"{tmp_path}/lake", **changes})


@contextlib.asynccontextmanager
async def serving(tmp_path: Path, **changes: Any) -> AsyncIterator[tuple[httpx.AsyncClient, FastAPI]]:
    app = create_app(settings(tmp_path, **changes))
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://cloud") as client:
            yield client, app


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(tmp_path) as (opened, _):
        yield opened


def frame(second: float, **signals: float | None) -> dict[str, Any]:
    return {"time": START + second, "signals": {**EVERY, **signals}}


def post(*frames: dict[str, Any], vehicle_id: str = "EV_1", **more: Any) -> dict[str, Any]:
    return {"vehicle_id": vehicle_id, "frames": list(frames), **more}


async def test_root_and_health_say_how_it_is(client: httpx.AsyncClient) -> None:
    assert (await client.get("/")).json()["status"] == "ok"
    health = (await client.get("/health")).json()
    assert health["status"] == "degraded"
    assert health["problems"] == ["no bundle: guards only"]
    assert health["store"]["ok"]
    assert not health["broker"]["configured"]


async def test_health_is_503_while_the_store_is_away(tmp_path: Path) -> None:
    async with serving(tmp_path) as (client, app):
        await app.state.service.store.close()
        (tmp_path / "v.db").unlink()
        (tmp_path / "v.db").mkdir()
        answer = await client.get("/health")
        assert answer.status_code == 503
        assert answer.json()["status"] == "down"
        listed = await client.get("/vehicles")
        assert (listed.status_code, listed.headers["content-type"]) == (503, PROBLEM)
        assert listed.headers["retry-after"]
        assert (await client.get("/")).status_code == 200
        (tmp_path / "v.db").rmdir()


async def test_a_broker_away_is_shown_and_not_fatal(tmp_path: Path) -> None:
    async with serving(tmp_path, broker="127.0.0.1:9") as (client, _):
        for _ in range(100):
            health = (await client.get("/health")).json()
            if "refused" in health["broker"]["detail"]:
                break
        assert health["status"] == "degraded"
        assert not health["broker"]["connected"]


async def test_a_bundle_with_a_wrong_hash_leaves_guards_only_and_says_why(tmp_path: Path) -> None:
    broken = build_bundle(tmp_path / "broken", default_catalogue())
    (broken / "model.onnx").write_bytes((broken / "model.onnx").read_bytes() + b"x")
    async with serving(tmp_path, bundle=broken) as (client, _):
        health = (await client.get("/health")).json()
        assert not health["bundle"]["loaded"]
        assert "hash does not match" in health["bundle"]["detail"]
        reply = (await client.post("/telemetry", json=post(frame(0)))).json()
        assert reply["notes"] == ["no bundle: guards only, nothing is predicted"]


async def test_a_bundle_that_is_whole_but_no_graph_leaves_guards_only_and_says_why(tmp_path: Path) -> None:
    unloadable = without_a_graph(build_bundle(tmp_path / "bundle", default_catalogue()))
    async with serving(tmp_path, bundle=unloadable) as (client, _):
        health = (await client.get("/health")).json()
        assert health["status"] == "degraded"
        assert not health["bundle"]["loaded"]
        assert "does not load" in health["bundle"]["detail"]
        answer = await client.post("/telemetry", json=post(frame(0)))
        assert answer.status_code == 200
        assert answer.json()["notes"] == ["no bundle: guards only, nothing is predicted"]


async def test_one_sqlite_file_is_one_session_at_the_broker_however_it_is_spelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def session(url: str) -> str:
        collector = Service(Settings(database_url=url, broker="127.0.0.1:9")).collector
        assert collector is not None
        return collector._config.client_id

    (tmp_path / "a").mkdir()
    absolute = session(f"sqlite:///{tmp_path}/a/v.db")
    monkeypatch.chdir(tmp_path / "a")
    assert session("sqlite:///v.db") == session("sqlite:///../a/v.db") == absolute
    monkeypatch.chdir(tmp_path)
    assert session("sqlite:///v.db") != absolute


async def test_the_first_prediction_comes_with_the_300th_frame_then_one_a_minute(tmp_path: Path, bundle: Path) -> None:
    async with serving(tmp_path, bundle=bundle) as (client, _):
        scored = []
        for second in range(370):
            reply = (await client.post("/telemetry", json=post(frame(second)))).json()
            assert reply["frames_accepted"] == 1
            if second == 99:
                assert reply["window"] == {"length_s": 300, "filled_s": 100, "remaining_s": 200, "stride_s": 60}
            if reply["prediction"]:
                scored.append(second)
                assert reply["prediction"]["model_release"] == 1
                degradation = reply["prediction"]["types"]["battery_degradation"]
                assert set(degradation) == {"probability", "raise_at", "severity"}
        assert scored == [299, 359]
        (vehicle,) = (await client.get("/vehicles")).json()["vehicles"]
        assert (vehicle["state"], vehicle["channel"], vehicle["model"]["release"]) == ("online", "http", 1)
        assert vehicle["scores"]["battery_degradation"] == 0


async def test_an_alert_of_the_model_is_in_the_reply_and_in_the_list(
    tmp_path: Path, bundle: Path, database_url: str
) -> None:
    async with serving(tmp_path, bundle=bundle, database_url=database_url) as (client, _):
        frames = [frame(s, **{SPEED: 200.0}) for s in range(300)]
        reply = (await client.post("/telemetry", json=post(*frames, make="sim"))).json()
        (told,) = [a for a in reply["alerts"] if a["failure_type"] == "battery_degradation"]
        assert (told["transition"], told["origin"], told["model_release"]) == ("raised", "model", 1)
        alerts = (await client.get("/alerts", params={"failure_type": "battery_degradation"})).json()["alerts"]
        assert [a["alert_id"] for a in alerts] == [told["alert_id"]]
        assert alerts[0]["time"] == "2026-02-25T06:18:19.000Z"
        assert alerts[0]["received"] > alerts[0]["time"]
        (vehicle,) = (await client.get("/vehicles")).json()["vehicles"]
        assert told["alert_id"] in [a["alert_id"] for a in vehicle["open_alerts"]]
        assert vehicle["make"] == "sim"


async def test_a_restart_continues_the_window_and_repeats_no_alert(
    tmp_path: Path, bundle: Path, database_url: str
) -> None:
    first = [frame(s, **{SPEED: 200.0}) for s in range(330)]
    async with serving(tmp_path, bundle=bundle, database_url=database_url) as (client, _):
        before = (await client.post("/telemetry", json=post(*first))).json()
        assert before["window"]["remaining_s"] == 30
    async with serving(tmp_path, bundle=bundle, database_url=database_url) as (client, _):
        later = [frame(s, **{SPEED: 200.0}) for s in range(330, 360)]
        reply = (await client.post("/telemetry", json=post(*later))).json()
        assert reply["predictions"] == 1
        assert reply["prediction"]["types"]["battery_degradation"]["probability"] == 1
        assert reply["alerts"] == []
        assert (await client.get("/health")).json()["telemetry"]["states_restored"] == 1


async def test_frames_in_any_number_and_order_give_the_same_prediction(tmp_path: Path, bundle: Path) -> None:
    async with serving(tmp_path, bundle=bundle) as (client, _):
        frames = [frame(s, **{SPEED: 200.0 if s % 3 else 0.0}) for s in range(300)]
        whole = (await client.post("/telemetry", json=post(*frames, vehicle_id="A"))).json()
        back = (await client.post("/telemetry", json=post(*frames[::-1], *frames[:9], vehicle_id="B"))).json()
        for first in range(0, 300, 7):
            cut = (await client.post("/telemetry", json=post(*frames[first : first + 7], vehicle_id="C"))).json()
        assert whole["prediction"] == back["prediction"] == cut["prediction"]
        assert whole["prediction"]["types"]["battery_degradation"]["probability"] == pytest.approx(2 / 3, abs=0.01)


async def test_a_frame_sent_again_is_no_second_arrival_for_a_guard(client: httpx.AsyncClient) -> None:
    """One glitch of one probe raises nothing, however often a client repeats the request."""
    hot = {"time": START + 10, "signals": {}, "cell_temperature": [25.0, 25.0, 150.0]}
    normal = {"time": START, "signals": {}, "cell_temperature": [25.0, 25.0, 25.0]}
    await client.post("/telemetry", json=post(normal))
    for _ in range(5):
        reply = (await client.post("/telemetry", json=post(hot))).json()
        assert reply["alerts"] == []


async def test_a_guard_alarms_at_once_without_any_bundle(client: httpx.AsyncClient) -> None:
    for second in range(0, 40, 10):
        temperatures = [25.0, 25.5, 26.0] if second < 20 else [120.0, 121.0, 118.0]
        body = {"vehicle_id": "EV_1", "time": START + second, "cell_temperature": temperatures}
        reply = (await client.post("/telemetry", json=body)).json()
        if reply["alerts"]:
            break
    assert second == 20
    alert = reply["alerts"][0]
    assert (alert["failure_type"], alert["origin"]) == ("thermal_runaway_risk", "guard")
    (listed,) = (await client.get("/alerts", params={"origin": "guard", "state": "open"})).json()["alerts"][:1]
    assert listed["rule"] == alert["rule"]


async def test_cells_that_turn_up_later_lose_no_frame_and_their_number_is_then_fixed(
    tmp_path: Path, bundle: Path
) -> None:
    async with serving(tmp_path, bundle=bundle) as (client, _):
        for second in range(300):
            one = frame(second)
            if second % 10 == 5:
                one["cell_voltage"] = [3.7, None, 3.8]
            reply = (await client.post("/telemetry", json=post(one))).json()
        assert reply["prediction"] is not None
        wrong = frame(300) | {"cell_voltage": [3.7, 3.7]}
        answer = await client.post("/telemetry", json=post(wrong))
        assert answer.status_code == 422
        assert answer.json()["detail"] == (
            "frames[0].cell_voltage: has 2 values, but 3 until now; a vehicle's number of them does not change"
        )


WRONG: list[tuple[object, str, str]] = [
    (post(frame(0), vehicle_id="a/b"), "vehicle_id", "pattern"),
    ({"frames": []}, "vehicle_id", "is required"),
    (post(), "", "no time"),
    (post({"signals": {}}), "frames[0].time", "is required"),
    (post({"time": "yesterday"}), "frames[0].time", "ISO 8601"),
    (post({"time": True}), "frames[0].time", "ISO 8601"),
    (post({"time": -5}), "frames[0].time", "1970"),
    (post({"time": 1772000000000}), "frames[0].time", "seconds, not milliseconds"),
    (post({"time": 1, "signals": {SPEED: "fast"}}), f"frames[0].signals.{SPEED}", "must be a number"),
    (post({"time": 1, "signals": {SPEED: [1]}}), f"frames[0].signals.{SPEED}", "must be a number"),
    (post({"time": 1, "signals": [1]}), "frames[0].signals", "must be an object"),
    (post({"time": 1, "signals": {"Vehicle.Sped": 1}}), "frames[0].signals.Vehicle.Sped", "nearest is Vehicle.Speed"),
    (post({"time": 1, "cell_voltage": ["x"]}), "frames[0].cell_voltage[0]", "must be a number"),
    (post({"time": 1, "cell_voltage": [1.0] * 5000}), "frames[0].cell_voltage", "1024"),
    (post({"time": 1, "speed": 3}), "frames[0].speed", "is not a field here"),
    (post(frame(0), period_s=0), "period_s", "greater than 0"),
    (post(frame(0), time=1), "", "not both"),
    (post(frame(0), make="a\0b"), "make", "printable"),
    (post(frame(0), make="a\nb"), "make", "printable"),
    ({"vehicle_id": "EV_1", "time": 1, "signals": {"nope": 1}}, "signals.nope", "the nearest is"),
    ([], "", "must be an object"),
    ("frames", "", "must be an object"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "field", "words"), WRONG)
async def test_wrong_telemetry_names_the_field_in_plain_words(
    client: httpx.AsyncClient, body: object, field: str, words: str
) -> None:
    answer = await client.post("/telemetry", json=body)
    assert (answer.status_code, answer.headers["content-type"]) == (422, PROBLEM)
    problem = answer.json()
    assert set(problem) == {"type", "title", "status", "detail", "errors"}
    (error,) = problem["errors"]
    assert error["field"] == field
    assert words in error["problem"]
    assert (await client.get("/vehicles")).json()["vehicles"] == []


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" + "0" * 400])
@pytest.mark.parametrize("place", ['"signals":{"Vehicle.Speed":%s}', '"cell_voltage":[3.7,%s]', '"time":%s'])
async def test_numbers_that_json_or_a_double_does_not_have_are_refused(
    client: httpx.AsyncClient, number: str, place: str
) -> None:
    body = '{"vehicle_id":"EV_1","frames":[{"time":1,%s}]}' % (place % number)
    answer = await client.post("/telemetry", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 422, answer.text
    assert answer.headers["content-type"] == PROBLEM


@pytest.mark.parametrize("value", [3.5e38, 1e300, -1e308, 5e-324, 66_535.0])
async def test_absurd_values_count_as_missing_and_never_leak(tmp_path: Path, bundle: Path, value: float) -> None:
    async with serving(tmp_path, bundle=bundle) as (client, _):
        frames = [frame(s, **{VOLTAGE: value, SPEED: None}) for s in range(300)]
        answer = await client.post("/telemetry", json=post(*frames))
        assert answer.status_code == 200
        _all_finite(_strictly(answer.text))
        (note,) = answer.json()["notes"]
        assert note.endswith("count as missing: 300")
        _all_finite(_strictly((await client.get("/vehicles")).text))


async def test_a_model_that_answers_nan_gives_no_score_and_valid_json(tmp_path: Path) -> None:
    poison = build_bundle(tmp_path / "poison", default_catalogue(), poison=True)
    async with serving(tmp_path, bundle=poison) as (client, _):
        answer = await client.post("/telemetry", json=post(*(frame(s) for s in range(300))))
        reply = _strictly(answer.text)
        assert reply["prediction"] is None
        assert [n["reason"] for n in reply["no_scores"]] == ["not_finite"]


def _strictly(text: str) -> Any:
    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is not JSON")

    return json.loads(text, parse_constant=refuse)


def _all_finite(value: object) -> None:
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            _all_finite(item)
    assert not isinstance(value, float) or math.isfinite(value)


async def test_too_much_at_once_is_413_before_it_is_read(tmp_path: Path) -> None:
    async with serving(tmp_path, max_body_bytes=2000, max_frames=5) as (client, _):
        headers = {"content-type": "application/json"}

        async def endless() -> AsyncIterator[bytes]:
            while True:
                yield b" " * 1000

        for content in (b" " * 3000, endless()):
            answer = await client.post("/telemetry", content=content, headers=headers)
            assert (answer.status_code, answer.headers["content-type"]) == (413, PROBLEM)
        many = await client.post("/telemetry", json=post(*({"time": t} for t in range(6))))
        assert many.status_code == 413


async def test_a_body_that_drips_is_given_up(tmp_path: Path) -> None:
    async with serving(tmp_path, body_timeout_s=0.2) as (client, _):

        async def dripping() -> AsyncIterator[bytes]:
            import asyncio  # noqa: PLC0415

            while True:
                yield b" "
                await asyncio.sleep(0.05)

        answer = await client.post("/telemetry", content=dripping(), headers={"content-type": "application/json"})
        assert (answer.status_code, answer.headers["content-type"]) == (408, PROBLEM)


async def test_every_error_has_the_one_shape(client: httpx.AsyncClient) -> None:
    cases = [
        (await client.get("/nothing"), 404), (await client.delete("/alerts"), 405),
        (await client.post("/telemetry", content=b"{}", headers={"content-type": "text/plain"}), 415),
        (await client.post("/telemetry", content=b"{", headers={"content-type": "application/json"}), 422),
        (await client.get("/alerts?limit=0"), 422), (await client.get("/alerts?limit=x"), 422),
        (await client.get("/alerts?severity=bad"), 422), (await client.get("/alerts?since=soon"), 422),
        (await client.get("/alerts?cursor=99999999999999999999999"), 422), (await client.get("/alerts?tpye=x"), 422),
        (await client.get("/vehicles", params={"cursor": "\x00' OR 1=1 --"}), 422),
        (await client.get("/alerts", params={"vehicle_id": "<script>"}), 422),
    ]  # fmt: skip
    for answer, status in cases:
        assert (answer.status_code, answer.headers["content-type"]) == (status, PROBLEM), answer.text
        problem = answer.json()
        assert set(problem) == {"type", "title", "status", "detail", "errors"}
        assert problem["status"] == status
        assert problem["detail"]
    assert cases[1][0].headers["allow"]


async def test_a_fault_of_ours_is_a_problem_without_a_traceback(tmp_path: Path) -> None:
    async with serving(tmp_path) as (client, app):
        app.state.service = None
        answer = await client.get("/vehicles")
        assert (answer.status_code, answer.headers["content-type"]) == (500, PROBLEM)
        assert "NoneType" not in answer.text


def alert_item(vehicle_id: str, seq: int, **changes: Any) -> Any:
    fields: dict[str, Any] = {
        "alert_id": f"{vehicle_id}-{seq}", "transition": "raised", "failure_type": "charging_fault", "severity": "low",
        "origin": "model", "since": "2026-01-01T00:00:00.000Z",
        "evidence": (messages.Evidence(name="x", value=None, deviation=3.5),),
    }  # fmt: skip
    alert = messages.Alert(**fields | changes)
    envelope = messages.event(
        alert, event_id=f"{seq}", vehicle_id=vehicle_id, time="2036-01-01T00:00:00.000Z", stream_id="s", seq=seq,
        boot_id="b", clock_trusted=False, replayed=True,
    )  # fmt: skip
    return ingest.decide(topics.alert(vehicle_id, alert.failure_type), messages.encode(envelope))


async def test_pages_follow_each_other_while_more_arrives(tmp_path: Path, database_url: str) -> None:
    async with serving(tmp_path, database_url=database_url) as (client, app):
        store = app.state.service.store
        now = app.state.service.wall()
        await store.commit([alert_item(f"EV_{n % 3}", n) for n in range(1, 26)], received_at_s=now)
        seen: list[str] = []
        cursor = None
        for page in range(3):
            params = {"limit": 10} | ({"cursor": cursor} if cursor else {})
            body = (await client.get("/alerts", params=params)).json()
            seen += [a["alert_id"] for a in body["alerts"]]
            cursor = body["next"]
            await store.commit([alert_item("EV_9", page + 1)], received_at_s=now)  # goes before the first page
        assert cursor is None
        assert seen == [f"EV_{n % 3}-{n}" for n in range(25, 0, -1)]
        ids = []
        url: str | None = "/vehicles?limit=1"
        while url:
            body = (await client.get(url)).json()
            ids += [v["vehicle_id"] for v in body["vehicles"]]
            url = f"/vehicles?limit=1&cursor={body['next']}" if body["next"] else None
        assert ids == ["EV_0", "EV_1", "EV_2", "EV_9"]


async def test_alerts_are_filtered_and_show_both_clocks(tmp_path: Path, database_url: str) -> None:
    async with serving(tmp_path, database_url=database_url) as (client, app):
        items = [
            alert_item("EV_1", 1, severity="critical"), alert_item("EV_1", 2, origin="guard"),
            alert_item("EV_2", 1, failure_type="anomaly"), alert_item("EV_2", 2, transition="cleared"),
        ]  # fmt: skip
        await app.state.service.store.commit(items, received_at_s=START)

        async def ids(**params: str) -> set[str]:
            return {a["alert_id"] for a in (await client.get("/alerts", params=params)).json()["alerts"]}

        assert await ids(vehicle_id="EV_1") == {"EV_1-1", "EV_1-2"}
        assert await ids(severity="critical") == {"EV_1-1"}
        assert await ids(origin="guard") == {"EV_1-2"}
        assert await ids(failure_type="anomaly") == {"EV_2-1"}
        assert await ids(state="cleared") == {"EV_2-2"}
        assert await ids(state="open") == {"EV_1-1", "EV_1-2", "EV_2-1"}
        assert len(await ids(since="2026-02-25T06:13:20Z")) == 4
        assert len(await ids(since="2026-02-25T07:13:20+01:00")) == 4
        assert await ids(since=str(START + 1)) == set()
        (shown,) = (await client.get("/alerts", params={"severity": "critical"})).json()["alerts"]
        assert (shown["time"], shown["received"]) == ("2036-01-01T00:00:00.000Z", "2026-02-25T06:13:20.000Z")
        assert (shown["clock_trusted"], shown["replayed"]) == (False, True)
        assert shown["evidence"] == [{"name": "x", "value": None, "deviation": 3.5, "unit": ""}]


async def test_thresholds_are_the_bundles(tmp_path: Path, bundle: Path) -> None:
    async with serving(tmp_path, bundle=bundle) as (client, _):
        told = (await client.get("/thresholds")).json()
        assert told["active"] in told["policies"]
        assert told["types"] == told["policies"][told["active"]]["types"]
        assert set(told["types"]["charging_fault"]) == {"raise_at", "clear_below"}
        assert told["decision"]["cooldown_s"] == 1800
    async with serving(tmp_path) as (client, _):
        told = (await client.get("/thresholds")).json()
        assert (told["active"], told["types"], told["bundle"]["loaded"]) == (None, {}, False)


async def test_the_openapi_page_describes_every_endpoint_with_examples(client: httpx.AsyncClient) -> None:
    page = (await client.get("/openapi.json")).json()
    assert {"/", "/health", "/telemetry", "/vehicles", "/alerts", "/thresholds"} <= set(page["paths"])
    for path in page["paths"].values():
        for operation in path.values():
            assert operation["summary"]
            assert operation["description"]
    schemas = page["components"]["schemas"]
    references = {r.removeprefix("#/components/schemas/") for r in _references(page)}
    assert references <= set(schemas), references - set(schemas)
    examples = page["paths"]["/telemetry"]["post"]["requestBody"]["content"]["application/json"]["examples"]
    for example in examples.values():
        answer = await client.post("/telemetry", json={**example["value"], "vehicle_id": "E" + str(id(example))})
        assert answer.status_code == 200, answer.text
    assert "/ws/telemetry" in page["info"]["description"]
    assert "TelemetryReply" in schemas


def _references(value: object) -> set[str]:
    if isinstance(value, dict):
        found = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
        return found.union(*(_references(v) for v in value.values()))
    return set().union(*(_references(v) for v in value)) if isinstance(value, list) else set()


def test_the_socket_answers_every_message_in_order(tmp_path: Path, bundle: Path, database_url: str) -> None:
    app = create_app(settings(tmp_path, bundle=bundle, database_url=database_url))
    with TestClient(app) as client, client.websocket_connect("/ws/telemetry") as socket:
        for second in range(300):
            one = frame(second, **{SPEED: 200.0})
            socket.send_json({"vehicle_id": "EV_1", **one})
            reply = socket.receive_json()
            assert reply["frames_accepted"] == 1
            assert (reply["prediction"] is not None) == (second == 299)
        assert [a["failure_type"] for a in reply["alerts"]] == ["battery_degradation"]
        socket.send_text("{nonsense")
        assert socket.receive_json()["error"]["status"] == 422
        socket.send_bytes(json.dumps(post(frame(300))).encode())
        assert socket.receive_json()["frames_accepted"] == 1
        assert client.get("/health").json()["telemetry"]["sockets"] == 1


def test_a_socket_with_nothing_but_bad_messages_is_closed_with_a_reason(tmp_path: Path) -> None:
    app = create_app(settings(tmp_path, max_bad_messages=3))
    with TestClient(app) as client, client.websocket_connect("/ws/telemetry") as socket:
        for _ in range(3):
            socket.send_text("NaN")
            assert socket.receive_json()["error"]["status"] == 422
        with pytest.raises(WebSocketDisconnect) as closed:
            socket.receive_json()
        assert closed.value.code == 1008
        assert "3 messages" in closed.value.reason


def test_another_sites_page_may_not_use_the_socket(tmp_path: Path) -> None:
    app = create_app(settings(tmp_path))
    with TestClient(app) as client:
        with (
            pytest.raises(WebSocketDisconnect),
            client.websocket_connect("/ws/telemetry", headers={"origin": "https://elsewhere.example"}),
        ):
            pass
        with client.websocket_connect("/ws/telemetry", headers={"origin": "http://testserver"}) as socket:
            socket.send_json(post(frame(0)))
            assert socket.receive_json()["frames_accepted"] == 1


def test_the_service_imports_nothing_of_training() -> None:
    heavy = ("torch", "lightgbm", "onnx", "sklearn", "pandas", "export", "cloud.training")
    code = f"import cloud.api, sys; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


async def test_a_database_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    environment = {"DATABASE_URL": "", "VOLTWATCH_BUNDLE": "", "VOLTWATCH_BROKER": "", "VOLTWATCH_SCHEMA": "x.json"}
    settings = Settings.from_environment(environment)
    assert settings.database_url == "sqlite:///var/voltwatch.db"
    assert settings.broker is settings.bundle is None
    with pytest.raises(Exception, match=r"schema x\.json: cannot be read"):
        settings.catalogue()
