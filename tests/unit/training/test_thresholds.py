from dataclasses import replace

import numpy as np
import pytest

from cloud.training.config import ThresholdPolicies
from cloud.training.dataset import Windows
from cloud.training.events import alerts, false_alarms, healthy_months, hold_against, k_of_n
from cloud.training.labels import Episode, label_windows
from cloud.training.thresholds import Scored, budget_kept, budget_threshold, choose_thresholds, precision_threshold
from edge_agent.contract.bundle import Decision, TypeThreshold
from edge_agent.contract.signals import FAILURE_TYPES

KIND = "inverter_overheating"
RANDOM = np.random.default_rng(5)


def windows_of(vehicles: int, count: int, episodes: dict[str, list[Episode]]) -> Windows:
    names = [f"V{i:02d}" for i in range(vehicles)]
    end_s = np.tile(np.arange(count) * 60.0 + 300.0, vehicles)
    parts = [
        label_windows(np.arange(count) * 60.0 + 300.0, episodes.get(n, []), horizon_s=1e9, window_length_s=300.0)
        for n in names
    ]
    total = vehicles * count

    def joined(name: str):
        return np.concatenate([getattr(p, name) for p in parts])

    return Windows(
        vehicle=np.repeat(names, count), end_s=end_s, stratum=np.full(total, "driving"),
        variant=np.full(total, "natural"), failure=joined("failure"), type_index=joined("type_index"),
        severity_index=joined("severity_index"), healthy=joined("healthy"), at_work=joined("at_work"),
        features=np.zeros((total, 1), np.float32), pooled=np.zeros((0, 1, 1), np.float32),
        pooled_row=np.zeros(0, np.int64),
    )  # fmt: skip


@pytest.fixture
def fleet():
    failing = Episode("V00", KIND, 3000.0, (6000.0, 9000.0, 12000.0, 15000.0), 17000.0, 18000.0)
    episodes = {"V00": [failing]}
    windows = windows_of(12, 300, episodes)
    value = RANDOM.beta(2, 8, len(windows))
    value[windows.type_index >= 0] = RANDOM.beta(12, 2, int((windows.type_index >= 0).sum()))
    return windows, value, episodes


def test_the_budget_is_kept_by_the_decision_table_itself(fleet):
    windows, value, episodes = fleet
    config = ThresholdPolicies(episodes_per_vehicle_month=5.0)
    at = budget_threshold(Scored.of(KIND, windows, value), episodes, config)
    assert at is not None
    found = alerts(windows, value, TypeThreshold(raise_at=at, clear_below=at * 0.6), config.decision)
    assert len(false_alarms(found, windows)) <= 5.0 * healthy_months(windows)
    assert all(f.detected for f in hold_against(found, windows, episodes, KIND))


def test_a_tighter_budget_never_lowers_the_threshold(fleet):
    windows, value, episodes = fleet
    head = Scored.of(KIND, windows, value)
    limits = [
        budget_threshold(head, episodes, ThresholdPolicies(episodes_per_vehicle_month=rate, margin=0.0))
        for rate in (0.0, 20.0, 200.0)
    ]
    assert limits[0] >= limits[1] >= limits[2]


def test_one_odd_healthy_vehicle_does_not_silence_a_head(fleet):
    windows, value, episodes = fleet
    odd = value.copy()
    odd[windows.vehicle == "V05"] = 0.999  # above every failure: no budget below one episode can be kept
    head = Scored.of(KIND, windows, odd)
    at = budget_threshold(head, episodes, ThresholdPolicies(episodes_per_vehicle_month=0.0))
    assert at is not None
    found = alerts(windows, odd, TypeThreshold(raise_at=at, clear_below=at * 0.6), Decision())
    assert all(f.detected for f in hold_against(found, windows, episodes, KIND))
    assert false_alarms(found, windows), "what it costs shows where it is measured"


def seen_twice(windows: Windows, variant: str) -> Windows:
    return Windows.together(windows, replace(windows, variant=np.full(len(windows), variant)))


def test_a_vehicles_day_counts_once_however_many_views_of_it_there_are(fleet):
    windows, *_ = fleet
    assert healthy_months(seen_twice(windows, "fresh")) == healthy_months(windows) == pytest.approx(12 / 30)


