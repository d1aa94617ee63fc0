"""Messages on the wire: their fields, and the only encoder and decoder of them.

What must not be lost is an `Event`: a CloudEvents 1.0 structured JSON envelope whose extension attributes carry the
outbox's numbering (streamid, seq). Retained states (`Status`, `Current`, `ModelState`), the cloud's `Desired` and the
collector's `Ack` are plain JSON.
A receiver keeps unknown fields of a newer minor version by storing the bytes it got; a newer major version raises
`NewerMajorError`. JSON has no NaN: an unknown number is null, and the encoder refuses anything not finite.
"""

import math
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import numpy as np
from msgspec import UNSET, Meta, UnsetType

from edge_agent.contract.errors import MessageError, NewerMajorError
from edge_agent.contract.samples import MAX_PARTS

SCHEMA_VERSION = "1.0"
TYPE_PREFIX = "io.voltwatch."
MAX_MESSAGE_BYTES = 65_536  # a window with its cells, int16 and compressed, is about 10 kB

Severity = Literal["low", "medium", "high", "critical"]
Transition = Literal["raised", "escalated", "cleared"]
Stratum = Literal["driving", "charging", "parked", "all"]
Identifier = Annotated[str, Meta(min_length=1, max_length=128)]
ShortText = Annotated[str, Meta(max_length=512)]
Seq = Annotated[int, Meta(ge=1, le=2**62)]
Probability = Annotated[float, Meta(ge=0.0, le=1.0)]


class Body(msgspec.Struct, frozen=True, kw_only=True):
    """Base of every message: frozen, by keyword."""


class Evidence(Body, frozen=True, kw_only=True):
    """One reason for an alert: a signal or feature, its value, and how far it stands from its normal (robust z)."""

    name: ShortText
    value: float | None
    deviation: float | None = None
    unit: str = ""


class Alert(Body, frozen=True, kw_only=True):
    """A change of one alert's state.

    `alert_id` is the same from raised to cleared. `since` is when the first window or arrival showed it, `time` (in the
    envelope) when this transition was decided. `origin` is "model" for a head over windows, "guard" for a
    deterministic rule on arrivals, named in `rule`. Probabilities are calibrated; null where the head is absent.
    """

    alert_id: Identifier
    transition: Transition
    failure_type: Identifier
    severity: Severity
    origin: Literal["model", "guard"]
    since: str
    rule: ShortText = ""
    model_release: int | None = None
    model_name: str = ""
    failure_probability: Probability | None = None
    type_probability: Probability | None = None
    severity_probability: dict[str, Probability] = {}
    anomaly_score: float | None = None
    worst_cell: int | None = None  # 0-based
    worst_cell_deviation_v: float | None = None
    windows_over_threshold: int | None = None
    windows_considered: int | None = None
    evidence: Annotated[tuple[Evidence, ...], Meta(max_length=16)] = ()


class Loss(Body, frozen=True, kw_only=True):
    """Messages shed on purpose or destroyed: exactly this range of that stream will never come.

    `last_seq` is null when a whole stream is gone (its file was corrupt) and its end is not known.
    """

    stream_id: Identifier
    stream: Identifier
    first_seq: Seq
    last_seq: Seq | None
    count: Annotated[int, Meta(ge=0)]
    reason: Annotated[str, Meta(max_length=128)]


class ReplaySummary(Body, frozen=True, kw_only=True):
    """What a replayed recording contained; published once, after its alerts."""

    recording: ShortText
    first_time: str | None
    last_time: str | None
    frames: int
    windows_scored: int
    windows_no_score: dict[str, int]
    values_masked: int
    alerts: int
    worst_cell: int | None = None
    worst_cell_deviation_v: float | None = None
    model_release: int | None = None


class DriftVariable(Body, frozen=True, kw_only=True):
    """Counts of one variable in one stratum against the bundle's bins; the last count is "missing"."""

    name: ShortText
    stratum: Stratum
    counts: Annotated[tuple[Annotated[int, Meta(ge=0)], ...], Meta(max_length=256)]


