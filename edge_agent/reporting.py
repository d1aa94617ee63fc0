"""From outcomes to the outbox: alerts first, then drift counts, then samples.

Promises: an outcome that `store` took is on the disk, or waits here and is tried again; what had to be given up because
the disk refuses for too long is counted, never silent; storing the same outcome twice is one message. What an outcome
says is left to `pipeline.reports`, sending to the link.
"""

import logging
import time
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import replace
from typing import Protocol

from edge_agent.contract import messages, topics
from edge_agent.contract.messages import Alert, Current, Event
from edge_agent.contract.signals import SEVERITIES
from edge_agent.delivery.mqtt import Link
from edge_agent.delivery.outbox import STREAMS, Outbox, OutboxError
from edge_agent.logs import event
from edge_agent.pipeline.bundle_dir import LoadedBundle
from edge_agent.pipeline.outcomes import AlertChange, Counted, Outcome, Sampled
from edge_agent.pipeline.reports import STREAM_OF, Report, reports

RETRY_S = 5.0  # what the disk refused is tried again
# kept in memory while the disk refuses, by stream; beyond it the oldest are given up and counted
KEPT = {"alert": 1000, "drift": 500, "sample": 20}
WORDS = {"alert": "alerts", "drift": "drift counts", "sample": "samples"}

log = logging.getLogger("voltwatch.agent")
Told = AlertChange | Counted | Sampled


class Envelope(Protocol):
    """Puts a report into its event, under the number that the outbox gives."""

    def __call__(self, report: Report, stream_id: str, seq: int) -> Event:
        """Return the event."""


def append(outbox: Outbox, report: Report, envelope: Envelope, retained: dict[str, bytes] | None = None) -> int:
    """Append one report and return its number; a repeated one has its own. Raises `OutboxError` as the outbox does."""

    def build(stream_id: str, seq: int) -> bytes:
        return messages.encode(envelope(report, stream_id, seq))

    return outbox.append(report.stream, report.event_id, build, report.topic, retained=retained)