def test_views_of_the_same_days_neither_widen_nor_spend_the_budget(fleet):
    windows, value, episodes = fleet
    noisy = value.copy()
    noisy[windows.healthy] = np.minimum(0.98, 1.5 * value[windows.healthy])  # an empty state is the worse for it
    config = ThresholdPolicies(episodes_per_vehicle_month=10.0)
    alone = choose_thresholds([Scored.of(KIND, windows, value)], episodes, config).policy
    views = Scored.of(KIND, seen_twice(windows, "fresh"), np.concatenate([value, noisy]))
    together = choose_thresholds([views], episodes, config).policy
    assert together.types == alone.types
    for quantity in ("healthy_vehicle_months", "false_alarm_episodes_per_vehicle_month", "budget_kept"):
        assert together.measured[f"{KIND}.{quantity}"] == alone.measured[f"{KIND}.{quantity}"]


def test_it_is_said_for_each_head_whether_the_budget_is_kept(fleet):
    windows, value, episodes = fleet
    odd = value.copy()
    odd[windows.vehicle == "V05"] = 0.999
    thresholds = choose_thresholds(
        [Scored.of(KIND, windows, odd), Scored.of("charging_fault", windows, value)], episodes, ThresholdPolicies()
    )
    assert thresholds.policy.measured[f"{KIND}.budget_kept"] == 0.0
    assert thresholds.policy.measured["charging_fault.budget_kept"] == 1.0
    assert budget_kept(thresholds) == {KIND: False, "charging_fault": True}
    assert "budget_kept" in thresholds.policy.description


def test_k_of_n_is_exactly_where_the_decision_table_raises(fleet):
    windows, value, _ = fleet
    rule = Decision(k=2, n=3, cooldown_s=0.0)
    within = k_of_n(windows, value, rule)
    for at in (0.35, 0.5, 0.7):
        found = alerts(windows, value, TypeThreshold(raise_at=at, clear_below=at / 2), rule)
        for (vehicle, variant), rows in windows.sequences().items():
            over = [r for r in rows if within[r] >= at]
            first = [a.row for a in found if (a.vehicle_id, a.variant) == (vehicle, variant)][:1]
            assert first == over[:1]


def test_an_alert_in_the_gray_zone_is_early_and_not_false(fleet):
    windows, value, episodes = fleet
    early = np.zeros(len(value))
    gray = np.flatnonzero((windows.vehicle == "V00") & ~windows.healthy & (windows.type_index < 0))[:3]
    early[gray] = 1.0
    found = alerts(windows, early, TypeThreshold(raise_at=0.5, clear_below=0.3), Decision())
    assert len(found) == 1
    assert not false_alarms(found, windows)
    (held,) = hold_against(found, windows, episodes, KIND)
    assert held.detected
    assert held.lead_s > 10_000


def test_precision_threshold_is_the_lowest_that_keeps_the_precision():
    value = np.array([0.9, 0.8, 0.7, 0.6, 0.5])
    truth = np.array([True, True, False, True, False])
    assert precision_threshold(value, truth, 0.75) == 0.6
    assert precision_threshold(value, ~truth & False, 0.75) is None


def test_all_three_policies_are_written_with_what_was_measured(fleet):
    windows, value, episodes = fleet
    head = Scored.of(KIND, windows, value)
    thresholds = choose_thresholds([head], episodes, ThresholdPolicies())
    assert set(thresholds.policies) == {"precision_80", "percentile_95", "false_alarm_budget"}
    assert thresholds.active == "false_alarm_budget"
    percentile = thresholds.policies["percentile_95"].types[KIND]
    assert (value[windows.healthy] > percentile.raise_at).mean() == pytest.approx(0.05, abs=0.005)
    precision = thresholds.policies["precision_80"].measured
    assert precision[f"{KIND}.window_precision"] >= 0.8
    assert precision[f"{KIND}.prevalence"] == pytest.approx(head.positive[head.used].mean())
    for policy in thresholds.policies.values():
        assert all(t.clear_below < t.raise_at for t in policy.types.values())


def test_a_head_is_judged_without_its_gray_zone(fleet):
    windows, value, _ = fleet
    head = Scored.of(KIND, windows, value)
    gray = ~windows.healthy & (windows.type_index < 0)
    assert gray.any()
    assert not head.used[gray].any()
    other = replace(windows, type_index=np.where(head.positive, FAILURE_TYPES.index("charging_fault"), -1))
    assert not Scored.of("charging_fault", other, value).used[gray].any()
