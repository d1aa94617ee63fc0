"""Evidence to verdicts, verdicts to alerts; what vehicles weigh; which limit holds."""

import math

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud.drift import merge
from cloud.drift.decide import Judged, Open, Scope, change, judge, limit
from cloud.drift.limits import Drift
from cloud.drift.merge import Merge, Size
from cloud.drift.statistics import Distances
from edge_agent.contract.bundle import DriftCalibration, DriftReferenceVariable, DriftSize

LIMITS = Drift()
SIZES = tuple(DriftSize(vehicles=v, windows=w) for w in (60, 240) for v in (1, 10))
CALIBRATION = DriftCalibration(false_alarm_rate=0.01, draws=100, sizes=SIZES)
VARIABLE = DriftReferenceVariable(
    name="x", kind="signal", edges=(0.0,), counts={"driving": (500, 500, 0)},
    limits={"driving": (8.0, 0.8, 4.0, 0.2)},
)  # fmt: skip
FLEET = Size(windows=5000, vehicles=10, effective_vehicles=10.0, windows_each=500.0)


def verdict(psi: float, *, size: Size = FLEET, scope: Scope = "fleet", reference: int = 1000,
            calibration: DriftCalibration | None = CALIBRATION) -> Judged:  # fmt: skip
    return judge(
        VARIABLE, "driving", Distances(psi, 0.1, 0.1), size=size, reference_windows=reference, scope=scope,
        calibration=calibration, limits=LIMITS,
    )  # fmt: skip


@given(st.lists(st.integers(60, 5000), min_size=1, max_size=40))
def test_merged_counts_are_all_windows_in_the_shares_of_the_vehicles(windows: list[int]) -> None:
    held = {f"EV_{i}": n for i, n in enumerate(windows)}
    planned = merge.plan(held, LIMITS)
    merged = Merge(planned, 2)
    for i, (vehicle, n) in enumerate(held.items()):
        merged.add(vehicle, np.array([n, 0]) if i == 0 else np.array([0, n]))
    assert merged.row.sum() == pytest.approx(sum(windows))
    cap = max(LIMITS.max_vehicle_share, 1 / len(windows))
    assert merged.row[0] / sum(windows) <= cap + 1e-9
    assert planned.size.effective_vehicles <= len(windows) + 1e-9


def test_a_flood_from_one_vehicle_weighs_no_more_than_the_cap() -> None:
    held = {"flood": 1_000_000, **{f"EV_{i}": 300 for i in range(39)}}
    merged = Merge(merge.plan(held, LIMITS), 1)
    merged.add("flood", np.array([1_000_000]))
    assert merged.row[0] / sum(held.values()) == pytest.approx(0.05)


def test_a_vehicle_with_too_few_windows_is_left_out_of_a_merge_and_weighs_nothing() -> None:
    planned = merge.plan({"a": 59, "b": 60, "c": 600}, LIMITS)
    assert set(planned.weights) == {"b", "c"}
    merged = Merge(planned, 1)
    merged.add("a", np.array([59]))
    assert merged.row.tolist() == [0.0]
    assert merge.plan({"a": 3}, LIMITS).size == Size(0, 0, 0.0, 0.0)


def test_a_limit_is_the_one_calibrated_for_so_many_vehicles_and_windows() -> None:
    def at(vehicles: float, windows: float) -> float | None:
        return limit(VARIABLE, "driving", CALIBRATION, Size(1000, 10, vehicles, windows), LIMITS)[0]

    assert at(1, 60) == pytest.approx(8.0)
    assert at(10, 239) == pytest.approx(0.8)
    assert at(10, 240) == pytest.approx(0.2)
    assert at(math.sqrt(10), 240) == pytest.approx(math.sqrt(4.0 * 0.2))
    assert at(1000, 1000) == pytest.approx(0.2)  # nothing is promised beyond what was calibrated
    assert at(10, 59) is None


def test_a_limit_is_never_below_the_least_shift_worth_an_alert() -> None:
    variable = msgspec.structs.replace(VARIABLE, limits={"driving": (1.0, 1.0, 1.0, 0.003)})
    assert limit(variable, "driving", CALIBRATION, FLEET, LIMITS) == (LIMITS.least_psi, "release")


def test_a_release_without_calibrated_limits_is_judged_by_the_configuration_and_it_says_so() -> None:
    found = verdict(0.3, calibration=None)
    assert (found.verdict, found.threshold, found.threshold_source) == ("drift", LIMITS.psi, "config")


def test_drift_begins_at_the_limit() -> None:
    assert verdict(0.2).verdict == "drift"
    assert verdict(0.199).verdict == "ok"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"size": Size(499, 10, 10.0, 50.0)}, "499 windows, at least 500"),
        ({"size": Size(5000, 2, 2.0, 2500.0)}, "2 vehicles, at least 3"),
        ({"reference": 499}, "reference has 499"),
        ({"size": Size(5000, 500, 500.0, 10.0)}, "no limit for so few windows"),
    ],
)
def test_too_few_is_no_verdict_and_says_of_what(changes: dict[str, object], why: str) -> None:
    found = verdict(99.0, **changes)  # type: ignore[arg-type]
    assert found.verdict == "too_few"
    assert why in found.why


def test_two_vehicles_are_enough_for_a_vehicles_own_verdict() -> None:
    assert verdict(99.0, scope="vehicle", size=Size(600, 1, 1.0, 600.0)).verdict == "drift"


def test_an_alert_is_raised_once_kept_between_the_limits_and_cleared_below_the_lower_one() -> None:
    def step(psi: float, open_alerts: list[Open]) -> tuple[int, int, int]:
        changes = change([verdict(psi)], open_alerts, now_s=1000.0, limits=LIMITS)
        return len(changes.raised), len(changes.updated), len(changes.cleared)

    standing = [Open(7, "x", "driving", 900.0)]
    assert step(0.25, []) == (1, 0, 0)
    assert step(0.25, standing) == (0, 1, 0)
    assert step(0.19, standing) == (0, 1, 0)
    assert step(0.2 * LIMITS.clear_ratio - 1e-6, standing) == (0, 0, 1)
    assert step(0.1, []) == (0, 0, 0)


def test_an_alert_of_which_nothing_more_is_heard_stands_for_one_span_and_is_then_cleared() -> None:
    few = verdict(9.0, size=Size(10, 1, 1.0, 10.0))
    span = LIMITS.window_hours * 3600
    for judged in ([few], []):
        assert change(judged, [Open(7, "x", "driving", 0.0)], now_s=span, limits=LIMITS).cleared == ()
        assert change(judged, [Open(7, "x", "driving", 0.0)], now_s=span + 1, limits=LIMITS).cleared == (7,)


def test_alerts_of_other_strata_are_not_mixed_up() -> None:
    changes = change([verdict(0.25)], [Open(7, "x", "charging", 900.0)], now_s=1000.0, limits=LIMITS)
    assert len(changes.raised) == 1
    assert changes.cleared == ()
