"""The uplink's decisions, stepped with a virtual clock: a day's outage takes milliseconds."""

import random
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from edge_agent.delivery.uplink import Connect, Limits, Quarantine, Send, Uplink, Wait

IDS = {"alert": "A", "drift": "D", "sample": "S"}
PRIORITY = ("alert", "drift", "sample")


def uplink(limits: Limits | None = None, connected_at: float | None = 0.0) -> Uplink:
    made = Uplink(IDS, PRIORITY, lambda: 0.0, limits or Limits())
    if connected_at is not None:
        assert made.next(connected_at) == Connect()
        made.connected(connected_at)
    return made


def sends(tested: Uplink, now_s: float) -> list[Send]:
    found: list[Send] = []
    while isinstance(action := tested.next(now_s), Send):
        found.append(action)
    return found


def test_a_puback_is_not_delivery() -> None:
    tested = uplink()
    tested.appended("alert", 1)
    assert sends(tested, 0) == [Send("alert", 1, replayed=False)]
    tested.puback("alert", 1, 0.1)
    assert not tested.idle
    assert sends(tested, 19.0) == []
    assert sends(tested, 21.0) == [Send("alert", 1, replayed=True)]
    assert tested.acked("A", [(1, 1)], 22.0) == [(1, 1)]
    assert tested.idle


def test_what_lay_in_the_window_when_the_link_went_is_sent_again() -> None:
    tested = uplink()
    tested.appended("alert", 1)
    sends(tested, 0)
    tested.disconnected(1.0)
    assert tested.next(2.5) == Connect()
    tested.connected(2.6)
    assert sends(tested, 2.6) == [Send("alert", 1, replayed=True)]


def test_live_alerts_go_before_backlog_and_alerts_before_drift_before_samples() -> None:
    tested = uplink(connected_at=None)
    for stream in ("sample", "drift", "alert"):
        for seq in (1, 2):
            tested.appended(stream, seq)
    tested.next(0)
    tested.connected(0)
    tested.appended("sample", 3)
    tested.appended("alert", 3)
    assert sends(tested, 0) == [
        Send("alert", 3, False), Send("sample", 3, False),
        Send("alert", 1, True), Send("alert", 2, True), Send("drift", 1, True), Send("drift", 2, True),
        Send("sample", 1, True), Send("sample", 2, True),
    ]  # fmt: skip


def test_backlog_is_limited_in_rate_and_a_live_alert_does_not_wait_for_it() -> None:
    limits = Limits(window=4, backlog_per_s=2.0)
    tested = uplink(limits, connected_at=None)
    tested.restore({"alert": range(1, 101)})
    tested.next(0)
    tested.connected(0)
    assert len(sends(tested, 0)) == 4
    for seq in range(1, 5):
        tested.puback("alert", seq, 0.01)
    assert isinstance(wait := tested.next(0.02), Wait)
    assert wait.until_s < 1.0
    tested.appended("alert", 101)
    assert sends(tested, 0.03) == [Send("alert", 101, False)]
    assert len(sends(tested, 1.0)) == 2


def test_the_window_and_the_outstanding_bound_hold() -> None:
    limits = Limits(window=3, outstanding=5, live_reserve=2, backlog_per_s=1e9)
    tested = uplink(limits, connected_at=None)
    tested.restore({"alert": range(1, 50)})
    tested.next(0)
    tested.connected(0, receive_maximum=2)
    taken = 0
    for step in range(20):
        for action in sends(tested, step * 0.01):
            tested.puback(action.stream, action.seq, step * 0.01)
            taken += 1
    assert taken == 5
    for seq in range(50, 60):
        tested.appended("alert", seq)
    live = []
    for step in range(20):
        for action in sends(tested, 1 + step * 0.01):
            live.append(action.seq)
            tested.puback(action.stream, action.seq, 1 + step * 0.01)
    assert live == [50, 51]


