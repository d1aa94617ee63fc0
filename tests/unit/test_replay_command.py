"""`edge-agent replay`: its summary, its files, publishing once however often, and its one-line errors."""

import json
from collections import Counter
from pathlib import Path

import paho.mqtt.client as paho
import pytest

from edge_agent.__main__ import main
from edge_agent.clock import from_iso
from edge_agent.contract import messages, topics
from edge_agent.contract.bundle import Decision, WindowSpec
from edge_agent.contract.messages import decode_event
from edge_agent.contract.samples import unpack
from edge_agent.contract.signals import default_catalogue
from tests.brokers import Broker, Collector, broker, free_port, wait_for
from tests.bundles import build_bundle
from tests.vehicles import SCHEMA, catalogue

__all__ = ["broker"]
# of the recording below: an alert and its end; a window at it, two before it, one after it, and one of the random share
MESSAGES = Counter(Alert=2, ReplaySummary=1, DriftCounts=1, Sample=5)
MAPPING = """
[source]
vehicle_id = "EV_8"
[source.time]
column = "t"
[signals."Pack.Voltage"]
column = "v"
[signals."Pack.Cells"]
columns = "c*"
"""


@pytest.fixture
def recording(tmp_path: Path) -> list[str]:
    """A recording of ten minutes whose voltage stands high for the middle third; the arguments to replay it."""
    rows = ["t,v,c1,c2"]
    for i in range(600):
        voltage = 900 if 200 <= i < 400 else 300
        rows.append(f"{1_700_000_000 + i},{'inf' if i == 7 else voltage},3.7,{66.535 if i % 50 == 0 else 3.6}")
    (tmp_path / "trip.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "map.toml").write_text(MAPPING)
    (tmp_path / "schema.json").write_bytes(messages.encode(SCHEMA))
    build_bundle(
        tmp_path / "bundle", catalogue(), spec=WindowSpec(frames=60, stride_s=20, vector_period_s=10),
        decision=Decision(k=1, n=1, clear_windows=1), failure_types=("battery_degradation", "motor_bearing_wear"),
    )  # fmt: skip
    return ["replay", str(tmp_path / "trip.csv"), "--map", str(tmp_path / "map.toml"), "--schema",
            str(tmp_path / "schema.json"), "--bundle", str(tmp_path / "bundle")]  # fmt: skip


def test_the_summary_says_what_the_recording_contained(
    recording: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*recording, "--json", str(tmp_path / "s.json"), "--alerts", str(tmp_path / "a.jsonl")]) == 0
    summary = json.loads((tmp_path / "s.json").read_bytes())
    assert summary["frames"] == 600
    assert (summary["first_time"], summary["last_time"]) == ("2023-11-14T22:13:20.000Z", "2023-11-14T22:23:19.000Z")
    assert summary["windows_scored"] == 28
    assert summary["values_masked"] == {"Pack.Voltage": {"not_finite": 1}, "Pack.Cells": {"out_of_range": 12}}
    assert (summary["cells"], summary["alerts_raised"]) == (2, 1)
    events = [decode_event(line, "EV_8") for line in (tmp_path / "a.jsonl").read_bytes().splitlines()]
    assert [e.seq for e, _ in events] == [1, 2]
    assert [d.transition for _, d in events if isinstance(d, messages.Alert)] == ["raised", "cleared"]
    printed = capsys.readouterr().out
    assert "600 in" in printed
    assert "28 scored" in printed
    assert "Pack.Cells: 12 out_of_range" in printed
    assert "raised battery_degradation" in printed


def test_published_twice_is_stored_once(recording: list[str], broker: Broker) -> None:
    collector = Collector(broker.port)
    publish = [*recording, "--publish", "--broker", f"127.0.0.1:{broker.port}", "--timeout", "10"]
    assert main(publish) == 0
    stored = dict(collector.stored)
    said = [decode_event(payload, "EV_8")[1] for payload in stored.values()]
    assert Counter(type(data).__name__ for data in said) == MESSAGES
    assert main(publish) == 0
    assert collector.stored == stored
    assert len([t for t, _, _ in collector.received if "/alert/" in t]) == 4
    collector.close()


def test_counts_and_samples_of_a_recording_are_published_with_its_alerts(recording: list[str], broker: Broker) -> None:
    collector = Collector(broker.port)
    assert main([*recording, "--publish", "--broker", f"127.0.0.1:{broker.port}", "--timeout", "10"]) == 0
    events = [decode_event(payload, "EV_8") for payload in collector.stored.values()]
    assert len({e.streamid for e, _ in events}) == 3, "a stream for each class of message"
    assert all(e.replayed and not e.clocktrusted for e, _ in events)
    said = [data for _, data in events]
    assert [d.windows for d in said if isinstance(d, messages.DriftCounts)] == [28]
    alert = next(d for d in said if isinstance(d, messages.Alert))
    around = [d for d in said if isinstance(d, messages.Sample) and d.reason == "alert"]
    assert {(d.alert_id, d.failure_type) for d in around} == {(alert.alert_id, alert.failure_type)}
    ends = [from_iso(d.end_time) for d in around]
    raised_s = next(from_iso(e.time) for e, d in events if d is alert)
    assert [end - raised_s for end in ends] == [0.0, -60.0, -120.0, 60.0], "at it, before it nearest first, after it"
    for sample in around:
        assert unpack(sample.payload).values.shape == (60, 2)
    collector.close()


