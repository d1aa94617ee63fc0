"""Which raw windows travel to training: those around alerts, and a small random share, within a byte budget.

Promises: pure, and the same windows give the same samples wherever they run; a window is sent at most once; an alert's
own window comes first, then those before it (nearest first), then those after it; no two of the before and after
overlap; random ones use at most half of the budget, so that an alert always finds some. What the budget refuses is
counted. Leaves packing to `contract.samples` and messages to `reports`.

The random share is chosen by a hash of the vehicle and the window, not by a generator: nothing to persist, and a replay
chooses what the vehicle chose.
"""

import hashlib
from collections import Counter, deque
from dataclasses import dataclass
from typing import Literal

import msgspec

from edge_agent.contract import samples
from edge_agent.contract.messages import MAX_MESSAGE_BYTES, Stratum
from edge_agent.contract.samples import MAX_PARTS, MAX_UNPACKED_BYTES, SampleWindow
from edge_agent.contract.signals import SEVERITIES
from edge_agent.pipeline.alerts import alert_id
from edge_agent.pipeline.inference import State
from edge_agent.pipeline.outcomes import AlertChange, Sampled, Window

DAY_S = 86_400.0
MAX_BEFORE_S = 3_600.0  # older windows, from before a long halt, say nothing about this alert
ENVELOPE_BYTES = 1_000  # of an event around its payload: 850 measured with ids of usual length
PART_BYTES = (MAX_MESSAGE_BYTES - 4_096) * 3 // 4  # of packed bytes; base64 and the longest ids still fit a message
RANDOM_SHARE_OF_BUDGET = 0.5


@dataclass(frozen=True, slots=True)
class SamplingLimits:
    """How much may be sent.

    bytes_a_day     of messages, on average; a burst may use one day's worth at once
    random_share    of all scored windows
    windows_before  an alert, not overlapping each other or its own
    windows_after   likewise
    """

    bytes_a_day: int = 131_072  # an alert is 4 windows of 10 to 19 kB as messages: room for one that escalates
    random_share: float = 0.005  # a drive of 1.5 h is 82 windows: two samples in five days, some 7 kB a day
    windows_before: int = 2
    windows_after: int = 1


