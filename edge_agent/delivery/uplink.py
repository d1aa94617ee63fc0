"""What to send next, and what an ack releases. Pure: told the time and what happened, says what to do.

Promises, whatever the order of events: a message is released only by the collector's ack for it (a broker's PUBACK is
not delivery); it is sent again until then; live alerts go before backlog, alerts before drift before samples, and each
stream's backlog in order; no more than `window` messages lie between us and the broker and `outstanding` between us
and the collector, so that nobody's queue overflows in silence; a message the broker will not take is set aside, but
only on proof that it takes others, and one the collector never acknowledges only on its acks for later ones: a
collector that is away costs nothing, however long. Bytes, sockets and files are left to others.

    message:  waiting ──send──► sent ──puback──► taken ──ack──► (released)
                 ▲                │ link lost       │ no ack in time
                 └────────────────┴─────────────────┘
"""

import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from edge_agent.contract.messages import ranges as fold

Key = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Limits:
    """How hard the uplink may push, and how patient it is."""

    window: int = 16  # QoS 1 messages without PUBACK; the broker's Receive Maximum may lower it
    outstanding: int = 64  # messages without the collector's ack: far below a broker's default queue of 1,000
    live_reserve: int = 64  # further ones, for live alerts while the collector is away
    backlog_per_s: float = 20.0  # so that a fleet that comes back does not drown the live alerts of others
    ack_timeout_s: float = 20.0  # first resend; doubles each time
    ack_timeout_max_s: float = 600.0
    backoff_first_s: float = 1.0
    backoff_max_s: float = 60.0
    max_failures: int = 8  # then quarantine; each needs proof of its own that other messages get through


@dataclass(frozen=True, slots=True)
class Connect:
    """Open a connection now; answer with `connected` or `disconnected`."""


@dataclass(frozen=True, slots=True)
class Send:
    """Publish this message now; `replayed` marks what is no longer live."""

    stream: str
    seq: int
    replayed: bool