def test_a_replay_leaves_what_is_retained_of_a_live_vehicle_as_it_is(
    recording: list[str], broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    wills: list[object] = []
    monkeypatch.setattr(paho.Client, "will_set", lambda *said, **_: wills.append(said))
    collector = Collector(broker.port)
    retained = {topics.status("EV_8"): b"the live", topics.current("EV_8", "battery_degradation"): b"vehicle's"}
    for topic, payload in retained.items():
        collector.client.publish(topic, payload, qos=1, retain=True).wait_for_publish(10)
    assert main([*recording, "--publish", "--broker", f"127.0.0.1:{broker.port}", "--timeout", "10"]) == 0
    assert len(collector.stored) == MESSAGES.total()
    assert wills == [], "nor is anything said when it breaks off"
    late = Collector(broker.port, name="late")
    wait_for(lambda: len(late.received) >= 2, what="what is retained")
    assert {topic: payload for topic, payload, _ in late.received} == retained
    told = [topic for topic, _, _ in collector.received if topics.parse(topic).kind in {"status", "current"}]
    assert sorted(told) == sorted(retained), "nothing was said on them but by the vehicle"
    late.close()
    collector.close()


def test_without_a_collector_it_ends_with_one_line_and_what_it_kept_is_delivered_later(
    recording: list[str], broker: Broker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish = [*recording, "--publish", "--broker", f"127.0.0.1:{broker.port}", "--timeout", "0.5",
               "--data-dir", str(tmp_path / "kept")]  # fmt: skip
    assert main(publish) == 69
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("edge-agent")]
    assert len(error) == 1
    assert f"{MESSAGES.total()} of {MESSAGES.total()} messages not delivered" in error[0]
    assert "kept in" in error[0]
    collector = Collector(broker.port)
    assert main(publish) == 0
    assert len(collector.stored) == MESSAGES.total()
    assert main(publish) == 0  # everything was delivered: nothing is sent again
    collector.close()


@pytest.mark.parametrize(
    ("argument", "value", "code", "says"),
    [
        (1, "none.csv", 66, "none.csv: no such file"),
        (3, "none.toml", 78, "none.toml: no such file"),
        (5, "none.json", 78, "none.json: no such file"),
        (7, "none", 65, "no such bundle directory"),
    ],
)
def test_a_missing_input_is_one_clear_line(
    recording: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], argument: int, value: str, code: int,
    says: str,
) -> None:  # fmt: skip
    recording[argument] = str(tmp_path / value)
    assert main(recording) == code
    error = capsys.readouterr().err
    assert error.startswith("edge-agent: error: ")
    assert error.count("\n") == 1
    assert says in error


def test_a_bundle_with_a_wrong_hash_is_an_error_of_replay(
    recording: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "bundle" / "model.onnx"
    data = bytearray(model.read_bytes())
    data[100] ^= 1
    model.write_bytes(bytes(data))
    assert main(recording) == 65
    assert "hash does not match" in capsys.readouterr().err


@pytest.mark.parametrize("broker_argument", ["nowhere", "host:", ":1883", "host:0", "host:99999", "host:port"])
def test_a_malformed_broker_is_one_clear_line(
    recording: list[str], capsys: pytest.CaptureFixture[str], broker_argument: str
) -> None:
    assert main([*recording, "--publish", "--broker", broker_argument]) == 78
    assert "is not HOST:PORT" in capsys.readouterr().err


def test_no_broker_is_one_clear_line(recording: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    assert main([*recording, "--publish", "--broker", f"127.0.0.1:{port}", "--timeout", "0.3"]) == 69
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("edge-agent")]
    assert len(lines) == 1
    assert f"127.0.0.1:{port}: Connection refused" in lines[0]


@pytest.mark.parametrize("vehicle", ["a", "b"])
def test_a_real_vehicle_is_replayed_from_end_to_end(real_data: Path, tmp_path: Path, vehicle: str) -> None:
    build_bundle(tmp_path / "bundle", default_catalogue())
    mapping = Path(__file__).parents[2] / "edge_agent" / "mappings" / f"vehicle_{vehicle}.toml"
    assert main(["replay", str(real_data / f"vehicle_{vehicle}.parquet"), "--map", str(mapping), "--bundle",
                 str(tmp_path / "bundle"), "--json", str(tmp_path / "s.json")]) == 0  # fmt: skip
    summary = json.loads((tmp_path / "s.json").read_bytes())
    assert summary["frames"] == {"a": 66_666, "b": 50_000}[vehicle]
    assert summary["cells"] == {"a": 96, "b": 87}[vehicle]
    assert summary["windows_scored"] > 1000
    assert summary["values_masked"]


def test_counts_and_samples_of_a_real_vehicle_are_stored_once_however_often_published(
    real_data: Path, tmp_path: Path, broker: Broker
) -> None:
    build_bundle(tmp_path / "bundle", default_catalogue())
    mapping = Path(__file__).parents[2] / "edge_agent" / "mappings" / "vehicle_a.toml"
    publish = ["replay", str(real_data / "vehicle_a.parquet"), "--map", str(mapping), "--bundle",
               str(tmp_path / "bundle"), "--json", str(tmp_path / "s.json"), "--publish", "--broker",
               f"127.0.0.1:{broker.port}", "--timeout", "30"]  # fmt: skip
    collector = Collector(broker.port)
    assert main(publish) == 0
    first = dict(collector.stored)
    vehicle_id = next(iter(first))[0]
    said = [decode_event(payload, vehicle_id)[1] for payload in first.values()]
    summary = json.loads((tmp_path / "s.json").read_bytes())
    counted = [d for d in said if isinstance(d, messages.DriftCounts)]
    assert sum(d.windows for d in counted) == summary["windows_scored"] > 1000
    sampled = [d for d in said if isinstance(d, messages.Sample)]
    assert len({(d.sample_id, d.part) for d in sampled}) == len(sampled) > 0
    cells = {unpack(d.payload).cell_voltage.shape[1] for d in sampled if d.parts == 1}
    assert cells == {96}
    assert main(publish) == 0
    assert collector.stored == first
    collector.close()
