"""docs/asyncapi.yaml is what the code says, and what really goes over the wire fits it."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import jsonschema_rs
import pytest
import yaml

from edge_agent.__main__ import main
from edge_agent.contract import messages, topics
from tests.brokers import Broker, Collector, broker, wait_for
from tests.unit.test_replay_command import recording

__all__ = ["broker", "recording"]
DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def asyncapi() -> ModuleType:
    spec = importlib.util.spec_from_file_location("asyncapi_document", DOCS / "asyncapi.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check(asyncapi: ModuleType, topic: str, payload: bytes) -> str:
    """Validate one captured message; returns its kind."""
    parsed = topics.parse(topic)
    schema = asyncapi.schema_of(parsed, payload)
    jsonschema_rs.validator_for(schema).validate(json.loads(payload))
    return parsed.kind


def test_the_committed_document_is_up_to_date(asyncapi: ModuleType) -> None:
    written = asyncapi.TARGET.read_text(encoding="utf-8")
    assert written == asyncapi.text(), "run: python docs/asyncapi.py"
    assert yaml.safe_load(written)["asyncapi"] == "3.0.0"


def test_every_topic_of_the_grammar_is_described(asyncapi: ModuleType) -> None:
    document = asyncapi.document()
    addresses = [channel["address"] for channel in document["channels"].values()]
    for make in (topics.alert, topics.current):
        assert make("EV", "anomaly").replace("EV", "{vehicle_id}").replace("anomaly", "{failure_type}") in addresses
    for make_one in (topics.notice, topics.drift, topics.sample, topics.status, topics.ack,
                     topics.model_desired, topics.model_state):  # fmt: skip
        assert make_one("EV").replace("EV", "{vehicle_id}") in addresses


def test_captured_traffic_fits_the_document(asyncapi: ModuleType, recording: list[str], broker: Broker) -> None:
    collector = Collector(broker.port)
    acks: list[bytes] = []
    collector.client.message_callback_add(topics.ack("EV_8"), lambda c, _u, m: (acks.append(bytes(m.payload)), c.ack(
        m.mid, m.qos)))  # fmt: skip
    collector.client.subscribe(topics.ack("EV_8"), qos=1)
    assert main([*recording, "--publish", "--broker", f"127.0.0.1:{broker.port}", "--timeout", "10"]) == 0
    wait_for(lambda: acks)
    kinds = {check(asyncapi, topic, payload) for topic, payload, _ in collector.received if payload}
    kinds |= {check(asyncapi, topics.ack("EV_8"), ack) for ack in acks}
    assert kinds == {"alert", "notice", "drift", "sample", "ack"}
    collector.close()


def test_each_kind_of_message_fits_the_document_and_a_wrong_one_does_not(asyncapi: ModuleType) -> None:
    loss = messages.Loss(stream_id="x", stream="alert", first_seq=1, last_seq=None, count=0, reason="corrupt")
    drift = messages.DriftCounts(
        model_release=1, reference="r", first_time="a", last_time="b", windows=1,
        variables=(messages.DriftVariable(name="v", stratum="driving", counts=(1, 2)),),
    )  # fmt: skip
    sample = messages.Sample(
        sample_id="i", reason="random", part=1, parts=1, sha256="0" * 64, length=1,
        end_time="2026-11-01T00:00:00.000Z", elapsed_s=60.0, coverage=1.0, stratum="all", payload=b"x",
    )  # fmt: skip
    current = messages.Current(alert_id="a", failure_type="anomaly", severity="low", since="s", time="t")
    good = {
        topics.current("E", "anomaly"): messages.encode(current),
        topics.status("E"): messages.encode(
            messages.Status(state="online", counters={"frames": 1}, scores={"x": None})
        ),
        topics.model_desired("E"): messages.encode(messages.Desired(target="bundles/x-1.tar", counter=1, time="t")),
        topics.model_state("E"): messages.encode(
            messages.ModelState(boot_id="b", time="t", state="running", counter=1, sha256="0" * 64, slot="a")
        ),
    }
    for topic, data in ((topics.notice("E"), loss), (topics.drift("E"), drift), (topics.sample("E"), sample)):
        good[topic] = messages.encode(
            messages.event(data, event_id="e", vehicle_id="E", time="2026-11-01T00:00:00.000Z", stream_id="s", seq=1,
                           boot_id="b", clock_trusted=False)
        )  # fmt: skip
    for topic, payload in good.items():
        check(asyncapi, topic, payload)
        broken = json.loads(payload)
        del broken[next(name for name in ("seq", "severity", "state", "counter") if name in broken)]
        with pytest.raises(jsonschema_rs.ValidationError):
            check(asyncapi, topic, json.dumps(broken).encode())
    wrong = json.loads(good[topics.notice("E")])
    wrong["data"]["first_seq"] = 0
    with pytest.raises(jsonschema_rs.ValidationError):
        check(asyncapi, topics.notice("E"), json.dumps(wrong).encode())
