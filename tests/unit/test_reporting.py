"""What the pipeline says on its way to the disk, while the disk refuses and after."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from edge_agent import health, reporting
from edge_agent.config import BrokerConfig
from edge_agent.contract import messages
from edge_agent.contract.messages import DriftVariable
from edge_agent.delivery.mqtt import Link
from edge_agent.delivery.outbox import STREAMS, Outbox
from edge_agent.delivery.uplink import Uplink
from edge_agent.pipeline.bundle_dir import LoadedBundle, load_bundle
from edge_agent.pipeline.outcomes import AlertChange, Counted, NoScore, Outcome, Sampled
from edge_agent.pipeline.reports import Report
from edge_agent.reporting import Reporter
from tests.brokers import free_port
from tests.bundles import build_bundle
from tests.telemetry import CATALOGUE

ALERT = AlertChange(700.0, 640.0, "charging_fault", "raised", "high", "model", key="/640000")
SAMPLE = Sampled("/700000", 700.0, 60.0, 1.0, "driving", "alert", b"packed" * 100)


def counts(ordinal: int, windows: int = 10) -> Counted:
    variable = DriftVariable(name="anomaly_score", stratum="driving", counts=(windows, 0, 0))
    return Counted(f"/{ordinal}/0", "driving", 0.0, 60.0 * windows, windows, (variable,), "ab" * 32, 7)


class Vehicle:
    """An outbox on the disk and a link that nobody started."""

    def __init__(self, folder: Path, bundle: LoadedBundle | None, *, reserve_bytes: int = 0) -> None:
        self.numbered: list[str] = []
        self.outbox = Outbox(folder, notice_topic="n", build_loss=lambda *_: b"loss", reserve_bytes=reserve_bytes)
        uplink = Uplink(self.outbox.stream_ids, STREAMS, lambda: 0.5)
        link = Link(BrokerConfig(port=free_port()), "EV_1", self.outbox, uplink, client_id="c", will=None)
        self.reporter = Reporter(self.outbox, link, self.envelope, vehicle_id="EV_1", bundle=bundle)

    def envelope(self, report: Report, stream_id: str, seq: int) -> messages.Event:
        self.numbered.append(report.stream)
        return messages.event(report.data, event_id=report.event_id, vehicle_id="EV_1", time=report.time,
                              stream_id=stream_id, seq=seq, boot_id="b", clock_trusted=True)  # fmt: skip

    def rows(self) -> dict[str, int]:
        return {stream: len(seqs) for stream, seqs in self.outbox.waiting().items() if seqs}

    @contextmanager
    def full_disk(self) -> Iterator[None]:
        """No file of this process may grow: what SQLite writes fails as on a full disk."""
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # Python ignores SIGXFSZ: writing gives EFBIG
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> LoadedBundle:
    return load_bundle(build_bundle(tmp_path_factory.mktemp("bundle"), CATALOGUE), CATALOGUE)


@pytest.fixture
def vehicle(tmp_path: Path, bundle: LoadedBundle) -> Iterator[Vehicle]:
    made = Vehicle(tmp_path, bundle)
    yield made
    made.outbox.close()


def test_alerts_are_on_the_disk_before_counts_and_counts_before_samples(vehicle: Vehicle) -> None:
    said: list[Outcome] = [SAMPLE, counts(0), NoScore(1.0, "low_coverage", ""), ALERT]
    assert vehicle.reporter.store(said, 0.0)
    assert vehicle.numbered == ["alert", "drift", "sample"]
    assert not vehicle.reporter.store([SAMPLE], 0.0), "no state has to be saved for a sample"
    assert vehicle.rows() == {"alert": 1, "drift": 1, "sample": 1}, "stored again is one message"


def test_what_a_full_disk_refused_is_said_and_stored_when_there_is_space_again(vehicle: Vehicle) -> None:
    with vehicle.full_disk():
        vehicle.reporter.store([SAMPLE, counts(0), ALERT], 0.0)
        assert vehicle.reporter.problem.startswith("alerts cannot be stored: outbox ")
        assert not vehicle.reporter.retry(0.0), "not at once: the disk is left in peace"
        assert vehicle.reporter.retry(0.0, now=True)
        assert vehicle.reporter.unstored_counts == (counts(0),)
    assert vehicle.rows() == {}
    assert vehicle.reporter.counters == {"alert_not_stored": 2, "drift_not_stored": 2, "sample_not_stored": 2}
    assert vehicle.reporter.retry(0.0, now=True)
    assert vehicle.rows() == {"alert": 1, "drift": 1, "sample": 1}
    assert vehicle.reporter.problem == ""
    assert vehicle.reporter.active.keys() == {"charging_fault|model"}
    assert not vehicle.reporter.retry(0.0, now=True), "nothing waits any more"


def test_counts_given_up_while_the_disk_refuses_are_counted_by_the_window(
    vehicle: Vehicle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporting, "KEPT", {"alert": 1, "drift": 2, "sample": 1})
    with vehicle.full_disk():
        vehicle.reporter.store([counts(0, 7), counts(1, 8), counts(2, 9), SAMPLE, SAMPLE], 0.0)
    assert vehicle.reporter.counters["drift_given_up"] == 1
    assert vehicle.reporter.counters["drift_windows_given_up"] == 7
    assert vehicle.reporter.counters["sample_given_up"] == 1
    assert vehicle.reporter.retry(0.0, now=True)
    assert vehicle.rows() == {"drift": 2, "sample": 1}


def test_counts_that_no_queue_took_are_kept_with_the_saved_state(
    vehicle: Vehicle, bundle: LoadedBundle, tmp_path: Path
) -> None:
    with vehicle.full_disk():
        vehicle.reporter.store([counts(0), counts(1)], 0.0)
    state = health.SavedState(
        timeline="boot-1", saved_s=1.0, wall_offset_s=0.0, floor_s=0.0, active={}, pipeline=b"",
        counted=vehicle.reporter.unstored_counts,
    )  # fmt: skip
    health.save_state(tmp_path, state)
    saved = health.load_state(tmp_path)
    assert saved is not None
    assert (saved.counted, saved.stopped) == ((counts(0), counts(1)), False)
    vehicle.outbox.close()
    after = Vehicle(tmp_path, bundle)
    after.reporter.restore_counts(saved.counted, shift_s=-30.0)
    assert [c.first_s for c in after.reporter.unstored_counts] == [-30.0, -30.0]
    after.reporter.retry(0.0, now=True)
    assert after.rows() == {"drift": 2}
    after.outbox.close()


def test_kept_counts_leave_under_their_own_bins_with_another_bundle_or_none(vehicle: Vehicle, tmp_path: Path) -> None:
    vehicle.outbox.close()
    after = Vehicle(tmp_path, None)
    after.reporter.restore_counts((counts(0), counts(1)), shift_s=0.0)
    after.reporter.retry(0.0, now=True)
    assert after.rows() == {"drift": 2}
    for seq in (1, 2):
        row = after.outbox.get("drift", seq)
        assert row is not None
        _, data = messages.decode_event(row.payload, "EV_1")
        assert isinstance(data, messages.DriftCounts)
        assert (data.reference, data.model_release) == ("ab" * 32, 7)
    after.outbox.close()


def test_the_end_of_an_alert_does_not_overtake_its_beginning(vehicle: Vehicle) -> None:
    end = replace(ALERT, time_s=760.0, transition="cleared")
    with vehicle.full_disk():
        vehicle.reporter.store([ALERT], 0.0)
    vehicle.reporter.store([end], 0.0)  # there is space again, but the retry's time has not come
    assert vehicle.rows() == {}
    vehicle.reporter.retry(0.0, now=True)
    said = []
    for seq in (1, 2):
        row = vehicle.outbox.get("alert", seq)
        assert row is not None
        _, data = messages.decode_event(row.payload, "EV_1")
        assert isinstance(data, messages.Alert)
        said.append(data.transition)
    assert said == ["raised", "cleared"]
    assert vehicle.reporter.active == {}, "and nothing is retained of it"


def test_what_can_never_be_a_message_is_counted_and_stops_nothing_behind_it(vehicle: Vehicle) -> None:
    huge = replace(counts(0), variables=tuple(counts(0).variables[0] for _ in range(2_000)))
    with vehicle.full_disk():
        vehicle.reporter.store([huge, counts(1)], 0.0)
    assert vehicle.reporter.retry(0.0, now=True)
    assert vehicle.rows() == {"drift": 1}
    assert vehicle.reporter.counters["drift_refused"] == 1
    assert vehicle.reporter.unstored_counts == ()