def test_messages_that_the_outbox_shed_meanwhile_take_no_place_from_those_behind_them() -> None:
    tested = uplink(Limits(window=4), connected_at=None)
    tested.restore({"sample": range(1, 41)})
    tested.next(0)
    tested.connected(0)
    went: list[int] = []
    for now_s in range(15):
        for send in sends(tested, float(now_s)):
            if send.seq <= 30:
                tested.gone("sample", send.seq)
            else:
                tested.puback("sample", send.seq, float(now_s))
                went.append(send.seq)
    assert went == list(range(31, 41))


def test_a_day_without_a_broker_keeps_every_message_in_order() -> None:
    tested = Uplink(IDS, PRIORITY, random.Random(1).random, Limits(backlog_per_s=1000))
    now, tries = 0.0, 0
    for minute in range(24 * 60):
        tested.appended("alert", minute + 1)
        while now < minute * 60:
            action = tested.next(now)
            if isinstance(action, Connect):
                tries += 1
                tested.disconnected(now)
            assert not isinstance(action, Send)
            now = min(max(now + 0.01, action.until_s if isinstance(action, Wait) else now), minute * 60.0)
    assert 24 * 60 <= tries <= 24 * 60 * 2.1  # once or twice a minute: the back-off's cap of 60 s with half of it drawn
    now += 60
    assert tested.next(now) == Connect()
    tested.connected(now)
    order = []
    while not tested.idle:
        for action in sends(tested, now):
            order.append(action.seq)
            tested.puback("alert", action.seq, now)
            tested.acked("A", [(action.seq, action.seq)], now)
        now += 0.01
    assert order == list(range(1, 24 * 60 + 1))


def test_a_fleet_that_comes_back_is_spread_over_time() -> None:
    times = []
    for vehicle in range(500):
        tested = Uplink(IDS, PRIORITY, random.Random(vehicle).random, Limits())
        for _ in range(6):
            tested.disconnected(0.0)
        action = tested.next(0.0)
        assert isinstance(action, Wait)
        times.append(action.until_s)
    assert min(times) >= 16.0
    assert max(times) <= 32.0
    tenths = [sum(lo <= t < lo + 1.6 for t in times) for lo in [16 + 1.6 * i for i in range(10)]]
    assert max(tenths) < 100


@pytest.mark.parametrize(
    ("stream_id", "ranges", "counter"),
    [
        ("A", [(3, 3)], "acks_future"),
        ("A", [(1, 2**40)], "acks_future"),
        ("A", [(2, 2)], "acks_future"),
        ("somebody", [(1, 1)], "acks_foreign"),
        ("D", [(1, 1)], "acks_future"),
    ],
)
def test_an_ack_for_what_was_never_sent_releases_nothing_and_is_counted(
    stream_id: str, ranges: list[tuple[int, int]], counter: str
) -> None:
    tested = uplink(Limits(window=1))
    tested.appended("alert", 1)
    tested.appended("alert", 2)
    assert sends(tested, 0) == [Send("alert", 1, False)]
    assert tested.acked(stream_id, ranges, 0.5) == []
    assert tested.counters[counter] == 1


def test_a_replayed_ack_is_harmless() -> None:
    tested = uplink()
    tested.appended("alert", 1)
    sends(tested, 0)
    assert tested.acked("A", [(1, 1)], 0.5) == [(1, 1)]
    assert tested.acked("A", [(1, 1)], 0.6) == []
    assert tested.counters["acks_repeated"] == 1


def test_an_ack_from_before_the_restart_is_believed() -> None:
    tested = uplink()
    tested.restore({"alert": [4, 5]})
    assert tested.acked("A", [(5, 5)], 0.5) == [(5, 5)]


