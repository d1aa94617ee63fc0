"""From a topic and a payload to what the store is to do with it. Pure.

Only the topic's vehicle id is trusted: a payload that names another one is refused. A newer major version is parked
raw. Whatever else cannot be used is refused with a reason that counts are kept under. Nothing here raises.
"""

from collections.abc import Iterable

import msgspec

from cloud.drift.bins import MOST_WINDOWS
from cloud.store.items import CurrentItem, EventItem, Item, ParkItem, RefusedItem, StatusItem, folded
from cloud.store.wire_time import unix_s
from cloud.store.writing import SERVER_STREAM
from edge_agent.contract import messages, topics
from edge_agent.contract.errors import MessageError, NewerMajorError
from edge_agent.contract.messages import Alert, DriftCounts, Event, EventData, Loss, ReplaySummary, Sample, Status
from edge_agent.contract.topics import Topic

SUBSCRIPTIONS = tuple(topics.subscription(kind) for kind in ("alert", "notice", "drift", "sample", "status", "current"))
_CARRIES: dict[str, tuple[type, ...]] = {
    "alert": (Alert,), "notice": (Loss, ReplaySummary), "drift": (DriftCounts,), "sample": (Sample,),
}  # fmt: skip
_MAX_TIME = 40  # characters of a time, as the envelope allows
_MAX_COUNT = 2**62  # what a 64-bit column holds, with room: of a number that is never added to another
# what is added up has less: a fleet's sums then stay far below 2**63. No vehicle comes near any of these
_MAX_LOST = 10**12  # messages: more than a thousand a second for thirty years
_MAX_FRAMES = 100_000  # of one window, as `WindowSpec` allows: its newest stride is no longer


