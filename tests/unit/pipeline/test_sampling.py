"""Which windows are sent: around alerts, a random share, within the budget, and the same again after a restart."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.contract.messages import Severity, Transition
from edge_agent.contract.samples import unpack
from edge_agent.pipeline import sampling
from edge_agent.pipeline.outcomes import AlertChange, Sampled, Window
from edge_agent.pipeline.sampling import DAY_S, Budget, Sampler, SamplingLimits, message_bytes

STRIDE_S, LENGTH_S = 60.0, 300.0
SIGNALS = ("Pump.Flow", "Pump.Pressure")
FREE = SamplingLimits(bytes_a_day=10**9, random_share=0.0, windows_before=2, windows_after=1)


def sampler(limits: SamplingLimits = FREE, timeline: str = "") -> Sampler:
    return Sampler(limits, vehicle_id="EV_1", signals=SIGNALS, length_s=LENGTH_S, timeline=timeline, state_id="s",
                   release=3)  # fmt: skip


def window(end_s: float, *, rows: int = 20) -> Window:
    values = np.sin(np.arange(rows * 2, dtype=np.float32).reshape(rows, 2) + end_s).astype(np.float32)
    return Window(end_s, values, np.full((3, 2), 3.7, np.float32), np.full((3, 1), 25.0, np.float32), STRIDE_S, 1.0)


def change(
    time_s: float, kind: str = "charging_fault", transition: Transition = "raised", severity: Severity = "high"
) -> AlertChange:
    return AlertChange(time_s, time_s, kind, transition, severity, "model", key=f"/{time_s}")


def run(target: Sampler, ends: list[float], alerts: dict[float, list[AlertChange]] | None = None) -> list[Sampled]:
    found: list[Sampled] = []
    for end_s in ends:
        state = {"trend": np.full((1, 2), end_s, np.float32)}
        found += target.take(window(end_s), state, "driving", (alerts or {}).get(end_s, []))
    return found


def ends(count: int, first_s: float = 300.0) -> list[float]:
    return [first_s + STRIDE_S * n for n in range(count)]


def test_an_alert_brings_its_window_then_those_before_it_nearest_first_then_those_after_it() -> None:
    found = run(sampler(), ends(40), {1500.0: [change(1500.0)]})
    assert [s.end_s for s in found] == [1500.0, 1200.0, 900.0, 1800.0]
    assert {(s.reason, s.failure_type, s.state_id, s.model_release) for s in found} == {
        ("alert", "charging_fault", "s", 3)
    }
    assert len({s.alert_id for s in found}) == 1


def test_a_sample_is_the_raw_window_with_the_state_from_before_it() -> None:
    (found,) = run(sampler(SamplingLimits(10**9, 0.0, 0, 0)), ends(5), {420.0: [change(420.0)]})
    unpacked = unpack(found.packed)
    assert unpacked.signals == SIGNALS
    assert np.abs(unpacked.values - window(420.0).values).max() < 2 / 65_000
    assert unpacked.state["trend"].tolist() == [[420.0, 420.0]]


def test_of_several_alerts_at_once_the_most_severe_names_the_sample() -> None:
    alerts = [
        change(600.0, "charging_fault", severity="low"),
        change(600.0, "thermal_runaway_risk", severity="critical"),
    ]
    assert {s.failure_type for s in run(sampler(), ends(10), {600.0: alerts})} == {"thermal_runaway_risk"}


def test_the_end_of_an_alert_brings_nothing() -> None:
    assert run(sampler(), ends(20), {900.0: [change(900.0, transition="cleared")]}) == []


def test_a_guards_alert_brings_the_next_window_that_holds_its_time() -> None:
    target = sampler(SamplingLimits(10**9, 0.0, 0, 0))
    run(target, ends(3))
    target.alert(change(455.0))
    assert [s.end_s for s in run(target, [480.0, 540.0])] == [480.0]
    target.alert(change(545.0))
    assert run(target, [2000.0]) == [], "a gap came first: no window holds it"
    assert target.counters["samples_without_window"] == 1


def test_windows_from_long_before_the_alert_are_none_of_it() -> None:
    times = [300.0, 600.0, 50_000.0]
    assert [s.end_s for s in run(sampler(), times, {50_000.0: [change(50_000.0)]})] == [50_000.0]


def test_a_clock_set_back_leaves_no_window_before_an_alert_that_lies_behind_it() -> None:
    found = run(sampler(), [9_000.0, 9_300.0, 9_600.0, 300.0], {300.0: [change(300.0)]})
    assert [s.end_s for s in found] == [300.0]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 59), max_size=8),
    st.integers(0, 3),
    st.integers(0, 3),
    st.sampled_from([0.0, 0.1, 1.0]),
)
def test_no_window_is_sent_twice_and_only_alerts_own_windows_may_overlap(
    at: list[int], before: int, after: int, share: float
) -> None:
    times = ends(60)
    alerts = {times[n]: [change(times[n])] for n in at}
    found = run(sampler(SamplingLimits(10**9, share, before, after)), times, alerts)
    assert len({s.key for s in found}) == len(found)
    assert {times[n] for n in at} <= {s.end_s for s in found}, "an alert's own window is always among them"
    others = sorted(s.end_s for s in found if s.reason == "alert" and s.end_s not in alerts)
    if len(set(at)) <= 1:
        assert all(later - earlier >= LENGTH_S for earlier, later in pairwise(others))
    assert len(others) <= (before + after) * len(set(at))


def test_the_random_share_is_about_what_was_asked_and_the_same_each_time() -> None:
    limits = SamplingLimits(10**12, 0.02, 0, 0)
    first = [s.key for s in run(sampler(limits), ends(5_000))]
    assert 60 < len(first) < 140
    assert [s.key for s in run(sampler(limits), ends(5_000))] == first
    other_boot = [s.key.rpartition("/")[2] for s in run(sampler(limits, "boot-2"), ends(5_000))]
    assert other_boot != [key.rpartition("/")[2] for key in first], "else each boot would choose the same minutes"


def test_a_window_without_a_score_is_none_of_the_random_share_but_may_stand_at_an_alert() -> None:
    target = sampler(SamplingLimits(10**9, 1.0, 0, 0))
    assert target.take(window(300.0), {}, "parked", [], scored=False) == []
    target.alert(change(330.0))
    (found,) = target.take(window(360.0), {}, "parked", [], scored=False)
    assert unpack(found.packed).state == {}


@given(
    st.integers(1_000, 1_000_000),
    st.lists(
        st.tuples(st.floats(-1e5, 2e5), st.integers(1, 50_000), st.sampled_from(["alert", "random"])), max_size=60
    ),
)
def test_the_budget_is_never_passed_and_the_random_share_has_half_of_it(
    size: int, steps: list[tuple[float, int, str]]
) -> None:
    budget, now_s, forward_s, spent = Budget(size), 0.0, 0.0, {"alert": 0, "random": 0}
    for i, (step_s, cost, reason) in enumerate(steps):
        now_s += step_s
        forward_s += max(0.0, step_s) if i else 0.0
        if budget.spend(now_s, cost, reason):  # type: ignore[arg-type]
            spent[reason] += cost
        earned = size * (1 + forward_s / DAY_S) + 1e-3
        assert sum(spent.values()) <= earned
        assert spent["random"] <= earned / 2 + 1e-3


def test_what_the_budget_refuses_is_counted_and_an_alert_still_finds_its_half() -> None:
    cost = message_bytes(len(run(sampler(), [300.0], {300.0: [change(300.0)]})[0].packed))
    target = sampler(SamplingLimits(4 * cost + 40, 1.0, 0, 0))
    found = run(target, ends(8), {720.0: [change(720.0)]})
    assert [(s.reason, s.end_s) for s in found] == [("random", 300.0), ("random", 360.0), ("alert", 720.0)]
    assert target.counters["samples_over_budget.random"] == 5
    assert target.counters["samples.alert"] == 1
    assert cost * 3 - 40 <= target.counters["sample_bytes"] <= cost * 3 + 40
    assert run(sampler(SamplingLimits(0, 1.0, 2, 1)), ends(8), {720.0: [change(720.0)]}) == [], "0 turns samples off"


def test_a_window_that_no_receiver_would_unpack_is_refused_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "MAX_UNPACKED_BYTES", 200)
    target = sampler()
    assert run(target, [300.0], {300.0: [change(300.0)]}) == []
    assert target.counters["samples_too_large"] == 1


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 40), st.lists(st.integers(0, 39), max_size=4), st.sampled_from(["", "boot"]))
def test_another_sampler_goes_on_exactly_from_a_saved_state(cut: int, at: list[int], timeline: str) -> None:
    limits = SamplingLimits(20_000, 0.2, 2, 2)
    times = ends(40)
    alerts = {times[n]: [change(times[n])] for n in at}
    whole = run(sampler(limits, timeline), times, alerts)
    first, second = sampler(limits, timeline), sampler(limits, timeline)
    found = run(first, times[:cut], alerts)
    second.restore(first.state())
    assert second.state() == first.state()
    assert found + run(second, times[cut:], alerts) == whole


def test_a_saved_state_of_another_boot_moves_in_time_and_keeps_its_keys() -> None:
    first, second = sampler(timeline="boot-1"), sampler(timeline="boot-2")
    run(first, ends(10))
    second.restore(first.state(), shift_s=10_000.0)
    found = run(second, [11_200.0], {11_200.0: [change(11_200.0)]})
    assert [(s.end_s, s.key) for s in found] == [
        (11_200.0, "boot-2/11200000"), (10_600.0, "boot-1/600000"), (10_300.0, "boot-1/300000"),
    ]  # fmt: skip