class DriftCounts(Body, frozen=True, kw_only=True):
    """Counts over one span of time, mergeable by adding: of windows for features and scores, of frames for signals.

    One message has the counts of one stratum: `windows` is how many of its windows were counted, which is also what the
    counts of every feature and score add up to; those of every signal add up to that many strides of frames.
    """

    model_release: int
    reference: Identifier  # sha256 of drift_reference.json: counts of other bins never mix
    first_time: str
    last_time: str
    windows: Annotated[int, Meta(ge=0)]
    variables: tuple[DriftVariable, ...]


class Sample(Body, frozen=True, kw_only=True):
    """One part of a raw window for training; the parts in order, joined, are what `samples.pack` made.

    `sha256` and `length` are of the joined bytes, so that a cut or mixed sample is known. `alert_id` and `failure_type`
    name the alert that the window stands around; empty for one of the random share. `state_id` says which release's
    state tensors the packed window carries.
    """

    sample_id: Identifier
    reason: Literal["alert", "random"]
    part: Annotated[int, Meta(ge=1, le=MAX_PARTS)]
    parts: Annotated[int, Meta(ge=1, le=MAX_PARTS)]
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    length: Annotated[int, Meta(ge=1, le=MAX_PARTS * MAX_MESSAGE_BYTES)]
    end_time: Annotated[str, Meta(min_length=20, max_length=40)]
    elapsed_s: Annotated[float, Meta(ge=0.0)]
    coverage: Probability
    stratum: Stratum
    state_id: Annotated[str, Meta(max_length=128)] = ""
    model_release: int | None = None
    alert_id: Annotated[str, Meta(max_length=128)] = ""
    failure_type: Annotated[str, Meta(max_length=128)] = ""
    payload: bytes  # base64 in JSON


class Event(Body, frozen=True, kw_only=True):
    """The CloudEvents 1.0 envelope. `data` stays raw until its type is known."""

    specversion: Literal["1.0"]
    id: Identifier
    source: Identifier
    type: Identifier
    time: Annotated[str, Meta(min_length=20, max_length=40)]
    subject: str = ""
    datacontenttype: str = "application/json"
    schemaversion: str
    streamid: Identifier
    seq: Seq
    bootid: Identifier
    clocktrusted: bool
    replayed: bool = False
    data: msgspec.Raw


class Status(Body, frozen=True, kw_only=True):
    """The retained status of a vehicle. The last will is `{"state": "offline", …}` with everything else unset."""

    schemaversion: str = SCHEMA_VERSION
    state: Literal["online", "offline"]
    boot_id: str = ""
    time: str | None = None
    clock_trusted: bool = False
    agent_version: str | UnsetType = UNSET
    make: str | UnsetType = UNSET
    source: str | UnsetType = UNSET
    model_release: int | UnsetType | None = UNSET
    model_name: str | UnsetType = UNSET
    model_sha256: str | UnsetType = UNSET
    heads: tuple[str, ...] | UnsetType = UNSET
    problems: tuple[str, ...] | UnsetType = UNSET  # in plain words: "no bundle: guards only"
    last_arrival: str | UnsetType | None = UNSET
    counters: dict[str, int] | UnsetType = UNSET
    outbox: dict[str, int] | UnsetType = UNSET  # rows waiting, by stream
    scores: dict[str, float | None] | UnsetType = UNSET  # of the newest window
    state_of_charge_percent: float | UnsetType | None = UNSET


class Current(Body, frozen=True, kw_only=True):
    """The retained present state of one failure type; an empty payload clears it."""

    schemaversion: str = SCHEMA_VERSION
    alert_id: Identifier
    failure_type: Identifier
    severity: Severity
    since: str
    time: str


