"""Outcomes become messages: once each, whole, and small enough."""

import hashlib
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.contract import messages
from edge_agent.contract.messages import DriftCounts, DriftVariable, Sample
from edge_agent.contract.samples import MAX_PARTS, SampleWindow, pack, unpack
from edge_agent.pipeline.bundle_dir import LoadedBundle, load_bundle
from edge_agent.pipeline.outcomes import Counted, NoScore, Sampled
from edge_agent.pipeline.reports import Report, reports
from edge_agent.pipeline.sampling import PART_BYTES, message_bytes
from tests.bundles import build_bundle
from tests.telemetry import CATALOGUE

BINS = ("ab" * 32, 7)  # reference and release
VARIABLE = DriftVariable(name="f", stratum="driving", counts=(10, 50, 0))
COUNTED = Counted("boot/3/299000", "driving", 299.0, 3839.0, 60, (VARIABLE,), *BINS)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> LoadedBundle:
    return load_bundle(build_bundle(tmp_path_factory.mktemp("bundle"), CATALOGUE, release=7), CATALOGUE)


def sampled(packed: bytes, **changes: object) -> Sampled:
    values = {"state_id": "s" * 128, "model_release": 7, "alert_id": "a" * 128, "failure_type": "f" * 128, **changes}
    return Sampled("boot/299000", 299.0, 60.0, 1.0, "driving", "alert", packed, **values)  # type: ignore[arg-type]


def encode(report: Report) -> bytes:
    """The event, with every id as long as it may be."""
    return messages.encode(
        messages.event(report.data, event_id=report.event_id, vehicle_id="v" * 64, time=report.time,
                       stream_id="i" * 128, seq=2**62, boot_id="b" * 128, clock_trusted=False, subject=report.subject)
    )  # fmt: skip


def test_counts_are_one_message_that_names_its_bins_and_its_span(bundle: LoadedBundle) -> None:
    (report,) = reports(COUNTED, vehicle_id="EV_1", bundle=bundle, offset_s=1.6e9)
    assert (report.stream, report.topic, report.subject) == ("drift", "voltwatch/v1/EV_1/drift", "driving")
    data = report.data
    assert isinstance(data, DriftCounts)
    assert data.reference == BINS[0], "those they were counted in, whatever is installed when they leave"
    assert (data.model_release, data.windows) == (7, 60)
    assert (data.first_time, data.last_time) == ("2020-09-13T12:31:39.000Z", "2020-09-13T13:30:39.000Z")
    assert report.time == data.last_time


def test_the_same_counts_have_the_same_id_whatever_the_clock_says_and_others_have_another(
    bundle: LoadedBundle,
) -> None:
    def event_id(counted: Counted, offset_s: float = 0.0, vehicle_id: str = "EV_1") -> str:
        return reports(counted, vehicle_id=vehicle_id, bundle=bundle, offset_s=offset_s)[0].event_id

    same = event_id(COUNTED)
    partial = Counted(COUNTED.key, "driving", 299.0, 959.0, 12, COUNTED.variables, *BINS)
    assert {event_id(COUNTED, 5.0), event_id(partial)} == {same}, "a span that was counted again after a kill"
    parked = Counted(COUNTED.key, "parked", 299.0, 959.0, 12, (), *BINS)
    later = Counted("boot/4/299000", "driving", 299.0, 959.0, 12, (), *BINS)
    others = {event_id(parked), event_id(later), event_id(COUNTED, vehicle_id="EV_2")}
    assert len(others | {same}) == 4


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3 * PART_BYTES + 5))
def test_a_sample_is_cut_into_parts_that_fit_a_message_and_join_again(length: int) -> None:
    packed = os.urandom(length)
    said = reports(sampled(packed), vehicle_id="v" * 64)
    parts = [messages.decode_event(encode(report), "v" * 64)[1] for report in said]
    assert all(len(encode(report)) <= messages.MAX_MESSAGE_BYTES for report in said)
    assert b"".join(p.payload for p in parts if isinstance(p, Sample)) == packed
    assert {(p.length, p.sha256, p.parts) for p in parts if isinstance(p, Sample)} == {
        (length, hashlib.sha256(packed).hexdigest(), len(said))
    }
    assert [p.part for p in parts if isinstance(p, Sample)] == list(range(1, len(said) + 1))
    assert len({report.event_id for report in said}) == len(said)


def test_the_largest_sample_has_no_more_parts_than_a_receiver_takes() -> None:
    assert len(reports(sampled(os.urandom(PART_BYTES * MAX_PARTS)), vehicle_id="EV_1")) == MAX_PARTS


def test_a_sample_has_the_same_id_each_time_and_another_for_other_bytes() -> None:
    def sample_id(packed: bytes, offset_s: float = 0.0) -> str:
        data = reports(sampled(packed), vehicle_id="EV_1", offset_s=offset_s)[0].data
        assert isinstance(data, Sample)
        return data.sample_id

    assert sample_id(b"x") == sample_id(b"x", 100.0) != sample_id(b"y")


def test_what_is_spent_of_the_budget_is_what_goes_over_the_wire() -> None:
    rng = np.random.default_rng(1)
    for rows in (10, 300, 9_000):
        window = SampleWindow(("a", "b"), rng.normal(size=(rows, 2)).astype(np.float32), np.empty((1, 0), np.float32),
                              np.empty((1, 0), np.float32))  # fmt: skip
        packed = pack(window)
        assert unpack(packed).values.shape == (rows, 2)
        said = reports(sampled(packed, state_id="ev-1", alert_id="a" * 36, failure_type="thermal_runaway_risk"),
                       vehicle_id="EV_1")  # fmt: skip
        sent = sum(
            len(messages.encode(messages.event(r.data, event_id=r.event_id, vehicle_id="EV_1", time=r.time,
                                               stream_id="i" * 36, seq=10**6, boot_id="b" * 36, clock_trusted=True,
                                               subject=r.subject)))
            for r in said
        )  # fmt: skip
        assert sent <= message_bytes(len(packed)) <= sent + 300 * len(said)


def test_windows_themselves_are_not_said(bundle: LoadedBundle) -> None:
    assert reports(NoScore(1.0, "low_coverage", "…"), vehicle_id="EV_1", bundle=bundle) == ()
