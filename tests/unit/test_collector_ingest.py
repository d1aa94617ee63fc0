"""What the collector decides about a message: only the topic's vehicle is trusted, and nothing makes it raise."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud.collector import ingest
from cloud.collector.mqtt import parse_broker
from cloud.store.items import CurrentItem, EventItem, ParkItem, RefusedItem, StatusItem
from edge_agent.contract import messages, topics
from edge_agent.contract.errors import ConfigError

TYPE = "charging_fault"
TOPIC = topics.alert("EV_1", TYPE)


def alert_body(**changes: Any) -> dict[str, Any]:
    alert = messages.Alert(
        alert_id="a1", transition="raised", failure_type=TYPE, severity="low", origin="guard", since="2026-03-01"
    )
    envelope = messages.event(
        alert, event_id="e1", vehicle_id="EV_1", time="2026-03-01T00:00:00.000Z", stream_id="s1", seq=1, boot_id="b",
        clock_trusted=True,
    )  # fmt: skip
    body: dict[str, Any] = json.loads(messages.encode(envelope))
    data = {k.removeprefix("data_"): v for k, v in changes.items() if k.startswith("data_")}
    body["data"] |= data
    return body | {k: v for k, v in changes.items() if not k.startswith("data_")}


def decide(topic: str = TOPIC, **changes: Any) -> object:
    return ingest.decide(topic, json.dumps(alert_body(**changes)).encode())


def test_an_alert_is_stored_with_its_bytes_and_its_key() -> None:
    item = decide()
    assert isinstance(item, EventItem)
    assert item.key == ("EV_1", "s1", 1)
    assert json.loads(item.body) == alert_body()


@pytest.mark.parametrize(
    ("topic", "changes", "reason"),
    [
        (topics.alert("EV_2", TYPE), {}, "malformed"),  # the payload's source names another vehicle
        (topics.alert("EV_1", "motor_bearing_wear"), {}, "mismatch"),
        (topics.drift("EV_1"), {}, "mismatch"),
        (topics.notice("EV_1"), {}, "mismatch"),
        (TOPIC, {"streamid": "server"}, "reserved_stream"),
        (TOPIC, {"streamid": "a\x00b"}, "malformed"),
        (TOPIC, {"id": "a\nb"}, "malformed"),
        (TOPIC, {"seq": 0}, "malformed"),
        (TOPIC, {"seq": 10**30}, "malformed"),
        (TOPIC, {"data_model_release": 10**30}, "malformed"),
        (TOPIC, {"data_since": "x" * 100}, "malformed"),
        (TOPIC, {"data_alert_id": "\u202e"}, "malformed"),
        (TOPIC, {"type": "io.voltwatch.unheard"}, "malformed"),
        (TOPIC, {"schemaversion": "one"}, "malformed"),
        (TOPIC, {"padding": "x" * messages.MAX_MESSAGE_BYTES}, "oversize"),
        ("voltwatch/v1/EV_1/ack", {}, "unexpected"),
        ("voltwatch/v1/../alert/x", {}, "topic"),
        ("elsewhere", {}, "topic"),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_reason(topic: str, changes: dict[str, Any], reason: str) -> None:
    item = decide(topic, **changes)
    assert isinstance(item, RefusedItem)
    assert (item.reason, item.topic) == (reason, topic)
    assert item.detail


def test_a_newer_major_is_parked_and_a_newer_minor_is_stored() -> None:
    assert isinstance(decide(schemaversion="2.0"), ParkItem)
    assert isinstance(decide(schemaversion="1.7", unheard={"of": 1}), EventItem)


def test_states_are_understood() -> None:
    status = ingest.decide(topics.status("EV_1"), messages.encode(messages.Status(state="online")), retained=True)
    assert isinstance(status, StatusItem)
    assert status.retained
    cleared = ingest.decide(topics.current("EV_1", TYPE), b"")
    assert isinstance(cleared, CurrentItem)
    assert cleared.current is None


def test_only_events_are_acknowledged_to_the_vehicle_duplicates_too() -> None:
    items = [decide(seq=1), decide(seq=1), decide(seq=2), decide(schemaversion="2.0", seq=3), decide(seq=0)]
    assert ingest.ack_keys(items) == {("EV_1", "s1"): [1, 1, 2]}  # type: ignore[arg-type]


def test_everything_subscribed_to_is_understood() -> None:
    assert ingest.SUBSCRIPTIONS == (
        "voltwatch/v1/+/alert/+", "voltwatch/v1/+/notice", "voltwatch/v1/+/drift", "voltwatch/v1/+/sample",
        "voltwatch/v1/+/status", "voltwatch/v1/+/current/+",
    )  # fmt: skip


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(
    topic=st.sampled_from([TOPIC, topics.status("EV_1"), topics.current("EV_1", TYPE), topics.drift("EV_1"), "x"]),
    payload=st.binary(max_size=200)
    | JSON.map(lambda v: json.dumps(v).encode())
    | st.tuples(st.sampled_from([*alert_body(), "state", "schemaversion"]), JSON).map(
        lambda kv: json.dumps(alert_body() | {kv[0]: kv[1]}).encode()
    ),
)
def test_no_message_makes_it_raise(topic: str, payload: bytes) -> None:
    ingest.decide(topic, payload)


@pytest.mark.parametrize("payload", [b"[" * 60_000, b'{"a":' * 12_000, b"1" * 60_000, b'{"seq":1e999}'])
def test_deep_nesting_and_endless_numbers_are_refused(payload: bytes) -> None:
    assert isinstance(ingest.decide(TOPIC, payload), RefusedItem)


def test_the_brokers_address_is_read_or_refused_in_one_line() -> None:
    assert parse_broker("10.0.0.1:1884") == ("10.0.0.1", 1884)
    assert parse_broker("[::1]:1883") == ("::1", 1883)
    assert parse_broker("broker") == ("broker", 1883)
    for wrong in ("host:x", ":1883", "h:70000", ""):
        with pytest.raises(ConfigError, match="HOST:PORT"):
            parse_broker(wrong)