class Ack(Body, frozen=True, kw_only=True):
    """What the collector has committed: inclusive ranges of seq of one stream. The agent deletes exactly that."""

    schemaversion: str = SCHEMA_VERSION
    stream_id: Identifier
    ranges: Annotated[tuple[tuple[Seq, Seq], ...], Meta(min_length=1, max_length=1024)]
    time: str


class Desired(Body, frozen=True, kw_only=True):
    """Which release a vehicle is to install: a pointer into the signed repository, and trusted for nothing else.

    `target` is the name of a signed target there; `counter` must be the one that is signed with it.
    """

    schemaversion: str = SCHEMA_VERSION
    target: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9][A-Za-z0-9_.-]*)*$", max_length=200)]
    counter: Annotated[int, Meta(ge=1, le=2**53)]
    rollout_id: Annotated[str, Meta(max_length=128)] = ""
    time: str


class ModelState(Body, frozen=True, kw_only=True):
    """Which release really decides on a vehicle, said at every boot and change.

    `counter` to `slot` are of the release that decides; `target`, `attempted` (its counter), `reason` and `attempts` of
    the last one that was to be installed. `shadow`: that one is scored beside the deciding one until its trend is warm.
    `rolled_back` and `refused`: it is not, or no longer, to decide, for `reason` (a code) and `detail` (one line).
    A bundle that came with the vehicle has no counter.
    """

    schemaversion: str = SCHEMA_VERSION
    boot_id: str
    time: str
    state: Literal["running", "probation", "shadow", "rolled_back", "refused", "guards_only"]
    counter: int | None = None
    release: int | None = None
    name: str = ""
    sha256: Annotated[str, Meta(pattern="^([0-9a-f]{64})?$")] = ""
    slot: Literal["a", "b", "factory", ""] = ""
    target: Annotated[str, Meta(max_length=200)] = ""
    attempted: int | None = None
    rollout_id: Annotated[str, Meta(max_length=128)] = ""
    reason: Annotated[str, Meta(max_length=64)] = ""
    detail: ShortText = ""
    attempts: Annotated[int, Meta(ge=0)] = 0


EventData = Alert | Loss | ReplaySummary | DriftCounts | Sample
EVENT_TYPES: dict[str, type[EventData]] = {
    TYPE_PREFIX + "alert": Alert,
    TYPE_PREFIX + "loss": Loss,
    TYPE_PREFIX + "replay": ReplaySummary,
    TYPE_PREFIX + "drift": DriftCounts,
    TYPE_PREFIX + "sample": Sample,
}
_TYPE_OF = {kind: name for name, kind in EVENT_TYPES.items()}
T = TypeVar("T")
Versioned = TypeVar("Versioned", Status, Current, Ack, Desired, ModelState)
_VERSION = re.compile(r"(\d{1,6})\.(\d{1,6})", re.ASCII)


def _plain(value: Any) -> Any:
    """Turn a numpy scalar into Python's own number; anything else is our own mistake."""
    if isinstance(value, np.generic):
        return value.item()
    raise NotImplementedError(f"{type(value).__name__} cannot stand in a message")


_encoder = msgspec.json.Encoder(order="deterministic", enc_hook=_plain)


def encode(message: msgspec.Struct) -> bytes:
    """Encode one message as JSON. Raises `ValueError` when a number in it is not finite: that is our own fault."""
    _refuse_not_finite(msgspec.to_builtins(message, builtin_types=(msgspec.Raw,), enc_hook=_plain), "")
    return _encoder.encode(message)


def event(
    data: EventData, *, event_id: str, vehicle_id: str, time: str, stream_id: str, seq: int, boot_id: str,
    clock_trusted: bool, replayed: bool = False, subject: str = "",
) -> Event:  # fmt: skip
    """Put `data` into its envelope."""
    return Event(
        specversion="1.0", id=event_id, source=f"voltwatch/v1/{vehicle_id}", type=_TYPE_OF[type(data)], time=time,
        subject=subject, schemaversion=SCHEMA_VERSION, streamid=stream_id, seq=seq, bootid=boot_id,
        clocktrusted=clock_trusted, replayed=replayed, data=msgspec.Raw(encode(data)),
    )  # fmt: skip