class _RefusedError(Exception):
    """Why a message that decodes is refused all the same; never leaves this module."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def decide(topic: str, payload: bytes, *, retained: bool = False) -> Item:
    """Decide about one message. `retained`: the broker had kept it, so it says nothing about now."""
    try:
        parsed = topics.parse(topic)
    except MessageError as error:
        return RefusedItem("topic", topic, str(error), payload)
    try:
        return _understand(parsed, topic, payload, retained=retained)
    except NewerMajorError:
        return ParkItem(parsed.vehicle_id, topic, payload)
    except MessageError as error:
        reason = "oversize" if len(payload) > messages.MAX_MESSAGE_BYTES else "malformed"
        return RefusedItem(reason, topic, str(error), payload)
    except _RefusedError as error:
        return RefusedItem(error.reason, topic, str(error), payload)


def ack_keys(items: Iterable[Item]) -> dict[tuple[str, str], list[int]]:
    """Group what a vehicle is to be told by (vehicle, stream): every event of the batch, duplicates too.

    Parked and refused messages are not among them: the vehicle keeps what this release did not take.
    """
    keys: dict[tuple[str, str], list[int]] = {}
    for item in items:
        if isinstance(item, EventItem):
            keys.setdefault((item.vehicle_id, item.envelope.streamid), []).append(item.envelope.seq)
    return keys


def _understand(parsed: Topic, topic: str, payload: bytes, *, retained: bool) -> Item:
    if parsed.kind in _CARRIES:
        envelope, data = messages.decode_event(payload, parsed.vehicle_id)
        _check_event(parsed, envelope, data)
        return EventItem(parsed.vehicle_id, topic, envelope, folded(data), payload)
    if parsed.kind == "status":
        if not payload:  # somebody removed the retained status: the vehicle's row stays as it is
            raise _RefusedError("empty_status", "an empty status says nothing")
        status = messages.decode_status(payload)
        _check_status(status)
        return StatusItem(parsed.vehicle_id, status, retained)
    if parsed.kind == "current":
        return _current(parsed, payload)
    raise _RefusedError("unexpected", f"the collector does not read {parsed.kind!r}")


def _current(parsed: Topic, payload: bytes) -> CurrentItem:
    if not payload:
        return CurrentItem(parsed.vehicle_id, parsed.leaf, None, payload)
    current = messages.decode_current(payload)
    if current.failure_type != parsed.leaf:
        raise _RefusedError("mismatch", f"failure type {current.failure_type!a} does not match its topic")
    _check_text(current.alert_id)
    return CurrentItem(parsed.vehicle_id, parsed.leaf, current, payload)


def _check_event(parsed: Topic, envelope: Event, data: EventData) -> None:
    if not isinstance(data, _CARRIES[parsed.kind]):
        raise _RefusedError("mismatch", f"an event of type {envelope.type!a} does not belong on a {parsed.kind} topic")
    if envelope.streamid == SERVER_STREAM:
        raise _RefusedError("reserved_stream", f"stream {SERVER_STREAM!r} is the server's own")
    _check_text(envelope.id, envelope.streamid, envelope.time, envelope.bootid, envelope.type)
    if isinstance(data, Alert):
        if data.failure_type != parsed.leaf:
            raise _RefusedError("mismatch", f"failure type {data.failure_type!a} does not match its topic")
        _check_text(data.alert_id, data.rule, data.model_name)
        _check_time(data.since)
        _check_count(data.model_release)
    elif isinstance(data, Loss):
        _check_text(data.stream_id, data.stream, data.reason)
        _check_count(data.count, _MAX_LOST)
    elif isinstance(data, DriftCounts):
        _check_drift(data)
    elif isinstance(data, Sample):
        _check_sample(data)


def _check_drift(told: DriftCounts) -> None:
    """Refuse counts that do not add up in themselves: added to the others they would shift them for good.

    Every feature and score is counted once a window, every signal once a frame of the newest stride: so each variable's
    counts add up to the windows, or to one common number of frames, which is that many whole strides.
    """
    _check_text(told.reference, *(variable.name for variable in told.variables))
    _check_moment(told.first_time)
    _check_moment(told.last_time)
    _check_count(told.model_release)
    _check_count(told.windows, MOST_WINDOWS)
    if not told.variables:
        raise _RefusedError("counts", "drift counts of no variable")
    seen: dict[str, int] = {}
    for variable in told.variables:
        if variable.stratum != told.variables[0].stratum:
            mixed = sorted({told.variables[0].stratum, variable.stratum})
            raise _RefusedError("counts", f"drift counts of {mixed[0]} and {mixed[1]} in one message")
        if variable.name in seen:
            raise _RefusedError("counts", f"drift counts of {variable.name[:80]!a} twice in one message")
        total = seen[variable.name] = sum(variable.counts)
        _check_count(total, told.windows * _MAX_FRAMES)
        if total != told.windows and (not told.windows or not total or total % told.windows):
            raise _RefusedError(
                "counts", f"counts of {variable.name[:80]!a} add up to {total}, which is no multiple of the "
                f"{told.windows} windows"
            )  # fmt: skip
    frames = sorted({total for total in seen.values() if total != told.windows})
    if len(frames) > 1:
        raise _RefusedError("counts", f"signals counted over {frames[0]} frames and over {frames[1]} in one message")


def _check_sample(told: Sample) -> None:
    _check_text(told.sample_id, told.state_id, told.alert_id, told.failure_type)
    _check_moment(told.end_time)
    _check_count(told.model_release)
    if told.part > told.parts:
        raise _RefusedError("malformed", f"part {told.part} of a sample of {told.parts}")
    if not told.payload:
        raise _RefusedError("malformed", f"part {told.part} of a sample is empty")


def _check_status(status: Status) -> None:
    for name in ("make", "source", "model_name", "model_sha256", "last_arrival"):
        text = getattr(status, name)
        if isinstance(text, str):
            if len(text) > 512:
                raise _RefusedError("malformed", f"status: {name} of {len(text)} characters; 512 are enough")
            _check_text(text)
    if status.model_release is not msgspec.UNSET:
        _check_count(status.model_release)


def _check_time(text: str) -> None:
    if len(text) > _MAX_TIME:
        raise _RefusedError("malformed", f"a time of {len(text)} characters; {_MAX_TIME} are enough")
    _check_text(text)


def _check_moment(text: str) -> None:
    _check_time(text)
    unix_s(text)


def _check_text(*texts: str) -> None:
    """Refuse control characters in what becomes a column, a log line or a page; PostgreSQL cannot even store NUL."""
    for text in texts:
        if not text.isprintable():
            raise _RefusedError("malformed", f"text with characters that cannot be shown: {text[:80]!a}")


def _check_count(number: int | None, most: int = _MAX_COUNT) -> None:
    if number is not None and not 0 <= number <= most:
        raise _RefusedError("malformed", f"number {str(number)[:40]} is outside 0 to {most}")
