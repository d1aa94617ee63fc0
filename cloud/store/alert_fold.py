"""One alert out of its transitions. Pure, and independent of the order in which they came.

Within a stream the sequence number orders. Streams of one alert (a vehicle whose outbox was lost begins a new one) are
ordered by the earliest time in each, then by name; a vehicle's clock decides nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edge_agent.contract.messages import Alert, decode_event


@dataclass(frozen=True, slots=True)
class Told:
    """One stored transition."""

    ingest_id: int
    received_at_s: float
    vehicle_id: str
    body: bytes


def fold(transitions: Sequence[Told]) -> dict[str, Any]:
    """Return the row of `tables.alert` for all known transitions of one alert (at least one)."""
    decoded = []
    for told in transitions:
        envelope, data = decode_event(told.body, told.vehicle_id)
        if isinstance(data, Alert):
            decoded.append((envelope, data))
    begins: dict[str, str] = {}
    for envelope, _ in decoded:
        begins[envelope.streamid] = min(envelope.time, begins.get(envelope.streamid, envelope.time))
    decoded.sort(key=lambda pair: (begins[pair[0].streamid], pair[0].streamid, pair[0].seq))
    last_envelope, last = decoded[-1]
    # the end of an alert says little; what to show is the newest transition before it
    shown_envelope, shown = next((p for p in reversed(decoded) if p[1].transition != "cleared"), decoded[-1])
    first_told = min(transitions, key=lambda told: told.ingest_id)
    last_told = max(transitions, key=lambda told: told.ingest_id)
    return {
        "vehicle_id": first_told.vehicle_id,
        "alert_id": last.alert_id,
        "ingest_id": first_told.ingest_id,
        "last_ingest_id": last_told.ingest_id,
        "received_at_s": first_told.received_at_s,
        "updated_at_s": last_told.received_at_s,
        "failure_type": shown.failure_type,
        "origin": shown.origin,
        "rule": shown.rule,
        "state": last.transition,
        "severity": shown.severity,
        "since": decoded[0][1].since,
        "time": last_envelope.time,
        "cleared_time": last_envelope.time if last.transition == "cleared" else None,
        "transitions": len(decoded),
        "clock_trusted": all(envelope.clocktrusted for envelope, _ in decoded),
        "replayed": any(envelope.replayed for envelope, _ in decoded),
        "model_release": shown.model_release,
        "model_name": shown.model_name,
        "body": bytes(shown_envelope.data).decode(),
    }