class BudgetState(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens are bytes."""

    tokens: float
    random_tokens: float
    at_s: float | None


class HeldWindow(msgspec.Struct, frozen=True, kw_only=True):
    """A recent window, packed."""

    key: str
    end_s: float
    elapsed_s: float
    coverage: float
    stratum: Stratum
    state_id: str
    model_release: int | None
    sent: bool
    packed: bytes


class AfterState(msgspec.Struct, frozen=True, kw_only=True):
    """An alert whose windows after it are still to come: the next one from `next_s` on, none beyond `until_s`."""

    alert_id: str
    failure_type: str
    left: int
    next_s: float
    until_s: float


class GuardState(msgspec.Struct, frozen=True, kw_only=True):
    """A guard's alert whose own window has not ended yet."""

    alert_id: str
    failure_type: str
    severity: int
    time_s: float


class SamplerState(msgspec.Struct, frozen=True, kw_only=True):
    """What `Sampler` keeps between two windows."""

    budget: BudgetState
    recent: tuple[HeldWindow, ...]
    after: AfterState | None
    guard: GuardState | None


def message_bytes(packed_bytes: int) -> int:
    """Return about how many bytes of messages so many packed bytes make: base64, and an envelope a part."""
    return -(-packed_bytes // 3) * 4 + ENVELOPE_BYTES * max(1, -(-packed_bytes // PART_BYTES))


class Budget:
    """Two token buckets over the source's time: one for all, and inside it one for the random share."""

    def __init__(self, bytes_a_day: int) -> None:
        self._size = float(bytes_a_day)
        self._tokens = self._size
        self._random_tokens = self._size * RANDOM_SHARE_OF_BUDGET
        self._at_s: float | None = None

    def spend(self, now_s: float, cost: int, reason: Literal["alert", "random"]) -> bool:
        """Take `cost` bytes where they are there; time that runs backwards brings nothing."""
        earned = 0.0 if self._at_s is None else max(0.0, now_s - self._at_s) * self._size / DAY_S
        self._at_s = now_s
        self._tokens = min(self._size, self._tokens + earned)
        share = RANDOM_SHARE_OF_BUDGET
        self._random_tokens = min(self._size * share, self._random_tokens + earned * share)
        if cost > self._tokens or (reason == "random" and cost > self._random_tokens):
            return False
        self._tokens -= cost
        if reason == "random":
            self._random_tokens -= cost
        return True

    def state(self) -> BudgetState:
        """Return what has to be kept."""
        return BudgetState(tokens=self._tokens, random_tokens=self._random_tokens, at_s=self._at_s)

    def restore(self, state: BudgetState, shift_s: float = 0.0) -> None:
        """Go on from `state`, whose size may have been another."""
        self._tokens = min(self._size, max(0.0, state.tokens))
        self._random_tokens = min(self._size * RANDOM_SHARE_OF_BUDGET, max(0.0, state.random_tokens))
        self._at_s = None if state.at_s is None else state.at_s + shift_s


@dataclass(slots=True)
class _Candidate:
    """A window that may become a sample; packed when it is first needed."""

    key: str
    end_s: float
    elapsed_s: float
    coverage: float
    stratum: Stratum
    state_id: str
    model_release: int | None
    window: SampleWindow | None
    packed: bytes = b""
    sent: bool = False

    def pack(self) -> bytes:
        """Return the packed window; empty where it is larger than a receiver would unpack."""
        if self.window is not None:
            self.packed = samples.pack(self.window) if _raw_bytes(self.window) <= MAX_UNPACKED_BYTES // 2 else b""
            self.window = None
        return self.packed


class Sampler:
    """Chooses among one vehicle's windows.

    signals              names of the columns of a window's values
    length_s             of a window
    timeline             part of a window's key: "" where times are Unix seconds, else the boot id
    state_id, release    of the bundle in use; "" and None without one
    """

    def __init__(
        self,
        limits: SamplingLimits,
        *,
        vehicle_id: str,
        signals: tuple[str, ...],
        length_s: float,
        timeline: str = "",
        state_id: str = "",
        release: int | None = None,
    ) -> None:
        self.counters: Counter[str] = Counter()
        self._limits = limits
        self._vehicle_id = vehicle_id
        self._signals = signals
        self._length_s = length_s
        self._timeline = timeline
        self._state_id, self._release = state_id, release
        self._budget = Budget(limits.bytes_a_day)
        # one more than asked for: the newest may overlap the alert's own window
        self._recent: deque[_Candidate] = deque(maxlen=limits.windows_before + 1 if limits.windows_before else 0)
        self._after: AfterState | None = None
        self._guard: GuardState | None = None

    def alert(self, change: AlertChange) -> None:
        """Note a guard's alert: the next window that holds its time is a sample, named by the most severe of them."""
        if change.transition == "cleared":
            return
        if self._guard is None or SEVERITIES.index(change.severity) > self._guard.severity:
            self._guard = GuardState(
                alert_id=alert_id(change, self._vehicle_id), failure_type=change.failure_type,
                severity=SEVERITIES.index(change.severity), time_s=change.time_s,
            )  # fmt: skip

    def take(
        self,
        window: Window,
        state: State,
        stratum: Stratum,
        changes: list[AlertChange],
        *,
        scored: bool = True,
    ) -> list[Sampled]:
        """Take one window with the model's state before it and the alerts it led to; return what is to be sent.

        Only a `scored` window may be one of the random share.
        """
        if not self._limits.bytes_a_day:
            return []
        if self._recent and window.end_s <= self._recent[-1].end_s:  # time was set back: nothing here lies before now
            self._recent.clear()
        candidate = _Candidate(
            f"{self._timeline}/{round(window.end_s * 1000)}", window.end_s, window.elapsed_s, window.coverage, stratum,
            self._state_id, self._release,
            SampleWindow(self._signals, window.values, window.cell_voltage, window.cell_temperature, state),
        )  # fmt: skip
        chosen = self._around(candidate, changes)
        if chosen is None:
            chosen = self._following(candidate)
        if chosen is None and scored and self._random(candidate.key):
            chosen = [self._choose(candidate, window.end_s, "random")]
        last = self._recent[-1] if self._recent else None
        if self._recent.maxlen and (last is None or window.end_s >= last.end_s + self._length_s):
            self._recent.append(candidate)
        return [sample for sample in chosen or [] if sample is not None]

    def _around(self, candidate: _Candidate, changes: list[AlertChange]) -> list[Sampled | None] | None:
        """Return the samples at and before an alert; None where this window has none."""
        alerts = [
            (SEVERITIES.index(c.severity), alert_id(c, self._vehicle_id), c.failure_type)
            for c in changes
            if c.transition != "cleared"
        ]
        guard = self._guard
        if guard is not None and guard.time_s <= candidate.end_s:
            self._guard = None
            if guard.time_s > candidate.end_s - self._length_s:
                alerts.append((guard.severity, guard.alert_id, guard.failure_type))
            else:
                self.counters["samples_without_window"] += 1  # a gap began before its window ended
        if not alerts:
            return None
        _, identity, failure_type = max(alerts, key=lambda alert: alert[0])
        end_s = candidate.end_s
        chosen = [self._choose(candidate, end_s, "alert", identity, failure_type)]
        nearest_s = end_s - self._length_s
        before = [held for held in self._recent if end_s - MAX_BEFORE_S <= held.end_s <= nearest_s]
        chosen += [
            self._choose(held, end_s, "alert", identity, failure_type)
            for held in before[::-1][: self._limits.windows_before]
            if not held.sent
        ]
        self._after = None
        if self._limits.windows_after:
            self._after = AfterState(
                alert_id=identity, failure_type=failure_type, left=self._limits.windows_after,
                next_s=end_s + self._length_s, until_s=end_s + MAX_BEFORE_S,
            )  # fmt: skip
        return chosen

    def _following(self, candidate: _Candidate) -> list[Sampled | None] | None:
        """Return the sample after an alert that this window is; None where it is none."""
        after = self._after
        if after is None or candidate.end_s < after.next_s:
            return None
        if candidate.end_s > after.until_s:
            self._after = None
            return None
        self._after = None if after.left <= 1 else msgspec.structs.replace(
            after, left=after.left - 1, next_s=candidate.end_s + self._length_s
        )  # fmt: skip
        return [self._choose(candidate, candidate.end_s, "alert", after.alert_id, after.failure_type)]

    def _random(self, key: str) -> bool:
        digest = hashlib.sha256(f"{self._vehicle_id}|{key}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < self._limits.random_share * 2**64

    def _choose(
        self,
        candidate: _Candidate,
        now_s: float,
        reason: Literal["alert", "random"],
        identity: str = "",
        failure_type: str = "",
    ) -> Sampled | None:
        packed = candidate.pack()
        if not packed or len(packed) > MAX_PARTS * PART_BYTES:
            self.counters["samples_too_large"] += 1
            return None
        cost = message_bytes(len(packed))
        if not self._budget.spend(now_s, cost, reason):
            self.counters[f"samples_over_budget.{reason}"] += 1
            return None
        candidate.sent = True
        self.counters[f"samples.{reason}"] += 1
        self.counters["sample_bytes"] += cost
        return Sampled(
            candidate.key, candidate.end_s, candidate.elapsed_s, candidate.coverage, candidate.stratum, reason, packed,
            candidate.state_id, candidate.model_release, identity, failure_type,
        )  # fmt: skip

    def state(self) -> SamplerState:
        """Return what has to be kept so that another sampler goes on exactly here: some 10 kB a held window."""
        return SamplerState(
            budget=self._budget.state(),
            recent=tuple(
                HeldWindow(
                    key=c.key, end_s=c.end_s, elapsed_s=c.elapsed_s, coverage=c.coverage, stratum=c.stratum,
                    state_id=c.state_id, model_release=c.model_release, sent=c.sent, packed=c.pack(),
                )
                for c in self._recent
            ),
            after=self._after,
            guard=self._guard,
        )  # fmt: skip

    def restore(self, state: SamplerState, shift_s: float = 0.0) -> None:
        """Go on from `state`, its times moved by `shift_s`; under smaller limits the oldest windows are left."""
        self._budget.restore(state.budget, shift_s)
        self._recent.clear()
        for h in state.recent:
            self._recent.append(
                _Candidate(
                    h.key, h.end_s + shift_s, h.elapsed_s, h.coverage, h.stratum, h.state_id, h.model_release,
                    None, h.packed, h.sent,
                )
            )  # fmt: skip
        replace = msgspec.structs.replace
        after, guard = state.after, state.guard
        if after is not None:
            after = replace(after, next_s=after.next_s + shift_s, until_s=after.until_s + shift_s)
        self._after = after
        self._guard = None if guard is None else replace(guard, time_s=guard.time_s + shift_s)


def _raw_bytes(window: SampleWindow) -> int:
    """Return about how large the window is unpacked: two bytes a value, four a number of the state."""
    values = window.values.size + window.cell_voltage.size + window.cell_temperature.size
    return 2 * int(values) + 4 * sum(int(tensor.size) for tensor in window.state.values())
