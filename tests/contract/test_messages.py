"""Messages survive the round trip; what is malformed, foreign or newer is told apart."""

import contextlib
import itertools
import json

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.contract import messages as m
from edge_agent.contract.errors import MessageError, NewerMajorError

ALERT = m.Alert(
    alert_id="a1", transition="raised", failure_type="motor_bearing_wear", severity="high", origin="model",
    since="2026-01-01T00:00:00.000Z", type_probability=0.93, evidence=(m.Evidence(name="x", value=1.5),),
)  # fmt: skip


def event(data: m.EventData = ALERT) -> m.Event:
    return m.event(
        data, event_id="e1", vehicle_id="EV_001", time="2026-01-01T00:00:00.000Z", stream_id="s1", seq=7, boot_id="b1",
        clock_trusted=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    "data",
    [
        ALERT,
        m.Loss(stream_id="s", stream="sample", first_seq=1, last_seq=9, count=9, reason="quota"),
        m.Loss(stream_id="s", stream="alert", first_seq=1, last_seq=None, count=0, reason="file corrupt"),
        m.ReplaySummary(
            recording="a.parquet", first_time=None, last_time=None, frames=3, windows_scored=0,
            windows_no_score={"low_coverage": 1}, values_masked=0, alerts=0,
        ),
        m.DriftCounts(
            model_release=1, reference="r", first_time="2026-01-01T00:00:00.000Z", last_time="2026-01-01T01:00:00.000Z",
            windows=2, variables=(m.DriftVariable(name="speed", stratum="driving", counts=(1, 1, 0)),),
        ),
    ],
)  # fmt: skip
def test_every_kind_of_event_survives_the_round_trip(data: m.EventData) -> None:
    envelope, decoded = m.decode_event(m.encode(event(data)), "EV_001")
    assert decoded == data
    assert (envelope.streamid, envelope.seq) == ("s1", 7)


def test_an_event_is_a_cloudevent_in_structured_mode() -> None:
    body = json.loads(m.encode(event()))
    assert {"specversion", "id", "source", "type", "time", "datacontenttype", "data"} <= body.keys()
    # CloudEvents 1.0: extension names are lower-case letters and digits only
    assert all(name.isalnum() and name.islower() for name in body)


def altered(**changes: object) -> bytes:
    return json.dumps(json.loads(m.encode(event())) | changes).encode()


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b"{}",
        b"null",
        altered(seq=0),
        altered(seq=10**400),
        altered(seq="7"),
        altered(source="voltwatch/v1/EV_002"),
        altered(type="io.voltwatch.unheard"),
        altered(schemaversion="one"),
        altered(data={"alert_id": "a"}),
        altered(data=None),
        m.encode(event()).replace(b"0.93", b"NaN"),
        m.encode(event()).replace(b"0.93", b"1e999"),
        m.encode(event()).replace(b"0.93", b"1.5"),
        altered(id="x" * m.MAX_MESSAGE_BYTES),
    ],
)
def test_a_malformed_event_is_refused_with_one_line(payload: bytes) -> None:
    with pytest.raises(MessageError) as refused:
        m.decode_event(payload, "EV_001")
    assert not isinstance(refused.value, NewerMajorError)
    assert "\n" not in str(refused.value)


def test_a_newer_minor_version_is_read_and_a_newer_major_is_told_apart() -> None:
    assert m.decode_event(altered(schemaversion="1.9", extra={"new": 1}), "EV_001")[1] == ALERT
    with pytest.raises(NewerMajorError):
        m.decode_event(altered(schemaversion="2.0"), "EV_001")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -np.float64("inf")])
def test_a_number_that_is_not_finite_never_reaches_the_wire(bad: float) -> None:
    with pytest.raises(ValueError, match="anomaly_score"):
        m.encode(msgspec.structs.replace(ALERT, anomaly_score=bad))
    assert m.finite(bad) is None


def test_numpy_scalars_become_plain_numbers() -> None:
    value = m.finite(np.float32(0.5))
    assert type(value) is float
    assert b'"value":0.5' in m.encode(m.Evidence(name="x", value=value))
    assert b'"value":0.5' in m.encode(m.Evidence(name="x", value=np.float32(0.5)))  # type: ignore[arg-type]


@given(st.binary(max_size=300))
def test_any_bytes_decode_or_raise_message_error_and_nothing_else(payload: bytes) -> None:
    for decode in (lambda p: m.decode_event(p, "EV_001"), m.decode_ack, m.decode_status, m.decode_current):
        with contextlib.suppress(MessageError):  # any other exception fails the test
            decode(payload)


def test_an_ack_whose_range_runs_backwards_is_refused() -> None:
    with pytest.raises(MessageError, match="range"):
        m.decode_ack(m.encode(m.Ack(stream_id="s", ranges=((9, 3),), time="t")))


@given(st.lists(st.integers(1, 200)))
def test_ranges_hold_exactly_the_numbers_given(seqs: list[int]) -> None:
    folded = m.ranges(seqs)
    assert {n for first, last in folded for n in range(first, last + 1)} == set(seqs)
    assert all(a[1] + 1 < b[0] for a, b in itertools.pairwise(folded)), "ranges are apart and in order"