def test_poison_is_set_aside_only_on_proof_that_others_pass() -> None:
    tested = uplink(Limits(backlog_per_s=1e9, max_failures=3))
    tested.appended("alert", 1)
    now = 0.0

    def refuse_poison() -> None:
        for action in sends(tested, now):
            if action.seq == 1:
                tested.refused("alert", 1, "Payload format invalid", now)
            else:
                tested.puback("alert", action.seq, now)
                tested.acked("A", [(action.seq, action.seq)], now)

    for _ in range(50):
        refuse_poison()
        now += 100.0
    assert not tested.idle  # fifty refusals, but nothing else ever passed: the broker may be at fault
    for seq in range(2, 10):
        tested.appended("alert", seq)
        action = tested.next(now)
        while isinstance(action, Send):
            if action.seq == 1:
                tested.refused("alert", 1, "Payload format invalid", now)
            else:
                tested.puback("alert", action.seq, now)
            action = tested.next(now)
        if isinstance(action, Quarantine):
            assert (action.stream, action.seq) == ("alert", 1)
            assert "Payload format invalid" in action.reason
            return
        now += 100.0
    pytest.fail("never set aside")


def test_poison_that_kills_the_connection_goes_alone_and_the_rest_flows() -> None:
    tested = uplink(Limits(backlog_per_s=1e9, max_failures=3))
    for seq in range(1, 21):
        tested.appended("alert", seq)
    now, delivered, set_aside = 0.0, set(), []
    for _ in range(200):
        action = tested.next(now)
        if isinstance(action, Connect):
            tested.connected(now)
            tested.proven()  # the status passes
        elif isinstance(action, Quarantine):
            set_aside.append(action.seq)
        elif isinstance(action, Send):
            if action.seq == 7:
                tested.disconnected(now, by_broker=True)
            else:
                tested.puback("alert", action.seq, now)
                tested.acked("A", [(action.seq, action.seq)], now)
                delivered.add(action.seq)
        else:
            now = min(action.until_s, now + 60)
        if tested.idle:
            break
    assert set_aside == [7]
    assert delivered == set(range(1, 21)) - {7}


def drive(tested: Uplink, now_s: float, until_s: float, acks: Callable[[Send], bool]) -> tuple[float, list[Quarantine]]:
    """Run against a broker that takes everything, a status too, and a collector that acks what `acks` says."""
    set_aside, status_s = [], now_s
    while now_s < until_s:
        if now_s >= status_s:
            tested.proven()
            status_s += 30.0
        action = tested.next(now_s)
        if isinstance(action, Quarantine):
            set_aside.append(action)
        elif isinstance(action, Send):
            tested.puback(action.stream, action.seq, now_s + 0.01)
            if acks(action):
                tested.acked(IDS[action.stream], [(action.seq, action.seq)], now_s + 0.02)
        else:
            assert isinstance(action, Wait)
            now_s = max(now_s + 0.01, min(action.until_s, status_s, until_s))
    return now_s, set_aside


def test_a_collector_that_is_away_for_a_day_while_the_broker_takes_everything_costs_nothing() -> None:
    tested = uplink()
    now, set_aside = 0.0, []
    for hour in range(24):
        for seq in range(10 * hour + 1, 10 * hour + 11):
            tested.appended("alert", seq)
            tested.appended("sample", seq)
        now, lost = drive(tested, now, 3600.0 * (hour + 1), lambda _: False)
        set_aside += lost
    assert set_aside == []
    assert len(tested._messages) == 480
    assert tested.counters["resends"] < 128 * 24 * 7  # the back-off: each of those under way at most every ten minutes
    now, set_aside = drive(tested, now, now + 900.0, lambda _: True)
    assert set_aside == []
    assert tested.idle
    assert tested.counters["acked"] == 480


def test_an_ack_for_what_was_sent_before_it_is_no_proof_against_a_message() -> None:
    tested = uplink(Limits(max_failures=1))
    now = 0.0
    for seq in range(1, 10):  # the collector works through its queue, slowly: each ack comes when the next is overdue
        tested.appended("alert", seq)
        sends(tested, now)
        tested.puback("alert", seq, now)
        now += 700.0
        if seq > 1:
            tested.acked("A", [(seq - 1, seq - 1)], now)
        action = tested.next(now)
        assert isinstance(action, Send)
        tested.puback("alert", action.seq, now)
    assert not tested.counters["quarantined"]


