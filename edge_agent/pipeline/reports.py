"""What the pipeline says becomes messages: of alerts (`alerts`), of drift counts, of samples.

Promises: the same outcome gives the same keys and the same bytes whenever it is made again, so that an append repeated
after a crash is one message; every part of a sample fits a message. Pure; sending is `delivery`'s.
"""

import hashlib
import uuid
from dataclasses import dataclass

from edge_agent.contract import topics
from edge_agent.contract.messages import DriftCounts, EventData, Sample
from edge_agent.pipeline.alerts import NAMESPACE, alert_message, iso
from edge_agent.pipeline.bundle_dir import LoadedBundle
from edge_agent.pipeline.outcomes import AlertChange, Counted, Outcome, Sampled
from edge_agent.pipeline.sampling import PART_BYTES

STREAM_OF = {AlertChange: "alert", Counted: "drift", Sampled: "sample"}


@dataclass(frozen=True, slots=True)
class Report:
    """One message before it is numbered: `event_id` is also what the outbox knows it by."""

    stream: str
    event_id: str
    topic: str
    time: str
    subject: str
    data: EventData


def reports(
    outcome: Outcome, *, vehicle_id: str, bundle: LoadedBundle | None = None, offset_s: float = 0.0
) -> tuple[Report, ...]:
    """Return what an outcome says to the cloud; nothing for windows, which stay on the vehicle.

    `offset_s` is added to the source's times to make wall time: 0 for recordings and for telemetry with its own time.
    """
    if isinstance(outcome, AlertChange):
        return (alert_report(outcome, vehicle_id=vehicle_id, bundle=bundle, offset_s=offset_s),)
    if isinstance(outcome, Counted):
        return (drift_report(outcome, vehicle_id=vehicle_id, offset_s=offset_s),)
    if isinstance(outcome, Sampled):
        return sample_reports(outcome, vehicle_id=vehicle_id, offset_s=offset_s)
    return ()


def alert_report(
    change: AlertChange, *, vehicle_id: str, bundle: LoadedBundle | None = None, offset_s: float = 0.0
) -> Report:
    """Return one change of an alert."""
    manifest = None if bundle is None else bundle.manifest
    _, event_id, alert = alert_message(change, vehicle_id=vehicle_id, manifest=manifest, offset_s=offset_s)
    topic = topics.alert(vehicle_id, change.failure_type)
    return Report("alert", event_id, topic, iso(change.time_s + offset_s), change.failure_type, alert)


def drift_event_id(counted: Counted, vehicle_id: str) -> str:
    """Return the id under which these counts are sent once, however often their window is counted again."""
    name = f"{vehicle_id}|drift|{counted.reference}|{counted.key}|{counted.stratum}"
    return str(uuid.uuid5(NAMESPACE, name))


def drift_report(counted: Counted, *, vehicle_id: str, offset_s: float = 0.0) -> Report:
    """Return the counts of one span and stratum."""
    counts = DriftCounts(
        model_release=counted.model_release,
        reference=counted.reference,
        first_time=iso(counted.first_s + offset_s),
        last_time=iso(counted.last_s + offset_s),
        windows=counted.windows,
        variables=counted.variables,
    )
    event_id = drift_event_id(counted, vehicle_id)
    return Report("drift", event_id, topics.drift(vehicle_id), counts.last_time, counted.stratum, counts)


def sample_reports(sampled: Sampled, *, vehicle_id: str, offset_s: float = 0.0) -> tuple[Report, ...]:
    """Return a sample's parts, in order.

    Its id comes from the window and from the bytes: parts of two releases' samples of one window never mix.
    """
    sha256 = hashlib.sha256(sampled.packed).hexdigest()
    sample_id = str(uuid.uuid5(NAMESPACE, f"{vehicle_id}|sample|{sampled.key}|{sha256}"))
    end_time = iso(sampled.end_s + offset_s)
    starts = range(0, len(sampled.packed), PART_BYTES)
    return tuple(
        Report(
            "sample", str(uuid.uuid5(NAMESPACE, f"{sample_id}|{part}")), topics.sample(vehicle_id), end_time, sample_id,
            Sample(
                sample_id=sample_id, reason=sampled.reason, part=part, parts=len(starts), sha256=sha256,
                length=len(sampled.packed), end_time=end_time, elapsed_s=sampled.elapsed_s,
                coverage=min(1.0, max(0.0, sampled.coverage)), stratum=sampled.stratum, state_id=sampled.state_id,
                model_release=sampled.model_release, alert_id=sampled.alert_id, failure_type=sampled.failure_type,
                payload=sampled.packed[start : start + PART_BYTES],
            ),
        )
        for part, start in enumerate(starts, start=1)
    )  # fmt: skip