def decode_event(payload: bytes, vehicle_id: str) -> tuple[Event, EventData]:
    """Decode an event that came on a topic of `vehicle_id`; only the topic's id is trusted.

    Raises `NewerMajorError` for a newer major version, else `MessageError` for anything malformed, oversize, of an
    unknown type, or whose source names another vehicle.
    """
    envelope = _decode(payload, Event)
    check_version(envelope.schemaversion)
    if envelope.source != f"voltwatch/v1/{vehicle_id}":
        raise MessageError(f"event source {envelope.source[:80]!a} does not match its topic's vehicle {vehicle_id!r}")
    kind = EVENT_TYPES.get(envelope.type)
    if kind is None:
        raise MessageError(f"event type {envelope.type[:80]!a} is not known")
    return envelope, _decode(bytes(envelope.data), kind)


def decode_status(payload: bytes) -> Status:
    """Decode a retained status. Raises like `decode_event`."""
    return _versioned(_decode(payload, Status))


def decode_current(payload: bytes) -> Current:
    """Decode a retained present state. Raises like `decode_event`."""
    return _versioned(_decode(payload, Current))


def decode_ack(payload: bytes) -> Ack:
    """Decode a collector's ack. Raises like `decode_event`, and `MessageError` for a range that runs backwards."""
    ack = _versioned(_decode(payload, Ack))
    if any(first > last for first, last in ack.ranges):
        raise MessageError("ack has a range whose end lies before its start")
    return ack


def decode_desired(payload: bytes) -> Desired:
    """Decode which release is to be installed. Raises like `decode_event`."""
    return _versioned(_decode(payload, Desired))


def decode_model_state(payload: bytes) -> ModelState:
    """Decode which release decides on a vehicle. Raises like `decode_event`."""
    return _versioned(_decode(payload, ModelState))


def check_version(version: str) -> None:
    """Accept our major version; raise `NewerMajorError` for a higher one, `MessageError` for no version at all."""
    match = _VERSION.fullmatch(version)
    if match is None:
        raise MessageError(f"schemaversion {version[:40]!a} is not MAJOR.MINOR")
    if int(match[1]) > int(SCHEMA_VERSION.split(".", maxsplit=1)[0]):
        raise NewerMajorError(f"schemaversion {version} is newer than {SCHEMA_VERSION}")


def finite(value: float | None) -> float | None:
    """Return a plain float, or None for NaN and infinities (numpy scalars included)."""
    if value is None:
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def ranges(seqs: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Fold sequence numbers, in any order and repeated, into inclusive ranges."""
    folded: list[tuple[int, int]] = []
    for seq in sorted(set(seqs)):
        if folded and folded[-1][1] == seq - 1:
            folded[-1] = (folded[-1][0], seq)
        else:
            folded.append((seq, seq))
    return tuple(folded)


def _versioned(message: Versioned) -> Versioned:
    check_version(message.schemaversion)
    return message


def _decode(payload: bytes, kind: type[T]) -> T:
    if len(payload) > MAX_MESSAGE_BYTES:
        raise MessageError(f"message of {len(payload)} bytes is over the limit of {MAX_MESSAGE_BYTES}")
    try:
        return msgspec.json.decode(payload, type=kind)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise MessageError(f"not a valid {kind.__name__}: {str(error)[:300]}") from error


def _refuse_not_finite(value: Any, path: str) -> None:
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{path or 'message'} is {value}; use messages.finite() for numbers that may be missing")
    elif isinstance(value, dict):
        for key, item in value.items():
            _refuse_not_finite(item, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _refuse_not_finite(item, f"{path}[{i}]")