def test_poison_that_the_collector_passes_over_is_set_aside_only_after_acks_for_later_ones() -> None:
    tested = uplink()
    tested.appended("alert", 1)
    now, set_aside = drive(tested, 0.0, 24 * 3600.0, lambda _: False)
    assert set_aside == []
    rounds = 0
    for seq in range(2, 40):
        tested.appended("sample", seq)
        now, set_aside = drive(tested, now, now + 700.0, lambda sent: sent.seq != 1)
        rounds += 1
        if set_aside:
            break
    assert [(q.stream, q.seq) for q in set_aside] == [("alert", 1)]
    assert "never acknowledges it" in set_aside[0].reason
    assert rounds >= Limits().max_failures
    assert tested.idle


def test_a_bad_link_never_sets_anything_aside() -> None:
    tested = uplink(Limits(backlog_per_s=1e9, max_failures=3))
    tested.appended("alert", 1)
    now = 0.0
    for _ in range(300):
        action = tested.next(now)
        assert not isinstance(action, Quarantine)
        if isinstance(action, Connect):
            tested.connected(now)
        elif isinstance(action, Send):
            tested.disconnected(now, by_broker=False)
        else:
            now = min(action.until_s, now + 60)
    assert not tested.idle


class AckMachine(RuleBasedStateMachine):
    """Acks in any order, for anything, at any time: only what was sent is ever released, and each only once."""

    @initialize()
    def begin(self) -> None:
        self.tested = uplink(Limits(window=3, backlog_per_s=1e9))
        self.now = 0.0
        self.newest = dict.fromkeys(IDS, 0)
        self.sent: set[tuple[str, int]] = set()
        self.flying: list[tuple[str, int]] = []
        self.released: list[tuple[str, int]] = []

    @rule(stream=st.sampled_from(sorted(IDS)))
    def append(self, stream: str) -> None:
        self.newest[stream] += 1
        self.tested.appended(stream, self.newest[stream])

    @rule(pause=st.floats(0, 700))
    def step(self, pause: float) -> None:
        self.now += pause
        for _ in range(50):
            action = self.tested.next(self.now)
            if isinstance(action, Connect):
                self.tested.connected(self.now)
            elif isinstance(action, Send):
                assert (action.stream, action.seq) not in self.released
                self.sent.add((action.stream, action.seq))
                self.flying.append((action.stream, action.seq))
            else:
                assert not isinstance(action, Quarantine)
                break
        assert len(self.flying) <= 3

    @rule(count=st.integers(0, 3))
    def puback(self, count: int) -> None:
        for stream, seq in self.flying[:count]:
            self.tested.puback(stream, seq, self.now)
        del self.flying[:count]

    @rule()
    def cut(self) -> None:
        self.tested.disconnected(self.now)
        self.flying.clear()

    @rule(
        stream_id=st.sampled_from([*IDS.values(), "X"]),
        first=st.integers(1, 12),
        length=st.integers(0, 2**30) | st.integers(0, 3),
    )
    def ack(self, stream_id: str, first: int, length: int) -> None:
        stream = next((s for s, i in IDS.items() if i == stream_id), "X")
        for low, high in self.tested.acked(stream_id, [(first, first + length)], self.now):
            for seq in range(low, high + 1):
                assert (stream, seq) in self.sent
                assert (stream, seq) not in self.released
                self.released.append((stream, seq))

    @invariant()
    def nothing_is_forgotten(self) -> None:
        if hasattr(self, "tested"):
            appended = sum(self.newest.values())
            assert len(self.tested._messages) == appended - len(self.released)


TestAckMachine = AckMachine.TestCase
TestAckMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
