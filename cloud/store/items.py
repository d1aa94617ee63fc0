"""What may be written: plain values that a message was turned into, before anything touches the database."""

from collections.abc import Callable
from dataclasses import dataclass

from edge_agent.contract.messages import Alert, Current, DriftCounts, Event, EventData, Loss, Sample, Status

Folded = Alert | Loss | DriftCounts | Sample


def folded(data: EventData) -> Folded | None:
    """Return what the tables fold further, None for what is kept as it came."""
    return data if isinstance(data, Alert | Loss | DriftCounts | Sample) else None


@dataclass(frozen=True, slots=True)
class EventItem:
    """An event to be stored once under (vehicle_id, stream_id, seq), with the very bytes it came in."""

    vehicle_id: str
    topic: str
    envelope: Event
    data: Folded | None  # what the tables fold further; None for every other event
    body: bytes

    @property
    def key(self) -> tuple[str, str, int]:
        """What it is stored once under, and acknowledged by."""
        return self.vehicle_id, self.envelope.streamid, self.envelope.seq


@dataclass(frozen=True, slots=True)
class StatusItem:
    """A vehicle's status. A retained one was said earlier: it does not mean that the vehicle was seen now."""

    vehicle_id: str
    status: Status
    retained: bool


@dataclass(frozen=True, slots=True)
class CurrentItem:
    """The present state of one failure type; None clears it."""

    vehicle_id: str
    failure_type: str
    current: Current | None
    body: bytes


@dataclass(frozen=True, slots=True)
class ParkItem:
    """A message of a newer major version, kept raw."""

    vehicle_id: str
    topic: str
    body: bytes


@dataclass(frozen=True, slots=True)
class RefusedItem:
    """A message that is not stored. `reason` is a short code that counts are kept under."""

    reason: str
    topic: str
    detail: str
    payload: bytes


Item = EventItem | StatusItem | CurrentItem | ParkItem | RefusedItem


@dataclass(frozen=True, slots=True)
class ServerEvent:
    """An event that this server itself decided on; its number is given inside the transaction that stores it."""

    event_id: str
    topic: str
    build: Callable[[str, int], Event]  # (stream_id, seq) → envelope


@dataclass(frozen=True, slots=True)
class TelemetryCommit:
    """Everything that one step of a vehicle's server-side pipeline leaves behind; stored as one."""

    vehicle_id: str
    make: str
    period_s: float
    cells: int
    probes: int
    snapshot: bytes | None  # None: nothing worth saving yet
    last_arrival: str | None
    scores: dict[str, float | None] | None  # of the newest window; None when no window was scored
    model_release: int | None
    model_name: str
    model_sha256: str
    events: tuple[ServerEvent, ...]


@dataclass(frozen=True, slots=True)
class PipelineState:
    """What a restart continues from."""

    make: str
    period_s: float
    cells: int
    probes: int
    snapshot: bytes


@dataclass(frozen=True, slots=True)
class Written:
    """What a commit did."""

    stored: int = 0
    duplicates: int = 0
    refused: frozenset[tuple[str, str, int]] = frozenset()  # keys of events that were not stored: not acknowledged
