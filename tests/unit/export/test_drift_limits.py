"""Limits calibrated on a training fleet hold on fleets that it never saw, and do not hide a shift."""

import numpy as np
import numpy.typing as npt
import pytest

from edge_agent.contract.bundle import DriftCalibration, DriftReferenceVariable
from edge_agent.contract.drift_measure import psi
from edge_agent.pipeline.drift import bin_of, count
from export.drift_limits import Rows, calibrate
from export.drift_reference import edges_of

VEHICLES, WINDOWS = 40, 300
NAMES = ("steady", "individual")


def fleet(vehicles: int, seed: int, shift: float = 0.0) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.str_]]:
    """Values [R, 2] and vehicles [R]: one variable that every vehicle shows alike, one that tells vehicles apart."""
    random = np.random.default_rng(seed)
    own = random.normal(0, 1, vehicles)
    values = [
        np.stack([random.normal(shift, 1, WINDOWS), random.normal(own[v], 0.2, WINDOWS)], axis=1)
        for v in range(vehicles)
    ]
    return np.concatenate(values), np.repeat([f"EV_{v}" for v in range(vehicles)], WINDOWS)


@pytest.fixture(scope="module")
def calibrated() -> tuple[tuple[DriftReferenceVariable, ...], DriftCalibration, dict[str, tuple[float, ...]]]:
    values, vehicle = fleet(VEHICLES, 1)
    variables = tuple(
        DriftReferenceVariable(
            name=name, kind="feature", edges=(edges := edges_of(values[:, i])),
            counts={"driving": tuple(int(c) for c in count(edges, values[:, i]))},
        )
        for i, name in enumerate(NAMES)
    )  # fmt: skip
    end_s = np.tile(np.arange(WINDOWS) * 60.0, VEHICLES)
    strata = np.full(len(values), "driving")
    windows = {(f"EV_{v}", "driving"): np.arange(WINDOWS) * 60.0 for v in range(VEHICLES)}
    rows = Rows(variables, values, vehicle, strata, end_s, 1)
    calibration, limits = calibrate([rows], windows, false_alarm_rate=0.05, draws=500)
    assert calibration is not None
    return variables, calibration, {name: held["driving"] for name, held in limits.items()}


def alarms(calibrated, vehicles: int, fleets: int, shift: float = 0.0) -> int:  # type: ignore[no-untyped-def]
    variables, calibration, limits = calibrated
    place = next(i for i, s in enumerate(calibration.sizes) if (s.vehicles, s.windows) == (vehicles, 240))
    raised = 0
    for seed in range(fleets):
        values, _ = fleet(vehicles, 1000 + seed, shift)
        raised += any(
            float(psi(v.counts["driving"], count(v.edges, values[:, i]))) > limits[v.name][place]
            for i, v in enumerate(variables)
        )
    return raised


@pytest.mark.parametrize("vehicles", [1, 3, 10, 30])
def test_a_healthy_fleet_of_any_size_seldom_alarms(calibrated, vehicles: int) -> None:  # type: ignore[no-untyped-def]
    """At a stated 5 % of looks, 200 fleets give 10; 24 would be four standard deviations more."""
    assert alarms(calibrated, vehicles, 200) < 24


@pytest.mark.parametrize("vehicles", [1, 3, 10, 30])
def test_a_shift_of_half_a_deviation_is_found_in_a_fleet_of_any_size(calibrated, vehicles: int) -> None:  # type: ignore[no-untyped-def]
    assert alarms(calibrated, vehicles, 50, shift=0.5) >= 45


def test_what_tells_vehicles_apart_has_a_wider_limit_that_narrows_with_the_vehicles(calibrated) -> None:  # type: ignore[no-untyped-def]
    _, calibration, limits = calibrated
    widths = [limits["individual"][i] for i, s in enumerate(calibration.sizes) if s.windows == 240]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > 3.0  # one vehicle stands in a corner of the fleet
    assert limits["steady"][4] < 0.5 < limits["individual"][4]


def test_too_few_vehicles_give_no_limits_rather_than_wrong_ones() -> None:
    values, vehicle = fleet(7, 1)
    variable = DriftReferenceVariable(name="steady", kind="feature", edges=(0.0,), counts={})
    end_s = np.tile(np.arange(WINDOWS) * 60.0, 7)
    windows = {(f"EV_{v}", "driving"): np.arange(WINDOWS) * 60.0 for v in range(7)}
    rows = Rows((variable,), values[:, :1], vehicle, np.full(len(values), "driving"), end_s, 1)
    assert calibrate([rows], windows, false_alarm_rate=0.01, draws=20) == (None, {})


def test_a_value_belongs_to_the_bin_that_counting_puts_it_in() -> None:
    values = np.array([-1.0, 0.0, 0.5, 1.0, np.nan, np.inf])
    bins = bin_of((0.0, 1.0), values)
    assert bins.tolist() == [0, 1, 1, 2, 3, 2]
    assert np.bincount(bins, minlength=4).tolist() == count((0.0, 1.0), values).tolist()