@dataclass(frozen=True, slots=True)
class Quarantine:
    """Set this message aside: it will not be offered again."""

    stream: str
    seq: int
    reason: str


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing to do before `until_s` (infinity: until something happens)."""

    until_s: float


Action = Connect | Send | Quarantine | Wait


@dataclass(slots=True)
class _Message:
    live: bool
    maybe_sent: bool
    phase: Literal["waiting", "sent", "taken"] = "waiting"
    sends: int = 0
    due_s: float = -math.inf  # waiting: not before; taken: sent again then
    suspicion: int = 0  # links lost while it lay in the window
    failures: int = 0  # of the broker to take it
    proof_seen: int = -1
    unacked: int = 0  # times that the collector passed over it
    first_sent: int = 0  # place of its first and of its latest sending among all sendings
    last_sent: int = 0


@dataclass(slots=True)
class Uplink:
    """The state of one vehicle's delivery. `random` gives [0, 1): jitter that keeps a fleet from marching in step."""

    stream_ids: Mapping[str, str]
    priority: tuple[str, ...]
    random: Callable[[], float]
    limits: Limits = field(default_factory=Limits)
    counters: Counter[str] = field(default_factory=Counter)
    _messages: dict[Key, _Message] = field(default_factory=dict)
    _newest: dict[str, int] = field(default_factory=dict)
    _live: list[tuple[int, int]] = field(default_factory=list)
    _backlog: list[tuple[int, int]] = field(default_factory=list)
    _timers: list[tuple[float, Key]] = field(default_factory=list)
    _suspects: list[Key] = field(default_factory=list)
    _condemned: list[tuple[Key, str]] = field(default_factory=list)
    _in_network: set[Key] = field(default_factory=set)
    _outstanding: set[Key] = field(default_factory=set)
    _link: Literal["down", "connecting", "up"] = "down"
    _retry_s: float = -math.inf
    _attempts: int = 0
    _window: int = 0
    _proofs: int = 0  # that the broker takes messages
    _sendings: int = 0
    _acked_sending: int = 0  # newest first sending among what the collector acknowledged: it got at least so far
    _tokens: float = 0.0
    _tokens_s: float = -math.inf

    @property
    def link(self) -> str:
        """State of the link: down, connecting or up."""
        return self._link

    @property
    def idle(self) -> bool:
        """True when the collector has acknowledged everything."""
        return not self._messages

    def renew(self, stream_ids: Mapping[str, str]) -> None:
        """Forget every message: the outbox began a new file with other streams."""
        self.stream_ids = dict(stream_ids)
        for collection in (self._messages, self._newest, self._live, self._backlog, self._timers, self._suspects,
                           self._condemned, self._in_network, self._outstanding):  # fmt: skip
            collection.clear()

    def restore(self, waiting: Mapping[str, Iterable[int]]) -> None:
        """Take up what an earlier run left; it may have been sent, so an ack for it is believed."""
        for stream, seqs in waiting.items():
            for seq in seqs:
                if (stream, seq) in self._messages:
                    continue
                self._add(stream, seq, _Message(live=False, maybe_sent=True))

    def appended(self, stream: str, seq: int) -> None:
        """Take up a new message; it is live when the link is up. Repeats are ignored."""
        if (stream, seq) not in self._messages:
            self._add(stream, seq, _Message(live=self._link == "up", maybe_sent=False))

    def gone(self, stream: str, seq: int) -> None:
        """Forget a message that the outbox no longer has; it did not go out, so it holds no place in the network."""
        self._in_network.discard((stream, seq))
        self._forget((stream, seq))

    def connected(self, now_s: float, receive_maximum: int = 65_535) -> None:
        """Note that the link is up and the ack topic is subscribed."""
        self._link = "up"
        self._window = max(1, min(self.limits.window, receive_maximum))
        self._tokens, self._tokens_s = float(self._window), now_s
        self.counters["connects"] += 1
        for key in self._outstanding:  # acks of the time without a link never came
            self._set_timer(key, now_s + self._ack_patience_s(1))

    def disconnected(self, now_s: float, *, by_broker: bool = False) -> None:
        """Note that the link is gone or was refused. `by_broker`: it closed on us, rather than falling silent."""
        if self._link == "up":
            self.counters["disconnects"] += 1
        self._link = "down"
        self._retry_s = now_s + self._backoff_s(self._attempts)
        self._attempts += 1
        in_network, alone = self._in_network, len(self._in_network) == 1
        self._in_network = set()
        for key in in_network:
            message = self._messages.get(key)
            if message is None:
                continue
            message.phase = "waiting"
            if by_broker:
                message.suspicion += 1
                if alone and message.suspicion > 2:
                    self._fail(key, message, "the broker closes the connection on it", now_s)
                    continue
            self._queue(key, message)
        for stream_rank, seq in self._live:  # no longer live
            key = (self.priority[stream_rank], seq)
            if key in self._messages:
                self._messages[key].live = False
                heapq.heappush(self._backlog, (stream_rank, seq))
        self._live.clear()

    def proven(self) -> None:
        """Note that the broker took some other message, such as a status: the link works."""
        self._proofs += 1
        self._attempts = 0

    def puback(self, stream: str, seq: int, now_s: float) -> None:
        """Note that the broker has it. That is not delivery: a broker that dies now loses it."""
        self._in_network.discard((stream, seq))
        self.proven()
        self.counters["pubacks"] += 1
        message = self._messages.get((stream, seq))
        if message is not None and message.phase == "sent":
            message.phase, message.suspicion = "taken", 0
            self._set_timer((stream, seq), now_s + self._ack_patience_s(message.sends))

    def refused(self, stream: str, seq: int, reason: str, now_s: float) -> None:
        """Note that the broker refused it with a reason code (MQTT 5, 3.4.2.1): it is tried again, later and rarely."""
        key = (stream, seq)
        self._in_network.discard(key)
        self.counters["refused"] += 1
        message = self._messages.get(key)
        if message is not None and message.phase == "sent":
            self._fail(key, message, f"the broker refuses it: {reason}", now_s)

    def condemn(self, stream: str, seq: int, reason: str) -> None:
        """Note that this message can never pass, being larger than the broker says it takes."""
        self._in_network.discard((stream, seq))
        if (stream, seq) in self._messages:
            self._condemned.append(((stream, seq), reason))

    def acked(self, stream_id: str, ranges: Iterable[tuple[int, int]], now_s: float) -> list[tuple[int, int]]:
        """Take the collector's ack; returns the ranges to release, all of messages that were really sent.

        An ack for another stream, or for a message that was never sent, is refused and counted; a repeated one is
        harmless.
        """
        stream = next((name for name, known in self.stream_ids.items() if known == stream_id), None)
        if stream is None:
            self.counters["acks_foreign"] += 1
            return []
        released: list[int] = []
        for first, last in ranges:
            if last > self._newest.get(stream, 0):
                self.counters["acks_future"] += 1
                continue
            found = self._of_stream(stream, first, last)
            early = [seq for seq in found if not self._messages[stream, seq].maybe_sent]
            self.counters["acks_future"] += bool(early)
            self.counters["acks_repeated"] += not found
            released.extend(set(found).difference(early))
        for seq in released:
            self._acked_sending = max(self._acked_sending, self._messages[stream, seq].first_sent)
            self._forget((stream, seq))
        if released:
            self.counters["acked"] += len(released)
            for key in self._outstanding:  # the collector is there: what it missed need not wait for ten minutes
                if self._messages[key].due_s > now_s + self.limits.ack_timeout_s:
                    self._set_timer(key, now_s + self._ack_patience_s(1))
        return list(fold(released))

    def next(self, now_s: float) -> Action:
        """Say what to do now. Each `Send` counts as done; call again until it says `Wait`."""
        if self._condemned:
            key, reason = self._condemned.pop()
            self._forget(key)
            self.counters["quarantined"] += 1
            return Quarantine(*key, reason)
        if self._link != "up":
            if self._link == "down" and now_s >= self._retry_s:
                self._link = "connecting"
                return Connect()
            return Wait(self._retry_s if self._link == "down" else math.inf)
        self._run_timers(now_s)
        if self._condemned:
            return self.next(now_s)
        return self._next_send(now_s)

    def _next_send(self, now_s: float) -> Action:
        wake_s = self._timers[0][0] if self._timers else math.inf
        free = len(self._in_network) < self._window
        limits = self.limits
        if free and self._peek(self._live) and len(self._outstanding) < limits.outstanding + limits.live_reserve:
            return self._send(self._pop(self._live))
        self._earn_tokens(now_s)
        if free and self._peek(self._backlog) and len(self._outstanding) < limits.outstanding:
            if self._tokens >= 1:
                self._tokens -= 1
                return self._send(self._pop(self._backlog))
            return Wait(min(wake_s, now_s + (1 - self._tokens) / limits.backlog_per_s))
        while self._suspects and not self._in_network and len(self._outstanding) < limits.outstanding:
            key = self._suspects.pop(0)
            if key in self._messages and self._messages[key].phase == "waiting":
                return self._send(key)
        return Wait(wake_s)

    def _send(self, key: Key) -> Send:
        message = self._messages[key]
        replayed = not message.live
        self.counters["resends"] += message.sends > 0
        message.phase, message.maybe_sent, message.live = "sent", True, False
        message.sends += 1
        self._sendings += 1
        message.first_sent, message.last_sent = message.first_sent or self._sendings, self._sendings
        message.due_s = math.inf
        self._in_network.add(key)
        self._outstanding.add(key)
        return Send(*key, replayed)

    def _run_timers(self, now_s: float) -> None:
        while self._timers and self._timers[0][0] <= now_s:
            due_s, key = heapq.heappop(self._timers)
            message = self._messages.get(key)
            if message is None or message.due_s != due_s:
                continue
            message.due_s = -math.inf
            if message.phase == "taken":  # no ack in time
                message.phase = "waiting"
                message.unacked += self._acked_sending > message.last_sent  # else nobody may be there to acknowledge
                if message.unacked >= self.limits.max_failures:
                    self._condemned.append((key, "the collector never acknowledges it, but later ones"))
                    continue
            self._queue(key, message)

    def _fail(self, key: Key, message: _Message, reason: str, now_s: float) -> None:
        message.phase = "waiting"
        self._outstanding.discard(key)
        if self._count_failure(key, message, reason):
            self._set_timer(key, now_s + self._backoff_s(message.failures))

    def _count_failure(self, key: Key, message: _Message, reason: str) -> bool:
        """Count a failure that proof stands against; False when it was one too many."""
        if message.proof_seen == -1 or self._proofs > message.proof_seen:
            message.failures += 1
            message.proof_seen = self._proofs
        if message.failures >= self.limits.max_failures:
            self._condemned.append((key, reason))
            return False
        return True

    def _queue(self, key: Key, message: _Message) -> None:
        self._outstanding.discard(key)
        message.live, message.due_s = False, -math.inf
        if message.suspicion >= 2:
            self._suspects.append(key)  # goes alone, after all others
        else:
            heapq.heappush(self._backlog, (self.priority.index(key[0]), key[1]))

    def _add(self, stream: str, seq: int, message: _Message) -> None:
        self._messages[stream, seq] = message
        self._newest[stream] = max(seq, self._newest.get(stream, 0))
        heapq.heappush(self._live if message.live else self._backlog, (self.priority.index(stream), seq))

    def _forget(self, key: Key) -> None:
        self._messages.pop(key, None)
        self._outstanding.discard(key)

    def _peek(self, heap: list[tuple[int, int]]) -> bool:
        """Drop from the top what was released meanwhile or lies on its way; True where something is left."""
        while heap:
            message = self._messages.get((self.priority[heap[0][0]], heap[0][1]))
            if message is not None and message.phase == "waiting" and message.due_s == -math.inf:
                return True
            heapq.heappop(heap)
        return False

    def _pop(self, heap: list[tuple[int, int]]) -> Key:
        rank, seq = heapq.heappop(heap)
        return self.priority[rank], seq

    def _of_stream(self, stream: str, first: int, last: int) -> list[int]:
        if last - first < len(self._messages):
            return [seq for seq in range(first, last + 1) if (stream, seq) in self._messages]
        return [seq for name, seq in self._messages if name == stream and first <= seq <= last]

    def _set_timer(self, key: Key, due_s: float) -> None:
        message = self._messages[key]
        if message.phase == "sent":
            return
        message.due_s = due_s
        heapq.heappush(self._timers, (due_s, key))

    def _earn_tokens(self, now_s: float) -> None:
        earned = max(0.0, now_s - self._tokens_s) * self.limits.backlog_per_s
        self._tokens, self._tokens_s = min(float(self._window), self._tokens + earned), now_s

    def _ack_patience_s(self, sends: int) -> float:
        patience = self.limits.ack_timeout_s * 2.0 ** min(sends - 1, 16)
        return float(min(patience, self.limits.ack_timeout_max_s) * (1.0 + 0.25 * self.random()))

    def _backoff_s(self, attempts: int) -> float:
        """Exponential with equal jitter: half of it fixed, half drawn, so that a fleet's return is spread."""
        full = min(self.limits.backoff_max_s, self.limits.backoff_first_s * 2.0 ** min(attempts, 16))
        return float(full * (0.5 + 0.5 * self.random()))