class Reporter:
    """Owns what is said of one vehicle, and what is retained of its standing alerts (`active`).

    `envelope` is asked at the moment of storing, so that the clock's trust is that of this moment.
    """

    def __init__(
        self, outbox: Outbox, link: Link, envelope: Envelope, *, vehicle_id: str, bundle: LoadedBundle | None
    ) -> None:
        self.counters: Counter[str] = Counter()
        self.active: dict[str, Current] = {}
        self.problem = ""
        self._outbox = outbox
        self._link = link
        self._envelope = envelope
        self._vehicle_id = vehicle_id
        self._bundle = bundle
        self._waiting: dict[str, deque[Told]] = {stream: deque() for stream in STREAMS}
        self._retry_at_s = 0.0

    def use(self, bundle: LoadedBundle | None) -> None:
        """Say from now on that it is this bundle that decides."""
        self._bundle = bundle

    def store(self, outcomes: Iterable[Outcome], offset_s: float) -> bool:
        """Store what is said; `offset_s` makes wall time of the source's. True when the state should be saved now.

        It should after an alert or counts: else a crash would forget that they were said.
        """
        told = [outcome for outcome in outcomes if isinstance(outcome, Told)]
        for outcome in sorted(told, key=lambda o: STREAMS.index(STREAM_OF[type(o)])):
            stream = STREAM_OF[type(outcome)]
            # behind what waits: an alert's end must not overtake its beginning
            if self._waiting[stream] or not self._told(stream, outcome, offset_s):
                self._keep(stream, outcome)
        return any(isinstance(outcome, AlertChange | Counted) for outcome in told)

    def retry(self, offset_s: float, *, now: bool = False) -> bool:
        """Try again what was refused, when its time has come; True where something was tried."""
        if not any(self._waiting.values()) or not (now or time.monotonic() >= self._retry_at_s):
            return False
        self.problem = ""
        for stream in STREAMS:
            waiting = self._waiting[stream]
            while waiting and self._told(stream, waiting[0], offset_s):
                waiting.popleft()
        return True

    @property
    def unstored_counts(self) -> tuple[Counted, ...]:
        """Counts that no outbox holds yet: they are kept with the saved state."""
        return tuple(outcome for outcome in self._waiting["drift"] if isinstance(outcome, Counted))

    def restore_counts(self, counts: Iterable[Counted], shift_s: float) -> None:
        """Take up again what `unstored_counts` gave, its times moved by `shift_s`."""
        for counted in counts:
            moved = replace(counted, first_s=counted.first_s + shift_s, last_s=counted.last_s + shift_s)
            self._waiting["drift"].append(moved)

    def _told(self, stream: str, outcome: Told, offset_s: float) -> bool:
        """Put an outcome on the disk; False, said, where the disk refuses. What can never be a message is counted."""
        try:
            if isinstance(outcome, AlertChange):
                self._alert(outcome, offset_s)
            else:
                for report in reports(outcome, vehicle_id=self._vehicle_id, bundle=self._bundle, offset_s=offset_s):
                    self._append(report)
        except OutboxError as error:
            self.counters[f"{stream}_not_stored"] += 1
            self._retry_at_s = time.monotonic() + RETRY_S
            problem = f"{WORDS[stream]} cannot be stored: {error}"
            if not self.problem:
                self.problem = problem
            event(log, "problem", level=logging.ERROR, what=problem)
            return False
        except ValueError as error:  # too large, or a number that is not finite: no later try would end otherwise
            self.counters[f"{stream}_refused"] += 1
            event(log, "problem", level=logging.ERROR, what=f"{WORDS[stream]} that are no message: {error}")
        return True

    def _keep(self, stream: str, outcome: Told) -> None:
        waiting = self._waiting[stream]
        if len(waiting) >= KEPT[stream]:
            shed = waiting.popleft()
            self.counters[f"{stream}_given_up"] += 1
            if isinstance(shed, Counted):
                self.counters["drift_windows_given_up"] += shed.windows
        waiting.append(outcome)

    def _append(self, report: Report, retained: dict[str, bytes] | None = None) -> int:
        seq = append(self._outbox, report, self._envelope, retained)
        self._link.appended(report.stream, seq)
        return seq

    def _alert(self, change: AlertChange, offset_s: float) -> None:
        (report,) = reports(change, vehicle_id=self._vehicle_id, bundle=self._bundle, offset_s=offset_s)
        alert = report.data
        if not isinstance(alert, Alert):  # pragma: no cover  # a change of an alert is an alert
            raise TypeError(type(alert))
        active = dict(self.active)
        key = f"{change.failure_type}|{change.origin}"
        if change.transition == "cleared":
            active.pop(key, None)
        else:
            active[key] = Current(
                alert_id=alert.alert_id, failure_type=change.failure_type, severity=change.severity,
                since=alert.since, time=report.time,
            )  # fmt: skip
        current = retained_current(active, change.failure_type)
        topic = topics.current(self._vehicle_id, change.failure_type)
        seq = self._append(report, {topic: current})
        self.active = active
        self._link.publish_retained(topic, current)
        event(
            log, "alert", level=logging.WARNING, vehicle=self._vehicle_id, transition=change.transition,
            type=change.failure_type, severity=change.severity, origin=change.origin, rule=change.rule or None,
            probability=alert.type_probability, since=alert.since, release=alert.model_release, seq=seq,
            id=alert.alert_id, evidence="; ".join(_evidence(e) for e in alert.evidence) or None,
        )  # fmt: skip


def retained_current(active: dict[str, Current], failure_type: str) -> bytes:
    """Return what `current/{failure_type}` should say: the most severe of what is active, or nothing."""
    of_type = [current for key, current in active.items() if key.partition("|")[0] == failure_type]
    if not of_type:
        return b""
    return messages.encode(max(of_type, key=lambda current: SEVERITIES.index(current.severity)))


def _evidence(evidence: messages.Evidence) -> str:
    value = "?" if evidence.value is None else f"{evidence.value:.4g}{evidence.unit}"
    return f"{evidence.name}={value}" + (f" (z {evidence.deviation:+.1f})" if evidence.deviation is not None else "")
